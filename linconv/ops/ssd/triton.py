"""The scan on Triton kernels, for one direction of time or both: which tiles, which memory, which launches.

The states that enter each chunk are found by one of two plans, each of two launches. Chunk-parallel: what each chunk
adds to the state, then the states from chunk to chunk. In sweeps, where those fill the GPU: the decays of each chunk,
then a sweep over the chunks of each sequence, head and direction with the state in registers, so that states are
written and read once and not twice. Forward is three launches, the last one that of the outputs. Backward saves
nothing but its inputs: states and their gradients (two launches); the gradients of B and C; dx, by the kernel of the
outputs, in the memory where states were; the gradient of dt; sums of what chunks, heads or directions share. Nothing
else runs on the device in between, nothing is read back to the host, and in one plan no result depends on the batch
that a sequence stands in.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch
import triton
import triton.language as tl

from linconv.ops.ssd import triton_kernels as kernels
from linconv.ops.ssd import triton_sweeps as sweeps
from linconv.ops.ssd.triton_tiles import (
    PLANS,
    PROGRAM_IN_HEADS,
    choose_plan,
    choose_tiles,
    forced_plan,
    may_spill,
    rounds_products,
)
from linconv.ops.triton_launch import ALL_REGISTERS, capability_of, empty, launch, launched
from linconv.ops.triton_replay import replayed

MATH = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16}
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
STEP_OPTIONS = ("SOFTPLUS", "LOW", "HIGH")
TYPES = ("MATH", "OPERAND", "PRECISION")
SPARE_MEMORY = 1 / 16  # of a result, if that is enough for what would else need memory of its own


def _divisor(number: int, at_most: int) -> int:
    return max(d for d in range(1, at_most + 1) if number % d == 0)


@dataclass
class Scan:
    """The arguments of the scan, as those of the operators: see csrc/ssd/scan.h."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    dt_bias: torch.Tensor | None
    dt_softplus: bool
    dt_min: float
    dt_max: float
    initial_states: torch.Tensor | None
    seq_lens: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    directions: int
    flip: bool = False  # the one direction is the backward one
    once: bool = False
    shifted: bool = False
    precision: str = ""
    plan: str = ""  # one of PLANS for forward to follow, else that of the committed table

    def __post_init__(self):
        self.batch, self.frames, self.heads, self.headdim = self.x.shape[-4:]
        self.groups, self.dstate = self.B.shape[-2:]
        self.summed = self.directions == 2 and self.x.dim() == 4
        self.math = torch.promote_types(self.x.dtype, torch.float32)
        types = {t.dtype for t in (self.x, self.B, self.C)}
        self.operand = torch.bfloat16 if types == {torch.bfloat16} else self.math
        # Results of fp16 arguments may be beyond its range, but TF32 has its mantissa.
        if self.math == torch.float64:
            self.precision = "ieee"
        elif not self.precision:
            half = types <= {torch.float16, torch.bfloat16}
            self.precision = "tf32" if half else PRECISIONS[torch.get_float32_matmul_precision()]
        # dt may stand in exponents where it has a logarithm, and rounding there is less than that of products.
        self.logarithmic = self.dt_min >= 0 and rounds_products(self.operand, self.precision)
        self.bounds = self.cu_seqlens if self.cu_seqlens is not None else self.seq_lens
        self.kind = "cu_seqlens" if self.cu_seqlens is not None else "seq_lens" if self.seq_lens is not None else ""
        self.sequences = self.batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        capability = capability_of(self.x)
        sizes = (self.operand, self.precision, self.headdim, self.dstate, capability)
        self.tiles = choose_tiles(*sizes)
        on_gpu = self.x.device.type == "cuda"
        properties = torch.cuda.get_device_properties(self.x.device) if on_gpu else None
        self.multiprocessors = properties.multi_processor_count if on_gpu else 0
        if not self.plan:
            blocks = triton.cdiv(self.headdim, self.tiles.sweep_p) * triton.cdiv(self.dstate, self.tiles.sweep_n)
            programs = self.sequences * self.heads * blocks * self.directions
            self.plan = choose_plan(programs, self.multiprocessors, capability, self.precision)

    def slots(self, chunk: int) -> int:
        if self.cu_seqlens is not None:
            return self.frames // chunk + self.sequences
        return self.batch * triton.cdiv(self.frames, chunk)

    def empty(self, *shape, dtype=None):
        return empty(shape, self.x, dtype or self.math)

    def heads_at_once(self) -> int:
        """Heads of a program of the kernels that take a frame's steps, which stand side by side."""
        return min(16, triton.next_power_of_2(self.heads))

    def heads_of_outputs(self, programs: int) -> int:
        """Heads that a program of the outputs takes: with more of them fewer programs do what they have in common, with
        less the GPU is fuller.

        Args:
            programs: how many there are for each head.
        """
        at_once = max(1, self.multiprocessors * self.tiles.resident)

        def time(heads):
            return triton.cdiv(programs * self.heads // heads, at_once) * (PROGRAM_IN_HEADS + heads), -heads

        group_heads = self.heads // self.groups
        return min((h for h in range(1, self.tiles.heads + 1) if group_heads % h == 0), key=time)

    def states_of_chunks(self, chunk: int) -> tuple:
        """The shape of the states that enter each chunk."""
        return self.directions, self.heads, self.slots(chunk), self.headdim, self.dstate

    def last_states(self):
        """Memory for the states after the last step, where there is one direction."""
        return self.empty(self.sequences, self.heads, self.headdim, self.dstate) if self.directions == 1 else None

    def sizes(self, slots: int) -> dict:
        return dict(
            bounds=self.bounds, frames=self.frames, sequences=self.sequences, slots=slots, heads=self.heads,
            group_heads=self.heads // self.groups, headdim=self.headdim, dstate=self.dstate,
        )  # fmt: skip

    def options(self, *names) -> dict:
        options = dict(
            DIRECTIONS=self.directions, FLIP=self.flip, ONCE=self.once, SHIFTED=self.shifted, SOFTPLUS=self.dt_softplus,
            LOW=self.dt_min, HIGH=self.dt_max, KIND=self.kind, MATH=MATH[self.math], OPERAND=MATH[self.operand],
            PRECISION=self.precision, SUMMED=self.summed,
            SUM_D=self.summed and self.D is not None and self.D.dim() == 2,
        )  # fmt: skip
        return {name: options[name] for name in names}


def _strides(tensor, prefix, letters, dims) -> dict:
    """Strides by name, the first one that of the axis of directions, 0 where both share the tensor."""
    if tensor is None:
        return {f"{prefix}_{letter}": 0 for letter in "d" + letters}
    strides = (tensor.stride(0) if tensor.dim() > dims else 0, *tensor.stride()[-dims:])
    return {f"{prefix}_{letter}": stride for letter, stride in zip("d" + letters, strides)}


def _x_strides(tensor, prefix):
    return _strides(tensor, prefix, "bthp", 4)


def _B_strides(tensor, prefix):
    return _strides(tensor, prefix, "btgn", 4)


def _dt_strides(scan):
    return {
        **_strides(scan.dt, "dt", "bth", 3),
        **_strides(scan.A, "A", "h", 1),
        **_strides(scan.dt_bias, "bias", "h", 1),
    }


def _state_strides(tensor, prefix) -> dict:
    values = (0, 0, 0, 0) if tensor is None else tensor.stride()
    return {f"{prefix}_{letter}": stride for letter, stride in zip("shpn", values)}


def _states(scan: Scan, chunk: int, states, dy=None, dlast=None):
    """Fills the states that enter each chunk, those of each direction in memory of their own.

    With dy, the gradients of the states that leave each chunk too.

    Returns:
        (these gradients, decays as kernels take them, last states, gradient of the first states); None for what there
        is not.
    """
    slots = scan.slots(chunk)
    per_chunk = (scan.directions, scan.heads, slots)
    leaving = scan.empty(*per_chunk, scan.headdim, scan.dstate, dtype=scan.operand) if dy is not None else None
    of_frames = (*per_chunk, chunk)
    decays = dict(
        v_of=scan.empty(*of_frames),
        step_of=None if scan.logarithmic else scan.empty(*of_frames),
        w_of=scan.empty(*of_frames) if scan.logarithmic else None,
        total_of=scan.empty(*per_chunk),
    )
    per_sequence = (scan.sequences, scan.heads, scan.headdim, scan.dstate)
    last = scan.last_states() if dy is None else None
    dfirst = scan.empty(*per_sequence) if dy is not None and scan.initial_states is not None else None
    find = _swept_states if scan.plan == "sweeps" else _passed_states
    memory = dict(states=states[0], other_states=states[-1], leaving=leaving)
    find(scan, chunk, memory, decays, dy, last, dlast, dfirst)
    return leaving, decays, last, dfirst


def _passed_states(scan: Scan, chunk: int, memory, decays, dy, last, dlast, dfirst):
    """What each chunk adds, all at once, and then from chunk to chunk."""
    slots, tiles, kinds = scan.slots(chunk), scan.tiles, 1 if dy is None else 2
    p_tiles, n_tiles = triton.cdiv(scan.headdim, tiles.state_p), triton.cdiv(scan.dstate, tiles.state_n)
    launch(
        kernels.chunk_states,
        (slots * scan.directions, scan.heads * p_tiles * n_tiles),
        dict(
            x=scan.x, dt=scan.dt, A=scan.A, dt_bias=scan.dt_bias, B=scan.B, dy=dy, C=None if dy is None else scan.C,
            **memory, **decays, **scan.sizes(slots), **_x_strides(scan.x, "x"), **_dt_strides(scan),
            **_B_strides(scan.B, "B"), **_x_strides(dy, "dy"), **_B_strides(None if dy is None else scan.C, "C"),
            **scan.options("DIRECTIONS", "FLIP", "SHIFTED", "KIND", *STEP_OPTIONS, *TYPES),
            GRADIENT=dy is not None, Q=chunk, BLOCK_P=tiles.state_p, BLOCK_N=tiles.state_n,
        ),
        tiles.state_warps, tiles.stages, **ALL_REGISTERS,
    )  # fmt: skip
    sizes = scan.sizes(slots)
    for name in ("sequences", "group_heads"):
        del sizes[name]
    block = 1024
    launch(
        kernels.pass_states,
        (scan.sequences * triton.cdiv(scan.headdim * scan.dstate, block), scan.heads * scan.directions * kinds),
        dict(
            **memory, total_of=decays["total_of"], first=scan.initial_states, last=last, dlast=dlast,
            dfirst=dfirst, **sizes, **_state_strides(scan.initial_states, "first"), **_state_strides(dlast, "dlast"),
            **scan.options("DIRECTIONS", "FLIP", "KIND", "MATH"), Q=chunk, BLOCK=block, STAGES=4,
        ),
        4, 4,
    )  # fmt: skip


def _swept_states(scan: Scan, chunk: int, memory, decays, dy, last, dlast, dfirst):
    """By a program for each sequence, head and direction, chunk after chunk."""
    slots, tiles, kinds = scan.slots(chunk), scan.tiles, 1 if dy is None else 2
    sizes = scan.sizes(slots)
    for name in ("group_heads", "headdim", "dstate"):
        del sizes[name]
    heads_at_once = scan.heads_at_once()
    launch(
        sweeps.chunk_decays,
        (slots * scan.directions, triton.cdiv(scan.heads, heads_at_once)),
        dict(
            dt=scan.dt, A=scan.A, dt_bias=scan.dt_bias, **decays, **sizes, **_dt_strides(scan),
            **scan.options("DIRECTIONS", "FLIP", "KIND", "MATH", *STEP_OPTIONS), Q=chunk, HEADS=heads_at_once,
        ),
        4, 1, **ALL_REGISTERS,
    )  # fmt: skip
    tiles_of_state = triton.cdiv(scan.headdim, tiles.sweep_p) * triton.cdiv(scan.dstate, tiles.sweep_n)
    sizes = scan.sizes(slots)
    del sizes["sequences"]
    C = None if dy is None else scan.C
    launch(
        sweeps.sweep_states,
        (scan.sequences * tiles_of_state, scan.heads * scan.directions * kinds),
        dict(
            x=scan.x, B=scan.B, dy=dy, C=C, **memory, first=scan.initial_states, last=last, dlast=dlast,
            dfirst=dfirst, **decays, **sizes, **_x_strides(scan.x, "x"), **_B_strides(scan.B, "B"),
            **_x_strides(dy, "dy"), **_B_strides(C, "C"), **_state_strides(scan.initial_states, "first"),
            **_state_strides(dlast, "dlast"),
            **scan.options("DIRECTIONS", "FLIP", "SHIFTED", "KIND", *TYPES),
            Q=chunk, BLOCK_P=tiles.sweep_p, BLOCK_N=tiles.sweep_n, STAGES=tiles.sweep_stages,
        ),
        tiles.sweep_warps, tiles.sweep_stages, **ALL_REGISTERS,
    )  # fmt: skip


def _outputs(scan: Scan, chunk, rows, z, out, states, decays, gradient: bool, skipped=None):
    """y from x, or with ``gradient`` dx from dy, and where there is a ``skipped`` sums for D's gradient."""
    slots, tiles = scan.slots(chunk), scan.tiles
    left, right = (scan.B, scan.C) if gradient else (scan.C, scan.B)
    block_n = (tiles.dx_n if gradient else 0) or tiles.block_n
    x = None if skipped is None else scan.x
    p_tiles = triton.cdiv(scan.headdim, tiles.block_p)
    ways = scan.directions if not scan.summed else 1
    blocks = slots * (chunk // rows)
    heads = scan.heads_of_outputs(blocks * p_tiles * ways)
    out_strides = _x_strides(out, "out")
    del out_strides["out_p"]
    launch(
        kernels.chunk_outputs,
        (blocks, p_tiles * (scan.heads // heads) * ways),
        dict(
            z=z, x=x, rows=left, columns=right, D=scan.D, states=states, out=out, skipped_of=skipped, **decays,
            **scan.sizes(slots), **_x_strides(z, "z"), **_x_strides(x, "x"),
            **_B_strides(left, "r"), **_B_strides(right, "c"), **_strides(scan.D, "D", "h", 1), **out_strides,
            **scan.options("DIRECTIONS", "SUMMED", "SUM_D", "FLIP", "ONCE", "SHIFTED", "KIND", *TYPES),
            heads_at_once=heads, GRADIENT=gradient, Q=chunk, ROWS=rows, BLOCK_P=tiles.block_p, BLOCK_N=block_n,
            STAGES=tiles.stages,
        ),
        tiles.warps, tiles.stages, **(ALL_REGISTERS if tiles.warps > 4 else {}),
    )  # fmt: skip


def scan_forward(scan: Scan):
    """(y as x, contiguous; the last states of the one direction, or None)."""
    y = scan.empty(*scan.x.shape, dtype=scan.x.dtype)
    chunk = scan.tiles.chunk
    states = scan.empty(*scan.states_of_chunks(chunk), dtype=scan.operand)
    _, decays, last, _ = _states(scan, chunk, states)
    _outputs(scan, chunk, scan.tiles.rows, scan.x, y, states, decays, gradient=False)
    return y, last


def _dx_and_states(scan: Scan, chunk: int):
    """(dx, memory for the states of each direction).

    dx is computed last, so its memory holds the states of as many directions as fit until then, for which it may be a
    little larger than dx.
    """
    one = scan.states_of_chunks(chunk)[1:]
    size, elements = math.prod(one), scan.x.numel()
    fitting = int(elements * (1 + SPARE_MEMORY)) // size if size and scan.operand == scan.x.dtype else 0
    fitting = min(scan.directions, fitting)
    memory = scan.empty(max(elements, fitting * size), dtype=scan.x.dtype)
    inside = memory[: fitting * size].view(fitting, *one).unbind()
    apart = scan.empty(scan.directions - fitting, *one, dtype=scan.operand).unbind()
    return memory[:elements].view(scan.x.shape), (*inside, *apart)


def scan_backward(scan: Scan, dy, dlast=None):
    """Gradients of x, dt, A, B, C, D, dt_bias, initial_states, each as its argument; of an absent one, (0,)."""
    tiles = scan.tiles
    chunk = tiles.gradient_chunk
    slots, directions, heads = scan.slots(chunk), scan.directions, scan.heads
    group_heads = heads // scan.groups
    dx, states = _dx_and_states(scan, chunk)
    leaving, decays, _, dfirst = _states(scan, chunk, states, dy, dlast)

    def like(argument):
        return scan.empty(*argument.shape, dtype=argument.dtype) if argument is not None else scan.empty(0)

    ddt, dA, dB, dC, dD, dbias = map(like, (scan.dt, scan.A, scan.B, scan.C, scan.D, scan.dt_bias))

    def shared(argument, dims):
        """Directions that an argument is summed over."""
        return 1 if argument is None or argument.dim() > dims else directions

    block_heads = _divisor(group_heads, tiles.gradient_heads)
    blocks = group_heads // block_heads
    of_batch = (directions, scan.batch, scan.frames)
    B_terms, C_terms, dt_terms = blocks * shared(scan.B, 4), blocks * shared(scan.C, 4), shared(scan.dt, 3)
    # What is the only term of its sum is written to its place at once.
    dB_parts = dB if B_terms == 1 else scan.empty(blocks, *of_batch, scan.groups, scan.dstate)
    dC_parts = dC if C_terms == 1 else scan.empty(blocks, *of_batch, scan.groups, scan.dstate)
    ddt_parts = ddt if dt_terms == 1 else scan.empty(*of_batch, heads)
    n_tiles = triton.cdiv(scan.dstate, tiles.gradient_n)
    per_chunk = (directions, heads, slots)
    for_steps = dict(
        moved_of=scan.empty(2 * n_tiles, *per_chunk, chunk),  # B's and C's
        given_of=scan.empty(n_tiles, *per_chunk, chunk),
        carried_of=scan.empty(n_tiles, *per_chunk, scan.headdim),
    )
    launch(
        kernels.chunk_gradients,
        (slots * directions, 2 * n_tiles * scan.groups * blocks),
        dict(
            dy=dy, x=scan.x, B=scan.B, C=scan.C, states=states[0], other_states=states[-1], leaving=leaving,
            dB=dB_parts, dC=dC_parts, **decays, **for_steps,
            **scan.sizes(slots), **_x_strides(dy, "dy"), **_x_strides(scan.x, "x"),
            **_B_strides(scan.B, "B"), **_B_strides(scan.C, "C"),
            **scan.options("DIRECTIONS", "FLIP", "ONCE", "SHIFTED", "KIND", *TYPES),
            Q=chunk, HEADS=block_heads, BLOCK_P=tiles.gradient_p, BLOCK_N=tiles.gradient_n,
            STAGES=tiles.gradient_stages,
        ),
        tiles.gradient_warps, tiles.gradient_stages, **ALL_REGISTERS,
    )  # fmt: skip

    # Not before the gradients above: dx may stand where their states did.
    p_tiles, ways = triton.cdiv(scan.headdim, tiles.block_p), 1 if scan.summed else directions
    skipped = None if scan.D is None else scan.empty(p_tiles, ways, heads, slots, chunk)
    _outputs(scan, chunk, min(tiles.rows, chunk), dy, dx, leaving, decays, gradient=True, skipped=skipped)

    per_head = scan.empty(3, *per_chunk)  # A's, dt_bias's, D's
    sizes = scan.sizes(slots)
    for name in ("group_heads", "dstate"):
        del sizes[name]
    heads_at_once = scan.heads_at_once()
    launch(
        kernels.step_gradients,
        (slots * directions, triton.cdiv(heads, heads_at_once)),
        dict(
            dt=scan.dt, A=scan.A, dt_bias=scan.dt_bias, total_of=decays["total_of"], **for_steps, skipped_of=skipped,
            ddt=ddt_parts, per_head=per_head, **sizes, **_dt_strides(scan), TILES=n_tiles, P_TILES=p_tiles, WAYS=ways,
            **scan.options("DIRECTIONS", "FLIP", "SHIFTED", "KIND", "MATH", *STEP_OPTIONS), Q=chunk,
            BLOCK_P=triton.next_power_of_2(scan.headdim), HEADS=heads_at_once,
        ),
        8, 1, **ALL_REGISTERS,
    )  # fmt: skip

    # Where a D of each direction is summed, both gradients are the one there is: x is shared.
    D_ways = 1 if scan.D is None or scan.D.dim() == 1 else ways
    B_size, C_size, dt_size = (
        0 if terms == 1 else whole.numel() for terms, whole in ((B_terms, dB), (C_terms, dC), (dt_terms, ddt))
    )
    block = 512
    programs = sum(triton.cdiv(n, block) for n in (B_size, C_size, dt_size)) + dA.numel() + dbias.numel() + dD.numel()
    launch(
        kernels.sum_parts,
        (programs,),
        dict(
            dB_parts=dB_parts, dC_parts=dC_parts, ddt_parts=ddt_parts, per_head=per_head, dB=dB, dC=dC, ddt=ddt, dA=dA,
            ddt_bias=dbias, dD=dD, B_terms=B_terms, B_size=B_size, C_terms=C_terms, C_size=C_size, dt_terms=dt_terms,
            dt_size=dt_size, A_terms=shared(scan.A, 1), A_size=dA.numel(), bias_terms=shared(scan.dt_bias, 1),
            bias_size=dbias.numel(), D_terms=ways // D_ways, D_size=heads * D_ways, heads=heads, slots=slots,
            directions=directions, BLOCK=block,
        ),
        4, 1,
    )  # fmt: skip
    return dx, ddt, dA, dB, dC, dD, dbias, dfirst if dfirst is not None else scan.empty(0)


def scan_settings() -> tuple:
    """What launches depend on besides the arguments."""
    return torch.get_float32_matmul_precision(), forced_plan()


def _one_direction(
    x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_states, seq_lens, cu_seqlens, reverse
):  # noqa: E501
    return Scan(
        x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_states, seq_lens, cu_seqlens, directions=1,
        flip=reverse,
    )  # fmt: skip


@replayed(scan_settings)
def ssd(*arguments):
    """``linconv::ssd_triton``."""
    return scan_forward(_one_direction(*arguments))


@replayed(scan_settings)
def ssd_backward(dy, dfinal_states, *arguments):
    """``linconv::ssd_backward_triton``."""
    return scan_backward(_one_direction(*arguments), dy, dfinal_states)


@dataclass(frozen=True)
class Form:
    """What the builds of an operator differ by, besides types and sizes.

    Attributes:
        label: tells it from others in tables.
        scan_of: makes a Scan of x, dt, A, B, C, D, dt_bias and seq_lens, whose types alone are looked at.
        per_direction: the names of those arguments that have an axis of directions.
        lengths: whether there is a seq_lens.
    """

    label: str
    scan_of: Callable[..., Scan]
    per_direction: tuple[str, ...] = ()
    lengths: bool = False

    def scan(self, dtype, width, headdim, dstate) -> Scan:
        batch, frames, heads = 8, 4096, width // headdim
        shapes = dict(
            x=(batch, frames, heads, headdim), dt=(batch, frames, heads), A=(heads,), B=(batch, frames, 1, dstate),
            C=(batch, frames, 1, dstate), D=(heads,), dt_bias=(heads,),
        )  # fmt: skip
        tensors = [
            torch.empty(
                *(2,) * (name in self.per_direction), *shape, dtype=dtype if len(shape) > 1 else None, device="meta"
            )
            for name, shape in shapes.items()
        ]
        return self.scan_of(*tensors, torch.empty(batch, dtype=torch.int64, device="meta") if self.lengths else None)


def _run_every_plan(form, dtype, width, headdim, dstate, precision):
    scan = replace(form.scan(dtype, width, headdim, dstate), precision=precision)
    # Float32 as IEEE is swept by force only, and may then spill.
    for plan in PLANS if scan.precision != "ieee" else PLANS[:1]:
        planned = replace(scan, plan=plan)
        scan_forward(planned)
        scan_backward(planned, torch.empty_like(scan.x), scan.last_states())


def builds_of(forms, usual, capability: int):
    """The builds that forward and backward launch on GPUs of a compute capability.

    forms: those that MIXED is shipped in. usual: the one that SHIPPED is.
    """
    for form, (dtype, width, headdim, dstate, precision) in (*product(forms, MIXED), *product((usual,), SHIPPED)):
        products = f" ({precision})" if precision else ""
        sizes = f"{str(dtype)[6:]}{products}, {width // headdim} heads of {headdim}, dstate {dstate}"
        label = f"{sizes}: {form.label}{', seq_lens' if form.lengths else ''}"
        run = functools.partial(_run_every_plan, form, dtype, width, headdim, dstate, precision)
        scan = form.scan(dtype, width, headdim, dstate)
        stack = may_spill(scan.operand, precision or scan.precision, capability)
        yield from (replace(build, stack=stack) for build in launched(run, label, capability))


# dtype, width, headdim, dstate, input_precision of products, or "" for that of the dtype and torch's own default: what
# mixers of base and large models run,
MIXED = tuple(
    (dtype, width, 64, dstate, "")
    for dtype in (torch.bfloat16, torch.float16)
    for width in (1024, 768)
    for dstate in (64, 128)
)
# and what else is usual.
SHIPPED = (
    *(
        (torch.float32, width, 64, dstate, precision)
        for precision in ("", "tf32x3", "tf32")
        for width in (1024, 768)
        for dstate in (64, 128)
    ),
    (torch.bfloat16, 1024, 128, 128, ""),
    (torch.bfloat16, 1024, 64, 256, ""),
    (torch.float32, 1024, 256, 256, ""),
)


def _form(label, started=False, lengths=False):
    def scan_of(x, dt, A, B, C, D, dt_bias, seq_lens):
        shape = (x.shape[0], *x.shape[2:], B.shape[-1])
        states = torch.empty(*shape, dtype=torch.promote_types(x.dtype, torch.float32), device="meta")
        initial_states = states if started else None
        return _one_direction(
            x, dt, A, B, C, D, dt_bias, True, 0.0, float("inf"), initial_states, seq_lens, None, False
        )  # fmt: skip

    return Form(label, scan_of, lengths=lengths)


# As the mixer Mamba2 runs it: a padded batch, one without padding, a state that goes on.
FORMS = (_form("forward", lengths=True), _form("forward"), _form("forward, initial_states", started=True))


def shipped(capability: int = 90):
    """Every build of the committed table for a compute capability."""
    return builds_of(FORMS, _form("forward"), capability)
