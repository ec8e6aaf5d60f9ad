"""What every mixer is: a module that takes the place of self-attention, at a cost linear in the number of frames."""

import abc
import inspect

import torch
from torch import nn

from linconv.ops import checks
from linconv.ops.linear import linear


class Mixer(nn.Module, abc.ABC):
    """Mixes a sequence of hidden states along time, like self-attention with its projections.

    A subclass takes ``d_model`` first and everything else as keywords with defaults: those keywords are its options.
    It sets ``causal`` and implements `forward`, `flops` and `reset_parameters`; a causal one also has
    ``new_state(batch)``, a dataclass of tensors with the batch first, a `forward` that goes on from such a ``state``
    and changes it, and ``step`` for one frame. ``no_weight_decay`` names its own parameters that are not to decay.

    Raises:
        TypeError, ValueError: a d_model that is no integer, or out of range.
    """

    causal = False
    no_weight_decay: tuple[str, ...] = ()

    def __init__(self, d_model: int):
        super().__init__()
        check_integer("d_model", d_model)
        self.d_model = d_model

    def register_parameter(self, name, param):
        """As torch.nn.Module; marks what is not to decay, as mamba_ssm does, for optimizers that look for the mark."""
        super().register_parameter(name, param)
        if name in self.no_weight_decay and param is not None:
            param._no_weight_decay = True

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
            TypeError: an option the mixer does not have, or attention without weights in floating point.
            TypeError, ValueError: options that the constructor does not take.
        """
        known = cls.options()
        for name in options:
            if name not in known:
                raise TypeError(f"{cls.__name__} has no option {name!r}, wanted one of {', '.join(known)}")
        weight = next((p for p in attention.parameters() if p.is_floating_point()), None)
        if weight is None:
            raise TypeError("attention has no weights in floating point, wanted some: quantization is to come after")
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
            TypeError, ValueError: something else than a floating-point tensor (batch, L, d_model), or float64 where the
                weights are not, or the other way round.
        """
        checks.floating_tensor("hidden_states", hidden_states)
        checks.shape("hidden_states", hidden_states, (None, None, self.d_model), "(batch, L, d_model)")
        weight = next(self.parameters(), None)
        if weight is not None and (weight.dtype == torch.float64) != (hidden_states.dtype == torch.float64):
            raise TypeError(
                f"hidden_states has dtype {hidden_states.dtype}, wanted torch.float64 just where the weights have it: "
                f"they have {weight.dtype}"
            )

    @abc.abstractmethod
    def flops(self, length: int) -> int:
        """Floating-point operations of the forward pass over ``length`` frames; a multiply-add counts as two."""

    @abc.abstractmethod
    def reset_parameters(self) -> None:
        """Initialises every parameter afresh."""


MOST = 2**24  # of any size: bytes of a weight with two such axes are still counted in 64 bits


def check_integer(name: str, value, low: int = 1, high: int = MOST) -> None:
    """``value`` of the option ``name`` is an int, ``low`` to ``high``.

    Raises:
        TypeError, ValueError: another type, or out of range.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, wanted an int")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, wanted {low} to {high}")


def check_number(name: str, value) -> None:
    """``value`` of the option ``name`` is an int or a float.

    Raises:
        TypeError: another type.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, wanted a number")


class Weights:
    """A module that gives its weights when it is called without an input, for a mixer that computes with them itself.

    A mixer calls it, where it could read ``weight`` and ``bias``: hooks run before a call only, and those of accelerate
    fetch weights that are offloaded.
    """

    def forward(self):
        return self.weight, self.bias


class Linear(nn.Linear, Weights):
    """torch.nn.Linear whose frames do not depend on how many there are: see `linconv.ops.linear.linear`."""

    def forward(self, input=None):
        return Weights.forward(self) if input is None else linear(input, self.weight, self.bias)
