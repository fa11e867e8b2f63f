// soft_target: POD parameters and kernel signature, free of torch.
//
//   loss = T^2 / B sum_b KL(p_b || q_b),  p = softmax(teacher / T), q = softmax(student / T),  d loss / d
//   student = T / B (q - p).
//
// With x = (teacher - max) / T, y = (student - max) / T, P = sum e^x and Q = sum e^y, KL = sum e^x (x - y) /
// P - log P + log Q. A row is read twice, for the maxima and for the three sums, the second time from cache;
// its exponentials wait in the gradient and in one row of scratch for their sums.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace kegfast {

struct SoftTargetParams {
  const float* student;  // [B, C], rows `student_stride` apart
  const float* teacher;  // [B, C], rows `teacher_stride` apart
  float* gradient;       // [B, C] contiguous, or null
  double* divergence;    // [B] KL of each row
  int64_t classes, student_stride, teacher_stride;
  float temperature;
  float gradient_scale;  // T / B
};

// Rows first..last. scratch: room for one row, used where there is a gradient.
#define KEGFAST_DECLARE_SOFT_TARGET(isa)                                                         \
  namespace isa {                                                                                \
  void soft_target_rows(const SoftTargetParams& p, int64_t first, int64_t last, float* scratch); \
  }
KEGFAST_EACH_ISA(KEGFAST_DECLARE_SOFT_TARGET)
#undef KEGFAST_DECLARE_SOFT_TARGET

}  // namespace kegfast
