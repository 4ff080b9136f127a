"""Compiled steps: the cache is updated in place, and one program serves every length."""

import warnings

from kvattn.testing.checks.base import Check
from kvattn.testing.report import Call, Failure
from kvattn.testing.trial import Trial

LARGE = 1024
"""Tokens of a cache that is to be updated in place: much more than anything else in a step."""


def _in_place(trial: Trial) -> None:
    """A step that is given the cache to keep returns it in the same memory, without a copy of it on the way.

    What is compiled returns the cache alone, so that what attention takes is not counted.
    """
    import jax

    sizes = trial.sizes(capacity=LARGE)
    cache = jax.tree.map(jax.numpy.asarray, trial.make(*sizes))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    new = trial.tokens(1)
    append = jax.jit(lambda cache, *new: trial.step(cache, *new)[1], donate_argnums=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*donated buffers")
        memory = append.lower(cache, *new).compile().memory_analysis()
    if memory is None:
        return
    call = [Call(*new)]
    if memory.alias_size_in_bytes < 0.95 * size:
        seen = f"{memory.alias_size_in_bytes:,} of its {size:,} bytes"
        raise Failure("the cache to be updated in place when it is donated", seen, call, sizes)
    if memory.temp_size_in_bytes > 0.4 * size + 2**16:
        seen = f"{memory.temp_size_in_bytes:,} bytes beside its {size:,}"
        raise Failure("the cache to be updated without a copy of it", seen, call, sizes)


def _one_program(trial: Trial) -> None:
    """Shapes do not grow with the sequence."""
    fresh = Trial(trial.make, trial.step, trial.claims, seed=trial.seed)
    session = fresh.session()
    for i in range(trial.claims.length):
        session(Call(*trial.tokens(1, i)))
        if fresh.traces.total() > 1:
            raise session.failure("one compiled step for every length", f"a new one for token {i}")


def _interpreted(trial: Trial) -> str:
    return "" if trial.claims.jit else "not compiled: jit=False"


PROGRAMS = (
    Check("in place", _in_place, _interpreted, needs=("values",)),
    Check("one program", _one_program, _interpreted, needs=("runs",)),
)
