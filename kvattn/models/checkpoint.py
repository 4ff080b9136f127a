"""Checkpoints of a `Decoder`: a safetensors file and, beside it, its settings as JSON. Nothing is ever unpickled."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from kvattn.errors import CacheVersionError, ConfigError, DTypeError, MissingFileError
from kvattn.families.config import DecoderConfig
from kvattn.families.rules import Numbers
from kvattn.models.decoder import Decoder
from kvattn.models.parameters import filled, floating, parameters_of
from kvattn.models.tensors import Tensors, read_json

FORMAT = "kvattn-decoder"
"""What the settings name themselves."""


def save(model: Decoder, path: str | os.PathLike[str], *, dtype: DTypeLike | None = None) -> Path:
    """Writes ``path`` (safetensors) and the settings beside it (the same name ending in ``.json``).

    Both are written under another name and then moved, so a reader never meets half a file.

    Args:
        model: the decoder.
        path: ends in ``.safetensors``.
        dtype: what the parameters are stored in. None: as they are.

    Returns:
        `path`.

    Raises:
        ConfigError: a name with another ending.
        DTypeError: a `dtype` that is not floating, something that is no path.
    """
    from safetensors.numpy import save_file

    path, dtype = _checked(path), None if dtype is None else floating(dtype)
    tensors = {name: np.asarray(x if dtype is None else x.astype(dtype)) for name, x in parameters_of(model).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, partial, metadata={"format": FORMAT})
    settings = json.dumps({"format": FORMAT, **model.config.to_json()}, indent=2) + "\n"
    partial_settings = path.with_suffix(".json.partial")
    partial_settings.write_text(settings)
    partial.replace(path)
    partial_settings.replace(path.with_suffix(".json"))
    return path


def load(path: str | os.PathLike[str], *, dtype: DTypeLike | None = None) -> Decoder:
    """Reads what `save` wrote.

    Args:
        path: the ``.safetensors`` file.
        dtype: what the parameters become. None: as they are stored.

    Raises:
        MissingFileError: one of the two files is not there.
        CacheCorruptionError: a file that cannot be read.
        ConfigError: settings that are not those of a decoder.
        CacheVersionError: tensors that are missing, left over, or of another shape or kind; all are named.
        DTypeError: a `dtype` that is not floating, something that is no path.
    """
    path, dtype = _checked(path), None if dtype is None else floating(dtype)
    settings = path.with_suffix(".json")
    if not settings.is_file():
        raise MissingFileError(f"{settings} is not there, which kvattn.models.save writes.{_theirs(path.parent)}")
    config = _read_settings(settings)
    tensors = _read_tensors(path)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    expected = parameters_of(model)

    problems = [f"missing: {name} {expected[name].shape}" for name in sorted(set(expected) - set(tensors))]
    problems += [f"left over: {name} {tensors[name].shape}" for name in sorted(set(tensors) - set(expected))]
    for name in sorted(set(tensors) & set(expected)):
        given, wanted = tensors[name], expected[name]
        if given.shape != wanted.shape:
            problems.append(f"shape: {name} is {given.shape}, the settings make it {wanted.shape}")
        elif not jnp.issubdtype(given.dtype, jnp.floating):
            problems.append(f"kind: {name} holds {given.dtype}, not floats")
    if problems:
        raise CacheVersionError(f"{path} does not fit {path.with_suffix('.json').name}:\n  " + "\n  ".join(problems))

    usual = max(tensors.values(), key=lambda x: x.nbytes).dtype if dtype is None else dtype
    model = nnx.eval_shape(lambda: Decoder(config, param_dtype=usual, rngs=nnx.Rngs(0)))
    # Some are float32 whatever the others are.
    become = {name: tensors[name].dtype if dtype is None else x.dtype for name, x in parameters_of(model).items()}
    return filled(model, {name: jnp.asarray(tensor, become[name]) for name, tensor in tensors.items()})


def _checked(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise DTypeError(f"a checkpoint must be a path that ends in .safetensors, got {path!r}.")
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"a checkpoint ends in .safetensors, got {path}.{_theirs(path)}")
    return path


def _theirs(folder: Path) -> str:
    """What to do with a checkpoint of transformers."""
    there = (folder / "config.json").is_file()
    advice = "give that folder to kvattn.models.from_pretrained, or on the command line."
    return f" {folder} is a checkpoint of transformers: {advice}" if there else ""


def _read_settings(path: Path) -> DecoderConfig:
    fields = read_json(path)
    if fields.pop("format", None) != FORMAT:
        raise ConfigError(f"{path} does not hold the settings of a decoder saved by kvattn (format {FORMAT!r}).")
    try:
        return DecoderConfig.from_json(fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _read_tensors(path: Path) -> dict[str, Numbers]:
    tensors = Tensors([path])
    try:
        return {name: tensors.read(name) for name in tensors.entries}
    finally:
        tensors.close()
