"""Whole models with random weights, converted against their originals."""

import functools

import torch

import linconv
from linconv.benchmarking.suite import TOKEN_LENGTHS, Case, Implementation, Setting, Shortcut
from linconv.benchmarking.suites.modules import check_module
from linconv.conversion import families

FULL_UP_TO = 499  # all layers are timed up to here; beyond, one model of one layer and one block of the others


def _wav2vec2(length, layers, **sizes):
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    return Wav2Vec2ForCTC(
        Wav2Vec2Config(num_hidden_layers=layers, vocab_size=32, attn_implementation="sdpa", layerdrop=0.0, **sizes)
    )


def _whisper(length, layers, **sizes):
    from transformers import WhisperConfig, WhisperForAudioClassification

    return WhisperForAudioClassification(
        WhisperConfig(
            encoder_layers=layers, decoder_layers=1, max_source_positions=length, num_labels=10,
            attn_implementation="sdpa", **sizes,
        )
    )  # fmt: skip


def _roberta(length, layers, **sizes):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(
        RobertaConfig(
            num_hidden_layers=layers, vocab_size=50_265, max_position_embeddings=length + 2, type_vocab_size=1,
            attn_implementation="sdpa", **sizes,
        )
    )  # fmt: skip


def _sizes(width, heads, feed_forward, **more):
    return dict(hidden_size=width, num_attention_heads=heads, intermediate_size=feed_forward, **more)


def _whisper_sizes(width, heads, feed_forward):
    return dict(
        d_model=width, encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=feed_forward,
        decoder_ffn_dim=feed_forward,
    )  # fmt: skip


LARGE = dict(do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True)
MODELS = {  # name: (builder, layers, sizes, mixers)
    "wav2vec2-base": (_wav2vec2, 12, _sizes(768, 12, 3072), ("bimamba2", "hydra")),
    "wav2vec2-large": (_wav2vec2, 24, _sizes(1024, 16, 4096, **LARGE), ("bimamba2", "hydra")),
    "whisper-tiny encoder": (_whisper, 4, _whisper_sizes(384, 6, 1536), ("bimamba2", "hydra")),
    "whisper-base encoder": (_whisper, 6, _whisper_sizes(512, 8, 2048), ("bimamba2", "hydra")),
    "roberta-base": (_roberta, 12, _sizes(768, 12, 3072), ("linformer",)),
}


def build(name, mixer, layers, length):
    """The model with this number of layers, converted unless ``mixer`` is None."""
    builder, _, sizes, _ = MODELS[name]
    original = builder(length, layers, **sizes).eval()
    if mixer is None:
        return original
    longest = {"max_length": length} if "max_length" in linconv.mixers.get(mixer).options() else {}
    return linconv.convert(original, mixer=mixer, **longest).eval()


def inputs(setting, length, model):
    """Arguments of the model's forward for this number of frames or tokens in its blocks."""
    batch, kind = setting.batch, model.config.model_type.removeprefix("linconv-")
    lengths = setting.seq_lens(length)
    if kind == "wav2vec2":
        samples = 320 * (length - 1) + 400  # the fewest that give this number of frames
        given = {"input_values": setting.tensor(batch, samples).detach()}
        if lengths is not None:
            lengths = 320 * (lengths - 1) + 400
            given["attention_mask"] = _mask(lengths, samples)
    elif kind == "whisper":
        bins = model.config.num_mel_bins
        given = {"input_features": setting.tensor(batch, bins, 2 * length).detach()}
    else:
        given = {"input_ids": torch.randint(5, 50_000, (batch, length), device=setting.device)}
        if lengths is not None:
            given["attention_mask"] = _mask(lengths, length)
    return given


def _mask(lengths, longest):
    return (torch.arange(longest, device=lengths.device) < lengths[:, None]).long()


def _on(setting, module):
    return module.to(device=setting.device, dtype=setting.torch_dtype)


def whole(setting, length, name, mixer, layers):
    model = _on(setting, build(name, mixer, layers, length))
    given = inputs(setting, length, model)
    return (lambda: model(**given).logits), list(model.parameters())


def block(setting, length, name, mixer):
    """One block of the model, on hidden states."""
    model = _on(setting, build(name, mixer, 1, length))
    layers = model.base_model.encoder.layer if "roberta" in name else families.of(model).blocks(model)
    hidden = setting.tensor(setting.batch, length, model.config.hidden_size)

    def function():
        y = layers[0](hidden, attention_mask=None)
        return y[0] if isinstance(y, tuple) else y

    return function, [hidden, *layers[0].parameters()]


def check(name, mixer, setting):
    """Check the mixer inside a model: logits of one layer over 2 s."""
    model = _on(setting, build(name, mixer, 1, 100))
    rest = inputs(setting, 100, model)  # includes a mask for batches of mixed lengths
    key = model.main_input_name
    given = rest.pop(key)
    if not given.is_floating_point():  # tokens have no gradient: their embeddings are the input
        key, given = "inputs_embeds", model.get_input_embeddings()(given).detach()
    check_module(model, lambda module, x: module(**{key: x}, **rest).logits, [given])


def cases(device):
    def case(name, work="forward", lengths=(249, 499, 1_499, 2_999, 5_999, 14_999, 29_999, 179_999), **keywords):
        _, layers, sizes, mixers = MODELS[name]
        setting = Setting(work, device=device, **keywords)

        def implementation(title, mixer):
            shortcut = Shortcut((name, mixer, 1), block, (name, mixer), layers - 1, FULL_UP_TO)
            return Implementation(
                title, whole, (name, mixer, layers), ours=mixer is not None, degree=1 if mixer else 2,
                check=functools.partial(check, name, mixer) if mixer else None,
                shortcut=None if setting.mixed or work == "step" or device != "cpu" else shortcut,
            )  # fmt: skip

        tokens = name.startswith("roberta")
        return Case(
            name, setting, (*(implementation(m, m) for m in mixers), implementation("original (SDPA)", None)),
            baseline="original (SDPA)", lengths=TOKEN_LENGTHS if tokens else lengths,
            unit="tokens" if tokens else "frames", units_per_second=None if tokens else 50,
            facts={"layers": layers, "width": sizes.get("hidden_size", sizes.get("d_model"))},
        )  # fmt: skip

    for name in MODELS:
        yield case(name)
    yield case("wav2vec2-base", "step", (249, 499, 1_499))
    yield case("wav2vec2-base", dtype="bfloat16", lengths=(249, 499, 1_499, 2_999))
    yield case("wav2vec2-large", lengths=(499, 1_499, 2_999), batch=4, mixed=True)
