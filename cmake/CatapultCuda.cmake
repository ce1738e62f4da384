# catapult_cuda: the CUDA kernels, compiled wherever nvcc is found; no GPU is needed for that. The CUDA
# runtime is linked statically and loads the driver at run time only: the module imports where there is none.
set(CATAPULT_HAVE_CUDA OFF)

if(NOT CATAPULT_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "CATAPULT_CUDA: expected AUTO, ON or OFF, got '${CATAPULT_CUDA}'")
endif()

if(NOT CATAPULT_CUDA STREQUAL "OFF")
  if(NOT CMAKE_CUDA_COMPILER)
    find_program(CATAPULT_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
    if(CATAPULT_NVCC)
      set(CMAKE_CUDA_COMPILER ${CATAPULT_NVCC})
    endif()
  endif()
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES ${CATAPULT_CUDA_ARCHS})
    enable_language(CUDA)
    set(CATAPULT_HAVE_CUDA ON)
    message(STATUS "CUDA kernels: ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION} for ${CATAPULT_CUDA_ARCHS}")
  elseif(CATAPULT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "CATAPULT_CUDA=ON, but nvcc was found neither on PATH nor under CUDA_HOME, CUDA_PATH or "
      "/usr/local/cuda. Install the CUDA toolkit, set CUDA_HOME, or build with CATAPULT_CUDA=OFF.")
  else()
    message(STATUS "CUDA kernels: left out (no nvcc)")
  endif()
endif()

if(CATAPULT_HAVE_CUDA)
  set(CMAKE_CUDA_STANDARD 17)  # enough for them, and known to every CMake from 3.24 on
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  file(GLOB CATAPULT_CUDA_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cu)
  add_library(catapult_cuda STATIC ${CATAPULT_CUDA_SOURCES})
  target_include_directories(catapult_cuda PUBLIC csrc)
  # nvcc's host stubs trip -Wpedantic, so that is not asked for.
  target_compile_options(catapult_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings -Xcompiler=-Wall,-Wextra>)
  set_target_properties(catapult_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  # cuda_runtime.h for the bindings, which are C++.
  target_include_directories(catapult_cuda SYSTEM PUBLIC ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    # The static runtime's symbols stay inside the module: another library may bring its own runtime.
    target_link_options(catapult_cuda INTERFACE -Wl,--exclude-libs,ALL)
  endif()
endif()
