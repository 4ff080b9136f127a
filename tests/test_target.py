"""The target decides, not the host: layouts and kernels follow the platform that a program is made for."""

import functools
import re
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kvattn
from kvattn import _target, attend
from kvattn.attend import api, late
from kvattn.cache import Layout
from kvattn.errors import ConfigError, UnsupportedError
from kvattn.layers import MultiQueryAttention, caching, linen

SLOTS, SIZE = 512, 64
H200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
V5E = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
TPU_LAYOUT, GPU_LAYOUT = Layout(300, 384, False), Layout(300, 304, False)
KERNELS = {"cuda": ("mosaic_gpu", "mosaic_gpu_v2"), "tpu": ("mosaic_tpu", "tpu_custom_call")}
UNCHECKED = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu", "mosaic_gpu_v2")]


def mesh_of(device):
    return jax.sharding.AbstractMesh((1,), ("one",), abstract_device=device)


def create(**options):
    return kvattn.KVCache.create(2, 2, SIZE, **{"capacity": 300, **options})


def tokens(dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (2, 1, heads, SIZE), dtype) for key, heads in zip(keys, (4, 2, 2), strict=True)]


def calls(cache, platform, implementation=None):
    """The kernels in a step that is exported for a platform."""
    step = jax.jit(functools.partial(kvattn.cached_attention, implementation=implementation))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache)
    program = jax.export.export(step, platforms=[platform], disabled_checks=UNCHECKED)(*jax.eval_shape(tokens), shapes)
    return re.findall(r"custom_call @(\w+)\(", program.mlir_module())


# Who says it -------------------------------------------------------------------------------------


def test_the_mesh_and_the_default_device_say_it():
    layout = lambda **options: jax.eval_shape(lambda: create(**options)).layout
    assert layout().transposed_keys  # as CPUs like it
    with jax.sharding.use_abstract_mesh(mesh_of(V5E)):
        assert layout() == TPU_LAYOUT
        assert attend.registry.made_for() == ("mosaic_tpu",)
        with jax.default_device("cpu"):
            assert layout() == TPU_LAYOUT
    with jax.sharding.use_abstract_mesh(mesh_of(H200)):
        assert _target.current() == _target.Target("cuda", "NVIDIA H200", 132)
        assert layout() == GPU_LAYOUT
        assert layout(platform="cpu") == Layout.best(300, 128, "cpu", SIZE)
    for device in ("cpu", jax.devices()[1]):
        with jax.default_device(device):
            assert _target.platform() == "cpu"


def test_a_platform_that_is_named():
    assert create(platform="tpu").layout == TPU_LAYOUT
    assert create(platform="cuda").layout == create(platform="rocm").layout == GPU_LAYOUT
    assert create(platform="tpu").platform == "tpu" and create().platform is None
    pool = functools.partial(kvattn.PagedKVCache.create, 4, 16, 2, SIZE, batch_size=2, max_pages=2)
    assert pool(platform="tpu").platform == "tpu"
    # Eight-bit floats are bits on CPUs only.
    for make in (create, pool):
        assert make(codec=kvattn.Float8(), platform="cuda").keys["data"].dtype == jnp.float8_e4m3fn
        assert make(codec=kvattn.Float8()).keys["data"].dtype == jnp.uint8
    key = jnp.ones((2, 300, 2, SIZE))
    assert kvattn.KVCache.from_encoder(key, key, platform="cuda").layout == GPU_LAYOUT
    host = create(memory_kind="pinned_host", platform="cuda").layout
    assert (host.rows, host.transposed_keys) == (304, False)
    for wrong in ("gpu", "TPU", 1):
        with pytest.raises(ConfigError, match=r"platform.*'cuda'"):
            create(platform=wrong)
        with pytest.raises(ConfigError, match=r"platform.*'cuda'"):
            pool(platform=wrong)


def test_layers_and_models_pass_it_on():
    layer = MultiQueryAttention(num_heads=2, in_features=128, rngs=nnx.Rngs(0))
    twin = linen.MultiQueryAttention(num_heads=2, head_dim=SIZE)
    for each in (layer, twin):
        assert each.make_cache(2, 300, platform="tpu").layout == TPU_LAYOUT
        assert each.make_paged_cache(4, 16, batch_size=2, max_length=32, platform="tpu").platform == "tpu"
    x = jnp.ones((2, 300, 128))
    assert layer.make_cross_cache(x, platform="tpu").layout == TPU_LAYOUT
    variables = twin.init(jax.random.key(0), x)
    assert twin.apply(variables, x, method="make_cross_cache", platform="tpu").layout == TPU_LAYOUT
    latent = dict(num_heads=2, in_features=32, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    latent = kvattn.layers.MultiHeadLatentAttention(**latent, rngs=nnx.Rngs(0))
    assert latent.make_cache(1, 300, platform="cuda").platform == "cuda"
    config = kvattn.models.DecoderConfig(
        vocab_size=8, model_dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=SIZE, mlp_dim=8
    )
    model = kvattn.models.Decoder(config, rngs=nnx.Rngs(0))
    assert [cache.layout for cache in model.make_cache(1, 300, platform="tpu")] == [TPU_LAYOUT] * 2
    paged = model.make_paged_cache(4, 16, batch_size=1, max_length=32, platform="tpu")
    assert [cache.platform for cache in paged] == ["tpu"] * 2


@pytest.mark.wrong_types
@pytest.mark.parametrize(("device", "rows"), [(V5E, 1024), (H200, 512)])
def test_sharded_caches(device, rows):
    """By sequence each device's share is laid out for the mesh's devices."""
    mesh = jax.sharding.AbstractMesh((8,), ("model",), abstract_device=device)
    arrange = functools.partial(kvattn.sharding.arrange, mesh=mesh, by="sequence")
    cache = create(capacity=512, layout=Layout(512, 512, False))
    assert jax.eval_shape(arrange, cache).layout.rows == rows
    assert jax.eval_shape(arrange, cache.replace(platform="tpu")).layout.rows == 1024

    # What a layer makes on its mesh. There are no such devices to put it on.
    settings = types.SimpleNamespace(mesh=mesh, axis="model", by="sequence", num_kv_heads=2)
    made = []
    with pytest.raises(ValueError, match="mesh"):
        caching._placed(settings, lambda: made.append(_target.platform()) or create(), 2)
    assert made[0] == _target.Target.of_device(device).platform


# When it is decided ------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", KERNELS)
def test_exported_on_a_cpu(platform):
    """Kernels are in programs for what they are made for, and in no others."""
    name, call = KERNELS[platform]
    mine, plain = create(platform=platform), create(layout=TPU_LAYOUT)
    for cache, implementation in ((mine, None), (plain, (name, "xla"))):
        found = calls(cache, platform, implementation)
        assert set(found) == {call}
        assert len(found) == 3  # TPU: keys, values, attention; GPU: both and all else, attention, the merge
    assert calls(mine, "cpu") == calls(plain, platform) == []
    with jax.sharding.use_abstract_mesh(mesh_of(H200 if platform == "cuda" else V5E)):
        assert calls(mine, "cpu") == []  # what was named may be lowered for anything
    for cache in (mine, plain):
        with pytest.raises(UnsupportedError, match=rf"{name}.*made for '{platform}'.*is for 'cpu'"):
            calls(cache, "cpu", name)


def test_elsewhere_it_works_all_the_same():
    """A step over a cache for another platform, and over one that moved: bits where encoding makes numbers."""
    here, there = (create(codec=kvattn.Float8(), platform=platform) for platform in (None, "cuda"))
    step = jax.jit(kvattn.cached_attention)
    expected, _ = step(*tokens(), here)
    for cache in (there, here.replace(platform="cuda"), there.replace(platform=None)):
        out, after = step(*tokens(), cache)
        assert after.platform == cache.platform and after.keys["data"].dtype == cache.keys["data"].dtype
        np.testing.assert_allclose(np.float32(out), np.float32(expected), atol=2e-2)


def test_derivatives_and_rows_mapped_over():
    """What is decided late has the derivatives and the batching of what is decided at once."""
    query, key, value = tokens(jnp.float32)
    late, now = (create(dtype=jnp.float32, platform=platform, layout=TPU_LAYOUT) for platform in ("tpu", None))

    def loss(cache, query):
        return jnp.sum(kvattn.cached_attention(query, key, value, cache)[0] ** 2)

    found, expected = (jax.jit(jax.grad(functools.partial(loss, cache)))(query) for cache in (late, now))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    stacked = jnp.stack([query, 2 * query])
    found, expected = (jax.jit(jax.vmap(functools.partial(loss, cache)))(stacked) for cache in (late, now))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    step = lambda q: kvattn.cached_attention(q, key, value, now, implementation="mosaic_tpu")[0]
    assert jax.eval_shape(jax.vmap(step), stacked).shape == stacked.shape
    with pytest.raises(UnsupportedError, match="mosaic_tpu"):
        jax.jit(jax.vmap(step))(stacked)


def test_inside_a_shard_map():
    """There the branches of a decision have results of one type."""
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    cache = create(platform="tpu", dtype=jnp.float32)
    step = lambda *args: kvattn.cached_attention(*args)[0]
    rows = jax.tree.map(lambda axes: P(*("rows" if name == "rows" else None for name in axes.split())), cache.axes)
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(*[P("rows")] * 3, rows), out_specs=P("rows")))
    args = tokens(jnp.float32)
    np.testing.assert_allclose(mapped(*args, cache), step(*args, cache), atol=1e-6)


def test_branches_in_a_shard_map():
    """One branch returns what differs from device to device, the other constants."""
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    call = lambda x: late.by_platform({"tpu": lambda x: jnp.zeros(x.shape)}, lambda x: 2 * x, x)
    mapped = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=P("rows"), out_specs=P("rows")))
    np.testing.assert_array_equal(mapped(jnp.arange(4.0)), 2 * jnp.arange(4.0))


def test_arguments_on_a_mesh_say_it():
    """Of arrays that are split over devices of another platform the step knows it without a current mesh."""
    seen = []
    kernel = types.SimpleNamespace(
        unsupported=lambda request: None, attend=lambda r: (seen.append(_target.current()), attend.attend(r, "xla"))[1]
    )
    attend.register(attend.Implementation("toy", lambda: kernel, platform="gpu"))
    try:
        where = NamedSharding(mesh_of(H200), P())
        on = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        args = jax.tree.map(on, (*tokens(), create()))
        jax.jit(kvattn.cached_attention).trace(*args)
        assert seen and set(seen) == {_target.Target("cuda", "NVIDIA H200", 132)}
        assert api.choose(jax.eval_shape(lambda c: c, request(create(layout=GPU_LAYOUT))))[0] == "xla"
    finally:
        attend.unregister("toy")


def test_the_current_mesh_knows_its_gpus_better():
    """Arrays on a mesh name the GPU only; what it can do, the mesh of `use_abstract_mesh` may say."""

    class Gpu(jax.sharding.AbstractDevice):
        compute_capability = "8.0"

    plain = jax.sharding.AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")
    said = Gpu(plain.device_kind, plain.num_cores, plain.platform)
    x, seen = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=NamedSharding(mesh_of(plain), P())), []
    for device in (said, H200):
        with jax.sharding.use_abstract_mesh(mesh_of(device)):
            jax.jit(lambda x: seen.append(_target.of_arrays(x).compute_capability) or x).trace(x)
    assert seen == ["8.0", None]


def request(cache):
    query, positions = tokens()[0], jnp.zeros((2, 1), jnp.int32)
    return attend.Request(query, positions, cache.view(), None, mask=kvattn.masks.Mask(), scale=1.0)


# Sizes that nobody names -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "size", "codec", "pages"),
    [
        ("cuda", 128, None, 16),
        ("cuda", 128, kvattn.Int8(), 32),
        ("cuda", 128, kvattn.Int4(64), 64),
        ("cuda", 40, None, 16),  # no kernel takes heads of 40
        ("tpu", 128, None, 16),
        ("tpu", 64, None, 16),
        ("tpu", 64, kvattn.Int8(), 16),
        ("tpu", 80, None, 128),
        ("tpu", 64, kvattn.Int4(32), 128),
        ("cpu", 80, kvattn.Int4(32), 16),
        (None, 128, kvattn.Int8(), 16),
        ("tpu", 128, kvattn.KIVI(residual=64), 64),
    ],
)
def test_the_smallest_pages_that_every_kernel_takes(platform, size, codec, pages):
    layer = MultiQueryAttention(num_heads=4, in_features=8, head_dim=size, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    make = lambda: layer.make_paged_cache(64, batch_size=2, max_length=600, codec=codec, platform=platform)
    cache = jax.eval_shape(make)
    assert (cache.page_size, cache.max_pages) == (pages, -(-600 // pages))


def test_layers_of_a_model_have_pages_of_one_size():
    """Those whose heads want larger ones decide."""
    config = kvattn.models.DecoderConfig(
        vocab_size=8, model_dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=80, mlp_dim=8
    )
    model = kvattn.models.Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    make = lambda: model.make_paged_cache(4, batch_size=1, max_length=300, codec=[kvattn.Int8(), None], platform="cuda")
    assert [cache.page_size for cache in jax.eval_shape(make)] == [32, 32]


# JAX's interpreters ------------------------------------------------------------------------------


def test_interpreters_that_jax_forces():
    cache = create(capacity=16, dtype=jnp.bfloat16, layout=Layout(16, 128, False))
    expected, _ = kvattn.cached_attention(*tokens(), cache)
    with pltpu.force_tpu_interpret_mode():
        assert kvattn.pallas.interpreter.interpreted("tpu") and not kvattn.pallas.interpreter.interpreted("cuda")
        out, _ = kvattn.cached_attention(*tokens(), cache, implementation="mosaic_tpu")
        np.testing.assert_allclose(np.float32(out), np.float32(expected), atol=2e-2)
        with pytest.raises(UnsupportedError, match="interpreter of 'tpu' kernels is forced"):
            kvattn.cached_attention(*tokens(), cache, implementation="mosaic_gpu")
    with plgpu.force_gpu_interpret_mode():
        assert kvattn.pallas.interpreter.interpreted("cuda") and not kvattn.pallas.interpreter.interpreted("tpu")
        step = functools.partial(kvattn.cached_attention, implementation="mosaic_gpu")
        assert "InterpretGPUParams" in str(jax.make_jaxpr(step)(*tokens(), cache))
    assert not kvattn.pallas.interpreter.interpreted()


# What it costs -----------------------------------------------------------------------------------


def test_check_says_once_what_a_move_costs(monkeypatch):
    monkeypatch.setattr(kvattn.cache.base, "_WARNED", set())
    create(platform="cpu").check()
    create(layout=GPU_LAYOUT).check()
    with pytest.warns(UserWarning, match=r"made for 'cuda' and lies on 'cpu'.*one block.*platform='cpu'"):
        create(platform="cuda").check()
    create(platform="cuda").check()
    pool = kvattn.PagedKVCache.create(4, 16, 2, SIZE, batch_size=2, max_pages=2, platform="tpu")
    with pytest.warns(UserWarning, match="pages or numbers of slots of another size"):
        pool.check()
    # A cache of a CPU's that lies on a GPU.
    monkeypatch.setattr(_target, "of_arrays", lambda tree: _target.Target("cuda"))
    with pytest.warns(UserWarning, match=r"made for 'cpu' and lies on 'cuda'.*no kernel reads"):
        create().check()
    create(platform="cuda").check()
