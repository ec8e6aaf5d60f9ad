"""The commands as functions: fine-tune a teacher, distil a student, score a checkpoint."""

from linconv.pipeline.checkpoints import empty_model, load_config, load_model, positions, save_preprocessing
from linconv.pipeline.commands import WAYPOINTS_FOLDER, distill, evaluate, finetune
from linconv.pipeline.models import make_student
from linconv.pipeline.run import RESULTS_FILE, Run, last_checkpoint

__all__ = [
    "RESULTS_FILE",
    "WAYPOINTS_FOLDER",
    "Run",
    "distill",
    "empty_model",
    "evaluate",
    "finetune",
    "last_checkpoint",
    "load_config",
    "load_model",
    "make_student",
    "positions",
    "save_preprocessing",
]
