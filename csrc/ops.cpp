// Every operator of kegfast, one line of meaning each. Kernels register themselves at the end of cpu/<op>.cpp and cuda/<op>.cu.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(kegfast, m) {
  // -mean_ij w(noises_i, noises_j) d(samples_i, samples_j) (float64 scalar) and its gradients, both in one pass.
  m.def(
      "diversity_forward(Tensor noises, Tensor samples, int metric, int noise_metric, bool noise_grad, bool sample_grad)"
      " -> (Tensor exponent, Tensor noise_gradient, Tensor sample_gradient)");
}
