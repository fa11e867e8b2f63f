// Weight gradients of tucker2: sums of outer products over pixels, k-major GEMMs on the same tiles as the
// forward pass.
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
  const Cut cut = best_cut(vectors, m, kChain, kMaxVectors);
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

void outer_products(bool a_channels_last, const float* a, int64_t a_step, int64_t m, const float* b,
                    int64_t n, const RowPairs& rows, int64_t pixels, float* c) {
  if (a_channels_last)
    outer_products<A::k_major>(a, a_step, m, b, n, n, rows, pixels, c);
  else
    outer_products<A::row_major>(a, a_step, m, b, n, n, rows, pixels, c);
}

// Calls f(rows) for chunks of the rows of images begin <= n < end.
template <class Offsets, class F>
void for_chunks(int64_t begin, int64_t end, int64_t height, int64_t width, const Offsets& offsets,
                const F& f) {
  const int64_t step = clamp(kChunkPixels / width, 1, kChunkPixels);
  RowPairs rows;
  for (int64_t row = begin * height; row < end * height; row += step) {
    rows.count = smaller(step, end * height - row);
    for (int64_t i = 0; i < rows.count; ++i)
      offsets((row + i) / height, (row + i) % height, rows.a[i], rows.b[i]);
    f(rows);
  }
}

void last_gradient(const Tucker2GradParams& g, int64_t begin, int64_t end) {
  const Tucker2Params& p = g.forward;
  const int64_t k = p.features, r2 = p.rank_out, q = p.out_width, plane = p.out_height * q;
  const bool last = g.grad_channels_last;
  for_chunks(
      begin, end, p.out_height, q,
      [&](int64_t n, int64_t row, int64_t& a, int64_t& b) {
        a = n * k * plane + row * q * (last ? k : 1);
        b = (n * p.out_height + row) * q * r2;
      },
      [&](const RowPairs& rows) {
        outer_products(last, g.grad, last ? k : plane, k, p.t2, r2, rows, q, g.last);
      });
}

void core_gradient(const Tucker2GradParams& g, int64_t begin, int64_t end) {
  const Tucker2Params& p = g.forward;
  const int64_t r1 = p.rank_in, r2 = p.rank_out;
  const int64_t t1_row = padded_width(p) * r1, dz2_row = (p.out_width + 2 * g.border_w) * r2;
  const int64_t dz2_height = p.out_height + 2 * g.border_h;
  const Window window = core_window(p);
  for_chunks(
      begin, end, p.out_height, p.out_width,
      [&](int64_t n, int64_t row, int64_t& a, int64_t& b) {
        a = (n * padded_height(p) + row * p.stride_h) * t1_row;
        b = (n * dz2_height + row + g.border_h) * dz2_row + g.border_w * r2;
      },
      [&](const RowPairs& rows) {
        for (int64_t s = 0; s < window.segments; ++s) {
          const int64_t i = p.dilation_w == 1 ? s : s / p.kernel_w,
                        j = p.dilation_w == 1 ? 0 : s % p.kernel_w;
          outer_products<A::k_major>(p.t1 + i * p.dilation_h * t1_row + j * p.dilation_w * r1,
                                     p.stride_w * r1, window.length, g.dz2, r2, r2, rows, p.out_width,
                                     g.core + s * window.length * r2);
        }
      });
}

void first_gradient(const Tucker2GradParams& g, int64_t begin, int64_t end) {
  const Tucker2Params& p = g.forward;
  for_chunks(
      begin, end, p.height, p.width,
      [&](int64_t n, int64_t row, int64_t& a, int64_t& b) {
        a = n * p.x_image + row * p.x_row;
        b = (n * p.height + row) * p.width * p.rank_in;
      },
      [&](const RowPairs& rows) {
        outer_products(p.channels_last, static_cast<const float*>(p.x),
                       p.channels_last ? p.x_pixel : p.x_channel, p.channels, g.dz1, p.rank_in, rows, p.width,
                       g.first);
      });
}

}  // namespace

void tucker2_weight_gradients(const Tucker2GradParams& g, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  if (g.last) last_gradient(g, begin, end);
  if (g.core) core_gradient(g, begin, end);
  if (g.first) first_gradient(g, begin, end);
}

}  // namespace kegfast::KEGFAST_ISA
