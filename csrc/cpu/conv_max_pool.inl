// A convolution and the max pooling behind it, band by band: a few rows of the convolution, by tucker2's tiles,
// stay in L2 until they are pooled. A ResNet's stem at 224 makes 25.7 MB of them at batch 8, which torch writes, reads
// to rectify and reads to pool: 6.8 ms on two Zen 5 cores inside the network, 12 to 17 in fresh pages, against 5.0.
// The convolution itself runs at 95 % of the FMA peak; a fifth of the time goes to the rows' way through L2. Tried
// without gain: 32 features at a time, whose weights L1 keeps.
#pragma once

#include "conv_max_pool.h"
#include "cpu/tucker2_sweep.inl"

namespace kegfast::KEGFAST_ISA {
namespace {

constexpr int64_t kPooledBytes = 192 << 10;  // of the convolution's rows in a band

Window conv_window(const ConvMaxPoolParams& p) {
  return {p.conv.height, p.conv.width * p.channels};
}
int64_t input_row(const ConvMaxPoolParams& p) {
  return (p.width + 2 * p.conv.padding_w) * p.channels;
}

// The maximum of what it has seen, or NaN if that was among it, as in torch; the two are apart because a single
// select for both would wait for the one before it.
struct Maximum {
  Floats largest, nan;
  KEGFAST_INLINE void see(Floats x) {
    largest = x > largest ? x : largest;
    nan = x != x ? x : nan;
  }
  KEGFAST_INLINE Floats value() const { return nan != nan ? nan : largest; }
};

class ConvMaxPool {
 public:
  ConvMaxPool(const ConvMaxPoolParams& p, const ConvMaxPoolPlan& plan, float* scratch)
      : p_(p),
        plan_(plan),
        input_(scratch + plan.input_at),
        conv_(scratch + plan.conv_at),
        pooled_row_(scratch + plan.row_at),
        conv_height_(p.conv.rows(p.height)),
        conv_width_(p.conv.columns(p.width)),
        out_height_(p.pool.rows(conv_height_)),
        out_width_(p.pool.columns(conv_width_)) {
    for (int64_t s = 0; s < p.conv.height; ++s) segments_[s] = s * input_row(p);
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
    copy_input(image, from * p_.conv.stride_h - p_.conv.padding_h,
               (end - from - 1) * p_.conv.stride_h + p_.conv.height);
    Tile tile{};
    tile.segments = segments_;
    tile.segment_count = p_.conv.height;
    tile.segment_length = conv_window(p_).length;
    tile.a = input_;
    tile.a_step = p_.conv.stride_w * p_.channels;
    tile.b = p_.packed;
    tile.c = conv_ + (from - begin) * conv_row();
    tile.c_step = p_.features;
    tile.bias = p_.bias;
    const Grid grid{1, end - from, conv_width_, 0, p_.conv.stride_h * input_row(p_), 0, conv_row()};
    sweep<ALayout::row_major>(tile, grid, tile.a_step, p_.features);
  }

  // `rows` rows of x from `row` on as pixels of contiguous channels, with their border of zeros.
  void copy_input(int64_t image, int64_t row, int64_t rows) {
    float* to = input_;
    const int64_t side = p_.conv.padding_w * p_.channels, inner = p_.width * p_.channels;
    const bool dense = p_.x_channel == 1 && p_.x_pixel == p_.channels;
    for (int64_t r = row; r < row + rows; ++r, to += input_row(p_)) {
      if (r < 0 || r >= p_.height) {
        memset(to, 0, input_row(p_) * sizeof(float));
        continue;
      }
      const float* const from = p_.x + image * p_.x_image + r * p_.x_row;
      memset(to, 0, side * sizeof(float));
      memset(to + side + inner, 0, side * sizeof(float));
      if (dense) {
        memcpy(to + side, from, inner * sizeof(float));
        continue;
      }
      for (int64_t c = 0; c < p_.channels; ++c)
        for (int64_t i = 0; i < p_.width; ++i)
          to[side + i * p_.channels + c] = from[c * p_.x_channel + i * p_.x_pixel];
    }
  }

  void pool_row(int64_t image, int64_t row) {
    const int64_t top = row * p_.pool.stride_h - p_.pool.padding_h, k = p_.features;
    const int64_t from = larger(top, 0) - begin_, to = smaller(top + p_.pool.height, conv_height_) - begin_;
    float* const y = p_.y + image * out_height_ * out_width_ * k;
    float* const out = p_.channels_last ? y + row * out_width_ * k : pooled_row_;
    for (int64_t i = 0; i < out_width_; ++i) {
      const int64_t left = i * p_.pool.stride_w - p_.pool.padding_w, begin = larger(left, 0);
      const int64_t columns = smaller(left + p_.pool.width, conv_width_) - begin;
      pool_pixel(conv_ + from * conv_row() + begin * k, to - from, columns, out + i * k);
    }
    if (p_.channels_last) return;
    for (int64_t c = 0; c < k; ++c)
      for (int64_t i = 0; i < out_width_; ++i) y[(c * out_height_ + row) * out_width_ + i] = out[i * k + c];
  }

  // The maximum over rows x columns pixels from `from` on.
  void pool_pixel(const float* from, int64_t rows, int64_t columns, float* out) const {
    const int64_t features = p_.features, row = conv_row();  // not to be read again after every store
    for (int64_t c = 0; c < features; c += kLanes) {
      const int n = static_cast<int>(smaller(kLanes, features - c));
      Maximum best{load_first(from + c, n), Floats{}};
      const float* top = from + c;
      for (int64_t r = 0; r < rows; ++r, top += row) {
        const float* x = top;
        for (int64_t i = 0; i < columns; ++i, x += features) best.see(load_first(x, n));
      }
      store_first(out + c, p_.relu ? relu(best.value()) : best.value(), n);
    }
  }

  const ConvMaxPoolParams& p_;
  const ConvMaxPoolPlan& plan_;
  float *const input_, *const conv_, *const pooled_row_;
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
  plan.packed_floats = packed_floats(p.features, conv_window(p));
  int64_t at = 0;
  const auto take = [&at](int64_t floats) {
    const int64_t here = at;
    at += round_up(floats, 16);
    return here;
  };
  plan.input_at = take(((conv_rows - 1) * p.conv.stride_h + p.conv.height) * input_row(p));
  plan.conv_at = take(conv_rows * conv_row);
  plan.row_at = take(p.channels_last ? 0 : p.pool.columns(p.conv.columns(p.width)) * p.features);
  plan.scratch_floats = at;
  return plan;
}

void conv_max_pool_pack(const ConvMaxPoolParams& p, const Tucker2Factor& weight, float* packed) {
  pack_factor(weight, p.features, p.channels, p.conv.width, conv_window(p), true, packed);
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
