// tucker2 on the CPU: the forward pass and the packed factors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <utility>

#include "check.h"
#include "cpu/tucker2_call.h"

namespace kegfast {

namespace {

Tensor dense_floats(const Tensor& t) {  // (K)
  const Tensor dense = t.is_contiguous() ? t : torch::stable::contiguous(t);
  return dense.scalar_type() == ScalarType::Float ? dense : torch::stable::to(dense, ScalarType::Float);
}

// Where the addend lies otherwise than y, y starts as a copy of it.
void set_addend(Tucker2Params& p, const Tensor& addend, Tensor& y) {
  check_addend(p, addend);
  const bool in_place = lies_as_output(p, addend);
  if (!in_place) torch::stable::copy_(y, addend);
  p.addend = (in_place ? addend : y).const_data_ptr();
}

struct Run {
  Tensor y;
  std::optional<Tensor> t1, t2;
};

// t1 with its border and t2: in bfloat16 where x is, else in float32.
void keep_intermediates(Tucker2Params& p, Run& run) {
  const int64_t h = p.height + 2 * p.padding_h, w = p.width + 2 * p.padding_w;
  const ScalarType type = p.pairs ? ScalarType::BFloat16 : ScalarType::Float;
  run.t1 = empty_strided({p.images, h, w, p.rank_in}, {h * w * p.rank_in, w * p.rank_in, p.rank_in, 1}, type);
  run.t2 =
      empty_strided({p.images, p.out_height, p.out_width, p.rank_out},
                    {p.out_height * p.out_width * p.rank_out, p.out_width * p.rank_out, p.rank_out, 1}, type);
  p.t1 = static_cast<float*>(run.t1->mutable_data_ptr());
  p.t2 = static_cast<float*>(run.t2->mutable_data_ptr());
}

void run_factors(Tucker2Params& p, const Tensor& first_weight, const Tensor& core_weight,
                 const Tensor& last_weight, const std::optional<Tensor>& packed) {
  choose_form(p);
  const int64_t threads = threads_for(work_of(p), p.images * p.out_height);
  const Tucker2Plan plan = KEGFAST_TUCKER2(p, tucker2_plan)(p, threads);
  const Tucker2Factor first = factor(first_weight), core = factor(core_weight), last = factor(last_weight);
  std::optional<Tensor> fresh;
  if (packed && is_packed_for(plan, *packed)) {
    p.packed = packed->const_data_ptr<float>();
  } else {
    fresh = empty_flat(plan.packed_floats);
    KEGFAST_TUCKER2(p, tucker2_pack)(p, plan, first, core, last, false, fresh->mutable_data_ptr<float>());
    p.packed = fresh->const_data_ptr<float>();
  }
  run_rows(p, plan, threads);
}

Run forward(const Tensor& input, const Tensor& first, const Tensor& core, const Tensor& last,
            const std::optional<Tensor>& bias, const std::optional<Tensor>& addend,
            const std::optional<Tensor>& packed, const Geometry& g, bool relu, bool keep) {
  check_weights(input, first, core, last, bias);
  const Tensor x = readable(input);
  Tucker2Params p = geometry(x.size(0), x.size(1), x.size(2), x.size(3), core, last.size(0), g);
  set_input(p, x);
  choose_numbers(p);
  p.relu = relu;
  Run run{empty(p.images, p.features, p.out_height, p.out_width, p.channels_last, x.scalar_type()), {}, {}};
  p.y = run.y.mutable_data_ptr();
  if (addend) set_addend(p, *addend, run.y);
  if (keep) keep_intermediates(p, run);
  std::optional<Tensor> wide_bias;
  if (bias) {
    wide_bias = dense_floats(*bias);
    p.bias = wide_bias->const_data_ptr<float>();
  }
  if (p.images > 0) run_factors(p, first, core, last, packed);
  if (keep && p.type == Tucker2Type::bfloat16 && !p.pairs)
    for (std::optional<Tensor>* t : {&run.t1, &run.t2}) *t = torch::stable::to(**t, ScalarType::BFloat16);
  return run;
}

Tensor tucker2(const Tensor& x, const Tensor& first, const Tensor& core, const Tensor& last,
               const std::optional<Tensor>& bias, const std::optional<Tensor>& packed, int64_t stride_h,
               int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
               bool relu) {
  return forward(x, first, core, last, bias, {}, packed,
                 {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w}, relu, false)
      .y;
}

Tensor tucker2_add(const Tensor& x, const Tensor& first, const Tensor& core, const Tensor& last,
                   const std::optional<Tensor>& bias, const Tensor& addend,
                   const std::optional<Tensor>& packed, int64_t stride_h, int64_t stride_w, int64_t padding_h,
                   int64_t padding_w, int64_t dilation_h, int64_t dilation_w, bool relu) {
  return forward(x, first, core, last, bias, addend, packed,
                 {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w}, relu, false)
      .y;
}

std::tuple<Tensor, Tensor, Tensor> tucker2_forward(const Tensor& x, const Tensor& first, const Tensor& core,
                                                   const Tensor& last, const std::optional<Tensor>& bias,
                                                   int64_t stride_h, int64_t stride_w, int64_t padding_h,
                                                   int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
                                                   bool relu, bool keep) {
  Run run = forward(x, first, core, last, bias, {}, {},
                    {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w}, relu, keep);
  if (!keep) {
    const ScalarType kept = type_of(x) == Tucker2Type::bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
    return {std::move(run.y), empty_flat(0, kept), empty_flat(0, kept)};
  }
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
  p.type = type_of(first);
  choose_numbers(p);
  const Tucker2Plan plan = KEGFAST_TUCKER2(p, tucker2_plan)(p, 1);
  Tensor packed = empty_packed(plan.packed_floats);
  KEGFAST_TUCKER2(p, tucker2_pack)
  (p, plan, factor(first), factor(core), factor(last), true, packed.mutable_data_ptr<float>());
  return packed;
}

}  // namespace

}  // namespace kegfast

STABLE_TORCH_LIBRARY_IMPL(kegfast, CPU, m) {
  m.impl("tucker2", TORCH_BOX(&kegfast::tucker2));
  m.impl("tucker2_add", TORCH_BOX(&kegfast::tucker2_add));
  m.impl("tucker2_forward", TORCH_BOX(&kegfast::tucker2_forward));
  m.impl("tucker2_pack", TORCH_BOX(&kegfast::tucker2_pack));
}
