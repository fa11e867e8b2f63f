// diversity: POD parameters and kernel signatures, free of torch.
//
//   S = (1/B^2) sum_ij w_ij d_ij,  w_ij from the noises, d_ij from the samples; all ordered pairs.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace kegfast {

struct DiversityParams {
  const float* weights;   // [B, B]
  const float* samples;   // [B, D]
  float* gradient;        // [B, D] dS/dsamples, or null
  int64_t batch, features;
};

#define KEGFAST_DECLARE(isa) \
  namespace isa {            \
  double diversity_l1_pairs(const DiversityParams& p, int64_t first_feature, int64_t last_feature); \
  }
KEGFAST_EACH_ISA(KEGFAST_DECLARE)
#undef KEGFAST_DECLARE

}  // namespace kegfast
