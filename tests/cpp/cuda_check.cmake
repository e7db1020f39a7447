# Compiles one .cu for ARCHITECTURES (80;90) with the flags of torch's extension builder, prints registers, shared memory and
# spills of each kernel, fails where registers spill. Needs no GPU and no CUDA build of torch: the one header that such a
# build would generate is an empty one here.
get_filename_component(folder ${OBJECT} DIRECTORY)
file(WRITE ${folder}/stub/c10/cuda/impl/cuda_cmake_macros.h "#pragma once\n")
set(includes -I${CSRC} -I${folder}/stub)
foreach(include ${TORCH_INCLUDES})
  list(APPEND includes -isystem ${include})
endforeach()
set(architectures "")
foreach(architecture ${ARCHITECTURES})
  list(APPEND architectures -gencode arch=compute_${architecture},code=sm_${architecture})
endforeach()
execute_process(
  COMMAND ${NVCC} -std=c++20 -O3 -lineinfo --expt-relaxed-constexpr -D__CUDA_NO_HALF_OPERATORS__
          -D__CUDA_NO_HALF_CONVERSIONS__ -D__CUDA_NO_BFLOAT16_CONVERSIONS__ -D__CUDA_NO_HALF2_OPERATORS__
          ${architectures} -Xptxas -v ${includes} -c ${SOURCE} -o ${OBJECT}
  OUTPUT_VARIABLE out ERROR_VARIABLE err RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${out}${err}")
endif()

include(${CMAKE_CURRENT_LIST_DIR}/registers.cmake)
register_table("-c ${SOURCE} ${out}${err}" table spills)
message("${table}")
if(spills)
  file(REMOVE ${OBJECT})
  message(FATAL_ERROR "registers spill: ${spills}")
endif()
