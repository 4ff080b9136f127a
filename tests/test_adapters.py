"""kvattn's caches under other libraries' models, layers and samplers: what comes out is what they compute without.

KerasHub, Tunix and Bonsai are too heavy for these tests, or ask for another JAX. Their protocols are tried on stand-ins
written here, as short as they can be; where a library is installed, the same is tried on it.
"""

import contextlib
import functools
import importlib
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvattn
from kvattn import adapters, errors
from kvattn.adapters.bonsai import LayerCache

B, T, N, K, H = 2, 7, 4, 2, 8
D = N * H
LENGTHS = (7, 4)


def as_users_run_it(test):
    """Other libraries promote types."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return test(*args, **kwargs)

    return pytest.mark.filterwarnings("ignore")(run)


def installed(name):
    """A library, or why it is not tried."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is tried by a stand-in: {error}")


# KerasHub -------------------------------------------------------------------------------------------------------------


class Hub:
    """What of KerasHub's serving context matters: a scope, and the context that layers find in it."""

    def __init__(self):
        self.context = None

    @contextlib.contextmanager
    def vllm_context_scope(self, paged_attention_func, positions, kv_caches):
        self.context = types.SimpleNamespace(
            attend=paged_attention_func, positions=positions, kv_caches=kv_caches, layer_index=0
        )
        self.context.updated_kv_caches = list(kv_caches)
        try:
            yield
        finally:
            self.context = None

    def get_vllm_context(self):
        return self.context


@pytest.fixture
def hub(monkeypatch):
    stand_in = Hub()
    for name in ("keras_hub", "keras_hub.src", "keras_hub.src.vllm"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType("keras_hub.src.vllm.context")
    module.vllm_context_scope, module.get_vllm_context = stand_in.vllm_context_scope, stand_in.get_vllm_context
    monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules["keras_hub.src.vllm"].context = module
    return stand_in


class Backbone:
    """Two layers of attention with RoPE, a window and a soft cap, as KerasHub serves them: tokens are [tokens, 1]."""

    window, cap, scale = 5, 20.0, 0.3

    def __init__(self, hub, num_layers=2):
        self.hub, self.rope, self.num_layers = hub, kvattn.RoPE(H), num_layers
        keys = iter(jax.random.split(jax.random.key(0), 20))
        self.embedding = jax.random.normal(next(keys), (20, D))
        shapes = (D, N * H), (D, K * H), (D, K * H), (N * H, D)
        self.weights = [[jax.random.normal(next(keys), s) / 6 for s in shapes] for _ in range(num_layers)]

    def __call__(self, inputs, training=False):
        x, context = self.embedding[inputs["token_ids"]], self.hub.context
        assert inputs["token_ids"].shape == inputs["padding_mask"].shape and inputs["token_ids"].shape[1] == 1
        for query, key, value, out in self.weights:
            heads = lambda w, n, x=x: (x @ w).reshape(len(x), 1, n, H)
            turn = lambda y: self.rope(y, context.positions.reshape(-1, 1)).reshape(len(y), -1)
            index = context.layer_index
            new, attended = context.attend(
                context.kv_caches[index],
                turn(heads(query, N)),
                turn(heads(key, K)),
                heads(value, K).reshape(len(x), -1),
                np.float64(self.scale),
                H,
                N,
                K,
                sliding_window=self.window,
                soft_cap=self.cap,
            )
            context.updated_kv_caches[index] = new
            context.layer_index = index + 1
            x = x + (attended.reshape(len(x), 1, -1) @ out)
        return x

    def dense(self, tokens):
        """The same over a whole sequence [T], as one writes it without a cache."""
        x = self.embedding[tokens][None]
        at = jnp.arange(len(tokens))[None]
        for query, key, value, out in self.weights:
            heads = lambda w, n, x=x: (x @ w).reshape(1, -1, n, H)
            q, k = self.rope(heads(query, N), at), self.rope(heads(key, K), at)
            scores = jnp.einsum("btkgh,bskh->bkgts", q.reshape(1, -1, K, N // K, H), k) * self.scale
            scores = self.cap * jnp.tanh(scores / self.cap)
            seen = (at[0, :, None] >= at) & (at[0, :, None] - at < self.window)
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
            x = x + jnp.einsum("bkgts,bskh->btkgh", weights, heads(value, K)).reshape(1, len(tokens), -1) @ out
        return np.asarray(x[0])


def caches_of_layers(num_layers, how="plain"):
    """Caches of every make, one per layer."""

    def one():
        if how == "pages":
            cache = kvattn.PagedKVCache.create(16, 4, K, H, batch_size=B, max_pages=4, dtype=jnp.float32)
            return cache.with_tables(jnp.arange(8, dtype=jnp.int32).reshape(B, 4) * 2, np.zeros(B, np.int32))
        options = {"capacity": 16}
        if how == "window":
            options = {"policy": kvattn.SlidingWindow(5)}
        if how == "codec":
            options["codec"] = kvattn.Int8()
        return kvattn.KVCache.create(B, K, H, dtype=jnp.float32, **options)

    return [one() for _ in range(num_layers)]


TOKENS = np.random.default_rng(0).integers(1, 20, (B, T + 3)).astype(np.int32)
"""Three tokens follow a prompt."""


@pytest.mark.parametrize(
    ("how", "padding"), [("plain", "right"), ("window", "left"), ("pages", "right"), ("codec", "left")]
)
def test_a_hub_backbone_over_our_caches(hub, how, padding):
    backbone = Backbone(hub)
    caches = caches_of_layers(2, how)
    prompt = np.zeros((B, T), np.int32)
    for b, n in enumerate(LENGTHS):
        prompt[b, slice(0, n) if padding == "right" else slice(T - n, None)] = TOKENS[b, :n]
    step = jax.jit(
        lambda tokens, caches, num_new: adapters.keras_hub.forward(backbone, tokens, caches, num_new, padding=padding)
    )
    hidden, caches = step(prompt, caches, jnp.asarray(LENGTHS))
    outs = [[hidden[b, (n if padding == "right" else T) - 1]] for b, n in enumerate(LENGTHS)]
    for i in range(3):
        hidden, caches = step(
            np.stack([TOKENS[b, n + i : n + i + 1] for b, n in enumerate(LENGTHS)]), caches, jnp.ones(B, jnp.int32)
        )
        for b in range(B):
            outs[b].append(hidden[b, 0])
    for b, n in enumerate(LENGTHS):
        expected = backbone.dense(TOKENS[b, : n + 3])[n - 1 :]
        assert np.abs(np.stack(outs[b]) - expected).max() < (0.1 if how == "codec" else 1e-4)
    assert hub.context is None and [c.check().lengths.tolist() for c in caches] == [[10, 7]] * 2


def test_the_hub_is_refused_what_it_cannot_mean(hub):
    backbone, hook = Backbone(hub), adapters.keras_hub.paged_attention()
    with pytest.raises(errors.ConfigError, match="2 layers attended, got 3 caches"):
        adapters.keras_hub.forward(backbone, TOKENS[:, :1], caches_of_layers(3))
    q, k = jnp.ones((3, N * H)), jnp.ones((3, K * H))
    with pytest.raises(errors.ShapeError, match="2 rows, as many of each, got 3 tokens"):
        hook(caches_of_layers(1)[0], q, k, k, 1.0, H, N, K)
    with pytest.raises(errors.ConfigError, match="kv_caches"):
        hook(None, q, k, k, 1.0, H, N, K)
    with pytest.raises(errors.ConfigError, match="padding"):
        adapters.keras_hub.paged_attention(padding="both")


def test_without_the_hub_its_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(errors.MissingLibraryError, match="pip install keras-hub"):
        adapters.keras_hub.forward(lambda x: x, TOKENS, caches_of_layers(1))


COMMON = {"vocabulary_size": 20, "num_layers": 2, "intermediate_dim": 32}
GQA = {"num_query_heads": N, "num_key_value_heads": K, "hidden_dim": D}
FAMILIES = {
    "Llama": GQA,
    "Mistral": {**GQA, "sliding_window": 5},
    "Qwen": GQA,
    "Qwen3": {**GQA, "head_dim": H},
    "Gemma": {
        **GQA,
        "head_dim": H,
        "use_sliding_window_attention": True,
        "sliding_window_size": 5,
        "attention_logit_soft_cap": 20.0,
        "query_head_dim_normalize": True,
    },
    "Gemma3": {
        **GQA,
        "head_dim": H,
        "image_size": 16,
        "use_sliding_window_attention": True,
        "sliding_window_size": 5,
        "use_query_key_norm": True,
        "vision_encoder": None,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@as_users_run_it
def test_keras_hub_itself(family, monkeypatch):
    """Six families, prompt and single tokens, over caches in pages: the backbone's own outputs without a cache."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    hub = installed("keras_hub")
    backbone = getattr(hub.models, f"{family}Backbone")(**COMMON, **FAMILIES[family])
    caches, found = caches_of_layers(2, "pages"), []
    for part in (TOKENS[:, :T], *(TOKENS[:, T + i : T + i + 1] for i in range(3))):
        hidden, caches = adapters.keras_hub.forward(backbone, part, caches)
        found.append(np.asarray(hidden))
    whole = backbone({"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}, training=False)
    assert np.abs(np.concatenate(found, axis=1) - np.asarray(whole)).max() < 1e-4


# Tunix ----------------------------------------------------------------------------------------------------------------


@functools.cache
def decoder():
    config = kvattn.models.DecoderConfig(
        vocab_size=20, model_dim=16, num_layers=2, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=16
    )
    return kvattn.models.Decoder(config, rngs=nnx.Rngs(0))


def sampled(model, prompts, steps, size):
    """Greedy sampling as Tunix does it: prompts padded on the left with 0, masks, one compiled loop."""
    batch, width = len(prompts), max(map(len, prompts))
    tokens = np.zeros((batch, width + steps), np.int32)
    for b, prompt in enumerate(prompts):
        tokens[b, width - len(prompt) : width] = prompt
    graphdef, state = nnx.split(model)
    real = jnp.asarray(tokens[:, :width] != 0)
    mask = jnp.pad(real[:, None] & jnp.tril(jnp.ones((1, width, width), bool)), ((0, 0), (0, 0), (0, size - width)))

    @jax.jit
    def run(state, tokens):
        model = nnx.merge(graphdef, state)
        cache = model.init_cache(batch, size, jnp.float32)
        at = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
        logits, cache = model(tokens[:, :width], at, cache, mask)

        def one(carry):
            step, tokens, cache, logits = carry
            tokens = tokens.at[:, step].set(jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32))
            last = jax.lax.dynamic_slice(tokens, (0, step), (batch, 1))
            logits, cache = nnx.merge(graphdef, state)(
                last, positions=jnp.zeros((batch, 1), jnp.int32), cache=cache, attention_mask=jnp.ones((batch, 1, size))
            )
            return step + 1, tokens, cache, logits

        start = jnp.int32(width), tokens, cache, logits[:, -1:]
        return jax.lax.while_loop(lambda carry: carry[0] < width + steps, one, start)[1:3]

    tokens, cache = run(state, tokens)
    return [row[width:].tolist() for row in np.asarray(tokens)], cache


PROMPTS = [[5, 3, 9, 2, 7], [4, 11]]


@pytest.mark.parametrize("how", [{}, {"policy": kvattn.SlidingWindow(4), "codec": kvattn.Int8()}])
def test_a_sampler_of_tunix_kind(how):
    found, cache = sampled(adapters.tunix.SamplerModel(decoder(), **how), PROMPTS, 6, 16)
    assert found == kvattn.generate(decoder(), PROMPTS, 6, **how)
    assert cache[0].check().lengths.tolist() == [11, 8]


def test_the_last_logits_alone_and_a_mask_that_does_not_fit():
    model = adapters.tunix.SamplerModel(decoder(), dtype=jnp.float32)
    assert model.num_embed == 20
    tokens = jnp.asarray([[5, 3, 9], [0, 4, 11]], jnp.int32)
    mask = (tokens != 0)[:, None] & jnp.tril(jnp.ones((1, 3, 3), bool))
    every, _ = model(tokens, None, model.init_cache(2, 8, jnp.bfloat16), mask)
    last, cache = model(tokens, None, model.init_cache(2, 8, jnp.bfloat16), mask, decode_only_last_token=True)
    assert cache[0].keys["data"].dtype == jnp.float32
    assert last.shape == (2, 1, 20) and np.abs(last - every[:, -1:]).max() < 1e-5
    alone, _ = decoder()(tokens[1:, 1:])
    assert np.abs(every[1, 1:] - alone[0]).max() < 1e-4  # as if there had been no pad
    with pytest.raises(errors.ShapeError, match=r"\[2, 3, 3 or more\]"):
        model(tokens, None, cache, mask[:, 0])


@pytest.mark.slow
@as_users_run_it
def test_tunix_itself():
    sampler = installed("tunix.generate.sampler")

    class Words:
        """Numbers as text."""

        pad_id, eos_id, bos_id = (lambda self: 0), (lambda self: 19), (lambda self: None)

        def encode(self, text, **_):
            return [int(word) for word in text.split()]

        def decode(self, ids, **_):
            return " ".join(map(str, ids))

        def dedup_bos_ids(self, ids):
            return ids

    adapter = sampler.tok_adapter.TokenizerAdapter
    words = type("Words", (Words, adapter), {"__init__": lambda self: None})()
    for how in ({}, {"policy": kvattn.SlidingWindow(4)}):
        config = sampler.CacheConfig(cache_size=32, num_layers=2, num_kv_heads=K, head_dim=H)
        own = sampler.Sampler(adapters.tunix.SamplerModel(decoder(), dtype=jnp.float32, **how), words, config)
        out = own([" ".join(map(str, p)) for p in PROMPTS], max_generation_steps=6, return_logits=True)
        expected = kvattn.generate(decoder(), PROMPTS, 6, **how)
        for text, tokens in zip(out.text, expected, strict=True):
            until = tokens[: tokens.index(19)] if 19 in tokens else tokens
            assert [int(word) for word in text.split()][: len(until)] == until


# Bonsai ---------------------------------------------------------------------------------------------------------------


class Projected(nnx.Module):
    """An attention layer as Bonsai's Qwen 3 has it, by its parts; over whole sequences, without a cache."""

    def __init__(self, rngs):
        self.q_proj = nnx.Einsum("BTD,DNH->BTNH", (D, N, H), rngs=rngs)
        self.k_proj = nnx.Einsum("BSD,DKH->BSKH", (D, K, H), rngs=rngs)
        self.v_proj = nnx.Einsum("BSD,DKH->BSKH", (D, K, H), rngs=rngs)
        self.o_proj = nnx.Einsum("BTNH,NHD->BTD", (N, H, D), rngs=rngs)
        self.q_norm, self.k_norm = nnx.RMSNorm(H, rngs=rngs), nnx.RMSNorm(H, rngs=rngs)
        self.scale = H**-0.5

    def __call__(self, x):
        rope, at = kvattn.RoPE(H), jnp.arange(x.shape[1])[None]
        q, k = rope(self.q_norm(self.q_proj(x)), at), rope(self.k_norm(self.k_proj(x)), at)
        seen = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        scores = jnp.einsum("btkgh,bskh->bkgts", q.reshape(*q.shape[:2], K, N // K, H), k) * self.scale
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        out = jnp.einsum("bkgts,bskh->btkgh", weights, self.v_proj(x))
        return self.o_proj(out.reshape(q.shape))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_module_that_holds_a_cache(padding):
    layer = Projected(nnx.Rngs(0))
    converted = adapters.bonsai.Attention(layer, kvattn.RoPE(H))
    (cache,) = adapters.bonsai.init_cache(1, B, K, H, capacity=16, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(1), (B, T + 3, D))

    @nnx.jit
    def forward(layer, cache, x, segment_ids):
        return layer(x, cache, segment_ids)

    prompt, real = np.full((B, T, D), np.nan, np.float32), np.zeros((B, T), np.int32)
    for b, n in enumerate(LENGTHS):
        where = slice(T - n, None) if padding == "left" else slice(0, n)
        prompt[b, where], real[b, where] = x[b, :n], 1
    outs = [np.asarray(forward(converted, cache, prompt, real))]
    assert (outs[0][real == 0] == 0).all()
    outs = [[outs[0][b][real[b] == 1]] for b in range(B)]
    for i in range(3):
        new = np.stack([x[b, n + i : n + i + 1] for b, n in enumerate(LENGTHS)])
        out = forward(converted, cache, new, np.ones((B, 1), np.int32))
        for b in range(B):
            outs[b].append(out[b])
    for b, n in enumerate(LENGTHS):
        assert np.abs(np.concatenate(outs[b]) - layer(x[b : b + 1, : n + 3])[0]).max() < 1e-5
    cache.check()
    assert cache.lengths.tolist() == [10, 7]


def test_a_module_forgets_nothing_and_refuses_what_it_does_not_know():
    cache = LayerCache(kvattn.KVCache.create(1, K, H, capacity=4, dtype=jnp.float32))
    q, k = jnp.ones((1, 3, N, H)), jnp.ones((1, 3, K, H))
    assert cache.attend(q, k, k).shape == q.shape
    with pytest.raises(errors.CapacityError):
        cache.attend(q, k, k)
    nnx.jit(lambda cache: cache.attend(q, k, k))(cache)  # records it
    with pytest.raises(errors.CapacityError):
        cache.check()
    assert cache.lengths.tolist() == [3]
    with pytest.raises(errors.ConfigError, match="k_proj"):
        adapters.bonsai.Attention(types.SimpleNamespace(q_proj=1))


@pytest.mark.slow
@as_users_run_it
def test_bonsai_itself():
    """Qwen 3, its own `forward` over ours with left pads, and over its own without: prompt, and single tokens.

    (Over its own with pads, the positions of single tokens are those of the longest row.)
    """
    modeling = installed("bonsai.models.qwen3.modeling")
    sizes = {"vocab_size": 20, "emb_dim": D, "mlp_dim": 16, "num_heads": N, "num_kv_heads": K, "head_dim": H}
    config = modeling.ModelConfig(
        num_layers=2, rope_theta=1_000_000, rope_scaling_factor=1.0, local_rope_theta=1e4, norm_eps=1e-6,
        tie_word_embeddings=True, **sizes,
    )  # fmt: skip
    model = modeling.Qwen3(config, rngs=nnx.Rngs(0))
    parts = [np.array([[0, 0, 3, 4, 5], [1, 2, 3, 4, 5]]), np.array([[7], [8]]), np.array([[9], [10]])]

    def run(cache, parts):
        outs = []
        for part in parts:
            logits, cache = modeling.forward(model, cache, jnp.asarray(part), 0)
            outs.append(np.asarray(logits, np.float32))
        return np.stack(outs)

    alone = [[part[b : b + 1, 2 * (i == b == 0) :] for i, part in enumerate(parts)] for b in range(B)]
    own = [run(modeling.init_cache(config, 1, 5, 3, jnp.float32), row) for row in alone]
    adapters.bonsai.convert(model, kvattn.RoPE(H, theta=1_000_000))
    ours = run(adapters.bonsai.init_cache(2, B, K, H, capacity=8, dtype=jnp.float32), parts)
    assert np.abs(np.concatenate(own, axis=1) - ours).max() < 1e-4


# Flax -----------------------------------------------------------------------------------------------------------------


def one_by_one(layer, x):
    """A sequence through Flax's own decode cache."""
    layer.init_cache(x.shape)
    layer.set_attributes(decode=True)
    step = nnx.jit(lambda layer, x: layer(x))
    return np.concatenate([np.asarray(step(layer, x[:, t : t + 1])) for t in range(x.shape[1])], axis=1)


RULES = {"window": 3, "softcap": 5.0, "scale": 0.2, "sinks": jnp.arange(N, dtype=jnp.float32)}


def test_flax_layers_with_our_attention():
    """Over whole sequences and over its own decode cache, what our layer of the same parameters gives."""
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    options = {"num_kv_heads": K, "decode": False, "rngs": nnx.Rngs(0)}
    layer = nnx.MultiHeadAttention(N, D, attention_fn=adapters.flax.attention_fn(**RULES), **options)
    q, k, v = (getattr(layer, part)(x) for part in ("query", "key", "value"))
    out, _ = kvattn.cached_attention(
        q, k, v, kvattn.KVCache.create(B, K, D // N, capacity=T, dtype=jnp.float32), **RULES
    )
    expected = np.asarray(layer.out(out))
    whole = layer(x, is_causal=True)
    assert np.abs(whole - expected).max() < 1e-5
    masked = layer(x, mask=nnx.make_causal_mask(x[..., 0]))
    assert np.abs(masked - expected).max() < 1e-5
    both = layer(x, mask=jnp.ones((B, 1, T, T), bool), is_causal=True)
    assert np.abs(both - expected).max() < 1e-5
    assert np.abs(one_by_one(layer, x) - expected).max() < 1e-5


def test_linen_layers_with_our_attention():
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    ours = adapters.flax.attention_fn(window=3)
    module = functools.partial(nn.MultiHeadDotProductAttention, N, attention_fn=ours, deterministic=True)
    variables = module().init(jax.random.key(0), x)
    expected = module().apply(variables, x, mask=nn.make_causal_mask(x[..., 0]))
    band = np.tril(np.ones((T, T), bool)) & ~np.tril(np.ones((T, T), bool), -3)
    plain = nn.MultiHeadDotProductAttention(N, deterministic=True).apply(variables, x, mask=band[None, None])
    assert np.abs(expected - plain).max() < 1e-5
    decoding = module(decode=True)
    cache = decoding.init(jax.random.key(0), x)["cache"]
    outs = []
    for t in range(T):
        out, changed = decoding.apply({**variables, "cache": cache}, x[:, t : t + 1], mutable=["cache"])
        cache = changed["cache"]
        outs.append(out)
    assert np.abs(np.concatenate(outs, axis=1) - expected).max() < 1e-5


def test_a_window_of_nothing_is_refused():
    with pytest.raises(errors.RangeError, match="window"):
        adapters.flax.attention_fn(window=0)
