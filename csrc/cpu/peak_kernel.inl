// What the vector units can do at best: the yardstick of the benchmarks.
#include "cpu/peak.h"
#include "cpu/vec.h"

namespace kegfast::KEGFAST_ISA {

int64_t issue_vectors(int64_t rounds) {
  Vec<int32_t> v[12];
  for (auto& x : v) x = Vec<int32_t>{} + 1;
  for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 12
    for (auto& x : v) {
      x += x;
#if defined(__x86_64__)
      asm volatile("" : "+x"(x));  // keeps every addition
#else
      asm volatile("" : "+w"(x));
#endif
    }
  return 12 * rounds;
}

int64_t issue_multiply_adds(int64_t rounds) {
  Vec<float> v[12];
#pragma GCC unroll 12
  for (auto& x : v) x = Vec<float>{} + 1;
  const Vec<float> half = Vec<float>{} + 0.5f;
  for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 12
    for (auto& x : v) {
      x = x * half + half;
#if defined(__x86_64__)
      asm volatile("" : "+v"(x));
#else
      asm volatile("" : "+w"(x));
#endif
    }
  return 12 * rounds * lanes<float>;
}

}  // namespace kegfast::KEGFAST_ISA
