"""Sizes of kernels: what they are without tuning, measured tables, and how to measure one.

Nothing is ever tuned by itself. A kernel takes, in this order: what `use` was given, the table that is shipped for
the device kind (``tuned/``, from runs under ``benchmarks/results``), a rule that is good without measuring.
"""

import dataclasses
import functools
import importlib.resources
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kvattn import _target
from kvattn._typing import Array
from kvattn.attend import registry
from kvattn.attend.request import Request
from kvattn.cache.base import Cache
from kvattn.errors import ConfigError, UnsupportedError
from kvattn.masks import Mask


@dataclasses.dataclass(frozen=True)
class GpuConfig:
    """Sizes of `"mosaic_gpu"`.

    Args:
        tile: tokens of one step of the computation, a multiple of 64.
        stages: tiles in flight per program, >= 2.
        blocks_per_sm: programs per multiprocessor.
        unit: which matrix unit takes the products, "wgmma" (Hopper's alone) or "mma" (of every GPU since Ampere). None:
            the better one that the device has.
        least_tiles: how many tiles a program takes at least: fewer programs leave fewer states to be merged.

    Raises:
        ConfigError: sizes out of range.
    """

    tile: int = 64
    stages: int = 3
    blocks_per_sm: int = 2
    unit: str | None = None
    least_tiles: int = 1

    def __post_init__(self):
        if self.unit not in (None, "wgmma", "mma"):
            raise ConfigError(f"unit must be None, 'wgmma' or 'mma', got {self.unit!r}.")
        if self.tile < 64 or self.tile % 64 or self.stages < 2 or self.blocks_per_sm < 1:
            raise ConfigError(f"tile must be a multiple of 64, stages >= 2, blocks_per_sm >= 1; got {self}.")
        if self.least_tiles < 1:
            raise ConfigError(f"least_tiles must be >= 1, got {self.least_tiles}.")


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """Sizes of `"mosaic_tpu"`.

    Args:
        tile_bytes: keys of one tile, all heads. Two tiles of keys and two of values are in vector memory at a time.
        most_rows: slots of a tile at most, a multiple of 128.

    Raises:
        ConfigError: sizes out of range.
    """

    tile_bytes: int = 1 << 20
    most_rows: int = 1024

    def __post_init__(self):
        if self.tile_bytes < 1 or self.most_rows < 128 or self.most_rows % 128:
            raise ConfigError(f"tile_bytes must be >= 1 and most_rows a multiple of 128; got {self}.")


Config = GpuConfig | TpuConfig
CANDIDATES: dict[str, tuple[Config, ...]] = {
    "mosaic_gpu": tuple(GpuConfig(t, s, b) for t in (64, 128) for b in (1, 2, 3) for s in (2, 4, 6)),
    "mosaic_tpu": tuple(TpuConfig(1 << n, rows) for n in (19, 20, 21, 22) for rows in (256, 512, 1024)),
}
"""What `tune` tries."""
_USED: dict[str, Config] = {}


def use(table: Mapping[str, Config] | str | os.PathLike | None) -> None:
    """Takes sizes from a table from now on; what is compiled already keeps its own.

    Args:
        table: sizes by key as `tune` returns them, or the file that `save` wrote. None: forgets all.

    Raises:
        ConfigError: a file that is no such table.
    """
    if table is None:
        _USED.clear()
    else:
        _USED.update(table if isinstance(table, Mapping) else _read(Path(table).read_text(), str(table)))


def save(path: str | os.PathLike, table: Mapping[str, Config]) -> None:
    """Writes a table for `use`, with the device and the version of JAX it was measured with."""
    content = {
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
        "sizes": {key: dataclasses.asdict(config) for key, config in sorted(table.items())},
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def lookup(key: str, device_kind: str | None) -> Config | None:
    """What was measured for a key, on devices of a kind, where that is known; None: nothing."""
    return _USED.get(key) or (None if device_kind is None else _shipped(device_kind).get(key))


@functools.cache
def _shipped(device_kind: str) -> dict[str, Config]:
    """The table in the package."""
    name = re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"
    file = importlib.resources.files("kvattn.pallas") / "tuned" / name
    return _read(file.read_text(), name) if file.is_file() else {}


def _read(text: str, name: str) -> dict[str, Config]:
    try:
        return {key: _kind(key.split()[0])(**sizes) for key, sizes in json.loads(text)["sizes"].items()}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"{name} is no table of sizes as kvattn.pallas.tuning.save writes it: {error}.") from error


def _kind(name: str) -> type[Any]:
    """The class of the sizes of a kernel."""
    tuning = registry.named(name).tuning
    if tuning is None:
        raise ConfigError(f"{name!r} has no sizes to tune.")
    return tuning.kind


def tune(
    query: Array,
    cache: Cache,
    *,
    mask: Mask | None = None,
    candidates: Sequence[Config] | None = None,
    repeats: int = 20,
    progress: Callable[[Config, float], None] | None = None,
) -> tuple[dict[str, Config], dict[Config, float]]:
    """Measures sizes for one decode step on this device. Takes seconds to a minute: each candidate is compiled.

    Args:
        query: [B, T, N, H], the new tokens, which are the last ones of the cache.
        cache: `kvattn.KVCache` or `PagedKVCache`, filled as it will be: larger than the device's own caches.
        mask: who attends to whom. None: causal.
        candidates: what to try. None: all that fit.
        repeats: calls per measurement; the median of five measurements counts.
        progress: called with each candidate and its seconds per call.

    Returns:
        the table with the fastest, for `use` and `save`; seconds per call of each candidate that ran.

    Raises:
        UnsupportedError: there is no kernel to tune for this call on this device.
        ConfigError: no candidate ran.
    """
    tunable = [(one, one.tuning) for one in map(registry.named, registry.made_for()) if one.tuning is not None]
    if not tunable:
        raise UnsupportedError(f"there is no kernel to tune on {_target.platform()!r}, where this runs.")
    ((implementation, tuning), *_) = tunable
    kernel: Any = implementation.load()
    positions = cache.lengths[:, None] - query.shape[1] + jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    request = Request(query, positions, cache.view(), None, mask=mask or Mask(), scale=query.shape[-1] ** -0.5)
    if (reason := kernel.unsupported(request)) is not None:
        raise UnsupportedError(f"{implementation.name!r}: {reason}.")
    if candidates is None:
        candidates = [c for c in tuning.candidates if kernel.fits(request, c)]
    attend = lambda config, request: kernel.attend(request, config)[0]
    return measure(attend, kernel.key(request), candidates, request, repeats, progress)


def measure(
    attend: Callable[[Config, Request], Any],
    key: str,
    candidates: Sequence[Config],
    request: Request,
    repeats: int,
    progress: Callable[[Config, float], None] | None,
) -> tuple[dict[str, Config], dict[Config, float]]:
    """What `tune` does, with a kernel of one's own."""
    seconds: dict[Config, float] = {}
    reasons = []
    for config in candidates:
        step = jax.jit(functools.partial(attend, config))
        try:
            jax.block_until_ready(step(request))
        except Exception as error:  # compilers refuse sizes in many ways
            reasons.append(f"{config}: {error}")
            continue
        times = []
        for _ in range(5):
            start = time.perf_counter()
            results = [step(request) for _ in range(repeats)]
            jax.block_until_ready(results)
            times.append((time.perf_counter() - start) / repeats)
        seconds[config] = statistics.median(times)
        if progress is not None:
            progress(config, seconds[config])
    if not seconds:
        raise ConfigError(f"none of {len(candidates)} candidates ran; the first said: {reasons[:1]}.")
    return {key: min(seconds, key=lambda config: seconds[config])}, seconds
