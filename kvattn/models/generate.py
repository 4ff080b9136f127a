"""Generation: the prompts go in, whole or in chunks, then one token of every sequence per step."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
from jaxtyping import Bool, Float32

from kvattn import _checks
from kvattn.cache import Cache
from kvattn.codecs import Codec
from kvattn.errors import DTypeError, MissingLibraryError, RangeError
from kvattn.models import loop
from kvattn.models import prompts as given
from kvattn.models.decoder import Caches, Decoder
from kvattn.models.sampling import Sampler
from kvattn.policies import Policy

Prompts = Sequence[Sequence[int]]
Logprobs = list[Float32[np.ndarray, " _"]]


class _Options(TypedDict, total=False):
    """The arguments of `generate` on which the type of its result does not depend."""

    capacity: int | None
    policy: Policy | Sequence[Policy | None] | None
    codec: Codec | Sequence[Codec | None] | None
    memory_kind: str | None
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    stop_tokens: int | Iterable[int] | None
    prefill_chunk: int | None
    on_token: Callable[[int, int], object] | None
    progress: bool | Callable[[int, int], object]
    cache: Sequence[Cache] | None


@overload
def generate(
    model: Decoder,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    return_cache: Literal[False] = ...,
    return_logprobs: Literal[False] = ...,
    **options: Unpack[_Options],
) -> list[list[int]]: ...


@overload
def generate(
    model: Decoder,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    return_cache: Literal[True],
    return_logprobs: Literal[False] = ...,
    **options: Unpack[_Options],
) -> tuple[list[list[int]], Caches]: ...


@overload
def generate(
    model: Decoder,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    return_cache: Literal[False] = ...,
    return_logprobs: Literal[True],
    **options: Unpack[_Options],
) -> tuple[list[list[int]], Logprobs]: ...


@overload
def generate(
    model: Decoder,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    return_cache: Literal[True],
    return_logprobs: Literal[True],
    **options: Unpack[_Options],
) -> tuple[list[list[int]], Logprobs, Caches]: ...


def generate(
    model: Decoder,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    capacity: int | None = None,
    policy: Policy | Sequence[Policy | None] | None = None,
    codec: Codec | Sequence[Codec | None] | None = None,
    memory_kind: str | None = None,
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
    return_logprobs: bool = False,
) -> (
    list[list[int]]
    | tuple[list[list[int]], Caches]
    | tuple[list[list[int]], Logprobs]
    | tuple[list[list[int]], Logprobs, Caches]
):
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
        memory_kind: "pinned_host" for caches in the host's memory, which may be larger than the device's.
        temperature: 0 takes the most probable token; otherwise logits are divided by it and a token is drawn.
        top_k: draw from the `top_k` most probable tokens only; ties go to lower ids. None: from all.
        top_p: draw from the nucleus only (Holtzman et al., arXiv:1904.09751): the smallest set of most probable tokens
            whose probability, after temperature and `top_k`, reaches it. None, or 1: all.
        seed: of the draws, below 2**32. A draw depends on the seed, the row and how many tokens this call drew before,
            not on the other prompts. The turns of a conversation should have different ones.
        stop_tokens: a token id or several. A row ends with the first of them that it comes to, which is part of the
            result; the other rows go on.
        prefill_chunk: the prompts are appended so many tokens at a time. None: whole, unless their widest activation
            (of the MLP, or of the heads) would have more than 2**27 numbers, 512 MiB in float32, and cutting them
            changes nothing but rounding; then in chunks that have no more (of 64 tokens at least). Policies that go by
            attention (`H2O`, `Scissorhands`, `FastGen`) judge every chunk by itself, and with `KIVI` a chunk sees those
            before it encoded: there the result depends on this.
        on_token: called as ``on_token(row, token)`` for every new token, a stop token too, as soon as it is known: what
            was passed for a row is at any time the beginning of its result. What it raises ends the generation.
        progress: True shows a bar (tqdm); a function is called as ``progress(done, total)`` after every step, in
            tokens: `total` is what there will be if no row ends early.
        cache: what an earlier call returned with `return_cache`, to go on from it: row i of the prompts is what is new
            in row i of the cache. (Or any caches of the model, one per layer, with what they hold.) It is donated: go
            on from what this call returns. None: new caches, of `capacity`, `policy`, `codec` and `memory_kind`, which
            belong to the first call only.
        return_cache: the caches are returned too. Row by row they hold all that was said: what they held before, the
            prompt, and every new token with the last one, a stop token too. The next call's prompts are only what is
            new.
        return_logprobs: the natural log-probability of every new token is returned too: the model's own, at temperature
            1 and before `top_k` and `top_p`, whatever was drawn from. `kvattn.score` gives the same.

    Returns:
        the new tokens of each prompt; with `return_logprobs` beside them float32 arrays of as many numbers, one per
        prompt; with `return_cache` last the caches, one per layer.

    Raises:
        ShapeError: an empty prompt; caches of another model, or of another number of rows.
        DTypeError: an argument of a wrong type, a prompt that does not hold ints.
        RangeError: a token id outside the vocabulary, a number outside its range. Later: logits that are NaN or
            infinite.
        ConfigError: `top_k` or `top_p` at temperature 0; `capacity`, `policy`, `codec` or `memory_kind` beside `cache`.
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
    for name, flag in (("return_cache", return_cache), ("return_logprobs", return_logprobs)):
        if not isinstance(flag, bool):
            raise DTypeError(f"{name} must be a bool, got {flag!r}.")
    sampler = Sampler.create(vocab_size, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    stop = given.stop_mask(stop_tokens, vocab_size)
    reporting = _reporting(progress)
    rows = given.checked(prompts, vocab_size)
    caches, held = None, np.zeros(len(rows), np.int32)
    if cache is not None:
        settings = {"capacity": capacity, "policy": policy, "codec": codec, "memory_kind": memory_kind}
        caches, held = given.continued(cache, model, len(rows), **settings)
    results: list[list[int]] = [[] for _ in rows]
    logprobs: list[list[float]] = [[] for _ in rows]

    def result(caches: Caches | None) -> Any:  # as the overloads say
        arrays = [np.array(row, np.float32) for row in logprobs]
        parts = (results, *([arrays] if return_logprobs else []), *([caches] if return_cache else []))
        return parts if len(parts) > 1 else results

    if not return_cache and (not rows or max_new_tokens == 0):
        return result(None)
    lengths = np.array([len(row) for row in rows], np.int32)
    # The last token is appended only if something may come after it.
    more = max_new_tokens if return_cache else max_new_tokens - 1
    reached = given.reached(model.config, held, lengths, max_new_tokens, more)
    if caches is None:
        capacity = given.rounded(reached + more) if capacity is None else capacity
        caches = model.make_cache(len(rows), capacity, policy=policy, codec=codec, memory_kind=memory_kind)
    given.fitting(caches, lengths + np.int32(more))
    if not rows:
        return result(caches)

    decoding = loop.Decoding(model, caches, loop.Settings.alike(len(rows), sampler, stop, max_new_tokens))
    decoding.append_prompts(rows, prefill_chunk)
    with reporting(len(rows) * max_new_tokens) as report:
        for row, token, logprob in _new_tokens(decoding, max_new_tokens, stop, report):
            results[row].append(token)
            logprobs[row].append(logprob)
            if on_token is not None:
                on_token(row, token)
    if return_cache and max_new_tokens > 0:
        decoding.append_last(np.array([new[-1] for new in results], np.int32))
    decoding.check()
    return result(decoding.cache)


def _new_tokens(
    decoding: loop.Decoding, count: int, stop: Bool[np.ndarray, " V"], report: Callable[[int], object]
) -> Iterator[tuple[int, int, float]]:
    """Row, token and its log-probability of every new token, in `count` steps or until all rows have ended.

    Reports after every step.

    Raises:
        RangeError: logits that are no distribution.
        KVAttnError: what a cache recorded before that.
    """
    num_new = np.zeros(decoding.cache[0].batch_size, np.int64)
    num_running = len(num_new)
    for came in decoding.steps(count):
        if np.any(came.new == loop.UNSOUND):
            decoding.check()  # the caches may know more
            raise RangeError(
                f"the logits of rows {np.nonzero(came.new == loop.UNSOUND)[0].tolist()} are NaN or infinite after "
                f"{num_new[0]} new tokens: a weight is not finite, or something overflowed. Look at the checkpoint, or "
                "compute in a wider dtype."
            )
        for row in np.nonzero(came.new >= 0)[0].tolist():
            token = int(came.new[row])
            num_running -= int(stop[token])
            num_new[row] += 1
            yield row, token, float(came.logprob[row])
        report(int(num_new.sum()))
        if num_running == 0:
            break


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
