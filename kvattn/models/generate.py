"""Generation: the prompts go in, whole or in chunks, then one token of every sequence per step."""

import collections
import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Int32

from kvattn import _checks
from kvattn._typing import Array, Rows
from kvattn.cache import Cache
from kvattn.codecs import Codec
from kvattn.errors import DTypeError, MissingLibraryError, RangeError
from kvattn.models import prompts as given
from kvattn.models.decoder import Caches, Decoder
from kvattn.models.sampling import Sampler, choose
from kvattn.policies import Policy

_ROUND = 64
"""Prompt lengths and default capacities are rounded up to this, so that fewer programs are compiled."""

_LOGITS = 2**27
"""Most logits of a chunk of prompts unless told otherwise: 512 MiB of float32."""

_AHEAD = 2
"""Steps handed to the device before the host looks at the tokens of one: it reads while the device works. What comes
out does not depend on it; when all rows have ended, so many steps were in vain."""

_NOTHING, _UNSOUND = -1, -2
"""In place of a token: the row had ended before; its logits were no distribution."""


@overload
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    capacity: int | None = ...,
    policy: Policy | Sequence[Policy | None] | None = ...,
    codec: Codec | Sequence[Codec | None] | None = ...,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    seed: int = ...,
    stop_tokens: int | Iterable[int] | None = ...,
    prefill_chunk: int | None = ...,
    on_token: Callable[[int, int], object] | None = ...,
    progress: bool | Callable[[int, int], object] = ...,
    cache: Sequence[Cache] | None = ...,
    return_cache: Literal[False] = ...,
) -> list[list[int]]: ...


@overload
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    capacity: int | None = ...,
    policy: Policy | Sequence[Policy | None] | None = ...,
    codec: Codec | Sequence[Codec | None] | None = ...,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    seed: int = ...,
    stop_tokens: int | Iterable[int] | None = ...,
    prefill_chunk: int | None = ...,
    on_token: Callable[[int, int], object] | None = ...,
    progress: bool | Callable[[int, int], object] = ...,
    cache: Sequence[Cache] | None = ...,
    return_cache: Literal[True],
) -> tuple[list[list[int]], Caches]: ...


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    capacity: int | None = None,
    policy: Policy | Sequence[Policy | None] | None = None,
    codec: Codec | Sequence[Codec | None] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_tokens: int | Iterable[int] | None = None,
    prefill_chunk: int | None = None,
    on_token: Callable[[int, int], object] | None = None,
    progress: bool | Callable[[int, int], object] = False,
    cache: Sequence[Cache] | None = None,
    return_cache: bool = False,
) -> list[list[int]] | tuple[list[list[int]], Caches]:
    """Continues every prompt by up to `max_new_tokens` tokens.

    Temperature, `top_k`, `top_p`, seed and stop tokens may change from call to call without compiling anew. The caches
    are donated to every step and updated in place. On a mesh of several processes all call it with the same arguments,
    and all get the same tokens.

    Args:
        model: the decoder.
        prompts: token ids, of any lengths >= 1; `bytes` are fine for a model of bytes.
        max_new_tokens: how many tokens follow each prompt, at most.
        capacity: slots of the caches. None: what the longest sequence needs. For a conversation: what all of it needs.
        policy: which tokens the caches keep; as in `Decoder.make_cache`.
        codec: in how many bits.
        temperature: 0 takes the most probable token; otherwise logits are divided by it and a token is drawn.
        top_k: draw from the `top_k` most probable tokens only; ties go to lower ids. None: from all.
        top_p: draw from the nucleus only (Holtzman et al., arXiv:1904.09751): the smallest set of most probable tokens
            whose probability, after temperature and `top_k`, reaches it. None, or 1: all.
        seed: of the draws, below 2**32. A draw depends on the seed, the row and how many tokens this call drew before,
            not on the other prompts. The turns of a conversation should have different ones.
        stop_tokens: a token id or several. A row ends with the first of them that it comes to, which is part of the
            result; the other rows go on.
        prefill_chunk: the prompts are appended so many tokens at a time. None: whole, unless their logits would take
            more than 512 MiB and cutting them changes nothing but rounding; then in chunks that take no more (of 64
            tokens at least). Policies that go by attention (`H2O`, `Scissorhands`, `FastGen`) judge every chunk by
            itself, and with `KIVI` a chunk sees those before it encoded: there the result depends on this.
        on_token: called as ``on_token(row, token)`` for every new token, a stop token too, as soon as it is known: what
            was passed for a row is at any time the beginning of its result. What it raises ends the generation.
        progress: True shows a bar (tqdm); a function is called as ``progress(done, total)`` after every step, in
            tokens: `total` is what there will be if no row ends early.
        cache: what an earlier call returned with `return_cache`, to go on from it: row i of the prompts is what is new
            in row i of the cache. (Or any caches of the model, one per layer, with what they hold.) It is donated: go
            on from what this call returns. None: new caches, of `capacity`, `policy` and `codec`, which belong to the
            first call only.
        return_cache: the caches are returned too. Row by row they hold all that was said: what they held before, the
            prompt, and every new token with the last one, a stop token too. The next call's prompts are only what is
            new.

    Returns:
        the new tokens of each prompt; with `return_cache` these and the caches, one per layer.

    Raises:
        ShapeError: an empty prompt; caches of another model, or of another number of rows.
        DTypeError: an argument of a wrong type, a prompt that does not hold ints.
        RangeError: a token id outside the vocabulary, a number outside its range. Later: logits that are NaN or
            infinite.
        ConfigError: `top_k` or `top_p` at temperature 0; `capacity`, `policy` or `codec` beside `cache`.
        CapacityError: the caches cannot take prompts and new tokens. Nothing was computed, and a `cache` is as it was.
        StaleCacheError: a `cache` that was given to an earlier call.
        MissingLibraryError: a bar is wanted and tqdm is not installed.

    Example:
        >>> from flax import nnx
        >>> from kvattn.models import Decoder, DecoderConfig, generate
        >>> config = DecoderConfig(vocab_size=256, model_dim=32, num_layers=1, num_heads=4, num_kv_heads=1, mlp_dim=32)
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> [len(new) for new in generate(model, [b"one", b"another"], 5)]
        [5, 5]
        >>> streamed = []
        >>> new = generate(model, [b"one"], 5, temperature=0.8, top_p=0.9, on_token=lambda row, t: streamed.append(t))
        >>> streamed == new[0]
        True
        >>> new, cache = generate(model, [b"one"], 5, capacity=64, return_cache=True)
        >>> new, cache = generate(model, [b"and then?"], 5, cache=cache, return_cache=True)
        >>> cache[0].lengths.tolist()  # 3 + 5 + 9 + 5
        [22]
    """
    vocab_size = model.config.vocab_size
    _checks.integer("max_new_tokens", max_new_tokens, 0, RangeError)
    if prefill_chunk is not None:
        _checks.integer("prefill_chunk", prefill_chunk, 1, RangeError)
    if on_token is not None and not callable(on_token):
        raise DTypeError(f"on_token must be a function of a row and a token, got {on_token!r}.")
    if not isinstance(return_cache, bool):
        raise DTypeError(f"return_cache must be a bool, got {return_cache!r}.")
    sampler = Sampler.create(vocab_size, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    stop = given.stop_mask(stop_tokens, vocab_size)
    reporting = _reporting(progress)
    rows = given.checked(prompts, vocab_size)
    caches, held = None, np.zeros(len(rows), np.int32)
    if cache is not None:
        caches, held = given.continued(cache, model, len(rows), capacity=capacity, policy=policy, codec=codec)
    results: list[list[int]] = [[] for _ in rows]
    if not return_cache and (not rows or max_new_tokens == 0):
        return results
    lengths = np.array([len(row) for row in rows], np.int32)
    longest = int(lengths.max(initial=1))
    # The last token is appended only if something may come after it.
    more = max_new_tokens if return_cache else max_new_tokens - 1
    reached = given.reached(model.config, held, lengths, max_new_tokens, more)
    if caches is None:
        capacity = _rounded(reached + more) if capacity is None else capacity
        caches = model.make_cache(len(rows), capacity, policy=policy, codec=codec)
    given.fitting(caches, lengths + np.int32(more))
    if not rows:
        return results, caches
    chunk = _default_chunk(caches, vocab_size, longest) if prefill_chunk is None else prefill_chunk

    decoding = _Decoding(model, caches, sampler, stop)
    decoding.append_prompts(rows, lengths, min(_rounded(longest), chunk))
    with reporting(len(rows) * max_new_tokens) as report:
        for row, token in _new_tokens(decoding, max_new_tokens, stop, report):
            results[row].append(token)
            if on_token is not None:
                on_token(row, token)
    if return_cache and max_new_tokens > 0:
        decoding.append_last(np.array([new[-1] for new in results], np.int32))
    decoding.check()
    return (results, decoding.cache) if return_cache else results


class _Rows(NamedTuple):
    """Where the rows of a batch are.

    Attributes:
        new: the tokens of the last step, `_NOTHING` or `_UNSOUND`.
        running: rows that have not ended.
        num_drawn: tokens that every running row drew before that.
    """

    new: Int32[Array, " B"]
    running: Rows
    num_drawn: Int32[Array, ""]


class _Decoding:
    """A batch on the device: weights, caches and where its rows are."""

    def __init__(self, model: Decoder, cache: Caches, sampler: Sampler, stop: Bool[np.ndarray, " V"]):
        graph, state = nnx.split(model)
        self.weights, treedef = jax.tree.flatten(state)
        self.append, self.step = _programs(model, (graph, treedef))
        self.cache = cache
        self.sampler = sampler
        self.stop = jnp.asarray(stop)
        batch = cache[0].batch_size
        self.place = model.split.place
        self.rows = self.placed(np.full(batch, _NOTHING, np.int32), np.zeros(batch, bool))

    def placed(self, new: Int32[np.ndarray, " B"], running: Bool[np.ndarray, " B"]) -> "_Rows":
        """Rows that lie where the steps leave them: the next call is the same program."""
        return _Rows(*self.place((new, running, np.zeros((), np.int32))))

    def append_prompts(
        self, rows: Sequence[Int32[np.ndarray, " _"]], lengths: Int32[np.ndarray, " B"], chunk: int
    ) -> None:
        """Appends the prompts, `chunk` tokens of each at a time, and chooses the first new tokens."""
        num_chunks = -(-int(lengths.max()) // chunk)
        tokens = given.padded(rows, num_chunks * chunk)
        for start in range(0, num_chunks * chunk, chunk):
            num_new = np.clip(lengths - start, 0, chunk).astype(np.int32)
            part = tokens[:, start : start + chunk]
            self.rows, self.cache = self.append(
                self.weights, part, num_new, self.cache, self.rows, self.sampler, self.stop
            )

    def steps(self, count: int) -> Iterator[Int32[np.ndarray, " B"]]:
        """The new tokens of each of `count` steps, the first of which the prompts brought."""
        in_flight: collections.deque[Array] = collections.deque()
        for number in range(count):
            if number > 0:
                self.rows, self.cache = self.step(self.weights, self.cache, self.rows, self.sampler, self.stop)
            self.rows.new.copy_to_host_async()
            in_flight.append(self.rows.new)
            if len(in_flight) > _AHEAD:
                yield np.asarray(in_flight.popleft())
        while in_flight:
            yield np.asarray(in_flight.popleft())

    def append_last(self, tokens: Int32[np.ndarray, " B"]) -> None:
        """Appends the last token of every row, which no step has: one more step, and nothing is drawn."""
        rows = self.placed(tokens, np.ones(len(tokens), bool))
        _, self.cache = self.step(self.weights, self.cache, rows, self.sampler, self.stop)

    def check(self) -> None:
        """Raises what the steps could only record."""
        for layer in self.cache:
            layer.check()


class _Programs(NamedTuple):
    """The compiled programs of a model, to which its weights go as a flat list.

    Attributes:
        append: takes a chunk of the prompts.
        step: takes the tokens that were chosen last.
    """

    append: Callable[..., tuple[_Rows, Caches]]
    step: Callable[..., tuple[_Rows, Caches]]


type _Treedef = Any  # jax.tree_util.PyTreeDef, which type checkers take for a variable
type _Structure = tuple[nnx.GraphDef[Decoder], _Treedef]
"""All of a model but its weights: programs are the same where it is."""

PROGRAMS: weakref.WeakKeyDictionary[Decoder, tuple[_Structure, _Programs]] = weakref.WeakKeyDictionary()
"""The programs of the models that have generated, as long as these live."""


def _programs(model: Decoder, structure: _Structure) -> _Programs:
    """Those of an earlier call with this model, or with another that has its structure and still lives."""
    known = (PROGRAMS.get(model), *PROGRAMS.values())
    same = next((entry for entry in known if entry is not None and entry[0] == structure), None)
    PROGRAMS[model] = same or (structure, _compiled(*structure))
    return PROGRAMS[model][1]


def _compiled(graph: nnx.GraphDef[Decoder], treedef: _Treedef) -> _Programs:
    """Programs that compile once per shapes and per kind of sampling (which parts a `Sampler` has)."""

    def advance(weights, tokens, num_new, cache, rows, sampler, stop):
        """Appends tokens [B, T] and chooses the next of every row that has any; other rows stay as they are."""
        model = nnx.merge(graph, jax.tree.unflatten(treedef, weights))
        logits, cache = model(tokens, cache, num_new)
        last = jnp.maximum(num_new - 1, 0)
        logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
        token, sound = choose(sampler, logits, rows.num_drawn)
        came = num_new > 0
        new = jnp.where(came, jnp.where(sound, token, _UNSOUND), rows.new)
        running = jnp.where(came, ~stop[token], rows.running)
        whole = model.split.whole
        return _Rows(whole(new), whole(running), whole(rows.num_drawn)), cache

    @functools.partial(jax.jit, donate_argnames="cache")
    def append(weights, tokens, num_new, cache, rows, sampler, stop):
        """Appends tokens [B, T], a chunk of the prompts. A row's token is that of its last chunk."""
        return advance(weights, tokens, num_new, cache, rows, sampler, stop)

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(weights, cache, rows, sampler, stop):
        """Appends the tokens [B] that the last call chose. Rows that have ended append nothing."""
        tokens, num_new = jnp.maximum(rows.new, 0)[:, None], rows.running.astype(jnp.int32)
        rows = _Rows(jnp.full_like(rows.new, _NOTHING), rows.running, rows.num_drawn + 1)
        return advance(weights, tokens, num_new, cache, rows, sampler, stop)

    return _Programs(append, step)


def _new_tokens(
    decoding: _Decoding, count: int, stop: Bool[np.ndarray, " V"], report: Callable[[int], object]
) -> Iterator[tuple[int, int]]:
    """Row and token of every new token, in `count` steps or until all rows have ended; reports after every step.

    Raises:
        RangeError: logits that are no distribution.
        KVAttnError: what a cache recorded before that.
    """
    num_new = np.zeros(decoding.cache[0].batch_size, np.int64)
    num_running = len(num_new)
    for new in decoding.steps(count):
        if np.any(new == _UNSOUND):
            decoding.check()  # the caches may know more
            raise RangeError(
                f"the logits of rows {np.nonzero(new == _UNSOUND)[0].tolist()} are NaN or infinite after {num_new[0]} "
                "new tokens: a weight is not finite, or something overflowed. Look at the checkpoint, or compute in a "
                "wider dtype."
            )
        for row in np.nonzero(new >= 0)[0].tolist():
            token = int(new[row])
            num_running -= int(stop[token])
            num_new[row] += 1
            yield row, token
        report(int(num_new.sum()))
        if num_running == 0:
            break


def _default_chunk(cache: Caches, vocab_size: int, longest: int) -> int:
    """Tokens appended at once: all, unless there would be too many logits and chunks make no difference."""
    for layer in cache:
        if layer.policy.needs_mass or layer.codec.for_chunk(layer.dtype) != layer.codec:
            return _rounded(longest)
    return max(_LOGITS // (cache[0].batch_size * vocab_size * _ROUND), 1) * _ROUND


def _reporting(progress: object) -> Callable[[int], contextlib.AbstractContextManager[Callable[[int], object]]]:
    """What opens a report on a total number of tokens; it takes how many there are."""
    if progress is not True and progress is not False:
        if not callable(progress):
            raise DTypeError(f"progress must be a bool or a function of two numbers, got {progress!r}.")
        return lambda total: contextlib.nullcontext(lambda done: progress(done, total))
    if not progress:
        return lambda total: contextlib.nullcontext(lambda done: None)
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise MissingLibraryError(
            "progress=True shows a bar of tqdm, which is not installed: pip install 'kvattn[hf]', or pass a function "
            "progress(done, total)."
        ) from error

    @contextlib.contextmanager
    def bar(total: int) -> Iterator[Callable[[int], object]]:
        with tqdm(total=total, unit="token") as shown:
            yield lambda done: shown.update(done - shown.n)

    return bar


def _rounded(count: int) -> int:
    return -(-count // _ROUND) * _ROUND
