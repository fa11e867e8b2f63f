/* Ten lines of C that run a frozen network: example NETWORK, floats from stdin, answers to stdout. */
#include <stdio.h>

#include "kegplan.h"

int main(int argc, char** argv) {
  static float images[1024], logits[10];
  const float* inputs[] = {images};
  float* outputs[] = {logits};
  const int64_t sizes[] = {1, 1, 32, 32};
  kegplan* plan = argc > 1 ? kegplan_load(argv[1]) : NULL;
  for (int i = 0; i < 1024; ++i) if (scanf("%f", &images[i]) != 1) return 2;
  if (!plan || kegplan_run(plan, sizes, inputs, outputs) != 0) return puts(kegplan_error()), 1;
  for (int i = 0; i < 10; ++i) printf("%.8g\n", logits[i]);
  kegplan_free(plan);
  return 0;
}
