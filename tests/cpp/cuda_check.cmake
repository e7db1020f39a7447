# Compiles one .cu for one architecture, prints registers and spills of each kernel, fails where registers spill.
get_filename_component(folder ${OBJECT} DIRECTORY)
file(MAKE_DIRECTORY ${folder})
execute_process(
  COMMAND ${NVCC} -std=c++17 -O3 -arch=sm_${ARCH} -Xptxas -v --expt-relaxed-constexpr -I${INCLUDES} -c ${SOURCE} -o ${OBJECT}
  OUTPUT_VARIABLE out ERROR_VARIABLE err RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${out}${err}")
endif()
get_filename_component(name ${SOURCE} NAME)
string(REGEX MATCHALL "Used [0-9]+ registers[^\n]*" used "${out}${err}")
list(JOIN used "; " used)
message("${name} sm_${ARCH}: ${used}")
string(REGEX MATCHALL "[1-9][0-9]* bytes spill[^\n]*" spills "${out}${err}")
if(spills)
  file(REMOVE ${OBJECT})
  message(FATAL_ERROR "${name} sm_${ARCH} spills registers: ${spills}")
endif()
