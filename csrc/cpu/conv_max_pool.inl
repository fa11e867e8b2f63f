// A convolution and the max pooling behind it, band by band: a few rows of the convolution, by tucker2's
// tiles, stay in L2 until they are pooled. A ResNet's stem at 224 makes 25.7 MB of them at batch 8, which
// torch writes, reads to rectify and reads to pool: 6.8 ms on two Zen 5 cores inside the network, 12 to 17 in
// fresh pages, against 5.0. The convolution itself runs at 95 % of the FMA peak; a fifth of the time goes to
// the rows' way through L2. Log: docs/kernels/log.md.
#pragma once

#include "conv_max_pool.h"
#include "cpu/padded_rows.inl"
#include "cpu/pooling.inl"
#include "cpu/tucker2_factor.inl"
#include "cpu/tucker2_sweep.inl"

namespace kegfast::KEGFAST_ISA {
namespace {

constexpr int64_t kPooledBytes = 192 << 10;  // of the convolution's rows in a band

// Pixels whose features one vector holds side by side: 2 of images of one channel with few features, whose
// sums are too short for lanes to share them. A window is then as wide as both pixels' together, and the
// weights of each are zeros where only the other's reach.
int64_t pixels_together(const ConvMaxPoolParams& p) {
  const bool fits = p.channels == 1 && 2 * p.features <= kLanes && p.conv.columns(p.width) % 2 == 0;
  return fits ? 2 : 1;
}

Window conv_window(const ConvMaxPoolParams& p) {
  const int64_t width = p.conv.width + (pixels_together(p) - 1) * p.conv.stride_w;
  return {p.conv.height, width * p.channels};
}
int64_t conv_outputs(const ConvMaxPoolParams& p) {
  return pixels_together(p) > 1 ? kLanes : p.features;
}
PaddedRows input_rows(const ConvMaxPoolParams& p) {
  return {p.channels, p.height, p.width, p.conv.padding_w, p.x_channel, p.x_row, p.x_pixel};
}

class ConvMaxPool {
 public:
  ConvMaxPool(const ConvMaxPoolParams& p, const ConvMaxPoolPlan& plan, float* scratch)
      : p_(p),
        plan_(plan),
        rows_(input_rows(p)),
        input_(scratch + plan.input_at),
        conv_(scratch + plan.conv_at),
        tallest_(scratch + plan.tallest_at),
        pooled_row_(scratch + plan.row_at),
        conv_height_(p.conv.rows(p.height)),
        conv_width_(p.conv.columns(p.width)),
        out_height_(p.pool.rows(conv_height_)),
        out_width_(p.pool.columns(conv_width_)) {
    for (int64_t s = 0; s < p.conv.height; ++s) segments_[s] = s * rows_.row();
  }

  int64_t out_height() const { return out_height_; }

  // Rows first <= row < last of an image of y.
  void run(int64_t image, int64_t first, int64_t last) {
    begin_ = end_ = 0;
    for (int64_t row = first; row < last; row += plan_.band_rows) {
      const int64_t rows = smaller(plan_.band_rows, last - row),
                    top = row * p_.pool.stride_h - p_.pool.padding_h;
      need_rows(image, larger(top, 0),
                smaller(top + (rows - 1) * p_.pool.stride_h + p_.pool.height, conv_height_));
      for (int64_t r = row; r < row + rows; ++r) pool_row(image, r);
    }
  }

 private:
  int64_t conv_row() const { return conv_width_ * p_.features; }

  // Makes the convolution's rows begin <= row < end present.
  void need_rows(int64_t image, int64_t begin, int64_t end) {
    const int64_t from = larger(begin, end_);
    if (begin < end_)
      memmove(conv_, conv_ + (begin - begin_) * conv_row(), (end_ - begin) * conv_row() * sizeof(float));
    begin_ = begin, end_ = end;
    rows_.copy(p_.x + image * p_.x_image, from * p_.conv.stride_h - p_.conv.padding_h,
               (end - from - 1) * p_.conv.stride_h + p_.conv.height, input_);
    Tile tile{};
    tile.segments = segments_;
    tile.segment_count = p_.conv.height;
    tile.segment_length = conv_window(p_).length;
    tile.a = input_;
    const int64_t together = pixels_together(p_);
    tile.a_step = together * p_.conv.stride_w * p_.channels;
    tile.b = p_.packed;
    tile.c = conv_ + (from - begin) * conv_row();
    tile.c_step = together * p_.features;
    tile.bias = together > 1 ? p_.packed + packed_floats(kLanes, conv_window(p_)) : p_.bias;
    const bool apart = together == 1 && p_.conv.stride_w == 1;
    tile.taps = apart && (p_.conv.width == 3 || p_.conv.width == 5) ? p_.conv.width : 0;
    const Grid grid{1, end - from, conv_width_ / together, 0, p_.conv.stride_h * rows_.row(), 0, conv_row()};
    sweep<ALayout::row_major>(tile, grid, tile.a_step, conv_outputs(p_));
  }

  void pool_row(int64_t image, int64_t row) {
    const int64_t top = row * p_.pool.stride_h - p_.pool.padding_h, k = p_.features;
    const int64_t from = larger(top, 0) - begin_, to = smaller(top + p_.pool.height, conv_height_) - begin_;
    // Down the rows first, in whole vectors however few the features.
    maximum(conv_ + from * conv_row(), conv_row(), to - from, conv_row(), false, tallest_);
    float* const y = p_.y + image * out_height_ * out_width_ * k;
    float* const out = p_.channels_last ? y + row * out_width_ * k : pooled_row_;
    for (int64_t i = 0; i < out_width_; ++i) {
      const int64_t left = i * p_.pool.stride_w - p_.pool.padding_w, begin = larger(left, 0);
      const int64_t columns = smaller(left + p_.pool.width, conv_width_) - begin;
      maximum(tallest_ + begin * k, k, columns, k, p_.relu, out + i * k);
    }
    if (p_.channels_last) return;
    for (int64_t c = 0; c < k; ++c)
      for (int64_t i = 0; i < out_width_; ++i) y[(c * out_height_ + row) * out_width_ + i] = out[i * k + c];
  }

  // Of `count` runs of numbers, `step` apart. The usual counts are compiled apart: a loop's end costs more
  // than three.
  static void maximum(const float* from, int64_t step, int64_t count, int64_t numbers, bool rectify,
                      float* out) {
    if (count == 2) return maximum_of<2>(from, step, count, numbers, rectify, out);
    if (count == 3) return maximum_of<3>(from, step, count, numbers, rectify, out);
    maximum_of<0>(from, step, count, numbers, rectify, out);
  }
  template <int Count>
  static void maximum_of(const float* from, int64_t step, int64_t any, int64_t numbers, bool rectify,
                         float* out) {
    const int64_t count = Count ? Count : any;
    const auto largest = [&](const auto& load, int64_t c) __attribute__((always_inline)) {
      Maximum best{splat(-__builtin_inff()), Ints{}};
      for (int64_t i = 0; i < count; ++i) best.see(load(from + c + i * step));
      return rectify ? relu(best.value()) : best.value();
    };
    int64_t c = 0;
    for (; c + kLanes <= numbers; c += kLanes)
      store_unaligned(out + c, largest([](const float* p) { return load_unaligned(p); }, c));
    if (const int n = static_cast<int>(numbers - c))
      store_first(out + c, largest([n](const float* p) { return load_first(p, n); }, c), n);
  }

  const ConvMaxPoolParams& p_;
  const ConvMaxPoolPlan& plan_;
  const PaddedRows rows_;
  float *const input_, *const conv_, *const tallest_, *const pooled_row_;
  const int64_t conv_height_, conv_width_, out_height_, out_width_;
  int64_t begin_ = 0, end_ = 0;  // the convolution's rows that are present
  int64_t segments_[kMaxSegments];
};

}  // namespace

ConvMaxPoolPlan conv_max_pool_plan(const ConvMaxPoolParams& p) {
  ConvMaxPoolPlan plan{};
  const int64_t conv_height = p.conv.rows(p.height), conv_row = p.conv.columns(p.width) * p.features;
  const int64_t rows = kPooledBytes / 4 / conv_row - p.pool.height;
  plan.band_rows = clamp(rows / p.pool.stride_h + 1, 1, p.pool.rows(conv_height));
  const int64_t conv_rows = smaller((plan.band_rows - 1) * p.pool.stride_h + p.pool.height, conv_height);
  plan.packed_floats = packed_floats(conv_outputs(p), conv_window(p)) + (pixels_together(p) > 1 ? kLanes : 0);
  int64_t at = 0;
  const auto take = [&at](int64_t floats) {
    const int64_t here = at;
    at += round_up(floats, 16);
    return here;
  };
  plan.input_at = take(((conv_rows - 1) * p.conv.stride_h + p.conv.height) * input_rows(p).row());
  plan.conv_at = take(conv_rows * conv_row + kLanes);  // pixels taken together are stored as whole vectors
  plan.tallest_at = take(conv_row);
  plan.row_at = take(p.channels_last ? 0 : p.pool.columns(p.conv.columns(p.width)) * p.features);
  plan.scratch_floats = at;
  return plan;
}

void conv_max_pool_pack(const ConvMaxPoolParams& p, const Tucker2Factor& weight, float* packed) {
  const Window window = conv_window(p);
  if (pixels_together(p) == 1)
    return pack_factor(weight, p.features, p.channels, p.conv.width, window, true, packed);
  float* const bias = packed + packed_floats(kLanes, window);
  memset(packed, 0, (bias + kLanes - packed) * sizeof(float));
  for (int64_t pixel = 0; pixel < 2; ++pixel)
    for (int64_t k = 0; k < p.features; ++k) {
      const int64_t lane = pixel * p.features + k;
      if (p.bias) bias[lane] = p.bias[k];
      for (int64_t i = 0; i < p.conv.height; ++i)
        for (int64_t j = 0; j < p.conv.width; ++j)
          packed[(i * window.length + j + pixel * p.conv.stride_w) * kLanes + lane] =
              element(weight, k * weight.row + i * weight.tap_h + j * weight.tap_w);
    }
}

void conv_max_pool_rows(const ConvMaxPoolParams& p, const ConvMaxPoolPlan& plan, int64_t begin, int64_t end,
                        float* scratch) {
  ConvMaxPool kernel(p, plan, scratch);
  const int64_t height = kernel.out_height();
  while (begin < end) {
    const int64_t image = begin / height, last = smaller((image + 1) * height, end);
    kernel.run(image, begin - image * height, last - image * height);
    begin = last;
  }
}

}  // namespace kegfast::KEGFAST_ISA
