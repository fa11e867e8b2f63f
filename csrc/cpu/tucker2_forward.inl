// The forward pass of tucker2, band by band: t1 rows into a zero-bordered channels-last scratch that stays in
// L2, the core over it into a t2 band that stays in L1, the last factor from there into y. With transposed
// factors it is also the gradient of x.
//
// What each version bought: fp32, batch 8, one core of Zen 5, on which the tile itself reaches 265 GFLOP/s.
//   tiles of 14 pixels x 2 vectors over that banding     92 to 99 % of that from rank 16 up, buffers in cache
//   accumulators of lane-packed tiles in registers       2.2 to 2.4x at rank 8: a fold that was not unrolled had
//                                                        kept them on the stack
//   Winograd F(2x2, 3x3) between the 1x1 factors         1.1x at rank 32, 1.35x at 64, 1.5x at 128, 1.35x at 256
//   sums by blocks of 128 k                                     error 2.9e-7 instead of 6.7e-7 at rank 256
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
//   a residual network's shortcut added in the last    ResNet-18, ranks C/4, batch 8, folded: 41.2 -> 39.5 ms, on
//     store, before the ReLU                             two threads 20.2 -> 19.4, half of what was predicted; 42 ->
//                                                        32 and 27 -> 18 where torch's sums came in fresh pages
//   tiles of up to 18 pixels x 1 vector, not 14: rows    32@16, rank 16, batch 64: 705 -> 600 us, 64->128@32/2, ranks
//     of 16 in one tile                                    8/16, batch 8: 161 -> 135; others on 16 pixels 1.06x
//   no prefetch where L2 holds x and y                   16@32, batch 8, rank 8: 97 -> 93 us, rank 2: 61 -> 50
//   the next part of a factor beyond 32 KB, of the next  out of cache, batch 1: 512@7, rank 256, by Winograd 476 ->
//     factor and of Winograd's next point asked for      309 us, directly 450 -> 371; 256->512@14/2, ranks 128/256,
//     every 8 steps, not in bursts between tiles         288 -> 256. In cache 0.93 of the peak (before 0.88); where
//                                                        L2 holds all of Winograd's points, they lose 2 to 4 %
//   x row by row in a call's first band; y of any size   out of cache, batch 1: 128->256@28/2, ranks 64/128, 282 ->
//     where the core's products outweigh the asking      231 us, 256->512@14/2, ranks 64/128, 116 -> 96
//   several taps from each word of t1 (run_taps) where   the core at rank 16: 0.76 -> 0.95 of the peak; 64@56, batch
//     the core has one vector of outputs                 1: 141 -> 126 us, 32@16, batch 64: 585 -> 498, 20->50, ranks
//                                                        5/12, batch 64: 266 -> 232
//   the same of packed lanes; the packed sums of several batch 8: 16@32, rank 8 89 -> 77 us, rank 4 54 -> 39, rank
//     pixels folded into one vector of t1 or t2            2 44 -> 31; 32@16, rank 4 18 -> 14; 64@56, rank 8 584 -> 496
//   calls of any size past the dispatcher, whose code    after other work, batch 8: 256@14, rank 32, 560 -> 450 us,
//     comes from memory too (tucker2_repeat.cpp)           128@28, rank 16, 640 -> 500; bfloat16 1.1 to 1.6x
// What remains, direct sums in cache: 0.93 of the peak from rank 64 up, 0.85 at rank 16, whose 1x1 factors are bound
// by loads, one for each product; out of cache 50 to 80 us of a call are code on its way from memory, two thirds of
// it Python's and torch's.
// Tried without gain: asking for a factor's next part into L1; asking for every second, fourth or eighth line and
// leaving the rest to the machine (0.6 to 1.0 of the speed; nothing asked for at all: 64@56, rank 8, batch 8,
// 642 -> 1268 us); huge pages for outputs and scratch below 2 MB; asking for a call's scratch and factors in its
// first band (what they cost 512@7 at rank 128 after other work, 280 of 960 us, only moved there); vectors of half
// the width for tails (they reach half the rate, 139 of 277 GFLOP/s, and so take as long as whole ones); 9 to 12
// outputs beside whole vectors as two tails (0.95 to 0.98x at ranks 25 and 28); half-width stores instead of masked
// ones; a pixel's tiles for all outputs before the next pixel's; 14 x 2 tiles whose sums are finished in place (GCC
// then spills a weight in the loop: 252 -> 185); asking for y and the next band of x during the 1x1 factors too (0.9
// to 0.96x at rank 16, whose loads are taken, nothing from 32 up); a line of each page two bands ahead; x by whole
// vectors whose quarters are shuffled, in place of a broadcast for each product (a first factor of rank 16 at 0.90 of
// the peak for 0.84, of rank 8 nothing: 2 % of a layer, for a packed form of its own).
#pragma once

#include "cpu/denormals.h"
#include "cpu/tucker2_stages.inl"

namespace kegfast::KEGFAST_ISA {
namespace {

constexpr int64_t kNearBytes = 1 << 20;

int64_t image_bytes(const Tucker2Params& p) {
  const int64_t outputs = p.addend ? 2 : 1;
  return kNumberBytes * p.images *
         (p.height * p.width * p.channels + outputs * p.out_height * p.out_width * p.features);
}

// Whether to prefetch x, y and the addend: L2 does not hold them, or prefetching in case costs nothing
// beside the core's vectors of products, so many for each line.
bool may_be_far(const Tucker2Params& p) {
  constexpr int64_t kFreeProducts = 32;
  const int64_t products = p.rank_in * p.rank_out * p.kernel_h * p.kernel_w;
  return image_bytes(p) > kNearBytes || products > kFreeProducts * (p.channels + p.features);
}

// Ranks from which a row of x costs the first factor enough for the machine's own prefetches to fall behind.
constexpr int64_t kLeastPrefetchRank = 32;

// The walk over bands: which rows of t1 exist, where, and what memory comes next.
class Forward {
 public:
  Forward(const Tucker2Params& p, const Tucker2Plan& plan, float* scratch)
      : p_(p),
        plan_(plan),
        scratch_(scratch),
        stages_(p, plan, scratch),
        t1_row_(stages_.t1_row()),
        far_(may_be_far(p)) {}

  // A band that is done: t2 of its pixels, and what it has added of t1, padded
  // rows begin <= row < end of images that are t1_image floats apart.
  struct FinishedBand {
    Band band;
    const float *t1, *t2;
    Prefetcher* prefetcher;  // or null: what is still to be prefetched
    int64_t t1_image, begin, end;
  };

  // Output rows first <= row < last of `count` images from `image` on.
  void run(int64_t image, int64_t count, int64_t first, int64_t last) {
    run(image, count, first, last, [](const FinishedBand&) {});
  }
  // The same; then(done) after each band.
  template <class F>
  void run(int64_t image, int64_t count, int64_t first, int64_t last, const F& then) {
    image_ = image, count_ = count;
    have_end_ = 0;
    t1_image_ = (p_.t1 ? padded_height(p_) : plan_.t1_rows) * t1_row_;
    t1_ = p_.t1 ? p_.t1 + image * t1_image_ : scratch_ + plan_.t1_at;
    for (int64_t row = first; row < last; row += plan_.band_rows) {
      const Band band{image, count, row, smaller(plan_.band_rows, last - row)};
      const int64_t from = row * p_.stride_h, windows = (band.rows - 1) * p_.stride_h + window_rows();
      const int64_t had = have_end_;
      if (p_.up.on)
        need_rows(0, padded_height(p_));
      else
        need_rows(from, from + windows);
      float* t2 = p_.t2 ? p_.t2 + (image * p_.out_height + row) * p_.out_width * words(p_.rank_out)
                        : scratch_ + plan_.t2_at;
      plan_prefetch(row, band.rows, last);
      prefetcher_.spread_over(stages_.core_steps(band) + band.count * band.rows * p_.prefetch_steps);
      const float* const t1 = p_.up.on ? t1_ : t1_ + (from - origin_) * t1_row_;
      Prefetcher* const prefetcher = far_ ? &prefetcher_ : nullptr;
      stages_.core(band, t1, t1_image_, t2, prefetcher);
      if (p_.y) stages_.last(band, t2);
      then(FinishedBand{band, t1_ + (had - origin_) * t1_row_, t2, prefetcher, t1_image_, had, have_end_});
    }
  }

 private:
  int64_t window_rows() const { return (p_.kernel_h - 1) * p_.dilation_h + 1; }

  // Makes the padded rows begin <= row < end of t1 present; rows come in rising order.
  void need_rows(int64_t begin, int64_t end) {
    if (have_end_ == 0) have_end_ = origin_ = p_.t1 ? 0 : begin;
    if (!p_.t1 && end - origin_ > plan_.t1_rows) {
      const int64_t keep = larger(0, have_end_ - begin);
      if (keep) memmove(t1_, t1_ + (begin - origin_) * t1_row_, keep * t1_row_ * sizeof(float));
      origin_ = begin;
    }
    const int64_t from = larger(have_end_, p_.t1 ? 0 : begin);
    const int64_t to = p_.t1 ? larger(end, last_call_end(end)) : end;
    for (int64_t n = 0; n < count_; ++n) fill_rows(n, from, to);
    asked_ = true;
    have_end_ = larger(have_end_, to);
  }

  int64_t last_call_end(int64_t end) const {
    // A kept t1 is complete: the last band also writes the rows that no window reaches.
    const int64_t reach = (p_.out_height - 1) * p_.stride_h + window_rows();
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
    const bool far = far_ && !asked_ && p_.rank_in >= kLeastPrefetchRank;
    stages_.first(image_ + n, top - p_.padding_h, bottom - top, t1 + top * t1_row_ + side, far);
  }

  // What the band's y and addend and the next band's t1 will touch, if the caches do not hold it anyway.
  void plan_prefetch(int64_t row, int64_t rows, int64_t last) {
    prefetcher_.clear();
    if (!far_) return;
    const int64_t size = p_.type == Tucker2Type::float32 ? 4 : 2;
    const int64_t plane = p_.out_height * p_.out_width, band = rows * p_.out_width;
    const int64_t pixel = p_.channels_last ? p_.features : 1;
    const int64_t at = (image_ * p_.features * plane + row * p_.out_width * pixel) * size;
    const void* const outputs[] = {stages_.stream() ? nullptr : p_.y, p_.addend};
    for (const void* const output : outputs)
      if (output && p_.channels_last)
        prefetcher_.add(static_cast<const char*>(output) + at, count_ * band * p_.features * size, 0, 1);
      else if (output)
        prefetcher_.add(static_cast<const char*>(output) + at, band * size, plane * size,
                        count_ * p_.features);

    for (const Tucker2Prefetch& prefetch : p_.prefetch) {
      const int64_t bytes = count_ * prefetch.bytes, from = bytes / 64 * row / last * 64,
                    to = bytes / 64 * (row + rows) / last * 64;
      prefetcher_.add(prefetch.at + image_ * prefetch.bytes + from, to - from, 0, 1);
    }
    const bool next_image = row + rows >= last;
    const int64_t image = next_image ? image_ + count_ : image_;
    const int64_t begin = next_image ? 0 : clamp(have_end_ - p_.padding_h, 0, p_.height);
    const int64_t images = next_image ? smaller(count_, p_.images - image) : 1;
    const int64_t halo = next_image ? window_rows() - p_.padding_h - p_.stride_h : 0;
    const int64_t whole = plan_.group_images > 1 || plan_.band_rows == p_.out_height
                              ? p_.height
                              : plan_.band_rows * p_.stride_h + halo;
    const int64_t height = smaller(whole, p_.height - begin);
    if (images <= 0) return;
    const char* x = static_cast<const char*>(p_.x) + (image * p_.x_image + begin * p_.x_row) * size;
    if (p_.channels_last)  // images follow each other in all but sliced tensors
      prefetcher_.add(x, p_.width * p_.channels * size, p_.x_row * size, images * height);
    else
      prefetcher_.add(x, height * p_.width * size, p_.x_channel * size, images * p_.channels);
  }

  const Tucker2Params& p_;
  const Tucker2Plan& plan_;
  float* const scratch_;
  Stages stages_;
  const int64_t t1_row_;
  const bool far_;
  bool asked_ = false;  // for what the band at hand reads of x, by the band before
  Prefetcher prefetcher_;
  int64_t image_ = 0, count_ = 0;
  float* t1_ = nullptr;
  int64_t t1_image_ = 0;
  int64_t origin_ = 0, have_end_ = 0;  // padded rows: at t1_[0], and behind the last that is present
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
  fence_streams();
}

}  // namespace kegfast::KEGFAST_ISA
