"""``kvattn generate``: a checkpoint continues text."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

import typer

from kvattn.cli import parse, show
from kvattn.errors import ConfigError, RangeError, UnsupportedError

if TYPE_CHECKING:  # Flax takes its time to load
    from kvattn.models import Decoder


@runtime_checkable
class _Encoded(Protocol):
    """A text as tokens."""

    @property
    def ids(self) -> list[int]:
        """Their ids."""
        ...


@runtime_checkable
class _Text(Protocol):
    """What turns text into tokens and back."""

    def encode(self, text: str, /) -> _Encoded:
        """The tokens of a text."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        ...


class _Bytes:
    """The tokens of a model of bytes."""

    def __init__(self, text: str = ""):
        self.ids = list(text.encode())

    def encode(self, text: str) -> "_Bytes":
        return _Bytes(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")


@show.reports_errors
def generate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A HuggingFace folder, or a .safetensors that kvattn.models.save wrote."
        ),
    ],
    prompt: Annotated[list[str], parse.option("TEXT", "Text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[str, typer.Option(metavar="INT")] = "128",
    temperature: Annotated[str, parse.option("NUMBER", "0 takes the most probable token.")] = "0",
    top_k: Annotated[str | None, parse.option("INT", "Draw from this many most probable tokens.")] = None,
    top_p: Annotated[str | None, parse.option("SHARE", "Draw from the nucleus.")] = None,
    seed: Annotated[str, typer.Option(metavar="INT")] = "0",
    policy: Annotated[str | None, parse.option("POLICY", "As for `kvattn memory`.")] = None,
    codec: Annotated[str | None, parse.option("CODEC", "As for `kvattn memory`.")] = None,
    cache_memory: Annotated[
        str | None, parse.option("KIND", "pinned_host: keys and values lie in the host's memory.")
    ] = None,
    dtype: Annotated[
        str | None, parse.option("DTYPE", "Compute in bfloat16, float16 or float32. Default: as stored.")
    ] = None,
    samples: Annotated[str, parse.option("INT", "Draw this many continuations of each prompt.")] = "1",
    beams: Annotated[str | None, parse.option("INT", "Search for the most probable one, this many at a time.")] = None,
    start_token: Annotated[str | None, parse.option("INT", "Put this token before every prompt.")] = None,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Go on after the model's end of text.")] = False,
    ignore: Annotated[
        list[str] | None, parse.option("FIELD", "A field of config.json that is not known here and changes nothing.")
    ] = None,
) -> None:
    """Continue text with the model of a checkpoint; one prompt is printed as its tokens come."""
    import kvattn.models as models
    from kvattn.codecs import Plain

    settings: dict[str, Any] = {
        "temperature": parse.number("temperature", temperature),
        "top_k": parse.count("top-k", top_k),
        "top_p": parse.number("top-p", top_p),
        "seed": parse.required("seed", seed, 0),
        "policy": parse.policy(policy),
    }
    settings["codec"], plain = parse.codec(codec)
    if plain is not None:
        import jax.numpy as jnp

        settings["codec"] = Plain(jnp.dtype(plain))
    if cache_memory is not None:
        if cache_memory not in ("device", "pinned_host"):
            raise ConfigError(f"unknown --cache-memory {cache_memory!r}; the known ones are device, pinned_host.")
        settings["memory_kind"] = cache_memory
    count = parse.required("max-new-tokens", max_new_tokens, 0)
    first = parse.count("start-token", start_token, 0)
    if dtype is not None and dtype not in parse.DTYPES:
        raise ConfigError(f"unknown --dtype {dtype!r}; the known ones are {', '.join(parse.DTYPES)}.")

    model, text, ends = _opened(checkpoint, dtype, ignore or [])
    if first is not None and first >= model.config.vocab_size:
        raise RangeError(f"--start-token must lie in [0, {model.config.vocab_size}), got {first}.")
    texts = [sys.stdin.read() if p == "-" else p for p in prompt]
    prompts = [([] if first is None else [first]) + list(text.encode(p).ids) for p in texts]
    # The prompt comes with its first token: once nothing is wrong.
    stream, unsaid = models.TextStream(text, prompts[0]), [texts[0]]

    def show_token(row: int, token: int) -> None:
        typer.echo((unsaid.pop() if unsaid else "") + stream.push(token), nl=False)

    start = time.perf_counter()
    settings["stop_tokens"] = None if ignore_end else ends or None
    number, width = parse.required("samples", samples), parse.count("beams", beams)
    if len(prompts) == 1 and number == 1 and width is None:
        settings["on_token"] = show_token
        (tokens,) = models.generate(model, prompts, count, **settings)
        typer.echo("".join(unsaid) + stream.finish())
        new = len(tokens)
    else:
        if number == 1 and width is None:
            found = [[tokens] for tokens in models.generate(model, prompts, count, **settings)]
        else:
            found = _searched(model, prompts, count, number, width, settings)
        for given, ids, several in zip(texts, prompts, found, strict=True):
            for tokens in several:
                typer.echo(f"--- {given}\n{models.continuation(text, ids, tokens)}")
        new = sum(len(tokens) for several in found for tokens in several)
    taken = time.perf_counter() - start
    message = f"{new} tokens in {taken:.1f} s, compiling included: {new / taken:,.1f} tokens/s"
    typer.echo(message, err=True)


def _searched(
    model: "Decoder", prompts: list[list[int]], count: int, samples: int, beams: int | None, settings: dict[str, Any]
) -> list[list[list[int]]]:
    """Several continuations of each prompt, which is computed once; of a search the best."""
    from kvattn.serving import Engine
    from kvattn.serving.sizes import page_size_for

    policy, codec = settings.pop("policy"), settings.pop("codec")
    if settings.pop("memory_kind", "device") != "device":
        raise UnsupportedError(
            "--samples and --beams share pages, which lie in the device's memory: leave --cache-memory out, or ask for "
            "one continuation at a time."
        )
    page_size = page_size_for(model, policy, codec)
    longest = max(map(len, prompts)) + count
    rows = beams or min(8, samples * len(prompts))
    pages = rows * -(-longest // page_size)
    options: dict[str, Any] = {
        "num_pages": pages,
        "page_size": page_size,
        "max_batch": rows,
        "max_length": max(longest, 1),
    }
    engine = Engine(model, policy=policy, codec=codec, **options)
    requests = [engine.submit(ids, count, num_samples=samples, beam_width=beams, **settings) for ids in prompts]
    engine.run()
    for request in requests:
        if request.error is not None:
            raise request.error
    return [request.tokens[: 1 if beams else None] for request in requests]


def _opened(path: Path, dtype: str | None, ignore: list[str]) -> tuple["Decoder", _Text, list[int]]:
    """The model, its tokenizer, and the tokens that end a text."""
    import kvattn.models as models

    if path.suffix == ".safetensors":
        if ignore:
            raise ConfigError("--ignore goes with a HuggingFace folder: it names fields of its config.json.")
        model = models.load(path, dtype=dtype)
        if model.config.vocab_size != 256:
            raise UnsupportedError(
                f"{path} has a vocabulary of {model.config.vocab_size} tokens and no tokenizer: only models of bytes "
                "(256) need none. In Python, kvattn.generate takes token ids."
            )
        return model, _Bytes(), []
    text = models.load_tokenizer(path)
    try:
        model = models.from_pretrained(path, dtype=dtype, ignore=ignore)
    except UnsupportedError as error:
        advice = " Here that is --ignore FIELD, once for each field." if "ignore=" in str(error) else ""
        raise UnsupportedError(f"{error}{advice}") from error
    return model, text, _ends(path)


def _ends(folder: Path) -> list[int]:
    """The end-of-text tokens that the checkpoint names."""
    from kvattn.models.tensors import read_json

    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name).get("eos_token_id")
            if found is not None:
                return list(found) if isinstance(found, list) else [found]
    return []
