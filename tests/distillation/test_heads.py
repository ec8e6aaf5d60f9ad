"""Heads of text models: whatever a head answers for, the losses are means over the answers that count."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

import linconv
from linconv.conversion import families
from linconv.distillation import DistillationTrainer, TrajectoryGuided
from linconv.distillation.heads import Head
from linconv.distillation.probe import PROBE_FILE, Probe

from .run import arguments
from .test_trainer import assert_same, config, records

TOKENS = ("TokenClassification", "MaskedLM", "CausalLM")
TASKS = (*TOKENS, "QuestionAnswering", "MultipleChoice", "NextSentencePrediction")
HEADS = [
    name
    for family in ("bert", "roberta", "distilbert", "gpt_neox")
    for name in families.FAMILIES[family].heads.values()
    if name.endswith(TASKS)
]
EACH = ["BertForTokenClassification", "RobertaForMaskedLM", "DistilBertForQuestionAnswering", "BertForMultipleChoice"]
EACH += ["BertForNextSentencePrediction", "GPTNeoXForCausalLM"]
SPEECH = ("Wav2Vec2", "Wav2Vec2Conformer")  # that have a head for pretraining
VOCABULARY, CHOICES, CLASSES = 24, 3, 2  # two classes: a question's answer has a start and an end
LENGTHS = (9, 4, 6, 3)


def models(name: str):
    """Two layers of width 16, without dropout."""
    torch.manual_seed(0)
    stock = getattr(transformers, name)
    if name.startswith("Distil"):
        entries = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
        entries.update(dict.fromkeys(("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"), 0.0))
    else:
        entries = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        entries.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 1, "num_labels": CLASSES}
    teacher = stock(stock.config_class(**common, **entries, initializer_range=0.5)).eval()
    mixer = "mamba2" if name.startswith("GPT") else "bimamba2"
    return teacher, linconv.convert(teacher, mixer=mixer, d_state=8, headdim=8)


def task_of(name: str) -> str:
    return name.partition("For")[2]


def example(name: str, length: int, seed: int) -> dict:
    """Tokens and what is right of them; of tokens, every third label is -100."""
    draw = torch.Generator().manual_seed(seed)

    def below(high, *shape):
        return torch.randint(high, shape, generator=draw)

    task = task_of(name)
    if task == "MultipleChoice":
        lengths = [length, *(int(2 + below(length - 1)) for _ in range(CHOICES - 1))]
        return {"input_ids": [2 + below(VOCABULARY - 2, n) for n in lengths], "labels": below(CHOICES)}
    found = {"input_ids": 2 + below(VOCABULARY - 2, length)}
    if task == "QuestionAnswering":
        start = below(length)
        return {**found, "start_positions": start, "end_positions": start + below(length - int(start))}
    if task == "NextSentencePrediction":
        return {**found, "labels": below(2)}
    labels = below(CLASSES if task == "TokenClassification" else VOCABULARY, length)
    return {**found, "labels": torch.where(torch.arange(length) % 3 == seed % 3, -100, labels)}


def collate(examples: list[dict], length: int = 0) -> dict[str, torch.Tensor]:
    """Padded to the longest, or to ``length``; what pads the tokens is a token like others."""

    def pad(rows: list, value: int) -> torch.Tensor:
        nested = isinstance(rows[0], list)  # of choices
        rows = [r for row in rows for r in row] if nested else rows
        padded = pad_sequence([*rows, torch.empty(length)], batch_first=True, padding_value=value)[:-1].long()
        return padded.view(-1, CHOICES, padded.shape[-1]) if nested else padded

    batch = {name: [e[name] for e in examples] for name in examples[0]}
    ones = [
        [torch.ones_like(r) for r in row] if isinstance(row, list) else torch.ones_like(row)
        for row in batch["input_ids"]
    ]
    found = {"input_ids": pad(batch.pop("input_ids"), 7), "attention_mask": pad(ones, 0)}
    for name, rows in batch.items():
        found[name] = pad(rows, -100) if rows[0].dim() else torch.stack(rows)
    return found


def examples(name: str, lengths=LENGTHS) -> list[dict]:
    return [example(name, length, seed) for seed, length in enumerate(lengths)]


def without_labels(batch: dict) -> dict:
    return {k: v for k, v in batch.items() if k not in ("labels", "start_positions", "end_positions")}


def trainer(folder, student, teacher, data, mode=None, **changes):
    return DistillationTrainer(
        student,
        arguments(folder, **changes),
        teacher=teacher,
        mode=mode,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
    )


def losses(run, *batches) -> dict:
    """The parts of the loss of one optimizer step over these micro-batches, and its gradients."""
    run.state.logging_steps = 1
    run.model.zero_grad()
    batches, counts = run.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    run.model.train()
    total = sum(run.compute_loss(run.model, batch, num_items_in_batch=counts) for batch in batches)
    total.backward()
    gradients = {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}
    return {"loss": total.detach(), **run._measures, **gradients}


def divergence(student, teacher, temperature=2.0):
    p, q = (F.softmax(x.double() / temperature, -1) for x in (teacher, student))
    return (p * (p / q).log()).sum()


@torch.no_grad()
def kd_by_hand(name, student, teacher, data, batch, labelled=True):
    """KL(teacher‖student), answer by answer, and the mean."""
    inputs, found = without_labels(batch), []
    s, t = student.eval()(**inputs), teacher(**inputs)
    for i, one in enumerate(data):
        if task_of(name) in TOKENS:
            labels = [*one["labels"][1:], -100] if task_of(name) == "CausalLM" else one["labels"]
            for j, label in enumerate(labels):
                if label != -100 or not labelled:
                    found.append(divergence(s.logits[i, j], t.logits[i, j]))
        elif task_of(name) == "QuestionAnswering":
            n = len(one["input_ids"])
            found.append(divergence(s.start_logits[i, :n], t.start_logits[i, :n]))
            found.append(divergence(s.end_logits[i, :n], t.end_logits[i, :n]))
        else:
            found.append(divergence(s.logits[i], t.logits[i]))
    return torch.stack(found).mean().item()


@pytest.mark.parametrize("name", HEADS)
def test_the_task_loss_is_transformers_own_and_the_kd_that_of_the_formula(tmp_path, name):
    teacher, student = models(name)
    before = copy.deepcopy(student)
    data = examples(name, (6, 6, 6, 6)) if task_of(name) == "QuestionAnswering" else examples(name)
    batch = collate(data)
    run = trainer(tmp_path, student, teacher, data, max_steps=1)
    want = student.eval()(**batch).loss.item()
    assert run.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)
    run.train()
    (record,) = records(tmp_path)
    assert record["task_loss"] == pytest.approx(want, rel=1e-5)
    assert record["kd_loss"] == pytest.approx(kd_by_hand(name, before, teacher, data, batch), rel=1e-4)
    assert record["kd_loss"] > 1e-3 and record["layer_loss"] > 1e-3
    parts = record["task_loss"] + record["kd_loss"] + 15 * record["layer_loss"]
    assert record["loss"] == pytest.approx(parts, rel=1e-5)


def test_kd_of_a_span_is_over_the_tokens_of_its_own_sentence(tmp_path):
    name = "BertForQuestionAnswering"
    teacher, student = models(name)
    data = examples(name)
    batch = collate(data)
    got = losses(trainer(tmp_path, student, teacher, data), batch)
    assert got["kd_loss"].item() == pytest.approx(kd_by_hand(name, student, teacher, data, batch), rel=1e-4)
    with torch.no_grad():
        outputs = student.eval()(**without_labels(batch))
    nll = 0
    for i, one in enumerate(data):
        n = len(one["input_ids"])
        nll -= outputs.start_logits[i, :n].log_softmax(-1)[one["start_positions"]]
        nll -= outputs.end_logits[i, :n].log_softmax(-1)[one["end_positions"]]
    torch.testing.assert_close(got["task_loss"], nll / 8)


@pytest.mark.parametrize("name", HEADS)
def test_neither_accumulation_nor_padding_changes_losses_and_gradients(tmp_path, name):
    teacher, student = models(name)
    data = examples(name)
    run = trainer(tmp_path, student, teacher, data)
    whole = losses(run, collate(data))
    assert {"task_loss", "kd_loss", "layer_loss", "layer_mse", "layer_cosine"} <= whole.keys()
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert_same(whole, losses(run, collate(data[:2]), collate(data[2:])), **close)
    assert_same(whole, losses(run, *(collate([one]) for one in data)), **close)
    assert_same(whole, losses(run, collate(data, length=14)), **close)


@pytest.mark.parametrize("name", EACH)
def test_a_micro_batch_may_hold_no_answer(tmp_path, name):
    """It still has frames, whose hidden states are compared."""
    teacher, student = models(name)
    data = examples(name)
    for one in data[:2]:
        if task_of(name) == "QuestionAnswering":
            one["start_positions"], one["end_positions"] = torch.tensor(40), torch.tensor(len(one["input_ids"]))
        else:
            one["labels"] = torch.full_like(one["labels"], -100)
    run = trainer(tmp_path, student, teacher, data)
    got = losses(run, collate(data[:2]), collate(data[2:]))
    assert_same(losses(run, collate(data)), got, rtol=1e-4, atol=1e-5)
    answers = losses(run, collate(data[2:]))
    for part in ("task_loss", "kd_loss"):
        torch.testing.assert_close(got[part], answers[part])
        assert answers[part] > 0
    assert not torch.isclose(got["layer_loss"], answers["layer_loss"])
    nothing = losses(run, collate(data[:2]))
    assert nothing["task_loss"] == nothing["kd_loss"] == 0 and nothing["layer_loss"] > 0
    student.eval()
    assert run.compute_loss(student, collate(data[:2])) == 0


@pytest.mark.parametrize("name", EACH)
def test_without_labels_every_answer_counts(tmp_path, name):
    teacher, student = models(name)
    data = examples(name)
    batch = collate(data)
    want = kd_by_hand(name, student, teacher, data, batch, labelled=False)
    got = losses(trainer(tmp_path, student, teacher, data), without_labels(batch))
    assert got["kd_loss"].item() == pytest.approx(want, rel=1e-4) and "task_loss" not in got


def test_a_label_on_padding_does_not_count(tmp_path):
    name = "BertForTokenClassification"
    teacher, student = models(name)
    run = trainer(tmp_path, student, teacher, examples(name))
    batch = collate(examples(name))
    want = losses(run, batch)
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, 1)
    assert_same(want, losses(run, batch))


def test_a_span_that_is_cut_off_does_not_count_and_one_before_the_first_token_is_at_it(tmp_path):
    name = "RobertaForQuestionAnswering"
    teacher, student = models(name)
    data = examples(name)
    run = trainer(tmp_path, student, teacher, data)
    data[1]["end_positions"] = torch.tensor(len(data[1]["input_ids"]))  # in the padding of this batch
    batch = collate(data)
    assert run.head.valid_answers(batch, run._frame_mask(batch)).tolist() == [
        [True] * 2,
        [True, False],
        *[[True] * 2] * 2,
    ]
    got = losses(run, batch)
    with torch.no_grad():
        outputs = student.eval()(**without_labels(batch))
    nll = 0
    for i, one in enumerate(data):
        n = len(one["input_ids"])
        for logits, at in ((outputs.start_logits, one["start_positions"]), (outputs.end_logits, one["end_positions"])):
            if at < n:
                nll -= logits[i, :n].log_softmax(-1)[at]
    torch.testing.assert_close(got["task_loss"], nll / 7)

    data[1]["end_positions"] = torch.tensor(0)
    want = losses(run, collate(data))
    data[1]["end_positions"] = torch.tensor(-1)
    assert_same(want, losses(run, collate(data)))


def test_a_span_is_predicted_within_its_sentence(tmp_path):
    name = "BertForQuestionAnswering"
    _, student = models(name)
    data = examples(name, (3, 9))
    batch = collate(data)
    with torch.no_grad():
        student.qa_outputs.weight.zero_()
        student.qa_outputs.bias.fill_(-3.0)
    for given in (data, [without_labels(one) for one in data]):
        start, end = trainer(tmp_path, student, None, data).predict(given).predictions
        padding = batch["attention_mask"].numpy() == 0
        for logits in (start, end):
            assert padding.any() and (logits[padding] < -1e30).all() and (logits[~padding] == -3).all()
            assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize(("part", "weight"), [("task_loss", "alpha_ce"), ("kd_loss", "alpha_kd"), (None, None)])
def test_a_short_run_lowers_the_loss(tmp_path, name, part, weight):
    """The random labels and the teacher do not agree: each alone, and all together."""
    teacher, student = models(name)
    changes = {"max_steps": 12, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    if weight is not None:
        changes.update({"alpha_ce": 0, "alpha_kd": 0, "alpha_ld": 0, weight: 1})
    trainer(tmp_path, student, teacher, examples(name), gradient_accumulation_steps=2, **changes).train()
    first, *_, last = records(tmp_path)
    assert last["loss"] < 0.7 * first["loss"]
    if part is not None:
        assert last["loss"] == pytest.approx(last[part], rel=1e-5)


@pytest.mark.parametrize("name", EACH)
def test_the_cache_holds_what_the_teacher_answers(tmp_path, name):
    data, runs = examples(name, (9, 4, 6, 3, 8, 5, 7, 10)), {}
    for kind in ("cold", "warm", "without"):
        teacher, student = models(name)
        asked = []
        teacher.register_forward_hook(lambda *_, asked=asked: asked.append(1))
        changes = {} if kind == "without" else {"teacher_cache": str(tmp_path / "cache")}
        run = trainer(tmp_path / kind, student, teacher, data, max_steps=6, **changes)
        run.train()
        if kind == "warm":  # a sentence is known without its labels and whatever its padding
            keys = [run.cache.keys(b, run._frame_mask(b).sum(-1)) for b in (collate(data), collate(data, length=14))]
            keys.append(run.cache.keys(without_labels(collate(data)), run._frame_mask(collate(data)).sum(-1)))
            assert keys[0] == keys[1] == keys[2] and all(key in run.cache for key in keys[0])
        runs[kind] = records(tmp_path / kind), len(asked)
    assert [n for _, n in runs.values()] == [2, 0, 6]  # eight sentences are two batches
    for cold, warm, without in zip(*(r for r, _ in runs.values()), strict=True):
        for part in ("loss", "task_loss", "kd_loss", "layer_loss"):
            assert cold[part] == warm[part]
            assert cold[part] == pytest.approx(without[part], rel=0.02), part


@pytest.mark.parametrize("name", EACH)
def test_a_teacher_is_fine_tuned_on_the_same_answers(tmp_path, name):
    teacher, student = models(name)
    data = examples(name)
    run = trainer(tmp_path, student, teacher, data, TrajectoryGuided(), max_steps=3)
    run.train()
    found = [r["teacher_loss"] for r in records(tmp_path) if "teacher_loss" in r]
    batch = collate(data)
    untrained, _ = models(name)
    frame_mask = run._frame_mask(batch)
    with torch.no_grad():
        outputs = untrained(**batch)
        want = run.head.task_loss(outputs, batch, frame_mask, untrained.config)
    assert found[0] == pytest.approx((want / run.head.valid_answers(batch, frame_mask).sum()).item(), rel=1e-4)
    assert found[1] < found[0]
    unlabelled = trainer(
        tmp_path, models(name)[1], untrained, [without_labels(one) for one in data], TrajectoryGuided(), max_steps=2
    )
    with pytest.raises(ValueError, match="labels: got None; want labels, for the teacher of this mode is trained"):
        unlabelled.train()


@pytest.mark.parametrize("task", ["CausalLM", "TokenClassification", "QuestionAnswering"])
def test_where_a_model_attends_to_the_past_only_padding_may_be_on_the_left(tmp_path, task):
    name = f"GPTNeoXFor{task}"
    teacher, student = models(name)
    data = examples(name)
    right, lengths = collate(data), torch.tensor(LENGTHS)
    at = (torch.arange(9) + lengths[:, None]) % 9  # rolls each row to the right
    left = {k: x.gather(1, at) if x.dim() == 2 else x + 9 - lengths for k, x in right.items()}
    run = trainer(tmp_path, student, teacher, data)
    assert not left["attention_mask"][1:, 0].any()
    assert_same(losses(run, right), losses(run, left), rtol=1e-3, atol=1e-5)

    cached = trainer(tmp_path, student, teacher, data, teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="teacher_cache: got a batch padded on the left; want it padded on the right"):
        losses(cached, left)


def test_nothing_is_cached_in_training(tmp_path):
    """Keys, values and states of a batch are for tokens to come."""
    name = "GPTNeoXForCausalLM"
    teacher, student = models(name)
    run = trainer(tmp_path, student, teacher, examples(name))
    kept = []
    for model in (teacher, student):
        model.register_forward_hook(lambda module, arguments, outputs: kept.append(set(outputs)))
        model.config.use_cache = True  # as it comes; Trainer turns it off in the model that it trains
    losses(run, collate(examples(name)))
    run.evaluate()
    assert len(kept) >= 3 and not {"cache", "past_key_values"} & set.union(*kept)
    assert {"cache", "past_key_values"} & set(teacher(**without_labels(collate(examples(name)))))


def test_a_probe_takes_each_choice_for_a_sentence(tmp_path):
    name = "BertForMultipleChoice"
    teacher, student = models(name)
    data = examples(name)
    run = trainer(tmp_path, student, teacher, data, max_steps=1)
    run.add_callback(Probe(run, collate(data), points=1))
    run.train()
    assert load_file(tmp_path / PROBE_FILE)["teacher/1"].shape == (len(data) * CHOICES, 2, 16)


def test_wrong_labels_are_named(tmp_path):
    def run(name):
        teacher, student = models(name)
        return trainer(tmp_path, student, teacher, examples(name)), collate(examples(name))

    guided, batch = run("BertForQuestionAnswering")
    del batch["end_positions"]
    with pytest.raises(ValueError, match="end_positions: got None; want start_positions and end_positions, or neither"):
        losses(guided, batch)
    guided, batch = run("BertForTokenClassification")
    batch["labels"] = batch["labels"][:, 0]
    with pytest.raises(ValueError, match=r"labels: got shape \(4,\); want \(4, 9\), one a token"):
        losses(guided, batch)


@pytest.mark.parametrize("largest", [VOCABULARY, 100_000_000])
def test_labels_beyond_the_vocabulary_of_ctc_are_named(tmp_path, largest):
    teacher = transformers.Wav2Vec2ForCTC(config(vocab_size=VOCABULARY))
    student = linconv.convert(teacher, d_state=8, headdim=8)
    batch = {"input_values": torch.randn(2, 800), "labels": torch.tensor([[largest, 3], [5, -100]])}
    with pytest.raises(ValueError, match=rf"labels: got {largest}; want ids below {VOCABULARY}, the size of the vocab"):
        losses(trainer(tmp_path, student, teacher, []), batch)


def test_a_clip_without_a_label_is_refused_where_the_loss_leaves_none_out(tmp_path):
    teacher = transformers.Wav2Vec2ForXVector(config(tdnn_dim=(8,) * 5, xvector_output_dim=8))
    student = linconv.convert(teacher, d_state=8, headdim=8)
    guided = trainer(tmp_path, student, teacher, [])
    batch = {"input_values": torch.randn(2, 800), "labels": torch.tensor([1, -100])}
    with pytest.raises(ValueError, match="labels: got -100; want an id from 0 up for each clip, for the head is ForX"):
        losses(guided, batch)
    batch["labels"] = torch.tensor([1, 0])
    assert losses(guided, batch)["loss"].isfinite()


def test_an_adapter_over_frames_is_refused(tmp_path):
    teacher = transformers.Wav2Vec2ForCTC(config(vocab_size=VOCABULARY, add_adapter=True))
    with pytest.raises(ValueError, match="model: got a LinconvWav2Vec2ForCTC with add_adapter=True, which answers for"):
        trainer(tmp_path, linconv.convert(teacher, d_state=8, headdim=8), teacher, [])


def stock_classes():
    return [family.stock_class(name) for family in families.FAMILIES.values() for name in family.heads.values()]


def test_every_head_that_converts_distils_or_is_refused_by_name(tmp_path):
    refused = []
    for stock in stock_classes():
        try:
            Head.of(stock.__new__(stock))
        except ValueError as error:
            assert f"model: got a {stock.__name__}; want a head class" in str(error)
            refused.append(stock.__name__)
    assert all(name.endswith(("Model", "ForPreTraining")) for name in refused)
    assert {"BertForPreTraining", "BertModel"} | {f"{speech}ForPreTraining" for speech in SPEECH} <= set(refused)


def test_heads_for_pretraining_are_refused(tmp_path):
    teacher, student = models("BertForPreTraining")
    with pytest.raises(ValueError, match=r"model: got a \w*BertForPreTraining; want a head class, its name ending in"):
        trainer(tmp_path, student, teacher, [])
    for name in SPEECH:
        stock = getattr(transformers, f"{name}ForPreTraining")
        speech = stock(config(kind=stock.config_class))
        with pytest.raises(ValueError, match=rf"model: got a \w*{name}ForPreTraining; want a head class"):
            trainer(tmp_path, linconv.convert(speech, d_state=8, headdim=8), speech, [])
