// The C interface of frozen networks, in a library of its own without torch.
#include "kegplan.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan.h"
#include "worker_pool.h"

#define KEGFAST_PUBLIC __attribute__((visibility("default")))

namespace {

using namespace kegfast;

constexpr size_t kMostPlans = 8;  // sizes for which a network keeps a plan
constexpr int64_t kMostFileBytes = int64_t{1} << 36;
constexpr int kMostThreads = 1024;

thread_local std::string last_error;

// f(), or what to return where it throws.
template <class F, class T>
T guarded(T failure, const F& f) {
  try {
    return f();
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "unknown error";
  }
  return failure;
}

std::vector<char> read_file(const char* path) {
  const auto close = [](std::FILE* file) { std::fclose(file); };
  const std::unique_ptr<std::FILE, decltype(close)> file(std::fopen(path, "rb"), close);
  const auto size = [&]() -> int64_t {
    if (!file || std::fseek(file.get(), 0, SEEK_END) != 0) return -1;
    const int64_t end = std::ftell(file.get());
    return std::fseek(file.get(), 0, SEEK_SET) == 0 ? end : -1;
  }();
  if (size < 0 || size > kMostFileBytes) throw std::invalid_argument(std::string("cannot read ") + path);
  std::vector<char> bytes(static_cast<size_t>(size));
  if (std::fread(bytes.data(), 1, bytes.size(), file.get()) != bytes.size())
    throw std::invalid_argument(std::string("cannot read ") + path);
  return bytes;
}

void run_on_workers(int64_t parts, Pool::Part f, void* context) {
  WorkerPool::shared().run(parts, f, context);
}
constexpr Pool kWorkers{&run_on_workers};

Shape shape_from(const int64_t* sizes) {
  const bool vector = sizes[2] == 0 && sizes[3] == 0;
  const Shape shape{sizes[0], sizes[1], vector ? 1 : sizes[2], vector ? 1 : sizes[3], vector};
  constexpr int64_t kMost = int64_t{1} << 31;
  for (const int64_t size : {shape.channels, shape.height, shape.width})
    if (size < 1 || size >= kMost || sizes[0] < 0 || sizes[0] >= kMost)
      throw std::invalid_argument("input sizes must be from 1 to 2^31, got " + std::to_string(size));
  return shape;
}

// y as planes, from pixels of contiguous channels.
void to_planes(const Shape& y, const float* pixels, float* planes) {
  const int64_t size = y.height * y.width;
  for (int64_t n = 0; n < y.images; ++n, pixels += y.image(), planes += y.image())
    for (int64_t i = 0; i < size; ++i)
      for (int64_t c = 0; c < y.channels; ++c) planes[c * size + i] = pixels[i * y.channels + c];
}

}  // namespace

struct kegplan {
  Network network;
  PackedWeights weights;
  std::mutex lock;
  int threads = 1;
  std::map<std::vector<int64_t>, std::shared_ptr<Plan>> plans;

  std::shared_ptr<Plan> plan_for(const int64_t* sizes) {
    const std::lock_guard guard(lock);
    std::vector<int64_t> key(sizes, sizes + 4 * network.inputs);
    key.push_back(threads);
    const auto found = plans.find(key);
    if (found != plans.end()) return found->second;
    std::vector<Input> inputs;
    for (int64_t i = 0; i < network.inputs; ++i) {
      const Shape s = shape_from(sizes + 4 * i);
      inputs.push_back({s, {s.image(), s.height * s.width, s.width, 1}});
    }
    auto plan = std::make_shared<Plan>(network, weights, inputs, threads);
    if (plans.size() >= kMostPlans) plans.clear();
    return plans[key] = plan;
  }
};

extern "C" {

KEGFAST_PUBLIC kegplan* kegplan_read(const void* bytes, size_t size) {
  return guarded(static_cast<kegplan*>(nullptr), [&] {
    auto plan = std::make_unique<kegplan>();
    plan->network = read_network(static_cast<const char*>(bytes), size);
    return plan.release();
  });
}

KEGFAST_PUBLIC kegplan* kegplan_load(const char* path) {
  return guarded(static_cast<kegplan*>(nullptr), [&] {
    const std::vector<char> bytes = read_file(path);
    return kegplan_read(bytes.data(), bytes.size());
  });
}

KEGFAST_PUBLIC void kegplan_free(kegplan* plan) {
  delete plan;
}

KEGFAST_PUBLIC int kegplan_inputs(const kegplan* plan) {
  return static_cast<int>(plan->network.inputs);
}
KEGFAST_PUBLIC int kegplan_outputs(const kegplan* plan) {
  return static_cast<int>(plan->network.outputs.size());
}

KEGFAST_PUBLIC void kegplan_set_threads(kegplan* plan, int threads) {
  const std::lock_guard guard(plan->lock);
  plan->threads = std::clamp(threads, 1, kMostThreads);
}

KEGFAST_PUBLIC int kegplan_output_sizes(kegplan* plan, const int64_t* input_sizes, int64_t* output_sizes) {
  return guarded(-1, [&] {
    for (const Shape& s : plan->plan_for(input_sizes)->outputs()) {
      *output_sizes++ = s.images, *output_sizes++ = s.channels;
      *output_sizes++ = s.vector ? 0 : s.height, *output_sizes++ = s.vector ? 0 : s.width;
    }
    return 0;
  });
}

KEGFAST_PUBLIC int kegplan_run(kegplan* plan, const int64_t* input_sizes, const float* const* inputs,
                               float* const* outputs) {
  return guarded(-1, [&] {
    const std::shared_ptr<Plan> planned = plan->plan_for(input_sizes);
    const std::vector<Shape>& shapes = planned->outputs();
    std::vector<float*> made(outputs, outputs + shapes.size());
    std::vector<std::vector<float>> pixels(shapes.size());
    for (size_t i = 0; i < shapes.size(); ++i)
      if (shapes[i].height * shapes[i].width > 1) {
        pixels[i].resize(static_cast<size_t>(shapes[i].numbers()));
        made[i] = pixels[i].data();
      }
    planned->run(inputs, made.data(), kWorkers);
    for (size_t i = 0; i < shapes.size(); ++i)
      if (made[i] != outputs[i]) to_planes(shapes[i], made[i], outputs[i]);
    return 0;
  });
}

KEGFAST_PUBLIC const char* kegplan_error(void) {
  return last_error.c_str();
}

}  // extern "C"
