"""`Engine`: many requests on one model and one pool of pages."""

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence

from kvattn import _checks
from kvattn.cache import groups_of
from kvattn.codecs import Codec
from kvattn.errors import (
    CapacityError,
    ConfigError,
    DTypeError,
    KVAttnError,
    RangeError,
)
from kvattn.models import loop
from kvattn.models import prompts as given
from kvattn.models.decoder import Decoder
from kvattn.policies import Policy
from kvattn.serving import checks, limits
from kvattn.serving.arrivals import Arrival
from kvattn.serving.below import Below
from kvattn.serving.choices import Choice, choice_of
from kvattn.serving.device import Device
from kvattn.serving.dispatch import Dispatcher, Read
from kvattn.serving.drafts import Guesses
from kvattn.serving.hosted import HostedPool
from kvattn.serving.hosts import Hosts
from kvattn.serving.jobs import Admission, Job, Tick
from kvattn.serving.prefixes import PrefixPool
from kvattn.serving.reads import SharedReads
from kvattn.serving.request import ENDED, Request
from kvattn.serving.scheduler import Scheduler
from kvattn.serving.searching import reason_for, search_on
from kvattn.serving.sinking import Sinking
from kvattn.serving.sizes import kind_of, layer_group, pages_for, shapes
from kvattn.serving.stack import Tiers
from kvattn.serving.stats import Stats
from kvattn.serving.texts import NO_ROW, Text
from kvattn.serving.tiers import Tier
from kvattn.serving.together import Together


class Engine:
    """Decodes many requests together: they come and go, share the pages of what they have in common, and give way.

    Every tick reads a part of the prompts that are waiting and takes every running row one token further; rows that
    have ended are given to others at once. Prompts that begin alike are computed once. Where pages run out, prefixes
    that nobody reads leave first, then the requests that came last, which are computed anew later. What comes out are
    the tokens that `kvattn.generate` gives for each prompt alone.

    For a program that owns its process (notebooks, evaluation, offline batches): it is not made for several threads.

    Args:
        model: the decoder, on its mesh if it has one.
        num_pages: pages of each layer's pool; a list or tuple: of each layer's. "auto": as many as the device has room
            for, once, beside what it holds now.
        page_size: tokens of a page. None: as many as the codec encodes together, else the smallest from 16 on that
            kernels take where the model runs.
        max_batch: rows: sequences that are decoded at a time.
        max_length: most tokens of a sequence, prompt and new ones.
        prefix_cache: whether what was computed stays for prompts that begin with it, as long as there is room. Policies
            that go by attention, and codecs that keep tokens outside pages, run without.
        schedule: who is let in first: "longest-prefix", whose prompt needs least computing, where equal new prompts
            wait for the first of them; or "fcfs", first come, first served. In either a request is passed over at most
            64 times.
        policy: which tokens are kept; as in `Decoder.make_paged_cache`.
        codec: in how many bits.
        prefill_chunk: prompts are read up to the next multiple of so many tokens at a time.
        tiers: where prefixes go that have to leave the device, the fastest first: `HostTier`, `DiskTier`. They come
            back where a prompt begins with them, also to another engine, and are found there by model, settings,
            namespace and tokens. They stay the caller's, to be closed by whoever made them.
        hosts: the mesh axis of hosts, of a model that is split by sequence along it, or `Hosts`; `num_pages` is then
            per host. Hosts lend each other pages, so a sequence may be longer than any host's pool. Where they are
            processes, each makes the same engine, requests come in at process 0, `step` and `run` are called equally
            often in all, and all get all tokens.
        speculate: how many tokens are guessed, at most 7, by what followed the last ones when they came before in the
            same text (`kvattn.serving.drafts`), and verified in one step. What comes out is the same, sampled tokens
            too; where a text repeats itself it comes faster, elsewhere up to as much slower as a step with so many
            tokens more takes. 0: none.

    Raises:
        ConfigError, DTypeError, RangeError: an argument outside its range, an unknown schedule.
        UnsupportedError: speculation where tokens cannot be taken back; a mesh that splits the rows of caches.
        HostMismatchError: processes that began with another version, model or setting.
        HostLostError: a process that did not come.
        Else as `Decoder.make_paged_cache`.

    Example:
        >>> from flax import nnx
        >>> from kvattn.models import Decoder, DecoderConfig, generate
        >>> from kvattn.serving import Engine
        >>> config = DecoderConfig(vocab_size=256, model_dim=32, num_layers=1, num_heads=4, num_kv_heads=1, mlp_dim=32)
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> engine = Engine(model, num_pages=64, page_size=4, max_length=64)
        >>> first = engine.submit(b"what is a cache?", 5)
        >>> second = engine.submit(b"what is a page?", 5, num_samples=2, temperature=1.0)
        >>> done = engine.run()
        >>> done[first] == generate(model, [b"what is a cache?"], 5)
        True
        >>> [len(tokens) for tokens in second.tokens], second.state
        ([5, 5], 'finished')
    """

    def __init__(
        self,
        model: Decoder,
        *,
        num_pages: int | str | Sequence[int],
        page_size: int | None = None,
        max_batch: int = 8,
        max_length: int,
        prefix_cache: bool = True,
        schedule: str = "longest-prefix",
        policy: Policy | Sequence[Policy | None] | None = None,
        codec: Codec | Sequence[Codec | None] | None = None,
        prefill_chunk: int = 256,
        tiers: Sequence[Tier] = (),
        hosts: str | Hosts | None = None,
        speculate: int = 0,
    ):
        if not isinstance(model, Decoder):
            raise DTypeError(f"model must be a kvattn.models.Decoder, got {type(model).__name__}.")
        limits.sizes(max_batch=max_batch, max_length=max_length, prefill_chunk=prefill_chunk)
        limits.prefixes(schedule, prefix_cache)
        self._together = None
        if hosts is not None:
            settings = hosts if isinstance(hosts, Hosts) else Hosts(hosts)
            limits.hosts(model, settings.axis)
            self._together = Together(settings, model)
        self.model = model
        self.max_batch, self.max_length = max_batch, max_length
        cached = {"max_length": max_length, "policy": policy, "codec": codec}
        options = {"batch_size": max_batch, **cached}
        if self._together is not None:
            pool = {"num_pages": num_pages, "page_size": page_size, "prefix_cache": prefix_cache}
            ticks = {"schedule": schedule, "prefill_chunk": prefill_chunk, "speculate": speculate}
            below = {"tiers": [type(tier).__name__ for tier in tiers]}
            self._together.meet(model, {**pool, "max_batch": max_batch, **cached, **ticks, **below})
        pages = pages_for(model, num_pages, page_size, options, self._together)
        self._make_caches = lambda: model.make_paged_cache(pages, page_size, **options)
        caches = self._make_caches()
        groups = groups_of(caches)
        limits.caches(model, caches)
        self._is_shareable = all(layer.policy.in_order and layer.codec.rows is None for layer in caches)
        self._rereads = not any(
            layer.policy.needs_mass or layer.codec.for_chunk(layer.dtype) != layer.codec for layer in caches
        )
        limits.guesses(speculate, self._is_shareable and self._rereads, f"{policy or 'Full()'}, {codec}")
        self._speculate = speculate
        self._guesses = Guesses(speculate) if speculate else None
        self._layer_groups = [layer_group(group, caches[group.layers[0]]) for group in groups]
        self.page_size = groups[0].page_size
        self._chunk, self._schedule, self._prefix_cache = prefill_chunk, schedule, prefix_cache
        self._shapes = shapes(prefill_chunk, max_batch)
        self._device = Device(model, caches)
        if self._together is not None:
            self._device.wait = self._together.wait
        self._tiers = Tiers(tiers)
        self._sinking = None
        if self._tiers.tiers and self._is_shareable and prefix_cache:
            kind = kind_of(model, caches, self._device, self._layer_groups)
            exchange = None if self._together is None else self._together.exchange
            self._sinking = Sinking(Below(self._tiers, kind, exchange), self._device)
        self._begin()
        self._numbers = itertools.count()
        self._jobs: dict[Request, list[Job]] = {}
        self._choices: dict[Request, Choice] = {}
        self._ended: list[Request] = []
        self._in_flight: deque[list[Read]] = deque()
        self._counts = dict.fromkeys(
            ("prompt_tokens", "cached_prompt_tokens", "new_tokens", "finished", "failed", "ticks"), 0
        )
        self._seconds = self._device_seconds = 0.0

    # What comes in.

    def submit(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        num_samples: int = 1,
        beam_width: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop_tokens: int | Iterable[int] | None = None,
        namespace: Hashable = "",
        priority: int = 0,
        on_token: Callable[[int, int], object] | None = None,
    ) -> Request:
        """A prompt to be continued; it waits for `step` or `run`.

        Args:
            prompt: token ids, one or more; `bytes` are fine for a model of bytes.
            max_new_tokens: how many tokens follow, at most.
            num_samples: continuations that are drawn independently: sample i draws what row i of `kvattn.generate`
                draws. The prompt is computed once for as many of them as there are rows.
            beam_width: search for the most probable continuations instead, keeping so many at a time
                (`kvattn.serving.beams`). `Request.tokens` are the beams then, the most probable first.
            temperature: as in `kvattn.generate`.
            top_k: likewise.
            top_p: likewise.
            seed: likewise.
            stop_tokens: likewise.
            namespace: prefixes are shared within it only (tenant, adapter): a string, or a tuple of strings.
            priority: larger ones are let in first, and leave last.
            on_token: called as ``on_token(sample, token)`` for every new token. If it raises, this request is
                cancelled, and the exception leaves `step`.

        Raises:
            CapacityError: prompt and new tokens are more than `max_length`; OutOfBlocksError: more than the pool.
            ConfigError: beams with samples, a temperature or a callback; more beams than rows.
            UnsupportedError: in another process than 0, where several are one engine.
            Else as `kvattn.generate`.
        """
        if self._together is not None:
            self._together.check_submit()
        drawn = num_samples, beam_width, temperature, top_k, top_p, seed
        arrival = Arrival(prompt, max_new_tokens, *drawn, stop_tokens, namespace, priority)
        request = self._accept(arrival, on_token)
        if self._together is not None:
            stops = sorted(self._choices[request].stop_tokens) if request in self._choices else []
            self._together.submitted(request, arrival._replace(prompt=request.prompt.tolist(), stop_tokens=stops))
        return request

    def _accept(self, arrival: Arrival, on_token: Callable[[int, int], object] | None = None) -> Request:
        """See `submit`."""
        max_new_tokens, beam_width, priority = arrival.max_new_tokens, arrival.beam_width, arrival.priority
        (tokens,) = given.checked([arrival.prompt], self.model.config.vocab_size)
        _checks.integer("max_new_tokens", max_new_tokens, 0, RangeError)
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise DTypeError(f"priority must be an int, got {priority!r}.")
        checks.namespace(arrival.namespace)
        if on_token is not None and not callable(on_token):
            raise DTypeError(f"on_token must be a function of a sample and a token, got {on_token!r}.")
        choice = choice_of(arrival, self.model.config.vocab_size, self.max_batch, on_token)
        limits.room(self.model.config, self.max_length, self._scheduler.pool, tokens, max_new_tokens, beam_width or 1)

        num_samples = arrival.num_samples
        request = Request(self, tokens, max_new_tokens, num_samples, beam_width, on_token)
        if max_new_tokens == 0:
            request.state = "finished"
            self._counts["finished"] += 1
            self._ended.append(request)
            return request
        self._choices[request] = choice
        number, rows = next(self._numbers), self.max_batch
        make = lambda sequences, width: Job(
            owner=request,
            number=number,
            prompt=tokens,
            limit=max_new_tokens,
            sequences=sequences,
            width=width,
            namespace=arrival.namespace,
            priority=priority,
            is_beam=beam_width is not None,
        )
        if beam_width is not None:
            jobs = [make([Text(0)], beam_width)]
        else:
            parts = [request.samples[i : i + rows] for i in range(0, num_samples, rows)]
            jobs = [make(list(part), len(part)) for part in parts]
        self._jobs[request] = jobs
        for job in jobs:
            self._scheduler.submit(job)
        return request

    # What goes on.

    def run(self) -> dict[Request, list[list[int]]]:
        """Steps until nothing is left to do.

        Returns:
            the requests that came to their end since the last `run`, with their tokens. Not those that were cancelled
            or failed (`Request.error`).
        """
        while self.step():
            pass
        ended, self._ended = self._ended, []
        return {request: request.tokens for request in ended}

    def step(self) -> bool:
        """One tick. Returns whether anything is left to do.

        Raises:
            Exception: what `on_token` raised, once the request's pages are back; what else went wrong on the device,
                which fails every request that is not waiting for its first tick.
        """
        began, on_device = time.perf_counter(), self._device.seconds
        self._counts["ticks"] += 1
        try:
            if self._together is not None:
                self._begin_together(self._together)
            self._sweep()
            if self._guesses is not None:
                self._guesses.guess(self._scheduler.running)
            tick = self._scheduler.next()
            self._in_flight.append(self._dispatch(tick))
            # One tick is in the device's hands while the last one's tokens are read; but guesses go by the last token.
            keep = 1 if tick and not self._speculate else 0
            raised = None
            if self._sinking is not None:
                self._sinking.store()
            while len(self._in_flight) > keep:
                error = self._collect(self._in_flight.popleft())
                raised = raised or error
            self._sweep()
            if self._together is not None:
                self._together.end(self._scheduler.pool.pool.digest())
        except BaseException as error:
            told = error if self._together is None else self._together.error_of(error)
            self._abandon(told)
            if told is not error:
                raise told from error
            raise
        finally:
            self._seconds += time.perf_counter() - began
            self._device_seconds += self._device.seconds - on_device
        if raised is not None:
            raise raised
        return bool(self._in_flight or self._scheduler.waiting or self._scheduler.running)

    def stats(self) -> Stats:
        """What was done so far."""
        pool = self._scheduler.pool
        return Stats(
            **self._counts,
            pages=pool.used_pages,
            cached_pages=pool.cached_pages,
            waste=max(usage.waste for usage in pool.pool.usage()),
            evictions=pool.evictions,
            preemptions=self._scheduler.preemptions,
            waiting=sum(request.state in ("waiting", "preempted") for request in self._jobs),
            running=sum(request.state == "running" for request in self._jobs),
            tokens_per_second=self._counts["new_tokens"] / self._seconds if self._seconds else 0.0,
            host_seconds=self._seconds - self._device_seconds,
            tier_prompt_tokens=() if self._sinking is None else tuple(self._sinking.below.prompt_tokens),
            tiers=tuple(dataclasses.replace(tier.counters) for tier in self._tiers.tiers),
        )

    def loans(self) -> list[dict[tuple[int, int], int]]:
        """Pages that hosts lend each other now: of every group of layers, by (creditor, debtor)."""
        pools = self._scheduler.pool.pool.pools
        return [pool.loans for pool in pools if isinstance(pool, HostedPool)]

    def warm_up(self, beam_widths: Sequence[int] = ()) -> None:
        """Compiles every program that requests may need, so that none of them waits for it.

        Args:
            beam_widths: of beam searches to come.

        Raises:
            ConfigError: requests are running.
        """
        if self._scheduler.running:
            raise ConfigError(
                "warm_up takes the caches of all rows: call it before requests run, or when they are done."
            )
        self._dispatcher.warm_up(beam_widths)

    # Below.

    def _begin(self) -> None:
        """An empty pool, in which nobody waits or runs."""
        pool = PrefixPool(
            self._layer_groups,
            self.page_size,
            chunk=self._chunk,
            is_shareable=self._is_shareable,
            keeps_prefixes=self._prefix_cache,
            num_hosts=None if self._together is None else self._together.num_hosts,
            below=None if self._sinking is None else self._sinking.below,
        )
        self._scheduler = Scheduler(
            pool,
            self.max_batch,
            schedule=self._schedule,
            chunk=self._chunk,
            shapes=self._shapes,
            rereads=self._rereads,
            guesses=self._speculate > 0,
        )
        windows = [group.window for group in self._layer_groups]
        self._dispatcher = Dispatcher(
            self._device,
            self._scheduler,
            num_rows=self.max_batch,
            shapes=self._shapes,
            shared=SharedReads(self.page_size, self.max_batch, windows, can_share=self._is_shareable),
            most_guessed=self._speculate,
            rereads=self._rereads,
        )

    def _dispatch(self, tick: Tick) -> list[Read]:
        """Hands a tick to the device; what will come of it."""
        for admission in tick.admitted:
            self._admitted(admission)
        device, reads = self._device, []
        if self._sinking is not None:
            self._sinking.read()
        device.copy(tick.copies)
        if tick.steps:
            reads.append(self._dispatcher.step(tick.steps))
        for tables, records in self._scheduler.pool.take_restored():
            device.restore(tables, [record.arrays for record in records])
        if tick.pieces:
            reads.append(self._dispatcher.read(tick))
        device.copy(tick.forks)
        for job in tick.beams:  # last: others may have to leave for them, once they have had their turn
            if job in self._scheduler.running:
                self._search_on(job)
        left = [job.owner for job in self._scheduler.waiting if job.was_in and not job.owner.is_over]
        running = {job.owner for job in self._scheduler.running} if left else ()
        for request in left:
            if request not in running:
                request.state = "preempted"
        return reads

    def save_prefixes(self) -> None:
        """Copies every prefix that is on the device into the tiers, and waits until they have it.

        For the end of a process: what has left the device is there already.
        """
        if self._sinking is not None:
            self._sinking.save(self._scheduler.pool)

    def _admitted(self, admission: Admission) -> None:
        """Counts a job that was let in, and gives its rows their settings."""
        job, sequences = admission.job, admission.sequences
        request, choice = job.owner, self._choices[job.owner]
        request.state = "running"
        if not job.was_in:
            job.was_in = True
            self._counts["prompt_tokens"] += len(sequences) * len(job.prompt)
            self._counts["cached_prompt_tokens"] += admission.start + (len(sequences) - 1) * len(job.prompt)
        if not job.is_beam:
            for sequence in sequences:
                if sequence.row != NO_ROW:
                    self._device.set_row(sequence.row, choice.samplers[sequence.index], choice.stop_bits, job.limit)

    def _collect(self, reads: list[Read]) -> Exception | None:
        """Takes tokens that came; what a callback raised, if one did."""
        raised = None
        for came, of in reads:
            if not of:
                continue
            new, logprob, status = self._device.on_host(came)
            if self._together is not None:
                self._together.came(new)
            if new.ndim == 1:
                new, logprob = new[:, None], logprob[:, None]
            tokens, logprobs, statuses = new.tolist(), logprob.tolist(), status.tolist()
            for job, sequence, index, row in of:
                if index != len(sequence.new):  # known: it was appended again
                    continue
                for token, number in zip(tokens[row], logprobs[row], strict=True):
                    if token == loop.NOTHING or job.owner.is_over:
                        break
                    if statuses[row] or token == loop.UNSOUND:
                        self._fail(job.owner, reason_for(statuses[row], len(sequence.new)))
                        break
                    error = self._take(job, sequence, token, number)
                    raised = raised or error
                if self._speculate:
                    sequence.num_drawn = len(sequence.new)
        return raised

    def _take(self, job: Job, sequence: Text, token: int, logprob: float) -> Exception | None:
        """One new token; what the callback raised."""
        request = job.owner
        sequence.new.append(token)
        sequence.logprobs.append(logprob)
        self._counts["new_tokens"] += 1
        if len(sequence.new) == job.limit or token in self._choices[request].stop_tokens:
            self._finish(job, sequence)
        if request.on_token is not None:
            try:
                request.on_token(sequence.index, token)
            except Exception as error:
                request.cancel()
                return error
        return None

    def _finish(self, job: Job, sequence: Text) -> None:
        """A sample that has all its tokens."""
        request = job.owner
        if job in self._scheduler.waiting:  # it was preempted before its last token came
            self._scheduler.withdraw(job)
        else:
            self._scheduler.finish(job, sequence)
        request.left -= 1
        if not request.left:
            self._end(request, "finished")
            self._ended.append(request)

    def _end(self, request: Request, state: str) -> None:
        request.state = state
        del self._jobs[request], self._choices[request]
        if self._guesses is not None:
            self._guesses.forget(request.samples)
        if state in ("finished", "failed"):
            self._counts[state] += 1

    def _fail(self, request: Request, error: KVAttnError) -> None:
        request.error = error
        request.state = "failed"

    def _sweep(self) -> None:
        """Takes everything back from requests that were cancelled, or failed."""
        gone = [request for request in self._jobs if request.state in ENDED]
        if not gone:
            return
        for job in [*self._scheduler.running, *self._scheduler.waiting]:
            if job.owner in gone:
                self._scheduler.withdraw(job, keep=job.owner.state != "failed")
        for request in gone:
            self._end(request, request.state)

    def _abandon(self, error: BaseException) -> None:
        """After an error in the middle of a tick nothing on the device can be relied on: all begins anew."""
        self._in_flight.clear()
        if self._sinking is not None:
            self._sinking.forget()
        cause = error if isinstance(error, KVAttnError) else None
        waiting = {job.owner for job in self._scheduler.waiting} - {job.owner for job in self._scheduler.running}
        for request in list(self._jobs):
            if request not in waiting or request.is_over:
                if not request.is_over:
                    self._fail(
                        request, cause or CapacityError(f"the engine stopped in the middle of a tick: {error!r}.")
                    )
                self._end(request, request.state)
        left = [job for job in self._scheduler.waiting if job.owner in self._jobs]
        self._begin()
        for job in left:
            self._scheduler.submit(job)
        if self._together is None or self._together.is_alone:  # no program runs without the others
            self._device.restart(self._make_caches())

    def cancels_later(self, request: Request) -> bool:
        """Whether a request that is to be cancelled is so with the next tick only: other processes are told first."""
        return self._together is not None and self._together.cancel(request)

    def _begin_together(self, together: Together) -> None:
        """Takes over what came in at process 0, and moves pages home."""
        together.begin(self._accept)
        self._dispatcher.move_home(self._scheduler.pool.pool.repay(together.hosts.repay))

    def _search_on(self, job: Job) -> None:
        """Takes a beam search on by a token."""
        request, choice = job.owner, self._choices[job.owner]
        assert choice.width is not None
        where = self._dispatcher.held(), self._device, self._scheduler, self._sinking
        outcome = search_on(job, choice.width, choice.stop, *where)
        self._counts["new_tokens"] += outcome.new_tokens
        if outcome.error is not None:
            self._fail(request, outcome.error)
        elif outcome.is_over:
            self._scheduler.withdraw(job, keep=False)
            self._end(request, "finished")
            self._ended.append(request)
