"""Trainer and pipelines of transformers with converted models."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    Trainer,
    TrainingArguments,
    Wav2Vec2ConformerForCTC,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Processor,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
    pipeline,
)

import linconv

from .conftest import MIXER, inputs_for, make, output_of


class Clips(torch.utils.data.Dataset):
    """Clips of many lengths; what the collator pads reaches the model with a mask."""

    def __init__(self, head, labels):
        self.inputs, self.labels = inputs_for(head, batch=8, lengths=[150, 200, 250, 300] * 2, length=300), labels

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {name: tensor[i] for name, tensor in self.inputs.items()} | {"labels": self.labels[i]}


@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "hybrid"])
@pytest.mark.parametrize(
    "head, auto, labels",
    [
        (Wav2Vec2ForCTC, AutoModelForCTC, torch.randint(1, 20, (8, 4))),
        (Wav2Vec2ForSequenceClassification, AutoModelForAudioClassification, torch.arange(8) % 3),
        (Wav2Vec2ConformerForCTC, AutoModelForCTC, torch.randint(1, 20, (8, 4))),
        (WhisperForAudioClassification, AutoModelForAudioClassification, torch.arange(8) % 3),
    ],
    ids=["ctc", "clips", "conformer", "whisper"],
)
def test_trainer_trains_saves_and_resumes(head, auto, labels, layers, tmp_path):
    def trainer(folder, steps):
        torch.manual_seed(0)
        student = linconv.convert(make(head), layers=layers, **MIXER)
        arguments = TrainingArguments(
            output_dir=tmp_path / folder, max_steps=steps, per_device_train_batch_size=4, save_steps=2, seed=0,
            gradient_checkpointing=True, learning_rate=1e-3, lr_scheduler_type="constant", report_to=[],
            disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        return Trainer(student, arguments, train_dataset=Clips(head, labels))

    through = trainer("through", 4)
    before = {name: tensor.clone() for name, tensor in through.model.state_dict().items()}
    through.train()
    moved = [name for name, tensor in through.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any("mixer.A_log" in name for name in moved)
    loaded = auto.from_pretrained(tmp_path / "through" / "checkpoint-4")
    inputs = Clips(head, labels).inputs
    assert torch.equal(output_of(loaded, inputs), output_of(through.model.eval(), inputs))

    trainer("resumed", 2).train()
    resumed = trainer("resumed", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, through.model.state_dict()[name]), name


@pytest.fixture
def no_error_logged(caplog):
    import logging

    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    errors = [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert not errors


SPEECH = np.random.default_rng(0).standard_normal(1600).astype(np.float32)


@pytest.mark.parametrize("head", [Wav2Vec2ForCTC, Wav2Vec2ConformerForCTC])
def test_speech_recognition_pipeline(head, tmp_path, no_error_logged):
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmno"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    processor = Wav2Vec2Processor(
        Wav2Vec2FeatureExtractor(return_attention_mask=True), Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    )
    student = linconv.convert(make(head), **MIXER)
    folder = tmp_path / "model"
    student.save_pretrained(folder)
    processor.save_pretrained(folder)
    inputs = processor(SPEECH, sampling_rate=16000, return_tensors="pt")
    wanted = processor.batch_decode(output_of(student, inputs).argmax(-1))[0]
    recognise = pipeline("automatic-speech-recognition", model=str(folder), device="cpu")
    assert type(recognise.model) is type(student)
    assert recognise(SPEECH)["text"] == wanted and wanted
    both = recognise([SPEECH, SPEECH[:1100]], batch_size=2)
    assert both[0]["text"] == wanted


def whisper_recogniser(tmp_path, **changes):
    """The pipeline of a converted model, whose segments are of a second."""
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    (tmp_path / "vocab.json").write_text(json.dumps(letters | {token: 26 + i for i, token in enumerate(special)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = WhisperTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    sizes = dict(vocab_size=29, eos_token_id=26, pad_token_id=26, bos_token_id=26, max_source_positions=50)
    student = linconv.convert(make(WhisperForConditionalGeneration, **{**sizes, **changes}), **MIXER)
    student.generation_config.update(decoder_start_token_id=27, eos_token_id=26, pad_token_id=26)
    return pipeline(
        "automatic-speech-recognition", model=student, tokenizer=tokenizer,
        feature_extractor=WhisperFeatureExtractor(feature_size=8, chunk_length=1), device="cpu",
    )  # fmt: skip


def test_speech_recognition_pipeline_of_whisper(tmp_path, no_error_logged):
    """It generates, as a model that is not known to be sequence to sequence would not."""
    recognise = whisper_recogniser(tmp_path)
    inputs = recognise.feature_extractor(SPEECH, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
    options = dict(max_new_tokens=5, num_beams=1)
    tokens = recognise.model.generate(**inputs, **options)  # the pipeline hands the mask on
    wanted = recognise.tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert recognise(SPEECH, generate_kwargs=options)["text"] == wanted and wanted


@pytest.mark.parametrize("chunks, segments", [({}, [250]), (dict(chunk_length_s=1), [100, 100, 100, 51])])
def test_speech_recognition_pipeline_of_whisper_that_is_told_what_it_has(chunks, segments, tmp_path, monkeypatch):
    """It takes all of a clip, also what is beyond one segment, and has timestamps, as for the stock model."""
    recognise = whisper_recogniser(tmp_path, vocab_size=29 + 51)
    recognise.tokenizer.add_tokens([f"<|{i / 50:.2f}|>" for i in range(51)])
    recognise.model.generation_config.no_timestamps_token_id = 28
    recognise.type = "seq2seq_whisper"  # as docs/conversion.md says
    generate, seen = recognise.model.generate, []

    def spy(**inputs):
        seen.append(int(inputs["attention_mask"].sum()))
        return generate(**inputs)

    monkeypatch.setattr(recognise.model, "generate", spy)
    speech = np.random.default_rng(0).standard_normal(40_000).astype(np.float32)
    found = recognise(speech, **chunks, return_timestamps=True, generate_kwargs=dict(max_new_tokens=5))
    assert seen == segments
    assert found["chunks"] and all(len(chunk["timestamp"]) == 2 for chunk in found["chunks"])


def test_preprocessing_that_does_not_name_its_class(tmp_path):
    """As in older checkpoints: the class is looked up by the config's."""
    linconv.convert(make(Wav2Vec2ForCTC), **MIXER).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 8000}))
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(extractor) is Wav2Vec2FeatureExtractor and extractor.sampling_rate == 8000


@pytest.mark.parametrize(
    "head, extractor",
    [
        (Wav2Vec2ForSequenceClassification, Wav2Vec2FeatureExtractor(return_attention_mask=True)),
        (WhisperForAudioClassification, WhisperFeatureExtractor(feature_size=8)),
        (WhisperForAudioClassification, WhisperFeatureExtractor(feature_size=8, return_attention_mask=True)),
    ],
    ids=["wav2vec2", "whisper", "whisper with a mask"],
)
def test_audio_classification_pipeline(head, extractor, tmp_path, no_error_logged):
    student = linconv.convert(make(head), **MIXER)
    student.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    options = {"return_attention_mask": True} if extractor.return_attention_mask else {}
    inputs = extractor(SPEECH, sampling_rate=16000, return_tensors="pt", **options)
    scores = output_of(student, inputs).softmax(-1)[0]
    found = pipeline("audio-classification", model=str(tmp_path), device="cpu")(SPEECH)
    assert {entry["label"]: entry["score"] for entry in found} == {
        student.config.id2label[i]: pytest.approx(float(score), abs=1e-6) for i, score in enumerate(scores)
    }
