// What tucker2's kernels need of a register of floats beyond cpu/vec.h: parts of a vector, streaming stores,
// transposes.
#pragma once

#include "cpu/vec.h"

namespace kegfast::KEGFAST_ISA {

constexpr int kLanes = lanes<float>;
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

KEGFAST_INLINE Floats relu(Floats v) {
  return v < Floats{} ? Floats{} : v;
}  // NaN stays NaN

// The first n lanes (1 <= n <= kLanes); the others load as zero and are not touched in memory.
KEGFAST_INLINE Floats load_first(const float* p, int n) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#elif defined(__AVX2__)
  if (n == kLanes) return load_unaligned(p);
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return (Floats)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes));
#elif defined(__ARM_NEON)
  if (n == 4) return load_unaligned(p);
  if (n == 1) return Floats{p[0]};
  return n == 2 ? Floats{p[0], p[1]} : Floats{p[0], p[1], p[2]};
#else
  Floats v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

KEGFAST_INLINE void store_first(float* p, Floats v, int n) {
  if (n == kLanes) return store_unaligned(p, v);
#if defined(__AVX512F__)
  // A masked store costs ten plain ones on Zen, and loads cannot be forwarded from it.
  if (n == 8) return _mm256_storeu_ps(p, _mm512_castps512_ps256((__m512)v));
  if (n == 4) return _mm_storeu_ps(p, _mm512_castps512_ps128((__m512)v));
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#elif defined(__AVX2__)
  // A masked store is tens of operations on Zen.
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (n & 4) _mm_storeu_ps(p, part), part = _mm256_extractf128_ps((__m256)v, 1), p += 4;
  if (n & 2) _mm_storel_pi(reinterpret_cast<__m64*>(p), part), part = _mm_movehl_ps(part, part), p += 2;
  if (n & 1) _mm_store_ss(p, part);
#elif defined(__ARM_NEON)
  p[0] = v[0];
  if (n > 1) p[1] = v[1];
  if (n > 2) p[2] = v[2];
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// Past the caches; p must be aligned to the vector.
KEGFAST_INLINE void store_stream(float* p, Floats v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)v);
#else
  store_unaligned(p, v);
#endif
}

// Streamed stores become visible before the call ends.
KEGFAST_INLINE void fence_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// rows[i][j] <-> rows[j][i], in registers: log2(kLanes) rounds that swap blocks of 1, 2, 4, ... lanes.
template <int Block>
KEGFAST_INLINE void transpose_round(Floats (&rows)[kLanes]) {
  KEGFAST_UNROLL
  for (int i = 0; i < kLanes; ++i) {
    if (i & Block) continue;
    const Floats a = rows[i], b = rows[i + Block];
    rows[i] = shuffle(a, b, [](int l) { return l & Block ? kLanes + l - Block : l; });
    rows[i + Block] = shuffle(a, b, [](int l) { return l & Block ? kLanes + l : l + Block; });
  }
}

KEGFAST_INLINE void transpose(Floats (&rows)[kLanes]) {
  transpose_round<1>(rows);
  transpose_round<2>(rows);
  if constexpr (kLanes >= 8) transpose_round<4>(rows);
  if constexpr (kLanes >= 16) transpose_round<8>(rows);
}

}  // namespace kegfast::KEGFAST_ISA
