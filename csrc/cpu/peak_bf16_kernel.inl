// What the units that multiply bfloat16 can do at best.
#define KEGFAST_PAIRS 1
#include "cpu/peak.h"
#if defined(__AMX_BF16__)
#include "cpu/tucker2_amx.inl"
#else
#include "cpu/tucker2_number.inl"
#endif

namespace kegfast::KEGFAST_ISA {

int64_t issue_pair_multiply_adds(int64_t rounds) {
#if defined(__AMX_BF16__)
  const AmxSession registers;
  amx_zero();
  for (int64_t i = 0; i < rounds; ++i)
    amx_multiply<0, 0>(), amx_multiply<0, 1>(), amx_multiply<1, 0>(), amx_multiply<1, 1>();
  return 4 * rounds * kSide * kSide * kSide * kPair;
#else
  Floats v[12];
#pragma GCC unroll 12
  for (auto& x : v) x = Floats{};
  const Floats ones = Floats{} + 1.0f;
  for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 12
    for (auto& x : v) {
      x = multiply_add(ones, ones, x);
      asm volatile("" : "+v"(x));
    }
  return 12 * rounds * kLanes * kPair;
#endif
}

}  // namespace kegfast::KEGFAST_ISA
