// The three factors of tucker2's forward pass as GEMMs over the pixels of a band: x -> t1 -> t2 -> y.
#pragma once

#include "cpu/tucker2_sweep.inl"
#if !defined(KEGFAST_PAIRS)
#include "cpu/tucker2_winograd.inl"
#endif

namespace kegfast::KEGFAST_ISA {
namespace {

// Outputs that the caches cannot keep bypass them.
constexpr int64_t kStreamBytes = 8 << 20;

bool streams(const Tucker2Params& p) {
  const int64_t bytes = kNumberBytes * p.images * p.out_height * p.out_width * p.features;
  return p.channels_last && p.features % kLanes == 0 &&
         reinterpret_cast<uintptr_t>(p.y) % (kNumberBytes * kLanes) == 0 && bytes >= kStreamBytes;
}

// Output rows row <= r < row + rows of `count` images from `image` on.
struct Band {
  int64_t image, count, row, rows;
};

class Stages {
 public:
  Stages(const Tucker2Params& p, const Tucker2Plan& plan, float* scratch)
      : p_(p), plan_(plan), scratch_(scratch), stream_(streams(p)) {
    const Window window = core_window(p);
    for (int64_t s = 0; s < window.segments; ++s) {
      const int64_t row = p.dilation_w == 1 ? s : s / p.kernel_w,
                    column = p.dilation_w == 1 ? 0 : s % p.kernel_w;
      window_[s] = row * p.dilation_h * t1_row() + column * p.dilation_w * words(p.rank_in);
    }
  }

  int64_t t1_row() const { return padded_width(p_) * words(p_.rank_in); }  // floats from one to the next
  bool stream() const { return stream_; }

  // t1 = first x for `rows` input rows of an image from `row` on. far: they are still to be asked for.
  void first(int64_t image, int64_t row, int64_t rows, float* t1, bool far) {
    if (rows <= 0) return;
    Tile tile{};
    tile.segments = kOrigin;
    tile.segment_count = 1;
    tile.segment_length = words(p_.channels);
    tile.b = p_.packed + plan_.first_at;
    tile.c_step = p_.rank_in;
    const int64_t at = image * p_.x_image + row * p_.x_row;
    Grid grid{1, rows, p_.width, 0, p_.x_row / kPair, 0, t1_row() * kPair};
    if (!gathers(p_)) {
      tile.a = reinterpret_cast<const float*>(static_cast<const Number*>(p_.x) + at);
      tile.c = reinterpret_cast<Number*>(t1);
      const int64_t width = p_.width * kNumberBytes;
      const PrefetchRange x_row =
          p_.channels_last ? PrefetchRange{tile.a, width * p_.channels, 0, 1}
                           : PrefetchRange{tile.a, width, p_.x_channel * kNumberBytes, p_.channels};
      return first_sweep(tile, grid, (p_.channels_last ? p_.x_pixel : p_.x_channel) / kPair,
                         {far ? x_row : PrefetchRange{}, core_factor()});
    }
    const int64_t step = gathered_rows(p_);
    for (int64_t r = 0; r < rows; r += step) {
      grid.rows = smaller(step, rows - r);
      grid.a_row = p_.channels_last ? p_.width * words(p_.channels) : p_.width;
      gather(static_cast<const uint16_t*>(p_.x) + at + r * p_.x_row, grid.rows);
      tile.a = scratch_ + plan_.x_at;
      tile.c = reinterpret_cast<Number*>(t1 + r * t1_row());
      first_sweep(tile, grid, p_.channels_last ? words(p_.channels) : grid.rows * p_.width,
                  {{}, core_factor()});
    }
  }

  // About how often the tiles of a band's core prefetch.
  int64_t core_steps(const Band& band) const {
    if (const int64_t edge = plan_.winograd) {
      const int64_t tiles = band.count * ceil_div(band.rows, edge) * ceil_div(p_.out_width, edge);
      const int64_t vectors = ceil_div(p_.rank_out, 2 * kLanes);
      return winograd_points(p_) * vectors * ceil_div(tiles, max_pixels(2)) *
             ceil_div(p_.rank_in, kPrefetchSteps);
    }
    const auto row = [&](Window window, int64_t width) {
      int64_t each = 0;
      for_parts(p_.rank_out, window, true, [&](const Part& part, int64_t) {
        if (sums_taps(window, taps(), part.outputs, part.group)) {
          each += ceil_div(width, kMaxPixels) * window.segments *
                  ceil_div(words(p_.rank_in), kTapPrefetchSteps * part.group);
          return;
        }
        const int64_t lanes = part.outputs * part.group, vectors = lanes > kLanes ? 2 : 1;
        each += ceil_div(lanes, vectors * kLanes) * ceil_div(width, max_pixels(static_cast<int>(vectors))) *
                window.segments * ceil_div(window.length, kPrefetchSteps * part.group);
      });
      return each;
    };
    if (!p_.up.on) return band.count * band.rows * row(core_window(p_), p_.out_width);
    int64_t phases = 0;
    for (int64_t a = 0; a < p_.up.stride_h; ++a)
      for (int64_t b = 0; b < p_.up.stride_w; ++b) {
        const PhaseAxis w = phase_w(p_, b);
        phases += row({phase_h(p_, a).taps * w.taps, words(p_.rank_in)}, w.count);
      }
    return ceil_div(band.rows, p_.up.stride_h) * phases;
  }

  // t2 of a band from t1 at its first window, whose images are t1_image floats apart.
  void core(const Band& band, const float* t1, int64_t t1_image, float* t2, Prefetcher* prefetcher) {
#if !defined(KEGFAST_PAIRS)
    if (plan_.winograd) {
      const int64_t rows = (band.rows - 1) * p_.stride_h + 3;
      const WinogradBand tiled{band.count,
                               band.rows,
                               t1,
                               t1_image,
                               t1_row(),
                               rows,
                               padded_width(p_),
                               0,
                               0,
                               t2,
                               band.rows * p_.out_width * p_.rank_out,
                               {}};
      const float* const packed = p_.packed + plan_.winograd_at;
      float* const tiles = scratch_ + plan_.tiles_at;
      const PrefetchRange then = last_factor();
      if (p_.stride_h == 2) return Winograd<2, 2>(p_, packed, tiles, prefetcher, then).run(tiled);
      if (plan_.winograd == 2) return Winograd<2, 1>(p_, packed, tiles, prefetcher, then).run(tiled);
      return Winograd<4, 1>(p_, packed, tiles, prefetcher, then).run(tiled);
    }
#endif
    if (p_.up.on) return core_phases(band, t1, t2, prefetcher);
    const Window window = core_window(p_);
    Tile tile{};
    tile.segments = window_;
    tile.segment_count = window.segments;
    tile.segment_length = window.length;
    tile.a = t1;
    tile.a_step = p_.stride_w * words(p_.rank_in);
    tile.b = p_.packed + plan_.core_at;
    tile.c = reinterpret_cast<Number*>(t2);
    tile.c_step = p_.rank_out;
    tile.prefetcher = prefetcher;
    tile.taps = taps();
    const int64_t t2_row = p_.out_width * p_.rank_out;
    const Grid grid{band.count,         band.rows, p_.out_width, t1_image, p_.stride_h * t1_row(),
                    band.rows * t2_row, t2_row};
    sweep<ALayout::row_major>(tile, grid, tile.a_step, p_.rank_out, {{}, last_factor()});
  }

  // y of a band, from its t2.
  void last(const Band& band, const float* t2) {
    const int64_t pixels = band.rows * p_.out_width;
    if (p_.channels_last) return last_to_pixels(band.image, band.row, band.count * pixels, t2);
    for (int64_t n = 0; n < band.count; ++n)
      last_to_planes(band.image + n, band.row, pixels, t2 + n * pixels * words(p_.rank_out));
  }

 private:
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

  // Of a row of the core, as a tile takes them.
  int64_t taps() const {
    const bool apart = p_.stride_w == 1 && p_.dilation_w == 1 && !p_.up.on;
    return apart && (p_.kernel_w == 3 || p_.kernel_w == 5) ? p_.kernel_w : 0;
  }

  // What the next stage reads first of its factor, if that is large.
  PrefetchRange core_factor() const {
    if (p_.up.on) return {};
    if (plan_.winograd) return first_of(p_.packed + plan_.winograd_at, p_.rank_out, {1, p_.rank_in});
    return first_if_far(p_.packed + plan_.core_at, p_.rank_out, core_window(p_));
  }
  PrefetchRange last_factor() const {
    if (!p_.channels_last) return {};
    return first_if_far(p_.packed + plan_.last_at, p_.features, {1, words(p_.rank_out)});
  }
  static PrefetchRange first_if_far(const float* packed, int64_t outputs, Window window) {
    return 4 * packed_floats(outputs, window) > kFarBytes ? first_of(packed, outputs, window)
                                                          : PrefetchRange{};
  }

  void first_sweep(Tile& tile, const Grid& grid, int64_t step, const SweepPrefetch& prefetch) {
    tile.a_step = step;
    if (p_.channels_last)
      sweep<ALayout::row_major>(tile, grid, step, p_.rank_in, prefetch);
    else
      sweep<ALayout::k_major>(tile, grid, 1, p_.rank_in, prefetch);
  }

  // The upsampling core of one image's rows, from all of its t1: every phase
  // fills its own phase of the output.
  void core_phases(const Band& band, const float* t1, float* t2, Prefetcher* prefetcher) {
    Tile tile{};
    tile.segments = window_;
    tile.segment_length = words(p_.rank_in);
    tile.a = t1;
    tile.a_step = words(p_.rank_in);
    tile.b = p_.packed + plan_.core_at;
    tile.c_step = p_.up.stride_w * p_.rank_out;
    tile.prefetcher = prefetcher;
    Number* const out = reinterpret_cast<Number*>(t2);
    const int64_t row = p_.out_width * p_.rank_out;
    for (int64_t a = 0; a < p_.up.stride_h; ++a)
      for (int64_t b = 0; b < p_.up.stride_w; ++b) {
        const PhaseAxis h = phase_h(p_, a), w = phase_w(p_, b);
        const int64_t skipped = ceil_div(larger(0, band.row - h.first), p_.up.stride_h),
                      end = ceil_div(larger(0, band.row + band.rows - h.first), p_.up.stride_h);
        tile.c = out + (h.first + skipped * p_.up.stride_h - band.row) * row + w.first * p_.rank_out;
        tile.segment_count = h.taps * w.taps;
        const Grid grid{1, larger(0, end - skipped), w.count, 0, t1_row(), 0, p_.up.stride_h * row};
        if (tile.segment_count == 0) {
          clear(tile, grid);
          continue;
        }
        for (int64_t s = 0; s < tile.segment_count; ++s)
          window_[s] = (p_.padding_h + h.source + skipped - s / w.taps) * t1_row() +
                       (p_.padding_w + w.source - s % w.taps) * tile.a_step;
        if (grid.rows && grid.pixels) sweep<ALayout::row_major>(tile, grid, tile.a_step, p_.rank_out);
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
  // Where outputs are converted, they start as the addend's floats.
  void add(Tile& tile) const {
    tile.accumulate = p_.addend != nullptr;
    if (p_.addend && !converts())
      tile.addend = static_cast<const Number*>(p_.addend) - static_cast<const Number*>(p_.y);
  }
  const uint16_t* half_addend(int64_t at) const { return static_cast<const uint16_t*>(p_.addend) + at; }

  void last_to_pixels(int64_t image, int64_t row, int64_t pixels, const float* t2) {
    const int64_t at = (image * p_.out_height + row) * p_.out_width * p_.features;
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
    add(tile);
    if (convert && p_.addend)
      to_float(p_.type, half_addend(at), reinterpret_cast<float*>(y), pixels * p_.features);
    const Grid grid{1, 1, pixels, 0, 0, 0, 0};
    sweep<ALayout::row_major>(tile, grid, words(p_.rank_out), p_.features);
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
    add(tile);
    Number* const y = output(at);
    for (int64_t k = 0; convert && p_.addend && k < p_.features; ++k)
      to_float(p_.type, half_addend(at + k * plane), reinterpret_cast<float*>(y) + k * pixels, pixels);
    const float* weights = p_.packed + plan_.last_at;
    const int64_t vectors = ceil_div(pixels, kLanes);
    const Tiling tiling = best_tiling(vectors, p_.features, p_.rank_out, kMaxVectors);
    const auto tiles = kTiles<ALayout::row_major, Bias::per_row, 1>.f;
    for (int64_t v = 0; v < vectors; v += tiling.vectors) {
      const int width = static_cast<int>(smaller(tiling.vectors, vectors - v));
      tile.b = planes + v * tile.b_vector;
      tile.tail = static_cast<int>(smaller(kLanes, pixels - (v + width - 1) * kLanes));
      int64_t done = 0;
      for (int i = 0; i < tiling.tiles; ++i) {
        const int64_t next = (i + 1) * p_.features / tiling.tiles;
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
  const bool stream_;
  int64_t window_[kMaxSegments];
};

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
