// diversity on CUDA: checks, allocation, and the plan on the current stream.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <tuple>

#include "check.h"
#include "diversity_plan.h"
#include "launch.h"

namespace kegfast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Sample>
void run(DiversityProblem<Sample> problem, const Tensor& samples, const Launcher& launcher) {
  problem.samples = static_cast<const Sample*>(samples.data_ptr());
  const Tensor workspace =
      torch::stable::new_empty(samples, {int64_t(diversity(problem, nullptr, launcher))}, ScalarType::Byte);
  diversity(problem, static_cast<char*>(workspace.data_ptr()), launcher);
}

std::tuple<Tensor, Tensor, Tensor> diversity_forward(const Tensor& noises,   // [B, nz]
                                                     const Tensor& samples,  // [B, D]
                                                     int64_t metric, int64_t noise_metric, bool noise_grad,
                                                     bool sample_grad) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  KEGFAST_CHECK(noises.dim() == 2 && noises.size(1) > 0, "noises", "(B, nz)", noises.dim());
  KEGFAST_CHECK(samples.dim() == 2 && samples.size(1) > 0, "samples", "(B, D)", samples.dim());
  KEGFAST_CHECK(noises.size(0) == samples.size(0) && noises.size(0) > 0, "noises", "one row a sample",
                noises.size(0));
  KEGFAST_CHECK(noises.get_device() == samples.get_device() && noises.is_cuda() && samples.is_cuda(),
                "noises", "on the samples' device", int(noises.get_device()));
  KEGFAST_CHECK(samples.size(0) <= 1 << 20 && samples.size(1) <= kMost / 2, "samples",
                "at most 2^20 rows of 2^30", samples.size(0));
  KEGFAST_CHECK(metric >= 0 && metric < 4 && noise_metric >= 0 && noise_metric < 2, "metric",
                "one that is known", metric);

  const Launcher launcher(samples);
  const Tensor z = torch::stable::contiguous(torch::stable::to(noises, ScalarType::Float));
  const Tensor x = torch::stable::contiguous(samples);
  const int64_t batch = x.size(0);
  const int64_t one[] = {1};
  const torch::headeronly::IntHeaderOnlyArrayRef scalar(one, size_t{0});
  Tensor exponent = torch::stable::new_empty(x, scalar, ScalarType::Double);
  const auto gradient_like = [&](const Tensor& t, bool wanted) {
    return wanted ? torch::stable::new_empty(x, {t.size(0), t.size(1)}, ScalarType::Float)
                  : torch::stable::new_empty(x, {0}, ScalarType::Float);
  };
  Tensor noise_gradient = gradient_like(z, noise_grad), sample_gradient = gradient_like(x, sample_grad);

  const auto problem = [&](auto element) {
    return DiversityProblem<decltype(element)>{
        static_cast<const float*>(z.data_ptr()),
        nullptr,
        static_cast<double*>(exponent.data_ptr()),
        noise_grad ? static_cast<float*>(noise_gradient.data_ptr()) : nullptr,
        sample_grad ? static_cast<float*>(sample_gradient.data_ptr()) : nullptr,
        int(batch),
        int(z.size(1)),
        int(x.size(1)),
        Metric(metric),
        NoiseMetric(noise_metric),
        launcher.shared_limit()};
  };
  switch (x.scalar_type()) {
    case ScalarType::Float:
      run(problem(float{}), x, launcher);
      break;
    case ScalarType::BFloat16:
      run(problem(simt::bf16{}), x, launcher);
      break;
    case ScalarType::Half:
      run(problem(simt::fp16{}), x, launcher);
      break;
    default:
      KEGFAST_CHECK(false, "samples", "float32, bfloat16 or float16 on CUDA", "another dtype");
  }
  return {exponent, noise_gradient, sample_gradient};
}

}  // namespace
}  // namespace kegfast::cuda

STABLE_TORCH_LIBRARY_IMPL(kegfast, CUDA, m) {
  m.impl("diversity_forward", TORCH_BOX(&kegfast::cuda::diversity_forward));
}
