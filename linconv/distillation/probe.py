"""Records the hidden states of student and teacher for a few fixed clips during training."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from linconv.conversion import encoder_layers
from linconv.distillation.hooks import LayerStates
from linconv.distillation.learning_rate import set_training

__all__ = ["PROBE_FILE", "Probe"]

PROBE_FILE = "probe.safetensors"


class Probe(TrainerCallback):
    """Writes ``probe.safetensors``: under ``student/STEP`` and ``teacher/STEP`` the mean over frames of each clip's
    hidden states, (clips, layers, d) in bfloat16, before the first step and at ``points`` steps, including the last.

    Models run in evaluation mode and training's random state is kept, so training continues as it would without.

    Args:
        trainer: the DistillationTrainer it belongs to.
        batch: the clips, from the collator.
        points: how many steps to measure at, evenly spaced.
    """

    def __init__(self, trainer, batch: dict, points: int = 20):
        self.trainer, self.batch, self.points = trainer, batch, points
        self.found: dict[str, Tensor] = {}

    @property
    def file(self) -> Path:
        return Path(self.trainer.args.output_dir) / PROBE_FILE

    def on_train_begin(self, args, state, control, **kwargs):
        self.found = {}
        if state.global_step and self.file.is_file():  # a resumed run
            found = load_file(self.file)
            self.found = {k: v for k, v in found.items() if int(k.rpartition("/")[2]) <= state.global_step}
        elif not state.global_step:
            self._measure(0)

    def on_step_end(self, args, state, control, **kwargs):
        step, steps = state.global_step, state.max_steps
        if step * self.points // steps > (step - 1) * self.points // steps:
            self._measure(step)

    def _measure(self, step: int) -> None:
        set_training(self.trainer.optimizer, False)  # in every process, so that their weights agree
        if not self.trainer.is_world_process_zero():
            return
        # Without labels that only the loss needs: the teacher may have other classes.
        inputs = {name: x for name, x in self.batch.items() if name not in self.trainer.head.label_names}
        inputs = self.trainer._prepare_inputs(inputs)
        frames = self.trainer._frame_mask(inputs)  # (batch, L)
        # Some models draw random numbers for LayerDrop in evaluation mode too: training keeps its own state.
        device = self.trainer.args.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            for name, model in (("student", self.trainer.student), ("teacher", self.trainer.teacher)):
                if model is not None:
                    self.found[f"{name}/{step}"] = self._means(model, inputs, frames)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.found, self.file)

    def _means(self, model, inputs: dict, frames: Tensor) -> Tensor:
        training = model.training
        model.eval()
        with torch.no_grad(), LayerStates(encoder_layers(model)) as states, self.trainer.autocast_for(model):
            model(**self.trainer.inputs_for(model, inputs))
            count = frames.sum(-1).clamp(min=1)[:, None]
            means = [x.float().masked_fill(~frames[..., None], 0).sum(1) / count for x in states.after]
        model.train(training)
        return torch.stack(means, 1).bfloat16().cpu()  # (batch, layers, d)
