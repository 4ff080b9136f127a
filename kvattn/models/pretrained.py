"""`from_pretrained`: a decoder from a checkpoint folder of HuggingFace's transformers."""

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike
from jaxtyping import Shaped

from kvattn._typing import Array
from kvattn.errors import CacheVersionError, ConfigError, DTypeError, KVAttnError, UnsupportedError
from kvattn.families import FAMILIES, Blueprint, Fields, Rule, fp8
from kvattn.families.rules import HEAD, Index, Numbers, Shape
from kvattn.families.text_part import OTHER_TENSORS, to_load
from kvattn.models import placement
from kvattn.models.decoder import Decoder
from kvattn.models.parameters import filled, floating, parameters_of
from kvattn.models.tensors import Tensors, folder_of, in_folder, read_json

_WRAPPERS = ("model.", "transformer.", "language_model.", "module.", "_orig_mod.", "base_model.")
"""What else names may begin with, more than once too: what a model was wrapped in when it was saved."""
_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(original_)?inv_freq|rotary_emb\.(cos|sin)_cached|position_ids|decoder\.version)$"
)
"""What files of any family may carry that is no parameter: numbers that follow from the config."""
_COMPARED = 1 << 22
"""How many numbers of two tensors are compared at a time."""
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    by: str = "auto",
    axis: str = "model",
    ignore: Collection[str] = (),
    on_read: Callable[[str, int], object] | None = None,
) -> Decoder:
    """Reads a checkpoint folder: ``config.json`` and ``model.safetensors``, or the shards that its index names.

    The ``model_type`` of the config says which family it is: one of `kvattn.models.FAMILIES` that has a `blueprint`
    (the table in docs/models.md), or one of your own (`kvattn.models.register`). Nothing is ever unpickled.
    Tensors are read one at a time, the largest first, and go straight to their dtype and devices. Of a tensor that is
    split over a mesh each process reads the parts that its own devices hold. A head that differs from the embedding is
    used, whatever ``tie_word_embeddings`` says; where it is tied, one of the two is enough. Names may have prefixes of
    what the model was wrapped in (``model.``, ``language_model.``, ``module.``, ...), or lack their own.

    Args:
        path: the folder.
        dtype: what the parameters become and the model computes in. None: what most of the file is stored in.
        mesh: devices to split the model over, as in `Decoder`.
        by: how its caches are split, likewise.
        axis: the mesh axis for both.
        ignore: fields of ``config.json`` that are not known here and that the caller knows to change nothing.
        on_read: called as ``on_read(name, nbytes)`` after everything that this process reads of a tensor. What it
            raises ends the loading.

    Raises:
        MissingFileError: the folder, the config, the tensors or a shard are not there, or the path is a file.
        CacheCorruptionError: a file that is damaged.
        ConfigError: a config whose sizes are no sizes or contradict each other. (What is left out is what transformers
            takes it for.)
        UnsupportedError: a model_type, or a setting, that this decoder does not have.
        CacheVersionError: tensors that are missing, left over, or of another shape or kind; all are named.
        DTypeError: a `dtype` that is not floating, a `path` that is none, one text for `ignore`.
        ShardingError: a mesh without the axis.

    Example:
        >>> import jax.numpy as jnp
        >>> import kvattn
        >>> model = kvattn.models.from_pretrained("path/to/Llama-3.2-1B", dtype=jnp.bfloat16)  # doctest: +SKIP
        >>> kvattn.generate(model, [[128000, 791, 6864]], max_new_tokens=8)  # doctest: +SKIP
    """
    dtype = None if dtype is None else floating(dtype)
    folder, on = folder_of(path), {"mesh": mesh, "by": by, "axis": axis}
    blueprint = describe(folder, ignore=ignore)
    placement.Split(**on)
    tensors = in_folder(folder, on_read)
    if blueprint.config.tie_embeddings and _has_its_own_head(blueprint, tensors):
        blueprint = _described(folder, ignore, tied=False)
    names = _checked(blueprint, tensors, folder)
    if dtype is None:
        dtype = _usual_dtype(tensors)
    skeleton = nnx.eval_shape(lambda: Decoder(blueprint.config, dtype=dtype, param_dtype=dtype, **on, rngs=nnx.Rngs(0)))
    shardings = placement.shardings(skeleton, mesh)
    _check_blueprint(blueprint, {name: x.shape for name, x in parameters_of(skeleton).items()}, folder)
    parameters: dict[str, Array] = {}
    try:
        for rule in _largest_first(blueprint.rules):
            reader = _Reader(rule, names, tensors, jnp.float32 if rule.exact else dtype)
            for name in rule.makes:
                parameters[name] = reader.placed(name, shardings[name])
    finally:
        tensors.close()
    return filled(skeleton, parameters)


class _Reader:
    """Reads the parts of a rule's parameters that are asked for, each once."""

    def __init__(self, rule: Rule, names: dict[str, str], tensors: Tensors, dtype: DTypeLike):
        self._rule, self._names, self._tensors, self._dtype = rule, names, tensors, jnp.dtype(dtype)
        self._parts: dict[tuple[tuple[int, int], ...], dict[str, Numbers]] = {}

    def placed(self, name: str, sharding: Sharding | None) -> Shaped[Array, "..."]:
        """A parameter; each device is given its part of it."""
        shape = self._rule.makes[name].shape
        if sharding is None:
            return jax.device_put(self.part(name, None))
        return jax.make_array_from_callback(shape, sharding, lambda index: self.part(name, index))

    def part(self, name: str, index: Index | None) -> Numbers:
        """A part of a parameter, None: all of it. Several devices may hold it, and are given the same."""
        shape = self._rule.makes[name].shape
        index = (slice(None),) * len(shape) if index is None else index
        key = tuple(along.indices(size)[:2] for along, size in zip(index, shape, strict=True))
        if key not in self._parts:
            read = self._rule.read(lambda source, where: self._tensors.read(self._names[source], where), index)
            self._parts[key] = {n: np.ascontiguousarray(x, self._dtype) for n, x in read.items()}
        return self._parts[key][name]


def describe(path: str | os.PathLike[str], *, ignore: Collection[str] = ()) -> Blueprint:
    """What `from_pretrained` would make of a folder, judging by its ``config.json``. No tensor is read.

    Args:
        path: the folder.
        ignore: as for `from_pretrained`.

    Returns:
        the decoder's ``config``, and in ``tensors`` the name and shape of every tensor the checkpoint must have.

    Raises:
        MissingFileError, CacheCorruptionError, ConfigError, UnsupportedError, DTypeError: as `from_pretrained`.

    Example:
        >>> import kvattn
        >>> kvattn.models.describe("path/to/Llama-3.2-1B").config.num_layers  # doctest: +SKIP
        16
    """
    if isinstance(ignore, str):
        raise DTypeError(f"ignore must hold names of fields, got the text {ignore!r}: write ({ignore!r},).")
    return _described(folder_of(path), ignore)


def _described(folder: Path, ignore: Collection[str], *, tied: bool | None = None) -> Blueprint:
    """The same, with `tied` in place of what the file says about ``tie_word_embeddings``."""
    source = folder / "config.json"
    given = read_json(source)
    settings = {**to_load(given), **({} if tied is None else {"tie_word_embeddings": tied})}
    kind = settings.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(f"{source} names no model_type.")
    family = FAMILIES.get(kind)
    if family is None or family.blueprint is None:
        known = sorted(kind for kind, family in FAMILIES.items() if family.blueprint is not None)
        raise UnsupportedError(
            f"{source}: model_type {kind!r} is not supported; the known ones are {', '.join(known)}."
        )
    fields = Fields(settings, str(source), family, ignore)
    is_fp8 = not family.is_quantized and _is_fp8(fields)
    try:
        blueprint = family.blueprint(fields)
        if is_fp8:
            blueprint = fp8.blockwise(blueprint, fields.get("quantization_config"), str(source))
    except KVAttnError as error:
        if str(source) in str(error):
            raise
        raise type(error)(f"{source}: {error}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{source}: {error}") from error
    fields.finish()
    if settings.get("model_type") == given.get("model_type"):
        return blueprint
    return dataclasses.replace(blueprint, ignored=(*blueprint.ignored, OTHER_TENSORS))


def _is_fp8(fields: Fields) -> bool:
    """Whether weights are in FP8.

    Raises:
        UnsupportedError: they are quantised in another way.
    """
    quantization = fields.get("quantization_config")
    if quantization is None:
        return False
    kind = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if kind != "fp8":
        known = "'fp8' in blocks (and 'mxfp4' of gpt_oss)"
        raise fields.unsupported("quantization_config.quant_method", kind, known)
    return True


def _check_blueprint(blueprint: Blueprint, parameters: Mapping[str, Shape], folder: Path) -> None:
    """That every parameter of the decoder is made, and nothing else: a mistake of the family, never of a file.

    Raises:
        ConfigError: it is not; all differences are named.
    """
    made = {name: layout.shape for rule in blueprint.rules for name, layout in rule.makes.items()}
    if made != parameters:
        wrong = sorted(name for name in {**made, **parameters} if made.get(name) != parameters.get(name))
        problems = [f"{name}: made {made.get(name)}, the decoder has {parameters.get(name)}" for name in wrong]
        raise ConfigError(f"the family of {folder} does not make the decoder's parameters:\n  " + "\n  ".join(problems))


def _checked(blueprint: Blueprint, tensors: Tensors, folder: Path) -> dict[str, str]:
    """The name each tensor has in the files, by the name that the blueprint has for it.

    Raises:
        CacheVersionError: the files do not hold what the config describes.
    """
    located, table = _Names(blueprint, tensors), _table(blueprint)
    names, problems = {}, []
    for rule in blueprint.rules:
        for name, shape in rule.sources.items():
            found = located(name)
            if found is None and name == table and blueprint.config.tie_embeddings:
                found = located(HEAD)
            if found is None:
                problems.append(f"missing: {name} {shape}")
                continue
            names[name] = found
            entry = tensors.entries[found]
            if entry.shape != shape:
                problems.append(f"shape: {found} in {entry.file.name} is {entry.shape}, the config makes it {shape}")
            elif entry.dtype not in rule.kinds(name):
                problems.append(f"kind: {found} in {entry.file.name} holds {entry.dtype}, not {rule.kinds(name)}")
    for name in sorted(set(tensors.entries) - set(names.values())):
        bare = located.bare(name)
        if not (_BUFFERS.search(name) or any(re.search(p, n) for p in blueprint.ignored for n in (name, bare))):
            entry = tensors.entries[name]
            problems.append(f"left over: {name} {entry.shape} in {entry.file.name}")
    if problems:
        raise CacheVersionError(f"the tensors in {folder} do not fit its config.json:\n  " + "\n  ".join(problems))
    return names


def _has_its_own_head(blueprint: Blueprint, tensors: Tensors) -> bool:
    """Whether the files hold a head that is not the embedding, though the config says that it is."""
    located = _Names(blueprint, tensors)
    embedding, head = located(_table(blueprint)), located(HEAD)
    if head is None or embedding is None:
        return False
    shape = tensors.entries[head].shape
    if shape != tensors.entries[embedding].shape or len(shape) != 2:
        return True
    rows = max(_COMPARED // max(shape[1], 1), 1)
    parts = ([np.arange(start, min(start + rows, shape[0]))] for start in range(0, shape[0], rows))
    try:
        return not all(np.array_equal(tensors.read(head, part), tensors.read(embedding, part)) for part in parts)
    finally:
        tensors.close()


def _table(blueprint: Blueprint) -> str:
    """The tensor that becomes the embedding."""
    return next(iter(next(rule for rule in blueprint.rules if "embed.embedding" in rule.makes).sources))


class _Names:
    """Finds tensors by the names that the blueprint has for them, whatever either of them begins with."""

    def __init__(self, blueprint: Blueprint, tensors: Tensors):
        self._prefixes, self._renamed = (*blueprint.prefixes, *_WRAPPERS), blueprint.renamed
        self._whole = set(tensors.entries)
        self._bare: dict[str, str] = {}
        for name in sorted(tensors.entries, key=len, reverse=True):  # of several the shortest counts
            self._bare[self.bare(name)] = name

    def __call__(self, name: str) -> str | None:
        """The name in the files; None: it is not there."""
        return name if name in self._whole else self._bare.get(self.bare(name))

    def bare(self, name: str) -> str:
        """A name without what may stand before it, with its parts called as in the rules."""
        for theirs, ours in self._renamed.items():
            name = name.replace(theirs, ours)
        while prefix := next((p for p in self._prefixes if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        return name


def _largest_first(rules: Iterable[Rule]) -> list[Rule]:
    """While a large tensor is copied, little else should be there yet."""
    return sorted(rules, key=lambda rule: -sum(int(np.prod(shape)) for shape in rule.sources.values()))


def _usual_dtype(tensors: Tensors) -> np.dtype:
    """The floating dtype that most numbers are stored in."""
    counts: dict[str, int] = {}
    for name, entry in tensors.entries.items():
        if entry.dtype in _DTYPES and not name.endswith(fp8.SCALES):
            counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.nbytes
    usual = jnp.dtype(_DTYPES[max(counts, key=lambda kind: counts[kind])])
    return jnp.dtype(jnp.float32) if usual == jnp.float64 else usual
