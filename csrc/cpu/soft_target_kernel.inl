// soft_target, a row at a time: see soft_target.h for the maths. The vectors' exponentials dominate; keeping
// those of the sums for the gradient, instead of computing them anew, took 0.75 ns an entry to 0.5 (Zen 5,
// AVX-512, one core, 1,000 classes).
#include <cmath>

#include "cpu/exponential.inl"
#include "cpu/vec.h"
#include "soft_target.h"

namespace kegfast::KEGFAST_ISA {

namespace {

using V = Vec<float>;
using I = Vec<int32_t>;
constexpr int kLanes = lanes<float>;
constexpr int64_t kBlock = 64 * kLanes;  // entries summed in float before they go to double

// Calls f(offset, student, teacher, count) for the vectors of a row; the last may hold fewer than kLanes
// entries.
template <class F>
inline void each_vector(const float* student, const float* teacher, int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes)
    f(i, load_unaligned(student + i), load_unaligned(teacher + i), kLanes);
  if (i == end) return;
  alignas(kVectorBytes) float s[kLanes], t[kLanes];
  store(s, splat(student[i]));  // an entry of the row again: harmless to a maximum, masked in a sum
  store(t, splat(teacher[i]));
  std::memcpy(s, student + i, (end - i) * sizeof(float));
  std::memcpy(t, teacher + i, (end - i) * sizeof(float));
  f(i, load(s), load(t), static_cast<int>(end - i));
}

// x with zeros from entry `count` on.
inline V keep(V x, int count) {
  static constexpr int32_t order[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return count == kLanes ? x : load_unaligned(order) < count - I{} ? x : V{};
}

inline void put(float* to, V x, int count) {
  if (count == kLanes)
    store_unaligned(to, x);
  else
    std::memcpy(to, &x, count * sizeof(float));
}

inline float largest(V x) {
  float m = x[0];
  for (int l = 1; l < kLanes; ++l) m = x[l] > m ? x[l] : m;
  return m;
}

inline double total(V x) {
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += static_cast<double>(x[l]);
  return sum;
}

struct Row {
  const float* student;
  const float* teacher;
  int64_t classes;
  float student_max, teacher_max, inverse;  // 1 / T
  double student_sum = 0, teacher_sum = 0, cross = 0;

  void find_maxima() {
    V s = splat(student[0]), t = splat(teacher[0]);
    each_vector(student, teacher, 0, classes, [&](int64_t, V a, V b, int) {
      s = vmax(a, s);
      t = vmax(b, t);
    });
    student_max = largest(s);
    teacher_max = largest(t);
  }

  // Sums the row's exponentials; with a gradient asked for they stay in `gradient` (student) and `scratch`
  // (teacher).
  void sum(float* gradient, float* scratch) {
    for (int64_t begin = 0; begin < classes; begin += kBlock) {
      const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
      V q{}, p{}, c{};
      each_vector(student, teacher, begin, end, [&](int64_t i, V s, V t, int count) {
        const V y = (s - student_max) * inverse, x = (t - teacher_max) * inverse;
        const V ey = keep(exp_negative(y), count), ex = keep(exp_negative(x), count);
        q += ey;
        p += ex;
        c += ex * (x - y);
        if (!gradient) return;
        put(gradient + i, ey, count);
        put(scratch + i, ex, count);
      });
      student_sum += total(q);
      teacher_sum += total(p);
      cross += total(c);
    }
  }

  double divergence() const { return cross / teacher_sum - std::log(teacher_sum) + std::log(student_sum); }

  // NaN everywhere when the divergence is: exp_negative hides what is not finite.
  void finish_gradient(float* gradient, const float* scratch, float scale, double divergence) const {
    const float poison = static_cast<float>(divergence - divergence);
    const V student_factor = splat(static_cast<float>(scale / student_sum) + poison);
    const V teacher_factor = splat(static_cast<float>(scale / teacher_sum));
    each_vector(gradient, scratch, 0, classes, [&](int64_t i, V ey, V ex, int count) {
      put(gradient + i, ey * student_factor - ex * teacher_factor, count);
    });
  }
};

}  // namespace

void soft_target_rows(const SoftTargetParams& p, int64_t first, int64_t last, float* scratch) {
  for (int64_t b = first; b < last; ++b) {
    Row row{p.student + b * p.student_stride,
            p.teacher + b * p.teacher_stride,
            p.classes,
            0,
            0,
            1 / p.temperature};
    float* gradient = p.gradient ? p.gradient + b * p.classes : nullptr;
    row.find_maxima();
    row.sum(gradient, scratch);
    p.divergence[b] = row.divergence();
    if (gradient) row.finish_gradient(gradient, scratch, p.gradient_scale, p.divergence[b]);
  }
}

}  // namespace kegfast::KEGFAST_ISA
