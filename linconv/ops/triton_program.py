"""The launches of a call as a program that compiled code runs.

Triton launches each kernel through Python, again with all of its arguments, constants included: for a few seconds of
speech that takes longer than the kernels. A program holds what the CUDA driver is given, and only addresses are filled
in. It is a list of words of 8 bytes, for each launch

    function, grid (3), threads of a block, bytes of shared memory, number of parameters, number of addresses,
    the parameters, in the first bytes of a word each; of an address, the distance from its start,
    of each address: which parameter it is, and from which start it is counted.

csrc/common/launches.cpp runs it.
"""

import array
import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass

from triton import knobs
from triton.runtime import driver

from linconv.ops import dispatch

__all__ = ["Address", "Launch", "Program"]

INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: a thread that has not used the GPU yet
# Bytes of a kernel's parameter by its type.
SIZES = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8}
FLOATS = {"fp32": ctypes.c_float, "f32": ctypes.c_float, "fp64": ctypes.c_double}
MOST_PARAMETERS = 128  # of linconv_launch
MOST_SHARED_MEMORY = 228 * 1024  # bytes, above which Triton's launcher asks for more in a way of its own


@dataclass(frozen=True)
class Address:
    """``offset`` bytes behind the start of number ``start``."""

    start: int
    offset: int


@dataclass(frozen=True)
class Launch:
    """A compiled kernel, its grid of three sizes, and all arguments in order, an `Address` for each tensor."""

    compiled: object
    grid: tuple
    values: list

    def addresses(self) -> list[tuple[int, Address]]:
        """Those among the arguments, with their positions."""
        return [(i, value) for i, value in enumerate(self.values) if isinstance(value, Address)]


class Program:
    """Launches that compiled code runs, while the compiled kernels exist; make them by :meth:`of`."""

    def __init__(self, words: list[int], count: int, cuda: "_Cuda"):
        self.words = array.array("Q", words)
        self.cuda = cuda
        self.fixed = cuda.launch_kernel, self.words.buffer_info()[0], count

    @classmethod
    def of(cls, launches: list[Launch]) -> "Program | None":
        """The program of these launches; None where Triton has to launch them itself: a kernel has something besides
        parameters (scratch memory, clusters), a parameter is of an unknown type, the CUDA driver does not confirm the
        parameters' sizes, or linconv's compiled library was not loaded."""
        cuda = _cuda()
        words = [] if cuda is None else [_words(launch, cuda) for launch in launches]
        if cuda is None or None in words:
            return None
        return cls([word for of_launch in words for word in of_launch], len(launches), cuda)

    def run(self, starts: list[int], device: int) -> bool:
        """Launch on the current stream of a device, which must be the current one.

        Returns:
            Whether it did. It does not where someone listens to Triton's launches, such as a profiler, and in a thread
            without a CUDA context, which Triton makes.

        Raises:
            RuntimeError: the CUDA driver refuses a launch.
        """
        runtime = knobs.runtime
        for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
            if getattr(hook, "calls", hook):  # a chain of hooks, or itself one or None
                return False
        starts, done = array.array("Q", starts), ctypes.c_uint64()
        stream = driver.active.get_current_stream(device)
        error = self.cuda.launch(*self.fixed, starts.buffer_info()[0], stream, ctypes.byref(done))
        if error == INVALID_CONTEXT and done.value == 0:
            return False
        if error:
            raise RuntimeError(f"launch {done.value + 1} of {self.fixed[2]} of a replayed call: CUDA error {error}")
        return True


@dataclass(frozen=True, eq=False)
class _Cuda:
    """Functions of the CUDA driver, and of linconv's library."""

    launch_kernel: int  # address of cuLaunchKernel
    parameter_info: object  # cuFuncGetParamInfo
    launch: object  # linconv_launch

    @functools.cache  # noqa: B019  there is one object
    def parameter_sizes(self, function: int) -> list[int]:
        """Bytes of each parameter of a kernel."""
        sizes, offset, size = [], ctypes.c_size_t(), ctypes.c_size_t()
        while self.parameter_info(function, len(sizes), ctypes.byref(offset), ctypes.byref(size)) == 0:
            sizes.append(size.value)
        return sizes


@functools.cache
def _cuda(library: str = "libcuda.so.1") -> _Cuda | None:
    """None where a function is missing: an older driver, no compiled library, or another maker's GPU."""
    if (path := dispatch.cpu_library()) is None:
        return None
    try:
        cuda, linconv = ctypes.CDLL(library), ctypes.CDLL(str(path))
        launch_kernel = ctypes.cast(cuda.cuLaunchKernel, ctypes.c_void_p).value
        parameter_info, launch = cuda.cuFuncGetParamInfo, linconv.linconv_launch
    except (OSError, AttributeError):
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    parameter_info.argtypes = pointer, size, ctypes.POINTER(size), ctypes.POINTER(size)
    launch.argtypes = pointer, pointer, ctypes.c_uint64, pointer, pointer, ctypes.POINTER(ctypes.c_uint64)
    return _Cuda(launch_kernel, parameter_info, launch)


def _words(launch: Launch, cuda: _Cuda) -> list[int] | None:
    """The words of one launch, or None if Triton has to do it."""
    compiled, metadata = launch.compiled, launch.compiled.metadata
    special = ("num_ctas", 1), ("launch_cooperative_grid", False), ("launch_pdl", False)
    needs = ("global_scratch_size", "profile_scratch_size", "tensordesc_meta")
    if any(getattr(metadata, n, v) != v for n, v in special) or any(getattr(metadata, n, None) for n in needs):
        return None
    if metadata.shared > MOST_SHARED_MEMORY:
        return None
    arguments = list(_flat(compiled.src.signature.values(), launch.values))
    sizes = [_size(type_) for type_, _ in arguments]
    found = cuda.parameter_sizes(compiled.function)
    # Behind a kernel's own parameters Triton has pointers to scratch memory, null here.
    scratch = len(found) - len(sizes)
    if not 0 <= scratch <= 2 or found != sizes + [8] * scratch or len(found) > MOST_PARAMETERS:
        return None
    parameters = [_word(*argument) for argument in arguments] + [0] * scratch
    addresses = [(i, value.start) for i, (_, value) in enumerate(arguments) if isinstance(value, Address)]
    threads = 32 * metadata.num_warps
    header = [compiled.function, *launch.grid, threads, metadata.shared, len(parameters), len(addresses)]
    return [*header, *parameters, *(word for address in addresses for word in address)]


def _flat(types, values) -> Iterator[tuple]:
    """Each type with its value, of what is no constant, those in tuples too."""
    for type_, value in zip(types, values, strict=True):
        if isinstance(type_, tuple):
            yield from _flat(type_, value)
        elif type_ != "constexpr":
            yield type_, value


def _size(type_: str) -> int | None:
    if type_[0] == "*":
        return 8
    return ctypes.sizeof(FLOATS[type_]) if type_ in FLOATS else SIZES.get(type_)


def _word(type_: str, value) -> int:
    if isinstance(value, Address):
        return value.offset
    if type_ in FLOATS:
        return int.from_bytes(bytes(FLOATS[type_](value)), "little")  # beyond its range infinity, as in C
    return (value or 0) % 2**64  # None: a null pointer
