// Kernels of diversity, compiled once per instruction set.
#include "diversity.h"

namespace kegfast::KEGFAST_ISA {

double diversity_l1_pairs(const DiversityParams& p, int64_t first_feature, int64_t last_feature) {
  double total = 0;
  for (int64_t i = 0; i < p.batch; ++i)
    for (int64_t d = first_feature; d < last_feature; ++d) {
      float g = 0;
      for (int64_t j = 0; j < p.batch; ++j) {
        const float delta = p.samples[i * p.features + d] - p.samples[j * p.features + d];
        g += p.weights[i * p.batch + j] * static_cast<float>((delta > 0) - (delta < 0));
      }
      total += 2.0 * g * p.samples[i * p.features + d];
      if (p.gradient) p.gradient[i * p.features + d] = 2 * g;
    }
  return total;
}

}  // namespace kegfast::KEGFAST_ISA
