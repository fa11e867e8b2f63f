// tucker2's gradients on the CPU: checks, allocation, threads over images, the sum of what they found.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/tucker2_call.h"

namespace kegfast {
namespace {

bool dense_channels_last(const Tensor& x) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  return reads_channels_last(x) && x.stride(3) == c && x.stride(2) == w * c && x.stride(0) == h * w * c;
}

// Both layouts of the gradient kernels are dense.
Tensor dense(const Tensor& x) {
  return dense_channels_last(x) ? x : torch::stable::contiguous(x);
}

// An output or its gradient in the layout that x has: the gradient of x must have it too, or what torch does
// with that one next takes its slow ways. LeNet5, whose last convolution makes single pixels, which are in
// both layouts: its ReLUs' gradients took 377 instead of 14 us.
Tensor dense_as(const Tensor& t, bool channels_last) {
  const bool both = t.size(2) * t.size(3) == 1;
  if (!channels_last || both) return torch::stable::contiguous(t);
  if (dense_channels_last(t)) return t;
  Tensor copy = empty(t.size(0), t.size(1), t.size(2), t.size(3), true, t.scalar_type());
  return torch::stable::copy_(copy, t);
}

// The same factor run backwards: outputs and inputs change places, taps reverse unless the core upsamples.
Tucker2Factor transposed(const Tensor& weight, bool reverse) {
  const Tucker2Factor w = factor(weight);
  Tucker2Factor t{w.data, w.type, w.input, w.row, w.tap_h, w.tap_w, w.inputs, w.outputs};
  if (!reverse) return t;
  const int64_t last_tap = (weight.size(2) - 1) * w.tap_h + (weight.size(3) - 1) * w.tap_w;
  t.data = static_cast<const char*>(w.data) + last_tap * static_cast<int64_t>(weight.element_size());
  t.tap_h = -w.tap_h, t.tap_w = -w.tap_w;
  return t;
}

// How a sum over the threads' copies lies in memory: element (o, i, tap h, tap w) of the weight.
struct Sums {
  const float* data;
  int64_t copies, copy_floats;
  int64_t output, input, tap_h, tap_w;  // steps
};

void reduce(const Sums& sums, const Tensor& to) {  // (O, I, kh, kw)
  constexpr int64_t kBlock = 16;                   // lines of either side at a time
  float* const out = to.mutable_data_ptr<float>();
  const int64_t outputs = to.size(0), inputs = to.size(1), taps_h = to.size(2), taps_w = to.size(3);
  const int64_t taps = taps_h * taps_w;
  for (int64_t from_o = 0; from_o < outputs; from_o += kBlock)
    for (int64_t from_i = 0; from_i < inputs; from_i += kBlock)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const float* const at = sums.data + tap / taps_w * sums.tap_h + tap % taps_w * sums.tap_w;
        const int64_t end_o = std::min(from_o + kBlock, outputs), end_i = std::min(from_i + kBlock, inputs);
        for (int64_t o = from_o; o < end_o; ++o)
          for (int64_t i = from_i; i < end_i; ++i) {
            const float* const from = at + o * sums.output + i * sums.input;
            float sum = from[0];
            for (int64_t c = 1; c < sums.copies; ++c) sum += from[c * sums.copy_floats];
            out[(o * inputs + i) * taps + tap] = sum;
          }
      }
}

Tensor like_weight(const Tensor& w, bool needed) {
  if (!needed) return empty_flat(0);
  return empty(w.size(0), w.size(1), w.size(2), w.size(3), false, ScalarType::Float);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients tucker2_gradients(const Tensor& gradient, const std::optional<Tensor>& output, const Tensor& input,
                            const Tensor& t1, const Tensor& t2, const Tensor& first, const Tensor& core,
                            const Tensor& last, int64_t stride_h, int64_t stride_w, int64_t padding_h,
                            int64_t padding_w, int64_t dilation_h, int64_t dilation_w, bool need_x,
                            bool need_first, bool need_core, bool need_last, bool need_bias) {
  const ScalarType type = input.scalar_type();
  KEGFAST_CHECK(gradient.is_cpu() && gradient.scalar_type() == type && core.scalar_type() == type,
                "arguments", "CPU tensors of x's type", static_cast<int>(core.scalar_type()));
  const Tensor x = dense(input);
  Tucker2GradParams g{};
  g.grad_channels_last = dense_channels_last(x);
  const Tensor grad = dense_as(gradient, g.grad_channels_last);
  std::optional<Tensor> y;
  if (output) y = dense_as(*output, g.grad_channels_last);
  Tucker2Params& p = g.forward;
  p = geometry(x.size(0), x.size(1), x.size(2), x.size(3), core, last.size(0),
               {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w});
  KEGFAST_CHECK(grad.size(2) == p.out_height && grad.size(3) == p.out_width, "gradient", "of y's size",
                grad.size(2));
  const bool fits = stride_h * stride_w == 1 && (p.kernel_h - 1) * dilation_h >= padding_h &&
                    (p.kernel_w - 1) * dilation_w >= padding_w;
  KEGFAST_CHECK(fits || dilation_h * dilation_w == 1, "dilation", "1 where the core has a stride",
                dilation_h);
  set_input(p, x);
  if (need_first || need_core || need_last) {
    KEGFAST_CHECK(t1.size(3) == p.rank_in && t2.size(3) == p.rank_out, "t1 and t2",
                  "the kept intermediates, without what made their ranks even", t1.size(3));
    g.kept = type_of(t1);
    p.t1 = static_cast<float*>(t1.mutable_data_ptr());
    p.t2 = static_cast<float*>(t2.mutable_data_ptr());
  }
  g.grad = grad.const_data_ptr();
  g.y = y ? y->const_data_ptr() : nullptr;

  Gradients grads{need_x ? empty(p.images, p.channels, p.height, p.width, g.grad_channels_last, type)
                         : empty_flat(0, type),
                  like_weight(first, need_first), like_weight(core, need_core), like_weight(last, need_last),
                  empty_flat(need_bias ? p.features : 0)};
  auto& [dx, dfirst, dcore, dlast, dbias] = grads;
  if (need_x) g.dx = dx.mutable_data_ptr();
  const int64_t first_floats = dfirst.numel(), core_floats = dcore.numel(), last_floats = dlast.numel();
  const int64_t copy_floats = first_floats + core_floats + last_floats;
  const int64_t parts = std::max<int64_t>(1, std::min(threads_for(multiply_adds(p), p.images), p.images));
  const Tensor sums = empty_flat(parts * copy_floats);
  float* const base = sums.mutable_data_ptr<float>();
  std::fill_n(base, parts * copy_floats, 0.0f);  // none where only x or the bias needs a gradient
  std::vector<double> bias_sums(parts * dbias.numel());
  const auto point = [&](int64_t part) {
    float* const copy = base + part * copy_floats;
    g.first = need_first ? copy : nullptr;
    g.core = need_core ? copy + first_floats : nullptr;
    g.last = need_last ? copy + first_floats + core_floats : nullptr;
    g.bias = need_bias ? bias_sums.data() + part * p.features : nullptr;
    return g;
  };
  point(0);
  if (p.images > 0) {
    KEGFAST_SELECT(tucker2_gradient_plan)(g, parts);
    const Tensor packed = empty_flat(g.plan.packed_floats);
    const bool reverse = !g.back.up.on;
    if (need_x || need_first || need_core) KEGFAST_SELECT(tucker2_pack)
    (g.back, g.plan, transposed(last, false), transposed(core, reverse), transposed(first, false), false,
     packed.mutable_data_ptr<float>());
    g.back.packed = packed.const_data_ptr<float>();
    const auto kernel = KEGFAST_SELECT(tucker2_gradients);
    std::vector<Tucker2GradParams> mine;
    for (int64_t i = 0; i < parts; ++i) mine.push_back(point(i));
    run_parts(parts, [&](int64_t i) {
      kernel(mine[i], p.images * i / parts, p.images * (i + 1) / parts, scratch(g.scratch_floats));
    });
  }
  const int64_t k = p.features, c = p.channels, r1 = p.rank_in, r2 = p.rank_out;
  const float* at = base;
  if (need_first) {
    const bool wide = p.channels_last;
    reduce({at, parts, copy_floats, wide ? c : 1, wide ? 1 : r1, 0, 0}, dfirst);
  }
  at += first_floats;
  if (need_core) {
    const int64_t row = dilation_w == 1 ? p.kernel_w * r1 : r1;  // a segment's length
    const int64_t tap_h = dilation_w == 1 ? r2 * row : p.kernel_w * r2 * row;
    reduce({at, parts, copy_floats, row, 1, tap_h, dilation_w == 1 ? r1 : r2 * row}, dcore);
  }
  at += core_floats;
  if (need_last) {
    const bool wide = g.grad_channels_last;
    reduce({at, parts, copy_floats, wide ? 1 : r2, wide ? k : 1, 0, 0}, dlast);
  }
  for (int64_t i = 0; need_bias && i < k; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += bias_sums[part * k + i];
    dbias.mutable_data_ptr<float>()[i] = static_cast<float>(sum);
  }
  return grads;
}

}  // namespace
}  // namespace kegfast

STABLE_TORCH_LIBRARY_IMPL(kegfast, CPU, m) {
  m.impl("tucker2_gradients", TORCH_BOX(&kegfast::tucker2_gradients));
}
