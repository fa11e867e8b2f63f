// diversity's plan and kernels on the emulator, callable through ctypes.
#include <stdexcept>
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
void run(const cuda::DiversityProblem<Sample>& problem, DiversityCall& c) {
  const auto order = emulator::Order(c.order);
  const auto launch = [&](auto kernel, const auto& params, int64_t x, int64_t y, size_t shared_bytes) {
    ++c.launches;
    if (y > 65535 || x > INT32_MAX) throw std::runtime_error("a grid that CUDA has not");
    const size_t limit = c.shared_bytes;
    emulator::require_shared(shared_bytes, limit);
    if (!c.dry) emulator::launch<decltype(kernel)>({int(x), int(y), 1}, shared_bytes, order, params, limit);
  };
  c.workspace = int64_t(cuda::diversity(problem, nullptr, launch));
  if (c.dry) {
    cuda::diversity(problem, reinterpret_cast<char*>(256), launch);  // never read
    return;
  }
  std::vector<char> workspace(c.workspace + 256, char(0xff));
  auto base = (reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256;
  cuda::diversity(problem, reinterpret_cast<char*>(base), launch);
}

std::string error;

}  // namespace

extern "C" const char* diversity_error() {
  return error.c_str();
}

extern "C" int emulate_diversity(DiversityCall* c) {
  const auto call = [&](auto element) {
    using T = decltype(element);
    const cuda::DiversityProblem<T> problem{c->noises,
                                            static_cast<const T*>(c->samples),
                                            c->exponent,
                                            c->noise_gradient,
                                            c->sample_gradient,
                                            c->batch,
                                            c->noise_size,
                                            c->features,
                                            cuda::Metric(c->metric),
                                            cuda::NoiseMetric(c->noise_metric),
                                            size_t(c->shared_bytes),
                                            c->panel_bytes};
    run(problem, *c);
  };
  try {
    if (c->dtype == 0) call(float{});
    if (c->dtype == 1) call(bf16{});
    if (c->dtype == 2) call(fp16{});
  } catch (const std::exception& caught) {
    error = caught.what();
    return 1;
  }
  return 0;
}
