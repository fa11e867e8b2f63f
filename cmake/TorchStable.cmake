# torch_stable: torch's stable C++ ABI as an imported target.
#
# find_package(Torch) is not used: beside a CUDA wheel without nvcc it is a fatal error, and it would drag in every ATen header.
# The stable headers need an include path and libtorch_cpu.so alone; one build then serves every torch from 2.11 on.
set(KEGFAST_TORCH_DIR "" CACHE PATH "The torch package folder (the one that holds include/ and lib/)")
if(NOT KEGFAST_TORCH_DIR)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec('torch').origin).parent)"
    OUTPUT_VARIABLE KEGFAST_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
if(NOT EXISTS "${KEGFAST_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "kegfast needs torch >= 2.11 to build its native part; found none in '${KEGFAST_TORCH_DIR}'. "
                      "Install torch first, or set KEGFAST_NATIVE=0 for the plain torch path.")
endif()

add_library(torch_stable INTERFACE IMPORTED)
target_include_directories(torch_stable SYSTEM INTERFACE "${KEGFAST_TORCH_DIR}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000 TORCH_STABLE_ONLY)
# torch is imported, hence loaded, before kegfast: the library's name alone is enough at run time.
target_link_libraries(torch_stable INTERFACE "${KEGFAST_TORCH_DIR}/lib/libtorch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX}")
