// Rows of images as pixels of contiguous channels between borders of zeros.
#pragma once

#include "cpu/tucker2_vec.inl"

namespace kegfast::KEGFAST_ISA {
namespace {

struct PaddedRows {
  int64_t channels, height, width, padding_w;
  int64_t x_channel, x_row, x_pixel;  // strides of x

  int64_t row() const { return (width + 2 * padding_w) * channels; }  // floats of one

  // `rows` rows of an image x from `first` on, some of which may lie outside of it.
  void copy(const float* x, int64_t first, int64_t rows, float* to) const {
    const int64_t side = padding_w * channels, inner = width * channels;
    const bool dense = x_channel == 1 && x_pixel == channels;
    for (int64_t r = first; r < first + rows; ++r, to += row()) {
      if (r < 0 || r >= height) {
        memset(to, 0, row() * sizeof(float));
        continue;
      }
      const float* const from = x + r * x_row;
      memset(to, 0, side * sizeof(float));
      memset(to + side + inner, 0, side * sizeof(float));
      if (dense) {
        memcpy(to + side, from, inner * sizeof(float));
        continue;
      }
      if (channels == 3 && x_pixel == 1)
        interleave(from, from + x_channel, from + 2 * x_channel, to + side);
      else
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t i = 0; i < width; ++i) to[side + i * channels + c] = from[c * x_channel + i * x_pixel];
    }
  }
  // Three colors side by side.
  void interleave(const float* red, const float* green, const float* blue, float* to) const {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes, to += 3 * kLanes) {
      const Floats r = load_unaligned(red + i), g = load_unaligned(green + i), b = load_unaligned(blue + i);
      store_unaligned(to, interleaved<0>(r, g, b));
      store_unaligned(to + kLanes, interleaved<1>(r, g, b));
      store_unaligned(to + 2 * kLanes, interleaved<2>(r, g, b));
    }
    for (; i < width; ++i) *to++ = red[i], *to++ = green[i], *to++ = blue[i];
  }
  template <int Part>
  static KEGFAST_INLINE Floats interleaved(Floats r, Floats g, Floats b) {
    const Floats two = shuffle(r, g, [](int l) {
      const int at = Part * kLanes + l, color = at % 3;
      return color == 2 ? 0 : color * kLanes + at / 3;
    });
    return shuffle(two, b, [](int l) {
      const int at = Part * kLanes + l, color = at % 3;
      return color == 2 ? kLanes + at / 3 : l;
    });
  }
};

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
