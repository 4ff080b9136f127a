"""By which rules queries attend."""

import dataclasses
import math

from jax.typing import ArrayLike
from jaxtyping import Float, Int32

from kvattn import _checks
from kvattn._typing import Array
from kvattn.attend.request import Request
from kvattn.attend.tokens import PerHead, folded
from kvattn.cache.view import View
from kvattn.masks import Mask
from kvattn.positions import RoPE, Temperature


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is the same for all the queries of a call, and known when it is traced. Hashable.

    Attributes:
        mask: who may attend to whom.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(scores / softcap). None: they do not.
        key_rope: rotates keys as they are read, by the positions they are seen at. None: they lie rotated.
        temperature: multiplies queries by a factor of their true positions. None: it does not.
    """

    mask: Mask
    scale: float
    softcap: float | None
    key_rope: RoPE | None = None
    temperature: Temperature | None = None

    @classmethod
    def checked(
        cls,
        query: Float[Array, "*BT N H"],
        *,
        mask: Mask,
        window: object,
        chunk: object = None,
        scale: ArrayLike | None,
        softcap: object,
        key_rope: RoPE | None = None,
        temperature: Temperature | None = None,
    ) -> tuple[Float[Array, "*BT N H"], "Rules"]:
        """The rules of a call, and its queries, which take in a scale that is traced.

        Args:
            query: the queries.
            mask: what holds before `window` is looked at.
            window: the call's window, or None.
            chunk: the call's chunk of positions, or None.
            scale: a number [], or None, which is 1/sqrt(H).
            softcap: or None.
            key_rope: as in `Rules`.
            temperature: likewise.

        Raises:
            RangeError, DTypeError, ShapeError, ConfigError: numbers out of range, or no numbers.
            UnsupportedError: a chunk beside other ones of the mask.
        """
        _checks.finite_scale(scale)
        query, scale = folded(query, scale)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        mask = mask.narrowed(_checks.window(window)).cut(_checks.window(chunk, "chunk"))
        return query, cls(mask, scale, _checks.positive_softcap(softcap), key_rope, temperature)

    def warmed(self, query: Float[Array, "B T N H"], positions: Int32[Array, "B T"]) -> Float[Array, "B T N H"]:
        """Queries at these true positions, with the temperature."""
        if self.temperature is None:
            return query
        return self.temperature.warmed(query, positions)

    def request(
        self,
        query: Float[Array, "B T N H"],
        positions: Int32[Array, "B T"],
        view: View,
        per_head: PerHead,
        *,
        mask: Mask | None = None,
        want_mass: bool = False,
        of_several: bool = False,
    ) -> Request:
        """What these queries ask of a view, by these rules or by another mask."""
        return Request(
            query,
            positions,
            view,
            per_head.slopes,
            mask=self.mask if mask is None else mask,
            scale=self.scale,
            softcap=self.softcap,
            want_mass=want_mass,
            key_rope=self.key_rope,
            of_several=of_several,
            relative_bias=per_head.relative,
        )
