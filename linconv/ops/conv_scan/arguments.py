"""Checks of the arguments of `conv_scan`, made before any kernel runs."""

from linconv.ops import checks
from linconv.ops.bidirectional_ssd import check_diagonal
from linconv.ops.conv_scan.layout import Layout
from linconv.ops.short_conv import check_window
from linconv.ops.ssd.arguments import MAX_SIZE


@checks.remembered
def checked(
    xBC, dt, conv_weight, conv_bias, A, D, dt_bias, dstate, ngroups, diagonal, lookahead
) -> Layout:  # fmt: skip
    """The layout of valid arguments; raises ValueError or TypeError naming an argument that does not fit."""
    named = dict(xBC=xBC, dt=dt, conv_weight=conv_weight, conv_bias=conv_bias, A=A, D=D, dt_bias=dt_bias)
    for name, value in named.items():
        if value is not None or name not in ("conv_bias", "D", "dt_bias"):
            checks.floating_tensor(name, value)
            checks.like(name, value, "xBC", xBC)
    if xBC.dim() not in (3, 4) or xBC.dim() == 4 and xBC.shape[0] != 2:
        raise ValueError(f"xBC has shape {tuple(xBC.shape)}, wanted (batch, L, channels) or (2, batch, L, channels)")
    batch, length, channels = xBC.shape[-3:]
    both = (2,) if xBC.dim() == 4 else ()
    rows = (batch, length) if dt.dim() == 3 else (2, batch, length)
    checks.shape("dt", dt, (*rows, None), "(batch, L, heads) or (2, batch, L, heads)")
    heads = dt.shape[-1]
    meaning = "(2, channels, width)" if both else "(channels, width)"
    checks.shape("conv_weight", conv_weight, (*both, channels, None), meaning)
    if conv_bias is not None:
        checks.shape("conv_bias", conv_bias, (*both, channels), "(2, channels)" if both else "(channels,)")
    directions = 2 if both or dt.dim() == 4 else 1
    for name in ("A", "D", "dt_bias"):
        value = named[name]
        if value is not None:
            apart = directions == 2 and value.dim() == 2
            meaning = "(heads,)" if directions == 1 else "(heads,) or (2, heads)"
            checks.shape(name, value, (2, heads) if apart else (heads,), meaning)
    for name, value in (("dstate", dstate), ("ngroups", ngroups)):
        if not isinstance(value, int):
            raise TypeError(f"{name} is {type(value).__name__}, wanted an int")
    if not 1 <= dstate <= MAX_SIZE:
        raise ValueError(f"dstate is {dstate}, wanted 1 to {MAX_SIZE}")
    if heads < 1 or ngroups < 1 or heads % ngroups:
        raise ValueError(f"ngroups is {ngroups}, wanted a divisor of the {heads} heads of dt")
    BC_channels = Layout.BC_blocks(directions == 2 and not both) * ngroups * dstate
    headdim = (channels - BC_channels) // heads
    if not 1 <= headdim <= MAX_SIZE or heads * headdim + BC_channels != channels:
        raise ValueError(
            f"xBC has {channels} channels, wanted heads * headdim = {heads} * headdim, headdim 1 to {MAX_SIZE}, and "
            f"{BC_channels} for B and C"
        )
    check_diagonal(diagonal)
    check_window("conv_weight", conv_weight.shape[-1], lookahead)
    if both and lookahead:
        raise ValueError(f"lookahead is {lookahead}, wanted 0 where xBC is per direction")
    return Layout.of(xBC, dt, ngroups, dstate)
