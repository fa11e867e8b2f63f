// sqeuclidean and cosine under squared noise distances: the closed form of rank nz + 2, on samples centered
// twice.
#pragma once

#include "cpu/diversity_tile.inl"

namespace kegfast::KEGFAST_ISA {

constexpr int kBlockColumns = 16;  // columns of one block of the low-rank table

// Takes the mean off x, twice: what rounding left of an offset after the first time goes with the second.
template <class T>
inline void center(T* x, int64_t batch) {
  constexpr int N = lanes<T>;
  Vec<T> mean{};
  for (int pass = 0; pass < 3; ++pass) {
    Vec<T> total{};
    for (int64_t i = 0; i < batch;) {
      Vec<T> sum{};
      for (const int64_t end = i + 32 < batch ? i + 32 : batch; i < end; ++i) {
        const Vec<T> v = pass ? load(x + i * N) - mean : load(x + i * N);
        if (pass) store(x + i * N, v);
        sum += v;
      }
      total += sum;
    }
    if (pass == 2) return;
    mean = total * (T(1) / static_cast<T>(batch));
  }
}

// c_k = sum_i table_ik x_i for K columns.
template <class T, int K>
inline void project_columns(const T* x, const T* table, int64_t batch, Vec<T>* c) {
  constexpr int N = lanes<T>;
  for (int k = 0; k < K; ++k) c[k] = Vec<T>{};
  for (int64_t i = 0; i < batch;) {
    Vec<T> sum[K] = {};  // short sums, then their sum: fewer roundings
    for (const int64_t end = i + 64 < batch ? i + 64 : batch; i < end; ++i) {
      const Vec<T> xi = load(x + i * N);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) sum[k] += xi * splat(table[i * kBlockColumns + k]);
    }
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) c[k] += sum[k];
  }
}

template <class T, int K>
inline __attribute__((always_inline)) Vec<T> expand(Vec<T> sum, const Vec<T>* c, const T* row) {
  Vec<T> odd{};  // two chains
#pragma GCC unroll 16
  for (int k = 0; k < K; k += 2) {
    sum += c[k] * splat(row[k]);
    odd += c[k + 1] * splat(row[k + 1]);
  }
  return sum + odd;
}

// K: columns of the last block, whose last one is a (p.low_rank_tail says which).
template <class T, int K>
inline void low_rank_tiles(const DiversityParams& p, int64_t first, int64_t last, void* workspace,
                           double* values) {
  constexpr int N = lanes<T>;
  const int64_t B = p.batch;
  const T* diagonal = static_cast<const T*>(p.diagonal);
  T* x = static_cast<T*>(workspace);
  T* g = x + block_tiles(B) * B * N;
  each_tile<T>(p, first, last, x, values, [&](const Tile<T>& loaded, Ahead ahead) {
    Tile<T> t = loaded;
    center(t.x, B);
    t.low = t.high = Vec<T>{};
    const T* table = static_cast<const T*>(p.low_rank);
    const bool several = p.low_rank_blocks > 1;
    Vec<T> c[kBlockColumns];
    for (int block = 0; block + 1 < p.low_rank_blocks; ++block, table += B * kBlockColumns) {
      project_columns<T, kBlockColumns>(t.x, table, B, c);
      for (int k = 0; k < kBlockColumns; ++k) c[k] *= T(2);
      for (int64_t i = 0; i < B; ++i) {
        const Vec<T> before = block ? load(g + i * N) : Vec<T>{};
        store(g + i * N, expand<T, kBlockColumns>(before, c, table + i * kBlockColumns));
      }
    }
    project_columns<T, K>(t.x, table, B, c);
    const Vec<T> shared = c[p.low_rank_tail];
    for (int k = 0; k < K; ++k) c[k] *= T(2);
    c[p.low_rank_tail] = Vec<T>{};
    // g is a quarter of dS/dx, and S = 1/2 sum x dS/dx.
    const double value = finish_tile<T>(p, t, 4.0 * t.unit, [&](int64_t i) __attribute__((always_inline)) {
      ahead.row();
      const Vec<T> own = load(t.x + i * N) * splat(diagonal[i]) - shared;
      return expand<T, K>(several ? own + load(g + i * N) : own, c, table + i * kBlockColumns);
    });
    return 0.5 * value;
  });
}

}  // namespace kegfast::KEGFAST_ISA
