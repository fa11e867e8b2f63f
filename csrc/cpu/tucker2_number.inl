// What tucker2's GEMMs multiply, one choice for the whole object: floats, or (KEGFAST_PAIRS) bfloat16. Two
// bfloat16 side by side along k make one 32-bit word, and words are blocked, packed, broadcast and transposed
// as floats are; sums are float32 either way.
#pragma once

#include "cpu/tucker2_convert.inl"
#include "cpu/tucker2_vec.inl"

namespace kegfast::KEGFAST_ISA {
namespace {

#if defined(KEGFAST_PAIRS)
using Number = uint16_t;  // x, the factors, both intermediates and y
constexpr int kPair = 2;
#else
using Number = float;
constexpr int kPair = 1;
#endif
constexpr int64_t kNumberBytes = sizeof(Number);

constexpr int64_t words(int64_t numbers) {
  return (numbers + kPair - 1) / kPair;
}

KEGFAST_INLINE Floats splat_word(const float* p) {
  int32_t word;  // no float holds every pair
  memcpy(&word, p, sizeof word);
  return (Floats)splat<int32_t>(word);
}

KEGFAST_INLINE Floats multiply_add(Floats x, Floats w, Floats sum) {
#if !defined(KEGFAST_PAIRS)
  return sum + x * w;
#elif defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#else
  const Ints high = Ints{} + static_cast<int32_t>(0xffff0000u);
  const Floats odd = (Floats)((Ints)x & high) * (Floats)((Ints)w & high);
  return sum + odd + (Floats)((Ints)x << 16) * (Floats)((Ints)w << 16);
#endif
}

// The first n lanes, rounded to Number.
KEGFAST_INLINE void store_numbers(float* p, Floats v, int n) {
  store_first(p, v, n);
}
KEGFAST_INLINE void store_numbers(uint16_t* p, Floats v, int n) {
#if defined(__AVX512BF16__)
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh((__m512)v);
  if (n == 16) return _mm256_storeu_si256((__m256i*)p, bits);
  if (n == 8) return _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(bits));
  if (n == 4) return _mm_storel_epi64((__m128i*)p, _mm256_castsi256_si128(bits));
  if (n == 2) return _mm_storeu_si32(p, _mm256_castsi256_si128(bits));
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), bits);
#else
  for (int i = 0; i < n; ++i) p[i] = to_bfloat16(v[i]);
#endif
}

// The first n lanes, as floats; the others load as zero.
KEGFAST_INLINE Floats load_numbers(const float* p, int n) {
  return load_first(p, n);
}
KEGFAST_INLINE Floats load_numbers(const uint16_t* p, int n) {
#if defined(__AVX512BF16__)
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16);
#else
  Floats v{};
  for (int i = 0; i < n; ++i) v[i] = bf16_to_float(p[i]);
  return v;
#endif
}

// Whole vectors past the caches; p must be aligned to them.
KEGFAST_INLINE void stream_numbers(float* p, Floats v) {
  store_stream(p, v);
}
KEGFAST_INLINE void stream_numbers(uint16_t* p, Floats v) {
#if defined(__AVX512BF16__)
  _mm256_stream_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  store_numbers(p, v, kLanes);
#endif
}

// Two rows of n bfloat16 side by side: word i holds low[i] and high[i]; high may be null for zeros.
[[maybe_unused]] void interleave(const uint16_t* low, const uint16_t* high, int64_t n, float* to) {
  uint16_t* out = reinterpret_cast<uint16_t*>(to);
  int64_t i = 0;
#if defined(__AVX512BW__)
  for (; i + 16 <= n; i += 16, out += 32) {
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(low + i)));
    const __m512i b =
        high ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(high + i))) : _mm512_setzero_si512();
    _mm512_storeu_si512(out, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }
  if (i < n) {
    const __mmask16 mask = static_cast<__mmask16>((1u << (n - i)) - 1);
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, low + i));
    const __m512i b =
        high ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, high + i)) : _mm512_setzero_si512();
    _mm512_mask_storeu_epi32(out, mask, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }
#else
  constexpr uint16_t zero = 0;
  for (; i < n; ++i, out += 2) memcpy(out, low + i, 2), memcpy(out + 1, high ? high + i : &zero, 2);
#endif
}

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
