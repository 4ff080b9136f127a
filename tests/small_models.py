"""Models that are small, and in which nothing is without effect."""

import jax
from flax import nnx

from kvattn.models import Decoder


def decoder(config, scale=0.2, **options):
    """A model whose every parameter matters: larger than Flax initialises them, norms that are not one."""
    model = Decoder(config, rngs=nnx.Rngs(0), **options)
    graph, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + (scale * jax.random.normal(k, x.shape)).astype(x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(structure, leaves))
