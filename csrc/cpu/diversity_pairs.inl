// Any weights: pairs of rows i < j over tiles of features.
//
// Three vector instructions a pair, comparison and two masked integer sums. Whole numbers make the sums
// exact, let ties be handled apart and issue faster than float sums. Weights are stored by groups of 16 rows.
// Comparisons, two a cycle, and sums, four, bound it. Log: docs/kernels/log.md.
#pragma once

#include "cpu/diversity_sort.inl"

namespace kegfast::KEGFAST_ISA {

constexpr int kBlock = 8;  // rows whose values and sums stay in registers

inline double fill_weights(const float* z, int64_t batch, int64_t width, bool root, float* weights) {
  const int64_t rows = (batch + 15) / 16 * 16;
  float most = 0;
  for (int64_t group = 0; group < batch; group += 16)
    for (int part = 0; part < 16; part += L) {
      const float* zi = z + group + part;
      Vec<float> total{};
      for (int64_t j = 0; j < batch; ++j) {
        Vec<float> square{};
        for (int64_t k = 0; k < width; ++k) {
          const Vec<float> d = load_unaligned(zi + k * rows) - splat(z[k * rows + j]);
          square += d * d;
        }
        const Vec<float> w = root ? vsqrt(square) : square * (1.0f / static_cast<float>(width));
        store(weights + weight_index(group, j, batch) + part, w);
        total += w;
      }
      const float sum = largest<float>(total);
      most = sum > most ? sum : most;
    }
  return most;
}

// Sums of fixed point wrap around: their results fit, what they pass through need not.
inline Vec<int32_t> wrapping_add(Vec<int32_t> a, Vec<int32_t> b) {
  return (Vec<int32_t>)((Keys)a + (Keys)b);
}
inline Vec<int32_t> wrapping_subtract(Vec<int32_t> a, Vec<int32_t> b) {
  return (Vec<int32_t>)((Keys)a - (Keys)b);
}

inline void fix_weights(float* weights, int64_t batch, double unit, int32_t* offsets) {
  const Vec<float> inverse = splat(static_cast<float>(0.5 / unit));
  for (int64_t group = 0; group < batch; group += 16)
    for (int part = 0; part < 16; part += L) {
      Vec<int32_t> balance{}, row;
      for (int l = 0; l < L; ++l) row[l] = static_cast<int32_t>(group + part + l);
      for (int64_t j = 0; j < batch; ++j) {
        float* at = weights + weight_index(group, j, batch) + part;
        const Vec<int32_t> half = __builtin_convertvector(load(at) * inverse + 0.5f, Vec<int32_t>);
        const Vec<int32_t> w = half + half;
        store(reinterpret_cast<int32_t*>(at), w);
        balance = wrapping_add(balance, row < static_cast<int32_t>(j) ? w : -w);  // w_ii is 0
      }
      for (int l = 0; l < L && group + part + l < batch; ++l) offsets[group + part + l] = balance[l];
    }
}

// sum where above else 0, added to and subtracted from the two rows' sums.
inline __attribute__((always_inline)) void add_sign(Vec<float> xi, Vec<float> xj, Vec<int32_t> w,
                                                    Vec<int32_t>& gi, Vec<int32_t>& gj) {
#if defined(__AVX512F__)
  const __mmask16 above = _mm512_cmp_ps_mask((__m512)xi, (__m512)xj, _CMP_GT_OQ);
  gi = (Vec<int32_t>)_mm512_mask_add_epi32((__m512i)gi, above, (__m512i)gi, (__m512i)w);
  gj = (Vec<int32_t>)_mm512_mask_sub_epi32((__m512i)gj, above, (__m512i)gj, (__m512i)w);
#else
  const Vec<int32_t> part = (xi > xj) & w;
  gi = wrapping_add(gi, part);
  gj = wrapping_subtract(gj, part);
#endif
}

// sums_i += sum_j w_ij [x_i > x_j] over pairs i < j, sums_j -= the same; with `both`, also the pairs where
// x_i < x_j, mirrored, so that ties count for nothing.
template <bool both>
inline void sign_pairs(const float* x, const int32_t* weights, int64_t batch, int32_t* sums) {
  for (int64_t i = 0; i < batch * L; i += L) store(sums + i, Vec<int32_t>{});
  int64_t i = 0;
  for (; i + kBlock <= batch; i += kBlock) {
    Vec<float> xi[kBlock];
    Vec<int32_t> gi[kBlock];
#pragma GCC unroll 8
    for (int b = 0; b < kBlock; ++b) xi[b] = load(x + (i + b) * L), gi[b] = load(sums + (i + b) * L);
#pragma GCC unroll 8
    for (int b = 0; b < kBlock; ++b)
#pragma GCC unroll 8
      for (int c = b + 1; c < kBlock; ++c) {
        const Vec<int32_t> w = splat(weights[weight_index(i + b, i + c, batch)]);
        add_sign(xi[b], xi[c], w, gi[b], gi[c]);
        if (both) add_sign(xi[c], xi[b], w, gi[c], gi[b]);
      }
    for (int64_t j = i + kBlock; j < batch; ++j) {
      const Vec<float> xj = load(x + j * L);
      const int32_t* w = weights + weight_index(i, j, batch);
      Vec<int32_t> gj = load(sums + j * L);
#pragma GCC unroll 8
      for (int b = 0; b < kBlock; ++b) {
        add_sign(xi[b], xj, splat(w[b]), gi[b], gj);
        if (both) add_sign(xj, xi[b], splat(w[b]), gj, gi[b]);
      }
      store(sums + j * L, gj);
    }
#pragma GCC unroll 8
    for (int b = 0; b < kBlock; ++b) store(sums + (i + b) * L, gi[b]);
  }
  for (; i < batch; ++i)
    for (int64_t j = i + 1; j < batch; ++j) {
      const Vec<float> xi = load(x + i * L), xj = load(x + j * L);
      const Vec<int32_t> w = splat(weights[weight_index(i, j, batch)]);
      Vec<int32_t> gi = load(sums + i * L), gj = load(sums + j * L);
      add_sign(xi, xj, w, gi, gj);
      if (both) add_sign(xj, xi, w, gj, gi);
      store(sums + i * L, gi);
      store(sums + j * L, gj);
    }
}

// Half of what sign_pairs<false> misses in tied pairs: with it, twice the sums less `offsets` is 0 for them.
inline void correct_pairs(const int32_t* weights, int64_t batch, const uint32_t* keys, const Run* ties,
                          int64_t runs, int32_t* sums) {
  const uint32_t row_mask = (uint32_t{1} << bits_for(batch)) - 1;
  for (const Run* run = ties; run != ties + runs; ++run)
    for (int64_t a = run->begin; a < run->end; ++a)
      for (int64_t b = a + 1; b < run->end; ++b) {
        const int64_t first = keys[a * L + run->lane] & row_mask, second = keys[b * L + run->lane] & row_mask;
        const int64_t i = first < second ? first : second, j = first < second ? second : first;
        const int32_t half = weights[weight_index(i, j, batch)] / 2;
        const auto at_i = sums + i * L + run->lane, at_j = sums + j * L + run->lane;
        *at_i = static_cast<int32_t>(static_cast<uint32_t>(*at_i) + static_cast<uint32_t>(half));
        *at_j = static_cast<int32_t>(static_cast<uint32_t>(*at_j) - static_cast<uint32_t>(half));
      }
}

inline int64_t tied_pairs(const Run* ties, int64_t runs) {
  int64_t pairs = 0;
  for (const Run* run = ties; run != ties + runs; ++run) {
    const int64_t length = run->end - run->begin;
    pairs += length * (length - 1) / 2;
  }
  return pairs;
}

inline void l1_pair_tiles(const DiversityParams& p, int64_t first, int64_t last, void* workspace,
                          double* values) {
  const int64_t B = p.batch;
  const int32_t* weights = static_cast<const int32_t*>(p.weights);
  float* x = static_cast<float*>(workspace);
  int32_t* sums = reinterpret_cast<int32_t*>(x + block_tiles(B) * B * L);
  uint32_t* keys = reinterpret_cast<uint32_t*>(sums + B * L);
  Run* ties = reinterpret_cast<Run*>(keys + padded_batch(B) * L);
  each_tile<float>(p, first, last, x, values, [&](const Tile<float>& t, Ahead) {
    const uint32_t constant = constant_lanes(t);
    int64_t runs = 0;
    bool both = B <= 24;  // asking for ties costs more than counting both signs
    if (!both) {
      sort_keys(t, B, keys);
      runs = settle(t, B, keys, constant, ties);
      both = tied_pairs(ties, runs) > B * B / 16;
    }
    if (both) {
      sign_pairs<true>(t.x, weights, B, sums);
    } else {
      sign_pairs<false>(t.x, weights, B, sums);
      correct_pairs(weights, B, keys, ties, runs, sums);
    }
    const Keys varies = varying_lanes(constant);
    // Without ties, sum_j w sign(x_i - x_j) = 2 sum_j w [x_i > x_j] - sum_j w for i < j, and its mirror image
    // for i > j. The sums are taken modulo 2^32; the result fits.
    return finish_tile<float>(p, t, 2.0 * p.weight_unit, [&](int64_t i) __attribute__((always_inline)) {
      Vec<int32_t> sum = load(sums + i * L);
      if (!both) sum = wrapping_subtract(wrapping_add(sum, sum), splat(p.offsets[i])) & (Vec<int32_t>)varies;
      return __builtin_convertvector(sum, Vec<float>);
    });
  });
}

template <class T>
inline void l1_pair_tiles_plain(const DiversityParams& p, int64_t first, int64_t last, void* workspace,
                                double* values) {
  const int64_t B = p.batch;
  const T* weights = static_cast<const T*>(p.weights);
  T* x = static_cast<T*>(workspace);
  T* g = x + block_tiles(B) * B * lanes<T>;
  each_tile<T>(p, first, last, x, values, [&](const Tile<T>& t, Ahead) {
    for (int64_t i = 0; i < B; ++i) {
      const Vec<T> xi = load(t.x + i * lanes<T>);
      Vec<T> sum{};
      for (int64_t j = 0; j < B; ++j) {
        const Vec<T> xj = load(t.x + j * lanes<T>), w = splat(weights[weight_index(i, j, B)]);
        sum += xi > xj ? w : xi < xj ? -w : w * 0;
      }
      store(g + i * lanes<T>, sum);
    }
    return finish_tile<T>(p, t, 2.0, [&](int64_t i) { return load(g + i * lanes<T>); });
  });
}

// g_i = sum_j c_ij (x_i - x_j).
template <class T>
inline void difference_pairs(const T* x, const T* weights, int64_t batch, T* g) {
  constexpr int N = lanes<T>;
  for (int64_t i = 0; i < batch; ++i) store(g + i * N, Vec<T>{});
  int64_t i = 0;
  for (; i + kBlock <= batch; i += kBlock) {
    Vec<T> xi[kBlock], gi[kBlock];
#pragma GCC unroll 8
    for (int b = 0; b < kBlock; ++b) xi[b] = load(x + (i + b) * N), gi[b] = load(g + (i + b) * N);
#pragma GCC unroll 8
    for (int b = 0; b < kBlock; ++b)
#pragma GCC unroll 8
      for (int c = b + 1; c < kBlock; ++c) {
        const Vec<T> w = splat(weights[weight_index(i + b, i + c, batch)]), d = xi[b] - xi[c];
        gi[b] += w * d;
        gi[c] -= w * d;
      }
    for (int64_t j = i + kBlock; j < batch; ++j) {
      const Vec<T> xj = load(x + j * N);
      const T* w = weights + weight_index(i, j, batch);
      Vec<T> gj = load(g + j * N);
#pragma GCC unroll 8
      for (int b = 0; b < kBlock; ++b) {
        const Vec<T> d = xi[b] - xj;
        gi[b] += splat(w[b]) * d;
        gj -= splat(w[b]) * d;
      }
      store(g + j * N, gj);
    }
#pragma GCC unroll 8
    for (int b = 0; b < kBlock; ++b) store(g + (i + b) * N, gi[b]);
  }
  for (; i < batch; ++i)
    for (int64_t j = i + 1; j < batch; ++j) {
      const Vec<T> d = load(x + i * N) - load(x + j * N), w = splat(weights[weight_index(i, j, batch)]);
      store(g + i * N, load(g + i * N) + w * d);
      store(g + j * N, load(g + j * N) - w * d);
    }
}

template <class T>
inline void square_pair_tiles(const DiversityParams& p, int64_t first, int64_t last, void* workspace,
                              double* values) {
  constexpr int N = lanes<T>;
  T* x = static_cast<T*>(workspace);
  T* g = x + block_tiles(p.batch) * p.batch * N;
  each_tile<T>(p, first, last, x, values, [&](const Tile<T>& t, Ahead) {
    difference_pairs(t.x, static_cast<const T*>(p.weights), p.batch, g);
    return finish_tile<T>(p, t, 2.0 * p.weight_unit * t.unit,
                          [&](int64_t i) __attribute__((always_inline)) { return load(g + i * N); });
  });
}

}  // namespace kegfast::KEGFAST_ISA
