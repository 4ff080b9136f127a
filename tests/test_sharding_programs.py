"""What compiled steps exchange, what they keep where, and that they update it in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharding_cases import (
    GQA,
    KINDS,
    MHA,
    MQA,
    ROPE,
    SCHEMES,
    SETTINGS,
    B,
    H,
    N,
    calls,
    check_equal,
    kinds,
    make,
    mesh_of,
    one_device,
    sharded_step,
    tokens,
)

import kvattn
from kvattn import sharding


def compiled(mesh, by, cache, num_kv_heads, length=1, num_heads=N, real_heads=None):
    """A decode step, its new tokens as projections leave them."""
    split = num_heads % mesh.shape["model"] == 0 and by != "sequence"
    rows = "data" if "data" in mesh.axis_names else None
    put = lambda x, heads: jax.device_put(x, NamedSharding(mesh, P(rows, None, heads)))
    new = tokens(0, length, num_kv_heads, num_heads)
    new = put(new[0], "model" if split else None), *(put(x, None) for x in new[1:])
    step = sharded_step(mesh, by, num_heads=real_heads)
    return step.lower(*new, cache, np.full(B, length, np.int32)).compile()


REDUCTIONS = ["all-reduce", "all-reduce"]
"""One maximum; sums and outputs together."""
EXCHANGED = (
    ("full", MHA, "heads", (8,), []),
    ("h2o", GQA, "heads", (8,), ["all-reduce"]),
    ("full", MQA, "batch", (8,), ["all-to-all"] * 2),
    ("full", GQA, "sequence", (8,), REDUCTIONS),
    ("h2o", GQA, "sequence", (8,), ["all-gather", *REDUCTIONS]),
)
MORE_EXCHANGED = (
    ("full", GQA, "heads", (8,), []),
    ("h2o", MQA, "batch", (2, 4), ["all-to-all"] * 2),
    ("int8", GQA, "batch", (8,), ["all-to-all"] * 2),
    ("int8", MQA, "sequence", (8,), REDUCTIONS),
    ("streaming", GQA, "sequence", (2, 4), REDUCTIONS),
    ("window", MHA, "sequence", (8,), REDUCTIONS),
    ("scissorhands", GQA, "sequence", (8,), ["all-gather", *REDUCTIONS]),
    ("full", MQA, "replicated", (8,), []),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "num_kv_heads", "by", "shape"),
    [("h2o", MHA, "heads", (2, 4)), ("full", MQA, "batch", (1, 8)), ("int8", GQA, "sequence", (8,))],
)
def test_a_decode_loop_is_one_program(name, num_kv_heads, by, shape, kind):
    """What a step returns lies where its argument lay, in the same words: nothing is looked up or compiled again."""
    mesh = mesh_of(kind, shape)
    cache = sharding.shard_cache(make(num_kv_heads, **SETTINGS[name]), mesh, by=by)
    step = sharded_step(mesh, by)
    for i in range(3):
        before = jax.tree.map(lambda x: x.sharding, cache)
        _, cache = step(*tokens(i, 1, num_kv_heads), cache, np.ones(B, np.int32))
        assert jax.tree.map(lambda x: x.sharding, cache) == before
    shapes = jax.eval_shape(lambda: cache)
    assert sharding.cache_sharding(shapes, mesh, by=by) == before


@pytest.mark.parametrize(("name", "num_kv_heads", "by", "shape", "expected"), EXCHANGED)
def test_what_a_decode_step_exchanges(name, num_kv_heads, by, shape, expected):
    check_exchanged(name, num_kv_heads, by, shape, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_kv_heads", "by", "shape", "expected"), MORE_EXCHANGED)
def test_what_other_decode_steps_exchange(name, num_kv_heads, by, shape, expected):
    check_exchanged(name, num_kv_heads, by, shape, expected)


def check_exchanged(name, num_kv_heads, by, shape, expected):
    """The collectives, how large they are, that the cache is updated in place, and the bytes of each device."""
    mesh = mesh_of("auto", shape)
    cache = sharding.shard_cache(make(num_kv_heads, **SETTINGS[name]), mesh, by=by)
    program = compiled(mesh, by, cache, num_kv_heads)
    assert kinds(program) == expected
    # A token of every query head and its sum; what a policy must see of every slot.
    largest = B * N * (H + 1) * 4
    if cache.policy.needs_mass:
        largest = max(largest, B * num_kv_heads * (cache.num_slots + 8) * 4)
    assert all(c.nbytes <= largest for c in sharding.collectives(program)), sharding.collectives(program)

    of_device = [sum(x.addressable_shards[d].data.nbytes for x in jax.tree.leaves(cache)) for d in range(8)]
    assert set(of_device) == {sharding.bytes_per_device(cache, mesh, by=by)}
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == of_device[0], "the cache is not donated as a whole"


@pytest.mark.parametrize(("num_kv_heads", "by"), SCHEMES)
def test_bytes_are_those_of_the_formula(num_kv_heads, by):
    """Keys and values: 2 H itemsize per slot and head, each scheme its share; beside them two int32 per row."""
    slots, mesh = 48, mesh_of("auto")
    size = 2 * H * 4
    expected = {
        "heads": B * slots * max(num_kv_heads / 8, 1) * size + B * 8,
        "batch": B / 8 * slots * num_kv_heads * size + B / 8 * 8,
        "sequence": B * (slots / 8) * num_kv_heads * size + B * 8,
    }
    cache = sharding.shard_cache(make(num_kv_heads, capacity=slots), mesh, by=by)
    assert sum(x.addressable_shards[3].data.nbytes for x in jax.tree.leaves(cache)) == expected[by]
    assert sharding.bytes_per_device(make(num_kv_heads, capacity=slots), mesh, by=by) == expected[by]
    told = sharding.explain(N, num_kv_heads, B, 8, head_dim=H, num_slots=slots, dtype=jnp.float32)
    assert told.bytes_per_device[by] == expected[by] - (B if by != "batch" else B / 8) * 8


@pytest.mark.parametrize("kind", ["explicit", pytest.param("auto", marks=pytest.mark.slow)])
def test_no_copy_of_the_cache(kind):
    """Large enough that one would show: temporary memory stays far below a device's part."""
    mesh = mesh_of(kind)
    shapes = {"heads": MHA, "batch": MQA, "sequence": GQA}
    for by, num_kv_heads in shapes.items():
        make_it = lambda: make(num_kv_heads, capacity=8192, layout=kvattn.cache.Layout(8192, 128, True))  # noqa: B023
        cache = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(make_it),
            sharding.cache_sharding(jax.eval_shape(make_it), mesh, by=by),
        )
        memory = compiled(mesh, by, cache, num_kv_heads).memory_analysis()
        own = sharding.bytes_per_device(cache, mesh, by=by)
        assert memory.alias_size_in_bytes == own
        assert memory.temp_size_in_bytes < 0.25 * own, f"{by}: {memory.temp_size_in_bytes} of {own}"


@pytest.mark.parametrize("kind", ["explicit", pytest.param("auto", marks=pytest.mark.slow)])
def test_falcon_has_71_heads(kind):
    """72 in the projections, the last without weight: two all-to-alls, one all-reduce after the output projection."""
    mesh, real, given = mesh_of(kind), 71, 72
    expected, _ = one_device("full", MQA, 2, real)
    cache = sharding.shard_cache(make(MQA, **SETTINGS["full"]), mesh, by="batch")
    rng = np.random.default_rng(0)
    w_out = rng.normal(size=(given, H, 4)).astype(np.float32)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    w_out = put(w_out, P("model"))
    where = NamedSharding(mesh, P()) if kind == "explicit" else None

    def step(q, k, v, cache, num_new, w_out):
        settings = {"num_new": num_new, "mesh": mesh, "by": "batch", "num_heads": real, "rope": ROPE}
        out, cache = sharding.cached_attention(q, k, v, cache, **settings)
        assert out.shape[2] == given
        projected = jnp.einsum("btnh,nhd->btd", out, w_out, out_sharding=where)
        return (out, projected), cache

    step = kvattn.jit(step)
    for i, (new, num_new) in enumerate(calls(MQA, 2, real)):
        query = put(np.concatenate([new[0], np.full_like(new[0][:, :, :1], 7)], axis=2), P(None, None, "model"))
        arguments = query, *(put(x, P()) for x in new[1:]), cache, num_new, w_out
        if i == 2:
            assert kinds(step.lower(*arguments).compile()) == ["all-reduce", "all-to-all", "all-to-all"]
        (out, projected), cache = step(*arguments)
        out = np.asarray(out)
        np.testing.assert_allclose(out[:, :, :real], expected[i], atol=1e-5)
        assert (out[:, :, real:] == 0).all()
        np.testing.assert_allclose(
            projected, np.einsum("btnh,nhd->btd", expected[i], np.asarray(w_out)[:real]), atol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("by", ["batch", "sequence", "replicated"])
@pytest.mark.parametrize("kind", KINDS)
def test_71_heads_are_filled_up(by, kind):
    check_equal("full", MQA, by, kind, 3, num_heads=71)


def test_one_in_several_fusions_counts_once():
    """TPUs write an exchange that runs beside other work into each of the fusions it runs beside."""
    line = '%a.{} = bf16[64,1024]{{1,0}} all-gather(%p), channel_id={}, frontend_attributes={{chain_id="{}"}}'
    beside = [line.format(i, 9, 0) for i in range(4)]
    plain = "%p.{} = f32[8]{{0}} all-reduce(%x), channel_id=1, to_apply=%add"  # of one channel, and two
    text = "\n".join([*beside, line.format(4, 10, 0), line.format(5, 9, 1), plain.format(0), plain.format(1)])
    found = sharding.collectives(text)
    assert [(c.kind, c.nbytes) for c in found] == [("all-gather", 2 * 64 * 1024)] * 3 + [("all-reduce", 32)] * 2
