// tucker2 on CUDA: y = last(core(first(x))) + bias, ReLU. One fused kernel, one kernel per stage, one to pack
// the factors.
//
// Fused: a block takes a tile of up to 64 output pixels of one image. (1) first: the tile's halo pixels, 64
// at a time, x and the factor streaming through three stages of cp.async in 128-byte chunks of K; t1 stays in
// shared memory, 0 outside of the image, which is the core's padding. (2) core: a tap is the same rows of t1
// shifted, so ldmatrix reads at a table of row offsets, one entry per step of K; only the factor streams, at
// any rank. (3) last: t2 is A, K goes in columns of 64 or 128; bias, ReLU, 16-byte stores. x is read once per
// halo pixel, y written once; t1 and t2 never reach device memory.
//
// Stage: one of the three as an implicit product over all output pixels, for training, which keeps t1 and t2
// anyway, and for the shapes that the fused form does not fit (shared memory) or does not fill (few images):
// 64 pixels x 64 or 128 columns a block.
//
// Bound (calculated, not yet measured on a device): where bandwidth decides, fused over unfused is 1 +
// 2R/C: 2.0, 1.5, 1.25 at C/2, C/4, C/8. mma.sync gives about 60 % of an H200's wgmma peak; 12 ldmatrix feed
// 16 to 32 mma, so the tensor pipe stays the limit.
#pragma once

#include "tucker2_image.cuh"

namespace kegfast::cuda {

constexpr int kTuckerThreads = 128;

struct Window {
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

// ---- factors
// -----------------------------------------------------------------------------------------------------------------------

// A factor as (rows, inputs, kernel_h, kernel_w) in any strides, negative ones too: a transposed or flipped
// factor is another view.
template <class T>
struct Factor {
  const T* data;
  int64_t row, input, tap_h, tap_w;
  int rows, inputs, kernel_h, kernel_w;

  // Bytes of one tap's inputs, padded to whole steps.
  KEGFAST_ANYWHERE int tap_bytes() const {
    return int((inputs * sizeof(T) + kStepBytes - 1) / kStepBytes * kStepBytes);
  }
  KEGFAST_ANYWHERE int row_bytes() const { return tap_bytes() * kernel_h * kernel_w; }
  KEGFAST_ANYWHERE int64_t bytes() const { return int64_t(rows) * row_bytes(); }
};

// [row][tap][input], inputs padded with zeros.
template <class T>
struct Tucker2Pack {
  static constexpr int kThreads = 256, kBlocksPerSm = 4;
  struct Params {
    Factor<T> factors[3];
    T* packed[3];
  };
  static int64_t blocks(const Params& p) {
    int64_t most = 0;
    for (const Factor<T>& f : p.factors) most = larger<int64_t>(most, f.bytes() / sizeof(T));
    return (most + kThreads - 1) / kThreads;
  }

  KEGFAST_DEVICE static void run(const Params& p) {
    const Factor<T>& f = p.factors[block().y];
    const int64_t i = int64_t(block().x) * kThreads + thread();
    if (i >= f.bytes() / int64_t(sizeof(T))) return;
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
// -----------------------------------------------------------------------------------------------------

template <class M, int kTiles>
struct Tucker2Stage {
  using T = typename M::T;
  static constexpr double kCost = M::kCost;
  static constexpr int kThreads = kTuckerThreads, kBlocksPerSm = 2;
  static constexpr int kColumnsPerBlock = 16 * kTiles;
  struct Params {
    Image<const T> x;
    Image<T> y;
    PackedFactor factor;
    Window window;
    int tap_bytes;
    int pixels;  // images * y.height * y.width
    Epilogue<T> epilogue;
  };
  static constexpr size_t kStageBytes = size_t(kRows + kColumnsPerBlock) * kPitch;
  static constexpr size_t kShared = kStages * kStageBytes;
  static_assert(kShared >= kRows * (kColumnsPerBlock * sizeof(T) + 16));
  static int blocks_x(const Params& p) { return (p.pixels - 1) / kRows + 1; }
  static int blocks_y(const Params& p) { return (p.factor.rows + kColumnsPerBlock - 1) / kColumnsPerBlock; }

  KEGFAST_DEVICE static void load(const Params& p, char* stage, int first_pixel, int chunk) {
    KEGFAST_UNROLL
    for (int i = thread(); i < kRows * kPieces; i += kThreads) {
      int row, piece;
      piece_of(p.x, i, row, piece);
      const int byte = chunk * kChunkBytes + piece * 16, tap = byte / p.tap_bytes;
      const int pixel = first_pixel + row, line = pixel / p.y.width, n = line / p.y.height;
      const int oy = line % p.y.height, ox = pixel % p.y.width;
      const Window& w = p.window;
      const int y = oy * w.stride_h + tap / w.kernel_w * w.dilation_h - w.padding_h;
      const int x = ox * w.stride_w + tap % w.kernel_w * w.dilation_w - w.padding_w;
      const bool inside = pixel < p.pixels && byte < p.factor.row_bytes;
      load_piece(p.x, stage + row * kPitch + piece * 16, n, inside ? y : -1, x,
                 (byte - tap * p.tap_bytes) / int(sizeof(T)));
    }
  }

  KEGFAST_DEVICE static void run(const Params& p) {
    char* stages = shared();
    const int first_pixel = block().x * kRows;
    const int first_column = block().y * kColumnsPerBlock;
    const Place<kTiles> place;
    const int columns = p.factor.rows - first_column - place.column;
    float acc[2][kTiles][4];
    clear(acc);
    pipeline(
        p.factor.chunks(),
        [&](int chunk, int s) {
          char* stage = stages + s * kStageBytes;
          load(p, stage, first_pixel, chunk);
          load_factor<kTiles, kThreads>(p.factor, stage + kRows * kPitch, first_column, chunk);
        },
        [&](int chunk, int s) {
          const char* stage = stages + s * kStageBytes;
          const char* const a[2] = {stage + place.a_row(0) * kPitch + place.a_byte(),
                                    stage + place.a_row(1) * kPitch + place.a_byte()};
          multiply_chunk<M>(
              acc, a, [](int step) { return step * kStepBytes; }, place.b(stage + kRows * kPitch),
              p.factor.steps(chunk), columns);
        });
    store_tile<T, kTiles, kThreads>(p.y, acc, stages, first_column, p.epilogue, [&](int row) -> int64_t {
      const int pixel = first_pixel + row, line = pixel / p.y.width;
      if (pixel >= p.pixels) return -1;
      return int64_t(line / p.y.height) * p.y.image + line % p.y.height * p.y.row +
             pixel % p.y.width * p.y.pixel;
    });
  }
};

// ---- all three in one
// --------------------------------------------------------------------------------------------------------------

template <class M, int kTiles>
struct Tucker2Fused {
  using T = typename M::T;
  static constexpr double kCost = M::kCost;
  static constexpr int kThreads = kTuckerThreads, kBlocksPerSm = 2;
  static constexpr int kColumnsPerBlock = 16 * kTiles;
  struct Params {
    Image<const T> x;
    Image<T> y;
    PackedFactor first, core, last;
    Window window;
    int core_tap_bytes;  // R1 padded
    int tile_h, tile_w;  // output pixels of a block, at most kRows
    int images;
    Epilogue<T> epilogue;

    KEGFAST_ANYWHERE int halo_h() const {
      return (tile_h - 1) * window.stride_h + (window.kernel_h - 1) * window.dilation_h + 1;
    }
    KEGFAST_ANYWHERE int halo_w() const {
      return (tile_w - 1) * window.stride_w + (window.kernel_w - 1) * window.dilation_w + 1;
    }
    KEGFAST_ANYWHERE int tiles_y() const { return (y.height + tile_h - 1) / tile_h; }
    KEGFAST_ANYWHERE int tiles_x() const { return (y.width + tile_w - 1) / tile_w; }
    KEGFAST_ANYWHERE int t1_pitch() const { return core_tap_bytes + 16; }
    KEGFAST_ANYWHERE int t2_pitch() const { return last.row_bytes + 16; }
    KEGFAST_ANYWHERE int core_steps() const { return core.row_bytes / kStepBytes; }
  };
  static constexpr size_t kStageBytes = size_t(kRows + kColumnsPerBlock) * kPitch;
  static_assert(kStages * kStageBytes >= kRows * (kColumnsPerBlock * sizeof(T) + 16));
  static size_t shared_bytes(const Params& p) {
    return kStages * kStageBytes + size_t(p.halo_h()) * p.halo_w() * p.t1_pitch() +
           size_t(kRows) * p.t2_pitch() + size_t(p.core_steps()) * sizeof(int);
  }
  static int64_t blocks(const Params& p) { return int64_t(p.tiles_y()) * p.tiles_x() * p.images; }

  // Stage 1 for halo pixels first_row .. + 64 of the tile at (y0, x0) of the padded image.
  KEGFAST_DEVICE static void load_halo(const Params& p, char* stage, int first_row, int64_t n, int y0, int x0,
                                       int chunk) {
    const int halo_w = p.halo_w(), count = p.halo_h() * halo_w;
    KEGFAST_UNROLL
    for (int i = thread(); i < kRows * kPieces; i += kThreads) {
      int row, piece;
      piece_of(p.x, i, row, piece);
      const int pixel = first_row + row;
      load_piece(p.x, stage + row * kPitch + piece * 16, n, pixel < count ? y0 + pixel / halo_w : -1,
                 x0 + pixel % halo_w, (chunk * kChunkBytes + piece * 16) / int(sizeof(T)));
    }
  }

  KEGFAST_DEVICE static void run(const Params& p) {
    char* stages = shared();
    const int halo_w = p.halo_w(), halo = p.halo_h() * halo_w;
    char* t1 = stages + kStages * kStageBytes;
    char* t2 = t1 + halo * p.t1_pitch();
    int* offsets = reinterpret_cast<int*>(t2 + kRows * p.t2_pitch());
    const int tile = block().x % (p.tiles_y() * p.tiles_x());
    const int64_t n = block().x / (p.tiles_y() * p.tiles_x());
    const int oy0 = tile / p.tiles_x() * p.tile_h, ox0 = tile % p.tiles_x() * p.tile_w;
    const int y0 = oy0 * p.window.stride_h - p.window.padding_h,
              x0 = ox0 * p.window.stride_w - p.window.padding_w;
    const Place<kTiles> place;
    float acc[2][kTiles][4];
    const auto along = [](int step) { return step * kStepBytes; };

    const int tap_steps = p.core_tap_bytes / kStepBytes;
    for (int s = thread(); s < p.core_steps(); s += kThreads) {
      const int tap = s / tap_steps, ky = tap / p.window.kernel_w, kx = tap % p.window.kernel_w;
      offsets[s] = (ky * p.window.dilation_h * halo_w + kx * p.window.dilation_w) * p.t1_pitch() +
                   s % tap_steps * kStepBytes;
    }

    KEGFAST_ROLLED
    for (int first_row = 0; first_row < halo; first_row += kRows) {
      KEGFAST_ROLLED
      for (int column = 0; column < p.first.rows; column += kColumnsPerBlock) {
        clear(acc);
        pipeline(
            p.first.chunks(),
            [&](int chunk, int s) {
              char* stage = stages + s * kStageBytes;
              load_halo(p, stage, first_row, n, y0, x0, chunk);
              load_factor<kTiles, kThreads>(p.first, stage + kRows * kPitch, column, chunk);
            },
            [&](int chunk, int s) {
              const char* stage = stages + s * kStageBytes;
              const char* const a[2] = {stage + place.a_row(0) * kPitch + place.a_byte(),
                                        stage + place.a_row(1) * kPitch + place.a_byte()};
              const int columns = first_row + place.row < halo ? p.first.rows - column - place.column : 0;
              multiply_chunk<M>(acc, a, along, place.b(stage + kRows * kPitch), p.first.steps(chunk),
                                columns);
            });
        keep_tile<T>(t1, p.t1_pitch(), halo, acc, first_row, column, p.core_tap_bytes / int(sizeof(T)));
      }
    }

    const char*
        rows[2];  // this lane's rows of t1; pixels past the tile's end read row 0, nobody reads their results
    KEGFAST_UNROLL
    for (int m = 0; m < 2; ++m) {
      const int pixel = place.a_row(m) < p.tile_h * p.tile_w ? place.a_row(m) : 0;
      const int row = pixel / p.tile_w * p.window.stride_h * halo_w + pixel % p.tile_w * p.window.stride_w;
      rows[m] = t1 + row * p.t1_pitch() + place.a_byte();
    }
    KEGFAST_ROLLED
    for (int column = 0; column < p.core.rows; column += kColumnsPerBlock) {
      clear(acc);
      pipeline(
          p.core.chunks(),
          [&](int chunk, int s) {
            load_factor<kTiles, kThreads>(p.core, stages + s * kStageBytes, column, chunk);
          },
          [&](int chunk, int s) {
            multiply_chunk<M>(
                acc, rows, [&](int step) { return offsets[chunk * kChunkSteps + step]; },
                place.b(stages + s * kStageBytes), p.core.steps(chunk), p.core.rows - column - place.column);
          });
      keep_tile<T>(t2, p.t2_pitch(), kRows, acc, 0, column, p.last.row_bytes / int(sizeof(T)));
    }

    const char* const t2_rows[2] = {t2 + place.a_row(0) * p.t2_pitch() + place.a_byte(),
                                    t2 + place.a_row(1) * p.t2_pitch() + place.a_byte()};
    KEGFAST_ROLLED
    for (int column = 0; column < p.last.rows; column += kColumnsPerBlock) {
      clear(acc);
      pipeline(
          p.last.chunks(),
          [&](int chunk, int s) {
            load_factor<kTiles, kThreads>(p.last, stages + s * kStageBytes, column, chunk);
          },
          [&](int chunk, int s) {
            multiply_chunk<M>(
                acc, t2_rows, [&](int step) { return chunk * kChunkBytes + step * kStepBytes; },
                place.b(stages + s * kStageBytes), p.last.steps(chunk), p.last.rows - column - place.column);
          });
      store_tile<T, kTiles, kThreads>(p.y, acc, stages, column, p.epilogue, [&](int row) -> int64_t {
        const int oy = oy0 + row / p.tile_w, ox = ox0 + row % p.tile_w;
        if (row >= p.tile_h * p.tile_w || oy >= p.y.height || ox >= p.y.width) return -1;
        return n * p.y.image + oy * p.y.row + ox * p.y.pixel;
      });
    }
  }
};

}  // namespace kegfast::cuda
