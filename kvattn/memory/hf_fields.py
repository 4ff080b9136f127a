"""Reading a config.json for its sizes, whatever a family calls them, and knowing what was not read."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kvattn import _checks
from kvattn.errors import ConfigError, RangeError, UnsupportedError
from kvattn.memory.hf_defaults import ALIASES, DEFAULTS, NULLABLE
from kvattn.memory.hf_harmless import is_harmless
from kvattn.memory.hf_planned import PLANNED, PLANNED_NULLABLE
from kvattn.memory.specs import MAX_LAYERS

_WINDOWS = {"sliding_window", "attention_chunk_size"}


class Fields:
    """The settings of a config.json under one set of names.

    Args:
        config: the settings as JSON has them.
        kind: the family: its aliases, its defaults and what null means to it are honoured. The fields of a family that
            is not known here may have any name of `NAMES`.
    """

    NAMES: Mapping[str, tuple[str, ...]] = {
        "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        "heads": ("num_attention_heads", "n_head", "n_heads"),
        "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "num_query_groups"),
        "head_dim": ("head_dim", "kv_channels", "attention_head_dim"),
        "model_dim": ("hidden_size", "n_embd", "d_model"),
        "mlp_dim": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "mlp_dim", "inner_hidden_size"),
        "vocab": ("vocab_size", "padded_vocab_size"),
        "positions": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
        "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        "experts_per_token": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
        "shared_experts": ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
        "dense_layers": ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
    }

    def __init__(self, config: Mapping[str, Any], kind: str):
        self.kind = kind
        self.is_known = kind in DEFAULTS or kind in PLANNED
        self._defaults: Mapping[str, Any] = DEFAULTS.get(kind) or PLANNED.get(kind) or {}
        self._nullable = NULLABLE.get(kind) or PLANNED_NULLABLE.get(kind, frozenset()) | _WINDOWS
        self._config = _renamed(dict(_flat(config)), ALIASES.get(kind, {}))
        self._read: set[str] = set()

    def get(self, name: str, otherwise: Any = None) -> Any:
        """A setting as it is; `otherwise` if it is null, or left out where the family has no default.

        Raises:
            ConfigError: null, where the family's default is something else and transformers takes no null for it.
        """
        self._read.add(name)
        default = self._defaults.get(name)
        value = self._config.get(name, default)
        if value is None and default is not None and name not in self._nullable:
            raise ConfigError(f"{name} is null: give it a value, or leave it out for {default!r}.")
        return otherwise if value is None else value

    def passed(self, *names: str) -> None:
        """These settings say nothing that is not known otherwise."""
        self._read.update(names)

    def says(self, name: str) -> bool:
        """Whether the file itself has the setting."""
        return name in self._config

    def reads(self, name: str) -> bool:
        """Whether the family has a setting of this name, so that it means there what it is taken for here."""
        return name in self._defaults

    def size(self, name: str, otherwise: int | None = None, least: int = 1) -> int:
        """A setting of `NAMES`, or one under its own name, as an int.

        Raises:
            ConfigError: it is missing, below `least`, or two of its names have different values.
            DTypeError: no int.
        """
        found = self._found(name)
        if not found and otherwise is None:
            raise ConfigError(f"the config has none of {', '.join(self.NAMES.get(name, (name,)))}.")
        if not found:
            return self._int(name, otherwise, least)
        first, value = next(iter(found.items()))
        if name in ("layers", "heads", "kv_heads", "model_dim", "experts"):
            for other, another in found.items():
                if another != value:
                    raise ConfigError(f"{first} is {value!r} but {other} is {another!r}: keep one.")
        return self._int(first, value, least)

    def count(self, name: str) -> int:
        """The same as an int >= 0; 0 where it is missing."""
        return self.size(name, 0, least=0)

    def _found(self, name: str) -> dict[str, Any]:
        """The values a setting has, by the names that the family has for it. A file goes before the defaults."""
        names = self.NAMES.get(name, (name,))
        own = [n for n in names if n in self._defaults]
        names = own or names
        given = {n: value for n in names if (value := self.get(n)) is not None}
        return {n: value for n, value in given.items() if n in self._config} or given

    @staticmethod
    def _int(name: str, value: Any, least: int) -> int:
        """A number, or the number that a list with one for every layer repeats.

        Raises:
            UnsupportedError: numbers that differ from layer to layer.
        """
        if isinstance(value, list | tuple) and value and all(type(x) is int for x in value):
            if len(set(value)) > 1:
                raise UnsupportedError(
                    f"{name} differs from layer to layer, which a ModelSpec cannot say: {list(value)}. Plan the layers "
                    "of each kind with a spec of their own."
                )
            value = value[0]
        return _checks.integer(name, value, least)

    @property
    def num_layers(self) -> int:
        """Layers.

        Raises:
            RangeError: more than any model has.
        """
        found = self.size("layers")
        if found > MAX_LAYERS:
            raise RangeError(f"the config has {found} layers, of which there may be {MAX_LAYERS} at most.")
        return found

    @property
    def num_experts(self) -> int:
        """Experts of a layer; 0 for dense models."""
        return 0 if self.get("is_moe") is False else self.count("experts")

    @property
    def head_dim(self) -> int:
        """H: given, or D // N."""
        if self.kind == "zamba2":
            return self.size("attention_head_dim", 2 * self.size("model_dim") // self.size("heads"))
        return self.size("head_dim", self.size("model_dim") // self.size("heads"))

    @property
    def kv_heads(self) -> int:
        """K, by whichever of the settings the family has."""
        heads = self.size("heads")
        if self.kind == "gpt_bigcode":
            self._read.add("num_key_value_heads")
            return 1 if self.get("multi_query") else heads
        if self.kind == "falcon":
            grouped, multi_query = self.get("new_decoder_architecture"), self.get("multi_query")
            groups = self.size("num_kv_heads", heads)
            return groups if grouped else 1 if multi_query else heads
        if self.kind == "mpt":
            kinds = {"multihead_attention": heads, "multiquery_attention": 1}
            groups, kind = self.size("attn_config.kv_n_heads", heads), self.get("attn_config.attn_type")
            return kinds.get(kind, groups)
        if self.kind == "chatglm":
            groups = self.size("multi_query_group_num", 1)
            # A file that names groups and not the flag means them; a flag that is off is taken at its word.
            means_groups = groups > 1 and "multi_query_attention" not in self._config
            return groups if means_groups or self.get("multi_query_attention") else heads
        return self.size("kv_heads", heads)

    def list_of(self, name: str, length: int) -> list[Any] | None:
        """A setting that has an entry per layer; None where it is null or left out.

        Raises:
            ConfigError: no list, or not as long as there are layers.
        """
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != length:
            raise ConfigError(f"{name} must have {length} entries, one per layer, got {value!r}.")
        return list(value)

    def unread(self) -> dict[str, Any]:
        """The settings of the file that nothing has asked for and that may matter."""
        return {
            name: value
            for name, value in self._config.items()
            if name not in self._read and name not in self._defaults and _may_matter(name.rpartition(".")[2], value)
        }


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings, those within attn_config and ffn_config with a dotted name."""
    for name, value in config.items():
        if name in ("attn_config", "ffn_config") and isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", x) for inner, x in value.items())
        else:
            yield name, value


def _renamed(config: dict[str, Any], aliases: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The settings by the names that the family has for them.

    Raises:
        ConfigError: two names of a setting with different values.
    """
    for name, others in aliases.items():
        for other in others:
            value = config.pop(other, None)
            if value is None:
                continue
            if config.get(name, value) not in (value, None):
                raise ConfigError(f"{name} is {config[name]!r} but {other} is {value!r}: keep one.")
            config[name] = value
    return config


def _may_matter(name: str, value: Any) -> bool:
    """Whether a setting may change what a layer keeps: its name speaks of layers, heads, windows or states."""
    return _SUSPECT.search(name) is not None and not _NO_SIZE.search(name) and not is_harmless(name, value)


_SUSPECT = re.compile(
    "attn|attention|block|cache|chunk|cla_|compress|conv|cross|delta|encoder|group|head|hybrid|interval|key|kv|latent|"
    "layer|linear|local|lora|mamba|memory|mixer|pattern|period|query|recurr|rnn|shar|skip|slid|sparse|ssm|state|"
    "stride|swa|value|window|yoco"
)
"""What the names of settings about layers, heads, windows and states hold."""

_NO_SIZE = re.compile(
    "_act$|activation|attn_(alpha|beta)_factor|bias|clip|_dt_|dtype|eps|expert|flash|gate$|implementation|init|kernels$|"
    "lm_head|log_max|log_min|max_window_layers|moe|mtp|multiplier|n_group$|neg_eigval|nextn|norm|parallel|per_layer_input|position|"
    "query_pre_attn_scalar|residual|rope|scal(e|ing)|sequence_id|softcap|temperature|topk_group"
)
"""And what those of them hold that change numbers or weights, but not how much a layer keeps."""
