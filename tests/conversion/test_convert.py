"""What convert() promises, for every head class."""

import copy
import dataclasses

import accelerate
import numpy as np
import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2Model,
    HubertForCTC,
    Wav2Vec2ConformerForCTC,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2ForXVector,
    WavLMForCTC,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperModel,
)

import linconv
from linconv import mixers
from linconv.conversion import ConvertedModel, encoder_layers, families, frame_lengths
from linconv.distillation.hooks import LayerStates

from .conftest import CONFORMER, HUBERT, MIXER, WAV2VEC2, WAVLM, WHISPER, ByPosition, inputs_for, make, output_of


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("implementation, none", [("sdpa", "none"), ("eager", [])])
def test_no_layer_converted_is_the_teacher(head, implementation, none):
    teacher = make(head, implementation)
    student = linconv.convert(teacher, layers=none)
    masked = head not in (*WHISPER, *CONFORMER)  # with padding the stock ones are not what a converted one is
    inputs = inputs_for(head, length=3000 if head in WHISPER else 1000, lengths=[1000, 700] if masked else None)
    assert torch.equal(output_of(student, inputs), output_of(teacher, inputs))


@pytest.mark.parametrize("stable", [True, False])
def test_no_layer_converted_is_the_teacher_in_both_forms_of_wav2vec2(stable):
    teacher = make(Wav2Vec2ForCTC, stable=stable)
    inputs = inputs_for(Wav2Vec2ForCTC, lengths=[1000, 700])
    assert torch.equal(output_of(linconv.convert(teacher, layers=[]), inputs), output_of(teacher, inputs))


def test_conversion_swaps_attention_and_nothing_else(head):
    teacher = make(head)
    before, config = state(teacher), copy.deepcopy(teacher.config.to_dict())
    student = linconv.convert(teacher, layers=[0, -1], **MIXER)

    assert type(teacher) is head and teacher.config.to_dict() == config
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(before[name], tensor), name

    assert isinstance(student, head) and isinstance(student, ConvertedModel)
    assert student.config.model_type == f"linconv-{teacher.config.model_type}"
    assert student.config.linconv == {"version": 1, "mixer": "bimamba2", "layers": [0, 2], "options": MIXER}
    swapped = {name for name in before if name not in student.state_dict()}
    assert swapped and all(".0." in name or ".2." in name for name in swapped)
    for name in before.keys() - swapped:
        assert torch.equal(before[name], student.state_dict()[name]), name
    mixers_in = [m for m in student.modules() if isinstance(m, mixers.Mixer)]
    assert [type(m) for m in mixers_in] == [mixers.BiMamba2] * 2
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    for module in student.modules():
        assert getattr(module, "config", student.config) is student.config


@pytest.mark.filterwarnings("ignore:mixer is .*, which sees the past only")
@pytest.mark.parametrize("mixer", mixers.names())
def test_every_mixer_in_every_layer_trains(head, mixer):
    options = {"linformer": dict(r=8, max_length=500), "mamba": dict(d_state=8)}.get(mixer, MIXER)
    student = linconv.convert(make(head), mixer=mixer, **options).train()
    inputs = inputs_for(head, lengths=[400, 301] if head in WHISPER else [1000, 700])
    outputs = student(**inputs)
    next(v for v in outputs.values() if torch.is_tensor(v) and v.requires_grad).float().square().sum().backward()
    for name, parameter in student.named_parameters():
        if ".mixer." in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_teacher_with_no_layer_converted_converts_like_a_stock_one(head):
    teacher = make(head)
    students = []
    for source in (teacher, linconv.convert(teacher, layers=[])):
        torch.manual_seed(1)
        students.append(linconv.convert(source, layers=[0], **MIXER))
    assert type(students[0]) is type(students[1])
    assert students[0].config.to_dict() == students[1].config.to_dict()
    inputs = inputs_for(head)
    assert torch.equal(output_of(students[0], inputs), output_of(students[1], inputs))
    assert (
        linconv.inspect(teacher, **MIXER).flops == linconv.inspect(linconv.convert(teacher, layers=[]), **MIXER).flops
    )


def test_training_mode_dtype_and_frozen_parts_are_kept():
    teacher = make(Wav2Vec2ForCTC).to(torch.bfloat16)
    teacher.freeze_feature_encoder()
    student = linconv.convert(teacher, **MIXER)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert not any(m.training for m in student.modules())
    assert all(m.training for m in linconv.convert(teacher.train(), **MIXER).modules())
    frozen = {name for name, p in teacher.named_parameters() if not p.requires_grad}
    assert {name for name, p in student.named_parameters() if not p.requires_grad} == frozen


@pytest.mark.parametrize(
    "changes, before, after",
    [
        (
            dict(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, conv_bias=True,
                feat_extract_norm="layer", do_stable_layer_norm=True,
            ),
            315_471_520, 379_432_864,
        ),
        ({}, 94_396_320, 113_597_184),
    ],
    ids=["large-lv60", "base"],
)  # fmt: skip
def test_parameter_counts_of_the_published_sizes(changes, before, after):
    from transformers import Wav2Vec2Config

    with torch.device("meta"):
        teacher = Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=32, **changes))
        student = linconv.convert(teacher)
    found = linconv.inspect(teacher)
    assert sum(p.numel() for p in teacher.parameters()) == found.parameters == before
    assert sum(p.numel() for p in student.parameters()) == found.parameters_after == after


def alone(inputs, row, length):
    """One clip of a padded batch, without its padding and without a mask."""
    signal = next(iter(inputs))
    single = {name: value[row : row + 1] for name, value in inputs.items() if name != "attention_mask"}
    single[signal] = single[signal][..., :length]
    return single


@pytest.mark.parametrize("layers", [None, [1], []], ids=["all", "hybrid", "none"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_padded_clip_is_what_it_is_alone(head, layers, implementation):
    student = linconv.convert(make(head, implementation), layers=layers, **MIXER)
    lengths = [400, 301, 7] if head in WHISPER else [1000, 701, 95]
    inputs = inputs_for(head, batch=3, lengths=lengths)
    if head in WHISPER:  # whatever stands in the padding
        inputs["input_features"].masked_fill_(inputs["attention_mask"][:, None] == 0, torch.nan)
    padded = output_of(student, inputs)
    frames = frame_lengths(student, inputs["attention_mask"])
    for row, length in enumerate(lengths):
        single = output_of(student, alone(inputs, row, length))[0]
        got = padded[row]
        if single.dim() == 2 and "decoder_input_ids" not in inputs:  # one output a frame
            assert single.shape[0] == frames[row]
            got = got[: frames[row]]
        torch.testing.assert_close(got, single, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "model_class",
    [Wav2Vec2ForCTC, Wav2Vec2ConformerForCTC, WhisperForAudioClassification, WhisperForConditionalGeneration],
)
def test_a_padded_batch_compiles_to_one_graph(model_class):
    student = linconv.convert(make(model_class), **MIXER)
    inputs = inputs_for(model_class, lengths=[400, 300] if model_class in WHISPER else [1000, 700])
    torch._dynamo.reset()
    compiled = output_of(torch.compile(student, fullgraph=True, backend="eager"), inputs)
    torch.testing.assert_close(compiled, output_of(student, inputs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace. is deprecated")
@pytest.mark.parametrize("model_class", [Wav2Vec2ForCTC, Wav2Vec2ConformerForCTC, *WHISPER])
def test_a_traced_model_heeds_other_masks_than_that_it_was_traced_with(model_class):
    student = linconv.convert(make(model_class), **MIXER)
    padded = inputs_for(model_class, lengths=[400, 300] if model_class in WHISPER else [1000, 700])
    whole = padded | {"attention_mask": torch.ones_like(padded["attention_mask"])}
    run = ByPosition(student, list(padded))
    traced = torch.jit.trace(run, tuple(whole.values()), check_trace=False)
    wanted = run(*padded.values())
    torch.testing.assert_close(traced(*padded.values()), wanted)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # whose tensors have no values to go by
        assert run(*map(mode.from_tensor, padded.values())).shape == wanted.shape


def test_group_norm_in_the_front_end_sees_padding():
    """As docs/conversion.md says: nothing behind the front end can undo it."""
    student = linconv.convert(make(Wav2Vec2ForCTC, stable=False), **MIXER)
    inputs = inputs_for(Wav2Vec2ForCTC, lengths=[1000, 700])
    single = output_of(student, alone(inputs, 1, 700))[0]
    assert (output_of(student, inputs)[1, : len(single)] - single).abs().max() > 1e-3


def test_the_stock_conformer_lets_its_convolutions_see_padding():
    """With no layer converted its masks are mended: clips are what they are alone, those of the stock model."""
    teacher = make(Wav2Vec2ConformerForCTC)
    student = linconv.convert(teacher, layers=[])
    inputs = inputs_for(Wav2Vec2ConformerForCTC, lengths=[1000, 700])
    single = output_of(teacher, alone(inputs, 1, 700))[0]
    of_teacher, of_student = (output_of(model, inputs)[1, : len(single)] for model in (teacher, student))
    assert (of_teacher - single).abs().max() > 1e-3
    torch.testing.assert_close(of_student, single, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layers", [None, []], ids=["all", "none"])
def test_batch_norm_in_training_counts_no_padding(layers):
    student = without_drawing(linconv.convert(make(Wav2Vec2ConformerForCTC), layers=layers, **MIXER))
    inputs = inputs_for(Wav2Vec2ConformerForCTC, lengths=[1000, 700])
    wider = {name: torch.nn.functional.pad(value, (0, 500)) for name, value in inputs.items()}
    frames = frame_lengths(student, inputs["attention_mask"])
    found = []
    for batch in (inputs, wider):
        model = copy.deepcopy(student).train()
        logits = model(**batch).logits
        valid = torch.cat([row[:n] for row, n in zip(logits, frames)])
        valid.square().mean().backward()
        statistics = [b for name, b in model.named_buffers() if "running" in name]
        found.append((valid, *statistics, *(p.grad for p in model.parameters() if p.grad is not None)))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    before = [b for name, b in student.named_buffers() if "running" in name]
    assert len(before) == 2 * 3 and not any(map(torch.equal, before, statistics))


@pytest.mark.parametrize("positions", ["relative", "rotary", None])
@pytest.mark.parametrize("layers", [None, [0, 2], []], ids=["all", "hybrid", "none"])
def test_positions_of_the_conformer(positions, layers, tmp_path):
    """They are made for the attention that is left, and not at all where none is."""
    teacher = make(Wav2Vec2ConformerForCTC, position_embeddings_type=positions)
    student = linconv.convert(teacher, layers=layers, **MIXER)
    inputs = inputs_for(Wav2Vec2ConformerForCTC, lengths=[1000, 700])
    if layers == []:
        whole = {"input_values": inputs["input_values"]}
        assert torch.equal(output_of(student, whole), output_of(teacher, whole))
    padded, single = output_of(student, inputs)[1], output_of(student, alone(inputs, 1, 700))[0]
    torch.testing.assert_close(padded[: len(single)], single, rtol=1e-4, atol=2e-5)
    student.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCTC.from_pretrained(tmp_path)
    assert torch.equal(output_of(loaded, inputs), output_of(student, inputs))
    for model in (student, loaded):
        assert (model.wav2vec2_conformer.encoder.embed_positions is None) == (positions is None or layers is None)
    assert (teacher.wav2vec2_conformer.encoder.embed_positions is None) == (positions is None)


@pytest.mark.parametrize("model_class", [Wav2Vec2ForCTC, WhisperForAudioClassification])
def test_frame_lengths_are_what_the_blocks_see(model_class):
    teacher = make(model_class)
    for model in (linconv.convert(teacher, layers=[]), linconv.convert(teacher, **MIXER)):
        for length in (95, 96, 97, 301):
            inputs = inputs_for(model_class, batch=1, length=length, lengths=[length])
            with LayerStates(encoder_layers(model)) as states:
                output_of(model, inputs)
            assert frame_lengths(model, inputs["attention_mask"]).tolist() == [states.after[0].shape[1]]
            assert frame_lengths(teacher, inputs["attention_mask"]).dtype == torch.int64


def test_blocks_of_teacher_and_student_line_up(head):
    teacher = make(head)
    for model in (teacher, linconv.convert(teacher, layers=[1], **MIXER)):
        assert len(encoder_layers(model)) == 3
    assert encoder_layers(teacher)[2] is teacher.base_model.encoder.layers[2]


@pytest.mark.parametrize("stable", [True, False])
def test_blocks_are_caught_before_the_final_norm(stable):
    """With stable layer norm the last block's output is not the encoder's: one norm, of its own weights, is between."""
    teacher = make(Wav2Vec2ForCTC, stable=stable)
    inputs = inputs_for(Wav2Vec2ForCTC)
    for model in (teacher, linconv.convert(teacher, layers=[1], **MIXER)):
        with LayerStates(encoder_layers(model)) as states, torch.no_grad():
            last = model.wav2vec2(**inputs).last_hidden_state
        after = states.after[-1]
        assert torch.equal(after, last) != stable
        assert torch.equal(model.wav2vec2.encoder.layer_norm(after) if stable else after, last)


class LargestTensor(TorchDispatchMode):
    """The largest tensor any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "model_class",
    [Wav2Vec2ForCTC, HubertForCTC, WavLMForCTC, Wav2Vec2ConformerForCTC, WhisperForAudioClassification],
)
def test_nothing_grows_with_the_square_of_the_length(model_class, masked):
    def largest(model, frames):
        length = 2 * frames if model_class in WHISPER else 10 * frames + 20
        inputs = inputs_for(model_class, length=length, lengths=[length, length // 2] if masked else None)
        with LargestTensor() as mode:
            output_of(model, inputs)
        return mode.numel

    changes = dict(max_source_positions=3000) if model_class in WHISPER else {}
    teacher = make(model_class, **changes)
    student = linconv.convert(teacher, **MIXER)
    assert largest(student, 3000) <= 2.1 * largest(student, 1500)
    if masked and model_class not in WHISPER:  # the measure does see a mask of L x L where there is one
        assert largest(teacher, 3000) > 3 * largest(teacher, 1500)
    # The mask of the layers that were left in place does not grow so either; WavLM's attention has a bias that does,
    # and the conformer's.
    if masked and model_class is not WavLMForCTC:
        hybrid = linconv.convert(teacher, layers=[0], **MIXER)
        masks = []
        attention = encoder_layers(hybrid)[1].get_submodule(families.of(hybrid).attention)
        attention.register_forward_pre_hook(
            lambda m, args, kwargs: masks.append(kwargs["attention_mask"].shape), with_kwargs=True
        )
        if model_class is Wav2Vec2ConformerForCTC:
            largest(hybrid, 100)
        else:
            assert largest(hybrid, 3000) <= 2.1 * largest(hybrid, 1500)
        assert len(masks[0]) == 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_left_in_place_gives_what_the_stock_masks_give(implementation):
    teacher = make(Wav2Vec2ForCTC, implementation)
    student = linconv.convert(teacher, layers=[], **MIXER)
    inputs = inputs_for(Wav2Vec2ForCTC, lengths=[1000, 700])
    states = [model(**inputs, output_hidden_states=True).hidden_states for model in (teacher, student)]
    assert len(states[0]) == len(states[1]) == 4
    for teacher_state, student_state in zip(*states):
        assert torch.equal(teacher_state, student_state)


@pytest.mark.parametrize("layers", [[0], [1], [2], [0, 1], [0, 2], [0, 1, 2]], ids=str)
def test_the_position_bias_of_wavlm_reaches_every_attention_that_is_left(layers, tmp_path):
    """The stock model makes it in the first layer, of weights that no other layer has."""
    teacher = make(WavLMForCTC)
    student = linconv.convert(teacher, layers=layers, **MIXER)
    biases = []
    for model, blocks in ((teacher, (0,)), (student, set(range(3)) - set(layers))):
        for index in blocks:
            attention = encoder_layers(model)[index].attention
            attention.register_forward_hook(lambda module, args, outputs: biases.append(outputs[2]))
        output_of(model, inputs_for(WavLMForCTC))
    assert len(biases) == 1 + 3 - len(layers)
    for bias in biases[1:]:
        assert torch.equal(bias, biases[0])
    found = linconv.inspect(teacher, layers=layers, **MIXER)
    assert found.parameters_after == sum(p.numel() for p in student.parameters())
    student.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCTC.from_pretrained(tmp_path)
    assert torch.equal(output_of(loaded, inputs_for(WavLMForCTC)), output_of(student, inputs_for(WavLMForCTC)))


def test_hidden_states_are_recorded_in_every_layer(head):
    student = linconv.convert(make(head), layers=[0, 1], **MIXER)
    outputs = student(**inputs_for(head), output_hidden_states=True)
    states = outputs.hidden_states if "hidden_states" in outputs else outputs.encoder_hidden_states
    assert len(states) == 4 and all(s is not None for s in states)


def test_attention_weights_come_from_the_layers_left_in_place():
    student = linconv.convert(make(Wav2Vec2ForCTC, "eager"), layers=[0, 1], **MIXER)
    outputs = student(**inputs_for(Wav2Vec2ForCTC, length=300), output_attentions=True)
    assert [tuple(a.shape) for a in outputs.attentions] == [(2, 2, 29, 29)]


def test_layer_drop_is_off_in_the_student():
    for model_class, entry in (
        (Wav2Vec2ForCTC, "layerdrop"),
        (Wav2Vec2ConformerForCTC, "layerdrop"),
        (WhisperForAudioClassification, "encoder_layerdrop"),
    ):
        teacher = make(model_class, **{entry: 1.0})
        student = linconv.convert(teacher, **MIXER).train()
        assert getattr(teacher.config, entry) == 1.0 and getattr(student.config, entry) == 0.0
        with LayerStates(encoder_layers(student)) as states:
            student(**inputs_for(model_class))
        assert len(states.after) == 3  # an error names the layers that did not run


@pytest.mark.parametrize("model_class", [Wav2Vec2ForCTC, HubertForCTC, WavLMForCTC, Wav2Vec2ConformerForCTC])
def test_one_spec_augment_mask_serves_teacher_and_student(model_class):
    """In evaluation and in training mode: the mask is an argument, not each model's own drawing."""
    teacher = make(model_class)
    student = linconv.convert(teacher, layers=[], **MIXER)
    inputs = inputs_for(model_class)
    inputs["mask_time_indices"] = torch.arange(99).remainder(7).lt(3).expand(2, -1)
    seen = []
    for model in (teacher, student.train()):
        encoder_layers(model)[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(**inputs)
    assert torch.equal(*seen)
    unmasked = {name: value for name, value in inputs.items() if name != "mask_time_indices"}
    assert not torch.equal(output_of(teacher, inputs), output_of(teacher, unmasked))


def without_drawing(model):
    """The model with nothing drawn at random in training."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    model.config.apply_spec_augment = False
    return model


@pytest.mark.parametrize(
    "model_class", [Wav2Vec2ForCTC, WavLMForCTC, Wav2Vec2ConformerForCTC, WhisperForAudioClassification]
)
@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "hybrid"])
def test_gradient_checkpointing_gives_the_same_gradients(model_class, layers):
    student = without_drawing(linconv.convert(make(model_class), layers=layers, **MIXER)).train()
    inputs = inputs_for(model_class, lengths=[400, 301] if model_class in WHISPER else [1000, 700])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student.zero_grad()
        student(**inputs).logits.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_whisper_takes_any_length_up_to_its_positions():
    student = linconv.convert(make(WhisperForAudioClassification), **MIXER)
    for length in (1, 2, 33, 3000):
        assert output_of(student, inputs_for(WhisperForAudioClassification, length=length)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"input_features has 3001 frames, wanted at most 3000"):
        student(**inputs_for(WhisperForAudioClassification, length=3001))


def test_whisper_masks_that_do_not_fit_are_refused():
    student = linconv.convert(make(WhisperForAudioClassification), **MIXER)
    inputs = inputs_for(WhisperForAudioClassification, lengths=[400, 300])
    for mask in (inputs["attention_mask"][:, 1:], inputs["attention_mask"][:1]):
        with pytest.raises(ValueError, match=rf"attention_mask has shape \({len(mask)}, .*, wanted \(2, 400\)"):
            student(**inputs | {"attention_mask": mask})
    with pytest.raises(ValueError, match="padding on the right"):
        student(**inputs | {"attention_mask": inputs["attention_mask"].flip(1)})


@pytest.mark.parametrize("model_class", [WhisperModel, WhisperForAudioClassification])
def test_whisper_takes_a_mask_over_samples(model_class):
    student = linconv.convert(make(model_class), **MIXER)
    inputs = inputs_for(model_class, lengths=[400, 300])
    for samples in (160 * 400, 160 * 401 - 1):
        of_samples = torch.arange(samples) < torch.tensor([[samples], [160 * 299 + 1]])
        assert torch.equal(output_of(student, inputs | {"attention_mask": of_samples}), output_of(student, inputs))


@pytest.mark.parametrize("layers", [None, []], ids=["all", "none"])
@pytest.mark.parametrize("model_class", [Wav2Vec2ForCTC, HubertForCTC, WavLMForCTC, Wav2Vec2ConformerForCTC])
def test_masks_over_sound_that_do_not_fit_are_refused(model_class, layers):
    """The stock front end reads the sum of each row, by which they are masks like others."""
    student = linconv.convert(make(model_class), layers=layers, **MIXER)
    inputs = inputs_for(model_class, lengths=[1000, 700])
    for mask in (inputs["attention_mask"][:, 100:], inputs["attention_mask"][:1]):
        with pytest.raises(ValueError, match=rf"attention_mask has shape \({len(mask)}, .*, wanted \(2, 1000\)"):
            student(**inputs | {"attention_mask": mask})
    with pytest.raises(ValueError, match="padding on the right"):
        student(**inputs | {"attention_mask": inputs["attention_mask"].flip(1)})


def test_whisper_weighted_layer_sum():
    teacher = make(WhisperForAudioClassification, use_weighted_layer_sum=True)
    inputs = inputs_for(WhisperForAudioClassification, length=3000)
    assert torch.equal(output_of(linconv.convert(teacher, layers=[]), inputs), output_of(teacher, inputs))


def test_whisper_loss_and_labels():
    teacher = make(WhisperForAudioClassification)
    inputs = inputs_for(WhisperForAudioClassification, length=3000) | {"labels": torch.tensor([0, 2])}
    assert torch.equal(linconv.convert(teacher, layers=[])(**inputs).loss, teacher(**inputs).loss)


def test_whisper_generates():
    student = linconv.convert(make(WhisperForConditionalGeneration), layers=[0], **MIXER)
    features = inputs_for(WhisperForConditionalGeneration, length=3000)["input_features"]
    tokens = student.generate(features, max_new_tokens=4, min_new_tokens=4)
    assert tokens.shape[0] == 2 and tokens.shape[1] >= 4


def test_positional_arguments_reach_the_whisper_model():
    model = linconv.convert(make(WhisperModel), **MIXER)
    inputs = inputs_for(WhisperModel, length=100)
    encoded = model.encoder(inputs["input_features"])
    ids = inputs["decoder_input_ids"]
    again = model(None, None, ids, None, encoded).last_hidden_state
    assert torch.equal(again, model(inputs["input_features"], None, ids).last_hidden_state)
    assert torch.equal(again, model(**inputs, return_dict=False)[0])


@pytest.mark.parametrize("requested", ["sdpa", "eager"])
def test_attention_implementation_can_be_changed(requested):
    student = linconv.convert(make(Wav2Vec2ForCTC), layers=[0], **MIXER)
    inputs = inputs_for(Wav2Vec2ForCTC, lengths=[1000, 700])
    before = output_of(student, inputs)
    student.set_attn_implementation(requested)
    assert student.config._attn_implementation == f"linconv_{requested}"
    torch.testing.assert_close(output_of(student, inputs)[:, :60], before[:, :60], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", [WhisperModel, WhisperForConditionalGeneration])
def test_cross_attention_that_would_drop_the_mask_is_refused(head):
    student = linconv.convert(make(head), **MIXER)
    student.config._attn_implementation = "flash_attention_2"  # as if it were installed
    with pytest.raises(ValueError, match="cross-attention by flash_attention_2 takes no mask; wanted"):
        student(**inputs_for(head, lengths=[400, 250]))


def test_attention_implementation_without_padding_masks_is_refused():
    student = linconv.convert(make(Wav2Vec2ForCTC), layers=[0], **MIXER)
    with pytest.raises(
        ValueError, match="attn_implementation is 'flex_attention', a converted model takes sdpa, eager"
    ):
        student.set_attn_implementation("flex_attention")


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(mixer="bimamba"), ValueError, "did you mean 'bimamba2'"),
        (dict(mixer=["hydra"]), ValueError, r"mixer is \['hydra'\], wanted one of"),
        (dict(layers=[3]), ValueError, "layers has 3, wanted -3 to 2: the model has 3 blocks"),
        (dict(layers="some"), ValueError, "layers is 'some'"),
        (dict(layers=[0.5]), TypeError, "layers is"),
        (dict(layers=[True]), TypeError, "layers is"),
        (dict(layers=1), TypeError, "layers is 1, wanted None, 'all', 'none' or indices"),
        (dict(layers=np.array(1)), TypeError, "layers is"),
        (dict(layers=np.array([True, False, True])), TypeError, "layers is"),
        (dict(layers=torch.tensor([0.0])), TypeError, "layers is"),
        (dict(layers=np.arange(4)), ValueError, "layers has 3, wanted -3 to 2"),
        (dict(d_state=300), ValueError, "d_state is 300, wanted 1 to 256"),
        (dict(d_state=np.int64(8)), TypeError, "d_state is .*8.*, wanted an int"),
        (dict(d_stat=4), TypeError, "BiMamba2 has no option 'd_stat', wanted one of d_state"),
        (dict(headdim=64), ValueError, "headdim is 64"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, match):
    teacher = make(Wav2Vec2ForCTC)
    for function in (linconv.convert, linconv.inspect):
        with pytest.raises(error, match=match):
            function(teacher, **arguments)


@pytest.mark.parametrize(
    "layers",
    [np.array([0, -1]), list(np.array([0, 2])), torch.tensor([2, 0]), (0, 2), range(0, 3, 2), (i for i in (0, 2))],
    ids=["array", "numpy integers", "tensor", "tuple", "range", "generator"],
)
def test_layers_are_indices_of_any_kind(layers):
    config = linconv.convert(make(Wav2Vec2ForCTC), layers=layers, **MIXER).config
    assert config.linconv["layers"] == [0, 2]
    assert config.to_json_string()


@pytest.mark.parametrize("function", [linconv.convert, linconv.inspect])
def test_wrong_teachers_are_named(function):
    with pytest.raises(TypeError, match="teacher is of type 'gpt2', wanted one of wav2vec2, hubert"):
        function(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)))
    for wrong in (torch.nn.Linear(2, 2), None):
        with pytest.raises(TypeError, match=f"teacher is a {type(wrong).__name__}, wanted a transformers model"):
            function(wrong)
    with pytest.raises(TypeError, match="converted already"):
        function(linconv.convert(make(Wav2Vec2ForCTC), **MIXER), **MIXER)
    with pytest.raises(TypeError, match="teacher is a WhisperEncoder, wanted one of WhisperModel"):
        function(make(WhisperModel).encoder)

    class Own(Wav2Vec2ForCTC):
        pass

    with pytest.raises(TypeError, match="teacher is a Own, .*; it is a subclass of Wav2Vec2ForCTC, .*load_state_dict"):
        function(make(Own))


def test_mixers_that_see_the_past_only_are_warned_of():
    teacher = make(Wav2Vec2ForCTC)
    for function in (linconv.convert, linconv.inspect):
        with pytest.warns(UserWarning, match="mixer is 'mamba2', which sees the past only.*bimamba2, hydra") as warned:
            function(teacher, mixer="mamba2", **MIXER)
        assert warned[0].filename == __file__ and "first token" not in str(warned[0].message)


class Running(mixers.Mixer):
    """The mean of all frames: nothing to learn."""

    def forward(self, hidden_states, seq_lens=None):
        return hidden_states.mean(1, keepdim=True).expand_as(hidden_states)

    def flops(self, length):
        return length * self.d_model

    def reset_parameters(self):
        pass


def test_a_mixer_without_parameters_converts_and_loads(monkeypatch, tmp_path):
    monkeypatch.setattr(mixers, "_REGISTRY", {**mixers._REGISTRY, "running": Running})
    student = linconv.convert(make(Wav2Vec2ForCTC), mixer="running")
    student.save_pretrained(tmp_path)
    inputs = inputs_for(Wav2Vec2ForCTC)
    loaded = transformers.AutoModelForCTC.from_pretrained(tmp_path)
    assert torch.equal(output_of(loaded, inputs), output_of(student, inputs))


OFFLOADED = {"linformer": dict(r=8, max_length=500), "mamba": dict(d_state=8)}


@pytest.mark.filterwarnings("ignore:mixer is .*, which sees the past only")
@pytest.mark.parametrize("where", ["cpu_offload", "disk_offload", "device_map"])
@pytest.mark.parametrize("mixer", mixers.names())
def test_offloaded_weights_are_fetched(mixer, where, tmp_path):
    student = linconv.convert(make(Wav2Vec2ForCTC), mixer=mixer, **OFFLOADED.get(mixer, MIXER))
    inputs = inputs_for(Wav2Vec2ForCTC, lengths=[1000, 700])
    wanted = output_of(student, inputs)
    if where == "cpu_offload":
        accelerate.cpu_offload(student)
    elif where == "disk_offload":
        accelerate.disk_offload(student, tmp_path)
    else:
        student.save_pretrained(tmp_path / "student")
        student = transformers.AutoModelForCTC.from_pretrained(
            tmp_path / "student", device_map={"": "disk"}, offload_folder=tmp_path / "weights"
        )
    assert all(p.is_meta for name, p in student.named_parameters() if ".mixer." in name)
    assert torch.equal(output_of(student, inputs), wanted)


def test_a_projection_of_all_layers_that_is_offloaded_is_named():
    student = linconv.convert(make(Wav2Vec2ForCTC), mixer="linformer", sharing="layerwise", **OFFLOADED["linformer"])
    accelerate.cpu_offload(student)
    with pytest.raises(ValueError, match='sharing is "layerwise", and proj_k .* is offloaded'):
        student(**inputs_for(Wav2Vec2ForCTC))


def test_an_offloaded_teacher_is_refused():
    teacher = make(Wav2Vec2ForCTC)
    accelerate.cpu_offload(teacher)
    with pytest.raises(
        ValueError, match="teacher has wav2vec2.masked_spec_embed on the meta device, wanted all weights"
    ):
        linconv.convert(teacher)


def test_a_teacher_that_is_spread_over_devices(head):
    teacher, inputs = make(head), inputs_for(head, lengths=[400 if head in WHISPER else 1000, 250])
    # Of such a teacher it has the hooks, which call each module's forward for themselves; here all is on the CPU.
    spread = accelerate.dispatch_model(copy.deepcopy(teacher), {"": "cpu"}, force_hooks=True)
    outputs = []
    for model in (teacher, spread):
        torch.manual_seed(0)
        outputs.append(output_of(linconv.convert(model, layers=[1], **MIXER), inputs))
    assert torch.equal(*outputs)


@pytest.fixture
def autocast(monkeypatch):
    """An accelerator with a state of its own: that of a process takes one precision only."""
    for shared in (accelerate.state.AcceleratorState, accelerate.PartialState):
        monkeypatch.setattr(shared, "_shared_state", {})
    return accelerate.Accelerator(cpu=True, mixed_precision="bf16")


def test_a_teacher_that_was_trained_under_autocast(head, autocast):
    teacher, inputs = make(head), inputs_for(head, lengths=[400 if head in WHISPER else 1000, 250])
    prepared = autocast.prepare(copy.deepcopy(teacher))
    assert "forward" in vars(prepared)  # bound to the stock class, as the Trainer leaves it
    outputs = []
    for model in (teacher, prepared):
        torch.manual_seed(0)
        outputs.append(output_of(linconv.convert(model, layers=[1], **MIXER), inputs))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("path", ["", "wav2vec2.encoder"])
def test_a_compiled_function_for_forward_is_refused(path):
    """In a copy it runs the teacher."""
    teacher = make(Wav2Vec2ForCTC)
    module = teacher.get_submodule(path)
    module.forward = torch.compile(module.forward, backend="eager")
    name = f"{path}.forward".lstrip(".")
    with pytest.raises(ValueError, match=f"teacher has a function of its own for {name}, as .*wanted none"):
        linconv.convert(teacher, **MIXER)


def test_compiled_modules_convert():
    teacher, inputs = make(Wav2Vec2ForCTC), inputs_for(Wav2Vec2ForCTC, lengths=[1000, 700])
    compiled = copy.deepcopy(teacher)
    compiled.wav2vec2.encoder = torch.compile(compiled.wav2vec2.encoder, backend="eager")
    compiled.compile(backend="eager")
    outputs = []
    for model in (teacher, compiled):
        torch.manual_seed(0)
        outputs.append(output_of(linconv.convert(model, **MIXER), inputs))
    torch.testing.assert_close(*outputs)


def test_inspect_counts_and_reads():
    teacher = make(Wav2Vec2ForCTC)
    found = linconv.inspect(teacher, layers=[0, 2], lengths=(10, 1000), **MIXER)
    student = linconv.convert(teacher, layers=[0, 2], **MIXER)
    assert found.parameters_after == sum(p.numel() for p in student.parameters())
    mixer = encoder_layers(student)[0].attention.mixer
    attention = 2 * (2 * 10 * 4 * 32 * 32 + 2 * 2 * 10 * 10 * 32)  # two layers: projections, then QK and PV
    assert found.flops[10] == (attention, 2 * mixer.flops(10))
    cross = found.crossover_frames
    both = linconv.inspect(teacher, layers=[0, 2], lengths=(cross - 1, cross), **MIXER).flops
    assert both[cross][1] < both[cross][0] and both[cross - 1][1] >= both[cross - 1][0]
    text = str(found)
    assert "2 of 3 blocks" in text and f"{found.parameters_after:,}" in text and f"{cross} frames" in text


@pytest.mark.parametrize(
    "frames, extrapolated, said",
    [
        (1, False, "below 249 frames (5.0 s), the shortest measured\n"),
        (1, True, "below 249 frames (5.0 s), the shortest measured (extrapolated)\n"),
        (250, False, "250 frames (5.0 s)\n"),
        (9_999, True, "9999 frames (200.0 s) (extrapolated)\n"),
        (None, False, "never, by these fits\n"),
    ],
)
def test_inspect_claims_no_crossover_where_nothing_was_measured(frames, extrapolated, said):
    found = linconv.inspect(make(Wav2Vec2ForCTC), **MIXER)
    assert found.measured_crossover.extrapolated  # no layer as narrow was measured
    measured = dataclasses.replace(
        found.measured_crossover, frames=frames, shortest=249, longest=2_999, extrapolated=extrapolated
    )
    text = str(dataclasses.replace(found, measured_crossover=measured))
    assert f"crossover, by time: {said}" in text and text.endswith(", 249 to 2,999 frames")


@pytest.mark.parametrize("positions", ["relative", "rotary", None])
def test_inspect_counts_the_operations_of_positions(positions):
    teacher = make(Wav2Vec2ConformerForCTC, "eager", position_embeddings_type=positions)
    with FlopCounterMode(display=False) as counter:
        output_of(teacher, inputs_for(Wav2Vec2ConformerForCTC, batch=1))
    attention = "Wav2Vec2ConformerForCTC.wav2vec2_conformer.encoder.layers.0.self_attn"
    counted = sum(counter.get_flop_counts()[attention].values())
    assert linconv.inspect(teacher, layers=[0], lengths=(99,), **MIXER).flops[99][0] == counted


def test_seed_decides_the_mixers():
    teacher = make(Wav2Vec2ForSequenceClassification)
    students = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        students.append(state(linconv.convert(teacher, **MIXER)))
    key = next(name for name in students[0] if name.endswith("in_proj.weight"))
    assert torch.equal(students[0][key], students[1][key]) and not torch.equal(students[0][key], students[2][key])


def test_weights_made_on_the_meta_device_can_be_initialised():
    """The bare parameters of a mixer (A_log, D, dt_bias) are known to whatever model they stand in."""
    from linconv.auto import LinconvWav2Vec2ForXVector

    config = linconv.convert(make(Wav2Vec2ForXVector), **MIXER).config
    with torch.device("meta"):
        model = LinconvWav2Vec2ForXVector(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights()
    for layer in encoder_layers(model):
        mixer = layer.attention.mixer
        assert all(p.isfinite().all() for p in mixer.parameters())
        assert -mixer.A.max() >= 1 and -mixer.A.min() <= 16 and mixer.dt_bias.max() < 0
        assert torch.all(mixer.D == 1)


def test_a_model_made_from_the_config_starts_its_mixers_their_own_way():
    config = linconv.convert(make(Wav2Vec2ForCTC), **MIXER).config
    model = transformers.AutoModelForCTC.from_config(config)
    for layer in encoder_layers(model):
        mixer, bound = layer.attention.mixer, 32**-0.5
        assert 0.9 * bound < mixer.in_proj.weight.abs().max() <= bound
        assert -mixer.A.max() >= 1 and torch.all(mixer.D == 1)
    assert model.config._attn_implementation == "linconv_sdpa"


def test_initialising_again_leaves_converted_weights_alone():
    student = linconv.convert(make(Wav2Vec2ForCTC), **MIXER)
    before = state(student)
    student.init_weights()
    for name, tensor in student.state_dict().items():
        assert torch.equal(before[name], tensor), name


def test_heads_listed_are_all_that_transformers_has():
    """A head class that a later transformers adds should not go unnoticed."""
    from transformers.models.auto import modeling_auto

    for heads in (WAV2VEC2, HUBERT, WAVLM, CONFORMER, WHISPER):
        known = set()
        for name in dir(modeling_auto):
            if name.startswith("MODEL_") and name.endswith("MAPPING"):
                known.add(getattr(modeling_auto, name).get(heads[0].config_class, None))
        known -= {None, transformers.WhisperForCausalLM}  # a decoder alone
        assert {c for c in known if not isinstance(c, tuple)} <= set(heads)
