// soft_target on the CPU: checks, allocation, threads over rows.
#include "soft_target.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "check.h"

namespace kegfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kEntriesPerThread =
    1 << 15;  // some 20 microseconds, several times what waking a thread costs

Tensor with_dense_rows(const Tensor& x) {
  return x.stride(1) == 1 || x.size(1) == 1 ? x : torch::stable::contiguous(x);
}

void check(const Tensor& x, const char* name) {
  KEGFAST_CHECK(x.dim() == 2, name, "2-dimensional", x.dim());
  KEGFAST_CHECK(x.scalar_type() == ScalarType::Float, name, "float32", static_cast<int>(x.scalar_type()));
  KEGFAST_CHECK(x.numel() > 0, name, "not empty", x.numel());
}

std::tuple<Tensor, Tensor> soft_target_forward(const Tensor& given_student,  // [B, C]
                                               const Tensor& given_teacher,  // [B, C]
                                               double temperature, bool want_gradient) {
  check(given_student, "student");
  check(given_teacher, "teacher");
  KEGFAST_CHECK(given_teacher.size(0) == given_student.size(0), "teacher", "of the student's batch",
                given_teacher.size(0));
  KEGFAST_CHECK(given_teacher.size(1) == given_student.size(1), "teacher", "of the student's classes",
                given_teacher.size(1));
  KEGFAST_CHECK(temperature > 0, "temperature", "above 0", temperature);
  const Tensor student = with_dense_rows(given_student), teacher = with_dense_rows(given_teacher);
  const int64_t B = student.size(0), C = student.size(1);
  const int64_t none[] = {0}, shape[] = {B, C};
  Tensor gradient =
      want_gradient ? torch::stable::new_empty(student, shape) : torch::stable::new_empty(student, none);
  Tensor loss = torch::stable::new_empty(student, torch::headeronly::IntHeaderOnlyArrayRef(none, size_t{0}));

  std::vector<double> divergence(B);
  SoftTargetParams p{};
  p.student = static_cast<const float*>(student.const_data_ptr());
  p.teacher = static_cast<const float*>(teacher.const_data_ptr());
  p.gradient = want_gradient ? static_cast<float*>(gradient.mutable_data_ptr()) : nullptr;
  p.divergence = divergence.data();
  p.classes = C;
  p.student_stride = student.stride(0);
  p.teacher_stride = teacher.stride(0);
  p.temperature = static_cast<float>(temperature);
  p.gradient_scale = static_cast<float>(temperature / static_cast<double>(B));

  const auto rows = KEGFAST_SELECT(soft_target_rows);
  torch::stable::parallel_for(0, B, (kEntriesPerThread + C - 1) / C, [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> scratch;  // a call a training step: the pages stay mapped
    if (want_gradient && static_cast<int64_t>(scratch.size()) < C) scratch.resize(C);
    rows(p, first, last, scratch.data());
  });

  double sum = 0;
  for (double value : divergence) sum += value;
  *static_cast<float*>(loss.mutable_data_ptr()) =
      static_cast<float>(temperature * temperature * sum / static_cast<double>(B));
  return {loss, gradient};
}

}  // namespace
}  // namespace kegfast

STABLE_TORCH_LIBRARY_IMPL(kegfast, CPU, m) {
  m.impl("soft_target_forward", TORCH_BOX(&kegfast::soft_target_forward));
}
