"""What tells one model from another: a digest of its settings and numbers."""

import hashlib

import jax
import numpy as np
from flax import nnx

from kvattn.models.decoder import Decoder


def digest_of(model: Decoder, about: object, *, whole_only: bool = False) -> str:
    """Of what is said about a model, and of its weights.

    Args:
        model: which.
        about: settings, by their `repr`.
        whole_only: leave out the numbers of arrays that not every process holds whole; names, shapes and dtypes stay.
            False: they are brought to every process, one array after the other.
    """
    hashed = hashlib.sha256(repr(about).encode())
    for path, x in nnx.to_flat_state(nnx.state(model)):
        array = x[...]
        hashed.update(repr((path, array.shape, str(array.dtype))).encode())
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            if not array.is_fully_replicated:
                if whole_only:
                    continue
                array = model.split.place(array)  # one after the other
            array = array.addressable_data(0)
        hashed.update(np.ascontiguousarray(np.asarray(array)).view(np.uint8).data)
    return hashed.hexdigest()
