"""The bytes of a record: it says itself what it is, and is believed only as a whole.

========  =====================================================================================
header    magic, version of the format, bytes of the table, bytes of the data: 24 bytes
table     JSON: kind, digest of the namespace, key of the page before, tokens, and of every array
          name, axis names, dtype, shape, offset and size
data      the arrays, little-endian, in the table's order, without holes
checksum  SHA-256 of all before
========  =====================================================================================

The header and the place of the checksum are the same in every version, so that damage and another version can be told
apart. Nothing is unpickled, mapped or evaluated, and no length is believed before it is compared with the real size.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping

import numpy as np
from jaxtyping import Shaped

from kvattn.errors import CacheCorruptionError, CacheVersionError
from kvattn.serving.kinds import DTYPES, FORMAT, Kind
from kvattn.serving.records import PageName, Record, namespace_digest

MAGIC = b"\x93kvattn\n"
HEADER = struct.Struct("<8sIIQ")
CHECKSUM_BYTES = hashlib.sha256().digest_size
MAX_TABLE_BYTES = 1 << 24

TABLE = {"kind": dict, "namespace": str, "parent": str, "tokens": list, "arrays": list}
ARRAY = {"name": str, "axes": str, "dtype": str, "shape": list, "offset": int, "size": int}


def encode(record: Record) -> bytes:
    """A record as bytes."""
    table, data = _table(record), [_bytes(array) for array in record.arrays.values()]
    start = HEADER.pack(MAGIC, FORMAT, len(table), sum(map(len, data))) + table
    content = b"".join([start, *data])
    return content + hashlib.sha256(content).digest()


def encoded_size(record: Record) -> int:
    """Bytes of `encode`."""
    arrays = sum(array.nbytes for array in record.arrays.values())
    return HEADER.size + len(_table(record)) + arrays + CHECKSUM_BYTES


def decode(content: bytes | bytearray, name: PageName) -> Record:
    """The record that was asked for, of bytes that are known to be nothing else.

    Args:
        content: of a file.
        name: of the page that is looked for.

    Raises:
        CacheVersionError: a record of another version, model, dtype, codec, policy, page size or layout.
        CacheCorruptionError: anything else that is not exactly this record: damage, another text, another namespace.
    """
    check_lengths(content[: HEADER.size], len(content))
    view = memoryview(content).toreadonly()
    if hashlib.sha256(view[:-CHECKSUM_BYTES]).digest() != view[-CHECKSUM_BYTES:]:
        raise CacheCorruptionError("the checksum of a record is not that of its bytes: it is damaged.")
    _, version, table_bytes, data_bytes = HEADER.unpack_from(content)
    if version != FORMAT:
        raise CacheVersionError(f"a record has version {version} of the format, expected {FORMAT}.")
    data_start = HEADER.size + table_bytes
    table = _parsed(bytes(view[HEADER.size : data_start]))
    entries = _entries(table["arrays"], data_bytes)
    _check_kind(table["kind"], name.kind)
    _check_name(table, name)
    arrays = {}
    for entry in entries:
        _check_layout(entry, name.kind)
        start = data_start + entry["offset"]
        arrays[entry["name"]] = _array(view[start : start + entry["size"]], entry)
    try:
        return Record(name, arrays)
    except ValueError as error:
        raise CacheCorruptionError(f"a record lacks arrays: {error}") from error


def check_lengths(header: bytes | bytearray, size: int) -> None:
    """Compares what a header says with the size of the file, before anything of that size is read.

    Args:
        header: the first bytes, `HEADER.size` of them.
        size: bytes of all.

    Raises:
        CacheCorruptionError: no record, or one of another size.
    """
    if len(header) != HEADER.size or size < HEADER.size + CHECKSUM_BYTES:
        raise CacheCorruptionError(f"a record has a header and a checksum, got {size} bytes.")
    magic, _, table_bytes, data_bytes = HEADER.unpack(header)
    if magic != MAGIC:
        raise CacheCorruptionError(f"a record starts with {MAGIC!r}, got {bytes(magic)!r}.")
    stated = HEADER.size + table_bytes + data_bytes + CHECKSUM_BYTES
    if stated != size or table_bytes > MAX_TABLE_BYTES:
        raise CacheCorruptionError(f"a record says that it has {stated} bytes, got {size}.")


# Writing.


def _table(record: Record) -> bytes:
    name, specs = record.name, record.name.kind.arrays
    arrays, offset = [], 0
    for key in record.arrays:
        spec = specs[key]
        entry = {"name": key, "axes": spec.axes, "dtype": spec.dtype, "shape": spec.shape}
        arrays.append(entry | {"offset": offset, "size": spec.nbytes})
        offset += spec.nbytes
    table = {
        "kind": _kind(name.kind),
        "namespace": namespace_digest(name.namespace).hex(),
        "parent": name.parent.hex(),
        "tokens": name.tokens,
        "arrays": arrays,
    }
    return json.dumps(table, separators=(",", ":")).encode()


def _kind(kind: Kind) -> dict[str, object]:
    return kind.settings | {"digest": kind.digest.hex()}


def _bytes(array: Shaped[np.ndarray, "..."]) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


# Reading. Everything is damage until it is shown to be right.


def _parsed(text: bytes) -> dict:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        table = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CacheCorruptionError(f"the table of a record is no JSON: {error}.") from error
    _check_fields(table, TABLE)
    return table


def _check_fields(found: object, fields: Mapping[str, type]) -> None:
    if not isinstance(found, dict) or found.keys() != fields.keys():
        raise CacheCorruptionError(f"the table of a record must have {', '.join(fields)}.")
    for field, wanted in fields.items():
        if type(found[field]) is not wanted:
            raise CacheCorruptionError(f"{field} in the table of a record must be of type {wanted.__name__}.")


def _entries(arrays: list, data_bytes: int) -> list[dict]:
    """The arrays of a table, if they fill the data without overlap or hole."""
    names, end = set(), 0
    for entry in arrays:
        _check_fields(entry, ARRAY)
        name, shape = entry["name"], entry["shape"]
        if name in names:
            raise CacheCorruptionError(f"array {name!r} is in the record twice.")
        names.add(name)
        if entry["dtype"] not in DTYPES:
            raise CacheCorruptionError(f"array {name!r} has the unknown dtype {entry['dtype']!r}.")
        if any(type(size) is not int or size < 0 for size in shape):
            raise CacheCorruptionError(f"array {name!r} has the shape {shape}.")
        size = math.prod(shape) * DTYPES[entry["dtype"]].itemsize
        if entry["offset"] != end or entry["size"] != size:
            raise CacheCorruptionError(
                f"array {name!r} must lie at {end} with {size} bytes, got {entry['offset']} with {entry['size']}."
            )
        end += size
    if end != data_bytes:
        raise CacheCorruptionError(f"the arrays of a record have {end} bytes, its data {data_bytes}.")
    return arrays


def _check_kind(found: Mapping[str, object], kind: Kind) -> None:
    for field, wanted in _kind(kind).items():
        if found.get(field) != wanted:
            what = "other axes, shapes or dtypes" if field == "digest" else f"{field} {found.get(field)!r}"
            raise CacheVersionError(f"a record has {what}, expected {field} {wanted!r}.")


def _check_name(found: Mapping[str, object], name: PageName) -> None:
    wanted = {
        "namespace": namespace_digest(name.namespace).hex(),
        "parent": name.parent.hex(),
        "tokens": list(name.tokens),
    }
    for field, value in wanted.items():
        if found[field] != value:
            raise CacheCorruptionError(f"the {field} of a record is not that of the page {name!r}.")


def _check_layout(entry: Mapping, kind: Kind) -> None:
    spec = kind.arrays.get(entry["name"])
    if spec is None or (spec.axes, spec.dtype, list(spec.shape)) != (entry["axes"], entry["dtype"], entry["shape"]):
        raise CacheCorruptionError(f"array {entry['name']!r} of a record is {dict(entry)}, expected {spec}.")


def _array(content: memoryview, entry: Mapping) -> Shaped[np.ndarray, "..."]:
    array = np.frombuffer(content, DTYPES[entry["dtype"]]).reshape(entry["shape"]).copy()
    array.flags.writeable = False
    return array
