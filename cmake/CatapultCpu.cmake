add_library(catapult_cpu OBJECT csrc/core/cpu_features.cpp csrc/cpu/dispatch.cpp csrc/cpu/kernels_scalar.cpp)
target_include_directories(catapult_cpu PUBLIC csrc)
target_compile_options(catapult_cpu PRIVATE -Wall -Wextra)

set(CATAPULT_X86 OFF)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(CATAPULT_X86 ON)
  target_compile_definitions(catapult_cpu PUBLIC CATAPULT_HAVE_X86)
  target_sources(catapult_cpu PRIVATE csrc/cpu/kernels_avx2.cpp csrc/cpu/kernels_avx512.cpp)
  set_source_files_properties(csrc/cpu/kernels_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma")
  set_source_files_properties(csrc/cpu/kernels_avx512.cpp PROPERTIES
    COMPILE_OPTIONS "-mavx512f;-mavx512dq;-mavx512vl;-mavx512bw;-mfma;-mprefer-vector-width=512")
endif()

# OpenMP on GNU/Linux only (core/parallel.h): compiled in, while who links a runtime is the choice
# of the final target. The Python module links none and uses the one that torch has loaded.
set(CATAPULT_OPENMP OFF)
if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(CATAPULT_OPENMP ON)
  target_compile_options(catapult_cpu PUBLIC $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
endif()
