// Kernels of diversity, compiled once per instruction set: the entry points of csrc/diversity.h.
#include "cpu/diversity_distances.inl"
#include "cpu/diversity_low_rank.inl"
#include "cpu/diversity_pairs.inl"
#include "cpu/diversity_scan.inl"

namespace kegfast::KEGFAST_ISA {

int64_t diversity_lanes() {
  return L;
}

int64_t diversity_workspace(int64_t batch) {
  // A block of tiles, one of sums, the keys, and the runs of ties (at most one for every two positions of a
  // lane).
  return (block_tiles(batch) + 1) * batch * kVectorBytes + padded_batch(batch) * kVectorBytes +
         (batch / 2 + 1) * L * int64_t{sizeof(Run)};
}

void diversity_l1_sort(const DiversityParams& p, int64_t first, int64_t last, void* workspace,
                       double* values) {
  if (p.chunks == 1)
    l1_sort_tiles<1>(p, first, last, workspace, values);
  else if (p.chunks == 2)
    l1_sort_tiles<2>(p, first, last, workspace, values);
  else if (p.chunks == 4)
    l1_sort_tiles<4>(p, first, last, workspace, values);
  else
    l1_sort_tiles<8>(p, first, last, workspace, values);
}

void diversity_l1_pairs(const DiversityParams& p, int64_t first, int64_t last, void* workspace,
                        double* values) {
  if (p.element == Element::f64)
    l1_pair_tiles_plain<double>(p, first, last, workspace, values);
  else
    l1_pair_tiles(p, first, last, workspace, values);
}

void diversity_square_pairs(const DiversityParams& p, int64_t first, int64_t last, void* workspace,
                            double* values) {
  if (p.element == Element::f64)
    square_pair_tiles<double>(p, first, last, workspace, values);
  else
    square_pair_tiles<float>(p, first, last, workspace, values);
}

template <class T>
static void low_rank(const DiversityParams& p, int64_t first, int64_t last, void* workspace, double* values) {
  const int columns = p.low_rank_tail + 1;
  if (columns <= 4)
    low_rank_tiles<T, 4>(p, first, last, workspace, values);
  else if (columns <= 8)
    low_rank_tiles<T, 8>(p, first, last, workspace, values);
  else if (columns <= 12)
    low_rank_tiles<T, 12>(p, first, last, workspace, values);
  else
    low_rank_tiles<T, 16>(p, first, last, workspace, values);
}

void diversity_low_rank(const DiversityParams& p, int64_t first, int64_t last, void* workspace,
                        double* values) {
  if (p.element == Element::f64)
    low_rank<double>(p, first, last, workspace, values);
  else
    low_rank<float>(p, first, last, workspace, values);
}

double diversity_weights(const float* z, int64_t batch, int64_t width, bool root, float* weights) {
  return fill_weights(z, batch, width, root, weights);
}

void diversity_fix_weights(float* weights, int64_t batch, double unit, int32_t* offsets) {
  fix_weights(weights, batch, unit, offsets);
}

double diversity_magnitude(const DiversityParams& p, int64_t first, int64_t last) {
  return p.element == Element::f64 ? magnitude<double>(p, first, last) : magnitude<float>(p, first, last);
}

template <class T>
static void distances_of(const DiversityParams& p, int64_t first, int64_t step, bool squared, double unit,
                         double* distances) {
  if (squared)
    distance_rows<T, true>(p, first, step, unit, distances);
  else
    distance_rows<T, false>(p, first, step, unit, distances);
}

void diversity_distances(const DiversityParams& p, int64_t first, int64_t step, bool squared, double unit,
                         double* distances) {
  if (p.element == Element::f64)
    distances_of<double>(p, first, step, squared, unit, distances);
  else
    distances_of<float>(p, first, step, squared, unit, distances);
}

// Rows a vector at a time: f(feature, x) for every vector of row i.
template <class T, class F>
static void each_vector(const DiversityParams& p, int64_t row, F f) {
  for (int64_t feature = 0; feature < p.features; feature += lanes<T>)
    f(feature, load_row<T>(p, row, feature));
}

template <class T>
static double square_norm(const DiversityParams& p, int64_t row) {
  double norm = 0;
  each_vector<T>(p, row, [&](int64_t, Vec<T> x) {
    for (int l = 0; l < lanes<T>; ++l) norm += static_cast<double>(x[l]) * x[l];
  });
  return norm;
}

void diversity_square_norms(const DiversityParams& p, int64_t first, int64_t last, double* norms) {
  for (int64_t i = first; i < last; ++i)
    norms[i] = p.element == Element::f64 ? square_norm<double>(p, i) : square_norm<float>(p, i);
}

// What T cannot hold, at its ends: the cosine of tiny samples is that steep.
template <class T>
static T saturated(double x) {
  const double most = sizeof(T) == 8 ? __DBL_MAX__ : double{__FLT_MAX__};
  return static_cast<T>(x > most ? most : x < -most ? -most : x);
}

template <class T>
static void project_row(const DiversityParams& p, int64_t row) {
  T* g = static_cast<T*>(p.gradient) + row * p.features;
  double along = 0;
  each_vector<T>(p, row, [&](int64_t feature, Vec<T> y) {
    const int64_t left = p.features - feature;
    for (int l = 0; l < lanes<T> && l < left; ++l) along += static_cast<double>(y[l]) * g[feature + l];
  });
  const double scale = p.row_scale[row], unit = p.row_unit ? p.row_unit[row] : 1;
  each_vector<T>(p, row, [&](int64_t feature, Vec<T> y) {
    const int64_t left = p.features - feature;
    for (int l = 0; l < lanes<T> && l < left; ++l)
      g[feature + l] = saturated<T>((g[feature + l] - along * y[l]) * scale * unit);
  });
}

void diversity_project(const DiversityParams& p, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i)
    if (p.element == Element::f64)
      project_row<double>(p, i);
    else
      project_row<float>(p, i);
}

}  // namespace kegfast::KEGFAST_ISA
