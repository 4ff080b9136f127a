"""The processes of an engine: what they tell each other, and how long they wait. Without JAX.

All that is said goes through a store of bytes by name that every process reaches (`kvattn.serving.processes`). Nobody
waits for ever: who waits looks every now and then whether somebody has said that all is lost, and says so himself when
his time is up.
"""

import json
import time
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from kvattn.errors import HostLostError, HostMismatchError, KVAttnError

_LOOK = 0.5
"""Seconds from one look at what others may have said to the next."""

_SHORTEST, _LONGEST = 5e-5, 2e-3
"""Seconds from one look at a device to the next, which grow while nothing comes."""

_NOBODY = "all is lost"


@runtime_checkable
class Store(Protocol):
    """Bytes by name, that all processes see."""

    def put(self, name: str, value: bytes) -> None:
        """Stores bytes, in place of others if there are any."""
        ...

    def get(self, name: str, seconds: float) -> bytes | None:
        """Bytes, once they are there; None: they did not come in time."""
        ...

    def drop(self, name: str) -> None:
        """Forgets bytes."""
        ...


class Peers:
    """This process among those of an engine.

    Args:
        store: what all of them reach.
        number: of this process.
        count: of all.
        timeout: seconds to wait for another.
        name: of the engine, the same in all processes, and of no other engine.

    Raises:
        HostLostError: by every call: a process is gone or late, or has said that all is lost.
    """

    def __init__(self, store: Store, number: int, count: int, timeout: float, name: str):
        self.number = number
        self.count = count
        self.timeout = timeout
        self._store = store
        self._name = name
        self._rounds = 0
        self._told: list[str] = []
        self._lost: HostLostError | None = None

    def meet(self, facts: Mapping[str, str]) -> None:
        """Waits for all, and compares what they begin with.

        Raises:
            HostMismatchError: it is not the same everywhere.
        """
        each = [json.loads(found) for found in self.exchange(json.dumps(dict(facts), sort_keys=True).encode())]
        for number, other in enumerate(each):
            for what in sorted({*each[0], *other}):
                if other.get(what) != each[0].get(what):
                    raise HostMismatchError(
                        f"process {number} began with another {what} than process 0: {other.get(what)}, not "
                        f"{each[0].get(what)}. Start the same program with the same arguments in all processes."
                    )

    def exchange(self, mine: bytes) -> list[bytes]:
        """Bytes of all processes, in their order. All must call it, in the same step."""
        self._rounds += 1
        self._put(f"exchange/{self._rounds}/{self.number}", mine)
        found = [self._get(f"exchange/{self._rounds}/{process}", process) for process in range(self.count)]
        # Whoever came to this round has read all of the one before.
        self._forget(f"exchange/{self._rounds - 1}/{self.number}")
        self._told, told = self._told[-1:], self._told[:-1]
        for name in told:
            self._forget(name)
        return found

    def tell(self, step: int, message: bytes) -> bytes:
        """What process 0 has to say at a step: its `message`; the others' is not asked for."""
        self._check()
        name = f"step/{step}"
        if self.number:
            self._put(f"at/{self.number}", b"%d" % step)
            return self._get(name, 0)
        self._put(name, message)
        self._told.append(name)
        return message

    def wait(self, step: int, is_ready: Callable[[], bool]) -> None:
        """Waits until something is there that all processes work at."""
        until, looked, pause = time.monotonic() + self.timeout, time.monotonic(), _SHORTEST
        while not is_ready():
            now = time.monotonic()
            if now - looked > _LOOK:
                self._look(0.0)
                looked = now
            if now > until:
                raise self.lose(
                    f"step {step} did not end within {self.timeout:g} s in process {self.number}: {self._who(step)}"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)

    def lose(self, why: str) -> HostLostError:
        """Tells the others that this process cannot go on; the error to raise. The first reason is kept."""
        if self._lost is None:
            self._lost = HostLostError(why)
            try:
                if self._store.get(self._full(_NOBODY), 0.0) is None:
                    self._store.put(self._full(_NOBODY), why.encode())
            except ConnectionError:
                pass
        return self._lost

    def failed(self, error: BaseException) -> HostLostError:
        """As `lose`, because of an error here; where somebody else has said why before, that."""
        if self._lost is None:
            try:
                self._look(_LOOK)
            except HostLostError as lost:
                return lost
        if isinstance(error, KVAttnError):
            return self.lose(f"process {self.number} could not go on: {error}")
        return self.lose(
            f"process {self.number} could not go on, which is what it looks like where another has ended: "
            f"{type(error).__name__}: {error}"
        )

    # Below.

    def _full(self, name: str) -> str:
        return f"{self._name}/{name}"

    def _check(self) -> None:
        if self._lost is not None:
            raise HostLostError(*self._lost.args)

    def _put(self, name: str, value: bytes) -> None:
        self._check()
        try:
            self._store.put(self._full(name), value)
        except ConnectionError as error:
            raise self._unreachable(error) from error

    def _get(self, name: str, whose: int) -> bytes:
        until = time.monotonic() + self.timeout
        while True:
            self._check()
            left = until - time.monotonic()
            try:
                found = self._store.get(self._full(name), max(min(left, _LOOK), 0.0))
            except ConnectionError as error:
                raise self._unreachable(error) from error
            if found is not None:
                return found
            self._look(0.0)
            if left <= 0:
                raise self.lose(
                    f"process {whose} did not come within {self.timeout:g} s to where process {self.number} waits for "
                    f"it ({name}): it is gone or late, or was not started."
                )

    def _look(self, seconds: float) -> None:
        """Raises what somebody has said."""
        try:
            why = self._store.get(self._full(_NOBODY), seconds)
        except ConnectionError as error:
            raise self._unreachable(error) from error
        if why is not None:
            self._lost = HostLostError(why.decode())
            raise self._lost

    def _unreachable(self, error: Exception) -> HostLostError:
        return self.lose(f"process 0, by which processes reach each other, is gone: {error}")

    def _who(self, step: int) -> str:
        """Which processes have not come to a step."""
        late = []
        for process in range(1, self.count):
            at = self._store.get(self._full(f"at/{process}"), 0.0)
            if at is None or int(at) < step:
                late.append(process)
        return f"process {', '.join(map(str, late))} did not come to it" if late else "all have come to it"

    def _forget(self, name: str) -> None:
        try:
            self._store.drop(self._full(name))
        except ConnectionError as error:
            raise self._unreachable(error) from error
