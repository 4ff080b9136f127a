"""A thread for what must not be waited for."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future


class Worker[T]:
    """Does calls one after another, in a thread that is there while there is something to do.

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
            if self._is_running:
                self._changed.notify()
            else:
                self._is_running = True
                threading.Thread(target=self._run, name=self._name, daemon=self._daemon).start()
        return future

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._calls:
                    if not self._changed.wait(self._linger) and not self._calls:
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
