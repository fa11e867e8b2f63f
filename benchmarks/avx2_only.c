// An x86 processor without AVX-512 and AMX, for every program and library that asks: to be loaded before one.
//
//   cc -O2 -shared -fPIC benchmarks/avx2_only.c -o build/avx2_only.so
//   LD_PRELOAD=build/avx2_only.so python -m benchmarks.bench_frozen
//
// Linux lets the instruction by which libraries ask (cpuid) fault where the processor can; the handler answers in its
// place. KEGFAST_CPU_ISA holds kegfast alone to AVX2; this holds the runtimes that it is compared with too.
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { kSetCpuid = 0x1012 };  // arch_prctl: whether cpuid answers in this thread and those that it starts

static struct sigaction before;

static long answer(int itself) {
  return syscall(SYS_arch_prctl, kSetCpuid, itself);
}

static void handle(int signal, siginfo_t* info, void* context) {
  (void)signal, (void)info;
  greg_t* const registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* const at = (const uint8_t*)registers[REG_RIP];
  if (at[0] != 0x0f || at[1] != 0xa2) {  // no cpuid: the fault comes again, to whom it belongs
    sigaction(SIGSEGV, &before, NULL);
    return;
  }
  const uint32_t leaf = (uint32_t)registers[REG_RAX], part = (uint32_t)registers[REG_RCX];
  uint32_t a, b, c, d;
  answer(1);
  __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(part));
  answer(0);
  if (leaf == 7 && part == 0) {
    b &= ~0xdc230000u;  // AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL
    c &= ~0x00005842u;  // VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
    d &= ~0x03c0010cu;  // 4VNNIW, 4FMAPS, VP2INTERSECT, AMX and FP16
  }
  if (leaf == 7 && part == 1) a &= ~0x00200030u;  // AVX-VNNI, AVX512-BF16, AMX-FP16
  registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
  struct sigaction action = {0};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  if (sigaction(SIGSEGV, &action, &before) != 0 || answer(0) != 0) {
    perror("avx2_only: this processor or kernel cannot hide an instruction set");
    abort();
  }
  setenv("HIDDEN_FROM_ALL", "AVX-512", 1);
}
