"""Where each model family has its attention. To add a family, add one entry here."""

import dataclasses
import difflib
import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """What conversion needs to know about a family of transformers models.

    model_type: the stock config's ``model_type``.
    modeling: the module its classes are in.
    config: name of the config class.
    heads: stock head class by the Auto class that loads it; the first one is the bare model.
    layers: path from ``model.base_model`` to the list of transformer blocks.
    attention: path from a block to its self-attention module.
    projections: paths from a block to its linear layers by name: query, key, value (or query_key_value for all three)
        and output, which may be outside the attention module. Default: the usual names in the attention module.
    cache: the argument of attention's forward that holds a cache, if attention is causal; such a family needs causal
        mixers. None if it is bidirectional.
    attention_outputs: what attention's forward returns after the hidden state: "weights", which a mixer does not have,
        or the name of an argument that it passes on.
    first_attention_only: modules that only the first block's attention holds, used by all blocks.
    attention_only: paths from ``model.base_model`` to modules that only attention uses.
    position_flops: maps (config, length) to the operations that a layer's attention needs for positions alone.
    input_name: the forward argument that holds the signal or tokens, time last.
    frame_lengths: maps (model, valid input lengths) to the numbers of valid frames that the blocks see.
    mask_sums: whether the bare model reads only the row sums of a mask, and so accepts any mask unless it is checked.
    frames_per_second: of the blocks, at the usual sampling rate; for display. None if frames are tokens.
    layer_drop: config entry of LayerDrop, or None.
    inner: classes inside a head model, other than the bare model, that are converted too: models or their modules.
    overrides: module with a class of the same name for every stock class whose forward conversion changes, or None.
        If there is one, masks keep padding out of places where the stock model lets it in.
    first_token_heads: Auto classes of the heads that read only the first token.
    """

    model_type: str
    modeling: str
    config: str
    heads: dict[str, str]
    layers: str
    attention: str
    input_name: str
    frame_lengths: Callable[[nn.Module, Tensor], Tensor]
    frames_per_second: float | None
    attention_outputs: tuple[str, ...] = ("weights",)
    first_attention_only: tuple[str, ...] = ()
    attention_only: tuple[str, ...] = ()
    position_flops: Callable[[PretrainedConfig, int], int] = lambda config, length: 0
    projections: dict[str, str] | None = None
    cache: str | None = None
    mask_sums: bool = False
    layer_drop: str | None = None
    inner: tuple[str, ...] = ()
    overrides: str | None = None
    first_token_heads: tuple[str, ...] = ()

    def stock_class(self, name: str) -> type:
        return getattr(importlib.import_module(self.modeling), name)

    def stock_config_class(self) -> type:
        return getattr(importlib.import_module(self.modeling.replace("modeling_", "configuration_")), self.config)

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The transformer blocks of a model of this family, stock or converted."""
        return model.base_model.get_submodule(self.layers)

    def self_attention(self, block: nn.Module) -> "SelfAttention":
        """The projections of a stock block's self-attention."""
        usual = dict(query="q_proj", key="k_proj", value="v_proj", output="out_proj")
        paths = self.projections or {name: f"{self.attention}.{own}" for name, own in usual.items()}
        return SelfAttention({name: block.get_submodule(path) for name, path in paths.items()})

    def keep_for_others(self, blocks: nn.ModuleList, converted: tuple[int, ...]) -> None:
        """Moves the modules that the first attention holds for all to the first attention that remains."""
        left = [block for index, block in enumerate(blocks) if index not in converted]
        if left and left[0] is not blocks[0]:
            for name in self.first_attention_only:
                module = blocks[0].get_submodule(self.attention).get_submodule(name)
                setattr(left[0].get_submodule(self.attention), name, module)

    def drop_attention_only(self, model: nn.Module) -> None:
        """Drops the modules that only attention uses, for a model without any attention left."""
        for path in self.attention_only:
            _replace(model.base_model, path, None)

    def replace_attention(self, block: nn.Module, slot: nn.Module) -> None:
        """Replaces a stock block's whole self-attention by ``slot``."""
        _replace(block, self.attention, slot)
        if self.projections and not self.projections["output"].startswith(f"{self.attention}."):
            _replace(block, self.projections["output"], nn.Identity())  # the slot has its own output projection


class SelfAttention(nn.Module):
    """The model's own linear layers of a self-attention, under the same names for every family."""

    def __init__(self, projections: dict[str, nn.Linear]):
        super().__init__()
        for name, projection in projections.items():
            self.add_module(name, projection)


def _replace(root: nn.Module, path: str, module: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _after_feature_encoder(model: nn.Module, lengths: Tensor) -> Tensor:
    for kernel, stride in zip(model.config.conv_kernel, model.config.conv_stride):
        lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
    return lengths.clamp(min=0)


def _relative_position_flops(config: PretrainedConfig, length: int) -> int:
    """For the conformer: the projection of each distance and its product with each query."""
    if config.position_embeddings_type != "relative":
        return 0
    return 2 * (2 * length - 1) * config.hidden_size * (config.hidden_size + length)


def _speech_heads(prefix: str, *heads: str) -> dict[str, str]:
    """Maps Auto class to stock class; Auto classes name the classification of clips and x-vectors differently."""
    own = {"AudioClassification": "SequenceClassification", "AudioXVector": "XVector"}
    return {"AutoModel": f"{prefix}Model", **{f"AutoModelFor{h}": f"{prefix}For{own.get(h, h)}" for h in heads}}


def _text_heads(prefix: str, *heads: str) -> dict[str, str]:
    return {"AutoModel": f"{prefix}Model", **{f"AutoModelFor{head}": f"{prefix}For{head}" for head in heads}}


# Heads of BERT and its derivatives, without the causal ones.
_BERT_HEADS = ("MaskedLM", "SequenceClassification", "MultipleChoice", "TokenClassification", "QuestionAnswering")


_WAV2VEC2_HEADS = ("CTC", "AudioClassification", "AudioFrameClassification", "AudioXVector", "PreTraining")
_WAV2VEC2_ENCODER = dict(
    layers="encoder.layers",
    attention="attention",
    input_name="input_values",
    frame_lengths=_after_feature_encoder,
    mask_sums=True,
    frames_per_second=50,
    layer_drop="layerdrop",
)
_BERT_BLOCK = dict(
    layers="encoder.layer",
    attention="attention.self",
    projections=dict(
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
    ),
)
_TOKENS = dict(input_name="input_ids", frame_lengths=lambda model, lengths: lengths, frames_per_second=None)
_FIRST_TOKEN_HEADS = ("AutoModelForSequenceClassification", "AutoModelForMultipleChoice")

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="wav2vec2",
            modeling="transformers.models.wav2vec2.modeling_wav2vec2",
            config="Wav2Vec2Config",
            heads=_speech_heads("Wav2Vec2", *_WAV2VEC2_HEADS),
            **_WAV2VEC2_ENCODER,
        ),
        Family(
            model_type="hubert",
            modeling="transformers.models.hubert.modeling_hubert",
            config="HubertConfig",
            heads=_speech_heads("Hubert", "CTC", "AudioClassification"),
            **_WAV2VEC2_ENCODER,
        ),
        Family(
            model_type="wavlm",
            modeling="transformers.models.wavlm.modeling_wavlm",
            config="WavLMConfig",
            heads=_speech_heads("WavLM", "CTC", "AudioClassification", "AudioFrameClassification", "AudioXVector"),
            attention_outputs=("weights", "position_bias"),
            first_attention_only=("rel_attn_embed",),
            **_WAV2VEC2_ENCODER,
        ),
        Family(
            model_type="wav2vec2-conformer",
            modeling="transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer",
            config="Wav2Vec2ConformerConfig",
            heads=_speech_heads("Wav2Vec2Conformer", *_WAV2VEC2_HEADS),
            projections=dict(
                query="self_attn.linear_q",
                key="self_attn.linear_k",
                value="self_attn.linear_v",
                output="self_attn.linear_out",
            ),
            attention_only=("encoder.embed_positions",),
            position_flops=_relative_position_flops,
            inner=("Wav2Vec2ConformerEncoderLayer", "Wav2Vec2ConformerConvolutionModule"),
            overrides="linconv.conversion.conformer",
            **{**_WAV2VEC2_ENCODER, "attention": "self_attn"},
        ),
        Family(
            model_type="whisper",
            modeling="transformers.models.whisper.modeling_whisper",
            config="WhisperConfig",
            heads={
                "AutoModel": "WhisperModel",
                "AutoModelForAudioClassification": "WhisperForAudioClassification",
                "AutoModelForSpeechSeq2Seq": "WhisperForConditionalGeneration",
            },
            layers="encoder.layers",
            attention="self_attn",
            input_name="input_features",
            frame_lengths=lambda model, lengths: torch.div(lengths + 1, 2, rounding_mode="floor"),
            frames_per_second=50,
            layer_drop="encoder_layerdrop",
            inner=("WhisperEncoder",),
            overrides="linconv.conversion.whisper",
        ),
        Family(
            model_type="bert",
            modeling="transformers.models.bert.modeling_bert",
            config="BertConfig",
            heads=_text_heads("Bert", *_BERT_HEADS, "PreTraining", "NextSentencePrediction"),
            first_token_heads=(*_FIRST_TOKEN_HEADS, "AutoModelForNextSentencePrediction"),
            **_BERT_BLOCK,
            **_TOKENS,
        ),
        Family(
            model_type="roberta",
            modeling="transformers.models.roberta.modeling_roberta",
            config="RobertaConfig",
            heads=_text_heads("Roberta", *_BERT_HEADS),
            first_token_heads=_FIRST_TOKEN_HEADS,
            **_BERT_BLOCK,
            **_TOKENS,
        ),
        Family(
            model_type="xlm-roberta",
            modeling="transformers.models.xlm_roberta.modeling_xlm_roberta",
            config="XLMRobertaConfig",
            heads=_text_heads("XLMRoberta", *_BERT_HEADS),
            first_token_heads=_FIRST_TOKEN_HEADS,
            **_BERT_BLOCK,
            **_TOKENS,
        ),
        Family(
            model_type="distilbert",
            modeling="transformers.models.distilbert.modeling_distilbert",
            config="DistilBertConfig",
            heads=_text_heads("DistilBert", *_BERT_HEADS),
            first_token_heads=_FIRST_TOKEN_HEADS,
            layers="transformer.layer",
            attention="attention",
            projections=dict(
                query="attention.q_lin", key="attention.k_lin", value="attention.v_lin", output="attention.out_lin"
            ),
            **_TOKENS,
        ),
        Family(
            model_type="gpt_neox",
            modeling="transformers.models.gpt_neox.modeling_gpt_neox",
            config="GPTNeoXConfig",
            heads=_text_heads(
                "GPTNeoX", "CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"
            ),
            layers="layers",
            attention="attention",
            projections=dict(query_key_value="attention.query_key_value", output="attention.dense"),
            cache="layer_past",
            **_TOKENS,
        ),
    )
}


def of(model: nn.Module, name: str = "model") -> Family:
    """The family of a stock or converted model; error messages call the model ``name``.

    Raises:
        TypeError: it is not a transformers model, or its family is unknown; the message has the nearest name.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise TypeError(f"{name} is a {type(model).__name__}, wanted a transformers model")
    stock_type = model_type.removeprefix("linconv-")
    if stock_type not in FAMILIES:
        near = difflib.get_close_matches(stock_type, FAMILIES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise TypeError(f"{name} is of type {model_type!r}, wanted one of {', '.join(FAMILIES)}{hint}")
    return FAMILIES[stock_type]
