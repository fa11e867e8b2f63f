// tucker2 on CUDA: images in global memory, in any strides, and how tiles of them come to and go from shared
// memory.
#pragma once

#include "tucker2_mma.cuh"

namespace kegfast::cuda {

struct Window {
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;

  // Rows and columns of input under so many of output.
  KEGFAST_ANYWHERE int halo_h(int tile_h) const {
    return (tile_h - 1) * stride_h + (kernel_h - 1) * dilation_h + 1;
  }
  KEGFAST_ANYWHERE int halo_w(int tile_w) const {
    return (tile_w - 1) * stride_w + (kernel_w - 1) * dilation_w + 1;
  }
};

// Where channel 0 of a pixel lies, inside of the image or not.
struct Pixel {
  int64_t at;
  int y, x;
  KEGFAST_DEVICE static Pixel nowhere() { return {0, -(1 << 30), 0}; }
};

// (N, C, H, W) with strides in elements.
template <class T>
struct Image {
  T* data;
  int64_t image, channel, row, pixel;
  int channels, height, width;
  bool vectors;  // channels lie together, and every pixel starts at a multiple of 16 bytes

  KEGFAST_DEVICE Pixel pixel_at(int64_t n, int y, int x) const {
    return {n * image + y * row + x * pixel, y, x};
  }
  KEGFAST_DEVICE bool has(int y, int x) const {
    return unsigned(y) < unsigned(height) && unsigned(x) < unsigned(width);
  }
};

template <class T>
Image<T> make_image(T* data, const int64_t (&strides)[4], int channels, int height, int width) {
  constexpr int kVector = 16 / sizeof(T);
  const bool vectors = strides[1] == 1 && channels % kVector == 0 && strides[0] % kVector == 0 &&
                       strides[2] % kVector == 0 && strides[3] % kVector == 0 &&
                       reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return {data, strides[0], strides[1], strides[2], strides[3], channels, height, width, vectors};
}

// Chunks of the windows of kRows pixels: K goes tap by tap, `per_tap` bytes each, or with kTaps false over
// the one tap. find(row) gives a row's window by its first pixel: asked once for each of a thread's rows,
// every 16th.
template <class T, bool kTaps, class Find>
class PixelLoad {
 public:
  // `count`: of the tile's rows, those that anybody reads.
  KEGFAST_DEVICE PixelLoad(const Image<const T>& x, int per_tap, const Window& window, int count, Find find)
      : x_(x), window_(window), per_tap_(per_tap), count_(count), find_(find) {
    if (!x.vectors) return;
    KEGFAST_UNROLL
    for (int i = 0; i < kRows / kPieceRows; ++i) pixels_[i] = find(piece_row() + i * kPieceRows);
  }

  KEGFAST_DEVICE void operator()(char* stage, int chunk) const {
    if (!x_.vectors) {
      elements(stage, chunk);
      return;
    }
    const Place place = at(chunk * kChunkBytes + piece_byte());
    char* to = stage + piece_row() * kPitch + piece_byte();
    KEGFAST_UNROLL
    for (int i = 0; i < kRows / kPieceRows; ++i) {
      if (i * kPieceRows >= count_) break;
      const Pixel& pixel = pixels_[i];
      const bool valid = place.channel < x_.channels && x_.has(pixel.y + place.y, pixel.x + place.x);
      cp_async16(to + i * kPieceRows * kPitch, x_.data + (valid ? pixel.at + place.offset : 0), valid);
    }
  }

 private:
  // A byte of K: how far from the window's first pixel, and its channel; past the last tap in no image.
  struct Place {
    int y, x, channel;
    int64_t offset;
  };
  KEGFAST_DEVICE Place at(int byte) const {
    if constexpr (!kTaps) {
      const int channel = byte / int(sizeof(T));
      return {0, 0, channel, channel * x_.channel};
    }
    const int tap = byte / per_tap_, channel = (byte - tap * per_tap_) / int(sizeof(T));
    const int y = tap / window_.kernel_w, x = tap % window_.kernel_w;
    if (y >= window_.kernel_h) return {0, 0, x_.channels, 0};
    return {y * window_.dilation_h, x * window_.dilation_w, channel,
            y * window_.dilation_h * x_.row + x * window_.dilation_w * x_.pixel + channel * x_.channel};
  }

  // One by one; neighboring threads go along what lies together in memory: pixels of a plane.
  KEGFAST_DEVICE void elements(char* stage, int chunk) const {
    KEGFAST_ROLLED
    for (int i = thread(); i < kRows * kPieces; i += kTuckerThreads) {
      const int row = i % kRows, byte = i / kRows * 16;
      const Place place = at(chunk * kChunkBytes + byte);
      const Pixel pixel = find_(row);
      const bool valid = x_.has(pixel.y + place.y, pixel.x + place.x);
      gather_piece(stage + row * kPitch + byte, x_.data + (valid ? pixel.at + place.offset : 0), x_.channel,
                   valid ? x_.channels - place.channel : 0);
    }
  }

  const Image<const T>& x_;
  const Window& window_;
  Pixel pixels_[kRows / kPieceRows];
  int per_tap_, count_;
  Find find_;
};

template <class T>
struct Epilogue {
  const T* bias;  // [K], or null
  bool relu;

  KEGFAST_DEVICE float finish(float value) const {
    return !relu || value > 0 || value != value ? value : 0;  // NaN stays
  }
};

// Rows of shared memory -> columns first .. of pixels of y, 16 bytes at a time where they may be. pixel(row):
// where channel 0 of the row's pixel lies in y, or -1.
template <class T, class Pixel>
KEGFAST_DEVICE void store_rows(const Image<T>& y, const char* rows, int pitch, int count, int first_column,
                               int columns, Pixel pixel) {
  constexpr int kVector = 16 / sizeof(T);
  if (y.vectors) {
    const int pieces = columns / kVector;
    for (int i = thread(); i < count * pieces; i += kTuckerThreads) {
      const int64_t at = pixel(i / pieces);
      if (at >= 0) {
        store_global16(y.data + at + first_column + i % pieces * kVector,
                       load_shared16(rows + i / pieces * pitch + i % pieces * 16));
      }
    }
  } else {
    const bool planes = y.channel != 1;
    for (int i = thread(); i < count * columns; i += kTuckerThreads) {
      const int row = planes ? i % count : i / columns, column = planes ? i / count : i % columns;
      const int64_t at = pixel(row);
      if (at >= 0)
        y.data[at + (first_column + column) * y.channel] =
            reinterpret_cast<const T*>(rows + row * pitch)[column];
    }
  }
}

// Two neighboring columns of a row, the first an even one.
template <class T>
KEGFAST_DEVICE void put_pair(char* row, int column, float first, float second) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<Pair*>(row + column * sizeof(T)) = {float_bits(first), float_bits(second)};
  } else {
    *reinterpret_cast<uint32_t*>(row + column * sizeof(T)) = pack<T>(first, second);
  }
}

// Accumulators -> shared memory -> bias, ReLU -> y. places[row]: where channel 0 of the row's pixel lies in
// y, or -1; in shared memory, as rows that 8 threads store together are looked up by each.
template <class T, int kTiles>
KEGFAST_DEVICE void store_tile(const Image<T>& y, const float (&acc)[2][kTiles][4], char* scratch,
                               int first_column, const Epilogue<T>& epilogue, const int64_t* places) {
  constexpr int kColumns = 16 * kTiles, kOutPitch = kColumns * sizeof(T) + 16;
  static_assert(kStages * stage_bytes(kTiles) >= kRows * kOutPitch);
  const Place<kTiles> place;
  const int live = smaller(kColumns, y.channels - first_column);
  barrier();  // the stages under `scratch` are read
  KEGFAST_UNROLL
  for (int t = 0; t < kTiles; ++t) {
    const int column = place.out_column(t, 0);
    float bias[2] = {};
    KEGFAST_UNROLL
    for (int e = 0; e < 2; ++e) {
      if (epilogue.bias != nullptr && column + e < live)
        bias[e] = to_float(epilogue.bias[first_column + column + e]);
    }
    KEGFAST_UNROLL
    for (int m = 0; m < 2; ++m) {
      KEGFAST_UNROLL
      for (int i = 0; i < 4; i += 2) {
        put_pair<T>(scratch + place.out_row(m, i) * kOutPitch, column,
                    epilogue.finish(acc[m][t][i] + bias[0]), epilogue.finish(acc[m][t][i + 1] + bias[1]));
      }
    }
  }
  barrier();
  if (!y.vectors) {
    store_rows(y, scratch, kOutPitch, kRows, first_column, live, [places](int row) { return places[row]; });
    return;
  }
  constexpr int kVector = 16 / sizeof(T), kRowPieces = kColumns / kVector;
  const int column = thread() % kRowPieces * kVector;
  KEGFAST_UNROLL
  for (int row = thread() / kRowPieces; row < kRows; row += kTuckerThreads / kRowPieces) {
    const int64_t at = places[row];
    if (at >= 0 && column < live) {
      store_global16(y.data + at + first_column + column,
                     load_shared16(scratch + row * kOutPitch + column * sizeof(T)));
    }
  }
}

// Accumulators -> rows of shared memory, as the next stage's A: `live` columns, then zeros up to `columns`.
// What is accumulated past the factor's rows is 0 only while all of x is finite.
template <class T, int kTiles>
KEGFAST_DEVICE void keep_tile(char* rows, int pitch, int row_count, const float (&acc)[2][kTiles][4],
                              int first_row, int first_column, int live, int columns) {
  const Place<kTiles> place;
  KEGFAST_UNROLL
  for (int m = 0; m < 2; ++m) {
    KEGFAST_UNROLL
    for (int i = 0; i < 4; i += 2) {
      const int row = first_row + place.out_row(m, i);
      if (row >= row_count) continue;
      KEGFAST_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        const int column = first_column + place.out_column(t, 0);
        if (column < columns) {
          put_pair<T>(rows + row * pitch, column, column < live ? acc[m][t][i] : 0,
                      column + 1 < live ? acc[m][t][i + 1] : 0);
        }
      }
    }
  }
}

}  // namespace kegfast::cuda
