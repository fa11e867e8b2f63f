// tucker2's plan and kernels on the emulator, callable through ctypes.
#include <string>
#include <vector>

#include "fibers.h"
#include "harness.h"
#include "tucker2_plan.h"

namespace {

using namespace kegfast;
using simt::bf16;
using simt::fp16;

std::string error;

template <class Params>
auto note_tile(Tucker2Call& c, const Params& p) -> decltype(p.tile_h, void()) {
  c.tile_h = p.tile_h, c.tile_w = p.tile_w;
}
void note_tile(Tucker2Call&, ...) {}

template <class M>
void run(Tucker2Call& c) {
  using T = typename M::T;
  const auto factor = [](const void* data, const int64_t (&strides)[4], int rows, int inputs, int kh,
                         int kw) {
    return cuda::make_factor(static_cast<const T*>(data), strides, rows, inputs, kh, kw);
  };
  const cuda::Window window{c.window[0], c.window[1], c.window[2], c.window[3],
                            c.window[4], c.window[5], c.window[6], c.window[7]};
  const cuda::Tucker2Problem<T> problem{
      cuda::make_image(static_cast<const T*>(c.x), c.x_strides, c.channels, c.height, c.width),
      cuda::make_image(static_cast<T*>(c.y), c.y_strides, c.features, c.out_height, c.out_width),
      factor(c.first, c.first_strides, c.rank_in, c.channels, 1, 1),
      factor(c.core, c.core_strides, c.rank_out, c.rank_in, c.window[0], c.window[1]),
      factor(c.last, c.last_strides, c.features, c.rank_out, 1, 1),
      static_cast<T*>(c.t1),
      static_cast<T*>(c.t2),
      {static_cast<const T*>(c.bias), c.relu != 0},
      window,
      c.images,
      cuda::Form(c.form),
      {size_t(c.shared_bytes), c.multiprocessors, c.bulk_copies != 0}};
  const auto order = emulator::Order(c.order);
  const auto launch = [&](auto kernel, const auto& params, int64_t x, int64_t y, size_t shared_bytes) {
    ++c.launches;
    c.persistent = std::is_same_v<typename decltype(kernel)::Params, cuda::PersistentParams<T>>;
    c.blocks = x * y;
    note_tile(c, params);
    c.most_shared = simt::larger(c.most_shared, int64_t(shared_bytes));
    const size_t limit = c.shared_bytes;
    emulator::require_shared(shared_bytes, limit);
    if (!c.dry) emulator::launch<decltype(kernel)>({int(x), int(y), 1}, shared_bytes, order, params, limit);
  };
  std::vector<char> kept;
  const auto workspace = [&](size_t bytes) {
    c.workspace = int64_t(bytes);
    if (c.dry) return reinterpret_cast<char*>(256);  // never read
    kept.assign(bytes + 256, char(0xff));
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(kept.data()) + 255) / 256 * 256);
  };
  cuda::tucker2<M>(problem, workspace, launch);
}

}  // namespace

extern "C" const char* tucker2_error() {
  return error.c_str();
}

extern "C" int emulate_tucker2(Tucker2Call* call) {
  try {
    if (call->dtype == 0 && !call->split) run<cuda::Math<float, false>>(*call);
    if (call->dtype == 0 && call->split) run<cuda::Math<float, true>>(*call);
    if (call->dtype == 1) run<cuda::Math<bf16, false>>(*call);
    if (call->dtype == 2) run<cuda::Math<fp16, false>>(*call);
  } catch (const std::exception& caught) {
    error = caught.what();
    return 1;
  }
  return 0;
}
