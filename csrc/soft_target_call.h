// What soft_target asks of its arguments and answers with, on every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "check.h"

namespace kegfast {

inline torch::stable::Tensor with_dense_rows(const torch::stable::Tensor& x) {
  return x.stride(1) == 1 || x.size(1) == 1 ? x : torch::stable::contiguous(x);
}

inline void check_soft_target(const torch::stable::Tensor& student,  // [B, C]
                              const torch::stable::Tensor& teacher,  // [B, C]
                              double temperature) {
  KEGFAST_CHECK(student.dim() == 2, "student", "2-dimensional", student.dim());
  KEGFAST_CHECK(teacher.dim() == 2, "teacher", "2-dimensional", teacher.dim());
  KEGFAST_CHECK(student.numel() > 0, "student", "not empty", student.numel());
  KEGFAST_CHECK(teacher.size(0) == student.size(0), "teacher", "of the student's batch", teacher.size(0));
  KEGFAST_CHECK(teacher.size(1) == student.size(1), "teacher", "of the student's classes", teacher.size(1));
  KEGFAST_CHECK(teacher.scalar_type() == student.scalar_type(), "teacher", "of the student's dtype",
                static_cast<int>(teacher.scalar_type()));
  KEGFAST_CHECK(temperature > 0, "temperature", "above 0", temperature);
  check_in_memory("student", student), check_in_memory("teacher", teacher);
}

struct SoftTargetResult {
  torch::stable::Tensor loss, gradient;  // [], and [B, C], or [0] where it is not wanted
};

inline SoftTargetResult new_soft_target_result(const torch::stable::Tensor& student, bool want_gradient) {
  const int64_t shape[] = {want_gradient ? student.size(0) : 0, student.size(1)};
  const torch::headeronly::IntHeaderOnlyArrayRef scalar(shape, size_t{0}), all(shape, want_gradient ? 2 : 1);
  return {torch::stable::new_empty(student, scalar), torch::stable::new_empty(student, all)};
}

}  // namespace kegfast
