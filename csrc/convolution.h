// convolution: POD parameters and kernel signatures of a dense, grouped or depthwise convolution, free of
// torch: a Tucker-2 convolution without its first and last factor.
//
//   y = weight * x + bias  (N, P, Q, K), then an addend and ReLU if asked
#pragma once

#include <cstdint>

#include "tucker2.h"

namespace kegfast {

struct ConvolutionParams {
  int64_t images, channels, height, width;          // N, C, H, W
  int64_t features, groups, out_height, out_width;  // K; P, Q
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t x_image, x_channel, x_row,
      x_pixel;  // strides of x in elements, any; y is pixels of contiguous channels
  bool relu;
  int64_t winograd;  // 2: it may run as F(2x2, 3x3); 0: not
};

enum class ConvolutionForm { direct, pointwise, winograd, depthwise };

struct ConvolutionPlan {
  ConvolutionForm form;
  int64_t units;                     // of an image: rows, or pixels where it is pointwise
  int64_t band_units, group_images;  // handled together: a band of an image, or whole images
  bool copies;                       // x is first copied, with its border of zeros
  int64_t packed_floats, tiles_at, scratch_floats;
};

struct ConvolutionCall {
  const float *x, *packed, *bias;  // bias (K), or null
  const float* addend;             // as y, or null
  float* y;
};

#define KEGFAST_DECLARE(isa)                                                                          \
  namespace isa {                                                                                     \
  ConvolutionPlan convolution_plan(const ConvolutionParams& p, int64_t threads);                      \
  void convolution_pack(const ConvolutionParams& p, const ConvolutionPlan& plan, const float* weight, \
                        float* packed);                                                               \
  /* Units begin <= n * plan.units + unit < end of all images. */                                     \
  void convolution_units(const ConvolutionParams& p, const ConvolutionPlan& plan,                     \
                         const ConvolutionCall& call, int64_t begin, int64_t end, float* scratch);    \
  }
KEGFAST_EACH_ISA(KEGFAST_DECLARE)
#undef KEGFAST_DECLARE

}  // namespace kegfast
