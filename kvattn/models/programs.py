"""Compiled programs of models, as long as these live: models of one structure share theirs."""

import weakref
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from kvattn._typing import Array
from kvattn.models.decoder import Decoder

type Weights = list[Array]
"""The arrays of a model, [...] each: what the host hands over fastest (`kvattn.layers.stateless`)."""

type _Treedef = Any  # jax.tree_util.PyTreeDef, which type checkers take for a variable
type _Structure = tuple[nnx.GraphDef[Decoder], _Treedef]
"""All of a model but its weights: programs are the same where it is."""


class ProgramsOf[P](weakref.WeakKeyDictionary[Decoder, tuple[_Structure, P]]):
    """The programs of each model that was asked for.

    Args:
        compiled: makes them, from what turns weights into the model again.
    """

    def __init__(self, compiled: Callable[[Callable[[Weights], Decoder]], P]):
        super().__init__()
        self._compiled = compiled

    def of(self, model: Decoder) -> tuple[Weights, P]:
        """The model's weights, and the programs that take them: its own, or those of another one of its structure."""
        graph, state = nnx.split(model)
        weights, treedef = jax.tree.flatten(state)
        structure = graph, treedef
        known = (self.get(model), *self.values())
        same = next((entry for entry in known if entry is not None and entry[0] == structure), None)
        if same is None:
            same = structure, self._compiled(lambda weights: nnx.merge(graph, jax.tree.unflatten(treedef, weights)))
        self[model] = same
        return weights, same[1]
