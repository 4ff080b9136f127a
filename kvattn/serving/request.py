"""What `Engine.submit` returns: a request, its tokens so far, and what has become of it."""

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from kvattn.errors import ConfigError, KVAttnError
from kvattn.serving.beams import Beam
from kvattn.serving.texts import Text

ENDED = "finished", "cancelled", "failed"


@runtime_checkable
class _Stepping(Protocol):
    def step(self) -> bool:
        """One tick; whether anything is left to do."""
        ...

    def cancels_later(self, request: "Request") -> bool:
        """Whether a request that is to be cancelled is so with the next tick only."""
        ...


class Request:
    """One prompt and its continuations.

    Attributes:
        prompt: its tokens.
        max_new_tokens: most tokens of each continuation.
        state: "waiting", "running", "preempted" (it had to give its pages back, and waits), "finished", "cancelled" or
            "failed".
        error: why it failed.
    """

    def __init__(
        self,
        engine: _Stepping,
        prompt: Int32[np.ndarray, " S"],
        max_new_tokens: int,
        num_samples: int,
        beam_width: int | None,
        on_token: Callable[[int, int], object] | None,
    ):
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.state = "waiting"
        self.error: KVAttnError | None = None
        self.samples = [Text(i) for i in range(num_samples)]
        self.beams: list[Beam] | None = None if beam_width is None else [Beam()]
        self.on_token = on_token
        self.left = num_samples
        self._engine = engine

    def __repr__(self) -> str:
        counts = "+".join(str(len(tokens)) for tokens in self.tokens)
        return f"Request({len(self.prompt)} tokens, {counts} of {self.max_new_tokens} new, {self.state})"

    @property
    def tokens(self) -> list[list[int]]:
        """The new tokens so far: of each sample, or of each beam, the most probable first."""
        if self.beams is not None:
            return [list(beam.tokens) for beam in self.beams]
        return [list(sequence.new) for sequence in self.samples]

    @property
    def logprobs(self) -> list[list[float]]:
        """The natural log-probability of each of the `tokens`, the model's own, as `kvattn.score` gives it."""
        if self.beams is not None:
            return [list(beam.logprobs) for beam in self.beams]
        return [list(sequence.logprobs) for sequence in self.samples]

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ENDED

    def cancel(self) -> None:
        """Ends it; the tokens so far stay. Its pages come back with the next tick. Harmless where it has ended.

        Where several processes are one engine, process 0 cancels, and the request ends with the next tick in all.

        Raises:
            UnsupportedError: in another process than 0.
        """
        if not self.is_over and not self._engine.cancels_later(self):
            self.state = "cancelled"

    def stream(self) -> Iterator[tuple[int, int]]:
        """Sample and token of every new token as it comes; takes the engine, and all its requests, on meanwhile.

        Raises:
            ConfigError: of a beam search: which tokens its beams have is known at the end.
            KVAttnError: why it failed.
        """
        if self.beams is not None:
            raise ConfigError("beams change until the search has ended: run the engine, then read request.tokens.")
        seen = [0] * len(self.samples)
        more = True
        while True:
            for i, sequence in enumerate(self.samples):
                while seen[i] < len(sequence.new):
                    seen[i] += 1
                    yield i, sequence.new[seen[i] - 1]
            if self.error is not None:
                raise self.error
            if self.is_over or not more:
                return
            more = self._engine.step()
