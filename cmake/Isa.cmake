# Compiles each CPU kernel file once per instruction set; csrc/cpu/isa.h chooses among them at run time.
#
# An .inl file puts its kernels in `namespace kegfast::KEGFAST_ISA`, so every object has names of its own and the linker can
# never hand an AVX-512 copy of a function to a baseline machine. Widest last.
include(CheckCXXCompilerFlag)

set(kegfast_isa_names baseline)
set(kegfast_bf16_isa_names "")
set(kegfast_flags_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND kegfast_isa_names avx2 avx512)
  set(kegfast_flags_avx2 -mavx2 -mfma -mf16c)
  set(kegfast_flags_avx512 ${kegfast_flags_avx2} -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl
                           -mprefer-vector-width=512)
  set(kegfast_flags_avx512_bf16 ${kegfast_flags_avx512} -mavx512bf16)
  check_cxx_compiler_flag(-mavx512bf16 KEGFAST_HAS_AVX512_BF16)
  if(KEGFAST_HAS_AVX512_BF16)
    list(APPEND kegfast_bf16_isa_names avx512_bf16)
    add_compile_definitions(KEGFAST_HAS_AVX512_BF16)
    set(kegfast_flags_amx ${kegfast_flags_avx512_bf16} -mamx-tile -mamx-bf16)
    check_cxx_compiler_flag("-mamx-tile -mamx-bf16" KEGFAST_HAS_AMX)
    if(KEGFAST_HAS_AMX)
      list(APPEND kegfast_bf16_isa_names amx)
      add_compile_definitions(KEGFAST_HAS_AMX)
    endif()
  endif()
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
