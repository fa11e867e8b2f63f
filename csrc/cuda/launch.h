// Puts kernels of simt.cuh's form on a CUDA stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdint>

// Part of torch's stable ABI; its header hides it from a build without a CUDA torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace kegfast::cuda {

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "kegfast: CUDA: ", cudaGetErrorString(error));
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerSm)
    enter(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

// The device and current stream of a tensor, for the length of one operator call. Nothing here synchronises,
// so that calls can be captured in a graph; the workspace comes from torch's caching allocator and is freed
// in stream order.
class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor& tensor) : guard_(tensor.get_device()) {
    void* stream = nullptr;
    const AOTITorchError error = aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream);
    STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "kegfast: no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
    device_ = tensor.get_device();
  }

  template <class Kernel>
  void operator()(Kernel, const typename Kernel::Params& params, int64_t x, int64_t y,
                  size_t shared_bytes) const {
    if (x == 0 || y == 0) return;
    if (shared_bytes > 48 * 1024) {
      check(cudaFuncSetAttribute(enter<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shared_bytes)));
    }
    enter<Kernel><<<dim3(unsigned(x), unsigned(y)), Kernel::kThreads, shared_bytes, stream_>>>(params);
    check(cudaGetLastError());
  }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }
  size_t shared_limit() const { return size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int device_ = 0;
};

}  // namespace kegfast::cuda
