"""Progress bars of training and evaluation, with the main figures beside the bar."""

from transformers.trainer_callback import ProgressCallback

__all__ = ["Progress"]

_SHOWN = ("loss", "task_loss", "layer_loss", "kd_loss", "eval_loss", "eval_accuracy", "eval_wer", "eval_cer")


class Progress(ProgressCallback):
    """The Trainer's bars, with logged values beside the bar instead of in lines above it."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.figures = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            self.figures.update({k: f"{v:.4g}" for k, v in logs.items() if k in _SHOWN})
            self.training_bar.set_postfix(self.figures, refresh=False)
