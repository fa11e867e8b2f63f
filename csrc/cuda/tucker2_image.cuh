// tucker2 on CUDA: images in global memory, in any strides, and how tiles of them come to and go from shared
// memory.
#pragma once

#include "tucker2_mma.cuh"

namespace kegfast::cuda {

// (N, C, H, W) with strides in elements.
template <class T>
struct Image {
  T* data;
  int64_t image, channel, row, pixel;
  int channels, height, width;
  bool vectors;  // channels lie together, and every pixel starts at a multiple of 16 bytes
};

template <class T>
Image<T> make_image(T* data, const int64_t (&strides)[4], int channels, int height, int width) {
  constexpr int kVector = 16 / sizeof(T);
  const bool vectors = strides[1] == 1 && channels % kVector == 0 && strides[0] % kVector == 0 &&
                       strides[2] % kVector == 0 && strides[3] % kVector == 0 &&
                       reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return {data, strides[0], strides[1], strides[2], strides[3], channels, height, width, vectors};
}

// Channels first .. first + 16 bytes of pixel (y, x), zeros outside of the image, to shared memory.
template <class T>
KEGFAST_DEVICE void load_piece(const Image<const T>& x, char* to, int64_t n, int y, int column, int first) {
  const bool inside = unsigned(y) < unsigned(x.height) && unsigned(column) < unsigned(x.width);
  const T* from = x.data + (inside ? n * x.image + y * x.row + column * x.pixel : 0);
  if (x.vectors) {
    const bool valid = inside && first < x.channels;
    cp_async16(to, from + (valid ? first : 0), valid);
    return;
  }
  gather_piece(to, from + first * x.channel, x.channel, inside ? x.channels - first : 0);
}

// Piece i of a tile of kRows rows: neighbouring threads go along what lies together in memory.
template <class T>
KEGFAST_DEVICE void piece_of(const Image<T>& x, int i, int& row, int& piece) {
  row = x.vectors ? i / kPieces : i % kRows;
  piece = x.vectors ? i % kPieces : i / kRows;
}

template <class T>
struct Epilogue {
  const T* bias;  // [K], or null
  bool relu;
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

// Accumulators -> shared memory -> bias, ReLU -> y.
template <class T, int kTiles, class Pixel>
KEGFAST_DEVICE void store_tile(const Image<T>& y, const float (&acc)[2][kTiles][4], char* scratch,
                               int first_column, const Epilogue<T>& epilogue, Pixel pixel) {
  constexpr int kColumns = 16 * kTiles, kOutPitch = kColumns * sizeof(T) + 16;
  static_assert(kStages * stage_bytes(kTiles) >= kRows * kOutPitch);
  const Place<kTiles> place;
  barrier();  // the stages under `scratch` are read
  KEGFAST_UNROLL
  for (int m = 0; m < 2; ++m) {
    KEGFAST_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      KEGFAST_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int column = place.out_column(t, i);
        float value = acc[m][t][i];
        if (epilogue.bias != nullptr && first_column + column < y.channels)
          value += to_float(epilogue.bias[first_column + column]);
        if (epilogue.relu) value = value > 0 || value != value ? value : 0;  // NaN stays
        reinterpret_cast<T*>(scratch + place.out_row(m, i) * kOutPitch)[column] = from_float<T>(value);
      }
    }
  }
  barrier();
  store_rows(y, scratch, kOutPitch, kRows, first_column, smaller(kColumns, y.channels - first_column), pixel);
}

// Accumulators -> rows of shared memory, as the next stage's A: `live` columns, then zeros up to `columns`. What is
// accumulated past the factor's rows is 0 only while all of x is finite.
template <class T, int kTiles>
KEGFAST_DEVICE void keep_tile(char* rows, int pitch, int row_count, const float (&acc)[2][kTiles][4],
                              int first_row, int first_column, int live, int columns) {
  const Place<kTiles> place;
  KEGFAST_UNROLL
  for (int m = 0; m < 2; ++m) {
    KEGFAST_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      KEGFAST_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + place.out_row(m, i), column = first_column + place.out_column(t, i);
        if (row < row_count && column < columns)
          reinterpret_cast<T*>(rows + row * pitch)[column] = from_float<T>(column < live ? acc[m][t][i] : 0);
      }
    }
  }
}

}  // namespace kegfast::cuda
