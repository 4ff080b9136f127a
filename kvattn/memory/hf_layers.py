"""Which layers of a config.json keep keys and values: all of them, those within a window, or those of another layer."""

from collections.abc import Callable, Mapping
from typing import Any

from kvattn import _checks
from kvattn.errors import ConfigError, UnsupportedError
from kvattn.memory.hf_fields import Fields
from kvattn.memory.specs import KVSource, Window

FULL, WINDOW, CHUNK, NONE = "full", "window", "chunk", "none"
"""What a layer keeps: all tokens; those of its window; those of the chunk it is in; no keys and values at all."""

_NAMES = {
    "full_attention": FULL,
    "attention": FULL,
    "hybrid": FULL,  # attention and Mamba in one layer
    "sliding_attention": WINDOW,
    "chunked_attention": CHUNK,
    "linear_attention": NONE,
    "mamba": NONE,
    "mamba2": NONE,
    "conv": NONE,
    "recurrent": NONE,
    "mlp": NONE,
    "moe": NONE,
}
"""What transformers calls them in layer_types and layers_block_type."""

LATENT = frozenset({
    "axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
    "kimi_k2", "kimi_linear", "longcat_flash", "minicpm3", "sarvam_mla", "youtu",
})  # fmt: skip
"""Families that cache latent vectors."""

STATE = frozenset({
    "falcon_mamba", "mamba", "mamba2", "retnet", "rwkv", "rwkv5", "rwkv6", "rwkv7", "xlstm",
})  # fmt: skip
"""Families without any attention."""

HYBRID = frozenset({
    "bamba", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "minimax", "minimax_m1", "minimax_text_01",
    "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "zamba2",
})  # fmt: skip
"""Families some of whose layers keep a state of constant size."""

_PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers")

Rule = Callable[[Fields, int], list[str]]


def layers_of(f: Fields) -> tuple[int, Window, KVSource]:
    """How many layers there are, their windows, and whose keys and values each attends to, as `ModelSpec` has them.

    Raises:
        ConfigError: settings that contradict each other, or do not say which layers have the window.
        UnsupportedError: a kind of layer that is not known, or that the family does not have.
    """
    kinds = kinds_of(f)
    sizes = {FULL: None, NONE: None}
    for kind, name in ((WINDOW, "sliding_window"), (CHUNK, "attention_chunk_size")):
        if kind in kinds:
            size = f.get(name)
            if not size:
                raise ConfigError(f"there are layers with a window, but {name} is {size!r}.")
            _checks.window(size)
            sizes[kind] = size
    windows = [sizes[kind] for kind in kinds]
    window = windows[0] if len(set(windows)) == 1 else tuple(windows)
    sources = _sources(f, kinds)
    return len(kinds), window, None if sources == list(range(len(kinds))) else tuple(sources)


def kinds_of(f: Fields) -> list[str]:
    """What each layer keeps: `FULL`, `WINDOW`, `CHUNK` or `NONE`.

    Raises:
        ConfigError, UnsupportedError: as `layers_of`.
    """
    if f.kind == "nemotron_h":
        blocks = nemotron_blocks(f)
        return _named(f, "layers_block_type", blocks, len(blocks))
    num_layers = f.num_layers
    for name in ("layer_types", "layers_block_type"):
        if (listed := f.get(name)) is not None:
            return _named(f, name, listed, num_layers)
    rule = RULES.get(f.kind, _uniform)
    kinds = rule(f, num_layers)
    assert len(kinds) == num_layers
    return kinds


def _named(f: Fields, name: str, listed: Any, num_layers: int) -> list[str]:
    """What the entries of such a list say."""
    entries = listed if isinstance(listed, list | tuple) else ()
    unknown = sorted({str(x) for x in entries if not isinstance(x, str) or x not in _NAMES})
    if unknown:
        raise UnsupportedError(
            f"{name} of model_type {f.kind!r} holds {', '.join(unknown)}, of which it is not known what such layers "
            "cache: plan the layers that have keys and values with a ModelSpec."
        )
    kinds = [_NAMES[x] for x in entries]
    if NONE in kinds and f.is_known and f.kind not in HYBRID:
        raise UnsupportedError(
            f"{name} of model_type {f.kind!r} holds {', '.join(sorted({x for x in entries if _NAMES[x] == NONE}))}, "
            "layers without a cache of keys and values, which this family does not have: plan it with a ModelSpec."
        )
    if len(kinds) != num_layers:
        raise ConfigError(f"{name} must have {num_layers} entries, one per layer, got {listed!r}.")
    f.passed(*_PATTERNS)  # what was the list made from is no news
    if f.get("use_sliding_window") is False:
        kinds = [FULL if kind == WINDOW else kind for kind in kinds]
    return kinds


def _sources(f: Fields, kinds: list[str]) -> list[int | None]:
    """Whose keys and values each layer attends to."""
    sources: list[int | None] = [None if kind == NONE else i for i, kind in enumerate(kinds)]
    if f.reads("num_kv_shared_layers") and (shared := f.size("num_kv_shared_layers", 0, least=0)):
        first = len(kinds) - shared
        for i in range(max(first, 0), len(kinds)):
            of_its_kind = [j for j in range(first) if kinds[j] == kinds[i]]
            if not of_its_kind:
                raise ConfigError(f"num_kv_shared_layers is {shared}: layer {i} has no earlier layer to share with.")
            sources[i] = of_its_kind[-1]
    if f.reads("use_cla") and f.get(
        "use_cla"
    ):  # cross-layer attention: the first layer of each group has keys and values
        group = f.size("cla_share_factor", 1)
        sources = [i - i % group for i in range(len(kinds))]
    return sources


# Families whose files do not list their layers.


def _every(period: int, num_layers: int, rest: str, *, at: int = -1) -> list[str]:
    """One layer in `period` keeps everything, the one whose number is `at` modulo it; the others are `rest`."""
    return [FULL if i % period == at % period else rest for i in range(num_layers)]


def _interval(f: Fields, num_layers: int) -> list[str]:
    return _every(f.size("full_attention_interval", 4), num_layers, NONE)


def _windowed(period: int, at: int = -1) -> Rule:
    def rule(f: Fields, num_layers: int) -> list[str]:
        if at != -1:
            return _every(period, num_layers, WINDOW, at=at)
        given = {name: value for name in _PATTERNS if (value := f.get(name)) and f.says(name)}
        if len(set(map(str, given.values()))) > 1:
            raise ConfigError(f"which layers have the window? {given} say different things: keep one.")
        name, pattern = next(iter(given.items()), (None, period))
        if isinstance(pattern, str):
            return _lettered(name, pattern, num_layers)
        return _every(period if name is None else f.size(name), num_layers, WINDOW)

    return rule


def _lettered(name: str | None, pattern: str, num_layers: int) -> list[str]:
    """A pattern that is repeated, of L (local) and G (global)."""
    if set(pattern) - {"L", "G"}:
        raise ConfigError(f"{name} must be a number, or a text of L and G, got {pattern!r}.")
    return [FULL if pattern[i % len(pattern)] == "G" else WINDOW for i in range(num_layers)]


def _exaone4(f: Fields, num_layers: int) -> list[str]:
    if f.get("sliding_window") is None:
        f.passed(*_PATTERNS)
        return [FULL] * num_layers
    return _windowed(4)(f, num_layers)


def _gpt_neo(f: Fields, num_layers: int) -> list[str]:
    """A list of patterns and how often each is repeated."""
    groups = f.get("attention_types")
    try:
        named = [kind for pattern, times in groups for kind in pattern * times]
    except (TypeError, ValueError) as error:
        raise ConfigError(f'attention_types must be such as [[["global", "local"], 12]], got {groups!r}.') from error
    known = {"global": FULL, "local": WINDOW}
    if len(named) != num_layers or any(not isinstance(kind, str) or kind not in known for kind in named):
        raise ConfigError(f"attention_types must say global or local for each of {num_layers} layers, got {groups!r}.")
    return [known[kind] for kind in named]


def _only(name: str) -> Rule:
    """The layers whose numbers are listed keep everything, the others nothing."""

    def rule(f: Fields, num_layers: int) -> list[str]:
        listed = f.get(name)
        if listed is None and f.kind == "lfm2":
            return [FULL] * num_layers
        if not isinstance(listed, list | tuple) or not all(type(i) is int and 0 <= i < num_layers for i in listed):
            raise ConfigError(f"{name} must list the layers with attention, out of {num_layers}, got {listed!r}.")
        return [FULL if i in listed else NONE for i in range(num_layers)]

    return rule


def _jamba(f: Fields, num_layers: int) -> list[str]:
    period, offset = f.size("attn_layer_period"), f.size("attn_layer_offset", least=0)
    return _every(period, num_layers, NONE, at=offset)


def _lfm2_moe(f: Fields, num_layers: int) -> list[str]:
    raise ConfigError(f"layer_types must list the {num_layers} layers of lfm2_moe.")


def _granitemoehybrid(f: Fields, num_layers: int) -> list[str]:
    return [NONE] * num_layers


def _recurrent_gemma(f: Fields, num_layers: int) -> list[str]:
    blocks = f.get("block_types")
    known = {"recurrent": NONE, "attention": WINDOW}
    if not isinstance(blocks, list | tuple) or not blocks or any(block not in known for block in blocks):
        raise ConfigError(f"block_types must list recurrent and attention, got {blocks!r}.")
    return [known[blocks[i % len(blocks)]] for i in range(num_layers)]


def _minimax(f: Fields, num_layers: int) -> list[str]:
    listed = f.list_of("attn_type_list", num_layers)
    if listed is None and f.kind == "minimax_m2":
        return [FULL] * num_layers
    if listed is None and f.kind != "minimax":
        raise ConfigError(f"attn_type_list must say which of the {num_layers} layers of {f.kind} have softmax.")
    if listed is None:
        return _every(2, num_layers, NONE, at=0)
    if any(x not in (0, 1) for x in listed):
        raise ConfigError(f"attn_type_list must hold 0 (linear) and 1 (softmax), got {listed!r}.")
    return [FULL if x else NONE for x in listed]


def _olmo_hybrid(f: Fields, num_layers: int) -> list[str]:
    kinds = _every(4, num_layers, NONE)
    return kinds if FULL in kinds else [*kinds[:-1], FULL]


_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


def nemotron_blocks(f: Fields) -> list[str]:
    """What each layer of Nemotron-H is, by the names of layers_block_type. The letters say how many there are.

    Raises:
        ConfigError: other letters, or not as many as layers.
    """
    letters, listed = f.get("hybrid_override_pattern"), f.get("layers_block_type")
    if listed is not None:
        length = len(listed) if isinstance(listed, list | tuple) else 1
        return f.list_of("layers_block_type", f.size("num_hidden_layers", length)) or []
    if not isinstance(letters, str) or not letters or any(letter not in _LETTERS for letter in letters):
        raise ConfigError(f"hybrid_override_pattern must be a text of {', '.join(_LETTERS)}, got {letters!r}.")
    if f.size("num_hidden_layers", len(letters)) != len(letters):
        raise ConfigError(
            f"num_hidden_layers is {f.get('num_hidden_layers')}, but hybrid_override_pattern has {len(letters)} "
            "letters: keep one."
        )
    return [_LETTERS[letter] for letter in letters]


def _llama4(f: Fields, num_layers: int) -> list[str]:
    local = CHUNK if f.get("attention_chunk_size") is not None else FULL
    return [local if turned else FULL for turned in _turned(f, num_layers)]


def _turned(f: Fields, num_layers: int) -> list[Any]:
    """Which layers have rotary positions: a list of these, in spite of its name."""
    if f.get("no_rope_layers"):
        return f.list_of("no_rope_layers", num_layers) or []
    every = f.size("no_rope_layer_interval")
    return [(i + 1) % every != 0 for i in range(num_layers)]


def _qwen(f: Fields, num_layers: int) -> list[str]:
    window = f.get("sliding_window")
    if not f.get("use_sliding_window", False) or not window:
        return [FULL] * num_layers
    first = f.size("max_window_layers", 28, least=0)
    return [WINDOW if i >= first else FULL for i in range(num_layers)]


def _qwen3_moe(f: Fields, num_layers: int) -> list[str]:
    window = f.get("sliding_window")
    used = f.get("use_sliding_window", False) and window
    return [WINDOW if used else FULL] * num_layers


def _all(f: Fields, num_layers: int) -> list[str]:
    return [FULL if f.get("sliding_window") is None else WINDOW] * num_layers


def _full(f: Fields, num_layers: int) -> list[str]:
    return [FULL] * num_layers


def _dots1(f: Fields, num_layers: int) -> list[str]:
    first = f.size("max_window_layers", least=0) if f.get("sliding_window") is not None else num_layers
    return [WINDOW if i >= first else FULL for i in range(num_layers)]


def _qwen2_moe(f: Fields, num_layers: int) -> list[str]:
    first = f.size("max_window_layers", least=0) if f.get("use_sliding_window") else 0
    return [WINDOW if i < first and i % 2 == 0 else FULL for i in range(num_layers)]


def _smollm3(f: Fields, num_layers: int) -> list[str]:
    used = f.get("use_sliding_window") and f.get("sliding_window") is not None
    return [FULL if turned or not used else WINDOW for turned in _turned(f, num_layers)]


def _uniform(f: Fields, num_layers: int) -> list[str]:
    """A family without a rule of its own: all layers alike."""
    if f.get("sliding_window") and f.get("use_sliding_window") is not False:
        raise (ConfigError if f.is_known else UnsupportedError)(
            f"which layers of model_type {f.kind!r} have the window of {f.get('sliding_window')}? Give it layer_types."
        )
    return [FULL] * num_layers


RULES: Mapping[str, Rule] = {
    "afmoe": _windowed(4),
    "bamba": _only("attn_layer_indices"),
    "cohere2": _windowed(4),
    "cwm": _windowed(4, at=0),
    "dots1": _dots1,
    "exaone4": _exaone4,
    "falcon_h1": _full,
    "gemma2": _windowed(2, at=1),
    "gemma3_text": _windowed(6),
    "gemma3n_text": _windowed(5),
    "gpt_neo": _gpt_neo,
    "gpt_oss": _windowed(2, at=1),
    "granitemoehybrid": _granitemoehybrid,
    "jamba": _jamba,
    "lfm2": _only("full_attn_idxs"),
    "lfm2_moe": _lfm2_moe,
    "llama4_text": _llama4,
    "minimax": _minimax,
    "minimax_m1": _minimax,
    "minimax_m2": _minimax,
    "minimax_text_01": _minimax,
    "ministral": _all,
    "ministral3": _all,
    "mistral": _all,
    "mixtral": _all,
    "olmo3": _windowed(4),
    "olmo_hybrid": _olmo_hybrid,
    "phi3": _all,
    "phimoe": _all,
    "qwen2": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen2_5_vl_text": _qwen,
    "qwen2_moe": _qwen2_moe,
    "qwen2_vl": _qwen,
    "qwen2_vl_text": _qwen,
    "qwen3": _qwen,
    "qwen3_5_moe_text": _interval,
    "qwen3_5_text": _interval,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _interval,
    "recurrent_gemma": _recurrent_gemma,
    "smollm3": _smollm3,
    "starcoder2": _all,
    "vaultgemma": _windowed(2, at=1),
    "zamba2": _only("hybrid_layer_ids"),
}
"""By model_type, where the file does not list its layers."""
