// diversity: POD parameters and kernel signatures, free of torch.
//
//   S = sum_ij w_ij d_ij over all ordered pairs, w_ij from the noises, d_ij from the samples, and its
//   gradients.
//
// No B x B x D array is needed (zh: centered noises, a_i = |zh_i|^2, A = sum a, xh: centered samples):
//   l1           with G_i = sum_j w_ij sign(x_i - x_j), one feature: S = 2 sum_i x_i G_i, dS/dx_i = 2 G_i.
//                Squared noise distances are bilinear, w_ij = v_i^T J v_j with v = (sqrt2 zh,
//                (a/c - c)/sqrt2, (a/c + c)/sqrt2) and J = diag(-1, ..., -1, 1), so that in sorted order
//                G_i = 2 v_i^T J (P_i - T/2), P the prefix sums of v and T their total:
//                O(D B (log B + nz)).
//   sqeuclidean  dS/dx_i = 4 (B a_i + A) xh_i + 8 sum_k zh_ik C_k - 4 C_a with C = Zh^T Xh,
//                C_a = sum_i a_i xh_i; S = 1/2 sum_i x_i dS/dx_i. cosine is half of it on rows of norm 1.
//   any weights  pairs i < j, over tiles of features.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace kegfast {

enum class Element : int32_t { f32, f64, bf16, f16 };

// How l1 under squared noise distances is computed; forced by tests and benchmarks, never visible in the
// result beyond rounding.
enum class L1Kernel : int32_t { automatic, sort, pairs };
void force_l1_kernel(L1Kernel kernel);

// Where w_ij stands: in groups of 16 rows i, so that a block of rows reads its weights to a row j in one
// piece.
static inline int64_t weight_index(int64_t i, int64_t j, int64_t batch) {
  return ((i / 16) * batch + j) * 16 + i % 16;
}
static inline int64_t weight_count(int64_t batch) {
  return (batch + 15) / 16 * 16 * batch;
}

struct DiversityParams {
  const void* samples;      // [B, D] elements, rows `row_stride` apart
  const double* row_scale;  // [B] each row is multiplied by it on loading, or null
  const double*
      row_unit;    // [B] and before that by it, a power of two, or null: norms near the ends of the range
  void* gradient;  // [B, D] double for f64 samples, else float; null where nobody asks for it
  double gradient_scale;  // what is stored there is dS/dx times this
  int64_t batch, features, row_stride;
  Element element;
  int32_t chunks;           // 16-float chunks of a row of `bilinear`
  const float* bilinear;    // [B, 16 * chunks] v_i, 64-byte aligned (l1 by sorting)
  const float* half_total;  // [16 * chunks] T/2
  const float* signature;   // [16 * chunks] diagonal of J
  const void* low_rank;     // [blocks, B, 16] (zh, a) in the compute type, 64-byte aligned (sqeuclidean)
  const void* diagonal;     // [B] B a_i + A in the compute type (sqeuclidean)
  int32_t low_rank_blocks, low_rank_tail;  // the column a of the last block, its last that is not 0
  const void* weights;  // symmetric, see weight_index(): int32 for l1 in float, else the compute type (pairs)
  const int32_t* offsets;  // [B] sum_{j>i} w_ij - sum_{j<i} w_ij modulo 2^32 (l1 pairs in float)
  double weight_unit;      // the value of one in `weights`
};

// The kernels: `first` and `last` count tiles of diversity_lanes() features (of half as many for f64).
// `values` receives each tile's share of S, NaN where the tile holds anything that is not finite. `workspace`
// is 64-byte aligned.
#define KEGFAST_DECLARE_DIVERSITY(isa)                                                                       \
  namespace isa {                                                                                            \
  int64_t diversity_lanes();                                                                                 \
  int64_t diversity_workspace(int64_t batch); /* bytes */                                                    \
  void diversity_l1_sort(const DiversityParams& p, int64_t first, int64_t last, void* workspace,             \
                         double* values);                                                                    \
  void diversity_l1_pairs(const DiversityParams& p, int64_t first, int64_t last, void* workspace,            \
                          double* values);                                                                   \
  void diversity_square_pairs(const DiversityParams& p, int64_t first, int64_t last, void* workspace,        \
                              double* values);                                                               \
  void diversity_low_rank(const DiversityParams& p, int64_t first, int64_t last, void* workspace,            \
                          double* values);                                                                   \
  /* The largest magnitude of rows first..last; NaN where something is not finite. */                        \
  double diversity_magnitude(const DiversityParams& p, int64_t first, int64_t last);                         \
  /* distances[i, j] = sum_d |x_id - x_jd| (squared: of squares), i < j, for every `step`th group of rows \
     i from `first` on; [B, B] double. `unit`: a power of two by which samples are divided, so that no \
     sum overflows; it stays in the distances. */  \
  void diversity_distances(const DiversityParams& p, int64_t first, int64_t step, bool squared, double unit, \
                           double* distances);                                                               \
  /* Mean squares, or with `root` norms, of the differences of the rows of z, [nz, B rounded up to 16] \
     transposed. Returns the largest sum of weights over a row. */     \
  double diversity_weights(const float* z, int64_t batch, int64_t width, bool root, float* weights);         \
  /* Turns weights into fixed point in place, as even multiples of `unit`; see DiversityParams::offsets. */  \
  void diversity_fix_weights(float* weights, int64_t batch, double unit, int32_t* offsets);                  \
  /* norms[i] = |x_i|^2, rows first..last. */                                                                \
  void diversity_square_norms(const DiversityParams& p, int64_t first, int64_t last, double* norms);         \
  /* gradient_i = (gradient_i - (gradient_i . y_i) y_i) row_scale_i with y_i = row_scale_i x_i, \
     rows first..last. */            \
  void diversity_project(const DiversityParams& p, int64_t first, int64_t last);                             \
  }
KEGFAST_EACH_ISA(KEGFAST_DECLARE_DIVERSITY)
#undef KEGFAST_DECLARE_DIVERSITY

}  // namespace kegfast
