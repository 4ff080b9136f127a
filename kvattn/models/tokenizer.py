"""Tokenizers of checkpoints: what ``tokenizer.json`` says, and what only ``tokenizer_config.json`` asks for."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from kvattn.errors import CacheCorruptionError, ConfigError, MissingFileError, MissingLibraryError
from kvattn.families.settings import Value
from kvattn.models.tensors import folder_of, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAME = "tokenizer.json"
"""The file of a checkpoint's folder that the tokenizer is in."""

CONFIG = "tokenizer_config.json"
"""The file beside it, which may ask for tokens at the ends of a text."""

OLDER = "special_tokens_map.json"
"""Where older checkpoints name the tokens."""

type Part = dict[str, Value]
"""An object of tokenizer.json: a processor, or a piece of its template."""

_TEMPLATE = "TemplateProcessing"

_REPLACING = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "GPTNeoXTokenizer", "CohereTokenizer")
"""Classes of transformers 4 (their fast kinds too) that take tokens at the ends away where the settings say so. The
others leave what tokenizer.json adds; so do all in transformers 5."""


def load_tokenizer(folder: str | os.PathLike[str]) -> "Tokenizer":
    """The tokenizer of a checkpoint, read from ``tokenizer.json`` by the `tokenizers` library.

    ``tokenizer.encode(text).ids`` is a prompt of `kvattn.generate`, ``tokenizer.token_to_id("</s>")`` a stop token, and
    `kvattn.models.continuation` the text of what it returns.

    Of ``tokenizer_config.json``, if there is one, it takes

    * ``add_bos_token`` and ``add_eos_token``: true adds ``bos_token`` before a text, ``eos_token`` behind it, unless
      tokenizer.json does so itself; false takes away what it adds where ``tokenizer_class`` is Llama's, CodeLlama's,
      Gemma's, GPT-NeoX's or Cohere's (as transformers 4 did; with other classes, and where nothing is said,
      tokenizer.json counts);
    * ``split_special_tokens``: true reads the names of special tokens in a text as text.

    Text is neither cut nor padded, whatever lengths tokenizer.json has: a prompt is all of its tokens. Nor are spaces
    cleaned up after decoding (``clean_up_tokenization_spaces``): text is what the tokens say.

    Args:
        folder: of the checkpoint.

    Raises:
        MissingFileError: there is no such folder, it is a file, or it has no such file.
        CacheCorruptionError: a file that is damaged or holds something else.
        ConfigError: a token to be added that has no name, or none that is in the vocabulary; settings that are
            neither true nor false.
        DTypeError: something that is no path.
        MissingLibraryError: `tokenizers` is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingLibraryError(
            "load_tokenizer needs the tokenizers library, which is not installed: pip install 'kvattn[hf]'."
        ) from error
    path = folder_of(folder) / NAME
    if not path.is_file():
        raise MissingFileError(
            f"{path} is not there: the folder has no {NAME}. A checkpoint with a tokenizer of another format gets one "
            "by transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # the library has no error class of its own
        raise CacheCorruptionError(f"{path} is damaged, or not the settings of a tokenizer: {error}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = path.with_name(CONFIG)
    if config.is_file():
        _obey(tokenizer, read_json(config), config)
    return tokenizer


def _obey(tokenizer: "Tokenizer", settings: dict[str, Value], source: Path) -> None:
    """Makes a tokenizer do what its settings ask for and tokenizer.json does not do."""
    if _flag(settings, "split_special_tokens", source):
        tokenizer.encode_special_tokens = True
    name = settings.get("tokenizer_class")
    replaces = isinstance(name, str) and name.removesuffix("Fast") in _REPLACING
    for end, option in (("bos", "add_bos_token"), ("eos", "add_eos_token")):
        wanted = _flag(settings, option, source)
        if wanted or (wanted is False and replaces):
            given = _named(settings, f"{end}_token", source)
            token = given.get("content") if isinstance(given, dict) else given
            number = tokenizer.token_to_id(token) if isinstance(token, str) else None
            if number is None and wanted:
                missing = "which is not in the vocabulary" if isinstance(token, str) else "which names no token"
                raise ConfigError(
                    f"{source}: {option} is true, but {end}_token is {given!r}, {missing} of {NAME}. Correct it, or "
                    f"set {option} to false."
                )
            if number is not None and wanted != _adds(tokenizer, end, number):
                _settle(tokenizer, end, str(token), number, wanted)


def _flag(settings: dict[str, Value], option: str, source: Path) -> bool | None:
    value = settings.get(option)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{source}: {option} must be true or false, got {value!r}.")
    return value


def _named(settings: dict[str, Value], option: str, source: Path) -> Value:
    """A token as the settings name it, by its text or as an object; older checkpoints do so in a file of its own."""
    older = source.with_name(OLDER)
    if settings.get(option) is None and older.is_file():
        return read_json(older).get(option)
    return settings.get(option)


def _adds(tokenizer: "Tokenizer", end: str, token: int) -> bool:
    """Whether every text gets this token at this end already."""
    ids = tokenizer.encode("a").ids
    own = tokenizer.encode("a", add_special_tokens=False).ids
    starts = (i for i in range(len(ids) - len(own) + 1) if ids[i : i + len(own)] == own)
    start = next(starts, 0)
    added = ids[:start] if end == "bos" else ids[start + len(own) :]
    return token in (added[:1] if end == "bos" else added[-1:])


def _settle(tokenizer: "Tokenizer", end: str, token: str, number: int, wanted: bool) -> None:
    """Puts a token at one end of every text, or takes it away there, in what is done with the tokens last."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    # Its settings are only to be had as those of a tokenizer: one without a vocabulary to write and read.
    carrier = Tokenizer(WordLevel({token: 0}, unk_token=token))
    if tokenizer.post_processor is not None:
        carrier.post_processor = tokenizer.post_processor
    whole = json.loads(carrier.to_str())
    parts = [_template(part) for part in _parts(whole["post_processor"])]
    if not any(part["type"] == _TEMPLATE for part in parts):
        parts.append({"type": _TEMPLATE, "single": [_text("A", 0)], "pair": [_text("A", 0), _text("B", 1)]})
    last = next(part for part in reversed(parts) if part["type"] == _TEMPLATE)
    for kind in ("single", "pair"):
        change = _with if wanted else _without
        last[kind] = change(last[kind], 0 if end == "bos" else 1, token)
    last["special_tokens"] = last.get("special_tokens", {}) | _special(token, number)
    whole["post_processor"] = {"type": "Sequence", "processors": parts}
    tokenizer.post_processor = Tokenizer.from_str(json.dumps(whole)).post_processor


def _parts(processor: Part | None) -> list[Part]:
    if processor is None:
        return []
    if processor["type"] != "Sequence":
        return [processor]
    return [inner for part in processor["processors"] for inner in _parts(part)]


def _template(part: Part) -> Part:
    """The processors of BERT and RoBERTa are templates with names of their own; others stay what they are."""
    if part["type"] not in ("BertProcessing", "RobertaProcessing"):
        return part
    (first, first_id), (last, last_id) = part["cls"], part["sep"]
    single = [_token(first, 0), _text("A", 0), _token(last, 0)]
    second, between = (1, []) if part["type"] == "BertProcessing" else (0, [_token(last, 0)])
    pair = [*single, *between, _text("B", second), _token(last, second)]
    special = _special(first, first_id) | _special(last, last_id)
    return {"type": _TEMPLATE, "single": single, "pair": pair, "special_tokens": special}


def _text(name: str, kind: int) -> Part:
    return {"Sequence": {"id": name, "type_id": kind}}


def _token(name: str, kind: int) -> Part:
    return {"SpecialToken": {"id": name, "type_id": kind}}


def _special(token: str, number: int) -> Part:
    return {token: {"id": token, "ids": [number], "tokens": [token]}}


def _with(template: list[Part], side: int, token: str) -> list[Part]:
    """The token before (side 0) or behind (1) everything that belongs to a text: of a pair, to each."""
    texts = [i for i, piece in enumerate(template) if "Sequence" in piece]
    ends = (0, *texts[1:]) if side == 0 else (*(i + 1 for i in texts[:-1]), len(template))
    out = list(template)
    for end, text in sorted(zip(ends, texts, strict=True), reverse=True):
        out.insert(end, _token(token, template[text]["Sequence"]["type_id"]))
    return out


def _without(template: list[Part], side: int, token: str) -> list[Part]:
    """The template without this token right before (side 0) or behind (1) a text."""
    beside = 1 if side == 0 else -1

    def goes(i: int) -> bool:
        named = template[i].get("SpecialToken", {}).get("id") == token
        return named and 0 <= i + beside < len(template) and "Sequence" in template[i + beside]

    return [piece for i, piece in enumerate(template) if not goes(i)]
