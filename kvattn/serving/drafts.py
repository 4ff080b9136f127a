"""Guesses of the next tokens, to be verified together: prompt lookup.

What followed the last tokens when they came before follows them again (Saxena, "Prompt Lookup Decoding", 2023; LLMA,
arXiv:2304.04487): in code, quotations and answers about a given text often enough.
"""

import itertools
from collections.abc import Iterable

from kvattn.serving.jobs import Job
from kvattn.serving.texts import Text

LONGEST, SHORTEST = 3, 2
"""How many last tokens are looked for, more of them first."""


class Lookup:
    """The text of a sequence, and where its pieces were last.

    >>> text = Lookup([5, 6, 7, 8, 1, 5, 6])
    >>> text.guess(3)
    [7, 8, 1]
    >>> text.push(9)
    >>> text.guess(3)
    []
    >>> Lookup([4, 1, 2, 1, 2]).guess(5)  # what repeats itself goes on
    [1, 2, 1, 2, 1]

    Attributes:
        foresaw: whether the last token is the one it would have guessed: a text that has begun to repeat something.
    """

    __slots__ = ("_after", "_text", "foresaw")

    def __init__(self, tokens: Iterable[int]):
        self.foresaw = False
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(token)

    def __len__(self) -> int:
        return len(self._text)

    def push(self, token: int) -> None:
        """The next token."""
        self.foresaw = self.guess(1) == [token]
        end = len(self._text)
        for count in range(SHORTEST, min(LONGEST, end) + 1):
            self._after[tuple(self._text[end - count :])] = end
        self._text.append(token)

    def guess(self, count: int) -> list[int]:
        """So many tokens that may come next; none where the last ones are new."""
        end = len(self._text)
        for last in range(min(LONGEST, end), SHORTEST - 1, -1):
            start = self._after.get(tuple(self._text[end - last :]))
            if start is not None:
                again = itertools.cycle(self._text[start : start + count])  # its end may be the end of the text
                return list(itertools.islice(again, count))
        return []


class Guesses:
    """Of the texts that an engine makes longer.

    Args:
        most: tokens to guess of each.
    """

    def __init__(self, most: int):
        self._most = most
        self._lookups: dict[Text, Lookup] = {}

    def guess(self, running: Iterable[Job]) -> None:
        """Says of every text that is going on what may come next (`Text.guess`).

        Only of texts whose last token was foreseen: to verify a guess costs about two steps or more where a step is
        short, so a wrong one is dearer than one that comes a token late.
        """
        for job in running:
            if job.is_beam or job.prefills:
                continue
            text = job.sequences[0]
            lookup = self._lookups.get(text)
            if lookup is None:
                lookup = self._lookups[text] = Lookup(job.prompt.tolist())
            for token in text.new[len(lookup) - len(job.prompt) :]:
                lookup.push(token)
            text.guess = lookup.guess(min(self._most, job.limit - text.num_drawn - 1)) if lookup.foresaw else []

    def forget(self, texts: Iterable[Text]) -> None:
        """Drops what is known of texts that have ended."""
        for text in texts:
            self._lookups.pop(text, None)
