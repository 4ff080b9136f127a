"""Tokenizers of checkpoints, and text from tokens as they come."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvattn import _checks
from kvattn.errors import CacheCorruptionError, MissingFileError, MissingLibraryError, RangeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAME = "tokenizer.json"
"""The file of a checkpoint's folder that `load_tokenizer` reads."""

_REPLACEMENT = "\ufffd"
"""What decoders make of bytes that are no text, or not yet."""


class Decodes(Protocol):
    """What `TextStream` needs of a tokenizer; those of `tokenizers` and `transformers` have it."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        ...


def load_tokenizer(folder: str | os.PathLike[str]) -> "Tokenizer":
    """The tokenizer of a checkpoint, read from ``tokenizer.json`` by the `tokenizers` library.

    ``tokenizer.encode(text).ids`` is a prompt of `kvattn.generate`, ``tokenizer.decode(tokens)`` the text of what it
    returns, ``tokenizer.token_to_id("</s>")`` a stop token.

    Args:
        folder: of the checkpoint.

    Raises:
        MissingFileError: there is no such folder, or no such file in it.
        CacheCorruptionError: the file is damaged or holds something else.
        MissingLibraryError: `tokenizers` is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingLibraryError(
            "load_tokenizer needs the tokenizers library, which is not installed: pip install 'kvattn[hf]'."
        ) from error
    path = Path(folder) / NAME
    if not path.is_file():
        there = "there is no such folder" if not path.parent.is_dir() else f"the folder has no {NAME}"
        raise MissingFileError(
            f"{path} is not there: {there}. A checkpoint with a tokenizer of another format gets one by "
            "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # the library has no error class of its own
        raise CacheCorruptionError(f"{path} is damaged, or not the settings of a tokenizer: {error}.") from error


class TextStream:
    """Text from tokens as they come, for `kvattn.generate`'s `on_token`.

    A token may end within a character: what is incomplete is held back until the rest has come, and bytes that are no
    UTF-8 until other text follows. What `push` returned, with what `finish` returns, is what the tokenizer decodes from
    all tokens at once. (Not so where tokenizers with byte fallback come to bytes that are no UTF-8: they take back
    the characters before.)

    Args:
        tokenizer: a `tokenizers.Tokenizer`, or another with its `decode`.
        skip_special_tokens: leave out what the tokenizer calls special.

    Example:
        >>> class Bytes:
        ...     def decode(self, ids, skip_special_tokens=True):
        ...         return bytes(ids).decode(errors="replace")
        >>> stream = TextStream(Bytes())
        >>> [stream.push(token) for token in "né.".encode()], stream.finish()
        (['n', '', 'é', '.'], '')
    """

    def __init__(self, tokenizer: Decodes, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # Tokens are decoded together with some before them: a token's text may depend on whether it is the first.
        self._context: list[int] = []
        self._new: list[int] = []
        self._returned = 0  # characters of the text of both

    def push(self, token: int) -> str:
        """The text that is complete with this token and was not before; often "", never half a character.

        Raises:
            DTypeError: a token that is no int.
            RangeError: a negative one.
        """
        self._new.append(_checks.integer("a token", token, 0, RangeError))
        text = self._decode(self._context + self._new)
        # All of them: byte fallback makes one of every byte since the last token of another kind.
        whole = text.rstrip(_REPLACEMENT)
        added = whole[self._returned :]
        self._returned = max(self._returned, len(whole))
        if added and len(whole) == len(text):
            self._context, self._new = self._new, []
            self._returned = len(self._decode(self._context))
        return added

    def finish(self) -> str:
        """What was held back, an incomplete character as U+FFFD. The stream begins anew."""
        rest = self._decode(self._context + self._new)[self._returned :]
        self._context, self._new, self._returned = [], [], 0
        return rest

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
