"""How large an engine is: its pages, the shapes that it compiles, and what its records are."""

import os
from collections.abc import Sequence
from typing import Any

import jax

from kvattn import _checks
from kvattn.cache import Group, PagedKVCache
from kvattn.errors import ConfigError
from kvattn.models.decoder import Decoder
from kvattn.serving.device import Device
from kvattn.serving.groups import LayerGroup
from kvattn.serving.kinds import ArraySpec, Kind
from kvattn.serving.together import Together
from kvattn.serving.weights import digest_of

_NARROWEST = 16
"""Fewest tokens of a piece of a prompt for which a program is compiled; wider ones by fours."""

_AT_ONCE = 512
"""Tokens of prompts that are read by one call, where one piece has fewer."""

_AUTO_SHARE = 0.8
"""Share of the memory that is left on a device which `num_pages="auto"` takes."""


def shapes(chunk: int, rows: int) -> list[tuple[int, int]]:
    """Rows and tokens of the pieces of prompts for which programs are compiled: together `_AT_ONCE` tokens or fewer."""
    widths = {chunk}
    width = _NARROWEST
    while width < chunk:
        widths.add(width)
        width *= 4
    return [(max(min(rows, _AT_ONCE // width), 1), width) for width in sorted(widths)]


def layer_group(group: Group, cache: PagedKVCache) -> LayerGroup:
    """A group of layers as the host counts its pages."""
    return LayerGroup(
        num_blocks=group.num_pages,
        window=group.policy.mask().window if group.policy.in_order else None,
        bytes_per_token=len(group.layers) * group.page_bytes // group.page_size,
        slots=None if group.policy.in_order else cache.num_slots,
    )


def kind_of(model: Decoder, caches: Sequence[PagedKVCache], device: Device, groups: Sequence[LayerGroup]) -> Kind:
    """What a record must have been made by, to be of use here."""
    each = lambda of: repr(sorted({repr(of(layer)) for layer in caches}))
    return Kind(
        model=digest_of(model, model.config),
        dtype=each(lambda layer: layer.dtype),
        codec=each(lambda layer: layer.codec),
        policy=repr([layer.policy for layer in caches]),
        page_size=caches[0].page_size,
        arrays={name: ArraySpec(*spec) for name, spec in device.arrays().items()},
        windows=tuple(group.window for group in groups),
    )


def pages_for(
    model: Decoder,
    num_pages: int | str | Sequence[int],
    page_size: int | None,
    options: dict[str, Any],
    together: Together | None = None,
) -> int | Sequence[int]:
    """Pages of the pools, of all hosts; "auto": those that the memory has room for, of the host that has least."""
    hosts = 1 if together is None else together.num_hosts
    if num_pages != "auto":
        if isinstance(num_pages, str):
            raise ConfigError(f'num_pages must be an int, one for each layer, or "auto", got {num_pages!r}.')
        if together is None:
            return num_pages
        each = num_pages if isinstance(num_pages, Sequence) else [num_pages]
        total = [_checks.integer("num_pages", pages, 1) * hosts for pages in each]
        return total if isinstance(num_pages, Sequence) else total[0]
    one, two = (
        sum(
            layer.nbytes
            for layer in jax.eval_shape(lambda n=n: model.make_paged_cache(n * hosts, page_size, **options))
        )
        for n in (options["batch_size"] * 1, options["batch_size"] * 2)
    )
    per_page = (two - one) / (options["batch_size"] * hosts)
    pages = max(int(memory_left() * _AUTO_SHARE / per_page), 1)
    return pages if together is None else together.least(pages) * hosts


def page_size_for(model: Decoder, policy: Any, codec: Any) -> int:
    """Tokens of a page where nobody says how many: those of the first layer's pages."""
    make = lambda: model.make_paged_cache(1, batch_size=1, max_length=1, policy=policy, codec=codec)
    return jax.eval_shape(make)[0].page_size


def memory_left() -> float:
    """Bytes that the first device has left; of a host, half of what is free."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
