// diversity on the CPU: checks, allocation, choice of kernel, threads over features.
#include "diversity.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/diversity_run.h"
#include "cpu/half.h"
#include "cpu/kept_memory.h"

namespace kegfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Element::f32;
    case ScalarType::Double:
      return Element::f64;
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Half:
      return Element::f16;
    default:
      KEGFAST_CHECK(false, "samples and noises", "of a floating-point dtype", static_cast<int>(type));
      return {};
  }
}

Noises read_noises(const Tensor& noises) {
  const int64_t batch = noises.size(0), width = noises.size(1), down = noises.stride(0),
                across = noises.stride(1);
  const auto read = [&](const auto* data, auto widen) {
    return Noises(batch, width, [&](int64_t i, int64_t k) { return widen(data[i * down + k * across]); });
  };
  const void* data = noises.const_data_ptr();
  const auto same = [](auto value) { return static_cast<double>(value); };
  switch (element_of(noises.scalar_type())) {
    case Element::f32:
      return read(static_cast<const float*>(data), same);
    case Element::f64:
      return read(static_cast<const double*>(data), same);
    case Element::bf16:
      return read(static_cast<const uint16_t*>(data), bf16_to_float);
    default:
      return read(static_cast<const uint16_t*>(data), half_to_float);
  }
}

// An empty tensor, by the shortest way there is: a call of torch's dispatcher costs as much as 32 samples.
Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) {
  int64_t strides[] = {1, 1};
  if (shape.size() == 2) strides[0] = shape.end()[-1];
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides,
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                               aoti_torch_device_type_cpu(), 0, &tensor));
  return Tensor(tensor);
}

// The type of losses and gradients.
ScalarType widened(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor gradient_like(const Tensor& x, bool wanted) {
  const ScalarType type = widened(x);
  if (!wanted) return empty({0}, type);
  const int64_t bytes = x.numel() * (type == ScalarType::Double ? 8 : 4);
  if (bytes < kLeastKept) return empty({x.size(0), x.size(1)}, type);
  const int64_t shape[] = {x.size(0), x.size(1)}, strides[] = {x.size(1), 1};
  KeptMemory* memory = KeptMemory::take(bytes);
  return torch::stable::from_blob(memory->data, shape, strides, x.device(), type,
                                  [memory](void*) { KeptMemory::give_back(memory); });
}

// Writes `value` to all of x.
void fill(const Tensor& x, double value) {
  const int64_t count = x.numel();
  if (x.scalar_type() == ScalarType::Double)
    std::fill_n(static_cast<double*>(x.mutable_data_ptr()), count, value);
  else
    std::fill_n(static_cast<float*>(x.mutable_data_ptr()), count, static_cast<float>(value));
}

void check(const Tensor& noises, const Tensor& samples, int64_t metric, int64_t noise_metric) {
  KEGFAST_CHECK(samples.dim() == 2, "samples", "2-dimensional", samples.dim());
  KEGFAST_CHECK(noises.dim() == 2, "noises", "2-dimensional", noises.dim());
  KEGFAST_CHECK(noises.size(0) == samples.size(0), "samples", "as many as noises", samples.size(0));
  KEGFAST_CHECK(samples.numel() > 0 && noises.numel() > 0, "samples and noises", "not empty", 0);
  KEGFAST_CHECK(samples.size(0) <= int64_t{1} << 24, "samples", "at most 2^24", samples.size(0));
  KEGFAST_CHECK(0 <= metric && metric <= 3, "metric", "0 to 3", metric);
  KEGFAST_CHECK(0 <= noise_metric && noise_metric <= 1, "noise_metric", "0 or 1", noise_metric);
  check_in_memory("noises", noises), check_in_memory("samples", samples);
}

struct Evaluation {
  double exponent;
  Tensor noise_gradient, sample_gradient;  // of the exponent; empty where nobody asks for them
};

Evaluation evaluate(const Tensor& noises,  // [B, nz]
                    const Tensor& given,   // [B, D]
                    int64_t metric, int64_t noise_metric, double factor, bool noise_grad, bool sample_grad) {
  check(noises, given, metric, noise_metric);
  const Tensor samples =
      given.stride(1) == 1 || given.size(1) == 1 ? given : torch::stable::contiguous(given);
  const int64_t B = samples.size(0), D = samples.size(1);
  const auto kind = static_cast<Metric>(metric);
  const auto noise_kind = static_cast<NoiseMetric>(noise_metric);
  Evaluation out{kNaN, gradient_like(noises, noise_grad), gradient_like(samples, sample_grad)};

  const Noises prepared = read_noises(noises);
  DiversityParams params{};
  params.samples = samples.const_data_ptr();
  params.gradient = sample_grad ? out.sample_gradient.mutable_data_ptr() : nullptr;
  params.batch = B;
  params.features = D;
  params.row_stride = samples.stride(0);
  params.element = element_of(samples.scalar_type());
  const bool averaged = kind == Metric::l1 || kind == Metric::sqeuclidean;
  const double scale = -factor / (static_cast<double>(B) * B) / (averaged ? static_cast<double>(D) : 1.0);

  if (prepared.finite) {
    Diversity diversity(params, kind, noise_kind, prepared);
    if (noise_grad) {
      const std::vector<double> d = diversity.distances();
      void* data = out.noise_gradient.mutable_data_ptr();
      if (out.noise_gradient.scalar_type() == ScalarType::Double)
        noise_gradient(prepared, noise_kind, d, scale, static_cast<double*>(data));
      else
        noise_gradient(prepared, noise_kind, d, scale, static_cast<float*>(data));
    }
    out.exponent = diversity.run(scale);
  }
  if (out.exponent != out.exponent) {
    fill(out.noise_gradient, kNaN);
    fill(out.sample_gradient, kNaN);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> diversity_forward(const Tensor& noises, const Tensor& samples,
                                                     int64_t metric, int64_t noise_metric, bool noise_grad,
                                                     bool sample_grad) {
  const Evaluation got = evaluate(noises, samples, metric, noise_metric, 1, noise_grad, sample_grad);
  const Tensor exponent = empty({}, ScalarType::Double);
  fill(exponent, got.exponent);
  return {exponent, got.noise_gradient, got.sample_gradient};
}

std::tuple<Tensor, Tensor, Tensor> diversity_loss(const Tensor& noises, const Tensor& samples, int64_t metric,
                                                  int64_t noise_metric, double scale, bool log,
                                                  bool noise_grad, bool sample_grad) {
  const Evaluation got = evaluate(noises, samples, metric, noise_metric, scale, noise_grad, sample_grad);
  const Tensor loss = empty({}, widened(samples));
  fill(loss, log ? got.exponent : std::exp(got.exponent));
  return {loss, got.noise_gradient, got.sample_gradient};
}

}  // namespace

void force_l1_kernel(L1Kernel kernel) {
  forced_l1.store(kernel, std::memory_order_relaxed);
}

}  // namespace kegfast

STABLE_TORCH_LIBRARY_IMPL(kegfast, CPU, m) {
  m.impl("diversity_forward", TORCH_BOX(&kegfast::diversity_forward));
  m.impl("diversity_loss", TORCH_BOX(&kegfast::diversity_loss));
}
