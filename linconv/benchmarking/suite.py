"""The parts of a suite: cases, and the implementations that each compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from linconv.benchmarking.latency import graphed

__all__ = [
    "LARGEST",
    "Absent",
    "Case",
    "CheckFailed",
    "Cost",
    "Implementation",
    "Setting",
    "Shortcut",
    "judge",
    "work",
]

LARGEST = 0  # as a batch: as many as fit
AUDIO_LENGTHS = (249, 499, 1_499, 2_999, 5_999, 14_999, 29_999, 89_999, 179_999)  # 5 s to 1 h at 50 frames a second
TOKEN_LENGTHS = (512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536)


class Absent(Exception):
    """An implementation cannot run here; the message says why, and how to get it."""


class CheckFailed(Exception):
    """An implementation gives wrong numbers: no speed is reported for it."""


@dataclass(frozen=True)
class Setting:
    """The setting in which all implementations of a case run.

    work: "forward" (no gradients), "training" (forward and the gradients of every input and parameter) or "step"
        (forward, backward and an AdamW step on every parameter).
    dtype: name of a torch dtype.
    graph: whether the work is captured as a CUDA graph and replayed, which excludes host time.
    batch: sequences at once; if ``mixed``, their lengths fall evenly from the longest to its batch-th part. LARGEST:
        for each implementation and length the largest power of two within the limits of the run; times, floors and
        memory are then of one sequence.
    """

    work: str = "forward"
    dtype: str = "float32"
    batch: int = 1
    mixed: bool = False
    device: str = "cpu"
    seed: int = 0
    graph: bool = False

    def with_batch(self, batch: int) -> Setting:
        return replace(self, batch=batch)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def arithmetic(self) -> str:
        """The dtype whose rate of matrix products bounds an operator: on CPU the math is in float32."""
        return "float32" if self.device == "cpu" else self.dtype

    def tensor(self, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """New normal numbers on the device; they require gradients if the work has any."""
        drawn = torch.randn(*shape, device=self.device) * scale + shift
        return drawn.to(dtype or self.torch_dtype).requires_grad_(self.work != "forward")

    def seq_lens(self, length: int) -> Tensor | None:
        """(batch,) valid frames of each sequence, or None if all are valid."""
        if not self.mixed:
            return None
        return torch.tensor([max(1, length * k // self.batch) for k in range(self.batch, 0, -1)], device=self.device)

    def frames(self, length: int) -> int:
        """Valid frames of the whole batch."""
        return self.batch * length if not self.mixed else int(self.seq_lens(length).sum())


@dataclass(frozen=True)
class Cost:
    """The least a piece of work must do: floating-point operations at the rate of ``dtype``, bytes read and written."""

    flops: float = 0.0
    bytes: float = 0.0
    dtype: str = "float32"

    def seconds(self, rates: dict) -> float:
        """The floor by measured rates: ``matmul`` (by dtype) operations a second and ``copy`` bytes a second."""
        return max(self.flops / rates["matmul"][self.dtype], self.bytes / rates["copy"])


@dataclass(frozen=True)
class Shortcut:
    """Many equal blocks timed as few: beyond ``up_to``, the work is ``make(*arguments)`` and ``times`` x ``block``."""

    arguments: tuple
    block: Callable
    block_arguments: tuple
    times: int
    up_to: int


@dataclass(frozen=True)
class Implementation:
    """One way to do the work of a case.

    make: ``make(setting, length, *arguments)`` draws inputs and returns (function without arguments, tensors whose
        gradients training wants). Must be at the top level of a module: memory is measured in a separate process.
    ours: whether it is linconv's.
    degree: of its growth with length, 1 or 2; used for predictions.
    check: ``check(setting)`` raises CheckFailed for wrong numbers; None if there is nothing to compare with.
    cost: ``cost(setting, length)``, the floor of the work; None if it has none.
    memory: ``memory(setting, length)``, the least bytes it needs, if known before measuring.
    reason: why it cannot run here, or None.
    """

    name: str
    make: Callable
    arguments: tuple = ()
    ours: bool = False
    degree: int = 1
    check: Callable[[Setting], object] | None = None
    cost: Callable[[Setting, int], Cost] | None = None
    shortcut: Shortcut | None = None
    memory: Callable[[Setting, int], float] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Case:
    """Implementations of one piece of work at one shape.

    baseline: the name of the implementation that the others are compared with.
    unit: what lengths count. units_per_second: how many of them one second of audio has, or None.
    facts: what else a reader must know about the shape, such as the width.
    """

    name: str
    setting: Setting
    implementations: tuple[Implementation, ...]
    baseline: str
    lengths: tuple[int, ...] = AUDIO_LENGTHS
    unit: str = "frames"
    units_per_second: float | None = 50
    facts: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        s = self.setting
        batch = "largest batch" if s.batch == LARGEST else f"batch {s.batch}"
        batch += " of mixed lengths" if s.mixed else ""
        return f"{self.name}, {s.work}, {s.dtype}, {batch}" + (", CUDA graph" if s.graph else "")

    def describe(self) -> dict:
        return {
            "name": self.name, **asdict(self.setting), "baseline": self.baseline, "unit": self.unit,
            "units_per_second": self.units_per_second, "facts": self.facts,
        }  # fmt: skip

    def with_setting(self, **changes) -> Case:
        return replace(self, setting=replace(self.setting, **changes))


def work(make: Callable, arguments: tuple, setting: Setting, length: int) -> Callable[[], object]:
    """The work of an implementation at one length, on inputs drawn now."""
    if setting.graph:
        return graphed(work(make, arguments, replace(setting, graph=False), length))
    torch.manual_seed(setting.seed + length)
    function, leaves = make(setting, length, *arguments)
    if setting.work == "forward":

        def forward():
            with torch.no_grad():
                return function()

        return forward
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    upstream = None

    def gradients():
        nonlocal upstream
        y = function()
        if upstream is None:
            upstream = torch.randn_like(y)
        return torch.autograd.grad(y, leaves, upstream, allow_unused=True)

    if setting.work == "training":
        return gradients
    optimizer = torch.optim.AdamW(leaves, lr=1e-5)

    def step():
        for leaf, gradient in zip(leaves, gradients(), strict=True):
            leaf.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return step


def judge(ours: Callable, plain: Callable, exact: Callable, tensors: list[Tensor]) -> None:
    """Compare the errors of ``ours`` and ``plain`` torch at the tensors' precision, both against ``exact`` in float64.

    Root mean squares are compared, since the largest error of a single draw is mostly chance. For the largest error,
    twice as much is allowed, which still detects a single wrong element.

    Raises:
        CheckFailed: an error above twice plain torch's, or above three times for the gradient of a tensor; or not a
            number.
    """

    def run(function, dtype):
        given = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in tensors]
        y = function(*given)
        upstream = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return [y.detach(), *torch.autograd.grad(y, given, upstream.to(y), allow_unused=True)]

    wanted, theirs, got = run(exact, torch.float64), run(plain, None), run(ours, None)
    for index, (e, a, b) in enumerate(zip(wanted, theirs, got, strict=True)):
        if e is None:
            continue
        what, factor = (f"gradient {index}", 3) if index else ("result", 2)
        for measure, times in ((_root_mean_square, factor), (_largest, 2 * factor)):
            error, allowed, size = (measure(x.double()) for x in (b - e, a - e, e))
            # The last term is half a unit in the last place of float32: what any rounding of the result may cost.
            if not error <= times * allowed + 6e-8 * size:
                raise CheckFailed(
                    f"{what}: error {error:.2e}, plain torch's is {allowed:.2e}, of numbers about {size:.2g}"
                )


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
