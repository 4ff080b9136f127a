"""What `kvattn.generate` is given: prompts and stop tokens, checked and brought into the form of arrays."""

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kvattn import _checks
from kvattn.errors import DTypeError, RangeError, ShapeError


def checked(prompts: Sequence[Sequence[int]], vocab_size: int) -> list[np.ndarray]:
    """Every prompt as int32 [length], length >= 1.

    Raises:
        ShapeError: an empty prompt, or something that is no sequence.
        DTypeError: what does not hold ints.
        RangeError: a token id outside the vocabulary.
    """
    if isinstance(prompts, str | bytes | bytearray):
        raise ShapeError(f"prompts must be a sequence of prompts, got one {type(prompts).__name__}: put it in a list.")
    if not isinstance(prompts, Iterable):
        raise DTypeError(f"prompts must be a sequence of prompts, got {type(prompts).__name__}.")
    return [_prompt(i, prompt, vocab_size) for i, prompt in enumerate(prompts)]


def stop_mask(stop_tokens: Any, vocab_size: int) -> np.ndarray:
    """bool [V]: which tokens end a row.

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
        if _checks.integer("a stop token", token, 0, RangeError) >= vocab_size:
            raise RangeError(f"stop tokens must lie in [0, {vocab_size}), got {token}.")
        mask[token] = True
    return mask


def padded(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """int32 [B, length]: the rows, zeros after them."""
    tokens = np.zeros((len(rows), length), np.int32)
    for to, row in zip(tokens, rows, strict=True):
        to[: len(row)] = row
    return tokens


def _prompt(index: int, prompt: Any, vocab_size: int) -> np.ndarray:
    if isinstance(prompt, str):
        raise DTypeError(
            f"prompt {index} is text, not token ids: pass tokenizer.encode(text).ids (kvattn.models.load_tokenizer), "
            "or text.encode() for a model of bytes."
        )
    values = list(prompt) if isinstance(prompt, bytes | bytearray) else prompt
    # NumPy would make [1, True] ints.
    if isinstance(values, list | tuple) and any(isinstance(x, bool | np.bool_) for x in values):
        raise DTypeError(f"prompt {index} must hold integers, got a bool among them.")
    try:
        values = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise ShapeError(f"prompt {index} must be a sequence of token ids: {error}.") from error
    if values.ndim != 1 or values.size == 0:
        raise ShapeError(
            f"prompt {index} must be a sequence of at least one token id, its shape is {values.shape}. Prompts are a "
            "list of such sequences, also where there is only one."
        )
    whole = values.dtype == object and all(isinstance(x, numbers.Integral) for x in values)  # beyond 64 bits
    if not (whole or np.issubdtype(values.dtype, np.integer)):
        raise DTypeError(f"prompt {index} must hold integers, got {values.dtype}.")
    if values.min() < 0 or values.max() >= vocab_size:
        raise RangeError(
            f"prompt {index}: token ids must lie in [0, {vocab_size}), got {values.min()} to {values.max()}."
        )
    return values.astype(np.int32)
