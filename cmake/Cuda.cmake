# _cuda: the CUDA operators, a library of its own so that _C loads on a machine without CUDA.
#
# Built where nvcc is found; FORCE_CUDA=1 insists on it, FORCE_CUDA=0 leaves it out. TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") chooses
# the architectures; by default Ampere's, Hopper's and Blackwell's, with PTX for what comes after. The runtime is linked statically:
# which CUDA torch was built with does not matter.
set(FORCE_CUDA "" CACHE STRING "1: fail without nvcc; 0: never build the CUDA part; empty: build it where nvcc is found")
set(TORCH_CUDA_ARCH_LIST "" CACHE STRING "CUDA architectures, as torch writes them")

set(KEGFAST_CUDA OFF)
if(NOT "${FORCE_CUDA}" STREQUAL "0")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(KEGFAST_CUDA ON)
  elseif("${FORCE_CUDA}" STREQUAL "1")
    message(FATAL_ERROR "FORCE_CUDA=1, but no nvcc was found; put it on PATH or set CUDACXX")
  endif()
endif()

include(CudaArchitectures)
if(KEGFAST_CUDA)
  if(TORCH_CUDA_ARCH_LIST)
    kegfast_cuda_architectures(CMAKE_CUDA_ARCHITECTURES "${TORCH_CUDA_ARCH_LIST}")
  else()
    kegfast_cuda_architectures(CMAKE_CUDA_ARCHITECTURES "8.0;9.0;10.0;12.0+PTX")
  endif()
  if(NOT CMAKE_CUDA_ARCHITECTURES AND "${FORCE_CUDA}" STREQUAL "1")
    message(FATAL_ERROR "FORCE_CUDA=1, but TORCH_CUDA_ARCH_LIST names no architecture from 8.0 on")
  elseif(NOT CMAKE_CUDA_ARCHITECTURES)
    message(STATUS "kegfast: built without CUDA kernels, for want of an architecture")
    set(KEGFAST_CUDA OFF)
  endif()
endif()

if(KEGFAST_CUDA)
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_EXTENSION_COMPILE_OPTION) # a CMake older than the nvcc it finds
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
endif()

# torch_cuda: libtorch_cuda.so by name. A machine that builds need not have a CUDA torch; one that runs has loaded it already. The
# stand-in only lends its name to the linker: without it the library would look for these functions in libtorch_cpu alone.
function(kegfast_torch_cuda)
  if(EXISTS "${KEGFAST_TORCH_DIR}/lib/libtorch_cuda.so")
    add_library(torch_cuda SHARED IMPORTED)
    set_target_properties(torch_cuda PROPERTIES IMPORTED_LOCATION "${KEGFAST_TORCH_DIR}/lib/libtorch_cuda.so")
    return()
  endif()
  set(source "${CMAKE_CURRENT_BINARY_DIR}/torch_cuda.cpp")
  file(CONFIGURE OUTPUT "${source}" CONTENT [[
extern "C" __attribute__((visibility("default"))) void aoti_torch_get_current_cuda_stream() {}
extern "C" __attribute__((visibility("default"))) void aoti_torch_cuda_convolution_backward() {}
]])
  add_library(torch_cuda SHARED "${source}")
  set_target_properties(torch_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/stand-in")
endfunction()

# kegfast_cuda_library(<name> <file.cu>...)
function(kegfast_cuda_library name)
  if(NOT KEGFAST_CUDA)
    file(REMOVE "${CMAKE_LIBRARY_OUTPUT_DIRECTORY}/${name}.so") # of a build that had it
    return()
  endif()
  add_library(${name} MODULE ${ARGN})
  target_include_directories(${name} PRIVATE csrc)
  kegfast_torch_cuda()
  target_link_libraries(${name} PRIVATE torch_stable torch_cuda)
  set_target_properties(${name} PROPERTIES
    PREFIX "" CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
endfunction()
