// soft_target's kernels on the emulator, callable through ctypes.
#include <string>
#include <vector>

#include "fibers.h"
#include "harness.h"
#include "soft_target.cuh"

namespace {

using namespace kegfast;

std::string error;

template <class T>
void run(const SoftTargetCall& c) {
  const auto order = emulator::Order(c.order);
  const auto launch = [order](auto kernel, const auto& params, int x, int y, size_t shared_bytes) {
    emulator::launch<decltype(kernel)>({x, y, 1}, shared_bytes, order, params);
  };
  std::vector<double> divergence(c.batch, double(NAN));
  cuda::soft_target(
      cuda::SoftTargetProblem<T>{static_cast<const T*>(c.student), static_cast<const T*>(c.teacher),
                                 static_cast<T*>(c.loss), static_cast<T*>(c.gradient), divergence.data(),
                                 c.student_stride, c.teacher_stride, c.batch, c.classes, c.temperature},
      launch);
}

}  // namespace

extern "C" const char* soft_target_error() {
  return error.c_str();
}

extern "C" int emulate_soft_target(const SoftTargetCall* call) {
  try {
    if (call->dtype == 0) run<float>(*call);
    if (call->dtype == 1) run<simt::bf16>(*call);
    if (call->dtype == 2) run<simt::fp16>(*call);
  } catch (const std::exception& caught) {
    error = caught.what();
    return 1;
  }
  return 0;
}
