// The micro-kernel of tucker2's weight gradients: a tile of sums of outer
// products over pixels, in registers.
#pragma once

#include "cpu/tucker2_sweep.inl"

namespace kegfast::KEGFAST_ISA {
namespace {

constexpr int64_t kMostRows = 256;

// Pixels of a chunk of A and B, `floats` each: it stays in L2 while the whole gradient is swept.
constexpr int64_t chunk_pixels(int64_t floats) {
  return clamp((32 << 10) / floats, 256, 4096);
}

// Rows of pixels of two tensors that are multiplied pixel by pixel.
struct RowPairs {
  int64_t a[kMostRows], b[kMostRows];  // offsets of each row, in floats
  int64_t count, pixels;               // pixels of each row
};

// C[m, v, :] += sum over rows and pixels of A[pixel, m] * B[pixel, v, :].
struct Outer {
  const float* a;
  int64_t a_step;  // floats from one pixel (k-major) or one m (row-major) to the
                   // next
  const float* b;
  int64_t b_step, b_vector;  // floats from one pixel, one vector to the next
  const RowPairs* rows;
  float* c;
  int64_t c_step, c_vector;
  int tail;                // lanes of the last vector, or of each
  Prefetcher* prefetcher;  // or null
};

enum class Lanes { whole, segments };  // all vectors but the last are whole; each has `tail` lanes

// Independent sums of one element: an FMA takes 4 cycles, in which 8 are
// issued.
constexpr int chains(int sums) {
  return sums >= 8 ? 1 : sums >= 4 ? 2 : 4;
}

template <ALayout kA, Lanes kKind, int M, int Vectors>
void run_outer(const Outer& t) {
  constexpr int kChains = chains(M * Vectors);
  constexpr int kBases = kA == ALayout::row_major ? (M + 2) / 3 : 1;  // x86 addresses base + {0, 1, 2} * step
  const int64_t a_step = t.a_step, b_step = t.b_step, b_vector = t.b_vector;
  const int tail = t.tail;
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < Vectors; ++v) __builtin_prefetch(t.c + m * t.c_step + v * t.c_vector, 1);
  const auto masked = [](int v) { return kKind == Lanes::segments || v == Vectors - 1; };
  Floats acc[kChains][M][Vectors] = {};
  for (int64_t r = 0; r < t.rows->count; ++r) {
    const float* b = t.b + t.rows->b[r];
    const float* base[kBases];
    KEGFAST_UNROLL
    for (int i = 0; i < kBases; ++i) base[i] = t.a + t.rows->a[r] + 3 * i * a_step;
    const auto pixel = [&](Floats(&sums)[M][Vectors]) __attribute__((always_inline)) {
      Floats w[Vectors];
      KEGFAST_UNROLL
      for (int v = 0; v < Vectors; ++v)
        w[v] = masked(v) ? load_first(b + v * b_vector, tail) : load_unaligned(b + v * b_vector);
      KEGFAST_UNROLL
      for (int m = 0; m < M; ++m) {
        const Floats x = splat(*(kA == ALayout::row_major ? base[m / 3] + (m % 3) * a_step : base[0] + m));
        KEGFAST_UNROLL
        for (int v = 0; v < Vectors; ++v) sums[m][v] += x * w[v];
      }
      b += b_step;
      KEGFAST_UNROLL
      for (int i = 0; i < kBases; ++i) {
        base[i] += kA == ALayout::row_major ? 1 : a_step;
        asm("" : "+r"(base[i]));  // keeps one pointer per three planes instead
                                  // of one each
      }
    };
    for (int64_t left = t.rows->pixels; left > 0;) {
      int64_t part = smaller(left, kPrefetchSteps);
      left -= part;
      if (t.prefetcher) t.prefetcher->step();
      for (; part >= kChains; part -= kChains) {
        KEGFAST_UNROLL
        for (int i = 0; i < kChains; ++i) pixel(acc[i]);
      }
      for (; part > 0; --part) pixel(acc[0]);
    }
  }
  KEGFAST_UNROLL
  for (int m = 0; m < M; ++m) {
    KEGFAST_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      Floats sum = acc[0][m][v];
      KEGFAST_UNROLL
      for (int i = 1; i < kChains; ++i) sum += acc[i][m][v];
      float* const c = t.c + m * t.c_step + v * t.c_vector;
      const int n = masked(v) ? tail : kLanes;
      store_first(c, sum + load_first(c, n), n);
    }
  }
}

using OuterFunction = void (*)(const Outer&);

template <ALayout kA, Lanes kKind>
struct OuterTable {
  OuterFunction f[kMaxVectors + 1][kMaxPixels + 1] = {};
  template <int Vectors, int M>
  constexpr void fill() {
    if constexpr (Vectors <= kMaxVectors) {
      if constexpr (M <= max_pixels(Vectors)) {
        f[Vectors][M] = &run_outer<kA, kKind, M, Vectors>;
        fill<Vectors, M + 1>();
      } else {
        fill<Vectors + 1, 1>();
      }
    }
  }
  constexpr OuterTable() { fill<1, 1>(); }
};
template <ALayout kA, Lanes kKind>
inline constexpr OuterTable<kA, kKind> kOuterTiles{};

// The whole of C: m rows, `vectors` vectors; `tile` at the first of both.
template <ALayout kA, Lanes kKind>
void outer_products(const Outer& whole, int64_t m, int64_t vectors) {
  const Tiling tiling = best_tiling(vectors, m, whole.rows->count * whole.rows->pixels, kMaxVectors, 0);
  const auto& tiles = kOuterTiles<kA, kKind>.f;
  Outer tile = whole;
  for (int64_t v = 0; v < vectors; v += tiling.vectors) {
    const int width = static_cast<int>(smaller(tiling.vectors, vectors - v));
    tile.b = whole.b + v * whole.b_vector;
    tile.tail = kKind == Lanes::segments || v + width == vectors ? whole.tail : kLanes;
    int64_t done = 0;
    for (int i = 0; i < tiling.tiles; ++i) {
      const int64_t next = (i + 1) * m / tiling.tiles;
      tile.a = whole.a + (kA == ALayout::k_major ? done : done * whole.a_step);
      tile.c = whole.c + done * whole.c_step + v * whole.c_vector;
      tiles[width][next - done](tile);
      done = next;
    }
  }
}

// C (M, N) += A[pixel, :M]^T B[pixel, :N].
template <ALayout kA>
void outer_products(const float* a, int64_t a_step, int64_t m, const float* b, int64_t b_step, int64_t n,
                    const RowPairs& rows, Prefetcher* prefetcher, float* c) {
  const int64_t vectors = ceil_div(n, kLanes);
  const int tail = static_cast<int>(n - (vectors - 1) * kLanes);
  outer_products<kA, Lanes::whole>({a, a_step, b, b_step, kLanes, &rows, c, n, kLanes, tail, prefetcher}, m,
                                   vectors);
}

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
