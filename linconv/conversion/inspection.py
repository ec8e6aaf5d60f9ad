"""What a conversion would change in a model, or has changed in a converted one."""

import bisect
import copy
import dataclasses
from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel

from linconv import mixers
from linconv.conversion import families
from linconv.conversion.convert import check_direction, check_mixer, convertible_family, layer_indices
from linconv.conversion.crossover import MeasuredCrossover, measured_crossover
from linconv.conversion.models import Conversion, ConvertedModel


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The result of `linconv.inspect`; ``print`` it for a table. For a text model, frames are tokens.

    converted: whether the model is already converted. layers: the blocks that are or would be converted.
    parameters, parameters_after: of the original and of the converted model. options: those of the mixer.
    flops: maps a number of frames to the (attention, mixer) floating-point operations of the forward pass through
    these layers, projections included; a multiply-add counts as two. crossover_frames: the shortest sequence for which
    the mixer needs fewer; it predicts the crossover in time if both run at the same rate. measured_crossover: the same
    by time, from measured layers; None if none with this mixer was measured.
    """

    model: str
    family: str
    attention: str
    mixer: str
    options: dict[str, object]
    blocks: int
    layers: tuple[int, ...]
    width: int
    parameters: int
    parameters_after: int
    flops: dict[int, tuple[int, int]]
    crossover_frames: int
    frames_per_second: float | None
    measured_crossover: MeasuredCrossover | None = None
    converted: bool = False

    def __str__(self):
        change, unit = self.parameters_after - self.parameters, self.unit
        seconds = "seconds" if self.frames_per_second else ""
        blocks = f"{len(self.layers)} of {self.blocks} blocks"
        if self.converted:
            which = "" if len(self.layers) == self.blocks else f" ({', '.join(map(str, self.layers))})"
            options = ", ".join(f"{name} {value}" for name, value in self.options.items() if value is not None)
            lines = [
                f"{self.model} ({self.family}): converted already, nothing would be swapped",
                f"  {self.mixer} in {blocks}{which}, width {self.width}, where {self.attention} was",
                *([f"  {options}"] if options else []),
                f"  parameters {self.parameters_after:,}, of the original {self.parameters:,} ({change:+,})",
            ]
        else:
            lines = [
                f"{self.model} ({self.family}): {blocks}, width {self.width}",
                f"  {self.attention} -> {self.mixer}",
                f"  parameters {self.parameters:,} -> {self.parameters_after:,} ({change:+,})",
            ]
        lines += [
            "",
            f"  {unit:>8} {seconds:>8} {self.attention + ' GFLOP':>26} {self.mixer + ' GFLOP':>24} {'ratio':>7}",
        ]
        for length, (before, after) in self.flops.items():
            ratio = f"{before / after:.2f}" if after else "-"  # no layer is converted
            seconds = self._seconds(length)
            lines.append(f"  {length:>8} {seconds:>8} {before / 1e9:>26.3f} {after / 1e9:>24.3f} {ratio:>7}")
        lines += ["", f"  predicted crossover, by operations: {self._duration(self.crossover_frames)}"]
        measured = self.measured_crossover
        if measured is None:
            lines.append(f"  predicted crossover, by time: no layer with {self.mixer} has been measured")
        else:
            if measured.frames is None:
                at = "never, by these fits"
            elif measured.frames < measured.shortest:  # a fit to longer sequences does not tell where
                at = f"below {self._duration(measured.shortest)}, the shortest measured"
            else:
                at = self._duration(measured.frames)
            lines.append(f"  predicted crossover, by time: {at}" + (" (extrapolated)" if measured.extrapolated else ""))
            lines.append(f"    from {measured.basis}, {measured.shortest:,} to {measured.longest:,} {unit}")
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
    mixer: str | None = None,
    layers: str | Sequence[int] | None = None,
    lengths: Sequence[int] = (250, 500, 1500, 3000, 15000, 30000),
    **mixer_kwargs,
) -> Inspection:
    """Shows what `linconv.convert` with the same arguments would swap and save. Nothing is converted.

    For a converted model: what was swapped, compared with the original.

    Args:
        teacher: as for `linconv.convert`, or a result of it.
        mixer, layers, mixer_kwargs: as for `linconv.convert`; None means its default. Not accepted for a converted
            model.
        lengths: numbers of frames, at least 1, to count operations for.

    Raises:
        TypeError, ValueError: as for `linconv.convert`, or mixer, layers or options were given for a converted model.
    """
    if not isinstance(lengths, Iterable):
        raise TypeError(f"lengths is {lengths!r}, wanted whole numbers from 1 up")
    lengths = list(lengths)
    for length in lengths:
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError(f"lengths has {length!r}, wanted whole numbers from 1 up")
    if isinstance(teacher, ConvertedModel) and (conversion := Conversion.from_config(teacher.config)).layers:
        given = [
            name for name, value in {"mixer": mixer, "layers": layers, **mixer_kwargs}.items() if value is not None
        ]
        if given:
            raise TypeError(
                f"teacher is a {type(teacher).__name__}, converted already, of which nothing would be swapped, and got "
                f"{', '.join(given)}; wanted no mixer, layers and options, or a model that is not converted"
            )
        found = _compare(_original(teacher), conversion, lengths)
        parameters = sum(p.numel() for p in teacher.parameters())
        return dataclasses.replace(found, model=type(teacher).__name__, parameters_after=parameters, converted=True)
    family, mixer = convertible_family(teacher), "bimamba2" if mixer is None else mixer
    check_mixer(mixer, family)
    indices = layer_indices(layers, len(family.blocks(teacher)))
    check_direction(teacher, mixer, indices, family)
    return _compare(teacher, Conversion(mixer, indices, mixer_kwargs), lengths)


def _original(converted: PreTrainedModel) -> PreTrainedModel:
    """The stock model that a converted one was made from, on the meta device.

    Raises:
        TypeError: the model is only a part of a model, without its head.
    """
    entries = converted.config.to_dict()
    for name in ("model_type", "linconv", "auto_map"):
        entries.pop(name, None)
    config = families.of(converted).stock_config_class().from_dict(entries)
    classes = (base for base in type(converted).__mro__ if issubclass(base, PreTrainedModel))
    stock = next(base for base in classes if not issubclass(base, ConvertedModel))
    with torch.device("meta"):
        original = stock(config)
    convertible_family(original)
    return original


def _compare(teacher: PreTrainedModel, conversion: Conversion, lengths: Sequence[int]) -> Inspection:
    """Compares a stock model, or one with no layer converted, after the conversion."""
    family, mixer_class, indices = families.of(teacher), mixers.get(conversion.mixer), conversion.layers
    blocks = family.blocks(teacher)
    attentions = [block.get_submodule(family.attention) for block in blocks]
    width = teacher.config.hidden_size
    sizes_only = [copy.deepcopy(family.self_attention(blocks[i])).to("meta") for i in indices or (0,)]
    layers_of_mixer = [mixer_class.from_attention(sizes, teacher.config, **conversion.options) for sizes in sizes_only]
    mixer_class.join(layers_of_mixer)
    new = layers_of_mixer[0]

    projections = sum(m.weight.numel() for m in sizes_only[0].children())

    triangle = 2 if family.cache is None else 1  # causal attention needs half

    def attention_flops(length):
        between_frames = triangle * 2 * length * length * width
        return 2 * length * projections + between_frames + family.position_flops(teacher.config, length)

    # The difference grows with the length, because attention's operations grow faster.
    crossover = bisect.bisect_left(range(1, 1 << 24), True, key=lambda n: new.flops(n) < attention_flops(n)) + 1
    parameters = sum(p.numel() for p in teacher.parameters())
    replaced = {
        p: p.numel() for i in indices for m in (attentions[i], family.self_attention(blocks[i])) for p in m.parameters()
    }
    if len(indices) < len(blocks):  # modules that the first attention holds for all blocks stay
        for name in family.first_attention_only:
            for parameter in attentions[0].get_submodule(name).parameters():
                replaced.pop(parameter, None)
    added = sum(p.numel() for mixer in (layers_of_mixer if indices else ()) for p in mixer.parameters())
    return Inspection(
        model=type(teacher).__name__,
        family=family.model_type,
        attention=type(attentions[0]).__name__,
        mixer=mixer_class.__name__,
        options={  # the mixer replaces None by a value
            name: getattr(new, name, None) if value is None else value
            for name, value in {**mixer_class.options(), **conversion.options}.items()
        },
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
        measured_crossover=measured_crossover(conversion.mixer, width, new.flops(1)),
    )
