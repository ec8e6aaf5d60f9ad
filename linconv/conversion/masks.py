"""Padding masks as (batch, L) all the way to each layer, instead of (batch, 1, L, L).

transformers builds one attention mask per forward pass, in the form of the config's attention implementation; for
"sdpa" and "eager" that form grows with L². A converted model runs on "linconv_sdpa" or "linconv_eager": the same
attention, but with (batch, L) masks. A mixer reads its lengths from them; an attention layer left in place makes a
(batch, 1, 1, L) mask, the same for every query. Causal attention left in place needs its stock mask, so in a decoder
masks stay (batch, L) only if all layers are converted.
"""

import sys

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask, sdpa_mask

PREFIX = "linconv_"
# Stock flash attention already takes (batch, L) masks.
UNCHANGED = ("flash_attention_2", "flash_attention_3")


def _padding_mask(stock_mask):
    def mask(*args, mask_function, attention_mask=None, config, **kwargs):
        decoder = mask_function is not bidirectional_mask_function
        converted = () if decoder and config.is_encoder_decoder else config.linconv["layers"]
        # Tracing builds the mask for packed sequences even if there are none.
        packed = decoder and mask_function is not causal_mask_function and not traced(attention_mask)
        if converted and packed:
            raise ValueError(
                "position_ids restart within a row, wanted one sequence per row: mixers do not take packed rows"
            )
        if attention_mask is not None and (converted or not decoder):
            # The size is that of the queries, as in self-attention: without a cache transformers takes kv_length from
            # the mask itself, and the stock causal mask would accept another length.
            check_size(attention_mask, kwargs["batch_size"], kwargs["q_offset"] + kwargs["q_length"])
        if decoder and len(converted) < config.num_hidden_layers:
            return stock_mask(
                *args, mask_function=mask_function, attention_mask=attention_mask, config=config, **kwargs
            )
        if attention_mask is None or (not traced(attention_mask) and attention_mask.all()):
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
    """Registers the two implementations with transformers."""
    for name, attention, mask, additive in (
        ("sdpa", sdpa_attention_forward, sdpa_mask, False),
        ("eager", _eager_attention, eager_mask, True),
    ):
        AttentionInterface.register(PREFIX + name, _attention(attention, additive))
        AttentionMaskInterface.register(PREFIX + name, _padding_mask(mask))


def traced(attention_mask: Tensor | None) -> bool:
    """Whether the mask's values must not be read: a graph that other masks will use is traced, or it has no values.

    This holds under torch.compile, torch.export or torch.jit.trace, and for fake tensors.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(attention_mask, FakeTensor)


def check_size(attention_mask: Tensor, batch: int, length: int) -> None:
    """Checks that a mask, (batch, L) or (batch, 1, any, L), fits ``batch`` rows of ``length`` frames.

    Raises:
        ValueError: the mask has another form or size.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask is {got}, wanted (batch, L)")
    if (attention_mask.shape[0], attention_mask.shape[-1]) != (batch, length):
        between = "1, L, " if attention_mask.dim() == 4 else ""
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, wanted ({batch}, {between}{length}), one entry "
            "for each token or frame, those in a cache included"
        )


def seq_lens(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """(batch,) valid frames of a mask.

    Args:
        attention_mask: (batch, L), True, or 1, at the valid frames; or (batch, 1, any, L), the same for every query,
            True at the valid frames or, in floating point, 0 there and negative elsewhere. None: all frames are valid.
        batch, length: of the hidden states.

    Raises:
        ValueError: the mask has another form or size, or valid frames after padding. Its values are read only on the
            CPU, since reading them elsewhere would stall the device.
    """
    if attention_mask is None:
        return None
    check_size(attention_mask, batch, length)
    readable = attention_mask.device.type == "cpu" and not traced(attention_mask)
    if attention_mask.dim() == 4:
        if readable and not (attention_mask == attention_mask[:, :1, :1]).all():
            raise ValueError("attention_mask differs from query to query, wanted one that masks padding only")
        attention_mask = attention_mask[:, 0, 0]
        if attention_mask.is_floating_point():
            attention_mask = attention_mask >= 0
    attention_mask = attention_mask.to(torch.bool)
    if readable:
        _check_padding_is_right(attention_mask)
    return attention_mask.sum(dim=-1)


class WaveformMask:
    """Checks the mask of a bare speech model, whose stock forward reads only the sum of each row."""

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None, *args, **kwargs):
        """As the stock model, with attention_mask (batch, samples) over input_values, the padding on the right.

        Raises:
            ValueError: the mask has another size, or padding elsewhere. Its values are read only on the CPU, since
                reading them elsewhere would stall the device.
        """
        if attention_mask is not None:
            if attention_mask.shape != input_values.shape:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, wanted {tuple(input_values.shape)}, one "
                    "entry for each sample of input_values"
                )
            if attention_mask.device.type == "cpu" and not traced(attention_mask):
                _check_padding_is_right(attention_mask.to(torch.bool))
        return super().forward(input_values, attention_mask, *args, **kwargs)


def _check_padding_is_right(attention_mask: Tensor) -> None:
    if (attention_mask[:, 1:] & ~attention_mask[:, :-1]).any():
        raise ValueError("attention_mask has valid frames after padding ones, wanted the padding on the right")


def zero_padding(features: Tensor, mask: Tensor | None) -> Tensor:
    """features (batch, channels, L), zero where mask, (batch, L) bool or None, is False.

    Before a convolution, this is what a clip on its own has beyond its end.
    """
    return features if mask is None else features.masked_fill(~mask[:, None], 0)


class AttentionSlot(nn.Module):
    """A mixer in place of a self-attention module, with that module's signature.

    Args:
        mixer: the `linconv.mixers.Mixer`.
        outputs: what the attention module returned after the hidden state: names of arguments that it passed on, and of
            values that a mixer does not have, which are None.
    """

    def __init__(self, mixer: nn.Module, outputs: tuple[str, ...]):
        super().__init__()
        self.mixer = mixer
        self.outputs = outputs

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **arguments):
        """hidden_states (batch, L, d), attention_mask (batch, L) or None. There are no attention weights."""
        lengths = seq_lens(attention_mask, *hidden_states.shape[:2])
        return self.mixer(hidden_states, lengths), *[arguments.get(name) for name in self.outputs]
