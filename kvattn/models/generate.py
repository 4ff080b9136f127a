"""Generation: one prefill of all prompts, then one token of every sequence per step."""

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvattn import _checks
from kvattn._typing import Array
from kvattn.errors import DTypeError, RangeError, ShapeError
from kvattn.models.decoder import Caches, Decoder

_ROUND = 64
"""Prompt lengths and default capacities are rounded up to this, so that fewer programs are compiled."""


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    capacity: int | None = None,
    policy: Any = None,
    codec: Any = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continues every prompt by `max_new_tokens` tokens.

    Args:
        model: the decoder.
        prompts: token ids, of any lengths >= 1; `bytes` are fine for a model of bytes.
        max_new_tokens: how many tokens follow each prompt.
        capacity: slots of the caches. None: what the longest sequence needs.
        policy: which tokens the caches keep; as in `Decoder.make_cache`.
        codec: in how many bits.
        temperature: 0 takes the most probable token; otherwise logits are divided by it and a token is drawn.
        seed: of the draws. A draw depends on the seed, the row and how many tokens were drawn before, not on
            the other prompts.

    Returns:
        the new tokens of each prompt.

    Raises:
        ShapeError: an empty prompt.
        DTypeError: a prompt that does not hold ints.
        RangeError: a token id outside the vocabulary, a negative count or temperature.
        CapacityError: the caches cannot take prompts and new tokens.

    Example:
        >>> from flax import nnx
        >>> from kvattn.models import Decoder, DecoderConfig, generate
        >>> config = DecoderConfig(vocab_size=256, model_dim=32, num_layers=1, num_heads=4, num_kv_heads=1, mlp_dim=32)
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> [len(new) for new in generate(model, [b"one", b"another"], 5)]
        [5, 5]
    """
    _checks.integer("max_new_tokens", max_new_tokens, 0, RangeError)
    _checks.integer("seed", seed, 0, RangeError)
    if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
        raise DTypeError(f"temperature must be a number, got {temperature!r}.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise RangeError(f"temperature must be finite and >= 0, got {temperature}.")
    rows = [_prompt(i, prompt, model.config.vocab_size) for i, prompt in enumerate(prompts)]
    if not rows or max_new_tokens == 0:
        return [[] for _ in rows]

    num_new = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), _rounded(int(num_new.max()))), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    # The last token is never appended: nothing comes after it.
    needed = jnp.asarray(num_new + (max_new_tokens - 1))
    if capacity is None:
        capacity = _rounded(int(num_new.max()) + max_new_tokens - 1)
    cache = model.make_cache(len(rows), capacity, policy=policy, codec=codec)
    for layer in cache:
        layer.refuse_overflow(layer.policy.fits(layer.state, layer.lengths, needed, layer.num_slots), needed)

    graph, state = nnx.split(model)
    weights, structure = jax.tree.flatten(state)
    append = _program(graph, structure, temperature == 0)
    key, divisor = jax.random.key(seed), jnp.asarray(temperature or 1.0, jnp.float32)
    token, step, cache = append(weights, jnp.asarray(tokens), jnp.asarray(num_new), cache, key, divisor, jnp.int32(0))
    new = [token]
    for _ in range(max_new_tokens - 1):
        token, step, cache = append(weights, token, None, cache, key, divisor, step)
        new.append(token)
    for layer in cache:
        layer.check()
    return np.concatenate(jax.device_get(new), axis=1).tolist()


@functools.lru_cache(maxsize=16)
def _program(graph: Any, structure: Any, greedy: bool) -> Callable[..., tuple[Array, Array, Caches]]:
    """The jitted step of a model, the same for later calls: it crosses to the device as a flat list of weights."""

    @functools.partial(jax.jit, donate_argnames="cache")
    def append(weights, tokens, num_new, cache, key, temperature, step):
        """Appends tokens [B, T] and chooses the next: int32 [B, 1], how many were chosen so far, the caches."""
        model = nnx.merge(graph, jax.tree.unflatten(structure, weights))
        logits, cache = model(tokens, cache, num_new)
        batch, length = tokens.shape
        last = jnp.full((batch,), length - 1, jnp.int32) if num_new is None else num_new - 1
        logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
        if greedy:
            token = jnp.argmax(logits, axis=-1)
        else:
            keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(jnp.arange(batch))
            token = jax.vmap(jax.random.categorical)(keys, logits / temperature)
        return token.astype(jnp.int32)[:, None], step + 1, cache

    return append


def _prompt(index: int, prompt: Sequence[int], vocab_size: int) -> np.ndarray:
    values = np.asarray(list(prompt) if isinstance(prompt, bytes) else prompt)
    if values.ndim != 1 or values.size == 0:
        raise ShapeError(f"prompt {index} must be a sequence of at least one token id, its shape is {values.shape}.")
    if not np.issubdtype(values.dtype, np.integer):
        raise DTypeError(f"prompt {index} must hold integers, got {values.dtype}.")
    if values.min() < 0 or values.max() >= vocab_size:
        raise RangeError(
            f"prompt {index}: token ids must lie in [0, {vocab_size}), got {values.min()} to {values.max()}."
        )
    return values.astype(np.int32)


def _rounded(count: int) -> int:
    return -(-count // _ROUND) * _ROUND
