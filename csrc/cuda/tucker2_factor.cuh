// tucker2 on CUDA: factors in any strides, and how chunks of their rows come to shared memory.
//
// A chunk is 128 bytes of K of each row, in 8 pieces of 16 bytes. A thread copies one piece of every 16th
// row, the same piece of each: where in a row it stands is computed once a chunk, where the rows stand once a
// product.
#pragma once

#include "simt.cuh"

namespace kegfast::cuda {

using namespace kegfast::simt;

constexpr int kTuckerThreads = 128;
constexpr int kStepBytes = 32, kChunkSteps = 4, kChunkBytes = kStepBytes * kChunkSteps,
              kPieces = kChunkBytes / 16;
constexpr int kPitch = kChunkBytes + 16;              // bytes between rows of a chunk in shared memory
constexpr int kPieceRows = kTuckerThreads / kPieces;  // from one of a thread's rows to the next

KEGFAST_DEVICE int piece_row() {  // a thread's first row
  return thread() / kPieces;
}
KEGFAST_DEVICE int piece_byte() {  // of a row's chunk
  return thread() % kPieces * 16;
}

// 16 bytes to shared memory: `count` elements `stride` apart, then zeros.
template <class T>
KEGFAST_DEVICE void gather_piece(char* to, const T* from, int64_t stride, int count) {
  uint32_t words[4] = {};
  KEGFAST_UNROLL
  for (int e = 0; e < int(16 / sizeof(T)); ++e) {
    if (e >= count) break;
    const T value = from[e * stride];
    if constexpr (sizeof(T) == 4) {
      words[e] = float_bits(value);
    } else {
      words[e / 2] |= uint32_t(value.bits) << (16 * (e % 2));
    }
  }
  store_shared16(to, {{words[0], words[1], words[2], words[3]}});
}

// A factor as (rows, inputs, kernel_h, kernel_w) in any strides, negative ones too: a transposed or flipped
// factor is another view. Its K goes tap by tap, each tap's inputs padded with zeros to whole steps.
template <class T>
struct Factor {
  const T* data;
  int64_t row, input, tap_h, tap_w;
  int rows, inputs, kernel_h, kernel_w;
  bool vectors;  // a tap's inputs lie together, in whole pieces of 16 bytes at multiples of 16

  KEGFAST_ANYWHERE int taps() const { return kernel_h * kernel_w; }
  KEGFAST_ANYWHERE int tap_bytes() const {
    return int((inputs * sizeof(T) + kStepBytes - 1) / kStepBytes * kStepBytes);
  }
  KEGFAST_ANYWHERE int row_bytes() const { return tap_bytes() * taps(); }
  KEGFAST_ANYWHERE int64_t elements() const { return int64_t(rows) * inputs * taps(); }
  KEGFAST_ANYWHERE int chunks() const { return (row_bytes() + kChunkBytes - 1) / kChunkBytes; }
  // Which tap a byte of K belongs to, and which of its inputs.
  KEGFAST_ANYWHERE void place(int byte, int& tap, int& input) const {
    tap = taps() == 1 ? 0 : byte / tap_bytes();
    input = (byte - tap * tap_bytes()) / int(sizeof(T));
  }
  KEGFAST_ANYWHERE int steps(int chunk) const {
    return smaller(kChunkSteps, row_bytes() / kStepBytes - chunk * kChunkSteps);
  }
};

template <class T>
Factor<T> make_factor(const T* data, const int64_t (&strides)[4], int rows, int inputs, int kernel_h,
                      int kernel_w) {
  constexpr int kVector = 16 / sizeof(T);
  const auto whole = [](int64_t stride, int size) { return size == 1 || stride % kVector == 0; };
  const bool vectors = (strides[1] == 1 || inputs == 1) && inputs % kVector == 0 && whole(strides[0], rows) &&
                       whole(strides[2], kernel_h) && whole(strides[3], kernel_w) &&
                       reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return {data, strides[0], strides[1], strides[2], strides[3], rows, inputs, kernel_h, kernel_w, vectors};
}

// 16 bytes of a row to shared memory, from an input of a tap on; zeros where the factor has none.
template <class T>
KEGFAST_DEVICE void load_piece(const Factor<T>& factor, int row, int tap, int input, char* to) {
  const bool inside = row < factor.rows && tap < factor.taps() && input < factor.inputs;
  const T* from = factor.data;
  if (inside) {
    from += row * factor.row + tap / factor.kernel_w * factor.tap_h + tap % factor.kernel_w * factor.tap_w +
            input * factor.input;
  }
  if (factor.vectors) {
    cp_async16(to, from, inside);
  } else {
    gather_piece(to, from, factor.input, inside ? factor.inputs - input : 0);
  }
}

// Rows first .. first + kRowCount of a factor, a chunk at a time; zeros past the end of K. Of the rows that
// the factor has not, those in whole groups of 16 stay as they are: no warp multiplies them.
template <int kRowCount, class T>
class FactorLoad {
 public:
  KEGFAST_DEVICE FactorLoad(const Factor<T>& factor, int first)
      : factor_(factor),
        first_(first),
        live_(smaller(kRowCount, factor.rows - first)),
        row_(factor.data + (first + piece_row()) * factor.row) {}

  KEGFAST_DEVICE void operator()(char* stage, int chunk) const {
    if (!factor_.vectors) {
      elements(stage, chunk);
      return;
    }
    const int byte = chunk * kChunkBytes + piece_byte();
    int tap, input;
    factor_.place(byte, tap, input);
    const bool there = tap < factor_.taps() && input < factor_.inputs;
    const T* from = row_ + input;
    if (factor_.taps() > 1)
      from += tap / factor_.kernel_w * factor_.tap_h + tap % factor_.kernel_w * factor_.tap_w;
    char* to = stage + piece_row() * kPitch + piece_byte();
    KEGFAST_UNROLL
    for (int row = 0; row < kRowCount; row += kPieceRows) {
      if (row >= live_) break;
      const bool valid = there && row + piece_row() < live_;
      cp_async16(to + row * kPitch, valid ? from + row * factor_.row : factor_.data, valid);
    }
  }

 private:
  // Neighboring threads go along what lies together in memory.
  KEGFAST_DEVICE void elements(char* stage, int chunk) const {
    const bool down = factor_.row == 1;
    const int rows = (live_ + kPieceRows - 1) / kPieceRows * kPieceRows;
    KEGFAST_ROLLED
    for (int i = thread(); i < rows * kPieces; i += kTuckerThreads) {
      const int row = down ? i % rows : i / kPieces, piece = down ? i / rows : i % kPieces;
      int tap, input;
      factor_.place(chunk * kChunkBytes + piece * 16, tap, input);
      load_piece(factor_, first_ + row, tap, input, stage + row * kPitch + piece * 16);
    }
  }

  const Factor<T>& factor_;
  int first_, live_;
  const T* row_;  // of this thread's first row
};

}  // namespace kegfast::cuda
