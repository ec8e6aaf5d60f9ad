"""Distillation of a transformer into its converted student (CALD, arXiv 2410.06846)."""

from linconv.distillation.arguments import DistillationArguments
from linconv.distillation.hooks import LayerStates
from linconv.distillation.schedules import (
    Hybrid,
    Mode,
    TargetGuided,
    TrajectoryGuided,
    Unguided,
    WaypointGuided,
    make_mode,
)
from linconv.distillation.trainer import DistillationTrainer
from linconv.ops.distillation_loss import distillation_loss, kd_loss, layerwise_mse

__all__ = [
    "DistillationArguments",
    "DistillationTrainer",
    "Hybrid",
    "LayerStates",
    "Mode",
    "TargetGuided",
    "TrajectoryGuided",
    "Unguided",
    "WaypointGuided",
    "distillation_loss",
    "kd_loss",
    "layerwise_mse",
    "make_mode",
]
