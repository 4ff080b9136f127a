"""`Family`: everything known about one kind of model. `Sizes`: a config.json of it, as the planner reads it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from kvattn import _checks
from kvattn.errors import ConfigError, RangeError, UnsupportedError
from kvattn.families.fields import Fields
from kvattn.families.harmless import may_matter
from kvattn.families.kinds import Kind
from kvattn.families.rules import Blueprint
from kvattn.families.settings import Format, Settings, Value
from kvattn.families.values import MAX_LAYERS

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
    "experts_per_token": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
    "shared_experts": ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
    "dense_layers": ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
}
"""What families call their sizes. If some of the names are among a family's defaults, only those count."""

Counter = Callable[["Sizes"], int]
"""Computes a number from the sizes of a config."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """How a family's experts differ from those of Mixtral and Qwen.

    Attributes:
        is_sparse: whether the layer with this number has experts.
        weights: numbers in the matrices of one expert.
        biases: numbers in its biases.
        shared: parameters of one layer that every token uses in addition to its experts.
    """

    is_sparse: Callable[["Sizes", int], bool] | None = None
    weights: Counter | None = None
    biases: Counter | None = None
    shared: Counter | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """How an estimate of the parameters differs from that of Llama. Norms and biases are never counted.

    Attributes:
        mlp: parameters of a dense MLP.
        mixer: parameters of what replaces attention in layers without keys and values. None: there are no such layers.
        gated_attention: attention has a gate as wide as its queries.
        tied: whether input and output embeddings are tied when the file does not say.
    """

    mlp: Counter | None = None
    mixer: Counter | None = None
    gated_attention: bool = False
    tied: Callable[["Sizes"], bool] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family(Format):
    """Everything known about the models of one ``model_type``: how their config.json is read, planned and loaded.

    Only the name is required. By default every layer keeps keys and values, fields have their usual names
    (`kvattn.families.family.NAMES`) and no default values, parameters are estimated, and checkpoints cannot be loaded.

    Attributes:
        model_type: the name.
        defaults: values of fields that the file leaves out, as in transformers' config class. `blueprint` can read no
            other fields.
        aliases: other names of fields, from transformers' attribute_map or from published files.
        nullable: fields that may be null although their default is not. Windows always may.
        formerly: older values of model_type, and the fields that each of them implies.
        text_part_of: models of text and images whose text part is of this family unless it names another.
        blueprint: builds the decoder's config and the rules for its tensors. None: checkpoints cannot be loaded.
        is_quantized: `blueprint` reads quantization_config. In other families quantised weights are refused.
        layers: what each layer keeps (`kvattn.families.kinds`), given the number of layers, where the file does not
            list them. None: every layer keeps everything.
        blocks: what each layer is, in the words of layers_block_type, where MLPs are layers of their own.
        has_states: every layer also keeps a state of constant size.
        kv_heads: K, given N. None: the usual field, else N.
        head_dim: H. None: the usual field, else D // N.
        values_in_keys: Hv, where a value is the first numbers of its key, stored once (latent attention, MLA). None:
            values are stored for themselves.
        heads: K and H of each layer, given what the layers keep, where layers differ. None: they do not.
        params: the exact number of parameters, tied ones once. None: it is estimated.
        estimate: what the estimate has to know.
        experts: how its experts differ from Mixtral's.
        is_certain: whether it is known which layers keep keys and values.

    Example:
        >>> from kvattn.families import FAMILIES
        >>> FAMILIES["gemma2"].defaults["sliding_window"], FAMILIES["bloom"].aliases["hidden_size"]
        (4096, ('n_embed',))
    """

    formerly: Mapping[str, Mapping[str, Value]] = dataclasses.field(default_factory=dict)
    text_part_of: tuple[str, ...] = ()
    blueprint: Callable[[Fields], Blueprint] | None = None
    is_quantized: bool = False
    layers: Callable[["Sizes", int], list[Kind]] | None = None
    blocks: Callable[["Sizes"], list[str]] | None = None
    has_states: bool = False
    kv_heads: Callable[["Sizes", int], int] | None = None
    head_dim: Counter | None = None
    values_in_keys: Counter | None = None
    heads: Callable[["Sizes", Sequence[Kind]], list[tuple[int, int]]] | None = None
    params: Counter | None = None
    estimate: Estimate = Estimate()
    experts: Experts = Experts()
    is_certain: bool = True


class Sizes(Settings):
    """The sizes in a config.json under one set of names: those of `NAMES`.

    Args:
        settings: what the file holds.
        family: which names, defaults and nulls the file may have.

    Raises:
        ConfigError: a field that has different values under two of its names.
    """

    def __init__(self, settings: Mapping[str, Value], family: Family):
        super().__init__(dict(_flat(settings)), "", family)
        self.family = family

    def get(self, name: str, null: Value = None) -> Value:
        """A setting as it is. `null` if it is null, or left out and without a default.

        Raises:
            ConfigError: null, where the family's default is something else and transformers takes no null for it.
        """
        value = super().get(name)
        return null if value is None else value

    def flag(self, name: str) -> bool:
        """Whether a setting is true, whatever its type; null counts as false."""
        return bool(self.get(name))

    def says(self, name: str) -> bool:
        """Whether the file itself has the setting."""
        return name in self._given

    def reads(self, name: str) -> bool:
        """Whether the family has a setting of this name, so that it means there what it is taken for here."""
        return name in self.family.defaults

    def size(self, name: str, null: int | None = None, least: int = 1) -> int:
        """A setting of `NAMES`, or one under its own name, as an int.

        Raises:
            ConfigError: it is missing, below `least`, or two of its names have different values.
            DTypeError: no int.
        """
        found = self._found(name)
        if not found and null is None:
            raise ConfigError(f"the config has none of {', '.join(NAMES.get(name, (name,)))}.")
        if not found:
            return self._int(name, null, least)
        first, value = next(iter(found.items()))
        if name in ("layers", "heads", "kv_heads", "model_dim", "experts"):
            for other, another in found.items():
                if another != value:
                    raise ConfigError(f"{first} is {value!r} but {other} is {another!r}: keep one.")
        return self._int(first, value, least)

    def count(self, name: str) -> int:
        """The same as an int >= 0; 0 where it is missing."""
        return self.size(name, 0, least=0)

    def _found(self, name: str) -> dict[str, Value]:
        """The values a setting has, by the names that the family has for it. A file goes before the defaults."""
        names = NAMES.get(name, (name,))
        own = [n for n in names if n in self.family.defaults]
        names = own or names
        given = {n: value for n in names if (value := self.get(n)) is not None}
        return {n: value for n, value in given.items() if n in self._given} or given

    @staticmethod
    def _int(name: str, value: Value, least: int) -> int:
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
        if self.family.head_dim is not None:
            return self.family.head_dim(self)
        return self.size("head_dim", self.size("model_dim") // self.size("heads"))

    @property
    def kv_heads(self) -> int:
        """K: given, or N."""
        heads = self.size("heads")
        return self.size("kv_heads", heads) if self.family.kv_heads is None else self.family.kv_heads(self, heads)

    def list_of(self, name: str, length: int) -> list[Value] | None:
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

    def unread(self) -> dict[str, Value]:
        """The settings of the file that nothing has asked for and that may matter."""
        return {
            name: value
            for name, value in self._given.items()
            if name not in self._asked
            and name not in self.family.defaults
            and may_matter(name.rpartition(".")[2], value)
        }


def _flat(config: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
    """The settings, those within attn_config and ffn_config with a dotted name."""
    for name, value in config.items():
        if name in ("attn_config", "ffn_config") and isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", x) for inner, x in value.items())
        else:
            yield name, value
