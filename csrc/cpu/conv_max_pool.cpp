// conv_max_pool on the CPU: checks, allocation, threads over rows of y.
#include "conv_max_pool.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "check.h"
#include "cpu/tucker2_call.h"

namespace kegfast {
namespace {

void check_window(const SlidingWindow& w, const char* name) {
  KEGFAST_CHECK(w.height > 0 && w.width > 0 && w.stride_h > 0 && w.stride_w > 0, name,
                "of positive size and stride", w.stride_h);
  KEGFAST_CHECK(w.padding_h >= 0 && w.padding_w >= 0, name, "of non-negative padding", w.padding_h);
}

ConvMaxPoolParams checked(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const SlidingWindow& conv, const SlidingWindow& pool) {
  for (const Tensor* t : {&x, &weight})
    KEGFAST_CHECK(t->dim() == 4 && t->is_cpu() && t->scalar_type() == ScalarType::Float, "x and weight",
                  "4-dimensional float32 tensors on the CPU", t->dim());
  KEGFAST_CHECK(weight.size(1) == x.size(1) && weight.size(0) > 0, "weight",
                "(K, C, kh, kw) with the channels of x", weight.size(1));
  check_window(conv, "convolution"), check_window(pool, "pool");
  KEGFAST_CHECK(conv.height <= 256, "weight", "a window of at most 256 rows", conv.height);
  KEGFAST_CHECK(2 * pool.padding_h <= pool.height && 2 * pool.padding_w <= pool.width, "pool",
                "padded by at most half of its size", pool.padding_h);
  ConvMaxPoolParams p{};
  p.images = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
  p.features = weight.size(0), p.conv = conv, p.pool = pool;
  const int64_t rows = conv.rows(p.height), columns = conv.columns(p.width);
  // A padded pool fits also where the convolution has left nothing to be padded.
  const bool fits = rows > 0 && columns > 0 && pool.rows(rows) > 0 && pool.columns(columns) > 0;
  KEGFAST_CHECK(fits && p.channels > 0, "x", "at least as large as both windows", p.height);
  if (bias)
    KEGFAST_CHECK(bias->numel() == p.features && bias->is_cpu() && bias->scalar_type() == ScalarType::Float,
                  "bias", "(K) of x's type", bias->numel());
  check_in_memory("x", x), check_in_memory("weight", weight);
  if (bias) check_in_memory("bias", *bias);
  return p;
}

Tensor conv_max_pool(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t pool_h,
                     int64_t pool_w, int64_t pool_stride_h, int64_t pool_stride_w, int64_t pool_padding_h,
                     int64_t pool_padding_w, bool relu, bool channels_last) {
  KEGFAST_CHECK(weight.dim() == 4, "weight", "4-dimensional", weight.dim());
  ConvMaxPoolParams p =
      checked(x, weight, bias, {weight.size(2), weight.size(3), stride_h, stride_w, padding_h, padding_w},
              {pool_h, pool_w, pool_stride_h, pool_stride_w, pool_padding_h, pool_padding_w});
  p.relu = relu, p.channels_last = channels_last;
  const int64_t conv_height = p.conv.rows(p.height), conv_width = p.conv.columns(p.width);
  const int64_t height = p.pool.rows(conv_height), width = p.pool.columns(conv_width);
  Tensor y = empty(p.images, p.features, height, width, channels_last, ScalarType::Float);
  if (p.images == 0) return y;
  p.x = x.const_data_ptr<float>(), p.y = y.mutable_data_ptr<float>();
  p.x_image = x.stride(0), p.x_channel = x.stride(1), p.x_row = x.stride(2), p.x_pixel = x.stride(3);
  std::optional<Tensor> dense_bias;
  if (bias) {
    dense_bias = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
    p.bias = dense_bias->const_data_ptr<float>();
  }
  const ConvMaxPoolPlan plan = KEGFAST_SELECT(conv_max_pool_plan)(p);
  Tensor packed = empty_flat(plan.packed_floats);  // anew in each call: a hundredth of it
  KEGFAST_SELECT(conv_max_pool_pack)(p, factor(weight), packed.mutable_data_ptr<float>());
  p.packed = packed.const_data_ptr<float>();
  const int64_t rows = p.images * height, taps = p.channels * p.conv.height * p.conv.width;
  const int64_t threads = threads_for(p.images * conv_height * conv_width * p.features * taps, rows);
  const auto kernel = KEGFAST_SELECT(conv_max_pool_rows);
  run_parts(threads, [&](int64_t i) {
    kernel(p, plan, rows * i / threads, rows * (i + 1) / threads, scratch(plan.scratch_floats));
  });
  return y;
}

}  // namespace
}  // namespace kegfast

STABLE_TORCH_LIBRARY_IMPL(kegfast, CPU, m) {
  m.impl("conv_max_pool", TORCH_BOX(&kegfast::conv_max_pool));
}
