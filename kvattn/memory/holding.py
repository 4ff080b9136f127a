"""The caches of a scenario, and what each device holds of them."""

import dataclasses
import functools

from kvattn.memory import caches
from kvattn.memory.caches import Kinds, total
from kvattn.memory.placement import Placement
from kvattn.memory.scenario import Scenario


@dataclasses.dataclass(frozen=True)
class Holding:
    """What a scenario's devices hold.

    "On a device" is on the fullest one: the stage whose layers need most.

    Attributes:
        scenario: what is asked.
        placement: how it is divided.
    """

    scenario: Scenario
    placement: Placement

    @classmethod
    def of(cls, asked: Scenario) -> "Holding":
        """Divides as the scenario says."""
        placement = Placement(asked.model, asked.batch_size, asked.num_devices, asked.pipeline_stages, asked.by)
        return cls(asked, placement)

    def kinds(self, only: range | None = None, num_kv_heads: int | None = None, reading: bool = False) -> Kinds:
        """Kinds of caches, as `kvattn.memory.caches.layers` has them."""
        asked = self.scenario
        found = caches.layers(
            asked.model,
            policy=asked.policy,
            codec=asked.codec,
            dtype=asked.dtype,
            backend=asked.device.backend,
            only=only,
            num_kv_heads=num_kv_heads,
            reading=reading,
        )
        return found if asked.page_size is None else caches.paged(found, asked.page_size)

    @functools.cached_property
    def whole(self) -> Kinds:
        """One copy of all caches."""
        return self.kinds()

    @functools.cached_property
    def stages(self) -> list[Kinds]:
        """What a device of each stage keeps."""
        return [self.kinds(only, self.placement.num_kv_heads) for only in self.placement.stage_layers]

    @functools.cached_property
    def readers(self) -> list[Kinds]:
        """What its layers attend to: a cache once for each of them."""
        return [self.kinds(only, self.placement.num_kv_heads, reading=True) for only in self.placement.stage_layers]

    def row_bytes(self, length: int, held: int | None = None) -> int:
        """One copy of a sequence of up to `length` tokens, of which it has `held`."""
        return total(self.whole, lambda layer: layer.row_bytes(length, held))

    def device_row_bytes(self, length: int, held: int | None = None) -> int:
        """What a device keeps of such a sequence."""
        parts = self.placement.parts
        return max(total(kinds, lambda layer: layer.row_bytes(length, held, parts)) for kinds in self.stages)

    def device_token_bytes(self) -> float:
        """What a device keeps of one more token, on average."""
        return max(total(kinds, lambda layer: layer.part_bytes(self.placement.parts)) for kinds in self.stages)

    def device_read_bytes(self, length: int) -> float:
        """What a step reads on a device of a sequence that has `length` tokens."""
        parts = self.placement.parts
        return max(total(kinds, lambda layer: layer.read_bytes(length, parts)) for kinds in self.readers)
