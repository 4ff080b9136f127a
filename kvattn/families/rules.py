"""Which tensors of a checkpoint become which parameters, and how: a `Blueprint` is a list of rules."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int, Shaped

from kvattn.errors import ConfigError
from kvattn.families.config import DecoderConfig

Shape = tuple[int, ...]
Index = tuple[slice, ...]
"""A part of a parameter, one slice per axis, as JAX asks for what a device holds."""
Numbers = Shaped[np.ndarray, "..."]
"""A tensor of a file, a parameter made of it, or a part of either."""
Indices = Int[np.ndarray, " _"]
"""Along one axis of a tensor."""
HEAD = "lm_head.weight"
"""The output projection, in every family."""
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where in a tensor the numbers of a parameter lie, so that a part of it can be read alone.

    Attributes:
        shape: of the parameter.
        axes: for every axis of the tensor, the axes of the parameter that lie along it, the slowest first. Torch's
            weight [N * H, D] of a projection to [D, N, H] is ((1, 2), (0,)).
        entries: which entries of the tensor an axis of the parameter takes, where these are not all of them in order.
        sizes: how many entries the tensor has along such an axis, where it is not the slowest of those along the
            tensor's. Torch's weight [N * (P + V), D] of keys and values, whose keys are [D, N, P], has P + V of axis 2.
    """

    shape: Shape
    axes: tuple[tuple[int, ...], ...]
    entries: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)
    sizes: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def within(self, index: Index) -> list[Indices]:
        """For every axis of the tensor the indices of a part of the parameter, in the part's order."""
        found = []
        for axes in self.axes:
            along = np.zeros(1, np.int64)
            for axis in axes:
                entries = np.asarray(self.entries.get(axis, range(self.shape[axis])), np.int64)[index[axis]]
                along = (along[:, None] * self.sizes.get(axis, self.shape[axis]) + entries).ravel()
            found.append(along)
        return found

    def arranged(self, numbers: Numbers, index: Index) -> Numbers:
        """A part of the parameter, from the numbers `within` found for it."""
        sizes = [len(range(*along.indices(size))) for along, size in zip(index, self.shape, strict=True)]
        order = list(itertools.chain(*self.axes))
        return numbers.reshape([sizes[axis] for axis in order]).transpose(np.argsort(order))


def _unchanged(x: Numbers) -> Numbers:
    return x


@dataclasses.dataclass(frozen=True)
class Rule:
    """Some tensors of a checkpoint, and the parameters made of them.

    Attributes:
        sources: the name of each tensor and the shape it must have.
        makes: the name of each parameter, and where in the tensors it lies. All have the same shape.
        convert: makes numbers of the tensors, number by number (or, if `packed`, block by block along the last axis).
        packed: how many numbers of the last axis that `makes` speaks of lie in one entry of the tensors' axis.
        exact: the parameters stay float32 whatever the model's dtype is.
        stored: the dtypes the tensors may have, as safetensors names them.
    """

    sources: Mapping[str, Shape]
    makes: Mapping[str, Layout]
    convert: Callable[..., Numbers] = _unchanged
    packed: int = 1
    exact: bool = False
    stored: tuple[str, ...] = FLOATS

    def kinds(self, name: str) -> tuple[str, ...]:
        """The dtypes that one of the tensors may have."""
        del name
        return self.stored

    def read(self, read: Callable[[str, list[Indices]], Numbers], index: Index) -> dict[str, Numbers]:
        """A part of every parameter. What several of them need is read once.

        Args:
            read: gives the numbers of a source at some indices (ascending) along each of its first axes.
            index: the part.
        """
        wanted = {name: layout.within(index) for name, layout in self.makes.items()}
        *outer, last = (np.unique(np.concatenate(along)) for along in zip(*wanted.values(), strict=True))
        stored = [*outer, np.unique(last // self.packed)]
        given = [read(source, stored) for source in self.sources]
        made = {}
        for name, (*rows, inner) in wanted.items():
            places = [np.searchsorted(known, own) for known, own in zip(outer, rows, strict=True)]
            numbers = self.convert(*(_picked(x, places) for x in given))
            place = np.searchsorted(stored[-1], inner // self.packed) * self.packed + inner % self.packed
            made[name] = self.makes[name].arranged(_picked(numbers, [None] * len(rows) + [place]), index)
        return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stacked(Rule):
    """Tensors of one shape, each an entry of the first axis of the one parameter that they make.

    Attributes:
        inner: where in a tensor its entry lies.
    """

    inner: Layout

    def read(self, read: Callable[[str, list[Indices]], Numbers], index: Index) -> dict[str, Numbers]:
        """As of any rule; one tensor is there at a time."""
        (name,), (along, *rest) = self.makes, index
        sources = list(self.sources.items())[along]
        made = None
        for i, (source, shape) in enumerate(sources):
            part = Rule({source: shape}, {name: self.inner}, self.convert).read(read, tuple(rest))[name]
            made = np.empty((len(sources), *part.shape), part.dtype) if made is None else made
            made[i] = part
        assert made is not None
        return {name: made}


def _picked(x: Numbers, places: Sequence[Indices | None]) -> Numbers:
    """The entries at `places` along each axis (None: all), without a copy where they are evenly spaced."""
    for axis, place in enumerate(places):
        if place is None:
            continue
        step = int(place[1] - place[0]) if len(place) > 1 else 1
        if step > 0 and np.all(np.diff(place) == step):
            x = x[(slice(None),) * axis + (slice(int(place[0]), int(place[-1]) + 1, step),)]
        else:
            x = np.take(x, place, axis)
    return x


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """What a checkpoint's config.json describes: a decoder, and how the tensors in the files become its parameters.

    Attributes:
        config: of the decoder.
        rules: for every parameter of the decoder.
        prefixes: what names may begin with that not all files have.
        ignored: regular expressions of tensors that are no parameters: buffers, and heads that are tied anyway.
        renamed: what parts of names are called in files, and what they are called in the rules.
    """

    config: DecoderConfig
    rules: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Shape]:
        """The name and shape of every tensor that the checkpoint must have."""
        return {name: shape for rule in self.rules for name, shape in rule.sources.items()}


Part = str | Callable[[str, str], Iterator[Rule]]
"""What a part is called in the files, or a function that makes its rules: (their prefix, our name) -> rules."""


def blueprint(
    config: DecoderConfig,
    parts: Mapping[str, Part],
    block: Mapping[str, Part],
    *,
    grouped: bool = False,
    transposed: bool = True,
    plus_one: bool = False,
    buffers: tuple[str, ...] = (),
    renamed: Mapping[str, str] | None = None,
) -> Blueprint:
    """The rules of a decoder, from a table of what its parts are called in the files.

    Args:
        config: of the decoder.
        parts: their name for everything outside the blocks, by ours: "embed" (first), "positions", "embed_norm",
            "embed_in", "embed_out", "layers" (the prefix of all blocks), "norm".
        block: the same within a block: "attention_norm", "attention" (queries, keys and values in one matrix) or
            "attention.query", "attention.key" and "attention.value", "attention.out", "mlp_norm", "mlp.up", ...
        grouped: that one matrix holds, for each key/value head, its query heads, its key and its value. Otherwise it
            holds all queries, all keys, all values.
        transposed: weights are [out, in], as in torch.
        plus_one: norms store the difference from 1.
        buffers: regular expressions for tensors that are not parameters.
        renamed: as in `Blueprint`.

    Raises:
        ConfigError: a part that a decoder does not have.
    """
    prefix = str(parts["embed"]).partition(".")[0] + "."
    tied = (f"^{re.escape(HEAD)}$",) if config.tie_embeddings else ()
    how = _Parts(config, grouped, transposed, plus_one)
    return Blueprint(config, tuple(how.rules(parts, block)), (prefix,), (*buffers, *tied), renamed or {})


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Makes the rules for `blueprint`, whose arguments these are."""

    config: DecoderConfig
    grouped: bool
    transposed: bool
    plus_one: bool

    def rules(self, parts: Mapping[str, Part], block: Mapping[str, Part]) -> Iterator[Rule]:
        """For all parts, and for the output projection if it is not the embedding."""
        for ours, theirs in parts.items():
            if ours != "layers":
                yield from self.part(theirs, "", ours)
                continue
            for layer in range(self.config.num_layers):
                for name, part in block.items():
                    if name not in self._missing(layer):
                        yield from self.part(part, f"{theirs}.{layer}", f"layers.{layer}.{name}")
        if not self.config.tie_embeddings:
            vocab, size = self.config.vocab_size, self.config.embedding_dim or self.config.model_dim
            yield tensor(HEAD, (vocab, size), "head.kernel", Layout((size, vocab), ((1,), (0,))))

    def _missing(self, layer: int) -> set[str]:
        """What a layer does not have, though others do."""
        missing = {"attention.value"} if self.config.layer_values_from_keys[layer] else set()
        if self.config.layer_sources[layer] != layer:
            missing |= {"attention.key", "attention.value", "attention.key_ln"}
        return missing

    def part(self, theirs: Part, prefix: str, ours: str) -> Iterator[Rule]:
        """For one part, by the prefix and name it has there and the name it has here."""
        if not isinstance(theirs, str):
            yield from theirs(prefix, ours)
            return
        theirs, kind = ".".join(filter(None, (prefix, theirs))), ours.rpartition(".")[2]
        config, features = self.config, self.config.model_dim
        layer = int(ours.split(".")[1]) if ours.startswith("layers.") else 0
        if kind in self._projections(layer):
            yield from linear(theirs, ours, *self._projections(layer)[kind], self.transposed)
        elif kind == "attention":
            yield from fused(theirs, ours, config, self.grouped, self.transposed)
        elif kind.endswith("_ln"):
            heads = config.num_heads if kind == "query_ln" else config.layer_kv_heads[layer]
            yield from self._of_heads(theirs, ours, heads, config.layer_head_dims[layer])
        elif kind.endswith("norm"):
            yield from norm(theirs, ours, features, bias=config.norm_bias, plus_one=self.plus_one)
        elif kind == "embed":
            yield tensor(f"{theirs}.weight", (config.vocab_size, config.embedding_dim or features), f"{ours}.embedding")
        elif kind == "positions":
            yield tensor(f"{theirs}.weight", (config.max_positions or 0, features), f"{ours}.embedding")
        elif kind == "sinks":
            yield tensor(theirs, (config.num_heads,), ours)
        else:
            raise ConfigError(f"a decoder has no part {ours!r}, which is called {theirs!r}.")

    def _of_heads(self, theirs: str, ours: str, heads: int, size: int) -> Iterator[Rule]:
        """The norm of queries or keys, which may have a tensor for all heads or one for each."""
        if self.config.qk_norm_heads == "shared":
            yield from norm(theirs, ours, size, plus_one=self.plus_one)
        elif self.config.qk_norm_heads == "joint":
            yield tensor(f"{theirs}.weight", (heads * size,), f"{ours}.scale", Layout((heads, size), ((0, 1),)))
        else:
            yield stacked([f"{theirs}.{i}.weight" for i in range(heads)], (size,), f"{ours}.scale", whole((size,)))

    def _projections(self, layer: int) -> dict[str, tuple[Shape, Shape, bool]]:
        """From which axes to which, and whether with a bias."""
        config, size = self.config, self.config.layer_head_dims[layer]
        features, embedded = (config.model_dim,), (config.embedding_dim or config.model_dim,)
        hidden, heads = (config.layer_mlp_dims[layer],), (config.num_heads, size)
        kv_heads = (config.layer_kv_heads[layer], size)
        return {
            "embed_in": (embedded, features, False),
            "embed_out": (features, embedded, False),
            "query": (features, heads, config.qkv_bias),
            "key": (features, kv_heads, config.qkv_bias),
            "value": (features, kv_heads, config.qkv_bias),
            "out": (heads, features, config.out_bias),
            "gate": (features, hidden, config.mlp_bias),
            "up": (features, hidden, config.mlp_bias),
            "down": (hidden, features, config.mlp_bias),
            "router": (features, (config.num_experts,), config.expert_kind == "gpt_oss"),
        }


def tensor(
    theirs: str,
    shape: Shape,
    ours: str,
    layout: Layout | None = None,
    convert: Callable[..., Numbers] = _unchanged,
    exact: bool = False,
) -> Rule:
    """One tensor that becomes one parameter, as it is unless there is a `layout`; see `Rule` for the others."""
    return Rule({theirs: shape}, {ours: layout or whole(shape)}, convert, exact=exact)


def stacked(theirs: Sequence[str], shape: Shape, ours: str, inner: Layout) -> Rule:
    """Tensors of one shape that become one parameter, with an entry along its first axis for each."""
    made = {ours: Layout((len(theirs), *inner.shape), ())}
    return Stacked(dict.fromkeys(theirs, shape), made, inner=inner)


def gate_and_up(theirs: str, ours: str, features: int, hidden: int) -> Iterator[Rule]:
    """The projections of a gated MLP in one matrix, the gate first."""
    for name, taken in (("gate", range(hidden)), ("up", range(hidden, 2 * hidden))):
        yield from linear(theirs, f"{ours}.{name}", (features,), (hidden,), False, heads=taken, num_heads=2 * hidden)


def whole(shape: Shape) -> Layout:
    """A parameter that is the tensor."""
    return Layout(shape, tuple((axis,) for axis in range(len(shape))))


def linear(
    theirs: str,
    ours: str,
    into: Shape,
    out: Shape,
    bias: bool,
    transposed: bool = True,
    *,
    heads: Sequence[int] | None = None,
    num_heads: int | None = None,
) -> Iterator[Rule]:
    """A projection from `into` to `out`: torch's weight is [out, in], GPT-2's (`transposed` False) [in, out].

    Of a matrix for `num_heads` heads [num_heads, *out[1:]] of all kinds, this is the projection to `heads`.
    """
    stored = out if num_heads is None else (num_heads, *out[1:])
    rows, columns = math.prod(into), math.prod(stored)
    first = tuple(range(len(into)))
    then = tuple(range(len(into), len(into) + len(out)))
    shape, axes = ((columns, rows), (then, first)) if transposed else ((rows, columns), (first, then))
    kernel = Layout(into + out, axes, {} if heads is None else {len(into): heads})
    yield tensor(f"{theirs}.weight", shape, f"{ours}.kernel", kernel)
    if bias:
        along = Layout(out, (tuple(range(len(out))),), {} if heads is None else {0: heads})
        yield tensor(f"{theirs}.bias", (columns,), f"{ours}.bias", along)


def norm(theirs: str, ours: str, size: int, *, bias: bool = False, plus_one: bool = False) -> Iterator[Rule]:
    """A norm. With `plus_one` its scale is stored as what differs from 1 (Gemma); the sum is kept in float32."""
    convert = (lambda x: x.astype(np.float32) + np.float32(1)) if plus_one else _unchanged
    yield tensor(f"{theirs}.weight", (size,), f"{ours}.scale", convert=convert, exact=plus_one)
    if bias:
        yield tensor(f"{theirs}.bias", (size,), f"{ours}.bias")


def fused(theirs: str, ours: str, config: DecoderConfig, grouped: bool, transposed: bool) -> Iterator[Rule]:
    """Queries, keys and values in one matrix."""
    heads, kv_heads = config.num_heads, kv(config)
    total = heads + 2 * kv_heads
    if grouped:
        each = np.arange(total).reshape(kv_heads, -1)
        parts = {"query": each[:, :-2], "key": each[:, -2], "value": each[:, -1]}
    else:
        query, key, value = np.split(np.arange(total), [heads, heads + kv_heads])
        parts = {"query": query, "key": key, "value": value}
    for name, part in parts.items():
        taken, out = part.ravel().tolist(), (part.size, width(config))
        into = (config.model_dim,)
        yield from linear(
            theirs, f"{ours}.{name}", into, out, config.qkv_bias, transposed, heads=taken, num_heads=total
        )


def kv(config: DecoderConfig) -> int:
    """K, where it is that of all layers."""
    return config.layer_kv_heads[0]


def width(config: DecoderConfig) -> int:
    """H, where it is that of all layers."""
    return config.layer_head_dims[0]
