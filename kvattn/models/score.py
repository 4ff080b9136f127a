"""Scoring: how probable a model finds the tokens of given sequences."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32, Integer

from kvattn import _checks
from kvattn._typing import Array
from kvattn.codecs import Codec
from kvattn.errors import ConfigError, DTypeError, RangeError, ShapeError
from kvattn.layers import placement
from kvattn.models import loop
from kvattn.models import prompts as given
from kvattn.models.decoder import Caches, Decoder
from kvattn.models.programs import ProgramsOf, Weights
from kvattn.models.sampling import HostOrDevice, Sampler, log_probability
from kvattn.policies import Policy

_LOGITS = 2**24
"""Most logits there are at once: 64 MiB of float32."""


def score(
    model: Decoder,
    sequences: Sequence[Sequence[int] | Integer[np.ndarray, " _"]],
    *,
    codec: Codec | Sequence[Codec | None] | None = None,
    policy: Policy | Sequence[Policy | None] | None = None,
    capacity: int | None = None,
    prefill_chunk: int | None = None,
    prompt_lengths: Sequence[int] | None = None,
) -> list[Float32[np.ndarray, " _"]]:
    """The natural log-probability of every token after the first, given those before it.

    Of what `kvattn.generate` returned it gives what ``return_logprobs=True`` gave, but for rounding: about 1e-6 in
    float32, whatever the batch and the chunks were. With `prompt_lengths`, bit for bit.

    Args:
        model: the decoder.
        sequences: token ids, of any lengths >= 1; they are one batch.
        codec: in how many bits the caches keep what came before; as in `Decoder.make_cache`.
        policy: which tokens they keep.
        capacity: slots of the caches. None: what the longest sequence needs.
        prefill_chunk: the sequences are appended so many tokens at a time. None, and where the result depends on it: as
            in `kvattn.generate`.
        prompt_lengths: how many tokens of each sequence were its prompt, at least one. The others are then appended one
            by one, by the programs that `kvattn.generate` runs, which choose nothing: their log-probabilities equal
            those that it returned in every bit, if rows, their order, `capacity`, `policy`, `codec`, `prefill_chunk`
            and the device are the same. That takes as long as generating them did (and the prompts are computed twice).
            None: nothing is appended one by one, which is many times faster.

    Returns:
        float32 arrays, one per sequence, each with one number less than it has tokens.

    Raises:
        ShapeError: an empty sequence; as many `prompt_lengths` as there are sequences are needed.
        DTypeError: an argument of a wrong type, a sequence that does not hold ints.
        RangeError: a token id outside the vocabulary, a number outside its range. Later: logits that are NaN or
            infinite.
        ConfigError: `prompt_lengths` without `capacity`: results differ in their last bits between capacities.
        CapacityError: the caches cannot take the sequences. Nothing was computed.

    Example:
        >>> from flax import nnx
        >>> from kvattn.models import Decoder, DecoderConfig, generate, score
        >>> config = DecoderConfig(vocab_size=256, model_dim=32, num_layers=1, num_heads=4, num_kv_heads=1, mlp_dim=32)
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> [x.shape for x in score(model, [b"one", b"another"])]
        [(2,), (6,)]
        >>> new, logprobs = generate(model, [b"one"], 5, temperature=1.0, capacity=64, return_logprobs=True)
        >>> again = score(model, [[*b"one", *new[0]]], capacity=64, prompt_lengths=[3])
        >>> again[0][2:].tolist() == logprobs[0].tolist()
        True
    """
    rows = given.checked(sequences, model.config.vocab_size, "sequence")
    if prefill_chunk is not None:
        _checks.integer("prefill_chunk", prefill_chunk, 1, RangeError)
    prompts = None if prompt_lengths is None else _prompt_lengths(prompt_lengths, rows)
    if prompts is not None and capacity is None:
        raise ConfigError(
            "prompt_lengths repeats what kvattn.generate computed, in every bit: give the same capacity to both."
        )
    lengths = np.array([len(row) - 1 for row in rows], np.int32)  # nothing comes after the last token
    if not lengths.any():
        return [np.zeros((0,), np.float32) for _ in rows]
    reached = given.reached(model.config, np.zeros_like(lengths), lengths, 0, 0)

    def make_cache() -> Caches:
        slots = given.rounded(reached) if capacity is None else capacity
        return model.make_cache(len(rows), slots, policy=policy, codec=codec)

    cache = make_cache()
    given.fitting(cache, lengths)
    if prompts is None:
        return _scored(model, rows, cache, prefill_chunk)
    heads = [row[:length] for row, length in zip(rows, prompts, strict=True)]
    scored = _scored(model, heads, cache, prefill_chunk)
    repeated = _repeated(model, rows, prompts, make_cache(), prefill_chunk)
    return [np.concatenate(parts) for parts in zip(scored, repeated, strict=True)]


def _compiled(model_of: Callable[[Weights], Decoder]) -> Callable[..., tuple[Float32[Array, "B T"], Caches]]:
    """A program that appends a chunk and gives the log-probabilities of other tokens [B, T], each after its own."""

    @functools.partial(jax.jit, donate_argnames="cache")
    def append(weights, tokens, following, num_new, cache):
        model = model_of(weights)
        x, cache = model.hidden(tokens, cache, num_new)
        following = placement.like_rows(following, x)
        size = max(_LOGITS // (tokens.shape[0] * model.config.vocab_size), 1)
        logprobs = _in_slices(lambda x, token: log_probability(model.logits(x), token), size, x, following)
        return model.split.whole(logprobs), cache

    return append


PROGRAMS = ProgramsOf(_compiled)


def _in_slices(
    of: Callable[[Array, Array], Array], size: int, x: Float[Array, "B T D"], tokens: Int32[Array, "B T"]
) -> Float32[Array, "B T"]:
    """``of(x, tokens)`` [B, T], so many tokens of each row at a time."""
    length = tokens.shape[1]
    if length <= size:
        return of(x, tokens)
    count = -(-length // size)

    def cut(a: Array) -> Array:
        """[B, T, ...] -> [count, B, size, ...], zeros at the end."""
        a = jnp.pad(a, [(0, 0), (0, count * size - length)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], count, size, *a.shape[2:]), 1, 0)

    out = jax.lax.map(lambda part: of(*part), (cut(x), cut(tokens)))
    return jnp.moveaxis(out, 0, 1).reshape(tokens.shape[0], count * size)[:, :length]


def _scored(
    model: Decoder, rows: list[Int32[np.ndarray, " _"]], cache: Caches, prefill_chunk: int | None
) -> list[Float32[np.ndarray, " _"]]:
    """All tokens but the first of each row, appended in chunks to empty caches."""
    lengths = np.array([len(row) - 1 for row in rows], np.int32)
    longest = int(lengths.max())
    if longest == 0:
        return [np.zeros((0,), np.float32) for _ in rows]
    weights, append = PROGRAMS.of(model)
    chunk = given.chunk_size(model, cache, longest, prefill_chunk)
    num_chunks = -(-longest // chunk)
    tokens = given.padded([row[:-1] for row in rows], num_chunks * chunk)
    following = given.padded([row[1:] for row in rows], num_chunks * chunk)
    parts = []
    for start in range(0, num_chunks * chunk, chunk):
        num_new = np.clip(lengths - start, 0, chunk).astype(np.int32)
        here = slice(start, start + chunk)
        part, cache = append(weights, tokens[:, here], following[:, here], num_new, cache)
        parts.append(part)
    return _on_host(parts, lengths, cache)


def _repeated(
    model: Decoder,
    rows: list[Int32[np.ndarray, " _"]],
    prompts: Int32[np.ndarray, " B"],
    cache: Caches,
    prefill_chunk: int | None,
) -> list[Float32[np.ndarray, " _"]]:
    """The tokens after the prompts, in the calls in which `kvattn.generate` would choose them."""
    new = [row[length:] for row, length in zip(rows, prompts, strict=True)]
    counts = np.array([len(tokens) for tokens in new], np.int32)
    vocab_size = model.config.vocab_size
    greedy = Sampler.create(vocab_size, temperature=0, top_k=None, top_p=None, seed=0)
    settings = loop.Settings.alike(len(rows), greedy, np.zeros((vocab_size,), bool), 0)
    decoding = loop.Decoding(model, cache, dataclasses.replace(settings, limit=counts))
    forced = given.padded(new, max(int(counts.max()), 1))
    heads = [row[:length] for row, length in zip(rows, prompts, strict=True)]
    decoding.append_prompts(heads, prefill_chunk, forced[:, 0])
    parts = [decoding.rows.logprob[:, None]]
    for number in range(1, forced.shape[1]):
        decoding.step(forced[:, number])
        parts.append(decoding.rows.logprob[:, None])
    return _on_host(parts, counts, decoding.cache)


def _on_host(
    parts: Sequence[Float32[HostOrDevice, "B _"]], counts: Int32[np.ndarray, " B"], cache: Caches
) -> list[Float32[np.ndarray, " _"]]:
    """The first numbers of each row.

    Raises:
        RangeError: one of them is NaN.
        KVAttnError: what a cache recorded before that.
    """
    logprobs = np.concatenate([np.asarray(part) for part in parts], axis=1)
    for layer in cache:
        layer.check()
    result = [row[:count] for row, count in zip(logprobs, counts, strict=True)]
    unsound = [number for number, row in enumerate(result) if np.isnan(row).any()]
    if unsound:
        raise RangeError(
            f"the logits of rows {unsound} are NaN or infinite: a weight is not finite, or something overflowed. Look "
            "at the checkpoint, or compute in a wider dtype."
        )
    return result


def _prompt_lengths(lengths: Sequence[int], rows: list[Int32[np.ndarray, " _"]]) -> Int32[np.ndarray, " B"]:
    """One per row, each from 1 to the row's own length."""
    if isinstance(lengths, str) or not hasattr(lengths, "__iter__"):
        raise DTypeError(f"prompt_lengths must be a sequence of ints, one for each sequence, got {lengths!r}.")
    values = [_checks.integer("a prompt length", length, 1, RangeError) for length in lengths]
    if len(values) != len(rows):
        raise ShapeError(f"there are {len(values)} prompt_lengths for {len(rows)} sequences: one for each.")
    for number, (length, row) in enumerate(zip(values, rows, strict=True)):
        if length > len(row):
            raise RangeError(f"sequence {number} has {len(row)} tokens, its prompt cannot have {length}.")
    return np.array(values, np.int32)
