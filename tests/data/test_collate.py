import jiwer
import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from linconv.data import Collator, build_tokenizer, normalize
from linconv.data.metrics import Metrics


def clips(*lengths):
    draw = np.random.default_rng(0)
    return [{"audio": draw.standard_normal(n).astype(np.float32), "target": str(i)} for i, n in enumerate(lengths)]


@pytest.mark.parametrize("extractor", [Wav2Vec2FeatureExtractor(return_attention_mask=True), WhisperFeatureExtractor()])
def test_features_of_a_clip_do_not_hang_on_its_neighbours(extractor):
    collate = Collator(extractor, int, attention_mask=True)
    name = extractor.model_input_names[0]
    both, alone = clips(16000, 8003), [collate([clip]) for clip in clips(16000, 8003)]
    batch = collate(both)
    lengths = batch["attention_mask"].sum(-1)
    for i in range(2):
        assert torch.equal(batch[name][i, ..., : lengths[i]], alone[i][name][0])
        assert (batch[name][i, ..., lengths[i] :] == 0).all()
    assert lengths.tolist() == ([16000, 8003] if name == "input_values" else [100, 50])
    assert batch["labels"].tolist() == [0, 1]


def test_attention_mask_is_the_feature_extractors_wish():
    assert "attention_mask" not in Collator(Wav2Vec2FeatureExtractor(return_attention_mask=False), int)(clips(500))
    assert "attention_mask" in Collator(Wav2Vec2FeatureExtractor(return_attention_mask=True), int)(clips(500))


def test_transcripts_are_padded_with_minus_100():
    tokenizer = build_tokenizer(["ab", "a b"])
    encode = {"0": "ab", "1": "a b b"}
    batch = Collator(Wav2Vec2FeatureExtractor(), lambda t: tokenizer(encode[t]).input_ids)(clips(500, 500))
    assert batch["labels"].tolist() == [[3, 4, -100, -100, -100], [3, 2, 4, 2, 4]]


def test_vocabulary_is_the_characters_of_the_transcripts():
    tokenizer = build_tokenizer(["ça va", "'n va"])
    assert tokenizer.get_vocab() == {"[PAD]": 0, "[UNK]": 1, "|": 2, "'": 3, "a": 4, "n": 5, "v": 6, "ç": 7}
    assert tokenizer.decode(tokenizer("ça va").input_ids, group_tokens=False) == "ça va"
    assert tokenizer("x").input_ids == [1]


def test_normalize():
    assert normalize("  Hello,  WORLD’s  No. 5 — Straße! ") == "hello world's no 5 strasse"
    assert normalize("ﬁn مرحبا؟") == "fin مرحبا"


def test_accuracy():
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    answers = Metrics.answers(logits, None)
    assert Metrics()(EvalPrediction(answers.numpy(), np.array([1, 1, 1]))) == {"accuracy": pytest.approx(2 / 3)}


def test_error_rates_are_jiwers_on_decoded_text():
    tokenizer = build_tokenizer(["one two"])
    said, heard = ["one two", "two", "noon"], ["one tow", "", "noon one"]
    labels = [tokenizer(text).input_ids for text in said]
    frames = []
    for text in heard:  # every character twice, a blank between, as CTC would have it
        frames.append([i for c in tokenizer(text).input_ids for i in (c, c, 0)])
    width = max(map(len, frames)) + 4
    answers = np.array([f + [0] * (width - 4 - len(f)) + [-100] * 4 for f in frames])
    padded = np.full((3, 8), -100)
    for row, ids in zip(padded, labels):
        row[: len(ids)] = ids
    got = Metrics(tokenizer)(EvalPrediction(answers, padded))
    assert got == {"wer": jiwer.wer(said, heard), "cer": jiwer.cer(said, heard)}
    assert got["wer"] == pytest.approx(3 / 4)


def test_rows_that_the_trainer_padded_are_no_answers():
    logits = torch.full((1, 3, 4), -100.0)
    logits[0, 0] = torch.tensor([0.0, 0.0, 5.0, 0.0])
    assert Metrics.answers(logits, None).tolist() == [[2, -100, -100]]
