"""How tensors (directions, batch, L, channels) lie in memory, as kernels that walk over their frames are told."""

import torch
import triton
import triton.language as tl

__all__ = ["aligned_to", "frame_of", "length_of", "load_frames", "store_frames", "strides_of"]

VECTOR_BYTES = 16  # that a thread reads at once, at most


def strides_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Its strides; 0 of an axis of one element, which directions may share. Channels keep theirs."""
    lead = (0 if size == 1 else stride for size, stride in zip(tensor.shape[:-1], tensor.stride()))
    return *lead, tensor.stride(-1)


def aligned_to(*tensors: torch.Tensor) -> int:
    """The largest power of two, within a vector, that divides all strides, where the channels lie together; else 1.

    Triton itself asks whether 16 divides a stride. Rows of a projection's slices are often aligned to 8 or 4 elements
    only, which is enough to read them in vectors.
    """
    vector = VECTOR_BYTES // max(t.element_size() for t in tensors)
    for tensor in tensors:
        *strides, together = strides_of(tensor)
        while vector > 1 and (together != 1 or any(stride % vector for stride in strides)):
            vector //= 2
    return vector


@triton.jit
def length_of(row, seq_lens, stride, frames):
    """How many frames of a row are not padding, within the tensor whatever seq_lens says."""
    if seq_lens is None:
        return row * 0 + frames
    else:
        return tl.minimum(tl.maximum(tl.load(seq_lens + row * stride).to(tl.int64), 0), frames)


@triton.jit
def frame_of(pointer, strides, direction, row, frame, channel, VECTOR: tl.constexpr):
    """Pointers to channels of one frame; VECTOR is what :func:`aligned_to` found."""
    lead = direction * strides[0] + row * strides[1] + frame * strides[2]
    return pointer + tl.multiple_of(lead, VECTOR) + channel * strides[3]


@triton.jit
def load_frames(pointers, stride, t, valid, there, MATH: tl.constexpr, VECTOR: tl.constexpr):
    """(frames, channels): the frames t behind the one that pointers are of; zeros where not valid, or not there."""
    at = pointers[None, :] + tl.multiple_of(t.to(tl.int64) * stride, VECTOR)[:, None]
    return tl.load(at, mask=valid[:, None] & there[None, :], other=0).to(MATH)


@triton.jit
def store_frames(pointers, stride, t, wanted, there, values, VECTOR: tl.constexpr):
    at = pointers[None, :] + tl.multiple_of(t.to(tl.int64) * stride, VECTOR)[:, None]
    tl.store(at, values.to(pointers.dtype.element_ty), mask=wanted[:, None] & there[None, :])
