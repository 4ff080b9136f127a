"""The tensors of safetensors files: what is there is known at once, numbers are read a tensor or a part at a time."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvattn.errors import CacheCorruptionError, ConfigError, DTypeError, MissingFileError
from kvattn.families.rules import Indices, Numbers
from kvattn.families.settings import Value

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ENDING = ".safetensors"
_MAPPED = {"F8_E4M3": jnp.float8_e4m3fn}
"""Dtypes that safetensors knows and cannot make arrays of NumPy of."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: the file it lies in, its shape, and its dtype as safetensors names it ("BF16")."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """How many bytes its numbers take."""
        return int(np.prod(self.shape, dtype=np.int64)) * _BYTES.get(self.dtype, 1)


class Tensors:
    """The tensors of one or more safetensors files.

    Args:
        files: all of them are opened, and their headers checked against their lengths.
        on_read: called as ``on_read(name, nbytes)`` after everything that is read of a tensor.

    Raises:
        MissingFileError: a file is not there.
        CacheCorruptionError: a file that is damaged or cut off, or a name that two files hold.
    """

    def __init__(self, files: Iterable[Path], on_read: Callable[[str, int], object] | None = None):
        self._on_read = on_read
        self.entries: dict[str, Entry] = {}
        for file in files:
            with _opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118  it is no dict
                    if name in self.entries:
                        raise CacheCorruptionError(f"{name} lies in {self.entries[name].file} and again in {file}.")
                    part = opened.get_slice(name)
                    self.entries[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())
        self._open: tuple[Path, Any] | None = None
        self._read = 0
        # What has been read of a mapped file counts as memory of this process until the file is closed.
        self._allowance = max(sum(entry.nbytes for entry in self.entries.values()) // 32, 1 << 20)

    def read(self, name: str, where: Sequence[Indices] = ()) -> Numbers:
        """The numbers of one tensor, or of a part of it, copied.

        Args:
            name: of the tensor.
            where: the indices along each of its first axes, ascending; of the others all is read.

        Raises:
            CacheCorruptionError: they cannot be read.
        """
        from safetensors import SafetensorError

        entry = self.entries[name]
        if self._open is None or self._open[0] != entry.file or self._read > self._allowance:
            self.close()
            self._open = entry.file, _opened(entry.file).__enter__()
        whole = all(len(along) == size for along, size in zip(where, entry.shape, strict=False))
        try:
            if entry.dtype in _MAPPED:
                part = _mapped(name, entry)
                runs = [np.array(run) for run in ([part] if whole else _runs(part, where))]
            else:
                runs = [self._open[1].get_tensor(name)] if whole else _runs(self._open[1].get_slice(name), where)
        except (SafetensorError, TypeError, ValueError) as error:
            raise CacheCorruptionError(f"{entry.file}: {name} cannot be read: {error}.") from error
        nbytes = sum(run.nbytes for run in runs)
        self._read += nbytes
        if self._on_read is not None:
            self._on_read(name, nbytes)
        numbers = runs[0] if len(runs) == 1 else np.concatenate(runs)
        for axis, along in enumerate(where[1:], 1):
            if len(along) != numbers.shape[axis]:
                numbers = np.take(numbers, along - along[0], axis)
        return numbers

    def close(self) -> None:
        """Lets go of the file that is open."""
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
        self._open, self._read = None, 0


def in_folder(folder: Path, on_read: Callable[[str, int], object] | None = None) -> Tensors:
    """The tensors of a folder: those of ``model.safetensors``, or of the shards that its index names.

    Raises:
        MissingFileError: there are none, or shards are missing; all are named.
        CacheCorruptionError: a damaged file, or tensors that do not lie where the index says; all are named.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():  # as transformers: where shards were joined, their index may have stayed
        return Tensors([folder / SINGLE], on_read)
    if not index.is_file():
        others = sorted(file.name for ending in ("*.bin", "*.safetensors") for file in folder.glob(ending))
        why = ""
        if any(name.endswith(".bin") for name in others):
            why = f" It holds {', '.join(others)}: pickled files are never read, save them as safetensors."
        elif others:
            why = f" It holds {', '.join(others)}: a single file must be named {SINGLE}, several need their index."
        raise MissingFileError(f"{folder} has neither {SINGLE} nor {INDEX}.{why}")
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise CacheCorruptionError(f"{index} has no weight_map from tensors to files.")
    names = sorted(set(placed.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CacheCorruptionError(f"{index} names files outside its folder: {outside}.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        tensors = sorted(name for name, file in placed.items() if file in missing)
        raise MissingFileError(f"{folder} lacks {', '.join(missing)}, where {INDEX} has: {', '.join(tensors)}.")
    found = Tensors((folder / name for name in names), on_read)
    files = {name: entry.file.name for name, entry in found.entries.items()}
    wrong = [f"{name} in {file}" for name, file in sorted(placed.items()) if files.get(name) != file]
    if wrong:
        raise CacheCorruptionError(f"{index} has tensors that are not where it says:\n  " + "\n  ".join(wrong))
    return found


def folder_of(path: object) -> Path:
    """The folder of a checkpoint.

    Raises:
        DTypeError: no path.
        MissingFileError: no folder; it says what to give instead.
    """
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise DTypeError(f"a checkpoint's folder must be a path, got {path!r}.")
    folder = Path(path)
    if folder.is_file():
        ours = ", or read what kvattn.models.save wrote with kvattn.models.load" if folder.suffix == _ENDING else ""
        raise MissingFileError(f"{folder} is no folder but a file: give the folder it lies in, {folder.parent}{ours}.")
    if not folder.is_dir():
        raise MissingFileError(
            f"{folder} is no folder, there is no such folder: give that of a checkpoint, with config.json and "
            f"{SINGLE}. The name of a model on a hub is not looked up: download it first."
        )
    return folder


def read_json(path: Path) -> dict[str, Value]:
    """A file that holds a JSON object.

    Raises:
        MissingFileError: it is not there.
        CacheCorruptionError: it is no JSON.
        ConfigError: it holds something else than an object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise MissingFileError(f"{path} is not there.") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or no end of brackets
        raise CacheCorruptionError(f"{path} is no JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} must hold a JSON object, it holds {type(fields).__name__}.")
    return fields


def _runs(part: Any, where: Sequence[Indices]) -> list[Numbers]:
    """Runs of rows, and of each row the range that holds what is wanted: a disk does not read less than that."""
    rows, *others = where
    ranges = [slice(int(along[0]), int(along[-1]) + 1) for along in others]
    ends = np.nonzero(np.diff(rows) != 1)[0] + 1
    return [part[(slice(int(run[0]), int(run[-1]) + 1), *ranges)] for run in np.split(rows, ends)]


def _mapped(name: str, entry: Entry) -> Numbers:
    """A tensor where it lies in its file, whose header has been checked."""
    with entry.file.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = json.loads(file.read(length))[name]["data_offsets"][0]
    return np.memmap(entry.file, _MAPPED[entry.dtype], "r", 8 + length + start, entry.shape)


def _opened(file: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError('reading checkpoints needs safetensors: pip install "kvattn[hf]".') from error
    if not file.is_file():
        raise MissingFileError(f"{file} is not there.")
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, ValueError, OSError) as error:
        raise CacheCorruptionError(f"{file} is damaged: {error}.") from error
