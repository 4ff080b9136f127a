"""`Family`: everything known about one kind of model. `FAMILIES` is the table of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kvattn.errors import ConfigError, DTypeError
from kvattn.families.kinds import Kind
from kvattn.families.rules import Blueprint

if TYPE_CHECKING:  # both of them need `Family`
    from kvattn.families.fields import Fields
    from kvattn.families.sizes import Sizes

Value = Any
"""Anything JSON can hold. Whoever reads it checks it."""
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
class Family:
    """Everything known about the models of one ``model_type``: how their config.json is read, planned and loaded.

    Only the name is required. By default every layer keeps keys and values, fields have their usual names
    (`kvattn.families.sizes.NAMES`) and no default values, parameters are estimated, and checkpoints cannot be loaded.

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
        params: the exact number of parameters, tied ones once. None: it is estimated.
        estimate: what the estimate has to know.
        experts: how its experts differ from Mixtral's.
        is_certain: whether it is known which layers keep keys and values.

    Example:
        >>> from kvattn.families import FAMILIES
        >>> FAMILIES["gemma2"].defaults["sliding_window"], FAMILIES["bloom"].aliases["hidden_size"]
        (4096, ('n_embed',))
    """

    model_type: str
    defaults: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    nullable: frozenset[str] = frozenset()
    formerly: Mapping[str, Mapping[str, Value]] = dataclasses.field(default_factory=dict)
    text_part_of: tuple[str, ...] = ()
    blueprint: Callable[["Fields"], Blueprint] | None = None
    is_quantized: bool = False
    layers: Callable[["Sizes", int], list[Kind]] | None = None
    blocks: Callable[["Sizes"], list[str]] | None = None
    has_states: bool = False
    kv_heads: Callable[["Sizes", int], int] | None = None
    head_dim: Counter | None = None
    params: Counter | None = None
    estimate: Estimate = Estimate()
    experts: Experts = Experts()
    is_certain: bool = True


FAMILIES: dict[str, Family] = {}
"""All known families by model_type."""


def register(*families: Family) -> None:
    """Adds families: `from_pretrained` then loads those that have a `blueprint`, and the planner knows all of them.

    The families of this package are registered the same way (`kvattn.families.hf`).

    Args:
        families: the new ones. ``dataclasses.replace(FAMILIES["llama"], model_type="mine", ...)`` is one.

    Raises:
        ConfigError: the name is taken.
        DTypeError: not a `Family`, or one without a name.

    Example:
        >>> import dataclasses
        >>> from kvattn.families import FAMILIES, register
        >>> register(dataclasses.replace(FAMILIES["llama"], model_type="yours", aliases={"hidden_size": ("width",)}))
        >>> FAMILIES["yours"].defaults["rms_norm_eps"]
        1e-06
        >>> del FAMILIES["yours"]
    """
    names: set[str] = set()
    for family in families:
        if not isinstance(family, Family):
            raise DTypeError(f"a family must be a kvattn.models.Family, got {family!r}.")
        if not isinstance(family.model_type, str) or not family.model_type:
            raise DTypeError(f"a family's model_type must be a text, got {family.model_type!r}.")
        for name in (family.model_type, *family.formerly):
            if name in names or find(name) is not None:
                raise ConfigError(f"model_type {name!r} is taken by another family: choose another name.")
            names.add(name)
    FAMILIES.update({family.model_type: family for family in families})


def find(model_type: str) -> tuple[Family, Mapping[str, Value]] | None:
    """The family with this name, and the fields that the name implies if it is an older one. None: unknown."""
    if model_type in FAMILIES:
        return FAMILIES[model_type], {}
    return next(((x, x.formerly[model_type]) for x in FAMILIES.values() if model_type in x.formerly), None)
