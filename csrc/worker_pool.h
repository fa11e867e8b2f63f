// Threads of our own, for where torch's are not: they sleep between runs.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "plan.h"

namespace kegfast {

class WorkerPool {
 public:
  static WorkerPool& shared() {
    static WorkerPool& pool = *new WorkerPool;  // never destroyed: threads may outlive everything else
    return pool;
  }

  // f(context, part) for every part; those of a second caller at the same time run one after the other.
  void run(int64_t parts, Pool::Part f, void* context) {
    std::unique_lock turn(turn_, std::try_to_lock);
    if (parts <= 1 || !turn) {
      for (int64_t i = 0; i < parts; ++i) f(context, i);
      return;
    }
    {
      const std::lock_guard guard(lock_);
      while (static_cast<int64_t>(workers_.size()) < parts - 1) {
        workers_.emplace_back(&WorkerPool::work, this, round_);
        workers_.back().detach();
      }
      part_ = f, context_ = context, parts_ = parts, next_ = 0, left_ = parts, ++round_;
    }
    wake_.notify_all();
    while (one()) continue;
    std::unique_lock guard(lock_);
    done_.wait(guard, [this] { return left_ == 0; });
  }

 private:
  bool one() {
    Pool::Part f;
    void* context;
    int64_t part;
    {
      const std::lock_guard guard(lock_);
      if (next_ == parts_) return false;
      f = part_, context = context_, part = next_++;
    }
    f(context, part);
    const std::lock_guard guard(lock_);
    if (--left_ == 0) done_.notify_one();
    return true;
  }

  void work(int64_t seen) {
    while (true) {
      {
        std::unique_lock guard(lock_);
        wake_.wait(guard, [&] { return round_ != seen; });
        seen = round_;
      }
      while (one()) continue;
    }
  }

  std::mutex turn_, lock_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Pool::Part part_ = nullptr;
  void* context_ = nullptr;
  int64_t parts_ = 0, next_ = 0, left_ = 0, round_ = 0;
};

}  // namespace kegfast
