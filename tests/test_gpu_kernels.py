"""`"mosaic_gpu"` in JAX's GPU interpreter: right values, nothing read that was not written, no races.

Memory that nobody wrote holds NaN there, and so does every unused slot, page and scale here.
"""

import dataclasses
import functools
import itertools
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from kernel_cases import (
    BAD,
    BF16,
    F16,
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
from kvattn import _target, attend, errors
from kvattn.attend import api
from kvattn.cache import Layout
from kvattn.masks import Mask
from kvattn.pallas import (
    gpu_append,
    gpu_body,
    gpu_decode,
    gpu_fetch,
    gpu_merge,
    gpu_queries,
    gpu_spec,
    gpu_threads,
    gpu_tile,
    gpu_walk,
    gpu_ways,
    interpreter,
    shares,
    tuning,
)


@pytest.fixture(autouse=True)
def interpreted(capsys):
    with kvattn.pallas.interpret():
        yield
    # Older versions of JAX print a race, newer ones raise.
    assert "RACE DETECTED" not in capsys.readouterr().out


TARGETS = {
    "Hopper": _target.Target("cuda", "NVIDIA H200", 132, "9.0"),
    "Blackwell": _target.Target("cuda", "NVIDIA B200", 148, "10.0"),
    "Ampere": _target.Target("cuda", "NVIDIA A100-SXM4-80GB", 108, "8.0"),
    "L4": _target.Target("cuda", "NVIDIA L4", 58, "8.9"),
    "unheard of": _target.Target("cuda", "one of 2030", 200, "10.9"),
}
"""One for each way, wgmma; mma, tiles copied by the engine; mma, tiles copied by threads; and small ones."""


def eights(slots):
    return -(-slots // 8) * 8


def check(request, wide=None, config=None, on="Hopper"):
    """The error rule against float64, the logarithm, and that the reference agrees on the mass.

    Narrow queries are measured by attention in `wide`; None: in the dtype that the kernel multiplies in.
    """
    with _target.aimed_at(TARGETS[on]):
        assert gpu_decode.unsupported(request) is None
        # Compiled anew: a fault may be planted.
        out, lse, mass = jax.jit(lambda r: gpu_decode.attend(r, config))(request)
    exact, exact_lse = truth(request)
    if request.query.dtype == F32:
        low, expected_mass = honest(request)
        assert_accurate(out, exact, low)
    else:
        expected_mass = api.attend(request, "reference")[2]
        assert_accurate(out, exact, narrow(request, wide or gpu_decode._numbers(request)[0]))
    assert_lse(lse, exact_lse)
    empty = np.isneginf(exact_lse)
    assert (np.asarray(out)[empty] == 0).all() and np.isneginf(np.asarray(lse)[empty]).all()
    if request.want_mass:
        np.testing.assert_allclose(mass, expected_mass, atol=1e-5)


SHAPES = {
    "GQA": (200, 8, 2, 128),
    "MHA": (130, 4, 4, 64),
    "MQA of 71 heads": (150, 71, 1, 64),
    "heads of 80": (72, 4, 2, 80),
    "heads of 96": (72, 4, 2, 96),
    "heads of 112": (72, 4, 2, 112),
    "heads of 256": (136, 2, 1, 256),
    "one slot": (1, 4, 2, 128),
}
STORES = {
    "bfloat16": {"dtype": BF16},
    "float16": {"dtype": F16},
    "Int8": {"dtype": BF16, "codec": kvattn.Int8()},
    "Float8": {"dtype": BF16, "codec": kvattn.Float8()},
    "Int4": {"dtype": BF16, "codec": kvattn.Int4(64)},
    "Int4, groups of 32": {"dtype": BF16, "codec": kvattn.Int4(32)},
}
RULES = {
    "plain": {},
    "window": {"mask": Mask(window=50)},
    "window and sinks": {"mask": Mask(window=20, num_sinks=3)},
    "a part": {"mask": Mask(begin=4, end=180)},
    "softcap": {"softcap": 2.0},
    "large softcap": {"softcap": 50.0},
    "slopes": {"alibi_slopes": True},
    "mass": {"want_mass": True},
}
QUERIES = {"bfloat16": BF16, "float16": F16, "float32": F32}
QUICK = {
    *((shape, "bfloat16", "plain", 0, "bfloat16", 1) for shape in SHAPES),
    *(("GQA", store, "plain", 0, "float32", 1) for store in STORES if store != "bfloat16"),
    *(("GQA", "bfloat16", rule, 16, "float32", 3) for rule in RULES if rule != "plain"),
    ("GQA", "Int8", "mass", 32, "float16", 2),
    ("GQA", "Int4", "window and sinks", 64, "bfloat16", 8),
    ("GQA", "float16", "plain", 128, "float16", 1),
    ("heads of 96", "Int4, groups of 32", "plain", 0, "float32", 1),
    ("heads of 80", "Int8", "plain", 0, "bfloat16", 1),
    ("MQA of 71 heads", "Float8", "mass", 0, "float16", 2),
    ("GQA", "bfloat16", "mass", 0, "bfloat16", 1),
}


def grid(begin=0):
    pages, rest = (0, 8, 16, 32, 64, 128), []
    for case in itertools.product(SHAPES, STORES, RULES, pages, QUERIES, (1, 3)):
        shape, store, _, page_size, _, _ = case
        least = {"Int8": 32, "Float8": 32}.get(store, 64 if store.startswith("Int4") else 8)
        step = 32 if store == "Int4, groups of 32" else 64
        if (page_size and page_size < least) or (store.startswith("Int4") and SHAPES[shape][3] % step):
            continue
        if case not in QUICK:
            rest.append(case)
    # All 8,000 take hours; neighbours differ in one option, so every 37th meets all pairs of options.
    for case in rest[begin :: 37 + begin]:
        yield pytest.param(*case, marks=pytest.mark.slow, id="-".join(map(str, case)))
    for case in sorted(QUICK):
        yield pytest.param(*case, id="-".join(map(str, case)))


@pytest.mark.parametrize(("shape", "store", "rule", "page_size", "query", "new"), list(grid()))
def test_values(shape, store, rule, page_size, query, new):
    """One full row, one empty row, one in between; NaN wherever there is no token."""
    assert_values(shape, store, rule, page_size, query, new, "Hopper")


@pytest.mark.parametrize("on", ["Blackwell", "Ampere"])
@pytest.mark.parametrize(("shape", "store", "rule", "page_size", "query", "new"), list(grid(40)))
def test_values_by_mma(shape, store, rule, page_size, query, new, on):
    """The same by `mma`, tiles copied by an engine or by threads."""
    assert_values(shape, store, rule, page_size, query, new, on)


def assert_values(shape, store, rule, page_size, query, new, on):
    slots, num_heads, heads, size = SHAPES[shape]
    rows = None if page_size else eights(slots)
    if on == "Ampere" and (size % 64 or "Int" in store or "Float" in store):
        # Threads cannot share eight rows of those.
        rows, page_size = rows and -(-rows // 32) * 32, page_size and max(page_size, 32)
    if on == "Ampere" and (size, query) == (256, "float32"):
        new = 1  # two tiles and more queries of that size do not fit into its shared memory
    cache = filled([slots, 0, slots // 3 + 1], slots, heads, size, page_size=page_size, rows=rows, **STORES[store])
    rules = dict(RULES[rule])
    if "alibi_slopes" in rules:
        rules["alibi_slopes"] = kvattn.alibi_slopes(num_heads)
    check(request_for(cache, num_heads, new, dtype=QUERIES[query], **rules), on=on)


SEVERAL = {
    # Four programs share twelve segments: each takes three of one tile, and waits for its first query
    # buffer to be free again. Two pages to a tile.
    "segments of a program": (
        64, 4, {"dtype": BF16, "codec": kvattn.Int8(), "page_size": 32}, 2, {"want_mass": True, "softcap": 2.0}, None,
    ),
    # Twelve programs have a tile each of the first row, whose eleven states are merged in three rounds.
    "states of a row": (
        704, 1, {"dtype": BF16, "rows": 704}, 1, {"alibi_slopes": kvattn.alibi_slopes(2)}, tuning.GpuConfig(64, 2, 6),
    ),
    # Two groups of four bits, with their minima, and two tiles to a page. Two programs have three tiles each and two
    # buffers for them: a third tile that is fetched before the first was read is a race.
    "groups of a token": (
        200, 1, {"dtype": BF16, "codec": kvattn.Int4(32), "page_size": 128}, 3,
        {"mask": Mask(window=20, num_sinks=3)}, tuning.GpuConfig(64, 2, 1),
    ),
}  # fmt: skip
"""Slots, key/value heads, how they are stored, new tokens, rules, sizes."""


@pytest.mark.parametrize("name", SEVERAL)
def test_several(name):
    """More segments, tiles, states, pages and groups than fit at a time; new tokens that are pads; scales, slopes."""
    slots, heads, store, new, rules, config = SEVERAL[name]
    cache = filled([slots, 1, slots // 2 + 1], slots, heads, 64, **store)
    check(request_for(cache, 2 * heads, new, dtype=BF16, **rules), config=config)


def test_mass_and_slopes_of_one_token():
    """Both are kept column by column, so a group's columns begin with its own queries, not with its neighbours'."""
    cache = filled([64, 1, 33], 64, 2, 64, dtype=BF16)
    check(request_for(cache, 8, 1, dtype=BF16, want_mass=True, alibi_slopes=kvattn.alibi_slopes(8)))


@pytest.mark.parametrize(("dtype", "parts", "bits"), [(BF16, 1, 8), (BF16, 2, 16), (BF16, 3, 24), (F16, 2, 22)])
def test_parts_sum_up_to_float32(dtype, parts, bits):
    """To as many bits as they have together: each begins where the ones before it end."""
    rng = np.random.default_rng(0)
    x = (rng.uniform(1, 2, 1000) * 2.0 ** rng.integers(0, 14, 1000)).astype(np.float32)
    found = gpu_tile.split(jnp.asarray(x), dtype, parts)
    assert [piece.dtype for piece in found] == [dtype] * parts
    total = sum(np.asarray(piece, np.float64) for piece in found)
    assert np.all(np.abs(total - x) <= 2.0**-bits * x)


@pytest.mark.parametrize("query", [F32, BF16], ids=["float32", "bfloat16"])
def test_large_and_small_numbers_in_float16(query):
    """Products in float16 take queries and scales from far outside its range."""
    for factor in (1e-9, 1e9):
        cache = filled([90, 3, 64], 96, 1, 64, dtype=F32, codec=kvattn.Float8())
        cache = cache.replace(values={**cache.values, "scale": cache.values["scale"] * factor})
        request = request_for(cache, 2, dtype=query)
        request = dataclasses.replace(request, query=request.query * jnp.asarray(factor, query), scale=1 / factor)
        check(request, BF16)


@pytest.mark.parametrize("page_size", [0, 64])
@pytest.mark.parametrize("codec", [None, kvattn.Int8(), kvattn.Int4()], ids=str)
def test_what_lies_elsewhere_changes_no_bit(page_size, codec):
    outs = []
    for fill in (jnp.zeros_like, worst):
        cache = filled(
            [100, 0, 33], 136, 2, 64 if codec is None else 128, codec=codec, dtype=BF16, page_size=page_size, fill=fill
        )
        outs.append(jax.jit(gpu_decode.attend)(request_for(cache, 4, dtype=BF16))[:2])
    for a, b in zip(*outs, strict=True):
        assert_same_bits(a, b, "output")


@pytest.mark.parametrize(
    ("page_size", "codec"),
    [
        (0, None),
        *(pytest.param(p, c, marks=pytest.mark.slow) for p, c in [(64, None), (0, kvattn.Int8()), (64, kvattn.Int4())]),
    ],
    ids=str,
)
def test_what_a_window_has_left_changes_no_bit(page_size, codec):
    """It is a token of the row still, but its page may be another row's by now."""
    outs = []
    for fill in (jnp.zeros_like, worst):
        cache = filled(
            [100, 5, 33], 136, 2, 64 if codec is None else 128, codec=codec, dtype=BF16, page_size=page_size, fill=fill,
            left=[80, 0, 13],
        )  # fmt: skip
        request = request_for(cache, 4, 2, dtype=BF16, mask=Mask(window=19))
        outs.append(jax.jit(lambda r: gpu_decode.attend(r))(request)[:2])
    assert np.isfinite(outs[1][0]).all()
    for a, b in zip(*outs, strict=True):
        assert_same_bits(a, b, "output")


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_through_the_step(name, monkeypatch):
    """Prompt by chunks of up to eight tokens, then token by token: as the reference, kept sets included."""
    # Caches and chunks lie as on a GPU.
    best = Layout.best.__func__
    monkeypatch.setattr(Layout, "best", classmethod(lambda cls, slots, size, **_: best(cls, slots, size, "gpu")))
    assert_steps_are_the_references("mosaic_gpu", name, 64, BF16, (8, 1, 1))


def test_arrays():
    """`decode_attention` and `paged_decode_attention`: lengths per head, log-sum-exp, sinks."""
    assert_arrays_agree("mosaic_gpu", "reference", 64, BF16, 4e-6)


def test_a_page_that_is_not_there():
    """Under jit such a row is empty, and the others are what they are."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(B, 2, 64)), BF16)
    pools = [jnp.asarray(rng.normal(size=(1, 6, 16, 64)), BF16) for _ in range(2)]
    attend = jax.jit(lambda *a: kvattn.pallas.paged_decode_attention(*a, return_lse=True, implementation="mosaic_gpu"))
    lengths = jnp.asarray([20, 20, 20], jnp.int32)
    table = jnp.asarray([[0, 1], [2, 3], [4, 5]], jnp.int32)
    good = attend(q, *pools, lengths, table)
    for page in (-1, 6, 2**30):
        out, lse = attend(q, *pools, lengths, jnp.asarray([[0, 1], [2, page], [4, 5]], jnp.int32))
        assert (np.asarray(out)[1] == 0).all() and np.isneginf(np.asarray(lse)[1]).all()
        for row in (0, 2):
            assert_same_bits(out[row], good[0][row])
        # Behind the last token a table may say anything.
        tail = attend(q, *pools, jnp.minimum(lengths, 16), jnp.asarray([[0, page], [2, page], [4, page]], jnp.int32))
        for a, b in zip(tail, attend(q, *pools, jnp.minimum(lengths, 16), table), strict=True):
            assert_same_bits(a, b)


def shared_out(lengths, slots, heads, programs, mask=None, least=1):
    """Who reads what: {(program, head, row): tiles}, and the states of every segment.

    The kernel's own walk, number by number instead of as a program.
    """
    cache = filled(lengths, slots, 1, 64, dtype=BF16)
    request = request_for(cache, 1, dtype=BF16, mask=mask)
    positions = request.view.layout.from_blocks(request.view.positions[..., None], False)[..., 0]
    positions = jnp.pad(positions, ((0, 0), (0, 0), (0, -slots % 64)), constant_values=-1)
    rows = shares.survey(request, positions, 64)
    index = jnp.arange(rows.count.shape[0], dtype=jnp.int32)
    counts = shares.Counts(rows.count, index, B, heads, programs, least)
    read, first, last = {}, {}, {}
    spec = types.SimpleNamespace(batch=B, in_order=False)
    for program in range(programs):
        walk = gpu_walk.Walk(spec, rows.arrays(), counts.of_program(jnp.int32(program)))
        number = walk.start
        while number <= walk.last:
            here = walk.at(number)
            head, row = int(here.head), int(here.row)
            read[program, head, row] = [int(here.tile(j)) for j in range(int(here.first), int(here.end))]
            assert read[program, head, row], "a segment without tiles is passed over"
            for is_end, end in ((here.is_first, first), (here.is_last, last)):
                if is_end:
                    assert (head, row) not in end, "two programs write the same number"
                    end[head, row] = program
            with jax.disable_jit():
                number = walk.after(number)
    assert first.keys() == last.keys()
    return read, {where: list(range(first[where], last[where] + 1)) for where in first}


@pytest.mark.wrong_types  # stand-ins for the kernel's own values
@pytest.mark.parametrize(("programs", "least"), [(1, 1), (4, 1), (7, 1), (50, 1), (50, 3)])
@pytest.mark.parametrize("lengths", [[640, 0, 65], [0, 0, 0], [0, 1, 700], [700, 700, 700]])
def test_work_is_shared_out_evenly(lengths, programs, least):
    """Every needed tile is read once, no program reads more than its share, and the merge finds all states."""
    heads = 3
    read, states = shared_out(lengths, 704, heads, programs, least=least)
    needed = {(h, r, t) for h in range(heads) for r in range(B) for t in range(-(-lengths[r] // 64))}
    found = [(h, r, t) for (_, h, r), tiles in read.items() for t in tiles]
    assert sorted(found) == sorted(needed)
    per_program = [sum(len(t) for (p, _, _), t in read.items() if p == program) for program in range(programs)]
    assert max(per_program) <= max(-(-len(needed) // programs), least)
    assert sum(n > 0 for n in per_program) <= -(-len(needed) // least)
    assert states.keys() == {(h, r) for h, r, _ in needed}
    for (head, row), programs_of in states.items():
        assert programs_of == sorted(p for p, h, r in read if (h, r) == (head, row))


def test_programs_take_a_few_tiles_at_least():
    """Thirteen tiles go to five programs, not to thirteen."""
    request = request_for(filled([704, 1, 33], 704, 1, 64, dtype=BF16), 2, dtype=BF16)
    check(request, config=tuning.GpuConfig(64, 2, 12, least_tiles=3))
    long, short = (request_for(made(n, 2, 64, dtype=BF16), 4, dtype=BF16) for n in (1024, 512))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_decode, "interpreted", lambda platform: False)
        assert [gpu_decode.config_for(r).least_tiles for r in (long, short)] == [2, 1]


@pytest.mark.wrong_types
def test_a_window_costs_a_window():
    read, _ = shared_out([700, 0, 65], 704, 1, 1, Mask(window=100, num_sinks=1))
    assert read == {(0, 0, 0): [0, 9, 10], (0, 0, 2): [0, 1]}


MASKS = [
    Mask(),
    Mask(causal=False),
    Mask(window=1),
    Mask(window=100, num_sinks=70),
    Mask(window=64, num_sinks=1),
    Mask(window=100, num_sinks=3, reach=120),
    Mask(window=30, begin=65, end=256),
    Mask(begin=64, end=64),
]


@pytest.mark.wrong_types
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_rows_in_order_need_not_be_looked_at(mask, tokens):
    """The closed form lists every tile that a look at the positions lists, and says "whole" of no other."""
    lengths = [0, 1, 63, 64, 65, 127, 128, 129, 200, 256, 300, 320]
    # The last tokens ask, and, as users may, earlier ones, some that are to come, and nobody.
    asked = [(n, at) for n in lengths for at in (n - 1, n // 2, n + 70, -1)]
    count, at = (jnp.asarray(x, jnp.int32) for x in zip(*asked, strict=True))
    slot = jnp.arange(320, dtype=jnp.int32)[None]
    positions = jnp.where(slot < count[:, None], slot, -1)[:, None]
    # The last position may come first, and there are pads among them.
    queries = jnp.stack([jnp.where((at < t) | (at % 3 == 1) & (t == 2), -1, at - t) for t in range(tokens)], axis=1)
    seen = mask.reachable(queries, positions)[:, 0].reshape(len(asked), 5, 64)
    query = jnp.zeros((*queries.shape, 6, 1))
    request = types.SimpleNamespace(positions=queries, query=query, view=types.SimpleNamespace(num_kv_heads=2))
    spec = types.SimpleNamespace(chunks=2, cols=8, lanes=32)  # three heads a group, so fifteen columns at most
    columns = gpu_queries.position_columns(request, spec)
    expected = np.full((len(asked), 16), -1)
    expected[:, : 3 * tokens] = np.tile(queries, (1, 3))
    np.testing.assert_array_equal(columns[:, :2, :8].reshape(-1, 16), expected)
    rows = shares.in_order(mask, 64, count, columns[:, 2, 0], columns[:, 2, 1])
    for i, (row, case) in enumerate(zip(np.asarray(seen), asked, strict=True)):
        hole, after, number, run, run_end = (
            int(getattr(rows, name)[i]) for name in ("hole", "after", "count", "run", "run_end")
        )
        listed = [*range(hole), *range(after, after + number - hole)]
        assert len(set(listed)) == len(listed) and set(listed) <= set(range(5)), case
        assert set(listed) >= set(np.nonzero(row.any(axis=1))[0]), case
        # Not one more where there is no `reach`, whose sinks are read all the same.
        assert mask.reach or len(listed) == row.any(axis=1).sum(), case
        assert all(row[t].all() for t in listed if run <= t < run_end), case


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by products of the interpreter
@pytest.mark.parametrize(
    ("store", "size", "page_size", "on", "rule"),
    [
        ("bfloat16", 64, 0, "Hopper", "all"),
        ("bfloat16", 80, 16, "Hopper", "window"),
        pytest.param("bfloat16", 64, 0, "Hopper", "window and sinks", marks=pytest.mark.slow),
        pytest.param("Int8", 64, 0, "Hopper", "window", marks=pytest.mark.slow),
        pytest.param("Int4", 128, 0, "Hopper", "all", marks=pytest.mark.slow),
        pytest.param("Int8", 64, 32, "Hopper", "all", marks=pytest.mark.slow),
        pytest.param("float16", 128, 128, "Hopper", "all", marks=pytest.mark.slow),
        pytest.param("bfloat16", 64, 16, "Blackwell", "all", marks=pytest.mark.slow),
        pytest.param("bfloat16", 112, 0, "Blackwell", "window", marks=pytest.mark.slow),
        pytest.param("bfloat16", 128, 64, "Blackwell", "window and sinks", marks=pytest.mark.slow),
        pytest.param("Float8", 64, 64, "Blackwell", "all", marks=pytest.mark.slow),
        pytest.param("Float8", 64, 0, "Hopper", "window", marks=pytest.mark.slow),
        pytest.param("Float8", 128, 0, "Ampere", "window", marks=pytest.mark.slow),
        pytest.param("Int4", 128, 64, "Blackwell", "window", marks=pytest.mark.slow),
    ],
)
def test_a_bad_value_reaches_those_who_may_attend_to_it(store, size, page_size, on, rule):
    """Channel by channel, as where they ask one by one; some are pads, and a row has nothing."""
    mask = {"all": Mask(), "window": Mask(window=49), "window and sinks": Mask(window=20, num_sinks=11)}[rule]
    by_channel = store in ("bfloat16", "float16")
    # A code has its token's scale: all channels are bad. One query sees neither of these tokens.
    tokens = BAD if by_channel else {98: BAD[98]} if rule == "all" else {98: BAD[98], 48: BAD[50]}
    cache = with_bad_values([100, 0, 70], tokens, slots=128, size=size, page_size=page_size, **STORES[store])
    request = request_for(cache, 4, 4, dtype=BF16, mask=mask)
    pads = jnp.asarray([[by_channel, 0, 0, 0], [0] * 4, [0, 1, 0, 0]], bool)
    positions = jnp.where(pads, -1, request.positions)
    for view in (request.view, dataclasses.replace(request.view, in_order=False)):
        asked = dataclasses.replace(request, positions=positions, view=view)
        with _target.aimed_at(TARGETS[on]):
            assert gpu_decode.unsupported(asked) is None and gpu_decode.hides(asked) == (store != "Float8")
            out, lse, _ = jax.jit(lambda r: api.attend(r, "mosaic_gpu"))(asked)
            one = jax.jit(lambda r: gpu_decode.attend(r)[:2])
            at = lambda t, r=asked: dataclasses.replace(
                r, query=r.query[:, t : t + 1], positions=r.positions[:, t : t + 1]
            )
            alone = [jnp.concatenate(x, axis=1) for x in zip(*(one(at(t)) for t in range(4)), strict=True)]
        np.testing.assert_allclose(out, alone[0], rtol=2e-2, atol=2e-2)
        np.testing.assert_allclose(lse, alone[1], rtol=1e-3)
        bad = ~np.isfinite(np.asarray(out))
        assert bad[0, -1].any() and not bad[1:].any() and not bad[0, 1].all()
        if by_channel:
            kinds = np.isnan, np.isposinf, np.isneginf
            assert all(kind(np.asarray(out)[0, -1]).any() for kind in kinds)


@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(causal=False),
        Mask(window=9),
        Mask(window=9, num_sinks=4),
        Mask(window=9, num_sinks=8, reach=12),
        Mask(window=20, begin=5, end=21),
    ],
    ids=str,
)
def test_queries_are_alike(mask):
    """Of no run of keys it is said that all queries see the same of it where they do not."""
    keys, found = jnp.arange(40, dtype=jnp.int32), set()
    for low, high, first, last in itertools.product((0, 3, 6, 12), (3, 7, 12, 39), (0, 10, 12, 25), (10, 12, 26, 39)):
        if low > high or first > last:
            continue
        allowed = np.asarray(mask.allowed(jnp.arange(first, last + 1, dtype=jnp.int32)[None], keys[None, None]))[0, 0]
        alike = bool(shares.alike(mask, *(jnp.int32(n) for n in (low, high, first, last))))
        found.add(alike)
        assert not alike or (allowed[:, low : high + 1] == allowed[:1, low : high + 1]).all()
    assert found == ({True, False} if mask.causal else {True})


@pytest.mark.parametrize(
    ("query", "several", "window", "loops"),
    [(BF16, False, None, 0), (F32, False, None, 1), (F32, True, None, 0), (F32, True, 9, 1)],
)
def test_no_query_waits_for_others(query, several, window, loops):
    """Where the kernel hides what is not finite itself, or all may see all, nobody is asked once more."""
    request = request_for(filled([100, 0, 33], 136, 2, 64, dtype=BF16), 4, 3, dtype=query, mask=Mask(window=window))
    request = dataclasses.replace(request, of_several=several)
    # Derivatives are one equation, with all in it.
    (call,) = jax.make_jaxpr(lambda r: api.attend(r, "mosaic_gpu"))(request).jaxpr.eqns[-1:]
    assert [eqn.primitive.name for eqn in call.params["call_jaxpr"].jaxpr.eqns].count("while") == loops


@pytest.mark.parametrize("page_size", [0, pytest.param(8, marks=pytest.mark.slow)])
def test_a_ring(page_size):
    """Values of one that has turned, of one that has not, and of an empty one; NaN where there is no token."""
    settings = {"policy": kvattn.SlidingWindow(136), "dtype": BF16}
    if page_size:
        cache = kvattn.PagedKVCache.create(51, 8, 2, 64, batch_size=B, max_pages=17, **settings)
        cache = cache.with_tables(np.random.default_rng(0).permutation(51).reshape(B, 17), [0] * B)
    else:
        cache = kvattn.KVCache.create(B, 2, 64, layout=Layout(136, 136, False), **settings)
    cache = cache.replace(keys=jax.tree.map(worst, cache.keys), values=jax.tree.map(worst, cache.values))
    lengths = np.asarray([136 + 70, 0, 75])
    key, value = (jnp.asarray(np.random.default_rng(n).normal(size=(B, 136, 2, 64)), BF16) for n in range(2))
    slots = np.where(np.arange(136)[None] < lengths[:, None], np.arange(136)[None], -1)
    cache = cache.write(jnp.asarray(slots, jnp.int32), key, value).replace(lengths=jnp.asarray(lengths, jnp.int32))
    for window in (136, 70) if page_size else (70,):
        request = request_for(cache, 4, dtype=BF16, mask=Mask(window=window))
        assert gpu_decode._spec(request, tuning.GpuConfig()).ring == 136
        check(request)


@pytest.mark.parametrize("ring", [1, 63, 64, 200, 256])
@pytest.mark.parametrize(
    "mask", [Mask(), Mask(causal=False), Mask(window=1), Mask(window=70), Mask(window=256)], ids=str
)
def test_rings_need_not_be_looked_at(mask, ring):
    """As above; and the positions are those of the policy."""
    tiles = -(-ring // 64)
    lengths = [0, 1, *(n + ring * turn for n in (0, 1, 30, 63, 64, 65, 128, 190, 199) for turn in (0, 1, 3))]
    asked = [(n, at) for n in lengths for at in (n - 1, n // 2, n - 20, n + 70, -1)]
    count, at = (jnp.asarray(x, jnp.int32) for x in zip(*asked, strict=True))
    policy = kvattn.SlidingWindow(ring)
    positions = jnp.pad(policy.positions((), count, ring), ((0, 0), (0, tiles * 64 - ring)), constant_values=-1)
    slot = jnp.arange(tiles * 64, dtype=jnp.int32)
    reckoned = jnp.stack([shares.position_in_ring(slot, ring, n) for n in count])
    np.testing.assert_array_equal(np.maximum(reckoned, -1), positions)
    seen = mask.allowed(at[:, None], positions[:, None])[:, 0, 0].reshape(len(asked), tiles, 64)
    rows = shares.turned(mask, 64, ring, count, at)
    for i, (row, case) in enumerate(zip(np.asarray(seen), asked, strict=True)):
        hole, after, number, run, run_end = (
            int(getattr(rows, name)[i]) for name in ("hole", "after", "count", "run", "run_end")
        )
        listed = [*range(hole), *range(after, after + number - hole)]
        assert len(set(listed)) == len(listed) and set(listed) <= set(range(tiles)), case
        assert set(listed) == set(np.nonzero(row.any(axis=1))[0]), case
        assert all(row[t].all() for t in listed if run <= t < run_end), case
        assert not row.all() or (run, run_end) == (0, tiles), case


@pytest.mark.parametrize(("batch", "new"), [(0, 1), (2, 0)])
def test_no_rows_or_no_tokens(batch, new):
    layout = Layout(16, 16, False)
    cache = kvattn.KVCache.create(batch, 2, 64, capacity=16, layout=layout)
    request = request_for(made(16, 2, 64, dtype=BF16), 4, want_mass=True)
    query, positions = jnp.zeros((batch, new, 4, 64), BF16), jnp.zeros((batch, new), jnp.int32)
    request = dataclasses.replace(request, query=query, positions=positions, view=cache.view())
    out, lse, mass = gpu_decode.attend(request)
    assert out.shape == (batch, new, 4, 64) and lse.shape == (batch, new, 4) and out.dtype == lse.dtype == F32
    assert mass.shape == (batch, 2, 16) and not mass.any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "codec", "query", "new"),
    [
        (64, None, "float32", 3),
        (80, None, "bfloat16", 1),
        (64, kvattn.Float8(), "float32", 8),
        (128, kvattn.Int4(), "float32", 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("capability", ["8.0", "9.0", "10.0"])
def test_lowered_for_a_gpu(size, codec, query, new, capability):
    """Down to Mosaic's own code, which refuses more than an interpreter: a copy of six dimensions, say."""
    cache = made(64, 1, size, codec=codec, dtype=BF16)
    request = request_for(cache, 4, new, dtype=query)
    # Outside of `interpret`, as it is compiled.
    token = interpreter._INTERPRETED.set(False)
    try:
        with jax.sharding.use_abstract_mesh(mesh_of(Gpu("one", 108, "gpu", capability))):
            lowered = jax.jit(lambda r: gpu_decode.attend(r)).trace(request).lower(lowering_platforms=("cuda",))
    finally:
        interpreter._INTERPRETED.reset(token)
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_steps_are_lowered_under_an_explicit_mesh(capability):
    """A whole step in pages: with the append where there is a copy engine, with tiles that threads copy elsewhere."""
    cache = made(64, 1, 64, codec=kvattn.Int8(), dtype=BF16, page_size=32)
    new = [jnp.ones((B, 1, n, 64), BF16) for n in (2, 1, 1)]
    step = functools.partial(kvattn.cached_attention, implementation="mosaic_gpu")
    token = interpreter._INTERPRETED.set(False)
    try:
        with jax.sharding.use_abstract_mesh(mesh_of(Gpu("one", 108, "gpu", capability), AxisType.Explicit)):
            lowered = jax.jit(step).trace(*new, cache).lower(lowering_platforms=("cuda",))
    finally:
        interpreter._INTERPRETED.reset(token)
    assert lowered.as_text().count("custom_call @mosaic_gpu") == {"8.0": 2, "9.0": 3}[capability]


def test_lengths_are_no_new_program():
    traces = []

    @jax.jit
    def attend(request):
        traces.append(1)
        return gpu_decode.attend(request)

    for lengths in ([10, 0, 72], [72, 72, 72], [0, 0, 0]):
        attend(request_for(filled(lengths, 72, 1, 64, dtype=BF16), 2, dtype=BF16))
    assert len(traces) == 1


def test_what_it_does_not_do_is_said():
    for cache, settings, why in (
        (made(16, 2, 64, dtype=BF16), {"new": 9}, "up to 8 new tokens"),
        (made(16, 2, 64), {}, "float32"),
        (made(16, 2, 64, dtype=BF16), {"key_rope": kvattn.RoPE(64)}, "rotate"),
        (made(16, 2, 72, dtype=BF16), {}, "multiples of 16"),
        (made(16, 2, 32, dtype=BF16), {}, "from 64 to 256"),
        (made(16, 2, 272, dtype=BF16), {}, "from 64 to 256"),
        (made(12, 2, 64, dtype=BF16), {}, "no multiple of 8"),
        (made(128, 2, 128, codec=kvattn.KIVI()), {}, "KIVI"),
        (made(16, 2, 128, codec=kvattn.Int4(24)), {}, "groups of 24"),
        (made(16, 2, 64, dtype=BF16, page_size=4), {}, "pages must have"),
        (made(96, 2, 64, dtype=BF16, page_size=48), {}, "pages must have"),
        (made(16, 2, 64, codec=kvattn.Int8(), page_size=16), {}, "pages of 32 slots"),
        (made(64, 2, 128, codec=kvattn.Int4(), page_size=32), {}, "pages of 64 slots"),
    ):
        request = request_for(cache, 4, dtype=BF16, **settings)
        assert why in gpu_decode.unsupported(request)
        with pytest.raises(errors.UnsupportedError, match="mosaic_gpu"):
            api.attend(request, "mosaic_gpu")
        api.attend(request, ("mosaic_gpu", "xla"))


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128])
def test_pages_that_it_takes(page_size):
    request = request_for(made(page_size, 1, 64, dtype=BF16, page_size=page_size), 2, dtype=BF16)
    assert gpu_decode.unsupported(request) is None


@dataclasses.dataclass(frozen=True)
class Gpu(jax.sharding.AbstractDevice):
    """One that says what it can do."""

    compute_capability: str


def mesh_of(device, kind=AxisType.Auto):
    return jax.sharding.AbstractMesh((1,), ("one",), axis_types=(kind,), abstract_device=device)


@pytest.mark.parametrize(
    ("kind", "said", "why"),
    [
        ("NVIDIA H100", None, None),
        ("NVIDIA B200", None, None),
        ("Tesla V100", None, "this GPU has 7.0"),
        ("NVIDIA A100-SXM4-80GB", None, "attribute compute_capability = '8.0'"),
        ("NVIDIA A100-SXM4-80GB", "8.0", None),
        ("unheard of", "7.5", "this GPU has 7.5"),
        ("unheard of", "10.9", None),
        ("NVIDIA GeForce RTX 5090", None, "nothing for compute capability 12.0 yet"),
        ("unheard of", None, None),
    ],
)
def test_which_gpus_it_takes(kind, said, why, monkeypatch):
    """What cannot run is refused by name when asked for, and passed over when not."""
    monkeypatch.setattr(gpu_decode, "interpreted", lambda platform: False)
    device = (kind, 108, "gpu")
    request = request_for(made(64, 2, 64, dtype=BF16), 4, dtype=BF16)
    with jax.sharding.use_abstract_mesh(mesh_of(Gpu(*device, said) if said else jax.sharding.AbstractDevice(*device))):
        reason = gpu_decode.unsupported(request)
        assert (reason is None) == (why is None) and (why or "") in (reason or "")
        if why is not None:
            with pytest.raises(errors.UnsupportedError, match="mosaic_gpu"):
                jax.eval_shape(lambda r: api.attend(r, "mosaic_gpu"), request)
            jax.eval_shape(lambda r: api.attend(r, ("mosaic_gpu", "xla")), request)


def test_ways_of_gpus(monkeypatch):
    """Which unit, who copies, how much fits, what is said of sizes that do not."""
    monkeypatch.setattr(gpu_decode, "interpreted", lambda platform: False)
    request = request_for(made(1024, 2, 128, dtype=BF16), 8, dtype=BF16)
    keys = set()
    for on, unit, by_threads, config in (
        ("Hopper", "wgmma", False, (3, 2)),
        ("Blackwell", "mma", False, (3, 2)),
        ("Ampere", "mma", True, (2, 2)),
        ("L4", "mma", True, (2, 1)),
        ("unheard of", "mma", False, (2, 1)),
    ):
        with _target.aimed_at(TARGETS[on]):
            chosen = gpu_decode.config_for(request)
            spec = gpu_decode._spec(request, chosen)
            assert (spec.unit, spec.by_threads, (chosen.stages, chosen.blocks_per_sm)) == (unit, by_threads, config), on
            assert gpu_spec.shared_bytes(spec) * chosen.blocks_per_sm <= gpu_ways.shared_bytes()
            keys.add(gpu_decode.key(request))
            by_mma = tuning.GpuConfig(unit="mma", stages=2, blocks_per_sm=1)
            assert gpu_decode._spec(request, by_mma).unit == "mma" and gpu_decode.fits(request, by_mma)
            by_wgmma = dataclasses.replace(by_mma, unit="wgmma")
            assert gpu_decode.fits(request, by_wgmma) == (on == "Hopper")
            if on != "Hopper":
                with pytest.raises(errors.UnsupportedError, match="take unit='mma'"):
                    gpu_decode.attend(request, by_wgmma)
    assert len(keys) == 3
    for on, cache, why in (
        ("L4", made(64, 2, 256, dtype=BF16), "of shared memory"),
        ("Blackwell", made(64, 2, 256, dtype=BF16), None),
        ("L4", made(40, 2, 80, dtype=BF16), "rows of 160 bytes in caches of 40 slots"),
        ("Blackwell", made(40, 2, 80, dtype=BF16), None),
        ("Ampere", made(64, 2, 80, dtype=BF16, page_size=16), "rows of 160 bytes in pages of 16"),
        ("Ampere", made(64, 2, 80, dtype=BF16, page_size=32), None),
        ("Ampere", made(40, 2, 64, dtype=BF16), None),
        ("Ampere", made(40, 2, 64, codec=kvattn.Int8()), "rows of 64 bytes"),
        ("unheard of", made(64, 2, 256, dtype=BF16), "of shared memory"),
    ):
        with _target.aimed_at(TARGETS[on]):
            reason = gpu_decode.unsupported(request_for(cache, 4, dtype=BF16))
        assert (reason is None) == (why is None) and (why or "") in (reason or ""), (on, reason)
    with pytest.raises(errors.ConfigError, match="unit must be"):
        tuning.GpuConfig(unit="tcgen05")


@pytest.mark.wrong_types  # nobody gets as far as looking at them
def test_threads_append_nothing():
    with _target.aimed_at(TARGETS["L4"]):
        assert "since Hopper" in gpu_append.unsupported(None, None)


class Anything:
    """Memory of which nobody looks at the numbers."""

    shape = (64,)

    def __init__(self):
        self.at = self

    def __getitem__(self, _):
        return self

    def __setitem__(self, *_):
        pass


@pytest.mark.wrong_types  # stand-ins for the kernel's own memory
@pytest.mark.parametrize(("rows", "stages"), [(200, 2), (256, 3), (256, 4)])
def test_threads_wait_for_their_own_copies(rows, stages, monkeypatch):
    """No tile is read before it is there, and the others stay on their way: the lines that no interpreter runs."""
    groups, waited, now = [], [], [0]

    def wait(n):
        """All but the last n copies are done."""
        waited.append(n)
        for group in groups[: len(groups) - n]:
            group["done"] = True

    monkeypatch.setattr(plgpu, "wait_gmem_to_smem", wait)
    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", lambda *_, **__: groups.append({"tile": now[0], "done": False}))
    for name in ("barrier_arrive", "barrier_wait"):
        monkeypatch.setattr(plgpu, name, lambda *_: None)
    monkeypatch.setattr(plgpu, "load", lambda *_, **__: None)
    cache = filled([rows, 0, 65], rows, 2, 64, dtype=BF16)
    request = request_for(cache, 4, dtype=BF16)
    with _target.aimed_at(TARGETS["Ampere"]):
        spec = gpu_decode._spec(request, tuning.GpuConfig(stages=stages))
    spec = dataclasses.replace(spec, interpreted=False)
    memory = {"counts": request.view.counts, "at": request.positions[:, 0]}
    memory |= {name: Anything() for name in ("query", "k_data", "v_data")}
    per_row = [-(-rows // 64), 0, 2]
    last = 2 * B - 1
    bounds = tuple(jnp.int32(n) for n in (0, 0, last, per_row[-1]))
    shared = {name: Anything() for name in ("query", "raw", "k_data", "v_data", "full")}
    with jax.disable_jit():
        walk = gpu_walk.Walk(spec, memory, bounds)
        fetcher = gpu_threads.ThreadFetcher(spec, memory, shared, walk)
        cursor = fetcher._into(walk.start, jnp.int32(0), jnp.int32(0))
        count = 2 * sum(per_row)
        for _ in range(stages):
            cursor, now[0] = fetcher.fetched(cursor), now[0] + 1
        for tile in range(count):
            fetcher.wait_for_tile(cursor)
            mine = [group for group in groups if group["tile"] == tile]
            assert len(mine) == gpu_threads.copies(spec) and all(group["done"] for group in mine)
            if tile + stages < count:  # as long as there is more to fetch
                assert not any(group["done"] for group in groups if group["tile"] > tile)
            cursor, now[0] = fetcher.fetched(cursor), now[0] + 1
    assert len(groups) == count * gpu_threads.copies(spec) and len(waited) == count
    assert gpu_threads.copies(spec) == (16 if rows == 200 else 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_is_not_left_to_the_compiler(kind):
    """Outside `jax.shard_map` the kernel is passed over, and says so; inside it runs."""
    mesh = jax.make_mesh((1, 2), ("one", "two"), axis_types=(kind, kind))
    request = request_for(made(16, 2, 64, dtype=BF16), 4, dtype=BF16)
    attend = lambda r: api.attend(r, "mosaic_gpu")[:2]
    with jax.set_mesh(mesh):
        with pytest.raises(errors.UnsupportedError, match=r"mesh axes \(two\).*shard_map"):
            attend(request)
        assert api.choose(request, ("mosaic_gpu", "xla"))[0] == "xla"
        everywhere = jax.sharding.PartitionSpec()
        mapped = jax.shard_map(attend, in_specs=everywhere, out_specs=everywhere, check_vma=False)
        assert jax.eval_shape(mapped, request)[0].shape == request.query.shape


def test_pages_as_tpus_like_them():
    request = request_for(made(16, 1, 64, dtype=BF16, page_size=16, platform="tpu"), 2, dtype=BF16)
    assert "side by side" in gpu_decode.unsupported(request)


def test_outputs_are_written_as_the_caller_gets_them():
    request = request_for(filled([70, 0, 33], 96, 1, 64, dtype=BF16), 8, dtype=BF16)
    out = jax.jit(lambda request: api.attend(request, "mosaic_gpu")[0])
    wide, narrow = (out(dataclasses.replace(request, out_dtype=dtype)) for dtype in (None, BF16))
    assert (wide.dtype, narrow.dtype) == (F32, BF16)
    np.testing.assert_array_equal(np.float32(narrow), np.float32(wide.astype(BF16)))


def test_only_what_nothing_is_done_to_is_rounded():
    """Not what sinks, or attention to other tokens, are still to be merged with."""
    seen = []
    toy = lambda request: seen.append(request.out_dtype) or api.attend(request, "xla")
    kernel = types.SimpleNamespace(unsupported=lambda request: None, attend=toy)
    attend.register(attend.Implementation("toy", lambda: kernel))
    x, sinks = jnp.ones((B, 1, 2, 64), BF16), jnp.ones((2,), F32)
    try:
        for policy, given in ((kvattn.Full(), {}), (kvattn.Full(), {"sinks": sinks}), (kvattn.StreamingLLM(2, 6), {})):
            cache = kvattn.KVCache.create(B, 2, 64, capacity=8, policy=policy)
            step = functools.partial(kvattn.cached_attention, implementation="toy", **given)
            assert jax.eval_shape(step, x, x, x, cache)[0].dtype == BF16
    finally:
        attend.unregister("toy")
    assert seen == [BF16, None, None, None]


def test_copies_land_on_aligned_addresses():
    """In shared memory a copy begins at a multiple of 128 bytes, on the device at one of 16. No interpreter looks."""
    shapes, pages = ("GQA", "MQA of 71 heads", "heads of 80", "heads of 96"), (0, 8, 32, 64)
    asked, looked_at = (("bfloat16", 1), ("float32", 8)), 0
    for shape, store, page_size, (query, new) in itertools.product(shapes, STORES, pages, asked):
        slots, num_heads, heads, size = SHAPES[shape]
        specs = []

        def look():
            cache = made(eights(slots), heads, size, page_size=page_size, **STORES[store])  # noqa: B023
            request = request_for(cache, num_heads, new, dtype=QUERIES[query])  # noqa: B023
            if gpu_decode.unsupported(request) is None:
                specs.append(gpu_decode._spec(request, tuning.GpuConfig()))  # noqa: B023

        jax.eval_shape(look)
        if not specs:
            continue
        (spec,) = specs
        looked_at += 1
        for name, buffer in gpu_spec.scratch(spec).items():
            if isinstance(buffer, plgpu.Barrier) or name in ("factor", "sums", "keys"):
                continue
            stride = int(np.prod(buffer.shape[1:])) * jnp.dtype(buffer.dtype).itemsize
            assert stride % 128 == 0, f"{name} of {shape}, {store}: {stride} bytes"
        for stream in spec.streams:
            row = jnp.dtype(stream.dtype).itemsize * (1 if stream.tokens_last else stream.features)
            assert spec.pages == 1 or row * page_size % 128 == 0, f"{stream.name}, pages of {page_size}"
            assert stream.tokens_last or row % 16 == 0, f"{stream.name}: rows of {row} bytes"
    assert looked_at == 136, "of 192; the others are refused"


def test_too_few_threads_are_said_not_waited_for(monkeypatch):
    monkeypatch.setattr(gpu_decode.jax, "local_device_count", lambda: 1)
    monkeypatch.setenv("NPROC", "2")
    request = request_for(made(16, 2, 64, dtype=BF16), 4, dtype=BF16)
    with pytest.raises(errors.UnsupportedError, match="NPROC=8"):
        api.attend(request, "mosaic_gpu")
    monkeypatch.setenv("NPROC", "4")
    assert gpu_decode.unsupported(request) is None


# Sizes ----------------------------------------------------------------------------------------------------------------


def test_sizes(tmp_path, monkeypatch):
    """By rule all fits; a table is taken where there is one; files are read back; nonsense is refused."""
    monkeypatch.setattr(gpu_decode, "interpreted", lambda platform: False)
    for size, codec, dtype in itertools.product((64, 128, 256), (None, kvattn.Int8(), kvattn.Int4()), (BF16, F32)):
        request = request_for(made(64, 1, size, dtype=BF16, codec=codec), 8, 8, dtype=dtype)
        assert gpu_decode.fits(request, gpu_decode.config_for(request))
    # Long tiles for codes, if each program has two of them and pages allow.
    for slots, page_size, codec, expected in (
        (65536, 0, kvattn.Int8(), (128, 2)), (65536, 0, kvattn.Int4(), (128, 2)), (65536, 0, None, (64, 2)),
        (16384, 0, kvattn.Int8(), (64, 3)), (65536, 64, kvattn.Int8(), (128, 2)), (65664, 192, kvattn.Int8(), (64, 3)),
    ):  # fmt: skip
        found = []

        def look():
            cache = made(slots, 1, 128, dtype=BF16, codec=codec, page_size=page_size)  # noqa: B023
            found.append(gpu_decode.config_for(request_for(cache, 4, dtype=BF16)))  # noqa: B023

        jax.eval_shape(look)
        assert (found[0].tile, found[0].blocks_per_sm) == expected, (slots, page_size, codec)
    # Three programs of a multiprocessor have 168 registers each: `make kernels-aot` says how many there are.
    for codec, dtype, size, new, blocks in (
        (None, BF16, 128, 1, 2),
        (None, F32, 128, 1, 2),
        (kvattn.Int8(), BF16, 128, 2, 3),
        (kvattn.Int8(), BF16, 128, 4, 2),
        (kvattn.Int8(), BF16, 256, 1, 1),
        (kvattn.Int4(), BF16, 128, 1, 3),
        (kvattn.Float8(), F32, 128, 1, 2),
    ):
        request = request_for(made(64, 1, size, dtype=BF16, codec=codec), 4, new, dtype=dtype)
        assert gpu_decode.config_for(request).blocks_per_sm == blocks, (codec, dtype, size, new)
    request = request_for(made(64, 1, 128, dtype=BF16), 8, dtype=BF16)
    table, seconds = tuning.measure(
        lambda config, r: jnp.zeros(()) if config.stages == 2 else 1 / 0,
        gpu_decode.key(request),
        [tuning.GpuConfig(64, 2), tuning.GpuConfig(64, 4)],
        request,
        2,
        None,
    )
    assert list(seconds) == [tuning.GpuConfig(64, 2)]
    assert table == {gpu_decode.key(request): tuning.GpuConfig(64, 2)}
    tuning.save(tmp_path / "table.json", table)
    tuning.use(tmp_path / "table.json")
    try:
        assert gpu_decode.config_for(request) == tuning.GpuConfig(64, 2)
    finally:
        tuning.use(None)
    assert gpu_decode.config_for(request) != tuning.GpuConfig(64, 2)
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(errors.ConfigError, match=r"table.json"):
        tuning.use(tmp_path / "table.json")
    with pytest.raises(errors.ConfigError, match="multiple of 128"):
        tuning.TpuConfig(most_rows=100)
    for sizes in ((32, 2, 1), (64, 1, 1), (64, 2, 0)):
        with pytest.raises(errors.ConfigError, match="multiple of 64"):
            tuning.GpuConfig(*sizes)
    with pytest.raises(errors.ConfigError, match="least_tiles"):
        tuning.GpuConfig(least_tiles=0)
    with pytest.raises(errors.ConfigError, match="none of 1"):
        tuning.measure(lambda *_: 1 / 0, "", [tuning.GpuConfig()], request, 2, None)
    with pytest.raises(errors.UnsupportedError, match="no kernel to tune"):
        tuning.tune(request.query, made(64, 1, 128, dtype=BF16))


def test_tiles_of_128():
    cache = filled([200, 0, 70], 200, 2, 64, dtype=BF16)
    request = request_for(cache, 4, dtype=F32)
    outs = [jax.jit(lambda r, c=c: gpu_decode.attend(r, c)[0])(request) for c in (tuning.GpuConfig(128, 2, 1), None)]
    np.testing.assert_allclose(*outs, atol=2e-6)


# Planted faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["full", "query_full", "one too many"])
def test_a_missing_barrier_is_found(fault, monkeypatch, capsys):
    """Without a wait what is computed overtakes its copies, or they overtake it: the interpreter sees a race."""
    compute, filled_ring = gpu_body.compute, gpu_fetch.Fetcher.filled
    wait, ignored = plgpu.barrier_wait, []

    def faulty(spec, memory, shared, program):
        ignored.append(shared[fault])
        return compute(spec, memory, shared, program)

    def one_too_many(fetcher):
        cursor = filled_ring(fetcher)
        return dataclasses.replace(fetcher.fetched(cursor), slot=cursor.slot)

    if fault == "one too many":
        monkeypatch.setattr(gpu_fetch.Fetcher, "filled", one_too_many)
    else:
        monkeypatch.setattr(gpu_body, "compute", faulty)
        monkeypatch.setattr(
            plgpu, "barrier_wait", lambda ref: None if any(ref.ref is x for x in ignored) else wait(ref)
        )
    try:
        # Eight tiles to a program, and a segment that follows another. Queries are looked at before the matrix unit
        # reads them, of which the interpreter keeps no account.
        dtype = F32 if fault == "query_full" else BF16
        request = request_for(filled([700, 0, 301], 704, 1, 64, dtype=BF16), 2, dtype=dtype)
        check(request, config=tuning.GpuConfig(64, 2, 1))
        said = ""
    except Exception as error:
        said = str(error)
    # Older versions of JAX print it, and may go on.
    assert "RACE DETECTED" in said + capsys.readouterr().out


@pytest.mark.parametrize(("size", "codec"), [(64, kvattn.Float8()), (80, None)], ids=str)
def test_values_are_masked_where_tiles_are_not_whole(size, codec, monkeypatch):
    """Values that are written once more are masked on the edges only: an edge said to be whole lets NaN in."""
    request = request_for(filled([100, 0, 37], 104, 1, size, dtype=BF16, codec=codec), 2, dtype=BF16)
    check(request)
    for module, name in ((gpu_decode, "survey"), (shares, "in_order")):
        rows_of = getattr(shares, name)
        every = lambda *a: dataclasses.replace(rows := rows_of(*a), run=rows.run * 0, run_end=rows.run_end + 9)  # noqa: B023
        looked_at = dataclasses.replace(request, view=dataclasses.replace(request.view, in_order=name == "in_order"))
        with monkeypatch.context() as patch:
            patch.setattr(module, name, every)
            with pytest.raises(AssertionError, match="not finite"):
                check(looked_at)


def test_planted_faults(monkeypatch):
    """A tile said to be whole lets NaN in; a lost tile, a lost state and a wrong split are seen."""
    cache = filled([200, 0, 101], 200, 2, 64, dtype=BF16)
    request = request_for(cache, 4, dtype=F32)

    in_order = shares.in_order

    def rows_with(**changes):
        def faulty(*args):
            rows = in_order(*args)
            return dataclasses.replace(rows, **{n: f(getattr(rows, n)) for n, f in changes.items()})

        return faulty

    def another_column(*args):
        segment, column = column_of(*args)
        return segment, 1 - column

    column_of = gpu_merge.column_of
    for target, name, fault in (
        (shares, "in_order", rows_with(run_end=lambda x: x + 9, run=lambda x: x * 0)),
        (shares, "in_order", rows_with(count=lambda x: jnp.maximum(x - 1, 0))),
        (gpu_merge, "column_of", another_column),
        (gpu_walk.Segment, "is_last", gpu_walk.Segment.is_first),
        (gpu_tile, "split", lambda x, dtype, parts: [x.astype(dtype)] * parts),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fault)
            with pytest.raises(AssertionError):
                check(request)
    check(request)
