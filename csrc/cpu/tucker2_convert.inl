// Rows of bfloat16 and float16 to and from float32.
#pragma once

#include "cpu/tucker2_vec.inl"
#include "tucker2.h"

namespace kegfast::KEGFAST_ISA {
namespace {

KEGFAST_INLINE uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

inline float half_bits_to_float(Tucker2Type type, uint16_t bits) {
  if (type == Tucker2Type::float16) return half_to_float(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

inline void to_float(Tucker2Type type, const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  if (type == Tucker2Type::bfloat16)
    for (; i + kLanes <= n; i += kLanes) store_unaligned(to + i, load_bf16(from + i));
  else
    for (; i + kLanes <= n; i += kLanes) store_unaligned(to + i, load_f16(from + i));
  for (; i < n; ++i) to[i] = half_bits_to_float(type, from[i]);
}

inline void from_float(Tucker2Type type, const float* from, uint16_t* to, int64_t n) {
  if (type == Tucker2Type::bfloat16) {
    for (int64_t i = 0; i < n; ++i) to[i] = to_bfloat16(from[i]);
    return;
  }
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_f16(to + i, load_unaligned(from + i), kLanes);
  if (i < n) store_f16(to + i, load_first(from + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
