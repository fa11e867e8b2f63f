// soft_target on CUDA: loss and gradient of a row in one launch, softmax by running maxima.
//
// With x = teacher / T and y = student / T, both less their row's first value, and m, n their maxima:
//   P = sum e^(x - m), Q = sum e^(y - n), A = sum e^(x - m) (x - y)
//   KL = A / P - (m + log P) + (n + log Q),  d loss / d student = T / B (e^(y - n) / Q - e^(x - m) / P).
// A team of threads takes a row, kValues of each array a thread in registers: a row of up to kCapacity is
// read once, a longer one chunk by chunk, once for the sums (rescaled where a chunk raises a maximum) and
// once for the gradient, the second time from L2 as far as it holds. 16-byte loads and stores where rows
// allow. Everything but the inputs and the gradient is float32, the sum over rows float64 in a fixed order.
//
// Predictions for an H200 (calculated at 4.8 TB/s and 16 exponentials a cycle and multiprocessor, not yet
// measured), float32, B = 256 with gradient: C = 1000 0.6 us of traffic under two launches; C = 10,000 6.4 us
// of traffic; C = 100,000 64 us of traffic, 107 where L2 keeps nothing for the second read, and 4 x 25.6e6
// exponentials, 28 us, beside it.
#pragma once

#include "simt.cuh"

namespace kegfast::cuda {

using namespace kegfast::simt;

// Sums of e^(x - maxima) over what a thread, a warp or a block has seen.
struct SoftSums {
  float m, p, n, q, a;

  KEGFAST_DEVICE static float factor(float from, float to) { return from == to ? 1 : expf(from - to); }

  KEGFAST_DEVICE void raise(float m2, float n2) {
    const float fp = factor(m, m2), fq = factor(n, n2);
    p *= fp, a *= fp, q *= fq;
    m = m2, n = n2;
  }
  KEGFAST_DEVICE void add(SoftSums other) {
    const float m2 = larger(m, other.m), n2 = larger(n, other.n);
    raise(m2, n2);
    other.raise(m2, n2);
    p += other.p, q += other.q, a += other.a;
  }
};

// kWarps: of a row's team; below a block's 8 warps, a block takes several rows.
template <class T, int kWarps, int kValues>
struct SoftTarget {
  static constexpr int kThreads = kWarps > 8 ? kWarps * kWarp : 256;
  static constexpr int kBlocksPerSm = kWarps > 8 ? 1 : (kWarps > 1 ? 3 : 4);  // 128, 85 and 64 registers
  static constexpr int kTeam = kWarps * kWarp, kRows = kThreads / kTeam, kCapacity = kTeam * kValues;
  static constexpr int kVector = 16 / sizeof(T);
  static_assert(kValues % kVector == 0 && (kRows == 1 || kWarps == 1));

  struct Params {
    const T* student;    // [batch, classes], rows student_stride apart
    const T* teacher;    // [batch, classes], rows teacher_stride apart
    T* gradient;         // [batch, classes], or null
    double* divergence;  // [batch] KL of each row
    int64_t student_stride, teacher_stride;
    int batch, classes;
    float inverse_temperature, gradient_scale;  // 1 / T, T / B
  };
  static constexpr size_t kShared = size_t(kWarps) * sizeof(SoftSums);
  static int blocks(const Params& p) { return (p.batch + kRows - 1) / kRows; }

  // Class of a thread's value v in the chunk that begins at `first`.
  KEGFAST_DEVICE static int place(int first, int t, int v) {
    return first + (v / kVector * kTeam + t) * kVector + v % kVector;
  }

  KEGFAST_DEVICE static void load(const T* row, int first, int t, int classes, bool vectors, float base,
                                  float scale, float (&x)[kValues]) {
    KEGFAST_UNROLL
    for (int v = 0; v < kValues; v += kVector) {
      const int at = place(first, t, v);
      if (vectors) {
        const Words4 words = at < classes ? load_global16(row + at) : Words4{};
        KEGFAST_UNROLL
        for (int e = 0; e < kVector; ++e) x[v + e] = (element<T>(words, e) - base) * scale;
      } else {
        KEGFAST_UNROLL
        for (int e = 0; e < kVector; ++e)
          x[v + e] = at + e < classes ? (to_float(row[at + e]) - base) * scale : 0;
      }
    }
  }

  // The team's sums; every thread gets them.
  KEGFAST_DEVICE static SoftSums together(SoftSums sums) {
    KEGFAST_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      sums.add({shuffle_xor(sums.m, mask), shuffle_xor(sums.p, mask), shuffle_xor(sums.n, mask),
                shuffle_xor(sums.q, mask), shuffle_xor(sums.a, mask)});
    }
    if constexpr (kWarps > 1) {
      SoftSums* of_warps = reinterpret_cast<SoftSums*>(shared());
      if (lane() == 0) of_warps[warp()] = sums;
      barrier();
      sums = of_warps[0];
      KEGFAST_ROLLED
      for (int w = 1; w < kWarps; ++w) sums.add(of_warps[w]);
    }
    return sums;
  }

  struct Row {
    const T *student, *teacher;
    float student_base, teacher_base;
    bool vectors;
  };

  KEGFAST_DEVICE static void load_both(const Params& p, const Row& row, int first, int t, float (&x)[kValues],
                                       float (&y)[kValues]) {
    load(row.teacher, first, t, p.classes, row.vectors, row.teacher_base, p.inverse_temperature, x);
    load(row.student, first, t, p.classes, row.vectors, row.student_base, p.inverse_temperature, y);
  }

  KEGFAST_DEVICE static void add(const Params& p, int first, int t, const float (&x)[kValues],
                                 const float (&y)[kValues], SoftSums& sums) {
    float m = sums.m, n = sums.n;
    KEGFAST_UNROLL
    for (int v = 0; v < kValues; ++v) {
      if (place(first, t, v) < p.classes) m = larger(m, x[v]), n = larger(n, y[v]);
    }
    sums.raise(m, n);
    KEGFAST_UNROLL
    for (int v = 0; v < kValues; ++v) {
      if (place(first, t, v) >= p.classes) continue;
      const float e = expf(x[v] - m);
      sums.p += e;
      sums.a = fmaf(e, x[v] - y[v], sums.a);
      sums.q += expf(y[v] - n);
    }
  }

  KEGFAST_DEVICE static void store(const Params& p, T* to, int first, int t, const float (&x)[kValues],
                                   const float (&y)[kValues], const SoftSums& sums, bool vectors) {
    const float scale_x = p.gradient_scale / sums.p, scale_y = p.gradient_scale / sums.q;
    KEGFAST_UNROLL
    for (int v = 0; v < kValues; v += kVector) {
      const int at = place(first, t, v);
      Words4 words{};
      KEGFAST_UNROLL
      for (int e = 0; e < kVector; ++e) {
        const float slope = expf(y[v + e] - sums.n) * scale_y - expf(x[v + e] - sums.m) * scale_x;
        if (!vectors) {
          if (at + e < p.classes) to[at + e] = from_float<T>(slope);
        } else if constexpr (sizeof(T) == 4) {
          words.w[e] = float_bits(slope);
        } else {
          words.w[e / 2] |= uint32_t(from_float<T>(slope).bits) << (16 * (e % 2));
        }
      }
      if (vectors && at < p.classes) store_global16(to + at, words);
    }
  }

  KEGFAST_DEVICE static void run(const Params& p) {
    const int t = thread() % kTeam, b = block().x * kRows + thread() / kTeam;
    if (kRows > 1 && b >= p.batch) return;  // a whole warp
    Row row{p.student + b * p.student_stride, p.teacher + b * p.teacher_stride, 0, 0, false};
    row.student_base = to_float(row.student[0]);
    row.teacher_base = to_float(row.teacher[0]);
    T* gradient = p.gradient == nullptr ? nullptr : p.gradient + int64_t(b) * p.classes;
    const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    row.vectors =
        p.classes % kVector == 0 && aligned(row.student) && aligned(row.teacher) && aligned(gradient);

    float x[kValues], y[kValues];
    SoftSums sums{-INFINITY, 0, -INFINITY, 0, 0};
    KEGFAST_ROLLED
    for (int first = 0; first < p.classes; first += kCapacity) {
      load_both(p, row, first, t, x, y);
      add(p, first, t, x, y, sums);
    }
    sums = together(sums);
    if (t == 0) {
      const double divergence =
          double(sums.a / sums.p) - (double(sums.m) + logf(sums.p)) + (double(sums.n) + logf(sums.q));
      p.divergence[b] = divergence;
    }
    if (gradient == nullptr) return;
    KEGFAST_ROLLED
    for (int first = 0; first < p.classes; first += kCapacity) {
      if (p.classes > kCapacity) load_both(p, row, first, t, x, y);
      store(p, gradient, first, t, x, y, sums, row.vectors);
    }
  }
};

// loss = scale * sum of the rows' divergences, in a fixed order.
template <class T>
struct SumRows {
  static constexpr int kThreads = 256, kBlocksPerSm = 1;
  struct Params {
    const double* divergence;  // [batch]
    T* loss;                   // []
    int batch;
    double scale;  // T^2 / B
  };
  static constexpr size_t kShared = kThreads / kWarp * sizeof(double);

  KEGFAST_DEVICE static void run(const Params& p) {
    double sum = 0;
    for (int b = thread(); b < p.batch; b += kThreads) sum += p.divergence[b];
    sum = block_sum<kThreads>(sum, reinterpret_cast<double*>(shared()));
    if (thread() == 0) *p.loss = from_float<T>(float(p.scale * sum));
  }
};

template <class T>
struct SoftTargetProblem {
  const T *student, *teacher;
  T *loss, *gradient;  // gradient: or null
  double* divergence;  // [batch], workspace
  int64_t student_stride, teacher_stride;
  int batch, classes;
  double temperature;
};

// Both launches; `launch` as in diversity_plan.h.
template <class T, class Launch>
void soft_target(const SoftTargetProblem<T>& p, Launch&& launch) {
  const auto rows = [&](auto kernel) {
    using Kernel = decltype(kernel);
    const typename Kernel::Params q{p.student,
                                    p.teacher,
                                    p.gradient,
                                    p.divergence,
                                    p.student_stride,
                                    p.teacher_stride,
                                    p.batch,
                                    p.classes,
                                    float(1 / p.temperature),
                                    float(p.temperature / p.batch)};
    launch(kernel, q, Kernel::blocks(q), 1, Kernel::kShared);
  };
  if (p.classes <= SoftTarget<T, 1, 8>::kCapacity) {
    rows(SoftTarget<T, 1, 8>{});
  } else if (p.classes <= SoftTarget<T, 8, 16>::kCapacity) {
    rows(SoftTarget<T, 8, 16>{});
  } else {
    rows(SoftTarget<T, 16, 24>{});
  }
  launch(SumRows<T>{},
         typename SumRows<T>::Params{p.divergence, p.loss, p.batch, p.temperature * p.temperature / p.batch},
         1, 1, SumRows<T>::kShared);
}

}  // namespace kegfast::cuda
