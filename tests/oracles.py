"""What tests compare with: the oracles of `kvattn.testing`, which imports nothing else, and cross-attention so."""

import numpy as np

from kvattn.testing.accuracy import assert_accurate as assert_accurate
from kvattn.testing.accuracy import assert_lse as assert_lse
from kvattn.testing.accuracy import assert_same_bits as assert_same_bits
from kvattn.testing.oracles import TokenLists as TokenLists
from kvattn.testing.oracles import attend_token as attend_token
from kvattn.testing.oracles import kept_after as kept_after
from kvattn.testing.oracles import narrower as narrower
from kvattn.testing.oracles import rotated as rotated
from kvattn.testing.oracles import seen_from as seen_from


def cross(query, key, value, lengths=None, num_new=None, padding="right", dtype=np.float64, **rules):
    """Static cross-attention: every real query attends to every real token of the encoder."""
    query, key, value = np.asarray(query), np.asarray(key), np.asarray(value)
    batch, length, heads = query.shape[:3]
    lengths = [key.shape[1]] * batch if lengths is None else lengths
    num_new = [length] * batch if num_new is None else num_new
    out = np.zeros((batch, length, heads, value.shape[3]))
    lse = np.full((batch, length, heads), -np.inf)
    for b in range(batch):
        first = 0 if padding == "right" else length - num_new[b]
        for t in range(first, first + num_new[b]):
            if lengths[b]:
                out[b, t], lse[b, t] = attend_token(
                    query[b, t], list(key[b, : lengths[b]]), list(value[b, : lengths[b]]), dtype=dtype, **rules
                )
    return out, lse
