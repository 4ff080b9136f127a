"""The decoder: cached calls against the whole forward pass, checkpoints."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from flax import nnx
from safetensors.numpy import load_file, save_file

import kvattn
from kvattn.errors import (
    CacheCorruptionError,
    CacheVersionError,
    ConfigError,
    DTypeError,
    KVAttnError,
    RangeError,
    ShapeError,
)
from kvattn.layers import stateless
from kvattn.models import Decoder, DecoderConfig, load, save

TINY = DecoderConfig(vocab_size=61, model_dim=24, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8, mlp_dim=40)
CONFIGS = {
    "gqa": TINY,
    "mha": dataclasses.replace(TINY, num_kv_heads=6),
    "mqa": dataclasses.replace(TINY, num_kv_heads=1),
    "windows": dataclasses.replace(TINY, windows=(5, None)),
    "caps, own head": dataclasses.replace(TINY, softcap=5.0, logit_softcap=3.0, tie_embeddings=False),
    "scaled rope": dataclasses.replace(TINY, rope_theta=500.0, rope_scaling={"rope_type": "linear", "factor": 4.0}),
}


def decoder(config=TINY, **options):
    return small_models.decoder(config, **options)


def random_tokens(batch, length, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, TINY.vocab_size)


CHUNKS = ([1] * 17, [17], [1, 7, 1, 8])


@pytest.mark.parametrize(
    ("name", "chunks"),
    [("windows", chunks) for chunks in CHUNKS] + [(name, CHUNKS[2]) for name in CONFIGS if name != "windows"],
    ids=str,
)
def test_cached_is_the_full_forward_pass(name, chunks):
    model, tokens = decoder(CONFIGS[name]), random_tokens(2, 17)
    full, none = model(tokens)
    assert none is None and full.shape == (2, 17, TINY.vocab_size) and full.dtype == jnp.float32
    cache, out, start = model.make_cache(2, 32), [], 0
    for size in chunks:
        logits, cache = model(tokens[:, start : start + size], cache)
        out.append(logits)
        start += size
    chex.assert_trees_all_close(jnp.concatenate(out, axis=1), full, atol=1e-5 * float(jnp.std(full)), rtol=1e-5)


def test_every_parameter_and_token_matters():
    model, tokens = decoder(CONFIGS["caps, own head"]), random_tokens(1, 9)
    graph, state = nnx.split(model)
    gradients = jax.grad(lambda state: jnp.sum(jnp.sin(nnx.merge(graph, state)(tokens)[0])))(state)
    for path, x in jax.tree.leaves_with_path(gradients):
        assert float(jnp.max(jnp.abs(x))) > 1e-6, path
    logits, _ = model(tokens)
    other, _ = model(tokens.at[0, 4].add(1).astype(jnp.int32) % TINY.vocab_size)
    changed = jnp.max(jnp.abs(logits - other), axis=(0, 2)) > 0
    assert changed.tolist() == [False] * 4 + [True] * 5  # causal


def test_ragged_rows_are_as_alone():
    model, lengths = decoder(CONFIGS["windows"]), [9, 1, 4]
    tokens = random_tokens(3, 9)
    cache = model.make_cache(3, 16)
    first, cache = model(tokens, cache, jnp.asarray(lengths, jnp.int32))
    second, cache = model(tokens[:, :2], cache, jnp.asarray([0, 2, 1], jnp.int32))
    assert [layer.lengths.tolist() for layer in cache] == [[9, 3, 5]] * 2
    for row, (length, more) in enumerate(zip(lengths, [0, 2, 1], strict=True)):
        alone = jnp.concatenate([tokens[row, :length], tokens[row, :more]])[None]
        expected, _ = model(alone)
        got = jnp.concatenate([first[row, :length], second[row, :more]])
        chex.assert_trees_all_close(got, expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes", [dict(positions="learned", max_positions=16), pytest.param({}, marks=pytest.mark.slow)]
)
def test_pads_on_either_side(changes):
    """With pads on the left, the same: logits of what is real, and the caches; without a cache too."""
    model = decoder(dataclasses.replace(TINY, num_layers=1, windows=5, **changes))
    lengths, turns = jnp.asarray([5, 1, 3], jnp.int32), jnp.asarray([0, 2, 1], jnp.int32)
    apply, weights = stateless(model)
    step = jax.jit(apply, static_argnames="padding")
    right, left = (model.make_cache(3, 16) for _ in range(2))
    for num_new in (lengths, turns):
        late = 5 - num_new
        tokens = random_tokens(3, 5, seed=int(num_new[0]))
        turned = jnp.stack([jnp.roll(row, int(by)) for row, by in zip(tokens, late, strict=True)])
        expected, right = step(weights, tokens, right, num_new, padding="right")
        got, left = step(weights, turned, left, num_new, padding="left")
        whole, _ = step(weights, turned, None, num_new, padding="left")
        alone, _ = step(weights, tokens, None, num_new, padding="right")
        for row, count in enumerate(num_new.tolist()):
            chex.assert_trees_all_close(got[row, 5 - count :], expected[row, :count], atol=1e-5, rtol=1e-5)
            chex.assert_trees_all_close(whole[row, 5 - count :], alone[row, :count], atol=1e-5, rtol=1e-5)
        chex.assert_trees_all_close(left, right, atol=1e-5, rtol=1e-5)
    assert left[0].lengths.tolist() == [5, 3, 4]


def test_pads_are_checked():
    model, tokens = decoder(), random_tokens(2, 3)
    for num_new, error in (([4, 1], RangeError), ([1, -1], RangeError), ([1], ShapeError), ([1.0, 1.0], DTypeError)):
        with pytest.raises(error, match="num_new"):
            model(tokens, None, np.asarray(num_new), padding="left")
    with pytest.raises(ConfigError, match="padding"):
        model(tokens, padding="both")
    chex.assert_trees_all_equal(model(tokens, padding="left")[0], model(tokens)[0])  # all are real


def test_logits_of_some_tokens():
    model, tokens = decoder(CONFIGS["caps, own head"]), random_tokens(2, 4)
    full, _ = model(tokens)
    index = np.array([[3, 0, 3], [1, 2, 0]])
    some, _ = model(tokens, logits_at=index)
    assert some.shape == (2, 3, TINY.vocab_size)
    chex.assert_trees_all_close(some, full[np.arange(2)[:, None], index], atol=1e-5, rtol=1e-5)
    assert model(tokens, logits_at=np.zeros((2, 0), int))[0].shape == (2, 0, TINY.vocab_size)
    apply, weights = stateless(model)
    (outside, _) = jax.jit(apply)(weights, tokens, logits_at=jnp.asarray([[4, 3], [-1, 2]]))
    assert np.isnan(outside[:, 0]).all() and not np.isnan(outside[:, 1]).any()
    for wrong, error in (
        ([[4], [0]], RangeError),
        ([[-1], [0]], RangeError),
        ([3, 0], ShapeError),
        ([[3]], ShapeError),
        ([[1.0], [0.0]], DTypeError),
    ):
        with pytest.raises(error, match="logits_at"):
            model(tokens, logits_at=np.asarray(wrong))


def test_layers_with_a_window_keep_a_small_cache():
    cache = decoder(CONFIGS["windows"]).make_cache(2, 32)
    assert [layer.num_slots for layer in cache] == [5, 32]
    assert cache[0].policy == kvattn.SlidingWindow(5)
    assert all(layer.dtype == jnp.float32 for layer in cache)
    assert decoder().make_cache(1, 8, dtype=jnp.bfloat16)[0].dtype == jnp.bfloat16


def test_a_decode_loop_compiles_once_and_works_in_place():
    model = decoder()
    apply, weights = stateless(model)
    step = jax.jit(chex.assert_max_traces(apply, n=1), donate_argnames="cache")
    cache = model.make_cache(2, 40)
    token = random_tokens(2, 1)
    for _ in range(40):
        given = cache
        logits, cache = step(weights, token, cache=cache)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        assert all(x.is_deleted() for x in jax.tree.leaves([layer.keys for layer in given]))
    for layer in cache:
        assert layer.check().lengths.tolist() == [40, 40]


def test_compute_and_parameter_dtypes(tmp_path):
    tokens = random_tokens(1, 6)
    full, _ = decoder()(tokens)
    computed = Decoder(TINY, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(computed, nnx.state(decoder()))
    stored = load(save(decoder(), tmp_path / "model.safetensors", dtype=jnp.bfloat16))
    for model in (computed, stored):
        logits, _ = model(tokens)
        assert logits.dtype == jnp.float32
        assert model.make_cache(1, 8)[0].dtype == jnp.bfloat16
        cached, _ = model(tokens, model.make_cache(1, 8))
        for other in (full, cached):
            assert 0 < float(jnp.std(logits - other)) < 0.1 * float(jnp.std(full))


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        (np.zeros((1, 2), np.float32), DTypeError),
        (np.zeros((2,), np.int32), ShapeError),
        (np.full((1, 2), 61, np.int32), RangeError),
        (np.full((1, 2), -1, np.int32), RangeError),
    ],
    ids=["floats", "rank", "too large", "negative"],
)
def test_the_decoder_refuses(tokens, error):
    with pytest.raises(error):
        decoder()(tokens)


def test_the_decoder_refuses_a_wrong_number_of_caches():
    model = decoder()
    with pytest.raises(ShapeError, match="2 layers"):
        model(random_tokens(1, 1), model.make_cache(1, 4)[:1])


# Settings and checkpoints -------------------------------------------------------------------------


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (dict(vocab_size=0), ConfigError),
        (dict(num_layers=1.0), DTypeError),
        (dict(num_kv_heads=4), ConfigError),
        (dict(head_dim=None, model_dim=25), ConfigError),
        (dict(head_dim=7), ConfigError),  # odd: RoPE turns pairs
        (dict(windows=(1, 2, 3)), ConfigError),
        (dict(windows=0), RangeError),
        (dict(norm_epsilon=float("nan")), RangeError),
        (dict(norm_epsilon="small"), DTypeError),
        (dict(tie_embeddings=1), DTypeError),
        (dict(softcap=0.0), RangeError),
        (dict(logit_softcap=-1.0), RangeError),
        (dict(rope_scaling={"rope_type": "unheard"}), ConfigError),
    ],
    ids=str,
)
def test_settings_refuse(change, error):
    with pytest.raises(error):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_comes_back(name, tmp_path):
    model = decoder(CONFIGS[name])
    again = load(save(model, tmp_path / "new folder" / "model.safetensors"))
    assert again.config == model.config and hash(again.config) == hash(model.config)
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(model))
    chex.assert_trees_all_equal(again(random_tokens(1, 5))[0], model(random_tokens(1, 5))[0])
    assert sorted(x.name for x in (tmp_path / "new folder").iterdir()) == ["model.json", "model.safetensors"]


def test_a_checkpoint_changes_dtype(tmp_path):
    path = save(decoder(), tmp_path / "model.safetensors", dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(load(path)))} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(nnx.state(load(path, dtype=jnp.float32)))} == {jnp.dtype(jnp.float32)}
    assert load(path).make_cache(1, 4)[0].dtype == jnp.bfloat16


@pytest.fixture
def checkpoint(tmp_path):
    return save(decoder(), tmp_path / "model.safetensors")


def test_all_tensors_that_do_not_fit_are_named(checkpoint):
    tensors = load_file(checkpoint)
    del tensors["norm.scale"], tensors["layers.1.mlp.up.kernel"]
    tensors["layers.2.mlp.up.kernel"] = np.zeros((3, 4), np.float32)
    tensors["embed.embedding"] = np.zeros((60, 24), np.float32)
    tensors["layers.0.mlp.up.kernel"] = np.zeros((24, 40), np.int32)
    save_file(tensors, checkpoint)
    with pytest.raises(CacheVersionError) as caught:
        load(checkpoint)
    for part in (
        "missing: layers.1.mlp.up.kernel (24, 40)",
        "missing: norm.scale (24,)",
        "left over: layers.2.mlp.up.kernel (3, 4)",
        "shape: embed.embedding is (60, 24), the settings make it (61, 24)",
        "kind: layers.0.mlp.up.kernel holds int32",
    ):
        assert part in str(caught.value)
    assert str(caught.value).count("\n") == 5


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_cut_file_is_refused(checkpoint, keep):
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    with pytest.raises(CacheCorruptionError, match=r"model\.safetensors"):
        load(checkpoint)


def _without(name):
    return lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != name})


@pytest.mark.parametrize(
    ("edit", "error", "part"),
    [
        (lambda text: text[:20], CacheCorruptionError, "JSON"),
        (lambda text: "[]", ConfigError, "JSON object"),
        (_without("format"), ConfigError, "format"),
        (_without("model_dim"), ConfigError, "model_dim"),
        (lambda text: text.replace('"softcap"', '"hardcap"', 1), ConfigError, "hardcap"),
        (lambda text: text.replace('"num_heads": 6', '"num_heads": "six"'), ConfigError, "num_heads"),
        (lambda text: text.replace('"num_layers": 2', '"num_layers": 0'), ConfigError, "num_layers"),
        (lambda text: text.replace('"windows": null', '"windows": [3]'), ConfigError, "windows"),
    ],
)
def test_settings_that_do_not_fit_are_refused(checkpoint, edit, error, part):
    settings = checkpoint.with_suffix(".json")
    settings.write_text(edit(settings.read_text()))
    with pytest.raises(error, match=part):
        load(checkpoint)


def test_files_that_are_not_there(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="safetensors"):
        load(tmp_path / "model.pickle")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "other.safetensors")
    checkpoint.unlink()
    with pytest.raises(FileNotFoundError):
        load(checkpoint)
    assert issubclass(CacheVersionError, KVAttnError)
