"""What every mixer is: a module that takes the place of self-attention, at a cost linear in the number of frames."""

import abc
import inspect
import math

import torch
from torch import nn

from linconv.ops import checks
from linconv.ops.linear import linear
from linconv.ops.short_conv import WIDTHS
from linconv.ops.ssd.arguments import MAX_SIZE


class Mixer(nn.Module, abc.ABC):
    """Mixes a sequence of hidden states along time, like self-attention with its projections.

    A subclass takes ``d_model`` first and everything else as keywords with defaults: those keywords are its options.
    It sets ``causal`` and implements `forward`, `flops` and `reset_parameters`; a causal one also has
    ``new_state(batch)``, a dataclass of tensors with the batch first, a `forward` that goes on from such a ``state``
    and changes it, and ``step`` for one frame.

    Raises:
        TypeError, ValueError: a d_model that is no integer from 1 up.
    """

    causal = False

    def __init__(self, d_model: int):
        super().__init__()
        check_integer("d_model", d_model)
        self.d_model = d_model

    @classmethod
    def from_attention(cls, attention: nn.Module, config, **options) -> "Mixer":
        """A new mixer as wide as ``attention``, on its device and in its dtype.

        It is drawn on the CPU, so that a seed gives the same mixer on every device.

        Args:
            attention: the self-attention whose place it takes, with the modules ``query``, ``key``, ``value`` and
                ``output`` where the mixer takes over weights; it is not changed.
            config: the model's config, of which ``hidden_size`` is read.
            options: the mixer's own keywords.

        Raises:
            TypeError: an option the mixer does not have.
            TypeError, ValueError: options that the constructor does not take.
        """
        known = cls.options()
        for name in options:
            if name not in known:
                raise TypeError(f"{cls.__name__} has no option {name!r}, wanted one of {', '.join(known)}")
        weight = next(attention.parameters())
        with torch.device("meta" if weight.is_meta else "cpu"):
            mixer = cls(config.hidden_size, **options)
        return mixer.to(device=weight.device, dtype=weight.dtype)

    @classmethod
    def join(cls, layers: list["Mixer"]) -> None:  # noqa: B027  most mixers share nothing
        """Called once with all new mixers of a model, first to last, for what they are to share."""

    @classmethod
    def options(cls) -> dict[str, object]:
        """The keywords of the constructor and their defaults."""
        parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]  # after self and d_model
        return {p.name: p.default for p in parameters}

    @abc.abstractmethod
    def forward(self, hidden_states: torch.Tensor, seq_lens: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, L, d_model) to (batch, L, d_model).

        Args:
            hidden_states: (batch, L, d_model), any L. What stands in the padding must be finite; it is not read
                otherwise.
            seq_lens: (batch,) integers, the valid frames of each row; None where all are.

        Returns:
            The mixed frames: each row as it would be alone at its own length, exactly zero in the padding.

        Raises:
            TypeError, ValueError: hidden_states or seq_lens of another type or shape.
        """

    def check_hidden_states(self, hidden_states: torch.Tensor) -> None:
        """What every `forward` asks of its hidden states.

        Raises:
            TypeError, ValueError: something else than a floating-point tensor (batch, L, d_model).
        """
        checks.floating_tensor("hidden_states", hidden_states)
        checks.shape("hidden_states", hidden_states, (None, None, self.d_model), "(batch, L, d_model)")

    @abc.abstractmethod
    def flops(self, length: int) -> int:
        """Floating-point operations of the forward pass over ``length`` frames; a multiply-add counts as two."""

    @abc.abstractmethod
    def reset_parameters(self) -> None:
        """Initialises every parameter afresh."""


def check_integer(name: str, value, low: int = 1, high: float = math.inf) -> None:
    """``value`` of the option ``name`` is an int, ``low`` to ``high``.

    Raises:
        TypeError, ValueError: another type, or out of range.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, wanted an int")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, wanted " + (f"{low} to {high}" if high < math.inf else f"at least {low}"))


def check_number(name: str, value) -> None:
    """``value`` of the option ``name`` is an int or a float.

    Raises:
        TypeError: another type.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, wanted a number")


class Linear(nn.Linear):
    """torch.nn.Linear whose frames do not depend on how many there are: see `linconv.ops.linear.linear`."""

    def forward(self, input):
        return linear(input, self.weight, self.bias)


class DepthwiseConv(nn.Module):
    """Holds the weights of a short convolution; the mixer computes it through `linconv.ops`.

    weight (*shape, width), bias (*shape), where shape is (channels,), or (2, channels) for both directions.
    """

    def __init__(self, *shape: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, width))
        self.bias = nn.Parameter(torch.empty(*shape))
        self.reset_parameters()

    def reset_parameters(self):
        bound = self.weight.shape[-1] ** -0.5  # as torch.nn.Conv1d with one channel a group
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)


class GatedRMSNorm(nn.Module):
    """Holds the weight (*shape) of a gated RMS norm; the mixer computes it through `linconv.ops`."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape))

    def reset_parameters(self):
        nn.init.ones_(self.weight)


class StateSpaceMixer(Mixer):
    """What the Mamba-2 type mixers share: sizes, the parameters A_log, D and dt_bias, and how they start.

    Args:
        directions: 2 where the parameters of the scan are stacked (forward, backward), else 1.

    Raises:
        TypeError, ValueError: options of another type, out of range or that do not fit; the message names the option.
    """

    def __init__(self, d_model, d_state, d_conv, expand, headdim, ngroups, *, directions):
        super().__init__(d_model)
        check_integer("d_state", d_state, high=MAX_SIZE)
        check_integer("d_conv", d_conv, WIDTHS.start, WIDTHS.stop - 1)
        check_integer("headdim", headdim, high=MAX_SIZE)
        check_integer("ngroups", ngroups)
        check_number("expand", expand)
        if not 0 < expand < math.inf:
            raise ValueError(f"expand is {expand}, wanted a number above 0")
        self.d_state, self.d_conv, self.headdim, self.ngroups = d_state, d_conv, headdim, ngroups
        self.d_inner = round(expand * d_model)
        if self.d_inner % headdim or not self.d_inner:
            raise ValueError(f"headdim is {headdim}, wanted a divisor of expand * d_model = {self.d_inner}")
        self.nheads = self.d_inner // headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups is {ngroups}, wanted a divisor of the {self.nheads} heads")
        shape = (2, self.nheads) if directions == 2 else (self.nheads,)
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.empty(shape)) for _ in range(3))

    @property
    def A(self) -> torch.Tensor:
        """(heads,) or (2, heads): the rates of the state, in fp32 at least."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    @torch.no_grad()
    def reset_parameters(self):
        """As mamba_ssm's Mamba2: A uniform in 1 to 16, steps log-uniform in 0.001 to 0.1, D one."""
        for child in self.children():
            child.reset_parameters()
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16).log_())
        self.D.fill_(1)
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def extra_repr(self):
        return f"heads={self.nheads}, headdim={self.headdim}, d_state={self.d_state}, ngroups={self.ngroups}"


def scan_flops(length: int, heads: int, headdim: int, d_state: int, groups: int, *, directions: int) -> int:
    """Operations of the chunked scan, chunks of 64 frames, whatever chunk a kernel takes.

    Per frame and direction: the state is updated and read (2 heads * headdim * d_state multiply-adds), and half of
    the products within the chunk count, one triangle of two.
    """
    chunk = 64
    per_direction = 2 * heads * headdim * d_state + (chunk * heads * headdim + chunk * groups * d_state) // 2
    return 2 * length * directions * per_direction
