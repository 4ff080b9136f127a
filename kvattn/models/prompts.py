"""What `kvattn.generate` and `kvattn.score` are given, checked and brought into the form that they work on."""

import numbers
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, Int32, Integer

from kvattn import _checks
from kvattn.cache import Cache
from kvattn.errors import CapacityError, ConfigError, DTypeError, RangeError, ShapeError, StaleCacheError
from kvattn.families.config import DecoderConfig
from kvattn.models.decoder import Caches, Decoder
from kvattn.policies import Context

_ROUND = 64
"""Prompt lengths and default capacities are rounded up to this, so that fewer programs are compiled."""

_ACTIVATIONS = 2**27
"""Most numbers of the widest activation of a chunk of prompts unless told otherwise: 512 MiB of float32."""


def checked(
    prompts: Sequence[Sequence[int] | Integer[np.ndarray, " _"]], vocab_size: int, name: str = "prompt"
) -> list[Int32[np.ndarray, " _"]]:
    """Every prompt, or what else the `name` says, of at least one token.

    Raises:
        ShapeError: an empty prompt, or something that is no sequence.
        DTypeError: what does not hold ints.
        RangeError: a token id outside the vocabulary.
    """
    if isinstance(prompts, str | bytes | bytearray):
        raise ShapeError(f"{name}s must be a sequence of {name}s, got one {type(prompts).__name__}: put it in a list.")
    if not isinstance(prompts, Iterable):
        raise DTypeError(f"{name}s must be a sequence of {name}s, got {type(prompts).__name__}.")
    return [_tokens(f"{name} {i}", prompt, vocab_size) for i, prompt in enumerate(prompts)]


def stop_mask(stop_tokens: object, vocab_size: int) -> Bool[np.ndarray, " V"]:
    """Which tokens end a row.

    Raises:
        DTypeError: what is no int, nor a collection of them.
        RangeError: an id outside the vocabulary.
    """
    if stop_tokens is None:
        stop_tokens = ()
    elif hasattr(stop_tokens, "dtype"):
        stop_tokens = np.atleast_1d(np.asarray(stop_tokens))
    elif isinstance(stop_tokens, numbers.Number):
        stop_tokens = (stop_tokens,)
    elif isinstance(stop_tokens, str) or not isinstance(stop_tokens, Iterable):
        raise DTypeError(
            f"stop_tokens must be a token id or several, got {stop_tokens!r}; for a token by its text: "
            "tokenizer.token_to_id(text)."
        )
    mask = np.zeros((vocab_size,), bool)
    for token in stop_tokens:
        index = _checks.integer("a stop token", token, 0, RangeError)
        if index >= vocab_size:
            raise RangeError(f"stop tokens must lie in [0, {vocab_size}), got {token}.")
        mask[index] = True
    return mask


def continued(
    cache: object, model: Decoder, num_rows: int, **settings: object
) -> tuple[Caches, Int32[np.ndarray, " B"]]:
    """The caches of an earlier call, one per layer, and how many tokens their rows hold.

    Args:
        cache: what was given as such.
        model: whose they must be.
        num_rows: B.
        **settings: of new caches, all None.

    Raises:
        DTypeError: what is no sequence of caches.
        ShapeError: caches of another model, or of another number of rows.
        ConfigError: a setting; caches of an encoder, or such that hold different tokens.
        StaleCacheError: caches that an earlier call or step has used up, or one for several layers.
        KVAttnError: what an earlier step recorded, as `kvattn.KVCache.check` raises it.
    """
    if beside := [name for name, value in settings.items() if value is not None]:
        raise ConfigError(
            f"{' and '.join(beside)} cannot be changed once there is a cache: give them to the first call only."
        )
    if not isinstance(cache, list | tuple) or not all(isinstance(layer, Cache) for layer in cache):
        raise DTypeError(
            "cache must be what generate(..., return_cache=True) or model.make_cache returned, a tuple of one cache "
            f"per layer, got {type(cache).__name__}."
        )
    model.check_number(cache)
    if len({id(layer) for layer in cache}) < len(cache):
        raise StaleCacheError("the cache of one layer is given to several: each has its own, which is used up.")
    for number, (layer, block) in enumerate(zip(cache, model.owners, strict=True)):
        _checks.not_donated("cache", layer)
        where, attention = f"the cache of layer {model.config.cache_layers[number]}", block.attention
        if layer.is_static:
            raise ConfigError(f"{where} is static, it holds an encoder's keys and values: nothing can be appended.")
        if layer.batch_size != num_rows:
            raise ShapeError(
                f"{where} has {layer.batch_size} rows, but there are {num_rows} prompts: one for each row. "
                "cache.select(rows) of every layer leaves rows out."
            )
        sizes = layer.num_kv_heads, layer.key_head_dim, layer.value_head_dim
        expected = attention.num_kv_heads, attention.head_dim, attention.value_head_dim
        if sizes != expected:
            raise ShapeError(
                f"{where} has {sizes[0]} key/value heads of {sizes[1]} and {sizes[2]}, the model {expected[0]} of "
                f"{expected[1]} and {expected[2]}: it belongs to another model."
            )
        layer.check()
    lengths = [_checks.on_host(layer.lengths) for layer in cache]
    for number, held in enumerate(lengths):
        if not np.array_equal(held, lengths[0]):
            raise ConfigError(
                f"the cache of layer {number} holds {held.tolist()} tokens, that of layer 0 {lengths[0].tolist()}: "
                "trim and select all layers alike."
            )
    return tuple(cache), lengths[0]


def reached(
    config: DecoderConfig,
    held: Int32[np.ndarray, " B"],
    lengths: Int32[np.ndarray, " B"],
    max_new_tokens: int,
    appended: int,
) -> int:
    """The tokens of the longest row once the prompts are in.

    Args:
        config: of the model.
        held: tokens that the caches hold before.
        lengths: of the prompts.
        max_new_tokens: most new tokens.
        appended: those of them that are appended.

    Raises:
        RangeError: positions beyond int32, or beyond what the model has learned.
    """
    most = int((held + lengths.astype(np.int64)).max(initial=1))
    if most + max_new_tokens > _checks.INT32_MAX:
        raise RangeError(f"max_new_tokens must leave positions within int32, got {max_new_tokens}.")
    limit = config.max_positions if config.positions == "learned" else None
    if limit is not None and most + appended > limit:
        before = f", {int(held.max())} of them in the cache," if held.any() else ""
        raise RangeError(
            f"the model has {limit} learned positions; a sequence of {most} tokens{before} and {max_new_tokens} new "
            f"ones take {most + appended}: at most {max(limit + max_new_tokens - appended - most, 0)} new tokens fit."
        )
    return most


def fitting(cache: Caches, needed: Int32[np.ndarray, " B"]) -> None:
    """Checks that so many more tokens can be appended.

    Raises:
        CapacityError: they cannot; it says how many are missing.
    """
    for layer in cache:
        step = Context(layer.lengths, jnp.asarray(needed), int(needed.max(initial=0)), layer.num_slots)
        fits = _checks.on_host(layer.policy.fits(layer.state, step))
        if not np.all(fits):
            rows = np.nonzero(~fits)[0]
            held, more = _checks.on_host(layer.lengths)[rows], needed[rows]
            raise CapacityError(
                f"rows {rows.tolist()} of a cache of {layer.num_slots} slots hold {held.tolist()} tokens, and prompts "
                f"and new tokens are {more.tolist()} more: {(held + more - layer.num_slots).tolist()} slots are "
                "missing. Nothing was computed. Give the first call a larger capacity, or a policy that lets tokens "
                "go, or ask for fewer new tokens."
            )


def rounded(count: int) -> int:
    """Up to where shapes are shared."""
    return -(-count // _ROUND) * _ROUND


def chunk_size(model: Decoder, cache: Caches, longest: int, prefill_chunk: int | None) -> int:
    """How many tokens of each prompt are appended at once, up to `longest`.

    Unless told otherwise all of them, or as many as keep activations small if chunks make no difference.
    """
    whole = rounded(longest)
    if prefill_chunk is not None:
        return min(whole, prefill_chunk)
    config = model.config
    if any(layer.policy.needs_mass or layer.codec.for_chunk(layer.dtype) != layer.codec for layer in cache):
        return whole
    if config.rope is not None and config.rope.depends_on_length:
        return whole
    mlp = max(config.layer_mlp_dims) * (2 if config.gated or config.num_experts else 1)
    mlp = max(mlp, 2 * (config.shared_expert_dim or 0), 2 * config.experts_per_token * config.model_dim)
    layers = zip(config.layer_kv_heads, config.layer_head_dims, strict=True)
    heads = max((config.num_heads + 2 * kv_heads) * size for kv_heads, size in layers)
    width = max(config.model_dim, mlp, heads, config.num_layers * (config.per_layer_dim or 0))
    return min(whole, max(_ACTIVATIONS // (cache[0].batch_size * width * _ROUND), 1) * _ROUND)


def padded(rows: Sequence[Sequence[int] | Int[np.ndarray, " _"]], length: int) -> Int32[np.ndarray, "B T"]:
    """The rows, zeros after them up to `length`."""
    tokens = np.zeros((len(rows), length), np.int32)
    for to, row in zip(tokens, rows, strict=True):
        to[: len(row)] = row
    return tokens


def _tokens(name: str, prompt: object, vocab_size: int) -> Int32[np.ndarray, " _"]:
    if isinstance(prompt, str):
        raise DTypeError(
            f"{name} is text, not token ids: pass tokenizer.encode(text).ids (kvattn.models.load_tokenizer), "
            "or text.encode() for a model of bytes."
        )
    values = list(prompt) if isinstance(prompt, bytes | bytearray) else prompt
    # NumPy would make [1, True] ints.
    if isinstance(values, list | tuple) and any(isinstance(x, bool | np.bool_) for x in values):
        raise DTypeError(f"{name} must hold integers, got a bool among them.")
    try:
        values = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise ShapeError(f"{name} must be a sequence of token ids: {error}.") from error
    if values.ndim != 1 or values.size == 0:
        raise ShapeError(
            f"{name} must be a sequence of at least one token id, its shape is {values.shape}. Give a list of such "
            "sequences, also where there is only one."
        )
    whole = values.dtype == object and all(isinstance(x, numbers.Integral) for x in values)  # beyond 64 bits
    if not (whole or np.issubdtype(values.dtype, np.integer)):
        raise DTypeError(f"{name} must hold integers, got {values.dtype}.")
    if values.min() < 0 or values.max() >= vocab_size:
        raise RangeError(f"{name}: token ids must lie in [0, {vocab_size}), got {values.min()} to {values.max()}.")
    return values.astype(np.int32)
