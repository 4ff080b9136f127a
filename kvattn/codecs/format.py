"""How kernels read what a codec stores: they multiply encoded tiles themselves, and ask for this and nothing else."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Format:
    """The numbers of single tokens as arrays "data", "scale" and "minimum": number = scale * data + minimum. Hashable.

    Attributes:
        dtype: of the numbers in "data", also where an array holds their bits (float8_e4m3fn in uint8). None: the
            array's own.
        is_scaled: whether there is one "scale", float32, per token and head.
        group_size: how many neighbouring channels share a "scale" and a "minimum", packed in 16 bits each
            (`kvattn.codecs.grouped.pack_pair`); "data" then holds codes of four bits, two to a byte. 0: none do.
    """

    dtype: np.dtype | None = None
    is_scaled: bool = False
    group_size: int = 0

    @property
    def is_grouped(self) -> bool:
        """Whether channels share scales in groups."""
        return self.group_size > 0

    @property
    def is_plain(self) -> bool:
        """Whether "data" is all there is."""
        return not (self.is_scaled or self.is_grouped)
