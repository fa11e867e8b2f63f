// tucker2: POD parameters and kernel signatures of the fused Tucker-2 convolution, free of torch.
//
//   t1 = first x        (N, H, W, R1)  1x1, C -> R1
//   t2 = core * t1      (N, P, Q, R2)  kernel_h x kernel_w, R1 -> R2, with stride, padding, dilation
//   y  = last t2 + bias (N, P, Q, K)   1x1, R2 -> K, then an addend and ReLU if asked
//
// Gradients, with g = dL/dy: dz2 = last^T g, dz1 = core^T * dz2, dx = first^T dz1: the same operator with
// transposed factors, whose two intermediates are what the weight gradients need:
//   dbias = sum g,  dlast = sum g t2^T,  dcore = sum dz2 (window of t1)^T,  dfirst = sum dz1 x^T,
//   sums over images and pixels.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace kegfast {

enum class Tucker2Form : int { automatic, direct, winograd };
enum class Tucker2Type : int { float32, bfloat16, float16 };

// The core of a strided convolution run backwards: output pixel u takes tap i of input pixel (u + padding -
// i) / stride where that divides. Phases of the output are convolutions of their own, by every stride-th tap
// of the core.
struct Tucker2Upsampling {
  bool on;
  int64_t stride_h, stride_w, padding_h, padding_w;  // of the forward pass
};

// To prefetch, as it is read once a band is done: where the first image's is, or null, and the next so many
// bytes on.
struct Tucker2Prefetch {
  const char* at;
  int64_t bytes;
};

struct Tucker2Params {
  int64_t images, channels, rank_in, rank_out, features;  // N, C, R1, R2, K
  int64_t height, width, out_height, out_width;           // H, W, P, Q
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  Tucker2Upsampling up;  // then stride is 1 and padding what the phases need of zeros around t1
  bool channels_last;    // of x and y alike: pixels of contiguous channels, or planes
  bool relu;
  int64_t winograd;  // 2 or 4: the core may run as F(2x2, 3x3) or F(4x4, 3x3); 0: as neither
  Tucker2Form form;  // chosen by measurement
  bool pairs;        // computed in bfloat16 (tucker2_number.inl), on ranks made even; else in float32

  Tucker2Type type;                            // of x and y; between them float32, or bfloat16 in pairs
  const void* x;                               // (N, C, H, W) in the strides below, in elements
  int64_t x_image, x_channel, x_row, x_pixel;  // x_channel == 1 if channels_last, else x_pixel == 1
  const float* packed;                         // the factors as tucker2_pack laid them out
  const float* bias;                           // (K), or null
  const void* addend;                          // (N, K, P, Q) as y, which it may be, or null
  void* y;                                     // (N, K, P, Q) dense, or null: stop at t2
  float* t1;  // in words: (N, H + 2 ph, W + 2 pw, R1) with its zero border, or null: do not keep
  float* t2;  // (N, P, Q, R2), or null: do not keep
  Tucker2Prefetch prefetch[3];
  int64_t prefetch_steps;  // how often whoever reads it prefetches, per row of y
};

// A factor as its kernel sees it: rows (outputs) x inputs x taps, any strides; a transposed factor is another
// view.
struct Tucker2Factor {
  const void* data;
  Tucker2Type type;
  int64_t row, input, tap_h, tap_w;  // strides in elements, taps may be negative
  int64_t outputs, inputs;
};

// Where the forward pass gets its blocking from; filled by tucker2_plan for the instruction set at hand.
struct Tucker2Plan {
  int64_t group_images;  // whole images handled together, or 1 image in bands
  int64_t band_rows;     // output rows per band
  int64_t t1_rows;       // padded input rows that the scratch holds
  int64_t winograd;      // 2 or 4: the core in output tiles of such an edge; 0: as a direct sum
  int64_t first_at, core_at, winograd_at, last_at, packed_floats;  // within packed
  float packed_layout;  // its first float: a packed buffer with another one is not for this run
  int64_t t1_at, t2_at, planes_at, tiles_at, x_at, y_at, scratch_floats;  // within a thread's scratch
};

// A call, in float32 or in pairs of bfloat16, that is settled but for where x lies. Whoever holds one also
// holds the memory of its factors, of their copies and of their packed form.
struct Tucker2Prepared;
// Every tensor by the address of its implementation, alive, or null where there is none.
struct Tucker2Tensors {
  void *x, *factors[3], *bias, *addend;
  void* copies[3];  // of the factors, byte for byte, as they were when they were packed; null: they are final
  void* packed;
};
// geometry: strides, paddings, dilations. Null where every call needs what the operator does.
Tucker2Prepared* prepare_tucker2(const Tucker2Tensors& tensors, const std::array<int64_t, 6>& geometry,
                                 bool relu);
// y of x and the addend, null where there is none: by the addresses of their implementations, but y is an
// AtenTensorHandle, the caller's to delete. The factors must be alive. Null, with nothing done, where the
// call no longer holds: another kind of x or addend, other factors than then or other bytes in them, other
// threads, another instruction set.
void* run_prepared(const Tucker2Prepared& call, void* x, void* addend);
void unsettle();                                     // No call that is prepared by now holds any longer.
bool grad_mode();                                    // of this thread
int64_t prepared_work(const Tucker2Prepared& call);  // multiply-adds
void forget_prepared(Tucker2Prepared* call);

struct Tucker2GradParams {
  Tucker2Params forward;  // geometry; x and t1, t2 as saved
  Tucker2Type kept;       // of t1 and t2
  const void *grad, *y;   // g (N, K, P, Q), dense, of x's type; y in the same layout, or null: no ReLU
  bool grad_channels_last;
  void* dx;  // (N, C, H, W) dense in g's layout, of x's type; null: not needed
  // Sums to add to, null: not needed. core: per segment of the window (R2, length); last: (R2, K) or, where g
  // is planes, (K, R2); first: (R1, C) or, where x is planes, (C, R1).
  float *first, *core, *last;
  double* bias;

  // Filled by tucker2_gradient_plan: the operator run backwards, and where a thread keeps what.
  Tucker2Params back;
  Tucker2Plan plan;
  int64_t group;  // images at a time
  int64_t grad_at, x_at, t1_at, t2_at, dz2_at, dz1_at, dx_at, scratch_floats;
};

// Knobs and news for `kegfast.tuning()` and `kegfast.last_kernel()`.
using Tucker2Shape = std::array<int64_t, 17>;  // of a call, as tucker2_shape lists it
// What autotune measured to be faster for a call; automatic forgets it.
void choose_tucker2(const Tucker2Shape& shape, Tucker2Form form);
int64_t tucker2_winograd();  // Tucker2Params::winograd of every call
void set_tucker2_winograd(int64_t most);
std::string last_kernel();  // what the last tucker2 call of any thread ran: "winograd avx512"
void note_unfused();        // it was torch's own convolutions

#define KEGFAST_DECLARE(isa)                                                                        \
  namespace isa {                                                                                   \
  Tucker2Plan tucker2_plan(const Tucker2Params& p, int64_t threads);                                \
  /* all: the core in every form, else in the plan's only. */                                       \
  void tucker2_pack(const Tucker2Params& p, const Tucker2Plan& plan, const Tucker2Factor& first,    \
                    const Tucker2Factor& core, const Tucker2Factor& last, bool all, float* packed); \
  /* Output rows begin <= n * P + row < end. */                                                     \
  void tucker2_rows(const Tucker2Params& p, const Tucker2Plan& plan, int64_t begin, int64_t end,    \
                    float* scratch);                                                                \
  }
KEGFAST_EACH_ISA(KEGFAST_DECLARE)
KEGFAST_EACH_BF16_ISA(KEGFAST_DECLARE)
#undef KEGFAST_DECLARE

#define KEGFAST_DECLARE(isa)                                                                      \
  namespace isa {                                                                                 \
  void tucker2_gradient_plan(Tucker2GradParams& g, int64_t threads);                              \
  /* dx and the sums of images begin <= n < end. */                                               \
  void tucker2_gradients(const Tucker2GradParams& g, int64_t begin, int64_t end, float* scratch); \
  }
KEGFAST_EACH_ISA(KEGFAST_DECLARE)
#undef KEGFAST_DECLARE

// The copy of kernel f for a run of p.
#define KEGFAST_TUCKER2(p, f) ((p).pairs ? KEGFAST_SELECT_BF16(f) : KEGFAST_SELECT(f))

}  // namespace kegfast
