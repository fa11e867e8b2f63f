// tucker2 on CUDA, 16-bit numbers in channels_last on sm_90: all three stages in one kernel whose blocks
// stay.
//
// As many blocks as the multiprocessors hold take tiles of up to 128 output pixels one after another. The
// three factors come to shared memory once a block. A tile's halo comes by bulk copies, one a chunk of 64
// channels, into two slots in turn, zeros outside of the image: one thread asks, so that no other computes an
// address, and the next chunk or tile is under way while one is multiplied. (1) first: the halo's pixels in
// groups of 16, three groups a warp, accumulators in registers over all chunks; t1 goes to shared memory. (2)
// core: 32 output pixels a warp, a tap is the same rows of t1 shifted. (3) last: t2 is turned from
// accumulators to operands inside of the warp's registers; y goes 64 channels at a time through shared memory
// and back by a bulk copy, which leaves out what is outside of the image. t1's place serves y.
//
// Prediction for an H200, bf16, batch 128, C / 4, before it was written: 26 us at 64@56, 14 at 128@28.
// Counted in sm_90's code since (benchmarks/cuda_counts.py): 3.3 thousand warp instructions a tile at 64@56,
// 6.3 at 128@28, 14.3 at 256@14, issued in 13, 6 and 4 us where bandwidth takes 21, 11 and 5. At 256@14 a
// block is alone on its multiprocessor, one warp a scheduler: latency bounds it. Not yet measured on a
// device.
//
// Rows of factors and of t1 are padded by 16 bytes, halo and y swizzled as the copy engine does it: the 8
// rows of an ldmatrix lie in different banks.
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
  static constexpr int kThreads = kTuckerThreads, kBlocksPerSm = kRank > 32 ? 1 : (kRank > 16 ? 2 : 3);
  static constexpr int kWarps = kThreads / kWarp, kPixels = 32 * kWarps, kSlots = 2;
  static constexpr int kHaloTiles = 3, kHalo = 16 * kHaloTiles * kWarps;  // pixels at most
  static constexpr int kColumns = kBoxRow / int(sizeof(T));               // channels of a box
  using Params = PersistentParams<T>;

  // ---- shared memory: slots, y or t1, factors, bias, arrivals. Ranks, channels and features are padded with
  // zeros to kRank and whole boxes, so that no loop over them has an end of its own.

  static constexpr int kTapBytes = kRank * int(sizeof(T)), kT1Pitch = kTapBytes + 16;
  static constexpr int kSlotBytes = kHalo * kBoxRow;
  static constexpr int kCommonBytes =
      kHalo * kT1Pitch > kPixels* kBoxRow ? kHalo * kT1Pitch : kPixels * kBoxRow;
  KEGFAST_ANYWHERE static int boxes(int channels) { return (channels + kColumns - 1) / kColumns; }
  KEGFAST_ANYWHERE static int first_pitch(const Params& p) { return boxes(p.first.inputs) * kBoxRow + 16; }
  KEGFAST_ANYWHERE static int core_pitch(const Params& p) { return p.core.taps() * kTapBytes + 16; }
  KEGFAST_ANYWHERE static int features(const Params& p) { return boxes(p.last.rows) * kColumns; }
  static size_t shared_bytes(const Params& p) {
    return size_t(kSlots) * kSlotBytes + kCommonBytes + size_t(kRank) * (first_pitch(p) + core_pitch(p)) +
           features(p) * (size_t(kT1Pitch) + sizeof(float)) + kSlots * sizeof(Arrival);
  }

  // ---- pieces

  struct Tile {
    int image, y, x;  // of its first output pixel
  };
  KEGFAST_DEVICE static Tile tile_at(const Params& p, int tile) {
    const int each = p.tiles_y() * p.tiles_x(), at = tile % each;
    return {tile / each, at / p.tiles_x() * p.tile_h, at % p.tiles_x() * p.tile_w};
  }

  // A factor, zeros up to `rows` and, in each tap, up to `tap_bytes`.
  KEGFAST_DEVICE static void keep_factor(const Factor<T>& factor, char* to, int rows, int tap_bytes) {
    const int bytes = factor.taps() * tap_bytes, pieces = bytes / 16;
    KEGFAST_ROLLED
    for (int i = thread(); i < rows * pieces; i += kThreads) {
      const int row = i / pieces, byte = i % pieces * 16;
      load_piece(factor, row, byte / tap_bytes, byte % tap_bytes / int(sizeof(T)),
                 to + row * (bytes + 16) + byte);
    }
  }

  // The block's chunk number `turn` of all its tiles' halos, if there is one.
  KEGFAST_DEVICE static void ask(const Params& p, int turn, int chunks, char* slots, Arrival* arrivals) {
    const int tile = block().x + turn / chunks * grid().x;
    if (tile >= p.tiles()) return;
    const Tile at = tile_at(p, tile);
    const int slot = turn % kSlots;
    bulk_load(slots + slot * kSlotBytes, p.x, turn % chunks * kColumns,
              at.x * p.window.stride_w - p.window.padding_w, at.y * p.window.stride_h - p.window.padding_h,
              at.image, p.halo_h() * p.halo_w() * kBoxRow, arrivals + slot);
  }

  // This lane's ldmatrix row of the first 16 rows of a factor.
  KEGFAST_DEVICE static const char* b_row(const char* factor, int pitch) {
    return factor + (lane() % 8 + lane() / 16 * 8) * pitch + lane() / 8 % 2 * 16;
  }

  // acc += A times 16 kPairs columns, one step of K.
  template <int kM, int kPairs>
  KEGFAST_DEVICE static void multiply(float (&acc)[kM][2 * kPairs][4], const uint32_t (&a)[kM][4],
                                      const char* b, int pitch) {
    KEGFAST_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      uint32_t fb[4];
      ldmatrix_x4(fb, b + pair * 16 * pitch);
      KEGFAST_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint32_t column[2] = {fb[2 * half], fb[2 * half + 1]};
        KEGFAST_UNROLL
        for (int m = 0; m < kM; ++m) mma(acc[m][2 * pair + half], a[m], column, T{});
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
    if (rows == 8 * kTiles) return;
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
    const int first_pitch = Tucker2Persistent::first_pitch(p), core_pitch = Tucker2Persistent::core_pitch(p);
    char* slots = shared();
    char* common = slots + kSlots * kSlotBytes;
    char* first = common + kCommonBytes;
    char* core = first + kRank * first_pitch;
    char* last = core + kRank * core_pitch;
    float* bias = reinterpret_cast<float*>(last + features(p) * kT1Pitch);
    Arrival* arrivals = reinterpret_cast<Arrival*>(bias + features(p));
    const int chunks = boxes(p.first.inputs);
    const int halo_w = p.halo_w(), halo = p.halo_h() * halo_w,
              in_warp = shuffle(warp(), 0),  // known to be the same for all lanes
        first_row = in_warp * 32;
    const int in_row = lane() % 16, in_piece = lane() / 16 * 16, out_row = lane() / 4,
              out_column = 2 * (lane() % 4);

    if (thread() == 0) {
      for (int s = 0; s < kSlots; ++s) arrival_init(arrivals + s);
    }
    keep_factor(p.first, first, kRank, chunks * kBoxRow);
    keep_factor(p.core, core, kRank, kTapBytes);
    keep_factor(p.last, last, features(p), kTapBytes);
    for (int i = thread(); i < features(p); i += kThreads)
      bias[i] = p.epilogue.bias != nullptr && i < p.last.rows ? to_float(p.epilogue.bias[i]) : 0;
    cp_async_commit();
    cp_async_wait<0>();
    barrier();
    if (thread() == 0) {
      for (int s = 0; s < kSlots; ++s) ask(p, s, chunks, slots, arrivals);
    }

    // This lane's rows: of the halo's groups warp, warp + 4, warp + 8, and of t1 under its output pixels.
    const int halo_row = (in_warp * 16 + in_row) * kBoxRow;
    const char* const first_b = b_row(first, first_pitch);
    int t1_row[2], piece[kChunkSteps];
    KEGFAST_UNROLL
    for (int step = 0; step < kChunkSteps; ++step)
      piece[step] = in_box(in_row % 8, step * kStepBytes + in_piece) % kBoxRow;
    KEGFAST_UNROLL
    for (int m = 0; m < 2; ++m) {
      const int pixel = first_row + 16 * m + in_row < p.tile_h * p.tile_w ? first_row + 16 * m + in_row : 0;
      t1_row[m] =
          (pixel / p.tile_w * p.window.stride_h * halo_w + pixel % p.tile_w * p.window.stride_w) * kT1Pitch +
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
          const char* rows = slots + turn % kSlots * kSlotBytes + halo_row;
          const char* b = first_b + chunk * kBoxRow;
          arrival_wait(arrivals + turn % kSlots, turn / kSlots);
          KEGFAST_UNROLL
          for (int step = 0; step < kBoxRow / kStepBytes; ++step) {
            uint32_t a[kHaloTiles][4];
            KEGFAST_UNROLL
            for (int m = 0; m < kHaloTiles; ++m)
              ldmatrix_x4(a[m], rows + piece[step] + m * kWarps * 16 * kBoxRow);
            multiply<kHaloTiles, kRankPairs>(acc, a, b + step * kStepBytes, first_pitch);
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
            char* to = common + row * kT1Pitch + out_column * int(sizeof(T));
            KEGFAST_UNROLL
            for (int t = 0; t < kRankTiles; ++t) {
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
        const char* b = b_row(core, core_pitch);
        KEGFAST_ROLLED
        for (int ky = 0; ky < p.window.kernel_h; ++ky) {
          KEGFAST_ROLLED
          for (int kx = 0; kx < p.window.kernel_w; ++kx) {
            const char* rows =
                common + (ky * p.window.dilation_h * halo_w + kx * p.window.dilation_w) * kT1Pitch;
            KEGFAST_UNROLL
            for (int step = 0; step < kRank / 16; ++step) {
              uint32_t a[2][4];
              KEGFAST_UNROLL
              for (int m = 0; m < 2; ++m) ldmatrix_x4(a[m], rows + t1_row[m] + step * kStepBytes);
              multiply<2, kRankPairs>(acc, a, b + step * kStepBytes, core_pitch);
            }
            b += kTapBytes;
          }
        }
        clear_from(p.core.rows, acc);
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
          uint32_t a[2][4];
          KEGFAST_UNROLL
          for (int m = 0; m < 2; ++m) {
            KEGFAST_UNROLL
            for (int i = 0; i < 4; ++i) a[m][i] = t2[m][2 * step + i / 2][i % 2];
          }
          multiply<2, kColumns / 16>(acc, a, b_row(last + column * kT1Pitch, kT1Pitch) + step * kStepBytes,
                                     kT1Pitch);
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
