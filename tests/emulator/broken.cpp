// Kernels with a mistake each, to see that the emulator finds it.
#include <string>

#include "simt.cuh"

namespace {

using namespace kegfast;

// Every thread writes a word and reads its neighbor's: right only with a barrier between.
template <bool kBarrier>
struct Neighbor {
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

// The first warp is right if it comes after the second or after the third, not if it comes first.
struct First {
  static constexpr int kThreads = 96;
  struct Params {
    float* out;  // [1]
  };
  static void run(const Params& p) {
    float* words = reinterpret_cast<float*>(simt::shared());
    if (simt::warp() != 1 && simt::lane() == 0) words[simt::warp()] = 1;
    if (simt::thread() == 32) *p.out = words[0] == 1 || words[2] == 1 ? 1 : 0;
  }
};

// A block reads what its neighbor has written.
struct InTurn {
  static constexpr int kThreads = 32;
  struct Params {
    float* out;  // [blocks + 1]
  };
  static void run(const Params& p) {
    if (simt::thread() == 0) p.out[simt::block().x + 1] = p.out[simt::block().x] + 1;
  }
};

// Reads what nobody wrote; as NaN it would pass for 0.
struct Unwritten {
  static constexpr int kThreads = 32;
  struct Params {
    float* out;  // [32]
  };
  static void run(const Params& p) {
    p.out[simt::thread()] = reinterpret_cast<float*>(simt::shared())[simt::thread()] > 0 ? 1 : 0;
  }
};

// 1 + 8 x 2^-25: a tensor core drops every one of them.
struct Truncated {
  static constexpr int kThreads = 32;
  struct Params {
    float* out;  // [32]
  };
  static void run(const Params& p) {
    const uint32_t x = simt::float_bits(std::ldexp(1.0f, -12)), y = simt::float_bits(std::ldexp(1.0f, -13));
    const uint32_t a[4] = {x, x, x, x}, b[2] = {y, y};
    float d[4] = {1, 1, 1, 1};
    simt::mma(d, a, b, float{});
    p.out[simt::thread()] = d[0];
  }
};

// Two teams that pass different numbers of barriers: of the block's it may not, of their own they may.
template <bool kOwn>
struct Teams {
  static constexpr int kThreads = 128;
  struct Params {
    float* out;  // [2]
  };
  static void run(const Params& p) {
    const int team = simt::thread() / 64;
    for (int i = 0; i <= team; ++i) {
      if constexpr (kOwn) {
        simt::part_barrier<64>(1 + team);
      } else {
        simt::barrier();
      }
    }
    if (simt::thread() % 64 == 0) p.out[team] = float(team);
  }
};

struct Misaligned {
  static constexpr int kThreads = 32;
  struct Params {
    float* out;  // [32]
  };
  static void run(const Params& p) {
    float* words = reinterpret_cast<float*>(simt::shared()) + simt::lane();
    *reinterpret_cast<simt::Float4*>(words) = {0, 1, 2, 3};
    p.out[simt::lane()] = words[0];
  }
};

// 16 bytes at an address that is no multiple of 16, by each way there is; kWay 0 makes no mistake.
template <int kWay>
struct OffBySome {
  static constexpr int kThreads = 32;
  struct Params {
    float* out;  // [128 + 1], at a multiple of 16
  };
  static void run(const Params& p) {
    char* words = simt::shared();
    float* out = p.out + 4 * simt::lane();
    simt::store_shared16(words + 16 * simt::lane() + (kWay == 1 ? 4 : 0), {{0, 0, 0, 0}});
    simt::warp_barrier();
    const simt::Words4 v = simt::load_shared16(words + 16 * simt::lane() + (kWay == 2 ? 8 : 0));
    simt::store_global16(out + (kWay == 3 ? 1 : 0), v);
    simt::load_global16(out + (kWay == 4 ? 1 : 0));
    uint32_t r[4];
    simt::ldmatrix_x4(r, words + 16 * simt::lane() + (kWay == 5 ? 4 : 0));
    simt::cp_async16(words + 16 * simt::lane() + (kWay == 6 ? 8 : 0), out + (kWay == 7 ? 1 : 0), true);
    simt::cp_async_commit();
    simt::cp_async_wait<0>();
  }
};

// A box to shared memory and back, times two; with a mistake of each kind.
template <int kMistake>
struct Boxed {
  static constexpr int kThreads = 64;
  struct Params {
    simt::TensorMap from, to;
  };
  static void run(const Params& p) {
    uint16_t* in = reinterpret_cast<uint16_t*>(simt::shared());
    uint16_t* out = in + 1024;
    simt::Arrival* arrival = reinterpret_cast<simt::Arrival*>(out + 1024);
    if (simt::thread() == 0) {
      simt::arrival_init(arrival);
      simt::bulk_load(in, p.from, 0, -1, 0, 0, 4 * 128, arrival);
      if (kMistake == 1) simt::bulk_load(in, p.from, 0, -1, 0, 0, 4 * 128, arrival);
    }
    simt::barrier();
    if (kMistake != 2) simt::arrival_wait(arrival, 0);
    for (int row = 0; row < 4; ++row) {
      const int at = simt::in_box(row, 2 * simt::thread()) / 2;
      out[at] = uint16_t(2 * in[at]);
    }
    if (kMistake != 3) simt::bulk_fence();
    simt::barrier();
    if (simt::thread() == 0) {
      simt::bulk_store(p.to, 0, -1, 0, 0, out);
      if (kMistake != 4) simt::bulk_store_wait();
    }
    simt::barrier();
    for (int row = 0; row < 4; ++row) out[simt::in_box(row, 2 * simt::thread()) / 2] = 0;
    if (kMistake == 4) simt::bulk_fence();
  }
};

std::string error;

template <class Kernel>
int emulate(const typename Kernel::Params& params, size_t shared_bytes, int order, int blocks = 1) {
  try {
    emulator::launch<Kernel>({blocks, 1, 1}, shared_bytes, emulator::Order(order), params);
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
extern "C" int emulate_neighbor(float* out, int with_barrier, int order) {
  return with_barrier ? emulate<Neighbor<true>>({out}, 256, order)
                      : emulate<Neighbor<false>>({out}, 256, order);
}
extern "C" int emulate_copied(const float* in, float* out, int with_wait, int order) {
  return with_wait ? emulate<Copied<true>>({in, out}, 512, order)
                   : emulate<Copied<false>>({in, out}, 512, order);
}
extern "C" int emulate_diverged(float* out) {
  return emulate<Diverged>({out}, 0, 0);
}
extern "C" int emulate_past_the_end(float* out) {
  return emulate<PastTheEnd>({out}, 128, 0);
}
extern "C" int emulate_first(float* out, int order) {
  return emulate<First>({out}, 12, order);
}
extern "C" int emulate_in_turn(float* out, int order) {
  return emulate<InTurn>({out}, 0, order, 4);
}
extern "C" int emulate_unwritten(float* out, int order) {
  return emulate<Unwritten>({out}, 128, order);
}
extern "C" int emulate_truncated(float* out) {
  return emulate<Truncated>({out}, 0, 0);
}
extern "C" int emulate_teams(float* out, int own, int order) {
  return own ? emulate<Teams<true>>({out}, 0, order) : emulate<Teams<false>>({out}, 0, order);
}
extern "C" int emulate_shared(float* out, int64_t bytes) {
  return emulate<Unwritten>({out}, size_t(bytes), 0);
}
extern "C" int emulate_misaligned(float* out) {
  return emulate<Misaligned>({out}, 36 * sizeof(float), 0);
}
extern "C" int emulate_off_by_some(float* out, int way) {  // [129]
  const size_t bytes = 33 * 16;
  if (way == 1) return emulate<OffBySome<1>>({out}, bytes, 0);
  if (way == 2) return emulate<OffBySome<2>>({out}, bytes, 0);
  if (way == 3) return emulate<OffBySome<3>>({out}, bytes, 0);
  if (way == 4) return emulate<OffBySome<4>>({out}, bytes, 0);
  if (way == 5) return emulate<OffBySome<5>>({out}, bytes, 0);
  if (way == 6) return emulate<OffBySome<6>>({out}, bytes, 0);
  if (way == 7) return emulate<OffBySome<7>>({out}, bytes, 0);
  return emulate<OffBySome<0>>({out}, bytes, 0);
}
extern "C" int emulate_tensor_map(int64_t pixel, int64_t row,
                                  int64_t image) {  // of a tensor that nobody reads
  try {
    simt::make_tensor_map({reinterpret_cast<void*>(1024), {40, 3, 2, 1}, {pixel, row, image}, {2, 2, 1}});
  } catch (const std::exception& caught) {
    error = caught.what();
    return 1;
  }
  return 0;
}
extern "C" int emulate_boxed(const uint16_t* from, uint16_t* to, int mistake, int order) {  // [2, 3, 40]
  const auto map = [](const void* data) {
    return simt::make_tensor_map({data, {40, 3, 2, 1}, {40, 120, 240}, {2, 2, 1}});
  };
  const size_t bytes = 2 * 2048 + sizeof(simt::Arrival);
  const auto run = [&](auto kernel) { return emulate<decltype(kernel)>({map(from), map(to)}, bytes, order); };
  if (mistake == 1) return run(Boxed<1>{});
  if (mistake == 2) return run(Boxed<2>{});
  if (mistake == 3) return run(Boxed<3>{});
  if (mistake == 4) return run(Boxed<4>{});
  return run(Boxed<0>{});
}
