"""Mixers in decoders: padding on either side, and states in place of past keys and values."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from linconv.conversion.masks import AttentionSlot, check_size, traced


class StateLayer(CacheLayerMixin):
    """The state of one layer's mixer as a layer of a `transformers.DynamicCache`.

    It counts tokens as a layer of keys and values does, because positions and masks depend on that number. Its size
    does not grow with it. It cannot be cropped: earlier states are not kept.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self):
        super().__init__()
        self.state = None  # of the mixer: a dataclass of tensors whose first axis is the batch
        self.tokens = 0

    @classmethod
    def of(cls, cache: Cache, index: int) -> "StateLayer":
        """The layer of that index; it replaces an unused layer of keys and values.

        Raises:
            TypeError: the cache is of another kind.
            ValueError: the layer already holds keys and values.
        """
        layers = getattr(cache, "layers", None)
        if layers is None:
            raise TypeError(f"the cache is a {type(cache).__name__}, wanted a transformers.DynamicCache")
        while len(layers) <= index:  # the cache was made without a config
            layers.append(DynamicLayer())
        if not isinstance(layers[index], cls):
            if type(layers[index]) is not DynamicLayer:
                raise TypeError(
                    f"the cache is a {type(cache).__name__} of {type(layers[index]).__name__}, wanted a "
                    "transformers.DynamicCache: a mixer's state cannot be static or quantized"
                )
            if layers[index].get_seq_length():
                raise ValueError(
                    f"the cache holds keys and values in layer {index}, which is converted; wanted a cache of this "
                    "model or a new one"
                )
            layers[index] = cls()
        return layers[index]

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            tensors = {field.name: change(getattr(self.state, field.name)) for field in dataclasses.fields(self.state)}
            self.state = dataclasses.replace(self.state, **tensors)

    def lazy_initialization(self, *args, **kwargs) -> None:
        raise RuntimeError("this layer is converted: it has no keys and values")

    update = lazy_initialization

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.tokens = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a converted layer's state cannot be cropped, as assisted decoding would do")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        self._change(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Does nothing: the slot moves the state to its mixer's device."""

    def state_on(self, mixer: nn.Module, batch: int, device: torch.device):
        """The state for ``batch`` rows, on ``device``."""
        if self.state is None:
            self.state = mixer.new_state(batch)
        self._change(lambda tensor: tensor.to(device))
        return self.state


class CausalSlot(AttentionSlot):
    """A causal mixer in place of causal attention, which may use a cache.

    Args:
        mixer, outputs: as for `AttentionSlot`.
        cache: the argument of the attention module that holds the cache.
        index: index of the layer in the cache.
    """

    def __init__(self, mixer: nn.Module, outputs: tuple[str, ...], cache: str, index: int):
        super().__init__(mixer, outputs)
        self.cache, self.index = cache, index

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **arguments):
        """hidden_states (batch, L, d), attention_mask as for `valid_tokens`. Padding may be on either side."""
        batch, length, _ = hidden_states.shape
        cache, given = arguments.get(self.cache), {}
        layer = None if cache is None else StateLayer.of(cache, self.index)
        past = 0 if layer is None else layer.tokens
        valid = valid_tokens(attention_mask, batch, length, past)
        if layer is not None:
            given["state"] = layer.state_on(self.mixer, batch, hidden_states.device)
        if valid is None:
            mixed = self.mixer(hidden_states, **given)
        else:
            # Each row is shifted to the start of its tokens and back, so that its result is the one it has alone.
            first = valid.to(torch.uint8).argmax(dim=-1)
            mixed = _moved(self.mixer(_moved(hidden_states, first), valid.sum(dim=-1), **given), -first)
        if layer is not None:  # after everything that may raise: a failed call adds no tokens
            layer.tokens = past + length
        return mixed, *[arguments.get(name) for name in self.outputs]


def valid_tokens(attention_mask: Tensor | None, batch: int, length: int, past: int) -> Tensor | None:
    """(batch, length), True at the tokens that are not padding; None if there is no padding.

    Args:
        attention_mask: (batch, past + length), True, or 1, at the valid tokens; or (batch, 1, length, past + length),
            where every valid query sees the valid tokens up to its own: True at them or, in floating point, 0 there
            and negative elsewhere. None: all tokens are valid.
        batch, length: of the hidden states.
        past: number of earlier tokens, in a cache.

    Raises:
        ValueError: the mask has another form or size, has padding between valid tokens, or differs from a causal one by
            more than padding. Its values are read only on the CPU, since reading them elsewhere would stall the device.
    """
    if attention_mask is None:
        return None
    check_size(attention_mask, batch, past + length)
    readable = attention_mask.device.type == "cpu" and not traced(attention_mask)
    if attention_mask.dim() == 4:
        seen = attention_mask >= 0 if attention_mask.is_floating_point() else attention_mask.to(torch.bool)
        # A query sees its own token unless it is padding; a padding query may see other tokens or none.
        valid = seen[:, 0].diagonal(past, dim1=-2, dim2=-1)  # (batch, length)
        if seen.shape[2] != length or (readable and not _of_whole_sequences(seen, valid, past)):
            raise ValueError(
                "attention_mask differs from a causal one by more than padding, wanted one sequence a row, each token "
                "of which sees itself and all before it"
            )
    else:
        valid = attention_mask[:, -length:].to(torch.bool)
    if readable:
        if valid.all():
            return None
        edges = (valid[:, 1:] & ~valid[:, :-1]).sum(dim=-1) + valid[:, 0]
        if (edges > 1).any():
            raise ValueError("attention_mask has padding between valid tokens, wanted it on one side or both")
    return valid


def _of_whole_sequences(seen: Tensor, valid: Tensor, past: int) -> bool:
    """Whether each valid query sees as many tokens as there are valid ones up to its own.

    Args:
        seen: (batch, any, length, past + length), True where a query sees a token.
        valid: (batch, length), True at the valid queries.
        past: tokens before the first query.
    """
    before = seen.sum(dim=-1, dtype=torch.int32) - valid.cumsum(dim=-1)[:, None]  # (batch, any, length)
    # All queries of a row see the same tokens in the cache.
    most = before.masked_fill(~valid[:, None], 0).amax(dim=(1, 2))
    least = before.masked_fill(~valid[:, None], past).amin(dim=(1, 2))
    return not ((most > past) | (most > least)).any()


def _moved(rows: Tensor, by: Tensor) -> Tensor:
    """rows (batch, L, d), each rotated towards its start by that many frames."""
    index = (torch.arange(rows.shape[1], device=rows.device) + by[:, None]) % rows.shape[1]  # (batch, L)
    return rows.gather(1, index[..., None].expand_as(rows))
