"""What is below a pool of pages: prefixes that had to leave the device, in tiers, and their way back.

Each process of an engine has tiers of its own, all with the same records unless a disk was full, a file was lost, or
one of them began without. What is decided goes by what all of them have.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Int32

from kvattn.serving.kinds import Kind
from kvattn.serving.matches import Leaving, Page
from kvattn.serving.records import Namespace, PageName, Record, page_names
from kvattn.serving.stack import Tiers, usable

Exchange = Callable[[bytes], Sequence[bytes]]
"""Takes bytes of this process to all, and brings those of each. All call it in the same order."""


class Gone(NamedTuple):
    """Pages on the device whose content is to be kept below.

    Attributes:
        names: of their content.
        pages: as a tree has them.
    """

    names: list[PageName]
    pages: list[Page]


class Below:
    """Tiers, and what an engine has to do for them.

    Args:
        tiers: the fastest first.
        kind: of record.
        exchange: with the other processes of the engine; None: there are none.

    Attributes:
        prompt_tokens: tokens of prompts that each tier gave.
    """

    def __init__(self, tiers: Tiers, kind: Kind, exchange: Exchange | None = None):
        self.tiers = tiers
        self.kind = kind
        self._exchange = exchange
        self.prompt_tokens = [0] * len(tiers.tiers)
        self._gone: list[Gone] = []

    def find(self, tokens: Int32[np.ndarray, " S"], namespace: Hashable, start: int) -> list[PageName]:
        """The pages of a text from `start` on that are there, as far as is known without reading them."""
        size = self.kind.page_size
        names = page_names(self.kind, cast(Namespace, namespace), tokens)
        self.tiers.touch(names[: start // size])
        names = names[start // size :]
        count = self.tiers.find(names)
        if self._exchange is not None and names:
            count = min(map(int, self._exchange(b"%d" % count)))
        return names[:count]

    def load(self, names: list[PageName]) -> list[Record]:
        """Their records, as many as can be used."""
        where = [next((i for i, tier in enumerate(self.tiers.tiers) if name.key in tier), 0) for name in names]
        records = self.tiers.load(names) if names else []
        if self._exchange is not None:
            records = self._everywhere(self._exchange, records)
        for i in where[: len(records)]:
            self.prompt_tokens[i] += self.kind.page_size
        return records

    def leaves(self, text: Leaving) -> None:
        """Remembers the last pages of a text, until `take`."""
        tokens = np.frombuffer(text.text, np.int32)
        names = page_names(self.kind, cast(Namespace, text.namespace), tokens)[-len(text.pages) :]
        several = any(window is not None for window in self.kind.windows)
        wanted = [i for i, name in enumerate(names) if several or name.key not in self.tiers]
        if self._exchange is not None:  # pages are read from the device by all or none
            each = self._exchange(bytes(i in wanted for i in range(len(names))))
            wanted = [i for i, anybody in enumerate(zip(*each, strict=True)) if any(anybody)]
        if wanted:
            self._gone.append(Gone([names[i] for i in wanted], [text.pages[i] for i in wanted]))

    def take(self) -> list[Gone]:
        """What has to be read from the device now, before its pages are written to."""
        gone, self._gone = self._gone, []
        return gone

    def _everywhere(self, exchange: Exchange, records: list[Record]) -> list[Record]:
        """What of these records every process has: as many, and of each the arrays of the same groups."""
        groups = range(len(self.kind.windows))
        mine = bytes(record.has(g) for record in records for g in groups)
        common = [all(each) for each in zip(*exchange(mine), strict=False)]
        specs, found = self.kind.arrays, []
        for record, start in zip(records, range(0, len(common), len(groups)), strict=False):
            there = common[start : start + len(groups)]
            arrays = {name: x for name, x in record.arrays.items() if there[specs[name].group]}
            found.append(dataclasses.replace(record, arrays=arrays))
        return usable(found)
