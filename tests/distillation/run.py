"""A small distillation to be started as a process of its own: run.py FOLDER [--steps N] [--batch N] [--accumulate N]
[--kill-at STEP] [--resume] [--augment] [--layer-drop P] [--mode NAME] [--cache FOLDER] [--by-length]
[--labels-of RANK] [--streamed] [--evaluate]. Also in several processes, with what torchrun tells them."""

import argparse
import copy
import os
import signal

import torch
from transformers import TrainerCallback, Wav2Vec2Config, Wav2Vec2ConformerConfig, Wav2Vec2ForCTC, set_seed

import linconv
from linconv.distillation import (
    DistillationArguments,
    DistillationTrainer,
    Hybrid,
    TargetGuided,
    TrajectoryGuided,
    Unguided,
    WaypointGuided,
)
from linconv.pipeline import last_checkpoint

VOCABULARY = 8


def config(augment: bool = False, kind: type = Wav2Vec2Config, **changes):
    """Two layers of width 16 and a frame every 20 samples; without ``augment`` nothing in training is random."""
    entries = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conv_dim": (8, 8),
        "conv_stride": (5, 4),
        "conv_kernel": (10, 8),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "num_labels": 3,
        "ctc_zero_infinity": True,
        "mask_time_length": 4,
        "mask_feature_length": 2,
        "mask_time_prob": 0.2,
        "mask_feature_prob": 0.1,
        "apply_spec_augment": augment,
    }
    if not augment:
        names = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
        entries.update(dict.fromkeys((*names, "layerdrop"), 0.0))
    if kind is Wav2Vec2ConformerConfig:
        entries.update(conv_depthwise_kernel_size=5, **({} if augment else {"conformer_conv_dropout": 0.0}))
    return kind(**{**entries, **changes})


class Noise(torch.utils.data.Dataset):
    """Clips of noise of different lengths, each with a transcript."""

    def __init__(self, count: int = 24):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        draw = torch.Generator().manual_seed(i)
        length = int(torch.randint(300, 900, (), generator=draw))
        return {
            "input_values": torch.randn(length, generator=draw),
            "labels": torch.randint(1, VOCABULARY, (int(torch.randint(1, 6, (), generator=draw)),), generator=draw),
        }


class Stream(torch.utils.data.IterableDataset):
    """The same clips, one after the other."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self):
        return map(Noise().__getitem__, range(self.count))


def collate(clips: list[dict]) -> dict[str, torch.Tensor]:
    def pad(name, value):
        return torch.nn.utils.rnn.pad_sequence([clip[name] for clip in clips], batch_first=True, padding_value=value)

    mask = [torch.ones_like(clip["input_values"], dtype=torch.long) for clip in clips]
    return {
        "input_values": pad("input_values", 0.0),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(mask, batch_first=True),
        "labels": pad("labels", -100),
    }


def models(augment: bool = False, **changes):
    set_seed(0)
    teacher = Wav2Vec2ForCTC(config(augment, **changes))
    return teacher, linconv.convert(teacher, mixer="bimamba2", d_state=8, headdim=8)


def arguments(folder, **changes) -> DistillationArguments:
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    return DistillationArguments(**{**options, **changes})


class KillAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def snapshots(teacher, folder) -> str:
    """Two snapshots of a fine-tuning, after steps 3 and 7, unless they are there."""
    for step in (3, 7):
        if os.path.isdir(os.path.join(folder, "snapshots", f"checkpoint-{step}")):
            continue
        model = copy.deepcopy(teacher)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + step / 100)
        model.save_pretrained(os.path.join(folder, "snapshots", f"checkpoint-{step}"))
    return os.path.join(folder, "snapshots")


def make_mode(name: str, teacher, folder):
    return {
        "unguided": Unguided,
        "target": TargetGuided,
        "trajectory": lambda: TrajectoryGuided(update_every=2),
        "waypoint": lambda: WaypointGuided(snapshots(teacher, folder)),
        "hybrid": lambda: Hybrid(drop_layer_loss_at=5),
        "hybrid-trajectory": lambda: Hybrid(TrajectoryGuided(), drop_layer_loss_at=5),
    }[name]()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--augment", action="store_true")
    parser.add_argument("--layer-drop", type=float)
    parser.add_argument("--mode", default="hybrid")
    parser.add_argument("--cache")
    parser.add_argument("--by-length", action="store_true")
    parser.add_argument("--labels-of", type=int, help="the one process that has labels")
    parser.add_argument("--streamed", action="store_true", help="from the second process on, fewer clips")
    parser.add_argument("--evaluate", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    changes = {} if given.layer_drop is None else {"layerdrop": given.layer_drop}
    teacher, student = models(given.augment, **changes)
    data = Noise()

    def collator(clips):
        batch = collate(clips)
        if given.labels_of not in (None, args.process_index):
            del batch["labels"]
        return batch

    args = arguments(
        given.folder,
        max_steps=given.steps,
        per_device_train_batch_size=given.batch,
        gradient_accumulation_steps=given.accumulate,
        save_strategy="steps",
        save_steps=3,
        warmup_steps=2,
        exponential_decay_to=0.1,
        teacher_cache=given.cache,
        train_sampling_strategy="group_by_length" if given.by_length else "random",
    )
    trainer = DistillationTrainer(
        student,
        args,
        teacher=teacher,
        mode=make_mode(given.mode, teacher, given.folder),
        train_dataset=Stream(24 - 6 * args.process_index) if given.streamed else data,
        lengths=[len(data[i]["input_values"]) for i in range(len(data))] if given.by_length else None,
        data_collator=collator,
        callbacks=[KillAt(given.kill_at)] if given.kill_at else None,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir) if given.resume else None)
    if given.streamed:
        torch.save(trainer.predict(Stream(5)).predictions, os.path.join(given.folder, f"{args.process_index}.pt"))
    if given.evaluate:
        trainer.evaluate(data)
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), os.path.join(given.folder, "student.pt"))
    trainer.leave_process_group()


if __name__ == "__main__":
    main()
