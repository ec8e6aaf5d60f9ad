"""Peak resident memory of a piece of work, each in a separate process.

A process that has already worked keeps freed memory for itself and would hide what the next piece of work needs. So
every measurement runs in a fresh child of a fork server, which has imported the heavy modules once but has computed
nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_extra_bytes(make: Callable[..., Callable[[], object]], *args, preload: Sequence[str] = ("torch",)) -> int:
    """Peak increase of resident memory in bytes while ``make(*args)()`` ran.

    ``make`` builds everything that should not be counted (the model, the input) and returns the work. It runs in the
    child, so it and its arguments are pickled: a function at the top level of an importable module.

    Args:
        preload: modules that the fork server imports once for all measurements with the same list.

    Raises:
        Whatever ``make`` or the work raises; ``BrokenProcessPool`` if the child is killed, e.g. for lack of memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload])
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        with _interrupts_held_back():
            future = pool.submit(_measure, make, args)
        try:
            return future.result()
        except KeyboardInterrupt:
            for child in set(multiprocessing.active_children()) - others:
                child.kill()  # its work may take minutes
            raise


@contextlib.contextmanager
def _interrupts_held_back():
    """Processes started within are not interrupted with this one, which handles them itself.

    A terminal interrupts all of them, and each would print a traceback. They inherit the signal mask.
    """
    resource_tracker.ensure_running()  # starting it would unblock interrupts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _measure(make: Callable[..., Callable[[], object]], args: tuple) -> int:
    work = make(*args)
    gc.collect()
    _give_back_freed_memory()
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")  # resets the peak to the current resident size
    before = peak_resident_bytes()
    work()
    return peak_resident_bytes() - before


def peak_extra_cuda_bytes(work: Callable[[], object]) -> int:
    """Peak increase of the bytes that torch allocated on the current CUDA device while ``work()`` ran."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_resident_bytes() -> int:
    """The highest resident size of this process so far (on Linux: since the last reset)."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> bool:
    """Make this process keep freed memory for its next allocation, as allocators for machine learning do.

    By default, glibc returns large blocks at once, and the system clears every page of the next one: this would be
    timed with each call that has a large result, and on a virtual machine it can take longer than the work.
    Returns whether the C library knows the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    no_own_mapping, trim_threshold = (-4, 0), (-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    return all([mallopt(*no_own_mapping), mallopt(*trim_threshold)])


def _give_back_freed_memory() -> None:
    """Return memory freed after building to the system; only glibc needs this."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
