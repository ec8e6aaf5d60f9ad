# The CUDA library: every csrc/*/cuda.cu, against any torch, a CPU-only one too.
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")

# Machine code for each architecture, and PTX for those still to come, of the last that is not for one GPU only (90a); of
# one that is named as 90-virtual PTX alone.
set(archs ${LINCONV_CUDA_ARCHS})
if(NOT archs)
  set(archs 80 90a)
  if(LINCONV_NVCC VERSION_GREATER_EQUAL 12.8)
    list(APPEND archs 100 120)
  endif()
endif()
set(general ${archs})
list(FILTER general INCLUDE REGEX "^[0-9]+$")
list(TRANSFORM archs APPEND "-real" REGEX "^[0-9]+[a-z]?$")
set(CMAKE_CUDA_ARCHITECTURES ${archs})
if(general)
  list(GET general -1 newest)
  list(APPEND CMAKE_CUDA_ARCHITECTURES "${newest}-virtual")
endif()
enable_language(CUDA)
message(STATUS "CUDA library: nvcc ${CMAKE_CUDA_COMPILER_VERSION}, ${CMAKE_CUDA_ARCHITECTURES}")

add_library(linconv_cuda MODULE ${LINCONV_CUDA_SOURCES} csrc/common/tensor.cpp)
target_link_libraries(linconv_cuda PRIVATE linconv_flags linconv_torch)
# LINCONV_CUDA: tensors of csrc/common/tensor.cpp are on the GPU. USE_CUDA: the CUDA part of torch's stable headers.
target_compile_definitions(linconv_cuda PRIVATE LINCONV_CUDA USE_CUDA)
target_compile_options(linconv_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:$<$<BOOL:${LINCONV_WERROR}>:-Werror=all-warnings;-Xcompiler=-Werror>;-Xcompiler=-Wall,-Wextra;-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=>)
set_target_properties(linconv_cuda PROPERTIES PREFIX "lib" SUFFIX ".so" CUDA_VISIBILITY_PRESET hidden)

# torch's libraries are found by name among those that `import torch` has loaded. A CPU-only torch has no
# libtorch_cuda.so to link against, so an empty stand-in bears the name, everywhere: the same binary either way.
file(WRITE "${CMAKE_BINARY_DIR}/empty.cpp" "")
foreach(name torch_cpu torch_cuda)
  add_library(stand_in_${name} SHARED "${CMAKE_BINARY_DIR}/empty.cpp")
  set_target_properties(stand_in_${name} PROPERTIES OUTPUT_NAME ${name} LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/stand_in")
  target_link_libraries(linconv_cuda PRIVATE stand_in_${name})
endforeach()
target_link_options(linconv_cuda PRIVATE -Wl,--no-as-needed -Wl,-z,now)
install(TARGETS linconv_cuda LIBRARY DESTINATION .)
