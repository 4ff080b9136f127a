"""What is below a pool of pages: prefixes that had to leave the device, in tiers, and their way back."""

from collections.abc import Hashable
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Int32

from kvattn.serving.kinds import Kind
from kvattn.serving.matches import Leaving, Page
from kvattn.serving.records import Namespace, PageName, Record, page_names
from kvattn.serving.stack import Tiers


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

    Attributes:
        prompt_tokens: tokens of prompts that each tier gave.
    """

    def __init__(self, tiers: Tiers, kind: Kind):
        self.tiers = tiers
        self.kind = kind
        self.prompt_tokens = [0] * len(tiers.tiers)
        self._gone: list[Gone] = []

    def find(self, tokens: Int32[np.ndarray, " S"], namespace: Hashable, start: int) -> list[PageName]:
        """The pages of a text from `start` on that are there, as far as is known without reading them."""
        size = self.kind.page_size
        names = page_names(self.kind, cast(Namespace, namespace), tokens)
        self.tiers.touch(names[: start // size])
        names = names[start // size :]
        return names[: self.tiers.find(names)]

    def load(self, names: list[PageName]) -> list[Record]:
        """Their records, as many as can be used."""
        where = [next((i for i, tier in enumerate(self.tiers.tiers) if name.key in tier), 0) for name in names]
        records = self.tiers.load(names) if names else []
        for i in where[: len(records)]:
            self.prompt_tokens[i] += self.kind.page_size
        return records

    def leaves(self, text: Leaving) -> None:
        """Remembers the last pages of a text, until `take`."""
        tokens = np.frombuffer(text.text, np.int32)
        names = page_names(self.kind, cast(Namespace, text.namespace), tokens)[-len(text.pages) :]
        several = any(window is not None for window in self.kind.windows)
        wanted = [i for i, name in enumerate(names) if several or name.key not in self.tiers]
        if wanted:
            self._gone.append(Gone([names[i] for i in wanted], [text.pages[i] for i in wanted]))

    def take(self) -> list[Gone]:
        """What has to be read from the device now, before its pages are written to."""
        gone, self._gone = self._gone, []
        return gone
