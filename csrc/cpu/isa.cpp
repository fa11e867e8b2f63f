#include "cpu/isa.h"

#if defined(KEGFAST_HAS_AMX)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

namespace kegfast {
namespace {

#define KEGFAST_NAME(isa) #isa,
constexpr const char* kNames[] = {KEGFAST_EACH_ISA(KEGFAST_NAME) KEGFAST_EACH_BF16_ISA(KEGFAST_NAME)};
#undef KEGFAST_NAME

#if defined(KEGFAST_HAS_AMX)
// The CPU has tiles of bfloat16, and the system lets this process use them: on Linux only if asked.
bool grants_amx() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of cpuid 7, edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa detect() {
#if defined(KEGFAST_HAS_AVX2)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(KEGFAST_HAS_AVX512)
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
#if defined(KEGFAST_HAS_AVX512_BF16)
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
#if defined(KEGFAST_HAS_AMX)
    if (grants_amx()) return Isa::amx;
#endif
    return Isa::avx512_bf16;
  }
#endif
  if (avx512) return Isa::avx512;
#endif
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa parse(const std::string& name) {
  if (name == "auto" || name.empty()) return detected_isa();
  for (int i = 0; i <= static_cast<int>(detected_isa()); ++i)
    if (name == kNames[i]) return static_cast<Isa>(i);
  std::string runnable = "auto";
  for (int i = 0; i <= static_cast<int>(detected_isa()); ++i) runnable += std::string(", ") + kNames[i];
  throw std::invalid_argument("instruction set must be one of " + runnable + ", got '" + name + "'");
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa = [] {
    const char* name = std::getenv("KEGFAST_CPU_ISA");
    return parse(name ? name : "auto");
  }();
  return isa;
}

}  // namespace

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() {
  return chosen().load(std::memory_order_relaxed);
}

Isa set_isa(const std::string& name) {
  const Isa isa = parse(name);
  chosen().store(isa, std::memory_order_relaxed);
  return isa;
}

std::vector<std::string> compiled_isas() {
  return {std::begin(kNames), std::end(kNames)};
}

std::string isas_left_out() {
#if defined(KEGFAST_ISA_LEFT_OUT)
  return KEGFAST_ISA_LEFT_OUT;
#else
  return {};
#endif
}

const char* isa_name(Isa isa) {
  return kNames[static_cast<int>(isa)];
}

}  // namespace kegfast
