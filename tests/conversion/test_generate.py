"""Generation with a mask: a padded clip gives what it gives alone, whatever `generate` does with the features."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor, WhisperForAudioClassification, WhisperForConditionalGeneration

import linconv
from linconv.conversion import frame_lengths

from .conftest import MIXER, inputs_for, make

OPTIONS = dict(max_new_tokens=6, no_repeat_ngram_size=1)  # else a random model says its first token again
TIMESTAMPS = dict(max_new_tokens=3, no_repeat_ngram_size=1, return_timestamps=True)
ALL_OR_NONE = pytest.mark.parametrize("layers", [None, []], ids=["all", "none"])


def student_of(layers, implementation="sdpa", **generation):
    student = linconv.convert(make(WhisperForConditionalGeneration, implementation), layers=layers, **MIXER)
    for name, value in generation.items():
        setattr(student.generation_config, name, value)
    return student


def clips(*lengths):
    """Features with NaN in the padding, and their mask."""
    features = torch.randn(len(lengths), 8, max(lengths))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return features.masked_fill(mask[:, None] == 0, torch.nan), mask


def alone(student, features, length, **options):
    """What the clip gives whose features go through the encoder as they are: not padded, without a mask."""
    with torch.no_grad():
        encoded = student.model.encoder(features[None, :, :length])
    return student.generate(encoder_outputs=encoded, **options)[0]


@ALL_OR_NONE
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, dict(num_beams=2), dict(use_cache=False)], ids=["greedy", "beams", "uncached"])
def test_short_clips(layers, implementation, options):
    student = student_of(layers, implementation)
    features, mask = clips(401, 133)
    tokens = student.generate(features, attention_mask=mask, **OPTIONS, **options)
    for row, length in enumerate((401, 133)):
        wanted = alone(student, features[row], length, **OPTIONS, **options)
        assert len(wanted.unique()) > 3 and torch.equal(tokens[row, : len(wanted)], wanted)
    assert not torch.equal(tokens, student.generate(features.nan_to_num(0), **OPTIONS, **options))


def test_a_mask_over_everything_gives_what_the_stock_model_gives():
    teacher = make(WhisperForConditionalGeneration)
    teacher.generation_config.no_timestamps_token_id = 50
    student = linconv.convert(teacher, layers=[])
    for length, options in ((3000, OPTIONS), (6000, TIMESTAMPS)):
        features, mask = clips(length, length)
        wanted = teacher.generate(features, attention_mask=mask, **options)
        assert torch.equal(student.generate(features, attention_mask=mask, **options), wanted)
        assert torch.equal(student.generate(features, attention_mask=mask.bool(), **options), wanted)


def test_what_the_feature_extractor_gives():
    speech = [np.random.default_rng(0).standard_normal(n).astype(np.float32) for n in (16123, 9000)]
    inputs = WhisperFeatureExtractor(feature_size=8)(
        speech, sampling_rate=16000, padding="longest", return_attention_mask=True, return_tensors="pt"
    )
    assert inputs["input_features"].shape[-1] == 100
    student = student_of(None)
    tokens = student.generate(**inputs, **OPTIONS)
    for row, length in enumerate(inputs["attention_mask"].sum(-1)):
        assert torch.equal(tokens[row], alone(student, inputs["input_features"][row], length, **OPTIONS))


@ALL_OR_NONE
@pytest.mark.parametrize("lengths", [(7000, 3500), (4000,)], ids=["batch", "one"])
def test_long_clips(layers, lengths):
    """Segment by segment; a clip ends where its mask ends, one that is alone in the batch too."""
    student = student_of(layers, no_timestamps_token_id=50)
    features, mask = clips(*lengths, 7000)
    features, mask = features[: len(lengths)], mask[: len(lengths)]
    tokens = student.generate(features, attention_mask=mask, **TIMESTAMPS)
    for row, length in enumerate(lengths):
        segments = features[row, :, :length].split(3000, dim=-1)
        wanted = torch.cat([alone(student, segment, segment.shape[-1], **TIMESTAMPS) for segment in segments])
        assert torch.equal(tokens[row, : len(wanted)], wanted)
        assert torch.all(tokens[row, len(wanted) :] == student.generation_config.pad_token_id)


def test_a_row_that_is_decoded_again_keeps_its_mask():
    student = student_of(None)
    features, mask = clips(401, 133)
    wanted = student.generate(features, attention_mask=mask, **OPTIONS)
    batches = []
    student.model.encoder.register_forward_hook(lambda module, args, output: batches.append(len(output[0])))
    student._need_fallback = lambda sequence, outputs, row, *_: (row == 1, False)
    assert torch.equal(student.generate(features, attention_mask=mask, temperature=(0.0, 0.0), **OPTIONS), wanted)
    assert batches == [2, 1]


def test_several_sequences_a_clip():
    student = student_of(None)
    features, mask = clips(401, 133)
    tokens = student.generate(features, attention_mask=mask, num_beams=2, num_return_sequences=2, **OPTIONS)
    wanted = student.generate(features, attention_mask=mask, num_beams=2, **OPTIONS)
    assert torch.equal(tokens, wanted.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("detected", ["language", "speech"])
def test_what_is_detected_before_decoding_is_without_the_padding(detected):
    if detected == "language":
        generation = dict(lang_to_id={f"<|{i}|>": i for i in range(3, 40)}, task_to_id={"transcribe": 45})
        options = OPTIONS
    else:
        generation = dict(lang_to_id={"<|en|>": 3}, task_to_id={"transcribe": 45})
        options = OPTIONS | dict(no_speech_threshold=0.6, logprob_threshold=-1.0, temperature=0.0, language="en")
    student = student_of(None, no_timestamps_token_id=50, is_multilingual=True, **generation)
    logits = []
    student.register_forward_hook(lambda module, args, output: logits.append(output.logits))
    features, mask = clips(401, 133)
    student.generate(features, attention_mask=mask, **options)
    padded, logits[:] = list(logits), []
    student.generate(features[1:, :, :133], attention_mask=mask[1:, :133], **options)
    for both, single in zip(padded, logits, strict=True):
        torch.testing.assert_close(both[1:], single, rtol=1e-4, atol=1e-5)
    seen = []
    student.model.encoder.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    student.generate(features, attention_mask=mask, **options)
    assert len(seen) == 2  # what detects encodes for itself


@ALL_OR_NONE
def test_timestamps_of_tokens(layers):
    """For them `generate` takes the model to eager attention, whose masks are other ones."""
    student = student_of(layers, no_timestamps_token_id=50, alignment_heads=[[0, 0], [0, 1]])
    features, mask = clips(401, 133)
    found = student.generate(features, attention_mask=mask, return_token_timestamps=True, **TIMESTAMPS)
    assert student.config._attn_implementation == "linconv_eager"
    for row, length in enumerate((401, 133)):
        single = student.generate(
            features[row : row + 1, :, :length],
            attention_mask=mask[row : row + 1, :length],
            return_token_timestamps=True,
            **TIMESTAMPS,
        )
        assert torch.equal(found["sequences"][row, : single["sequences"].shape[1]], single["sequences"][0])
        assert 0 < found["token_timestamps"][row].max() <= length / 100


def test_a_clip_without_a_frame_has_its_row():
    student = student_of(None)
    features, mask = clips(401, 0)
    found = student.generate(features, attention_mask=mask, return_dict_in_generate=True, **OPTIONS)
    assert found.sequences.shape[0] == 2


def test_masks_that_do_not_fit_are_refused():
    student = student_of(None)
    features, mask = clips(401, 133)
    for given in (mask[:, 1:], mask[:1]):
        with pytest.raises(ValueError, match=rf"attention_mask has shape \({len(given)}, .*, wanted \(2, 401\)"):
            student.generate(features, attention_mask=given, **OPTIONS)
    with pytest.raises(ValueError, match="padding on the right"):
        student.generate(features, attention_mask=mask.flip(1), **OPTIONS)


@pytest.mark.parametrize("length", [400, 399])
@pytest.mark.parametrize("head", [WhisperForConditionalGeneration, WhisperForAudioClassification])
def test_given_encoder_outputs_take_a_mask_over_their_frames_too(head, length):
    student = linconv.convert(make(head), **MIXER)
    inputs = inputs_for(head, length=length, lengths=[length, 301])
    features, mask = inputs.pop("input_features"), inputs.pop("attention_mask")
    with torch.no_grad():
        wanted = student(input_features=features, attention_mask=mask, **inputs).logits
        encoded = student.get_encoder()(features, attention_mask=mask)
        frames = torch.arange(200) < frame_lengths(student, mask)[:, None]
        for given in (mask, frames, frames.long()):
            got = student(encoder_outputs=encoded, attention_mask=given, **inputs).logits
            assert torch.equal(got, wanted)
        assert not torch.equal(student(encoder_outputs=encoded, **inputs).logits, wanted)
        for given in (mask[:, :100], mask[:1]):
            shapes = rf"shape \({len(given)}, .*, wanted \(2, 400\) as input_features or \(2, 200\) as"
            with pytest.raises(ValueError, match=f"attention_mask has {shapes}"):
                student(encoder_outputs=encoded, attention_mask=given, **inputs)


def test_generation_from_encoder_outputs_takes_a_mask_over_their_frames_too():
    student = student_of(None)
    features, mask = clips(401, 133)
    with torch.no_grad():
        encoded = student.model.encoder(features, attention_mask=mask)
    wanted = student.generate(features, attention_mask=mask, **OPTIONS)
    for given in (mask, mask[:, ::2]):
        assert torch.equal(student.generate(encoder_outputs=encoded, attention_mask=given, **OPTIONS), wanted)
    assert not torch.equal(student.generate(encoder_outputs=encoded, **OPTIONS), wanted)
