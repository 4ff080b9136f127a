"""Threads for what must not be waited for, or not for long."""

import errno
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from kvattn.errors import OffloadError


class Worker[T]:
    """Does calls one after another, in a thread that is there while there is something to do.

    Where no thread can be started (too many, or the interpreter is ending) they are done at once.

    Args:
        name: of the thread.
        daemon: whether a process may end before the calls are done.
        linger: seconds that the thread waits for another call before it ends.
    """

    def __init__(self, name: str, *, daemon: bool, linger: float = 0.2):
        self._name, self._daemon, self._linger = name, daemon, linger
        self._calls: deque[tuple[Future[T], Callable[[], T]]] = deque()
        self._changed = threading.Condition()
        self._is_running = False

    def submit(self, call: Callable[[], T]) -> "Future[T]":
        """Has a call done, after those before it."""
        future: Future[T] = Future()
        with self._changed:
            self._calls.append((future, call))
            self._changed.notify()
            if self._is_running:
                return future
            self._is_running = True
        try:
            threading.Thread(target=self._run, args=[self._linger], name=self._name, daemon=self._daemon).start()
        except RuntimeError:
            self._run(0)
        return future

    def _run(self, linger: float) -> None:
        while True:
            with self._changed:
                while not self._calls:
                    if not self._changed.wait(linger) and not self._calls:
                        self._is_running = False
                        return
                future, call = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    result = call()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
            del future, call  # what they hold may go


class Timed[T]:
    """Does calls in a thread, and waits for each of them, but not for long. While one stalls no other is tried.

    Args:
        name: of the thread. A process may end before a call is done.
        what: a call is, in messages.
    """

    def __init__(self, name: str, what: str):
        self._worker = Worker[T](name, daemon=True)
        self._what = what
        self._last: Future[T] | None = None

    def call(self, call: Callable[[], T], seconds: float) -> T:
        """Does a call; what it raises is raised.

        Raises:
            OffloadError: ETIMEDOUT: it took longer; EBUSY: an earlier one that did has not ended yet.
        """
        if self._last is not None and not self._last.done():
            raise OffloadError(errno.EBUSY, f"{self._what} was not tried: an earlier one stalls")
        self._last = self._worker.submit(call)
        try:
            return self._last.result(seconds)
        except TimeoutError:
            raise OffloadError(errno.ETIMEDOUT, f"{self._what} was not done in {seconds} s") from None
