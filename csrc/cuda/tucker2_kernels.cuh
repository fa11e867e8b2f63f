// tucker2 on CUDA: one fused kernel, one kernel per stage, one to pack factors.
//
// Fused: a block takes a tile of up to 64 output pixels of one image. (1) first: the tile's halo pixels, 64
// at a time, x and the factor streaming through three stages of cp.async in 128-byte chunks of K; t1 stays in
// shared memory, 0 outside of the image, which is the core's padding. (2) core: a tap is the same rows of t1
// shifted, so ldmatrix reads at a table of row offsets, one entry per step of K; only the factor streams, at
// any rank. (3) last: t2 is A, K goes in columns of 64 or 128; bias, ReLU, 16-byte stores. x is read once per
// halo pixel, y written once; t1 and t2 never reach device memory, unless training asks to keep them: then
// each block also writes its own part of both. The gradient of x is the same kernel on transposed factors.
//
// Factors are read where the user's tensors lie: 16 bytes at a time where a tap's inputs lie together (1x1
// factors; a core in channels_last), else element by element. Where that would cost more than a launch (large
// calls on a core in the plain layout, transposed factors) Tucker2Pack copies them once beforehand.
//
// Stage: one of the three as an implicit product over all output pixels, for the shapes that the fused form
// does not fit (shared memory) or does not fill (few images): 64 pixels x 64 or 128 columns a block.
//
// Where bandwidth decides, fused over unfused is 1 + 2R/C: 2.0, 1.5, 1.25 at C/2, C/4, C/8. Counted in
// sm_90's code (benchmarks/cuda_counts.py), bf16, batch 128, C / 4: 18.2 thousand warp instructions a block
// of 64 pixels at 64@56, 26.0 at 128@28, 41.8 at 256@14, issued by an H200 in 123, 50 and 23 us where
// bandwidth takes 21, 11 and 5: instructions bound it. A chunk of K is 351 (first), 271 (core) or 279 (last)
// of a warp's. Not yet measured on a device.
#pragma once

#include "tucker2_image.cuh"

namespace kegfast::cuda {

// ---- factors

// Copies factors to [row][tap][input], inputs padded with zeros to whole steps.
template <class T>
struct Tucker2Pack {
  static constexpr int kThreads = 256, kBlocksPerSm = 4;
  struct Params {
    Factor<T> factors[3];
    T* packed[3];  // null: stays where it is
  };
  static int64_t blocks(const Params& p) {
    int64_t most = 0;
    for (int i = 0; i < 3; ++i) {
      if (p.packed[i] != nullptr) most = larger<int64_t>(most, size(p.factors[i]));
    }
    return (most + kThreads - 1) / kThreads;
  }
  KEGFAST_ANYWHERE static int64_t size(const Factor<T>& f) {
    return int64_t(f.rows) * f.row_bytes() / int(sizeof(T));
  }
  static Factor<T> packed(const Factor<T>& f, const T* data) {
    const int64_t per_tap = f.tap_bytes() / int64_t(sizeof(T)), per_row = per_tap * f.taps();
    return {data, per_row, 1, per_tap * f.kernel_w, per_tap, f.rows, f.inputs, f.kernel_h, f.kernel_w, true};
  }

  KEGFAST_DEVICE static void run(const Params& p) {
    const Factor<T>& f = p.factors[block().y];
    const int64_t i = int64_t(block().x) * kThreads + thread();
    if (p.packed[block().y] == nullptr || i >= size(f)) return;
    const int per_tap = f.tap_bytes() / int(sizeof(T)), per_row = f.row_bytes() / int(sizeof(T));
    const int input = int(i % per_tap), tap = int(i % per_row) / per_tap;
    T value{};
    if (input < f.inputs) {
      value = f.data[i / per_row * f.row + input * f.input + tap / f.kernel_w * f.tap_h +
                     tap % f.kernel_w * f.tap_w];
    }
    p.packed[block().y][i] = value;
  }
};

// ---- one stage over all pixels

template <class M, int kTiles>
struct Tucker2Stage {
  using T = typename M::T;
  static constexpr double kCost = M::kCost;
  static constexpr int kThreads = kTuckerThreads, kBlocksPerSm = kTiles > 4 ? 2 : (M::kSplit ? 3 : 4);
  static constexpr int kColumnsPerBlock = 16 * kTiles;
  struct Params {
    Image<const T> x;
    Image<T> y;
    Factor<T> factor;
    Window window;
    int pixels;  // images * y.height * y.width
    Epilogue<T> epilogue;
  };
  static constexpr size_t kShared = kStages * stage_bytes(kTiles) + kRows * sizeof(int64_t);
  static int blocks_x(const Params& p) { return (p.pixels - 1) / kRows + 1; }
  static int blocks_y(const Params& p) { return (p.factor.rows + kColumnsPerBlock - 1) / kColumnsPerBlock; }

  KEGFAST_DEVICE static void run(const Params& p) {
    const int first_pixel = block().x * kRows, column = block().y * kColumnsPerBlock;
    const Window& w = p.window;
    int64_t* places = reinterpret_cast<int64_t*>(shared() + kStages * stage_bytes(kTiles));
    const auto pixel = [&](int row, const auto& image, int step_y, int step_x, int border_y, int border_x) {
      const int at = first_pixel + row, line = at / p.y.width;
      return at < p.pixels ? image.pixel_at(line / p.y.height, line % p.y.height * step_y - border_y,
                                            at % p.y.width * step_x - border_x)
                           : Pixel::nowhere();
    };
    if (thread() < kRows) {
      const Pixel to = pixel(thread(), p.y, 1, 1, 0, 0);
      places[thread()] = to.y < 0 ? -1 : to.at;
    }
    const auto find = [&](int row) {
      return pixel(row, p.x, w.stride_h, w.stride_w, w.padding_h, w.padding_w);
    };
    float acc[2][kTiles][4];
    if (p.factor.taps() == 1) {
      const PixelLoad<T, false, decltype(find)> load(p.x, p.factor.tap_bytes(), w, kRows, find);
      product<M>(acc, p.factor, shared(), column, true, Streamed<kTiles, decltype(load)>{load});
    } else {
      const PixelLoad<T, true, decltype(find)> load(p.x, p.factor.tap_bytes(), w, kRows, find);
      product<M>(acc, p.factor, shared(), column, true, Streamed<kTiles, decltype(load)>{load});
    }
    store_tile<T, kTiles>(p.y, acc, shared(), column, p.epilogue, places);
  }
};

// ---- all three in one

template <class M, int kTiles>
struct Tucker2Fused {
  using T = typename M::T;
  static constexpr double kCost = M::kCost;
  static constexpr int kThreads = kTuckerThreads, kBlocksPerSm = kTiles > 4 ? 2 : (M::kSplit ? 3 : 4);
  static constexpr int kColumnsPerBlock = 16 * kTiles;
  struct Params {
    Image<const T> x;
    Image<T> y;       // its data null: stop at t2
    Image<T> t1, t2;  // their data null: not kept. t1 with its border; kept at stride 1 only
    Factor<T> first, core, last;
    Window window;
    int tile_h, tile_w;  // output pixels of a block, at most kRows
    int images;
    Epilogue<T> epilogue;

    KEGFAST_ANYWHERE int halo_h() const { return window.halo_h(tile_h); }
    KEGFAST_ANYWHERE int halo_w() const { return window.halo_w(tile_w); }
    KEGFAST_ANYWHERE int tiles_y() const { return (y.height + tile_h - 1) / tile_h; }
    KEGFAST_ANYWHERE int tiles_x() const { return (y.width + tile_w - 1) / tile_w; }
    KEGFAST_ANYWHERE int t1_pitch() const { return core.tap_bytes() + 16; }
    KEGFAST_ANYWHERE int t2_pitch() const { return last.row_bytes() + 16; }
    KEGFAST_ANYWHERE int core_steps() const { return core.row_bytes() / kStepBytes; }
    // Whole chunks of them: a chunk's offsets are loaded at once.
    KEGFAST_ANYWHERE int core_offsets() const { return core.chunks() * kChunkSteps; }
  };
  static size_t shared_bytes(const Params& p) {
    return kStages * stage_bytes(kTiles) + size_t(p.halo_h()) * p.halo_w() * p.t1_pitch() +
           size_t(kRows) * p.t2_pitch() + kRows * sizeof(int64_t) + size_t(p.core_offsets()) * sizeof(int);
  }
  static int64_t blocks(const Params& p) { return int64_t(p.tiles_y()) * p.tiles_x() * p.images; }

  struct Tile {
    int64_t image;
    int y, x;  // of its first output pixel
  };

  // The halo's pixels up to where the next tile begins; the last tiles' to the end.
  KEGFAST_DEVICE static void keep_t1(const Params& p, const Tile& tile, const char* t1) {
    const int own_h = tile.y + p.tile_h < p.y.height ? p.tile_h : p.t1.height - tile.y;
    const int own_w = tile.x + p.tile_w < p.y.width ? p.tile_w : p.t1.width - tile.x;
    const int halo_w = p.halo_w();
    store_rows(p.t1, t1, p.t1_pitch(), p.halo_h() * halo_w, 0, p.t1.channels, [&](int row) -> int64_t {
      const int y = row / halo_w, x = row % halo_w;
      return y < own_h && x < own_w
                 ? tile.image * p.t1.image + (tile.y + y) * p.t1.row + (tile.x + x) * p.t1.pixel
                 : -1;
    });
  }

  KEGFAST_DEVICE static int64_t pixel_of(const Params& p, const Tile& tile, const Image<T>& to, int row) {
    const int y = tile.y + row / p.tile_w, x = tile.x + row % p.tile_w;
    if (row >= p.tile_h * p.tile_w || y >= to.height || x >= to.width) return -1;
    return tile.image * to.image + y * to.row + x * to.pixel;
  }

  KEGFAST_DEVICE static void run(const Params& p) {
    char* stages = shared();
    const int halo_w = p.halo_w(), halo = p.halo_h() * halo_w, tiles = p.tiles_y() * p.tiles_x();
    char* t1 = stages + kStages * stage_bytes(kTiles);
    char* t2 = t1 + halo * p.t1_pitch();
    int64_t* places = reinterpret_cast<int64_t*>(t2 + kRows * p.t2_pitch());  // of the tile's pixels in y
    int* offsets = reinterpret_cast<int*>(places + kRows);
    const int at = block().x % tiles;
    const Tile tile{block().x / tiles, at / p.tiles_x() * p.tile_h, at % p.tiles_x() * p.tile_w};
    const Place<kTiles> place;
    float acc[2][kTiles][4];

    const int tap_steps = p.core.tap_bytes() / kStepBytes;
    for (int s = thread(); s < p.core_offsets(); s += kThreads) {
      const int tap = s / tap_steps, ky = tap / p.window.kernel_w, kx = tap % p.window.kernel_w;
      offsets[s] = s < p.core_steps()
                       ? (ky * p.window.dilation_h * halo_w + kx * p.window.dilation_w) * p.t1_pitch() +
                             s % tap_steps * kStepBytes
                       : 0;
    }

    if (thread() < kRows) places[thread()] = pixel_of(p, tile, p.y, thread());

    const int y0 = tile.y * p.window.stride_h - p.window.padding_h,
              x0 = tile.x * p.window.stride_w - p.window.padding_w;
    KEGFAST_ROLLED
    for (int first_row = 0; first_row < halo; first_row += kRows) {
      const auto find = [&](int row) {
        const int pixel = first_row + row;
        return pixel < halo ? p.x.pixel_at(tile.image, y0 + pixel / halo_w, x0 + pixel % halo_w)
                            : Pixel::nowhere();
      };
      const PixelLoad<T, false, decltype(find)> load(p.x, p.first.row_bytes(), p.window, halo - first_row,
                                                     find);
      KEGFAST_ROLLED
      for (int column = 0; column < p.first.rows; column += kColumnsPerBlock) {
        product<M>(acc, p.first, stages, column, first_row + place.row < halo,
                   Streamed<kTiles, decltype(load)>{load});
        keep_tile<T>(t1, p.t1_pitch(), halo, acc, first_row, column, p.first.rows,
                     p.core.tap_bytes() / int(sizeof(T)));
      }
    }
    if (p.t1.data != nullptr) {
      barrier();
      keep_t1(p, tile, t1);
    }

    // This lane's rows of t1; pixels past the tile's end read row 0, nobody reads their results.
    const char* t1_rows[2];
    KEGFAST_UNROLL
    for (int m = 0; m < 2; ++m) {
      const int pixel = place.a_row(m) < p.tile_h * p.tile_w ? place.a_row(m) : 0;
      const int row = pixel / p.tile_w * p.window.stride_h * halo_w + pixel % p.tile_w * p.window.stride_w;
      t1_rows[m] = t1 + row * p.t1_pitch() + place.a_byte();
    }
    const auto shifted = [&](int chunk, int step) { return offsets[chunk * kChunkSteps + step]; };
    KEGFAST_ROLLED
    for (int column = 0; column < p.core.rows; column += kColumnsPerBlock) {
      product<M>(acc, p.core, stages, column, true,
                 Resident<decltype(shifted)>{{t1_rows[0], t1_rows[1]}, shifted});
      keep_tile<T>(t2, p.t2_pitch(), kRows, acc, 0, column, p.core.rows, p.last.row_bytes() / int(sizeof(T)));
    }
    if (p.t2.data != nullptr) {
      barrier();
      store_rows(p.t2, t2, p.t2_pitch(), kRows, 0, p.t2.channels,
                 [&](int row) { return pixel_of(p, tile, p.t2, row); });
    }
    if (p.y.data == nullptr) return;

    const char* const t2_rows[2] = {t2 + place.a_row(0) * p.t2_pitch() + place.a_byte(),
                                    t2 + place.a_row(1) * p.t2_pitch() + place.a_byte()};
    const auto along = [](int chunk, int step) { return chunk * kChunkBytes + step * kStepBytes; };
    KEGFAST_ROLLED
    for (int column = 0; column < p.last.rows; column += kColumnsPerBlock) {
      product<M>(acc, p.last, stages, column, true,
                 Resident<decltype(along)>{{t2_rows[0], t2_rows[1]}, along});
      store_tile<T, kTiles>(p.y, acc, stages, column, p.epilogue, places);
    }
  }
};

}  // namespace kegfast::cuda
