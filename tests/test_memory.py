"""The planner against the arrays themselves, against published figures, and against arithmetic done another way."""

import dataclasses
import functools
import itertools
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import published_configs
import pytest
import variants
from memory_configs import (
    ACTIVE,
    AWQ,
    BUILT,
    CONFIGS,
    COUNTED,
    COUNTED_EXACTLY,
    DENSE_LAYERS,
    ESTIMATED,
    EXACT,
    KEPT,
    LLAMA4,
    PUBLISHED,
    QWEN3_MOE,
    STORED,
    WRITTEN,
    nested,
    sized,
)
from published_configs import GEMMA4_E2B

import kvattn
from kvattn import errors, memory
from kvattn.cache import Layout, groups_of, pages_at_once
from kvattn.cache.groups import most_slots
from kvattn.codecs import Plain
from kvattn.memory import (
    DEVICES,
    MODELS,
    ModelSpec,
    bytes_per_token,
    cache_bytes,
    caches,
    formula,
    from_config,
    levers,
    plan,
)
from kvattn.memory.levers import with_kv_heads
from kvattn.memory.plan import _seen
from kvattn.models import FAMILIES, describe
from kvattn.policies import Full, OrderedWindow
from kvattn.serving.groups import GroupedPool, LayerGroup

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = sorted(path.parent for path in (ROOT / "tests" / "golden" / "hf").glob("*/config.json"))


def tiny(layers=1, heads=4, kv_heads=2, head_dim=16, window=None, num_params=1000):
    sizes = {"num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    return ModelSpec(name="tiny", num_params=num_params, window=window, **sizes)


# The published figures ------------------------------------------------------------------------------------------------

# layers, query heads, key/value heads, head dim, bytes per token in half precision.
TABLES = {
    "llama-2-7b": (32, 32, 32, 128, 524_288),
    "llama-2-13b": (40, 40, 40, 128, 819_200),
    "llama-2-70b": (80, 64, 8, 128, 327_680),
    "opt-125m": (12, 12, 12, 64, 36_864),
    "opt-1.3b": (24, 32, 32, 64, 196_608),
    "opt-2.7b": (32, 32, 32, 80, 327_680),
    "opt-6.7b": (32, 32, 32, 128, 524_288),
    "opt-13b": (40, 40, 40, 128, 819_200),
    "opt-30b": (48, 56, 56, 128, 1_376_256),
    "opt-66b": (64, 72, 72, 128, 2_359_296),
    "opt-175b": (96, 96, 96, 128, 4_718_592),
    "mpt-7b": (32, 32, 32, 128, 524_288),
    "mpt-30b": (48, 64, 64, 112, 1_376_256),
    "bloom-176b": (70, 112, 112, 128, 4_014_080),
    "palm-8b": (32, 16, 1, 256, 32_768),
    "palm-62b": (64, 32, 1, 256, 65_536),
    "palm-540b": (118, 48, 1, 256, 120_832),
    "falcon-7b": (32, 71, 1, 64, 8_192),
    "falcon-40b": (60, 128, 8, 64, 122_880),
    "falcon-180b": (80, 232, 8, 64, 163_840),
    "mistral-7b-v0.1": (32, 32, 8, 128, 131_072),
}


@pytest.mark.parametrize("name", TABLES)
def test_bytes_per_token_of_the_tables(name):
    layers, heads, kv_heads, head_dim, expected = TABLES[name]
    m = MODELS[name]
    assert (m.num_layers, m.num_heads, m.num_kv_heads, m.head_dim) == (layers, heads, kv_heads, head_dim)
    assert bytes_per_token(layers, kv_heads, head_dim) == expected
    assert plan(name, "h100").bytes_per_token == expected


def test_figures_of_the_article():
    """Half a MiB and 4 MB a token; 14 GiB are 28,672 tokens; 20 thousand on an A10; 1,000 tokens: 524 MB, 13.5e12."""
    assert plan("llama-2-7b", "a10").bytes_per_token == 2**19
    assert round(plan("bloom-176b", "a10").bytes_per_token / 1e6, 2) == 4.01
    assert 14 * 2**30 // bytes_per_token(32, 32, 128) == 28_672 == 56 * 512
    p = plan("llama-2-7b", "a10", batch_size=1, length=1000)
    assert p.weight_bytes == 13_476_831_232
    assert p.max_tokens == 20_071
    assert p.weight_bytes // p.bytes_per_token == p.crossover_length == 25_705
    assert 10 * 10**9 // 500_000 == 20_000  # the article's own rounding
    assert round(p.bytes_per_token * 1000 / 1e6) == 524
    assert round(p.prefill_flops / 1e12, 1) == 13.5
    assert p.prefill_attention_flops / p.prefill_flops < 0.02  # the quadratic part that the article leaves out
    assert max(plan(name, "a10").bytes_per_token for name in TABLES) == 4_718_592  # "about 1 MB": the order


def test_floor_of_a_step():
    """13.48 GB over 600 GB/s; every 1,000 tokens of cache 0.87 ms more."""
    empty = plan("llama-2-7b", "a10")
    full = plan("llama-2-7b", "a10", length=1000)
    assert round(1e3 * empty.step_seconds, 1) == 22.5
    assert round(1e3 * (full.step_seconds - empty.step_seconds), 2) == 0.87
    assert full.tokens_per_second == 1 / full.step_seconds
    many = plan("llama-2-7b", "a10", batch_size=4, length=1000)
    assert math.isclose(many.step_seconds, (13_476_831_232 + 4 * 524_288_000) / 600e9)
    assert math.isclose(many.tokens_per_second, 4 / many.step_seconds)


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "by", "published"),
    [(48, 128, "heads", (1320, 330)), (1, 256, "heads", (660, 165)), (1, 256, "batch", (43_000, 10_700))],
    ids=["multihead", "multiquery, by heads", "multiquery, by batch"],
)
def test_longest_contexts_of_pope_et_al(kv_heads, head_dim, by, published):
    """arXiv:2211.05102, table 1: PaLM 540B on 64 TPU v4, 30 % of memory for caches, batches of 128 and 512."""
    model = dataclasses.replace(MODELS["palm-540b"], num_kv_heads=kv_heads, head_dim=head_dim)
    for batch, expected in zip((128, 512), published, strict=True):
        p = plan(model, "tpu-v4", batch_size=batch, num_devices=64, by=by, memory_fraction=0.3)
        assert abs(p.max_tokens / batch / expected - 1) < 0.02
        # In whole rows of eight slots, which a length of 165 feels.
        assert 0 <= p.max_tokens / batch - p.max_length < 9
    assert by == plan(model, "tpu-v4", batch_size=128, num_devices=64, memory_fraction=0.3).by or by == "heads"


def test_three_terabytes_of_pope_et_al():
    model = dataclasses.replace(MODELS["palm-540b"], num_kv_heads=48, head_dim=128)
    assert round(plan(model, "tpu-v4", batch_size=512, length=2048).cache_bytes / 1e12, 2) == 3.04


def test_window_of_mistral():
    """32,768 tokens: 4 GiB without the window, half a GiB with it."""
    whole = cache_bytes(MODELS["mistral-7b-v0.1"], 1, 32768, policy=Full())
    ring = cache_bytes(MODELS["mistral-7b-v0.1"], 1, 32768)
    assert round(whole / 2**30, 3) == 4 and round(ring / 2**30, 3) == 0.5
    p = plan("mistral-7b-v0.1", "a10", length=32768)
    assert p.max_length is None and p.crossover_length is None


# The arrays themselves ------------------------------------------------------------------------------------------------

POLICIES = [
    None,
    *variants.POLICIES.values(),
    kvattn.SlidingWindow(100),
    kvattn.StreamingLLM(4, 60),
    kvattn.Scissorhands(33, history=41),
]
CODECS = [
    None,
    *variants.CODECS.values(),
    kvattn.Int4(),
    kvattn.Int4(7),
    kvattn.KIVI(),
    kvattn.KIVI(4, 16, 48),
]


def shapes(policy, codec, heads, head_dim, capacity, batch, backend, dtype):
    """A cache's arrays by shape."""

    def create():
        options = {"policy": policy, "codec": codec, "dtype": dtype, "capacity": capacity}
        if policy is not None and policy.needs_mass:  # they set aside their budget, however short sequences are
            options["capacity"] = variants.capacity_of(policy, capacity)
        if backend != "cpu":  # what KVCache.create takes there
            slots = (policy or Full()).num_slots(options["capacity"])
            options["layout"] = Layout.best(slots, 0, backend, head_dim)
        return kvattn.KVCache.create(batch, heads, head_dim, **options)

    return jax.eval_shape(create)


CASES = list(itertools.product(POLICIES, CODECS))


@functools.cache
def real_bytes():
    """Of every policy and codec that go together, at sizes that change from case to case."""
    found = {}
    sizes = itertools.cycle(itertools.product([(2, 64), (1, 5), (3, 128)], (1, 50, 300, 1000), ("cpu", "gpu", "tpu")))
    for policy, codec in CASES:
        for (heads, head_dim), capacity, backend in itertools.islice(sizes, 5):
            dtype = "float32" if capacity == 50 else "bfloat16"
            case = (policy, codec, heads, head_dim, capacity, backend, dtype)
            try:
                found[case] = shapes(policy, codec, heads, head_dim, capacity, 3, backend, dtype).nbytes
            except errors.UnsupportedError:
                assert not variants.go_together(policy, codec)
    assert len(found) > 150
    return found


def test_what_caches_refuse_is_refused():
    """A policy and a codec that do not go together, by the words of the cache itself."""
    refused = 0
    for policy, codec in CASES:
        try:
            shapes(policy, codec, 2, 64, 50, 1, "cpu", "bfloat16")
        except errors.UnsupportedError as error:
            refused += 1
            with pytest.raises(errors.UnsupportedError) as caught:
                cache_bytes(tiny(1, 2, 2, 64), 1, 50, policy=policy, codec=codec)
            assert str(caught.value) == str(error)
    kivis = sum(isinstance(codec, kvattn.KIVI) for codec in CODECS)
    assert refused == kivis * sum(policy is not None and type(policy) is not Full for policy in POLICIES)


def predicted(case):
    policy, codec, heads, head_dim, capacity, backend, dtype = case
    model = tiny(1, heads, heads, head_dim)
    return cache_bytes(model, 3, capacity, policy=policy, codec=codec, dtype=dtype, backend=backend)


def wrong():
    return [case for case, size in real_bytes().items() if predicted(case) != size]


def test_every_policy_and_codec_to_the_byte():
    assert not wrong()


@pytest.mark.parametrize("codec", [None, kvattn.Int4(), kvattn.KIVI()], ids=str)
def test_values_of_another_size(codec):
    """Counted as they are stored; what fewer heads save in weights too."""
    model = dataclasses.replace(tiny(2, 4, 2, 64, num_params=10_000), value_head_dim=32, model_dim=8)
    cache = jax.eval_shape(lambda: kvattn.KVCache.create(3, 2, 64, capacity=256, codec=codec, value_head_dim=32))
    assert cache_bytes(model, 3, 256, codec=codec, backend="cpu") == 2 * cache.nbytes
    assert kvattn.memory.bytes_per_token(2, 2, 64, value_head_dim=32) == 2 * 2 * (64 + 32) * 2
    assert model.num_params - with_kv_heads(model, 1).num_params == 2 * 8 * (64 + 32)


def latent(**changes):
    """One key of 72 numbers for all heads, 64 of which are its value."""
    return dataclasses.replace(tiny(1, 8, 1, 72), value_head_dim=64, values_in_keys=True, **changes)


IN_KEYS = {"value_head_dim": 64, "values_in_keys": True}


@pytest.mark.parametrize("codec", [None, kvattn.Int8(), kvattn.Float8(), kvattn.Int4(24)], ids=str)
def test_latent_caches_to_the_byte(codec):
    """Under every policy, contiguous and in pages."""
    for policy in POLICIES:
        options = {"policy": policy, "codec": codec}
        capacity = variants.capacity_of(policy, 300) if policy is not None and policy.needs_mass else 300
        cache = jax.eval_shape(
            lambda capacity=capacity, options=options: kvattn.KVCache.create(
                3, 1, 72, capacity=capacity, **IN_KEYS, **options
            )
        )
        assert cache_bytes(latent(), 3, 300, backend="cpu", **options) == cache.nbytes, policy
        rule = policy or Full()
        pages, columns = 3 * pages_at_once(rule, 16, 300), -(-most_slots(rule, 300) // 16)
        paged = jax.eval_shape(
            lambda pages=pages, columns=columns, options=options: kvattn.PagedKVCache.create(
                pages, 16, 1, 72, batch_size=3, max_pages=columns, **IN_KEYS, **options
            )
        )
        assert cache_bytes(latent(), 3, 300, page_size=16, **options) == paged.nbytes, policy
    with pytest.raises(errors.UnsupportedError, match="KIVI"):
        cache_bytes(latent(), 1, 300, codec=kvattn.KIVI())


@pytest.mark.parametrize(("by", "batch"), [("batch", 8), ("sequence", 3)])
@pytest.mark.parametrize("codec", [None, kvattn.Int8()], ids=str)
def test_what_a_device_holds_of_latents(by, batch, codec):
    mesh = jax.make_mesh((4,), ("model",))
    cache = jax.eval_shape(lambda: kvattn.KVCache.create(batch, 1, 72, capacity=1024, codec=codec, **IN_KEYS))
    device = dataclasses.replace(DEVICES["a10"], backend="cpu")
    p = plan(latent(), device, batch_size=batch, length=1024, codec=codec, num_devices=4, by=by)
    assert p.device_cache_bytes == kvattn.sharding.bytes_per_device(cache, mesh, by=by)


def test_deepseek():
    """As its papers have it: 576 numbers a token and layer; 671 billion parameters, of which a token meets 37."""
    p = plan("deepseek-v3", "h200", batch_size=32, length=8192, num_devices=16)
    assert p.bytes_per_token == 61 * 1152 and p.by == "batch"
    assert p.changed(codec=kvattn.Int8()).bytes_per_token == 61 * (576 + 4)
    assert p.changed(codec=kvattn.Int4(64)).bytes_per_token == 61 * (288 + 9 * 4)
    # A ring has a slot for every token that is seen, and nothing else.
    ring = p.changed(policy=kvattn.SlidingWindow(1024))
    assert ring.cache_bytes == 32 * 61 * (1024 * 1152 + 8)
    assert p.changed(by="sequence").device_cache_bytes == 32 * 61 * (8192 // 16 * 1152 + 8)
    heads = p.changed(by="heads")
    assert heads.device_cache_bytes == heads.cache_bytes == p.cache_bytes == 16 * p.device_cache_bytes
    assert "1 key/value head takes the room of 16" in heads.notes[0]
    assert not any("GQA" in lever.name or "MQA" in lever.name for lever in levers(p))
    # All parameters, and those that a token meets: with and without the table that it is only looked up in.
    for name, total, active in (("v3", 671.0, 37.6), ("v2", 235.7, 21.4), ("v2-lite", 15.7, 2.7)):
        spec = MODELS[f"deepseek-{name}"]
        assert (round(spec.num_params / 1e9, 1), round(spec.active_params / 1e9, 1)) == (total, active)
    lite = MODELS["deepseek-v2-lite"]
    assert round((lite.active_params - 102400 * 2048) / 1e9, 1) == 2.5  # 2.4 in its paper
    assert MODELS["DeepSeek-R1"] is MODELS["deepseek-v3"]


def test_fp8_in_blocks():
    """Weights of projections in 8 bits, a float32 for each block of 128 x 128, everything else in 16 bits."""
    config, count = published_configs.PUBLISHED["deepseek-v3"]
    p = plan(from_config(config), "h200", num_devices=8)
    d, vocab, experts = 7168, 129280, 256
    floats = 2 * vocab * d + 61 * (2 * d + 1536 + 512) + d + 58 * experts * (d + 1)
    attention = [(1536, d), (128 * 192, 1536), (576, d), (128 * 256, 512), (d, 128 * 128)]
    mlp = lambda hidden: [(hidden, d), (hidden, d), (d, hidden)]
    matrices = 61 * attention + 3 * mlp(18432) + 58 * (experts + 1) * mlp(2048)
    assert sum(a * b for a, b in matrices) == count - floats
    scales = sum(-(-a // 128) * -(-b // 128) for a, b in matrices)
    assert p.weight_bytes == count - floats + 2 * floats + 4 * scales
    assert "163,352,928 bytes of scales" in p.notes[0] and p.model.num_scale_bytes == 4 * scales
    assert p.changed(weight_dtype="bfloat16").weight_bytes == 2 * count
    # One token reads 8 of 256 experts, with their scales.
    idle = 58 * 248 * sum(a * b for a, b in mlp(2048)) * (1 + 4 / 128**2)
    read = p.step_seconds * DEVICES["h200"].bandwidth * 8
    assert abs(read / (p.weight_bytes - idle) - 1) < 1e-5  # 576 is no multiple of 128
    # Of a file that cannot be read it is not known how many, as before.
    odd = from_config(config | {"quantization_config": published_configs.FP8 | {"fmt": "e5m2"}})
    assert odd.num_scale_bytes == 0 and "scales are not counted" in odd.notes[0]


@pytest.mark.parametrize("fault", ["no state", "no lengths", "no rounding", "no scales", "keys only", "residual"])
def test_a_fault_in_the_formula_is_seen(monkeypatch, fault):
    whole = formula.storage
    if fault == "no state":
        monkeypatch.setattr(formula, "state_bytes", lambda policy, heads: (0, 0))
    elif fault == "no lengths":
        monkeypatch.setattr(formula, "ROW_BYTES", 0)
    elif fault == "no rounding":
        rows = lambda self, slots, parts: Layout(slots, self.codec.rows or 1, False)
        monkeypatch.setattr(formula.Layer, "_layout", rows)
    elif fault == "residual":
        monkeypatch.setattr(formula, "storage", lambda *a: dataclasses.replace(whole(*a), rest=0))
    elif fault == "keys only":
        monkeypatch.setattr(formula, "storage", lambda *a: dataclasses.replace(whole(*a), block=whole(*a).block // 2))
    else:

        def bare(codec, head_dim, dtype, *values):
            store = whole(codec, head_dim, dtype)
            bits = {kvattn.Int8: 8, kvattn.Float8: 8, kvattn.Int4: 4, kvattn.KIVI: getattr(codec, "bits", 0)}
            kind = type(codec)
            return (
                store
                if kind is Plain
                else dataclasses.replace(store, block=2 * store.rows * head_dim * bits[kind] // 8)
            )

        monkeypatch.setattr(formula, "storage", bare)
    assert wrong()


def test_the_formula_written_out():
    """2 * layers * K * H * bytes * slots, and scales, and tables: by hand, for sizes that nothing rounds."""
    layers, heads, head_dim, batch, slots = 3, 2, 64, 5, 256
    model = tiny(layers, 4, heads, head_dim)
    numbers = 2 * layers * heads * head_dim * slots * batch
    groups = numbers // head_dim  # (token, head, key or value)
    rows = 8 * layers * batch
    size = functools.partial(cache_bytes, model, batch, slots)
    assert size() == 2 * numbers + rows
    assert size(dtype="float32") == 4 * numbers + rows
    assert size(codec=kvattn.Int8()) == numbers + 4 * groups + rows
    assert size(codec=kvattn.Int4(32)) == numbers // 2 + (head_dim // 32) * 4 * groups + rows
    kivi = kvattn.KIVI(2, 32, 128)
    residual = 2 * layers * heads * head_dim * 128 * batch * 2
    assert size(codec=kivi) == numbers // 4 + (numbers // 32) * 4 + residual + rows
    per_slot = layers * heads * slots * batch
    assert size(policy=kvattn.FastGen()) == 2 * numbers + 12 * per_slot + layers * batch * (4 * heads + 4) + rows
    # H2O: positions and scores of budget + 1 slots, rounded up to eight for keys and values only.
    kept = 2 * layers * heads * head_dim * 2 * batch * 24
    assert size(policy=kvattn.H2O(10, 8)) == kept + 8 * layers * heads * batch * 19 + rows
    pages, most = 40, 16
    paged = cache_bytes(model, batch, slots, page_size=16, num_pages=pages)
    assert paged == 2 * layers * heads * head_dim * 2 * pages * 16 + layers * batch * 4 * most + rows


@pytest.mark.parametrize("codec", [None, kvattn.Int8(), kvattn.Int4(), kvattn.KIVI(2, 16, 16)], ids=str)
@pytest.mark.parametrize("num_pages", [None, 7])
def test_pages(codec, num_pages):
    model = tiny(1, 6, 3, 64)

    def create():
        pages = num_pages or 4 * 5
        options = {"batch_size": 4, "max_pages": 5, "codec": codec}
        return kvattn.PagedKVCache.create(pages, 16, 3, 64, **options)

    expected = jax.eval_shape(create).nbytes
    assert cache_bytes(model, 4, 70, codec=codec, page_size=16, num_pages=num_pages) == expected


PAGED = [*POLICIES, OrderedWindow(40)]


def counted_in_pages(policy, codec, page_size, heads=2, head_dim=64, length=300):
    """True: a cache of three sequences has the bytes that the planner says. False: both refuse it in equal words."""
    rule, options = policy or Full(), {"policy": policy, "codec": codec}
    sizes = {"batch_size": 3, "max_pages": -(-most_slots(rule, length) // page_size)}
    pages = 3 * pages_at_once(rule, page_size, length)
    count = functools.partial(cache_bytes, tiny(1, heads, heads, head_dim), 3, length, page_size=page_size, **options)
    try:
        real = jax.eval_shape(
            lambda: kvattn.PagedKVCache.create(pages, page_size, heads, head_dim, **sizes, **options)
        ).nbytes
    except errors.KVAttnError as error:
        with pytest.raises(type(error)) as caught:
            count()
        assert str(caught.value) == str(error)
        return False
    assert count() == real, (policy, codec, page_size, heads, head_dim, length)
    return True


def test_policies_and_codecs_in_pages():
    """Each policy, each codec in the pages that it takes; all of them together is the test below."""
    assert all(counted_in_pages(policy, None, 8) for policy in PAGED)
    assert all(counted_in_pages(OrderedWindow(40), codec, (codec and codec.rows) or 16) for codec in CODECS)


@pytest.mark.parametrize("page_size", [1, 8, 16, 128])
def test_every_policy_and_codec_in_pages(page_size):
    """At sizes that change from case to case."""
    sizes = itertools.cycle(itertools.product([(2, 64), (1, 5), (3, 128)], (1, 50, 300, 1000)))
    cases = zip(itertools.product(PAGED, CODECS), sizes, strict=False)
    assert sum(counted_in_pages(*case, page_size, *heads, length) for case, (heads, length) in cases) > 70


@pytest.mark.parametrize("page_size", [1, 8, 16, 128])
def test_pages_that_sequences_hold(page_size):
    """As the host's pools count them, token by token and by chunks, layer by layer."""
    model, length = tiny(5, window=(None, 20, None, 3, 20)), 90
    for chunk, policy in itertools.product((1, 7), (None, Full(), kvattn.SlidingWindow(33), kvattn.StreamingLLM(2, 9))):
        rules = [policy] * 5 if policy else [Full() if w is None else OrderedWindow(w) for w in model.window]
        slots = [None if rule.in_order else rule.num_slots(None) for rule in rules]
        windows = [rule.mask().window if rule.in_order else None for rule in rules]
        pool = GroupedPool([LayerGroup(200, w, 1, s) for w, s in zip(windows, slots, strict=True)], page_size)
        pool.allocate("a", chunk)
        for have in range(chunk, length, chunk):
            pool.append("a", min(chunk, length - have))
        peaks = [usage.peak_blocks for usage in pool.usage()]
        kinds = caches.layers(model, policy=policy, page_size=page_size, prefill_chunk=chunk)
        most = sorted(layer.num_pages(length) for layer, count in kinds.items() for _ in range(count))
        # Where chunks begin on no page the bound is one more than this walk meets.
        assert all(real <= said <= real + (chunk > 1) for real, said in zip(sorted(peaks), most, strict=True))
        options = {"policy": policy, "page_size": page_size, "prefill_chunk": chunk}
        pools = 2 * 16 * 2 * 2 * page_size * sum(most)
        tables = 4 * sum(-(-most_slots(rule, length) // page_size) for rule in rules) + 8 * 5
        assert cache_bytes(model, 1, length, **options) == pools + tables


@pytest.mark.parametrize(("length", "every", "own"), [(4096, 192, 102), (8192, 384, 198), (16384, 768, 390)])
def test_window_groups_of_gpt_oss(length, every, own):
    """MiB of a sequence in pages of 128, all layers with the tables of those that keep all, and in two groups."""
    size = functools.partial(cache_bytes, MODELS["gpt-oss-20b"], 1, length, page_size=128)
    tables = 24 * (4 * length // 128 + 8)
    assert size() == (own << 20) + tables and size(policy=Full()) == (every << 20) + tables
    p = plan("gpt-oss-20b", "h100", length=length, page_size=128)
    assert p.cache_bytes == size()
    assert p.notes[0].startswith(f"a sequence holds 2 pages in 12 layers and {length // 128} pages in 12 layers")
    assert p.changed(policy=Full()).notes == p.changed(page_size=None).notes == p.changed(length=None).notes == ()
    # A step reads as much; more tokens at a time need more pages.
    assert math.isclose(p.step_seconds, p.changed(policy=Full()).step_seconds)
    assert p.changed(prefill_chunk=257).cache_bytes == p.cache_bytes + 12 * 2 * (128 * 8 * 64 * 2 * 2)


def test_heads_that_give_pages_back_are_counted_whole():
    """A table of each head; pages for heads that keep everything, and a word on it."""
    model = tiny(1, 4, 2, 16)
    p = plan(model, "t4", batch_size=3, length=100, mean_length=60, policy=kvattn.FastGen(), page_size=16)
    state = 12 * 2 * 7 * 16 + 4 * 2 + 4  # positions, scores and kinds of all slots; a choice of each head, the prompt
    assert p.cache_bytes == 3 * (4 * 16 * 2 * 16 * 2 * 2 + 4 * 2 * 7 + state + 8)
    assert p.notes == (
        "FastGen heads give back pages as the text allows, which is not known before: counted is the most, with heads "
        "that keep everything",
    )


@pytest.mark.parametrize("folder", [f for f in GOLDEN if f.name in ("gemma3", "gpt_oss")], ids=lambda f: f.name)
@pytest.mark.parametrize(
    "options",
    [{}, {"codec": kvattn.KIVI(2, 8, 8)}, {"policy": kvattn.H2O(3, 4)}, {"policy": kvattn.FastGen()}],
    ids=str,
)
def test_the_pools_of_a_model(folder, options):
    """`make_paged_cache` of a checkpoint's model, each layer with the pages that its group says."""
    model, sizes = models()[folder.name], {"batch_size": 2, "max_length": 40, "dtype": jnp.float32, **options}
    make = lambda pages: jax.eval_shape(lambda: model.make_paged_cache(pages, 8, **sizes))
    groups = groups_of(make(4))
    pages = {i: 2 * group.pages(40) for group in groups for i in group.layers}
    real = sum(cache.nbytes for cache in make([pages[i] for i in range(len(pages))]))
    size = functools.partial(cache_bytes, from_config(folder), 2, 40, dtype="float32", page_size=8, **options)
    assert size() == real and size(num_pages=4) == sum(cache.nbytes for cache in make(4))
    if not options:
        assert len(set(pages.values())) > 1


@pytest.mark.parametrize("folder", [f for f in GOLDEN if f.name in ("gemma3", "mistral", "gpt_oss", "falcon7b")],
                         ids=lambda f: f.name)  # fmt: skip
@pytest.mark.parametrize("codec", [None, kvattn.Int8()], ids=str)
def test_the_caches_of_a_model(folder, codec):
    """`make_cache` of a checkpoint's model: windows layer by layer, heads as the family has them."""
    model = models()[folder.name]
    caches = jax.eval_shape(lambda: model.make_cache(2, 40, codec=codec, dtype=jnp.float32))
    size = cache_bytes(from_config(folder), 2, 40, codec=codec, dtype="float32", backend="cpu")
    assert size == sum(cache.nbytes for cache in caches)


@functools.cache
def models():
    return {name: kvattn.models.from_pretrained(ROOT / "tests" / "golden" / "hf" / name)
            for name in ("gemma3", "mistral", "gpt_oss", "falcon7b")}  # fmt: skip


COMPILED = [
    (None, None),
    (None, kvattn.Int8()),
    (kvattn.SlidingWindow(96), kvattn.Int4()),
    (kvattn.H2O(40, 40), None),
]


@pytest.mark.parametrize(("policy", "codec"), COMPILED, ids=str)
def test_the_compiled_step(policy, codec):
    """What the program of a decode step is given, and updates in place, is what the planner says, within 1 %."""
    model = tiny(1, 4, 2, 64)
    capacity = None if isinstance(policy, kvattn.H2O) else 640
    cache = jax.eval_shape(
        lambda: kvattn.KVCache.create(2, 2, 64, capacity=capacity, policy=policy, codec=codec, dtype=jnp.float32)
    )
    query = jax.ShapeDtypeStruct((2, 1, 4, 64), jnp.float32)
    token = jax.ShapeDtypeStruct((2, 1, 2, 64), jnp.float32)
    compiled = kvattn.jit(kvattn.cached_attention).lower(query, token, token, cache).compile()
    found = compiled.memory_analysis()
    expected = cache_bytes(model, 2, 640, policy=policy, codec=codec, dtype="float32", backend="cpu")
    given = found.argument_size_in_bytes - 4 * (query.size + 2 * token.size)
    assert abs(given / expected - 1) < 0.01
    assert abs(found.alias_size_in_bytes / expected - 1) < 0.01


MESH_CASES = [
    ("heads", 4, 4, None, None),
    ("heads", 8, 4, kvattn.H2O(20, 11), kvattn.Int8()),
    ("batch", 1, 8, None, None),
    ("batch", 2, 8, kvattn.StreamingLLM(4, 60), kvattn.Int4()),
    ("sequence", 1, 3, None, kvattn.Int8()),
    ("sequence", 2, 3, kvattn.StreamingLLM(4, 57), kvattn.Int4()),
    ("sequence", 1, 1, kvattn.H2O(20, 11, positions_in="cache"), None),
    ("sequence", 2, 3, kvattn.Scissorhands(300, 8, 100), kvattn.Int8()),
    ("sequence", 1, 2, kvattn.FastGen(0.9), None),
]


@pytest.mark.parametrize(("by", "kv_heads", "batch", "policy", "codec"), MESH_CASES)
def test_what_a_device_holds(by, kv_heads, batch, policy, codec):
    """Those of the shards that `kvattn.sharding` makes, to the byte."""
    mesh = jax.make_mesh((4,), ("model",))
    capacity = 1024 if policy is None else variants.capacity_of(policy, 1024)
    cache = jax.eval_shape(
        lambda: kvattn.KVCache.create(batch, kv_heads, 64, capacity=capacity, policy=policy, codec=codec)
    )
    real = kvattn.sharding.bytes_per_device(cache, mesh, by=by)
    model, device = tiny(1, 8, kv_heads, 64), dataclasses.replace(DEVICES["a10"], backend="cpu")
    options = {"policy": policy, "codec": codec, "num_devices": 4, "by": by}
    p = plan(model, device, batch_size=batch, length=1024, **options)
    assert p.device_cache_bytes == real


MESH_PAGES = [
    ("heads", 4, 4, None, kvattn.KIVI(2, 16, 32)),
    ("heads", 8, 4, kvattn.H2O(20, 11), kvattn.Int8()),
    ("heads", 2, 3, kvattn.FastGen(0.9), None),
    ("batch", 1, 8, OrderedWindow(40), None),
    ("batch", 2, 8, kvattn.StreamingLLM(4, 60), kvattn.Int4()),
    ("batch", 2, 8, kvattn.FastGen(0.9), None),
    ("sequence", 1, 3, None, kvattn.Int8()),
    ("sequence", 2, 5, OrderedWindow(40), None),
    ("sequence", 2, 4, kvattn.Scissorhands(60, 8, 10), kvattn.Int4()),
    ("sequence", 1, 2, kvattn.FastGen(0.9), None),
]


@pytest.mark.wrong_types  # shapes of caches instead of caches
@pytest.mark.parametrize(("by", "kv_heads", "batch", "policy", "codec"), MESH_PAGES)
def test_what_a_device_holds_in_pages(by, kv_heads, batch, policy, codec):
    """Pools are divided whole, not row by row: tables and what policies remember by rows or heads, or not at all."""
    mesh, length, page_size = jax.make_mesh((4,), ("model",)), 1000, 32
    rule = policy or Full()
    pages = -(-batch * pages_at_once(rule, page_size, length) // 4) * 4
    pages = batch * pages_at_once(rule, page_size, length) if by == "heads" else pages
    sizes = {"batch_size": batch, "max_pages": -(-most_slots(rule, length) // page_size)}
    cache = jax.eval_shape(
        lambda: kvattn.PagedKVCache.create(pages, page_size, kv_heads, 64, policy=policy, codec=codec, **sizes)
    )
    real = kvattn.sharding.bytes_per_device(cache, mesh, by=by)
    options = {"policy": policy, "codec": codec, "num_devices": 4, "by": by, "page_size": page_size}
    p = plan(tiny(1, 8, kv_heads, 64), "a10", batch_size=batch, length=length, **options)
    assert p.device_cache_bytes == real


def test_a_token_by_sequence():
    """Of its slot one device has the keys and values, every device what the policy remembers."""
    settings = {"length": 4096, "policy": kvattn.FastGen(0.9), "by": "sequence", "num_devices": 8}
    p = plan(tiny(3, 8, 2, 128), "a10", **settings)
    assert p.max_tokens == int(p.free_bytes / (3 * 2 * (2 * 128 * 2 / 8 + 12)))


def test_auto_is_what_sharding_chooses():
    for kv_heads, batch in itertools.product((1, 2, 8), (1, 3, 8, 16)):
        p = plan(tiny(1, 16, kv_heads), "a10", batch_size=batch, length=64, num_devices=8)
        assert p.by == kvattn.sharding.choose(16, kv_heads, batch, 8)
    assert plan(tiny(1, 16, 1), "a10", length=64, num_devices=8).by == "batch"  # a batch that divides


def test_nothing_is_allocated_and_flax_stays_away():
    code = """
import sys, jax
from kvattn import memory
p = memory.plan("bloom-176b", "tpu-v4", batch_size=10**5, length=10**6)
memory.levers(memory.plan("gpt2", "t4", length=10**6))
print("flax" in sys.modules, len(jax.live_arrays()), p.cache_bytes > 4 * 10**17)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.split() == ["False", "0", "True"], done.stderr


# Models and devices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert from_config(CONFIGS[name]).num_params == PUBLISHED[name]


@pytest.mark.parametrize("name", EXACT)
def test_parameters_of_other_families_exactly(name):
    config, counted = EXACT[name]
    spec = from_config(config)
    assert (spec.num_params, spec.is_estimate) == (counted, False) and not plan(spec, "h100").notes
    if name in ACTIVE:
        assert abs(spec.active_params / ACTIVE[name] - 1) < 0.06


@pytest.mark.parametrize("name", ESTIMATED)
def test_parameters_of_other_families_are_estimated(name):
    config, counted = ESTIMATED[name]
    spec = from_config(config)
    assert spec.is_estimate and abs(spec.num_params / counted - 1) < 1e-3
    assert any("estimate" in note for note in plan(spec, "h100").notes)
    if name in ACTIVE:
        assert abs(spec.active_params / ACTIVE[name] - 1) < 0.06
    exact = from_config(config, num_params=counted)
    assert not exact.is_estimate and exact.num_params == counted and not plan(exact, "h100").notes


def test_experts_by_their_newer_name():
    """transformers 5 writes Qwen's experts under Mixtral's name."""
    older = CONFIGS["qwen3-30b-a3b"]
    newer = {name: value for name, value in older.items() if name != "num_experts"}
    newer["num_local_experts"] = older["num_experts"]
    assert from_config(newer, name="same") == from_config(older, name="same")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_is_what_the_config_says(name):
    found, listed = from_config(CONFIGS[name]), MODELS[name]
    for field in dataclasses.fields(ModelSpec):
        if field.name not in ("name", "source", "max_length"):
            assert getattr(found, field.name) == getattr(listed, field.name), field.name


def test_the_rest_of_the_table():
    """PaLM's sizes are its paper's; Llama 3.1 is Llama 3 for longer texts."""
    rest = set(MODELS) - set(CONFIGS)
    assert rest == {"palm-8b", "palm-62b", "palm-540b", "llama-3.1-8b", "llama-3.1-70b"}
    assert all(model.source for model in MODELS.values()) and all(device.source for device in DEVICES.values())
    for size in ("8b", "70b"):
        ours, older = MODELS[f"llama-3.1-{size}"], MODELS[f"llama-3-{size}"]
        assert dataclasses.replace(ours, name=older.name, max_length=older.max_length, source=older.source) == older


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_parameters_of_real_checkpoints(folder):
    """Counted from the config, and from the header of the weights."""
    data = (folder / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    others = (
        "__metadata__", "vision_tower.", "vision_model.", "multi_modal_projector.", "model.vision_tower.",
        "model.embed_vision.",
    )  # fmt: skip
    tensors = [
        math.prod(entry["shape"])
        for name, entry in header.items()
        if not (name.startswith(others) or name.endswith(".layer_scalar"))  # a buffer
    ]
    spec = from_config(folder)
    assert spec.num_params == sum(tensors)
    assert spec.name == folder.name and from_config(folder / "config.json", name="mine").name == "mine"


def limits(config):
    """The window or chunk of each layer of a decoder: how many tokens it keeps at most."""
    return tuple(a or b for a, b in zip(config.layer_windows, config.layer_chunks, strict=True))


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_sizes_of_real_checkpoints(folder):
    """Heads and windows, read by the planner and by what loads the checkpoint."""
    config, spec = describe(folder).config, from_config(folder)
    assert spec.layer_sources == config.layer_sources
    names = ("num_layers", "num_heads", "model_dim")
    assert [getattr(spec, name) for name in names] == [getattr(config, name) for name in names]
    assert_same_layers(spec, config)


def assert_same_layers(spec, config, what=None):
    """Windows and heads, layer by layer."""
    assert (spec.num_layers, spec.num_heads) == (config.num_layers, config.num_heads), what
    assert spec.layer_windows == limits(config), what
    assert spec.heads == tuple(zip(config.layer_kv_heads, config.layer_head_dims, strict=True)), what


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_what_a_config_leaves_out(folder, tmp_path):
    """Field by field: the planner takes what the loader takes."""
    config, read = json.loads((folder / "config.json").read_text()), 0
    for left_out in config:
        (tmp_path / "config.json").write_text(json.dumps({n: v for n, v in config.items() if n != left_out}))
        try:
            loaded = describe(tmp_path).config
        except errors.KVAttnError:
            continue  # without it other fields contradict each other
        found, read = from_config(tmp_path), read + 1
        assert_same_layers(found, loaded, left_out)
    assert read > len(config) // 2


@pytest.mark.parametrize("what", KEPT)
def test_which_layers_keep_keys_and_values(what):
    config, layers, keeping, expected = KEPT[what]
    spec = from_config(config, num_params=10**9)
    assert (spec.num_layers, spec.num_cache_layers, spec.cache_is_estimate) == (layers, keeping, False)
    assert plan(spec, "h100").bytes_per_token == expected
    assert bytes_per_token(keeping, spec.num_kv_heads, spec.head_dim) == expected
    kinds = caches.layers(spec, policy=kvattn.Full())
    assert sum(kinds.values()) == keeping


def test_where_hybrids_keep_them():
    """Jamba's fifth of eight, Nemotron's stars, every fourth of Qwen3-Next; a window in Griffin's third of three."""
    sources = {name: from_config(KEPT[name][0], num_params=1).layer_sources for name in ("jamba", "nemotron_h", "lfm2")}
    assert sources["jamba"] == tuple(i if i % 8 == 4 else None for i in range(32))
    assert sources["nemotron_h"] == tuple(i if i % 4 == 3 else None for i in range(52))
    assert [i for i in sources["lfm2"] if i is not None] == [2, 5, 8, 10, 12, 14]
    griffin = from_config(KEPT["recurrent_gemma"][0], num_params=1)
    assert griffin.cache_layers == tuple(range(2, 26, 3))
    assert [griffin.layer_windows[i] for i in griffin.cache_layers] == [2048] * 8
    assert any("18 of 26 layers keep no keys" in note for note in plan(griffin, "a10").notes)


def test_which_layers_have_the_window():
    windows = lambda name: from_config(KEPT[name][0], num_params=1).layer_windows
    assert windows("gpt_neo") == (None, 256) * 12
    assert windows("exaone4, letters") == (4096, 4096, 4096, None) * 2
    assert windows("exaone4, no window") == (None,) * 30
    assert windows("cohere2, by its newer name") == (9, None) * 4


def test_layers_that_share_a_cache():
    """Gemma 3n: the last 15 of 35 go by the last of the first 20 of their kind: layer 18, with a window, or 19."""
    spec = from_config(KEPT["gemma3n"][0], num_params=10**9)
    assert spec.layer_sources == tuple(range(20)) + tuple(19 if i % 5 == 4 else 18 for i in range(20, 35))
    hunyuan = from_config(KEPT["hunyuan"][0], num_params=10**9)
    assert hunyuan.layer_sources == tuple(i - i % 2 for i in range(64))
    # What is kept once is read by every layer that attends to it.
    read = lambda model: plan(model, "h100", length=100).step_seconds - plan(model, "h100").step_seconds
    assert math.isclose(read(hunyuan), read(dataclasses.replace(hunyuan, kv_source=None)))
    whole = plan(dataclasses.replace(hunyuan, kv_source=None), "h100", length=100)
    assert plan(hunyuan, "h100", length=100).cache_bytes * 2 == whole.cache_bytes
    assert plan(hunyuan, "h100", length=100).prefill_attention_flops == whole.prefill_attention_flops


def test_layers_with_heads_of_their_own():
    """Gemma 4: of 512 where there is no window, of 256 where there is; and the last 20 layers of E2B keep nothing."""
    e2b = GEMMA4_E2B["text_config"]
    spec = from_config(e2b)
    assert spec.cache_layers == tuple(range(15)) and spec.layer_sources[15:] == ((13,) * 4 + (14,)) * 4
    assert spec.heads == ((1, 256),) * 4 + ((1, 512),) + spec.heads[:5] * 6
    of_token = lambda spec: 2 * 2 * sum(k * h for k, h in (spec.heads[i] for i in spec.cache_layers))
    whole = dataclasses.replace(spec, window=None)
    for model in (whole, dataclasses.replace(whole, kv_source=None)):
        assert plan(model, "h100").bytes_per_token == of_token(model)
        one_more = [cache_bytes(model, 1, n, page_size=16, backend="gpu") for n in (160, 176)]
        assert one_more[1] - one_more[0] == 16 * of_token(model) + 4 * model.num_cache_layers
    # The cache as it is made.
    tiny_one = from_config(e2b | {"num_hidden_layers": 12, "num_kv_shared_layers": 5, "layer_types": None})
    made = [
        kvattn.KVCache.create(2, k, h, capacity=40, policy=None if w is None else kvattn.SlidingWindow(w))
        for (k, h), w in ((tiny_one.heads[i], tiny_one.layer_windows[i]) for i in tiny_one.cache_layers)
    ]
    assert cache_bytes(tiny_one, 2, 40, backend="cpu") == sum(cache.nbytes for cache in made)
    by_heads = plan(dataclasses.replace(whole, layer_heads=((8, 256), (2, 512)) * 17 + ((8, 256),), kv_source=None),
                    "h100", length=64, num_devices=2, by="heads")  # fmt: skip
    assert by_heads.device_cache_bytes < by_heads.cache_bytes


def test_layers_without_a_cache_are_not_attended_to():
    model = tiny(4, 4, 2, 16, window=(8, None, 8, None))
    hybrid = dataclasses.replace(model, kv_source=(None, 1, None, 1), window=(None, None, 8, None))
    alone = dataclasses.replace(model, num_layers=1, window=None)
    for options in ({}, {"codec": kvattn.Int8()}, {"page_size": 16}, {"policy": kvattn.H2O(4, 4)}):
        assert cache_bytes(hybrid, 2, 64, **options) == cache_bytes(alone, 2, 64, **options)
    p, one = plan(hybrid, "t4", batch_size=2, length=64), plan(alone, "t4", batch_size=2, length=64)
    assert p.bytes_per_token == one.bytes_per_token == 2 * 2 * 16 * 2
    assert p.prefill_attention_flops == 2 * one.prefill_attention_flops
    assert p.max_tokens == one.max_tokens
    gqa = next(lever for lever in levers(p) if lever.name.startswith("MQA"))
    assert gqa.cache_ratio == pytest.approx(1 / 2, rel=0.01)
    # Two stages: the second attends to a cache of the first and keeps a copy of it.
    staged = plan(hybrid, "t4", batch_size=2, length=64, pipeline_stages=2)
    assert staged.device_cache_bytes == staged.cache_bytes == p.cache_bytes
    apart = dataclasses.replace(hybrid, kv_source=(None, None, None, 3))
    assert plan(apart, "t4", batch_size=2, length=64, pipeline_stages=4).device_cache_bytes == p.cache_bytes


def test_chunks_are_windows_of_their_size():
    """Llama 4: all but every fourth layer keep at most a chunk."""
    spec = from_config(nested("llama4", **LLAMA4), num_params=10**9)
    assert spec.layer_windows == (8192, 8192, 8192, None) * 12
    listed = nested("llama4", **LLAMA4, no_rope_layers=[1, 0] * 24, attention_chunk_size=512)
    assert from_config(listed, num_params=1).layer_windows == (512, None) * 24
    whole = nested("llama4", **LLAMA4, attention_chunk_size=None)
    assert from_config(whole, num_params=1).window is None


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_by_layer(name):
    """Dense layers among those with experts, shared experts, state spaces: within 2.5 % of what the pages say."""
    config, billions, active = COUNTED[name]
    spec = from_config(config)
    assert spec.is_estimate != (name in COUNTED_EXACTLY) and abs(spec.num_params / 1e9 / billions - 1) < 0.025
    assert abs(spec.active_params / 1e9 / active - 1) < 0.06


@pytest.mark.parametrize("name", BUILT)
def test_parameters_that_transformers_builds(name):
    config, counted = BUILT[name]
    spec = from_config(config)
    assert spec.is_estimate and abs(spec.num_params / counted - 1) < 1e-3


@pytest.mark.parametrize("what", DENSE_LAYERS)
def test_dense_layers_among_experts(what):
    config, dense = DENSE_LAYERS[what]
    spec, whole = from_config(config), from_config(QWEN3_MOE)
    d, expert = 2048, 3 * 2048 * 768
    assert whole.num_params - spec.num_params == dense * (128 * (expert + d) - 3 * d * 6144)
    assert spec.num_params - spec.active_params == (48 - dense) * 120 * expert
    assert spec.num_expert_weights == (48 - dense) * 128 * expert


def test_experts_that_do_not_fit_in_the_parameters_given():
    spec = from_config(QWEN3_MOE, num_params=7_000_000_000)
    assert (spec.num_params, spec.num_experts) == (7 * 10**9, None)
    assert any("less than the experts" in note for note in plan(spec, "h100").notes)


def test_mxfp4_is_for_experts():
    """As published: experts in 4.25 bits, everything else in bfloat16."""
    assert plan("gpt-oss-120b", "h100", weight_dtype="mxfp4").weight_bytes == 65_248_815_744
    assert plan("gpt-oss-20b", "h100", weight_dtype="mxfp4").weight_bytes == 13_761_264_768
    config = CONFIGS["gpt-oss-120b"] | {"quantization_config": {"quant_method": "mxfp4"}}
    p = plan(from_config(config), "h100")
    assert (p.weight_dtype, p.weight_bytes) == ("mxfp4", 65_248_815_744)
    assert p.changed() == p
    whole = plan(from_config(config), "h100", weight_dtype="bfloat16")
    assert whole.weight_bytes == 2 * 116_829_156_672
    # A token reads 4 of 128 experts of 36 layers; their biases have 16 bits.
    idle = 36 * 124 * (3 * 2880**2 * 17 / 32 + 3 * 2880 * 2)
    assert math.isclose(p.step_seconds, (65_248_815_744 - idle) / 3.35e12, rel_tol=1e-9)


@pytest.mark.parametrize("what", STORED)
def test_what_the_checkpoint_is_quantised_to(what):
    settings, expected = STORED[what]
    spec = from_config(CONFIGS["llama-3-8b"] | {"quantization_config": settings})
    p = plan(spec, "h100")
    assert spec.weight_dtype == expected and p.weight_dtype == (expected or "bfloat16")
    assert ("not understood" in " ".join(p.notes)) == (expected is None) and p.notes
    tables = 2 * 128256 * 4096
    bits = {None: 16, "int3": 3, "int4": 4, "mxfp4": 4.25}.get(expected, 8)
    linear = spec.num_params - (0 if expected == "mxfp4" else tables)
    if what == "fp8":  # in blocks: a float32 for each, and norms in 16 bits too
        linear -= 65 * 4096
        assert spec.num_scale_bytes == 4 * 32 * (2 * 32 * 32 + 2 * 8 * 32 + 3 * 112 * 32)
    assert p.weight_bytes == math.ceil(linear * bits / 8) + 2 * (spec.num_params - linear) + spec.num_scale_bytes
    assert plan(spec, "h100", weight_dtype="float32").weight_bytes == 4 * spec.num_params


def test_quantised_text_within_a_model_of_images():
    inner = {key: x for key, x in CONFIGS["llama-3-8b"].items()}
    spec = from_config({"model_type": "llava", "text_config": inner, "quantization_config": AWQ})
    assert spec.weight_dtype == "int4"


# Families and fields that are not known.


def test_a_family_that_is_not_known_is_an_estimate():
    spec = from_config(sized("brand_new", 4, 8, 2, 512), num_params=1000)
    assert spec.cache_is_estimate and not spec.is_estimate
    notes = " ".join(plan(spec, "t4").notes)
    assert "the cache of brand_new is an estimate" in notes and "2 heads of 64" in notes
    assert plan(spec, "t4").to_json()["model"]["cache_is_estimate"] is True
    assert not from_config(sized("olmo2", 4, 8, 2, 512), num_params=1000).cache_is_estimate


UNREAD = {
    "linear_every": 2, "attn_layer_freq": 4, "mamba_expand": 2, "num_kv_shared": 8, "kv_share_pattern": [0, 0],
    "full_attention_interval": 4, "hybrid_override_pattern": "M*", "cross_layer_attention": True, "mb_per_layer": 2,
    "multi_query": True, "attn_config": {"kv_n_heads": 8}, "v_head_dim": 128, "recurrent_layers": [1],
    "ssm_cfg": {"d": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_settings_of_an_unknown_family_that_may_matter_are_refused(name):
    with pytest.raises(errors.UnsupportedError, match="ModelSpec") as caught:
        from_config(sized("brand_new", 4, 8, 2, 512, **{name: UNREAD[name]}), num_params=1000)
    assert name in str(caught.value) and "brand_new" in str(caught.value)


@pytest.mark.parametrize("name", UNREAD)
def test_settings_of_a_known_family_that_may_matter_are_said(name):
    spec = from_config(CONFIGS["llama-2-7b"] | {name: UNREAD[name]})
    assert spec.cache_is_estimate and name in " ".join(plan(spec, "t4").notes)


@pytest.mark.parametrize("config", WRITTEN, ids=lambda config: config["model_type"])
def test_published_files_leave_no_doubt(config):
    spec = from_config(config, num_params=10**12)
    assert not spec.cache_is_estimate, spec.notes


def test_settings_that_do_not_matter_pass():
    harmless = {
        "attention_bias": True,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.1,
        "temperature": 0.6,
        "min_length": 3,
    }
    harmless |= {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "is_decoder": True,
        "kv_sharing": None,
        "group_of": 0,
    }
    assert not from_config(CONFIGS["llama-2-7b"] | harmless).notes
    assert len(from_config(sized("brand_new", 4, 8, 2, 512, **harmless), num_params=1).notes) == 1


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_what_null_means(folder, tmp_path):
    """Field by field: the planner takes null for what the loader takes it for, and refuses it where that does."""
    config, read = json.loads((folder / "config.json").read_text()), 0
    for name in config:
        (tmp_path / "config.json").write_text(json.dumps(config | {name: None}))
        try:
            loaded = describe(tmp_path).config
        except errors.KVAttnError as error:
            if f"{name} is null" in str(error) and name in NULL_SIZES:
                with pytest.raises(errors.KVAttnError, match=name):
                    from_config(tmp_path)
            continue
        found, read = from_config(tmp_path), read + 1
        assert_same_layers(found, loaded, name)
    assert read


NULL_SIZES = ("hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "num_attention_heads",
              "num_key_value_heads", "head_dim", "sliding_window")  # fmt: skip


@pytest.mark.parametrize(
    "folder", [f for f in GOLDEN if not f.name.endswith("_images")], ids=lambda folder: folder.name
)
def test_other_names_of_a_field(folder, tmp_path):
    """Every alias of the family, for the planner and for the loader."""
    config = json.loads((folder / "config.json").read_text())
    for name, others in FAMILIES[config["model_type"]].aliases.items():
        for other in others:
            if name not in config:
                continue
            renamed = {key: value for key, value in config.items() if key != name} | {other: config[name]}
            (tmp_path / "config.json").write_text(json.dumps(renamed))
            assert from_config(tmp_path, name="x") == from_config(folder, name="x"), other
            assert describe(tmp_path).config == describe(folder).config, other
            (tmp_path / "config.json").write_text(json.dumps(renamed | {name: config[name] + 1}))
            with pytest.raises(errors.ConfigError, match="keep one"):
                from_config(tmp_path)


def test_bloom_by_its_published_name():
    published = {"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "vocab_size": 250880}
    spec = from_config(published)
    assert (spec.num_params, spec.is_estimate) == (559_214_592, False)


def test_windows_layer_by_layer():
    base = CONFIGS["qwen3-8b"] | {"num_hidden_layers": 6, "sliding_window": 100}
    assert from_config(base).window is None
    assert from_config(base | {"use_sliding_window": False}).window is None
    some = from_config(base | {"use_sliding_window": True, "max_window_layers": 4})
    assert some.window == (None, None, None, None, 100, 100)
    gemma = CONFIGS["gemma-2-2b"] | {"num_hidden_layers": 5}
    assert from_config(gemma).window == (4096, None, 4096, None, 4096)
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert from_config(gemma | {"layer_types": kinds}).window == (None, 4096, 4096, None, 4096)
    three = CONFIGS["gemma-3-1b"] | {"num_hidden_layers": 4, "sliding_window_pattern": 2}
    assert from_config(three).window == (512, None, 512, None)
    assert from_config(CONFIGS["mistral-7b-v0.1"]).window == 4096
    # A file that leaves it out means the family's default; a null means none.
    left_out = {key: x for key, x in CONFIGS["mistral-7b-v0.1"].items() if key != "sliding_window"}
    assert from_config(left_out).window == 4096 and from_config(left_out | {"sliding_window": None}).window is None


def test_experts_that_a_step_reads():
    """Against every way in which two or three tokens can choose two of four experts."""
    spec = ModelSpec(
        name="m", num_layers=1, num_heads=1, num_kv_heads=1, head_dim=1, num_params=100 + 4 * 30,
        num_active_params=100 + 2 * 30, num_experts=4, experts_per_token=2,
    )  # fmt: skip
    pairs = list(itertools.combinations(range(4), 2))
    for count in (1, 2, 3):
        chosen = [len(set().union(*choice)) for choice in itertools.product(pairs, repeat=count)]
        assert math.isclose(spec.touched_params(count), 100 + 30 * sum(chosen) / len(chosen))
    mixtral = MODELS["mixtral-8x7b"]
    assert round(mixtral.active_params / 1e9, 1) == 12.9  # as its paper says
    assert plan("mixtral-8x7b", "h200").step_seconds == 2 * mixtral.active_params / 4.8e12
    assert plan("mixtral-8x7b", "h200", length=10).prefill_flops == 2 * mixtral.active_params * 10


def test_names_are_forgiven_and_unknown_ones_listed():
    assert MODELS["Llama_2_7B"] is MODELS["meta-llama/Llama-2-7b-hf"] is MODELS["llama-2-7b"]
    assert DEVICES["H100"].bandwidth == 3.35e12 and DEVICES["v5e"] is DEVICES["tpu-v5e"]
    assert "mistral-7b" in MODELS and "nonsense" not in MODELS and MODELS.get("nonsense") is None
    with pytest.raises(errors.UnknownNameError) as caught:
        MODELS["lama-2-7b"]
    assert isinstance(caught.value, KeyError | ValueError)
    message = str(caught.value)
    assert message.startswith("unknown model 'lama-2-7b'; the known ones are llama-2-7b, ")
    assert all(name in message for name in MODELS)
    with pytest.raises(errors.UnknownNameError, match="unknown device 'h10'; the known ones are h100, "):
        plan("gpt2", "h10")


def test_devices():
    """The rows of the article's table and those of today, in bytes and bytes per second."""
    rows = {
        "t4": (16e9, 320), "v100-16gb": (16e9, 900), "a10": (24e9, 600), "l4": (24e9, 300), "a40": (48e9, 696),
        "l40s": (48e9, 864), "a100-40gb": (40e9, 1555), "a100-80gb": (80e9, 2039), "a100-80gb-pcie": (80e9, 1935),
        "h100": (80e9, 3350), "h200": (141e9, 4800), "b200": (180e9, 8000), "tpu-v4": (32 * 2**30, 1200),
        "tpu-v5e": (16 * 2**30, 819), "tpu-v5p": (95 * 2**30, 2765), "tpu-v6e": (32 * 2**30, 1640),
        "tpu-7x": (192 * 2**30, 7380),
    }  # fmt: skip
    for name, (size, bandwidth) in rows.items():
        assert (DEVICES[name].memory_bytes, DEVICES[name].bandwidth) == (size, bandwidth * 1e9)
        assert DEVICES[name].backend == ("tpu" if name.startswith("tpu") else "gpu")


# The plan -------------------------------------------------------------------------------------------------------------

SMALL = dataclasses.replace(DEVICES["t4"], name="small", memory_bytes=3_000_000)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"codec": kvattn.Int8()},
        {"codec": kvattn.KIVI(2, 16, 32)},
        {"policy": kvattn.H2O(50, 50)},
        {"num_devices": 2, "by": "batch"},
        {"num_devices": 2, "by": "sequence"},
        {"pipeline_stages": 3},
        {"page_size": 16},
        {"page_size": 16, "prefill_chunk": 50},
        {"page_size": 16, "num_devices": 2, "by": "sequence"},
        {"page_size": 8, "policy": kvattn.H2O(50, 50)},
        {"page_size": 8, "policy": kvattn.FastGen()},
        {"reserved_bytes": 500_000},
        {"memory_fraction": 0.25},
    ],
    ids=str,
)
def test_the_largest_batch_and_length(options):
    """Everything up to it fits, and nothing beyond."""
    model = tiny(5, 4, 2, 16, window=(None, 64, None, 64, None), num_params=100_000)
    if isinstance(options.get("codec"), kvattn.KIVI):
        model = dataclasses.replace(model, window=None)
    p = plan(model, SMALL, batch_size=6, length=200, **options)

    def fits(batch, length):
        q = p.changed(batch_size=batch, length=length)
        assert q.fits == (q.device_cache_bytes <= p.free_bytes)
        return q.fits

    if p.max_length is None:
        assert fits(6, 10**6)
    else:
        lengths = {1, 2, 10, p.max_length // 2, *range(p.max_length - 9, p.max_length + 18), 2 * p.max_length}
        assert [fits(6, n) for n in sorted(lengths)] == [n <= p.max_length for n in sorted(lengths)]
    step = 2 if p.by == "batch" else 1
    batches = {1, p.max_batch // 2, p.max_batch, p.max_batch + step, 2 * p.max_batch}
    assert [fits(n, 200) for n in sorted(batches)] == [n <= p.max_batch for n in sorted(batches)]
    assert fits(6, 200) == p.fits and p.max_batch > 1
    room = 3_000_000 - p.device_weight_bytes - p.reserved_bytes
    assert p.free_bytes == min(room, int(3_000_000 * p.memory_fraction))


def test_stages_hold_their_own_layers():
    model = tiny(5, 4, 2, 16, window=(None, 64, None, 64, None), num_params=100_000)
    p = plan(model, "t4", batch_size=3, length=200, pipeline_stages=3)
    # Layers 0-1, 2-3 and 4: the fullest stage holds one whole layer and one with a window.
    one = cache_bytes(dataclasses.replace(model, num_layers=2, window=(None, 64)), 3, 200)
    assert p.device_cache_bytes == one and p.cache_bytes == cache_bytes(model, 3, 200)
    assert p.device_weight_bytes == 2 * 100_000 * 2 // 5
    alone = plan(model, "t4", batch_size=3, length=200)
    assert p.step_seconds >= alone.step_seconds  # one stage after the other


def test_weights_that_do_not_fit():
    p = plan("llama-2-70b", "a10", batch_size=1, length=100)
    assert (p.fits, p.free_bytes, p.max_tokens, p.max_batch, p.max_length) == (False, 0, 0, 0, 0)
    assert plan("llama-2-70b", "a10", weight_dtype="int4", num_devices=2).fits


def test_weights_by_dtype():
    for dtype, size in {"float32": 400, "bfloat16": 200, "int8": 100, jnp.float16: 200, "int4": 50}.items():
        assert plan(tiny(num_params=100), "t4", weight_dtype=dtype).weight_bytes == size
    assert plan(tiny(num_params=3), "t4", weight_dtype="int4").weight_bytes == 2  # rounded up
    assert plan(tiny(num_params=64), "t4", weight_dtype="mxfp4").weight_bytes == 34


def test_bits_that_fill_no_byte_are_rounded_up():
    assert bytes_per_token(1, 1, 5, "int4") == 5
    assert bytes_per_token(1, 1, 5, "uint2") == 3
    assert bytes_per_token(1, 3, 7, "int8") == 42 and bytes_per_token(2, 3, 7, np.float32) == 336


def test_mean_length_and_pages():
    """Contiguous caches are as long as the longest sequence; pages as the tokens that are there."""
    model = tiny(2, 4, 2, 16)
    one = plan(model, "t4", batch_size=4, length=1000, mean_length=300)
    paged = plan(model, "t4", batch_size=4, length=1000, mean_length=300, page_size=16)
    assert one.cache_bytes == cache_bytes(model, 4, 1000) and one.unused_share == 0.7
    assert paged.cache_bytes == cache_bytes(model, 4, 1000, page_size=16, num_pages=4 * 19)
    assert paged.device_cache_bytes == paged.cache_bytes
    assert paged.max_batch == paged.free_bytes // (paged.cache_bytes // 4)
    assert math.isclose(paged.unused_share, 1 - 300 / 304)
    assert one.step_seconds == paged.step_seconds < plan(model, "t4", batch_size=4, length=1000).step_seconds
    # A budget fills no more pages than there are tokens; a window's pages hold tokens that it has left.
    heavy = plan(model, "t4", batch_size=4, length=1000, mean_length=20, policy=kvattn.H2O(40, 39), page_size=16)
    state = 2 * 4 * (8 * 2 * 80 + 4 * 5 + 8)
    assert heavy.cache_bytes == 2 * (4 * 2 * 16 * 2 * 2 * 2 * 16) + state
    assert math.isclose(heavy.unused_share, 1 - 20 / 32)
    assert plan(tiny(window=8), "t4", length=1000, page_size=4).unused_share == 1 - 8 / 12
    # A window's ring is full, whatever the longest sequence is.
    assert plan(tiny(window=8), "t4", length=1000, mean_length=300).unused_share == 0


@pytest.mark.parametrize("options", [{"page_size": 16}, {"policy": kvattn.Full()}])
def test_a_window_is_read_however_much_is_kept(options):
    """Pages, and a policy that keeps everything, cost memory; the step's floor is the window's."""
    for window in (32, (32, None)):
        ring, all_kept = (plan(tiny(2, window=window), "t4", length=512, **more) for more in ({}, options))
        assert ring.step_seconds == all_kept.step_seconds < plan(tiny(2), "t4", length=512).step_seconds
        assert ring.cache_bytes < all_kept.cache_bytes
    narrow = plan(tiny(2, window=32), "t4", length=512, policy=kvattn.SlidingWindow(8), page_size=16)
    assert narrow.step_seconds == plan(tiny(2, window=8), "t4", length=512).step_seconds
    wide = plan(tiny(2, window=8), "t4", length=512, policy=kvattn.SlidingWindow(32), page_size=16)
    assert wide.step_seconds == narrow.step_seconds
    # Whatever is set aside: what is kept in order is read as far as its window goes, a budget as far as it goes.
    in_order = plan(tiny(2), "t4", length=512, policy=OrderedWindow(8))
    assert in_order.step_seconds == in_order.changed(page_size=16).step_seconds == narrow.step_seconds
    budget = plan(tiny(2), "t4", length=512, policy=kvattn.H2O(4, 3), page_size=16)
    assert budget.step_seconds == budget.changed(page_size=None).step_seconds == narrow.step_seconds


def test_what_attention_computes():
    for length, window in itertools.product((1, 5, 9), (None, 1, 4, 9, 20)):
        assert _seen(length, window) == sum(min(t, window or t) for t in range(1, length + 1))
    p = plan(tiny(3, 4, 2, 16, window=(None, 4, None)), "t4", batch_size=2, length=9)
    assert p.prefill_attention_flops == 2 * 4 * 4 * 16 * (45 + 30 + 45)
    assert math.isclose(p.prefill_seconds, (p.prefill_flops + p.prefill_attention_flops) / DEVICES["t4"].flops)


def test_crossover_by_walking():
    for options in ({}, {"codec": kvattn.Int8()}, {"policy": kvattn.StreamingLLM(4, 60)}):
        model = tiny(2, 4, 2, 16, num_params=50_000)
        p = plan(model, "t4", batch_size=2, **options)
        heavier = [n for n in range(1, 3000) if cache_bytes(model, 2, n, **options) >= 100_000]
        assert p.crossover_length == (heavier[0] if heavier else None)


def test_what_a_step_reads():
    """Tokens that are kept, in their bits; never empty slots."""
    model, device = tiny(1, 2, 2, 64, num_params=0), DEVICES["t4"]

    def read(length, **options):
        return plan(model, device, length=length, **options).step_seconds * device.bandwidth

    assert math.isclose(read(100), 100 * 2 * 2 * 64 * 2)
    assert math.isclose(read(100, codec=kvattn.Int8()), 100 * 2 * 2 * (64 + 4))
    assert math.isclose(read(10**6, policy=kvattn.SlidingWindow(50)), 50 * 512)
    assert math.isclose(read(10**6, policy=kvattn.H2O(20, 29)), 50 * 512)
    kivi = kvattn.KIVI(2, 32, 128)
    assert math.isclose(read(100, codec=kivi), 100 * 512)  # all of them as they came
    assert math.isclose(read(128 + 96, codec=kivi), 128 * 512 + 96 * 2 * 2 * 64 * 3 / 8)
    assert math.isclose(read(100, num_devices=2, by="heads"), 100 * 256)
    assert math.isclose(read(100, num_devices=2, by="sequence"), 100 * 256)


# Levers ---------------------------------------------------------------------------------------------------------------


def test_levers_best_first():
    p = plan("llama-2-7b", "a10", batch_size=2, length=4096)
    found = levers(p)
    names = [lever.name for lever in found]
    # GQA, windows, StreamingLLM, H2O, 8 and 4 bits, KIVI, devices, pages, lighter weights: one of each at least.
    for part in ("GQA, 8", "MQA", "SlidingWindow", "StreamingLLM", "H2O", "Int8", "Int4", "KIVI(2)", "8 devices",
                 "pages", "weights in int8"):  # fmt: skip
        assert any(part in name for name in names), part
    room = [lever.plan.free_bytes / lever.plan.device_cache_bytes for lever in found]
    assert room == sorted(room, reverse=True)
    for lever in found:
        assert math.isclose(
            lever.gain, lever.plan.free_bytes / lever.plan.device_cache_bytes * p.device_cache_bytes / p.free_bytes
        )
        assert math.isclose(lever.cache_ratio, lever.plan.device_cache_bytes / p.device_cache_bytes)
        assert lever.plan.length == 4096 and lever.plan.batch_size == 2
    by_name = dict(zip(names, found, strict=True))
    assert by_name["GQA, 8 key/value heads"].cache_ratio == pytest.approx(1 / 4, rel=1e-4)
    assert by_name["Int8()"].cache_ratio == pytest.approx(8.25 / 16, rel=1e-4)
    assert by_name["weights in int8"].cache_ratio == 1 and by_name["weights in int8"].gain > 1.6
    assert by_name["Int8()"].outputs == "rounded" and by_name["2 devices, by heads"].outputs == "the same"
    # Keys and values of 24 heads less: 2 * 32 layers * 4096 * 24 * 128 weights.
    saved = 2 * 32 * 4096 * 24 * 128
    assert by_name["GQA, 8 key/value heads"].plan.model.num_params == 6_738_415_616 - saved


def test_gqa_of_llama_is_counted_as_its_config_would_be():
    converted = from_config(CONFIGS["llama-2-7b"] | {"num_key_value_heads": 8})
    lever = next(x for x in levers(plan("llama-2-7b", "a10")) if x.name.startswith("GQA"))
    assert lever.plan.model.num_params == converted.num_params


def test_levers_that_are_pulled_or_do_not_go_together_are_left_out():
    names = {lever.name for lever in levers(plan("falcon-7b", "a10", length=2048, codec=kvattn.Int8()))}
    assert not any(name.startswith(("GQA", "MQA", "Int", "KIVI")) for name in names)
    windowed = [lever.name for lever in levers(plan("mistral-7b-v0.1", "a10", length=32768))]
    assert not any(name.startswith("KIVI") for name in windowed)  # a ring's slots are given away one by one
    assert "SlidingWindow(4096)" not in windowed  # it has that window
    paged = [lever.name for lever in levers(plan("gpt2", "t4", length=512, page_size=16))]
    assert not any("pages" in name for name in paged)
    assert {"H2O", "StreamingLLM", "SlidingWindow"} <= {name.partition("(")[0] for name in paged}
    mqa = {lever.name: lever for lever in levers(plan("palm-8b", "h100", batch_size=64, length=2048))}
    assert "8 devices, by heads" in mqa  # lighter weights make room, but the cache stays whole
    assert mqa["8 devices, by heads"].cache_ratio == 1 and mqa["8 devices, by batch"].cache_ratio == 1 / 8


def test_pages_as_a_lever():
    """For every policy whose slots short sequences leave empty, in the pages that the codec needs."""
    p = plan("llama-3-8b", "a10", batch_size=2, length=4096, mean_length=1024)
    for policy, size in ((None, 1024), (kvattn.H2O(1000, 999), 1024), (kvattn.FastGen(), 1024)):
        of = p.changed(policy=policy)
        (lever,) = [lever for lever in levers(of) if "pages" in lever.name]
        assert (lever.name, lever.outputs) == ("pages of 16, sequences 25 % full", "the same")
        assert lever.plan == of.changed(page_size=16) and lever.plan.policy == policy
        numbers = 2 * 32 * 8 * 128 * 2 * 2 * size  # keys and values of two sequences
        assert numbers < lever.plan.device_cache_bytes < of.device_cache_bytes
    kivi = [lever.name for lever in levers(p.changed(codec=kvattn.KIVI(2, 32, 64)))]
    assert "pages of 64, sequences 25 % full" in kivi and not any("sequence" in x and "devices" in x for x in kivi)
    # A ring is as small: what it leaves empty is less than pages that a window has not left.
    assert not any("pages" in lever.name for lever in levers(p.changed(policy=kvattn.SlidingWindow(256))))


def test_levers_where_nothing_fits():
    found = levers(plan("llama-2-70b", "a10", length=1000))
    assert all(lever.gain == float("inf") for lever in found if lever.plan.max_batch)
    assert json.loads(json.dumps([lever.to_json() for lever in found]))[0]["gain"] is None


def test_a_plan_as_json_and_again():
    p = plan("gemma-3-1b", "tpu-v5e", batch_size=3, length=2048, codec=kvattn.Int8(), num_devices=2)
    assert p.changed() == p
    as_json = json.loads(json.dumps(p.to_json()))
    assert as_json["codec"] == "Int8()" and as_json["model"]["num_layers"] == 26
    assert as_json["cache_bytes"] == p.cache_bytes and as_json["by"] == p.by


# What is refused ------------------------------------------------------------------------------------------------------

LLAMA = CONFIGS["llama-2-7b"]
HYBRID = sized("nemotron_h", 3, 8, 2, 64)
GPT2 = functools.partial(plan, "gpt2", "t4")
REFUSED = {
    "no such window": (errors.RangeError, "window", lambda: tiny(window=0)),
    "a window per layer, too few": (errors.ConfigError, "2 entries for 3 layers", lambda: tiny(3, window=(1, None))),
    "heads that do not group": (errors.ConfigError, "divisible", lambda: tiny(heads=16, kv_heads=5)),
    "a batch below 1": (errors.RangeError, "batch_size must be >= 1, got -1", lambda: GPT2(batch_size=-1)),
    "a batch that is a bool": (errors.DTypeError, "batch_size", lambda: GPT2(batch_size=True)),
    "a length that is a float": (errors.DTypeError, "length", lambda: GPT2(length=1e3)),
    "a length of 0": (errors.RangeError, "length must be >= 1", lambda: GPT2(length=0)),
    "a length past int32": (errors.RangeError, "int32", lambda: GPT2(length=2**31)),
    "nan of the memory": (errors.RangeError, "memory_fraction", lambda: GPT2(memory_fraction=float("nan"))),
    "none of the memory": (errors.RangeError, "memory_fraction", lambda: GPT2(memory_fraction=0)),
    "all of it and more": (errors.RangeError, "memory_fraction", lambda: GPT2(memory_fraction=1.5)),
    "a fraction that is a bool": (errors.DTypeError, "memory_fraction", lambda: GPT2(memory_fraction=True)),
    "5 bits": (errors.ConfigError, "unknown weight_dtype 'int5'", lambda: GPT2(weight_dtype="int5")),
    "a dtype that is none": (errors.DTypeError, "dtype", lambda: bytes_per_token(1, 1, 1, 5)),
    "an unknown dtype": (errors.ConfigError, "bfloat17", lambda: bytes_per_token(1, 1, 1, "bfloat17")),
    "a cache dtype of 8 bits": (errors.DTypeError, "codec", lambda: GPT2(dtype="int8")),
    "no layers": (errors.ConfigError, "num_layers", lambda: bytes_per_token(0, 1, 1)),
    "a head dim of half": (errors.DTypeError, "head_dim", lambda: bytes_per_token(1, 1, 0.5)),
    "no devices": (errors.ConfigError, "num_devices", lambda: GPT2(num_devices=0)),
    "an unknown placement": (errors.ConfigError, "'rows'", lambda: GPT2(num_devices=2, by="rows")),
    "more stages than layers": (errors.ConfigError, "pipeline_stages", lambda: GPT2(pipeline_stages=13)),
    "pages of nothing": (errors.ConfigError, "page_size", lambda: GPT2(page_size=0)),
    "a chunk of nothing": (errors.ConfigError, "prefill_chunk", lambda: GPT2(page_size=16, prefill_chunk=0)),
    "a chunk without pages": (errors.ConfigError, "without page_size", lambda: GPT2(prefill_chunk=64)),
    "KIVI under a ring in pages": (
        errors.UnsupportedError, "does not work",
        lambda: GPT2(page_size=128, codec=kvattn.KIVI(), policy=kvattn.SlidingWindow(8)),
    ),
    "KIVI by sequence": (
        errors.UnsupportedError, 'by="heads"', lambda: GPT2(codec=kvattn.KIVI(), num_devices=2, by="sequence"),
    ),
    "more pages than int32": (
        errors.RangeError, "at most 2147483647, so that int32 counts them",
        lambda: cache_bytes(tiny(), 1, 9, page_size=8, num_pages=2**31),
    ),
    "more strips of pages than int32": (
        errors.RangeError, "at most 715827882, so that int32 counts the strips",
        lambda: cache_bytes(tiny(), 2**29, 9, page_size=8, policy=kvattn.FastGen()),
    ),
    "KIVI in other pages": (
        errors.ConfigError, "same size", lambda: GPT2(length=9, page_size=16, codec=kvattn.KIVI()),
    ),
    "KIVI under H2O": (
        errors.UnsupportedError, "does not work", lambda: GPT2(codec=kvattn.KIVI(), policy=kvattn.H2O(1, 1)),
    ),
    "no policy": (errors.ConfigError, "policy", lambda: GPT2(policy="h2o")),
    "no codec": (errors.ConfigError, "codec", lambda: GPT2(codec=8)),
    "a mean above the longest": (errors.RangeError, "mean_length", lambda: GPT2(length=9, mean_length=10)),
    "a mean of nothing": (errors.RangeError, "mean_length", lambda: GPT2(mean_length=10)),
    "memory of less than nothing": (errors.RangeError, "reserved", lambda: GPT2(reserved_bytes=-1)),
    "a device of no bandwidth": (errors.RangeError, "bandwidth", lambda: dataclasses.replace(SMALL, bandwidth=0)),
    "a model that is a number": (errors.ConfigError, "model", lambda: plan(7, "t4")),
    "experts without active ones": (errors.ConfigError, "experts", lambda: dataclasses.replace(tiny(), num_experts=2)),
    "embeddings in every layer": (
        errors.ConfigError, "give num_params",
        lambda: from_config(LLAMA | {"model_type": "x", "hidden_size_per_layer_input": 256}),
    ),
    "convolutions": (
        errors.UnsupportedError, "without a cache", lambda: from_config(LLAMA | {"model_type": "x", "conv_L_cache": 3}),
    ),
    "a config that is a list": (errors.ConfigError, "object", lambda: from_config([])),
    "a family that is a list": (
        errors.ConfigError, "model_type", lambda: from_config({"model_type": [], "text_config": LLAMA}),
    ),
    "a window of an unknown family": (
        errors.UnsupportedError, "layer_types", lambda: from_config(LLAMA | {"model_type": "x", "sliding_window": 9}),
    ),
    "heads that differ from layer to layer": (
        errors.UnsupportedError, "layer to layer",
        lambda: from_config(LLAMA | {"num_key_value_heads": [32] * 31 + [8]}),
    ),
    "patterns that differ": (
        errors.ConfigError, "keep one",
        lambda: from_config(
            sized("cohere2", 8, 8, 8, 64, sliding_window=4, sliding_window_pattern=4, _sliding_window_pattern=2)
        ),
    ),
    "other letters": (
        errors.ConfigError, "L and G",
        lambda: from_config(sized("exaone4", 8, 8, 8, 64, sliding_window=4, sliding_window_pattern="LLX")),
    ),
    "attention types of too few layers": (
        errors.ConfigError, "attention_types",
        lambda: from_config(sized("gpt_neo", 8, 8, None, 64, attention_types=[[["global", "local"], 3]])),
    ),
    "a config without a family": (errors.ConfigError, "model_type", lambda: from_config({"hidden_size": 3})),
    "a config without sizes": (errors.ConfigError, "hidden_size", lambda: from_config({"model_type": "olmo"})),
    "half a layer": (errors.DTypeError, "num_hidden_layers", lambda: from_config(LLAMA | {"num_hidden_layers": 1.5})),
    "a config with a window of -1": (
        errors.RangeError, "window", lambda: from_config(CONFIGS["mistral-7b-v0.1"] | {"sliding_window": -1}),
    ),
    "latent attention": (errors.UnsupportedError, "MLA", lambda: from_config(LLAMA | {"kv_lora_rank": 512})),
    "linear attention": (
        errors.UnsupportedError, "linear_attention", lambda: from_config(LLAMA | {"layer_types": ["linear_attention"]}),
    ),
    "sources of too few layers": (
        errors.ConfigError, "2 entries for 3", lambda: dataclasses.replace(tiny(3), kv_source=(0, 1)),
    ),
    "a source that comes later": (
        errors.ConfigError, "earlier layer", lambda: dataclasses.replace(tiny(2), kv_source=(1, 1)),
    ),
    "a source that has none": (
        errors.ConfigError, "of its own", lambda: dataclasses.replace(tiny(3), kv_source=(0, None, 1)),
    ),
    "a source that keeps less": (
        errors.ConfigError, "keeps 4", lambda: dataclasses.replace(tiny(2, window=(4, 9)), kv_source=(0, 0)),
    ),
    "no layer that keeps anything": (
        errors.ConfigError, "no cache", lambda: dataclasses.replace(tiny(2), kv_source=(None, None)),
    ),
    "more experts than parameters": (
        errors.ConfigError, "exceeds num_params", lambda: dataclasses.replace(tiny(), num_expert_weights=1001),
    ),
    "quantised to nothing": (
        errors.ConfigError, "weight_dtype", lambda: dataclasses.replace(tiny(), num_quantized_params=5),
    ),
    "quantised in words": (
        errors.ConfigError, "quantization_config", lambda: from_config(LLAMA | {"quantization_config": "awq"}),
    ),
    "an encoder around a decoder": (
        errors.UnsupportedError, "encoder",
        lambda: from_config({"model_type": "x", "is_encoder_decoder": True, "text_config": LLAMA}),
    ),
    "Mamba alone": (errors.UnsupportedError, "state", lambda: from_config(LLAMA | {"model_type": "mamba2"})),
    "a model of Gemma 4's kind that is not known": (
        errors.UnsupportedError, "layer_heads", lambda: from_config({"model_type": "gemma4_unified"}),
    ),
    "heads of fewer layers": (
        errors.ConfigError, "layer_heads", lambda: dataclasses.replace(tiny(), layer_heads=((1, 8),) * 99),
    ),
    "kinds of layers that are not known": (
        errors.UnsupportedError, "compressed", lambda: from_config(LLAMA | {"layer_types": ["compressed"] * 32}),
    ),
    "a pattern of other letters": (
        errors.ConfigError, "hybrid_override_pattern", lambda: from_config(HYBRID | {"hybrid_override_pattern": "MXA"}),
    ),
    "a pattern of another length": (
        errors.ConfigError, "4 letters", lambda: from_config(HYBRID | {"hybrid_override_pattern": "MM*M"}),
    ),
    "layers with attention that are not there": (
        errors.ConfigError, "attn_layer_indices",
        lambda: from_config(sized("bamba", 4, 8, 2, 64, attn_layer_indices=[4])),
    ),
    "two names that contradict each other": (
        errors.ConfigError, "keep one", lambda: from_config(sized("brand_new", 4, 8, 2, 64, n_layer=5), num_params=1),
    ),
    "an encoder": (errors.UnsupportedError, "encoder", lambda: from_config(LLAMA | {"is_encoder_decoder": True})),
    "a file that is not there": (errors.MissingFileError, "nowhere", lambda: from_config("nowhere/config.json")),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta-v2", "modernbert", "vit", "clip_text_model",
     "dinov2", "t5", "mt5", "bart", "whisper", "wav2vec2", "encoder-decoder"],
)  # fmt: skip
def test_encoders_are_refused(kind):
    with pytest.raises(errors.UnsupportedError, match="encoder"):
        from_config(sized(kind, 12, 12, 12, 768), num_params=1000)


@pytest.mark.wrong_types
@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    kind, part, call = REFUSED[what]
    with pytest.raises(kind) as caught:
        call()
    assert part in str(caught.value)
    assert isinstance(caught.value, errors.KVAttnError)


def test_files_that_are_no_config(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(errors.ConfigError, match=r"is no JSON"):
        from_config(tmp_path)
    file.write_text(json.dumps(LLAMA | {"model_type": "brand_new"}))
    spec = from_config(tmp_path, num_params=7_000_000_000)
    assert (spec.num_params, spec.num_layers, spec.head_dim) == (7 * 10**9, 32, 128)


def test_public_names():
    assert kvattn.memory is memory


PLANNED = json.loads((Path(__file__).parent / "golden" / "planned.json").read_text())
"""Configs written by hand, and the bytes of a token in bfloat16."""


@pytest.mark.parametrize("name", PLANNED)
def test_configs_that_name_their_sizes_otherwise(name):
    spec = from_config(PLANNED[name]["config"], num_params=10**9)
    assert plan(spec, "h100", batch_size=1, length=64).bytes_per_token == PLANNED[name]["bytes_per_token"]
    assert not spec.cache_is_estimate
