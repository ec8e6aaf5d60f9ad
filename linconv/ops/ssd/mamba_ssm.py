"""The scan by the Triton kernels of the mamba-ssm package: a check of parity, never a default.

Both directions are two passes, the second over flipped inputs, as `reference` has them, which hands over float32.
"""

import torch

from linconv.ops.packages import import_singly

CHUNK = 256  # mamba_ssm's own default


def scan(x, dt, A, B, C, *, strict=False, initial_states=None):
    """`reference.recurrence` with its arguments and results, differentiable.

    Raises:
        ImportError: mamba_ssm is not installed.
    """
    combined = import_singly("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    if x.shape[1] == 0:  # its kernels have no empty grid
        states = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]) if initial_states is None else initial_states
        return torch.zeros_like(x), states
    y, states = combined(
        x, dt, A, B, C, chunk_size=CHUNK, initial_states=initial_states, return_final_states=True
    )  # fmt: skip
    if strict:
        own = torch.einsum("blgn,blgn->blg", C, B).repeat_interleave(x.shape[2] // B.shape[2], dim=2)
        y = y - (own * dt)[..., None] * x
    return y, states
