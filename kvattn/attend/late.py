"""What is decided when a program is lowered, and its platform is known, not when it is traced."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Int32, PyTree, Shaped

from kvattn import _manual, _target
from kvattn._typing import Array
from kvattn.cache.pages import Store
from kvattn.codecs.blocks import Blocks, Stored
from kvattn.errors import UnsupportedError


def by_platform[T](branches: Mapping[str, Callable[..., T]], default: Callable[..., T], *operands: PyTree) -> T:
    """`jax.lax.platform_dependent`: each branch is traced as a program for its platform.

    Args:
        branches: by platform; "gpu" stands for "cuda" and "rocm".
        default: on all others.
        operands: trees of arrays that a branch is called with.
    """
    names = {name: ("cuda", "rocm") if name == "gpu" else (name,) for name in branches}
    aimed = {name: _aimed(branch, names[name][0]) for name, branch in branches.items()}
    *every, default = _manual.alike((*aimed.values(), default), *operands)
    each = {platform: call for name, call in zip(aimed, every, strict=True) for platform in names[name]}
    return jax.lax.platform_dependent(*operands, default=default, **each)


def _aimed[T](call: Callable[..., T], platform: str) -> Callable[..., T]:
    def traced(*operands: PyTree) -> T:
        with _target.aimed_at(platform):
            return call(*operands)

    return traced


def refusing(message: str, like: Callable[..., Any]) -> Callable[..., Any]:
    """A function that returns what `like` would, and that no program can be lowered with.

    Args:
        message: of the `UnsupportedError` that is raised then.
        like: any function of arrays.
    """

    def call(*operands: PyTree) -> PyTree:
        shapes = jax.eval_shape(like, *operands)
        return jax.tree.map(lambda x: _refused.bind(jnp.zeros(x.shape, x.dtype), message=message), shapes)

    return call


@dataclasses.dataclass(frozen=True)
class Writing:
    """A store whose single tokens a kernel writes where the program is lowered for its platform.

    Attributes:
        store: the cache's, which writes elsewhere.
        kernels: what writes in its place, by platform.
    """

    store: Store
    kernels: Mapping[str, Blocks]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def write(
        self, array: Stored, slots: Int32[Array, "B *K T"], x: Shaped[Array, "B K T F"], transposed: bool
    ) -> Stored:
        """As `Layout.write` and `Pages.write`."""
        by = lambda store: lambda array, slots, x: store.write(array, slots, x, transposed)
        return by_platform({name: by(kernel) for name, kernel in self.kernels.items()}, by(self.store), array, slots, x)


# What `__getattr__` hands on, `isinstance` does not see.
Blocks.register(Writing)  # pyright: ignore[reportAttributeAccessIssue]

_refused = Primitive("kvattn_unsupported")
"""Returns what it is given, in programs that are never lowered. What it is given are constants, under jax.vmap too."""


@_refused.def_impl
def _(x: Shaped[Array, "..."], *, message: str) -> Shaped[Array, "..."]:
    raise UnsupportedError(message)


@_refused.def_abstract_eval
def _(x: Any, *, message: str) -> Any:
    del message
    return x


def _lower(context: mlir.LoweringRuleContext, x: Any, *, message: str) -> Any:
    raise UnsupportedError(message)


mlir.register_lowering(_refused, _lower)
