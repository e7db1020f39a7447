# Compiles one .cu for sm_80 and sm_90 with the flags of torch's extension builder, prints registers, shared memory and
# spills of each kernel, fails where registers spill. Needs no GPU and no CUDA build of torch: the one header that such a
# build would generate is an empty one here.
get_filename_component(folder ${OBJECT} DIRECTORY)
file(WRITE ${folder}/stub/c10/cuda/impl/cuda_cmake_macros.h "#pragma once\n")
set(includes -I${CSRC} -I${folder}/stub)
foreach(include ${TORCH_INCLUDES})
  list(APPEND includes -isystem ${include})
endforeach()
set(architectures -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90)
execute_process(
  COMMAND ${NVCC} -std=c++20 -O3 -lineinfo --expt-relaxed-constexpr -D__CUDA_NO_HALF_OPERATORS__
          -D__CUDA_NO_HALF_CONVERSIONS__ -D__CUDA_NO_BFLOAT16_CONVERSIONS__ -D__CUDA_NO_HALF2_OPERATORS__
          ${architectures} -Xptxas -v ${includes} -c ${SOURCE} -o ${OBJECT}
  OUTPUT_VARIABLE out ERROR_VARIABLE err RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${out}${err}")
endif()

# ptxas prints for each kernel: "Compiling entry function 'mangled' for 'sm_80'", a line with its spills, "Used ...".
get_filename_component(name ${SOURCE} NAME)
string(REGEX MATCHALL "(Compiling entry function '[^']*' for 'sm_[0-9]+'|[0-9]+ bytes spill stores, [0-9]+ bytes spill loads|Used [0-9]+ registers[^\n]*)"
       lines "${out}${err}")
set(table "${name}: registers, shared bytes, spilled bytes\n")
foreach(line ${lines})
  if(line MATCHES "function '([^']*)' for '(sm_[0-9]+)'")
    set(architecture ${CMAKE_MATCH_2})
    set(kernel ${CMAKE_MATCH_1})
    find_program(CUFILT cu++filt HINTS ${NVCC}/.. $ENV{CUDA_HOME}/bin)
    if(CUFILT)
      execute_process(COMMAND ${CUFILT} ${kernel} OUTPUT_VARIABLE kernel OUTPUT_STRIP_TRAILING_WHITESPACE)
    else()
      execute_process(COMMAND c++filt ${kernel} OUTPUT_VARIABLE kernel OUTPUT_STRIP_TRAILING_WHITESPACE)
    endif()
    string(REGEX REPLACE "^void |margin_kernels::|cuda::|math::|\\(.*$" "" kernel "${kernel}")
  elseif(line MATCHES "([0-9]+) bytes spill stores, ([0-9]+) bytes spill loads")
    math(EXPR spilled "${CMAKE_MATCH_1} + ${CMAKE_MATCH_2}")
  elseif(line MATCHES "Used ([0-9]+) registers")
    set(registers ${CMAKE_MATCH_1})
    set(shared 0)
    if(line MATCHES "([0-9]+) bytes smem")
      set(shared ${CMAKE_MATCH_1})
    endif()
    string(APPEND table "  ${architecture} ${registers} ${shared} ${spilled}  ${kernel}\n")
    if(spilled GREATER 0)
      list(APPEND spills "${kernel} ${architecture}")
    endif()
  endif()
endforeach()
message("${table}")
if(spills)
  file(REMOVE ${OBJECT})
  message(FATAL_ERROR "registers spill in ${name}: ${spills}")
endif()
