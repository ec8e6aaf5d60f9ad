"""Whisper's encoder for clips of any length: what conversion changes in the forward passes of its classes.

The stock encoder takes exactly 30 s and no mask. Here it takes any number of frames for which it has positions, and a
mask over the input features that keeps padding out of valid frames, of the pooled output and of cross-attention.
Without a mask, at 30 s, every operation is the stock one.
"""

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


def _feature_mask(attention_mask: Tensor | None, frames: int) -> Tensor | None:
    """The mask over the input features, (batch, frames) bool.

    Raises:
        ValueError: another shape, or valid frames after padding ones.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != frames:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, wanted (batch, {frames}) as input_features"
        )
    mask = attention_mask.to(torch.bool)
    if not torch.compiler.is_compiling() and (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("attention_mask has valid frames after padding ones, wanted the padding on the right")
    return mask


def _halved(feature_mask: Tensor | None) -> Tensor | None:
    """The mask over the encoder's frames: its second convolution has stride 2 and keeps frames 0, 2, 4, …"""
    return None if feature_mask is None else feature_mask[:, ::2]


class WhisperEncoder:
    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs) -> BaseModelOutput:
        """input_features (batch, mel bins, frames), attention_mask (batch, frames) with the padding on the right.

        Raises:
            ValueError: more frames than the model has positions for, or a mask that does not fit.
        """
        frames = input_features.shape[-1]
        length = (frames + 1) // 2
        if length > self.embed_positions.num_embeddings:
            raise ValueError(
                f"input_features has {frames} frames, wanted at most {2 * self.embed_positions.num_embeddings}: "
                f"the model has {self.embed_positions.num_embeddings} positions (max_source_positions)"
            )
        mask = _feature_mask(attention_mask, frames)
        # Zeros in the padding, before each convolution, are what a clip alone has beyond its end.
        hidden_states = nn.functional.gelu(self.conv1(_zero_padding(input_features, mask)))
        hidden_states = nn.functional.gelu(self.conv2(_zero_padding(hidden_states, mask)))
        hidden_states = hidden_states.permute(0, 2, 1)
        positions = torch.arange(length, device=hidden_states.device)
        hidden_states = hidden_states + self.embed_positions(positions)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)

        mask = _halved(mask)
        if mask is not None and not torch.compiler.is_compiling() and mask.all():
            mask = None
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden_states))


def _zero_padding(features: Tensor, mask: Tensor | None) -> Tensor:
    """features (batch, channels, frames)."""
    return features if mask is None else features.masked_fill(~mask[:, None], 0)


class WhisperModel:
    @can_return_tuple
    def forward(
        self,
        input_features=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        decoder_inputs_embeds=None,
        decoder_position_ids=None,
        use_cache=None,
        **kwargs,
    ):
        """As the stock model, with attention_mask (batch, frames) over input_features."""
        if encoder_outputs is None:
            input_features = self._mask_input_features(input_features, attention_mask=attention_mask)
            encoder_outputs = self.encoder(input_features, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None:
            mask = _halved(attention_mask.to(torch.bool))
            if mask.shape[1] == encoder_outputs[0].shape[1] and not mask.all():
                kwargs["cross_attention_mask"] = mask
        return super().forward(
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_position_ids=decoder_position_ids,
            use_cache=use_cache,
            **kwargs,
        )


class WhisperForAudioClassification:
    @can_return_tuple
    def forward(self, input_features=None, attention_mask=None, encoder_outputs=None, labels=None, **kwargs):
        """As the stock model, with attention_mask (batch, frames) over input_features: the mean is of valid frames."""
        if self.config.use_weighted_layer_sum:
            kwargs["output_hidden_states"] = True
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_features, attention_mask=attention_mask, **kwargs)
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)

        if self.config.use_weighted_layer_sum:
            hidden_states = torch.stack(encoder_outputs.hidden_states, dim=1)
            weights = nn.functional.softmax(self.layer_weights, dim=-1)
            hidden_states = (hidden_states * weights.view(-1, 1, 1)).sum(dim=1)
        else:
            hidden_states = encoder_outputs.last_hidden_state

        hidden_states = self.projector(hidden_states)
        if attention_mask is None:
            pooled = hidden_states.mean(dim=1)
        else:
            mask = _halved(attention_mask.to(torch.bool))[..., None]
            pooled = hidden_states.masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        logits = self.classifier(pooled)

        loss = None
        if labels is not None:
            labels = labels.to(logits.device).view(-1)
            loss = nn.functional.cross_entropy(logits.view(-1, self.config.num_labels), labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoder_outputs.hidden_states, attentions=encoder_outputs.attentions
        )
