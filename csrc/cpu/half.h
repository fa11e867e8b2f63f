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

[[maybe_unused]] static inline float half_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  // The product is exact; it normalises subnormal numbers.
  const float value = magnitude < 0x7c00u ? bits_to_float(magnitude << 13) * 0x1p112f
                                          : bits_to_float((magnitude << 13) + 0x70000000u);
  return h & 0x8000u ? -value : value;
}

}  // namespace kegfast
