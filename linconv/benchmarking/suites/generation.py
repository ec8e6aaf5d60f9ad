"""Language models with random weights, converted against their originals: a prompt, and one token on from it."""

import functools
import inspect

import torch

import linconv
from linconv.benchmarking.suite import TOKEN_LENGTHS, Case, Implementation, Setting, Shortcut
from linconv.benchmarking.suites.modules import check_module
from linconv.conversion import families

FULL_UP_TO = 512  # all layers are timed up to here; beyond, one model of one layer and one block of the others
MODELS = {  # name: (layers, sizes)
    "pythia-160m": (12, dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072)),
}
MIXERS = {  # about as many parameters as attention has
    "mamba2, expand 1": ("mamba2", dict(expand=1)),
    "mamba, expand 1": ("mamba", dict(expand=1)),
}


def build(name, mixer, layers):
    """The model with this number of layers, converted unless ``mixer`` is None."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    _, sizes = MODELS[name]
    config = GPTNeoXConfig(num_hidden_layers=layers, vocab_size=50_304, attn_implementation="sdpa", **sizes)
    original = GPTNeoXForCausalLM(config).eval()
    if mixer is None:
        return original
    mixer, options = MIXERS[mixer]
    return linconv.convert(original, mixer=mixer, **options).eval()


def _on(setting, module):
    return module.to(device=setting.device, dtype=setting.torch_dtype)


def _tokens(setting, length):
    return torch.randint(5, 50_000, (setting.batch, length), device=setting.device)


def prompt(setting, length, name, mixer, layers):
    """The first step of generation: the whole prompt, and the logits after its last token."""
    model, ids = _on(setting, build(name, mixer, layers)), _tokens(setting, length)
    return (lambda: model(ids, use_cache=False, logits_to_keep=1).logits), list(model.parameters())


def block(setting, length, name, mixer):
    """One block of the model, on hidden states."""
    model = _on(setting, build(name, mixer, 1)).base_model
    (layer,) = families.of(model).blocks(model)
    hidden = setting.tensor(setting.batch, length, model.config.hidden_size)
    positions = model.rotary_emb(hidden, torch.arange(length, device=setting.device)[None])

    def function():
        y = layer(hidden, position_embeddings=positions)
        return y[0] if isinstance(y, tuple) else y

    return function, [hidden, *layer.parameters()]


def _cached(model, ids_or_embeddings, cache):
    """Logits, continuing from a cache; later versions of transformers name its argument differently."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model(**ids_or_embeddings, **{name: cache}, use_cache=True).logits


def cache_of(setting, model, length):
    """A cache of ``length`` tokens.

    A prompt of that length is slow: keys and values are random, and a state is that of a short prompt, equally large.
    """
    from transformers import DynamicCache

    config = model.config
    cache, heads = DynamicCache(config=config), config.num_attention_heads
    shape = setting.batch, heads, length, config.hidden_size // heads
    if hasattr(config, "linconv"):
        _cached(model, {"input_ids": _tokens(setting, 8)}, cache)
    else:
        for index in range(config.num_hidden_layers):
            cache.update(*(setting.tensor(*shape) for _ in range(2)), index)
    return cache


def next_token(setting, length, name, mixer, layers):
    """One more token, with a cache that has seen ``length`` before it."""
    model = _on(setting, build(name, mixer, layers))
    with torch.no_grad():
        cache, ids = cache_of(setting, model, length), _tokens(setting, 1)

    def function():
        logits = _cached(model, {"input_ids": ids}, cache)
        if mixer is None:
            cache.crop(-1)  # so that the next call finds the same number
        return logits

    return function, list(model.parameters())


def check(name, mixer, setting):
    """Check the mixer inside a model: logits of one layer over 100 tokens, the last one from a cache."""
    from transformers import DynamicCache

    model = _on(setting, build(name, mixer, 1))
    embeddings = model.get_input_embeddings()(_tokens(setting, 100)).detach()

    def call(module, x):
        cache = DynamicCache()
        return torch.cat([_cached(module, {"inputs_embeds": part}, cache) for part in (x[:, :-1], x[:, -1:])], dim=1)

    check_module(model, call, [embeddings])


def cases(device):
    def case(name, work, lengths):
        layers, sizes = MODELS[name]
        setting = Setting(device=device)

        def implementation(title, mixer):
            shortcut = Shortcut((name, mixer, 1), block, (name, mixer), layers - 1, FULL_UP_TO)
            return Implementation(
                title, work, (name, mixer, layers), ours=mixer is not None,
                degree=2 if work is prompt and mixer is None else 1,
                check=functools.partial(check, name, mixer) if mixer else None,
                shortcut=shortcut if work is prompt and device == "cpu" else None,
            )  # fmt: skip

        return Case(
            f"{name}, {work.__name__.replace('_', ' ')}", setting,
            (*(implementation(m, m) for m in MIXERS), implementation("original (SDPA)", None)),
            baseline="original (SDPA)", lengths=lengths, unit="tokens", units_per_second=None,
            facts={"layers": layers, "width": sizes["hidden_size"]},
        )  # fmt: skip

    for name in MODELS:
        yield case(name, prompt, TOKEN_LENGTHS)
        yield case(name, next_token, TOKEN_LENGTHS)
