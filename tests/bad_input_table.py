"""Tables of bad inputs and edge cases: what is passed, and the error (type and message) or the defined result.

``bad_inputs.txt`` lists them by number.

A test file fills a `Table` and runs it in one test::

    TABLE = Table()
    TABLE.bad(4, "a window of 0", errors.RangeError, "window", "0")(lambda: kvattn.SlidingWindow(0))

    @TABLE.defined(5, "a window larger than the capacity")
    def _():
        assert ...

    @pytest.mark.parametrize("row", TABLE.parameters())
    def test_rows(row):
        run(row)
"""

import dataclasses
import pathlib
from collections.abc import Callable, Collection
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import kvattn

LIST = {
    int(line.split()[0]): line.split(" ", 1)[1]
    for line in pathlib.Path(__file__).with_name("bad_inputs.txt").read_text().splitlines()
    if line and not line.startswith("#")
}
"""What every number stands for."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        number: of ``bad_inputs.txt``.
        what: the input in words.
        call: what is done; without an error it asserts the defined result itself.
        error: the exact exception type, None where there is a defined result.
        fragments: what the message must contain: the argument, the value.
    """

    number: int
    what: str
    call: Callable[[], Any]
    error: type[Exception] | None = None
    fragments: tuple[str, ...] = ()

    def __post_init__(self):
        assert self.number in LIST, f"{self.number} is not in bad_inputs.txt: {self.what}"
        assert "[" not in LIST[self.number], f"{self.number} is tested elsewhere: {LIST[self.number]}"


class Table:
    """Rows in the order in which they were registered."""

    def __init__(self):
        self.rows: list[Row] = []

    def bad(self, number, what, error, *fragments):
        """Registers a call that must raise `error` with all of `fragments` in its message."""

        def register(call):
            self.rows.append(Row(number, what, call, error, fragments))

        return register

    def defined(self, number, what):
        """Registers a call that must succeed, and asserts its own result."""

        def register(call):
            self.rows.append(Row(number, what, call))
            return call

        return register

    def numbers(self):
        """The numbers that have a row."""
        return {row.number for row in self.rows}

    def row(self, what):
        """The one row of these words."""
        (row,) = (row for row in self.rows if row.what == what)
        return row

    def parameters(self, slow: Collection[str] = (), wrong_types: Collection[str] = ()):
        """The rows for `pytest.mark.parametrize`, marked: slow ones, and those that give what is refused."""
        unknown = {*slow, *wrong_types} - {row.what for row in self.rows}
        assert not unknown, f"no such rows: {unknown}"
        is_wrong = lambda row: row.error is not None or row.what in wrong_types
        marks = lambda row: [pytest.mark.slow] * (row.what in slow) + [pytest.mark.wrong_types] * is_wrong(row)
        return [pytest.param(row, marks=marks(row), id=f"{row.number}-{row.what}") for row in self.rows]


def run(row):
    """Does what the row says and holds it to its result."""
    if row.error is None:
        row.call()
        return
    with pytest.raises(row.error) as caught:
        row.call()
    assert type(caught.value) is row.error, f"{type(caught.value)} was raised"
    for fragment in row.fragments:
        assert fragment in str(caught.value), f"{fragment!r} is not in: {caught.value}"


def create(**changes):
    """A small cache, with some settings replaced."""
    settings = {"batch_size": 2, "num_kv_heads": 2, "head_dim": 8, "capacity": 4, "dtype": jnp.float32}
    return kvattn.KVCache.create(**{**settings, **changes})


def step(query=None, key=None, value=None, cache=None, **settings):
    """One token for the cache of `create`, eagerly, with some arguments replaced."""
    x = np.ones((2, 1, 2, 8), np.float32)
    given = (x if a is None else a for a in (query, key, value))
    return kvattn.cached_attention(*given, create() if cache is None else cache, **settings)
