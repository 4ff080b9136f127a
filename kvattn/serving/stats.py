"""What an engine has done so far."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from kvattn.serving.tiers import TierCounters


@dataclasses.dataclass(frozen=True)
class Stats(Mapping[str, Any]):
    """What an engine has done so far; also to be read as a mapping.

    Attributes:
        prompt_tokens: tokens of all prompts that were let in; of G samples G times.
        cached_prompt_tokens: those that were not computed: found in pages, or forked.
        new_tokens: tokens that came.
        pages: pages that running requests hold now, of all groups of layers.
        cached_pages: pages that are kept as prefixes now; some are of running requests too.
        waste: share of the slots in `pages` that hold no token: the ends of last pages.
        evictions: pages of prefixes that had to leave.
        preemptions: how often a request had to give its pages back and wait.
        waiting: requests that wait now.
        running: requests that have rows now.
        finished: requests that came to their end.
        failed: requests that could not go on.
        ticks: calls of `Engine.step`.
        tokens_per_second: new tokens by the time spent in ticks.
        host_seconds: of that time, what the host took for itself: neither in calls of compiled programs nor in waiting
            for what they bring.
        tier_prompt_tokens: of `cached_prompt_tokens` those that came from each tier.
        tiers: what each tier has seen.
    """

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    new_tokens: int = 0
    pages: int = 0
    cached_pages: int = 0
    waste: float = 0.0
    evictions: int = 0
    preemptions: int = 0
    waiting: int = 0
    running: int = 0
    finished: int = 0
    failed: int = 0
    ticks: int = 0
    tokens_per_second: float = 0.0
    host_seconds: float = 0.0
    tier_prompt_tokens: tuple[int, ...] = ()
    tiers: tuple[TierCounters, ...] = ()

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self.__dataclass_fields__)
