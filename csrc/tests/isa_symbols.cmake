# Objects compiled for an instruction set that not every processor has may define one external function: the getter
# of their kernel table. Anything else (an inline function, a template of a header) could be the copy that the linker keeps for
# the baseline, which then dies with an illegal instruction.
# cmake -DNM=<nm> -DOBJECTS=<object;object;...> -P isa_symbols.cmake
set(checked 0)
foreach(object IN LISTS OBJECTS)
  if(NOT object MATCHES "kernels_(avx2|avx512)")
    continue()
  endif()
  set(level ${CMAKE_MATCH_1})
  execute_process(COMMAND ${NM} --defined-only --extern-only --demangle ${object}
    OUTPUT_VARIABLE listing COMMAND_ERROR_IS_FATAL ANY)
  string(REPLACE "\n" ";" lines "${listing}")
  set(tables 0)
  foreach(line IN LISTS lines)
    if(line MATCHES " T catapult::cpu::${level}_kernels\\(\\)$")
      math(EXPR tables "${tables} + 1")
    elseif(line MATCHES " [TWi] ")  # code, strong or weak; data has no instructions
      message(SEND_ERROR "${object}: expected ${level}_kernels() to be the only external function, got ${line}")
    endif()
  endforeach()
  if(NOT tables EQUAL 1)
    message(SEND_ERROR "${object}: expected to find ${level}_kernels(), got:\n${listing}")
  endif()
  math(EXPR checked "${checked} + 1")
endforeach()
if(NOT checked EQUAL 2)
  message(FATAL_ERROR "expected the objects of avx2 and avx512 among: ${OBJECTS}")
endif()
