"""The convolutions in Wav2Vec2-Conformer's blocks without padding: what conversion changes in its classes.

The stock blocks pass their mask only to attention. The depthwise convolution after it mixes padding into the last
frames of a clip, half a kernel further in with each block, and batch norm counts the padding in training. Here both get
the mask. Without a mask every operation is the stock one.
"""

from torch import Tensor

from linconv.conversion import masks


class Wav2Vec2ConformerEncoderLayer:
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """hidden_states (batch, L, d), attention_mask (batch, L) bool or None; kwargs are those of attention."""
        hidden_states = hidden_states + self.ffn1(self.ffn1_layer_norm(hidden_states)) * 0.5
        normed = self.self_attn_layer_norm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + self.self_attn_dropout(attended)
        hidden_states = hidden_states + self.conv_module(hidden_states, attention_mask)
        hidden_states = hidden_states + self.ffn2(self.ffn2_layer_norm(hidden_states)) * 0.5
        return self.final_layer_norm(hidden_states)


class Wav2Vec2ConformerConvolutionModule:
    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """hidden_states (batch, L, d), mask (batch, L) bool or None."""
        hidden_states = self.layer_norm(hidden_states).transpose(1, 2)  # (batch, d, L)
        hidden_states = self.glu(self.pointwise_conv1(hidden_states))
        hidden_states = self.depthwise_conv(masks.zero_padding(hidden_states, mask))
        hidden_states = self.activation(self._batch_norm(hidden_states, mask))
        return self.dropout(self.pointwise_conv2(hidden_states)).transpose(1, 2)

    def _batch_norm(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        """hidden_states (batch, d, L); in training the statistics are over the valid frames."""
        if mask is None or not self.batch_norm.training:
            return self.batch_norm(hidden_states)
        frames = hidden_states.transpose(1, 2)
        return frames.masked_scatter(mask[..., None], self.batch_norm(frames[mask])).transpose(1, 2)
