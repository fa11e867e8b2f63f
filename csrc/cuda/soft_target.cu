// soft_target on CUDA: checks, allocation, two kernels on the current stream.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <tuple>

#include "check.h"
#include "launch.h"
#include "soft_target.cuh"

namespace kegfast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(const Tensor& x, const char* name) {
  KEGFAST_CHECK(x.dim() == 2, name, "2-dimensional", x.dim());
  KEGFAST_CHECK(x.is_cuda(), name, "on a CUDA device", "another one");
  KEGFAST_CHECK(x.numel() > 0, name, "not empty", x.numel());
  for (int64_t dim : {0, 1})
    KEGFAST_CHECK(x.size(dim) < std::numeric_limits<int32_t>::max() / 2, name, "below 2^30 in every size",
                  x.size(dim));
}

Tensor with_dense_rows(const Tensor& x) {
  return x.stride(1) == 1 || x.size(1) == 1 ? x : torch::stable::contiguous(x);
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
  check(given_student, "student");
  check(given_teacher, "teacher");
  KEGFAST_CHECK(given_teacher.size(0) == given_student.size(0), "teacher", "of the student's batch",
                given_teacher.size(0));
  KEGFAST_CHECK(given_teacher.size(1) == given_student.size(1), "teacher", "of the student's classes",
                given_teacher.size(1));
  KEGFAST_CHECK(given_teacher.get_device() == given_student.get_device() &&
                    given_teacher.scalar_type() == given_student.scalar_type(),
                "teacher", "of the student's device and dtype", int(given_teacher.get_device()));
  KEGFAST_CHECK(temperature > 0, "temperature", "above 0", temperature);

  const Launcher launcher(given_student);
  const Tensor student = with_dense_rows(given_student), teacher = with_dense_rows(given_teacher);
  const int64_t none[] = {0}, shape[] = {student.size(0), student.size(1)};
  Tensor gradient =
      want_gradient ? torch::stable::new_empty(student, shape) : torch::stable::new_empty(student, none);
  Tensor loss = torch::stable::new_empty(student, torch::headeronly::IntHeaderOnlyArrayRef(none, size_t{0}));
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
