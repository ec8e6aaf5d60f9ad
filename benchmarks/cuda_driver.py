"""A CUDA driver that launches nothing and writes down what it is given, for Triton's own launcher and for linconv's.

It is a library in C. Where it takes the place of NVIDIA's, no GPU can be used in that process.
"""

import ctypes
import os
import shutil
import struct
import subprocess

import torch

SOURCE = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// As in cuda.h.
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} Config;

enum { MOST = 256 };
static uint64_t functions, sizes[MOST][MOST];  // of the parameters of each function
static int counts[MOST];
uint64_t record[1 << 16], recorded, launched;
int error_of_next;

// The driver reads the sizes from the kernel's file; here they are told before it is loaded.
void stub_next_function(int count, const uint64_t *of) {
  counts[functions + 1] = count;
  memcpy(sizes[functions + 1], of, count * sizeof(uint64_t));
}

static int launch(void *f, const unsigned *shape, void *stream, unsigned attributes, void **parameters) {
  int error = error_of_next;
  error_of_next = 0;
  if (error) return error;
  const uint64_t function = (uint64_t)f;
  ++launched;
  if (recorded + 16 + MOST > sizeof record / sizeof *record) recorded = 0;  // nobody reads it
  record[recorded++] = function;
  for (int i = 0; i < 7; ++i) record[recorded++] = shape[i];
  record[recorded++] = (uint64_t)stream;
  record[recorded++] = attributes;
  record[recorded++] = counts[function];
  for (int i = 0; i < counts[function]; ++i) {
    record[recorded] = 0;
    memcpy(&record[recorded++], parameters[i], sizes[function][i]);
  }
  return 0;
}

int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
  const unsigned shape[] = {gx, gy, gz, bx, by, bz, shared};
  return launch(f, shape, stream, 0, parameters);
}
int cuLaunchKernelEx(const Config *c, void *f, void **parameters, void **extra) {
  const unsigned shape[] = {c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared};
  return launch(f, shape, c->stream, c->count, parameters);
}
int cuFuncGetParamInfo(void *f, size_t i, size_t *offset, size_t *size) {
  if (i >= (size_t)counts[(uint64_t)f]) return 1;
  *offset = 8 * i;
  *size = sizes[(uint64_t)f][i];
  return 0;
}
int cuModuleGetFunction(void **f, void *module, const char *name) { *f = (void *)++functions; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *f) { *value = attribute == 0 ? 1024 : 32; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error"; return 0; }
"""
# Triton's module names these too, and never calls them here.
NOTHING = (
    "cuCtxGetDevice cuCtxGetLimit cuCtxSetCurrent cuCtxSetLimit cuDeviceGet cuDevicePrimaryCtxRetain "
    "cuDriverGetVersion cuFuncSetAttribute cuFuncSetCacheConfig cuInit cuModuleUnload cuOccupancyMaxActiveClusters "
    "cuPointerGetAttribute cuStreamIsCapturing cuTensorMapEncodeIm2col cuTensorMapEncodeTiled"
)


def build(folder, name="libcuda.so.1"):
    """The library's path in a folder. By its usual name it takes the place of NVIDIA's where that is not loaded yet.

    Raises:
        FileNotFoundError: there is no C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    source, library = folder / "driver.c", folder / name
    source.write_text(SOURCE + "".join(f"int {name}() {{ return 0; }}\n" for name in NOTHING.split()))
    flags = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}"]
    subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
    if name == "libcuda.so.1":
        (folder / "libcuda.so").symlink_to(library)
    return library


class Stub:
    """The library, loaded."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.folder = library.parent
        self.words = (ctypes.c_uint64 * (1 << 16)).in_dll(self.library, "record")
        self.count = ctypes.c_uint64.in_dll(self.library, "recorded")
        self.launched = ctypes.c_uint64.in_dll(self.library, "launched")  # how many so far
        self.error_of_next = ctypes.c_int.in_dll(self.library, "error_of_next")

    def next_function(self, sizes: list[int]) -> None:
        """Tell the sizes of the parameters of the function that is loaded next."""
        self.library.stub_next_function(len(sizes), (ctypes.c_uint64 * len(sizes))(*sizes))

    def launches(self) -> list[int]:
        """What was launched since the last time, as words."""
        words = list(self.words[: self.count.value])
        self.count.value = 0
        return words


def parameter_sizes(cubin: bytes) -> list[int]:
    """Bytes of each parameter, from the file that the driver reads: its records EIATTR_KPARAM_INFO."""
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    size, number, names = struct.unpack_from("<HHH", cubin, 58)

    def section(i):
        name, _, _, _, offset, length = struct.unpack_from("<IIQQQQ", cubin, sections + i * size)
        return name, offset, length

    _, strings, _ = section(names)
    found = {}
    for name, offset, length in map(section, range(number)):
        if not cubin[strings + name :].startswith(b".nv.info."):
            continue
        at, end = offset, offset + length
        while at < end:
            kind, attribute, value = struct.unpack_from("<BBH", cubin, at)
            if (kind, attribute) == (4, 0x17):
                _, ordinal, _, packed = struct.unpack_from("<IHHI", cubin, at + 4)
                found[ordinal] = packed >> 18
            at += 4 + (value if kind == 4 else 0)
    return [found[i] for i in range(len(found))]


def make_triton_use(stub: Stub):
    """Make Triton's runtime launch through its own launcher, on the stub as a GPU of compute capability 9.0."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(stub.folder)
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    class Driver(CudaDriver):
        def __init__(self):
            self.get_device_capability = lambda device=0: (9, 0)
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 77
            load_binary = self.utils.load_binary

            def load(name, kernel, *rest):
                stub.next_function(parameter_sizes(kernel))
                return load_binary(name, kernel, *rest)

            self.utils.load_binary = load

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

    driver.set_active(Driver())
