/* Frozen networks without Python: load a file that kegfast's Frozen.save wrote, run it, free it.
 *
 *   kegplan* plan = kegplan_load("student.kegplan");
 *   int64_t sizes[4] = {1, 1, 32, 32};
 *   if (!plan || kegplan_run(plan, sizes, &images, &logits) != 0) puts(kegplan_error());
 *
 * Arrays are dense float32 in C order: images (N, C, H, W), vectors (N, C). A plan may be used by several
 * threads. */
#ifndef KEGPLAN_H
#define KEGPLAN_H

#include <stddef.h>
#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

typedef struct kegplan kegplan;

/* The network of a file, or of its bytes; NULL: kegplan_error says why. */
kegplan* kegplan_load(const char* path);
kegplan* kegplan_read(const void* bytes, size_t size);
void kegplan_free(kegplan* plan); /* NULL is fine */

int kegplan_inputs(const kegplan* plan);
int kegplan_outputs(const kegplan* plan);

/* How many threads share the work of a run: 1 at first. */
void kegplan_set_threads(kegplan* plan, int threads);

/* Four sizes per output for four sizes per input; of a vector (N, C) the last two are 0. Returns 0, or else
 * kegplan_error says what is wrong. */
int kegplan_output_sizes(kegplan* plan, const int64_t* input_sizes, int64_t* output_sizes);

/* Runs it on arrays of such sizes, into arrays of kegplan_output_sizes. New sizes cost a new plan. */
int kegplan_run(kegplan* plan, const int64_t* input_sizes, const float* const* inputs, float* const* outputs);

/* What went wrong in this thread's last call that failed. */
const char* kegplan_error(void);

#if defined(__cplusplus)
}
#endif
#endif
