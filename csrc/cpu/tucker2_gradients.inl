// Weight gradients of tucker2: sums of outer products over pixels. The tensor
// of ranks is broadcast and the wide one fills the vectors, which at rank 16
// halves the loads per FMA; planes can only be broadcast.
#pragma once

#include "cpu/tucker2_outer.inl"

namespace kegfast::KEGFAST_ISA {
namespace {

// Calls f(rows) for chunks of about `chunk` pixels of `images` images whose
// pixels lie in a row, `a_image` and `b_image` floats apart, `a_pixel` and
// `b_pixel` from one to the next.
template <class F>
void for_chunks(int64_t images, int64_t pixels, int64_t a_image, int64_t a_pixel, int64_t b_image,
                int64_t b_pixel, int64_t chunk, const F& f) {
  const int64_t together = clamp(chunk / pixels, 1, kMostRows);
  RowPairs rows;
  for (int64_t n = 0; n < images; n += together) {
    rows.count = smaller(together, images - n);
    for (int64_t from = 0; from < pixels; from += chunk) {
      for (int64_t i = 0; i < rows.count; ++i) {
        rows.a[i] = (n + i) * a_image + from * a_pixel;
        rows.b[i] = (n + i) * b_image + from * b_pixel;
      }
      rows.pixels = smaller(chunk, pixels - from);
      f(rows);
    }
  }
}

// Images of which `pixels` in a row are meant: where the first lies, and the
// steps.
struct Image {
  const float* data;
  bool channels_last;
  int64_t image, channel, pixel;
};

// Pixels of `ranks` contiguous numbers (t2, dz1) against those of `channels`
// channels (g, x): (ranks, channels) where channels are contiguous, else
// (channels, ranks).
void factor_gradient(const float* ranked, int64_t ranks, int64_t ranked_image, const Image& x,
                     int64_t channels, int64_t images, int64_t pixels, Prefetcher* prefetcher, float* c) {
  const int64_t chunk = chunk_pixels(ranks + channels);
  if (x.channels_last)
    for_chunks(images, pixels, ranked_image, ranks, x.image, x.pixel, chunk, [&](const RowPairs& rows) {
      outer_products<ALayout::k_major>(ranked, ranks, ranks, x.data, x.pixel, channels, rows, prefetcher, c);
    });
  else
    for_chunks(images, pixels, x.image, x.pixel, ranked_image, ranks, chunk, [&](const RowPairs& rows) {
      outer_products<ALayout::row_major>(x.data, x.channel, channels, ranked, ranks, ranks, rows, prefetcher,
                                         c);
    });
}

template <int Step>
KEGFAST_INLINE Floats fold_pixels(Floats v) {
  if constexpr (Step < kLanes) return fold_pixels<2 * Step>(add_swapped<Step>(v));
  return v;
}

constexpr int64_t kLanesChunk = 4096;  // floats of either tensor: in L1

// Ranks of 2, 4 and 8, alike: a vector holds kLanes / R pixels of t1, and each of dz2's channels is spread
// over theirs. c (R, 3 R) += the three taps of a window's row.
template <int R>
void three_taps(const float* dz2, const float* t1, const RowPairs& rows, Prefetcher* prefetcher, float* c) {
  constexpr int kPixels = kLanes / R, kTaps = 3,
                kOutputs = R < 4 ? R : 4;  // at a time
  constexpr int kChains = chains(kOutputs * kTaps);
  for (int from = 0; from < R; from += kOutputs) {
    Ints spread[kOutputs];
    for (int o = 0; o < kOutputs; ++o)
      for (int l = 0; l < kLanes; ++l) spread[o][l] = l / R * R + from + o;
    Floats acc[kChains][kOutputs][kTaps] = {};
    const auto step = [&](Floats d, const float* window, int lanes,
                          Floats(&sums)[kOutputs][kTaps]) __attribute__((always_inline)) {
      Floats w[kTaps];
      KEGFAST_UNROLL
      for (int j = 0; j < kTaps; ++j)
        w[j] = lanes == kLanes ? load_unaligned(window + j * R) : load_first(window + j * R, lanes);
      KEGFAST_UNROLL
      for (int o = 0; o < kOutputs; ++o) {
        const Floats x = permute(d, spread[o]);
        KEGFAST_UNROLL
        for (int j = 0; j < kTaps; ++j) sums[o][j] += x * w[j];
      }
    };
    for (int64_t r = 0; r < rows.count; ++r) {
      const float *d = dz2 + rows.a[r], *window = t1 + rows.b[r];
      int64_t left = rows.pixels;
      for (; left >= kChains * kPixels; left -= kChains * kPixels) {
        if (prefetcher && left % kPrefetchSteps == 0) prefetcher->step();
        KEGFAST_UNROLL
        for (int i = 0; i < kChains; ++i, d += kLanes, window += kLanes)
          step(load_unaligned(d), window, kLanes, acc[i]);
      }
      if (prefetcher) prefetcher->step();
      for (; left > 0; left -= kPixels, d += kLanes, window += kLanes) {
        const int lanes = static_cast<int>(smaller(left, kPixels)) * R;
        step(load_first(d, lanes), window, lanes, acc[0]);
      }
    }
    for (int o = 0; o < kOutputs; ++o)
      for (int j = 0; j < kTaps; ++j) {
        Floats sum = acc[0][o][j];
        for (int i = 1; i < kChains; ++i) sum += acc[i][o][j];
        float* const to = c + ((from + o) * kTaps + j) * R;
        store_first(to, fold_pixels<R>(sum) + load_first(to, R), R);
      }
  }
}

bool spreads(const Tucker2Params& p) {
  const int64_t r = p.rank_in;
  return kLanes >= 8 && r == p.rank_out && 2 * r <= kLanes && (r == 2 || r == 4 || r == 8) &&
         p.kernel_w == 3 && p.dilation_w == 1 && p.stride_w == 1;
}

void three_taps(int64_t r, const float* dz2, const float* t1, const RowPairs& rows, Prefetcher* prefetcher,
                float* c) {
  if constexpr (kLanes >= 16)
    if (r == 8) return three_taps<8>(dz2, t1, rows, prefetcher, c);
  if constexpr (kLanes >= 8) {
    if (r == 4) return three_taps<4>(dz2, t1, rows, prefetcher, c);
    if (r == 2) return three_taps<2>(dz2, t1, rows, prefetcher, c);
  }
}

// The first of some rows of an intermediate in `images` images.
struct Rows {
  const float* data;
  int64_t image, row;  // steps
};

constexpr int64_t kQuickSums = 16 * kLanes;

// `height` rows of dz2 against the windows of t1: per segment (R2, length of the segment).
void core_gradient(const Tucker2Params& p, const Rows& t1, const Rows& dz2, int64_t images, int64_t height,
                   Prefetcher* prefetcher, float* c) {
  const int64_t r1 = p.rank_in, r2 = p.rank_out, width = p.out_width;
  const Window window = core_window(p);
  const int64_t t1_step = p.stride_w * r1, block = r2 * window.length;
  const bool lanes = spreads(p), together = window.length <= kLanes && p.dilation_w == 1;
  const auto taps = [&](const RowPairs& rows) {
    if (together && !lanes) {
      const Outer outer{dz2.data,  r2, t1.data,       t1_step, p.dilation_h * t1.row,
                        &rows,     c,  window.length, block,   static_cast<int>(window.length),
                        prefetcher};
      return outer_products<ALayout::k_major, Lanes::segments>(outer, r2, window.segments);
    }
    for (int64_t s = 0; s < window.segments; ++s) {
      const int64_t i = p.dilation_w == 1 ? s : s / p.kernel_w, j = p.dilation_w == 1 ? 0 : s % p.kernel_w;
      const float* const from = t1.data + i * p.dilation_h * t1.row + j * p.dilation_w * r1;
      if (lanes)
        three_taps(r1, dz2.data, from, rows, prefetcher, c + s * block);
      else
        outer_products<ALayout::k_major>(dz2.data, r2, r2, from, t1_step, window.length, rows, prefetcher,
                                         c + s * block);
    }
  };
  // Where both have rows of one length and a pixel is quickly done, the border's zeros between dz2's rows are
  // cheaper than stopping there.
  const int64_t chunk = chunk_pixels(r1 + r2);
  const bool narrow = lanes || r2 * window.length <= kQuickSums;
  if (narrow && p.stride_h * p.stride_w == 1 && t1.row * r2 == dz2.row * r1)
    return for_chunks(images, (height - 1) * (t1.row / r1) + width, dz2.image, r2, t1.image, r1,
                      lanes ? kLanesChunk / r1 : chunk, taps);
  const int64_t step = clamp(chunk / width, 1, kMostRows);
  RowPairs rows;
  rows.pixels = width;
  for (int64_t row = 0; row < images * height; row += step) {
    rows.count = smaller(step, images * height - row);
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t n = (row + i) / height, r = (row + i) % height;
      rows.a[i] = n * dz2.image + r * dz2.row;
      rows.b[i] = n * t1.image + r * p.stride_h * t1.row;
    }
    taps(rows);
  }
}

// A sum of vectors by blocks of blocks: an addend meets no more than a few dozen others in float32, and the
// blocks' sums meet in double.
template <int Vectors>
struct BlockedSum {
  static constexpr int64_t kBlock = 16, kBlocks = 16;
  Floats sum[Vectors] = {};

  // Takes add(part) for each step first <= step < last, at most kBlock * kBlocks of them.
  template <class Add>
  KEGFAST_INLINE void take(int64_t first, int64_t last, const Add& add) {
    while (first < last) {
      Floats part[Vectors] = {};
      for (const int64_t end = smaller(first + kBlock, last); first < end; ++first) add(first, part);
      KEGFAST_UNROLL
      for (int v = 0; v < Vectors; ++v) sum[v] += part[v];
    }
  }
};

// sums (K) += the pixels of g.
void bias_gradient(const Image& g, int64_t channels, int64_t images, int64_t pixels, double* sums) {
  constexpr int kWide = 4;
  using Sum = BlockedSum<kWide>;
  constexpr int64_t kMost = Sum::kBlock * Sum::kBlocks;
  for (int64_t n = 0; n < images; ++n) {
    const float* const x = g.data + n * g.image;
    if (g.channels_last) {
      for (int64_t c = 0; c < channels; c += kWide * kLanes) {
        int width[kWide];
        for (int v = 0; v < kWide; ++v)
          width[v] = static_cast<int>(clamp(channels - c - v * kLanes, 0, kLanes));
        for (int64_t i = 0; i < pixels; i += kMost) {
          Sum total;
          total.take(i, smaller(i + kMost, pixels), [&](int64_t pixel, Floats(&part)[kWide]) {
            for (int v = 0; v < kWide; ++v)
              if (width[v]) part[v] += load_first(x + pixel * g.pixel + c + v * kLanes, width[v]);
          });
          for (int v = 0; v < kWide; ++v)
            for (int l = 0; l < width[v]; ++l)
              sums[c + v * kLanes + l] += static_cast<double>(total.sum[v][l]);
        }
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        const float* const plane = x + c * g.channel;
        const int64_t whole = pixels / (kWide * kLanes);
        for (int64_t i = 0; i <= whole; i += kMost) {
          Sum total;
          total.take(i, smaller(i + kMost, whole), [&](int64_t step, Floats(&part)[kWide]) {
            for (int v = 0; v < kWide; ++v) part[v] += load_unaligned(plane + (step * kWide + v) * kLanes);
          });
          if (i + kMost > whole)
            for (int64_t rest = whole * kWide * kLanes; rest < pixels; rest += kLanes)
              total.sum[0] += load_first(plane + rest, static_cast<int>(smaller(kLanes, pixels - rest)));
          const Floats all = total.sum[0] + total.sum[1] + (total.sum[2] + total.sum[3]);
          for (int l = 0; l < kLanes; ++l) sums[c] += static_cast<double>(all[l]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
