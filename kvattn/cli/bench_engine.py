"""``kvattn bench --engine``: conversations on an engine, with prefixes kept and without."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import RenderableType

from kvattn.cli import show
from kvattn.codecs import Codec

if TYPE_CHECKING:  # Flax takes its time to load
    from kvattn.models import Decoder

_CHUNK = 64
"""Tokens of a prompt that are read at a time: few shapes, so few programs to compile."""

Progress = Callable[[int, int], object] | None


@dataclasses.dataclass(frozen=True)
class Chat:
    """Conversations that begin with one text, such as a system prompt. Every turn is asked and answered in all of them.

    Tokens are random, so nothing else is shared.

    Attributes:
        conversations: how many go on at a time.
        turns: of each.
        shared: tokens that all of them begin with.
        said: tokens of a question.
        new: tokens of an answer.
    """

    conversations: int = 8
    turns: int = 3
    shared: int = 256
    said: int = 32
    new: int = 24

    @property
    def longest(self) -> int:
        """Tokens of a conversation at its end."""
        return self.shared + self.turns * (self.said + self.new)

    @property
    def num_new(self) -> int:
        """Tokens of all answers."""
        return self.conversations * self.turns * self.new


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the engine.

    Attributes:
        num_pages: pages of each layer's pool; None: as many as all conversations fill.
        page_size: tokens per page; None: what the codec and the kernels want.
        max_batch: rows.
        codec: of the cache.
    """

    num_pages: int | None
    page_size: int | None
    max_batch: int
    codec: Codec | None


@dataclasses.dataclass(frozen=True)
class Run:
    """What an engine did.

    Attributes:
        keeps_prefixes: whether what was computed stayed for prompts that begin with it.
        requests: that were finished.
        tokens_per_second: new tokens by the seconds of all ticks, compiling not included.
        prompt_tokens: of all prompts.
        cached_prompt_tokens: those that needed no computing.
        pages: pages that requests held at once, at most.
        waste: share of the slots in the pages that requests hold with no token in it, on average over ticks.
        evictions: pages of prefixes that had to leave.
        preemptions: how often a request had to wait for pages again.
        ticks: how many there were.
        host_seconds: of a tick, in which the host was busy with itself.
    """

    keeps_prefixes: bool
    requests: int
    tokens_per_second: float
    prompt_tokens: int
    cached_prompt_tokens: int
    pages: int
    waste: float
    evictions: int
    preemptions: int
    ticks: int
    host_seconds: float

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that needed no computing."""
        return self.cached_prompt_tokens / self.prompt_tokens


def opened(path: Path | None, dtype: str | None) -> tuple["Decoder", str]:
    """The model of a checkpoint, or one of bytes with random weights, and what to call it."""
    import kvattn.models as models

    if path is None:
        from flax import nnx

        config = models.DecoderConfig(
            vocab_size=256, model_dim=256, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=32, mlp_dim=384
        )
        model = models.Decoder(config, dtype=dtype, param_dtype=dtype or "float32", rngs=nnx.Rngs(0))
        return model, "a model of bytes with random weights"
    read = models.load if path.suffix == ".safetensors" else models.from_pretrained
    return read(path, dtype=dtype), path.name


def measured(model: "Decoder", chat: Chat, settings: Settings, keeps_prefixes: bool, progress: Progress) -> Run:
    """Has all conversations on a new engine, after every program has been compiled.

    Args:
        model: that answers.
        chat: what is said.
        settings: of the engine.
        keeps_prefixes: see `Run`.
        progress: called with the tokens so far, and of all answers.

    Raises:
        KVAttnError: what the engine refuses, or why a request failed.
    """
    from kvattn.serving import Engine
    from kvattn.serving.sizes import page_size_for

    page_size = settings.page_size or page_size_for(model, None, settings.codec)
    engine = Engine(
        model,
        num_pages=settings.num_pages or (chat.conversations + 1) * -(-chat.longest // page_size),
        page_size=page_size,
        max_batch=settings.max_batch,
        max_length=chat.longest,
        codec=settings.codec,
        prefill_chunk=_CHUNK,
        prefix_cache=keeps_prefixes,
    )
    engine.warm_up()
    rng = np.random.default_rng(0)
    words = lambda count: rng.integers(0, model.config.vocab_size, count).tolist()
    said = [words(chat.shared)] * chat.conversations
    pages, waste = 0, []
    for _ in range(chat.turns):
        said = [[*tokens, *words(chat.said)] for tokens in said]
        requests = [engine.submit(tokens, chat.new) for tokens in said]
        more = True
        while more:
            more = engine.step()
            stats = engine.stats()
            if stats.pages:
                pages, waste = max(pages, stats.pages), [*waste, stats.waste]
            if progress is not None:
                progress(stats.new_tokens, chat.num_new)
        for request in requests:
            if request.error is not None:
                raise request.error
        said = [[*tokens, *request.tokens[0]] for tokens, request in zip(said, requests, strict=True)]
    stats = engine.stats()
    return Run(
        keeps_prefixes=keeps_prefixes,
        requests=stats.finished,
        tokens_per_second=stats.tokens_per_second,
        prompt_tokens=stats.prompt_tokens,
        cached_prompt_tokens=stats.cached_prompt_tokens,
        pages=pages,
        waste=float(np.mean(waste)),
        evictions=stats.evictions,
        preemptions=stats.preemptions,
        ticks=stats.ticks,
        host_seconds=stats.host_seconds / stats.ticks,
    )


def screen(name: str, chat: Chat, settings: Settings, runs: Sequence[Run]) -> list[RenderableType]:
    """What is printed of some runs."""
    table = show.columns(
        ["prefixes", "tokens/s", "computed", "hit rate", "pages", "waste", "evicted", "ticks", "host/tick"]
    )
    for run in runs:
        table.add_row(
            "kept" if run.keeps_prefixes else "none",
            f"{run.tokens_per_second:,.0f}",
            f"{run.prompt_tokens - run.cached_prompt_tokens:,}",
            f"{100 * run.hit_rate:.1f} %",
            f"{run.pages:,}",
            f"{100 * run.waste:.1f} %",
            f"{run.evictions:,}",
            f"{run.ticks:,}",
            f"{1e3 * run.host_seconds:.2f} ms",
        )
    first = runs[0]
    what = (
        f"{name}: {first.requests} requests, {chat.conversations} conversations of {chat.turns} turns that begin with "
        f"the same {chat.shared:,} tokens; {first.prompt_tokens:,} prompt tokens, {chat.num_new:,} new ones; "
        f"{settings.max_batch} rows"
    )
    legend = (
        "computed: prompt tokens that were not found. pages: most that requests held at once. waste: share of the "
        "slots in them without a token, on average. host/tick: what the host takes for itself."
    )
    faster = first.tokens_per_second / runs[-1].tokens_per_second
    saved = (
        f"Kept prefixes save {first.cached_prompt_tokens:,} prompt tokens: {faster:.2f} times the tokens per second."
    )
    return [what, "", table, "", saved, legend]
