"""The caches of a scenario, and what each device holds of them."""

import dataclasses
import functools

from kvattn.errors import UnsupportedError
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
        """Divides as the scenario says.

        Raises:
            UnsupportedError: slots divided, of tokens that are encoded together.
        """
        placement = Placement(asked.model, asked.batch_size, asked.num_devices, asked.pipeline_stages, asked.by)
        if placement.parts > 1 and asked.codec is not None and asked.codec.rows is not None:
            raise UnsupportedError(
                f"{asked.codec} encodes {asked.codec.rows} tokens together, so devices cannot share the slots of a "
                'sequence: use by="heads" or by="batch", or a codec of single tokens such as kvattn.Int4().'
            )
        return cls(asked, placement)

    def kinds(self, only: range | None = None, head_parts: int = 1, reading: bool = False) -> Kinds:
        """Kinds of caches, as `kvattn.memory.caches.layers` has them."""
        asked = self.scenario
        return caches.layers(
            asked.model,
            policy=asked.policy,
            codec=asked.codec,
            dtype=asked.dtype,
            backend=asked.device.backend,
            only=only,
            head_parts=head_parts,
            reading=reading,
            page_size=asked.page_size,
            prefill_chunk=asked.prefill_chunk,
        )

    @functools.cached_property
    def whole(self) -> Kinds:
        """One copy of all caches."""
        return self.kinds()

    @functools.cached_property
    def stages(self) -> list[Kinds]:
        """What a device of each stage keeps."""
        return [self.kinds(only, self.placement.head_parts) for only in self.placement.stage_layers]

    @functools.cached_property
    def readers(self) -> list[Kinds]:
        """What its layers attend to: a cache once for each of them."""
        return [self.kinds(only, self.placement.head_parts, reading=True) for only in self.placement.stage_layers]

    @property
    def notes(self) -> tuple[str, ...]:
        """What one should know about its pages."""
        asked, notes = self.scenario, []
        if asked.page_size is not None and asked.length is not None:
            layers_of: dict[int, int] = {}
            for layer, count in self.whole.items():
                pages = layer.num_pages(asked.mean_length or asked.length)
                layers_of[pages] = layers_of.get(pages, 0) + count
            each = [f"{_plural(pages, 'page')} in {_plural(n, 'layer')}" for pages, n in sorted(layers_of.items())]
            if len(each) > 1:  # one number for all would have windows hold what they never read
                notes.append(f"a sequence holds {' and '.join(each)}: give each layer's pool its own num_pages")
        if asked.page_size is not None and asked.policy is not None and asked.policy.is_uneven:
            notes.append(
                f"{type(asked.policy).__name__} heads give back pages as the text allows, which is not known before: "
                "counted is the most, with heads that keep everything"
            )
        return tuple(notes)

    def row_bytes(self, length: int, held: int | None = None) -> int:
        """One copy of a sequence of up to `length` tokens, of which it has `held`."""
        return total(self.whole, lambda layer: layer.nbytes(1, length, held))

    def device_bytes(self, num_rows: int, length: int, held: int | None = None) -> int:
        """What a device keeps of so many such sequences, as far as they come to it."""
        parts = self.placement.parts
        return max(total(kinds, lambda layer: layer.nbytes(num_rows, length, held, parts)) for kinds in self.stages)

    def device_token_bytes(self) -> float:
        """What a device keeps of one more token, on average."""
        return max(total(kinds, lambda layer: layer.part_bytes(self.placement.parts)) for kinds in self.stages)

    def device_read_bytes(self, length: int) -> float:
        """What a step reads on a device of a sequence that has `length` tokens."""
        parts = self.placement.parts
        return max(total(kinds, lambda layer: layer.read_bytes(length, parts)) for kinds in self.readers)


def _plural(count: int, of: str) -> str:
    return f"{count:,} {of}{'s' * (count > 1)}"
