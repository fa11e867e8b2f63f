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
  KEGFAST_ANYWHERE int tiles() const { return tiles_y() * tiles_x() * images; }
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

  // ---- shared memory: slots, y or t1, factors, bias, arrivals

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
           bias_columns(p) * sizeof(float) + kSlots * sizeof(Arrival);
  }
  KEGFAST_ANYWHERE static int bias_columns(const Params& p) {
    return (p.last.rows + kColumns - 1) / kColumns * kColumns;
  }
  KEGFAST_ANYWHERE static int rank_rows(const Factor<T>& f) { return (f.rows + 15) / 16 * 16; }

  // ---- pieces

  struct Tile {
    int image, y, x;  // of its first output pixel
  };
  KEGFAST_DEVICE static Tile tile_at(const Params& p, int tile) {
    const int each = p.tiles_y() * p.tiles_x(), at = tile % each;
    return {tile / each, at / p.tiles_x() * p.tile_h, at % p.tiles_x() * p.tile_w};
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
    const int tile = block().x + turn / chunks * grid().x;
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

  // Past a factor's rows stands 0 only while all of x is finite.
  template <int kM, int kTiles>
  KEGFAST_DEVICE static void clear_from(int rows, float (&acc)[kM][kTiles][4]) {
    if (rows % 16 == 0) return;
    KEGFAST_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      KEGFAST_UNROLL
      for (int i = 0; i < 4; ++i) {
        KEGFAST_UNROLL
        for (int m = 0; m < kM; ++m)
          acc[m][t][i] = 8 * t + 2 * (lane() % 4) + i % 2 < rows ? acc[m][t][i] : 0;
      }
    }
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
    float* bias = reinterpret_cast<float*>(last + last_rows(p) * pitch(p.last));
    Arrival* arrivals = reinterpret_cast<Arrival*>(bias + bias_columns(p));
    const int chunks = (p.first.row_bytes() + kBoxRow - 1) / kBoxRow;
    const int halo_w = p.halo_w(), halo = p.halo_h() * halo_w,
              in_warp = shuffle(warp(), 0),  // known to be the same for all lanes
        first_row = in_warp * 32;
    const int in_row = lane() % 16, in_piece = lane() / 16 * 16, out_row = lane() / 4,
              out_column = 2 * (lane() % 4);

    if (thread() == 0) {
      for (int s = 0; s < kSlots; ++s) arrival_init(arrivals + s);
    }
    keep_factor(p.first, first, rank_rows(p.first));
    keep_factor(p.core, core, rank_rows(p.core));
    keep_factor(p.last, last, last_rows(p));
    for (int i = thread(); i < bias_columns(p); i += kThreads)
      bias[i] = p.epilogue.bias != nullptr && i < p.last.rows ? to_float(p.epilogue.bias[i]) : 0;
    cp_async_commit();
    cp_async_wait<0>();
    barrier();
    if (thread() == 0) {
      for (int s = 0; s < kSlots; ++s) ask(p, s, chunks, slots, arrivals);
    }

    // This lane's rows: of the halo's groups warp, warp + 4, warp + 8, and of t1 under its output pixels.
    const int groups = smaller(kHaloTiles, ((halo + 15) / 16 - in_warp + kWarps - 1) / kWarps);
    const int halo_row = (in_warp * 16 + in_row) * kBoxRow;
    const char* const first_b = b_row(first, pitch(p.first));
    int t1_row[2], piece[kChunkSteps];
    KEGFAST_UNROLL
    for (int step = 0; step < kChunkSteps; ++step)
      piece[step] = in_box(in_row % 8, step * kStepBytes + in_piece) % kBoxRow;
    KEGFAST_UNROLL
    for (int m = 0; m < 2; ++m) {
      const int pixel = first_row + 16 * m + in_row < p.tile_h * p.tile_w ? first_row + 16 * m + in_row : 0;
      t1_row[m] = (pixel / p.tile_w * p.window.stride_h * halo_w + pixel % p.tile_w * p.window.stride_w) *
                      t1_pitch(p) +
                  in_piece;
    }

    int turn = 0;
    KEGFAST_ROLLED
    for (int tile = block().x; tile < p.tiles(); tile += grid().x) {
      const Tile at = tile_at(p, tile);
      {
        float acc[kHaloTiles][kRankTiles][4];
        clear(acc);
        KEGFAST_ROLLED
        for (int chunk = 0; chunk < chunks; ++chunk, ++turn) {
          const char* rows = slots + turn % kSlots * slot_bytes(p) + halo_row;
          const char* b = first_b + chunk * kChunkBytes;
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
            multiply<kHaloTiles, kRankPairs>(acc, a, groups, b + step * kStepBytes, pitch(p.first),
                                             p.first.rows);
          }
          if (thread() == 0 && chunk + 1 == chunks) bulk_store_wait();
          barrier();  // the slot is read, and in the end y's last columns
          if (thread() == 0) ask(p, turn + kSlots, chunks, slots, arrivals);
        }
        clear_from(p.first.rows, acc);
        KEGFAST_UNROLL
        for (int m = 0; m < kHaloTiles; ++m) {
          KEGFAST_UNROLL
          for (int i = 0; i < 4; i += 2) {
            const int row = (in_warp + m * kWarps) * 16 + out_row + 4 * i;
            if (row >= halo) continue;
            char* to = common + row * t1_pitch(p) + out_column * int(sizeof(T));
            KEGFAST_UNROLL
            for (int t = 0; t < kRankTiles; ++t) {
              if (16 * t >= p.core.tap_bytes()) break;
              *reinterpret_cast<uint32_t*>(to + 16 * t) = pack<T>(acc[m][t][i], acc[m][t][i + 1]);
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
            for (int i = 0; i < 2; ++i) t2[m][t][i] = pack<T>(acc[m][t][2 * i], acc[m][t][2 * i + 1]);
          }
        }
      }

      KEGFAST_ROLLED
      for (int column = 0; column < p.last.rows; column += kColumns) {
        float acc[2][kColumns / 8][4];
        KEGFAST_UNROLL
        for (int t = 0; t < kColumns / 8; ++t) {
          const Pair both = *reinterpret_cast<const Pair*>(bias + column + 8 * t + out_column);
          KEGFAST_UNROLL
          for (int m = 0; m < 2; ++m) {
            KEGFAST_UNROLL
            for (int i = 0; i < 4; ++i) acc[m][t][i] = bits_float(i % 2 == 0 ? both.first : both.second);
          }
        }
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
        char* to = common + first_row * kBoxRow + out_row * kBoxRow + out_column * int(sizeof(T));
        KEGFAST_UNROLL
        for (int t = 0; t < kColumns / 8; ++t) {
          char* const piece_to = to + (16 * t ^ out_row * 16);
          KEGFAST_UNROLL
          for (int m = 0; m < 2; ++m) {
            KEGFAST_UNROLL
            for (int i = 0; i < 4; i += 2) {
              uint32_t both = pack<T>(acc[m][t][i], acc[m][t][i + 1]);
              if (p.epilogue.relu) both = relu(both, T{});
              *reinterpret_cast<uint32_t*>(piece_to + (16 * m + 4 * i) * kBoxRow) = both;
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
