# SPDX-License-Identifier: Apache-2.0
# Chooses the CUDA backend of kvq_kernels: KVQ_BACKEND_CUDA are its C files, in kernels/; the target kvq_cuda carries
# kernels, device runtime and libraries. Without KVQ_CUDA, a file that says so, and nothing.
set(KVQ_BACKEND_CUDA backend_no_cuda.c)
if(NOT KVQ_CUDA)
  add_library(kvq_cuda INTERFACE)
  return()
endif()

set(KVQ_BACKEND_CUDA cuda/backend_cuda.c cuda/cache.c cuda/cache_cuda.c cuda/cache_memory.c cuda/codec_cuda.c
  cuda/transfer.c)
set(kvq_cuda_sources
  attention.cu attention_launch.cu attention_step.cu attention_window.cu cache_steps.cu count.cu experts.cu linear.cu
  loss.cu probe.cu rope.cu row_ops.cu rows.cu tile_outliers.cu tiles.cu codec_spec.cpp runtime.cpp)
set(kvq_cuda_oldest 12.4)

# The compiler that a person names comes first, then the one of the PATH.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(CMAKE_CUDA_COMPILER nvcc HINTS ${CUDAToolkit_ROOT} ENV CUDAToolkit_ROOT ENV CUDA_PATH
    PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "KVQ_CUDA=ON, but nvcc was not found: install the CUDA Toolkit (${kvq_cuda_oldest} or later: "
      "nvcc, cudart, cuBLAS), or say where it is with -DCMAKE_CUDA_COMPILER=.../bin/nvcc")
  endif()
endif()
# Machine code for what there is, and PTX, which the driver compiles, for what is to come.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES "80-real;86-real;89-real;90" CACHE STRING "Compute capabilities to compile kernels for")
endif()
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")
include(cmake/Cxx.cmake)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS kvq_cuda_oldest)
  message(FATAL_ERROR "KVQ_CUDA=ON, but ${CMAKE_CUDA_COMPILER} is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}: install the "
    "CUDA Toolkit, ${kvq_cuda_oldest} or later, and name its compiler with -DCMAKE_CUDA_COMPILER=.../bin/nvcc")
endif()
# To a project that requires it, CMake 3.25 says that nvToolsExt is deprecated, and fails where it is gone (CUDA 12.9).
set(kvq_required ${CMAKE_MINIMUM_REQUIRED_VERSION})
set(CMAKE_MINIMUM_REQUIRED_VERSION 3.24)
find_package(CUDAToolkit ${kvq_cuda_oldest} REQUIRED)
set(CMAKE_MINIMUM_REQUIRED_VERSION ${kvq_required})
find_path(KVQ_CUBLAS_INCLUDE cublas_v2.h PATHS ${CUDAToolkit_INCLUDE_DIRS} NO_DEFAULT_PATH)
if(NOT TARGET CUDA::cublas OR NOT KVQ_CUBLAS_INCLUDE)
  message(FATAL_ERROR "KVQ_CUDA=ON, but cuBLAS was not found in ${CUDAToolkit_LIBRARY_DIR} and "
    "${CUDAToolkit_INCLUDE_DIRS}: install it with its headers (NVIDIA's Debian packages: libcublas-dev-12-4 or later)")
endif()

# Objects, which become a part of kvq_kernels. The flags of kernels are those of tests/cuda/gates.py.
list(TRANSFORM kvq_cuda_sources PREPEND ${CMAKE_SOURCE_DIR}/kernels/cuda/)
add_library(kvq_cuda OBJECT ${kvq_cuda_sources})
set_target_properties(kvq_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF)
target_compile_options(kvq_cuda PRIVATE
  "$<$<COMPILE_LANGUAGE:CUDA>:-fmad=false;-Xcompiler=-ffp-contract=off,-Wall,-Wextra>")
if(KVQ_WERROR)
  target_compile_options(kvq_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>")
endif()
string(REPLACE ";" ", " kvq_cuda_architectures "${CMAKE_CUDA_ARCHITECTURES}")
string(REPLACE "-real" "" kvq_cuda_architectures "${kvq_cuda_architectures}")
set_source_files_properties(${CMAKE_SOURCE_DIR}/kernels/cuda/runtime.cpp PROPERTIES
  COMPILE_DEFINITIONS "KVQ_CUDA_ARCHITECTURES=\"${kvq_cuda_architectures}\"")
target_include_directories(kvq_cuda PRIVATE ${CMAKE_SOURCE_DIR}/core ${CMAKE_SOURCE_DIR}/kernels
  PUBLIC ${CMAKE_SOURCE_DIR}/kernels/cuda)
target_link_libraries(kvq_cuda PRIVATE kvq_cxx_flags
  PUBLIC CUDA::cudart_static CUDA::cublas)
set(CMAKE_INSTALL_RPATH_USE_LINK_PATH ON) # cuBLAS is rarely where the loader looks by itself
message(STATUS "kvq: CUDA ${CUDAToolkit_VERSION}: ${kvq_cuda_architectures}; products through ${CUDA_cublas_LIBRARY}")
