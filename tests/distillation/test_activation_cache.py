import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC, Wav2Vec2ForCTC

import linconv
from linconv.conversion import encoder_layers, frame_lengths
from linconv.distillation import DistillationTrainer, Hybrid, LayerStates, TrajectoryGuided, WaypointGuided
from linconv.distillation.activation_cache import ActivationCache
from linconv.distillation.heads import Head

from .run import Noise, arguments, collate, config, models, snapshots
from .test_trainer import records


def trainer(folder, student, teacher, mode=None, **changes):
    return DistillationTrainer(
        student,
        arguments(folder, **changes),
        teacher=teacher,
        mode=mode,
        train_dataset=Noise(),
        data_collator=collate,
    )


def cache_of(folder, teacher, embeddings=False) -> ActivationCache:
    return ActivationCache(folder, teacher.eval(), Head.of(teacher), precision="own", embeddings=embeddings)


@torch.no_grad()
def answers(teacher, batch):
    """Frames of each clip, hidden states and logits, of the teacher itself."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with LayerStates(encoder_layers(teacher)) as states:
        logits = teacher.eval()(**inputs).logits
    return frame_lengths(teacher, batch["attention_mask"]), states.after, logits


def loss_of(record):
    return {k: v for k, v in record.items() if k in ("loss", "layer_mse", "layer_cosine", "kd_loss", "layer_loss")}


def test_warm_the_run_is_the_same_bit_for_bit_and_the_teacher_is_not_asked(tmp_path):
    runs = {}
    for name in ("cold", "warm", "without"):
        teacher, student = models()
        asked = []
        teacher.register_forward_hook(lambda *_, asked=asked: asked.append(1))
        changes = {} if name == "without" else {"teacher_cache": str(tmp_path / "cache")}
        trainer(tmp_path / name, student, teacher, max_steps=10, **changes).train()
        runs[name] = [loss_of(r) for r in records(tmp_path / name)], len(asked)
    assert runs["cold"][0] == runs["warm"][0]
    # 24 clips are six batches: the second epoch asks nothing.
    assert (runs["cold"][1], runs["warm"][1], runs["without"][1]) == (6, 0, 10)
    for a, b in zip(runs["cold"][0], runs["without"][0], strict=True):
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=0.02, abs=1e-4), key


def test_what_comes_out_is_what_went_in_whatever_the_padding(tmp_path):
    teacher, _ = models()
    cache = cache_of(tmp_path, teacher)
    clips = [Noise()[i] for i in range(4)]
    batch = collate(clips)
    frames, states, logits = answers(teacher, batch)
    cache.add(cache.keys(batch, frames), frames, states, logits)
    cache.flush()
    assert not list(cache.folder.glob("*.unfinished"))

    again = cache_of(tmp_path, teacher)  # as another process finds it
    other = collate([clips[2], clips[0]])
    other["input_values"], other["attention_mask"] = (
        F.pad(other[k], (0, 400)) for k in ("input_values", "attention_mask")
    )
    lengths = frame_lengths(teacher, other["attention_mask"])
    length = int(frame_lengths(teacher, torch.ones_like(other["attention_mask"][:1])))
    keys = again.keys(other, lengths)
    assert len(again) == 4 and all(key in again for key in keys)
    found, found_logits = again.batch(keys, length, "cpu", with_states=True)
    for row, clip in enumerate((2, 0)):
        n = int(frames[clip])
        assert n == int(lengths[row])
        for mine, theirs in zip(found, states, strict=True):
            assert mine.dtype == torch.bfloat16
            assert torch.equal(mine[row, :n], theirs[clip, :n].bfloat16()) and not mine[row, n:].any()
        assert torch.equal(found_logits[row, :n], logits[clip, :n])
    nothing, _ = again.batch(keys, length, "cpu", with_states=False)
    assert nothing == []


def test_where_padding_reaches_the_states_the_padded_length_counts(tmp_path):
    batch = collate([Noise()[0]])
    padded = {k: F.pad(v, (0, 400)) if k != "labels" else v for k, v in batch.items()}
    conformer = Wav2Vec2ConformerForCTC(config(kind=Wav2Vec2ConformerConfig))
    for teacher, reaches in (
        (Wav2Vec2ForCTC(config()), False),
        (Wav2Vec2ForCTC(config(feat_extract_norm="group", do_stable_layer_norm=False)), True),
        (conformer, True),
        (linconv.convert(conformer, layers=[]), False),
    ):
        cache, frames = cache_of(tmp_path, teacher), frame_lengths(teacher, batch["attention_mask"])
        assert (cache.keys(batch, frames) != cache.keys(padded, frames)) == reaches


def test_other_clips_and_other_teachers_are_not_taken_for_known_ones(tmp_path):
    teacher, _ = models()
    cache = cache_of(tmp_path, teacher)
    batch = collate([Noise()[0]])
    frames, states, logits = answers(teacher, batch)
    keys = cache.keys(batch, frames)
    cache.add(keys, frames, states, logits)
    batch["input_values"][0, 5] += 1e-3
    assert keys[0] in cache and cache.keys(batch, frames)[0] not in cache

    other = copy.deepcopy(teacher)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    folders = {cache_of(tmp_path, model).folder for model in (teacher, other)}
    assert len({*folders, cache_of(tmp_path, teacher, embeddings=True).folder}) == 3


def test_a_full_disk_ends_the_keeping_not_the_run(tmp_path, monkeypatch, caplog):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(100 << 30, 99 << 30, 1 << 30))
    monkeypatch.setattr("linconv.distillation.activation_cache.SHARD_BYTES", 1)
    teacher, student = models()
    run = trainer(tmp_path, student, teacher, teacher_cache=str(tmp_path / "cache"))
    run.train()
    assert len(records(tmp_path)) == 4 and len(run.cache) <= 4
    assert not list(run.cache.folder.iterdir())
    assert [r.message.count("nearly full") for r in caplog.records if "teacher_cache" in r.message] == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trajectory", "TrajectoryGuided.* changes"),
        ("waypoint", "WaypointGuided.* changes"),
        ("hybrid", "TrajectoryGuided.* changes"),
        ("augment", "SpecAugment"),
        ("no teacher", "no teacher"),
    ],
)
def test_where_a_clip_has_no_one_activation_it_is_refused(tmp_path, change, message):
    teacher, student = models(augment=change == "augment")
    mode = {
        "trajectory": lambda: TrajectoryGuided(),
        "waypoint": lambda: WaypointGuided(snapshots(teacher, tmp_path)),
        "hybrid": lambda: Hybrid(TrajectoryGuided(), drop_layer_loss_at=5),
    }.get(change, lambda: None)()
    with pytest.raises(ValueError, match=f"teacher_cache: .*{message}"):
        trainer(tmp_path, student, None if change == "no teacher" else teacher, mode, teacher_cache=str(tmp_path))


def test_dropout_in_the_teacher_is_refused(tmp_path):
    teacher, student = models()
    teacher.dropout = torch.nn.Dropout(0.1)
    run = trainer(tmp_path, student, teacher)
    teacher.dropout.train()
    from linconv.distillation.activation_cache import check_cacheable

    with pytest.raises(ValueError, match=r"teacher_cache: dropout of the teacher draws dropout.*teacher\.eval"):
        check_cacheable(student, teacher, run.mode)


def test_clips_of_text_go_by_their_tokens(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    teacher = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    ).eval()
    student = linconv.convert(teacher, mixer="linformer", r=4)
    cache = ActivationCache(tmp_path, teacher, Head.of(student), precision="own", embeddings=True)
    ids = torch.tensor([[1, 2, 3, 0], [1, 2, 3, 4]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([0, 1])}
    frames = batch["attention_mask"].sum(-1)
    with torch.no_grad(), LayerStates(encoder_layers(teacher)) as states:
        logits = teacher(**batch).logits
    keys = cache.keys(batch, frames)
    cache.add(keys, frames, [states.before, *states.after], logits)
    assert len(set(keys)) == 2
    alone = {"input_ids": ids[:1, :3], "attention_mask": batch["attention_mask"][:1, :3], "labels": torch.tensor([1])}
    assert cache.keys(alone, frames[:1]) == keys[:1]
    found, found_logits = cache.batch(keys[:1], 3, "cpu", with_states=True)
    assert len(found) == 3 and torch.equal(found_logits, logits[:1])
