#include "soft_target.h"

#include "check.h"

namespace check {
namespace {

void one(int64_t batch, int64_t classes, float temperature) {
  const std::string what = "soft_target " + std::to_string(batch) + " x " + std::to_string(classes);
  Numbers numbers(static_cast<uint64_t>(classes));
  const Stored student(Kind::float32, numbers.take(batch * classes, 3));
  const Stored teacher(Kind::float32, numbers.take(batch * classes, 3));
  const Stored gradient(Kind::float32, batch * classes);
  Memory<float> scratch(classes);
  std::vector<double> divergence(batch);
  kegfast::SoftTargetParams p{};
  p.student = static_cast<const float*>(student.data()),
  p.teacher = static_cast<const float*>(teacher.data());
  p.gradient = static_cast<float*>(gradient.data()), p.divergence = divergence.data();
  p.classes = p.student_stride = p.teacher_stride = classes;
  p.temperature = temperature, p.gradient_scale = temperature / static_cast<float>(batch);
  KEGFAST_SELECT(soft_target_rows)(p, 0, batch, scratch.get());

  std::vector<double> want_divergence(batch), want(batch * classes);
  for (int64_t b = 0; b < batch; ++b) {
    double p_sum = 0, q_sum = 0;
    for (int64_t c = 0; c < classes; ++c) {
      p_sum += std::exp(teacher[b * classes + c] / temperature);
      q_sum += std::exp(student[b * classes + c] / temperature);
    }
    for (int64_t c = 0; c < classes; ++c) {
      const double t = std::exp(teacher[b * classes + c] / temperature) / p_sum;
      const double s = std::exp(student[b * classes + c] / temperature) / q_sum;
      want_divergence[b] += t * std::log(t / s);
      want[b * classes + c] = (s - t) * temperature / static_cast<double>(batch);
    }
  }
  close(divergence, want_divergence, 1e-5, what + ", divergence", 1e-3);
  close(gradient.values(), want, 1e-5, what + ", gradient", 1e-3);
}

}  // namespace

void soft_target() {
  for (const int64_t classes : {1, 2, 3, 4, 5, 10, 17, 64, 100, 1000, 4099}) one(3, classes, 2.5f);
}

}  // namespace check
