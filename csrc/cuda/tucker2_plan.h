// tucker2 on CUDA: which form runs, with which tile, on what workspace.
//
// Free of torch and of the CUDA runtime, like diversity_plan.h: launch(Kernel{}, params, x, y, shared_bytes).
#pragma once

#include "arena.h"
#include "tucker2_kernels.cuh"
#include "tucker2_persistent.cuh"

namespace kegfast::cuda {

// `persistent` wherever it can be, else as `fused`; never taken by itself before it was measured.
enum class Form { automatic, fused, stages, persistent };

struct DeviceLimits {
  size_t shared_bytes;  // that a block may ask for
  int multiprocessors;
  bool bulk_copies;
};

template <class T>
struct Tucker2Problem {
  Image<const T> x;             // (N, C, H, W)
  Image<T> y;                   // (N, K, P, Q)
  Factor<T> first, core, last;  // (R1, C), (R2, R1, kh, kw), (K, R2)
  T* t1;                        // (N, H + 2 ph, W + 2 pw, R1) with its zero border, or null: not kept
  T* t2;                        // (N, P, Q, R2), or null: not kept
  Epilogue<T> epilogue;
  Window window;
  int images;
  Form form;
  DeviceLimits limits;
};

// A calculated model for an H200, until measured entries replace it: time in multiply-adds of one
// multiprocessor, of which mma.sync is taken to do 1.2e12 a second (a third of the tensor cores' peak)
// while 4.8e12 bytes a second come from memory.
struct Estimate {
  static constexpr double kRate = 1.2e12;
  static constexpr double kLaunch = 2.5e-6 * kRate;  // what one more launch costs
  static constexpr double kByte = kRate / 4.8e12;    // what moving one byte costs
  static constexpr double kGather = kRate / 2.8e10;  // loading one element by itself: 16 a cycle
  static constexpr int kMostBlocks = 4;  // of 128 threads that a multiprocessor is expected to hold

  static double time(double blocks, double work, double bytes, size_t shared_bytes,
                     const DeviceLimits& limits) {
    const double on_each = std::ceil(blocks / limits.multiprocessors);
    const double fit = std::floor((limits.shared_bytes + 1024.0) / (double(shared_bytes) + 1024));
    const double together = smaller(on_each, smaller(double(kMostBlocks), larger(fit, 1.0)));
    const double waves = std::ceil(on_each / together);
    const double compute =
        waves * work * larger(together, 2.0);  // a block alone keeps half of the units busy
    const double memory = bytes * kByte;
    return larger(compute, memory) + smaller(compute, memory) / 4;  // they do not overlap perfectly
  }
};

constexpr double multiply_adds(double rows, double columns, double depth) {
  return std::ceil(rows / 32) * 32 * std::ceil(columns / 16) * 16 * std::ceil(depth / 16) * 16;
}

template <class T>
Image<const T> readable(const Image<T>& x) {
  return {x.data, x.image, x.channel, x.row, x.pixel, x.channels, x.height, x.width, x.vectors};
}

template <class T>
Image<T> pixels_image(T* data, int channels, int height, int width) {  // NHWC, dense
  return make_image<T>(data, {int64_t(height) * width * channels, 1, int64_t(width) * channels, channels},
                       channels, height, width);
}

template <class T>
Image<T> kept_t1(const Tucker2Problem<T>& p, T* data) {  // with the core's padding as its border
  return pixels_image<T>(data, p.first.rows, p.x.height + 2 * p.window.padding_h,
                         p.x.width + 2 * p.window.padding_w);
}

template <class T>
Image<T> kept_t2(const Tucker2Problem<T>& p, T* data) {
  return pixels_image<T>(data, p.core.rows, p.y.height, p.y.width);
}

// The fused form's parameters with the tile that the model likes best; `time` infinite where none fits in
// shared memory.
template <class Kernel, class T>
typename Kernel::Params fused_params(const Tucker2Problem<T>& p, double& time) {
  typename Kernel::Params q{p.x, p.y, kept_t1(p, p.t1), kept_t2(p, p.t2), p.first, p.core, p.last, p.window,
                            1,   1,   p.images,         p.epilogue};
  typename Kernel::Params best = q;
  time = INFINITY;
  if (p.t1 != nullptr && (p.window.stride_h != 1 || p.window.stride_w != 1)) return best;
  const double own = double(p.images) * p.y.height * p.y.width * (p.y.data != nullptr ? p.y.channels : 0) +
                     (p.t1 != nullptr ? double(p.images) * q.t1.height * q.t1.width * q.t1.channels : 0) +
                     (p.t2 != nullptr ? double(p.images) * p.y.height * p.y.width * q.t2.channels : 0);
  for (q.tile_h = 1; q.tile_h <= smaller(kRows, p.y.height); ++q.tile_h) {
    // For a height only the widest tile, or one of equal parts of the row, can be best.
    const int widest = smaller(kRows / q.tile_h, p.y.width), parts = (p.y.width + widest - 1) / widest;
    q.tile_w = (p.y.width + parts - 1) / parts;
    const size_t shared_bytes = Kernel::shared_bytes(q);
    if (shared_bytes > p.limits.shared_bytes) continue;
    const double work = multiply_adds(double(q.halo_h()) * q.halo_w(), p.first.rows, p.first.inputs) +
                        multiply_adds(kRows, p.core.rows, double(p.core.inputs) * p.core.taps()) +
                        multiply_adds(kRows, p.last.rows, p.last.inputs);
    // L2 serves about half of the pixels that two tiles share.
    const double blocks = double(Kernel::blocks(q)), halo = blocks * q.halo_h() * q.halo_w();
    const double inputs = (double(p.images) * p.x.height * p.x.width + halo) / 2 * p.x.channels;
    const double now =
        Estimate::time(blocks, work * Kernel::kCost, (inputs + own) * sizeof(T), shared_bytes, p.limits);
    if (now < time) {
      time = now;
      best = q;
    }
  }
  return best;
}

template <class M, int kTiles, class T>
double stage_time(const Tucker2Problem<T>& p, const Factor<T>& factor, double from,
                  double pixels) {  // in, out
  using Kernel = Tucker2Stage<M, kTiles>;
  const double blocks = std::ceil(pixels / kRows) * std::ceil(factor.rows / double(Kernel::kColumnsPerBlock));
  const double work = multiply_adds(kRows, smaller(factor.rows, Kernel::kColumnsPerBlock),
                                    double(factor.inputs) * factor.taps());
  const double bytes = (from * factor.inputs + pixels * factor.rows) * sizeof(T);
  return Estimate::time(blocks, work * Kernel::kCost, bytes, Kernel::kShared, p.limits) + Estimate::kLaunch;
}

template <class M, int kTiles, class T, class Launch>
void launch_stage(const Tucker2Problem<T>& p, const Image<const T>& from, const Image<T>& to,
                  const Factor<T>& factor, const Window& window, const Epilogue<T>& epilogue,
                  Launch&& launch) {
  using Kernel = Tucker2Stage<M, kTiles>;
  const typename Kernel::Params q{from, to, factor, window, p.images * to.height * to.width, epilogue};
  launch(Kernel{}, q, Kernel::blocks_x(q), Kernel::blocks_y(q), Kernel::kShared);
}

// A stage with 64 columns a block, or 128 where the factor is wide and the blocks would be many anyway.
template <class M, class T, class Launch>
void run_stage(const Tucker2Problem<T>& p, const Image<const T>& from, const Image<T>& to,
               const Factor<T>& factor, const Window& window, const Epilogue<T>& epilogue, Launch&& launch) {
  const double pixels = double(p.images) * to.height * to.width;
  const double inputs = double(p.images) * from.height * from.width;
  if (factor.rows > 64 &&
      stage_time<M, 8>(p, factor, inputs, pixels) <= stage_time<M, 4>(p, factor, inputs, pixels)) {
    launch_stage<M, 8>(p, from, to, factor, window, epilogue, launch);
  } else {
    launch_stage<M, 4>(p, from, to, factor, window, epilogue, launch);
  }
}

// Three launches through device memory. t1 gets its border from `first` itself: outside of the image its
// input is 0.
template <class M, class T, class Launch>
void run_stages(const Tucker2Problem<T>& p, T* t1, T* t2, Launch&& launch) {
  const Window& w = p.window;
  const Window pad{1, 1, 1, 1, w.padding_h, w.padding_w, 1, 1}, one{1, 1, 1, 1, 0, 0, 1, 1};
  const Epilogue<T> none{nullptr, false};
  const Window core{w.kernel_h, w.kernel_w, w.stride_h, w.stride_w, 0, 0, w.dilation_h, w.dilation_w};
  const Image<T> z1 = kept_t1(p, t1), z2 = kept_t2(p, t2);
  run_stage<M>(p, p.x, z1, p.first, pad, none, launch);
  run_stage<M>(p, readable(z1), z2, p.core, core, none, launch);
  if (p.y.data != nullptr) run_stage<M>(p, readable(z2), p.y, p.last, one, p.epilogue, launch);
}

// Whether bulk copies take the image: strides that grow outward, each a multiple of the one before.
template <class T>
bool has_boxes(const Image<T>& image) {
  return image.vectors && image.pixel > 0 && image.row > 0 && image.image > 0 &&
         image.row % image.pixel == 0 && image.image % image.row == 0;
}

// The persistent form's parameters with the tile of which there are fewest, or none (tile_h 0) where it
// cannot be: it has 16-bit numbers, channels together, ranks up to 64, halos up to 192 pixels, and keeps
// neither t1 nor t2.
template <class Kernel, class T>
PersistentParams<T> persistent_params(const Tucker2Problem<T>& p) {
  PersistentParams<T> q{{}, {}, p.first,    p.core,    p.last,   p.window,
                        0,  0,  p.y.height, p.y.width, p.images, p.epilogue};
  const int rank = larger(p.first.rows, p.core.rows);
  if (!p.limits.bulk_copies || p.y.data == nullptr || !has_boxes(p.x) || !has_boxes(p.y) || p.t1 != nullptr ||
      p.t2 != nullptr || rank > 64)
    return q;
  double least = INFINITY;
  PersistentParams<T> best = q;
  for (q.tile_h = 1; q.tile_h <= smaller(Kernel::kPixels, p.y.height); ++q.tile_h) {
    const int widest = smaller(Kernel::kPixels / q.tile_h, p.y.width),
              parts = (p.y.width + widest - 1) / widest;
    q.tile_w = (p.y.width + parts - 1) / parts;
    const int64_t halo = int64_t(q.halo_h()) * q.halo_w();
    if (halo > Kernel::kHalo || Kernel::shared_bytes(q) > p.limits.shared_bytes) continue;
    const double work = double(q.tiles()) * Kernel::kHalo + halo;  // all tiles cost the same
    if (work < least) {
      least = work;
      best = q;
    }
  }
  if (least == INFINITY) return best;
  const auto view = [&](const auto& image, int box_h, int box_w) {
    return make_tensor_map({image.data,
                            {image.channels, image.width, image.height, p.images},
                            {image.pixel, image.row, image.image},
                            {box_w, box_h, 1}});
  };
  best.x = view(p.x, best.halo_h(), best.halo_w());
  best.y = view(p.y, best.tile_h, best.tile_w);
  return best;
}

// Whether the persistent form took the call.
template <class T, class Launch>
bool run_persistent(const Tucker2Problem<T>& p, Launch&& launch) {
  if constexpr (sizeof(T) == 2) {
    const int rank = larger(p.first.rows, p.core.rows);
    const auto run = [&](auto kernel) {
      using Kernel = decltype(kernel);
      const PersistentParams<T> q = persistent_params<Kernel>(p);
      if (q.tile_h == 0) return false;
      const size_t bytes = Kernel::shared_bytes(q) + 1024;  // the system keeps a kilobyte for each block
      const int64_t on_each =
          smaller(int64_t(Kernel::kBlocksPerSm), int64_t((p.limits.shared_bytes + 1024) / bytes));
      const int64_t fit = on_each * p.limits.multiprocessors;
      launch(kernel, q, smaller(fit, int64_t(q.tiles())), 1, Kernel::shared_bytes(q));
      return true;
    };
    if (rank <= 16) return run(Tucker2Persistent<T, 16>{});
    if (rank <= 32) return run(Tucker2Persistent<T, 32>{});
    return run(Tucker2Persistent<T, 64>{});
  }
  return false;
}

template <class M>
struct Choice {
  typename Tucker2Fused<M, 4>::Params narrow;
  typename Tucker2Fused<M, 8>::Params wide;
  bool is_wide, stages, packs;
};

// Whether copying the factors that do not lie in vectors once costs less than that every block gathers them,
// or up to `rows` of their rows.
template <class T>
bool packs(const Tucker2Problem<T>& p, double blocks, double rows = INFINITY) {
  double gathered = 0;
  for (const Factor<T>* factor : {&p.first, &p.core, &p.last})
    gathered += factor->vectors ? 0 : factor->elements() * smaller(1.0, rows / factor->rows);
  return std::ceil(blocks / p.limits.multiprocessors) * gathered * Estimate::kGather > Estimate::kLaunch;
}

template <class M, class T>
Choice<M> choose(const Tucker2Problem<T>& p) {
  const double pixels = double(p.images) * p.y.height * p.y.width;
  const double padded =
      double(p.images) * (p.x.height + 2 * p.window.padding_h) * (p.x.width + 2 * p.window.padding_w);
  double narrow = INFINITY, wide = INFINITY;
  Choice<M> choice{};
  // Up to rank 64 the narrow form wastes no column; above, the wide one reads x once for up to 128 of them.
  if (larger(p.first.rows, p.core.rows) > 64) choice.wide = fused_params<Tucker2Fused<M, 8>>(p, wide);
  choice.is_wide = wide < INFINITY;
  if (!choice.is_wide) choice.narrow = fused_params<Tucker2Fused<M, 4>>(p, narrow);
  const double fused = smaller(wide, narrow);
  choice.stages = fused == INFINITY || p.form == Form::stages;
  if (!choice.stages && p.form == Form::automatic) {
    const double stages = stage_time<M, 4>(p, p.first, padded, padded) +
                          stage_time<M, 4>(p, p.core, padded, pixels) +
                          (p.y.data == nullptr ? 0 : stage_time<M, 4>(p, p.last, pixels, pixels));
    choice.stages = stages < fused + Estimate::kLaunch;
  }
  if (choice.stages) {
    choice.packs = packs(p, std::ceil(padded / kRows), Tucker2Stage<M, 4>::kColumnsPerBlock);
  } else {
    choice.packs = packs(p, double(choice.is_wide ? Tucker2Fused<M, 8>::blocks(choice.wide)
                                                  : Tucker2Fused<M, 4>::blocks(choice.narrow)));
  }
  return choice;
}

template <class Kernel, class T, class Launch>
void launch_fused(typename Kernel::Params q, const Tucker2Problem<T>& p, Launch&& launch) {
  q.first = p.first, q.core = p.core, q.last = p.last;
  launch(Kernel{}, q, Kernel::blocks(q), 1, Kernel::shared_bytes(q));
}

// y, and t1 and t2 where asked. workspace(bytes) gives the call's device memory; called once, and only where
// some is needed.
template <class M, class T, class Launch, class Workspace>
void tucker2(Tucker2Problem<T> p, Workspace&& workspace, Launch&& launch) {
  if (p.form == Form::persistent && run_persistent(p, launch)) return;
  const Choice<M> choice = choose<M>(p);
  typename Tucker2Pack<T>::Params pack{{p.first, p.core, p.last}, {}};
  const auto take = [&](Arena& arena, T*& t1, T*& t2) {
    for (int i = 0; choice.packs && i < 3; ++i) {
      if (!pack.factors[i].vectors) pack.packed[i] = arena.take<T>(Tucker2Pack<T>::size(pack.factors[i]));
    }
    if (!choice.stages) return;
    const Image<T> z1 = kept_t1(p, t1), z2 = kept_t2(p, t2);
    if (t1 == nullptr) t1 = arena.take<T>(p.images * z1.image);
    if (t2 == nullptr) t2 = arena.take<T>(p.images * z2.image);
  };
  T *t1 = p.t1, *t2 = p.t2;
  Arena counting(nullptr);
  take(counting, t1, t2);
  if (counting.used() > 0) {
    Arena arena(workspace(counting.used()));
    t1 = p.t1, t2 = p.t2;
    take(arena, t1, t2);
  }
  if (choice.packs) {
    launch(Tucker2Pack<T>{}, pack, Tucker2Pack<T>::blocks(pack), 3, size_t(0));
    Factor<T>* const factors[3] = {&p.first, &p.core, &p.last};
    for (int i = 0; i < 3; ++i) {
      if (pack.packed[i] != nullptr) *factors[i] = Tucker2Pack<T>::packed(*factors[i], pack.packed[i]);
    }
  }
  if (choice.stages) {
    run_stages<M>(p, t1, t2, launch);
  } else if (choice.is_wide) {
    launch_fused<Tucker2Fused<M, 8>>(choice.wide, p, launch);
  } else {
    launch_fused<Tucker2Fused<M, 4>>(choice.narrow, p, launch);
  }
}

}  // namespace kegfast::cuda
