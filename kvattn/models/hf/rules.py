"""Which tensors of a checkpoint become which parameters, and how. A family is a list of rules."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from kvattn.errors import UnsupportedError
from kvattn.models.config import DecoderConfig

Make = Callable[..., np.ndarray]
Shape = tuple[int, ...]
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Some tensors of a checkpoint, and the parameters made of them.

    Attributes:
        sources: the name of each tensor and the shape it must have.
        makes: the name of each parameter, and what makes it of the tensors.
        exact: the parameters stay float32 whatever the model's dtype is.
        stored: the dtypes the tensors may have, as safetensors names them.
    """

    sources: Mapping[str, Shape]
    makes: Mapping[str, Make]
    exact: bool = False
    stored: tuple[str, ...] = FLOATS


@dataclasses.dataclass(frozen=True)
class Family:
    """How one kind of checkpoint is read.

    Attributes:
        config: of the decoder.
        rules: for every parameter of the decoder.
        prefixes: what names may begin with that not all files have.
        ignored: regular expressions of tensors that are no parameters: buffers, and heads that are tied anyway.
    """

    config: DecoderConfig
    rules: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def tensor(theirs: str, shape: Shape, ours: str, make: Make = lambda x: x, *, exact: bool = False) -> Rule:
    """One tensor that becomes one parameter."""
    return Rule({theirs: shape}, {ours: make}, exact)


def linear(theirs: str, ours: str, into: Shape, out: Shape, bias: bool, transposed: bool = True) -> Iterator[Rule]:
    """A projection from `into` to `out`: torch's weight is [out, in], GPT-2's (`transposed` False) [in, out]."""
    rows, columns = math.prod(into), math.prod(out)

    def kernel(x: np.ndarray) -> np.ndarray:
        return (x.T if transposed else x).reshape(into + out)

    yield tensor(f"{theirs}.weight", (columns, rows) if transposed else (rows, columns), f"{ours}.kernel", kernel)
    if bias:
        yield tensor(f"{theirs}.bias", (columns,), f"{ours}.bias", lambda x: x.reshape(out))


def norm(theirs: str, ours: str, size: int, *, bias: bool = False, plus_one: bool = False) -> Iterator[Rule]:
    """A norm. With `plus_one` its scale is stored as what differs from 1 (Gemma); the sum is kept in float32."""
    make = (lambda x: x.astype(np.float32) + np.float32(1)) if plus_one else (lambda x: x)
    yield tensor(f"{theirs}.weight", (size,), f"{ours}.scale", make, exact=plus_one)
    if bias:
        yield tensor(f"{theirs}.bias", (size,), f"{ours}.bias")


def fused(
    theirs: str, ours: str, config: DecoderConfig, *, grouped: bool, bias: bool, transposed: bool = True
) -> Iterator[Rule]:
    """Queries, keys and values in one matrix.

    `grouped`: for every key/value head its query heads, then its key, then its value. Otherwise all queries, all keys,
    all values.
    """
    heads, kv_heads, size, features = config.num_heads, kv(config), width(config), config.model_dim
    group = heads // kv_heads
    rows = (heads + 2 * kv_heads) * size

    def part(name: str, x: np.ndarray) -> np.ndarray:
        """Of [rows, ...]: the heads of one kind [heads, H, ...]."""
        if grouped:
            x = x.reshape(kv_heads, group + 2, size, *x.shape[1:])
            x = {"query": x[:, :group], "key": x[:, group : group + 1], "value": x[:, group + 1 :]}[name]
        else:
            x = x.reshape(heads + 2 * kv_heads, size, *x.shape[1:])
            ends = {"query": (0, heads), "key": (heads, heads + kv_heads), "value": (heads + kv_heads, None)}[name]
            return x[slice(*ends)]
        return x.reshape(-1, *x.shape[2:])

    def kernel(name: str) -> Make:
        return lambda x: np.moveaxis(part(name, x if transposed else x.T), -1, 0)

    names = ("query", "key", "value")
    shape = (rows, features) if transposed else (features, rows)
    yield Rule({f"{theirs}.weight": shape}, {f"{ours}.{name}.kernel": kernel(name) for name in names})
    if bias:
        yield Rule({f"{theirs}.bias": (rows,)}, {f"{ours}.{n}.bias": (lambda x, n=n: part(n, x)) for n in names})


def separate(
    theirs: str,
    ours: str,
    config: DecoderConfig,
    *,
    names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
) -> Iterator[Rule]:
    """Queries, keys, values and output in four matrices."""
    features, size = (config.model_dim,), width(config)
    for kind, name in zip(("query", "key", "value"), names[:3], strict=True):
        heads = config.num_heads if kind == "query" else kv(config)
        yield from linear(f"{theirs}.{name}", f"{ours}.{kind}", features, (heads, size), config.qkv_bias)
    yield from output(f"{theirs}.{names[3]}", ours, config)


def output(theirs: str, ours: str, config: DecoderConfig, transposed: bool = True) -> Iterator[Rule]:
    """The projection from the heads back to D."""
    heads = (config.num_heads, width(config))
    yield from linear(theirs, f"{ours}.out", heads, (config.model_dim,), config.out_bias, transposed)


def mlp(
    theirs: str, ours: str, config: DecoderConfig, names: Mapping[str, str], transposed: bool = True
) -> Iterator[Rule]:
    """The MLP's projections, by the names they have there: ``{"up": ..., "down": ...}`` and perhaps "gate"."""
    for name, their_name in names.items():
        sizes = (config.model_dim,), (config.mlp_dim,)
        into, out = sizes[::-1] if name == "down" else sizes
        yield from linear(f"{theirs}.{their_name}", f"{ours}.{name}", into, out, config.mlp_bias, transposed)


def embedding(theirs: str, config: DecoderConfig) -> Rule:
    """The table of tokens."""
    return tensor(theirs, (config.vocab_size, config.embedding_dim or config.model_dim), "embed.embedding")


def head(theirs: str, config: DecoderConfig) -> Iterator[Rule]:
    """The output projection, where it is not the embedding."""
    if not config.tie_embeddings:
        size = config.embedding_dim or config.model_dim
        yield tensor(theirs, (config.vocab_size, size), "head.kernel", lambda x: x.T)


def tied(config: DecoderConfig) -> tuple[str, ...]:
    """What may be left over of an output projection that is the embedding."""
    return (r"^(.*\.)?lm_head\.weight$",) if config.tie_embeddings else ()


def kv(config: DecoderConfig) -> int:
    """K."""
    return config.num_kv_heads or config.num_heads


def width(config: DecoderConfig) -> int:
    """H."""
    return config.head_dim or config.model_dim // config.num_heads


def per_layer(config: DecoderConfig, block: Callable[[int, str], Any]) -> Iterator[Rule]:
    """The rules of every layer: `block` is given its number and the name of our block."""
    for layer in range(config.num_layers):
        yield from block(layer, f"layers.{layer}")


def unsupported(source: str, name: str, value: Any, known: str) -> UnsupportedError:
    """The error for a field whose value is not supported."""
    return UnsupportedError(f"{source}: {name} is {value!r}, supported is {known}.")
