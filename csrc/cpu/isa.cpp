#include "cpu/isa.h"

#if defined(KEGFAST_HAS_AVX2)
#include <cpuid.h>
#endif
#if defined(KEGFAST_HAS_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
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

#if defined(KEGFAST_HAS_AVX2)
// What the processor says of itself and the system saves of its registers. Asked for here and not of
// __builtin_cpu_supports, whose tables are of the compiler's own library: some lack them, and say no to
// everything.
class Processor {
 public:
  Processor() {
    unsigned a = 0, b = 0, d = 0;
    if (__get_cpuid(1, &a, &b, &basic_, &d) && has(basic_, 27)) {  // OSXSAVE: xgetbv may be asked
      unsigned low = 0, high = 0;
      __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
      saved_ = low;
    }
    unsigned c = 0;
    __get_cpuid_count(7, 0, &a, &wide_, &c, &tiles_);
    __get_cpuid_count(7, 1, &extended_, &b, &c, &d);
  }

  bool avx2() const {  // with fma and f16c
    return saves(0x6) && has(basic_, 12) && has(basic_, 28) && has(basic_, 29) && has(wide_, 5);
  }
  bool avx512() const {  // f, dq, cd, bw, vl
    return avx2() && saves(0xe6) && has(wide_, 16) && has(wide_, 17) && has(wide_, 28) && has(wide_, 30) &&
           has(wide_, 31);
  }
  bool avx512_bf16() const { return avx512() && has(extended_, 5); }
  bool amx() const {
    return avx512_bf16() && saves(0x60000) && has(tiles_, 22) && has(tiles_, 24) && granted();
  }

 private:
  static bool has(unsigned flags, int bit) { return flags >> bit & 1; }
  bool saves(unsigned registers) const { return (saved_ & registers) == registers; }

  // Linux lets a process use tiles if it asks.
  static bool granted() {
#if defined(KEGFAST_HAS_AMX) && defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
  }

  unsigned basic_ = 0, wide_ = 0, tiles_ = 0, extended_ = 0, saved_ = 0;
};
#endif

// The widest that is both compiled and there.
Isa detect() {
#if defined(KEGFAST_HAS_AVX2)
  const Processor processor;
#if defined(KEGFAST_HAS_AMX)
  if (processor.amx()) return Isa::amx;
#endif
#if defined(KEGFAST_HAS_AVX512_BF16)
  if (processor.avx512_bf16()) return Isa::avx512_bf16;
#endif
#if defined(KEGFAST_HAS_AVX512)
  if (processor.avx512()) return Isa::avx512;
#endif
  if (processor.avx2()) return Isa::avx2;
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
