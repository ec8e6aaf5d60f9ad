"""The interface of mixers: modules that replace self-attention, at a cost linear in the number of frames."""

import abc
import inspect

import torch
from torch import nn

from linconv.ops import checks
from linconv.ops.linear import linear


class Mixer(nn.Module, abc.ABC):
    """Mixes a sequence of hidden states along time, like self-attention with its projections.

    A subclass takes ``d_model`` first and everything else as keywords with defaults, which are its options.
    It sets ``causal`` and implements `forward`, `flops` and `reset_parameters`; a causal one also has
    ``new_state(batch)``, a dataclass of tensors with the batch first, a `forward` that continues from such a ``state``
    and updates it, and ``step`` for one frame. ``no_weight_decay`` names its own parameters without weight decay.

    Raises:
        TypeError, ValueError: d_model is not an integer, or out of range.
    """

    causal = False
    no_weight_decay: tuple[str, ...] = ()

    def __init__(self, d_model: int):
        super().__init__()
        check_integer("d_model", d_model)
        self.d_model = d_model

    def register_parameter(self, name, param):
        """As torch.nn.Module; marks parameters without weight decay as mamba_ssm does, for optimizers that check it."""
        super().register_parameter(name, param)
        if name in self.no_weight_decay and param is not None:
            param._no_weight_decay = True

    @classmethod
    def from_attention(cls, attention: nn.Module, config, **options) -> "Mixer":
        """A new mixer as wide as ``attention``, on its device and in its dtype.

        It is initialised on the CPU, so that a seed gives the same mixer on every device.

        Args:
            attention: the self-attention to replace, with the modules ``query``, ``key``, ``value`` and ``output``
                if the mixer copies weights; it is not changed.
            config: the model's config; ``hidden_size`` is read.
            options: keyword arguments of the mixer.

        Raises:
            TypeError: the mixer has no such option, or attention has no floating-point weights.
            TypeError, ValueError: the constructor rejects an option.
        """
        known = cls.options()
        for name in options:
            if name not in known:
                raise TypeError(f"{cls.__name__} has no option {name!r}, wanted one of {', '.join(known)}")
        weight = next((p for p in attention.parameters() if p.is_floating_point()), None)
        if weight is None:
            raise TypeError("attention has no floating-point weights, wanted some: convert first, quantize afterwards")
        with torch.device("meta" if weight.is_meta else "cpu"):
            mixer = cls(config.hidden_size, **options)
        return mixer.to(device=weight.device, dtype=weight.dtype)

    @classmethod
    def join(cls, layers: list["Mixer"]) -> None:  # noqa: B027  most mixers share nothing
        """Called once with all new mixers of a model, first to last, to set up sharing between them."""

    @classmethod
    def options(cls) -> dict[str, object]:
        """The keywords of the constructor and their defaults."""
        parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]  # after self and d_model
        return {p.name: p.default for p in parameters}

    @abc.abstractmethod
    def forward(self, hidden_states: torch.Tensor, seq_lens: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, L, d_model) to (batch, L, d_model).

        Args:
            hidden_states: (batch, L, d_model), any L. Values in the padding must be finite; they do not affect
                the result.
            seq_lens: (batch,) integers, the number of valid frames of each row; None if all are valid.

        Returns:
            The mixed frames: each row as it is alone at its own length, exactly zero in the padding.

        Raises:
            TypeError, ValueError: hidden_states or seq_lens has a wrong type or shape.
        """

    def check_hidden_states(self, hidden_states: torch.Tensor) -> None:
        """Check the hidden states, for every `forward`.

        Raises:
            TypeError, ValueError: not a floating-point tensor (batch, L, d_model), or only one of the hidden states and
                the weights is float64.
        """
        checks.floating_tensor("hidden_states", hidden_states)
        checks.shape("hidden_states", hidden_states, (None, None, self.d_model), "(batch, L, d_model)")
        weight = next(self.parameters(), None)
        if weight is not None and (weight.dtype == torch.float64) != (hidden_states.dtype == torch.float64):
            raise TypeError(
                f"hidden_states has dtype {hidden_states.dtype}, the weights have {weight.dtype}, wanted "
                "torch.float64 for both or neither"
            )

    @abc.abstractmethod
    def flops(self, length: int) -> int:
        """Floating-point operations of the forward pass over ``length`` frames; a multiply-add counts as two."""

    @abc.abstractmethod
    def reset_parameters(self) -> None:
        """Initialise every parameter again."""


MAX_WIDTH = 2**24  # for any size: the bytes of a weight with two such axes still fit 64 bits


def check_integer(name: str, value, low: int = 1, high: int = MAX_WIDTH) -> None:
    """Check that ``value`` of the option ``name`` is an int from ``low`` to ``high``.

    Raises:
        TypeError, ValueError: it has another type, or is out of range.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, wanted an int")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, wanted {low} to {high}")


def check_number(name: str, value) -> None:
    """Check that ``value`` of the option ``name`` is an int or a float.

    Raises:
        TypeError: it has another type.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, wanted a number")


class Weights:
    """A module that returns its weights when called without an input, for a mixer that computes with them itself.

    Mixers call it instead of reading ``weight`` and ``bias``, because hooks run only before a call, and accelerate's
    hooks fetch offloaded weights.
    """

    def forward(self):
        return self.weight, self.bias


class Linear(nn.Linear, Weights):
    """torch.nn.Linear whose bits per frame do not depend on the number of frames: see `linconv.ops.linear.linear`."""

    def forward(self, input=None):
        return Weights.forward(self) if input is None else linear(input, self.weight, self.bias)
