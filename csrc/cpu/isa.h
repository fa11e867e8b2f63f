// Run-time choice among the instruction sets that cmake/Isa.cmake compiled the kernels for.
#pragma once

#include <string>
#include <vector>

namespace kegfast {

// Rising; the names are those of cmake/Isa.cmake, where aarch64's baseline is called neon. avx512_bf16 and
// amx hold only what multiplies bfloat16; everything else runs its avx512 copy there.
enum class Isa : int { baseline, avx2, avx512, avx512_bf16, amx };

Isa detected_isa();                    // the widest that is compiled and that this CPU and its system support
Isa active_isa();                      // detected_isa(), lowered by KEGFAST_CPU_ISA or set_isa()
Isa set_isa(const std::string& name);  // throws std::invalid_argument for a name that cannot run here
const char* isa_name(Isa isa);
std::vector<std::string> compiled_isas();
std::string isas_left_out();  // which of this processor's family the compiler did not know, or nothing

}  // namespace kegfast

// KEGFAST_SELECT(f): the copy of kernel f for the active instruction set. KEGFAST_SELECT_BF16(f): the same of
// a kernel that multiplies bfloat16, from Isa::avx512_bf16 up.
#if defined(KEGFAST_HAS_AVX512)
#define KEGFAST_EACH_ISA(X) X(baseline) X(avx2) X(avx512)
#define KEGFAST_SELECT(f)                                                    \
  (::kegfast::active_isa() >= ::kegfast::Isa::avx512 ? &::kegfast::avx512::f \
   : ::kegfast::active_isa() == ::kegfast::Isa::avx2 ? &::kegfast::avx2::f   \
                                                     : &::kegfast::baseline::f)
#elif defined(KEGFAST_HAS_AVX2)
#define KEGFAST_EACH_ISA(X) X(baseline) X(avx2)
#define KEGFAST_SELECT(f) \
  (::kegfast::active_isa() == ::kegfast::Isa::avx2 ? &::kegfast::avx2::f : &::kegfast::baseline::f)
#elif defined(__aarch64__)
#define KEGFAST_EACH_ISA(X) X(neon)
#define KEGFAST_SELECT(f) (&::kegfast::neon::f)
#else
#define KEGFAST_EACH_ISA(X) X(baseline)
#define KEGFAST_SELECT(f) (&::kegfast::baseline::f)
#endif
#if defined(KEGFAST_HAS_AMX)
#define KEGFAST_EACH_BF16_ISA(X) X(avx512_bf16) X(amx)
#define KEGFAST_SELECT_BF16(f) \
  (::kegfast::active_isa() == ::kegfast::Isa::amx ? &::kegfast::amx::f : &::kegfast::avx512_bf16::f)
#elif defined(KEGFAST_HAS_AVX512_BF16)
#define KEGFAST_EACH_BF16_ISA(X) X(avx512_bf16)
#define KEGFAST_SELECT_BF16(f) (&::kegfast::avx512_bf16::f)
#else
#define KEGFAST_EACH_BF16_ISA(X)
#define KEGFAST_SELECT_BF16(f) KEGFAST_SELECT(f)  // never taken
#endif
