// Whether a device runs this library's kernels.
#include <torch/csrc/stable/library.h>

#include <string>

#include "launch.h"

namespace kegfast::cuda {
namespace {

struct Nothing {
  static constexpr int kThreads = 32, kBlocksPerSm = 1;
  struct Params {};
  __device__ static void run(const Params&) {}
};

// Empty where the device (-1: the current one) runs this library's code, else why it does not: no machine
// code for its architecture and no PTX that its driver translates, or a driver that is too old.
std::string why_not(int64_t device) {
  int before = 0;
  cudaFuncAttributes found;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && device >= 0) error = cudaSetDevice(int(device));
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&found, enter<Nothing>);
  if (error == cudaSuccess) error = cudaSetDevice(before);
  if (error == cudaSuccess) return "";
  cudaSetDevice(before);
  cudaGetLastError();  // the next call is not to report this one
  return cudaGetErrorString(error);
}

}  // namespace
}  // namespace kegfast::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(kegfast, m) {
  m.def("cuda_why_not(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(kegfast, CompositeExplicitAutograd, m) {
  m.impl("cuda_why_not", TORCH_BOX(&kegfast::cuda::why_not));
}
