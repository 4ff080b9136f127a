"""What a check found, and how to see it again."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kvattn.errors import UnknownNameError

Make = Callable[..., Any]
"""``make(batch_size, capacity, num_kv_heads, head_dim, dtype)``: an empty cache."""
Step = Callable[..., tuple[Any, Any]]
"""``step(cache, query, key, value)``: appends and attends; gives the output and the cache."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One step: queries [B, T, N, H], keys and values [B, T, K, H], and which tokens are real.

    Attributes:
        query: [B, T, N, H].
        key: [B, T, K, H].
        value: [B, T, K, H].
        num_new: int32[B], how many tokens of each row are real; None: all.
        padding: the side on which the others lie.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    num_new: np.ndarray | None = None
    padding: str = "right"

    @property
    def options(self) -> dict[str, Any]:
        """What a step is given by name: nothing where all tokens are real."""
        return {} if self.num_new is None else {"num_new": self.num_new, "padding": self.padding}

    @property
    def real(self) -> np.ndarray:
        """bool [B, T]: which tokens are real."""
        batch, length = self.query.shape[:2]
        if self.num_new is None:
            return np.ones((batch, length), bool)
        t, counts = np.arange(length)[None], np.asarray(self.num_new)[:, None]
        return t < counts if self.padding == "right" else t >= length - counts

    def __str__(self) -> str:
        pads = "" if self.num_new is None else f", num_new={self.num_new.tolist()}, padding={self.padding!r}"
        return f"T={self.query.shape[1]}{pads}"


class Failure(Exception):
    """What a check raises where a claim does not hold."""

    def __init__(self, expected: str, seen: str, calls: Sequence[Call] = (), sizes: tuple[Any, ...] = ()) -> None:
        super().__init__(f"expected {expected}; saw {seen}")
        self.expected, self.seen, self.calls, self.sizes = expected, seen, tuple(calls), sizes


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of one check.

    Attributes:
        name: of the check.
        status: "ok", "failed", "not offered" (nothing is claimed) or "not tried" (what it rests on failed).
        expected: what should have been seen.
        seen: what was.
        again: how to see it again, in words.
        calls: the steps that lead to it, the last one shows it.
        sizes: what `make` was given.
    """

    name: str
    status: str
    expected: str = ""
    seen: str = ""
    again: str = ""
    calls: tuple[Call, ...] = dataclasses.field(default=(), repr=False)
    sizes: tuple[Any, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: it held, or nobody claims it."""
        return self.status in ("ok", "not offered")

    def replay(self, make: Make, step: Step) -> list[Any]:
        """Makes the cache and the calls again, in a debugger for one.

        Returns:
            The outputs [B, T, N, H], step by step. The last is the one that is wrong.
        """
        cache, outs = make(*self.sizes), []
        for call in self.calls:
            out, cache = step(cache, call.query, call.key, call.value, **call.options)
            outs.append(out)
        return outs

    def __str__(self) -> str:
        if self.status == "failed":
            lines = [f"FAILED       {self.name}", f"  expected   {self.expected}", f"  saw        {self.seen}"]
            return "\n".join([*lines, f"  again      {self.again}"])
        return f"{self.status:<12} {self.name}" + (f": {self.seen}" if self.seen else "")


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check_cache` found. Print it; ask `ok`; or call `raise_if_failed` in a test."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether all that is claimed holds."""
        return all(finding.ok for finding in self.findings)

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return [finding.name for finding in self.findings if finding.status == "failed"]

    def raise_if_failed(self) -> "Report":
        """The report, if all that is claimed holds.

        Raises:
            AssertionError: something does not; the message is the report.
        """
        if not self.ok:
            raise AssertionError(f"the cache does not do what is claimed\n{self}")
        return self

    def as_dict(self) -> dict[str, str]:
        """The status of every check, by name."""
        return {finding.name: finding.status for finding in self.findings}

    def __getitem__(self, name: str) -> Finding:
        for finding in self.findings:
            if finding.name == name:
                return finding
        known = ", ".join(repr(finding.name) for finding in self.findings)
        raise UnknownNameError(f"no check is called {name!r}. There are {known}.")

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __str__(self) -> str:
        count = lambda status: sum(finding.status == status for finding in self.findings)
        failures = [str(finding) for finding in self.findings if finding.status == "failed"]
        others = [str(finding) for finding in self.findings if finding.status != "failed"]
        words = [f"{count(status)} {status}" for status in ("ok", "failed", "not offered", "not tried")]
        return "\n".join([*failures, *others, ", ".join(words)])
