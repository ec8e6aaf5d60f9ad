"""Modules that replace attention, by name: ``linconv.mixers.get("bimamba2")``."""

import difflib

from linconv.mixers.bimamba2 import BiMamba2
from linconv.mixers.causal import MambaState
from linconv.mixers.hydra import Hydra
from linconv.mixers.linformer import LinformerAttention
from linconv.mixers.mamba import Mamba
from linconv.mixers.mamba2 import Mamba2
from linconv.mixers.protocol import Mixer

__all__ = [
    "BiMamba2",
    "Hydra",
    "LinformerAttention",
    "Mamba",
    "Mamba2",
    "MambaState",
    "Mixer",
    "get",
    "names",
    "register",
]

_REGISTRY: dict[str, type[Mixer]] = {
    "bimamba2": BiMamba2,
    "hydra": Hydra,
    "linformer": LinformerAttention,
    "mamba": Mamba,
    "mamba2": Mamba2,
}


def get(name: str) -> type[Mixer]:
    """The mixer class with this name.

    Raises:
        ValueError: there is no such mixer; the message suggests the nearest name.
    """
    if not isinstance(name, str) or name not in _REGISTRY:
        near = difflib.get_close_matches(str(name), _REGISTRY, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"mixer is {name!r}, wanted one of {', '.join(names())}{hint}")
    return _REGISTRY[name]


def names() -> list[str]:
    """The names that `get` accepts."""
    return sorted(_REGISTRY)


def register(name: str, mixer: type[Mixer]) -> None:
    """Register ``mixer`` as ``name`` for `linconv.convert` and for checkpoints that name it.

    Raises:
        TypeError: ``name`` is not a str, or ``mixer`` not a subclass of `Mixer`.
        ValueError: another class has the name; a new definition of the same class replaces it.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}, wanted a str")
    if not (isinstance(mixer, type) and issubclass(mixer, Mixer)):
        raise TypeError(f"mixer is {mixer!r}, wanted a subclass of linconv.mixers.Mixer")
    taken = _REGISTRY.get(name, mixer)
    if (taken.__module__, taken.__qualname__) != (mixer.__module__, mixer.__qualname__):
        raise ValueError(f"name is {name!r}, already the mixer {taken.__name__}")
    _REGISTRY[name] = mixer
