import torch
from safetensors.torch import load_file
from transformers import Wav2Vec2ForSequenceClassification

import linconv
from linconv.conversion import encoder_layers
from linconv.distillation import DistillationTrainer, LayerStates, TrajectoryGuided
from linconv.distillation.probe import PROBE_FILE, Probe

from .run import Noise, arguments, collate, config, models


def run(folder, probed: bool, checkpoint=None, **changes):
    teacher, student = models(augment=True)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **changes}
    trainer = DistillationTrainer(
        student,
        arguments(folder, **options),
        teacher=teacher,
        mode=TrajectoryGuided(),
        train_dataset=Noise(),
        data_collator=collate,
    )
    batch = collate([Noise()[i] for i in (20, 21, 22)])
    if probed:
        trainer.add_callback(Probe(trainer, batch, points=2))
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, batch


def test_probe_holds_the_means_over_valid_frames_and_leaves_training_alone(tmp_path):
    trainer, batch = run(tmp_path / "probed", True)
    found = load_file(tmp_path / "probed" / PROBE_FILE)
    assert sorted(found) == [f"{side}/{step}" for side in ("student", "teacher") for step in (0, 2, 4)]
    for name, model in (("student", trainer.model), ("teacher", trainer.teacher)):
        with torch.no_grad(), LayerStates(encoder_layers(model.eval())) as states:
            model(**{k: v for k, v in batch.items() if k != "labels"})
        frames = trainer._frame_mask(batch)
        for clip in range(3):
            for layer in range(2):
                wanted = states.after[layer][clip][frames[clip]].mean(0)
                torch.testing.assert_close(found[f"{name}/4"][clip, layer], wanted.bfloat16(), rtol=0.02, atol=1e-3)
    assert not torch.equal(found["teacher/0"], found["teacher/4"])

    plain, _ = run(tmp_path / "plain", False)
    for (name, a), b in zip(trainer.model.state_dict().items(), plain.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_a_resumed_run_keeps_what_it_had_measured(tmp_path):
    run(tmp_path / "whole", True)
    run(tmp_path / "halves", True, max_steps=4)
    run(tmp_path / "halves", True, checkpoint=str(tmp_path / "halves" / "checkpoint-2"))
    whole, halves = (load_file(tmp_path / name / PROBE_FILE) for name in ("whole", "halves"))
    assert whole.keys() == halves.keys() and all(torch.equal(whole[k], halves[k]) for k in whole)


def test_the_teacher_may_have_another_dtype_and_other_classes(tmp_path):
    teachers = [Wav2Vec2ForSequenceClassification(config(num_labels=n)) for n in (2, 5)]
    student = linconv.convert(teachers[1], mixer="bimamba2", d_state=8, headdim=8)
    args = arguments(tmp_path, alpha_kd=0.0)
    trainer = DistillationTrainer(student, args, teacher=teachers[0].to(torch.bfloat16))
    batch = {**collate([Noise()[i] for i in range(3)]), "labels": torch.tensor([4, 3, 0])}
    Probe(trainer, batch)._measure(0)
    assert load_file(tmp_path / PROBE_FILE)["teacher/0"].isfinite().all()
