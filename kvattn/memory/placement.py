"""What one device of several holds: its heads, its rows, its slots, its layers."""

import dataclasses

from kvattn import _checks
from kvattn.errors import ConfigError
from kvattn.memory.specs import ModelSpec

BY = ("auto", "heads", "batch", "sequence")
"""The ways to divide a cache over the devices that share every layer."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a cache is divided over `num_devices` devices that share every layer, and over stages of layers.

    By heads, a device holds ceil(K / n) key/value heads: with fewer heads than devices they are copied (MQA: everybody
    holds everything). By batch, ceil(B / n) rows. By sequence, ceil(C / n) slots of every row, and all that the policy
    remembers of them. Weights are divided over all devices in each case (Pope et al., arXiv:2211.05102).

    Attributes:
        by: "heads", "batch" or "sequence".
        num_devices: n.
        stages: of the pipeline: each holds ceil(layers / stages) layers, and a copy of a cache of an earlier stage
            that one of them shares.
        notes: what one should know about it.
    """

    by: str
    num_devices: int
    stages: int
    notes: tuple[str, ...] = ()

    def kv_heads(self, model: ModelSpec) -> int:
        """K on one device."""
        return -(-model.num_kv_heads // self.num_devices) if self.by == "heads" else model.num_kv_heads

    def rows(self, batch_size: int) -> int:
        """B on one device."""
        return -(-batch_size // self.num_devices) if self.by == "batch" else batch_size

    @property
    def parts(self) -> int:
        """Devices that share the slots of a row."""
        return self.num_devices if self.by == "sequence" else 1

    @property
    def groups(self) -> int:
        """Devices that hold different rows: n by batch, else 1."""
        return self.num_devices if self.by == "batch" else 1

    def stage_layers(self, model: ModelSpec) -> list[range]:
        """The layers of each stage."""
        size = -(-model.num_layers // self.stages)
        return [range(i, min(i + size, model.num_layers)) for i in range(0, model.num_layers, size)]


def place(model: ModelSpec, batch_size: int | None, num_devices: int, stages: int, by: str) -> Placement:
    """Settles "auto" by `kvattn.sharding.choose`, for a batch that divides where none is given.

    Raises:
        ConfigError: a count below 1, more stages than layers, an unknown `by`.
    """
    n = _checks.integer("num_devices", num_devices, 1)
    _checks.integer("pipeline_stages", stages, 1)
    _checks.one_of("by", by, BY)
    if stages > model.num_layers:
        raise ConfigError(f"pipeline_stages ({stages}) exceeds the {model.num_layers} layers of {model.name}.")
    if n == 1:
        return Placement("heads" if by == "auto" else by, 1, stages)
    notes = []
    if by == "auto":
        from kvattn.sharding.choose import choose

        by = choose(model.num_heads, model.num_kv_heads, n if batch_size is None else batch_size, n)
    kv_heads = model.num_kv_heads
    if by == "heads" and (room := n * -(-kv_heads // n)) > kv_heads:
        heads = "1 key/value head takes" if kv_heads == 1 else f"{kv_heads} key/value heads take"
        notes.append(f"by heads, {heads} the room of {room} on {n} devices: by batch or sequence nothing is copied")
    if by == "batch" and batch_size is not None and batch_size % n:
        notes.append(f"{batch_size} rows do not divide over {n} devices: the fullest holds {-(-batch_size // n)}")
    return Placement(by, n, stages, tuple(notes))
