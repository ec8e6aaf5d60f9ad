"""Both directions of the scan: the kernels of linconv/ops/ssd with two directions."""

from linconv.ops.ssd.triton import Form, Scan, builds_of, scan_backward, scan_forward, scan_settings
from linconv.ops.triton_replay import replayed


def _both_directions(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, diagonal, seq_lens, cu_seqlens):
    return Scan(
        x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, None, seq_lens, cu_seqlens, directions=2,
        once=diagonal == "once", shifted=diagonal == "shifted",
    )  # fmt: skip


@replayed(scan_settings)
def bidirectional_ssd(*arguments):
    """``linconv::bidirectional_ssd_triton``."""
    return scan_forward(_both_directions(*arguments))[0]


@replayed(scan_settings)
def bidirectional_ssd_backward(dy, *arguments):
    """``linconv::bidirectional_ssd_backward_triton``."""
    return scan_backward(_both_directions(*arguments), dy)[:-1]


def _form(regime, per_direction, diagonal, lengths=False):
    def scan_of(*arguments):
        *tensors, seq_lens = arguments
        return _both_directions(*tensors, True, 0.0, float("inf"), diagonal, seq_lens, None)

    return Form(f"{regime}, {diagonal}", scan_of, per_direction, lengths)


# As the mixers run it, padded or not: BiMamba2 all per direction, Hydra with x and the parameters of heads shared.
FORMS = tuple(
    _form(*form, lengths)
    for form in (
        ("separate", ("x", "dt", "A", "B", "C", "D", "dt_bias"), "both"),
        ("hydra", ("dt", "B", "C"), "shifted"),
    )
    for lengths in (True, False)
)


def shipped(capability: int = 90):
    """Every build of the committed table for a compute capability."""
    usual = _form("hydra", ("dt", "A", "B", "C", "dt_bias"), "both")
    return builds_of(FORMS, usual, capability)
