"""kvattn in the place of Flax and JAX by assignment, as people do it: what it means does not change."""

import ast
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import kvattn
from kvattn import layers
from kvattn.layers import linen
from kvattn.models import convert_to_gqa

ROOT = pathlib.Path(__file__).resolve().parent.parent
N, D = 2, 8
X = jax.random.normal(jax.random.key(0), (1, 4, D))
FLAX = {"nnx": nnx.dot_product_attention, "linen": nn.dot_product_attention, "layer": nnx.MultiHeadAttention}


@pytest.fixture
def swapped(monkeypatch):
    """Every name that has a twin in kvattn."""
    import flax.linen.attention
    import flax.nnx.nn.attention

    monkeypatch.setattr(jax.nn, "dot_product_attention", kvattn.dot_product_attention)
    for module in (nnx, flax.nnx.nn.attention):
        for name in ("MultiHeadAttention", "dot_product_attention"):
            monkeypatch.setattr(module, name, getattr(layers, name))
    monkeypatch.setattr(nnx, "RoPE", kvattn.RoPE)
    for module in (nn, flax.linen.attention):
        monkeypatch.setattr(module, "dot_product_attention", layers.dot_product_attention)
        for name in ("MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention"):
            monkeypatch.setattr(module, name, getattr(linen, name))


HEADS = X.reshape(1, 4, N, D // N)


def layer(**settings):
    return layers.MultiHeadAttention(N, D, **settings, rngs=nnx.Rngs(0))


def layer_with_cache():
    module = layer(attention_fn=FLAX["nnx"])
    return lambda x: module(x, cache=module.make_cache(1, 4))[0]


def linen_layer(with_cache=False, **settings):
    module = linen.MultiHeadDotProductAttention(N, **settings)
    variables = module.init(jax.random.key(0), X)
    if not with_cache:
        return lambda x: module.apply(variables, x)
    cache = module.make_cache(1, 4, in_features=D)
    return lambda x: module.apply(variables, x, cache=cache)[0]


def converted_layer():
    flax = FLAX["layer"](N, D, decode=False, rngs=nnx.Rngs(0))
    return lambda x: convert_to_gqa(flax, 1)(x)


MAKERS = {
    "function": (lambda: lambda h: kvattn.dot_product_attention(h, h, h, is_causal=True), HEADS),
    "layers' function": (lambda: lambda h: layers.dot_product_attention(h, h, h), HEADS),
    "flax's function": (lambda: lambda h: FLAX["nnx"](h, h, h), HEADS),
    "layer": (layer, X),
    "layer, flax's function": (lambda: layer(attention_fn=FLAX["nnx"], softcap=2.0), X),
    "layer with cache, flax's function": (layer_with_cache, X),
    "linen": (linen_layer, X),
    "linen with cache": (lambda: linen_layer(with_cache=True), X),
    "linen, flax's function": (lambda: linen_layer(attention_fn=FLAX["linen"], softcap=2.0), X),
    "flax's layer, converted": (converted_layer, X),
}
"""All that might look for Flax's or JAX's attention when it is made or called: how to make it, and its input."""


def _both(call):
    """Value and gradient, compiled."""
    return jax.jit(jax.value_and_grad(lambda x: (lambda y: (jnp.sum(y**2), y))(call(x)), has_aux=True))


@pytest.mark.parametrize("name", MAKERS)
def test_values_and_gradients_are_the_same(name, swapped, monkeypatch):
    make, x = MAKERS[name]
    call = make()
    eager = call(x)
    (_, out), gradient = _both(call)(x)
    monkeypatch.undo()
    (_, expected), expected_gradient = _both(make())(x)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_allclose(eager, expected, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


TWINS = {
    *("dot_product_attention", "dot_product_attention_with_rope", "MultiHeadAttention", "RoPE", "SelfAttention"),
    *("MultiHeadDotProductAttention", "mqa", "gqa", "paged_attention"),
}


def test_no_function_looks_such_a_name_up_when_it_is_called():
    """In jax, jax.nn, flax.nnx, flax.linen: people assign to these names."""
    found = []
    for path in (ROOT / "kvattn").rglob("*.py"):
        text = path.read_text()
        if not any(name in text for name in TWINS):
            continue
        tree = ast.parse(text)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]
        for node in (inner for function in functions for inner in ast.walk(function)):
            if isinstance(node, ast.Attribute) and node.attr in TWINS:
                owner = ast.unparse(node.value)
                found += [(path.name, owner, node.attr)] if owner.split(".")[0] in ("jax", "flax", "nnx", "nn") else []
    assert not found


def test_a_jit_of_ours_in_jaxs_place_compiles(monkeypatch):
    x = jnp.ones((1, 1, 2, 8))
    cache = kvattn.KVCache.create(1, 2, 8, capacity=4, dtype=jnp.float32)
    monkeypatch.setattr(jax, "jit", kvattn.jit)
    step = jax.jit(kvattn.cached_attention)
    monkeypatch.undo()
    assert step(x, x, x, cache)[1].lengths.tolist() == [1]


def test_names_assigned_before_the_layers_are_loaded():
    code = """
import jax, jax.numpy as jnp, numpy as np, kvattn, flax
from flax import linen as nn, nnx
from_flax, of_linen, of_jax = nnx.dot_product_attention, nn.dot_product_attention, jax.nn.dot_product_attention
q = jnp.arange(64.0).reshape(1, 4, 2, 8) / 64
before = of_jax(q, q, q, is_causal=True)
jax.nn.dot_product_attention = nnx.dot_product_attention = nn.dot_product_attention = kvattn.dot_product_attention
loss = lambda q: jnp.sum(jax.nn.dot_product_attention(q, q, q, is_causal=True) ** 2)
np.testing.assert_allclose(jax.jit(jax.nn.dot_product_attention, static_argnames="is_causal")(q, q, q, is_causal=True), before)
assert np.isfinite(jax.grad(loss)(q)).all()
layer = kvattn.layers.MultiHeadAttention(2, 8, attention_fn=from_flax, rngs=nnx.Rngs(0))
x = jnp.ones((1, 4, 8))
np.testing.assert_allclose(layer(x, cache=layer.make_cache(1, 4))[0], layer(x, is_causal=True), atol=1e-6)
module = kvattn.layers.linen.MultiHeadDotProductAttention(2)
variables = module.init(jax.random.key(0), x)
cached = module.apply(variables, x, cache=module.make_cache(1, 4, in_features=8))[0]
np.testing.assert_allclose(cached, module.apply(variables, x, is_causal=True), atol=1e-6)
"""  # noqa: E501
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
