// tucker2 on CUDA, 16-bit numbers in channels_last on sm_90: all three stages in one kernel whose blocks stay.
//
// As many blocks as the multiprocessors hold take tiles of up to 128 output pixels one after another. The three factors
// come to shared memory once a block. A tile's halo comes by bulk copies, one a chunk of 64 channels, into two slots in
// turn, zeros outside of the image: one thread asks, so that no other computes an address, and the next chunk or tile is
// under way while one is multiplied. (1) first: the halo's pixels in groups of 16, three groups a warp, accumulators in
// registers over all chunks; t1 goes to shared memory. (2) core: 32 output pixels a warp, a tap is the same rows of t1
// shifted. (3) last: t2 is turned from accumulators to operands inside of the warp's registers; y goes 64 channels at a
// time through shared memory and back by a bulk copy, which leaves out what is outside of the image. t1's place serves y.
//
// Rows of factors and of t1 are padded by 16 bytes, halo and y swizzled as the copy engine does it: the 8 rows of an
// ldmatrix lie in different banks.
#pragma once

#include "tucker2_image.cuh"

namespace kegfast::cuda {

template <class T>
struct PersistentParams {
  TensorMap x, y;
  Factor<T> first, core, last;
  Window window;
  int tile_h, tile_w;         // output pixels of a tile
  int height, width, images;  // of y
  Epilogue<T> epilogue;

  KEGFAST_ANYWHERE int halo_h() const { return window.halo_h(tile_h); }
  KEGFAST_ANYWHERE int halo_w() const { return window.halo_w(tile_w); }
  KEGFAST_ANYWHERE int tiles_y() const { return (height + tile_h - 1) / tile_h; }
  KEGFAST_ANYWHERE int tiles_x() const { return (width + tile_w - 1) / tile_w; }
  KEGFAST_ANYWHERE int64_t tiles() const { return int64_t(tiles_y()) * tiles_x() * images; }
};

// kRank: R1 and R2 at most, 16, 32 or 64.
template <class T, int kRank>
struct Tucker2Persistent {
  static_assert(sizeof(T) == 2);
  static constexpr int kThreads = kTuckerThreads, kBlocksPerSm = kRank > 32 ? 1 : 2;
  static constexpr int kWarps = kThreads / kWarp, kPixels = 32 * kWarps, kSlots = 2;
  static constexpr int kHaloTiles = 3, kHalo = 16 * kHaloTiles * kWarps;  // pixels at most
  static constexpr int kColumns = kBoxRow / int(sizeof(T));               // channels of a box
  using Params = PersistentParams<T>;

  // ---- shared memory: slots, y or t1, factors, arrivals

  KEGFAST_ANYWHERE static int slot_bytes(const Params& p) {
    return ((p.halo_h() * p.halo_w() + 15) / 16 * 16 * kBoxRow + 1023) / 1024 * 1024;
  }
  KEGFAST_ANYWHERE static int t1_pitch(const Params& p) { return p.core.tap_bytes() + 16; }
  KEGFAST_ANYWHERE static int common_bytes(const Params& p) {  // of t1, and of y's columns after it
    return (larger(p.halo_h() * p.halo_w() * t1_pitch(p), kPixels * kBoxRow) + 15) / 16 * 16;
  }
  KEGFAST_ANYWHERE static int pitch(const Factor<T>& f) { return f.row_bytes() + 16; }
  KEGFAST_ANYWHERE static int last_rows(const Params& p) { return (p.last.rows + 15) / 16 * 16; }
  static size_t shared_bytes(const Params& p) {
    return size_t(kSlots) * slot_bytes(p) + common_bytes(p) + size_t(rank_rows(p.first)) * pitch(p.first) +
           size_t(rank_rows(p.core)) * pitch(p.core) + size_t(last_rows(p)) * pitch(p.last) +
           kSlots * sizeof(Arrival);
  }
  KEGFAST_ANYWHERE static int rank_rows(const Factor<T>& f) { return (f.rows + 15) / 16 * 16; }

  // ---- pieces

  struct Tile {
    int image, y, x;  // of its first output pixel
  };
  KEGFAST_DEVICE static Tile tile_at(const Params& p, int64_t tile) {
    const int each = p.tiles_y() * p.tiles_x(), at = int(tile % each);
    return {int(tile / each), at / p.tiles_x() * p.tile_h, at % p.tiles_x() * p.tile_w};
  }

  // Rows of a factor, zeros up to `rows`.
  KEGFAST_DEVICE static void keep_factor(const Factor<T>& factor, char* to, int rows) {
    const int pieces = factor.row_bytes() / 16;
    KEGFAST_ROLLED
    for (int i = thread(); i < rows * pieces; i += kThreads) {
      const int row = i / pieces, byte = i % pieces * 16;
      load_piece(factor, row, byte, to + row * pitch(factor) + byte);
    }
  }

  // The block's chunk number `turn` of all its tiles' halos, if there is one.
  KEGFAST_DEVICE static void ask(const Params& p, int turn, int chunks, char* slots, Arrival* arrivals) {
    const int64_t tile = block().x + int64_t(turn / chunks) * grid().x;
    if (tile >= p.tiles()) return;
    const Tile at = tile_at(p, tile);
    const int slot = turn % kSlots;
    bulk_load(slots + slot * slot_bytes(p), p.x, turn % chunks * kColumns,
              at.x * p.window.stride_w - p.window.padding_w, at.y * p.window.stride_h - p.window.padding_h,
              at.image, p.halo_h() * p.halo_w() * kBoxRow, arrivals + slot);
  }

  // This lane's ldmatrix row of the first 16 rows of a factor.
  KEGFAST_DEVICE static const char* b_row(const char* factor, int pitch) {
    return factor + (lane() % 8 + lane() / 16 * 8) * pitch + lane() / 8 % 2 * 16;
  }

  // acc += A times up to 16 kPairs columns, one step of K; of these `columns` exist.
  template <int kM, int kPairs>
  KEGFAST_DEVICE static void multiply(float (&acc)[kM][2 * kPairs][4], const uint32_t (&a)[kM][4], int groups,
                                      const char* b, int pitch, int columns) {
    KEGFAST_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      if (pair * 16 >= columns) break;
      uint32_t fb[4];
      ldmatrix_x4(fb, b + pair * 16 * pitch);
      KEGFAST_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint32_t column[2] = {fb[2 * half], fb[2 * half + 1]};
        KEGFAST_UNROLL
        for (int m = 0; m < kM; ++m) {
          if (m >= groups) break;
          mma(acc[m][2 * pair + half], a[m], column, T{});
        }
      }
    }
  }

  template <int kM, int kTiles>
  KEGFAST_DEVICE static void clear(float (&acc)[kM][kTiles][4]) {
    KEGFAST_UNROLL
    for (int m = 0; m < kM; ++m) {
      KEGFAST_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        KEGFAST_UNROLL
        for (int i = 0; i < 4; ++i) acc[m][t][i] = 0;
      }
    }
  }

  // Accumulators of two neighbouring columns as one word, 0 from column `live` on: past a factor's rows stands 0 only
  // while all of x is finite.
  KEGFAST_DEVICE static uint32_t pair_of(const float (&acc)[4], int i, int column, int live) {
    return pack_pair<T>(column < live ? acc[i] : 0, column + 1 < live ? acc[i + 1] : 0);
  }

  // ---- the kernel

  KEGFAST_DEVICE static void run(const Params& p) {
    if constexpr (kBulkCopies) work(p);
  }

  KEGFAST_DEVICE static void work(const Params& p) {
    constexpr int kRankTiles = kRank / 8, kRankPairs = kRank / 16;
    char* slots = shared();
    char* common = slots + kSlots * slot_bytes(p);
    char* first = common + common_bytes(p);
    char* core = first + rank_rows(p.first) * pitch(p.first);
    char* last = core + rank_rows(p.core) * pitch(p.core);
    Arrival* arrivals = reinterpret_cast<Arrival*>(last + last_rows(p) * pitch(p.last));
    const int chunks = (p.first.row_bytes() + kBoxRow - 1) / kBoxRow;
    const int halo_w = p.halo_w(), halo = p.halo_h() * halo_w, first_row = warp() * 32;
    const int in_row = lane() % 16, in_piece = lane() / 16 * 16, out_row = lane() / 4,
              out_column = 2 * (lane() % 4);

    if (thread() == 0) {
      for (int s = 0; s < kSlots; ++s) arrival_init(arrivals + s);
    }
    keep_factor(p.first, first, rank_rows(p.first));
    keep_factor(p.core, core, rank_rows(p.core));
    keep_factor(p.last, last, last_rows(p));
    cp_async_commit();
    cp_async_wait<0>();
    barrier();
    if (thread() == 0) {
      for (int s = 0; s < kSlots; ++s) ask(p, s, chunks, slots, arrivals);
    }

    // This lane's rows: of the halo's groups warp, warp + 4, warp + 8, and of t1 under its output pixels.
    const int groups = smaller(kHaloTiles, ((halo + 15) / 16 - warp() + kWarps - 1) / kWarps);
    int t1_row[2];
    KEGFAST_UNROLL
    for (int m = 0; m < 2; ++m) {
      const int pixel = first_row + 16 * m + in_row < p.tile_h * p.tile_w ? first_row + 16 * m + in_row : 0;
      t1_row[m] = (pixel / p.tile_w * p.window.stride_h * halo_w + pixel % p.tile_w * p.window.stride_w) *
                      t1_pitch(p) +
                  in_piece;
    }

    int turn = 0;
    KEGFAST_ROLLED
    for (int64_t tile = block().x; tile < p.tiles(); tile += grid().x) {
      const Tile at = tile_at(p, tile);
      {
        float acc[kHaloTiles][kRankTiles][4];
        clear(acc);
        KEGFAST_ROLLED
        for (int chunk = 0; chunk < chunks; ++chunk, ++turn) {
          const char* slot = slots + turn % kSlots * slot_bytes(p);
          const int steps = smaller(kChunkSteps, p.first.row_bytes() / kStepBytes - chunk * kChunkSteps);
          arrival_wait(arrivals + turn % kSlots, turn / kSlots);
          KEGFAST_UNROLL
          for (int step = 0; step < kChunkSteps; ++step) {
            if (step >= steps) break;
            uint32_t a[kHaloTiles][4];
            KEGFAST_UNROLL
            for (int m = 0; m < kHaloTiles; ++m) {
              if (m >= groups) break;
              ldmatrix_x4(a[m],
                          slot + in_box((warp() + m * kWarps) * 16 + in_row, step * kStepBytes + in_piece));
            }
            multiply<kHaloTiles, kRankPairs>(
                acc, a, groups, b_row(first, pitch(p.first)) + (chunk * kChunkSteps + step) * kStepBytes,
                pitch(p.first), p.first.rows);
          }
          if (thread() == 0 && chunk + 1 == chunks) bulk_store_wait();
          barrier();  // the slot is read, and in the end y's last columns
          if (thread() == 0) ask(p, turn + kSlots, chunks, slots, arrivals);
        }
        KEGFAST_UNROLL
        for (int m = 0; m < kHaloTiles; ++m) {
          KEGFAST_UNROLL
          for (int i = 0; i < 4; i += 2) {
            const int row = (warp() + m * kWarps) * 16 + out_row + 4 * i;
            if (row >= halo) continue;
            KEGFAST_UNROLL
            for (int t = 0; t < kRankTiles; ++t) {
              const int column = 8 * t + out_column;
              if (column * int(sizeof(T)) < p.core.tap_bytes()) {
                *reinterpret_cast<uint32_t*>(common + row * t1_pitch(p) + column * sizeof(T)) =
                    pair_of(acc[m][t], i, column, p.first.rows);
              }
            }
          }
        }
      }
      barrier();

      uint32_t t2[2][kRankTiles][2];  // operands of `last`: pairs of columns, of rows out_row and out_row + 8
      {
        float acc[2][kRankTiles][4];
        clear(acc);
        const char* b = b_row(core, pitch(p.core));
        KEGFAST_ROLLED
        for (int ky = 0; ky < p.window.kernel_h; ++ky) {
          KEGFAST_ROLLED
          for (int kx = 0; kx < p.window.kernel_w; ++kx) {
            const char* rows =
                common + (ky * p.window.dilation_h * halo_w + kx * p.window.dilation_w) * t1_pitch(p);
            KEGFAST_UNROLL
            for (int step = 0; step < kRank / 16; ++step) {
              if (step * kStepBytes >= p.core.tap_bytes()) break;
              uint32_t a[2][4];
              KEGFAST_UNROLL
              for (int m = 0; m < 2; ++m) ldmatrix_x4(a[m], rows + t1_row[m] + step * kStepBytes);
              multiply<2, kRankPairs>(acc, a, 2, b + step * kStepBytes, pitch(p.core), p.core.rows);
            }
            b += p.core.tap_bytes();
          }
        }
        KEGFAST_UNROLL
        for (int m = 0; m < 2; ++m) {
          KEGFAST_UNROLL
          for (int t = 0; t < kRankTiles; ++t) {
            KEGFAST_UNROLL
            for (int i = 0; i < 2; ++i)
              t2[m][t][i] = pair_of(acc[m][t], 2 * i, 8 * t + out_column, p.core.rows);
          }
        }
      }

      KEGFAST_ROLLED
      for (int column = 0; column < p.last.rows; column += kColumns) {
        float acc[2][kColumns / 8][4];
        clear(acc);
        KEGFAST_UNROLL
        for (int step = 0; step < kRank / 16; ++step) {
          if (step * kStepBytes >= p.last.row_bytes()) break;
          uint32_t a[2][4];
          KEGFAST_UNROLL
          for (int m = 0; m < 2; ++m) {
            KEGFAST_UNROLL
            for (int i = 0; i < 4; ++i) a[m][i] = t2[m][2 * step + i / 2][i % 2];
          }
          multiply<2, kColumns / 16>(acc, a, 2,
                                     b_row(last + column * pitch(p.last), pitch(p.last)) + step * kStepBytes,
                                     pitch(p.last), p.last.rows - column);
        }
        if (thread() == 0 && column > 0) bulk_store_wait();
        barrier();  // t1 is read, or y's columns before
        KEGFAST_UNROLL
        for (int t = 0; t < kColumns / 8; ++t) {
          const int feature = column + 8 * t + out_column;
          float bias[2] = {};
          KEGFAST_UNROLL
          for (int e = 0; e < 2; ++e) {
            if (p.epilogue.bias != nullptr && feature + e < p.last.rows)
              bias[e] = to_float(p.epilogue.bias[feature + e]);
          }
          KEGFAST_UNROLL
          for (int m = 0; m < 2; ++m) {
            KEGFAST_UNROLL
            for (int i = 0; i < 4; i += 2) {
              const int row = first_row + 16 * m + out_row + 4 * i;
              *reinterpret_cast<uint32_t*>(common + in_box(row, 16 * t) + out_column * sizeof(T)) =
                  pack_pair<T>(p.epilogue.finish(acc[m][t][i] + bias[0]),
                               p.epilogue.finish(acc[m][t][i + 1] + bias[1]));
            }
          }
        }
        bulk_fence();
        barrier();
        if (thread() == 0) bulk_store(p.y, column, at.x, at.y, at.image, common);
      }
    }
    if (thread() == 0) bulk_store_wait();
  }
};

}  // namespace kegfast::cuda
