// What the tests call, through ctypes or from sanitized/main.cpp. Functions return 0, or 1 with *_error().
#pragma once

#include <cstdint>

// What ctypes hands over; strides in elements, those of a factor may be negative.
struct Tucker2Call {
  const void *x, *first, *core, *last, *bias;
  void *y, *t1, *t2;
  int64_t x_strides[4], y_strides[4], first_strides[4], core_strides[4], last_strides[4];
  int images, channels, height, width, rank_in, rank_out, features, out_height, out_width;
  int window[8];
  int relu, form, dtype, split, multiprocessors, order;
  int64_t shared_bytes;
  int bulk_copies;              // whether the device has them
  int dry;                      // only the plan
  int launches;                 // out: kernels run
  int persistent;               // out: whether the last one was the persistent form
  int tile_h, tile_w;           // out: of the last kernel, if it has tiles
  int64_t blocks, most_shared;  // out: of the last kernel; of any
  int64_t workspace;            // out: bytes
};

extern "C" const char* tucker2_error();
extern "C" int emulate_tucker2(Tucker2Call* call);

// dtype: 0 float, 1 bfloat16, 2 half, of the samples; the noises are float. Gradients may be null.
struct DiversityCall {
  const float* noises;
  const void* samples;
  double* exponent;
  float *noise_gradient, *sample_gradient;
  int batch, noise_size, features, metric, noise_metric, dtype, order;
  int64_t shared_bytes, panel_bytes;
  int dry;            // only the plan
  int launches;       // out: kernels run
  int64_t workspace;  // out: bytes
};

extern "C" const char* diversity_error();
extern "C" int emulate_diversity(DiversityCall* call);

// dtype as above, of all four tensors; the gradient may be null.
struct SoftTargetCall {
  const void *student, *teacher;
  void *loss, *gradient;
  int64_t student_stride, teacher_stride;
  double temperature;
  int batch, classes, dtype, order;
};

extern "C" const char* soft_target_error();
extern "C" int emulate_soft_target(const SoftTargetCall* call);

extern "C" const char* broken_error();
extern "C" int emulate_past_the_end(float* out);
extern "C" int emulate_misaligned(float* out);
