#include "diversity.h"

#include "check.h"
#include "cpu/diversity_run.h"

namespace kegfast {
void force_l1_kernel(L1Kernel kernel) {  // as csrc/cpu/diversity.cpp's, which needs torch
  forced_l1.store(kernel);
}
}  // namespace kegfast

namespace check {
namespace {

using kegfast::Element;
using kegfast::Metric;
using kegfast::NoiseMetric;

// The exponent of the loss by its definition, without a mean over features or noises' entries.
double distance(const std::vector<double>& x, int64_t width, int64_t i, int64_t j, Metric metric) {
  double sum = 0, dot = 0, a = 0, b = 0;
  for (int64_t k = 0; k < width; ++k) {
    const double p = x[i * width + k], q = x[j * width + k];
    sum += metric == Metric::l1 ? std::fabs(p - q) : (p - q) * (p - q);
    dot += p * q, a += p * p, b += q * q;
  }
  if (metric == Metric::cosine) return i == j ? 0 : 1 - dot / std::sqrt(a * b);
  return metric == Metric::euclidean ? std::sqrt(sum) : sum;
}

double exponent(const std::vector<double>& z, int64_t width, const std::vector<double>& x, int64_t batch,
                Metric metric, NoiseMetric noise_metric, double scale) {
  const int64_t features = static_cast<int64_t>(x.size()) / batch;
  const bool root = noise_metric == NoiseMetric::euclidean;
  double sum = 0;
  for (int64_t i = 0; i < batch; ++i)
    for (int64_t j = 0; j < batch; ++j) {
      const double square = distance(z, width, i, j, Metric::sqeuclidean);
      sum += (root ? std::sqrt(square) : square / static_cast<double>(width)) *
             distance(x, features, i, j, metric);
    }
  return scale * sum;
}

void one(int64_t batch, int64_t width, int64_t features, Metric metric, NoiseMetric noise_metric, Kind kind,
         bool wide) {
  constexpr const char* kMetrics[] = {"l1", "sqeuclidean", "euclidean", "cosine"};
  const std::string what = std::string("diversity ") + kMetrics[static_cast<int>(metric)] + ", " +
                           std::to_string(batch) + " x " + std::to_string(features) + ", noises of " +
                           std::to_string(width) + (wide ? ", float64" : std::string(", ") + name(kind));
  Numbers numbers(static_cast<uint64_t>(batch * features));
  const std::vector<double> z = numbers.take(batch * width), given = numbers.take(batch * features);
  const Stored stored(kind, given);
  std::vector<double> x = wide ? given : stored.values();

  const bool averaged = metric == Metric::l1 || metric == Metric::sqeuclidean;
  const double n = static_cast<double>(batch);
  const double scale = -1 / (n * n) / (averaged ? static_cast<double>(features) : 1);
  Memory<float> floats(batch * features);
  Memory<double> doubles(batch * features);
  kegfast::DiversityParams p{};
  p.samples = wide ? static_cast<const void*>(x.data()) : stored.data();
  p.gradient = wide ? static_cast<void*>(doubles.get()) : floats.get();
  p.batch = batch, p.features = p.row_stride = features;
  p.element = wide                     ? Element::f64
              : kind == Kind::float32  ? Element::f32
              : kind == Kind::bfloat16 ? Element::bf16
                                       : Element::f16;
  const kegfast::Noises noises(batch, width, [&](int64_t i, int64_t k) { return z[i * width + k]; });
  kegfast::Diversity diversity(p, metric, noise_metric, noises);
  std::vector<double> noise_gradient(batch * width);
  kegfast::noise_gradient(noises, noise_metric, diversity.distances(), scale, noise_gradient.data());
  const double value = diversity.run(scale);
  std::vector<double> gradient(batch * features);
  for (int64_t i = 0; i < batch * features; ++i) gradient[i] = wide ? doubles.get()[i] : floats.get()[i];

  const auto exact = [&] { return exponent(z, width, x, batch, metric, noise_metric, scale); };
  const double tolerance = wide ? 1e-11 : 2e-6;
  close({value}, {exact()}, tolerance, what + ", value", 1e-3);
  // Directional derivatives by central differences, some entries each.
  constexpr double kStep = 1e-6;
  std::vector<double> got, want;
  for (int64_t i = 0; i < batch * features; i += std::max<int64_t>(1, batch * features / 12)) {
    const double kept = x[i];
    x[i] = kept + kStep;
    const double above = exact();
    x[i] = kept - kStep;
    want.push_back((above - exact()) / (2 * kStep));
    x[i] = kept;
    got.push_back(gradient[i]);
  }
  double most = 0;
  for (const double g : gradient) most = std::max(most, std::fabs(g));
  close(got, want, 1e-4, what + ", gradient", most);
  std::vector<double> moved = z, noise_got, noise_want;
  for (int64_t i = 0; i < batch * width; i += std::max<int64_t>(1, batch * width / 8)) {
    const auto at = [&](double by) {
      moved[i] = z[i] + by;
      return exponent(moved, width, x, batch, metric, noise_metric, scale);
    };
    noise_want.push_back((at(kStep) - at(-kStep)) / (2 * kStep));
    moved[i] = z[i];
    noise_got.push_back(noise_gradient[i]);
  }
  most = 0;
  for (const double g : noise_gradient) most = std::max(most, std::fabs(g));
  close(noise_got, noise_want, 1e-4, what + ", gradient of the noises", most);
}

}  // namespace

void diversity() {
  for (const auto metric : {Metric::l1, Metric::sqeuclidean, Metric::euclidean, Metric::cosine})
    for (const auto noise_metric : {NoiseMetric::sqeuclidean, NoiseMetric::euclidean}) {
      for (const Kind kind : {Kind::float32, Kind::bfloat16, Kind::float16})
        one(19, 5, 23, metric, noise_metric, kind, false);
      one(18, 3, 9, metric, noise_metric, Kind::float32, true);
    }
  for (const auto kernel : {kegfast::L1Kernel::sort, kegfast::L1Kernel::pairs}) {
    kegfast::force_l1_kernel(kernel);
    for (const int64_t batch : {2, 16, 33, 70})
      for (const int64_t width : {3, 20, 40})
        one(batch, width, 37, Metric::l1, NoiseMetric::sqeuclidean, Kind::float32, false);
  }
  kegfast::force_l1_kernel(kegfast::L1Kernel::automatic);
}

}  // namespace check
