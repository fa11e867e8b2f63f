// tucker2's gradients on the CPU: the operator itself with transposed factors, then sums over pixels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "check.h"
#include "cpu/tucker2_call.h"

namespace kegfast {
namespace {

// Both layouts of the gradient kernels are dense.
Tensor dense(const Tensor& x) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  if (reads_channels_last(x) && x.stride(3) == c && x.stride(2) == w * c && x.stride(0) == h * w * c)
    return x;
  return torch::stable::contiguous(x);
}

// The same factor run backwards: outputs and inputs change places, taps reverse. float32 only.
Tucker2Factor transposed(const Tensor& weight) {
  const Tucker2Factor w = factor(weight);
  const int64_t last_tap = (weight.size(2) - 1) * w.tap_h + (weight.size(3) - 1) * w.tap_w;
  return {weight.const_data_ptr<float>() + last_tap,
          w.type,
          w.input,
          w.row,
          -w.tap_h,
          -w.tap_w,
          w.inputs,
          w.outputs};
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

}  // namespace

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

}  // namespace kegfast
