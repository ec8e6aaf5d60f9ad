"""What `linconv.inspect` says of a model that is converted already."""

import dataclasses
import warnings

import pytest
import transformers
from transformers import BertConfig, GPTNeoXConfig, Wav2Vec2ForCTC, WhisperForConditionalGeneration, WhisperModel

import linconv
from linconv import mixers
from linconv.conversion import encoder_layers
from linconv.conversion.families import of

from .conftest import MIXER, make

OPTIONS = {"linformer": dict(r=8, max_length=500), "mamba": dict(d_state=8)}
LENGTHS = (10, 1000)
TEXT = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, vocab_size=40)


def counted(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def check(teacher, mixer, layers, options):
    """A converted model tells what its teacher told before, and what it has: nothing of it is converted again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of causal mixers
        student = linconv.convert(teacher, mixer, layers, **options)
        before = linconv.inspect(teacher, mixer, layers, LENGTHS, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = linconv.inspect(student, lengths=LENGTHS)
    assert found == dataclasses.replace(before, model=type(student).__name__, converted=True)
    assert (found.parameters, found.parameters_after) == (counted(teacher), counted(student))
    own = [module for module in student.modules() if isinstance(module, mixers.Mixer)]
    assert len(own) == len(found.layers) == len(student.config.linconv["layers"]) and own
    for length in LENGTHS:
        assert found.flops[length][1] == sum(mixer.flops(length) for mixer in own)
    assert found.options.items() >= options.items()
    return student, found


@pytest.mark.parametrize("layers", [None, [0, -1], [1]], ids=["all", "hybrid", "one"])
def test_every_head_tells_what_it_is(head, layers):
    check(make(head), "hydra", layers, MIXER)


@pytest.mark.parametrize("layers", [None, [0, 2]], ids=["all", "hybrid"])
@pytest.mark.parametrize("mixer", mixers.names())
def test_every_mixer_tells_what_it_is_loaded_from_a_folder_too(mixer, layers, tmp_path):
    teacher = make(Wav2Vec2ForCTC)
    student, found = check(teacher, mixer, layers, OPTIONS.get(mixer, MIXER))
    student.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCTC.from_pretrained(tmp_path)
    assert linconv.inspect(loaded, lengths=LENGTHS) == found
    text = str(found)
    where = "3 of 3 blocks, width 32" if layers is None else "2 of 3 blocks (0, 2), width 32"
    assert "LinconvWav2Vec2ForCTC (wav2vec2): converted already, nothing would be swapped" in text
    name = type(encoder_layers(student)[0].attention.mixer).__name__
    assert f"{name} in {where}, where Wav2Vec2Attention was" in text
    assert f"parameters {counted(student):,}, of the original {counted(teacher):,} (" in text and "->" not in text


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"])
@pytest.mark.parametrize("sharing", ["none", "layerwise"])
def test_text_models_tell_what_they_are(auto, sharing):
    teacher = getattr(transformers, auto).from_config(BertConfig(**TEXT))
    found = check(teacher, "linformer", [0, 2], dict(r=8, sharing=sharing))[1]
    # What the mixer took of the model's config.
    assert (found.options["num_heads"], found.options["max_length"], found.unit) == (2, 512, "tokens")
    assert "r 8" in str(found) and "num_heads 2" in str(found) and "None" not in str(found)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModelForTokenClassification"])
def test_decoders_tell_what_they_are(auto, mixer):
    teacher = getattr(transformers, auto).from_config(GPTNeoXConfig(**TEXT))
    check(teacher, mixer, [1], OPTIONS.get(mixer, MIXER))


def test_a_new_head_on_a_causal_student_is_told_of_too(tmp_path):
    """`convert` refuses it, for its head reads the first token; here it is there already."""
    with pytest.warns(UserWarning, match="sees the past only"):
        student = linconv.convert(transformers.BertModel(BertConfig(**TEXT)), "mamba2", **MIXER)
    student.save_pretrained(tmp_path)
    headed = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    found = linconv.inspect(headed)
    assert found.converted and found.model == "LinconvBertForSequenceClassification"
    assert found.parameters_after == counted(headed)


def test_a_model_without_a_converted_layer_is_one_to_be_converted():
    student = linconv.convert(make(WhisperForConditionalGeneration), layers=[])
    found = linconv.inspect(student, layers=[0], **MIXER)
    assert not found.converted and found.layers == (0,) and "->" in str(found)


@pytest.mark.parametrize(
    "given, named", [({"mixer": "hydra"}, "mixer"), ({"layers": []}, "layers"), ({"d_state": 8}, "d_state")]
)
def test_what_would_be_swapped_is_not_asked_of_a_converted_model(given, named):
    student = linconv.convert(make(Wav2Vec2ForCTC), **MIXER)
    with pytest.raises(TypeError, match=f"LinconvWav2Vec2ForCTC, converted already, .* and got {named}; wanted no mix"):
        linconv.inspect(student, **given)


def test_parts_of_a_converted_model_are_refused():
    student = linconv.convert(make(WhisperModel), **MIXER)
    with pytest.raises(TypeError, match="teacher is a WhisperEncoder, wanted one of WhisperModel"):
        linconv.inspect(student.encoder)
    assert of(student).model_type == "whisper" and linconv.inspect(student).converted


@pytest.mark.parametrize("length", [0, -5, 2.5, True])
def test_lengths_are_counts_of_frames(length):
    with pytest.raises(ValueError, match=f"lengths has {length}, wanted whole numbers from 1 up"):
        linconv.inspect(make(Wav2Vec2ForCTC), lengths=[250, length])


def test_lengths_are_several():
    teacher = make(Wav2Vec2ForCTC)
    with pytest.raises(TypeError, match="lengths is 250, wanted whole numbers from 1 up"):
        linconv.inspect(teacher, lengths=250)
    assert list(linconv.inspect(teacher, lengths=(n for n in (250, 500)), headdim=16).flops) == [250, 500]
