// The core by Winograd's minimal filtering (Lavin and Gray 2016, section 4.1): F(2x2, 3x3) takes 4 x 4 input
// tiles to 2 x 2 output tiles by 16 products instead of 36, F(4x4, 3x3) 6 x 6 to 4 x 4 by 36 instead of 144,
// as one GEMM over tiles for each product ("point"). A core of stride 2 takes 5 x 5 to 2 x 2 by 25 instead of
// 36: along an axis the even inputs meet two taps, which is F(2, 2) by 3 products, the odd ones the third, by
// 2.
//
// Rounding: the products' errors grow by a = mean over outputs o of sum_i (A_oi |B_i| |G_i|)^2 / 3 along each
// axis, for data and filters of independent elements. F(2x2): a = 1.7, that of the direct sum in practice,
// whose sums are longer; F(4x4) from the points 0, s/2, -s/2, s, -s, s = sqrt(2): 5.0 (10.8 from the
// paper's), so it is only run where asked for. 64 outputs at a time, so that a band's inputs and products
// stay in L2. Log: docs/kernels/log.md.
#pragma once

#include "cpu/tucker2_factor.inl"
#include "cpu/tucker2_sweep.inl"

namespace kegfast::KEGFAST_ISA {
namespace {

// Multiples of one axis: B^T d, G g and A^T m for F(2, 3) and F(4, 3).
KEGFAST_INLINE void input_axis(const Floats (&d)[4], Floats (&v)[4]) {
  v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
}
KEGFAST_INLINE void filter_axis(const Floats (&g)[3], Floats (&u)[4]) {
  const Floats sum = 0.5f * (g[0] + g[2]), half = 0.5f * g[1];
  u[0] = g[0], u[1] = sum + half, u[2] = sum - half, u[3] = g[2];
}
KEGFAST_INLINE void output_axis(const Floats (&m)[4], Floats (&y)[2]) {
  y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
}

// Stride 2: the even inputs, then the odd.
KEGFAST_INLINE void input_axis(const Floats (&d)[5], Floats (&v)[5]) {
  v[0] = d[0] - d[2], v[1] = d[2], v[2] = d[4] - d[2], v[3] = d[1], v[4] = d[3];
}
KEGFAST_INLINE void filter_axis(const Floats (&g)[3], Floats (&u)[5]) {
  u[0] = g[0], u[1] = g[0] + g[2], u[2] = g[2], u[3] = u[4] = g[1];
}
KEGFAST_INLINE void output_axis(const Floats (&m)[5], Floats (&y)[2]) {
  y[0] = m[0] + m[1] + m[3], y[1] = m[1] + m[2] + m[4];
}

constexpr float kRoot = 1.41421356237309505f;
KEGFAST_INLINE void input_axis(const Floats (&d)[6], Floats (&v)[6]) {
  const Floats near = d[4] - 2.0f * d[2], far = d[4] - 0.5f * d[2];
  const Floats near_odd = kRoot * (0.5f * d[3] - d[1]), far_odd = kRoot * (d[3] - 0.5f * d[1]);
  v[0] = d[0] + d[4] - 2.5f * d[2];
  v[1] = near + near_odd, v[2] = near - near_odd;
  v[3] = far + far_odd, v[4] = far - far_odd;
  v[5] = d[1] + d[5] - 2.5f * d[3];
}
KEGFAST_INLINE void filter_axis(const Floats (&g)[3], Floats (&u)[6]) {
  const Floats near = (-2.0f / 3) * (g[0] + 0.5f * g[2]), near_odd = (-kRoot / 3) * g[1];
  const Floats far = (1.0f / 6) * (g[0] + 2.0f * g[2]), far_odd = (kRoot / 6) * g[1];
  u[0] = g[0], u[1] = near + near_odd, u[2] = near - near_odd;
  u[3] = far + far_odd, u[4] = far - far_odd, u[5] = g[2];
}
KEGFAST_INLINE void output_axis(const Floats (&m)[6], Floats (&y)[4]) {
  const Floats near = m[1] + m[2], far = m[3] + m[4];
  const Floats near_odd = kRoot * (m[1] - m[2]), far_odd = kRoot * (m[3] - m[4]);
  y[0] = m[0] + near + far, y[1] = 0.5f * near_odd + far_odd;
  y[2] = 0.5f * near + 2.0f * far, y[3] = m[5] + 0.25f * near_odd + 2.0f * far_odd;
}

// V = B^T d B for kLanes channels at once.
template <int kSide>
KEGFAST_INLINE void transform_input(const float* const (&d)[kSide * kSide], int64_t channel, float* v,
                                    int64_t step) {
  Floats half[kSide][kSide];  // transposed
  KEGFAST_UNROLL
  for (int j = 0; j < kSide; ++j) {
    Floats column[kSide];
    KEGFAST_UNROLL
    for (int i = 0; i < kSide; ++i) column[i] = load_unaligned(d[kSide * i + j] + channel);
    Floats to[kSide];
    input_axis(column, to);
    KEGFAST_UNROLL
    for (int i = 0; i < kSide; ++i) half[i][j] = to[i];
  }
  KEGFAST_UNROLL
  for (int i = 0; i < kSide; ++i) {
    Floats to[kSide];
    input_axis(half[i], to);
    KEGFAST_UNROLL
    for (int j = 0; j < kSide; ++j) store_unaligned(v + (kSide * i + j) * step, to[j]);
  }
}

// What a sum meets on its way to memory, where the transform is an operator's last stage: a bias, or null;
// numbers from the outputs to an addend, where there is one; ReLU.
struct LastStore {
  const float* bias;
  bool add;
  int64_t addend;
  bool relu;
};

// Y = A^T m A; out[i] is null for pixels beyond an uneven edge.
template <int Edge, int kSide>
KEGFAST_INLINE void transform_output(const float* m, int64_t step, float* const (&out)[Edge * Edge],
                                     int64_t channel, const LastStore& last) {
  const Floats bias = last.bias ? load_unaligned(last.bias + channel) : Floats{};
  Floats half[Edge][kSide];
  KEGFAST_UNROLL
  for (int j = 0; j < kSide; ++j) {
    Floats column[kSide];
    KEGFAST_UNROLL
    for (int i = 0; i < kSide; ++i) column[i] = load_unaligned(m + (kSide * i + j) * step);
    Floats to[Edge];
    output_axis(column, to);
    KEGFAST_UNROLL
    for (int i = 0; i < Edge; ++i) half[i][j] = to[i];
  }
  KEGFAST_UNROLL
  for (int i = 0; i < Edge; ++i) {
    Floats to[Edge];
    output_axis(half[i], to);
    KEGFAST_UNROLL
    for (int j = 0; j < Edge; ++j) {
      if (!out[Edge * i + j]) continue;
      float* const at = out[Edge * i + j] + channel;
      Floats y = to[j] + bias;
      if (last.add) y += load_unaligned(at + last.addend);
      store_unaligned(at, last.relu ? relu(y) : y);
    }
  }
}

// U = G g G^T of the core, one packed factor per point.
template <int kSide>
void pack_winograd(const Tucker2Params& p, const Tucker2Factor& core, float* out) {
  const int64_t point = packed_floats(p.rank_out, {1, p.rank_in});
  for (int64_t r2 = 0; r2 < p.rank_out; r2 += kLanes)
    for (int64_t r1 = 0; r1 < p.rank_in; ++r1, out += kLanes) {
      Floats half[kSide][3];
      for (int j = 0; j < 3; ++j) {
        Floats column[3], to[kSide];
        for (int i = 0; i < 3; ++i) {
          const int64_t at = r2 * core.row + r1 * core.input + i * core.tap_h + j * core.tap_w;
          float lane[kLanes];
          for (int l = 0; l < kLanes; ++l) lane[l] = element(core, at + l * core.row);
          column[i] = load_unaligned(lane);
        }
        filter_axis(column, to);
        for (int i = 0; i < kSide; ++i) half[i][j] = to[i];
      }
      for (int i = 0; i < kSide; ++i) {
        Floats to[kSide];
        filter_axis(half[i], to);
        for (int j = 0; j < kSide; ++j) store_unaligned(out + (kSide * i + j) * point, to[j]);
      }
    }
}

// `rows` output rows of each of `images` images. t1 is its first row and pixel in memory, `above` and `left`
// of zeros around which the first window starts.
struct WinogradBand {
  int64_t images, rows;
  const float* t1;
  int64_t t1_image, t1_row, t1_rows, t1_columns, above, left;
  float* t2;
  int64_t t2_image;
  LastStore last;
};

// The core in output tiles of Edge x Edge.
template <int Edge, int Stride>
class Winograd {
 public:
  Winograd(const Tucker2Params& p, const float* packed, float* scratch, Prefetcher* prefetcher,
           const PrefetchRange& then)
      : p_(p), packed_(packed), scratch_(scratch), prefetcher_(prefetcher), then_(then) {}

  void run(const WinogradBand& band) {
    const int64_t tile_rows = ceil_div(band.rows, Edge), tile_columns = ceil_div(p_.out_width, Edge);
    const int64_t tiles = band.images * tile_rows * tile_columns;
    float* const zeros = scratch_;
    float* const v = zeros + round_up(p_.rank_in, 16);
    float* const m = v + kPoints * point_step(tiles, p_.rank_in);
    memset(zeros, 0, p_.rank_in * sizeof(float));

    int64_t tile = 0;
    for (int64_t n = 0; n < band.images; ++n)
      for (int64_t i = 0; i < tile_rows; ++i)
        for (int64_t j = 0; j < tile_columns; ++j, ++tile)
          input_tile(band, zeros, n, Stride * Edge * i - band.above, Stride * Edge * j - band.left,
                     v + tile * p_.rank_in, tiles);
    const int64_t share = winograd_share(p_);
    for (int64_t first = 0; first < p_.rank_out; first += share) {
      const int64_t outputs = smaller(share, p_.rank_out - first);
      products(tiles, v, first, outputs, m);
      tile = 0;
      for (int64_t n = 0; n < band.images; ++n)
        for (int64_t i = 0; i < tile_rows; ++i)
          for (int64_t j = 0; j < tile_columns; ++j, ++tile)
            output_tile(band, n, Edge * i, Edge * j, m + tile * outputs, tiles, first, outputs);
    }
  }

 private:
  static constexpr int kSide = winograd_side(Edge, Stride), kPoints = kSide * kSide;

  static bool in_range(int64_t i, int64_t size) {
    return static_cast<uint64_t>(i) < static_cast<uint64_t>(size);
  }

  void input_tile(const WinogradBand& band, const float* zeros, int64_t n, int64_t row, int64_t column,
                  float* v, int64_t tiles) {
    const float* d[kPoints];
    for (int i = 0; i < kSide; ++i)
      for (int j = 0; j < kSide; ++j) {
        const bool exists = in_range(row + i, band.t1_rows) && in_range(column + j, band.t1_columns);
        d[kSide * i + j] =
            exists ? band.t1 + n * band.t1_image + (row + i) * band.t1_row + (column + j) * p_.rank_in
                   : zeros;
      }
    for (int64_t c = 0; c < p_.rank_in; c += kLanes)
      transform_input<kSide>(d, c, v + c, point_step(tiles, p_.rank_in));
  }

  // Of `outputs` channels from `first` on: their products stay in L2.
  void products(int64_t tiles, const float* v, int64_t first, int64_t outputs, float* m) {
    const Grid grid{1, 1, tiles, 0, 0, 0, 0};
    Tile tile{};
    tile.segments = kOrigin;
    tile.segment_count = 1;
    tile.segment_length = p_.rank_in;
    tile.a_step = p_.rank_in;
    tile.c_step = outputs;
    tile.prefetcher = prefetcher_;
    const Window window{1, p_.rank_in};
    const int64_t point = packed_floats(p_.rank_out, window), begin = packed_floats(first, window);
    const bool ends = first + outputs >= p_.rank_out;
    for (int x = 0; x < kPoints; ++x) {
      tile.a = v + x * point_step(tiles, p_.rank_in);
      tile.b = packed_ + x * point + begin;
      tile.c = m + x * point_step(tiles, outputs);
      const float* const next =
          x + 1 < kPoints ? tile.b + point : packed_ + begin + packed_floats(outputs, window);
      const bool last = x + 1 == kPoints && ends;
      sweep<ALayout::row_major>(tile, grid, p_.rank_in, outputs,
                                {{}, last ? then_ : first_of(next, outputs, window)});
    }
  }

  void output_tile(const WinogradBand& band, int64_t n, int64_t row, int64_t column, const float* m,
                   int64_t tiles, int64_t first, int64_t outputs) {
    float* out[Edge * Edge];
    for (int i = 0; i < Edge; ++i)
      for (int j = 0; j < Edge; ++j) {
        const bool exists = row + i < band.rows && column + j < p_.out_width;
        out[Edge * i + j] = exists ? band.t2 + n * band.t2_image +
                                         ((row + i) * p_.out_width + column + j) * p_.rank_out + first
                                   : nullptr;
      }
    LastStore last = band.last;
    if (last.bias) last.bias += first;
    for (int64_t c = 0; c < outputs; c += kLanes)
      transform_output<Edge, kSide>(m + c, point_step(tiles, outputs), out, c, last);
  }

  const Tucker2Params& p_;
  const float* const packed_;
  float* const scratch_;
  Prefetcher* const prefetcher_;
  const PrefetchRange then_;  // what is read after the last point's factor
};

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
