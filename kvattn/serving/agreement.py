"""Whether processes that must decide alike did: their digests, step by step, compared every so many steps."""

from collections.abc import Callable, Sequence

from kvattn.errors import ConfigError, DivergedError, DTypeError, RangeError
from kvattn.serving import checks

DIGEST_BYTES = 32
"""Of a digest: SHA-256."""


class Agreement:
    """Compares this process with the others.

    Args:
        exchange: takes bytes to all processes, and brings the bytes of each, in the same order everywhere. It is called
            in the same step by all of them.
        every: steps from one comparison to the next.

    Raises:
        ConfigError, DTypeError: fewer than one step, no int.

    >>> others = Agreement(lambda mine: [mine, mine], every=2)
    >>> others.step(bytes(32))
    >>> others.step(bytes(32))
    >>> others.num_compared
    2
    """

    def __init__(self, exchange: Callable[[bytes], Sequence[bytes]], *, every: int = 64):
        self.every = checks.integer("every", every, 1, ConfigError)
        self._exchange = exchange
        self._noted = bytearray()
        self._compared = 0

    @property
    def num_compared(self) -> int:
        """Steps that all processes have done alike."""
        return self._compared

    def step(self, digest: bytes) -> None:
        """Notes one step, and compares if it is time.

        Args:
            digest: of 32 bytes, of all that was done so far: `Ledger.digest`.

        Raises:
            DivergedError: processes differ; it names the first step at which they do.
            DTypeError, RangeError: no bytes, or not so many.
        """
        if not isinstance(digest, bytes):
            raise DTypeError(f"digest must be bytes, got {digest!r} of type {type(digest).__name__}.")
        if len(digest) != DIGEST_BYTES:
            raise RangeError(f"digest must have {DIGEST_BYTES} bytes, got {len(digest)}.")
        self._noted += digest
        if len(self._noted) == self.every * DIGEST_BYTES:
            self.compare()

    def compare(self) -> None:
        """Compares the steps since the last comparison now. All processes must.

        Raises:
            DivergedError: processes differ.
        """
        mine = bytes(self._noted)
        found = [bytes(each) for each in self._exchange(mine)]
        step = first_difference(found)
        if step is not None:
            groups: dict[bytes, list[int]] = {}
            for process, each in enumerate(found):
                groups.setdefault(each[step * DIGEST_BYTES : (step + 1) * DIGEST_BYTES], []).append(process)
            raise DivergedError(self._compared + step, sorted(groups.values()))
        self._compared += len(mine) // DIGEST_BYTES
        self._noted.clear()


def first_difference(histories: Sequence[bytes]) -> int | None:
    """The first step, counted from 0, at which not all histories have the same digest; None: there is none.

    Args:
        histories: of each process, the digests of its steps one after the other. A step that one has and another has
            not is a difference.
    """
    longest = max(map(len, histories), default=0)
    for start in range(0, longest, DIGEST_BYTES):
        if len({each[start : start + DIGEST_BYTES] for each in histories}) > 1:
            return start // DIGEST_BYTES
    return None
