"""Text from token ids: of a continuation at once, and as its tokens come."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, SupportsIndex, runtime_checkable

from kvattn import _checks
from kvattn.errors import DTypeError, RangeError

_REPLACEMENT = "\ufffd"
"""What decoders make of bytes that are no text, or not yet."""

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
"""What tokens with byte fallback call one byte."""


@runtime_checkable
class Decodes(Protocol):
    """What text is made with; tokenizers of `tokenizers` and `transformers` have it."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        ...


def continuation(
    tokenizer: Decodes,
    prompt: Iterable[SupportsIndex],
    tokens: Iterable[SupportsIndex],
    *,
    skip_special_tokens: bool = True,
) -> str:
    """The text by which `tokens` go on from `prompt`: that of both together, without that of the prompt.

    Decoding the new tokens alone is something else: Llama's decoders take away the space that a text begins with, so
    words would stick to the prompt, and a character may begin in the prompt and end behind it.

    Args:
        tokenizer: a `tokenizers.Tokenizer`, or another with its `decode`.
        prompt: the ids that `kvattn.generate` was given.
        tokens: the ids that it returned for them.
        skip_special_tokens: leave out what the tokenizer calls special.

    Raises:
        DTypeError: a token that is no int, text instead of ids.
        RangeError: a negative one.

    Example:
        >>> class Words:
        ...     def decode(self, ids, skip_special_tokens=True):
        ...         return " ".join("once upon a time".split()[i] for i in ids)
        >>> continuation(Words(), [0, 1], [2, 3])
        ' a time'
    """
    before = _ids("prompt", prompt)
    both = before + _ids("tokens", tokens)
    text = tokenizer.decode(both, skip_special_tokens=skip_special_tokens)
    return text[_in_common(tokenizer.decode(before, skip_special_tokens=skip_special_tokens), text) :]


class TextStream:
    """Text from tokens as they come, for `kvattn.generate`'s `on_token`.

    What `push` returned, with what `finish` returns, is the `continuation` of the prompt. What later tokens may change
    is held back: a character whose last token has not come, bytes that are no UTF-8 until other text follows, and, with
    byte fallback, bytes that follow each other, which only become text together. (Of the names of its bytes, such as
    ``<0x0A>``, a tokenizer tells by `id_to_token` or `convert_ids_to_tokens`.)

    Args:
        tokenizer: a `tokenizers.Tokenizer`, or another with its `decode`.
        prompt: the ids that the tokens follow. Without it they are taken for a text of their own, whose first space
            some tokenizers leave out.
        skip_special_tokens: leave out what the tokenizer calls special.

    Raises:
        DTypeError: a token of the prompt that is no int, text instead of ids.
        RangeError: a negative one.

    Example:
        >>> class Bytes:
        ...     def decode(self, ids, skip_special_tokens=True):
        ...         return bytes(ids).decode(errors="replace")
        >>> stream = TextStream(Bytes())
        >>> [stream.push(token) for token in "né.".encode()], stream.finish()
        (['n', '', 'é', '.'], '')
    """

    def __init__(self, tokenizer: Decodes, prompt: Iterable[SupportsIndex] = (), *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._name = _naming(tokenizer)
        self._prompt = _ids("prompt", prompt)
        self._begin(self._prompt)
        self._among_bytes = self._ends_in_bytes(self._prompt)

    def push(self, token: int) -> str:
        """The text that is certain with this token and was not before; often "", never half a character.

        Raises:
            DTypeError: a token that is no int.
            RangeError: a negative one.
        """
        self._new.append(_checks.integer("a token", token, 0, RangeError))
        self._among_bytes = self._is_byte(token) or (self._among_bytes and self._is_silent(token))
        if self._among_bytes:
            return ""
        text = self._decode(self._context + self._new)
        whole = text.rstrip(_REPLACEMENT)
        added = whole[max(self._returned, _in_common(self._before, whole)) :]
        if added:
            self._returned = len(whole)
            if len(whole) == len(text):
                self._begin(self._new)
        return added

    def finish(self) -> str:
        """What was held back, an incomplete character as U+FFFD. The stream begins anew, after the same prompt."""
        text = self._decode(self._context + self._new)
        rest = text[max(self._returned, _in_common(self._before, text)) :]
        self._begin(self._prompt)
        self._among_bytes = self._ends_in_bytes(self._prompt)
        return rest

    def _begin(self, context: list[int]) -> None:
        """Tokens are decoded together with some before them: what a token adds may depend on them."""
        self._context, self._new = context, []
        self._before = self._decode(context)
        self._returned = 0  # characters of the text of context and new tokens; those in common with `_before` are too

    def _is_byte(self, token: int) -> bool:
        name = self._name(token)
        return isinstance(name, str) and _BYTE.fullmatch(name) is not None

    def _is_silent(self, token: int) -> bool:
        """Whether the token leaves no trace in a text. Twice: of one, a decoder may take away the space that it is."""
        return not self._decode([token, token])

    def _ends_in_bytes(self, ids: list[int]) -> bool:
        """Whether a byte that comes next would join others: also across special tokens that are left out."""
        for token in reversed(ids):
            if self._is_byte(token) or not self._is_silent(token):
                return self._is_byte(token)
        return False

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip) if ids else ""


def _ids(name: str, ids: object) -> list[int]:
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise DTypeError(f"{name} must be token ids, got {ids!r}: tokenizer.encode(text).ids.")
    values = getattr(ids, "tolist", lambda: ids)()
    return [_checks.integer(f"a token of {name}", token, 0, RangeError) for token in values]


def _in_common(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _naming(tokenizer: Decodes) -> Callable[[int], object]:
    """The name of a token as the tokenizer's vocabulary has it; None where it does not say."""
    for method in ("id_to_token", "convert_ids_to_tokens"):
        if hasattr(tokenizer, method):
            return getattr(tokenizer, method)
    return lambda token: None
