// conv_max_pool: POD parameters and kernel signatures of a convolution and the max pooling behind it, free of
// torch.
//
//   z = weight * x + bias  (N, P, Q, K), of which no more than a band of rows exists at a time
//   y = max over windows of z  (N, U, V, K), then ReLU if asked, which commutes with it
#pragma once

#include <cstdint>

#include "tucker2.h"

namespace kegfast {

struct SlidingWindow {
  int64_t height, width, stride_h, stride_w, padding_h, padding_w;
  // Places of the window in a (padded) image of such a size; below 1 where it does not fit.
  int64_t rows(int64_t size) const { return fits(size, height, stride_h, padding_h); }
  int64_t columns(int64_t size) const { return fits(size, width, stride_w, padding_w); }

 private:
  static int64_t fits(int64_t size, int64_t window, int64_t stride, int64_t padding) {
    return size + 2 * padding < window ? 0 : (size + 2 * padding - window) / stride + 1;
  }
};

struct ConvMaxPoolParams {
  int64_t images, channels, height, width, features;  // N, C, H, W, K
  SlidingWindow conv, pool;
  const float* x;                              // (N, C, H, W), in elements:
  int64_t x_image, x_channel, x_row, x_pixel;  // any strides
  const float* packed;                         // the weight as conv_max_pool_pack laid it out
  const float* bias;                           // (K), or null
  float* y;                                    // (N, K, U, V) dense: pixels of contiguous channels, or planes
  bool relu, channels_last;                    // channels_last: of y
};

struct ConvMaxPoolPlan {
  int64_t band_rows;  // of y
  int64_t packed_floats;
  int64_t input_at, conv_at, tallest_at, row_at, scratch_floats;  // within a thread's scratch
};

#define KEGFAST_DECLARE(isa)                                                                       \
  namespace isa {                                                                                  \
  ConvMaxPoolPlan conv_max_pool_plan(const ConvMaxPoolParams& p);                                  \
  void conv_max_pool_pack(const ConvMaxPoolParams& p, const Tucker2Factor& weight, float* packed); \
  /* Rows of y begin <= n * U + row < end. */                                                      \
  void conv_max_pool_rows(const ConvMaxPoolParams& p, const ConvMaxPoolPlan& plan, int64_t begin,  \
                          int64_t end, float* scratch);                                            \
  }
KEGFAST_EACH_ISA(KEGFAST_DECLARE)
#undef KEGFAST_DECLARE

}  // namespace kegfast
