"""Saving, loading and refusing: every converted checkpoint through transformers' own doors."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2ConformerForCTC, Wav2Vec2ForCTC, WhisperForAudioClassification

import linconv
from linconv.conversion.families import of

from . import test_text as text
from .conftest import MIXER, inputs_for, make, output_of


def auto_class(head_class):
    return {name: getattr(transformers, auto) for auto, name in of(make(head_class)).heads.items()}[head_class.__name__]


@pytest.mark.parametrize("layers", [None, [1], []], ids=["all", "hybrid", "none"])
def test_round_trip_is_bit_exact(head, layers, tmp_path):
    student = linconv.convert(make(head), layers=layers, mixer="hydra", **MIXER)
    student.save_pretrained(tmp_path)
    weights = [name for name in os.listdir(tmp_path) if name.endswith((".bin", ".safetensors", ".pt"))]
    assert weights == ["model.safetensors"]
    loaded = auto_class(head).from_pretrained(tmp_path)
    assert type(loaded) is type(student) and loaded.config.linconv == student.config.linconv
    assert loaded.state_dict().keys() == student.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name]), name
    inputs = inputs_for(head)
    assert torch.equal(output_of(loaded, inputs), output_of(student, inputs))


FRESH = """
import json, os, sys
import torch
{imports}
import transformers
for folder, auto in json.loads(sys.argv[1]).items():
    kept = torch.load(os.path.join(folder, "kept.pt"))
    model = getattr(transformers, auto).from_pretrained(folder{arguments})
    with torch.no_grad():
        assert torch.equal(model(**kept["inputs"]).logits, kept["logits"]), folder
    model.save_pretrained(os.path.join(folder, "again"))
    print(type(model).__name__)
"""


@pytest.mark.parametrize(
    "imports, arguments", [("import linconv.auto", ""), ("", ", trust_remote_code=True")], ids=["auto", "remote-code"]
)
def test_fresh_process(imports, arguments, tmp_path):
    students = [
        (linconv.convert(make(head), layers=layers, **MIXER), inputs_for(head), auto)
        for head, auto, layers in (
            (Wav2Vec2ForCTC, "AutoModelForCTC", None),
            (Wav2Vec2ConformerForCTC, "AutoModelForCTC", [0]),
            (WhisperForAudioClassification, "AutoModelForAudioClassification", [0]),
        )
    ]
    # One projection for all layers.
    roberta = linconv.convert(text.make("roberta"), sharing="layerwise", **text.LINFORMER)
    students.append((roberta, text.inputs_for(), "AutoModelForSequenceClassification"))
    folders = {}
    for student, inputs, auto in students:
        folder = tmp_path / type(student).__name__
        student.save_pretrained(folder)
        torch.save({"inputs": inputs, "logits": output_of(student, inputs)}, folder / "kept.pt")
        folders[str(folder)] = auto
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", FRESH.format(imports=imports, arguments=arguments), json.dumps(folders)],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "LinconvWav2Vec2ForCTC", "LinconvWav2Vec2ConformerForCTC", "LinconvWhisperForAudioClassification",
        "LinconvRobertaForSequenceClassification",
    ]  # fmt: skip
    for folder in folders:  # a checkpoint of a loaded model is as good as the first
        assert {"auto.py", "config.json", "model.safetensors"} <= set(os.listdir(f"{folder}/again"))
        first, again = (Path(path, "config.json").read_text() for path in (folder, f"{folder}/again"))
        assert json.loads(first) == json.loads(again)


@pytest.fixture
def checkpoint(tmp_path):
    linconv.convert(make(Wav2Vec2ForCTC), layers=[0, 2], **MIXER).save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def change_config(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["A_log", "in_proj.weight"])
def test_a_checkpoint_without_its_mixer_weights_is_refused(checkpoint, name):
    key = f"wav2vec2.encoder.layers.2.attention.mixer.{name}"
    change_weights(checkpoint, lambda weights: weights.pop(key))
    for auto in (transformers.AutoModelForCTC, transformers.AutoModel):
        with pytest.raises(ValueError, match=rf"lacks 1 weights of its mixers, the first of them .*{name}"):
            auto.from_pretrained(checkpoint)


def test_mixer_weights_of_another_size_are_refused(checkpoint):
    def change(config):
        config["linconv"]["options"]["d_state"] = 16

    change_config(checkpoint, change)
    with pytest.raises(ValueError, match="weights of its mixers"):
        transformers.AutoModelForCTC.from_pretrained(checkpoint, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("layers", [[0], []])
def test_mixer_weights_of_a_layer_that_the_config_does_not_convert_are_refused(checkpoint, layers):
    """Attention with random weights would stand there."""
    change_config(checkpoint, set_block(layers=layers))
    for auto in (transformers.AutoModelForCTC, transformers.AutoModelForAudioClassification):
        with pytest.raises(ValueError, match="weights of mixers that are not in its config, the first of them .*mixer"):
            auto.from_pretrained(checkpoint)


def test_mixer_weights_that_the_options_do_not_have_are_refused(tmp_path):
    student = linconv.convert(make(Wav2Vec2ForCTC), mixer="linformer", r=8, max_length=500)
    student.save_pretrained(tmp_path)
    change_config(tmp_path, lambda config: config["linconv"]["options"].update(sharing="key_value"))
    with pytest.raises(ValueError, match="has 3 weights of mixers that are not in its config, .*proj_v"):
        transformers.AutoModelForCTC.from_pretrained(tmp_path)


def test_the_teachers_checkpoint_is_not_a_converted_one(tmp_path):
    make(Wav2Vec2ForCTC).save_pretrained(tmp_path)
    from linconv.auto import LinconvWav2Vec2ForCTC

    with pytest.raises(ValueError, match="no 'linconv' block"):
        LinconvWav2Vec2ForCTC.from_pretrained(tmp_path)


def set_block(**changes):
    return lambda config: config["linconv"].update(changes)


@pytest.mark.parametrize(
    "change, match",
    [
        (set_block(version=2), "version 2, wanted 1: update linconv"),
        (set_block(mixer="bimamba3"), "mixer is 'bimamba3'.*did you mean 'bimamba2'"),
        (set_block(layer=[1]), "wanted .*'layers'"),
        (set_block(layers=[7]), "block has layer 7, wanted 0 to 2: the model has 3 blocks"),
        (set_block(layers=[-1]), "block has layer -1, wanted 0 to 2"),
        (set_block(layers=1), "block has layers 1, wanted a list of indices"),
        (set_block(layers=["0"]), r"block has layers \['0'\], wanted a list of indices"),
        (set_block(options={"d_state": 300}), "d_state is 300, wanted 1 to 256"),
        (set_block(options=None), "block has options None, wanted a mapping"),
        (set_block(options=["d_state"]), r"block has options \['d_state'\], wanted a mapping"),
        (lambda config: config.pop("linconv"), "no 'linconv' block"),
    ],
)
def test_a_block_that_cannot_be_read_is_refused(checkpoint, change, match):
    change_config(checkpoint, change)
    with pytest.raises(ValueError, match=match):
        transformers.AutoModelForCTC.from_pretrained(checkpoint)


def test_pickled_weights_are_refused(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    torch.save(weights, checkpoint / "pytorch_model.bin")
    os.remove(checkpoint / "model.safetensors")
    for arguments in ({}, dict(use_safetensors=None)):
        with pytest.raises(OSError, match="model.safetensors"):
            transformers.AutoModelForCTC.from_pretrained(checkpoint, **arguments)
    with pytest.raises(ValueError, match="use_safetensors is False, wanted True"):
        transformers.AutoModelForCTC.from_pretrained(checkpoint, use_safetensors=False)


def test_another_head_on_a_converted_backbone(checkpoint):
    """Only the head is new: the mixers, bare parameters too, are the checkpoint's."""
    weights = load_file(checkpoint / "model.safetensors")
    model, info = transformers.AutoModelForAudioClassification.from_pretrained(
        checkpoint, num_labels=7, output_loading_info=True
    )
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"projector", "classifier"}
    assert model.classifier.out_features == 7
    for name, tensor in model.state_dict().items():
        if name.startswith("wav2vec2."):
            assert torch.equal(tensor, weights[name]), name
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementation_at_loading(checkpoint, implementation):
    model = transformers.AutoModelForCTC.from_pretrained(checkpoint, attn_implementation=implementation)
    assert model.config._attn_implementation == f"linconv_{implementation}"
    assert model.wav2vec2.encoder.layers[1].attention.config is model.config
    output_of(model, inputs_for(Wav2Vec2ForCTC, lengths=[1000, 700]))


def test_low_precision_at_loading(checkpoint):
    model = transformers.AutoModelForCTC.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert output_of(model, {"input_values": torch.randn(1, 500).bfloat16()}).isfinite().all()


def test_a_converted_model_can_be_pickled():
    student = linconv.convert(make(WhisperForAudioClassification), **MIXER)
    inputs = inputs_for(WhisperForAudioClassification)
    assert torch.equal(output_of(pickle.loads(pickle.dumps(student)), inputs), output_of(student, inputs))
