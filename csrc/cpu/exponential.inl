// Exponentials of whole vectors.
#pragma once

#include "cpu/vec.h"

namespace kegfast::KEGFAST_ISA {
namespace {

// e^x for x <= 0, 2 ulp; what float cannot hold becomes about 1e-38, NaN stays out (the caller sees to it).
inline Vec<float> exp_negative(Vec<float> x) {
  x = vmax(x, splat(-87.0f));
  const Vec<float> shifted =
      x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer nearest x / log 2 lands in the low bits
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n log 2, in two parts
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (Vec<float>)((Vec<int32_t>)p + ((Vec<int32_t>)shifted << 23));  // times 2^n
}

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
