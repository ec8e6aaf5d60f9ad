import copy
import json

import pytest
import torch

from linconv.distillation import DistillationTrainer, TrajectoryGuided, WaypointGuided
from linconv.distillation.learning_rate import teacher_scheduler

from .run import Noise, arguments, collate, models, snapshots


def trained(folder, mode, **changes):
    teacher, student = models()
    start = copy.deepcopy(teacher.state_dict())
    trainer = DistillationTrainer(
        student,
        arguments(folder, **changes),
        teacher=teacher,
        mode=mode,
        train_dataset=Noise(),
        data_collator=collate,
    )
    trainer.train()
    return trainer, start


@pytest.mark.parametrize("decay", [None, 0.1])
def test_the_trajectory_teacher_learns_and_its_schedule_ends_with_the_run(tmp_path, decay):
    options = {"lr_scheduler_type": "linear"} if decay is None else {"exponential_decay_to": decay}
    trainer, start = trained(tmp_path, TrajectoryGuided(3), max_steps=8, warmup_steps=2, **options)
    guide = trainer.guide
    # Updates before steps 3 and 6: two, and no more to come.
    assert guide.scheduler.last_epoch == 2
    assert guide.scheduler.get_last_lr()[0] == pytest.approx((decay or 0.0) * 1e-3)
    moved = [name for name, value in trainer.teacher.state_dict().items() if not torch.equal(value, start[name])]
    assert len(moved) > len(start) / 2 and not trainer.teacher.training
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [i for i, line in enumerate(lines, 1) if '"teacher_loss"' in line] == [4, 7]


@pytest.mark.parametrize("changes", [
    {"lr_scheduler_type": "linear"},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 4}},
    {"exponential_decay_to": 0.1},
])  # fmt: skip
def test_updates_have_the_rates_of_the_steps_they_stand_for(tmp_path, changes):
    args = arguments(tmp_path, warmup_steps=2, **changes)
    found = []
    for updates in (8, 4):  # of eight steps
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = teacher_scheduler(optimizer, args, steps=8, updates=updates)
        found.append(scheduler.get_last_lr())
        for _ in range(updates):
            optimizer.step()
            scheduler.step()
            found[-1] += scheduler.get_last_lr()
    each, second = found
    assert second == pytest.approx(each[::2])
    assert each[2] == 1 and (each[4] == 1) == ("lr_scheduler_kwargs" in changes)


def test_a_schedule_that_goes_by_scores_is_refused(tmp_path):
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    teacher, student = models()
    data = {"train_dataset": Noise(), "eval_dataset": Noise(4), "data_collator": collate}
    run = DistillationTrainer(student, arguments(tmp_path, **plateau), teacher=teacher, mode=TrajectoryGuided(), **data)
    with pytest.raises(ValueError, match="lr_scheduler_type: got reduce_lr_on_plateau, which goes by scores"):
        run.train()


def test_an_optimizer_may_share_out_the_parameters_itself(tmp_path, monkeypatch):
    def projected(args, model):
        return torch.optim.SGD, {"lr": 1e-3, "params": [{"params": list(model.parameters()), "momentum": 0.5}]}

    monkeypatch.setattr(DistillationTrainer, "get_optimizer_cls_and_kwargs", staticmethod(projected))
    trainer, _ = trained(tmp_path, TrajectoryGuided(), max_steps=2)
    (group,) = trainer.guide.optimizer.param_groups
    assert group["momentum"] == 0.5 and [*map(id, group["params"])] == [*map(id, trainer.teacher.parameters())]


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "lomo"])
def test_an_optimizer_that_steps_in_the_backward_pass_is_refused(tmp_path, optim):
    with pytest.raises(ValueError, match=f"optim: got {optim}, which steps during the backward pass"):
        trained(tmp_path, TrajectoryGuided(), optim=optim)


def test_each_student_of_model_init_has_a_teacher_that_starts_again(tmp_path):
    teacher, student = models()
    run = DistillationTrainer(
        args=arguments(tmp_path, max_steps=3),
        teacher=teacher,
        mode=TrajectoryGuided(),
        model_init=lambda: copy.deepcopy(student),
        train_dataset=Noise(),
        data_collator=collate,
    )
    ends = []
    for _ in range(2):
        run.train()
        ends.append(((tmp_path / "metrics.jsonl").read_text(), copy.deepcopy(teacher.state_dict())))
    losses = [[json.loads(line).get("teacher_loss") for line in text.splitlines()] for text, _ in ends]
    assert losses[0] == losses[1] and losses[0].count(None) == 2
    assert all(torch.equal(ends[0][1][name], value) for name, value in ends[1][1].items())


def test_trained_on_the_teacher_has_a_schedule_anew(tmp_path):
    trainer, _ = trained(tmp_path, TrajectoryGuided(), max_steps=3)
    end = copy.deepcopy(trainer.teacher.state_dict())
    trainer.train()
    assert trainer.guide.scheduler.last_epoch == 2
    assert not torch.equal(trainer.teacher.lm_head.weight, end["lm_head.weight"])


def test_an_update_is_a_step_of_plain_training(tmp_path):
    teacher, student = models()
    plain = copy.deepcopy(teacher).train()
    options = {"lr_scheduler_type": "constant", "teacher_learning_rate": 1e-2, "max_grad_norm": 0.0, "max_steps": 2}
    args = arguments(tmp_path, **options)
    trainer = DistillationTrainer(student, args, teacher=teacher, mode=TrajectoryGuided(), data_collator=collate)
    trainer.state.max_steps = 2
    batches = [collate([Noise()[i] for i in (first, first + 1)]) for first in (0, 2)]
    _, counts = trainer.get_batch_samples(iter(batches), 2, torch.device("cpu"))
    assert trainer.guide.advance(0, batches, counts) is None
    got = trainer.guide.advance(1, batches, counts)

    whole = collate([Noise()[i] for i in range(4)])
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    frame_mask = trainer._frame_mask(whole)
    outputs = plain(**trainer.head.model_inputs(whole))
    loss = trainer.head.task_loss(outputs, whole, frame_mask, plain.config) / frame_mask.sum()
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(got, loss.detach())
    for (name, moved), wanted in zip(teacher.named_parameters(), plain.parameters()):
        # Where a gradient is nothing but rounding, Adam makes a whole step of it.
        near = wanted.grad is not None and wanted.grad.abs() > 1e-5
        torch.testing.assert_close(moved[near], wanted[near], rtol=1e-3, atol=1e-4, msg=name)


def test_the_waypoint_teacher_has_the_weights_of_its_step(tmp_path):
    teacher, _ = models()
    mode = WaypointGuided(snapshots(teacher, tmp_path))
    trainer, start = trained(tmp_path / "run", mode, max_steps=3)
    scaled = {name: value * 1.03 for name, value in start.items()}
    for name, value in trainer.teacher.named_parameters():
        torch.testing.assert_close(value.detach(), scaled[name])
        assert not value.requires_grad
    trainer, _ = trained(tmp_path / "run", mode, max_steps=4)
    name, value = next(iter(trainer.teacher.named_parameters()))
    torch.testing.assert_close(value.detach(), start[name] * 1.07)


def test_a_checkpoint_without_its_teacher_is_refused(tmp_path):
    teacher, student = models()
    trainer = DistillationTrainer(
        student, arguments(tmp_path), teacher=teacher, mode=TrajectoryGuided(), train_dataset=Noise()
    )
    with pytest.raises(ValueError, match=r"holds no teacher_optimizer.pt"):
        trainer.guide.load(str(tmp_path))
