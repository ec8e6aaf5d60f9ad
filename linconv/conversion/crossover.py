"""The length from which a converted layer is faster, from measured layers: what `linconv inspect` predicts by.

`linconv bench --fits` writes ``layer_fits.json``, beside this file, from committed results.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

__all__ = ["MeasuredCrossover", "measured_crossover"]


@dataclasses.dataclass(frozen=True)
class MeasuredCrossover:
    """frames: the length from which the mixer is faster; None if it never is, by the fits.

    shortest, longest: the sequences that both sides were measured at. extrapolated: whether the width is outside the
    range of measured widths, or frames is beyond the longest. basis: a readable description of the measurements.
    """

    frames: int | None
    shortest: int
    longest: int
    extrapolated: bool
    basis: str


def measured_crossover(mixer: str, width: int, operations: float) -> MeasuredCrossover | None:
    """The crossover of a layer of ``width``, from the measured layers of the width nearest to it.

    The mixer's time is scaled by its operations, attention's projections by the square of the widths, and attention
    between frames by the width.

    Args:
        mixer: its name. width: of the hidden states. operations: of the mixer for one frame.

    Returns:
        None if no layer with this mixer was measured.
    """
    layers = [layer for layer in _layers() if mixer in layer["fits"]]
    if not layers:
        return None
    layer = min(layers, key=lambda layer: (abs(math.log(layer["width"] / width)), layer["dtype"] != "float32"))
    scale = width / layer["width"]
    attention, new = layer["fits"]["attention"], layer["fits"][mixer]
    fixed, per_frame, per_pair = attention["seconds"]
    fixed_new, per_frame_new, per_pair_new = new["seconds"]
    frames = _faster_from(
        fixed_new - fixed,
        per_frame_new * operations / new["operations"] - per_frame * scale**2,
        per_pair_new * operations / new["operations"] - per_pair * scale,
    )
    on = layer["measured_on"]
    device = on["device"] + (f", {on['threads']} threads" if on["threads"] else "")
    what = f"layers of width {layer['width']} in {layer['dtype']}"
    basis = f"{what}, measured on {device}, {on['date']}, torch {on['torch']}"
    if scale != 1:
        basis += f", scaled to width {width}"
    widths = [layer["width"] for layer in layers]
    narrowest, widest = min(widths), max(widths)
    outside = not narrowest <= width <= widest
    if outside:
        basis += f", outside of those measured ({narrowest} to {widest})"
    shortest = max(attention["shortest"], new["shortest"])
    longest = min(attention["longest"], new["longest"])
    extrapolated = outside or (frames is not None and frames > longest)
    return MeasuredCrossover(frames, shortest, longest, extrapolated, basis)


def _faster_from(a: float, b: float, c: float) -> int | None:
    """The least length >= 1 from which a + b·length + c·length² < 0 for all lengths; None if there is none."""
    if c >= 0:  # decided by the sign for long sequences
        if c > 0 or b > 0 or (b == 0 and a >= 0):
            return None
        meet = 0 if b == 0 else -a / b
        return max(1, math.floor(meet) + 1) if meet < math.inf else None
    discriminant = b * b - 4 * a * c
    if discriminant < 0:
        return 1
    return max(1, math.floor((-b - math.sqrt(discriminant)) / (2 * c)) + 1)


@functools.cache
def _layers() -> list[dict]:
    path = Path(__file__).with_name("layer_fits.json")
    return json.loads(path.read_text())["layers"] if path.exists() else []
