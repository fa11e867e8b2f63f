// Stands in for csrc/cuda/launch.h: the operators' host code runs on CPU tensors and its kernels on the
// emulator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "fibers.h"

#define aoti_torch_cuda_convolution_backward aoti_torch_cpu_convolution_backward

constexpr int cudaDevAttrMultiProcessorCount = 132, cudaDevAttrComputeCapabilityMajor = 9;

namespace kegfast::cuda {

class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor&) {}

  template <class Kernel>
  void operator()(Kernel, const typename Kernel::Params& params, int64_t x, int64_t y,
                  size_t shared_bytes) const {
    if (x == 0 || y == 0) return;
    emulator::launch<Kernel>({int(x), int(y), 1}, shared_bytes, emulator::Order::ascending, params,
                             shared_limit());
  }
  int attribute(int which) const { return which; }
  size_t shared_limit() const { return 227 * 1024; }
};

}  // namespace kegfast::cuda
