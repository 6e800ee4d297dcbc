# PyTorch's stable-ABI headers and libraries, found by path: under pip's build isolation torch cannot be imported, but
# it lies where sysconfig says.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)

set(PYGEN_TORCH "" CACHE PATH "The torch package to build against; the one of this Python by default")
if(NOT PYGEN_TORCH)
  execute_process(
    COMMAND
      ${Python_EXECUTABLE} -c
      "import site, sysconfig, pathlib
folders = [sysconfig.get_path('purelib'), sysconfig.get_path('platlib'), *site.getsitepackages(), site.getusersitepackages()]
found = [p for p in (pathlib.Path(f) / 'torch' for f in folders) if (p / 'include/torch/csrc/stable/library.h').exists()]
print(found[0] if found else '')"
    OUTPUT_VARIABLE torch_found OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
else()
  set(torch_found ${PYGEN_TORCH})
endif()
if(NOT EXISTS "${torch_found}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "PyTorch >= 2.10 was not found for ${Python_EXECUTABLE}: install it first, as in "
                      "pip install torch, or name its folder with PYGEN_TORCH=.../site-packages/torch "
                      "(pip install . -C cmake.define.PYGEN_TORCH=...)")
endif()
file(STRINGS "${torch_found}/version.py" torch_version REGEX "^__version__ = ")
string(REGEX REPLACE ".*'(.*)'.*" "\\1" PYGEN_TORCH_VERSION "${torch_version}")
if(PYGEN_TORCH_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR "PyTorch ${PYGEN_TORCH_VERSION} was found at ${torch_found}, but pygen needs 2.10 or later")
endif()
message(STATUS "Building against PyTorch ${PYGEN_TORCH_VERSION} at ${torch_found}")

# Target 2.10: the one build serves every PyTorch from there on.
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${torch_found}/include)
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_directories(torch_stable INTERFACE ${torch_found}/lib)
target_link_libraries(torch_stable INTERFACE torch_cpu c10)

# libtorch.so is what pulls libtorch_cuda.so in on a CUDA install; a CPU-only one has it too, so both link alike.
add_library(torch_stable_cuda INTERFACE)
target_link_libraries(torch_stable_cuda INTERFACE torch_stable)
target_compile_definitions(torch_stable_cuda INTERFACE USE_CUDA)
target_link_options(torch_stable_cuda INTERFACE "LINKER:--no-as-needed" "LINKER:-ltorch")
