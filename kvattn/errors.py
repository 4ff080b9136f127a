"""The error family.

Every error kvattn raises on purpose derives from `KVAttnError` and from the built-in exception a
caller would expect, so `except ValueError` keeps working. A message says what was expected, what
was given, and what to do.

Values that are only known inside `jax.jit` cannot raise: there the offending row is left
unchanged, its output is defined (zeros), a sticky status bit is set, and
`kvattn.KVCache.check` raises the error named here.
"""

__all__ = [
    "BlockStateError",
    "CacheCorruptionError",
    "CacheVersionError",
    "CapacityError",
    "ConfigError",
    "DTypeError",
    "DivergedError",
    "DuplicateSequenceError",
    "HostLostError",
    "HostMismatchError",
    "KVAttnError",
    "MissingFileError",
    "MissingLibraryError",
    "OffloadError",
    "OutOfBlocksError",
    "RangeError",
    "ShapeError",
    "ShardingError",
    "StaleCacheError",
    "UnknownNameError",
    "UnknownSequenceError",
    "UnsupportedError",
]


class KVAttnError(Exception):
    """Base of every error kvattn raises on purpose."""


class ConfigError(KVAttnError, ValueError):
    """A setting that can never work: head counts, capacities, unknown names, bad combinations."""


class UnknownNameError(ConfigError, KeyError):
    """A name that a table (models, devices) does not have; the message lists those it has, closest first."""

    def __str__(self) -> str:  # KeyError would quote it
        return str(self.args[0]) if self.args else ""


class ShapeError(KVAttnError, ValueError):
    """An array whose shape does not fit the others."""


class DTypeError(KVAttnError, TypeError):
    """A value of the wrong type: an integer query, a float length, a bool where an int belongs."""


class RangeError(KVAttnError, ValueError):
    """A length, position, window, scale or id outside its range."""


class CapacityError(KVAttnError, RuntimeError):
    """An append that does not fit into the cache. Nothing of it was written."""


class OutOfBlocksError(CapacityError, MemoryError):
    """A pool that has too few free pages."""


class BlockStateError(KVAttnError, RuntimeError):
    """A page used against its state: freed twice, written while shared."""


class UnknownSequenceError(KVAttnError, KeyError):
    """A sequence id that is not known."""


class DuplicateSequenceError(KVAttnError, ValueError):
    """A sequence id that is taken."""


class DivergedError(KVAttnError, RuntimeError):
    """Processes that must decide alike did not. Nothing that they computed since can be relied on.

    Attributes:
        step: the first step, counted from 0, after which they were not in the same state.
        processes: the processes that agree with each other, one list for each state.
    """

    def __init__(self, step: int, processes: list[list[int]]):
        states = " and ".join(", ".join(map(str, each)) for each in processes)
        super().__init__(
            f"processes differ since step {step}: {states} are not in the same state. Each must be given the same "
            "calls in the same order, and run the same version: begin anew, and compare more often to come closer."
        )
        self.step = step
        self.processes = processes

    def __reduce__(self) -> tuple[type["DivergedError"], tuple[int, list[list[int]]]]:
        return type(self), (self.step, self.processes)


class HostMismatchError(KVAttnError, ValueError):
    """Processes that were to work as one began with something different: another version, model or setting."""


class HostLostError(KVAttnError, ConnectionError):
    """A process that ended, broke off, or did not come in time. The others cannot go on without it."""


class StaleCacheError(KVAttnError, RuntimeError):
    """A cache whose buffers were donated to an earlier step, or given twice to one step."""


class MissingLibraryError(KVAttnError, ImportError):
    """A library that only some installations have. The message says which extra brings it."""


class CacheCorruptionError(KVAttnError, ValueError):
    """A stored cache or checkpoint that is damaged."""


class CacheVersionError(CacheCorruptionError):
    """A stored cache of another version, model or data type."""


class MissingFileError(CacheCorruptionError, FileNotFoundError):
    """A file of a checkpoint that is not there."""


class OffloadError(KVAttnError, OSError):
    """A transfer to or from host memory or disk that failed."""


class ShardingError(KVAttnError, ValueError):
    """A placement that does not divide, or a mesh axis that does not exist."""


class UnsupportedError(KVAttnError, NotImplementedError):
    """Right in itself, but this backend, implementation or combination cannot do it."""
