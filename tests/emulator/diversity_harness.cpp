// diversity's plan and kernels on the emulator, callable through ctypes.
#include <cstring>
#include <string>
#include <vector>

#include "diversity_plan.h"
#include "fibers.h"
#include "harness.h"

namespace {

using namespace kegfast;
using simt::bf16;
using simt::fp16;

template <class Sample>
void run(const cuda::DiversityProblem<Sample>& problem, emulator::Order order) {
  const auto launch = [order](auto kernel, const auto& params, int x, int y, size_t shared_bytes) {
    emulator::launch<decltype(kernel)>({x, y, 1}, shared_bytes, order, params);
  };
  std::vector<char> workspace(cuda::diversity(problem, nullptr, launch) + 256, char(0xff));
  auto base = (reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256;
  cuda::diversity(problem, reinterpret_cast<char*>(base), launch);
}

std::string error;

}  // namespace

extern "C" const char* diversity_error() {
  return error.c_str();
}

// dtype: 0 float, 1 bfloat16, 2 half, of the samples; the noises are float. Returns 0, or 1 with
// diversity_error().
extern "C" int emulate_diversity(const float* noises, const void* samples, double* exponent,
                                 float* noise_gradient, float* sample_gradient, int batch, int noise_size,
                                 int features, int metric, int noise_metric, int dtype, int64_t shared_limit,
                                 int descending) {
  const auto call = [&](auto element) {
    using T = decltype(element);
    run<T>(
        {noises, static_cast<const T*>(samples), exponent, noise_gradient, sample_gradient, batch, noise_size,
         features, cuda::Metric(metric), cuda::NoiseMetric(noise_metric), size_t(shared_limit)},
        descending ? emulator::Order::descending : emulator::Order::ascending);
  };
  try {
    if (dtype == 0) call(float{});
    if (dtype == 1) call(bf16{});
    if (dtype == 2) call(fp16{});
  } catch (const std::exception& caught) {
    error = caught.what();
    return 1;
  }
  return 0;
}
