// issue_vectors: runs 12 * rounds independent vector additions and returns their number; issue_multiply_adds:
// as many vector multiply-adds, the number of their float32 lanes. issue_pair_multiply_adds: those of
// bfloat16.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace kegfast {

#define KEGFAST_DECLARE_PEAK(isa)              \
  namespace isa {                              \
  int64_t issue_vectors(int64_t rounds);       \
  int64_t issue_multiply_adds(int64_t rounds); \
  }
KEGFAST_EACH_ISA(KEGFAST_DECLARE_PEAK)
#undef KEGFAST_DECLARE_PEAK

#define KEGFAST_DECLARE_PEAK(isa)                   \
  namespace isa {                                   \
  int64_t issue_pair_multiply_adds(int64_t rounds); \
  }
KEGFAST_EACH_BF16_ISA(KEGFAST_DECLARE_PEAK)
#undef KEGFAST_DECLARE_PEAK

}  // namespace kegfast
