"""A family from outside the package (toy_family.py): one object, which the loader and the planner both take."""

import dataclasses
import json
import math
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy_family import BLOCK, PARTS, TOY

import kvattn
from kvattn.errors import CacheVersionError, ConfigError, DTypeError, UnknownNameError, UnsupportedError
from kvattn.families import hf, rules
from kvattn.families.hf import llama
from kvattn.memory import from_config, plan
from kvattn.models import FAMILIES, Family, describe, from_pretrained, register

GOLDEN = pathlib.Path(__file__).parent / "golden" / "hf" / "llama2"
LLAMA_NAMES = {**llama.PARTS, **llama.ATTENTION, **llama.MLP}
LLAMA_NAMES |= {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    for kind in list(FAMILIES):
        monkeypatch.setitem(FAMILIES, kind, FAMILIES[kind])
    known = set(FAMILIES)
    yield FAMILIES
    for kind in set(FAMILIES) - known:
        del FAMILIES[kind]


def renamed(name):
    """What a tensor of Llama is called by the toy."""
    for ours, theirs in {**PARTS, **BLOCK}.items():
        name = re.sub(rf"\b{re.escape(LLAMA_NAMES[ours])}\b", theirs, name)
    return name


@pytest.fixture
def folder(tmp_path):
    """The golden Llama under the toy's names."""
    config = json.loads((GOLDEN / "config.json").read_text())
    kept = ("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
            "rope_parameters", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
    fields = {name: config[name] for name in kept} | {"model_type": "toy", "width": config["hidden_size"]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    tensors = {renamed(name): x for name, x in load_file(GOLDEN / "model.safetensors").items()}
    assert "net.blocks.0.mix.q.weight" in tensors
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_it_is_loaded(registry, folder):
    with pytest.raises(UnsupportedError, match="model_type 'toy' is not supported"):
        from_pretrained(folder)
    register(TOY)
    mine, usual = from_pretrained(folder), from_pretrained(GOLDEN)
    assert mine.config == usual.config
    tokens = jnp.array([[5, 17, 3, 8, 2]])
    np.testing.assert_array_equal(mine(tokens)[0], usual(tokens)[0])


def test_it_is_planned(registry, folder):
    with pytest.raises(ConfigError, match="none of hidden_size"):
        from_config(folder)
    register(TOY)
    spec = from_config(folder)
    tensors = load_file(folder / "model.safetensors")
    assert spec.num_params == sum(math.prod(x.shape) for x in tensors.values())
    assert not spec.is_estimate and not spec.cache_is_estimate and not spec.notes
    assert dataclasses.replace(spec, name="llama2") == from_config(GOLDEN)
    assert plan(spec, "h100").bytes_per_token == plan(from_config(GOLDEN), "h100").bytes_per_token


def test_it_is_described(registry, folder):
    register(TOY)
    described = describe(folder)
    assert described.tensors == {n: x.shape for n, x in load_file(folder / "model.safetensors").items()}
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))  # what it leaves out is the family's
    assert (describe(folder).config.model_dim, from_config(folder).num_kv_heads) == (64, 2)


def test_mistakes_of_a_checkpoint_are_refused_as_in_every_family(registry, folder):
    register(TOY)
    settings = json.loads((folder / "config.json").read_text())
    for fields, error, match in (
        ({"hidden_size": 7}, ConfigError, "hidden_size is 7 but width is .*: keep one"),
        ({"odd_field": 3}, UnsupportedError, "odd_field"),
        ({"width": None}, ConfigError, "hidden_size is null"),
    ):
        (folder / "config.json").write_text(json.dumps(settings | fields))
        with pytest.raises(error, match=match):
            from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = load_file(folder / "model.safetensors")
    save_file({n.replace("mix.q", "mix.query"): x for n, x in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(CacheVersionError, match=r"missing: net\.blocks\.0\.mix\.q\.weight"):
        from_pretrained(folder)


def test_mistakes_of_a_family_are_named(registry, folder):
    weights, whole = folder / "model.safetensors", load_file(folder / "model.safetensors")
    forgotten = {name: x for name, x in TOY.defaults.items() if name != "rms_norm_eps"}
    register(dataclasses.replace(TOY, defaults=forgotten))
    with pytest.raises(UnknownNameError, match="rms_norm_eps"):
        describe(folder)
    del FAMILIES["toy"]
    shorter = {name: part for name, part in BLOCK.items() if name != "mlp_norm"}
    for block, match in (
        (BLOCK | {"attention.kye": "mix.k"}, r"no part 'layers\.0\.attention\.kye'"),
        (shorter, r"layers\.1\.mlp_norm\.scale: made None, the decoder has \(32,\)"),
    ):
        wrong = lambda fields, block=block: rules.blueprint(TOY.blueprint(fields).config, PARTS, block)
        register(dataclasses.replace(TOY, blueprint=wrong))
        save_file({n: x for n, x in whole.items() if block is not shorter or "norm_b" not in n}, weights)
        with pytest.raises(ConfigError, match=match):
            from_pretrained(folder)
        del FAMILIES["toy"]


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: "toy", DTypeError, r"kvattn\.models\.Family, got 'toy'"),
        (lambda: {"model_type": "toy"}, DTypeError, "must be a"),
        (lambda: Family(model_type=""), DTypeError, "model_type"),
        (lambda: Family(model_type=None), DTypeError, "model_type"),
        (lambda: Family(model_type="llama"), ConfigError, "'llama' is taken"),
        (lambda: Family(model_type="RefinedWeb"), ConfigError, "'RefinedWeb' is taken"),
        (lambda: Family(model_type="new", formerly={"gpt2": {}}), ConfigError, "'gpt2' is taken"),
    ],
)
def test_what_is_no_new_family_is_refused(registry, make, error, match):
    before = dict(FAMILIES)
    with pytest.raises(error, match=match):
        register(TOY, make())
    assert before == FAMILIES  # none of them


def test_a_name_is_taken_once_registered(registry):
    with pytest.raises(ConfigError, match="'toy' is taken"):
        register(TOY, TOY)
    register(TOY)
    with pytest.raises(ConfigError, match="'toy' is taken"):
        register(TOY)


def test_a_family_that_is_only_planned(registry, tmp_path):
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 64, "intermediate_size": 96}
    config = {"model_type": "my_bert", "vocab_size": 100} | sizes
    with pytest.raises(UnsupportedError, match="encoder"):  # by its name; a description knows better
        from_config(config)
    register(Family(model_type="my_bert", text_part_of=("my_bert_with_eyes",)))
    spec = from_config(config)
    assert (spec.is_estimate, spec.cache_is_estimate, spec.num_cache_layers) == (True, False, 4)
    seeing = {"model_type": "my_bert_with_eyes", "text_config": {"vocab_size": 100} | sizes}
    assert from_config(seeing, name="x") == from_config(config, name="x")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="my_bert"):
        from_pretrained(tmp_path)


def test_every_file_of_families_has_its_line():
    files = {path.stem for path in pathlib.Path(hf.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == {name for name in vars(hf) if not name.startswith("_")} - {"jaxtyping"}  # of `--shapes`
    assert kvattn.models.FAMILIES is FAMILIES
