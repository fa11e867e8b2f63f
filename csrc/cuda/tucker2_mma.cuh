// tucker2 on CUDA: the matrix product that all three stages are made of.
//
// A block of 4 warps (2 x 2) multiplies 64 rows (pixels) by 64 or 128 columns; a warp holds 32 x (8 kTiles)
// accumulators. Operands lie in shared memory as rows of K, B as [column][K], which is how ldmatrix and
// mma.sync want them: no transposition anywhere. K goes in steps of 32 bytes: 16 elements of 16 bits
// (m16n8k16) or 8 floats (m16n8k8, TF32), at the same byte offsets, so one code path serves all. Rows are
// padded by 16 bytes, an odd number of 16-byte units: the 8 rows of an ldmatrix lie in different banks.
//
// float32: TF32 rounds once (10 bits); the split form adds the two products of the rounding errors (3 mma),
// float32's own accuracy. Tensor cores truncate what they add to an accumulator: over a long K that loses
// bits, so each step's three products start from 0 and are added by the ordinary units, which round.
#pragma once

#include <type_traits>

#include "tucker2_factor.cuh"

namespace kegfast::cuda {

constexpr int kRows = 64;   // of a block's tile
constexpr int kStages = 3;  // chunks in flight

template <class T_, bool kSplit_>
struct Math {
  using T = T_;
  static constexpr bool kSplit = kSplit_;                            // 3xTF32
  static constexpr double kCost = sizeof(T) / 2 * (kSplit ? 3 : 1);  // a product's time over a 16-bit one's
  static_assert(!kSplit || std::is_same_v<T, float>);

  // What of a float the unit does not see, as tf32.
  KEGFAST_DEVICE static uint32_t rest(uint32_t bits, uint32_t rounded) {
    return round_tf32(float_bits(bits_float(bits) - bits_float(rounded)));
  }

  template <int kA, int kCount>
  KEGFAST_DEVICE static void prepare(uint32_t (&bits)[kCount], uint32_t (&low)[kCount]) {
    if constexpr (std::is_same_v<T, float>) {
      KEGFAST_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const uint32_t rounded = round_tf32(bits[i]);
        if constexpr (kSplit) low[i] = rest(bits[i], rounded);
        bits[i] = rounded;
      }
    }
  }
};

// acc += the tile's rows times its columns over up to four steps of K. `a[m]`: this lane's ldmatrix row of
// the 16-row tile m; `b`: its row of the first 16 columns; a_offset(step): where the step's 32 bytes lie in a
// row of A. `columns`: how many this warp has (the rest of the accumulators stays as it is).
template <class M, int kTiles, class Offset>
KEGFAST_DEVICE void multiply_chunk(float (&acc)[2][kTiles][4], const char* const (&a)[2], Offset a_offset,
                                   const char* b, int steps, int columns) {
  KEGFAST_UNROLL
  for (int step = 0; step < kChunkSteps; ++step) {
    if (step >= steps) break;
    const int offset = a_offset(step);
    uint32_t fa[2][4], low_a[2][4];
    KEGFAST_UNROLL
    for (int m = 0; m < 2; ++m) {
      ldmatrix_x4(fa[m], a[m] + offset);
      M::template prepare<0>(fa[m], low_a[m]);
    }
    KEGFAST_UNROLL
    for (int pair = 0; pair < kTiles / 2; ++pair) {
      if (pair * 16 >= columns) break;
      uint32_t fb[4], low_b[4];
      ldmatrix_x4(fb, b + pair * 16 * kPitch + step * kStepBytes);
      M::template prepare<1>(fb, low_b);
      KEGFAST_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint32_t high[2] = {fb[2 * half], fb[2 * half + 1]};
        KEGFAST_UNROLL
        for (int m = 0; m < 2; ++m) {
          float (&d)[4] = acc[m][2 * pair + half];
          if constexpr (M::kSplit) {
            const uint32_t low[2] = {low_b[2 * half], low_b[2 * half + 1]};
            float step_sum[4] = {};
            mma(step_sum, low_a[m], high, float{});
            mma(step_sum, fa[m], low, float{});
            // Of an infinite number there is no rest, and infinity times a rest of 0 is no part of the
            // product.
            KEGFAST_UNROLL
            for (int i = 0; i < 4; ++i) step_sum[i] = fabsf(step_sum[i]) < INFINITY ? step_sum[i] : 0;
            mma(step_sum, fa[m], high, float{});
            KEGFAST_UNROLL
            for (int i = 0; i < 4; ++i) d[i] += step_sum[i];
          } else {
            mma(d, fa[m], high, typename M::T{});
          }
        }
      }
    }
  }
}

// Loads chunk after chunk, kStages - 1 ahead of the one that is multiplied. load(chunk, stage),
// multiply(chunk, stage).
template <class Load, class Multiply>
KEGFAST_DEVICE void pipeline(int chunks, Load load, Multiply multiply) {
  barrier();  // whoever read the stages before is done
  KEGFAST_UNROLL
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < chunks) load(s, s);
    cp_async_commit();
  }
  KEGFAST_ROLLED
  for (int c = 0; c < chunks; ++c) {
    cp_async_wait<kStages - 2>();
    barrier();
    const int next = c + kStages - 1;
    if (next < chunks) load(next, next % kStages);
    cp_async_commit();
    multiply(c, c % kStages);
  }
}

// Where a lane and its warp stand in the block's tile.
template <int kTiles>
struct Place {
  int row, column;  // of the warp's accumulators
  KEGFAST_DEVICE Place() : row(warp() / 2 * 32), column(warp() % 2 * 8 * kTiles) {}

  KEGFAST_DEVICE int a_row(int m) const { return row + 16 * m + lane() % 16; }
  KEGFAST_DEVICE int a_byte() const { return lane() / 16 * 16; }
  KEGFAST_DEVICE const char* b(const char* stage) const {
    return stage + (column + lane() % 8 + lane() / 16 * 8) * kPitch + lane() / 8 % 2 * 16;
  }
  // Accumulator i of tile (m, t).
  KEGFAST_DEVICE int out_row(int m, int i) const { return row + 16 * m + lane() / 4 + 8 * (i / 2); }
  KEGFAST_DEVICE int out_column(int t, int i) const { return column + 8 * t + 2 * (lane() % 4) + i % 2; }
};

template <int kTiles>
KEGFAST_DEVICE void clear(float (&acc)[2][kTiles][4]) {
  KEGFAST_UNROLL
  for (int m = 0; m < 2; ++m) {
    KEGFAST_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      KEGFAST_UNROLL
      for (int i = 0; i < 4; ++i) acc[m][t][i] = 0;
    }
  }
}

KEGFAST_ANYWHERE constexpr size_t stage_bytes(int tiles) {
  return size_t(kRows + 16 * tiles) * kPitch;
}

// acc = A times rows column .. column + 16 kTiles of the factor, over all of K: the one product loop. `a`
// gives A:
//   a.load(stage, chunk)     brings a chunk of A beside the factor's, or nothing where A is in shared memory
//   a.row(m, stage)          this lane's ldmatrix row of the 16-row tile m
//   a.offset(chunk, step)    where the step's 32 bytes lie in such a row
// `live`: whether anybody will read this warp's rows.
template <class M, int kTiles, class T, class A>
KEGFAST_DEVICE void product(float (&acc)[2][kTiles][4], const Factor<T>& factor, char* stages, int column,
                            bool live, const A& a) {
  const Place<kTiles> place;
  const int columns = live ? factor.rows - column - place.column : 0;
  const FactorLoad<16 * kTiles, T> load_factor(factor, column);
  clear(acc);
  pipeline(
      factor.chunks(),
      [&](int chunk, int s) {
        char* stage = stages + s * stage_bytes(kTiles);
        a.load(stage, chunk);
        load_factor(stage + kRows * kPitch, chunk);
      },
      [&](int chunk, int s) {
        const char* stage = stages + s * stage_bytes(kTiles);
        const char* const rows[2] = {a.row(0, stage), a.row(1, stage)};
        multiply_chunk<M>(
            acc, rows, [&](int step) { return a.offset(chunk, step); }, place.b(stage + kRows * kPitch),
            factor.steps(chunk), columns);
      });
}

// A arrives chunk by chunk: load(stage, chunk).
template <int kTiles, class Load>
struct Streamed {
  Load load;
  KEGFAST_DEVICE const char* row(int m, const char* stage) const {
    const Place<kTiles> place;
    return stage + place.a_row(m) * kPitch + place.a_byte();
  }
  KEGFAST_DEVICE int offset(int, int step) const { return step * kStepBytes; }
};

// A lies in shared memory, its rows anywhere: at(chunk, step).
template <class Offset>
struct Resident {
  const char* rows[2];
  Offset at;
  KEGFAST_DEVICE void load(char*, int) const {}
  KEGFAST_DEVICE const char* row(int m, const char*) const { return rows[m]; }
  KEGFAST_DEVICE int offset(int chunk, int step) const { return at(chunk, step); }
};

}  // namespace kegfast::cuda
