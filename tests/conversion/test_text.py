"""What convert() promises, for BERT, RoBERTa and DistilBERT with every head."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import BertConfig, DistilBertConfig, RobertaConfig, XLMRobertaConfig

import linconv
from linconv.conversion import encoder_layers, frame_lengths
from linconv.conversion.families import FAMILIES
from linconv.mixers import LinformerAttention

LINFORMER = dict(mixer="linformer", r=8, init="normal")
STATE_SPACE = dict(d_state=8, headdim=16)
SIZES = dict(num_hidden_layers=3, num_attention_heads=2, vocab_size=60, max_position_embeddings=40, num_labels=3)
CONFIGS = {
    "bert": lambda **changes: BertConfig(**{"hidden_size": 32, "intermediate_size": 48, **SIZES, **changes}),
    "roberta": lambda **changes: RobertaConfig(**{"hidden_size": 32, "intermediate_size": 48, **SIZES, **changes}),
    "xlm-roberta": lambda **changes: XLMRobertaConfig(
        **{"hidden_size": 32, "intermediate_size": 48, **SIZES, **changes}
    ),
    "distilbert": lambda **changes: DistilBertConfig(**{"dim": 32, "hidden_dim": 48, **SIZES, **changes}),
}
HEADS = [(family, auto) for family in CONFIGS for auto in FAMILIES[family].heads]


def make(family, auto="AutoModelForSequenceClassification", **changes):
    """A model in eval mode whose norms are not the trivial ones that they start as."""
    torch.manual_seed(0)
    if auto == "AutoModelForQuestionAnswering":
        changes["num_labels"] = 2
    implementation = changes.pop("attn_implementation", "sdpa")
    config = CONFIGS[family](**changes)
    model = (
        FAMILIES[family]
        .stock_class(FAMILIES[family].heads[auto])
        ._from_config(config, attn_implementation=implementation)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def inputs_for(auto="AutoModel", lengths=(21, 13), length=21):
    shape = (len(lengths), 2, length) if auto == "AutoModelForMultipleChoice" else (len(lengths), length)
    ids = torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    mask = mask[:, None].expand(shape).contiguous() if len(shape) == 3 else mask
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def output_of(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("family, auto", HEADS)
def test_every_head_converts_loads_and_keeps_padding_out(family, auto, tmp_path):
    teacher, inputs = make(family, auto), inputs_for(auto)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    assert torch.equal(output_of(linconv.convert(teacher, layers=[]), inputs), output_of(teacher, inputs))

    student = linconv.convert(teacher, layers=[0, -1], **LINFORMER)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(before[name], tensor), name
    assert isinstance(student, type(teacher)) and student.config.model_type == f"linconv-{family}"
    # Nothing is lost: every weight of the teacher is in the student, those of attention under the mixer's names.
    kept = [tensor for name, tensor in student.state_dict().items() if not name.endswith(("proj_k", "proj_v"))]
    assert sorted(t.double().sum().item() for t in kept) == sorted(t.double().sum().item() for t in before.values())

    student.save_pretrained(tmp_path)
    loaded = getattr(transformers, auto).from_pretrained(tmp_path)
    assert type(loaded) is type(student)
    got = output_of(loaded, inputs)
    assert torch.equal(got, output_of(student, inputs))

    alone = {name: value[1:, ..., :13].contiguous() for name, value in inputs.items() if name != "attention_mask"}
    single, padded = output_of(student, alone)[0], got[1]
    if padded.shape != single.shape:  # one output a token
        padded = padded[:13]
    torch.testing.assert_close(padded, single, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("mixer", ["bimamba2", "hydra", "linformer"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_mixer_trains_beside_attention(family, mixer, implementation, tmp_path):
    options = LINFORMER if mixer == "linformer" else dict(mixer=mixer, **STATE_SPACE)
    student = linconv.convert(make(family, attn_implementation=implementation), layers=[0, 2], **options).train()
    loss = student(**inputs_for(), labels=torch.tensor([0, 2])).loss
    loss.backward()
    for name, parameter in student.named_parameters():
        if ".mixer." in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    student.eval().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation=implementation
    )
    assert torch.equal(output_of(loaded, inputs_for()), output_of(student, inputs_for()))


@pytest.mark.parametrize(
    "sharing, wanted", [("headwise", 127_805_186), ("key_value", 126_226_178), ("layerwise", 124_778_754)]
)
def test_parameter_counts_of_roberta_base(sharing, wanted):
    with torch.device("meta"):
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        teacher = transformers.RobertaForSequenceClassification(config)
        student = linconv.convert(teacher, mixer="linformer", sharing=sharing)
    found = linconv.inspect(teacher, mixer="linformer", sharing=sharing)
    assert sum(p.numel() for p in teacher.parameters()) == found.parameters == 124_647_170
    assert sum(p.numel() for p in student.parameters()) == found.parameters_after == wanted


def test_bimamba2_takes_the_output_projection_along():
    teacher = make("roberta")
    student = linconv.convert(teacher, layers=[1], **STATE_SPACE)
    assert not [name for name in student.state_dict() if "layer.1.attention.output.dense" in name]
    found = linconv.inspect(teacher, layers=[1], **STATE_SPACE)
    assert found.parameters_after == sum(p.numel() for p in student.parameters())
    assert "  tokens  " in str(found) and "frames" not in str(found) and "seconds" not in str(found)
    assert "RobertaSelfAttention -> BiMamba2" in str(found)


def test_one_projection_for_all_layers_is_saved_once(tmp_path):
    linconv.convert(make("roberta"), sharing="layerwise", **LINFORMER).save_pretrained(tmp_path)
    shared = [name for name in load_file(tmp_path / "model.safetensors") if name.endswith((".proj_k", ".proj_v"))]
    assert shared == ["roberta.encoder.layer.0.attention.self.mixer.proj_k"]
    block = json.loads((tmp_path / "config.json").read_text())["linconv"]
    assert block["mixer"] == "linformer" and block["options"]["sharing"] == "layerwise"


def test_a_shared_projection_trains_through_every_layer():
    student = linconv.convert(make("bert"), sharing="layerwise", layers=[1, 2], **LINFORMER).train()
    mixers = [m for m in student.modules() if isinstance(m, LinformerAttention)]
    gradients = []
    for frozen in (False, True):
        student.zero_grad()
        student(**inputs_for()).logits.square().sum().backward() if not frozen else None
        gradients.append(mixers[0].proj_k.grad)
    assert gradients[0] is not None and gradients[0].abs().sum() > 0
    assert sum(p.numel() for p in (m.proj_k for m in mixers) if p is not None) == 40 * 8


@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "hybrid"])
def test_any_form_of_padding_mask(layers):
    student = linconv.convert(make("bert"), layers=layers, **LINFORMER)
    inputs = inputs_for()
    mask, wanted = inputs["attention_mask"], output_of(student, inputs)
    additive = (1.0 - mask[:, None, None]) * torch.finfo(torch.float32).min
    forms = [mask.bool(), mask.float(), mask.int()]
    if layers is None:  # attention that was left in place takes what the stock class takes
        forms += [mask.bool()[:, None, None], mask.bool()[:, None, None].expand(-1, 1, 21, -1), additive]
    for form in forms:
        torch.testing.assert_close(output_of(student, inputs | {"attention_mask": form}), wanted)


def test_masks_that_do_more_than_pad_are_refused():
    student, inputs = linconv.convert(make("roberta"), **LINFORMER), inputs_for()
    with pytest.raises(ValueError, match="attention_mask has valid frames after padding ones"):
        student(**inputs | {"attention_mask": inputs["attention_mask"].flip(1)})
    causal = torch.ones(21, 21, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    with pytest.raises(ValueError, match="attention_mask differs from query to query"):
        student(**inputs | {"attention_mask": causal})


def test_decoders_are_refused():
    with pytest.raises(TypeError, match="teacher is a BertModel with is_decoder, wanted one that attends both ways"):
        linconv.convert(make("bert", "AutoModel", is_decoder=True))
    causal = transformers.RobertaForCausalLM(CONFIGS["roberta"]())
    with pytest.raises(TypeError, match="teacher is a RobertaForCausalLM, wanted one of RobertaModel"):
        linconv.convert(causal)


CAUSAL = [dict(mixer="mamba2", **STATE_SPACE), dict(mixer="mamba", d_state=8)]


@pytest.mark.parametrize("options", CAUSAL, ids=["mamba2", "mamba"])
@pytest.mark.parametrize("family, auto", HEADS)
def test_mixers_that_see_the_past_only_are_warned_of_or_refused(family, auto, options):
    teacher, wanted = make(family, auto), "Mixers that see both ways: bimamba2, hydra, linformer"
    with pytest.warns(UserWarning, match=f"sees the past only, and .* attends both ways.*{wanted}") as warned:
        student = linconv.convert(teacher, layers=[0, 1], **options)
    assert warned[0].filename == __file__
    inputs = inputs_for(auto)
    first = {**inputs, "input_ids": torch.cat([inputs["input_ids"][..., :1], inputs["input_ids"][..., 1:].flip(0)], -1)}
    if auto in FAMILIES[family].first_token_heads:  # what is left attends, and the first token sees the text
        assert not torch.equal(output_of(student, inputs), output_of(student, first))
        for function in (linconv.convert, linconv.inspect):
            with pytest.raises(
                ValueError, match=f"mixer is '{options['mixer']}'.* see nothing of the text; wanted .*hydra"
            ):
                function(teacher, **options)
    else:
        with pytest.warns(UserWarning, match="The first token, which a pooler reads, sees itself alone"):
            linconv.convert(teacher, **options)


@pytest.mark.filterwarnings("ignore:mixer is 'mamba2', which sees the past only")
@pytest.mark.parametrize("family", CONFIGS)
def test_a_head_of_the_first_token_is_known_as_one(family):
    """Those and no others give the same for every text with the same first token where all layers are causal."""
    for auto in FAMILIES[family].heads:
        teacher, inputs = make(family, auto), inputs_for(auto, lengths=(21, 21))
        base = linconv.convert(teacher.base_model, **CAUSAL[0])
        setattr(teacher, teacher.base_model_prefix, base) if teacher.base_model is not teacher else None
        model = base if teacher.base_model is teacher else teacher
        ids = inputs["input_ids"]
        changed = {**inputs, "input_ids": torch.cat([ids[..., :1], (ids[..., 1:] + 7) % 50 + 3], -1)}
        same = torch.equal(output_of(model, inputs), output_of(model, changed))
        assert same == (auto in FAMILIES[family].first_token_heads), auto


@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "hybrid"])
@pytest.mark.parametrize("length", [20, 22])
@pytest.mark.parametrize("fill", [0, 1])
def test_masks_of_another_length_are_refused(layers, length, fill):
    student, inputs = linconv.convert(make("bert"), layers=layers, **LINFORMER), inputs_for()
    mask = torch.full((2, length), fill)
    mask[:, :5] = 1
    with pytest.raises(ValueError, match=rf"attention_mask has shape \(2, {length}\), wanted \(2, 21\)"):
        student(**inputs | {"attention_mask": mask})


def test_masks_of_another_length_in_four_axes_are_refused():
    student, inputs = linconv.convert(make("bert"), **LINFORMER), inputs_for()
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 1, 20\), wanted \(2, 1, L, 21\)"):
        student(**inputs | {"attention_mask": torch.ones(2, 1, 1, 20, dtype=torch.bool)})


def test_more_tokens_than_the_projection_has_are_refused():
    student = linconv.convert(make("bert"), max_length=20, **LINFORMER)
    with pytest.raises(ValueError, match="hidden_states has 21 frames, wanted at most max_length = 20"):
        student(**inputs_for())


def test_blocks_and_lengths_line_up():
    for family in CONFIGS:
        teacher = make(family)
        student = linconv.convert(teacher, **LINFORMER)
        assert len(encoder_layers(teacher)) == len(encoder_layers(student)) == 3
        assert frame_lengths(student, inputs_for()["attention_mask"]).tolist() == [21, 13]


def test_embeddings_stay_tied():
    student = linconv.convert(make("bert", "AutoModelForMaskedLM"), **LINFORMER)
    assert student.cls.predictions.decoder.weight is student.bert.embeddings.word_embeddings.weight
