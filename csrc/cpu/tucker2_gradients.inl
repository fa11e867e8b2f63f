// Weight gradients of tucker2: sums of outer products over pixels, k-major GEMMs on the same tiles as the
// forward pass. The tensor of ranks is broadcast and the wide one fills the vectors, which at rank 16 halves
// the loads per FMA; planes can only be broadcast.
#pragma once

#include "cpu/tucker2_forward.inl"

namespace kegfast::KEGFAST_ISA {
namespace {

constexpr int64_t kChunkPixels = 256;  // A and B of a chunk stay in L2 while the whole gradient is swept

// Rows of pixels of two tensors that are multiplied pixel by pixel.
struct RowPairs {
  int64_t a[kChunkPixels], b[kChunkPixels];  // offsets of each row, in floats
  int64_t count;
};

// C (M, N) += sum over rows and pixels of A[pixel, :M]^T B[pixel, :N].
template <A kA>
void outer_products(const float* a, int64_t a_step, int64_t m, const float* b, int64_t b_step, int64_t n,
                    const RowPairs& rows, int64_t pixels, float* c) {
  const int64_t vectors = ceil_div(n, kLanes);
  const Cut cut = best_cut(vectors, m, rows.count * pixels, kMaxVectors);
  const auto& tiles = kTiles<kA, B::plain, Bias::per_lane, 1>.f;
  Tile tile{};
  tile.a_step = a_step;
  tile.segments = rows.a;
  tile.segment_count = rows.count;
  tile.segment_length = pixels;
  tile.b_segments = rows.b;
  tile.b_step = b_step;
  tile.c_step = n;
  tile.accumulate = true;
  for (int64_t v = 0; v < vectors; v += cut.vectors) {
    const int width = static_cast<int>(smaller(cut.vectors, vectors - v));
    tile.b = b + v * kLanes;
    tile.tail = static_cast<int>(smaller(kLanes, n - (v + width - 1) * kLanes));
    int64_t done = 0;
    for (int i = 0; i < cut.tiles; ++i) {
      const int64_t next = (i + 1) * m / cut.tiles;
      tile.a = a + (kA == A::k_major ? done : done * a_step);
      tile.c = c + done * n + v * kLanes;
      tiles[width][next - done](tile);
      done = next;
    }
  }
}

// Calls f(rows, length) for chunks of about kChunkPixels pixels of `images` images whose pixels lie in a row,
// `a_image` and `b_image` floats apart, `a_pixel` and `b_pixel` from one to the next.
template <class F>
void for_chunks(int64_t images, int64_t pixels, int64_t a_image, int64_t a_pixel, int64_t b_image,
                int64_t b_pixel, const F& f) {
  const int64_t together = clamp(kChunkPixels / pixels, 1, kChunkPixels);
  RowPairs rows;
  for (int64_t n = 0; n < images; n += together) {
    rows.count = smaller(together, images - n);
    for (int64_t from = 0; from < pixels; from += kChunkPixels) {
      for (int64_t i = 0; i < rows.count; ++i) {
        rows.a[i] = (n + i) * a_image + from * a_pixel;
        rows.b[i] = (n + i) * b_image + from * b_pixel;
      }
      f(rows, smaller(kChunkPixels, pixels - from));
    }
  }
}

// Pixels of `ranks` contiguous numbers (t2, dz1) against images of `channels` channels (g, x), whose pixels lie
// in a row: (ranks, channels) where channels are contiguous, else (channels, ranks).
struct Image {
  const float* data;
  bool channels_last;
  int64_t image, channel, pixel;  // steps
};
void factor_gradient(const float* ranked, int64_t ranks, const Image& x, int64_t channels, int64_t images,
                     int64_t pixels, float* c) {
  if (x.channels_last)
    for_chunks(images, pixels, pixels * ranks, ranks, x.image, x.pixel, [&](const RowPairs& rows, int64_t n) {
      outer_products<A::k_major>(ranked, ranks, ranks, x.data, x.pixel, channels, rows, n, c);
    });
  else
    for_chunks(images, pixels, x.image, x.pixel, pixels * ranks, ranks, [&](const RowPairs& rows, int64_t n) {
      outer_products<A::row_major>(x.data, x.channel, channels, ranked, ranks, ranks, rows, n, c);
    });
}

// dz2 with its border against the windows of t1: per segment (R2, length of the segment).
void core_gradient(const Tucker2Params& p, const float* t1, const float* dz2, int64_t border_h,
                   int64_t border_w, int64_t images, float* c) {
  const int64_t r1 = p.rank_in, r2 = p.rank_out, height = p.out_height, width = p.out_width;
  const int64_t t1_row = padded_width(p) * r1, dz2_row = (width + 2 * border_w) * r2;
  const int64_t t1_image = padded_height(p) * t1_row, dz2_image = (height + 2 * border_h) * dz2_row;
  const Window window = core_window(p);
  const float* const inner = dz2 + border_h * dz2_row + border_w * r2;
  const auto taps = [&](const RowPairs& rows, int64_t pixels) {
    for (int64_t s = 0; s < window.segments; ++s) {
      const int64_t i = p.dilation_w == 1 ? s : s / p.kernel_w, j = p.dilation_w == 1 ? 0 : s % p.kernel_w;
      outer_products<A::k_major>(inner, r2, r2, t1 + i * p.dilation_h * t1_row + j * p.dilation_w * r1,
                                 p.stride_w * r1, window.length, rows, pixels, c + s * r2 * window.length);
    }
  };
  // Where both have rows of one length, the border's zeros between dz2's rows are cheaper than stopping there.
  if (p.stride_h * p.stride_w == 1 && padded_width(p) == width + 2 * border_w)
    return for_chunks(images, (height - 1) * padded_width(p) + width, dz2_image, r2, t1_image, r1, taps);
  const int64_t step = clamp(kChunkPixels / width, 1, kChunkPixels);
  RowPairs rows;
  for (int64_t row = 0; row < images * height; row += step) {
    rows.count = smaller(step, images * height - row);
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t n = (row + i) / height, r = (row + i) % height;
      rows.a[i] = n * dz2_image + r * dz2_row;
      rows.b[i] = n * t1_image + r * p.stride_h * t1_row;
    }
    taps(rows, width);
  }
}

// sums (K) += the pixels of g.
void bias_gradient(const Image& g, int64_t channels, int64_t images, int64_t pixels, float* sums) {
  for (int64_t n = 0; n < images; ++n) {
    const float* const x = g.data + n * g.image;
    if (g.channels_last) {
      constexpr int kWide = 4;
      for (int64_t c = 0; c < channels; c += kWide * kLanes) {
        Floats sum[kWide] = {};
        int width[kWide];
        for (int v = 0; v < kWide; ++v)
          width[v] = static_cast<int>(clamp(channels - c - v * kLanes, 0, kLanes));
        for (int64_t i = 0; i < pixels; ++i)
          for (int v = 0; v < kWide; ++v)
            if (width[v]) sum[v] += load_first(x + i * g.pixel + c + v * kLanes, width[v]);
        for (int v = 0; v < kWide; ++v)
          for (int l = 0; l < width[v]; ++l) sums[c + v * kLanes + l] += sum[v][l];
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        const float* const plane = x + c * g.channel;
        Floats sum[4] = {};
        int64_t i = 0;
        for (; i + 4 * kLanes <= pixels; i += 4 * kLanes)
          for (int v = 0; v < 4; ++v) sum[v] += load_unaligned(plane + i + v * kLanes);
        for (; i < pixels; i += kLanes)
          sum[0] += load_first(plane + i, static_cast<int>(smaller(kLanes, pixels - i)));
        const Floats total = sum[0] + sum[1] + (sum[2] + sum[3]);
        for (int l = 0; l < kLanes; ++l) sums[c] += total[l];
      }
    }
  }
}

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
