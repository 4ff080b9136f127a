"""Request traces in Mooncake's format: what was asked when, without the text.

Qin et al., arXiv:2407.00079 (FAST'25): one JSON object a line with `timestamp` (ms), `input_length`, `output_length`
and `hash_ids`, one id for every 512 tokens of the prompt. Equal ids stand for equal prefixes up to there.
"""

import dataclasses
import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from kvattn.errors import ConfigError

FIELDS = ("timestamp", "input_length", "output_length")


@dataclasses.dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request.

    Attributes:
        timestamp: when it came, in ms from the first.
        input_length: tokens of its prompt.
        output_length: tokens of its answer.
        hash_ids: one id per block of the prompt, the last of which may be short.
    """

    timestamp: int
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def read_trace(
    path: str | PathLike[str], *, progress: Callable[[int, int], object] | None = None
) -> list[TraceRequest]:
    """Reads a trace; blank lines are passed over.

    Args:
        path: of the file.
        progress: called with the bytes read and those of the file, now and then.

    Raises:
        ConfigError: a line that is no request; the message has its number.
        OSError: a file that cannot be read.
    """
    path = Path(path)
    size, done, requests = path.stat().st_size, 0, []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                requests.append(_request(path, number, line))
            done += len(line)
            if progress is not None and not number % 1000:
                progress(done, size)
    if progress is not None:
        progress(done, size)
    return requests


def _request(path: Path, number: int, line: bytes) -> TraceRequest:
    def wrong(why: str) -> ConfigError:
        return ConfigError(
            f"{path}, line {number}: {why}. A line is one JSON object with {', '.join(FIELDS)}, hash_ids."
        )

    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8
        raise wrong(f"no JSON ({error})") from error
    if not isinstance(found, dict):
        raise wrong(f"a {type(found).__name__}, no object")
    for name in FIELDS:
        if type(found.get(name)) is not int or found[name] < 0:
            raise wrong(f"{name} must be an int >= 0, got {found.get(name)!r}")
    ids = found.get("hash_ids")
    if not isinstance(ids, list) or any(type(i) is not int for i in ids):
        raise wrong("hash_ids must be a list of ints")
    if len(set(ids)) != len(ids):
        raise wrong("hash_ids names an id twice: each stands for a prefix, and no two of a prompt are the same")
    if bool(ids) != (found["input_length"] > 0):
        raise wrong(f"{found['input_length']} tokens have {len(ids)} hash_ids")
    return TraceRequest(found["timestamp"], found["input_length"], found["output_length"], tuple(ids))
