"""How an engine works over several hosts: what is said to it."""

import dataclasses

from kvattn.errors import ConfigError, DTypeError
from kvattn.serving import checks


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Settings of an engine over several hosts.

    Attributes:
        axis: the mesh axis of hosts: position h along it is host h, with the pages of its devices.
        timeout: seconds that a process waits for another one, to come to a step and to finish it. Compiling counts:
            call `Engine.warm_up` first, or give more.
        compare_every: steps from one comparison of the processes' digests to the next (`kvattn.serving.Agreement`).
        repay: pages of each group of layers that move home in a step, at most.

    Raises:
        ConfigError, DTypeError: other types, a timeout or number that is not positive.
    """

    axis: str
    timeout: float = 30.0
    compare_every: int = 64
    repay: int = 8

    def __post_init__(self):
        if not isinstance(self.axis, str):
            raise DTypeError(f"axis must be the name of a mesh axis, got {self.axis!r}.")
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, int | float) or not 0 < self.timeout < 1e6:
            raise ConfigError(f"timeout must be a positive number of seconds, got {self.timeout!r}.")
        checks.integer("compare_every", self.compare_every, 1, ConfigError)
        checks.integer("repay", self.repay, 0, ConfigError)
