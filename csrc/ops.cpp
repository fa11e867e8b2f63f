// Every operator of kegfast, one line of meaning each. Kernels register themselves at the end of cpu/<op>.cpp
// and cuda/<op>.cu.
#include <torch/csrc/stable/library.h>

// clang-format off: schemas break between arguments
STABLE_TORCH_LIBRARY(kegfast, m) {
  // -mean_ij w(noises_i, noises_j) d(samples_i, samples_j) (float64 scalar) and its gradients, both in one
  // pass.
  m.def(
      "diversity_forward(Tensor noises, Tensor samples, int metric, int noise_metric, bool noise_grad, "
      "  bool sample_grad) -> (Tensor exponent, Tensor noise_gradient, Tensor sample_gradient)");

  // The loss itself, exp(scale * exponent) or with log its exponent, in the samples' widened type, and the
  // gradients of scale * exponent: what one training step on the CPU asks for, in one call.
  m.def(
      "diversity_loss(Tensor noises, Tensor samples, int metric, int noise_metric, float scale, "
      "  bool log, bool noise_grad, bool sample_grad)"
      "  -> (Tensor loss, Tensor noise_gradient, Tensor sample_gradient)");

  // T^2 KL(softmax(teacher / T) || softmax(student / T)), batch mean (float32 scalar), and its gradient in
  // the student, or none.
  m.def(
      "soft_target_forward(Tensor student, Tensor teacher, float temperature, bool want_gradient)"
      "  -> (Tensor loss, Tensor gradient)");

  // A Tucker-2 convolution last(core(first(x))) + bias, then ReLU if asked. packed: tucker2_pack of these
  // factors as they are now, which is the caller's to know, or none. Strides, paddings and dilations come as
  // single ints: lists cost a microsecond a call.
  m.def(
      "tucker2(Tensor x, Tensor first, Tensor core, Tensor last, Tensor? bias, Tensor? packed, "
      "  int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w, "
      "  bool relu) -> Tensor");
  // The same on CPUs, with an addend of y's shape and type before the ReLU.
  m.def(
      "tucker2_add(Tensor x, Tensor first, Tensor core, Tensor last, Tensor? bias, Tensor addend, "
      "  Tensor? packed, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, "
      "  int dilation_w, bool relu) -> Tensor");
  // The same for training. keep: also what the weight gradients need, t1 (N, H + 2 ph, W + 2 pw, R1) with its
  // zero border and t2 (N, P, Q, R2), float32 (x's type on CUDA); else both are empty.
  m.def(
      "tucker2_forward(Tensor x, Tensor first, Tensor core, Tensor last, Tensor? bias, int stride_h, "
      "  int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w, bool relu, "
      "  bool keep) -> (Tensor y, Tensor t1, Tensor t2)");
  // On CPUs: gradients of x (in its type), first, core, last and bias (float32), empty where not needed. y:
  // where it is not above 0 the gradient is nothing (ReLU), or none. t1, t2: kept, of R1 and R2 channels.
  m.def(
      "tucker2_gradients(Tensor gradient, Tensor? y, Tensor x, Tensor t1, Tensor t2, Tensor first, "
      "  Tensor core, Tensor last, int stride_h, int stride_w, int padding_h, int padding_w, "
      "  int dilation_h, int dilation_w, bool need_x, bool need_first, bool need_core, bool need_last, "
      "  bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // On CUDA devices: gradients of x, first, core, last at stride 1 (float32; empty where not needed).
  m.def(
      "tucker2_backward(Tensor gradient, Tensor x, Tensor t1, Tensor t2, Tensor first, Tensor core, "
      "  Tensor last, int padding_h, int padding_w, int dilation_h, int dilation_w, bool need_x, "
      "  bool need_first, bool need_core, bool need_last) -> (Tensor, Tensor, Tensor, Tensor)");
  // The factors in the order in which the CPU kernels read them, for one memory layout and instruction set.
  m.def(
      "tucker2_pack(Tensor first, Tensor core, Tensor last, int stride_h, int stride_w, "
      "  int dilation_h, int dilation_w, bool channels_last) -> Tensor");

  // On CPUs: the maximum of weight * x + bias (float32) over windows, then ReLU if asked. channels_last: y's
  // layout.
  m.def(
      "conv_max_pool(Tensor x, Tensor weight, Tensor? bias, int stride_h, int stride_w, int padding_h, "
      "  int padding_w, int pool_h, int pool_w, int pool_stride_h, int pool_stride_w, "
      "  int pool_padding_h, int pool_padding_w, bool relu, bool channels_last) -> Tensor");
}
// clang-format on
