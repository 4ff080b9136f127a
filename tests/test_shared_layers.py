"""Layers of models that share caches: the layers, decoders of them, generation and the engine."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from decoder_oracle import logits_of
from flax import nnx

import kvattn
from kvattn import errors, layers
from kvattn.cache.status import OVERFLOW
from kvattn.layers import linen, stateless
from kvattn.models import Decoder, DecoderConfig
from kvattn.serving import Engine

B, T, D = 2, 9, 16
SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope": kvattn.RoPE(8), "qk_norm": "rms"}
FAST = {"xla_backend_optimization_level": 0}
X = np.random.default_rng(0).normal(size=(2, B, T, D)).astype(np.float32)
"""What comes to the owner, and to the reader."""


# Layers ---------------------------------------------------------------------------------------------------------------


def nnx_pair(**settings):
    """An owner and a reader as functions (x, **options), and the owner's `make_cache` and `keys_and_values`."""
    owner, reader = (
        layers.GroupedQueryAttention(in_features=D, shares_kv=shares, rngs=nnx.Rngs(i), **SIZES, **settings)
        for i, shares in enumerate((False, True))
    )
    return owner, reader, owner.make_cache, owner.keys_and_values


def linen_pair(**settings):
    owner, reader = (linen.GroupedQueryAttention(shares_kv=shares, **SIZES, **settings) for shares in (False, True))
    variables = owner.init(jax.random.key(0), X[0])
    kv = owner.apply(variables, X[0], method="keys_and_values")
    others = reader.init(jax.random.key(1), X[1], kv=kv)
    assert set(others["params"]) == {"query", "query_ln", "out"}
    project = functools.partial(owner.apply, variables, method="keys_and_values")
    return functools.partial(owner.apply, variables), functools.partial(reader.apply, others), owner.make_cache, project


@pytest.mark.parametrize("pair", [nnx_pair, linen_pair])
def test_layers(pair):
    """With caches, in a chunk and then one token, as over full sequences."""
    owner, reader, make_cache, project = pair(window=4)

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(x, asked):
        full = owner(x, is_causal=True), reader(asked, kv=project(x), is_causal=True)
        kv = project(x[:, :-1])
        before = make_cache(B)
        beside, same = reader(asked[:, :-1], cache=before, kv=kv, append=False)
        own, cache = owner(x[:, :-1], cache=before, kv=kv)
        _, cache = owner(x[:, -1:], cache=cache)
        last, cache = reader(asked[:, -1:], cache=cache, append=False)
        return full, own, jnp.concatenate([beside, last], 1), same, cache

    (own, expected), found, read, same, cache = run(*X)
    np.testing.assert_allclose(found, own[:, :-1], atol=2e-5)
    np.testing.assert_allclose(read, expected, atol=2e-5)
    assert same.lengths.tolist() == [0, 0] and cache.check().lengths.tolist() == [T, T]


def test_values_that_are_keys():
    """Before their norm, and normalised themselves; Linen's are NNX's."""
    owner = layers.MultiHeadAttention(
        4, D, head_dim=8, qk_norm="rms", values_from_keys=True, value_norm=True, rngs=nnx.Rngs(0)
    )
    assert owner.value is None
    key, value = owner.keys_and_values(X[0])
    raw = np.einsum("btd,dnh->btnh", X[0], owner.key.kernel[...])
    normed = raw / np.sqrt((raw**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(value, normed, atol=1e-5)
    np.testing.assert_allclose(key, normed * np.asarray(owner.key_ln.scale[...]), atol=1e-5)
    twin = linen.MultiHeadAttention(
        num_heads=4, head_dim=8, qk_norm="rms", values_from_keys=True, value_norm=True, use_bias=True
    )
    params = {"params": nnx.to_pure_dict(nnx.state(owner))}
    np.testing.assert_allclose(twin.apply(params, X[0], is_causal=True), owner(X[0], is_causal=True), atol=1e-5)


def test_latent_layers():
    """The second one's latents are of no use: its queries go to those that are cached."""
    sizes = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "rope": kvattn.RoPE(4)}
    owner, reader = (layers.MultiHeadLatentAttention(4, D, rngs=nnx.Rngs(i), **sizes) for i in (0, 1))
    _, cache = owner(X[0], cache=owner.make_cache(B, T))
    out, same = reader(X[1], cache=cache, append=False)
    # Its own latents in place of the owner's: then the same cache is its own.
    twin = nnx.clone(owner)
    _, theirs = reader(X[1], cache=twin.make_cache(B, T))
    other, _ = reader(X[1], cache=theirs, append=False)
    own, _ = reader(X[1], cache=reader.make_cache(B, T))
    np.testing.assert_allclose(other, own, atol=2e-5)
    assert np.abs(np.asarray(out - own)).max() > 0.01 and same.lengths.tolist() == [T, T]
    with pytest.raises(errors.ConfigError, match="append=False belongs to cache="):
        reader(X[1], append=False)


WRONG = {
    "without keys": (errors.ConfigError, "shares_kv=True", lambda o, r, c: r(X[1])),
    "an append": (errors.ConfigError, "append=False", lambda o, r, c: r(X[1], cache=c)),
    "a cache of its own": (errors.ConfigError, "keeps no keys", lambda o, r, c: r.make_cache(B, T)),
    "pages of its own": (
        errors.ConfigError, "keeps no keys", lambda o, r, c: r.make_paged_cache(4, batch_size=B, max_length=T),
    ),
    "Flax's cache": (errors.ConfigError, "keeps no keys", lambda o, r, c: r.init_cache((B, T, D))),
    "an encoder's": (errors.ConfigError, "keeps no keys", lambda o, r, c: r.make_cross_cache(X[0])),
    "its keys": (errors.ConfigError, "keeps no keys", lambda o, r, c: r.keys_and_values(X[0])),
    "no cache": (errors.ConfigError, "belongs to cache=", lambda o, r, c: o(X[0], append=False)),
    "inputs of keys": (errors.ConfigError, "inputs_k", lambda o, r, c: o(X[0], X[1], cache=c, append=False)),
    "inputs of keys beside keys": (
        errors.ConfigError, "inputs_k", lambda o, r, c: o(X[0], X[1], kv=o.keys_and_values(X[0])),
    ),
    "keys while decoding": (
        errors.ConfigError, "decode=True", lambda o, r, c: o(X[0], kv=o.keys_and_values(X[0]), decode=True),
    ),
    "keys alone": (errors.DTypeError, "pair", lambda o, r, c: o(X[0], kv=o.keys_and_values(X[0])[0])),
    "no bool": (errors.DTypeError, "append", lambda o, r, c: o(X[0], cache=c, append="no")),
    "an empty cache": (errors.RangeError, "last tokens", lambda o, r, c: r(X[1], cache=c, append=False)),
    "values and none": (
        errors.ConfigError, "value_norm",
        lambda o, r, c: layers.MultiHeadAttention(4, D, shares_kv=True, value_norm=True, rngs=nnx.Rngs(0)),
    ),
    "longer values": (
        errors.ConfigError, "values_from_keys",
        lambda o, r, c: layers.MultiHeadAttention(4, D, values_from_keys=True, value_head_dim=8, rngs=nnx.Rngs(0)),
    ),
}  # fmt: skip


@pytest.mark.wrong_types
@pytest.mark.parametrize("case", WRONG)
def test_calls_that_cannot_be(case):
    error, text, call = WRONG[case]
    owner, reader, make_cache, _ = nnx_pair()
    with pytest.raises(error, match=text):
        call(owner, reader, make_cache(B, T))


# Decoders -------------------------------------------------------------------------------------------------------------

CONFIG = DecoderConfig(
    vocab_size=32, model_dim=16, num_layers=4, num_heads=4, num_kv_heads=(2, 1, 2, 1), head_dim=(4, 8, 4, 8),
    mlp_dim=(16, 16, 24, 24), windows=(4, None, 4, None), kv_source=(0, 1, 0, 1),
)  # fmt: skip
LENGTHS = np.array([11, 6], np.int32)


@functools.cache
def model_of(config=CONFIG, **options):
    return small_models.decoder(config, 0.3, **options)


@functools.cache
def call_of(config=CONFIG):
    apply, weights = stateless(model_of(config))
    call = jax.jit(apply, donate_argnames="cache", compiler_options=FAST)
    return lambda *args: call(weights, *args)


def in_chunks(call, cache, prompts, size):
    """The logits of ragged prompts, so many tokens at a time."""
    out = []
    for start in range(0, prompts.shape[1], size):
        chunk = np.zeros((len(prompts), size), np.int32)
        given = prompts[:, start : start + size]
        chunk[:, : given.shape[1]] = given
        logits, cache = call(jnp.asarray(chunk), cache, jnp.asarray(np.clip(LENGTHS - start, 0, size)))
        out.append(np.asarray(logits)[:, : given.shape[1]])
    return np.concatenate(out, 1), cache


@pytest.mark.parametrize(
    ("policy", "size"),
    [(None, 5), (None, 11), (kvattn.StreamingLLM(2, 4), 1), (kvattn.H2O(3, 3), 1), (kvattn.H2O(8, 8), 5)],
    ids=str,
)
def test_decoders(policy, size):
    """In chunks and token by token, against lists of tokens; budgets, token by token, unless they hold all."""
    model = model_of()
    prompts = np.random.default_rng(1).integers(0, 32, (2, 11))
    cache = model.make_cache(2, 16, policy=policy) if policy is None else model.make_cache(2, policy=policy)
    assert len(cache) == 2 and [layer.key_head_dim for layer in cache] == [4, 8]
    logits, cache = in_chunks(call_of(), cache, prompts, size)
    for row, length in enumerate(LENGTHS):
        expected, _ = logits_of(model, prompts[row, :length], policy)
        np.testing.assert_allclose(logits[row, :length], expected, atol=2e-4 * expected.std())
    assert all((layer.check().lengths == LENGTHS).all() for layer in cache)


def test_what_comes_out_of_generate_and_of_the_engine():
    """The same tokens: whole, in chunks, in pages, with prefixes shared."""
    model = model_of()
    rng = np.random.default_rng(2)
    same = rng.integers(0, 32, 8).tolist()
    prompts = [[*same, *rng.integers(0, 32, n).tolist()] for n in (3, 1, 5)]
    expected = kvattn.generate(model, prompts, 5)
    assert kvattn.generate(model, prompts, 5, prefill_chunk=4) == expected
    begun, cache = kvattn.generate(model, [p[:9] for p in prompts[::2]], 0, capacity=32, return_cache=True)
    assert begun == [[], []] and len(cache) == 2
    assert kvattn.generate(model, [p[9:] for p in prompts[::2]], 5, cache=cache) == expected[::2]
    engine = Engine(model, num_pages=24, page_size=4, max_batch=2, max_length=24, prefill_chunk=5)
    requests = [engine.submit(prompt, 5) for prompt in prompts]
    engine.run()
    assert [request.tokens[0] for request in requests] == expected
    assert engine.stats()["cached_prompt_tokens"] > 0


def test_a_step_works_in_place():
    """A cache that other layers read is not copied for it."""
    call, cache = call_of(), model_of().make_cache(2, 16)
    for t in range(3):
        given = jax.tree.leaves([(layer.keys, layer.values) for layer in cache])
        _, cache = call(jnp.full((2, 1), t, jnp.int32), cache)
        assert all(x.is_deleted() for x in given)


def test_what_is_refused_stays_refused():
    """Under jit a chunk that does not fit is dropped, and nothing of it is read."""
    _, cache = call_of()(jnp.ones((2, 11), jnp.int32), model_of().make_cache(2, 8))
    assert cache[1].lengths.tolist() == [0, 0] and cache[1].status.tolist() == [OVERFLOW] * 2
    with pytest.raises(errors.CapacityError):
        cache[1].check()


@pytest.mark.slow
@pytest.mark.parametrize("axes", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_decoders_on_a_mesh(axes):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(axes, axes))
    split = Decoder(CONFIG, mesh=mesh, rngs=nnx.Rngs(0))
    nnx.update(split, nnx.state(model_of()))
    prompts = np.random.default_rng(1).integers(0, 32, (2, 11))
    apply, weights = stateless(split)
    call = jax.jit(apply, compiler_options=FAST)
    got, _ = in_chunks(lambda *args: call(weights, *args), split.make_cache(2, 16), prompts, 6)
    expected, _ = in_chunks(call_of(), model_of().make_cache(2, 16), prompts, 6)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(got[row, :length], expected[row, :length], atol=1e-4)


BAD = {
    "a later layer": ({"kv_source": (0, 1, 3, 3)}, "earlier layer"),
    "one that has none": ({"kv_source": (0, 1, 0, 2)}, "earlier layer"),
    "another size": ({"kv_source": (0, 1, 1, 1)}, "key/value heads of"),
    "less than it sees": (
        {"kv_source": (0, 1, 0, 1), "windows": (4, None, 5, None)}, "sees 5 tokens of layer 0, which keeps 4",
    ),
    "other frequencies": (
        {"kv_source": (0, 0, 2, 2), "num_kv_heads": 2, "head_dim": 4, "windows": (None, 4, None, None),
         "local_rope_theta": 5e4}, "turn them alike",
    ),
    "experts beside nothing": ({"experts_beside": True}, "experts_beside"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_sources_that_cannot_be(case):
    changes, text = BAD[case]
    with pytest.raises(errors.ConfigError, match=text):
        dataclasses.replace(CONFIG, **changes)


def test_numbers_of_caches():
    model = model_of()
    with pytest.raises(errors.ShapeError, match="4 layers, 2 of which keep keys and values, but was given 4 caches"):
        model(jnp.ones((1, 2), jnp.int32), [*model.make_cache(1, 8)] * 2)
    with pytest.raises(errors.ShapeError, match="policy has 4 entries for 4 layers, 2 of which"):
        model.make_cache(1, 8, policy=[None] * 4)


def test_heads_become_fewer():
    """`convert_to_gqa` leaves layers without keys and values as they are."""
    config = dataclasses.replace(CONFIG, num_kv_heads=4, head_dim=4)
    fewer = kvattn.models.convert_to_gqa(model_of(config), 2)
    assert fewer.config.layer_kv_heads == (2,) * 4 and fewer.layers[2].attention.num_kv_heads == 2
    logits, cache = fewer(jnp.ones((1, 3), jnp.int32), fewer.make_cache(1, 8))
    assert cache[0].num_kv_heads == 2 and np.isfinite(np.asarray(logits)).all()
    values = dataclasses.replace(config, values_from_keys=True)
    with pytest.raises(errors.UnsupportedError, match="no projection to values"):
        kvattn.models.convert_to_gqa(model_of(values), 2)
