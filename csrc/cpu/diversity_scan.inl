// The prefix pass over a sorted tile: g_i = v_i^T J (P_i - T/2), scattered back to the rows.
//
// Sums of 16 features come out of a vector by a tree, through memory that is read four positions later: a
// load at once would wait for the wide store. It walks from both ends to the middle, which keeps prefix sums
// short. Loads, stores and vector operations bound it alike. Log: docs/kernels/log.md.
#pragma once

#include "cpu/diversity_sort.inl"

namespace kegfast::KEGFAST_ISA {

#if defined(__AVX512F__)

// [sum of q[0], ..., sum of q[15]]: a tree that halves the number of vectors at each level.
inline __m512 fold_halves(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
}
inline __m512 fold_quarters(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
inline __m512 fold_pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
inline __m512 fold_singles(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

#endif

// Puts sums[f] into g[f] at[f] bytes further on. Copied as whole numbers, past the units that add.
template <int G>
inline void scatter(const float* sums, const uint32_t* at, float* g) {
#pragma GCC unroll 16
  for (int f = 0; f < G; ++f) {
    uint32_t bits;
    std::memcpy(&bits, sums + f, 4);
    std::memcpy(reinterpret_cast<char*>(g + f) + at[f], &bits, 4);
  }
}

constexpr int64_t kBehind = 4;  // positions between a sum and its scattering

// Walks `count` positions from `from` in steps of `step` and writes g (row, lane) for all lanes. Offsets are
// row * L * 4 bytes: they address a row of g directly and, times a constant, a row of `bilinear`.
template <int chunks>
inline void scan(const DiversityParams& p, const uint32_t* offsets, float* g, int64_t from, int64_t step,
                 int64_t count, Ahead& ahead) {
  constexpr int C = chunks * 16 / L;
  constexpr int64_t kRow = C;  // a row of `bilinear` takes kRow times the bytes of a row of g
  const char* rows = reinterpret_cast<const char*>(p.bilinear);
  const float direction = step > 0 ? 1.0f : -1.0f;
  Vec<float> start[C], sign[C];
  for (int c = 0; c < C; ++c) {
    start[c] = load_unaligned(p.half_total + c * L) * -direction;
    start[c] *= load_unaligned(p.signature + c * L);
    sign[c] = load_unaligned(p.signature + c * L) * direction;
  }
#if defined(__AVX512F__)
  constexpr int G = chunks == 1 ? 16 : 8;
#else
  constexpr int G = 4;
#endif
  for (int group = 0; group < L; group += G) {
    Vec<float> state[G][C];
    for (int f = 0; f < G; ++f)
      for (int c = 0; c < C; ++c) state[f][c] = start[c];
    const uint32_t* at = offsets + from * L + group;
    const uint32_t* behind = at;
    alignas(64) float ring[kBehind * 16];
    for (int64_t i = 0; i < count + kBehind; ++i, at += step * L) {
      float* sums = ring + (i & (kBehind - 1)) * 16;
      if (i >= kBehind) {
        asm volatile("" : : : "memory");  // or they are kept in registers
        scatter<G>(sums, behind, g + group);
        behind += step * L;
      }
      if (i >= count) continue;
      if (group == 0) ahead.row();
      const auto dot = [&](int f) __attribute__((always_inline)) {
        const float* v = reinterpret_cast<const float*>(rows + int64_t{at[f]} * kRow);
        Vec<float> q{};
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
          const Vec<float> part = load(v + c * L);
          q = c ? q + state[f][c] * part : state[f][c] * part;
          state[f][c] += part * sign[c];
        }
        return q;
      };
#if defined(__AVX512F__)
      const auto halves = [&](int f) __attribute__((always_inline)) {
        return fold_halves((__m512)dot(f), (__m512)dot(f + (G == 16 ? 4 : 2)));
      };
      if constexpr (G == 16) {
        const auto quarters = [&](int f) __attribute__((always_inline)) {
          return fold_quarters(halves(f), halves(f + 8));
        };
        const __m512 even = fold_pairs(quarters(0), quarters(1)), odd = fold_pairs(quarters(2), quarters(3));
        _mm512_store_ps(sums, fold_singles(even, odd));
      } else {
        const auto quarters = [&](int f) __attribute__((always_inline)) {
          return fold_quarters(halves(f), halves(f + 4));
        };
        const __m512 even = fold_pairs(quarters(0), quarters(1));
        const __m512 folded = fold_singles(even, even);  // blocks of (f, f + 1, f, f + 1)
        alignas(64) float spread[16];
        _mm512_store_ps(spread, folded);
        for (int b = 0; b < 4; ++b) sums[2 * b] = spread[4 * b], sums[2 * b + 1] = spread[4 * b + 1];
      }
#else
      for (int f = 0; f < G; ++f) {
        const Vec<float> q = dot(f);
#if defined(__AVX2__)
        const __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)q), _mm256_extractf128_ps((__m256)q, 1));
        const __m128 pair = _mm_add_ps(s, _mm_movehl_ps(s, s));
        sums[f] = _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
#else
        sums[f] = (q[0] + q[2]) + (q[1] + q[3]);
#endif
      }
#endif
    }
  }
}

// The pass above took equal values for rising ones: undo that within each run of ties.
template <int chunks>
inline void correct_ties(const DiversityParams& p, const uint32_t* offsets, float* g, const Run* ties,
                         int64_t runs) {
  constexpr int C = chunks * 16 / L;
  const char* rows = reinterpret_cast<const char*>(p.bilinear);
  Vec<float> sign[C];
  for (int c = 0; c < C; ++c) sign[c] = load_unaligned(p.signature + c * L);
  for (const Run* run = ties; run != ties + runs; ++run) {
    const uint32_t* at = offsets + run->lane;
    const auto row = [&](int64_t i) { return reinterpret_cast<const float*>(rows + int64_t{at[i * L]} * C); };
    Vec<float> state[C] = {};
    for (int64_t i = run->begin; i < run->end; ++i)
      for (int c = 0; c < C; ++c) state[c] -= load(row(i) + c * L) * sign[c];
    for (int c = 0; c < C; ++c) state[c] *= 0.5f;
    for (int64_t i = run->begin; i < run->end; ++i) {
      Vec<float> q{};
      for (int c = 0; c < C; ++c) {
        const Vec<float> v = load(row(i) + c * L);
        state[c] += v * sign[c] * 0.5f;
        q += state[c] * v;
        state[c] += v * sign[c] * 0.5f;
      }
      float sum = 0;
      for (int l = 0; l < L; ++l) sum += q[l];
      *reinterpret_cast<float*>(reinterpret_cast<char*>(g + run->lane) + at[i * L]) -= sum;
    }
  }
}

template <int chunks>
inline void l1_sort_tiles(const DiversityParams& p, int64_t first, int64_t last, void* workspace,
                          double* values) {
  const int64_t B = p.batch, n = padded_batch(B);
  float* x = static_cast<float*>(workspace);
  float* g = x + block_tiles(B) * B * L;
  uint32_t* keys = reinterpret_cast<uint32_t*>(g + B * L);
  Run* ties = reinterpret_cast<Run*>(keys + n * L);
  const uint32_t row_mask = (uint32_t{1} << bits_for(B)) - 1;
  each_tile<float>(p, first, last, x, values, [&](const Tile<float>& t, Ahead ahead) {
    const uint32_t constant = constant_lanes(t);
    sort_keys(t, B, keys);
    const int64_t runs = settle(t, B, keys, constant, ties);
    for (int64_t i = 0; i < B; ++i)
      store(keys + i * L, (load(keys + i * L) & row_mask) * static_cast<uint32_t>(4 * L));
    const int64_t half = B / 2;
    scan<chunks>(p, keys, g, 0, 1, half, ahead);
    scan<chunks>(p, keys, g, B - 1, -1, B - half, ahead);
    correct_ties<chunks>(p, keys, g, ties, runs);
    const Keys varies = varying_lanes(constant);
    // g is half of G, hence dS/dx = 4 g and S = 4 sum x g.
    return finish_tile<float>(p, t, 4.0, [&](int64_t i) __attribute__((always_inline)) {
      return (Vec<float>)((Keys)load(g + i * L) & varies);
    });
  });
}

}  // namespace kegfast::KEGFAST_ISA
