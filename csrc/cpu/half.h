// Half-precision numbers, one at a time. Internal linkage: objects for different instruction sets each have
// their own copy.
#pragma once

#include <cstdint>
#include <cstring>

namespace kegfast {

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

[[maybe_unused]] static inline float bf16_to_float(uint16_t b) {
  return bits_to_float(static_cast<uint32_t>(b) << 16);
}

// Subnormal numbers as integers: a float made of their bits would be one too, and may be flushed.
[[maybe_unused]] static inline float half_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  const float value = magnitude >= 0x7c00u   ? bits_to_float((magnitude << 13) + 0x70000000u)
                      : magnitude >= 0x0400u ? bits_to_float((magnitude << 13) + 0x38000000u)
                                             : static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  return h & 0x8000u ? -value : value;
}

// To nearest, ties to even, in whole numbers: no mode of the processor flushes what is small.
[[maybe_unused]] static inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u)
    return static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x1ffu));  // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);   // 65520 and more
  const int exponent = static_cast<int>(magnitude >> 23);
  if (exponent < 102) return static_cast<uint16_t>(sign);  // below half of the least
  // Below 2^-14 the numbers are whole multiples of 2^-24, above the exponent counts from another origin.
  const bool subnormal = exponent < 113;
  const int dropped = subnormal ? 126 - exponent : 13;
  const uint32_t whole = subnormal ? (magnitude & 0x7fffffu) | 0x800000u : magnitude - (112u << 23);
  const uint32_t kept = whole >> dropped, rest = whole << (32 - dropped);
  return static_cast<uint16_t>(sign | (kept + (rest > 0x80000000u || (rest == 0x80000000u && (kept & 1)))));
}

}  // namespace kegfast
