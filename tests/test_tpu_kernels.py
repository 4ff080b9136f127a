"""`"mosaic_tpu"` in JAX's TPU interpreter: right values, nothing read that was not written, no races.

Memory that nobody wrote holds NaN there, and so does every unused slot, page and scale here.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from kernel_cases import (
    BAD,
    BF16,
    F32,
    POLICIES,
    B,
    assert_arrays_agree,
    assert_steps_are_the_references,
    filled,
    honest,
    made,
    narrow,
    request_for,
    truth,
    with_bad_values,
    worst,
)
from oracles import assert_accurate, assert_lse, assert_same_bits

import kvattn
import kvattn.pallas
from kvattn import _target, errors
from kvattn.attend import api
from kvattn.cache import Layout
from kvattn.masks import Mask
from kvattn.pallas import tiles, tpu_append, tpu_bits, tpu_decode, tpu_fetch, tuning


@pytest.fixture(autouse=True)
def interpreted():
    with kvattn.pallas.interpret():
        yield


def races_found():
    """What the interpreter saw in the last kernel; in newer versions of JAX a race is an error already."""
    return interpret_pallas_call.races.races_found


def check(request, config=None):
    """The error rule against float64, the logarithm, and that the reference agrees on the mass."""
    assert tpu_decode.unsupported(request) is None
    # Compiled anew: a fault may be planted.
    out, lse, mass = jax.block_until_ready(jax.jit(lambda r: tpu_decode.attend(r, config))(request))
    assert not races_found()
    exact, exact_lse = truth(request)
    low, expected_mass = honest(request)
    if request.query.dtype == F32 and request.view.keys["data"].dtype != BF16:
        assert_accurate(out, exact, low)
        assert_lse(lse, exact_lse)
    else:
        assert_accurate(out, exact, narrow(request, BF16))
        np.testing.assert_allclose(lse, exact_lse, atol=1e-4)
    empty = np.isneginf(exact_lse)
    assert (np.asarray(out)[empty] == 0).all() and np.isneginf(np.asarray(lse)[empty]).all()
    if request.want_mass:
        np.testing.assert_allclose(mass, expected_mass, atol=1e-5)


SHAPES = {
    "GQA": (300, 16, 4, 128),
    "MHA": (130, 4, 4, 128),
    "whole pieces": (384, 4, 2, 128),
    "MQA of 71 heads": (600, 71, 1, 128),
    "heads of 256": (140, 4, 2, 256),
    "one slot": (1, 4, 2, 128),
}
RULES = {
    "plain": {},
    "window": {"mask": Mask(window=50)},
    "window and sinks": {"mask": Mask(window=20, num_sinks=3)},
    "a part": {"mask": Mask(begin=4, end=200)},
    "softcap": {"softcap": 2.0},
    "mass": {"want_mass": True},
}


def grid():
    for shape, (rule, paged, codec, new) in itertools.product(
        SHAPES,
        [(r, p, c, t) for r in RULES for p in (0, 16) for c in (None, kvattn.Int8(), kvattn.Float8()) for t in (1, 3)],
    ):
        plain = (rule, paged, codec, new) == ("plain", 0, None, 1)
        quick = plain or (shape == "GQA" and (paged == 16) == (new == 3) == (codec == kvattn.Int8()))
        quick |= (shape, rule, paged, codec, new) == ("MHA", "plain", 0, kvattn.Float8(), 1)  # no whole words
        marks = () if quick else pytest.mark.slow
        yield pytest.param(shape, rule, paged, codec, new, marks=marks, id=f"{shape}-{rule}-{paged}-{codec}-{new}")


@pytest.mark.parametrize(("shape", "rule", "page_size", "codec", "new"), list(grid()))
def test_values(shape, rule, page_size, codec, new):
    """float32; one full row, one empty row, one in between; NaN wherever there is no token."""
    slots, num_heads, heads, size = SHAPES[shape]
    cache = filled([slots, 0, slots // 3 + 1], slots, heads, size, codec=codec, page_size=page_size)
    check(request_for(cache, num_heads, new, **RULES[rule]))


@pytest.mark.parametrize("rising", [1, -1], ids=["rising", "falling"])
def test_scores_of_one_tile_above_those_of_the_last(rising):
    """Three tiles whose scores differ by 30: what was added up before is rescaled, or what comes. And slopes, pads."""
    cache = filled([300, 1, 129], 300, 1, 128)
    ramp = rising * jnp.arange(300, dtype=F32)[None, None, None, :, None] * (30 / 128 / 16)
    cache = cache.replace(keys={"data": cache.keys["data"] * 0.3 + ramp})
    request = request_for(cache, 4, 2, alibi_slopes=kvattn.alibi_slopes(4), want_mass=True)
    # About the same scores for every head, and some of each tile that count.
    request = dataclasses.replace(request, query=request.query * 0.2 + 1.0)
    check(request, tuning.TpuConfig(1, 128))


@pytest.mark.parametrize(
    ("size", "codec", "rule"),
    [
        (128, None, "window and sinks"),
        (64, kvattn.Float8(), "mass"),
        *(
            pytest.param(size, codec, rule, marks=pytest.mark.slow)
            for size, codec in ((128, kvattn.Int8()), (64, None), (128, kvattn.Int4(64)))
            for rule in RULES
        ),
    ],
    ids=str,
)
def test_only_pieces_that_hold_something_are_fetched(size, codec, rule):
    """Two tiles of two pieces each; what was not fetched is NaN. A window leaves pieces in the middle of a tile."""
    rules = {**RULES[rule], **({"mask": Mask(window=150, num_sinks=3)} if rule == "window and sinks" else {})}
    for lengths in ([512, 0, 129], [385, 128, 256]):
        cache = filled(lengths, 512, 2, size, codec=codec)
        check(request_for(cache, 4, **rules), tuning.TpuConfig(1 << 22, 256))


def test_minima_and_scales_in_several_pages():
    """Two groups of four bits, tokens last, and two pages to a tile."""
    cache = filled([256, 0, 130], 256, 1, 64, codec=kvattn.Int4(32), page_size=128)
    request = request_for(cache, 2, mask=Mask(window=200, num_sinks=3))
    out, lse, _ = jax.jit(lambda r: tpu_decode.attend(r))(request)
    exact, exact_lse = truth(request)
    np.testing.assert_allclose(out, exact, atol=5e-6)
    np.testing.assert_allclose(lse, exact_lse, atol=5e-6)


@pytest.mark.parametrize("page_size", [0, 8])
def test_bfloat16_and_slopes(page_size):
    cache = filled([300, 1, 129], 300, 2, 128, dtype=BF16, page_size=page_size)
    check(request_for(cache, 8, 2, dtype=BF16))
    cache = filled([300, 1, 129], 300, 2, 128, page_size=page_size)
    check(request_for(cache, 8, 2, alibi_slopes=kvattn.alibi_slopes(8)))


def lying_across():
    """Caches whose tokens lie last: heads of less than 128, and four bits."""
    quick = [
        (64, None, 128, "mass"),
        (80, kvattn.Int8(), 0, "window"),
        (128, kvattn.Int4(32), 0, "window and sinks"),
    ]
    plain = itertools.product((64, 80, 96, 112, 192), (None, kvattn.Int8(), kvattn.Float8()), (0, 128), RULES)
    sizes = ((64, 64), (64, 32), (128, 128), (128, 64), (128, 32), (128, 16), (192, 100), (320, 80))
    four = [(h, kvattn.Int4(g), p, r) for (h, g), p, r in itertools.product(sizes, (0, 128), RULES)]
    for case in dict.fromkeys([*quick, *plain, *four]):
        yield pytest.param(*case, marks=() if case in quick else pytest.mark.slow, id="-".join(map(str, case)))


@pytest.mark.parametrize(("size", "codec", "page_size", "rule"), list(lying_across()))
def test_tokens_that_lie_last(size, codec, page_size, rule):
    """As `test_values`; the arrays have more slots than the cache."""
    slots, rows = (256, None) if page_size else (200, 256)
    cache = filled([slots, 0, 67], slots, 2, size, codec=codec, page_size=page_size, rows=rows)
    check(request_for(cache, 6, 2, **RULES[rule]))


def lying_side_by_side():
    """Heads of 64 in pages of less than 128."""
    quick = [(16, None, "window and sinks")]
    rest = itertools.product((16, 32, 48, 64), (None, kvattn.Int8(), kvattn.Float8()), RULES)
    for case in dict.fromkeys([*quick, *rest]):
        yield pytest.param(*case, marks=() if case in quick else pytest.mark.slow, id="-".join(map(str, case)))


@pytest.mark.parametrize(("page_size", "codec", "rule"), list(lying_side_by_side()))
def test_tokens_that_lie_side_by_side(page_size, codec, rule):
    """As `test_values`; the last page of the longest row has room for more."""
    cache = filled([299, 0, 67], 299, 2, 64, codec=codec, page_size=page_size, platform="tpu")
    assert cache.keys["data"].shape[-2:] == (page_size // 2, 128)
    assert tpu_decode.rows_of(cache.view()) > page_size
    check(request_for(cache, 6, 2, **RULES[rule]))


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    "codec", [kvattn.Int4(64), *(pytest.param(kvattn.Int4(n), marks=pytest.mark.slow) for n in (16, 32, 128))], ids=str
)
def test_four_bits_for_bfloat16_queries(codec, native, monkeypatch):
    """The error is that of rounding the probabilities: 2^-8 of the largest value; either way to widen codes."""
    monkeypatch.setattr(tpu_decode, "native", lambda: tpu_bits.Native(int4=native))
    request = request_for(filled([256, 0, 67], 256, 2, 128, codec=codec, dtype=BF16), 8, dtype=BF16)
    (out, lse, _), (exact, exact_lse) = jax.jit(tpu_decode.attend)(request), truth(request)
    largest = np.abs(np.asarray(request.view.dense(F32)[1])).max(
        where=np.asarray(request.view.positions[0] >= 0)[..., None], initial=0
    )
    assert np.abs(np.asarray(out, np.float64) - exact).max() <= 2.0**-8 * largest
    np.testing.assert_allclose(lse, exact_lse, atol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("page_size", [0, 32])
def test_float8_as_the_device_has_it(page_size, platform, monkeypatch):
    """Unused slots hold NaN then; bits in uint8 are read as well."""
    monkeypatch.setattr(tpu_decode, "native", lambda: tpu_bits.Native(float8=True))
    fill = worst if platform == "tpu" else lambda x: jnp.full_like(x, 0x7F if x.dtype == jnp.uint8 else jnp.nan)
    with _target.aimed_at(platform):
        cache = filled([256, 0, 67], 256, 2, 128, codec=kvattn.Float8(), page_size=page_size, fill=fill)
    assert cache.keys["data"].dtype == (jnp.float8_e4m3fn if platform == "tpu" else jnp.uint8)
    check(request_for(cache, 8, mask=Mask(window=150, num_sinks=3)))


def test_float16_queries():
    """As they would be in float32."""
    request = request_for(filled([40, 0, 33], 40, 1, 128), 2, dtype=jnp.float16)
    wide = dataclasses.replace(request, query=request.query.astype(F32))
    for a, b in zip(*(jax.jit(tpu_decode.attend)(r)[:2] for r in (request, wide)), strict=True):
        assert_same_bits(a, b, "output")


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("codec", [None, kvattn.Int8()], ids=str)
def test_what_lies_elsewhere_changes_no_bit(page_size, codec):
    outs = []
    for fill in (jnp.zeros_like, worst):
        cache = filled([200, 0, 33], 290, 2, 128, codec=codec, page_size=page_size, fill=fill)
        outs.append(jax.jit(tpu_decode.attend)(request_for(cache, 4))[:2])
    for a, b in zip(*outs, strict=True):
        assert_same_bits(a, b, "output")


@pytest.mark.parametrize(
    ("page_size", "codec"),
    [
        (0, None),
        *(
            pytest.param(p, c, marks=pytest.mark.slow)
            for p, c in [(16, None), (0, kvattn.Int8()), (16, kvattn.Float8())]
        ),
    ],
    ids=str,
)
def test_what_a_window_has_left_changes_no_bit(page_size, codec):
    """It is a token of the row still, but its page may be another row's by now."""
    outs = []
    for fill in (jnp.zeros_like, worst):
        cache = filled([200, 5, 33], 290, 2, 128, codec=codec, page_size=page_size, fill=fill, left=[180, 0, 13])
        outs.append(jax.jit(lambda r: tpu_decode.attend(r))(request_for(cache, 4, 2, mask=Mask(window=19)))[:2])
    assert np.isfinite(outs[1][0]).all()
    for a, b in zip(*outs, strict=True):
        assert_same_bits(a, b, "output")


@pytest.mark.parametrize("mask", [Mask(), Mask(window=49)], ids=str)
def test_a_bad_value_reaches_those_who_may_attend_to_it(mask):
    """Channel by channel; some queries are pads, and a row has nothing."""
    cache = with_bad_values([100, 0, 70], BAD, slots=128, size=64)
    request = request_for(cache, 4, 4, mask=mask)
    request = dataclasses.replace(request, positions=request.positions.at[2, 1].set(-1))
    found, expected = (api.attend(request, name)[0] for name in ("mosaic_tpu", "reference"))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert not np.isfinite(expected[0, -1]).all() and np.isfinite(found[1:]).all()


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_through_the_step(name, monkeypatch):
    """Prompt by chunks of up to eight tokens, then token by token: as the reference, kept sets included."""
    # Chunks lie as on a TPU.
    monkeypatch.setattr(Layout, "best", classmethod(lambda cls, slots, *_, **__: cls(slots, slots, False)))
    assert_steps_are_the_references("mosaic_tpu", name, 128, F32, (8, 1, 3, 1, 1))


def test_arrays():
    """`decode_attention` and `paged_decode_attention`, lengths per head, log-sum-exp, sinks; and derivatives."""
    q, k, v, pools, lengths = assert_arrays_agree("mosaic_tpu", "xla", 128, F32, 2e-6)
    total = lambda i: lambda q: jnp.sum(kvattn.pallas.decode_attention(q, k, v, lengths[:, 0], implementation=i) ** 3)
    grads = [jax.grad(total(i))(q) for i in ("mosaic_tpu", "reference")]
    np.testing.assert_allclose(*grads, atol=1e-5)
    with pytest.raises(errors.RangeError, match="page 99"):
        kvattn.pallas.paged_decode_attention(q, *pools, [48, 1, 1], np.full((B, 6), 99))
    with pytest.raises(errors.ConfigError, match="int8 needs k_scales"):
        kvattn.pallas.decode_attention(q, k.astype(jnp.int8), v.astype(jnp.int8), [1, 1, 1])
    with pytest.raises(errors.RangeError, match="lengths"):
        kvattn.pallas.decode_attention(q, k, v, [49, 0, 0])


def test_only_tiles_that_hold_something_are_read():
    """The plan: cost follows the tokens, whatever the capacity; a window starts where it starts."""
    cache = filled([1000, 0, 130], 4096, 1, 128)
    request = request_for(cache, 1)
    positions = request.view.layout.from_blocks(request.view.positions[..., None], False)[..., 0]
    chosen = tiles.plan(request, positions, 128)
    listed = [(int(r), int(t)) for r, t in zip(chosen.row, chosen.tile, strict=True)][: int(chosen.count[0])]
    assert listed == [(0, t) for t in range(8)] + [(1, 0)] + [(2, 0), (2, 1)]
    assert np.asarray(chosen.whole)[: len(listed)].tolist() == [1] * 7 + [0, 0, 1, 0]
    windowed = tiles.plan(request_for(cache, 1, mask=Mask(window=100, num_sinks=1)), positions, 128)
    listed = [(int(r), int(t)) for r, t in zip(windowed.row, windowed.tile, strict=True)][: int(windowed.count[0])]
    assert listed == [(0, 0), (0, 7), (1, 0), (2, 0), (2, 1)]
    holds = jnp.any(positions.reshape(3, 32, 128) >= 0, axis=2)
    for unknown in (-7, 96):
        table = jnp.arange(3 * 32, dtype=jnp.int32).reshape(3, 32).at[1].set(unknown)
        pages = np.asarray(tiles.pages_of(chosen, table, holds, 96))[: int(chosen.count[0]), 0].tolist()
        assert pages == [0, 1, 2, 3, 4, 5, 6, 7, -1, 64, 65], "nothing is fetched for a row that holds nothing"


def test_sizes():
    """Smaller tiles give the same; a table is taken where it fits."""
    request = request_for(filled([300, 1, 129], 384, 2, 128), 4)
    small = tuning.TpuConfig(1 << 17, 128)
    usual, _, _ = jax.jit(tpu_decode.attend)(request)
    tuning.use({tpu_decode.key(request): small})
    try:
        assert tpu_decode.config_for(request) == small
        assert tpu_decode.rows_of(request.view, small) == 128
        out, _, _ = jax.jit(lambda r: tpu_decode.attend(r))(request)
    finally:
        tuning.use(None)
    assert tpu_decode.config_for(request) == tuning.TpuConfig()
    np.testing.assert_allclose(out, usual, atol=2e-6)


def test_lengths_are_no_new_program():
    traces = []

    @jax.jit
    def attend(request):
        traces.append(1)
        return tpu_decode.attend(request)

    for lengths in ([10, 0, 300], [300, 300, 300], [0, 0, 0]):
        attend(request_for(filled(lengths, 300, 1, 128), 2))
    assert len(traces) == 1


def test_what_it_does_not_do_is_said():
    for cache, settings, why in (
        (made(16, 2, 128), {"new": 9}, "up to 8 new tokens"),
        (made(16, 2, 128), {"key_rope": kvattn.RoPE(128)}, "rotate"),
        (made(16, 2, 128, dtype=jnp.float16), {}, "float16"),
        (made(128, 2, 64, codec=kvattn.Int4(4)), {}, "1, 2, 4 or 8 groups"),
        (made(128, 2, 192, codec=kvattn.Int4(64)), {}, "1, 2, 4 or 8 groups"),
        (made(128, 2, 96, codec=kvattn.Int4(32)), {}, "not of 96"),
        (made(128, 2, 256, codec=kvattn.Int4(64)), {}, "not of 256"),
        (made(128, 2, 128, codec=kvattn.KIVI()), {}, "KIVI"),
        (made(16, 2, 64), {}, "no multiple of 128"),
        (made(64, 2, 64, page_size=16), {}, "no multiple of 128"),
        (made(128, 2, 100), {}, "neither rows nor columns"),
    ):
        request = request_for(cache.replace(lengths=jnp.full((B,), 9, jnp.int32)), 4, **settings)
        assert why in tpu_decode.unsupported(request)
        with pytest.raises(errors.UnsupportedError, match="mosaic_tpu"):
            api.attend(request, "mosaic_tpu")
    api.attend(request, ("mosaic_tpu", "xla"))


# Writing a token ------------------------------------------------------------------------------------------------------


def appended(cache, slots, key, value):
    """The cache with a token written by the kernel."""
    write = jax.jit(lambda *args: cache.write(*args, tpu_append.InPlace(cache.store)))
    written = jax.block_until_ready(write(jnp.asarray(slots, jnp.int32), key, value))
    assert not races_found()
    return written


WRITES = {
    "rows": (128, None, 0, 304),
    "rows of bfloat16": (128, kvattn.Int8(), 0, 256),
    "tokens last": (64, None, 0, 256),
    "tokens last, Int4": (64, kvattn.Int4(32), 0, 256),
    "tokens last, Float8": (80, kvattn.Float8(), 0, 256),
    "pages": (128, None, 16, 64),
    "pages, tokens last": (64, kvattn.Int8(), 128, 256),
    "pages, side by side": (64, kvattn.Int8(), 32, 96),
    "pages, side by side in several blocks": (64, None, 96, 192),
    "pages, Int4": (128, kvattn.Int4(64), 128, 256),
}


QUICK_WRITES = ("pages, side by side", "tokens last, Int4")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK_WRITES else pytest.mark.slow) for n in WRITES])
def test_a_token_is_written_where_it_belongs(name):
    """Bit for bit as without the kernel: one slot each, none at all, slots that are not there, slots per head."""
    size, codec, page_size, slots = WRITES[name]
    platform = "tpu" if "side by side" in name else None
    cache = filled([70, 0, 55], slots, 2, size, codec=codec, page_size=page_size, platform=platform)
    rng = np.random.default_rng(0)
    new = [jnp.asarray(rng.normal(size=(B, 1, 2, size)), F32) for _ in range(2)]
    where = [[[5], [-1], [55]], [[-1], [-1], [slots - 1]], [[-1]] * 3]
    where.append([[0], [slots + 999], [40]] if page_size else [[[1], [7]], [[-1], [9]], [[55], [2]]])
    for at in where:
        expected = cache.write(jnp.asarray(at, jnp.int32), *new)
        for a, b in zip(*map(jax.tree.leaves, (expected, appended(cache, at, *new))), strict=True):
            assert_same_bits(a, b, f"{at}")


@pytest.mark.parametrize(("size", "codec", "slots"), [(128, None, 64), (64, kvattn.Int8(), 128)], ids=["rows", "last"])
def test_a_token_is_written_into_contiguous_slots(size, codec, slots):
    """Keys and values, scales too: slots of a row, and of a head each; nothing else moves."""
    cache, rng = filled([30, 0, 55], slots, 2, size, codec=codec), np.random.default_rng(0)
    new = [jnp.asarray(rng.normal(size=(B, 1, 2, size)), F32) for _ in range(2)]
    for at in ([[slots - 1], [-1], [40]], [[[1], [7]], [[-1], [9]], [[55], [2]]]):
        expected = cache.write(jnp.asarray(at, jnp.int32), *new)
        for a, b in zip(*map(jax.tree.leaves, (expected, appended(cache, at, *new))), strict=True):
            assert_same_bits(a, b, f"{at}")


def test_rows_that_write_nothing_stay_away_from_the_pages_of_others():
    cache = filled([3, 3, 3], 16, 2, 128, page_size=16, fill=jnp.zeros_like)
    cache = cache.with_tables(np.ones((B, 1), int), cache.lengths)
    new = [jnp.full((B, 1, 2, 128), x, F32) for x in (2.0, 3.0)]
    for at in ([[-1], [7], [-1]], [[4], [-1], [5]]):
        expected = cache.write(jnp.asarray(at, jnp.int32), *new)
        for a, b in zip(*map(jax.tree.leaves, (expected, appended(cache, at, *new))), strict=True):
            assert_same_bits(a, b, f"{at}")


@pytest.mark.parametrize("pages", [(2, 0, 1), (0, 1, -1), (-1, 1, 0)], ids=str)
def test_no_block_comes_again_once_it_was_left(pages, monkeypatch):
    """A row that writes nothing must not put back, as it was, what another row wrote, whatever page it knows.

    Values do not show it: the interpreter ends a step before the next, where a TPU fetches one block ahead.
    """
    cache, named = made(64, 1, 128, page_size=64).with_tables(np.array(pages)[:, None], [0] * B), []
    monkeypatch.setattr(tpu_append, "_run", lambda array, x, scalars, *_: named.append(scalars) or array)
    new = jnp.ones((B, 1, 1, 128))
    for at in itertools.product((-1, 3, 40), repeat=B):
        cache.write(jnp.asarray(at, jnp.int32)[:, None], new, new, tpu_append.InPlace(cache.store))
        own = [
            (page, slot // 32, slot % 32) if min(page, slot) >= 0 else None
            for page, slot in zip(pages, at, strict=True)
        ]
        for page, _, tile, slot in named:
            visited = list(zip(page.tolist(), tile.tolist(), strict=True))
            for block, inside, wanted in zip(visited, slot.tolist(), own, strict=True):
                assert (*block, inside) == wanted if wanted else inside < 0, at
            runs = [block for block, _ in itertools.groupby(visited)]
            assert len(set(runs)) == len(runs), f"{at}: {runs}"
        assert len(named) == 2
        named.clear()


def test_what_is_written_can_be_differentiated():
    cache = filled([3, 0, 9], 16, 2, 128, fill=jnp.zeros_like)
    slots, new = jnp.asarray([[3], [-1], [9]], jnp.int32), jnp.ones((B, 1, 2, 128), F32)

    def written(store, new):
        return cache.write(slots, new, 2 * new, store)

    changes = [
        jax.jvp(functools.partial(written, store), (new,), (3 * new,))[1]
        for store in (tpu_append.InPlace(cache.store), None)
    ]
    for name in ("keys", "values"):
        np.testing.assert_array_equal(*(getattr(change, name)["data"] for change in changes))


# Planted faults -------------------------------------------------------------------------------------------------------


def test_planted_faults(monkeypatch):
    """A tile said to be whole lets NaN in; a wrong plan reads other tokens; two cores on one row race."""
    cache = filled([300, 0, 101], 300, 2, 128)
    original = tiles.plan

    def all_whole(*args):
        chosen = original(*args)
        return tiles.Plan(chosen.count, chosen.row, chosen.tile, jnp.ones_like(chosen.whole), chosen.needed)

    def short(*args):
        chosen = original(*args)
        return tiles.Plan(chosen.count - 1, chosen.row, chosen.tile, chosen.whole, chosen.needed)

    for fault in (all_whole, short):
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "plan", fault)
            with pytest.raises(AssertionError):
                check(request_for(cache, 4))
    check(request_for(cache, 4))


def test_what_is_not_waited_for_is_a_race(monkeypatch):
    """The parts of a tile that is not whole are read before they have come, or fetched before they were read."""
    request = request_for(filled([512, 0, 129], 512, 2, 128), 4)
    config = tuning.TpuConfig(1 << 22, 256)
    check(request, config)
    monkeypatch.setattr(tpu_fetch.Fetcher, "wait", lambda self, tile: None)
    try:
        with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
            check(request, config)
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_a_planted_race_is_found(monkeypatch):
    """Two cores that share the tiles of a row write its output without waiting for each other."""
    # Of a length whose tiles the grid fetches: what the kernel fetches itself, one core would wait for in vain.
    request, config = request_for(filled([1000, 0, 0], 1000, 1, 128), 2), tuning.TpuConfig(1 << 22, 512)
    attend = lambda: jax.block_until_ready(jax.jit(lambda r: tpu_decode.attend(r, config))(request))
    two_cores = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    monkeypatch.setattr(tpu_decode, "INTERPRETER", two_cores)
    attend()
    assert not races_found()
    # The interpreter shares out grids of known size only: the two tiles of the first row.
    monkeypatch.setattr(tpu_decode, "_grid", lambda chosen: (2,))
    monkeypatch.setattr(tpu_decode, "ORDER", ("parallel", "parallel"))
    try:
        attend()
        found = races_found()
    except jax.errors.JaxRuntimeError as error:
        found = "RACE DETECTED" in str(error)
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert found


@pytest.mark.parametrize("kind", ["contiguous", "pages, heads of 64", "scores per head", "Int8, slopes"])
def test_two_cores_share_the_heads(kind, monkeypatch):
    """Each core reads, and writes, what is of its own heads; nothing is read by both that one of them writes."""
    size, given, rules = {
        "contiguous": (128, {}, {}),
        "pages, heads of 64": (64, {"page_size": 16, "platform": "tpu"}, {}),
        "scores per head": (128, {}, {"want_mass": True}),
        "Int8, slopes": (128, {"codec": kvattn.Int8()}, {"alibi_slopes": kvattn.alibi_slopes(8)}),
    }[kind]
    request = request_for(filled([256, 0, 65], 256, 4, size, dtype=jnp.bfloat16, **given), 8, **rules)
    monkeypatch.setattr(tpu_decode, "cores_for", lambda view: 2)
    monkeypatch.setattr(tpu_decode, "INTERPRETER", pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
    # The interpreter shares out grids of known size only: a tile for each row, of the empty one too.
    monkeypatch.setattr(tpu_decode, "_grid", lambda chosen: (3,))
    try:
        check(request)
        assert not races_found()
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_devices_of_two_cores():
    """Where the heads can be halved; one core otherwise, and everywhere else."""
    for cores, heads, expected in ((2, 4, 2), (2, 1, 1), (1, 4, 1), (None, 4, 1)):
        device = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=cores, platform="tpu")
        mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
        view = filled([8], 8, heads, 128).view()
        with jax.sharding.use_abstract_mesh(mesh):
            assert tpu_decode.cores_for(view) == expected
    assert tpu_decode.cores_for(view) == 1
