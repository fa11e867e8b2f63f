// Runs every kernel on buffers of exactly the length they need, for AddressSanitizer and for the alignment
// check of UndefinedBehaviorSanitizer. An argument: a kernel that reads past the end, or one that stores 16
// bytes elsewhere than at a multiple of 16.
#include <cstdio>
#include <cstring>
#include <vector>

#include "harness.h"

namespace {

constexpr int64_t kShared = 227 * 1024;

template <class T>
std::vector<T> numbers(size_t count) {  // small, with ties, whatever the type's bits mean
  std::vector<T> values(count);
  uint32_t state = 1;
  for (T& value : values) {
    state = state * 1664525u + 1013904223u;
    if constexpr (sizeof(T) == 4) {
      value = float(state >> 24) / 64 - 2;
    } else {
      value = T(0x3c00u + (state >> 24));
    }
  }
  return values;
}

template <class T>
int diversity(int batch, int noise_size, int features, int metric, int noise_metric, int dtype) {
  const auto noises = numbers<float>(size_t(batch) * noise_size);
  const auto samples = numbers<T>(size_t(batch) * features);
  std::vector<float> noise_gradient(noises.size()), sample_gradient(samples.size());
  double exponent = 0;
  DiversityCall call{};
  call.noises = noises.data(), call.samples = samples.data(), call.exponent = &exponent;
  call.noise_gradient = noise_gradient.data(), call.sample_gradient = sample_gradient.data();
  call.batch = batch, call.noise_size = noise_size, call.features = features;
  call.metric = metric, call.noise_metric = noise_metric, call.dtype = dtype;
  call.shared_bytes = kShared, call.panel_bytes = 4 * 64 * batch;
  return emulate_diversity(&call);
}

template <class T>
int tucker2(int channels, int rank_in, int rank_out, int features, int kernel, int stride, bool pixels,
            int form, int dtype) {
  const int n = 2, h = 7, w = 9, padding = kernel / 2;
  const int oh = (h + 2 * padding - kernel) / stride + 1, ow = (w + 2 * padding - kernel) / stride + 1;
  const auto x = numbers<T>(size_t(n) * channels * h * w), bias = numbers<T>(features);
  const auto first = numbers<T>(size_t(rank_in) * channels), last = numbers<T>(size_t(features) * rank_out);
  const auto core = numbers<T>(size_t(rank_out) * rank_in * kernel * kernel);
  std::vector<T> y(size_t(n) * features * oh * ow);
  const auto strides = [pixels](int64_t (&to)[4], int64_t c, int64_t rows, int64_t columns) {
    const int64_t nhwc[4] = {rows * columns * c, 1, columns * c, c},
                  nchw[4] = {rows * columns * c, rows * columns, columns, 1};
    std::memcpy(to, pixels ? nhwc : nchw, sizeof to);
  };
  Tucker2Call call{};
  call.x = x.data(), call.first = first.data(), call.core = core.data(), call.last = last.data(),
  call.bias = bias.data();
  call.y = y.data();
  strides(call.x_strides, channels, h, w);
  strides(call.y_strides, features, oh, ow);
  const int64_t k = kernel, first_strides[4] = {channels, 1, 1, 1}, last_strides[4] = {rank_out, 1, 1, 1};
  const int64_t core_strides[4] = {rank_in * k * k, k * k, k, 1};
  std::memcpy(call.first_strides, first_strides, sizeof first_strides);
  std::memcpy(call.core_strides, core_strides, sizeof core_strides);
  std::memcpy(call.last_strides, last_strides, sizeof last_strides);
  call.images = n, call.channels = channels, call.height = h, call.width = w;
  call.rank_in = rank_in, call.rank_out = rank_out, call.features = features, call.out_height = oh,
  call.out_width = ow;
  const int window[8] = {kernel, kernel, stride, stride, padding, padding, 1, 1};
  std::memcpy(call.window, window, sizeof window);
  call.relu = 1, call.form = form, call.dtype = dtype, call.split = 1, call.multiprocessors = 4,
  call.shared_bytes = kShared;
  return emulate_tucker2(&call);
}

template <class T>
int soft_target(int batch, int classes, int dtype) {
  const auto student = numbers<T>(size_t(batch) * classes), teacher = numbers<T>(size_t(batch) * classes);
  std::vector<T> loss(1), gradient(student.size());
  const SoftTargetCall call{student.data(),
                            teacher.data(),
                            loss.data(),
                            gradient.data(),
                            classes,
                            classes,
                            2.0,
                            batch,
                            classes,
                            dtype,
                            0};
  return emulate_soft_target(&call);
}

template <class T>
int all(int dtype) {
  int failures = 0;
  for (int classes : {7, 256, 1001, 13000}) failures += soft_target<T>(3, classes, dtype);
  for (int metric = 0; metric < 4; ++metric) {
    for (int noise_metric = 0; noise_metric < 2; ++noise_metric) {
      failures += diversity<T>(33, 5, 11, metric, noise_metric, dtype) +
                  diversity<T>(70, 3, 9, metric, noise_metric, dtype);
    }
  }
  failures += diversity<T>(259, 3, 3, 0, 0, dtype);
  for (int form = 1; form <= 2; ++form) {
    for (bool pixels : {false, true}) {
      failures += tucker2<T>(16, 8, 8, 24, 3, 1, pixels, form, dtype) +
                  tucker2<T>(5, 3, 10, 7, 3, 2, pixels, form, dtype);
    }
    failures += tucker2<T>(24, 70, 66, 72, 1, 1, true, form, dtype);
  }
  return failures;
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) {
    std::vector<float> out(32);
    const bool end = std::strcmp(arguments[1], "past the end") == 0;
    return end ? emulate_past_the_end(out.data()) : emulate_misaligned(out.data());
  }
  // Beyond one block's shared memory: the merged sort.
  const int failures =
      diversity<float>(4100, 1, 1, 0, 0, 0) + all<float>(0) + all<uint16_t>(1) + all<uint16_t>(2);
  if (failures != 0)
    std::fprintf(stderr, "%d failed: %s %s %s\n", failures, diversity_error(), tucker2_error(),
                 soft_target_error());
  return failures != 0;
}
