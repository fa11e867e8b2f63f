// tucker2 on CUDA: checks, allocation, the plan on the current stream, weight gradients.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <tuple>

#include "check.h"
#include "launch.h"
#include "tucker2_plan.h"

// Part of torch's stable ABI; its header hides it from a build without a CUDA torch.
extern "C" AOTITorchError aoti_torch_cuda_convolution_backward(
    AtenTensorHandle grad_output, AtenTensorHandle input, AtenTensorHandle weight, const int64_t** bias_sizes,
    int64_t bias_sizes_length, const int64_t* stride, int64_t stride_length, const int64_t* padding,
    int64_t padding_length, const int64_t* dilation, int64_t dilation_length, int32_t transposed,
    const int64_t* output_padding, int64_t output_padding_length, int64_t groups, const int32_t* output_mask,
    int64_t output_mask_length, AtenTensorHandle* input_grad, AtenTensorHandle* weight_grad,
    AtenTensorHandle* bias_grad);

namespace kegfast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float32 by one TF32 product instead of three; set from torch.backends.cudnn.allow_tf32.
std::atomic<bool> tf32{false};

Tensor same_type(const Tensor& t, const Tensor& like) {
  return t.scalar_type() == like.scalar_type() ? t : torch::stable::to(t, like.scalar_type());
}

bool channels_last(const Tensor& x) {
  return x.stride(1) == 1 && x.size(2) * x.size(3) > 1;
}

// (n, c, h, w), dense, as pixels of channels or as planes.
Tensor empty_image(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool pixels) {
  if (!pixels) return torch::stable::new_empty(like, {n, c, h, w});
  return torch::stable::transpose(
      torch::stable::transpose(torch::stable::new_empty(like, {n, h, w, c}), 2, 3), 1, 2);
}

template <class T>
Image<T> image(const Tensor& t) {  // (N, C, H, W)
  using Value = std::remove_const_t<T>;
  return make_image<T>(static_cast<Value*>(t.data_ptr()),
                       {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}, int(t.size(1)), int(t.size(2)),
                       int(t.size(3)));
}

template <class T>
Factor<T> factor(const Tensor& w) {
  return make_factor(static_cast<const T*>(w.data_ptr()),
                     {w.stride(0), w.stride(1), w.stride(2), w.stride(3)}, int(w.size(0)), int(w.size(1)),
                     int(w.size(2)), int(w.size(3)));
}

// Rows and inputs exchanged, taps backward: what the gradient of x convolves with.
template <class T>
Factor<T> transposed(const Tensor& w) {
  const int64_t last_tap = (w.size(2) - 1) * w.stride(2) + (w.size(3) - 1) * w.stride(3);
  return make_factor(static_cast<const T*>(w.data_ptr()) + last_tap,
                     {w.stride(1), w.stride(0), -w.stride(2), -w.stride(3)}, int(w.size(1)), int(w.size(0)),
                     int(w.size(2)), int(w.size(3)));
}

template <class M, class T>
void run(const Tucker2Problem<T>& problem, const Tensor& like, const Launcher& launcher) {
  std::optional<Tensor> kept;  // freed in stream order when the call returns
  const auto workspace = [&](size_t bytes) {
    kept = torch::stable::new_empty(like, {int64_t(bytes)}, ScalarType::Byte);
    return static_cast<char*>(kept->data_ptr());
  };
  tucker2<M>(problem, workspace, launcher);
}

// work(Math{}) for the tensor's dtype and the precision asked for.
template <class Work>
void for_dtype(const Tensor& x, Work work) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return tf32 ? work(Math<float, false>{}) : work(Math<float, true>{});
    case ScalarType::BFloat16:
      return work(Math<simt::bf16, false>{});
    case ScalarType::Half:
      return work(Math<simt::fp16, false>{});
    default:
      KEGFAST_CHECK(false, "x", "float32, bfloat16 or float16 on CUDA", "another dtype");
  }
}

void check_image(const char* name, const Tensor& t) {
  KEGFAST_CHECK(t.dim() == 4, name, "(N, C, H, W)", t.dim());
  KEGFAST_CHECK(t.is_cuda(), name, "on a CUDA device", "another one");
  for (int64_t dim : {0, 1, 2, 3})
    KEGFAST_CHECK(t.size(dim) < int64_t(1) << 30, name, "below 2^30 in every size", t.size(dim));
}

DeviceLimits limits(const Launcher& launcher) {
  const int major = launcher.attribute(cudaDevAttrComputeCapabilityMajor);
  return {launcher.shared_limit(), launcher.attribute(cudaDevAttrMultiProcessorCount),
          major == 9 || major == 10};
}

struct Kept {
  Tensor y, t1, t2;
};

Kept forward(const Tensor& x, const Tensor& first_weight, const Tensor& core_weight,
             const Tensor& last_weight, const std::optional<Tensor>& bias_weight, const Window& window,
             bool relu, bool keep, Form form) {
  check_image("x", x);
  const Tensor first = same_type(first_weight, x), core = same_type(core_weight, x),
               last = same_type(last_weight, x);
  for (const Tensor* w : {&first, &core, &last}) {
    check_image("factors", *w);
    KEGFAST_CHECK(w->get_device() == x.get_device(), "factors", "on x's device", int(w->get_device()));
  }
  KEGFAST_CHECK(first.size(1) == x.size(1), "first", "(R1, C, 1, 1) with x's C", first.size(1));
  KEGFAST_CHECK(core.size(1) == first.size(0), "core", "(R2, R1, kh, kw) with first's R1", core.size(1));
  KEGFAST_CHECK(last.size(1) == core.size(0), "last", "(K, R2, 1, 1) with core's R2", last.size(1));
  std::optional<Tensor> bias;
  if (bias_weight) {
    bias = torch::stable::contiguous(same_type(*bias_weight, x));
    KEGFAST_CHECK(bias->dim() == 1 && bias->size(0) == last.size(0) && bias->get_device() == x.get_device(),
                  "bias", "(K,) on x's device", bias->dim());
  }
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3);
  const auto out = [](int64_t size, int kernel, int stride, int padding, int dilation) {
    return (size + 2 * padding - int64_t(dilation) * (kernel - 1) - 1) / stride + 1;
  };
  const int64_t out_h = out(h, window.kernel_h, window.stride_h, window.padding_h, window.dilation_h);
  const int64_t out_w = out(w, window.kernel_w, window.stride_w, window.padding_w, window.dilation_w);
  KEGFAST_CHECK(out_h > 0 && out_w > 0, "x", "at least as large as the core's window", h);
  const int64_t padded_h = h + 2 * window.padding_h, padded_w = w + 2 * window.padding_w;
  KEGFAST_CHECK(n * padded_h * padded_w < int64_t(1) << 31, "x", "below 2^31 pixels", n * h * w);

  const Launcher launcher(x);
  Kept kept{
      empty_image(x, n, last.size(0), out_h, out_w, channels_last(x)),
      keep ? torch::stable::new_empty(x, {n, padded_h, padded_w, core.size(1)})
           : torch::stable::new_empty(x, {0}),
      keep ? torch::stable::new_empty(x, {n, out_h, out_w, core.size(0)}) : torch::stable::new_empty(x, {0})};
  if (n == 0) return kept;
  for_dtype(x, [&](auto math) {
    using M = decltype(math);
    using T = typename M::T;
    run<M>(Tucker2Problem<T>{image<const T>(x),
                             image<T>(kept.y),
                             factor<T>(first),
                             factor<T>(core),
                             factor<T>(last),
                             keep ? static_cast<T*>(kept.t1.data_ptr()) : nullptr,
                             keep ? static_cast<T*>(kept.t2.data_ptr()) : nullptr,
                             {bias ? static_cast<const T*>(bias->data_ptr()) : nullptr, relu},
                             window,
                             int(n),
                             form,
                             limits(launcher)},
           x, launcher);
  });
  return kept;
}

Window window_of(const Tensor& core, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
                 int64_t dilation_h, int64_t dilation_w) {
  check_image("core", core);
  KEGFAST_CHECK(stride_h > 0 && stride_w > 0, "stride", "above 0", stride_h);
  KEGFAST_CHECK(dilation_h > 0 && dilation_w > 0, "dilation", "above 0", dilation_h);
  KEGFAST_CHECK(padding_h >= 0 && padding_w >= 0, "padding", "at least 0", padding_h);
  return {int(core.size(2)), int(core.size(3)), int(stride_h),   int(stride_w),
          int(padding_h),    int(padding_w),    int(dilation_h), int(dilation_w)};
}

Tensor tucker2_as(const Tensor& x, const Tensor& first, const Tensor& core, const Tensor& last,
                  const std::optional<Tensor>& bias, int64_t stride_h, int64_t stride_w, int64_t padding_h,
                  int64_t padding_w, int64_t dilation_h, int64_t dilation_w, bool relu, int64_t form) {
  KEGFAST_CHECK(form >= 0 && form < 4, "form", "0 (automatic), 1 (fused), 2 (stages) or 3 (persistent)",
                form);
  const Window window = window_of(core, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w);
  return forward(x, first, core, last, bias, window, relu, false, Form(form)).y;
}

// `packed` is the CPU's. Here factors are read where they lie: a copy kept between calls would outlive them
// in a captured graph, and would have to be ordered across streams.
Tensor tucker2_inference(const Tensor& x, const Tensor& first, const Tensor& core, const Tensor& last,
                         const std::optional<Tensor>& bias, const std::optional<Tensor>& /*packed*/,
                         int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
                         int64_t dilation_h, int64_t dilation_w, bool relu) {
  return tucker2_as(x, first, core, last, bias, stride_h, stride_w, padding_h, padding_w, dilation_h,
                    dilation_w, relu, 0);
}

std::tuple<Tensor, Tensor, Tensor> tucker2_forward(const Tensor& x, const Tensor& first, const Tensor& core,
                                                   const Tensor& last, const std::optional<Tensor>& bias,
                                                   int64_t stride_h, int64_t stride_w, int64_t padding_h,
                                                   int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
                                                   bool relu, bool keep) {
  const Window window = window_of(core, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w);
  Kept kept = forward(x, first, core, last, bias, window, relu, keep, Form::automatic);
  return {kept.y, kept.t1, kept.t2};
}

// ---- gradients

Tensor pixels_of(const Tensor& planes) {  // (N, C, H, W) -> (N H W, C)
  const Tensor last = torch::stable::transpose(torch::stable::transpose(planes, 1, 2), 2, 3);
  return torch::stable::reshape(last, {-1, planes.size(1)});
}

Tensor planes_of(const Tensor& pixels) {  // (N, H, W, C) -> (N, C, H, W), a view
  return torch::stable::transpose(torch::stable::transpose(pixels, 2, 3), 1, 2);
}

Tensor product(const Tensor& a, const Tensor& b,
               const Tensor& weight) {  // a^T b, of rows of pixels, as a (rows, inputs, 1, 1) weight
  const Tensor sum = torch::stable::matmul(torch::stable::transpose(a, 0, 1), b);
  return torch::stable::reshape(sum, {weight.size(0), weight.size(1), 1, 1});
}

Tensor core_gradient(const Tensor& dz2, const Tensor& t1, const Tensor& core, int64_t dilation_h,
                     int64_t dilation_w) {
  const int64_t one[2] = {1, 1}, zero[2] = {0, 0}, dilation[2] = {dilation_h, dilation_w};
  const int32_t mask[3] = {0, 1, 0};
  AtenTensorHandle input_grad = nullptr, weight_grad = nullptr, bias_grad = nullptr;
  const AOTITorchError error = aoti_torch_cuda_convolution_backward(
      dz2.get(), t1.get(), core.get(), nullptr, 0, one, 2, zero, 2, dilation, 2, 0, zero, 2, 1, mask, 3,
      &input_grad, &weight_grad, &bias_grad);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "kegfast: the core's weight gradient failed");
  for (AtenTensorHandle unused : {input_grad, bias_grad}) {
    if (unused != nullptr) aoti_torch_delete_tensor_object(unused);
  }
  return torch::stable::contiguous(Tensor(weight_grad));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> tucker2_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& t1, const Tensor& t2, const Tensor& first,
    const Tensor& core, const Tensor& last, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
    int64_t dilation_w, bool need_x, bool need_first, bool need_core, bool need_last) {
  for (const Tensor* t : {&gradient, &x, &first, &core, &last}) {
    check_image("arguments", *t);
    KEGFAST_CHECK(t->scalar_type() == gradient.scalar_type() && t->get_device() == gradient.get_device(),
                  "arguments", "of one dtype and device", int(t->get_device()));
  }
  const int64_t border_h = (core.size(2) - 1) * dilation_h - padding_h,
                border_w = (core.size(3) - 1) * dilation_w - padding_w;
  KEGFAST_CHECK(border_h >= 0 && border_w >= 0, "padding", "at most dilation * (kernel - 1)", padding_h);
  const Launcher launcher(gradient);
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3), out_h = gradient.size(2),
                out_w = gradient.size(3);
  KEGFAST_CHECK(out_h == h + 2 * padding_h - dilation_h * (core.size(2) - 1) &&
                    out_w == w + 2 * padding_w - dilation_w * (core.size(3) - 1),
                "gradient", "the size that x gives at stride 1", out_h);
  KEGFAST_CHECK(n * (out_h + 2 * border_h) * (out_w + 2 * border_w) < int64_t(1) << 31, "gradient",
                "below 2^31 pixels", n * h * w);

  const Tensor nothing = torch::stable::new_empty(gradient, {0});
  const bool weights = (need_first || need_core) && n > 0;
  Tensor dx = need_x ? empty_image(gradient, n, x.size(1), h, w, channels_last(gradient)) : nothing;
  Tensor dz2 = weights ? torch::stable::new_empty(
                             gradient, {n, out_h + 2 * border_h, out_w + 2 * border_w, core.size(0)})
                       : nothing;
  Tensor dz1 = weights ? torch::stable::new_empty(gradient, {n, h, w, core.size(1)}) : nothing;
  const Window window{int(core.size(2)), int(core.size(3)), 1, 1, int(border_h), int(border_w),
                      int(dilation_h),   int(dilation_w)};
  if (n > 0 && (need_x || weights)) {
    for_dtype(gradient, [&](auto math) {
      using M = decltype(math);
      using T = typename M::T;
      // Without a gradient of x the last stage is left out; its place still tells the plan how large the
      // image is.
      Image<T> to =
          need_x ? image<T>(dx) : make_image<T>(nullptr, {0, 0, 0, 0}, int(x.size(1)), int(h), int(w));
      run<M>(Tucker2Problem<T>{image<const T>(gradient),
                               to,
                               transposed<T>(last),
                               transposed<T>(core),
                               transposed<T>(first),
                               weights ? static_cast<T*>(dz2.data_ptr()) : nullptr,
                               weights ? static_cast<T*>(dz1.data_ptr()) : nullptr,
                               {nullptr, false},
                               window,
                               int(n),
                               Form::automatic,
                               limits(launcher)},
             gradient, launcher);
    });
  }
  // Without images every sum below is over nothing: matmul and the convolution give zeros.
  Tensor dfirst = need_first
                      ? (n > 0 ? product(torch::stable::reshape(dz1, {-1, core.size(1)}), pixels_of(x), first)
                               : torch::stable::new_zeros(first, {first.size(0), first.size(1), 1, 1}))
                      : nothing;
  Tensor dlast = need_last
                     ? product(pixels_of(gradient), torch::stable::reshape(t2, {-1, core.size(0)}), last)
                     : nothing;
  Tensor dcore = nothing;
  if (need_core && n > 0) {
    Tensor inner = torch::stable::narrow(dz2, 1, border_h, out_h);
    inner = torch::stable::narrow(inner, 2, border_w, out_w);
    dcore = core_gradient(planes_of(inner), planes_of(t1), core, dilation_h, dilation_w);
  } else if (need_core) {
    dcore = torch::stable::new_zeros(core, {core.size(0), core.size(1), core.size(2), core.size(3)});
  }
  return {dx, dfirst, dcore, dlast};
}

void allow_tf32(bool allow) {
  tf32 = allow;
}

}  // namespace
}  // namespace kegfast::cuda

// Operators that only the CUDA library has.
STABLE_TORCH_LIBRARY_FRAGMENT(kegfast, m) {
  // tucker2 in a chosen form, for measurements: 0 automatic, 1 fused, 2 stages, 3 persistent.
  m.def(
      "tucker2_as(Tensor x, Tensor first, Tensor core, Tensor last, Tensor? bias, int stride_h, int "
      "stride_w, int padding_h,"
      " int padding_w, int dilation_h, int dilation_w, bool relu, int form) -> Tensor");
  // Whether float32 may go through one TF32 product instead of three.
  m.def("cuda_allow_tf32(bool allow) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kegfast, CUDA, m) {
  m.impl("tucker2", TORCH_BOX(&kegfast::cuda::tucker2_inference));
  m.impl("tucker2_forward", TORCH_BOX(&kegfast::cuda::tucker2_forward));
  m.impl("tucker2_backward", TORCH_BOX(&kegfast::cuda::tucker2_backward));
  m.impl("tucker2_as", TORCH_BOX(&kegfast::cuda::tucker2_as));
}

STABLE_TORCH_LIBRARY_IMPL(kegfast, CompositeExplicitAutograd, m) {
  m.impl("cuda_allow_tf32", TORCH_BOX(&kegfast::cuda::allow_tf32));
}
