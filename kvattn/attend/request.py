"""What is asked of an implementation of attention."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int32, Shaped

from kvattn._typing import Array
from kvattn.cache.view import View
from kvattn.masks import Mask
from kvattn.positions import RoPE


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One call: queries, what they read, and by which rule.

    An implementation returns ``(out, lse, mass)``: out [B, T, N, Hv] and lse [B, T, N] in float32 (float64 for
    float64), and mass float32 [B, K, S] if `want_mass`, else None: the probability each slot received, summed over
    the new tokens, mean over the query heads of its group. Sinks are not its business.

    Attributes:
        query: the queries.
        positions: -1 for pads, whose rows come out as 0 and -inf.
        view: the slots.
        alibi_slopes: adds slope * (key position - query position) to the scores. None: nothing.
        mask: who may attend to whom.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(scores / softcap), before ALiBi, relative bias and mask.
        want_mass: whether the attention per slot is wanted.
        key_rope: rotates the keys of the view by their positions. None: they are stored rotated.
        of_several: whether the queries of a row are of several sequences that read it together: then many of them are
            no prompt, and what they read comes before all of them.
        relative_bias: adds what stands there for the distance from key to query, the last for all larger ones. None:
            nothing.
        out_dtype: what out may be rounded to where an implementation can write it so: nothing else is done to it. None:
            float32 is wanted.
    """

    query: Float[Array, "B T N H"]
    positions: Int32[Array, "B T"]
    view: View
    alibi_slopes: Float[Array, " N"] | None
    mask: Mask = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    want_mass: bool = dataclasses.field(default=False, metadata={"static": True})
    key_rope: RoPE | None = dataclasses.field(default=None, metadata={"static": True})
    of_several: bool = dataclasses.field(default=False, metadata={"static": True})
    relative_bias: Float[Array, "N distances"] | None = None
    out_dtype: DTypeLike | None = dataclasses.field(default=None, metadata={"static": True})

    def reached(self, kv_positions: Int32[Array, "*lead B K1 R"]) -> Bool[Array, "*lead B K1 R"]:
        """Which slots hold a token that some query of the row may attend to. All others are as good as empty.

        What lies in them must change no bit: a page that a window has left may be another row's by now.

        Args:
            kv_positions: of one head or all.
        """
        return self.mask.reachable(self.positions, kv_positions)


def rotated(
    keys: Float[Array, "B K R H"], request: Request, kv_positions: Int32[Array, "B K1 R"]
) -> Float[Array, "B K R H"]:
    """Keys turned to their positions (of one head or all) by `key_rope`; keys of empty slots to anywhere.

    Frequencies that depend on a length go by that of the queries, whichever slots these keys are.
    """
    assert request.key_rope is not None
    batch, heads, rows, features = keys.shape
    where = jnp.broadcast_to(jnp.maximum(kv_positions, 0), (batch, heads, rows)).reshape(batch * heads, rows)
    lengths = None
    if request.key_rope.depends_on_length:
        lengths = jnp.repeat(jnp.max(request.positions, axis=1, initial=0) + 1, heads)
    return request.key_rope(keys.reshape(batch * heads, rows, 1, features), where, lengths).reshape(keys.shape)


def grouped(query: Shaped[Array, "B T N H"], num_kv_heads: int) -> Shaped[Array, "B K G T H"]:
    """Query heads by the key/value head they read: head n reads n // G."""
    batch, length, heads, features = query.shape
    query = query.reshape(batch, length, num_kv_heads, heads // num_kv_heads, features)
    return query.transpose(0, 2, 3, 1, 4)


def ungrouped(x: Shaped[Array, "B K G T *rest"]) -> Shaped[Array, "B T N *rest"]:
    """The inverse of `grouped`."""
    batch, kv_heads, group, length, *rest = x.shape
    order = (0, 3, 1, 2, *range(4, x.ndim))
    return x.transpose(order).reshape(batch, length, kv_heads * group, *rest)


def adjust(
    scores: Float[Array, "B K G T R"],
    request: Request,
    q_positions: Int32[Array, "B T"],
    kv_positions: Int32[Array, "B K1 R"],
) -> Float[Array, "B K G T R"]:
    """Scale, soft cap, ALiBi and relative bias.

    Args:
        scores: raw products.
        request: the call.
        q_positions: those of the scores.
        kv_positions: of one head or all.
    """
    scores = scores * jnp.asarray(request.scale, scores.dtype)
    if request.softcap is not None:
        scores = jnp.tanh(scores / request.softcap) * request.softcap
    slopes, relative = request.alibi_slopes, request.relative_bias
    if slopes is None and relative is None:
        return scores
    _, kv_heads, group, *_ = scores.shape
    distance = q_positions[:, None, None, :, None] - kv_positions[:, :, None, None, :]
    if slopes is not None:
        scores = scores - slopes.astype(scores.dtype).reshape(1, kv_heads, group, 1, 1) * distance.astype(scores.dtype)
    if relative is not None:
        by_head = relative.astype(scores.dtype).reshape(kv_heads, group, -1)
        head = [jnp.arange(size, dtype=jnp.int32) for size in (kv_heads, group)]
        scores = scores + by_head[head[0][:, None, None, None], head[1][:, None, None], _along(by_head, distance)]
    return scores


def _along(by_distance: Float[Array, "... distances"], distance: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """Where in such a table a distance is found: the last entry is for all larger ones, the first for keys to come."""
    return jnp.clip(distance, 0, by_distance.shape[-1] - 1)
