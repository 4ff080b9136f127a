"""The decode steps that are compiled for devices that are not there, and what a compiled one needs."""

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import kvattn
from kvattn.attend import Request
from kvattn.masks import Mask
from kvattn.pallas import tpu_decode

CAUSAL = Mask()
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode step: B rows, N and K heads of H, C slots."""

    heads: int = 32
    kv_heads: int = 8
    size: int = 128
    slots: int = 4096
    batch: int = 8
    dtype: Any = jnp.bfloat16
    query: Any = None  # dtype of the queries; None: that of the cache
    codec: Any = None
    page_size: int = 0
    new: int = 1
    mask: Mask = CAUSAL
    mass: bool = False
    softcap: float | None = None
    on_host: bool = False
    policy: Any = None  # which keeps `slots` tokens; None: all


CASES = {
    "GQA 32/8": Case(),
    "GQA 32/8, Int8": Case(codec=kvattn.Int8()),
    "GQA 32/8, Float8": Case(codec=kvattn.Float8()),
    "GQA 32/8, pages of 16": Case(page_size=16),
    "GQA 32/8, pages of 64": Case(page_size=64),
    "GQA 32/8, pages of 64, Int8": Case(page_size=64, codec=kvattn.Int8()),
    "GQA 32/8, float32": Case(dtype=jnp.float32),
    "GQA 32/8, 4 tokens, window, sinks": Case(new=4, mask=Mask(window=1000, num_sinks=4)),
    "GQA 32/8, mass": Case(mass=True),
    "GQA 64/8": Case(heads=64),
    "MHA 32/32": Case(kv_heads=32),
    "MQA 71/1": Case(heads=71, kv_heads=1),
    "heads of 256": Case(size=256),
    "heads of 64": Case(size=64),
    "heads of 64, Int8": Case(size=64, codec=kvattn.Int8()),
    "heads of 64, pages of 128": Case(size=64, page_size=128),
    "heads of 64, pages of 16": Case(size=64, page_size=16),
    "heads of 80": Case(size=80),
    "heads of 80, Int8": Case(size=80, codec=kvattn.Int8()),
    "heads of 96": Case(size=96),
    "heads of 112, Float8": Case(size=112, codec=kvattn.Float8()),
    "MQA 71/1 of 64": Case(heads=71, kv_heads=1, size=64),
    "GQA 32/8, Int4(64)": Case(codec=kvattn.Int4(64)),
    "GQA 32/8, Int4(32)": Case(codec=kvattn.Int4(32)),
    "GQA 32/8, Int4(128), pages of 128": Case(codec=kvattn.Int4(128), page_size=128),
    "heads of 64, Int4(32)": Case(codec=kvattn.Int4(32), size=64),
    "heads of 192, Int4(96), float32": Case(codec=kvattn.Int4(96), size=192, dtype=jnp.float32),
    "1000 slots": Case(slots=1000),
    "pool of 2^31 numbers and more": Case(page_size=128, slots=65536, batch=33),
}

ON_HOST = {
    "GQA 32/8": Case(on_host=True),
    "GQA 32/8, 8 times the slots": Case(on_host=True, slots=32768),
    "GQA 32/8, 512 tokens": Case(on_host=True, new=512),
    "heads of 64": Case(on_host=True, size=64),
}
"""Steps of `"xla"` over caches in the host's memory. Without codes of eight bits: the compiler lays these out otherwise
where a block is written than where it is kept, and brings the whole array over to do so."""


def first_device(target: str) -> Any:
    """A device to compile for; there need be none."""
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_STDERR_LOG_LEVEL": "3"}
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[target]).devices[0]


@dataclasses.dataclass(frozen=True)
class _Gpu(AbstractDevice):
    """A GPU that is not there, of a kind that says what it can do: Pallas takes it for Hopper otherwise."""

    compute_capability: str


def aimed_at(device: Any) -> contextlib.AbstractContextManager[Any]:
    """Inside, programs are made for a device that need not be there."""
    mesh = Mesh(np.array([device]), ("x",)).abstract_mesh
    if (capability := getattr(device, "compute_capability", None)) is not None:
        gpu = _Gpu(device.device_kind, device.core_count, "gpu", str(capability))
        mesh = mesh.update(abstract_device=gpu)
    return jax.sharding.use_abstract_mesh(mesh)


def arguments(device: Any, case: Case) -> tuple[Any, Any, Any]:
    """Shapes of query, new token and cache of a case, on a device."""
    batch, heads, kv_heads, size, slots = case.batch, case.heads, case.kv_heads, case.size, case.slots
    codec, page_size = case.codec, case.page_size
    sharding = NamedSharding(Mesh(np.array([device]), ("x",)), P())

    def make():
        if page_size:
            columns = slots // page_size
            return kvattn.PagedKVCache.create(
                batch * columns,
                page_size,
                kv_heads,
                size,
                batch_size=batch,
                max_pages=columns,
                codec=codec,
                dtype=case.dtype,
                policy=case.policy,
            )
        where = {"memory_kind": "pinned_host"} if case.on_host else {}
        settings = {"capacity": slots, "policy": case.policy, "codec": codec, "dtype": case.dtype}
        return kvattn.KVCache.create(batch, kv_heads, size, **settings, **where)

    def on_device(x, axes):
        where = sharding.with_memory_kind("pinned_host") if case.on_host and "blocks" in axes else sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    with aimed_at(device):
        shapes = jax.eval_shape(make)
    cache = jax.tree.map(on_device, shapes, shapes.axes)
    query, new = (
        jax.ShapeDtypeStruct((batch, case.new, n, size), dtype, sharding=sharding)
        for n, dtype in ((heads, case.query or case.dtype), (kv_heads, case.dtype))
    )
    return query, new, cache


def asked(case: Case, query: Any, cache: Any, unsupported: Callable[[Request], str | None]) -> Request:
    """The call of a case: its last tokens ask. Raises what the kernel says against it."""
    positions = cache.lengths[:, None] - case.new + jnp.arange(case.new, dtype=jnp.int32)[None]
    scale = case.size**-0.5
    request = Request(query, positions, cache.view(), None, mask=case.mask, scale=scale, want_mass=case.mass)
    request = dataclasses.replace(request, softcap=case.softcap)
    if (reason := unsupported(request)) is not None:
        raise kvattn.errors.UnsupportedError(reason)
    return request


def request(device: Any, case: Case, unsupported: Callable[[Request], str | None]) -> tuple[Request, Any]:
    """Shapes of the call of a case, its output as a step asks for it; and of its cache. Raises as `asked` does."""
    query, _, cache = arguments(device, case)
    with aimed_at(device):
        shapes = jax.eval_shape(lambda query, cache: asked(case, query, cache, unsupported), query, cache)
    on_device = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=query.sharding)
    return dataclasses.replace(jax.tree.map(on_device, shapes), out_dtype=jnp.dtype(query.dtype)), cache


def attend(device: Any, case: Case) -> tuple[Any, int, int]:
    """The compiled kernel over a cache that is an argument, the bytes of the cache and those of vector memory."""
    query, _, cache = arguments(device, case)
    vmem = []

    def step(query, cache):
        request = asked(case, query, cache, tpu_decode.unsupported)
        vmem.append(tpu_decode.vmem_bytes(request))
        return tpu_decode.attend(request)

    with aimed_at(device):
        return jax.jit(step).lower(query, cache).compile(), cache.nbytes, vmem[0]


def tile_rows(device: Any, case: Case) -> int:
    """Slots of a tile of the kernel."""
    return tpu_decode.rows_of(jax.eval_shape(lambda cache: cache.view(), arguments(device, case)[2]))


def append(device: Any, case: Case, implementation: str = "mosaic_tpu") -> Any:
    """The compiled step of `kvattn.cached_attention`: a token is written into a donated cache, then attention."""
    query, new, cache = arguments(device, case)
    step = functools.partial(kvattn.cached_attention, implementation=implementation, window=case.mask.window)
    with aimed_at(device):
        return jax.jit(step, donate_argnums=3).lower(query, new, new, cache).compile()


def large_copies(text: str, count: int) -> int:
    """Copies, transposes, converts and gathers of at least `count` numbers in the text of a program."""
    found = re.findall(r"= \(?\w+\[([\d,]*)\][^=\n]* (?:copy|copy-start|transpose|convert|gather)\(", text)
    return sum(int(np.prod([int(n) for n in shape.split(",") if n] or [1])) >= count for shape in found)


def launches(text: str) -> int:
    """Kernels that a program for a GPU starts, copies included."""
    entry = text[text.index("\nENTRY") :].split("\n}")[0]
    kinds = "fusion|custom-call|copy|scatter|gather|reduce|reduce-window|sort|transpose|convert|pad|concatenate|while"
    return len(re.findall(rf" (?:{kinds})\(", entry))


def loops(text: str) -> int:
    """Loops in a program, whose steps follow one another."""
    return len(re.findall(r" while\(", text))


def needs(program: Any, case: Case) -> list[str]:
    """KiB of temporary memory and cache-sized copies of a program."""
    numbers = case.batch * case.kv_heads * case.slots * case.size // (2 if isinstance(case.codec, kvattn.Int4) else 1)
    temporary = program.memory_analysis().temp_size_in_bytes
    return [f"{temporary / 2**10:.0f}", str(large_copies(program.as_text(), numbers // 2))]
