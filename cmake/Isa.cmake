# Compiles each CPU kernel file once per instruction set; csrc/cpu/isa.h chooses among them at run time.
#
# An .inl file puts its kernels in `namespace kegfast::KEGFAST_ISA`, so every object has names of its own and the linker can
# never hand an AVX-512 copy of a function to a baseline machine. Widest last.
# An instruction set that the compiler does not know is left out with all above it, with a line in the log and in `kegfast info`.
include(CheckCXXSourceCompiles)

set(kegfast_isa_names baseline)
set(kegfast_bf16_isa_names "")
set(kegfast_flags_baseline "")
set(kegfast_probe_avx2 "__m256 v = _mm256_fmadd_ps(__m256(), __m256(), _mm256_cvtph_ps(__m128i())); (void)v")
set(kegfast_probe_avx512 "__m512i v = _mm512_permutexvar_epi16(__m512i(), _mm512_conflict_epi32(__m512i())); (void)v")
set(kegfast_probe_avx512_bf16 "__m512 v = _mm512_dpbf16_ps(__m512(), __m512bh(), __m512bh()); (void)v")
set(kegfast_probe_amx "_tile_dpbf16ps(0, 1, 2)")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(kegfast_isa_names neon)
  set(kegfast_flags_neon "")
  if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
    set(kegfast_flags_neon -fno-schedule-insns) # or it loads broadcasts so far ahead that tiles leave the registers
  endif()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(kegfast_flags_avx2 -mavx2 -mfma -mf16c)
  set(kegfast_flags_avx512 ${kegfast_flags_avx2} -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl
                           -mprefer-vector-width=512)
  set(kegfast_flags_avx512_bf16 ${kegfast_flags_avx512} -mavx512bf16)
  set(kegfast_flags_amx ${kegfast_flags_avx512_bf16} -mamx-tile -mamx-bf16)
  foreach(isa avx2 avx512 avx512_bf16 amx)
    string(TOUPPER "KEGFAST_HAS_${isa}" known)
    string(JOIN " " CMAKE_REQUIRED_FLAGS ${kegfast_flags_${isa}})
    check_cxx_source_compiles("#include <immintrin.h>\nint main() { ${kegfast_probe_${isa}}; }" ${known})
    if(NOT ${known})
      message(STATUS "kegfast: no kernels for ${isa} and above: ${CMAKE_CXX_COMPILER} does not know it")
      add_compile_definitions(KEGFAST_ISA_LEFT_OUT="${isa}")
      break()
    endif()
    add_compile_definitions(${known})
    if(isa MATCHES "bf16|amx")
      list(APPEND kegfast_bf16_isa_names ${isa})
    else()
      list(APPEND kegfast_isa_names ${isa})
    endif()
  endforeach()
  unset(CMAKE_REQUIRED_FLAGS)
endif()

# kegfast_isa_objects(<variable> <names of instruction sets> <file.inl>...): adds the generated sources to <variable>.
function(kegfast_isa_objects variable names)
  set(sources ${${variable}})
  foreach(file IN LISTS ARGN)
    get_filename_component(stem "${file}" NAME_WE)
    foreach(isa IN LISTS names)
      set(source "${CMAKE_CURRENT_BINARY_DIR}/${stem}.${isa}.cpp")
      file(CONFIGURE OUTPUT "${source}" CONTENT "#define KEGFAST_ISA @isa@\n#include \"@file@\"\n" @ONLY)
      set_source_files_properties("${source}" PROPERTIES
        INCLUDE_DIRECTORIES "${CMAKE_CURRENT_SOURCE_DIR}"
        COMPILE_OPTIONS "${kegfast_flags_${isa}};-fno-math-errno;-ffp-contract=fast")
      list(APPEND sources "${source}")
    endforeach()
  endforeach()
  set(${variable} ${sources} PARENT_SCOPE)
endfunction()
