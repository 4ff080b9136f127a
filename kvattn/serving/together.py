"""An engine that several hosts are: what every process does beside its own ticks, so that all of them do the same.

Process 0 takes requests, and says at the beginning of every step which came and which were cancelled. All processes
then decide alike, by what they were told and by the tokens that came, which are the same everywhere. That they did is
compared every so many steps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from kvattn.errors import DivergedError, HostLostError, UnsupportedError
from kvattn.models.decoder import Decoder
from kvattn.serving import digests
from kvattn.serving.agreement import Agreement
from kvattn.serving.arrivals import Arrival, packed, unpacked
from kvattn.serving.hosts import Hosts
from kvattn.serving.processes import peers_of
from kvattn.serving.request import Request
from kvattn.serving.weights import digest_of


class Together:
    """One process of an engine over several hosts; the only one, where all hosts are devices of it.

    Args:
        hosts: settings.
        model: on its mesh.

    Attributes:
        hosts: settings.
        num_hosts: positions along the axis of hosts.

    Raises:
        HostLostError: by `meet`, `begin`, `wait` and `end`: another process is gone or late.
    """

    def __init__(self, hosts: Hosts, model: Decoder):
        assert model.split.mesh is not None
        self.hosts = hosts
        self.num_hosts = model.split.mesh.shape[hosts.axis]
        self._peers = peers_of(model.split.mesh, hosts.timeout)
        self._agreement = None if self._peers is None else Agreement(self._peers.exchange, every=hosts.compare_every)
        self._step = 0
        self._digest = digests.NOTHING_DONE
        self._broken: DivergedError | None = None
        self._arrivals: list[Arrival] = []
        self._cancelled: list[int] = []
        self._number = 0
        self._requests: dict[int, Request] = {}

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return self._peers is None

    @property
    def exchange(self) -> Callable[[bytes], Sequence[bytes]] | None:
        """Takes bytes to all processes, and brings those of each; None: there is no other."""
        return None if self._peers is None else self._peers.exchange

    def least(self, mine: int) -> int:
        """The least of a number that each process has."""
        return mine if self._peers is None else min(map(int, self._peers.exchange(b"%d" % mine)))

    def meet(self, model: Decoder, settings: dict[str, Any]) -> None:
        """Waits for the other processes, and compares what they begin with.

        Raises:
            HostMismatchError: another version, model or setting.
        """
        if self._peers is not None:
            from kvattn import __version__

            versions = {"version of kvattn": __version__, "version of jax": jax.__version__}
            found = {
                "model": digest_of(model, (model.config, model.split), whole_only=True),
                **{name: repr(value) for name, value in settings.items()},
            }
            self._peers.meet({**versions, **found, "hosts": repr(self.hosts)})

    # Requests.

    def check_submit(self) -> None:
        """Raises `UnsupportedError` where requests do not come in."""
        if self._peers is not None and self._peers.number:
            raise UnsupportedError(
                f"requests come in at process 0, this is process {self._peers.number}: call step() or run() here, "
                "which get them from there."
            )

    def submitted(self, request: Request, arrival: Arrival) -> None:
        """Notes a request that came in here; the others are told with the next step."""
        if self._peers is None:
            return
        self._requests[self._number] = request
        self._number += 1
        self._arrivals.append(arrival)

    def cancel(self, request: Request) -> bool:
        """Whether a request that is to be cancelled is once all processes know it, with the next step."""
        if self._peers is None:
            return False
        self.check_submit()
        self._cancelled += [number for number, each in self._requests.items() if each is request]
        return True

    # Steps.

    def begin(self, accept: Callable[[Arrival], Request]) -> None:
        """Begins a step: takes over what came in at process 0.

        Args:
            accept: what makes a request of one that came.
        """
        if self._peers is None:
            return
        if self._broken is not None:
            raise self._broken
        for number in [number for number, request in self._requests.items() if request.is_over]:
            del self._requests[number]
        message = self._peers.tell(self._step, packed(self._arrivals, self._cancelled))
        self._digest = digests.after(self._digest, message)
        self._arrivals, self._cancelled = [], []
        arrivals, cancelled = unpacked(message)
        if self._peers.number:
            for arrival in arrivals:
                self._requests[self._number] = accept(arrival)
                self._number += 1
        for number in cancelled:
            request = self._requests.get(number)
            if request is not None and not request.is_over:
                request.state = "cancelled"

    def wait(self, arrays: Sequence[Any]) -> None:
        """Waits until what all processes compute is there."""
        if self._peers is not None:
            self._peers.wait(self._step, lambda: all(x.is_ready() for x in arrays))

    def came(self, tokens: Int[np.ndarray, "..."]) -> None:
        """Notes tokens that came, of any shape."""
        if self._peers is not None:
            self._digest = digests.after(self._digest, tokens.tobytes())

    def end(self, digest: bytes) -> None:
        """Ends a step.

        Args:
            digest: of the pool (`kvattn.serving.hosted`).

        Raises:
            DivergedError: the processes did not do the same.
        """
        if self._agreement is None:
            return
        self._digest = digests.after(self._digest, digest)
        self._agreement.step(self._digest)
        self._step += 1

    def error_of(self, error: BaseException) -> BaseException:
        """What to raise of an error in a step, once the others know that this process cannot go on."""
        if self._peers is None:
            return error
        if isinstance(error, DivergedError):  # all processes have seen it
            self._broken = error
            return error
        if isinstance(error, HostLostError):
            return error
        lost = self._peers.failed(error)
        return lost if isinstance(error, Exception) else error
