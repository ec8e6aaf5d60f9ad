"""Linformer: attention to r learned projections of the frames (Wang et al., arXiv 2006.04768)."""

import torch
from torch import nn

from linconv import ops
from linconv.mixers.protocol import Linear, Mixer, check_integer, check_number
from linconv.ops.linformer import MAX_HEADDIM, MAX_RANK, rewrite_pays
from linconv.ops.masks import frame_mask

INITS = ("frames", "normal")
SHARING = ("none", "headwise", "key_value", "layerwise")


class LinformerAttention(Mixer):
    """Multi-head attention whose keys and values are projected along time onto ``r`` rows; not causal.

    Parameters: q_proj, k_proj, v_proj, out_proj, torch.nn.Linear (d_model, d_model) each, which `from_attention` copies
    from the attention that it replaces; proj_k and proj_v (max_length, r), or (num_heads, max_length, r). The cost
    is linear in L, with fewer operations than exact attention from L = 1.1 r to 1.5 r on, depending on the width. At
    most max_length frames.

    Args:
        d_model: width of the hidden states.
        r: number of rows that keys and values are projected onto, 1 to 512.
        sharing: what uses the same projection, as in section 4 of the paper. "none": each head has its own for keys and
            for values; "headwise": all heads of a layer; "key_value": keys and values too; "layerwise": all converted
            layers of a model too, of which the first one holds the only ``proj_k``.
        max_length: most frames per sequence; None for 512, in conversion the number of the model's positions.
        num_heads: None for heads of 64, in conversion the model's number; heads have at most 256.
        dropout: share of the attention weights dropped in training; None for 0, in conversion the model's value.
        init: initial projections. "frames": frame t is the only part of row t mod r, times the root of r, so that a
            sequence of r frames starts with exact attention; "normal": drawn from N(0, 1), so that a row is a random
            mixture of all frames.
        normalize: whether to divide projected keys and values by the root of the number of valid frames.

    Raises:
        TypeError, ValueError: an option has a wrong type or value, or does not fit the others; the message names it.
    """

    def __init__(
        self,
        d_model,
        r=256,
        sharing="headwise",
        max_length=None,
        num_heads=None,
        dropout=None,
        normalize=True,
        init="frames",
    ):
        super().__init__(d_model)
        self.max_length = 512 if max_length is None else max_length
        self.num_heads = max(d_model // 64, 1) if num_heads is None else num_heads
        self.dropout = 0.0 if dropout is None else dropout
        self.r, self.sharing, self.normalize, self.init = r, sharing, normalize, init
        check_integer("r", r, high=MAX_RANK)
        check_integer("max_length", self.max_length)
        check_integer("num_heads", self.num_heads)
        check_number("dropout", self.dropout)
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize is {normalize!r}, wanted a bool")
        if sharing not in SHARING:
            raise ValueError(f"sharing is {sharing!r}, wanted one of {', '.join(SHARING)}")
        if init not in INITS:
            raise ValueError(f"init is {init!r}, wanted one of {', '.join(INITS)}")
        if d_model % self.num_heads or d_model // self.num_heads > MAX_HEADDIM:
            came = f"{self.num_heads}, for heads of 64" if num_heads is None else num_heads
            raise ValueError(
                f"num_heads is {came}, wanted a divisor of d_model = {d_model} for heads of at most {MAX_HEADDIM}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {dropout}, wanted 0 <= dropout < 1")
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(d_model, d_model) for _ in range(4))
        heads = (self.num_heads,) if sharing == "none" else ()
        self.proj_k = nn.Parameter(torch.empty(*heads, self.max_length, r))
        self.proj_v = None if sharing in ("key_value", "layerwise") else nn.Parameter(torch.empty_like(self.proj_k))
        self._holder = []  # the layer whose proj_k this one shares; in a list, so that it does not become a submodule
        self._draw_projections()

    @classmethod
    def from_attention(cls, attention, config, **options):
        """As `Mixer.from_attention`, with the weights of ``attention``.

        Args:
            attention: has ``query``, ``key``, ``value`` and ``output``, torch.nn.Linear.
            config: the model's config; supplies sizes that ``options`` omits.
            options: keyword arguments of the mixer.

        Raises:
            TypeError: the mixer has no such option, or a projection is not a torch.nn.Linear.
            TypeError, ValueError: the constructor rejects an option.
            ValueError: no max_length is given for a model without a limit to its positions.
        """
        own = {
            "num_heads": getattr(config, "num_attention_heads", None),
            "max_length": getattr(config, "max_position_embeddings", getattr(config, "max_source_positions", None)),
            "dropout": getattr(config, "attention_probs_dropout_prob", getattr(config, "attention_dropout", None)),
        }
        options = {**own, **options}
        if options["max_length"] is None:
            raise ValueError(
                "max_length is None for a model without a limit to its positions, wanted a number of frames"
            )
        for name, source in attention.named_children():
            if not isinstance(source, nn.Linear):
                raise TypeError(
                    f"{name} is a {type(source).__name__}, wanted a torch.nn.Linear, whose weights are taken over: "
                    "merge adapters before converting, quantize afterwards"
                )
        mixer = super().from_attention(attention, config, **options)
        for to, source in zip(mixer._projections(), attention.children()):
            if source.bias is None:
                to.register_parameter("bias", None)
            for name, parameter in to.named_parameters():
                taken = getattr(source, name)  # a parametrization, such as weight norm, computes it
                parameter.requires_grad_(taken.requires_grad)
                if not taken.is_meta:
                    parameter.data.copy_(taken.detach())
        return mixer

    @classmethod
    def join(cls, layers):
        """Set up the sharing between the layers of one model."""
        for layer in layers[1:]:
            if layer.sharing == "layerwise":
                layer.proj_k = None
                layer._holder = [layers[0]]

    def _projections(self):
        return self.q_proj, self.k_proj, self.v_proj, self.out_proj

    def forward(self, hidden_states, seq_lens=None):
        """As `Mixer.forward`.

        Raises:
            TypeError, ValueError: as `Mixer.forward`, or more than max_length frames.
        """
        self.check_hidden_states(hidden_states)
        length = hidden_states.shape[1]
        if length > self.max_length:
            raise ValueError(f"hidden_states has {length} frames, wanted at most max_length = {self.max_length}")
        proj_k = self._holder[0].proj_k if self._holder else self.proj_k
        if proj_k.is_meta and not hidden_states.is_meta:
            raise ValueError(
                'sharing is "layerwise", and proj_k of the layer that holds it is offloaded when another one wants it; '
                "wanted that layer in memory, by a device_map, or another sharing"
            )
        if self._holder and (proj_k.dim() != 2 or hasattr(proj_k, "full_tensor")):  # flat in FSDP, a DTensor in FSDP2
            raise ValueError(
                'sharing is "layerwise", and proj_k of the layer that holds it is sharded when another one wants it; '
                "wanted all these layers in one unit of FSDP, or another sharing"
            )
        options = dict(seq_lens=seq_lens, normalize=self.normalize, dropout_p=self.dropout if self.training else 0.0)
        projections = self._projections()[:3]
        if all(type(projection) is Linear for projection in projections):
            q, k, v = (projection() for projection in projections)
            y = ops.linformer_self_attention(
                hidden_states, *q, *k, *v, proj_k, self.proj_v, num_heads=self.num_heads, **options
            )
        else:  # an adapter is more than its weights, and FSDP2 frees weights after a call
            q, k, v = (
                torch.unflatten(projection(hidden_states), -1, (self.num_heads, -1)).transpose(1, 2)
                for projection in projections
            )
            y = ops.linformer_attention(q, k, v, proj_k, self.proj_v, **options).transpose(1, 2).flatten(-2)
        y = self.out_proj(y)
        if seq_lens is None:
            return y
        return y.masked_fill(~frame_mask(seq_lens, length)[..., None], 0)

    def flops(self, length):
        d, r, shared = self.d_model, self.r, self.proj_v is None
        sum_first = self.sharing != "none" and rewrite_pays(length, r, d, d, shared=shared)
        if sum_first:
            keys_and_values = 2 * (1 if shared else 2) * length * r * d + 4 * r * d * d
        else:
            keys_and_values = 4 * length * d * d + 4 * length * r * d
        return 4 * length * d * d + keys_and_values + 4 * length * r * d

    def reset_parameters(self):
        for projection in self._projections():
            projection.reset_parameters()
        self._draw_projections()

    @torch.no_grad()
    def _draw_projections(self):
        # Either way a row of K' is about as large as one of K, due to the division by the root of the length.
        for proj in (self.proj_k, self.proj_v):
            if proj is None:
                continue
            if self.init == "normal":
                nn.init.normal_(proj)
            else:
                frames = torch.arange(self.max_length, device=proj.device) % self.r
                proj.copy_(self.r**0.5 * nn.functional.one_hot(frames, self.r))

    def extra_repr(self):
        return f"heads={self.num_heads}, r={self.r}, max_length={self.max_length}, sharing={self.sharing}"
