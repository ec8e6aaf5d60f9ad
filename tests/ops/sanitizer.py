"""What compute-sanitizer's memcheck, racecheck and initcheck look for, in kernels that Triton's interpreter runs.

The interpreter runs programs one after another, and a program's threads not at all, so it shows neither an access
outside of a tensor nor an order of accesses that a GPU would leave to chance. Here every address that a kernel loads
from or stores to is looked up among the elements of the launch's tensors, each of which remembers who touched it:

- ``OutOfBounds``: no tensor of the launch has such an element, though its memory may be there;
- ``Race``: another program of the launch stores to the element, or two lanes of one store do;
- ``Hazard``: the program itself touches it a second time, one of both stores, and no barrier between: a thread stores
  what another loads. It may where both are the same position of blocks of one size that take all threads: the thread
  is the same then;
- ``Uninitialized``: nothing was stored to it, and it was made by ``triton_launch.empty``.

And every sum, difference and product of 32-bit integers that an address may be made of is taken in 64 bits too:

- ``Overflow``: they differ.
"""

import weakref

import numpy as np
import torch

from linconv.ops import triton_launch


class OutOfBounds(AssertionError):
    pass


class Race(AssertionError):
    pass


class Hazard(AssertionError):
    pass


class Uninitialized(AssertionError):
    pass


class Overflow(AssertionError):
    pass


NOBODY, SEVERAL = -1, -2  # in place of a program
VECTOR = 16  # bytes that a thread takes at once, at most


class _Memory:
    """The elements that were stored to, of memory that ``triton_launch.empty`` made."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = weakref.ref(tensor)
        self.start, self.itemsize = tensor.data_ptr(), tensor.element_size()
        self.stored = np.zeros(tensor.numel(), bool)

    def of(self, elements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which of these addresses are its own, their indices)."""
        own = (elements >= self.start) & (elements < self.start + len(self.stored) * self.itemsize)
        return own, (elements[own] - self.start) // self.itemsize


class _Touched:
    """Of each element: the last program that touched it, at which position of a block, after which barrier."""

    def __init__(self, elements: int):
        self.program = np.full(elements, NOBODY)
        self.position = np.zeros(elements, np.int64)
        self.barrier = np.zeros(elements, np.int64)

    def by_nobody(self, at):
        return (self.program[at] == NOBODY).all()

    def by_another(self, at, program):
        return (self.program[at] != NOBODY) & (self.program[at] != program)

    def by_another_thread(self, at, program, position, barrier):
        same_thread = (self.position[at] == position) & (position >= 0)
        return (self.program[at] == program) & (self.barrier[at] == barrier) & ~same_thread

    def add(self, at, program, position, barrier):
        self.program[at] = np.where(self.by_another(at, program), SEVERAL, program)
        self.position[at], self.barrier[at] = position, barrier


def _tensors(arguments: dict):
    """The tensors among a launch's arguments, by name; those of a tuple by name[index]."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, tuple):
            yield from _tensors({f"{name}[{i}]": v for i, v in enumerate(value)})


def _addresses(tensor: torch.Tensor) -> np.ndarray:
    address = np.full([], tensor.data_ptr(), np.uint64)
    for size, stride in zip(tensor.shape, tensor.stride()):
        address = address[..., None] + (np.arange(size) * stride * tensor.element_size()).astype(np.uint64)
    return address.ravel()


def _sorted_once(addresses: np.ndarray) -> np.ndarray:
    """What np.unique gives: much sooner, as the addresses of a tensor are mostly in order."""
    addresses = np.sort(addresses, kind="stable")
    return addresses[np.append(True, addresses[1:] != addresses[:-1])[: len(addresses)]]


class _Launch:
    def __init__(self, name: str, tensors: dict[str, torch.Tensor], threads: int, made: list[_Memory]):
        self.name, self.tensors, self.threads = name, tensors, threads
        self.elements = _sorted_once(np.concatenate([np.empty(0, np.uint64), *map(_addresses, tensors.values())]))
        self.loaded, self.stored = _Touched(len(self.elements)), _Touched(len(self.elements))
        self.initialized = np.ones(len(self.elements), bool)
        self.made = made
        for memory in made:
            own, index = memory.of(self.elements)
            self.initialized[own] = memory.stored[index]
        self.program, self.barrier = 0, 0

    def end(self):
        for memory in self.made:
            own, index = memory.of(self.elements)
            memory.stored[index] = self.initialized[own]

    def next_program(self):
        self.program += 1

    def touch(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int, stores: bool):
        kept = np.broadcast_to(mask.astype(bool), pointers.shape).ravel()
        address = pointers.ravel()[kept]
        at = np.searchsorted(self.elements, address)
        there = at < len(self.elements)
        there[there] = self.elements[at[there]] == address[there]
        self._refuse(~there, address, OutOfBounds, "is no element of any tensor of the launch", stores)
        # Where a block has fewer elements than its threads take, several threads load each and one of them stores it.
        spread = pointers.size * itemsize >= self.threads * VECTOR
        position = np.flatnonzero(kept) + (pointers.size << 32) if spread else np.full(len(at), -1)
        if stores:
            times = np.bincount(at, minlength=len(self.elements))
            self._refuse(times[at] > 1, address, Race, "is stored to by two lanes at once", stores)
        others = [(self.stored, "stores to")] + ([(self.loaded, "loads")] if stores else [])
        for touched, does in others:
            if touched.by_nobody(at):
                continue
            another = touched.by_another(at, self.program)
            self._refuse(another, address, Race, f"is what another program {does}", stores)
            thread = touched.by_another_thread(at, self.program, position, self.barrier)
            self._refuse(thread, address, Hazard, f"is what another thread {does}, no barrier between", stores)
        if stores:
            self.stored.add(at, self.program, position, self.barrier)
            self.initialized[at] = True
        else:
            self._refuse(~self.initialized[at], address, Uninitialized, "was never stored to", stores)
            self.loaded.add(at, self.program, position, self.barrier)

    def _refuse(self, bad: np.ndarray, address: np.ndarray, error, why: str, stores: bool):
        if bad.any():
            verb = "stores to" if stores else "loads"
            raise error(f"{self.name} {verb} {self._describe(int(address[bad][0]))}, which {why}")

    def _describe(self, address: int) -> str:
        def distance(named):
            start, size = named[1].data_ptr(), named[1].untyped_storage().nbytes()
            return max(start - address, address - start - size + 1, 0)

        if not self.tensors:
            return hex(address)
        name, tensor = min(self.tensors.items(), key=distance)
        offset = (address - tensor.data_ptr()) / tensor.element_size()
        return f"element {offset:g} behind the start of {name} {tuple(tensor.shape)}, strides {tensor.stride()}"


class _Listener:
    """Hears of the memory that operators make; see triton_launch.listener."""

    def __init__(self):
        self.made: list[_Memory] = []

    def on_empty(self, tensor):
        self.alive()
        if tensor.numel():
            self.made.append(_Memory(tensor))

    def on_launch(self, *_):
        pass

    def alive(self) -> list[_Memory]:
        self.made = [memory for memory in self.made if memory.tensor() is not None]
        return self.made


def check_integers(operation, lhs: np.ndarray, rhs: np.ndarray | int) -> None:
    """Raises Overflow if the operation, a function of NumPy, gives what 32 bits do not hold."""
    exact = operation(lhs.astype(np.int64), rhs)
    low, high = exact.min(), exact.max()
    if low < -(2**31) or high >= 2**31:
        name, result = operation.__name__, low if low < -(2**31) else high
        raise Overflow(f"{name} of 32-bit integers gives {result}")


def _watch_integers(interpreter) -> None:
    """In place of the interpreter's own check, which takes four more operations of the language and tells nobody."""
    builder, semantic = interpreter.InterpreterBuilder, interpreter.TritonSemantic
    bitcast, operations = builder.create_bitcast, {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def create_bitcast(self, source, dtype):
        handle = bitcast(self, source, dtype)
        handle.wraps = True  # bits of a floating-point number, no size and no index
        return handle

    def check(self, lhs, rhs, operation):
        if lhs.dtype.name == "int32" and not hasattr(lhs.handle, "wraps"):
            check_integers(operations[operation.__name__], lhs.handle.data, rhs.handle.data)

    builder.create_bitcast, semantic.binary_op_sanitize_overflow_impl = create_bitcast, check


def install(interpreter) -> None:
    """Makes Triton's interpreter, a module, check every launch from now on in this thread."""
    _watch_integers(interpreter)
    listener = triton_launch.listener.current = _Listener()
    memory, builder = interpreter._interpreter, interpreter.interpreter_builder
    run, set_grid_idx, barrier = interpreter.GridExecutor.__call__, builder.set_grid_idx, builder.create_barrier
    launches: list[_Launch] = []

    class Memory:
        """The interpreter's own loads and stores, watched."""

        def __getattr__(self, name):
            return getattr(memory, name)

        def load(self, pointers, mask, other, dtype):
            launches[-1].touch(pointers, mask, np.dtype(dtype).itemsize, stores=False)
            return memory.load(pointers, mask, other, dtype)

        def store(self, pointers, value, mask):
            launches[-1].touch(pointers, mask, value.dtype.itemsize, stores=True)
            return memory.store(pointers, value, mask)

    def call(self, *arguments, **named):
        tensors = dict(_tensors({**dict(zip(self.arg_names, arguments)), **named}))
        launch = _Launch(self.fn.__name__, tensors, 32 * named.get("num_warps", 4), listener.alive())
        launches.append(launch)
        try:
            run(self, *arguments, **named)
            launch.end()
        finally:
            launches.pop()

    def next_program(*index):
        launches[-1].next_program()
        set_grid_idx(*index)

    def create_barrier(*arguments):
        launches[-1].barrier += 1
        return barrier(*arguments)

    interpreter._interpreter = Memory()
    interpreter.GridExecutor.__call__ = call
    builder.set_grid_idx, builder.create_barrier = next_program, create_barrier
