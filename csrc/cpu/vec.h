// Vectors of the instruction set that this object is compiled for, on the vector extensions of GCC and clang,
// and all in which the two differ. Included by .inl files only: everything lives in `namespace
// kegfast::KEGFAST_ISA` (see cmake/Isa.cmake).
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/half.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 says so of its own intrinsics (PR 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define KEGFAST_INLINE inline __attribute__((always_inline))
#define KEGFAST_UNROLL _Pragma("GCC unroll 64")

namespace kegfast::KEGFAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes), may_alias));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), may_alias, aligned(alignof(T))));
};
template <class T>
using Vec = typename VecOf<T>::type;
using Floats = Vec<float>;
using Ints = Vec<int32_t>;
template <class T>
constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
inline Vec<T> load_unaligned(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}
template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}
template <class T>
inline void store_unaligned(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = v;
}
template <class T>
inline Vec<T> splat(T value) {
  return value - Vec<T>{};
}
template <class V>
inline V vmin(V a, V b) {
  return a < b ? a : b;
}
template <class V>
inline V vmax(V a, V b) {
  return a > b ? a : b;
}

template <int... l, class Rule>
KEGFAST_INLINE Floats shuffle(Floats a, Floats b, std::integer_sequence<int, l...>, Rule rule) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, rule(l)...);
#else
  return __builtin_shuffle(a, b, Ints{rule(l)...});
#endif
}
// Lane l is lane rule(l) of a and b, one behind the other; the rule is a lambda that captures nothing.
template <class Rule>
KEGFAST_INLINE Floats shuffle(Floats a, Floats b, Rule rule) {
  return shuffle(a, b, std::make_integer_sequence<int, lanes<float>>{}, rule);
}
template <class Rule>
KEGFAST_INLINE Floats shuffle(Floats v, Rule rule) {
  return shuffle(v, v, rule);
}
// Lane l is lane from[l] of v.
KEGFAST_INLINE Floats permute(Floats v, Ints from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)from, (__m512)v);
#elif defined(__AVX2__)
  return (Floats)_mm256_permutevar8x32_ps((__m256)v, (__m256i)from);
#else
  Floats to;
  for (int l = 0; l < lanes<float>; ++l) to[l] = v[from[l]];
  return to;
#endif
}

inline Vec<float> vabs(Vec<float> v) {
  return (Vec<float>)((Vec<uint32_t>)v & 0x7fffffffu);
}
inline Vec<double> vabs(Vec<double> v) {
  return (Vec<double>)((Vec<uint64_t>)v & 0x7fffffffffffffffu);
}

inline Vec<float> vsqrt(Vec<float> v) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_sqrt_ps((__m256)v);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_sqrt_ps((__m128)v);
#elif defined(__ARM_NEON)
  return (Vec<float>)vsqrtq_f32((float32x4_t)v);
#else
  for (int i = 0; i < lanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// lanes<float> consecutive bfloat16 or IEEE half numbers, widened.
inline Vec<float> load_bf16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#elif defined(__ARM_NEON)
  return (Vec<float>)vshll_n_u16(vld1_u16(p), 16);
#else
  Vec<uint32_t> bits;
  for (int i = 0; i < lanes<float>; ++i) bits[i] = static_cast<uint32_t>(p[i]) << 16;
  return (Vec<float>)bits;
#endif
}
inline Vec<float> load_f16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__ARM_NEON)
  return (Vec<float>)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
  Vec<float> v;
  for (int i = 0; i < lanes<float>; ++i) v[i] = half_to_float(p[i]);
  return v;
#endif
}
// The first n lanes (1 <= n <= lanes<float>), rounded to IEEE half numbers.
inline void store_f16(uint16_t* p, Vec<float> v, int n) {
  uint16_t bits[lanes<float>];
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)bits, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)bits, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON)
  vst1_u16(bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
  for (int i = 0; i < lanes<float>; ++i) bits[i] = float_to_half(v[i]);
#endif
  std::memcpy(p, bits, n * sizeof *bits);
}

}  // namespace kegfast::KEGFAST_ISA
