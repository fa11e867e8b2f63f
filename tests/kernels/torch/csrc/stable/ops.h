// Stands in for torch's, so that the kernels run where there is no torch: on KEGFAST_THREADS threads, or one.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

#ifndef KEGFAST_THREADS
#define KEGFAST_THREADS 1
#endif

namespace torch::stable {

inline uint32_t get_num_threads() {
  return KEGFAST_THREADS;
}
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  std::vector<std::thread> others;
  const int64_t count = end - begin;
  for (int64_t i = 1; i < KEGFAST_THREADS; ++i)
    others.emplace_back(
        [&, i] { f(begin + count * i / KEGFAST_THREADS, begin + count * (i + 1) / KEGFAST_THREADS); });
  f(begin, begin + count / KEGFAST_THREADS);
  for (std::thread& other : others) other.join();
}

}  // namespace torch::stable
