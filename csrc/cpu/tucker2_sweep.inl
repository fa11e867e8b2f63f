// GEMMs over grids of pixels: how rows are split into tiles and long sums into blocks of K.
#pragma once

#include "cpu/tucker2_plan.inl"
#include "cpu/tucker2_tile.inl"
#if defined(KEGFAST_AMX)
#include "cpu/tucker2_amx.inl"
#endif

namespace kegfast::KEGFAST_ISA {
namespace {

// A GEMM over a grid of pixels: images x rows x pixels, each pixel of A and C at its own fixed step.
struct Grid {
  int64_t images, rows, pixels;
  int64_t a_image, a_row, c_image, c_row;
};

// What a sweep prefetches beside the panels of its factor; a range of count 0: nothing.
struct SweepPrefetch {
  PrefetchRange row;   // A's first: each is prefetched one row early
  PrefetchRange then;  // what is read after the sweep, during its last part
};

// Longer sums are split into blocks of K: rounding stays that of a blocked sum, a block of B in L1.
constexpr int64_t kBlockK = 128;
constexpr int64_t kWholeK = 300;  // not worth splitting

// How a row of pixels is split into tiles.
struct Tiling {
  int vectors, tiles;
};

constexpr int64_t kNearVectors = 256;  // of B: what L1 keeps beside A and C

constexpr int64_t kLatency = 8;  // half cycles of an FMA

// Fewest half cycles for sums of `length`: the larger of FMA count, load count
// and FMA latency in the loop, what storing a pixel costs beside its vectors,
// and B's way from L2.
inline Tiling best_tiling(int64_t vectors, int64_t pixels, int64_t length, int max_vectors,
                          int64_t latency = kLatency) {
  constexpr int64_t kPixelCost = 7;
  constexpr bool kShort = kRegisters == 16;
  constexpr int64_t kFewProducts = 10, kTileCost = 50;
  const bool far = length * vectors > kNearVectors;
  Tiling best{1, 1};
  int64_t least = INT64_MAX;
  for (int v = 1; v <= max_vectors && v <= vectors; ++v) {
    const int tiles = static_cast<int>(ceil_div(pixels, max_pixels(v)));
    const int64_t narrow = pixels / tiles, wider = pixels % tiles;
    auto cycles = [&](int64_t width, int64_t n) {
      const int64_t products = width * n, most = larger(larger(products, width + n), latency);
      if (kShort) return length * (most + (products < kFewProducts)) + kPixelCost * width + kTileCost;
      return length * (most + (far ? n : 0)) + kPixelCost * width;
    };
    auto row = [&](int64_t n) {
      const int64_t once = far && kShort ? 2 * n * length : 0;
      return n == 0 ? 0 : (tiles - wider) * cycles(narrow, n) + wider * cycles(narrow + 1, n) + once;
    };
    const int64_t cost = vectors / v * row(v) + row(vectors % v);
    if (cost <= least) least = cost, best = {v, tiles};
  }
  return best;
}

template <ALayout kA, Bias kBias, int Group>
inline constexpr TileTable<kA, Group, kBias> kTiles{};

template <ALayout kA>
inline const TileFunction (*tiles_of(int group)) [kMaxPixels + 1] {
  constexpr Bias kBias = Bias::per_lane;
  if constexpr (kA == ALayout::row_major && kLanes >= 8) {
    if (group == 2) return kTiles<kA, kBias, 2>.f;
    if (group == 4) return kTiles<kA, kBias, 4>.f;
    if constexpr (kLanes >= 16)
      if (group == 8) return kTiles<kA, kBias, 8>.f;
  }
  return kTiles<kA, kBias, 1>.f;
}

// Segments, and steps of k in each, that one call of a tile sums.
struct KBlock {
  int64_t segments, length;
};
constexpr KBlock k_block_of(Window window, int group) {
  const auto [segments, length] = window;
  if (kPair > 1 || segments * length <= kWholeK) return {segments, length};
  return {clamp(kBlockK / length, 1, segments), round_up(ceil_div(length, ceil_div(length, kBlockK)), group)};
}

constexpr int kMostTapGroup = 4;

// Whether tiles may take a row's taps together: one vector of outputs, sums of one block of K.
constexpr bool sums_taps(Window window, int64_t taps, int64_t outputs, int group) {
  return taps && group <= kMostTapGroup && window.length / taps % group == 0 && outputs * group <= kLanes &&
         k_block_of(window, group).length >= window.length &&
         k_block_of(window, group).segments == window.segments;
}

// The calls of one tile that make up its whole sum: f(tile, offset in A, offset in B), bias and ReLU with the
// last.
template <ALayout kA, class F>
void for_k_blocks(const Tile& whole, int group, const F& f) {
  const int64_t length = whole.segment_length, segments = whole.segment_count;
  const auto [together, piece] = k_block_of({segments, length}, group);
  for (int64_t s = 0; s < segments; s += together)
    for (int64_t k = 0; k < length; k += piece) {
      const bool ends = s + together >= segments && k + piece >= length;
      Tile part = whole;
      part.segments += s;
      part.segment_count = smaller(together, segments - s);
      part.segment_length = smaller(piece, length - k);
      if (s + k > 0) part.accumulate = true, part.addend = 0;
      part.relu = ends && whole.relu;
      if (!ends) part.bias = nullptr;
      f(part, kA == ALayout::row_major ? k : k * whole.a_step,
        (s * ceil_div(length, group) + k / group) * kLanes);
    }
}

constexpr int64_t kFarBytes = 32 << 10;  // of a factor: beyond it, its next part is asked for early

// The pixels of a row that wider units than vectors take; how many they were.
template <ALayout kA>
KEGFAST_INLINE int64_t run_wide(const Tile& tile, int vectors, int64_t pixels, int group) {
#if defined(KEGFAST_AMX)
  if (kA == ALayout::row_major && group == 1) return run_amx_row(tile, vectors, pixels);
#endif
  (void)tile, (void)vectors, (void)pixels, (void)group;
  return 0;
}

// What a sweep over a packed factor reads first.
inline PrefetchRange first_of(const float* packed, int64_t outputs, Window window) {
  const KBlock block = k_block_of(window, 1);
  return {packed, block.segments * block.length * kLanes * 4, window.segments * window.length * kLanes * 4,
          smaller(kMaxVectors, ceil_div(outputs, kLanes))};
}

template <int Taps, int Group>
inline constexpr TapTable<Taps, Group> kTaps{};

template <int Taps>
inline const TileFunction* taps_of(int group) {
  if constexpr (kLanes >= 8) {
    if (group == 2) return kTaps<Taps, 2>.f;
    if (group == 4) return kTaps<Taps, 4>.f;
  }
  return kTaps<Taps, 1>.f;
}

// How often a tile prefetches.
inline int64_t steps_of(const Tile& tile, int group) {
  if (tile.taps) return tile.segment_count * ceil_div(tile.a_step, kTapPrefetchSteps * group);
  return tile.segment_count * ceil_div(tile.segment_length, kPrefetchSteps * group);
}

// C = A * packed factor over the grid, of outputs that are held alike; `whole` carries everything that is the
// same for all tiles.
template <ALayout kA>
void sweep_part(const Tile& whole, const Grid& grid, int64_t a_pixel, int64_t outputs, int group,
                const SweepPrefetch& prefetch) {
  const int channels = kLanes / group;
  const int64_t vectors = ceil_div(outputs, channels);
  const int64_t vector_floats = whole.segment_count * ceil_div(whole.segment_length, group) * kLanes;
  const int64_t length = smaller(whole.segment_count * whole.segment_length, kBlockK);
  const Tiling tiling = best_tiling(vectors, grid.pixels, length, group > 1 ? 1 : kMaxVectors);
  const auto all = tiles_of<kA>(group);
  const bool far = vectors * vector_floats * 4 > kFarBytes;
  for (int64_t v = 0; v < vectors; v += tiling.vectors) {
    const int width = static_cast<int>(smaller(tiling.vectors, vectors - v));
    const TileFunction* const tiles = whole.taps == 3   ? taps_of<3>(group)
                                      : whole.taps == 5 ? taps_of<5>(group)
                                                        : all[width];
    for_k_blocks<kA>(whole, group, [&](Tile tile, int64_t a_offset, int64_t b_offset) {
      tile.b = whole.b + v * vector_floats + b_offset;
      tile.b_vector = vector_floats;
      if (tile.bias) tile.bias += v * channels;
      tile.tail = static_cast<int>(smaller(channels, outputs - (v + width - 1) * channels));
      const int64_t run = tile.segment_count * ceil_div(tile.segment_length, group) * kLanes;
      const bool ends = b_offset + run >= vector_floats;
      Prefetcher next_part(whole.prefetcher);
      if (ends && v + tiling.vectors >= vectors)
        next_part.add(prefetch.then);
      else if (far)
        next_part.add(ends ? whole.b + (v + tiling.vectors) * vector_floats : tile.b + run, run * 4,
                      vector_floats * 4, width);
      next_part.spread_over(grid.images * grid.rows * tiling.tiles * steps_of(tile, group));
      Prefetcher next_row(&next_part);
      const bool asks_rows = prefetch.row.count > 0 && v == 0 && a_offset == 0;
      for (int64_t n = 0; n < grid.images; ++n)
        for (int64_t r = 0; r < grid.rows; ++r) {
          const float* const a = whole.a + a_offset + n * grid.a_image + r * grid.a_row;
          Number* const c = whole.c + n * grid.c_image + r * grid.c_row + v * channels;
          tile.a = a, tile.c = c;
          if (asks_rows) {
            next_row.clear();
            if (r + 1 < grid.rows) next_row.add(moved(prefetch.row, (r + 1) * grid.a_row * 4));
            next_row.spread_over(tiling.tiles * steps_of(tile, group));
          }
          tile.prefetcher = next_row.pending();
          const int64_t start = run_wide<kA>(tile, width, grid.pixels, group), rest = grid.pixels - start;
          const int64_t count = start ? ceil_div(rest, max_pixels(tiling.vectors)) : tiling.tiles;
          int64_t done = start;
          for (int64_t i = 0; i < count; ++i) {
            const int64_t next = start + (i + 1) * rest / count;
            tile.a = a + done * a_pixel;
            tile.c = c + done * tile.c_step;
            tile.prefetcher = next_row.pending();
            tiles[next - done](tile);
            done = next;
          }
        }
    });
  }
}

// The same of all outputs.
template <ALayout kA>
void sweep(const Tile& whole, const Grid& grid, int64_t a_pixel, int64_t outputs,
           const SweepPrefetch& prefetch = {}) {
  const Window window{whole.segment_count, whole.segment_length};
  for_parts(outputs, window, kA == ALayout::row_major, [&](const Part& part, int64_t at) {
    Tile tile = whole;
    if (!sums_taps(window, tile.taps, part.outputs, part.group)) tile.taps = 0;
    tile.b += at;
    tile.c += part.first;
    if (tile.bias) tile.bias += part.first;
    const bool ends = part.first + part.outputs == outputs;
    sweep_part<kA>(tile, grid, a_pixel, part.outputs, part.group,
                   {part.first ? PrefetchRange{} : prefetch.row, ends ? prefetch.then : PrefetchRange{}});
  });
}

constexpr int64_t kOrigin[1] = {0};

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
