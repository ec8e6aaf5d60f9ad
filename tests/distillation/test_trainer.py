import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    TrainingArguments,
    Wav2Vec2ConformerForAudioFrameClassification,
    Wav2Vec2ConformerForSequenceClassification,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMForCTC,
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    default_data_collator,
)

import linconv
from linconv.conversion import encoder_layers, frame_lengths
from linconv.distillation import (
    DistillationArguments,
    DistillationTrainer,
    Hybrid,
    LayerStates,
    TargetGuided,
    TrajectoryGuided,
    Unguided,
)
from linconv.ops.distillation_loss import kd_loss, layerwise_mse

from .run import VOCABULARY, Noise, arguments, collate, config, models

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def trainer(folder, student, teacher=None, mode=None, data=None, collator=collate, callbacks=None, **changes):
    return DistillationTrainer(
        student,
        arguments(folder, **changes),
        teacher=teacher,
        mode=mode,
        train_dataset=Noise() if data is None else data,
        eval_dataset=Noise(6),
        data_collator=collator,
        callbacks=callbacks,
    )


def records(folder) -> list[dict]:
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in r]


def gradients(trainer, clips, micro_batches=1) -> dict[str, torch.Tensor]:
    """The gradients of one optimizer step over ``clips``, cut into micro-batches."""
    trainer.model.zero_grad()
    size = len(clips) // micro_batches
    batches = iter([collate(clips[i : i + size]) for i in range(0, len(clips), size)])
    batches, counts = trainer.get_batch_samples(batches, micro_batches, torch.device("cpu"))
    for batch in batches:
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same(a: dict, b: dict, **tolerance):
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_the_loss_is_what_the_formula_says(tmp_path):
    teacher, student = models()
    guided = trainer(tmp_path, student, teacher, alpha_ce=0.5, alpha_kd=2.0, alpha_ld=15.0, temperature=3.0)
    guided.state.logging_steps = 1
    clips = [Noise()[i] for i in range(4)]
    batch = collate(clips)
    _, counts = guided.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    student.train()
    loss = guided.compute_loss(student, batch, num_items_in_batch=counts)

    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with LayerStates(encoder_layers(student)) as s, LayerStates(encoder_layers(teacher)) as t:
        logits, teacher_logits = student(**inputs).logits, teacher(**inputs).logits
    lengths = frame_lengths(student, batch["attention_mask"])
    nll = 0
    for i, (n, clip) in enumerate(zip(lengths, clips)):
        said = clip["labels"]
        log_probs = logits[i, :n].log_softmax(-1)[:, None]
        nll += F.ctc_loss(log_probs, said[None], n[None], torch.tensor([len(said)]), reduction="sum")
    ld = layerwise_mse(s.after, t.after, mask=lengths, layer_norm=True)
    kd = kd_loss(logits, teacher_logits, temperature=3.0, mask=lengths)
    torch.testing.assert_close(loss, 0.5 * nll / lengths.sum() + 2.0 * kd + 15.0 * ld)


def test_accumulation_does_not_change_gradients(tmp_path):
    teacher, student = models()
    guided = trainer(tmp_path, student, teacher)
    clips = [Noise()[i] for i in range(8)]
    assert_same(gradients(guided, clips, 1), gradients(guided, clips, 4), rtol=1e-4, atol=1e-6)


def test_accumulated_run_is_the_run_in_one_batch(tmp_path):
    runs = {}
    for size, accumulate in ((8, 1), (2, 4)):
        teacher, student = models()
        folder = tmp_path / str(size)
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
        trainer(folder, student, teacher, **changes).train()
        runs[size] = records(folder), dict(student.named_parameters())
    for a, b in zip(runs[8][0], runs[2][0], strict=True):
        assert a.keys() == b.keys()
        assert {"task_loss", "kd_loss", "layer_loss", "layer_mse", "layer_cosine"} <= a.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), name
    assert_same(runs[8][1], runs[2][1], rtol=1e-3, atol=1e-5)


def test_padding_does_not_change_the_loss(tmp_path):
    teacher, student = models()
    guided = trainer(tmp_path, student, teacher)
    batch = collate([Noise()[i] for i in range(3)])
    padded = {
        "input_values": F.pad(batch["input_values"], (0, 400)),
        "attention_mask": F.pad(batch["attention_mask"], (0, 400)),
        "labels": F.pad(batch["labels"], (0, 3), value=-100),
    }
    losses = []
    for inputs in (batch, padded):
        _, counts = guided.get_batch_samples(iter([inputs]), 1, torch.device("cpu"))
        student.train()
        losses.append(guided.compute_loss(student, inputs, num_items_in_batch=counts))
    torch.testing.assert_close(losses[0], losses[1])


def test_log_records_hold_the_parts_and_the_layers(tmp_path):
    teacher, student = models()
    before = copy.deepcopy(student)
    clips = Noise(4)
    trainer(tmp_path, student, teacher, data=clips, max_steps=1, alpha_ld=3.0).train()
    (record,) = records(tmp_path)
    parts = record["task_loss"] + record["kd_loss"] + 3.0 * record["layer_loss"]
    assert record["loss"] == pytest.approx(parts, rel=1e-5)

    batch = collate([clips[i] for i in range(4)])
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with LayerStates(encoder_layers(before)) as s, LayerStates(encoder_layers(teacher)) as t:
        before(**inputs), teacher(**inputs)
    lengths = frame_lengths(before, batch["attention_mask"])
    mse = layerwise_mse(s.after, t.after, mask=lengths, layer_norm=True, reduction="none")
    valid = torch.arange(s.after[0].shape[1]) < lengths[:, None]
    cosine = [F.cosine_similarity(a[valid], b[valid], dim=-1).mean().item() for a, b in zip(s.after, t.after)]
    assert record["layer_mse"] == pytest.approx(mse.tolist(), rel=1e-4)
    assert record["layer_cosine"] == pytest.approx(cosine, rel=1e-4)


def test_layers_reach_the_log_one_by_one(tmp_path):
    teacher, student = models()
    run = trainer(tmp_path, student, teacher, max_steps=1)
    run.train()
    logged = run.state.log_history[0]
    (record,) = records(tmp_path)
    assert [logged["layer_mse/1"], logged["layer_mse/2"]] == record["layer_mse"]
    assert [logged["layer_cosine/1"], logged["layer_cosine/2"]] == record["layer_cosine"]


def test_layers_are_compared_only_where_a_record_is_written(tmp_path):
    teacher, student = models()
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer(tmp_path, student, teacher, mode=Unguided(), max_steps=4, logging_steps=2).train()
    assert len(calls) == 2
    assert [r["step"] for r in records(tmp_path)] == [2, 4]
    assert all(len(r["layer_mse"]) == 2 and "layer_loss" not in r for r in records(tmp_path))


def test_teacher_is_frozen_and_stays_out_of_optimizer_and_checkpoint(tmp_path):
    teacher, student = models()
    teacher.train()
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    guided = trainer(tmp_path, student, teacher, save_strategy="steps", save_steps=4)
    guided.train()
    assert not any(m.training for m in teacher.modules())
    assert_same(before, dict(teacher.named_parameters()), rtol=0, atol=0)
    optimized = {id(p) for group in guided.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in teacher.parameters()}
    assert optimized == {id(p) for p in student.parameters()}
    from safetensors import safe_open

    with safe_open(tmp_path / "checkpoint-4" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(student.state_dict())


def test_teacher_hears_the_students_augmentation(tmp_path):
    """A student that is its teacher differs from it in nothing, masked and all, unless the masks differ."""
    plain = config(augment=False)
    plain.apply_spec_augment = True
    teacher = Wav2Vec2ForCTC(plain)
    with torch.no_grad():
        teacher.wav2vec2.masked_spec_embed.fill_(3.0)
    student = copy.deepcopy(teacher)
    seen = {}
    for name, model in (("student", student), ("teacher", teacher)):
        model.wav2vec2.encoder.pos_conv_embed.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, args[0].detach().clone())
        )
    trainer(tmp_path, student, teacher, max_steps=1).train()
    (record,) = records(tmp_path)
    assert record["layer_loss"] == 0 and record["kd_loss"] == pytest.approx(0, abs=1e-9)
    assert record["layer_cosine"] == pytest.approx([1, 1])
    assert torch.equal(seen["student"], seen["teacher"])
    masked = (seen["student"] == 3.0).sum(-1) >= plain.hidden_size - plain.mask_feature_length * 4
    assert 0 < masked.sum() < masked.numel()
    dropped = (seen["student"] == 0).all(1)  # features that are zero in every frame of a clip
    assert dropped.any() and not dropped.all()
    assert (student.config.mask_feature_prob, student.config.mask_time_prob) == (0.1, 0.2)


class Wrapped(torch.nn.Module):
    """What PEFT puts around a model."""

    def __init__(self, model):
        super().__init__()
        self.base_model = torch.nn.ModuleDict({"model": model})

    def get_base_model(self):
        return self.base_model["model"]

    def forward(self, **inputs):
        return self.get_base_model()(**inputs)


def test_a_student_within_a_model_of_its_adapters_is_trained_as_alone(tmp_path):
    for folder, wrap in (("alone", lambda model: model), ("within", Wrapped)):
        teacher, student = models(augment=True)
        trainer(tmp_path / folder, wrap(student), teacher).train()
    alone, within = records(tmp_path / "alone"), records(tmp_path / "within")
    assert alone == within and len(alone) == 4


class Averaging(torch.optim.SGD):
    """Trains at other points than it is good for, as schedule-free optimizers do; here at weights larger by one."""

    training = False

    def _shift(self, training):
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.data += int(training) - int(self.training)
        self.training = training

    def train(self):
        self._shift(True)

    def eval(self):
        self._shift(False)

    def step(self, closure=None):
        assert self.training
        return super().step(closure)


def test_weights_of_a_schedule_free_optimizer_are_kept_and_teach_as_they_are_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(DistillationTrainer, "get_optimizer_cls_and_kwargs", lambda *_: (Averaging, {"lr": 0.0}))
    teacher, student = models()
    before = [copy.deepcopy(model.state_dict()) for model in (teacher, student)]
    run = trainer(tmp_path, student, teacher, TrajectoryGuided(), max_steps=2, save_strategy="steps", save_steps=2)
    trained_at = []
    student.register_forward_pre_hook(lambda *_: trained_at.append(student.lm_head.bias - before[1]["lm_head.bias"]))
    run.train()
    assert len(trained_at) == 2
    torch.testing.assert_close(torch.stack(trained_at), torch.ones(2, VOCABULARY))
    run.save_model()
    for got, want in zip((run.teacher, student), before):
        assert_same(got.state_dict(), want)
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert_same(load_file(folder / "model.safetensors"), before[1])


def test_a_signal_is_masked_once_for_both_and_the_batch_is_left_as_it_is(tmp_path):
    """Whisper's own SpecAugment writes into the batch, where a teacher that is trained would leave its mask, too."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    size = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 8}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 24}
    masked = {"apply_spec_augment": True, "mask_time_prob": 0.3, "mask_time_length": 4, "mask_feature_prob": 0.2,
              "mask_feature_length": 2}  # fmt: skip
    whisper = WhisperConfig(**special, **size, **decoder, **masked, max_source_positions=50)
    teacher = linconv.convert(WhisperForConditionalGeneration(whisper), layers=[])
    student = linconv.convert(teacher, mixer="bimamba2", d_state=8, headdim=8)
    heard = {"teacher": [], "student": []}
    for name, model in (("student", student), ("teacher", teacher)):
        model.model.encoder.conv1.register_forward_pre_hook(
            lambda _, args, name=name: heard[name].append(args[0].detach().clone())
        )
    batch = {
        "input_features": torch.randn(3, 8, 60).abs() + 1,
        "attention_mask": (torch.arange(60) < torch.tensor([60, 40, 30])[:, None]).long(),
        "labels": torch.randint(3, 24, (3, 5)),
    }
    clips, whole = [{}] * 6, batch["input_features"].clone()
    trainer(tmp_path, student, teacher, TrajectoryGuided(), clips, lambda _: batch, max_steps=2).train()
    assert torch.equal(batch["input_features"], whole)
    # The teacher teaches at step 0, is trained and teaches at step 1: all it teaches is what the student hears.
    assert len(heard["student"]) == 2 and len(heard["teacher"]) == 3
    assert torch.equal(heard["student"][0], heard["teacher"][0])
    assert torch.equal(heard["student"][1], heard["teacher"][2])
    times, bins = (heard["student"][1] == 0).all(1), (heard["student"][1] == 0).all(2)
    assert 0 < times[0].sum() < 60 and bins.any() and not bins.all()
    assert (student.config.mask_time_prob, teacher.config.mask_feature_prob) == (0.3, 0.2)
    with pytest.raises(ValueError, match="teacher_cache: the teacher gets the student's SpecAugment"):
        trainer(tmp_path, student, teacher, teacher_cache=str(tmp_path / "cache"))


def test_masks_longer_than_a_clip_are_cut(tmp_path):
    long = config(apply_spec_augment=True, mask_time_length=500)
    student = Wav2Vec2ForCTC(long)
    trainer(tmp_path, student, copy.deepcopy(student), max_steps=1).train()
    assert np.isfinite(records(tmp_path)[0]["loss"])


def test_features_of_wavlm_are_masked(tmp_path):
    """Its config says nothing of the least number of masks, and the stock model alone fails for it."""
    augmented = config(augment=True, kind=WavLMConfig)
    assert not hasattr(augmented, "mask_feature_min_masks")
    teacher = WavLMForCTC(augmented)
    student = linconv.convert(teacher, mixer="bimamba2", d_state=8, headdim=8)
    trainer(tmp_path, student, teacher, max_steps=1).train()
    assert np.isfinite(records(tmp_path)[0]["loss"])


def test_layer_drop_is_turned_off(tmp_path, caplog):
    student = Wav2Vec2ForCTC(config(layerdrop=0.9))
    trainer(tmp_path, student, copy.deepcopy(student), max_steps=2).train()
    assert student.config.layerdrop == 0
    assert "layerdrop of the student is set to 0" in caplog.text

    dropping = Wav2Vec2ForCTC(config(layerdrop=1.0)).train()
    with LayerStates(encoder_layers(dropping)) as states:
        dropping(torch.randn(1, 400))
    with pytest.raises(RuntimeError, match=r"layers \[0, 1\] did not run"):
        states.after  # noqa: B018


def test_hybrid_drops_the_layer_loss_at_its_step(tmp_path):
    teacher, student = models()
    trainer(tmp_path, student, teacher, mode=Hybrid(drop_layer_loss_at=1, drop_kd_at=2), max_steps=3).train()
    assert [("layer_loss" in r, "kd_loss" in r) for r in records(tmp_path)] == [
        (True, True), (False, True), (False, False)
    ]  # fmt: skip
    assert all("layer_mse" in r for r in records(tmp_path))


def test_unguided_needs_no_teacher(tmp_path):
    _, student = models()
    trainer(tmp_path, student, max_steps=1).train()
    (record,) = records(tmp_path)
    assert record["loss"] == pytest.approx(record["task_loss"]) and "layer_mse" not in record


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    clips, got = [Noise()[i] for i in range(4)], []
    for checkpointing in (False, True):
        teacher, student = models()
        guided = trainer(tmp_path, student, teacher, gradient_checkpointing=checkpointing)
        if checkpointing:  # as Trainer.train does
            student.gradient_checkpointing_enable(guided.args.gradient_checkpointing_kwargs)
        got.append(gradients(guided, clips))
    assert_same(*got, rtol=1e-5, atol=1e-7)
    teacher, student = models()
    trainer(tmp_path / "run", student, teacher, gradient_checkpointing=True, max_steps=2).train()
    assert len(records(tmp_path / "run")) == 2


def test_hidden_states_cut_off_by_reentrant_checkpointing_are_noticed(tmp_path):
    _, student = models()
    student.train().gradient_checkpointing_enable({"use_reentrant": True})
    layers = encoder_layers(student)
    with LayerStates([layers[0].feed_forward]) as states:
        student(torch.randn(2, 400))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        states.after  # noqa: B018


def test_bf16(tmp_path):
    runs = []
    for bf16 in (False, True):
        teacher, student = models()
        trainer(tmp_path / str(bf16), student, teacher, bf16=bf16, max_steps=2).train()
        runs.append(records(tmp_path / str(bf16)))
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    for name in ("loss", "layer_loss", "task_loss"):
        assert runs[1][0][name] != runs[0][0][name]
        assert runs[1][0][name] == pytest.approx(runs[0][0][name], rel=0.03)


def test_streaming_data(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from (Noise()[i] for i in range(24))

    runs = []
    for folder, changes in (("stream", {"data": Stream()}), ("index", {"train_sampling_strategy": "sequential"})):
        teacher, student = models()
        trainer(tmp_path / folder, student, teacher, max_steps=3, **changes).train()
        runs.append([r["loss"] for r in records(tmp_path / folder)])
    assert runs[0] == runs[1]


class Stream(torch.utils.data.IterableDataset):
    """Ten clips, which are five batches of two."""

    def __iter__(self):
        return iter([Noise()[i] for i in range(10)])


def test_a_stream_is_resumed_in_its_second_pass(tmp_path):
    def run(folder, checkpoint=None):
        teacher, student = models(augment=True)
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
        guided = trainer(folder, student, teacher, TrajectoryGuided(2), Stream(), max_steps=6, save_steps=3, **options)
        guided.train(resume_from_checkpoint=checkpoint)
        return records(folder), student.state_dict()

    whole, weights = run(tmp_path / "whole")
    resumed, again = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed == whole[3:]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("data", [Stream, Noise])
def test_resumed_at_its_last_step_a_run_takes_no_step(tmp_path, data):
    options = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    weights = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        teacher, student = models()
        guided = trainer(tmp_path, student, teacher, TrajectoryGuided(2), data(), **options)
        guided.train(resume_from_checkpoint=checkpoint)
        assert guided.state.global_step == 3
        weights.append(student.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not (tmp_path / "checkpoint-4").exists()


def test_what_a_pass_over_a_stream_leaves_goes_into_no_step(tmp_path):
    """Two steps of two batches and a fifth batch: the third step is the first one again, whatever the fifth was."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 0.0}
    teacher, student = models()
    trainer(tmp_path, student, teacher, data=Stream(), **options).train()
    first, _, third = records(tmp_path)
    assert third["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)
    assert third["loss"] == pytest.approx(first["loss"], rel=1e-5)


def test_embeddings_count_as_one_more_layer(tmp_path):
    teacher, student = models()
    options = {"include_embeddings": True, "layer_weights": [1.0, 2.0, 0.0], "layer_reduction": "sum"}
    trainer(tmp_path, student, teacher, max_steps=1, **options).train()
    (record,) = records(tmp_path)
    # What the first layer is given does not differ yet.
    assert record["layer_mse"][0] == 0 and len(record["layer_mse"]) == 3
    assert record["layer_loss"] == pytest.approx(2 * record["layer_mse"][1], rel=1e-5)


def test_learning_rate_decays_exponentially_after_the_warm_up(tmp_path):
    teacher, student = models()
    trainer(
        tmp_path, student, teacher, max_steps=6, warmup_steps=2, learning_rate=1.0, exponential_decay_to=0.01
    ).train()
    rates = [r["learning_rate"] for r in records(tmp_path)]
    assert rates == pytest.approx([0.0, 0.5, *(0.01 ** (k / 4) for k in range(4))])


def classified(count=4):
    return [{**Noise()[i], "labels": torch.tensor([i % 3])} for i in range(count)]


@pytest.mark.parametrize("head", [Wav2Vec2ForSequenceClassification, Wav2Vec2ConformerForSequenceClassification])
def test_classification_of_clips(tmp_path, head):
    teacher = head(config(kind=head.config_class)).eval()
    student = linconv.convert(teacher, d_state=8, headdim=8)

    def collator(clips):
        return {**collate(clips), "labels": torch.cat([clip["labels"] for clip in clips])}

    clips = classified()
    run = trainer(tmp_path, student, teacher, data=clips, collator=collator, max_steps=1)
    batch = collator(clips)
    want = [student.train()(**batch), teacher(**batch)]
    run.train()
    (record,) = records(tmp_path)
    assert record["task_loss"] == pytest.approx(want[0].loss.item(), rel=1e-4)
    assert record["kd_loss"] == pytest.approx(kd_loss(want[0].logits, want[1].logits).item(), rel=1e-3)


@pytest.mark.parametrize("head", [Wav2Vec2ForAudioFrameClassification, Wav2Vec2ConformerForAudioFrameClassification])
def test_classification_of_frames_leaves_padding_out(tmp_path, head):
    teacher = head(config(kind=head.config_class))
    student = linconv.convert(teacher, d_state=8, headdim=8)
    batch = collate([Noise()[i] for i in range(3)])
    lengths = frame_lengths(student, batch["attention_mask"])
    classes = torch.randint(3, (3, int(lengths.max())))
    batch["labels"] = F.one_hot(classes, 3)
    guided = trainer(tmp_path, student, teacher)
    student.eval()
    loss, outputs = guided.compute_loss(student, batch, return_outputs=True)
    valid = torch.arange(classes.shape[1]) < lengths[:, None]
    torch.testing.assert_close(loss, F.cross_entropy(outputs.logits[valid], classes[valid]))


def test_whisper_encoder_on_clips_of_any_length(tmp_path):
    whisper = WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=60, num_labels=3,
        classifier_proj_size=8, vocab_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    teacher = linconv.convert(WhisperForAudioClassification(whisper), layers=[])
    student = linconv.convert(WhisperForAudioClassification(whisper), d_state=8, headdim=8)

    def collator(clips):
        lengths = torch.tensor([9, 24, 17, 40])
        return {
            "input_features": torch.randn(4, 8, 40),
            "attention_mask": (torch.arange(40) < lengths[:, None]).long(),
            "labels": torch.cat([clip["labels"] for clip in clips]),
        }

    run = trainer(tmp_path, student, teacher, data=classified(), collator=collator, max_steps=2)
    run.train()
    assert [len(r["layer_mse"]) for r in records(tmp_path)] == [2, 2]
    assert all(np.isfinite(r["loss"]) for r in records(tmp_path))
    batch = collator([classified()[0]] * 4)
    batch["attention_mask"] = batch["attention_mask"].repeat_interleave(160, dim=1)  # which the model takes
    with pytest.raises(ValueError, match=r"attention_mask has shape \(4, 6400\), wanted \(4, 40\)"):
        run.compute_loss(student, batch)


@pytest.mark.parametrize("with_states", [False, True])
def test_evaluation_reports_the_task_and_ctc_answers_blank_in_padding(tmp_path, with_states):
    teacher, student = models()
    student.config.output_hidden_states = with_states
    run = trainer(tmp_path, student, teacher, per_device_eval_batch_size=6)
    batch = collate([Noise()[i] for i in range(6)])
    lengths = frame_lengths(student, batch["attention_mask"])
    got = run.predict(Noise(6))
    answers = got.predictions[0] if with_states else got.predictions
    want = run.head.task_loss(
        student(**run.head.model_inputs(batch)), batch,
        torch.arange(answers.shape[1]) < lengths[:, None], student.config,
    ) / lengths.sum()  # fmt: skip
    assert got.metrics["test_loss"] == pytest.approx(want.item(), rel=1e-5)
    answers = answers.argmax(-1)
    padding = np.arange(answers.shape[1]) >= lengths.numpy()[:, None]
    assert (answers[padding] == student.config.pad_token_id).all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_teacher_may_have_another_dtype(tmp_path, dtype, autocast):
    losses = []
    for kind in (torch.float32, dtype):
        teacher, student = models()
        trainer(tmp_path / str(kind), student, teacher.to(kind), max_steps=2, bf16=autocast).train()
        assert teacher.dtype == kind
        losses.append([r["loss"] for r in records(tmp_path / str(kind))])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_student_of_model_init_is_that_student(tmp_path):
    teacher, student = models()
    made = []

    def model_init():
        made.append(copy.deepcopy(student))
        return made[-1]

    trainer(tmp_path / "model", copy.deepcopy(student), teacher, max_steps=2).train()
    args = arguments(tmp_path / "init", max_steps=2)
    run = DistillationTrainer(
        args=args, teacher=teacher, model_init=model_init, train_dataset=Noise(), data_collator=collate
    )
    run.train()
    assert run.model is made[-1] and len(made) == 2
    assert [r["loss"] for r in records(tmp_path / "init")] == [r["loss"] for r in records(tmp_path / "model")]
    with pytest.raises(ValueError, match="`model` or `model_init` argument, but not both"):
        DistillationTrainer(student, args, teacher=teacher, model_init=model_init)
    with pytest.raises(RuntimeError, match="`model` or `model_init`"):
        DistillationTrainer(args=args, teacher=teacher)


def test_rates_skips_and_steps_of_a_state_do_not_decay(tmp_path):
    teacher, student = models()
    student = copy.deepcopy(student)  # whose parameters have lost the mark
    run = trainer(tmp_path, student, teacher, weight_decay=0.1)
    run.create_optimizer()
    names = {id(p): name for name, p in student.named_parameters()}
    spared = {names[id(p)] for g in run.optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    decayed = {names[id(p)] for g in run.optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    mixer = {name for name in names.values() if ".mixer." in name}
    of_state = {name for name in mixer if name.endswith((".A_log", ".D", ".dt_bias"))}
    assert len(of_state) == 6 and of_state <= spared
    assert decayed & mixer == {name for name in mixer if name.endswith(("_proj.weight", "conv1d.weight"))}
    teacher, _ = models()
    teacher.lm_head.weight._no_weight_decay = True
    assert "lm_head.weight" not in run.get_decay_parameter_names(teacher)


def without_labels(clips):
    return {name: x for name, x in collate(clips).items() if name != "labels"}


def test_without_labels_a_teacher_is_wanted(tmp_path):
    teacher, student = models()
    trainer(tmp_path, student, teacher, collator=without_labels, max_steps=1).train()
    assert "task_loss" not in records(tmp_path)[0]
    for options in ({}, {"teacher": teacher, "alpha_kd": 0.0, "alpha_ld": 0.0}):
        with pytest.raises(ValueError, match="labels: got None, and at step 0 nothing is learnt from a teacher; want"):
            trainer(tmp_path, student, collator=without_labels, **options).train()


def test_a_task_that_is_left_out_may_be_without_an_alignment(tmp_path):
    teacher, student = models()
    student.config.ctc_zero_infinity = False
    start = copy.deepcopy(student.state_dict())

    def too_long(clips):
        return {**collate(clips), "labels": torch.ones(len(clips), 200, dtype=torch.long)}

    with pytest.warns(UserWarning, match="task_loss is inf.*; the weights are finite"):
        trainer(tmp_path, student, teacher, collator=too_long, alpha_ce=0.0, max_steps=2).train()
    assert all(value.isfinite().all() for value in student.state_dict().values())
    assert not torch.equal(student.lm_head.weight, start["lm_head.weight"])
    assert np.isfinite(records(tmp_path)[-1]["loss"])


def test_the_head_has_a_gradient_where_only_hidden_states_are_compared(tmp_path):
    """Of zeros: DistributedDataParallel waits for it."""
    teacher, student = models()
    guided = trainer(tmp_path, student, teacher, alpha_kd=0.0)
    batches, counts = guided.get_batch_samples(iter([without_labels([Noise()[0]])]), 1, torch.device("cpu"))
    student.train()
    guided.compute_loss(student, batches[0], num_items_in_batch=counts).backward()
    assert not student.lm_head.weight.grad.any()
    assert student.wav2vec2.encoder.layers[0].feed_forward.output_dense.weight.grad.any()


def test_students_and_trained_teachers_in_half_precision_are_refused(tmp_path):
    teacher, student = models()
    with pytest.raises(ValueError, match=r"model: got weights in torch.bfloat16; want float32, by model.float\(\)"):
        trainer(tmp_path, copy.deepcopy(student).bfloat16(), teacher)
    with pytest.raises(ValueError, match="teacher: got weights in torch.float16; want float32"):
        trainer(tmp_path, student, teacher.half(), mode=TrajectoryGuided())


TOKENS = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


@pytest.mark.parametrize(
    "teacher, match",
    [
        (lambda: Wav2Vec2Model(config()), "got a Wav2Vec2Model; want a model with a head like that of the student"),
        (lambda: Wav2Vec2ForPreTraining(config()), "got a Wav2Vec2ForPreTraining; want a model with a head"),
        (lambda: Wav2Vec2ForSequenceClassification(config()), "got a Wav2Vec2ForSequenceClassification; want a model"),
        (lambda: RobertaForMaskedLM(RobertaConfig(**TOKENS)), "got a RobertaForMaskedLM, which takes input_ids; want"),
        (lambda: Wav2Vec2ForCTC(config(hidden_size=32)), "got hidden states of width 32; want 16"),
        (lambda: Wav2Vec2ForCTC(config(vocab_size=9)), "got a head of 9 classes; want 8"),
    ],
    ids=["bare", "pretraining", "head", "modality", "width", "vocabulary"],
)
def test_teachers_that_do_not_fit_are_refused_at_construction(tmp_path, teacher, match):
    _, student = models()
    with pytest.raises(ValueError, match=f"teacher: {match}"):
        trainer(tmp_path, student, teacher())


def test_a_teacher_of_text_has_the_tokens_of_the_student(tmp_path):
    student, teacher = (RobertaForTokenClassification(RobertaConfig(vocab_size=size, **TOKENS)) for size in (60, 70))
    with pytest.raises(ValueError, match="teacher: got a vocabulary of 70 tokens; want the student's, of 60"):
        trainer(tmp_path, student, teacher)


def test_other_classes_are_fine_where_outputs_are_not_compared(tmp_path):
    _, student = models()
    trainer(tmp_path, student, Wav2Vec2ForCTC(config(vocab_size=9)), alpha_kd=0.0, max_steps=1).train()
    assert "layer_loss" in records(tmp_path)[0]


def test_a_teacher_of_other_classes_is_not_asked_for_the_loss_of_the_labels(tmp_path):
    def classifier(classes):
        return RobertaForSequenceClassification(RobertaConfig(vocab_size=60, num_labels=classes, **TOKENS))

    student = linconv.convert(classifier(3), mixer="linformer", r=4)
    sentences = [{"input_ids": torch.tensor([5, 6, 7]), "labels": 2}] * 4
    options = {"alpha_kd": 0.0, "max_steps": 1, "collator": default_data_collator}
    trainer(tmp_path, student, classifier(2), data=sentences, **options).train()
    assert records(tmp_path)[0]["layer_loss"] > 0


def test_stale_records_are_dropped_when_a_run_starts_again(tmp_path):
    tmp_path.joinpath("metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    teacher, student = models()
    trainer(tmp_path, student, teacher, max_steps=2).train()
    assert [r["step"] for r in records(tmp_path)] == [1, 2] and records(tmp_path)[0]["loss"] != 9.0


def test_wrong_arguments_are_named(tmp_path):
    teacher, student = models()
    with pytest.raises(TypeError, match="args: got TrainingArguments; want DistillationArguments"):
        DistillationTrainer(student, TrainingArguments(str(tmp_path), use_cpu=True), teacher=teacher)
    with pytest.raises(ValueError, match="teacher: got None"):
        trainer(tmp_path, student, mode=TargetGuided())
    with pytest.raises(TypeError, match=r"mode: got 'target_guided'; want a mode such as TargetGuided\(\)"):
        trainer(tmp_path, student, teacher, mode="target_guided")
    with pytest.raises(ValueError, match="teacher: got a model of 1 layers; want 2"):
        trainer(tmp_path, student, Wav2Vec2ForCTC(config(num_hidden_layers=1)))
    with pytest.raises(ValueError, match="shares parameters with the student"):
        trainer(tmp_path, teacher, teacher)
    for name, value in (
        ("alpha_kd", -1.0),
        ("alpha_kd", "1"),
        ("temperature", 0.0),
        ("teacher_learning_rate", True),
        ("layer_reduction", "max"),
        ("exponential_decay_to", 2.0),
        ("alpha_ld", math.inf),
        ("alpha_kd", 10**400),
        ("temperature", math.inf),
        ("teacher_learning_rate", math.inf),
        ("scale_by_t2", "False"),
        ("layer_norm", None),
        ("include_embeddings", 1),
        ("layer_weights", 1.0),
        ("layer_weights", ["1"]),
    ):
        with pytest.raises(ValueError, match=f"{name}: got"):
            arguments(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="use_reentrant=True"):
        arguments(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert isinstance(arguments(tmp_path), DistillationArguments)
    for weights, match in (
        ([1.0], "got 1; want 2, one for each"),
        ([1.0, -2.0], r"got \[1.0, -2.0\]; want numbers from 0"),
    ):
        with pytest.raises(ValueError, match=f"layer_weights: {match}"):
            trainer(tmp_path, student, teacher, layer_weights=weights)
    nothing = {"alpha_ce": 0.0, "alpha_kd": 0.0, "alpha_ld": 0.0}
    for options in ({"teacher": teacher, **nothing}, {"teacher": teacher, "alpha_ce": 0.0, "mode": Unguided()}):
        with pytest.raises(ValueError, match="alpha_ce, alpha_kd, alpha_ld: got 0, .*; want one above 0 that the mode"):
            trainer(tmp_path, student, **options)
    dropping = {"teacher": teacher, "alpha_ce": 0.0, "alpha_kd": 0.0, "max_steps": 4}
    with pytest.raises(ValueError, match="alpha_ld: got 0, 0, .*; want one .* the mode Hybrid.* uses to the end"):
        trainer(tmp_path, student, mode=Hybrid(TargetGuided(), drop_layer_loss_at=2), **dropping)
    trainer(tmp_path, student, mode=Hybrid(TargetGuided(), drop_layer_loss_at=4), **dropping)


def test_a_run_that_diverges_ends(tmp_path):
    student = models()[1]
    unguided = trainer(tmp_path, student, logging_steps=1, learning_rate=1e30, max_steps=8)
    with pytest.raises(FloatingPointError, match=r"training has diverged: at step \d+ task_loss is .*\(got 1e\+30\)"):
        unguided.train()
    # Before a checkpoint of it, and with the record of that step.
    assert records(tmp_path)[-1]["step"] == unguided.state.global_step < 8


def test_a_loss_that_is_not_finite_is_warned_of_where_weights_are(tmp_path):
    unguided = trainer(tmp_path, models()[1])
    unguided._measures = {"task_loss": torch.tensor(float("inf"))}
    with pytest.warns(UserWarning, match="at step 0 task_loss is inf; the weights are finite"):
        unguided.log({"loss": 1.0})
    with torch.no_grad():
        next(unguided.model.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(FloatingPointError, match="weights that are not finite"):
        unguided.log({"loss": 1.0})
