// diversity on CUDA: which kernels run, in which order, on what workspace.
//
// Free of torch and of the CUDA runtime: `launch(Kernel{}, params, x, y, shared_bytes)` is the library's
// (launch.h, on a stream) or the tests' (on the emulator), so that this file is under test without a device
// as well.
#pragma once

#include <type_traits>
#include <utility>

#include "arena.h"
#include "diversity_merge.cuh"
#include "diversity_moments.cuh"
#include "diversity_pair.cuh"
#include "diversity_sort.cuh"

namespace kegfast::cuda {

enum class Metric { l1, sqeuclidean, euclidean, cosine };  // the operator's integers
enum class NoiseMetric { sqeuclidean, euclidean };

template <class Sample>
struct DiversityProblem {
  const float* noises;     // [batch, noise_size]
  const Sample* samples;   // [batch, features]
  double* exponent;        // []
  float* noise_gradient;   // [batch, noise_size], or null
  float* sample_gradient;  // [batch, features], or null
  int batch, noise_size, features;
  Metric metric;
  NoiseMetric noise_metric;
  size_t shared_limit;                      // bytes of shared memory that a block of this device may ask for
  int64_t panel_bytes = int64_t(64) << 20;  // of each matrix over pairs, or 32 of its rows
};

// Up to here the pair kernel does less work than the sort (calculated; not yet measured on a device).
constexpr int kPairBatch = 64;

// Features that a block of the sort takes within the device's shared memory; 0: the batch is too large for
// this kernel.
template <class Kernel, class Problem>
int sort_features(const Problem& p) {
  typename Kernel::Params q{};
  q.batch = p.batch;
  for (int count = Kernel::kFeatures; p.batch <= Kernel::kCapacity && count >= Kernel::kTeams; count /= 2) {
    q.block_features = count;
    if (Kernel::shared_bytes(q) <= p.shared_limit) return count;
  }
  return 0;
}

template <class T, int kWarps>
using Sort = DiversitySort<T, std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>, kWarps>;

// Returns the number of partial sums, 0 where the batch is too large.
template <class Kernel, class Problem, class T, class Launch>
int sort_by(const Problem& p, const T* samples, const float* table, double* partial, double scale,
            Launch&& launch) {
  const int features = sort_features<Kernel>(p);
  if (features == 0) return 0;
  const typename Kernel::Params q{samples, table,      p.sample_gradient,           partial,
                                  p.batch, p.features, table_columns(p.noise_size), float(2 * scale),
                                  features};
  launch(Kernel{}, q, Kernel::blocks(q), 1, Kernel::shared_bytes(q));
  return Kernel::blocks(q);
}

// The workspace of the sort beyond one block: some features at a time, so that it stays below kMergeBytes or
// 8 features.
struct MergeSpace {
  static constexpr int64_t kMergeBytes = int64_t(256) << 20;
  static constexpr int kSumBlocks = 128;
  uint64_t *from, *to;  // [features, stride]
  Float4* prefix;       // [kSumBlocks, stride]
  float* g;             // [features, batch]
  int stride, features;

  static MergeSpace take(Arena& arena, int batch, int features) {
    constexpr int kTile = SortTiles<float>::kTile;
    const int stride = (batch + kTile - 1) / kTile * kTile;
    const int64_t per_feature = 2 * int64_t(stride) * sizeof(uint64_t) + int64_t(batch) * sizeof(float);
    const int count = int(smaller<int64_t>(features, larger<int64_t>(8, kMergeBytes / per_feature / 8 * 8)));
    return {arena.take<uint64_t>(int64_t(count) * stride),
            arena.take<uint64_t>(int64_t(count) * stride),
            arena.take<Float4>(int64_t(smaller(count, kSumBlocks)) * stride),
            arena.take<float>(int64_t(count) * batch),
            stride,
            count};
  }
};

// Returns the number of partial sums.
template <class Problem, class T, class Launch>
int merge_by(const Problem& p, const T* samples, const float* table, double* partial, double scale,
             MergeSpace space, Launch&& launch) {
  using Tiles = SortTiles<T>;
  for (int first = 0; first < p.features; first += space.features) {
    const int count = smaller(space.features, p.features - first);
    typename Tiles::Params tiles{samples, space.from, p.batch, p.features, first, count, space.stride, 8};
    while (tiles.block_features > 1 && Tiles::shared_bytes(tiles) > p.shared_limit) tiles.block_features /= 2;
    launch(Tiles{}, tiles, Tiles::blocks_x(tiles), Tiles::blocks_y(tiles), Tiles::shared_bytes(tiles));
    for (int run = Tiles::kTile; run < space.stride; run *= 2) {
      const MergeRuns::Params q{space.from, space.to, space.stride, run};
      launch(MergeRuns{}, q, MergeRuns::blocks_x(q), count, size_t(0));
      std::swap(space.from, space.to);
    }
    using Sum = SumSorted<T>;
    const typename Sum::Params sum{space.from, table,           space.prefix,
                                   space.g,    partial + first, p.batch,
                                   count,      space.stride,    table_columns(p.noise_size)};
    launch(Sum{}, sum, smaller(count, MergeSpace::kSumBlocks), 1, Sum::kShared);
    if (p.sample_gradient != nullptr) {
      const ScaleTransposed::Params q{space.g, p.sample_gradient, p.batch, p.features, first,
                                      count,   float(2 * scale)};
      launch(ScaleTransposed{}, q, (p.batch + 31) / 32, (count + 31) / 32, ScaleTransposed::kShared);
    }
  }
  return p.features;
}

// The pairs' matrices, a panel of rows at a time.
struct PanelSpace {
  float *weights, *distances, *quotients;  // [rows, batch], or null
  int rows;

  static PanelSpace take(Arena& arena, int64_t bytes, int64_t batch, bool weights, bool distances,
                         bool quotients) {
    const int64_t fit = larger<int64_t>(32, bytes / int64_t(sizeof(float)) / batch / 32 * 32);
    const int rows = int(smaller(batch, fit));
    const auto matrix = [&](bool wanted) { return wanted ? arena.take<float>(rows * batch) : nullptr; };
    float* const w = matrix(weights);
    float* const d = matrix(distances);
    return {w, d, matrix(quotients), rows};
  }
};

// One panel of pairs: `samples` with `inverse` norms (cosine) or null; partial sums are appended.
template <Difference kDifference, class Problem, class Launch>
void run_panel(const Problem& p, const PanelSpace& space, Panel panel, const double* inverse, double mean,
               double unit, double* partial, int& partials, Launch&& launch) {
  using T = std::remove_const_t<std::remove_pointer_t<decltype(p.samples)>>;
  const bool root = p.noise_metric == NoiseMetric::euclidean, euclidean = p.metric == Metric::euclidean;
  if (space.weights != nullptr) {
    const PairWeights::Params q{p.noises, space.weights, p.batch, p.noise_size, panel, root};
    launch(PairWeights{}, q, PairWeights::blocks(q), 1, size_t(0));
  }
  if (space.distances != nullptr) {
    using Kernel = Distances<T, kDifference>;
    const typename Kernel::Params q{p.samples,  inverse, space.distances, p.batch,
                                    p.features, panel,   float(unit)};
    const auto tiles = [](int count) { return (count + Kernel::kTile - 1) / Kernel::kTile; };
    launch(Kernel{}, q, tiles(p.batch), tiles(panel.count), Kernel::kShared);
  }
  if (euclidean) {
    const Reweigh::Params q{space.weights, space.distances, space.quotients, int64_t(panel.count) * p.batch};
    launch(Reweigh{}, q, Reweigh::blocks(q), 1, size_t(0));
  }
  if (space.weights != nullptr) {
    using Kernel = DiversityPairs<T, kDifference>;
    const double slope = euclidean ? 2 * mean : (kDifference == Difference::square ? 4 : 2) * mean * unit;
    const typename Kernel::Params q{p.samples,
                                    inverse,
                                    euclidean ? space.quotients : space.weights,
                                    p.sample_gradient,
                                    partial + partials,
                                    p.batch,
                                    p.features,
                                    panel,
                                    float(slope)};
    launch(Kernel{}, q, Kernel::blocks_x(q), Kernel::blocks_y(q), Kernel::kShared);
    partials += Kernel::blocks_x(q) * Kernel::blocks_y(q);
  }
  if (p.noise_gradient != nullptr) {
    const NoiseGradient::Params q{p.noises,
                                  space.distances,
                                  root ? space.weights : nullptr,
                                  p.noise_gradient,
                                  p.batch,
                                  p.noise_size,
                                  panel,
                                  mean};
    launch(NoiseGradient{}, q, NoiseGradient::blocks(q), 1, size_t(0));
  }
}

// Value and gradients on a workspace of as many bytes as the call returns; a null workspace only asks for
// that number.
template <class Sample, class Launch>
size_t diversity(const DiversityProblem<Sample>& p, char* workspace, Launch&& launch) {
  const bool cosine = p.metric == Metric::cosine, euclidean = p.metric == Metric::euclidean,
             l1 = p.metric == Metric::l1;
  const bool root = p.noise_metric == NoiseMetric::euclidean;
  const bool sorts = l1 && !root && p.batch > kPairBatch;
  const bool merges = sorts && sort_features<Sort<Sample, 16>>(p) == 0;
  // By the noise table's low rank where its moments fit into a block's shared memory (on an H200 up to some
  // 1,700 columns), else by pairs.
  const bool low_rank = !root && (cosine || p.metric == Metric::sqeuclidean) &&
                        DiversityMoments<Sample>::least_shared(table_columns(p.noise_size)) <= p.shared_limit;
  const bool pairs = !sorts && !low_rank;
  const double mean = -1.0 / (double(p.batch) * double(p.batch));
  const double unit =
      cosine ? 0.5 : (euclidean ? 1.0 : 1.0 / p.features);  // a distance in terms of what the kernels sum
  const int columns = table_columns(p.noise_size);
  const bool by_rows = cosine && p.sample_gradient != nullptr;

  Arena arena(workspace);
  float* table = arena.take<float>(pairs ? 0 : int64_t(p.batch) * columns);
  double* inverse = cosine ? arena.take<double>(p.batch) : nullptr;
  float* moments = by_rows && low_rank ? arena.take<float>(int64_t(columns) * p.features + 1) : nullptr;
  const bool panels = pairs || p.noise_gradient != nullptr;
  const PanelSpace panel_space = panels
                                     ? PanelSpace::take(arena, p.panel_bytes, p.batch, pairs,
                                                        p.noise_gradient != nullptr || euclidean, euclidean)
                                     : PanelSpace{};
  // Shares of S: cosine's of rows first, which RowNorms writes, then those of the kernel that sums.
  const int row_shares = cosine ? p.batch : 0;
  double* partial =
      arena.take<double>(row_shares + p.features + (int64_t(p.features) + 31) / 32 * ((p.batch + 31) / 32));
  const MergeSpace merge_space = merges ? MergeSpace::take(arena, p.batch, p.features) : MergeSpace{};
  if (workspace == nullptr) return arena.used();

  if (!pairs) {
    const NoiseTable::Params q{p.noises, table, p.batch, p.noise_size};
    launch(NoiseTable{}, q, NoiseTable::blocks(q), 1, NoiseTable::kShared);
  }
  if (cosine) {
    const typename RowNorms<Sample>::Params q{p.samples, p.noises,   inverse,      partial,
                                              p.batch,   p.features, p.noise_size, root};
    launch(RowNorms<Sample>{}, q, p.batch, 1, RowNorms<Sample>::kShared);
  }

  int partials = row_shares;
  if (merges) {
    partials = merge_by(p, p.samples, table, partial, mean * unit, merge_space, launch);
  } else if (sorts) {
    partials = sort_by<Sort<Sample, 1>>(p, p.samples, table, partial, mean * unit, launch);
    if (partials == 0) partials = sort_by<Sort<Sample, 4>>(p, p.samples, table, partial, mean * unit, launch);
    if (partials == 0)
      partials = sort_by<Sort<Sample, 16>>(p, p.samples, table, partial, mean * unit, launch);
  } else if (low_rank) {
    using Kernel = DiversityMoments<Sample>;
    typename Kernel::Params q{p.samples, inverse,
                              table,     cosine ? nullptr : p.sample_gradient,
                              moments,   partial + partials,
                              p.batch,   p.features,
                              columns,   float(4 * mean * unit),
                              true};
    q.resident = Kernel::shared_bytes(q) <= p.shared_limit;
    launch(Kernel{}, q, Kernel::blocks(q), 1, Kernel::shared_bytes(q));
    partials += Kernel::blocks(q);
  }
  for (int first = 0; panels && first < p.batch; first += panel_space.rows) {
    const Panel panel{first, smaller(panel_space.rows, p.batch - first)};
    if (l1) {
      run_panel<Difference::absolute>(p, panel_space, panel, inverse, mean, unit, partial, partials, launch);
    } else {
      run_panel<Difference::square>(p, panel_space, panel, inverse, mean, unit, partial, partials, launch);
    }
  }
  if (by_rows) {
    const typename RowGradients<Sample>::Params q{p.samples,  inverse,           table,
                                                  moments,    p.sample_gradient, p.batch,
                                                  p.features, columns,           float(4 * mean * unit)};
    launch(RowGradients<Sample>{}, q, p.batch, 1, RowGradients<Sample>::kShared);
  }
  const Finish::Params q{partial, p.exponent,   p.noise_gradient, p.sample_gradient, partials,
                         p.batch, p.noise_size, p.features,       mean * unit};
  launch(Finish{}, q, 1, 1, Finish::kShared);
  return arena.used();
}

}  // namespace kegfast::cuda
