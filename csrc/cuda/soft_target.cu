// soft_target on CUDA: checks, allocation, two kernels on the current stream.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "launch.h"
#include "soft_target.cuh"
#include "soft_target_call.h"

namespace kegfast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(const Tensor& student, const Tensor& teacher) {
  KEGFAST_CHECK(student.is_cuda(), "student", "on a CUDA device", "another one");
  KEGFAST_CHECK(teacher.is_cuda() && teacher.get_device() == student.get_device(), "teacher",
                "on the student's device", "another one");
  for (int64_t dim : {0, 1})
    KEGFAST_CHECK(student.size(dim) < std::numeric_limits<int32_t>::max() / 2, "student",
                  "below 2^30 in every size", student.size(dim));
}

template <class T>
void run(const Tensor& student, const Tensor& teacher, const Tensor& loss, const Tensor* gradient,
         double temperature, const Launcher& launcher) {
  const Tensor divergence = torch::stable::new_empty(student, {student.size(0)}, ScalarType::Double);
  soft_target(
      SoftTargetProblem<T>{static_cast<const T*>(student.data_ptr()),
                           static_cast<const T*>(teacher.data_ptr()), static_cast<T*>(loss.data_ptr()),
                           gradient ? static_cast<T*>(gradient->data_ptr()) : nullptr,
                           static_cast<double*>(divergence.data_ptr()), student.stride(0), teacher.stride(0),
                           int(student.size(0)), int(student.size(1)), temperature},
      launcher);
}

std::tuple<Tensor, Tensor> soft_target_forward(const Tensor& given_student,  // [B, C]
                                               const Tensor& given_teacher,  // [B, C]
                                               double temperature, bool want_gradient) {
  check_soft_target(given_student, given_teacher, temperature);
  check(given_student, given_teacher);
  const Launcher launcher(given_student);
  const Tensor student = with_dense_rows(given_student), teacher = with_dense_rows(given_teacher);
  const auto [loss, gradient] = new_soft_target_result(student, want_gradient);
  const Tensor* wanted = want_gradient ? &gradient : nullptr;
  switch (student.scalar_type()) {
    case ScalarType::Float:
      run<float>(student, teacher, loss, wanted, temperature, launcher);
      break;
    case ScalarType::BFloat16:
      run<simt::bf16>(student, teacher, loss, wanted, temperature, launcher);
      break;
    case ScalarType::Half:
      run<simt::fp16>(student, teacher, loss, wanted, temperature, launcher);
      break;
    default:
      KEGFAST_CHECK(false, "student", "float32, bfloat16 or float16 on CUDA", "another dtype");
  }
  return {loss, gradient};
}

}  // namespace
}  // namespace kegfast::cuda

STABLE_TORCH_LIBRARY_IMPL(kegfast, CUDA, m) {
  m.impl("soft_target_forward", TORCH_BOX(&kegfast::cuda::soft_target_forward));
}
