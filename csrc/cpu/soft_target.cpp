// soft_target on the CPU: checks, allocation, threads over rows.
#include "soft_target.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "soft_target_call.h"

namespace kegfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kEntriesPerThread =
    1 << 15;  // some 20 microseconds, several times what waking a thread costs

std::tuple<Tensor, Tensor> soft_target_forward(const Tensor& given_student,  // [B, C]
                                               const Tensor& given_teacher,  // [B, C]
                                               double temperature, bool want_gradient) {
  check_soft_target(given_student, given_teacher, temperature);
  KEGFAST_CHECK(given_student.scalar_type() == ScalarType::Float, "student", "float32",
                static_cast<int>(given_student.scalar_type()));
  const Tensor student = with_dense_rows(given_student), teacher = with_dense_rows(given_teacher);
  const int64_t B = student.size(0), C = student.size(1);
  const auto [loss, gradient] = new_soft_target_result(student, want_gradient);

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
