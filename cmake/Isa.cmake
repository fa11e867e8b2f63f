# Compiles each CPU kernel file once per instruction set; csrc/cpu/isa.h chooses among them at run time.
#
# An .inl file puts its kernels in `namespace kegfast::KEGFAST_ISA`, so every object has names of its own and the linker can
# never hand an AVX-512 copy of a function to a baseline machine. Widest last.
set(kegfast_isa_names baseline)
set(kegfast_flags_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND kegfast_isa_names avx2 avx512)
  set(kegfast_flags_avx2 -mavx2 -mfma -mf16c)
  set(kegfast_flags_avx512 ${kegfast_flags_avx2} -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl
                           -mprefer-vector-width=512)
endif()

# kegfast_isa_objects(<variable> <file.inl>...): sets <variable> to the generated sources.
function(kegfast_isa_objects variable)
  foreach(file IN LISTS ARGN)
    get_filename_component(stem "${file}" NAME_WE)
    foreach(isa IN LISTS kegfast_isa_names)
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
