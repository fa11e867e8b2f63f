// Stands in for torch's: one thread, so that the kernels run where there is no torch.
#pragma once

#include <cstdint>

namespace torch::stable {

inline uint32_t get_num_threads() {
  return 1;
}
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  f(begin, end);
}

}  // namespace torch::stable
