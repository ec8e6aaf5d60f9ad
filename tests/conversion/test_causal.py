"""What convert() promises for models that attend to the past only: GPT-NeoX (Pythia)."""

import inspect
import re

import accelerate
import pytest
import torch
import transformers
from transformers import DynamicCache, GPTNeoXConfig, StaticCache, Trainer, TrainingArguments, pipeline

import linconv
from linconv.conversion import encoder_layers
from linconv.conversion.causal import StateLayer
from linconv.conversion.families import FAMILIES

from .conftest import ByPosition
from .test_convert import LargestTensor

MIXER = dict(mixer="mamba2", d_state=8, headdim=16)
OF_BOTH = pytest.mark.parametrize("options", [MIXER, dict(mixer="mamba", d_state=8)], ids=["mamba2", "mamba"])
HEADS = FAMILIES["gpt_neox"].heads
LENGTH, SHORT = 21, 13
# transformers has given the argument another name.
_names = inspect.signature(transformers.GPTNeoXForCausalLM.forward).parameters
CACHE = "cache" if "cache" in _names else "past_key_values"
LAYERS = pytest.mark.parametrize("layers", [None, [0], [1], []], ids=["all", "first", "second", "none"])


def make(auto="AutoModelForCausalLM", attn_implementation="sdpa", **changes):
    """A model in eval mode whose norms are not the trivial ones that they start as."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, bos_token_id=0,
        eos_token_id=0, pad_token_id=1, num_labels=2 if auto == "AutoModelForQuestionAnswering" else 3,
    )  # fmt: skip
    head = FAMILIES["gpt_neox"].stock_class(HEADS[auto])
    model = head._from_config(GPTNeoXConfig(**sizes | changes), attn_implementation=attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tokens(side=None):
    """Two rows, the second padded on that side."""
    ids = torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if side is not None:
        mask[1, slice(None, LENGTH - SHORT) if side == "left" else slice(SHORT, None)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def own(side):
    return slice(LENGTH - SHORT, None) if side == "left" else slice(SHORT)


def output_of(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@OF_BOTH
@pytest.mark.parametrize("auto", HEADS)
def test_what_is_made_of_a_loaded_teacher_loads(options, auto, tmp_path):
    """The head of a language model has one name in checkpoints and another in the model."""
    make(auto).save_pretrained(tmp_path / "teacher")
    teacher = getattr(transformers, auto).from_pretrained(tmp_path / "teacher")
    student = linconv.convert(teacher, **options).eval()
    student.save_pretrained(tmp_path / "student")
    loaded, info = getattr(transformers, auto).from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(output_of(loaded.eval(), tokens("left")), output_of(student, tokens("left")))


@pytest.mark.parametrize("auto", HEADS)
def test_every_head_converts_and_loads(auto, tmp_path):
    teacher, inputs = make(auto), tokens("right")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    assert torch.equal(output_of(linconv.convert(teacher, layers=[], **MIXER), inputs), output_of(teacher, inputs))

    student = linconv.convert(teacher, layers=[0, -1], **MIXER)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(before[name], tensor), name
    assert isinstance(student, type(teacher)) and student.config.model_type == "linconv-gpt_neox"
    assert not [n for n in student.state_dict() if "layers.0." in n and "query_key_value" in n]
    for layers in ([0, -1], None):
        found = linconv.inspect(teacher, layers=layers, **MIXER)
        converted = linconv.convert(teacher, layers=layers, **MIXER)
        assert found.parameters_after == sum(p.numel() for p in converted.parameters())

    student.save_pretrained(tmp_path)
    loaded = getattr(transformers, auto).from_pretrained(tmp_path)
    assert type(loaded) is type(student)
    assert torch.equal(output_of(loaded, inputs), output_of(student, inputs))


@OF_BOTH
@LAYERS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_padded_row_is_what_it_is_alone(options, implementation, side, layers):
    student = linconv.convert(make(attn_implementation=implementation), layers=layers, **options)
    inputs = tokens(side)
    mask = inputs["attention_mask"]
    padded = output_of(student, inputs | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)})[1, own(side)]
    alone = output_of(student, {"input_ids": inputs["input_ids"][1:, own(side)]})[0]
    if layers is None:
        assert torch.equal(padded, alone)
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=2e-5)
    other = inputs["input_ids"].masked_fill(mask == 0, 7)
    again = output_of(student, inputs | {"input_ids": other, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)})
    torch.testing.assert_close(again[1, own(side)], padded)


@OF_BOTH
@LAYERS
def test_it_does_not_look_ahead(options, layers):
    student, inputs = linconv.convert(make(), layers=layers, **options), tokens()
    changed = inputs["input_ids"].clone()
    changed[:, 12] = 5
    difference = (output_of(student, {"input_ids": changed}) - output_of(student, inputs)).abs().amax(-1)
    assert difference[:, :12].max() < 1e-6 and difference[:, 12:].min() > 1e-6


GENERATE = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)


@OF_BOTH
@LAYERS
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_from_states_is_generation_from_all_tokens(options, layers, beams):
    student, inputs = linconv.convert(make(), layers=layers, **options), tokens("left")
    how = GENERATE | dict(num_beams=beams)
    found = student.generate(**inputs, **how)
    assert torch.equal(found, student.generate(**inputs, **how, use_cache=False))
    alone = student.generate(inputs["input_ids"][1:, own("left")], **how)
    assert torch.equal(found[1, LENGTH:], alone[0, SHORT:])
    assert torch.equal(found, student.generate(**inputs, **how, **{CACHE: DynamicCache()}))
    for size in (8, 1):  # a chunk may be padding alone
        assert torch.equal(found, student.generate(**inputs, **how, prefill_chunk_size=size))


@OF_BOTH
def test_the_cache_of_a_converted_layer_does_not_grow(options):
    student = linconv.convert(make(), layers=[0, 2], **options)
    sizes = []
    for length in (5, 21):
        cache = DynamicCache(config=student.config)
        student(tokens()["input_ids"][:, :length], **{CACHE: cache})
        assert [isinstance(layer, StateLayer) for layer in cache.layers] == [True, False, True]
        assert cache.get_seq_length() == length
        state = cache.layers[0].state
        sizes.append((state.conv.numel() + state.ssm.numel(), cache.layers[1].keys.numel()))
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] < sizes[1][1]
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.layers[0].state is None


@OF_BOTH
def test_logits_come_step_by_step(options):
    student, ids = linconv.convert(make(), layers=[0, 2], **options), tokens()["input_ids"]
    cache = DynamicCache()
    pieces = [output_of(student, {"input_ids": part, CACHE: cache}) for part in ids.split([9, 1, 1, 8, 2], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), output_of(student, dict(input_ids=ids)), rtol=1e-4, atol=2e-5)


@OF_BOTH
def test_several_sequences_of_a_prompt(options):
    student = linconv.convert(make(), layers=[0, 2], **options)
    cache = DynamicCache()
    ids = tokens()["input_ids"]
    student(ids[:, :-1], **{CACHE: cache})
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 3]))
    found = output_of(student, {"input_ids": ids[[0, 1, 1], -1:], CACHE: cache})
    torch.testing.assert_close(
        found[:, 0], output_of(student, dict(input_ids=ids))[[0, 1, 1], -1], rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("masked", [True, False])
def test_nothing_grows_with_the_square_of_the_length(masked):
    def largest(model, length):
        ids = torch.randint(3, 60, (2, length))
        mask = torch.ones_like(ids)
        mask[1, : length // 2] = 0
        with LargestTensor() as mode:
            output_of(model, dict(input_ids=ids, attention_mask=mask if masked else None))
        return mode.numel

    teacher = make()
    student = linconv.convert(teacher, **MIXER)
    assert largest(student, 1500) <= 2.1 * largest(student, 750)
    if masked:
        assert largest(teacher, 1500) > 3 * largest(teacher, 750)


@OF_BOTH
@LAYERS
def test_a_compiled_model_gives_the_same(options, layers):
    compiled_gives_the_same(linconv.convert(make(), layers=layers, **options), tokens("left"))


@OF_BOTH
@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "hybrid"])
def test_a_compiled_model_without_a_mask_gives_the_same(options, layers):
    inputs = tokens("left")
    del inputs["attention_mask"]
    compiled_gives_the_same(linconv.convert(make(), layers=layers, **options), inputs)


def compiled_gives_the_same(student, inputs):
    inputs, masked = {**inputs, "use_cache": False}, "attention_mask" in inputs
    torch._dynamo.reset()
    compiled = output_of(torch.compile(student, fullgraph=True, backend="aot_eager"), inputs)
    wanted = output_of(student, inputs)
    rows = slice(None) if not masked else own("left")
    torch.testing.assert_close(compiled[:, rows], wanted[:, rows], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace. is deprecated")
@LAYERS
def test_a_traced_model_heeds_other_masks_than_that_it_was_traced_with(layers):
    student, inputs = linconv.convert(make(), layers=layers, **MIXER), tokens("left")
    ids, mask = inputs.values()
    run = ByPosition(student, list(inputs), use_cache=False)
    traced = torch.jit.trace(run, (ids, torch.ones_like(mask)), check_trace=False)
    torch.testing.assert_close(traced(ids, mask)[:, own("left")], run(ids, mask)[:, own("left")])


@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "hybrid"])
def test_trainer_trains(layers, tmp_path):
    student = linconv.convert(make(), layers=layers, **MIXER)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    inputs = tokens("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    rows = [{n: t[i] for n, t in (inputs | {"labels": labels}).items()} for i in (0, 1)] * 4
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=30, per_device_train_batch_size=2, learning_rate=3e-3,
        gradient_checkpointing=True,
        logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(student, arguments, train_dataset=rows)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0] - 1
    for name, tensor in student.state_dict().items():
        if ".mixer." in name:
            assert not torch.equal(tensor, before[name]), name


def test_text_generation_pipeline(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<end>", "<pad>", "<unk>", *(f"w{i}" for i in range(57))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    linconv.convert(make(), **MIXER).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(write.model).__name__ == "LinconvGPTNeoXForCausalLM"
    prompts = ["w1 w2 w3 w4 w5", "w6 w7"]
    single = [write(prompt, **GENERATE)[0]["generated_text"] for prompt in prompts]
    assert [found[0]["generated_text"] for found in write(prompts, batch_size=2, **GENERATE)] == single
    assert all(len(text.split()) > len(prompt.split()) for text, prompt in zip(single, prompts))


@OF_BOTH
def test_generation_with_offloaded_weights(options):
    student, inputs = linconv.convert(make(), **options), tokens("left")
    wanted = student.generate(**inputs, max_new_tokens=6)
    accelerate.cpu_offload(student)
    assert torch.equal(student.generate(**inputs, max_new_tokens=6), wanted)


def test_caches_that_will_not_do_are_refused():
    teacher = make()
    student, ids = linconv.convert(teacher, **MIXER), tokens()["input_ids"]
    with pytest.raises(ValueError, match="holds keys and values in layer 0, which is converted"):
        student(ids, **{CACHE: teacher(ids)[CACHE]})
    with pytest.raises(
        TypeError, match="the cache is a StaticCache of StaticLayer, wanted a transformers.DynamicCache"
    ):
        student(ids, **{CACHE: StaticCache(config=teacher.config, max_cache_len=40)})
    cache = DynamicCache()
    student(ids, **{CACHE: cache})
    with pytest.raises(ValueError, match="state cannot be cropped"):
        cache.layers[0].crop(-1)
    with pytest.raises(RuntimeError, match="this layer is converted"):
        teacher(ids, **{CACHE: cache})


@pytest.mark.parametrize("layers", [None, [0]], ids=["all", "hybrid"])
def test_a_call_that_is_refused_adds_no_tokens_to_the_cache(layers):
    student, inputs, cache = linconv.convert(make(), layers=layers, **MIXER), tokens("left"), DynamicCache()
    mask = inputs["attention_mask"].clone()
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="padding between valid tokens"):
        student(inputs["input_ids"], attention_mask=mask, **{CACHE: cache})
    assert cache.get_seq_length() == 0
    assert torch.equal(output_of(student, inputs | {CACHE: cache}), output_of(student, inputs))


@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "hybrid"])
def test_what_mixers_cannot_honour_is_refused(layers):
    student, inputs = linconv.convert(make(), layers=layers, **MIXER), tokens()
    inputs["attention_mask"][:, 5:8] = 0
    with pytest.raises(ValueError, match="padding between valid tokens"):
        student(**inputs)
    for shape in ((2, 20), (2, 22), (1, 21)):
        with pytest.raises(ValueError, match=re.escape(f"attention_mask has shape {shape}, wanted (2, 21)")):
            student(inputs["input_ids"], attention_mask=torch.ones(shape))
    with pytest.raises(ValueError, match=re.escape("attention_mask is (2, 21, 21), wanted (batch, L)")):
        student(inputs["input_ids"], attention_mask=torch.ones(2, 21, 21))
    packed = torch.tensor([[*range(10), *range(11)]])
    with pytest.raises(ValueError, match="position_ids restart within a row, wanted one sequence per row"):
        student(inputs["input_ids"], position_ids=packed, use_cache=False)


@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "hybrid"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_of_queries_and_tokens_is_one_of_padding(layers, side):
    """Queries of padding see other tokens or none; a mask that hides valid tokens from later ones is refused."""
    student, inputs = linconv.convert(make(), layers=layers, **MIXER), tokens(side)
    valid = inputs["attention_mask"].bool()
    wanted = output_of(student, inputs)[valid]
    causal = (torch.ones(LENGTH, LENGTH).tril().bool() & valid[:, None])[:, None]  # (2, 1, L, L)
    for mask in (causal, causal & valid[:, None, :, None]):
        found = output_of(student, inputs | {"attention_mask": mask})[valid]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)

    packed = torch.arange(LENGTH) >= 7
    window = torch.ones(LENGTH, LENGTH).triu(-3).bool()
    for mask in (causal & (packed[:, None] == packed), causal & window, causal | causal.mT, causal[:, :, -1:]):
        with pytest.raises(ValueError, match="attention_mask differs from a causal one by more than padding"):
            student(inputs["input_ids"], attention_mask=mask)


@pytest.mark.parametrize("function", [linconv.convert, linconv.inspect])
@pytest.mark.parametrize("mixer", ["bimamba2", "hydra", "linformer"])
def test_mixers_that_look_ahead_are_refused(function, mixer):
    wanted = f"mixer is '{mixer}', which looks ahead, .* wanted a causal one: mamba, mamba2"
    with pytest.raises(ValueError, match=wanted):
        function(make(), mixer=mixer)


def test_parameter_counts_of_pythia():
    with torch.device("meta"):
        teacher = transformers.GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=50304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
            )
        )
        student = linconv.convert(teacher, mixer="mamba2", expand=1)
    assert sum(p.numel() for p in teacher.parameters()) == 162_322_944  # pythia-160m, as its card has it
    found = linconv.inspect(teacher, mixer="mamba2", expand=1)
    assert found.parameters_after == sum(p.numel() for p in student.parameters())
    assert len(encoder_layers(student)) == 12
