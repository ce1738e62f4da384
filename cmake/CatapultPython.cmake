find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG QUIET)
if(NOT pybind11_FOUND)
  execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
    OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE)
  find_package(pybind11 CONFIG REQUIRED)
endif()

set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS catapult_ext/_version.py)
file(STRINGS catapult_ext/_version.py CATAPULT_VERSION_LINE REGEX "__version__")
string(REGEX MATCH "[0-9][^\"]*" CATAPULT_VERSION_TEXT "${CATAPULT_VERSION_LINE}")

pybind11_add_module(_C
  csrc/bindings/module.cpp csrc/bindings/ntk_gram.cpp csrc/bindings/jacobian_accumulate.cpp
  csrc/bindings/agop_reduce.cpp csrc/bindings/topk_eigh.cpp csrc/bindings/step.cpp
  csrc/bindings/chain_sgd.cpp)
target_link_libraries(_C PRIVATE catapult_cpu)
target_compile_definitions(_C PRIVATE
  CATAPULT_VERSION="${CATAPULT_VERSION_TEXT}"
  CATAPULT_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
if(CATAPULT_HAVE_CUDA)
  string(REPLACE ";" " " CATAPULT_CUDA_ARCHS_TEXT "${CATAPULT_CUDA_ARCHS}")
  target_sources(_C PRIVATE csrc/bindings/cuda.cpp)
  target_link_libraries(_C PRIVATE catapult_cuda)
  target_compile_definitions(_C PRIVATE CATAPULT_HAVE_CUDA
    CATAPULT_CUDA_ARCHS="${CATAPULT_CUDA_ARCHS_TEXT}" CATAPULT_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}")
else()
  target_compile_definitions(_C PRIVATE CATAPULT_CUDA_ARCHS="" CATAPULT_CUDA_VERSION="")
endif()
install(TARGETS _C LIBRARY DESTINATION catapult_ext)
