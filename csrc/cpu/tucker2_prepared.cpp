// Calls of tucker2 that are settled but for where x lies: what tucker2_repeat.cpp runs.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/half.h"
#include "cpu/seen_tensor.h"
#include "cpu/tucker2_call.h"

namespace kegfast {

// A factor in memory and the copy of its bytes from which it was packed.
struct CheckedFactor {
  SeenTensor seen;
  const char* copy;  // null: final
};

struct Tucker2Prepared {
  SeenTensor x;
  std::vector<CheckedFactor> factors;
  std::optional<SeenTensor> bias, addend;
  Tucker2Params p;
  Tucker2Plan plan;
  int64_t threads;
  uint32_t pool_threads;
  Isa isa;
  int64_t choices, most_winograd;
};

namespace {

const float* widen(const uint16_t* bfloat16, int64_t count, std::vector<float>& wide) {
  wide.resize(static_cast<size_t>(count));
  std::transform(bfloat16, bfloat16 + count, wide.begin(), bf16_to_float);
  return wide.data();
}

// One read of the factors and one of their copies, shared out where they are more than a cache holds.
bool same_numbers(const Tucker2Prepared& call) {
  constexpr int64_t kLeastShared = 512 << 10;
  for (const auto& [seen, copy] : call.factors) {
    if (!copy) continue;
    const auto* const numbers = static_cast<const char*>(seen.numbers());
    const int64_t bytes = seen.bytes(), parts = bytes < kLeastShared ? 1 : call.threads;
    std::atomic<bool> same{true};
    run_parts(parts, [&, copy = copy](int64_t i) {
      const int64_t begin = bytes * i / parts, end = bytes * (i + 1) / parts;
      if (std::memcmp(numbers + begin, copy + begin, static_cast<size_t>(end - begin)) != 0)
        same.store(false, std::memory_order_relaxed);
    });
    if (!same.load(std::memory_order_relaxed)) return false;
  }
  return true;
}

bool holds(const Tucker2Prepared& call, void* x, void* addend) {
  if (call.isa != active_isa() || call.choices != choices_made() ||
      call.most_winograd != tucker2_winograd() || call.pool_threads != torch::stable::get_num_threads())
    return false;
  if (!call.x.looks_like(x)) return false;
  if (call.addend.has_value() != (addend != nullptr)) return false;
  if (call.addend && !call.addend->looks_like(addend)) return false;
  for (const CheckedFactor& factor : call.factors)
    if (!factor.seen.unchanged()) return false;
  return (!call.bias || call.bias->unchanged()) && same_numbers(call);
}

}  // namespace

Tucker2Prepared* prepare_tucker2(const Tucker2Tensors& tensors, const std::array<int64_t, 6>& geometry_ints,
                                 bool relu) {
  const auto& [sh, sw, ph, pw, dh, dw] = geometry_ints;
  const Tensor x = tensor_of(tensors.x), packed = tensor_of(tensors.packed);
  const Tensor first = tensor_of(tensors.factors[0]), core = tensor_of(tensors.factors[1]),
               last = tensor_of(tensors.factors[2]);
  std::optional<Tensor> bias;
  if (tensors.bias) bias = tensor_of(tensors.bias);
  check_weights(x, first, core, last, bias);
  Tucker2Params p =
      geometry(x.size(0), x.size(1), x.size(2), x.size(3), core, last.size(0), {sh, sw, ph, pw, dh, dw});
  if (p.images == 0 || (bias && !bias->is_contiguous())) return nullptr;
  set_input(p, x);
  choose_numbers(p);
  if (p.type != Tucker2Type::float32 && !p.pairs) return nullptr;
  p.relu = relu;
  std::optional<SeenTensor> seen_bias, seen_addend;
  if (bias) {
    seen_bias.emplace(tensors.bias);
    if (!p.pairs) p.bias = static_cast<const float*>(seen_bias->numbers());
  }
  if (tensors.addend) {
    const Tensor addend = tensor_of(tensors.addend);
    check_addend(p, addend);
    if (!lies_as_output(p, addend)) return nullptr;
    seen_addend.emplace(tensors.addend);
    p.addend = seen_addend->numbers();
  }
  choose_form(p);
  const int64_t threads = threads_for(work_of(p), p.images * p.out_height);
  const Tucker2Plan plan = KEGFAST_TUCKER2(p, tucker2_plan)(p, threads);
  if (!is_packed_for(plan, packed)) return nullptr;
  p.packed = packed.const_data_ptr<float>();
  std::vector<CheckedFactor> factors;
  for (int i = 0; i < 3; ++i) {
    const SeenTensor seen(tensors.factors[i]);
    void* const copy = tensors.copies[i];
    if (copy && !same_bytes(seen, copy)) return nullptr;
    factors.push_back({seen, copy ? static_cast<const char*>(SeenTensor::numbers(copy)) : nullptr});
  }
  return new Tucker2Prepared{SeenTensor(tensors.x),
                             std::move(factors),
                             std::move(seen_bias),
                             std::move(seen_addend),
                             p,
                             plan,
                             threads,
                             torch::stable::get_num_threads(),
                             active_isa(),
                             choices_made(),
                             tucker2_winograd()};
}

void* run_prepared(const Tucker2Prepared& call, void* x, void* addend) {
  if (!holds(call, x, addend)) return nullptr;
  Tucker2Params p = call.p;
  p.x = SeenTensor::numbers(x);
  if (addend) p.addend = SeenTensor::numbers(addend);
  std::vector<float> wide_bias;
  if (call.bias && p.pairs)
    p.bias = widen(static_cast<const uint16_t*>(call.bias->numbers()), p.features, wide_bias);
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
