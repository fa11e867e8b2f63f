// tucker2 on the CPU: the forward pass and the packed factors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/half.h"
#include "cpu/tucker2_call.h"

namespace kegfast {

// What a tensor was when a call was settled. Python names tensors by the address of their implementation
// (`_cdata`), which is all that an at::Tensor holds: a cell with it is one that counts no reference.
class SeenTensor {
 public:
  explicit SeenTensor(const Tensor& t)
      : implementation_(*reinterpret_cast<void* const*>(t.get())), data_(t.const_data_ptr()) {
    type_ = t.scalar_type();
    for (int64_t i = 0; i < t.dim(); ++i) view_.push_back(t.size(i));
    for (int64_t i = 0; i < t.dim(); ++i) view_.push_back(t.stride(i));
  }

  void* implementation() const { return implementation_; }

  // The tensor itself, alive: it may look at other memory, or otherwise, under the same version.
  bool unchanged() const { return numbers(implementation_) == data_ && looks_like(implementation_); }

  const void* numbers() const { return data_; }  // of it unchanged
  // Of a tensor, alive.
  static const void* numbers(void* implementation) {
    const void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle(&implementation), &data));
    return data;
  }

  // Another tensor, alive and in memory: on the CPU, of this one's type, sizes and strides.
  bool looks_like(void* implementation) const {
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
    int32_t type = 0, device = 0;
    const AtenTensorHandle t = handle(&implementation);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t, &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t, &strides));
    return 2 * dim == static_cast<int64_t>(view_.size()) && type == static_cast<int32_t>(type_) &&
           device == aoti_torch_device_type_cpu() && std::equal(sizes, sizes + dim, view_.begin()) &&
           std::equal(strides, strides + dim, view_.begin() + dim);
  }

 private:
  static AtenTensorHandle handle(void** cell) { return reinterpret_cast<AtenTensorHandle>(cell); }

  void* implementation_;
  const void* data_;
  ScalarType type_;
  std::vector<int64_t> view_;  // sizes, then strides
};

struct Tucker2Prepared {
  std::vector<SeenTensor> seen;  // x, first, core, last and, if there is one, bias
  std::optional<SeenTensor> addend;
  Tucker2Params p;
  Tucker2Plan plan;
  int64_t threads;
  uint32_t pool_threads;
  Isa isa;
  int64_t choices, most_winograd;
  Tucker2Sample samples[kMostSamples];
  int64_t sample_count;
};

namespace {

Tensor dense_floats(const Tensor& t) {  // (K)
  const Tensor dense = t.is_contiguous() ? t : torch::stable::contiguous(t);
  return dense.scalar_type() == ScalarType::Float ? dense : torch::stable::to(dense, ScalarType::Float);
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

void check_addend(const Tucker2Params& p, const Tensor& addend) {
  KEGFAST_CHECK(addend.dim() == 4 && addend.size(0) == p.images && addend.size(1) == p.features &&
                    addend.size(2) == p.out_height && addend.size(3) == p.out_width,
                "addend", "of the output's shape", addend.dim());
  KEGFAST_CHECK(addend.is_cpu() && type_of(addend) == p.type, "addend", "of x's type on x's device",
                static_cast<int>(addend.scalar_type()));
}

bool lies_as_output(const Tucker2Params& p, const Tensor& t) {
  const int64_t plane = p.out_height * p.out_width, k = p.features;
  const int64_t strides[] = {k * plane, p.channels_last ? 1 : plane, p.out_width * (p.channels_last ? k : 1),
                             p.channels_last ? k : 1};
  for (int64_t i = 0; i < 4; ++i)
    if (t.size(i) > 1 && t.stride(i) != strides[i]) return false;
  return true;
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
  if (packed && packed->numel() == plan.packed_floats &&
      KEGFAST_TUCKER2(p, tucker2_packed_from)(p, plan, first, core, last, packed->const_data_ptr<float>())) {
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

// 0 where every call needs what forward() does.
int64_t tucker2_prepare(const Tensor& x, const Tensor& first_weight, const Tensor& core_weight,
                        const Tensor& last_weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& addend, const Tensor& packed, int64_t stride_h,
                        int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                        int64_t dilation_w, bool relu) {
  check_weights(x, first_weight, core_weight, last_weight, bias);
  Tucker2Params p = geometry(x.size(0), x.size(1), x.size(2), x.size(3), core_weight, last_weight.size(0),
                             {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w});
  if (p.images == 0 || (bias && !bias->is_contiguous())) return 0;
  set_input(p, x);
  choose_numbers(p);
  if (p.type != Tucker2Type::float32 && !p.pairs) return 0;
  p.relu = relu;
  p.packed = packed.const_data_ptr<float>();
  if (addend) {
    check_addend(p, *addend);
    if (!lies_as_output(p, *addend)) return 0;
    p.addend = addend->const_data_ptr();
  }
  choose_form(p);
  const int64_t threads = threads_for(work_of(p), p.images * p.out_height);
  const Tucker2Plan plan = KEGFAST_TUCKER2(p, tucker2_plan)(p, threads);
  const Tucker2Factor first = factor(first_weight), core = factor(core_weight), last = factor(last_weight);
  if (packed.numel() != plan.packed_floats ||
      !KEGFAST_TUCKER2(p, tucker2_packed_from)(p, plan, first, core, last, p.packed))
    return 0;
  std::vector<SeenTensor> seen;
  for (const Tensor* t : {&x, &first_weight, &core_weight, &last_weight}) seen.emplace_back(*t);
  if (bias) seen.emplace_back(*bias);
  std::optional<SeenTensor> seen_addend;
  if (addend) seen_addend.emplace(*addend);
  auto* const call = new Tucker2Prepared{std::move(seen),
                                         std::move(seen_addend),
                                         p,
                                         plan,
                                         threads,
                                         torch::stable::get_num_threads(),
                                         active_isa(),
                                         choices_made(),
                                         tucker2_winograd(),
                                         {},
                                         0};
  call->sample_count = KEGFAST_TUCKER2(p, tucker2_samples)(p, plan, first, core, last, call->samples);
  return reinterpret_cast<int64_t>(call);
}

constexpr size_t kBias = 4;  // in Tucker2Prepared::seen

const float* widen(const uint16_t* bfloat16, int64_t count, std::vector<float>& wide) {
  wide.resize(static_cast<size_t>(count));
  std::transform(bfloat16, bfloat16 + count, wide.begin(), bf16_to_float);
  return wide.data();
}

bool holds(const Tucker2Prepared& call, void* x, void* addend) {
  if (call.isa != active_isa() || call.choices != choices_made() ||
      call.most_winograd != tucker2_winograd() || call.pool_threads != torch::stable::get_num_threads())
    return false;
  if (!call.seen[0].looks_like(x)) return false;
  if (call.addend.has_value() != (addend != nullptr)) return false;
  if (call.addend && !call.addend->looks_like(addend)) return false;
  for (size_t i = 1; i < call.seen.size(); ++i)
    if (!call.seen[i].unchanged()) return false;
  const size_t number = call.p.pairs ? 2 : 4;
  for (int64_t i = 0; i < call.sample_count; ++i)
    if (std::memcmp(call.samples[i].factor, call.samples[i].packed, number) != 0) return false;
  return true;
}

}  // namespace

std::vector<void*> prepared_tensors(const Tucker2Prepared& call) {
  std::vector<void*> found;
  for (const SeenTensor& t : call.seen) found.push_back(t.implementation());
  return found;
}

void* run_prepared(const Tucker2Prepared& call, void* x, void* addend) {
  if (!holds(call, x, addend)) return nullptr;
  Tucker2Params p = call.p;
  p.x = SeenTensor::numbers(x);
  if (addend) p.addend = SeenTensor::numbers(addend);
  std::vector<float> wide_bias;
  if (call.seen.size() > kBias) {
    p.bias = static_cast<const float*>(call.seen[kBias].numbers());
    if (p.pairs)
      p.bias = widen(static_cast<const uint16_t*>(call.seen[kBias].numbers()), p.features, wide_bias);
  }
  const auto forget = [](AtenTensorHandle t) { aoti_torch_delete_tensor_object(t); };
  std::unique_ptr<AtenTensorOpaque, decltype(forget)> y(new_output(p), forget);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(y.get(), &p.y));
  run_rows(p, call.plan, call.threads);
  return y.release();
}

int64_t prepared_work(const Tucker2Prepared& call) {
  return multiply_adds(call.p);
}
void forget_prepared(Tucker2Prepared* call) {
  delete call;
}
bool grad_mode() {
  return aoti_torch_grad_mode_is_enabled();
}

}  // namespace kegfast

STABLE_TORCH_LIBRARY_IMPL(kegfast, CPU, m) {
  m.impl("tucker2", TORCH_BOX(&kegfast::tucker2));
  m.impl("tucker2_add", TORCH_BOX(&kegfast::tucker2_add));
  m.impl("tucker2_forward", TORCH_BOX(&kegfast::tucker2_forward));
  m.impl("tucker2_prepare", TORCH_BOX(&kegfast::tucker2_prepare));
  m.impl("tucker2_pack", TORCH_BOX(&kegfast::tucker2_pack));
}
