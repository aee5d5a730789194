# SPDX-License-Identifier: Apache-2.0
# Chooses how several processes share a calibration; the target kvq_mpi carries the library, KVQ_PROCESSES the source.
add_library(kvq_mpi INTERFACE)
set(KVQ_PROCESSES processes_none.c)
if(NOT KVQ_MPI STREQUAL "off")
  find_package(MPI COMPONENTS C)
endif()
if(MPI_C_FOUND)
  set(KVQ_PROCESSES processes_mpi.c)
  target_link_libraries(kvq_mpi INTERFACE MPI::MPI_C)
elseif(KVQ_MPI STREQUAL "on")
  message(FATAL_ERROR "KVQ_MPI=on, but MPI was not found (Debian: libopenmpi-dev)")
endif()
message(STATUS "kvq: several processes through ${KVQ_PROCESSES}")
