"""Parts of prompts as the arrays that a program takes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvattn.serving.jobs import Piece
from kvattn.serving.texts import NO_ROW, Text


class Pieces(NamedTuple):
    """Parts of prompts of M rows.

    Attributes:
        take: int32 [M], the rows.
        tokens: int32 [M, T].
        num_new: int32 [M], how many of them are real.
        lengths: int32 [M], tokens before them.
        fresh: bool [M], rows that begin with it.
        source: int32 [B], which piece each row takes its past from; negative: none.
        ends: bool [B], rows that choose their next token after it.
        drawn: int32 [B], how many they have then.
        forced: int32 [B], tokens that are not to be chosen; negative: they are.
    """

    take: Any
    tokens: Any
    num_new: Any
    lengths: Any
    fresh: Any
    source: Any
    ends: Any
    drawn: Any
    forced: Any


def pieces_of(pieces: Sequence[Piece], shape: tuple[int, int], num_rows: int) -> Pieces:
    """Parts of prompts as arrays.

    Args:
        pieces: the parts; of jobs that have rows.
        shape: of the arrays, rows and tokens: as many as there are pieces, or more.
        num_rows: of the batch.
    """
    count, width = shape
    take, num_new, lengths = (np.zeros((count,), np.int32) for _ in range(3))
    tokens, fresh = np.zeros((count, width), np.int32), np.zeros((count,), bool)
    source, forced = (np.full((num_rows,), -1, np.int32) for _ in range(2))
    ends, drawn = np.zeros((num_rows,), bool), np.zeros((num_rows,), np.int32)
    found = Pieces(
        take=take,
        tokens=tokens,
        num_new=num_new,
        lengths=lengths,
        fresh=fresh,
        source=source,
        ends=ends,
        drawn=drawn,
        forced=forced,
    )
    for i, piece in enumerate(pieces):
        prefill, text = piece.prefill, piece.prefill.text
        take[i], lengths[i], num_new[i] = text.row, piece.start, piece.stop - piece.start
        tokens[i, : num_new[i]] = prefill.tokens[piece.start : piece.stop]
        fresh[i] = piece.start == prefill.start
        for each in (text, *(prefill.followers if piece.is_last else ())):
            if each.row != NO_ROW:
                _goes_on(found, i, piece, each)
    return found


def _goes_on(found: Pieces, i: int, piece: Piece, text: Text) -> None:
    """A row whose past is piece i."""
    found.source[text.row] = i
    if piece.is_last and not piece.prefill.job.is_beam:
        found.ends[text.row] = True
        found.drawn[text.row] = text.num_drawn - 1
        if text.num_drawn - 1 < len(text.new):
            found.forced[text.row] = text.new[text.num_drawn - 1]
