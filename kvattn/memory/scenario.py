"""What the planner is asked, checked."""

import dataclasses
import numbers

from kvattn import _checks
from kvattn.codecs import Codec
from kvattn.errors import DTypeError, RangeError
from kvattn.memory.placement import settled
from kvattn.memory.specs import DeviceSpec, ModelSpec
from kvattn.policies import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    """The arguments of `kvattn.memory.plan`, which explains them and names what is raised.

    Model, device and types are looked up already; `by` becomes what "auto" means. Policy, codec and pages are checked
    where caches are sized (`kvattn.memory.caches.layers`).
    """

    model: ModelSpec
    device: DeviceSpec
    batch_size: int | None
    length: int | None
    mean_length: int | None
    policy: Policy | None
    codec: Codec | None
    dtype: str
    weight_dtype: str
    num_devices: int
    pipeline_stages: int
    by: str
    memory_fraction: float
    reserved_bytes: int
    page_size: int | None
    prefill_chunk: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "mean_length"):
            value = getattr(self, name)
            if value is not None and _checks.integer(name, value, 1, RangeError) > _checks.INT32_MAX:
                raise RangeError(f"{name} must fit in int32, got {value}.")
        if self.mean_length is not None and (self.length is None or self.mean_length > self.length):
            raise RangeError(f"mean_length ({self.mean_length}) must be at most length, got length {self.length}.")
        _checks.integer("reserved_bytes", self.reserved_bytes, 0, RangeError)
        object.__setattr__(self, "memory_fraction", _share("memory_fraction", self.memory_fraction))
        by = settled(self.by, self.model, self.batch_size, self.num_devices, self.pipeline_stages)
        object.__setattr__(self, "by", by)


def _share(name: str, value: object) -> float:
    """Checks a number above 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise DTypeError(f"{name} must be a number, got {value!r}.")
    if not 0 < float(value) <= 1:
        raise RangeError(f"{name} must lie in (0, 1], got {value}.")
    return float(value)
