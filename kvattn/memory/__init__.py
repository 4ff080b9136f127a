"""How large is a cache, what fits, and which lever helps most: arithmetic, without making an array.

`plan` answers for a model on a device; `levers` says what one change at a time would do. `MODELS` and `DEVICES` are
tables of both, and `from_config` reads any HuggingFace ``config.json``. The command ``kvattn memory`` prints all this.
"""

from kvattn.memory.caches import bytes_per_token, cache_bytes
from kvattn.memory.devices import DEVICES
from kvattn.memory.hf_config import from_config
from kvattn.memory.levers import Lever, levers
from kvattn.memory.models import MODELS
from kvattn.memory.plan import Plan, plan
from kvattn.memory.specs import DeviceSpec, ModelSpec

__all__ = [
    "DEVICES", "MODELS", "DeviceSpec", "Lever", "ModelSpec", "Plan", "bytes_per_token", "cache_bytes",
    "from_config", "levers", "plan",
]  # fmt: skip
