// tucker2 on the CPU: checks, allocation, choice of kernels, threads.
#include "tucker2.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"

namespace kegfast {
namespace {

std::atomic<bool> winograd_allowed{true};
std::atomic<const char*> last_path{"none"};

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Geometry {
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

// A stride-exact allocation: the fakes promise these strides.
Tensor empty_strided(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                     ScalarType type) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                         strides.begin(), static_cast<int32_t>(type),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Fresh memory of this size comes from the kernel page by page: more time in faults than in arithmetic.
constexpr int64_t kHugeBytes = 32 << 20;

void ask_for_huge_pages(const Tensor& t, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < kHugeBytes) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr()),
                  first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: failure changes nothing
#else
  (void)t, (void)bytes;
#endif
}

Tensor empty(int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last, ScalarType type) {
  if (channels_last) return empty_strided({n, c, h, w}, {h * w * c, 1, w * c, c}, type);
  return empty_strided({n, c, h, w}, {c * h * w, h * w, w, 1}, type);
}

Tensor empty_flat(int64_t n, ScalarType type = ScalarType::Float) {
  return empty_strided({n}, {1}, type);
}

// Memory that a thread keeps between calls, so that no call pays for page faults.
class Scratch {
 public:
  float* take(int64_t floats) {
    if (floats > held_) {
      memory_.reset(
          static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>((floats * 4 + 63) / 64 * 64))));
      held_ = memory_ ? floats : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t held_ = 0;
};

float* scratch(int64_t floats) {
  static thread_local Scratch memory;
  return memory.take(floats);
}

// x as the kernels read it: pixels of contiguous channels, planes of contiguous rows, or else a copy as
// planes.
bool reads_channels_last(const Tensor& x) {
  return x.stride(1) == 1 && x.size(2) * x.size(3) > 1;
}

Tensor readable(const Tensor& x) {
  if (reads_channels_last(x) || x.stride(3) == 1 || x.size(3) == 1) return x;
  return torch::stable::contiguous(x);
}

// Both layouts of the gradient kernels are dense.
Tensor dense(const Tensor& x) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  if (reads_channels_last(x) && x.stride(3) == c && x.stride(2) == w * c && x.stride(0) == h * w * c)
    return x;
  return torch::stable::contiguous(x);
}

Tucker2Type type_of(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float) return Tucker2Type::float32;
  KEGFAST_CHECK(t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half, "x",
                "float32, bfloat16 or float16", static_cast<int>(t.scalar_type()));
  return t.scalar_type() == ScalarType::BFloat16 ? Tucker2Type::bfloat16 : Tucker2Type::float16;
}

Tensor as_float(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
}

Tucker2Factor factor(const Tensor& weight) {  // (O, I, kh, kw)
  return {weight.const_data_ptr(), type_of(weight),  weight.stride(0),
          weight.stride(1),        weight.stride(2), weight.stride(3)};
}

// The same factor run backwards: outputs and inputs change places, taps reverse. float32 only.
Tucker2Factor transposed(const Tensor& weight) {
  const Tucker2Factor w = factor(weight);
  const int64_t last_tap = (weight.size(2) - 1) * w.tap_h + (weight.size(3) - 1) * w.tap_w;
  return {weight.const_data_ptr<float>() + last_tap, w.type, w.input, w.row, -w.tap_h, -w.tap_w};
}

void check_weights(const Tensor& x, const Tensor& first, const Tensor& core, const Tensor& last,
                   const std::optional<Tensor>& bias) {
  KEGFAST_CHECK(x.dim() == 4, "x", "4-dimensional", x.dim());
  KEGFAST_CHECK(first.dim() == 4 && first.size(1) == x.size(1), "first",
                "(R1, C, 1, 1) with the channels of x", first.size(1));
  KEGFAST_CHECK(core.dim() == 4 && core.size(1) == first.size(0), "core", "(R2, R1, kh, kw)", core.size(1));
  KEGFAST_CHECK(last.dim() == 4 && last.size(1) == core.size(0), "last", "(K, R2, 1, 1)", last.size(1));
  for (const Tensor* t : {&first, &core, &last})
    KEGFAST_CHECK(t->scalar_type() == x.scalar_type() && t->is_cpu(), "weights",
                  "tensors of x's type on x's device", static_cast<int>(t->scalar_type()));
  if (bias)
    KEGFAST_CHECK(bias->numel() == last.size(0) && bias->scalar_type() == x.scalar_type(), "bias",
                  "(K) of x's type", bias->numel());
}

Tucker2Params geometry(int64_t images, int64_t channels, int64_t height, int64_t width, const Tensor& core,
                       int64_t features, const Geometry& g) {
  Tucker2Params p{};
  p.images = images, p.channels = channels, p.height = height, p.width = width, p.features = features;
  p.rank_in = core.size(1), p.rank_out = core.size(0), p.kernel_h = core.size(2), p.kernel_w = core.size(3);
  p.stride_h = g.stride_h, p.stride_w = g.stride_w, p.padding_h = g.padding_h, p.padding_w = g.padding_w;
  p.dilation_h = g.dilation_h, p.dilation_w = g.dilation_w;
  KEGFAST_CHECK(g.stride_h > 0 && g.stride_w > 0 && g.dilation_h > 0 && g.dilation_w > 0,
                "stride and dilation", "positive", g.stride_h);
  KEGFAST_CHECK(g.padding_h >= 0 && g.padding_w >= 0, "padding", "non-negative", g.padding_h);
  const int64_t reach_h = height + 2 * g.padding_h - (p.kernel_h - 1) * g.dilation_h - 1;
  const int64_t reach_w = width + 2 * g.padding_w - (p.kernel_w - 1) * g.dilation_w - 1;
  KEGFAST_CHECK(reach_h >= 0 && reach_w >= 0, "x", "at least as large as the core's window", height);
  p.out_height = reach_h / g.stride_h + 1, p.out_width = reach_w / g.stride_w + 1;
  p.winograd = tucker2_winograd();
  KEGFAST_CHECK(p.kernel_h * p.kernel_w <= 256, "core", "a window of at most 256 taps",
                p.kernel_h * p.kernel_w);
  return p;
}

void set_input(Tucker2Params& p, const Tensor& x) {
  p.channels_last = reads_channels_last(x);
  p.type = type_of(x);
  p.x = x.const_data_ptr();
  p.x_image = x.stride(0), p.x_channel = x.stride(1), p.x_row = x.stride(2), p.x_pixel = x.stride(3);
}

int64_t multiply_adds(const Tucker2Params& p) {
  return p.images *
         (p.height * p.width * p.channels * p.rank_in +
          p.out_height * p.out_width * p.rank_out * (p.rank_in * p.kernel_h * p.kernel_w + p.features));
}

// Below this a second thread costs more than it brings (about 40 us of one core).
constexpr int64_t kSerialWork = 4'000'000;

int64_t threads_for(int64_t work, int64_t parts) {
  if (work < kSerialWork) return 1;
  return std::max<int64_t>(
      1, std::min<int64_t>({torch::stable::get_num_threads(), parts, work / (kSerialWork / 2)}));
}

// f(begin, end) over `parts` equal shares of `units`, each a multiple of `grain`.
template <class F>
void share_out(int64_t parts, int64_t units, int64_t grain, const F& f) {
  if (parts == 1) return f(0, units * grain);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) f(units * i / parts * grain, units * (i + 1) / parts * grain);
  });
}

void run_rows(const Tucker2Params& p, const Tucker2Plan& plan, int64_t threads) {
  last_path.store(plan.winograd ? "winograd" : "direct", std::memory_order_relaxed);
  const auto kernel = KEGFAST_SELECT(tucker2_rows);
  const auto f = [&](int64_t begin, int64_t end) {
    kernel(p, plan, begin, end, scratch(plan.scratch_floats));
  };
  // Kept intermediates overlap between bands of an image, so then images are the unit.
  const bool by_image = p.images >= threads || p.t1;
  if (by_image)
    share_out(std::min(threads, p.images), p.images, p.out_height, f);
  else
    share_out(threads, p.images * p.out_height, 1, f);
}

struct Run {
  Tensor y;
  std::optional<Tensor> t1, t2;
};

Run forward(const Tensor& input, const Tensor& first_weight, const Tensor& core_weight,
            const Tensor& last_weight, const std::optional<Tensor>& bias_weight,
            const std::optional<Tensor>& packed, const Geometry& g, bool relu, bool keep) {
  check_weights(input, first_weight, core_weight, last_weight, bias_weight);
  const Tensor x = readable(input);
  Tucker2Params p = geometry(x.size(0), x.size(1), x.size(2), x.size(3), core_weight, last_weight.size(0), g);
  set_input(p, x);
  p.relu = relu;
  Run run{empty(p.images, p.features, p.out_height, p.out_width, p.channels_last, x.scalar_type()), {}, {}};
  p.y = run.y.mutable_data_ptr();
  ask_for_huge_pages(run.y, run.y.numel() * static_cast<int64_t>(run.y.element_size()));
  if (keep) {
    const int64_t h = p.height + 2 * p.padding_h, w = p.width + 2 * p.padding_w;
    run.t1 = empty_strided({p.images, h, w, p.rank_in}, {h * w * p.rank_in, w * p.rank_in, p.rank_in, 1},
                           ScalarType::Float);
    run.t2 = empty_strided({p.images, p.out_height, p.out_width, p.rank_out},
                           {p.out_height * p.out_width * p.rank_out, p.out_width * p.rank_out, p.rank_out, 1},
                           ScalarType::Float);
    p.t1 = run.t1->mutable_data_ptr<float>();
    p.t2 = run.t2->mutable_data_ptr<float>();
  }
  if (p.images == 0) return run;
  std::optional<Tensor> bias;
  if (bias_weight) {
    bias = as_float(*bias_weight);
    p.bias = bias->const_data_ptr<float>();
  }
  const int64_t threads = threads_for(multiply_adds(p), p.images * p.out_height);
  const Tucker2Plan plan = KEGFAST_SELECT(tucker2_plan)(p, threads);
  const Tucker2Factor first = factor(first_weight), core = factor(core_weight), last = factor(last_weight);
  std::optional<Tensor> fresh;
  if (packed && packed->numel() == plan.packed_floats &&
      KEGFAST_SELECT(tucker2_packed_from)(p, plan, first, core, last, packed->const_data_ptr<float>())) {
    p.packed = packed->const_data_ptr<float>();
  } else {
    fresh = empty_flat(plan.packed_floats);
    KEGFAST_SELECT(tucker2_pack)(p, plan, first, core, last, false, fresh->mutable_data_ptr<float>());
    p.packed = fresh->const_data_ptr<float>();
  }
  run_rows(p, plan, threads);
  return run;
}

Tensor tucker2(const Tensor& x, const Tensor& first, const Tensor& core, const Tensor& last,
               const std::optional<Tensor>& bias, const std::optional<Tensor>& packed, int64_t stride_h,
               int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
               bool relu) {
  return forward(x, first, core, last, bias, packed,
                 {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w}, relu, false)
      .y;
}

std::tuple<Tensor, Tensor, Tensor> tucker2_forward(const Tensor& x, const Tensor& first, const Tensor& core,
                                                   const Tensor& last, const std::optional<Tensor>& bias,
                                                   int64_t stride_h, int64_t stride_w, int64_t padding_h,
                                                   int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
                                                   bool relu, bool keep) {
  Run run = forward(x, first, core, last, bias, {},
                    {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w}, relu, keep);
  if (!keep) return {std::move(run.y), empty_flat(0), empty_flat(0)};
  return {std::move(run.y), std::move(*run.t1), std::move(*run.t2)};
}

Tensor tucker2_pack(const Tensor& first, const Tensor& core, const Tensor& last, int64_t stride_h,
                    int64_t stride_w, int64_t dilation_h, int64_t dilation_w, bool channels_last) {
  Tucker2Params p{};
  p.images = 1, p.channels = first.size(1), p.features = last.size(0);
  p.rank_in = core.size(1), p.rank_out = core.size(0), p.kernel_h = core.size(2), p.kernel_w = core.size(3);
  p.height = 1 + (p.kernel_h - 1) * dilation_h, p.width = 1 + (p.kernel_w - 1) * dilation_w;
  p.out_height = p.out_width = 1;
  p.stride_h = stride_h, p.stride_w = stride_w, p.dilation_h = dilation_h, p.dilation_w = dilation_w;
  p.winograd = tucker2_winograd();
  p.channels_last = channels_last;
  const Tucker2Plan plan = KEGFAST_SELECT(tucker2_plan)(p, 1);
  Tensor packed = empty_flat(plan.packed_floats);
  KEGFAST_SELECT(tucker2_pack)
  (p, plan, factor(first), factor(core), factor(last), true, packed.mutable_data_ptr<float>());
  return packed;
}

// sums[from] over the threads' copies, laid out as the weight: to[i * outer + j] = sum of from[j * inner +
// i], per tap.
void reduce(const float* sums, int64_t copies, int64_t copy_floats, int64_t taps, int64_t inner,
            int64_t outer,
            const Tensor& to) {   // sums (taps, outer, inner) -> to (inner, outer, taps)
  constexpr int64_t kBlock = 16;  // lines written at a time
  float* const out = to.mutable_data_ptr<float>();
  for (int64_t begin = 0; begin < inner; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, inner);
    for (int64_t j = 0; j < outer; ++j)
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t i = begin; i < end; ++i) {
          float sum = 0;
          for (int64_t c = 0; c < copies; ++c) sum += sums[c * copy_floats + (t * outer + j) * inner + i];
          out[(i * outer + j) * taps + t] = sum;
        }
  }
}

Tensor like_weight(const Tensor& w, bool needed) {
  if (!needed) return empty_flat(0);
  return empty(w.size(0), w.size(1), w.size(2), w.size(3), false, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> tucker2_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& t1, const Tensor& t2, const Tensor& first,
    const Tensor& core, const Tensor& last, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
    int64_t dilation_w, bool need_x, bool need_first, bool need_core, bool need_last) {
  const int64_t border_h = (core.size(2) - 1) * dilation_h - padding_h;
  const int64_t border_w = (core.size(3) - 1) * dilation_w - padding_w;
  KEGFAST_CHECK(border_h >= 0 && border_w >= 0, "padding", "at most dilation * (kernel - 1)", padding_h);
  for (const Tensor* t : {&gradient, &input, &t1, &t2, &first, &core, &last})
    KEGFAST_CHECK(t->scalar_type() == ScalarType::Float && t->is_cpu(), "arguments",
                  "float32 tensors on the CPU", static_cast<int>(t->scalar_type()));
  const Tensor x = readable(input), grad = dense(gradient);
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3), r1 = core.size(1), r2 = core.size(0);

  // The same operator with transposed factors; its intermediates are dz2 (with its border) and dz1.
  Tucker2Params back{};
  back = geometry(n, grad.size(1), grad.size(2), grad.size(3), core, x.size(1),
                  {1, 1, border_h, border_w, dilation_h, dilation_w});
  std::swap(back.rank_in, back.rank_out);
  KEGFAST_CHECK(back.out_height == h && back.out_width == w, "gradient", "the size that x gives at stride 1",
                back.out_height);
  set_input(back, grad);
  Tensor grad_x = need_x ? empty(n, x.size(1), h, w, back.channels_last, ScalarType::Float) : empty_flat(0);
  back.y = need_x ? grad_x.mutable_data_ptr() : nullptr;
  std::optional<Tensor> dz2, dz1;
  if (need_core) {
    dz2 = empty_flat(n * (back.height + 2 * border_h) * (back.width + 2 * border_w) * r2);
    back.t1 = dz2->mutable_data_ptr<float>();
  }
  if (need_first) {
    dz1 = empty_flat(n * h * w * r1);
    back.t2 = dz1->mutable_data_ptr<float>();
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor> grads{
      grad_x, like_weight(first, need_first), like_weight(core, need_core), like_weight(last, need_last)};
  auto& [dx, dfirst, dcore, dlast] = grads;
  const int64_t threads = n ? threads_for(multiply_adds(back), n * h) : 1;
  if (n && (need_x || need_first || need_core)) {
    const Tucker2Plan plan = KEGFAST_SELECT(tucker2_plan)(back, threads);
    const Tensor packed = empty_flat(plan.packed_floats);
    KEGFAST_SELECT(tucker2_pack)
    (back, plan, transposed(last), transposed(core), transposed(first), false,
     packed.mutable_data_ptr<float>());
    back.packed = packed.const_data_ptr<float>();
    run_rows(back, plan, threads);
  }
  if (!(need_first || need_core || need_last)) return grads;

  Tucker2GradParams g{};
  g.forward =
      geometry(n, x.size(1), h, w, core, last.size(0), {1, 1, padding_h, padding_w, dilation_h, dilation_w});
  set_input(g.forward, x);
  g.forward.t1 = t1.mutable_data_ptr<float>();
  g.forward.t2 = t2.mutable_data_ptr<float>();
  g.grad = grad.const_data_ptr<float>();
  g.grad_channels_last = back.channels_last;
  g.dz2 = back.t1, g.border_h = border_h, g.border_w = border_w;
  g.dz1 = back.t2;
  const int64_t parts = std::max<int64_t>(1, std::min(threads, n));
  const int64_t first_floats = need_first ? first.numel() : 0, core_floats = need_core ? core.numel() : 0;
  const int64_t copy_floats = first_floats + core_floats + (need_last ? last.numel() : 0);
  const Tensor sums = empty_flat(parts * copy_floats);
  float* const base = sums.mutable_data_ptr<float>();
  std::memset(base, 0, static_cast<size_t>(parts * copy_floats) * sizeof(float));
  const auto kernel = KEGFAST_SELECT(tucker2_weight_gradients);
  const auto part = [&](int64_t i) {
    Tucker2GradParams mine = g;
    float* copy = base + i * copy_floats;
    if (need_first) mine.first = copy;
    if (need_core) mine.core = copy + first_floats;
    if (need_last) mine.last = copy + first_floats + core_floats;
    kernel(mine, n * i / parts, n * (i + 1) / parts);
  };
  if (parts == 1)
    part(0);
  else
    torch::stable::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) part(i);
    });
  if (need_first) reduce(base, parts, copy_floats, 1, r1, x.size(1), dfirst);
  if (need_core) reduce(base + first_floats, parts, copy_floats, core.size(2) * core.size(3), r2, r1, dcore);
  if (need_last)
    reduce(base + first_floats + core_floats, parts, copy_floats, r2 * last.size(0), 1, 1, dlast);
  return grads;
}

}  // namespace

bool tucker2_winograd() {
  return winograd_allowed.load(std::memory_order_relaxed);
}
void set_tucker2_winograd(bool allowed) {
  winograd_allowed.store(allowed, std::memory_order_relaxed);
}
void note_unfused() {
  last_path.store("unfused", std::memory_order_relaxed);
}
std::string last_kernel() {
  const std::string path = last_path.load(std::memory_order_relaxed);
  return path == "direct" || path == "winograd" ? path + " " + isa_name(active_isa()) : path;
}

}  // namespace kegfast

STABLE_TORCH_LIBRARY_IMPL(kegfast, CPU, m) {
  m.impl("tucker2", TORCH_BOX(&kegfast::tucker2));
  m.impl("tucker2_forward", TORCH_BOX(&kegfast::tucker2_forward));
  m.impl("tucker2_backward", TORCH_BOX(&kegfast::tucker2_backward));
  m.impl("tucker2_pack", TORCH_BOX(&kegfast::tucker2_pack));
}
