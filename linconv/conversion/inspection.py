"""What a conversion would do to a model, before it is done."""

import bisect
import copy
import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedModel

from linconv.conversion.convert import check_direction, check_mixer, convertible_family, layer_indices
from linconv.conversion.crossover import MeasuredCrossover, measured_crossover


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `linconv.inspect` found; ``print`` it for a table. Frames are tokens where the model is one of text.

    flops: by number of frames, (attention, mixer) floating-point operations of the forward pass through all layers
    to be converted, projections included, a multiply-add counting as two. crossover_frames: the shortest sequence for
    which the mixer takes fewer; it predicts where time crosses as far as both run at the same rate. measured_crossover:
    the same by time, from layers that were measured; None where none with this mixer was.
    """

    model: str
    family: str
    attention: str
    mixer: str
    blocks: int
    layers: tuple[int, ...]
    width: int
    parameters: int
    parameters_after: int
    flops: dict[int, tuple[int, int]]
    crossover_frames: int
    frames_per_second: float | None
    measured_crossover: MeasuredCrossover | None = None

    def __str__(self):
        change, unit = self.parameters_after - self.parameters, self.unit
        seconds = "seconds" if self.frames_per_second else ""
        lines = [
            f"{self.model} ({self.family}): {len(self.layers)} of {self.blocks} blocks, width {self.width}",
            f"  {self.attention} -> {self.mixer}",
            f"  parameters {self.parameters:,} -> {self.parameters_after:,} ({change:+,})",
            "",
            f"  {unit:>8} {seconds:>8} {self.attention + ' GFLOP':>26} {self.mixer + ' GFLOP':>24} {'ratio':>7}",
        ]
        for length, (before, after) in self.flops.items():
            ratio = before / after if after else float("nan")
            seconds = self._seconds(length)
            lines.append(f"  {length:>8} {seconds:>8} {before / 1e9:>26.3f} {after / 1e9:>24.3f} {ratio:>7.2f}")
        lines += ["", f"  predicted crossover, by operations: {self._duration(self.crossover_frames)}"]
        measured = self.measured_crossover
        if measured is None:
            lines.append(f"  predicted crossover, by time: no layer with {self.mixer} has been measured")
        else:
            at = "never, by these fits" if measured.frames is None else self._duration(measured.frames)
            beyond = measured.frames is not None and measured.frames > measured.longest
            lines.append(f"  predicted crossover, by time: {at}" + (" (extrapolated)" if beyond else ""))
            lines.append(f"    from {measured.basis}, up to {measured.longest:,} {unit}")
        return "\n".join(lines)

    @property
    def unit(self) -> str:
        return "frames" if self.frames_per_second else "tokens"

    def _seconds(self, frames: int) -> str:
        return f"{frames / self.frames_per_second:.1f}" if self.frames_per_second else ""

    def _duration(self, frames: int) -> str:
        return f"{frames} {self.unit}" + (f" ({self._seconds(frames)} s)" if self.frames_per_second else "")


def inspect(
    teacher: PreTrainedModel,
    mixer: str = "bimamba2",
    layers: str | Sequence[int] | None = None,
    lengths: Sequence[int] = (250, 500, 1500, 3000, 15000, 30000),
    **mixer_kwargs,
) -> Inspection:
    """What `linconv.convert` with the same arguments would swap, and what that would save. Nothing is converted.

    Args:
        teacher, mixer, layers, mixer_kwargs: as for `linconv.convert`.
        lengths: numbers of frames to count operations for.

    Raises:
        TypeError, ValueError: as `linconv.convert`.
    """
    family = convertible_family(teacher)
    mixer_class = check_mixer(mixer, family)
    blocks = family.blocks(teacher)
    indices = layer_indices(layers, len(blocks))
    check_direction(teacher, mixer, indices, family)
    attentions = [block.get_submodule(family.attention) for block in blocks]
    width = teacher.config.hidden_size
    sizes_only = [copy.deepcopy(family.self_attention(blocks[i])).to("meta") for i in indices or (0,)]
    layers_of_mixer = [mixer_class.from_attention(sizes, teacher.config, **mixer_kwargs) for sizes in sizes_only]
    mixer_class.join(layers_of_mixer)
    new = layers_of_mixer[0]

    projections = sum(m.weight.numel() for m in sizes_only[0].children())

    triangle = 2 if family.cache is None else 1  # to the past only is half of it

    def attention_flops(length):
        between_frames = triangle * 2 * length * length * width
        return 2 * length * projections + between_frames + family.position_flops(teacher.config, length)

    # The difference only grows with the length: attention's operations do so faster.
    crossover = bisect.bisect_left(range(1, 1 << 24), True, key=lambda n: new.flops(n) < attention_flops(n)) + 1
    parameters = sum(p.numel() for p in teacher.parameters())
    replaced = {
        p: p.numel() for i in indices for m in (attentions[i], family.self_attention(blocks[i])) for p in m.parameters()
    }
    if len(indices) < len(blocks):  # what the first attention has for all of them stays
        for name in family.first_attention_only:
            for parameter in attentions[0].get_submodule(name).parameters():
                replaced.pop(parameter, None)
    added = sum(p.numel() for mixer in (layers_of_mixer if indices else ()) for p in mixer.parameters())
    return Inspection(
        model=type(teacher).__name__,
        family=family.model_type,
        attention=type(attentions[0]).__name__,
        mixer=mixer_class.__name__,
        blocks=len(blocks),
        layers=indices,
        width=width,
        parameters=parameters,
        parameters_after=parameters - sum(replaced.values()) + added,
        flops={
            length: (len(indices) * attention_flops(length), len(indices) * new.flops(length)) for length in lengths
        },
        crossover_frames=crossover,
        frames_per_second=family.frames_per_second,
        measured_crossover=measured_crossover(mixer, width, new.flops(1)),
    )
