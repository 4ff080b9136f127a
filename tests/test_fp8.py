"""Checkpoints in FP8 with a scale for every block: the parameters of the floats that they stand for."""

import functools
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from kvattn import errors
from kvattn.models import describe, from_pretrained
from kvattn.models.parameters import parameters_of

GOLDEN = pathlib.Path(__file__).parent / "golden" / "hf"
WEIGHTS, BLOCK, E4M3 = "model.safetensors", (5, 7), jnp.float8_e4m3fn
KINDS = {"float32": "F32", "float8_e4m3fn": "F8_E4M3", "bfloat16": "BF16"}
QUANTIZED = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
FLOATS = ("embed_tokens.weight", "lm_head.weight", "norm.weight", "mlp.gate.weight", ".bias")


def write(path, tensors):
    """A safetensors file by hand: its own writer knows no FP8."""
    header, start = {}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": KINDS[x.dtype.name], "shape": x.shape, "data_offsets": [start, start + x.nbytes]}
        start += x.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(x.tobytes() for x in tensors.values()))


def rounded(weight, block=BLOCK):
    """FP8 [O, I], scales of its blocks, and the floats that they stand for, one number at a time."""
    blocks = [math.ceil(size / along) for size, along in zip(weight.shape, block, strict=True)]
    scales, codes, floats = np.zeros(blocks, np.float32), np.zeros(weight.shape, E4M3), np.zeros(weight.shape)
    for i, j in np.ndindex(*blocks):
        part = tuple(slice(at * size, (at + 1) * size) for at, size in zip((i, j), block, strict=True))
        scales[i, j] = np.abs(weight[part]).max() / 448
        codes[part] = (weight[part] / scales[i, j]).astype(E4M3)
    for i, j in np.ndindex(*weight.shape):
        floats[i, j] = np.float32(codes[i, j]) * scales[i // block[0], j // block[1]]
    return codes, scales, floats.astype(np.float32)


@functools.cache
def checkpoint(name, kept=()):
    """Tensors in FP8, and the floats."""
    stored, floats = {}, {}
    for key, x in load_file(GOLDEN / name / WEIGHTS).items():
        stored[key] = floats[key] = x
        if x.ndim == 2 and not key.endswith(FLOATS) and not any(part in key for part in kept):
            stored[key], stored[f"{key}_scale_inv"], floats[key] = rounded(x)
    return stored, floats


def folder_of(tmp_path, name, tensors, **quantization):
    """A golden checkpoint with these tensors."""
    folder = pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / f"{name}_fp8"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZED | quantization}))
    write(folder / WEIGHTS, tensors)
    return folder


def assert_same(a, b):
    a, b = parameters_of(a), parameters_of(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(b[name], np.float32), err_msg=name)


@pytest.mark.parametrize("name", ["qwen3_moe", "llama3", "deepseek_v3"])
def test_blocks_that_do_not_divide(tmp_path, name):
    """Each number times its block's scale: projections, experts; not embeddings, norms, routers."""
    stored, floats = checkpoint(name)
    model = from_pretrained(folder_of(tmp_path, name, stored), dtype=jnp.float32)
    plain = pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / "plain"))
    save_file(floats, plain / WEIGHTS)
    assert_same(model, from_pretrained(plain))
    with pytest.raises(AssertionError):
        assert_same(model, from_pretrained(GOLDEN / name))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_parts_of_weights(tmp_path, kind):
    """Each device reads its rows and columns, which begin within blocks, and their scales."""
    stored, _ = checkpoint("qwen3_moe")
    folder = folder_of(tmp_path, "qwen3_moe", stored)
    mesh = jax.make_mesh((1, 4), ("data", "model"), axis_types=(kind, kind))
    read = []
    split = from_pretrained(folder, mesh=mesh, dtype=jnp.float32, on_read=lambda name, size: read.append(name))
    assert_same(split, from_pretrained(folder, dtype=jnp.float32))
    assert {name.removesuffix("_scale_inv") for name in read} == {name for name in stored if "scale" not in name}


def test_modules_that_stay_floats(tmp_path):
    kept = ("self_attn.q_proj", "layers.1.mlp")
    stored, floats = checkpoint("llama3", kept)
    folder = folder_of(tmp_path, "llama3", stored, modules_to_not_convert=["q_proj", "model.layers.1.mlp", "lm_head"])
    plain = pathlib.Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "plain"))
    save_file(floats, plain / WEIGHTS)
    assert_same(from_pretrained(folder, dtype=jnp.float32), from_pretrained(plain))
    assert describe(folder).tensors["model.layers.0.mlp.down_proj.weight_scale_inv"] == (7, 7)


def test_the_dtype_is_that_of_the_floats(tmp_path):
    """Not that of the scales, float32 and here most of the file: that of what is no weight in 8 bits."""
    stored = {}
    for key, x in load_file(GOLDEN / "llama3" / WEIGHTS).items():
        if x.ndim == 2 and not key.endswith(FLOATS):
            stored[key], stored[f"{key}_scale_inv"], _ = rounded(x, (1, 1))
        else:
            stored[key] = x.astype(jnp.bfloat16)
    model = from_pretrained(folder_of(tmp_path, "llama3", stored, weight_block_size=[1, 1]))
    assert model.layers[0].mlp.up.kernel.dtype == model.embed.embedding.dtype == jnp.bfloat16


SETTINGS = {
    "another format": ({"fmt": "e5m2"}, errors.UnsupportedError, "fmt is 'e5m2', supported is 'e4m3'"),
    "activations": ({"activation_scheme": "static"}, errors.UnsupportedError, "activation_scheme is 'static'"),
    "one scale": ({"weight_block_size": None}, errors.UnsupportedError, "weight_block_size is null"),
    "half a block": ({"weight_block_size": [128]}, errors.ConfigError, "two sizes"),
    "a block of nothing": ({"weight_block_size": [0, 128]}, errors.ConfigError, "two sizes"),
    "names": ({"modules_to_not_convert": "lm_head"}, errors.ConfigError, "must list names"),
    "something else": ({"zero_point": 3}, errors.UnsupportedError, r"not known for fp8: \['zero_point'\]"),
    "another method": ({"quant_method": "gptq"}, errors.UnsupportedError, "quant_method is 'gptq'"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_other_forms_are_refused(tmp_path, name):
    changes, error, words = SETTINGS[name]
    with pytest.raises(error, match=words):
        describe(folder_of(tmp_path, "llama3", {}, **changes))


def test_tensors_that_do_not_fit(tmp_path):
    """A scale that is missing or of another shape, floats where codes should be: all are named."""
    stored = dict(checkpoint("llama3")[0])
    first, second, third = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv")
    del stored[f"{first}_scale_inv"]
    stored[f"{second}_scale_inv"] = stored[f"{second}_scale_inv"][:-1].copy()
    stored[third] = np.zeros(stored[third].shape, np.float32)
    with pytest.raises(errors.CacheVersionError) as caught:
        from_pretrained(folder_of(tmp_path, "llama3", stored))
    message = str(caught.value)
    assert f"missing: {first}_scale_inv (7, 5)" in message and f"kind: {third} in {WEIGHTS} holds F32" in message
    assert f"shape: {second}_scale_inv in {WEIGHTS} is (3, 5), the config makes it (4, 5)" in message
