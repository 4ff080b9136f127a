"""One cache over four devices in every way: who holds which slots of which heads of which rows."""

import importlib

import jax
import jax.numpy as jnp
from svg import MARGIN, Picture

import kvattn
from kvattn import sharding

DEVICES = 4
SMALL = 11


def holders(cache):
    """For every row, head and slot of a cache the numbers of the devices that hold it."""
    data, axes = cache.keys["data"], cache.axes.keys["data"].split()
    sizes = dict(zip(axes, data.shape, strict=True))
    held = [
        [[[] for _ in range(sizes["blocks"] * sizes["slots"])] for _ in range(sizes["heads"])]
        for _ in range(sizes["rows"])
    ]
    for shard in data.addressable_shards:
        part = {name: range(*index.indices(sizes[name])) for name, index in zip(axes, shard.index, strict=True)}
        for row in part["rows"]:
            for head in part["heads"]:
                for block in part["blocks"]:
                    for slot in part["slots"]:
                        held[row][head][block * sizes["slots"] + slot].append(shard.device.id)
    return held


def split(by, num_kv_heads, rows=4, slots=8):
    """A cache split over four devices."""
    mesh = jax.make_mesh((DEVICES,), ("model",), devices=jax.devices()[:DEVICES])
    cache = kvattn.KVCache.create(rows, num_kv_heads, 8, capacity=slots, dtype=jnp.float32)
    return sharding.shard_cache(cache, mesh, by=by)


def grid(draw, held, title):
    """Rows below each other, heads side by side, slots within."""
    draw.text(MARGIN, draw.y, title, "head")
    draw.y += 16
    heads, slots = len(held[0]), len(held[0][0])
    for h in range(heads):
        draw.text(MARGIN + 44 + h * (slots * SMALL + 8), draw.y, f"head {h}", "small")
    draw.y += 5
    for row, of_row in enumerate(held):
        draw.text(MARGIN, draw.y + 11, f"row {row}", "small")
        for h, of_head in enumerate(of_row):
            for s, devices in enumerate(of_head):
                kind = f"d{devices[0]}" if len(devices) == 1 else "d7"
                x = MARGIN + 44 + h * (slots * SMALL + 8) + s * SMALL
                draw.cell(x, draw.y, kind=kind, width=SMALL, height=SMALL + 2)
        draw.y += SMALL + 4
    draw.y += 18


def one(by, num_kv_heads, title, note):
    draw = Picture(title, [sharding.shard_cache, scheme(by)], __file__)
    draw.line(
        f"{num_kv_heads} key/value head{'s' if num_kv_heads > 1 else ''}, 4 rows, 8 slots, {DEVICES} devices", "small"
    )
    cache = split(by, num_kv_heads)
    held = holders(cache)
    grid(draw, held, "Who holds which slots")
    mesh = jax.make_mesh((DEVICES,), ("model",), devices=jax.devices()[:DEVICES])
    plain = kvattn.KVCache.create(4, num_kv_heads, 8, capacity=8, dtype=jnp.float32)
    each = sharding.bytes_per_device(plain, mesh, by=by)
    draw.legend(*((f"d{d}", f"device {d}") for d in range(DEVICES)))
    draw.line(
        f"Bytes: {plain.nbytes:,} on one device, {each:,} on each of four ({each / plain.nbytes:.0%}). {note}",
        "small",
        72,
    )
    return draw.svg()


def scheme(by):
    """The class of a scheme."""
    module = importlib.import_module(f"kvattn.sharding.{by}")
    found = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
    return next(x for x in found if issubclass(x, sharding.Scheme))


def pictures():
    """Name of the file, and what is in it."""
    yield "by_heads", one("heads", 4, 'by="heads"', "A decode step exchanges nothing.")
    yield (
        "by_heads_copied",
        one(
            "heads",
            2,
            'by="heads", fewer heads than devices',
            "Each head is stored twice: the cache has four heads now.",
        ),
    )
    yield (
        "by_batch",
        one("batch", 1, 'by="batch"', "Queries and outputs of one token change devices in two all-to-alls."),
    )
    yield (
        "by_sequence",
        one("sequence", 1, 'by="sequence"', "Every device attends to its slots; two all-reduces merge the parts."),
    )
    yield "by_layers", layers()


def layers():
    """Stages of a pipeline."""
    mesh = jax.make_mesh((DEVICES,), ("stage",), devices=jax.devices()[:DEVICES])
    make = lambda: kvattn.KVCache.create(2, 1, 8, capacity=8, dtype=jnp.float32)
    caches = sharding.layer_caches(make, 8, 2, mesh=mesh)
    data = caches.keys["data"]
    held = {}
    for shard in data.addressable_shards:
        for layer in range(*shard.index[0].indices(8)):
            held[layer] = shard.device.id
    draw = Picture("by layers", [sharding.layer_caches], __file__)
    draw.line("8 layers in 4 stages; each layer's cache has two microbatches of 2 rows", "small")
    for layer in range(8):
        draw.text(MARGIN, draw.y + 11, f"layer {layer}", "small")
        draw.cell(MARGIN + 56, draw.y, f"device {held[layer]}", f"d{held[layer]}", 240, 17)
        draw.y += 19
    draw.y += 14
    draw.line("Activations go from stage to stage; caches stay where they are.", "small")
    return draw.svg()
