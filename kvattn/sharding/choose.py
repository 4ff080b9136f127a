"""Which way to split a cache, and what each way costs."""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from kvattn import _checks
from kvattn.errors import ConfigError

SCHEMES = ("heads", "batch", "sequence")
"""The ways `choose` chooses from."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why a cache is split as it is. Printing it shows a line per scheme.

    Attributes:
        by: what `choose` returns.
        reasons: per scheme, why it is taken, or why not.
        bytes_per_device: per scheme, bytes of keys and values on each device; None where it cannot be.
        collectives: per scheme, what devices exchange in one decode step of one layer.
    """

    by: str
    reasons: dict[str, str]
    bytes_per_device: dict[str, int | None]
    collectives: dict[str, str]

    def __str__(self) -> str:
        lines = [f"by {self.by}"]
        for name in self.reasons:
            size = self.bytes_per_device[name]
            size = "cannot be" if size is None else f"{_readable(size)} per device, {self.collectives[name]}"
            lines.append(f"{'*' if name == self.by else ' '} {name}: {size}. {self.reasons[name]}")
        return "\n".join(lines)


def choose(num_heads: int, num_kv_heads: int, batch_size: int, axis_size: int) -> str:
    """The way to split a cache over a mesh axis: "heads", "batch" or "sequence".

    By heads while the key/value heads divide evenly: nothing is exchanged and nothing stored twice. With fewer heads
    (MQA, few key/value heads) by batch, if the rows divide: two all-to-alls of one token's queries and outputs. With
    fewer rows than devices by sequence. With more rows that do not divide, by heads with copies within groups where the
    counts allow it, else by sequence.

    Args:
        num_heads: N.
        num_kv_heads: K.
        batch_size: B, rows along this axis (of one data shard, if there are several).
        axis_size: n, devices along the axis.

    Raises:
        ConfigError: a count below 1, heads that do not group.
    """
    return _choice(num_heads, num_kv_heads, batch_size, axis_size)[0]


def explain(
    num_heads: int,
    num_kv_heads: int,
    batch_size: int,
    axis_size: int,
    *,
    head_dim: int = 128,
    num_slots: int = 4096,
    dtype: DTypeLike = jnp.bfloat16,
    value_head_dim: int | None = None,
    values_in_keys: bool = False,
) -> Explanation:
    """What `choose` chooses, why, and what every scheme costs.

    Bytes are those of one layer's keys and values as they are: (H + Hv) itemsize per slot and head, H itemsize where
    values are in the keys, times K, B and C, one of which is divided by n and rounded up.
    `kvattn.sharding.bytes_per_device` tells them for a cache, with codec and policy.

    Args:
        num_heads: N.
        num_kv_heads: K.
        batch_size: B.
        axis_size: n.
        head_dim: H.
        num_slots: C.
        dtype: of keys and values.
        value_head_dim: Hv; None: H.
        values_in_keys: whether values are the first numbers of their keys, stored once (latent attention).

    Raises:
        ConfigError: a count below 1, heads that do not group, values longer than the keys they are in.
        DTypeError: a count that is no int, a flag that is no bool.
    """
    by, why = _choice(num_heads, num_kv_heads, batch_size, axis_size)
    _checks.integer("head_dim", head_dim, 1)
    _checks.integer("num_slots", num_slots, 1)
    value_head_dim = head_dim if value_head_dim is None else _checks.integer("value_head_dim", value_head_dim, 1)
    if _checks.flag("values_in_keys", values_in_keys) and value_head_dim > head_dim:
        raise ConfigError(f"values_in_keys: value_head_dim ({value_head_dim}) must be at most head_dim ({head_dim}).")
    n, token = axis_size, (head_dim + (0 if values_in_keys else value_head_dim)) * jnp.dtype(dtype).itemsize
    padded = -(-num_heads // n) * n
    reasons: dict[str, str] = {}
    size: dict[str, int | None] = {
        scheme: token * math.prod(held(scheme, n, num_kv_heads, batch_size, num_slots)) for scheme in SCHEMES
    }

    against = against_heads(num_heads, num_kv_heads, n)
    copies = max(n // num_kv_heads, 1)
    if against is None:
        reasons["heads"] = (
            "No head is stored twice." if copies == 1 else f"Each key/value head is stored {copies} times."
        )
    else:
        latent = " Latent attention keeps one key for all query heads." * values_in_keys
        size["heads"], reasons["heads"] = None, against + latent
    if batch_size % n:
        size["batch"], reasons["batch"] = None, f"{batch_size} rows do not divide over {n} devices."
    else:
        pads = "" if padded == num_heads else f" {num_heads} query heads are filled up to {padded} on the way."
        rows = batch_size // n
        reasons["batch"] = f"Each device holds {rows} row{'s' if rows != 1 else ''}.{pads}"
    reasons["sequence"] = f"Each device holds {-(-num_slots // n)} slots of every row."
    reasons[by] = f"{reasons[by]} {why}"
    exchange = {"heads": "no collectives", "batch": "2 all-to-alls of a token", "sequence": "all-reduces of a token"}
    return Explanation(by, reasons, size, exchange if n > 1 else dict.fromkeys(exchange, "no collectives"))


def held(by: str, axis_size: int, num_kv_heads: int, batch_size: int, num_slots: int) -> tuple[int, int, int]:
    """Key/value heads, rows, and slots of each row that the fullest device holds: K, B and C, one of them divided.

    With fewer heads than devices each holds one: it is copied n / K times.
    """
    counts = num_kv_heads, batch_size, num_slots
    heads, rows, slots = (-(-x // axis_size) if by == s else x for s, x in zip(SCHEMES, counts, strict=True))
    return heads, rows, slots


def against_heads(num_heads: int | None, num_kv_heads: int, axis_size: int) -> str | None:
    """Why heads cannot be split over so many devices; None: they can. `num_heads` None: only K is known."""
    n = axis_size
    if num_kv_heads == 1 and n > 1:
        return "One key/value head (MQA) cannot be split: every device would hold the whole cache."
    if num_kv_heads % n and n % num_kv_heads:
        return f"{num_kv_heads} key/value heads and {n} devices: neither divides the other."
    if num_heads is not None and num_heads % n:
        return f"{num_heads} query heads do not divide over {n} devices."
    return None


def _choice(num_heads: int, num_kv_heads: int, batch_size: int, axis_size: int) -> tuple[str, str]:
    _checks.head_counts(num_heads, num_kv_heads)
    _checks.integer("batch_size", batch_size, 0)
    n = _checks.integer("axis_size", axis_size, 1)
    heads = "one key/value head is" if num_kv_heads == 1 else f"{num_kv_heads} key/value heads are"
    if num_kv_heads % n == 0:
        return "heads", "The heads divide."
    if batch_size and batch_size % n == 0:
        return "batch", f"Taken because the rows divide, and {heads} too few for {n} devices."
    if batch_size > n and against_heads(num_heads, num_kv_heads, n) is None:
        return "heads", f"Taken because {batch_size} rows do not divide."
    few = "too few" if batch_size < n else "not a multiple of the devices"
    return "sequence", f"Taken because {heads} too few for {n} devices, and {batch_size} rows are {few}."


def _readable(size: int) -> str:
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.4g} {unit}"
