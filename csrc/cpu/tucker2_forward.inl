// The forward pass of tucker2; with transposed factors also the gradient of x. Band by band of output rows:
//
//   x --first 1x1--> t1 rows --core k x k--> t2 band --last 1x1 + bias (+ addend, ReLU)--> y
//     channels-last    zero-bordered, in L2    in L1
//
// t1 grows by the rows that the next band adds, so no row is computed twice; the core reads it as kh segments
// of kw * R1 contiguous floats: a plain GEMM, no im2col. Rows of x, of y and panels of the factors that L2
// does not hold are prefetched from inside the core, whose products outweigh its loads. Bound by
// multiply-adds from rank 64 up (0.93 of the peak), by one broadcast a product in the 1x1 factors below (0.85
// at rank 16). Versions, what each bought and what did not: docs/kernels/log.md.
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
