"""Tiny models with random weights, of every head class that converts."""

import pytest
import torch
from transformers import (
    HubertForCTC,
    HubertForSequenceClassification,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForAudioFrameClassification,
    Wav2Vec2ConformerForCTC,
    Wav2Vec2ConformerForPreTraining,
    Wav2Vec2ConformerForSequenceClassification,
    Wav2Vec2ConformerForXVector,
    Wav2Vec2ConformerModel,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2ForXVector,
    Wav2Vec2Model,
    WavLMForAudioFrameClassification,
    WavLMForCTC,
    WavLMForSequenceClassification,
    WavLMForXVector,
    WavLMModel,
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperModel,
)

MIXER = dict(d_state=8, headdim=16)
WAV2VEC2 = (
    Wav2Vec2Model,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForXVector,
    Wav2Vec2ForPreTraining,
)
HUBERT = (HubertModel, HubertForCTC, HubertForSequenceClassification)
WAVLM = (
    WavLMModel,
    WavLMForCTC,
    WavLMForSequenceClassification,
    WavLMForAudioFrameClassification,
    WavLMForXVector,
)
CONFORMER = (
    Wav2Vec2ConformerModel,
    Wav2Vec2ConformerForCTC,
    Wav2Vec2ConformerForSequenceClassification,
    Wav2Vec2ConformerForAudioFrameClassification,
    Wav2Vec2ConformerForXVector,
    Wav2Vec2ConformerForPreTraining,
)
WHISPER = (WhisperModel, WhisperForAudioClassification, WhisperForConditionalGeneration)


def speech_config(config_class=Wav2Vec2Config, stable=True, **changes):
    """Layer norm in the feature extractor goes with stable layer norm in the blocks, as in the published models."""
    if config_class is Wav2Vec2ConformerConfig:  # positions that the length of the inputs goes beyond
        changes = dict(conv_depthwise_kernel_size=5, max_source_positions=50) | changes
    return config_class(
        **dict(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=48,
            conv_dim=(16, 16),
            conv_kernel=(10, 3),
            conv_stride=(5, 2),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            do_stable_layer_norm=stable,
            feat_extract_norm="layer" if stable else "group",
            vocab_size=20,
            num_labels=3,
            classifier_proj_size=16,
            mask_time_length=2,
            num_codevectors_per_group=4,
            codevector_dim=8,
            proj_codevector_dim=8,
            tdnn_dim=(16, 16),
            tdnn_kernel=(3, 1),
            tdnn_dilation=(1, 1),
            xvector_output_dim=8,
        )
        | changes
    )


def whisper_config(**changes):
    return WhisperConfig(
        **dict(
            d_model=32,
            encoder_layers=3,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=1500,
            vocab_size=60,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            classifier_proj_size=16,
            num_labels=3,
        )
        | changes
    )


def make(head, attn_implementation="sdpa", **changes):
    """A model in eval mode whose attention and norms are not the trivial ones that they start as."""
    torch.manual_seed(0)
    config = whisper_config(**changes) if head in WHISPER else speech_config(head.config_class, **changes)
    if not head._supports_sdpa:  # WavLM has but one attention, whose masks are (batch, L) as they come
        attn_implementation = "eager"
    model = head._from_config(config, attn_implementation=attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def inputs_for(head, batch=2, length=None, lengths=None):
    """Inputs of a batch, with the padding that ``lengths`` asks for."""
    generator = torch.Generator().manual_seed(1)
    if head in WHISPER:
        length = length or 400
        inputs = {"input_features": torch.randn(batch, 8, length, generator=generator)}
    else:
        length = length or 1000
        inputs = {"input_values": torch.randn(batch, length, generator=generator)}
    if head in (WhisperModel, WhisperForConditionalGeneration):
        inputs["decoder_input_ids"] = torch.randint(3, 50, (batch, 6), generator=generator)
    if lengths is not None:
        inputs["attention_mask"] = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
        signal = next(iter(inputs))
        padding = inputs["attention_mask"] == 0
        inputs[signal] = inputs[signal].masked_fill(padding[:, None] if head in WHISPER else padding, 0)
    return inputs


def output_of(model, inputs):
    """The main output of any head."""
    with torch.no_grad():
        outputs = model(**inputs)
    for name in ("logits", "projected_states", "last_hidden_state"):
        if getattr(outputs, name, None) is not None:
            return getattr(outputs, name)
    raise AssertionError(f"no output known in {list(outputs)}")


class ByPosition(torch.nn.Module):
    """A model with inputs of these names, which come by position, and its main output alone: what a trace wants."""

    def __init__(self, model, names, **options):
        super().__init__()
        self.model, self.names, self.options = model, names, options

    def forward(self, *tensors):
        return output_of(self.model, dict(zip(self.names, tensors)) | self.options)


@pytest.fixture(params=[*WAV2VEC2, *HUBERT, *WAVLM, *CONFORMER, *WHISPER], ids=lambda head: head.__name__)
def head(request):
    return request.param
