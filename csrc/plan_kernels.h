// What the steps of a plan that are no convolutions run: POD parameters and kernel signatures, free of torch.
// Images are pixels of contiguous channels.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "network.h"

namespace kegfast {

struct PoolParams {
  enum class Kind { maximum, average, adaptive } kind;  // adaptive: averages over equal shares of the image
  int64_t channels, height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  bool count_padding;
  int64_t divisor;  // of an average; 0: the window's size
};

struct Strides {
  int64_t image, channel, row, pixel;
};

struct PlaceParams {
  Shape x, y;
  Strides strides;  // of x, any
  int64_t stride_h, stride_w, front, top, left;
};

#define KEGFAST_DECLARE(isa)                                                                          \
  namespace isa {                                                                                     \
  /* Rows begin <= n * P + row < end of y. */                                                         \
  void pool_rows(const PoolParams& p, const float* x, float* y, int64_t begin, int64_t end);          \
  void place_rows(const PlaceParams& p, const float* x, float* y, int64_t begin, int64_t end);        \
  /* Of count numbers. */                                                                             \
  void add_numbers(const float* a, const float* b, float* y, int64_t count, bool relu);               \
  void multiply_numbers(const float* a, const float* b, float* y, int64_t count);                     \
  void activate_numbers(Activation kind, const float* x, float* y, int64_t count);                    \
  /* Of `pixels` of so many channels: y = x * scale + shift, where there is one. */                   \
  void scale_pixels(const float* x, const float* scale, const float* shift, float* y, int64_t pixels, \
                    int64_t channels, bool relu);                                                     \
  void softmax_rows(const float* x, float* y, int64_t rows, int64_t channels, bool logarithm);        \
  }
KEGFAST_EACH_ISA(KEGFAST_DECLARE)
#undef KEGFAST_DECLARE

}  // namespace kegfast
