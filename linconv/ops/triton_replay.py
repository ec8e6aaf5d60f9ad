"""Launches of a call, done again without the Python that worked them out.

Between the call of an operator and its first kernel stand sizes, strides, tiles, grids and what Triton looks up by
them: for a few seconds of speech far more time than the kernels' floor. All of it depends on the arguments' shapes,
strides, dtypes and alignment alone. So a call is noted down, and for arguments alike only memory is made from then on
and addresses are filled in.
"""

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import replace

import torch

from linconv.ops.triton_launch import POISONED, listener
from linconv.ops.triton_program import Address, Launch, Program

__all__ = ["Calls", "replayed"]

MOST_CALLS = 1024  # that an operator remembers
ALIGNMENT = 256  # bytes, of what lies in one piece of scratch memory
POINTER_ALIGNMENT = 16  # bytes, which Triton compiles other code for


def replayed(settings: Callable[[], tuple] = tuple):
    """Makes a function on CUDA tensors repeat what it launched for arguments alike.

    The function makes memory by ``triton_launch.empty`` only, launches by ``triton_launch.launch`` only, reads no
    element of a tensor, and returns tensors that it made, or None in their place. Its first argument is a tensor. Views
    of its arguments that it launches with start where these do.

    Args:
        settings: what else it depends on, as a tuple that can be compared.
    """

    def decorate(function):
        calls = Calls(function)

        @functools.wraps(function)
        def run(*arguments):
            return calls(settings(), arguments) if repeats(arguments[0]) else function(*arguments)

        run.calls = calls
        return run

    return decorate


def repeats(tensor: torch.Tensor) -> bool:
    """Whether launches are repeated on such tensors: not in Triton's interpreter, or where they are only listed."""
    return tensor.device.type == "cuda"


class Calls:
    """What a function did before, by all that it depends on."""

    def __init__(self, function):
        self.function = function
        self.known: dict[tuple, _Call | None] = {}  # None: not to be repeated
        self.lock = threading.Lock()

    def __call__(self, settings: tuple, arguments: tuple):
        key = (settings, *map(_looked_at, arguments))
        call = self.known.get(key)
        if call is not None:
            return call(arguments)
        if key in self.known:
            return self.function(*arguments)
        # The first time: a length of speech may not come again, but the layers of a model are called alike.
        recording = _Recording(arguments)
        with recording:
            results = self.function(*recording.arguments)
        call = recording.call(results) if recording.certain else None
        with self.lock:  # forward and backward passes may be in threads of their own
            while len(self.known) >= MOST_CALLS:
                del self.known[next(iter(self.known))]
            self.known[key] = call
        return results


def _looked_at(argument):
    """What of an argument the launches may depend on."""
    if isinstance(argument, torch.Tensor):
        aligned = argument.data_ptr() % POINTER_ALIGNMENT == 0
        return argument.shape, argument.stride(), argument.dtype, argument.device, aligned
    return argument


class _Recording:
    """Listens to the memory that a function makes and to the kernels that it launches."""

    def __init__(self, arguments: tuple):
        # Aliases: a tensor that is passed twice may be two tensors next time.
        self.arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        self.number = {id(a): i for i, a in enumerate(self.arguments) if isinstance(a, torch.Tensor)}
        self.starting: dict[tuple, list[int]] = {}  # arguments by where they start
        for i in self.number.values():
            self.starting.setdefault(_start(self.arguments[i]), []).append(i)
        self.made: list[torch.Tensor] = []
        self.memory: dict = {}  # of each of them its number
        self.certain = True  # of each view, which argument it is of
        self.launches: list[Launch] = []  # addresses from a tensor: an argument, then one that was made, by number

    def __enter__(self):
        listener.current = self

    def __exit__(self, *_):
        listener.current = None

    def on_empty(self, tensor: torch.Tensor) -> None:
        self.memory.setdefault(_memory(tensor), len(self.made))
        self.made.append(tensor)

    def on_launch(self, kernel, grid: tuple, arguments: dict, compiled) -> None:
        values = [arguments[name] for name in kernel.arg_names]
        values = [self._address(value) if isinstance(value, torch.Tensor) else value for value in values]
        self.launches.append(Launch(compiled, (*grid, 1, 1)[:3], values))

    def _address(self, tensor: torch.Tensor) -> Address | int:
        if tensor.numel() == 0:
            return 0
        if (number := self.number.get(id(tensor))) is not None:
            return Address(number, 0)
        if viewed := self.starting.get(_start(tensor)):
            self.certain &= len(viewed) == 1
            return Address(viewed[0], 0)
        made = self._made(tensor)
        return Address(len(self.arguments) + made, tensor.data_ptr() - self.made[made].data_ptr())

    def _made(self, tensor: torch.Tensor) -> int:
        if (number := self.memory.get(_memory(tensor))) is None:
            raise RuntimeError("a replayed function used a tensor that is neither an argument nor made by empty()")
        return number

    def call(self, results) -> "_Call":
        several = isinstance(results, tuple)
        returned = [(None if r is None else (self._made(r), r)) for r in (results if several else (results,))]
        return _Call(self, returned, several)


class _Call:
    """A call's memory and launches. Results have memory of their own; all else is one piece."""

    def __init__(self, recording: _Recording, returned: list, several: bool):
        own = list(dict.fromkeys(result[0] for result in returned if result is not None))
        as_made = [recording.made[i] for i in own]
        for i, result in filter(None, returned):  # made at once as it is returned, if that is all of its memory
            if as_made[own.index(i)].numel() == result.numel():
                as_made[own.index(i)] = result
        self.own = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in as_made]
        self.returned = [
            None if result is None else (own.index(result[0]), _view(result[1], as_made[own.index(result[0])]))
            for result in returned
        ]
        self.several = several

        arguments = [i for i, a in enumerate(recording.arguments) if isinstance(a, torch.Tensor)]
        self.arguments = arguments
        # For each number of a recorded address: which start it is counted from (the tensors among the arguments, own
        # results, scratch) and its offset there.
        start = {i: (at, 0) for at, i in enumerate(arguments)}
        total = 0
        for i, memory in enumerate(recording.made):
            number = len(recording.arguments) + i
            if i in own:
                start[number] = len(arguments) + own.index(i), 0
            else:
                start[number] = len(arguments) + len(own), total
                total += math.ceil(memory.numel() * memory.element_size() / ALIGNMENT) * ALIGNMENT
        self.scratch = total
        launches = [
            replace(launch, values=[_counted_from(start, value) for value in launch.values])
            for launch in recording.launches
        ]
        self.program = Program.of(launches)
        # For Triton, where it has to do them.
        self.launches = [(launch.compiled[launch.grid], launch.values, launch.addresses()) for launch in launches]

    def __call__(self, arguments: tuple):
        device = arguments[0].device
        own = [torch.empty_strided(*size, dtype=dtype, device=device) for *size, dtype in self.own]
        memory = own
        if self.scratch:
            memory = [*own, torch.empty(self.scratch, dtype=torch.uint8, device=device)]
        if POISONED:
            for tensor in memory:
                tensor.fill_(math.nan if tensor.is_floating_point() else 0xFF)  # NaN in every floating type
        starts = [arguments[i].data_ptr() for i in self.arguments]
        starts += [tensor.data_ptr() for tensor in memory]
        if self.program is None or not self.program.run(starts, device.index):
            for launch, values, addresses in self.launches:
                values = values.copy()
                for i, address in addresses:
                    values[i] = starts[address.start] + address.offset
                launch(*values)
        results = [None if r is None else _seen(own[r[0]], r[1]) for r in self.returned]
        return tuple(results) if self.several else results[0]


def _memory(tensor: torch.Tensor):
    """Equal for tensors in the same memory. One without elements has no address, and may stand for any other."""
    return tensor.untyped_storage().data_ptr() or tensor.dtype


def _start(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.untyped_storage().data_ptr(), tensor.data_ptr()


def _counted_from(start: dict[int, tuple[int, int]], value):
    if not isinstance(value, Address):
        return value
    number, offset = start[value.start]
    return Address(number, offset + value.offset)


def _seen(memory: torch.Tensor, view: tuple | None) -> torch.Tensor:
    return memory if view is None else memory.as_strided(*view)


def _view(result: torch.Tensor, memory: torch.Tensor) -> tuple | None:
    """Shape, strides and offset of a result in its memory; None where it is all of it, as it was made."""
    if result is memory:
        return None
    return result.shape, result.stride(), result.storage_offset()
