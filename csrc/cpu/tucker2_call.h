// What the forward and the backward pass of tucker2 on the CPU share: tensors as the kernels see them, and
// the threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>

#include "tucker2.h"

namespace kegfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Geometry {
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

// A stride-exact allocation: the fakes promise these strides.
Tensor empty_strided(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                     ScalarType type);
Tensor empty(int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last, ScalarType type);
AtenTensorHandle new_output(const Tucker2Params& p);  // (N, K, P, Q), the caller's to delete
Tensor empty_flat(int64_t n, ScalarType type = ScalarType::Float);
Tensor empty_packed(int64_t floats);  // in huge pages where they pay

bool reads_channels_last(const Tensor& x);
// x as the kernels read it: pixels of contiguous channels, planes of contiguous rows, or else a copy as
// planes.
Tensor readable(const Tensor& x);

Tucker2Type type_of(const Tensor& t);
Tucker2Factor factor(const Tensor& weight);  // (O, I, kh, kw)

// Throw for tensors that are not a layer's, or not in memory.
void check_weights(const Tensor& x, const Tensor& first, const Tensor& core, const Tensor& last,
                   const std::optional<Tensor>& bias);
void check_addend(const Tucker2Params& p, const Tensor& addend);
bool lies_as_output(const Tucker2Params& p, const Tensor& t);
// By size and layout alone: whoever hands a packed buffer on has made sure of its numbers.
bool is_packed_for(const Tucker2Plan& plan, const Tensor& packed);

// The whole Params of a call but for x, y and what is kept; throws for a geometry that cannot be.
Tucker2Params geometry(int64_t images, int64_t channels, int64_t height, int64_t width, const Tensor& core,
                       int64_t features, const Geometry& g);
void set_input(Tucker2Params& p, const Tensor& x);
// bfloat16 is computed in pairs where the CPU multiplies them, on ranks made even everywhere.
void choose_numbers(Tucker2Params& p);

// Fills p.form from what choose_tucker2 was told of such a call.
void choose_form(Tucker2Params& p);
int64_t choices_made();  // so far: what was settled before the last one no longer holds
int64_t multiply_adds(const Tucker2Params& p);
int64_t work_of(const Tucker2Params& p);           // of a forward pass, in multiply-adds that take as long
int64_t threads_for(int64_t work, int64_t parts);  // 1 where a second thread costs more than it brings
void run_rows(const Tucker2Params& p, const Tucker2Plan& plan, int64_t threads);  // all rows, on `threads`

float* scratch(int64_t floats);  // memory that the calling thread keeps, so that no call pays for page faults

// f(i) for every part, side by side.
template <class F>
void run_parts(int64_t parts, const F& f) {
  if (parts == 1) return f(0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) f(i);
  });
}

}  // namespace kegfast
