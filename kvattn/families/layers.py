"""Which layers of a config.json keep keys and values: all of them, those within a window, or those of another layer."""

from collections.abc import Callable, Mapping

from kvattn import _checks
from kvattn.errors import ConfigError, UnsupportedError
from kvattn.families.family import Sizes
from kvattn.families.kinds import CHUNK, FULL, NONE, WINDOW, Kind, every, shared_from
from kvattn.families.settings import Settings, Value

_NAMES: Mapping[str, Kind] = {
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

PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers")
"""Fields that say after how many layers one has no window."""

Layers = Callable[[Sizes, int], list[Kind]]


def layers_of(f: Sizes) -> tuple[list[int | None], list[int | None]]:
    """The window of each layer, and the layer whose keys and values it attends to, as `ModelSpec` has them.

    Raises:
        ConfigError: settings that contradict each other, or do not say which layers have the window.
        UnsupportedError: a kind of layer that is not known, or that the family does not have.
    """
    kinds = kinds_of(f)
    sizes: dict[Kind, int | None] = {FULL: None, NONE: None}
    for kind, name in ((WINDOW, "sliding_window"), (CHUNK, "attention_chunk_size")):
        if kind in kinds:
            size = f.get(name)
            if not size:
                raise ConfigError(f"there are layers with a window, but {name} is {size!r}.")
            _checks.window(size)
            sizes[kind] = size
    return [sizes[kind] for kind in kinds], _sources(f, kinds)


def kinds_of(f: Sizes) -> list[Kind]:
    """What each layer keeps.

    Raises:
        ConfigError, UnsupportedError: as `layers_of`.
    """
    if f.family.blocks is not None:
        blocks = f.family.blocks(f)
        return _named(f, "layers_block_type", blocks, len(blocks))
    num_layers = f.num_layers
    for name in ("layer_types", "layers_block_type"):
        if (listed := f.get(name)) is not None:
            return _named(f, name, listed, num_layers)
    kinds = (f.family.layers or _uniform)(f, num_layers)
    assert len(kinds) == num_layers
    return kinds


def _named(f: Sizes, name: str, listed: Value, num_layers: int) -> list[Kind]:
    """What the entries of such a list say."""
    entries = listed if isinstance(listed, list | tuple) else ()
    kind = f.family.model_type
    unknown = sorted({str(x) for x in entries if not isinstance(x, str) or x not in _NAMES})
    if unknown:
        raise UnsupportedError(
            f"{name} of model_type {kind!r} holds {', '.join(unknown)}, of which it is not known what such layers "
            "cache: plan the layers that have keys and values with a ModelSpec."
        )
    kinds: list[Kind] = [_NAMES[x] for x in entries]
    if NONE in kinds and f.family.is_certain and f.family.estimate.mixer is None:
        raise UnsupportedError(
            f"{name} of model_type {kind!r} holds {', '.join(sorted({x for x in entries if _NAMES[x] == NONE}))}, "
            "layers without a cache of keys and values, which this family does not have: plan it with a ModelSpec."
        )
    if len(kinds) != num_layers:
        raise ConfigError(f"{name} must have {num_layers} entries, one per layer, got {listed!r}.")
    f.passed(*PATTERNS)  # what was the list made from is no news
    if f.get("use_sliding_window") is False:
        kinds = [FULL if kind == WINDOW else kind for kind in kinds]
    return kinds


def _sources(f: Sizes, kinds: list[Kind]) -> list[int | None]:
    """Whose keys and values each layer attends to."""
    sources: list[int | None] = [None if kind == NONE else i for i, kind in enumerate(kinds)]
    if f.reads("num_kv_shared_layers") and (shared := f.count("num_kv_shared_layers")):
        sources = [*shared_from(kinds, shared)]
    if f.reads("use_cla") and f.flag("use_cla"):  # cross-layer attention: the first of each group has keys and values
        group = f.size("cla_share_factor", 1)
        sources = [i - i % group for i in range(len(kinds))]
    return sources


# What layers keep in families whose files do not list it.


def _uniform(f: Sizes, num_layers: int) -> list[Kind]:
    """A family without a rule of its own: all layers alike."""
    if f.get("sliding_window") and f.get("use_sliding_window") is not False:
        raise (ConfigError if f.family.is_certain else UnsupportedError)(
            f"which layers of model_type {f.family.model_type!r} have the window of {f.get('sliding_window')}? Give it "
            "layer_types."
        )
    return full(f, num_layers)


def full(f: Settings, num_layers: int) -> list[Kind]:
    """All layers keep everything."""
    del f
    return [FULL] * num_layers


def windowed(f: Settings, num_layers: int) -> list[Kind]:
    """All layers have the window, where there is one."""
    return [FULL if f.get("sliding_window") is None else WINDOW] * num_layers


def windowed_but(at: int, period: int) -> Callable[[Settings, int], list[Kind]]:
    """All layers have the window, except those with number `at` modulo `period`."""
    return lambda f, num_layers: every(period, num_layers, WINDOW, at=at)


def windowed_by_pattern(period: int) -> Layers:
    """All have it except the last in each period. The file may give another, or a text of L (local) and G (global)."""

    def layers(f: Sizes, num_layers: int) -> list[Kind]:
        given = {name: value for name in PATTERNS if (value := f.get(name)) and f.says(name)}
        if len(set(map(str, given.values()))) > 1:
            raise ConfigError(f"which layers have the window? {given} say different things: keep one.")
        name, pattern = next(iter(given.items()), (None, period))
        if isinstance(pattern, str):
            if set(pattern) - {"L", "G"}:
                raise ConfigError(f"{name} must be a number, or a text of L and G, got {pattern!r}.")
            return [FULL if pattern[i % len(pattern)] == "G" else WINDOW for i in range(num_layers)]
        return every(period if name is None else f.size(name), num_layers, WINDOW)

    return layers


def windowed_from(first: str, switch: str | None = None) -> Callable[[Settings, int], list[Kind]]:
    """Layers from number `first` (a field) on have the window, if there is one and the field `switch` is on."""

    def layers(f: Settings, num_layers: int) -> list[Kind]:
        window = f.get("sliding_window")
        used = window is not None and (switch is None or f.flag(switch))
        start = f.size(first, least=0) if used else num_layers
        return [WINDOW if i >= start else FULL for i in range(num_layers)]

    return layers


def turned(f: Settings, num_layers: int) -> list[bool]:
    """Which layers have rotary positions, as no_rope_layers says in spite of its name.

    Raises:
        ConfigError: a list of another length, or of something else than 0 and 1.
    """
    listed = f.get("no_rope_layers")
    f.passed("no_rope_layer_interval")  # what a list was made from is no news
    if not listed:
        every = f.size("no_rope_layer_interval")
        return [(i + 1) % every != 0 for i in range(num_layers)]
    if not isinstance(listed, list | tuple) or len(listed) != num_layers or not set(map(repr, listed)) <= _ZERO_OR_ONE:
        raise ConfigError(f"no_rope_layers must list 0 or 1 for each of {num_layers} layers, got {listed!r}.")
    return [bool(entry) for entry in listed]


_ZERO_OR_ONE = {"0", "1", "False", "True"}


def attending(name: str) -> Layers:
    """The layers that the field `name` lists keep everything, the others nothing."""

    def layers(f: Sizes, num_layers: int) -> list[Kind]:
        listed = f.get(name)
        if not isinstance(listed, list | tuple) or not all(type(i) is int and 0 <= i < num_layers for i in listed):
            raise ConfigError(f"{name} must list the layers with attention, out of {num_layers}, got {listed!r}.")
        return [FULL if i in listed else NONE for i in range(num_layers)]

    return layers
