// The forward pass of tucker2, band by band: t1 rows into a zero-bordered channels-last scratch that stays in
// L2, the core over it into a t2 band that stays in L1, the last factor from there into y. With transposed
// factors it is also the gradient of x.
//
// What each version bought: fp32, batch 8, one core of Zen 5, on which the tile itself reaches 265 GFLOP/s.
//   tiles of 14 pixels x 2 vectors over that banding     92 to 99 % of that from rank 16 up, buffers in cache
//   accumulators of lane-packed tiles in registers       2.2 to 2.4x at rank 8: a fold that was not unrolled had
//                                                        kept them on the stack
//   Winograd F(2x2, 3x3) between the 1x1 factors         1.1x at rank 32, 1.35x at 64, 1.5x at 128, 1.35x at 256
//   sums cut at 128                                      error 2.9e-7 instead of 6.7e-7 at rank 256
//   asking for the next band's memory during the core    best rival / ours on the ResNet shapes 1.08 -> 1.21
//   what a store does chosen once a tile, not per store  a tile of 16 steps 190 -> 217 GFLOP/s, lane-packed ones
//                                                        187 -> 222: 6 % over all shapes, 20 % at ranks to 16
//   tiles of 4 vectors where a sum is short              (with the former)
//   a line between the points of Winograd's tiles        5 to 12 % where they lay a power of two apart
//   memory of large outputs kept between calls           128->128@28, ranks 16, batch 64: 15.1 -> 4.5 ms; page
//                                                        faults had been two thirds of it, as malloc gave its heap back
//   asking for the next part of a factor beyond 256 KB   512@7, batch 1, factors out of cache: 550 -> 458 us at
//                                                        rank 256; in cache they lose up to 8 % by it
//   a few lines every 8 steps instead of 40 at once,     64->128@56/2, ranks 16/32: core 285 -> 218 us, others 1 to 6 %;
//   bands of one height and a next image's whole first   with x out of cache: 128->256@28/2, ranks 32/64,
//   band, not only what the last band had of rows        794 -> 660, 256@14, rank 64, 795 -> 685 to 774
//   non-temporal stores for outputs from 8 MB on         0 to 15 %
//   tails of up to 8 outputs with several lanes each     1.33x at rank 17 or 18, 1.26 at 20, 1.14 at 24, 1.17 at
//     (lane packing) instead of a padded vector          40, 1.06 to 1.1 at 72 and 104; planes of x, whose first
//                                                        factor has no part in it, two thirds of that
//   ranks 10 and 12 as 8 and a tail                      1.05 to 1.19x
// Tried without gain: huge pages for outputs and scratch below 2 MB; asking for a call's scratch and factors in
// its first band (what they cost 512@7 at rank 128 after other work, 280 of 960 us, only moved there); vectors of half
// the width for tails (they reach half the rate, 139 of 277 GFLOP/s, and so take as long as whole ones); 9 to 12
// outputs beside whole vectors as two tails (0.95 to 0.98x at ranks 25 and 28); half-width stores instead of masked
// ones; a pixel's tiles for all outputs before the next pixel's; 14 x 2 tiles whose sums are finished in place (GCC
// then spills a weight in the loop: 252 -> 185).
#pragma once

#include "cpu/tucker2_sweep.inl"
#if !defined(KEGFAST_PAIRS)
#include "cpu/tucker2_winograd.inl"
#endif

namespace kegfast::KEGFAST_ISA {
namespace {

constexpr int64_t kNearBytes = 512 << 10;

// Outputs that the caches cannot keep bypass them.
constexpr int64_t kStreamBytes = 8 << 20;

bool streams(const Tucker2Params& p) {
  const int64_t bytes = kNumberBytes * p.images * p.out_height * p.out_width * p.features;
  return p.channels_last && p.features % kLanes == 0 &&
         reinterpret_cast<uintptr_t>(p.y) % (kNumberBytes * kLanes) == 0 && bytes >= kStreamBytes;
}

int64_t image_bytes(const Tucker2Params& p) {
  return kNumberBytes * p.images *
         (p.height * p.width * p.channels + p.out_height * p.out_width * p.features);
}

class Forward {
 public:
  Forward(const Tucker2Params& p, const Tucker2Plan& plan, float* scratch)
      : p_(p),
        plan_(plan),
        scratch_(scratch),
        t1_row_(padded_width(p) * words(p.rank_in)),
        far_(image_bytes(p) > kNearBytes),
        stream_(streams(p)) {
    const Window window = core_window(p);
    for (int64_t s = 0; s < window.segments; ++s) {
      const int64_t row = p.dilation_w == 1 ? s : s / p.kernel_w,
                    column = p.dilation_w == 1 ? 0 : s % p.kernel_w;
      window_[s] = row * p.dilation_h * t1_row_ + column * p.dilation_w * words(p.rank_in);
    }
  }

  // Output rows first <= row < last of `count` images from `image` on.
  void run(int64_t image, int64_t count, int64_t first, int64_t last) {
    image_ = image, count_ = count;
    have_begin_ = have_end_ = 0;
    t1_image_ = (p_.t1 ? padded_height(p_) : plan_.t1_rows) * t1_row_;
    t1_ = p_.t1 ? p_.t1 + image * t1_image_ : scratch_ + plan_.t1_at;
    for (int64_t row = first; row < last; row += plan_.band_rows) {
      const int64_t rows = smaller(plan_.band_rows, last - row);
      const int64_t pixels = count * rows * p_.out_width;
      if (p_.up.on)
        need_rows(0, padded_height(p_));
      else
        need_rows(row * p_.stride_h, (row + rows - 1) * p_.stride_h + (p_.kernel_h - 1) * p_.dilation_h + 1);
      float* t2 = p_.t2 ? p_.t2 + (image * p_.out_height + row) * p_.out_width * words(p_.rank_out)
                        : scratch_ + plan_.t2_at;
      look_ahead(row, rows, last);
      core(row, rows, t2);
      if (!p_.y) continue;
      if (p_.channels_last)
        last_to_pixels(row, pixels, t2);
      else
        for (int64_t n = 0; n < count; ++n)
          last_to_planes(image + n, row, rows * p_.out_width,
                         t2 + n * rows * p_.out_width * words(p_.rank_out));
    }
  }

 private:
  // Makes the padded rows begin <= row < end of t1 present; rows come in rising order.
  void need_rows(int64_t begin, int64_t end) {
    if (have_end_ == 0) have_begin_ = have_end_ = p_.t1 ? 0 : begin, origin_ = have_begin_;
    if (!p_.t1 && end - origin_ > plan_.t1_rows) {
      const int64_t keep = larger(0, have_end_ - begin);
      if (keep) memmove(t1_, t1_ + (begin - origin_) * t1_row_, keep * t1_row_ * sizeof(float));
      origin_ = begin;
    }
    const int64_t from = larger(have_end_, p_.t1 ? 0 : begin);
    const int64_t to = p_.t1 ? larger(end, last_call_end(end)) : end;
    for (int64_t n = 0; n < count_; ++n) fill_rows(n, from, to);
    have_end_ = larger(have_end_, to);
  }

  int64_t last_call_end(int64_t end) const {
    // A kept t1 is complete: the last band also writes the rows that no window reaches.
    const int64_t reach = (p_.out_height - 1) * p_.stride_h + (p_.kernel_h - 1) * p_.dilation_h + 1;
    return end == reach ? padded_height(p_) : end;
  }

  void fill_rows(int64_t n, int64_t from, int64_t to) {
    float* t1 = t1_ + n * t1_image_ - origin_ * t1_row_;
    const int64_t top = clamp(p_.padding_h, from, to), bottom = clamp(p_.padding_h + p_.height, top, to);
    const int64_t side = p_.padding_w * words(p_.rank_in);
    memset(t1 + from * t1_row_, 0, (top - from) * t1_row_ * sizeof(float));
    memset(t1 + bottom * t1_row_, 0, (to - bottom) * t1_row_ * sizeof(float));
    for (int64_t row = top; row < bottom && side; ++row) {
      memset(t1 + row * t1_row_, 0, side * sizeof(float));
      memset(t1 + (row + 1) * t1_row_ - side, 0, side * sizeof(float));
    }
    first(n, top - p_.padding_h, bottom - top, t1 + top * t1_row_ + side);
  }

  // t1 = first x for `rows` input rows from `row` on.
  void first(int64_t n, int64_t row, int64_t rows, float* t1) {
    if (rows <= 0) return;
    Tile tile{};
    tile.segments = kOrigin;
    tile.segment_count = 1;
    tile.segment_length = words(p_.channels);
    tile.b = p_.packed + plan_.first_at;
    tile.c_step = p_.rank_in;
    const int64_t at = (image_ + n) * p_.x_image + row * p_.x_row;
    Grid grid{1, rows, p_.width, 0, p_.x_row / kPair, 0, t1_row_ * kPair};
    if (!gathers(p_)) {
      tile.a = reinterpret_cast<const float*>(static_cast<const Number*>(p_.x) + at);
      tile.c = reinterpret_cast<Number*>(t1);
      return first_sweep(tile, grid, (p_.channels_last ? p_.x_pixel : p_.x_channel) / kPair);
    }
    const int64_t step = gathered_rows(p_);
    for (int64_t r = 0; r < rows; r += step) {
      grid.rows = smaller(step, rows - r);
      grid.a_row = p_.channels_last ? p_.width * words(p_.channels) : p_.width;
      gather(static_cast<const uint16_t*>(p_.x) + at + r * p_.x_row, grid.rows);
      tile.a = scratch_ + plan_.x_at;
      tile.c = reinterpret_cast<Number*>(t1 + r * t1_row_);
      first_sweep(tile, grid, p_.channels_last ? words(p_.channels) : grid.rows * p_.width);
    }
  }

  // Rows of x into the scratch as words: [row][pixel][channels], or from planes [channels][row][pixel].
  void gather(const uint16_t* x, int64_t rows) {
    float* to = scratch_ + plan_.x_at;
    if (p_.channels_last) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < p_.width; ++i, to += words(p_.channels))
          gather_run(x + r * p_.x_row + i * p_.x_pixel, nullptr, p_.channels, to);
      return;
    }
    const bool whole = p_.x_row == p_.width;
    const int64_t runs = whole ? 1 : rows, run = whole ? rows * p_.width : p_.width;
    for (int64_t c = 0; c < p_.channels; c += kPair)
      for (int64_t r = 0; r < runs; ++r, to += run) {
        const uint16_t* const from = x + c * p_.x_channel + r * p_.x_row;
        gather_run(from, c + 1 < p_.channels ? from + p_.x_channel : nullptr, run, to);
      }
  }

  // A pixel's channels, or the same pixels of one channel (of two where numbers come in pairs).
  void gather_run(const uint16_t* from, const uint16_t* next, int64_t n, float* to) {
#if defined(KEGFAST_PAIRS)
    if (!p_.channels_last) return interleave(from, next, n, to);
    to[words(n) - 1] = 0;
    memcpy(to, from, static_cast<size_t>(n) * kNumberBytes);
#else
    (void)next;
    to_float(p_.type, from, to, n);
#endif
  }

  void first_sweep(Tile& tile, const Grid& grid, int64_t step) {
    tile.a_step = step;
    if (p_.channels_last)
      sweep<A::row_major>(tile, grid, step, p_.rank_in);
    else
      sweep<A::k_major>(tile, grid, 1, p_.rank_in);
  }

  // What the band's y and the next band's t1 will touch, if the caches do not hold it anyway.
  void look_ahead(int64_t row, int64_t rows, int64_t last) {
    ahead_.clear();
    if (!far_) return;
    const int64_t size = p_.type == Tucker2Type::float32 ? 4 : 2;
    const int64_t plane = p_.out_height * p_.out_width, band = rows * p_.out_width;
    const char* y = static_cast<const char*>(p_.y) + image_ * p_.features * plane * size;
    if (p_.y && p_.channels_last && !stream_)
      ahead_.add(y + row * p_.out_width * p_.features * size, count_ * band * p_.features * size, 0, 1);
    else if (p_.y && !p_.channels_last)
      ahead_.add(y + row * p_.out_width * size, band * size, plane * size, count_ * p_.features);

    if (p_.soon) {
      const int64_t bytes = count_ * p_.soon_bytes, from = bytes / 64 * row / last * 64,
                    to = bytes / 64 * (row + rows) / last * 64;
      ahead_.add(p_.soon + image_ * p_.soon_bytes + from, to - from, 0, 1);
    }
    const bool next_image = row + rows >= last;
    const int64_t image = next_image ? image_ + count_ : image_;
    const int64_t begin = next_image ? 0 : clamp(have_end_ - p_.padding_h, 0, p_.height);
    const int64_t images = next_image ? smaller(count_, p_.images - image) : 1;
    const int64_t halo = next_image ? (p_.kernel_h - 1) * p_.dilation_h + 1 - p_.padding_h - p_.stride_h : 0;
    const int64_t whole = plan_.group_images > 1 || plan_.band_rows == p_.out_height
                              ? p_.height
                              : plan_.band_rows * p_.stride_h + halo;
    const int64_t height = smaller(whole, p_.height - begin);
    if (images <= 0) return;
    const char* x = static_cast<const char*>(p_.x) + (image * p_.x_image + begin * p_.x_row) * size;
    if (p_.channels_last)  // images follow each other in all but sliced tensors
      ahead_.add(x, p_.width * p_.channels * size, p_.x_row * size, images * height);
    else
      ahead_.add(x, height * p_.width * size, p_.x_channel * size, images * p_.channels);
  }

  // How often the tiles of a band's core ask for lines, about.
  int64_t steps(int64_t rows) const {
    const int64_t pixels = max_pixels(2);
    if (const int64_t edge = plan_.winograd) {
      const int64_t tiles = count_ * ceil_div(rows, edge) * ceil_div(p_.out_width, edge);
      const int64_t vectors = ceil_div(p_.rank_out, 2 * kLanes);
      return points_of(edge) * vectors * ceil_div(tiles, pixels) * ceil_div(p_.rank_in, kAheadSteps);
    }
    const Window window = core_window(p_);
    int64_t each = 0;  // of a tile
    for_parts(p_.rank_out, window, true, [&](const Part& part, int64_t) {
      each += ceil_div(part.outputs * part.group, 2 * kLanes) * window.segments *
              ceil_div(window.length, kAheadSteps * part.group);
    });
    return each * count_ * rows * ceil_div(p_.out_width, pixels);
  }

  void core(int64_t row, int64_t rows, float* t2) {
    ahead_.spread_over(steps(rows));
    Ahead* const ahead = far_ ? &ahead_ : nullptr;
#if !defined(KEGFAST_PAIRS)
    if (plan_.winograd) {
      const float* const t1 = t1_ + (row * p_.stride_h - origin_) * t1_row_;
      const WinogradBand band{count_, rows, t1, t1_image_, t1_row_, rows + 2, t2};
      const float* const packed = p_.packed + plan_.winograd_at;
      float* const tiles = scratch_ + plan_.tiles_at;
      if (plan_.winograd == 2) return Winograd<2>(p_, packed, tiles, ahead).run(band);
      return Winograd<4>(p_, packed, tiles, ahead).run(band);
    }
#endif
    if (p_.up.on) return core_phases(t2, ahead);
    const Window window = core_window(p_);
    Tile tile{};
    tile.segments = window_;
    tile.segment_count = window.segments;
    tile.segment_length = window.length;
    tile.a = t1_ + (row * p_.stride_h - origin_) * t1_row_;
    tile.a_step = p_.stride_w * words(p_.rank_in);
    tile.b = p_.packed + plan_.core_at;
    tile.c = reinterpret_cast<Number*>(t2);
    tile.c_step = p_.rank_out;
    tile.ahead = ahead;
    const int64_t t2_row = p_.out_width * p_.rank_out;
    const Grid grid{count_, rows, p_.out_width, t1_image_, p_.stride_h * t1_row_, rows * t2_row, t2_row};
    sweep<A::row_major>(tile, grid, tile.a_step, p_.rank_out);
  }

  // The upsampling core of one image: every phase fills its own comb of the output.
  void core_phases(float* t2, Ahead* ahead) {
    Tile tile{};
    tile.segments = window_;
    tile.segment_length = words(p_.rank_in);
    tile.a = t1_;
    tile.a_step = words(p_.rank_in);
    tile.b = p_.packed + plan_.core_at;
    tile.c_step = p_.up.stride_w * p_.rank_out;
    tile.ahead = ahead;
    Number* const out = reinterpret_cast<Number*>(t2);
    const int64_t row = p_.out_width * p_.rank_out;
    for (int64_t a = 0; a < p_.up.stride_h; ++a)
      for (int64_t b = 0; b < p_.up.stride_w; ++b) {
        const Comb h = comb_h(p_, a), w = comb_w(p_, b);
        tile.c = out + h.first * row + w.first * p_.rank_out;
        tile.segment_count = h.taps * w.taps;
        const Grid grid{1, h.count, w.count, 0, t1_row_, 0, p_.up.stride_h * row};
        if (tile.segment_count == 0) {
          clear(tile, grid);
          continue;
        }
        for (int64_t s = 0; s < tile.segment_count; ++s)
          window_[s] = (p_.padding_h + h.source - s / w.taps) * t1_row_ +
                       (p_.padding_w + w.source - s % w.taps) * tile.a_step;
        if (h.count && w.count) sweep<A::row_major>(tile, grid, tile.a_step, p_.rank_out);
        tile.b += packed_floats(p_.rank_out, {tile.segment_count, tile.segment_length});
      }
  }

  void clear(const Tile& tile, const Grid& grid) const {
    for (int64_t r = 0; r < grid.rows; ++r)
      for (int64_t i = 0; i < grid.pixels; ++i)
        memset(tile.c + r * grid.c_row + i * tile.c_step, 0, p_.rank_out * sizeof(Number));
  }

  bool converts() const { return kPair == 1 && p_.type != Tucker2Type::float32; }
  Number* output(int64_t at) const {
    return converts() ? reinterpret_cast<Number*>(scratch_ + plan_.y_at) : static_cast<Number*>(p_.y) + at;
  }

  void last_to_pixels(int64_t row, int64_t pixels, const float* t2) {
    const int64_t at = (image_ * p_.out_height + row) * p_.out_width * p_.features;
    const bool convert = converts();
    Number* const y = output(at);
    Tile tile{};
    tile.segments = kOrigin;
    tile.segment_count = 1;
    tile.segment_length = words(p_.rank_out);
    tile.a = t2;
    tile.a_step = words(p_.rank_out);
    tile.b = p_.packed + plan_.last_at;
    tile.c = y;
    tile.c_step = p_.features;
    tile.bias = p_.bias;
    tile.relu = p_.relu;
    tile.stream = stream_ && !convert;
    const Grid grid{1, 1, pixels, 0, 0, 0, 0};
    sweep<A::row_major>(tile, grid, words(p_.rank_out), p_.features);
    if (convert)
      from_float(p_.type, reinterpret_cast<const float*>(y), static_cast<uint16_t*>(p_.y) + at,
                 pixels * p_.features);
  }

  // Planes of y: pixels in lanes. The band is transposed into [vectors of pixels][R2][kLanes], the factor is
  // broadcast.
  void last_to_planes(int64_t image, int64_t row, int64_t pixels, const float* t2) {
    float* planes = scratch_ + plan_.planes_at;
    to_planes(t2, pixels, words(p_.rank_out), planes);
    const int64_t plane = p_.out_height * p_.out_width;
    const int64_t at = image * p_.features * plane + row * p_.out_width;
    const bool convert = converts();
    Tile tile{};
    tile.segments = kOrigin;
    tile.segment_count = 1;
    tile.segment_length = words(p_.rank_out);
    tile.a_step = words(p_.rank_out);
    tile.b_vector = words(p_.rank_out) * kLanes;
    tile.c_step = convert ? pixels : plane;
    tile.relu = p_.relu;
    Number* const y = output(at);
    const float* weights = p_.packed + plan_.last_at;
    const int64_t vectors = ceil_div(pixels, kLanes);
    const Cut cut = best_cut(vectors, p_.features, p_.rank_out, kMaxVectors);
    const auto tiles = tiles_of<A::row_major, Bias::per_row>(1);
    for (int64_t v = 0; v < vectors; v += cut.vectors) {
      const int width = static_cast<int>(smaller(cut.vectors, vectors - v));
      tile.b = planes + v * tile.b_vector;
      tile.tail = static_cast<int>(smaller(kLanes, pixels - (v + width - 1) * kLanes));
      int64_t done = 0;
      for (int i = 0; i < cut.tiles; ++i) {
        const int64_t next = (i + 1) * p_.features / cut.tiles;
        tile.a = weights + done * words(p_.rank_out);
        tile.c = y + done * tile.c_step + v * kLanes;
        tile.bias = p_.bias ? p_.bias + done : nullptr;
        tiles[width][next - done](tile);
        done = next;
      }
    }
    if (!convert) return;
    for (int64_t k = 0; k < p_.features; ++k)
      from_float(p_.type, reinterpret_cast<const float*>(y) + k * pixels,
                 static_cast<uint16_t*>(p_.y) + at + k * plane, pixels);
  }

  static void to_planes(const float* t2, int64_t pixels, int64_t channels, float* planes) {
    for (int64_t first = 0; first < pixels; first += kLanes)
      for (int64_t c = 0; c < channels; c += kLanes) {
        Floats rows[kLanes];
        const int64_t width = smaller(kLanes, channels - c), height = smaller(kLanes, pixels - first);
        for (int i = 0; i < kLanes; ++i)
          rows[i] = i >= height       ? Floats{}
                    : width == kLanes ? load_unaligned(t2 + (first + i) * channels + c)
                                      : load_first(t2 + (first + i) * channels + c, static_cast<int>(width));
        transpose(rows);
        float* out = planes + first * channels + c * kLanes;
        for (int i = 0; i < width; ++i) store_unaligned(out + i * kLanes, rows[i]);
      }
  }

  const Tucker2Params& p_;
  const Tucker2Plan& plan_;
  float* const scratch_;
  const int64_t t1_row_;
  const bool far_;  // x and y are more than the near caches hold
  const bool stream_;
  Ahead ahead_;
  int64_t window_[kMaxSegments];
  int64_t image_ = 0, count_ = 0;
  float* t1_ = nullptr;
  int64_t t1_image_ = 0;
  int64_t origin_ = 0, have_begin_ = 0, have_end_ = 0;  // padded rows: at t1_[0], and present
};

// Denormals cost 150x in FMA and carry nothing here: flushed inside, the caller's mode restored.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace

void tucker2_rows(const Tucker2Params& p, const Tucker2Plan& plan, int64_t begin, int64_t end,
                  float* scratch) {
  const FlushDenormals flush;
#if defined(KEGFAST_AMX)
  const AmxSession registers;
#endif
  Forward forward(p, plan, scratch);
  while (begin < end) {
    const int64_t image = begin / p.out_height, row = begin % p.out_height;
    const int64_t whole = row == 0 ? smaller(plan.group_images, (end - begin) / p.out_height) : 0;
    const int64_t rows = whole ? whole * p.out_height : smaller(p.out_height - row, end - begin);
    if (whole)
      forward.run(image, whole, 0, p.out_height);
    else
      forward.run(image, 1, row, row + rows);
    begin += rows;
  }
#if defined(__x86_64__)
  _mm_sfence();  // streamed stores become visible before the call ends
#endif
}

}  // namespace kegfast::KEGFAST_ISA
