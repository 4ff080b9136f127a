"""Checkpoint folders: what is read, in which forms, and what is refused by name."""

import json
import math
import pathlib
import resource
import shutil
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from published_configs import PUBLISHED
from safetensors.numpy import load_file, save_file

import kvattn
from kvattn.errors import (
    CacheCorruptionError,
    CacheVersionError,
    ConfigError,
    DTypeError,
    KVAttnError,
    MissingFileError,
    RangeError,
    ShardingError,
    UnsupportedError,
)
from kvattn.families.hf.gpt_oss import from_mxfp4
from kvattn.memory import from_config
from kvattn.models import FAMILIES, DecoderConfig, describe, from_pretrained
from kvattn.models.parameters import parameters_of

GOLDEN = pathlib.Path(__file__).parent / "golden" / "hf"
WEIGHTS = "model.safetensors"
LOADED = sorted(kind for kind, family in FAMILIES.items() if family.blueprint is not None)


@pytest.fixture
def folder(tmp_path):
    """A copy of a golden checkpoint, by its name."""

    def copy(name="llama3"):
        return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return copy


def tensors(folder):
    return load_file(folder / WEIGHTS)


def set_config(folder, drop=(), **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config = {name: value for name, value in (config | fields).items() if name not in drop}
    path.write_text(json.dumps(config))


def assert_same(a, b):
    """The same configuration and parameters, bit by bit."""
    assert a.config == b.config
    a, b = parameters_of(a), parameters_of(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(b[name], np.float32), err_msg=name)


def shards(folder, count=3):
    """Spreads a checkpoint over several files, with their index."""
    given = sorted(tensors(folder).items())
    placed = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = dict(given[i::count])
        save_file(part, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    (folder / WEIGHTS).unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": placed}))
    return placed


# What is read -------------------------------------------------------------------------------------


def test_shards(folder):
    path = folder()
    shards(path)
    assert_same(from_pretrained(path), from_pretrained(GOLDEN / "llama3"))


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("bloom", "transformer.")])
def test_names_without_their_prefix(folder, name, prefix):
    """The oldest files of these families have the names of the inner model."""
    path = folder(name)
    save_file({k.removeprefix(prefix): x for k, x in tensors(path).items()}, path / WEIGHTS)
    assert_same(from_pretrained(path), from_pretrained(GOLDEN / name))


SPARSE = [
    ({"moe_layer_freq": 2, "first_k_dense_replace": 0}, (True, False, True)),
    ({"first_k_dense_replace": 2}, (False, False, True)),
    ({"first_k_dense_replace": 0, "n_shared_experts": None}, None),
    ({"n_routed_experts": None}, "dense"),
    ({"first_k_dense_replace": 9}, "dense"),
]


@pytest.mark.parametrize(
    ("name", "fields", "sparse"),
    [(name, *case) for name in ("deepseek_v2", "deepseek_v3") for case in SPARSE]
    + [("deepseek_v2", {"first_k_dense_replace": 0, "n_shared_experts": 0, "mlp_bias": True}, None)],
    ids=str,
)
def test_which_layers_of_deepseek_have_experts(folder, name, fields, sparse):
    """In the decoder, among its tensors, and counted by the planner."""
    path = folder(name)
    set_config(path, **fields)
    found, spec = describe(path), from_config(path)
    assert found.config.num_experts == (0 if sparse == "dense" else 8)
    assert found.config.expert_layers == (None if sparse == "dense" else sparse)
    assert spec.num_params == sum(map(math.prod, found.tensors.values()))
    idle = spec.num_params - spec.active_params
    assert idle == sum(map(found.config.has_experts, range(3))) * 5 * 3 * 32 * 12


def test_layers_that_guess_are_left_alone(folder):
    """DeepSeek-V3's files have modules behind the last layer that predict tokens further ahead: as many as are said."""
    path = folder("deepseek_v3")
    given = tensors(path)
    behind = {name.replace("layers.2.", "layers.3."): x for name, x in given.items() if "layers.2." in name}
    behind["model.layers.3.eh_proj.weight"] = np.ones((4, 8), np.float32)
    save_file(given | behind, path / WEIGHTS)
    assert_same(from_pretrained(path), from_pretrained(GOLDEN / "deepseek_v3"))
    set_config(path, num_nextn_predict_layers=0)
    with pytest.raises(CacheVersionError, match=r"left over: model\.layers\.3\.eh_proj"):
        from_pretrained(path)


def test_buffers_and_tied_heads_are_passed_over(folder):
    path = folder("gpt2")
    given = tensors(path)
    more = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "h.1.attn.masked_bias": np.array(-1e9, np.float32)}
    save_file(given | more | {"lm_head.weight": given["transformer.wte.weight"]}, path / WEIGHTS)
    assert_same(from_pretrained(path), from_pretrained(GOLDEN / "gpt2"))


@pytest.mark.parametrize("name", ["gpt2", "opt350m", "llama3"])
def test_a_head_of_its_own_is_used_whatever_the_config_says(folder, name, monkeypatch):
    """transformers does not tie either what differs; the last number here is the one that does."""
    monkeypatch.setattr("kvattn.models.pretrained._COMPARED", 64)
    path = folder(name)
    given = tensors(path)
    table = next(x for key, x in given.items() if "wte" in key or "embed_tokens" in key)
    save_file(given | {"lm_head.weight": table}, path / WEIGHTS)
    assert_same(from_pretrained(path), from_pretrained(GOLDEN / name))
    head = table.copy()
    head[-1, -1] += 1
    save_file(given | {"lm_head.weight": head}, path / WEIGHTS)
    model = from_pretrained(path)
    assert not model.config.tie_embeddings
    np.testing.assert_array_equal(model.head.kernel[...], head.T)
    set_config(path, tie_word_embeddings=False)
    assert_same(model, from_pretrained(path))
    set_config(path, tie_word_embeddings=True)
    save_file(given | {"lm_head.weight": head[:-1]}, path / WEIGHTS)
    refused(CacheVersionError, path, "shape: lm_head.weight")


@pytest.mark.parametrize("name", ["gpt2", "opt350m", "gemma2", "qwen2", "falcon7b", "bloom", "mpt", "gpt_bigcode"])
def test_a_tied_model_with_its_head_only(folder, name):
    """Either of the two tensors that are one is enough; where they are not one, it is not."""
    path = folder(name)
    set_config(path, tie_word_embeddings=True)
    given = {key: x for key, x in tensors(path).items() if key != "lm_head.weight"}
    save_file(given, path / WEIGHTS)
    expected = from_pretrained(path)
    assert expected.config.tie_embeddings
    table = next(key for key in given if key.endswith(("wte.weight", "embed_tokens.weight", "word_embeddings.weight")))
    given["lm_head.weight"] = given.pop(table)
    save_file(given, path / WEIGHTS)
    assert_same(from_pretrained(path), expected)
    save_file(given | {"lm_head.weight": given["lm_head.weight"][:-1]}, path / WEIGHTS)
    refused(CacheVersionError, path, "shape: lm_head.weight")
    save_file(given, path / WEIGHTS)
    set_config(path, tie_word_embeddings=False)
    refused(CacheVersionError, path, f"missing: {table}")


WRAPPED = {
    "doubled": lambda name: f"model.{name}" if name.startswith("model.") else name,
    "without": lambda name: name.removeprefix("model."),
    "parallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "of a text model": lambda name: f"language_model.{name}",
    "inner": lambda name: name.replace("model.", "model.language_model.", 1),
    "adapters merged": lambda name: f"base_model.model.{name}",
}


@pytest.mark.parametrize("how", WRAPPED)
def test_names_of_wrapped_models(folder, how):
    """The head too, tied or not."""
    path = folder("llama3")
    given, wrapped = tensors(path), WRAPPED[how]
    given["lm_head.weight"] = given["model.embed_tokens.weight"] + 1
    save_file(given, path / WEIGHTS)
    expected = from_pretrained(path)
    assert not expected.config.tie_embeddings
    save_file({wrapped(name): x for name, x in given.items()}, path / WEIGHTS)
    assert_same(from_pretrained(path), expected)
    given["lm_head.weight"] = given["model.embed_tokens.weight"]
    save_file({wrapped(name): x for name, x in given.items()}, path / WEIGHTS)
    set_config(path, tie_word_embeddings=True)
    assert from_pretrained(path).config.tie_embeddings


def test_names_that_are_there_twice(folder):
    """With a prefix and without: the one that the table has counts, and the other is no part of the model."""
    path = folder("llama3")
    given = tensors(path)
    save_file(given | {"norm.weight": given["model.norm.weight"] + 1}, path / WEIGHTS)
    refused(CacheVersionError, path, "left over: norm.weight (32,)")
    path = folder("gpt2")
    save_file(tensors(path) | {"model.vision.weight": np.zeros(3, np.float32)}, path / WEIGHTS)
    refused(CacheVersionError, path, "left over: model.vision.weight (3,)")


@pytest.mark.parametrize("name", ["llama3", "falcon40b", "gpt2", "opt", "gemma3", "qwen3", "gpt_oss"])
def test_buffers_of_other_releases(folder, name):
    """Numbers that follow from the config, wherever files have them."""
    path = folder(name)
    given = tensors(path)
    numbers = np.zeros(3, np.float32)
    names = ["model.rotary_emb.inv_freq", "transformer.h.0.self_attention.rotary_emb.inv_freq", "position_ids"]
    names += ["model.layers.1.self_attn.rotary_emb.cos_cached", "rotary_emb.original_inv_freq", "model.decoder.version"]
    save_file(given | dict.fromkeys(names, numbers), path / WEIGHTS)
    assert_same(from_pretrained(path), from_pretrained(GOLDEN / name))
    save_file(given | {"model.layers.0.self_attn.rotary_emb.weight": numbers}, path / WEIGHTS)
    refused(CacheVersionError, path, "left over: model.layers.0.self_attn.rotary_emb.weight")


def test_shards_that_were_joined(folder):
    """Their index has stayed, and they are gone: the whole file counts, as for transformers."""
    path = folder()
    placed = shards(path)
    shutil.copy(GOLDEN / "llama3" / WEIGHTS, path / WEIGHTS)
    for file in set(placed.values()):
        (path / file).unlink()
    assert_same(from_pretrained(path), from_pretrained(GOLDEN / "llama3"))
    (path / WEIGHTS).unlink()
    refused(MissingFileError, path, *set(placed.values()))


OLDER = {
    "llama3": (
        {"rope_theta": 500000.0, "rope_scaling": "inner", "torch_dtype": "float32"},
        ("rope_parameters", "dtype"),
    ),
    "mistral": ({"rope_theta": 10000.0}, ("rope_parameters",)),
    "gemma2": ({"rope_theta": 10000.0, "hidden_act": "gelu_pytorch_tanh"}, ("rope_parameters", "layer_types")),
    "gemma3": (
        {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 3, "cache_implementation": "x"},
        ("rope_parameters", "layer_types", "_sliding_window_pattern"),
    ),
    "falcon40b": (
        {"n_head_kv": 2, "n_layer": 2, "n_head": 4, "rope_theta": 10000.0},
        ("num_kv_heads", "rope_parameters"),
    ),
    "bloom": ({"n_embed": 48, "num_attention_heads": 6, "seq_length": 64}, ("hidden_size", "n_head")),
    "gpt_oss": ({"rope_scaling": "inner", "rope_theta": 150000.0, "experts_per_token": 2}, ("rope_parameters",)),
    "qwen2": ({"rope_theta": 10000.0}, ("rope_parameters", "layer_types")),
}


@pytest.mark.parametrize("name", OLDER)
def test_configs_of_older_releases(folder, name):
    path = folder(name)
    more, drop = OLDER[name]
    if more.get("rope_scaling") == "inner":
        scaling = json.loads((path / "config.json").read_text())["rope_parameters"]
        more = more | {"rope_scaling": {k: v for k, v in scaling.items() if k != "rope_theta"}}
    set_config(path, drop, **more)
    assert describe(path).config == describe(GOLDEN / name).config


def test_dtypes(folder):
    """Stored in bfloat16: stays so, or becomes what is asked for; Gemma's norms, one added, stay exact."""
    path = folder("gemma2")
    given = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors(path).items()}
    save_file(given, path / WEIGHTS)
    model = from_pretrained(path)
    parameters = parameters_of(model)
    kinds = {name.rsplit(".", 1)[1]: x.dtype for name, x in parameters.items()}
    assert kinds == {"embedding": jnp.bfloat16, "kernel": jnp.bfloat16, "scale": jnp.float32}
    norm = given["model.norm.weight"].astype(np.float32) + 1
    np.testing.assert_array_equal(parameters["norm.scale"], norm)
    assert model.make_cache(1, 8)[1].dtype == jnp.bfloat16
    wide = from_pretrained(path, dtype=jnp.float32)
    assert {x.dtype for x in parameters_of(wide).values()} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(wide.embed.embedding[...], given["model.embed_tokens.weight"].astype(np.float32))
    with pytest.raises(DTypeError, match="int8"):
        from_pretrained(path, dtype=jnp.int8)


def test_mxfp4():
    """Against the format's definition, one number at a time."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 3, 2, 16), np.uint8)
    scales = rng.integers(110, 140, (2, 3, 2), np.uint8)
    got = from_mxfp4(blocks, scales)
    assert got.shape == (2, 3, 64) and got.dtype == np.float32

    def number(code, exponent):
        sign, power, fraction = code >> 3, (code >> 1) & 3, code & 1
        value = fraction * 0.5 if power == 0 else (1 + fraction * 0.5) * 2.0 ** (power - 1)
        return (-1) ** sign * value * 2.0 ** (exponent - 127)

    for e, row, i in np.ndindex(2, 3, 64):
        byte = int(blocks[e, row, i // 32, i % 32 // 2])
        assert got[e, row, i] == number((byte >> 4) if i % 2 else byte & 15, int(scales[e, row, i // 32]))


def test_packed_experts(folder):
    """gpt-oss as it is published: experts in MXFP4, the rest in bfloat16."""
    path = folder("gpt_oss")
    plain, packed, rng = {}, {}, np.random.default_rng(0)
    # Groups of 32 need features that are multiples of it: the hidden size is 32, the experts' 48 becomes 64.
    for name, x in tensors(path).items():
        if "experts" not in name:
            plain[name] = packed[name] = x
            continue
        into, out = (32, 128) if "gate_up" in name else (64, 32)
        if name.endswith("_bias"):
            plain[name] = packed[name] = rng.normal(size=(4, out)).astype(np.float32)
            continue
        blocks = rng.integers(0, 256, (4, out, into // 32, 16), np.uint8)
        scales = rng.integers(122, 126, (4, out, into // 32), np.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = np.ascontiguousarray(from_mxfp4(blocks, scales).swapaxes(1, 2))
    set_config(path, intermediate_size=64)
    save_file(plain, path / WEIGHTS)
    expected = from_pretrained(path)
    set_config(path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    save_file(packed, path / WEIGHTS)
    assert_same(from_pretrained(path), expected)


@pytest.mark.wrong_types
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh(kind):
    """Kernels are split by heads where they divide; numbers stay what they are."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    whole, split = from_pretrained(GOLDEN / "gpt_oss"), from_pretrained(GOLDEN / "gpt_oss", mesh=mesh)
    assert_same(whole, split)
    spec = lambda name: tuple(parameters_of(split)[name].sharding.spec)
    assert spec("layers.0.attention.query.kernel") == (None, "model", None)
    assert spec("layers.1.attention.out.kernel") == ("model", None, None)
    assert spec("layers.1.mlp.gate") == (None, None, "model") and spec("layers.1.mlp.down") == (None, "model", None)
    one_axis = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    one_head = from_pretrained(GOLDEN / "falcon7b", mesh=one_axis, axis="x")
    assert parameters_of(one_head)["layers.0.attention.key.kernel"].sharding.is_fully_replicated
    assert tuple(parameters_of(one_head)["layers.0.mlp.up.kernel"].sharding.spec) == (None, "x")
    with pytest.raises(ShardingError, match="Mesh"):
        from_pretrained(GOLDEN / "gpt_oss", mesh=4)
    with pytest.raises(ShardingError, match="no axis 'model'"):
        from_pretrained(GOLDEN / "gpt_oss", mesh=one_axis)


# What config.json leaves out -----------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
LLAMA_BLOCK = {"model_dim": 4096, "num_layers": 32, "num_heads": 32, "head_dim": 128, "norm_epsilon": 1e-6}
LLAMA_BLOCK |= {"activation": "silu", "tie_embeddings": False, "rope_theta": 1e4, "rope_scaling": None, "windows": None}
GPT_BLOCK = {"vocab_size": 50257, "model_dim": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072}
GPT_BLOCK |= {"max_positions": 1024, "norm_epsilon": 1e-5, "activation": "gelu_tanh", "attention_scale": 0.125}
GEMMA_BLOCK = {"model_dim": 2304, "num_layers": 26, "num_heads": 8, "num_kv_heads": 4, "head_dim": 256}
GEMMA_BLOCK |= {"mlp_dim": 9216, "norm_epsilon": 1e-6, "activation": "gelu_tanh", "attention_scale": 0.0625}
GEMMA_BLOCK |= {"tie_embeddings": True, "qkv_bias": False, "rope_scaling": None}
SIX = (*[4096] * 5, None)
_DEEPSEEK = {"num_kv_heads": 1, "head_dim": 576, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128}
_DEEPSEEK |= {"qk_rope_head_dim": 64, "v_head_dim": 128, "qkv_bias": False, "norm_epsilon": 1e-6, "rope_theta": 1e4}
_DEEPSEEK |= {"rope_interleaved": True, "tie_embeddings": False, "attention_scale": None, "rope_scaling": None}
NEEDED = {"deepseek_v2": {"num_experts_per_tok": 6}}
"""What cannot be left out: null there, which is transformers' default, is no model."""
ABSENT = {
    "deepseek_v2": _DEEPSEEK
    | {"vocab_size": 102400, "model_dim": 4096, "num_layers": 32, "num_heads": 32, "mlp_dim": 11008}
    | {"num_experts": 64, "expert_dim": 1407, "shared_expert_dim": 2814, "expert_scores": "softmax"}
    | {"expert_shares": "all", "expert_scale": 1.0, "expert_groups": 1, "expert_bias": False, "expert_layers": None},
    "deepseek_v3": _DEEPSEEK
    | {"vocab_size": 129280, "model_dim": 7168, "num_layers": 61, "num_heads": 128, "mlp_dim": 18432}
    | {"num_experts": 256, "experts_per_token": 8, "expert_dim": 2048, "shared_expert_dim": 2048}
    | {"expert_scores": "sigmoid", "expert_shares": "chosen", "expert_scale": 2.5, "expert_groups": 8}
    | {"groups_per_token": 4, "expert_bias": True, "expert_layers": (False,) * 3 + (True,) * 58},
    "kimi_k2": _DEEPSEEK | {"num_experts": 256, "expert_groups": 8},
    "minicpm3": {"vocab_size": 73448, "model_dim": 2560, "num_layers": 62, "num_heads": 40, "mlp_dim": 6400}
    | {"kv_lora_rank": 256, "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
    | {"norm_epsilon": 1e-5, "embedding_scale": 12, "residual_scale": 1.4 / 62**0.5, "logit_scale": 0.1}
    | {"tie_embeddings": True, "rope_interleaved": False, "mlp_bias": False, "qkv_bias": False},
    "bloom": {"vocab_size": 250880, "model_dim": 64, "num_layers": 2, "num_heads": 8, "mlp_dim": 256}
    | {"norm_epsilon": 1e-5, "residual_after_norm": False, "tie_embeddings": True},
    "falcon": {"vocab_size": 65024, "model_dim": 4544, "num_layers": 32, "num_heads": 71, "num_kv_heads": 1}
    | {"mlp_dim": 18176, "norm_epsilon": 1e-5, "activation": "gelu", "positions": "rope", "rope_theta": 1e4}
    | {"parallel": True, "shared_norm": True, "qkv_bias": False, "tie_embeddings": True},
    "gemma2": GEMMA_BLOCK
    | {"vocab_size": 256000, "softcap": 50.0, "logit_softcap": 30.0, "rope_theta": 1e4, "windows": (4096, None) * 13},
    "gemma3_text": GEMMA_BLOCK
    | {"vocab_size": 262208, "softcap": None, "logit_softcap": None, "rope_theta": 1e6, "local_rope_theta": 1e4}
    | {"windows": SIX * 4 + (4096, 4096)},
    "gemma4_text": GEMMA_BLOCK
    | {"vocab_size": 262144, "num_layers": 30, "head_dim": (*[256] * 5, 512) * 5, "attention_scale": 1.0}
    | {"windows": (*[512] * 5, None) * 5, "rope_theta": 1e6, "local_rope_theta": 1e4, "logit_softcap": None}
    | {"rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": 0.25}, "per_layer_dim": 256}
    | {"kv_source": None, "num_experts": 0, "value_norm": True, "values_from_keys": False},
    "cohere2": {"vocab_size": 256000, "model_dim": 8192, "num_layers": 40, "num_heads": 64, "num_kv_heads": 64}
    | {"mlp_dim": 22528, "norm_epsilon": 1e-5, "activation": "silu", "logit_scale": 0.0625, "rope_theta": 1e4}
    | {"windows": (4096, 4096, 4096, None) * 10, "rope_layers": (True, True, True, False) * 10}
    | {"tie_embeddings": True, "qkv_bias": False, "norm": "layer", "norm_bias": False, "shared_norm": True},
    "gemma": {"vocab_size": 256000, "model_dim": 3072, "num_layers": 28, "num_heads": 16, "num_kv_heads": 16}
    | {"head_dim": 256, "mlp_dim": 24576, "norm_epsilon": 1e-6, "activation": "gelu_tanh", "rope_theta": 1e4}
    | {"tie_embeddings": True, "qkv_bias": False, "embedding_scale": 3072**0.5, "norm_position": "pre"},
    "glm4": {"vocab_size": 151552, "model_dim": 4096, "num_layers": 40, "num_heads": 32, "num_kv_heads": 2}
    | {"head_dim": 128, "mlp_dim": 13696, "norm_epsilon": 1.5625e-7, "activation": "silu", "rotary_dim": 64}
    | {"qkv_bias": True, "out_bias": False, "tie_embeddings": False, "rope_interleaved": True},
    "gpt_neox": {"vocab_size": 50432, "model_dim": 6144, "num_layers": 44, "num_heads": 64, "mlp_dim": 24576}
    | {"activation": "gelu", "norm_epsilon": 1e-5, "rotary_dim": 24, "parallel": True, "shared_norm": False}
    | {"qkv_bias": True, "mlp_bias": True, "tie_embeddings": False, "rope_theta": 1e4},
    "granite": LLAMA_BLOCK
    | {"vocab_size": 32000, "num_kv_heads": 32, "mlp_dim": 11008, "qkv_bias": False, "mlp_bias": False}
    | {"embedding_scale": 1.0, "attention_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0},
    "llama4_text": {"vocab_size": 202048, "model_dim": 5120, "num_layers": 48, "num_heads": 40, "num_kv_heads": 8}
    | {"head_dim": 128, "mlp_dim": 16384, "expert_dim": 8192, "shared_expert_dim": 8192, "num_experts": 16}
    | {"experts_per_token": 1, "expert_layers": None, "chunks": (8192, 8192, 8192, None) * 12, "rope_theta": 5e5}
    | {"rope_layers": (True, True, True, False) * 12, "qk_norm_layers": (True, True, True, False) * 12}
    | {"temperature": (8192, 0.1), "norm_epsilon": 1e-5, "qkv_bias": False, "tie_embeddings": False},
    "mixtral": LLAMA_BLOCK
    | {"vocab_size": 32000, "num_kv_heads": 8, "mlp_dim": 14336, "norm_epsilon": 1e-5, "rope_theta": 1e6}
    | {"num_experts": 8, "experts_per_token": 2, "expert_kind": "gated", "expert_shares": "chosen"},
    "olmo2": LLAMA_BLOCK
    | {"vocab_size": 50304, "num_kv_heads": 32, "mlp_dim": 11008, "norm_epsilon": 1e-5, "qkv_bias": False}
    | {"norm_position": "output", "qk_norm": True, "qk_norm_heads": "joint"},
    "phi3": {"vocab_size": 32064, "model_dim": 3072, "num_layers": 32, "num_heads": 32, "num_kv_heads": 32}
    | {"mlp_dim": 8192, "norm_epsilon": 1e-5, "activation": "silu", "windows": None, "rotary_dim": None}
    | {"rope_scaling": None, "rope_theta": 1e4, "tie_embeddings": False},
    "qwen2_moe": {"vocab_size": 151936, "model_dim": 2048, "num_layers": 24, "num_heads": 16, "num_kv_heads": 16}
    | {"mlp_dim": 5632, "expert_dim": 1408, "shared_expert_dim": 5632, "shared_expert_gate": True, "num_experts": 60}
    | {"experts_per_token": 4, "expert_shares": "all", "expert_layers": None, "qkv_bias": True, "windows": None}
    | {"norm_epsilon": 1e-6, "rope_theta": 1e4, "tie_embeddings": False},
    "qwen3_moe": {"vocab_size": 151936, "model_dim": 2048, "num_layers": 24, "num_heads": 32, "num_kv_heads": 4}
    | {"head_dim": 64, "mlp_dim": 6144, "expert_dim": 768, "shared_expert_dim": None, "num_experts": 128}
    | {"experts_per_token": 8, "expert_shares": "all", "qk_norm": True, "qkv_bias": False, "windows": None}
    | {"tie_embeddings": False},
    "smollm3": {"vocab_size": 128256, "model_dim": 2048, "num_layers": 36, "num_heads": 16, "num_kv_heads": 4}
    | {"mlp_dim": 11008, "norm_epsilon": 1e-6, "rope_theta": 2e6, "rope_layers": (True, True, True, False) * 9}
    | {"windows": None, "qkv_bias": False, "mlp_bias": False, "tie_embeddings": True},
    "stablelm": {"vocab_size": 50304, "model_dim": 2560, "num_layers": 32, "num_heads": 32, "num_kv_heads": 32}
    | {"mlp_dim": 6912, "norm_epsilon": 1e-5, "rotary_dim": 20, "qk_norm": False, "parallel": False}
    | {"qkv_bias": False, "tie_embeddings": False, "norm_bias": True},
    "starcoder2": {"vocab_size": 49152, "model_dim": 3072, "num_layers": 30, "num_heads": 24, "num_kv_heads": 2}
    | {"mlp_dim": 12288, "norm_epsilon": 1e-5, "activation": "gelu_tanh", "qkv_bias": True, "mlp_bias": True}
    | {"out_bias": True, "windows": None, "tie_embeddings": True},
    "gpt2": GPT_BLOCK | {"num_kv_heads": 12, "tie_embeddings": True},
    "gpt_bigcode": GPT_BLOCK | {"num_kv_heads": 1, "tie_embeddings": True},
    "gpt_oss": {"vocab_size": 201088, "model_dim": 2880, "num_layers": 36, "num_heads": 64, "num_kv_heads": 8}
    | {"head_dim": 64, "mlp_dim": 2880, "norm_epsilon": 1e-5, "tie_embeddings": False, "qkv_bias": True}
    | {"rope_theta": 150000.0, "rope_scaling": YARN | {"original_max_position_embeddings": 4096}}
    | {"num_experts": 128, "experts_per_token": 4, "expert_alpha": 1.702, "expert_limit": 7.0}
    | {"windows": (128, None) * 18},
    "llama": LLAMA_BLOCK
    | {"vocab_size": 32000, "num_kv_heads": 32, "mlp_dim": 11008, "qkv_bias": False, "mlp_bias": False},
    "mistral": LLAMA_BLOCK | {"vocab_size": 32000, "num_kv_heads": 8, "mlp_dim": 14336, "windows": (4096,) * 32},
    "mpt": {"vocab_size": 50368, "model_dim": 2048, "num_layers": 24, "num_heads": 16, "mlp_dim": 8192}
    | {"norm_epsilon": 1e-5, "attention_scale": None, "qkv_clip": None, "tie_embeddings": True},
    "opt": {"vocab_size": 50272, "model_dim": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072}
    | {"max_positions": 2048, "activation": "relu", "norm_position": "pre", "final_norm": True, "embedding_dim": None}
    | {"qkv_bias": True, "tie_embeddings": True},
    "qwen2": LLAMA_BLOCK | {"vocab_size": 151936, "num_kv_heads": 32, "mlp_dim": 22016},
    "qwen3": LLAMA_BLOCK | {"vocab_size": 151936, "num_kv_heads": 32, "mlp_dim": 22016, "qkv_bias": False},
}
"""What the config classes of transformers 5.23 and 5.24 say, called without arguments."""


def config_of(folder, **fields):
    """What a config.json with these fields only describes."""
    (folder / "config.json").write_text(json.dumps(fields))
    return describe(folder).config


@pytest.mark.parametrize("kind", LOADED)
def test_absent_fields_have_the_familys_defaults(tmp_path, kind):
    fields = config_of(tmp_path, model_type=kind, **NEEDED.get(kind, {})).to_json()
    assert {name: fields[name] for name in ABSENT[kind]} == ABSENT[kind]
    assert set(LOADED) == set(ABSENT)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_windows_that_are_only_switched_on(tmp_path, kind):
    config = config_of(tmp_path, model_type=kind, use_sliding_window=True)
    assert config.windows == (None,) * 28 + (4096,) * 4


def test_null_is_not_absent(folder):
    """Where transformers accepts null it stays null; where it does not, neither is it read here."""
    for name, fields, expected in (
        ("mistral", {"sliding_window": None}, {"windows": None}),
        ("gemma2", {"attn_logit_softcapping": None}, {"softcap": None}),
        ("gemma2", {"final_logit_softcapping": None}, {"logit_softcap": None}),
        ("qwen3", {"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ("llama3", {"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ("gpt2", {"n_inner": None}, {"mlp_dim": 128}),
        ("gpt_oss", {"rope_parameters": None}, {"rope_theta": 150000.0}),
        ("falcon7b", {"alibi": None, "bias": None, "ffn_hidden_size": None}, {"positions": "rope", "mlp_dim": 128}),
    ):
        path = folder(name)
        set_config(path, **fields)
        config = describe(path).config
        assert {field: getattr(config, field) for field in expected} == expected, name
        shutil.rmtree(path)
    for name, field in (("mistral", "num_key_value_heads"), ("gemma2", "query_pre_attn_scalar"), ("qwen3", "head_dim")):
        path = folder(name)
        set_config(path, **{field: None})
        refused(ConfigError, path, f"{field} is null")
        shutil.rmtree(path)
    for name in ("gemma2", "gpt_oss"):
        path = folder(name)
        set_config(path, sliding_window=None)
        refused(ConfigError, path, "sliding_window is null")
        shutil.rmtree(path)


def test_names_that_contradict_each_other(tmp_path):
    with pytest.raises(ConfigError, match=r"n_head is 8 but num_attention_heads is 4"):
        config_of(tmp_path, model_type="bloom", n_head=8, num_attention_heads=4)


def test_gemma_has_its_own_name_for_the_activation(tmp_path):
    for kind in ("gemma2", "gemma3_text"):
        assert config_of(tmp_path, model_type=kind, hidden_act="silu").activation == "gelu_tanh"
        assert config_of(tmp_path, model_type=kind, hidden_act="tanh", hidden_activation="silu").activation == "silu"


def test_opt_without_a_norm_to_remove(tmp_path):
    config = config_of(tmp_path, model_type="opt", do_layer_norm_before=False, _remove_final_layer_norm=True)
    assert config.norm_position == "post" and not config.final_norm
    assert not config_of(tmp_path, model_type="opt", _remove_final_layer_norm=True).final_norm


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LENGTH = "original_max_position_embeddings"
ROPES = {
    "dynamic, whatever the dict says": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, LENGTH: 8}},
        {"rope_type": "dynamic", "factor": 4.0, LENGTH: 64.0},
    ),
    "dynamic, older": (
        {"rope_scaling": {"type": "dynamic", "factor": 4.0, LENGTH: 16}, LENGTH: 8},
        {"rope_type": "dynamic", "factor": 4.0, LENGTH: 64.0},
    ),
    "llama3 without a length": ({"rope_parameters": LLAMA3}, LLAMA3 | {LENGTH: 64.0}),
    "llama3 with a length outside": ({"rope_parameters": LLAMA3 | {LENGTH: 32}, LENGTH: 8}, LLAMA3 | {LENGTH: 8.0}),
    "yarn without a factor": (
        {"rope_parameters": {"rope_type": "yarn", "factor": None, LENGTH: 16}},
        {"rope_type": "yarn", "factor": 4.0, LENGTH: 16.0},
    ),
    "yarn with a length outside": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, LENGTH: 32}, LENGTH: 8},
        {"rope_type": "yarn", "factor": 4.0, LENGTH: 8.0},
    ),
    "both dicts": (
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_parameters": LLAMA3},
        {"rope_type": "linear", "factor": 4.0},
    ),
    "an empty older one": (
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope_type": "linear", "factor": 2.0},
    ),
    "a length that linear does not read": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, LENGTH: 8},
        {"rope_type": "linear", "factor": 2.0},
    ),
}
"""What a Llama for 64 positions is given, and what transformers makes of it."""


@pytest.mark.parametrize("case", ROPES)
def test_what_rope_takes_from_around_its_dict(tmp_path, case):
    fields, expected = ROPES[case]
    config = config_of(tmp_path, model_type="llama", max_position_embeddings=64, **fields)
    assert config.to_json()["rope_scaling"] == expected and config.rope_theta == 10000.0


def test_the_base_of_the_frequencies(tmp_path):
    """The older dict replaces the newer one, base and all; what is within a dict goes before what is around it."""
    newer, older = {"rope_type": "default", "rope_theta": 500.0}, {"rope_type": "linear", "factor": 4.0}
    read = lambda kind="llama", **fields: config_of(tmp_path, model_type=kind, **fields).rope_theta
    assert read(rope_parameters=newer, rope_theta=123.0) == 500.0
    assert read(rope_parameters=newer, rope_scaling=older, rope_theta=123.0) == 123.0
    assert read(rope_parameters=newer, rope_scaling=older) == 10000.0
    assert read("gpt_oss", rope_scaling=older) == 150000.0
    assert read("gemma3_text", rope_parameters={"sliding_attention": newer}, rope_theta=7e4) == 7e4
    assert read("gemma3_text", rope_parameters={"full_attention": newer}, rope_theta=7e4) == 500.0


NONSENSE = [
    {"model_type": "falcon", "hidden_size": 4, "num_attention_heads": 8},
    {"model_type": "bloom", "hidden_size": 4, "n_head": 8},
    {"model_type": "gemma2", "query_pre_attn_scalar": 0},
    {"model_type": "gemma2", "query_pre_attn_scalar": -4},
    {"model_type": "gemma3_text", "query_pre_attn_scalar": float("inf")},
    {"model_type": "gemma3_text", "sliding_window_pattern": 0},
    *({"model_type": kind, "num_hidden_layers": 10**30} for kind in LOADED),
    {"model_type": "falcon", "hidden_size": 10**30, "num_attention_heads": 10**30, "alibi": True},
    {"model_type": "llama", "num_attention_heads": 10**9},
    {"model_type": "llama", "rope_theta": 10**400},
    {"model_type": "llama", "rms_norm_eps": 10**400},
    {"model_type": "llama", "rope_theta": None},
    {"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "factor": None, LENGTH: 0}},
    {"model_type": "llama", "rope_parameters": {"rope_type": ["yarn"], "factor": 2.0}},
    {"model_type": "gemma3_text", "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    {"model_type": "gemma3_text", "rope_parameters": {"full_attention": 5}},
    {"model_type": "qwen2", "layer_types": 5},
    {"model_type": "qwen2", "max_window_layers": "x"},
    {"model_type": "llama", "hidden_act": ["silu"]},
    {"model_type": "bloom", "pretraining_tp": 2, "slow_but_exact": True},
]


@pytest.mark.parametrize("fields", NONSENSE, ids=lambda x: str(x)[:60])
def test_nonsense_is_refused_at_once(tmp_path, fields):
    with pytest.raises(KVAttnError, match=r"config\.json"):
        config_of(tmp_path, **fields)


def test_a_decoder_has_a_number_of_layers_that_can_be_counted():
    with pytest.raises(RangeError, match="num_layers must be at most 10000"):
        DecoderConfig(vocab_size=8, model_dim=8, num_layers=10**30, num_heads=2, mlp_dim=8)


# What is refused ----------------------------------------------------------------------------------


def refused(error, path, *parts, **options):
    """That the folder is refused with this error, whose message has all these parts."""
    with pytest.raises(error) as caught:
        from_pretrained(path, **options)
    assert isinstance(caught.value, KVAttnError)
    for part in parts:
        assert str(part) in str(caught.value), f"{part!r} not in {caught.value}"


def test_files_that_are_not_there(folder, tmp_path):
    refused(MissingFileError, tmp_path / "nowhere", "config.json")
    path = folder()
    (path / WEIGHTS).rename(path / "pytorch_model.bin")
    refused(MissingFileError, path, "pytorch_model.bin", "never read", "safetensors")
    path = folder("llama2")
    placed = shards(path)
    (path / "model-00002-of-00003.safetensors").unlink()
    lost = sorted(name for name, file in placed.items() if "00002" in file)
    refused(MissingFileError, path, "model-00002-of-00003.safetensors", *lost)


@pytest.mark.wrong_types
def test_paths_that_are_no_folders(folder, tmp_path):
    path = folder()
    for file in ("config.json", WEIGHTS):
        refused(MissingFileError, path / file, f"give the folder it lies in, {path}")
    refused(MissingFileError, path / WEIGHTS, "kvattn.models.load")
    refused(MissingFileError, "some-org/Some-Model-7B", "no such folder", "download it")
    for wrong in (None, 3, b"folder", ["folder"]):
        refused(DTypeError, wrong, "path")
    refused(DTypeError, path, "ignore", ignore="rope_theta")
    for wrong in ("float99", jnp.int8, bool, "folder"):
        refused(DTypeError, path, "dtype must be floating", dtype=wrong)
        for call in (kvattn.models.load, lambda x, dtype: kvattn.models.save(None, x, dtype=dtype)):
            with pytest.raises(DTypeError, match="dtype must be floating"):
                call(tmp_path / "x.safetensors", dtype=wrong)
    (path / WEIGHTS).rename(path / "consolidated.safetensors")
    refused(MissingFileError, path, "consolidated.safetensors", f"must be named {WEIGHTS}")
    (path / "config.json").unlink()
    (path / "config.json").mkdir()
    refused(MissingFileError, path, "config.json")


@pytest.mark.wrong_types
def test_a_folder_given_to_load(folder, tmp_path):
    """The other way round: what `save` wrote is a file."""
    path = folder()
    for given in (path, path / WEIGHTS):
        with pytest.raises((ConfigError, MissingFileError), match=r"kvattn\.models\.from_pretrained") as caught:
            kvattn.models.load(given)
        assert str(path) in str(caught.value)
    with pytest.raises(MissingFileError, match=r"x\.json is not there"):
        kvattn.models.load(tmp_path / "x.safetensors")
    for wrong in (None, 3, b"x.safetensors"):
        with pytest.raises(DTypeError, match="path"):
            kvattn.models.load(wrong)


def test_an_index_that_lies(folder):
    path = folder()
    placed = shards(path)
    index = path / "model.safetensors.index.json"
    name = "model.norm.weight"
    index.write_text(json.dumps({"weight_map": placed | {"model.more.weight": placed[name]}}))
    refused(CacheCorruptionError, path, "model.more.weight", placed[name])
    index.write_text(json.dumps({"weight_map": placed | {name: "../model.safetensors"}}))
    refused(CacheCorruptionError, path, "../model.safetensors")
    for text in ("{}", '{"weight_map": 3}', "[", "[]"):
        index.write_text(text)
        refused((CacheCorruptionError, ConfigError), path, index.name)
    shards_of_two = {name: np.zeros(3, np.float32)}
    save_file(shards_of_two, path / "model-00001-of-00003.safetensors")
    save_file(shards_of_two, path / "model-00002-of-00003.safetensors")
    index.write_text(json.dumps({"weight_map": placed}))
    refused(CacheCorruptionError, path, name)


def test_another_models_tensors(folder):
    path = folder()
    given = tensors(path)
    lost, odd = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    wrong = {name: x for name, x in given.items() if name != lost}
    wrong |= {odd: given[odd].T.copy(), "model.layers.2.new": np.zeros(3, np.float32)}
    wrong["model.norm.weight"] = np.ones(32, np.int32)
    save_file(wrong, path / WEIGHTS)
    refused(
        CacheVersionError, path, path, f"missing: {lost} (48, 32)", f"shape: {odd} in {WEIGHTS} is (32, 16)",
        "(16, 32)", "left over: model.layers.2.new (3,)", "kind: model.norm.weight", "I32",
    )  # fmt: skip
    shutil.copy(GOLDEN / "gpt2" / WEIGHTS, path / WEIGHTS)
    refused(CacheVersionError, path, "missing: model.embed_tokens.weight", "left over: transformer.wte.weight")


def test_damaged_files(folder):
    path = folder()
    whole = (path / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for size in (0, 7, 8, 8 + length // 2, 8 + length, len(whole) - 1):
        (path / WEIGHTS).write_bytes(whole[:size])
        refused(CacheCorruptionError, path, WEIGHTS)
    for bad in (
        struct.pack("<Q", 2**60) + whole[8:],
        whole[:8] + b"[" + whole[9:],
        whole + b"more",
        whole[:8] + b"\xff" * length + whole[8 + length :],
    ):
        (path / WEIGHTS).write_bytes(bad)
        refused(CacheCorruptionError, path, WEIGHTS)
    for text in (b"\xff\xfe", b"{", b""):
        (path / "config.json").write_bytes(text)
        refused(CacheCorruptionError, path, "config.json")
    (path / "config.json").write_text("[]")
    refused(ConfigError, path, "config.json")


def test_unknown_models(folder):
    path = folder()
    set_config(path, model_type="mamba")
    refused(UnsupportedError, path, "mamba", "llama", "gpt_oss")
    set_config(path, drop=("model_type",))
    refused(ConfigError, path, "model_type")


FLAGS = [
    ("llama3", {"hidden_act": "tanh"}, UnsupportedError),
    ("llama3", {"quantization_config": {"quant_method": "gptq"}}, UnsupportedError),
    ("llama3", {"rope_parameters": {"rope_type": "proportional", "factor": 2.0}}, UnsupportedError),
    ("llama3", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, ConfigError),
    ("llama3", {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}, UnsupportedError),
    ("gemma2", {"sliding_window_size": 4096}, ConfigError),
    ("llama3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, UnsupportedError),
    ("llama3", {"partial_rotary_factor": 0.5}, UnsupportedError),
    ("llama3", {"residual_multiplier": 0.22}, UnsupportedError),
    ("llama3", {"hidden_size": "32"}, ConfigError),
    ("llama3", {"num_key_value_heads": 3}, ConfigError),
    ("llama3", {"attention_bias": "no"}, ConfigError),
    ("llama3", {"rms_norm_eps": "tiny"}, KVAttnError),
    ("llama3", {"rope_parameters": 5}, ConfigError),
    ("mistral", {"sliding_window": 0}, KVAttnError),
    ("qwen2", {"layer_types": ["full_attention"]}, ConfigError),
    ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, UnsupportedError),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}, ConfigError),
    ("gemma2", {"use_bidirectional_attention": True}, UnsupportedError),
    ("gemma2", {"attn_logit_softcapping": "x"}, KVAttnError),
    ("gemma3", {"attn_logit_softcapping": 30.0}, UnsupportedError),
    ("falcon40b", {"parallel_attn": False}, UnsupportedError),
    ("falcon7b", {"num_ln_in_parallel_attn": 2}, UnsupportedError),
    ("opt", {"layer_norm_elementwise_affine": False}, UnsupportedError),
    ("mpt", {"no_bias": False}, UnsupportedError),
    ("mpt", {"logit_scale": "inv_sqrt_d_model"}, UnsupportedError),
    ("mpt", {"norm_type": "rmsnorm"}, UnsupportedError),
    ("mpt", {"attn_config": {"alibi": False}}, UnsupportedError),
    ("mpt", {"attn_config": {"qk_ln": True}}, UnsupportedError),
    ("mpt", {"attn_config": {"prefix_lm": True}}, UnsupportedError),
    ("mpt", {"attn_config": {"alibi_bias_max": 16}}, UnsupportedError),
    ("mpt", {"attn_config": {"attn_type": "grouped_query_attention"}}, UnsupportedError),
    ("mpt", {"attn_config": [1]}, ConfigError),
    ("bloom", {"n_head": 5}, ConfigError),
    ("gpt2", {"add_cross_attention": True}, UnsupportedError),
    ("gpt2", {"n_head": 5}, ConfigError),
    ("gpt_bigcode", {"inference_runner": 2}, UnsupportedError),
    ("gpt_oss", {"hidden_act": "gelu"}, UnsupportedError),
    ("gpt_oss", {"num_experts_per_tok": 9}, ConfigError),
    ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, UnsupportedError),
    ("gemma", {"hidden_activation": "relu"}, UnsupportedError),
    ("gemma", {"use_bidirectional_attention": True}, UnsupportedError),
    ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, UnsupportedError),
    ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.5}}, ConfigError),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, ConfigError),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0] * 2}}, ConfigError),
    ("olmo2", {"clip_qkv": 8.0}, UnsupportedError),
    ("granite", {"logits_scaling": 0}, ConfigError),
    ("granite", {"residual_multiplier": -1.0}, ConfigError),
    ("smollm3", {"no_rope_layers": [1, 1]}, ConfigError),
    ("smollm3", {"no_rope_layers": [2, 0, 1]}, ConfigError),
    ("stablelm", {"qk_layernorm": "yes"}, ConfigError),
    ("stablelm", {"hidden_act": "relu2"}, UnsupportedError),
    ("starcoder2", {"norm_type": "rms_norm"}, UnsupportedError),
    ("starcoder2", {"mlp_type": "gated"}, UnsupportedError),
    ("gpt_neox", {"num_attention_heads": 5}, ConfigError),
    ("glm4", {"use_qk_norm": True}, UnsupportedError),
    ("cohere2", {"use_qk_norm": True}, UnsupportedError),
    ("cohere2", {"use_parallel_block": False}, UnsupportedError),
    ("cohere2", {"position_embedding_type": "rope_neox"}, UnsupportedError),
    ("cohere2", {"order_of_interleaved_layers": "global_attn_first"}, UnsupportedError),
    ("cohere2", {"sliding_window": None}, ConfigError),
    ("mixtral", {"num_experts_per_tok": 9}, ConfigError),
    ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, UnsupportedError),
    ("qwen2_moe", {"decoder_sparse_step": 0}, ConfigError),
    ("qwen2_moe", {"mlp_only_layers": [0, 1]}, UnsupportedError),
    ("qwen3_moe", {"mlp_only_layers": 3}, ConfigError),
    ("deepseek_v2", {"num_key_value_heads": 2}, UnsupportedError),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, UnsupportedError),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, UnsupportedError),
    ("deepseek_v2", {"head_dim": 5}, UnsupportedError),
    ("deepseek_v2", {"kv_lora_rank": 0}, ConfigError),
    ("deepseek_v2", {"q_lora_rank": -1}, ConfigError),
    ("deepseek_v2", {"num_experts_per_tok": None}, ConfigError),
    ("deepseek_v3", {"scoring_func": "softmax"}, UnsupportedError),
    ("deepseek_v3", {"topk_method": "greedy"}, UnsupportedError),
    ("deepseek_v3", {"qk_head_dim": 11}, UnsupportedError),
    ("deepseek_v3", {"n_group": 3}, ConfigError),
    ("deepseek_v3", {"routed_scaling_factor": 0}, ConfigError),
    ("deepseek_v3", {"qk_rope_head_dim": 3, "head_dim": None, "qk_head_dim": None}, ConfigError),
    ("deepseek_v3", {"moe_layer_freq": 0}, ConfigError),
    ("minicpm3", {"scale_depth": -1.0}, ConfigError),
    ("minicpm3", {"scale_emb": None}, ConfigError),
    ("gemma3_images", {"use_something": 3}, UnsupportedError),
    ("mistral3_images", {"quantization_config": {"quant_method": "fp8"}}, UnsupportedError),
]


OURS = {
    "windows must": "sliding_window",
    "sliding_window is null": "layer_types",
    "num_heads": "n_head",
    "num_kv_heads": "num_key_value_heads",
    "experts_per_token": "num_experts_per_tok",
    "decoder_sparse_step": "mlp_only_layers",
    "expert_groups": "n_group",
}
"""Where the decoder's settings say it, by their own names."""


@pytest.mark.parametrize(("name", "fields", "error"), FLAGS, ids=lambda x: str(x)[:60])
def test_flags_that_cannot_be_honoured(folder, name, fields, error):
    path = folder(name)
    set_config(path, **fields)
    field = next(iter(fields))
    inner = fields[field] if isinstance(fields[field], dict) else {}
    with pytest.raises(error) as caught:
        from_pretrained(path)
    assert "config.json" in str(caught.value)
    assert isinstance(caught.value, KVAttnError)
    said = str(caught.value)
    for ours, theirs in OURS.items():
        said = said.replace(ours, f"{ours} {theirs}")
    assert field in said or any(name in said for name in inner), caught.value


def test_fields_that_are_known_to_change_nothing(folder):
    path = folder()
    set_config(path, residual_multiplier=1.0, _name_or_path="x", torch_dtype="float32", something=None, other=False)
    refused(UnsupportedError, path, "residual_multiplier", "ignore=")
    assert_same(from_pretrained(path, ignore=("residual_multiplier",)), from_pretrained(GOLDEN / "llama3"))


HARMLESS = {
    "files": {
        "is_llama_config": True, "_num_labels": 1, "finetuning_task": "x", "sep_token_id": 3, "_commit_hash": "1f",
        "model_max_length": 8, "summary_type": "cls_index", "license": "mit",
    },
    "generation": {
        "max_length": 50, "min_length": 1, "do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 0.9,
        "num_beams": 4, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "bad_words_ids": [[5]],
        "output_scores": True, "forced_eos_token_id": 2, "num_return_sequences": 2, "early_stopping": True,
        "stop_strings": ["x"],
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "typical_p": 1.0,
    },
    "training": {
        "neftune_noise_alpha": 5.0, "activation_dropout": 0.1, "classifier_dropout": 0.1,
        "gradient_checkpointing": True, "loss_type": "ForCausalLM", "resid_pdrop": 0.1,
    },
    "runtime": {
        "_attn_implementation": "flash_attention_2", "attn_implementation": "eager", "max_sequence_length": 2048,
        "pad_key_length": True, "torchscript": True, "use_bfloat16": True, "_flash_attn_2_enabled": True,
        "_attn_implementation_internal": "sdpa", "use_flash_attn": True, "max_batch_size": 4,
    },
    "switched off": {
        "is_decoder": True, "add_cross_attention": False, "is_encoder_decoder": False, "pruned_heads": {},
        "chunk_size_feed_forward": 0, "tie_encoder_decoder": False, "cross_attention_hidden_size": None,
        "rope_interleaved": False,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "llama3", "mistral", "gemma2", "falcon7b", "gpt2", "gpt_bigcode", "opt", "bloom", "mpt", "phi3", "olmo2",
        "cohere2", "granite", "smollm3", "stablelm", "starcoder2", "gpt_neox", "glm4", "mixtral", "qwen2_moe",
        "qwen3_moe", "gemma",
    ],
)  # fmt: skip
def test_fields_that_never_matter(folder, name):
    """What published files carry of how they were trained, run and sampled from, in every family."""
    path = folder(name)
    for fields in HARMLESS.values():
        set_config(path, **fields)
    assert describe(path).config == describe(GOLDEN / name).config


@pytest.mark.parametrize(
    "fields",
    [
        {"add_cross_attention": True}, {"is_encoder_decoder": True}, {"pruned_heads": {"0": [1]}},
        {"chunk_size_feed_forward": 8}, {"tie_encoder_decoder": True}, {"cross_attention_hidden_size": 64},
        {"rope_interleaved": True}, {"is_causal": False}, {"activation": "relu"}, {"is_decoder": 2},
        {"temperatur": 0.6},
        {"embedding_multiplier": 12.0}, {"logits_scaling": 8.0}, {"num_kv_shared_layers": 2}, {"use_qk_norm": True},
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_matter_with_this_value(folder, fields):
    path = folder()
    set_config(path, **fields)
    refused(UnsupportedError, path, *fields)


@pytest.mark.parametrize(
    ("name", "note"), [("gemma2", {"sliding_window_size": "sliding_window"}), ("falcon7b", {"ff_factor": None})]
)
def test_notes_that_published_files_have_beside_a_field(folder, name, note):
    path, (field, same) = folder(name), *note.items()
    config = json.loads((path / "config.json").read_text())
    set_config(path, **{field: 4 if same is None else config[same]})
    assert describe(path).config == describe(GOLDEN / name).config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(tmp_path, name):
    """Whole files as they are published: every field is known, and every parameter is in one of the tensors."""
    config, count = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, spec = describe(tmp_path), from_config(tmp_path)
    scales = [shape for name, shape in found.tensors.items() if name.endswith("_scale_inv")]
    # What multiplies a layer's output is a buffer there.
    no_parameters = ("_scale_inv", ".layer_scalar")
    shapes = [shape for tensor, shape in found.tensors.items() if not tensor.endswith(no_parameters)]
    assert sum(math.prod(shape) for shape in shapes) == count
    assert (spec.num_params, spec.is_estimate, spec.cache_is_estimate) == (count, False, False)
    assert (spec.weight_dtype, spec.num_scale_bytes) == (
        "float8_e4m3fn" if scales else None,
        4 * sum(map(math.prod, scales)),
    )
    assert len(spec.notes) == bool(scales)
    windows = zip(found.config.layer_windows, found.config.layer_chunks, strict=True)
    assert spec.layer_windows == tuple(window or chunk for window, chunk in windows)
    assert spec.heads == tuple(zip(found.config.layer_kv_heads, found.config.layer_head_dims, strict=True))
    assert spec.layer_sources == found.config.layer_sources
    sizes = ("num_layers", "num_heads", "model_dim")
    assert [getattr(spec, size) for size in sizes] == [getattr(found.config, size) for size in sizes]
    if found.config.num_experts:
        assert (spec.num_experts, spec.experts_per_token) == (found.config.num_experts, found.config.experts_per_token)


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_settings_as_json_and_again(name):
    """What `kvattn.models.save` writes beside the parameters; lists become tuples again, those of longrope too."""
    config = describe(GOLDEN / name).config
    again = DecoderConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config and hash(again) == hash(config)


def test_a_text_part_with_its_tensors_elsewhere(folder):
    """Newer releases have the text part within `model.`, older ones have the models one after the other."""
    for name in ("gemma3_images", "mistral3_images"):
        path = folder(name)
        expected, given = from_pretrained(path), tensors(path)
        newer = {
            key.replace("language_model.model.", "model.language_model.").replace(
                "language_model.lm_head", "lm_head"
            ): x
            for key, x in given.items()
        }
        newer = {f"model.{key}" if key.startswith(("vision", "multi")) else key: x for key, x in newer.items()}
        save_file(newer, path / WEIGHTS)
        assert_same(from_pretrained(path), expected)
        save_file(newer | {"model.language_model.layers.0.more": np.zeros(3, np.float32)}, path / WEIGHTS)
        refused(CacheVersionError, path, "left over: model.language_model.layers.0.more")


def test_what_is_said_around_a_text_part(folder):
    """Whether embeddings are tied is, and it is true where nothing is said; a head of its own wins."""
    path = folder("mistral3_images")
    expected = from_pretrained(path)
    set_config(path, drop=("tie_word_embeddings",))
    assert describe(path).config.tie_embeddings
    assert_same(from_pretrained(path), expected)
    given = tensors(path)
    save_file({key: x for key, x in given.items() if "lm_head" not in key}, path / WEIGHTS)
    assert from_pretrained(path).config.tie_embeddings
    set_config(path, tie_word_embeddings=False)
    refused(CacheVersionError, path, "missing: lm_head.weight")


def test_experts_on_a_mesh():
    """Stacked from one tensor each, split within each expert."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    whole, split = (from_pretrained(GOLDEN / "qwen2_moe", **on) for on in ({}, {"mesh": mesh}))
    assert_same(whole, split)
    spec = lambda name: tuple(parameters_of(split)[f"layers.0.mlp.{name}"].sharding.spec)
    assert spec("gate") == spec("up") == (None, None, "model") and spec("down") == (None, "model", None)
    assert spec("shared.up.kernel") == (None, "model") and spec("router.kernel") == ()


def test_every_family_is_documented():
    text = (pathlib.Path(__file__).parents[1] / "docs" / "models.md").read_text()
    for name in LOADED:
        assert f"`{name}`" in text, name


# What it costs ------------------------------------------------------------------------------------

MEASURE = """
import resource, sys, jax, jax.numpy as jnp, kvattn.models, safetensors.numpy, numpy
kvattn.models.from_pretrained(sys.argv[1])  # everything is imported and warm
jax.block_until_ready(jnp.ones(8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = kvattn.models.from_pretrained(sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_loading_needs_little_more_than_the_checkpoint(folder):
    """The peak of a process's memory, in a process of its own, against the file's bytes."""
    path = folder("llama2")
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 16000, "head_dim": 96}
    set_config(path, **sizes, num_attention_heads=8, num_key_value_heads=8)
    rng = np.random.default_rng(0)
    given = {
        name: rng.normal(size=shape).astype(np.float32)
        for rule in describe(path).rules
        for name, shape in rule.sources.items()
    }
    save_file(given, path / WEIGHTS)
    stored = (path / WEIGHTS).stat().st_size
    del given
    run = [sys.executable, "-c", MEASURE, str(GOLDEN / "llama2"), str(path)]
    out = subprocess.run(run, capture_output=True, text=True, check=True, timeout=300).stdout
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.getpagesize() and int(out.split()[-1]) * unit < 1.2 * stored, (out, stored)


def test_nothing_is_unpickled():
    package = pathlib.Path(kvattn.__file__).parent
    for path in package.rglob("*.py"):
        for word in ("import pickle", "torch.load", "allow_pickle=True"):
            assert word not in path.read_text(), path
