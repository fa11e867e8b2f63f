// The core by Winograd's minimal filtering F(2x2, 3x3): 4 x 4 input tiles to 2 x 2 output tiles by 16
// products instead of 36 (Lavin and Gray 2016, section 4.1), as 16 GEMMs over tiles. Same rounding error as
// the direct sum, 2.25x fewer FMAs.
#pragma once

#include "cpu/tucker2_sweep.inl"

namespace kegfast::KEGFAST_ISA {
namespace {

// Floats from one point of `tiles` tiles to the next: a line more than they need, or the 16 streams that a
// transform writes could all fall into one set of L1.
constexpr int64_t point_step(int64_t tiles, int64_t channels) {
  return tiles * channels + 16;
}

// Rows of A, B and G of the paper are small enough to write out. V = B^T d B for kLanes channels at once.
KEGFAST_INLINE void transform_input(const float* const (&d)[kPoints], int64_t channel, float* v,
                                    int64_t step) {
  Floats rows[4][4];
  KEGFAST_UNROLL
  for (int j = 0; j < 4; ++j) {
    const Floats d0 = load_unaligned(d[j] + channel), d1 = load_unaligned(d[4 + j] + channel);
    const Floats d2 = load_unaligned(d[8 + j] + channel), d3 = load_unaligned(d[12 + j] + channel);
    rows[0][j] = d0 - d2, rows[1][j] = d1 + d2, rows[2][j] = d2 - d1, rows[3][j] = d1 - d3;
  }
  KEGFAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const Floats(&r)[4] = rows[i];
    store_unaligned(v + (4 * i + 0) * step, r[0] - r[2]);
    store_unaligned(v + (4 * i + 1) * step, r[1] + r[2]);
    store_unaligned(v + (4 * i + 2) * step, r[2] - r[1]);
    store_unaligned(v + (4 * i + 3) * step, r[1] - r[3]);
  }
}

// Y = A^T m A; out[i] is null for pixels beyond an odd edge.
KEGFAST_INLINE void transform_output(const float* m, int64_t step, float* const (&out)[4], int64_t channel) {
  Floats rows[2][4];
  KEGFAST_UNROLL
  for (int j = 0; j < 4; ++j) {
    const Floats m0 = load_unaligned(m + j * step), m1 = load_unaligned(m + (4 + j) * step);
    const Floats m2 = load_unaligned(m + (8 + j) * step), m3 = load_unaligned(m + (12 + j) * step);
    rows[0][j] = m0 + m1 + m2, rows[1][j] = m1 - m2 - m3;
  }
  KEGFAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    const Floats(&r)[4] = rows[i];
    if (out[2 * i]) store_unaligned(out[2 * i] + channel, r[0] + r[1] + r[2]);
    if (out[2 * i + 1]) store_unaligned(out[2 * i + 1] + channel, r[1] - r[2] - r[3]);
  }
}

// U = G g G^T of the core, one packed factor per point.
void pack_winograd(const Tucker2Params& p, const Tucker2Factor& core, float* out) {
  const int64_t point = packed_floats(p.rank_out, {1, p.rank_in}, 1);
  for (int64_t r2 = 0; r2 < p.rank_out; r2 += kLanes)
    for (int64_t r1 = 0; r1 < p.rank_in; ++r1, out += kLanes) {
      Floats rows[4][3];
      for (int j = 0; j < 3; ++j) {
        Floats g[3];
        for (int i = 0; i < 3; ++i) {
          const int64_t at = r2 * core.row + r1 * core.input + i * core.tap_h + j * core.tap_w;
          float lane[kLanes];
          for (int l = 0; l < kLanes; ++l) lane[l] = element(core, at + l * core.row);
          g[i] = load_unaligned(lane);
        }
        const Floats sum = 0.5f * (g[0] + g[2]), half = 0.5f * g[1];
        rows[0][j] = g[0], rows[1][j] = sum + half, rows[2][j] = sum - half, rows[3][j] = g[2];
      }
      for (int i = 0; i < 4; ++i) {
        const Floats *const g = rows[i], sum = 0.5f * (g[0] + g[2]), half = 0.5f * g[1];
        const Floats points[4] = {g[0], sum + half, sum - half, g[2]};
        for (int j = 0; j < 4; ++j) store_unaligned(out + (4 * i + j) * point, points[j]);
      }
    }
}

// A band of t1: `rows` output rows of each of `images` images, t1 at the first row's window.
struct WinogradBand {
  int64_t images, rows;
  const float* t1;
  int64_t t1_image, t1_row, t1_rows;  // t1_rows: how many of them exist from t1 on
  float* t2;
};

class Winograd {
 public:
  Winograd(const Tucker2Params& p, const float* packed, float* scratch, Ahead* ahead)
      : p_(p), packed_(packed), scratch_(scratch), ahead_(ahead) {}

  void run(const WinogradBand& band) {
    const int64_t tile_rows = ceil_div(band.rows, 2), tile_columns = ceil_div(p_.out_width, 2);
    const int64_t tiles = band.images * tile_rows * tile_columns;
    float* const zeros = scratch_;
    float* const v = zeros + round_up(p_.rank_in, 16);
    float* const m = v + kPoints * point_step(tiles, p_.rank_in);
    memset(zeros, 0, p_.rank_in * sizeof(float));

    int64_t tile = 0;
    for (int64_t n = 0; n < band.images; ++n)
      for (int64_t i = 0; i < tile_rows; ++i)
        for (int64_t j = 0; j < tile_columns; ++j, ++tile)
          input_tile(band, zeros, n, 2 * i, 2 * j, v + tile * p_.rank_in, tiles);
    products(tiles, v, m);
    tile = 0;
    for (int64_t n = 0; n < band.images; ++n)
      for (int64_t i = 0; i < tile_rows; ++i)
        for (int64_t j = 0; j < tile_columns; ++j, ++tile)
          output_tile(band, n, 2 * i, 2 * j, m + tile * p_.rank_out, tiles);
  }

 private:
  void input_tile(const WinogradBand& band, const float* zeros, int64_t n, int64_t row, int64_t column,
                  float* v, int64_t tiles) {
    const float* d[kPoints];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        const bool exists = row + i < band.t1_rows && column + j < padded_width(p_);
        d[4 * i + j] = exists
                           ? band.t1 + n * band.t1_image + (row + i) * band.t1_row + (column + j) * p_.rank_in
                           : zeros;
      }
    for (int64_t c = 0; c < p_.rank_in; c += kLanes)
      transform_input(d, c, v + c, point_step(tiles, p_.rank_in));
  }

  void products(int64_t tiles, const float* v, float* m) {
    const Grid grid{1, 1, tiles, 0, 0, 0, 0};
    Tile tile{};
    tile.segments = kOrigin;
    tile.segment_count = 1;
    tile.segment_length = p_.rank_in;
    tile.a_step = p_.rank_in;
    tile.c_step = p_.rank_out;
    tile.ahead = ahead_;
    for (int x = 0; x < kPoints; ++x) {
      tile.a = v + x * point_step(tiles, p_.rank_in);
      tile.b = packed_ + x * packed_floats(p_.rank_out, {1, p_.rank_in}, 1);
      tile.c = m + x * point_step(tiles, p_.rank_out);
      sweep<A::row_major>(tile, grid, p_.rank_in, p_.rank_out, 1);
    }
  }

  void output_tile(const WinogradBand& band, int64_t n, int64_t row, int64_t column, const float* m,
                   int64_t tiles) {
    float* out[4];
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) {
        const bool exists = row + i < band.rows && column + j < p_.out_width;
        out[2 * i + j] = exists
                             ? band.t2 + ((n * band.rows + row + i) * p_.out_width + column + j) * p_.rank_out
                             : nullptr;
      }
    for (int64_t c = 0; c < p_.rank_out; c += kLanes)
      transform_output(m + c, point_step(tiles, p_.rank_out), out, c);
  }

  const Tucker2Params& p_;
  const float* const packed_;
  float* const scratch_;
  Ahead* const ahead_;
};

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
