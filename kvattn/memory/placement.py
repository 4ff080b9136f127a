"""What one device of several holds: its heads, its rows, its slots, its layers."""

import dataclasses

from kvattn import _checks
from kvattn.errors import ConfigError
from kvattn.memory.specs import ModelSpec
from kvattn.sharding.choose import SCHEMES, choose, held

HEADS, BATCH, SEQUENCE = SCHEMES


@dataclasses.dataclass(frozen=True)
class Placement:
    """How caches are divided over `num_devices` devices that share every layer, and over stages of layers.

    By heads, a device holds ceil(K / n) key/value heads: with fewer heads than devices they are copied (MQA: everybody
    holds everything). By batch, ceil(B / n) rows. By sequence, ceil(C / n) slots of every row, and all that the policy
    remembers of them. Weights are divided over all devices in each case (Pope et al., arXiv:2211.05102).

    Attributes:
        model: whose caches.
        batch_size: B; None where it was not given: then there is one row.
        num_devices: n.
        stages: of the pipeline: each holds ceil(layers / stages) layers, and a copy of a cache of an earlier stage
            that one of them shares.
        by: "heads", "batch" or "sequence".
    """

    model: ModelSpec
    batch_size: int | None
    num_devices: int
    stages: int
    by: str

    @property
    def num_kv_heads(self) -> int:
        """K on one device."""
        return held(self.by, self.num_devices, self.model.num_kv_heads, 1, 1)[0]

    @property
    def head_parts(self) -> int:
        """Devices that heads are divided over."""
        return self.num_devices if self.by == HEADS else 1

    @property
    def num_rows(self) -> int:
        """B on one device."""
        return held(self.by, self.num_devices, 1, self.batch_size or 1, 1)[1]

    @property
    def groups(self) -> int:
        """Groups of devices that hold different rows."""
        return self.num_devices if self.by == BATCH else 1

    @property
    def parts(self) -> int:
        """Devices that share the slots of a row."""
        return self.num_devices if self.by == SEQUENCE else 1

    @property
    def stage_size(self) -> int:
        """Layers of a stage, of the last one perhaps fewer."""
        return -(-self.model.num_layers // self.stages)

    @property
    def stage_layers(self) -> list[range]:
        """The layers of each stage."""
        size, all_layers = self.stage_size, range(self.model.num_layers)
        return [all_layers[start : start + size] for start in all_layers[::size]]

    def of_weights(self, count: float) -> float:
        """What one device holds of so many weights, or bytes of them."""
        return count * (self.stage_size / self.model.num_layers) / self.num_devices

    @property
    def notes(self) -> tuple[str, ...]:
        """What one should know about it."""
        n, kv_heads, rows = self.num_devices, self.model.num_kv_heads, self.batch_size
        notes = []
        if self.by == HEADS and (room := n * self.num_kv_heads) > kv_heads:
            heads = "1 key/value head takes" if kv_heads == 1 else f"{kv_heads} key/value heads take"
            notes.append(f"by heads, {heads} the room of {room} on {n} devices: by batch or sequence nothing is copied")
        if self.by == BATCH and rows is not None and rows % n:
            notes.append(f"{rows} rows do not divide over {n} devices: the fullest holds {self.num_rows}")
        return tuple(notes)


def settled(by: str, model: ModelSpec, batch_size: int | None, num_devices: int, stages: int) -> str:
    """The scheme that is meant: "auto" is `kvattn.sharding.choose`'s, for a batch that divides where none is given.

    Raises:
        ConfigError: a count below 1, more stages than layers, an unknown `by`.
    """
    n = _checks.integer("num_devices", num_devices, 1)
    _checks.integer("pipeline_stages", stages, 1)
    _checks.one_of("by", by, ("auto", *SCHEMES))
    if stages > model.num_layers:
        raise ConfigError(f"pipeline_stages ({stages}) exceeds the {model.num_layers} layers of {model.name}.")
    if by != "auto":
        return by
    return choose(model.num_heads, model.num_kv_heads, n if batch_size is None else batch_size, n)
