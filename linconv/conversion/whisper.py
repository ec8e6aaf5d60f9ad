"""Whisper's encoder for clips of any length: what conversion changes in its classes.

The stock encoder takes exactly 30 s and no mask. Here it takes any number of frames up to its number of positions, and
a mask over the input features that keeps padding out of valid frames, the pooled output and cross-attention.
Without a mask, at 30 s, every operation is the stock one.

Stock `generate` pads and cuts the features to 30 s, drops finished rows and repeats others, but does not change the
mask. Here the mask is an extra channel of the features, which the model removes again.
"""

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from linconv.conversion import masks

# Samples per frame in the feature extractor of every published Whisper.
HOP = 160


def _feature_mask(attention_mask: Tensor | None, input_features: Tensor) -> Tensor | None:
    """The (batch, frames) bool mask over input_features (batch, mel bins, frames), from one over frames or samples.

    A WhisperFeatureExtractor whose own ``return_attention_mask`` is true returns a mask over samples,
    (batch, 160 frames), as in a pipeline. It returns one over features only if the call asks for it.

    Raises:
        ValueError: the mask has another shape, or valid frames after padding.
    """
    if attention_mask is None:
        return None
    batch, _, frames = input_features.shape
    if attention_mask.dim() == 2 and attention_mask.shape[1] // HOP == frames:
        attention_mask = attention_mask[:, ::HOP][:, :frames]  # the last samples may be too few for a frame
    if attention_mask.shape != (batch, frames):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, wanted ({batch}, {frames}) as input_features"
        )
    mask = attention_mask.to(torch.bool)
    if not masks.traced(mask) and (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("attention_mask has valid frames after padding ones, wanted the padding on the right")
    return mask


def _encoder_mask(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """The (batch, length) bool mask over the encoder's frames, from one over these or over the features.

    Raises:
        ValueError: the mask has another shape.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2:
        halved = attention_mask[:, ::2]  # the second convolution has stride 2 and keeps frames 0, 2, 4, …
        for mask in (attention_mask, halved):
            if mask.shape == (batch, length):
                return mask.to(torch.bool)
    raise ValueError(
        f"attention_mask has shape {tuple(attention_mask.shape)}, wanted ({batch}, {2 * length}) as input_features "
        f"or ({batch}, {length}) as the frames of the encoder"
    )


def _with_mask(input_features: Tensor, mask: Tensor) -> Tensor:
    """(batch, mel bins + 1, frames): the features and, as last channel, 1 at valid frames and 0 at padding."""
    return torch.cat((input_features, mask[:, None].to(input_features.dtype)), dim=1)


def _without_mask(input_features: Tensor | None, mel_bins: int) -> tuple[Tensor | None, Tensor | None]:
    """Undoes `_with_mask`: the features and the mask (batch, frames), or None if there is no mask."""
    if input_features is None or input_features.shape[1] != mel_bins + 1:
        return input_features, None
    return input_features[:, :mel_bins], input_features[:, mel_bins] > 0


class WhisperEncoder:
    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs) -> BaseModelOutput:
        """input_features (batch, mel bins, frames), attention_mask (batch, frames) with the padding on the right.

        Raises:
            ValueError: there are more frames than the model has positions for, or the mask does not fit.
        """
        frames = input_features.shape[-1]
        length = (frames + 1) // 2
        if length > self.embed_positions.num_embeddings:
            raise ValueError(
                f"input_features has {frames} frames, wanted at most {2 * self.embed_positions.num_embeddings}: "
                f"the model has {self.embed_positions.num_embeddings} positions (max_source_positions)"
            )
        mask = _feature_mask(attention_mask, input_features)
        hidden_states = nn.functional.gelu(self.conv1(masks.zero_padding(input_features, mask)))
        hidden_states = nn.functional.gelu(self.conv2(masks.zero_padding(hidden_states, mask)))
        hidden_states = hidden_states.permute(0, 2, 1)
        positions = torch.arange(length, device=hidden_states.device)
        hidden_states = hidden_states + self.embed_positions(positions)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)

        mask = _encoder_mask(mask, *hidden_states.shape[:2])
        if mask is not None and not masks.traced(mask) and mask.all():
            mask = None
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden_states))


class WhisperModel:
    @can_return_tuple
    def forward(
        self,
        input_features=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        decoder_inputs_embeds=None,
        decoder_position_ids=None,
        use_cache=None,
        **kwargs,
    ):
        """As the stock model, with attention_mask (batch, frames) over input_features.

        With encoder_outputs, attention_mask may be over their frames too.

        Raises:
            ValueError: the mask does not fit, or has padding under flash attention.
        """
        input_features, mask = _without_mask(input_features, self.config.num_mel_bins)
        attention_mask = attention_mask if mask is None else mask
        # The decoder's cache; transformers from 5.24 on calls it `cache`.
        cache = {name: kwargs.pop(name) for name in ("past_key_values", "cache") if name in kwargs}
        if encoder_outputs is None:
            attention_mask = _feature_mask(attention_mask, input_features)
            input_features = self._mask_input_features(input_features, attention_mask=attention_mask)
            encoder_outputs = self.encoder(input_features, attention_mask=attention_mask, **kwargs)
        mask = _encoder_mask(attention_mask, *encoder_outputs[0].shape[:2])
        if mask is not None and (masks.traced(mask) or not mask.all()):
            implementation = self.config._attn_implementation
            if implementation in masks.UNCHANGED:  # it would drop the mask
                raise ValueError(
                    f"attention_mask has padding, of which cross-attention by {implementation} takes no mask; wanted "
                    "attn_implementation 'sdpa' or 'eager', or no padding"
                )
            kwargs["cross_attention_mask"] = mask
        return super().forward(
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_position_ids=decoder_position_ids,
            use_cache=use_cache,
            **cache,
            **kwargs,
        )


class WhisperForConditionalGeneration:
    def generate(self, input_features: Tensor | None = None, *args, attention_mask: Tensor | None = None, **kwargs):
        """As the stock model, with attention_mask (batch, frames) over input_features, the padding on the right.

        With encoder_outputs, attention_mask may be over their frames too.

        Raises:
            ValueError: a mask that does not fit.
        """
        if input_features is not None and attention_mask is not None:
            attention_mask = _feature_mask(attention_mask, input_features)
            input_features = _with_mask(input_features, attention_mask)
        return super().generate(input_features, *args, attention_mask=attention_mask, **kwargs)

    def _retrieve_max_frames_and_seek(self, attention_mask, total_input_frames, is_shortform, **kwargs):
        """Where each clip ends; the stock model reads this from the mask only for batches longer than 30 s."""
        max_frames, seek = super()._retrieve_max_frames_and_seek(
            attention_mask=attention_mask,
            total_input_frames=total_input_frames,
            is_shortform=is_shortform,
            **kwargs,
        )
        if attention_mask is not None and attention_mask.shape[1] == total_input_frames:
            least = 1 if is_shortform else 0  # a single pass has an output for every clip
            max_frames = attention_mask.sum(dim=-1).cpu().long().clamp(min=least)
        return max_frames, seek

    def generate_with_fallback(self, *args, **kwargs):
        if self.config._attn_implementation == "eager":  # set by `generate` for token timestamps
            self.set_attn_implementation(masks.PREFIX + "eager")
        return super().generate_with_fallback(*args, **kwargs)

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        inputs, mask = _without_mask(inputs, self.config.num_mel_bins)
        if mask is not None:
            model_kwargs["attention_mask"] = mask
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)


class WhisperForAudioClassification:
    @can_return_tuple
    def forward(self, input_features=None, attention_mask=None, encoder_outputs=None, labels=None, **kwargs):
        """As the stock model, with attention_mask (batch, frames) over input_features; averages the valid frames.

        With encoder_outputs, attention_mask may be over their frames too.

        Raises:
            ValueError: a mask that does not fit.
        """
        if self.config.use_weighted_layer_sum:
            kwargs["output_hidden_states"] = True
        if encoder_outputs is None:
            attention_mask = _feature_mask(attention_mask, input_features)
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
        mask = _encoder_mask(attention_mask, *hidden_states.shape[:2])
        if mask is None:
            pooled = hidden_states.mean(dim=1)
        else:
            mask = mask[..., None]
            pooled = hidden_states.masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        logits = self.classifier(pooled)

        loss = None
        if labels is not None:
            labels = labels.to(logits.device).view(-1)
            loss = nn.functional.cross_entropy(logits.view(-1, self.config.num_labels), labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoder_outputs.hidden_states, attentions=encoder_outputs.attentions
        )
