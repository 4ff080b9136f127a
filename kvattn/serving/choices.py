"""How the tokens of a request are chosen, and what ends it."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt32

from kvattn.models import loop
from kvattn.models import prompts as given
from kvattn.models.sampling import Sampler
from kvattn.serving import checks, limits
from kvattn.serving.arrivals import Arrival


class Choice(NamedTuple):
    """How a request's tokens are chosen: of each sample how, and what ends it.

    Attributes:
        samplers: of the samples.
        stop: the stop tokens,
        stop_tokens: as a set,
        stop_bits: and as `kvattn.models.loop` takes them.
        width: beams, where it is a search.
    """

    samplers: list[Sampler]
    stop: Bool[np.ndarray, " V"]
    stop_tokens: frozenset[int]
    stop_bits: UInt32[np.ndarray, " W"]
    width: int | None


def choice_of(arrival: Arrival, vocab_size: int, max_batch: int, on_token: object) -> Choice:
    """What is asked of a request, checked.

    Args:
        arrival: the request.
        vocab_size: V.
        max_batch: rows of the engine.
        on_token: its callback.

    Raises:
        as `Engine.submit`.
    """
    checks.integer("num_samples", arrival.num_samples, 1)
    settings = {name: getattr(arrival, name) for name in ("temperature", "top_k", "top_p", "seed")}
    sampler = Sampler.create(vocab_size, **settings)
    stop = given.stop_mask(arrival.stop_tokens, vocab_size)
    if arrival.beam_width is not None:
        checks.integer("beam_width", arrival.beam_width, 1)
        most = min(max_batch, vocab_size)
        limits.beams(arrival.beam_width, most, arrival.num_samples, arrival.temperature, on_token)
    samplers = [dataclasses.replace(sampler, stream=np.uint32(i)) for i in range(arrival.num_samples)]
    stop_tokens = frozenset(np.flatnonzero(stop).tolist())
    return Choice(samplers, stop, stop_tokens, loop.as_bits(stop), arrival.beam_width)
