// Puts kernels of simt.cuh's form on a CUDA stream.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include "simt.cuh"

// Part of torch's stable ABI; its header hides it from a build without a CUDA torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace kegfast::cuda {

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "kegfast: CUDA: ", cudaGetErrorString(error));
}

// The driver's function by its address: the library is not linked with the driver, which a machine that
// builds lacks.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                         &found));
  STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess, "kegfast: this CUDA driver knows no tensor maps");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerSm)
    enter(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

// Lets a kernel be launched with up to `bytes` of shared memory, all that the device has. Once per kernel and
// device: set before each launch to what that one needs, another thread's could lower it in between.
template <class Kernel>
void allow_shared(int device, size_t bytes) {
  static std::array<std::once_flag, 64> done;
  STD_TORCH_CHECK(size_t(device) < done.size(), "kegfast: no more than ", done.size(), " CUDA devices");
  std::call_once(done[device], [bytes] {
    check(cudaFuncSetAttribute(enter<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  });
}

// The device and current stream of a tensor, for the length of one operator call. Nothing here synchronizes,
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
    shared_limit_ = size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  }

  template <class Kernel>
  void operator()(Kernel, const typename Kernel::Params& params, int64_t x, int64_t y,
                  size_t shared_bytes) const {
    if (x == 0 || y == 0) return;
    STD_TORCH_CHECK(shared_bytes <= shared_limit_, "kegfast: a kernel asks for ", shared_bytes,
                    " bytes of shared memory, of which this device's blocks have ", shared_limit_);
    if (shared_bytes > 48 * 1024) allow_shared<Kernel>(device_, shared_limit_);
    enter<Kernel><<<dim3(unsigned(x), unsigned(y)), Kernel::kThreads, shared_bytes, stream_>>>(params);
    check(cudaGetLastError());
  }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }
  size_t shared_limit() const { return shared_limit_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int device_ = 0;
  size_t shared_limit_ = 0;
};

}  // namespace kegfast::cuda

namespace kegfast::simt {

inline TensorMap make_tensor_map(const TensorView& view) {
  static const auto encode = kegfast::cuda::tensor_map_encoder();
  cuuint64_t sizes[4], strides[3];
  cuuint32_t box[4] = {kBoxRow / 2}, every[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) sizes[i] = view.sizes[i];
  for (int i = 0; i < 3; ++i) strides[i] = view.strides[i] * 2, box[i + 1] = view.box[i];
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap));
  TensorMap map;
  const CUresult result = encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT16, 4,
                                 const_cast<void*>(view.data), sizes, strides, box, every,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "kegfast: no tensor map of this image, CUresult ", int(result));
  return map;
}

}  // namespace kegfast::simt
