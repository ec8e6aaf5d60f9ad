"""The output of each transformer block, captured by forward hooks.

``output_hidden_states`` is not suitable: LayerDrop shortens its tuple, its last entry is normalized in some families
and not in others, and head classes differ in what they pass on.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LayerStates:
    """Captures what each of ``layers`` returns within the context: ``with LayerStates(layers) as states``.

    ``states.after`` holds one hidden state (batch, L, d) per layer, part of the autograd graph; ``states.before`` is
    the input of the first layer. A recomputation in the backward pass (gradient checkpointing) is not captured, since
    the context has ended by then.
    """

    def __init__(self, layers: Iterable[nn.Module]):
        self.layers = list(layers)
        self.before: Tensor | None = None
        self._after: list[Tensor | None] = [None] * len(self.layers)
        self._handles: list = []

    def __enter__(self):
        self._handles = [self.layers[0].register_forward_pre_hook(self._catch_before, with_kwargs=True)]
        for i, layer in enumerate(self.layers):
            self._handles.append(layer.register_forward_hook(self._catcher(i)))
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()

    @property
    def after(self) -> list[Tensor]:
        missing = [i for i, state in enumerate(self._after) if state is None]
        if missing:
            raise RuntimeError(f"layers {missing} did not run: is layer drop on, or the forward pass not done?")
        for i, (layer, state) in enumerate(zip(self.layers, self._after)):
            trained = layer.training and torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
            if trained and not state.requires_grad:
                raise RuntimeError(
                    f"the hidden state of layer {i} is cut off from its graph: gradient checkpointing must use "
                    "use_reentrant=False"
                )
        return self._after

    def _catch_before(self, layer, args, kwargs):
        self.before = args[0] if args else kwargs["hidden_states"]

    def _catcher(self, i: int):
        def catch(layer, args, output):
            self._after[i] = output if isinstance(output, Tensor) else output[0]

        return catch
