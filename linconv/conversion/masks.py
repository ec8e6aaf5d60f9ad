"""Padding masks as (batch, L) all the way to each layer, instead of (batch, 1, L, L).

transformers builds an attention mask once a forward pass, of the form that the config's attention implementation
wants; for "sdpa" and "eager" that form grows with L². A converted model runs on "linconv_sdpa" or "linconv_eager": the
same attention, but its masks stay (batch, L), from which a mixer reads its lengths and an attention layer that was
left in place makes a (batch, 1, 1, L) mask, the same for every query.
"""

import sys

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, eager_mask, sdpa_mask

PREFIX = "linconv_"
# Flash attention takes (batch, L) masks as it is.
UNCHANGED = ("flash_attention_2", "flash_attention_3")


def _padding_mask(stock_mask):
    def mask(*args, mask_function, attention_mask=None, **kwargs):
        if mask_function is not bidirectional_mask_function:  # a decoder's
            return stock_mask(*args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)
        if attention_mask is None or (not torch.compiler.is_compiling() and attention_mask.all()):
            return None
        return attention_mask

    return mask


def _attention(stock_attention, additive):
    def attention(module, query, key, value, attention_mask, *, cross_attention_mask=None, **kwargs):
        if cross_attention_mask is not None and module.is_decoder and not module.is_causal:
            attention_mask = cross_attention_mask
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None, :].to(torch.bool)  # (batch, 1, 1, L)
            if additive:
                padded = ~attention_mask
                attention_mask = torch.zeros_like(padded, dtype=query.dtype)
                attention_mask.masked_fill_(padded, torch.finfo(query.dtype).min)
        return stock_attention(module, query, key, value, attention_mask, **kwargs)

    return attention


def _eager_attention(module, *args, **kwargs):
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def register() -> None:
    """Makes the two implementations known to transformers."""
    for name, attention, mask, additive in (
        ("sdpa", sdpa_attention_forward, sdpa_mask, False),
        ("eager", _eager_attention, eager_mask, True),
    ):
        AttentionInterface.register(PREFIX + name, _attention(attention, additive))
        AttentionMaskInterface.register(PREFIX + name, _padding_mask(mask))


def seq_lens(attention_mask: Tensor | None) -> Tensor | None:
    """(batch,) valid frames of a (batch, L) mask that is True, or 1, at the valid frames.

    Raises:
        ValueError: a mask of another form.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask is {got}, wanted (batch, L)")
    return attention_mask.sum(dim=-1)


class AttentionSlot(nn.Module):
    """A mixer in the place of a self-attention module, with that module's signature.

    Args:
        mixer: the `linconv.mixers.Mixer`.
        outputs: how many values the attention module returned.
    """

    def __init__(self, mixer: nn.Module, outputs: int):
        super().__init__()
        self.mixer = mixer
        self.outputs = outputs

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_):
        """hidden_states (batch, L, d), attention_mask (batch, L) or None. Attention weights there are none."""
        return self.mixer(hidden_states, seq_lens(attention_mask)), *[None] * (self.outputs - 1)
