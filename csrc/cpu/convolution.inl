// Convolutions by tucker2's tiles, band by band: directly, as one GEMM over pixels where the kernel is 1x1,
// by Winograd, or, where each channel is a group of its own, channel by channel.
#pragma once

#include "convolution.h"
#include "cpu/padded_rows.inl"
#include "cpu/tucker2_factor.inl"
#include "cpu/tucker2_sweep.inl"
#include "cpu/tucker2_winograd.inl"

namespace kegfast::KEGFAST_ISA {
namespace {

constexpr int64_t kConvolvedBytes = 512 << 10;  // of x and y in a band: they stay in L2

bool is_pixels(const ConvolutionParams& p) {  // x lies as y does
  return (p.channels == 1 || p.x_channel == 1) && (p.width == 1 || p.x_pixel == p.channels);
}
bool is_dense(const ConvolutionParams& p) {
  return is_pixels(p) && (p.height == 1 || p.x_row == p.width * p.channels) &&
         (p.images == 1 || p.x_image == p.height * p.width * p.channels);
}

// The convolution as the core of a tucker2.
Tucker2Params as_core(const ConvolutionParams& p) {
  Tucker2Params core{};
  core.images = p.images, core.channels = core.rank_in = p.channels,
  core.features = core.rank_out = p.features;
  core.height = p.height, core.width = p.width, core.out_height = p.out_height, core.out_width = p.out_width;
  core.kernel_h = p.kernel_h, core.kernel_w = p.kernel_w, core.stride_h = p.stride_h,
  core.stride_w = p.stride_w;
  core.padding_h = p.padding_h, core.padding_w = p.padding_w;
  core.dilation_h = p.dilation_h, core.dilation_w = p.dilation_w;
  core.channels_last = true;
  core.winograd = p.winograd;
  return core;
}

// A kernel row is one run of numbers where its taps are neighbors.
Window window_of(const ConvolutionParams& p) {
  const int64_t channels = p.channels / p.groups;
  const bool whole = p.dilation_w == 1 && p.groups == 1;
  return whole ? Window{p.kernel_h, p.kernel_w * channels} : Window{p.kernel_h * p.kernel_w, channels};
}

int64_t group_floats(const ConvolutionParams& p) {
  return packed_floats(p.features / p.groups, window_of(p));
}

Tucker2Factor factor_of(const ConvolutionParams& p, const float* weight, int64_t group) {
  const int64_t taps = p.kernel_h * p.kernel_w, inputs = p.channels / p.groups,
                outputs = p.features / p.groups;
  return {weight + group * outputs * inputs * taps,
          Tucker2Type::float32,
          inputs * taps,
          taps,
          p.kernel_w,
          1,
          outputs,
          inputs};
}

int64_t window_rows(const ConvolutionParams& p, int64_t rows) {
  return (rows - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;
}

class Convolution {
 public:
  Convolution(const ConvolutionParams& p, const ConvolutionPlan& plan, const ConvolutionCall& call,
              float* scratch)
      : p_(p),
        plan_(plan),
        call_(call),
        scratch_(scratch),
        rows_{p.channels, p.height, p.width, p.padding_w, p.x_channel, p.x_row, p.x_pixel},
        row_(plan.copies ? rows_.row() : p.x_row),
        pixel_(plan.copies ? p.channels : p.x_pixel),
        out_row_(p.out_width * p.features),
        addend_(call.addend ? call.addend - call.y : 0) {}

  void pixels(int64_t begin, int64_t end) {
    Tile tile = last_tile();
    tile.segments = kOrigin;
    tile.segment_count = 1;
    tile.segment_length = p_.channels;
    tile.a_step = p_.channels;
    tile.b = call_.packed;
    for (int64_t at = begin; at < end; at += plan_.band_units) {
      tile.a = call_.x + at * p_.channels;
      tile.c = call_.y + at * p_.features;
      sweep<ALayout::row_major>(tile, {1, 1, smaller(plan_.band_units, end - at), 0, 0, 0, 0}, tile.a_step,
                                p_.features);
    }
  }

  // Rows first <= row < last of `count` images from `image` on.
  void rows(int64_t image, int64_t count, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += plan_.band_units) {
      const int64_t rows = smaller(plan_.band_units, last - row);
      if (plan_.form == ConvolutionForm::winograd)
        by_winograd(image, count, row, rows);
      else if (plan_.form == ConvolutionForm::depthwise)
        by_channel(image, row, rows);
      else
        directly(image, count, row, rows);
    }
  }

 private:
  Tile last_tile() const {
    Tile tile{};
    tile.c_step = p_.features;
    tile.bias = call_.bias;
    tile.relu = p_.relu;
    tile.accumulate = call_.addend != nullptr;
    tile.addend = addend_;
    return tile;
  }
  float* out(int64_t image, int64_t row) const { return call_.y + (image * p_.out_height + row) * out_row_; }

  void by_winograd(int64_t image, int64_t count, int64_t row, int64_t rows) {
    const Tucker2Params core = as_core(p_);
    const LastStore last{call_.bias, call_.addend != nullptr, addend_, p_.relu};
    const WinogradBand band{count,
                            rows,
                            call_.x + image * p_.x_image,
                            p_.x_image,
                            p_.x_row,
                            p_.height,
                            p_.width,
                            p_.padding_h - row * p_.stride_h,
                            p_.padding_w,
                            out(image, row),
                            p_.out_height * out_row_,
                            last};
    float* const tiles = scratch_ + plan_.tiles_at;
    if (p_.stride_h == 2) return Winograd<2, 2>(core, call_.packed, tiles, nullptr, {}).run(band);
    Winograd<2, 1>(core, call_.packed, tiles, nullptr, {}).run(band);
  }

  void directly(int64_t image, int64_t count, int64_t row, int64_t rows) {
    const int64_t top = row * p_.stride_h - p_.padding_h, windows = window_rows(p_, rows);
    const float* x =
        call_.x + image * p_.x_image + top * p_.x_row;  // behind no image: padded ones are copied
    int64_t x_image = p_.x_image;
    if (plan_.copies) {
      x_image = windows * row_;
      for (int64_t n = 0; n < count; ++n)
        rows_.copy(call_.x + (image + n) * p_.x_image, top, windows, scratch_ + n * x_image);
      x = scratch_;
    }
    const Window window = window_of(p_);
    const bool whole = window.segments == p_.kernel_h;
    for (int64_t s = 0; s < window.segments; ++s) {
      const int64_t tap_row = whole ? s : s / p_.kernel_w, tap_column = whole ? 0 : s % p_.kernel_w;
      segments_[s] = tap_row * p_.dilation_h * row_ + tap_column * p_.dilation_w * pixel_;
    }
    Tile tile = last_tile();
    tile.segments = segments_;
    tile.segment_count = window.segments;
    tile.segment_length = window.length;
    tile.a_step = p_.stride_w * pixel_;
    tile.taps = whole && p_.stride_w == 1 && (p_.kernel_w == 3 || p_.kernel_w == 5) ? p_.kernel_w : 0;
    const int64_t inputs = p_.channels / p_.groups, outputs = p_.features / p_.groups;
    const Grid grid{count,   rows, p_.out_width, x_image, p_.stride_h * row_, p_.out_height * out_row_,
                    out_row_};
    for (int64_t g = 0; g < p_.groups; ++g) {
      tile.a = x + g * inputs;
      tile.b = call_.packed + g * group_floats(p_);
      tile.c = out(image, row) + g * outputs;
      tile.bias = call_.bias ? call_.bias + g * outputs : nullptr;
      sweep<ALayout::row_major>(tile, grid, tile.a_step, outputs);
    }
  }

  // The taps of a window along an axis that lie inside the image.
  struct Taps {
    int64_t begin, end;
  };
  static Taps inside(int64_t start, int64_t kernel, int64_t dilation, int64_t size) {
    const int64_t begin = start < 0 ? ceil_div(-start, dilation) : 0;
    const int64_t end = start < size ? smaller(kernel, ceil_div(size - start, dilation)) : 0;
    return {begin, larger(begin, end)};
  }

  void by_channel(int64_t image, int64_t row, int64_t rows) {
    for (int64_t r = row; r < row + rows; ++r) {
      const int64_t top = r * p_.stride_h - p_.padding_h;
      const Taps down = inside(top, p_.kernel_h, p_.dilation_h, p_.height);
      for (int64_t i = 0; i < p_.out_width; ++i) {
        const int64_t left = i * p_.stride_w - p_.padding_w;
        const Taps across = inside(left, p_.kernel_w, p_.dilation_w, p_.width);
        const float* const x = call_.x + image * p_.x_image + top * p_.x_row + left * p_.x_pixel;
        float* const y = out(image, r) + i * p_.features;
        int64_t c = 0;
        for (; c + 4 * kLanes <= p_.features; c += 4 * kLanes) channels<4>(x, down, across, c, kLanes, y + c);
        for (; c < p_.features; c += kLanes)
          channels<1>(x, down, across, c, static_cast<int>(smaller(kLanes, p_.features - c)), y + c);
      }
    }
  }

  template <int Vectors>
  void channels(const float* x, Taps down, Taps across, int64_t c, int tail, float* y) const {
    const int64_t step = round_up(p_.features, kLanes), row = p_.dilation_h * p_.x_row,
                  pixel = p_.dilation_w * p_.x_pixel;
    Floats sum[Vectors] = {};
    for (int64_t a = down.begin; a < down.end; ++a)
      for (int64_t b = across.begin; b < across.end; ++b) {
        const float* const w = call_.packed + (a * p_.kernel_w + b) * step + c;
        const float* const from = x + a * row + b * pixel + c;
        KEGFAST_UNROLL
        for (int v = 0; v < Vectors; ++v)
          sum[v] += load_first(from + v * kLanes, tail) * load_unaligned(w + v * kLanes);
      }
    KEGFAST_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      if (call_.bias) sum[v] += load_first(call_.bias + c + v * kLanes, tail);
      if (call_.addend) sum[v] += load_first(y + addend_ + v * kLanes, tail);
      store_first(y + v * kLanes, p_.relu ? relu(sum[v]) : sum[v], tail);
    }
  }

  const ConvolutionParams& p_;
  const ConvolutionPlan& plan_;
  const ConvolutionCall& call_;
  float* const scratch_;
  const PaddedRows rows_;
  const int64_t row_, pixel_;  // strides of what the tiles read
  const int64_t out_row_, addend_;
  int64_t segments_[kMaxSegments];
};

// How many rows of how many images a band holds, about so many pixels; at most what one thread gets.
void choose_bands(const ConvolutionParams& p, int64_t pixels, int64_t threads, int64_t edge,
                  ConvolutionPlan& plan) {
  const int64_t image = p.out_height * p.out_width;
  plan.band_units = clamp(pixels / p.out_width, 1, p.out_height);
  plan.band_units = ceil_div(p.out_height, ceil_div(p.out_height, plan.band_units));  // alike
  plan.band_units = smaller(round_up(plan.band_units, edge), p.out_height);
  plan.group_images =
      plan.band_units < p.out_height ? 1 : clamp(pixels / image, 1, ceil_div(p.images, threads));
}

}  // namespace

ConvolutionPlan convolution_plan(const ConvolutionParams& p, int64_t threads) {
  ConvolutionPlan plan{};
  plan.units = p.out_height;
  plan.group_images = 1;
  const bool depthwise = p.groups > 1 && p.groups == p.channels && p.groups == p.features && is_pixels(p);
  if (depthwise) {
    plan.form = ConvolutionForm::depthwise;
    plan.band_units = p.out_height;
    plan.packed_floats = p.kernel_h * p.kernel_w * round_up(p.features, kLanes);
    return plan;
  }
  const Tucker2Params core = as_core(p);
  const bool padded = p.padding_h > 0 || p.padding_w > 0;
  const int64_t step = p.stride_h * p.stride_w;
  int64_t pixels = clamp(kConvolvedBytes / (4 * (step * p.channels + p.features)), 64, 2048);
  if (p.groups == 1 && is_pixels(p) && winograd_wins(core, threads)) {
    plan.form = ConvolutionForm::winograd;
    const int64_t point = packed_floats(p.features, {1, p.channels});
    plan.packed_floats = winograd_points(core) * point;
    choose_bands(p, 4 * band_tiles(core), threads, 2, plan);
    const int64_t tiles = plan.group_images * ceil_div(plan.band_units, 2) * ceil_div(p.out_width, 2);
    plan.scratch_floats =
        round_up(p.channels, 16) +
        winograd_points(core) * (point_step(tiles, p.channels) + point_step(tiles, winograd_share(core)));
    return plan;
  }
  plan.packed_floats = p.groups * group_floats(p);
  if (p.kernel_h * p.kernel_w * step * p.groups == 1 && !padded && is_dense(p)) {
    plan.form = ConvolutionForm::pointwise;
    plan.units = p.out_height * p.out_width;
    plan.band_units = pixels;
    return plan;
  }
  plan.form = ConvolutionForm::direct;
  plan.copies = padded || !is_pixels(p);
  choose_bands(p, pixels, threads, 1, plan);
  if (plan.copies)
    plan.scratch_floats =
        plan.group_images * window_rows(p, plan.band_units) * (p.width + 2 * p.padding_w) * p.channels;
  return plan;
}

void convolution_pack(const ConvolutionParams& p, const ConvolutionPlan& plan, const float* weight,
                      float* packed) {
  if (plan.form == ConvolutionForm::depthwise) {
    const int64_t taps = p.kernel_h * p.kernel_w, step = round_up(p.features, kLanes);
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < step; ++c) packed[t * step + c] = c < p.features ? weight[c * taps + t] : 0.0f;
    return;
  }
  if (plan.form == ConvolutionForm::winograd) {
    const auto pack = p.stride_h == 2 ? pack_winograd<5> : pack_winograd<4>;
    return pack(as_core(p), factor_of(p, weight, 0), packed);
  }
  for (int64_t g = 0; g < p.groups; ++g)
    pack_factor(factor_of(p, weight, g), p.features / p.groups, p.channels / p.groups, p.kernel_w,
                window_of(p), true, packed + g * group_floats(p));
}

void convolution_units(const ConvolutionParams& p, const ConvolutionPlan& plan, const ConvolutionCall& call,
                       int64_t begin, int64_t end, float* scratch) {
  Convolution convolution(p, plan, call, scratch);
  if (plan.form == ConvolutionForm::pointwise) return convolution.pixels(begin, end);
  while (begin < end) {
    const int64_t image = begin / p.out_height, row = begin % p.out_height;
    const int64_t whole = row == 0 ? smaller(plan.group_images, (end - begin) / p.out_height) : 0;
    const int64_t rows = whole ? p.out_height : smaller(p.out_height - row, end - begin);
    convolution.rows(image, larger(whole, 1), row, row + rows);
    begin += larger(whole, 1) * rows;
  }
}

}  // namespace kegfast::KEGFAST_ISA
