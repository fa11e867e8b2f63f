// Kernels with a mistake each, to see that the emulator finds it.
#include <string>

#include "simt.cuh"

namespace {

using namespace kegfast;

// Every thread writes a word and reads its neighbour's: right only with a barrier between.
template <bool kBarrier>
struct Neighbour {
  static constexpr int kThreads = 64;
  struct Params {
    float* out;  // [64]
  };
  static void run(const Params& p) {
    float* words = reinterpret_cast<float*>(simt::shared());
    const int t = simt::thread();
    words[t] = float(t);
    if (kBarrier) simt::barrier();
    p.out[t] = words[(t + 1) % kThreads];
  }
};

// Reads an asynchronous copy without waiting for it.
template <bool kWait>
struct Copied {
  static constexpr int kThreads = 32;
  struct Params {
    const float* in;  // [128]
    float* out;       // [128]
  };
  static void run(const Params& p) {
    float* words = reinterpret_cast<float*>(simt::shared());
    const int t = simt::thread();
    simt::cp_async16(words + 4 * t, p.in + 4 * t, true);
    simt::cp_async_commit();
    if (kWait) simt::cp_async_wait<0>();
    for (int i = 0; i < 4; ++i) p.out[4 * t + i] = words[4 * t + i];
  }
};

// Half the warp goes to the barrier, half to a shuffle.
struct Diverged {
  static constexpr int kThreads = 32;
  struct Params {
    float* out;
  };
  static void run(const Params& p) {
    if (simt::lane() < 16) {
      simt::barrier();
    } else {
      *p.out = simt::shuffle_xor(1.0f, 1);
    }
  }
};

struct PastTheEnd {
  static constexpr int kThreads = 32;
  struct Params {
    float* out;  // [32]
  };
  static void run(const Params& p) {
    float* words = reinterpret_cast<float*>(simt::shared());
    words[simt::thread()] = 0;
    p.out[simt::thread()] = words[simt::thread() + 1];
  }
};

std::string error;

template <class Kernel>
int emulate(const typename Kernel::Params& params, size_t shared_bytes, int descending) {
  try {
    emulator::launch<Kernel>({1, 1, 1}, shared_bytes,
                             descending ? emulator::Order::descending : emulator::Order::ascending, params);
  } catch (const std::exception& caught) {
    error = caught.what();
    return 1;
  }
  return 0;
}

}  // namespace

extern "C" const char* broken_error() {
  return error.c_str();
}
extern "C" int emulate_neighbour(float* out, int with_barrier, int descending) {
  return with_barrier ? emulate<Neighbour<true>>({out}, 256, descending)
                      : emulate<Neighbour<false>>({out}, 256, descending);
}
extern "C" int emulate_copied(const float* in, float* out, int with_wait, int descending) {
  return with_wait ? emulate<Copied<true>>({in, out}, 512, descending)
                   : emulate<Copied<false>>({in, out}, 512, descending);
}
extern "C" int emulate_diverged(float* out) {
  return emulate<Diverged>({out}, 0, 0);
}
extern "C" int emulate_past_the_end(float* out) {
  return emulate<PastTheEnd>({out}, 128, 0);
}
