"""`Family`: all that is known of one kind of model, and `FAMILIES`, the table of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kvattn.errors import ConfigError, DTypeError
from kvattn.families.kinds import Kind
from kvattn.families.rules import Blueprint

if TYPE_CHECKING:  # both read by a family
    from kvattn.families.fields import Fields
    from kvattn.families.sizes import Sizes

Value = Any
"""What JSON holds: checked by whoever asks for it."""
Counter = Callable[["Sizes"], int]
"""A number that follows from a config's sizes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """MLPs of which a token takes a few, where they are not as in Mixtral and Qwen.

    Attributes:
        is_sparse: whether the layer of this number has experts.
        weights: numbers in the matrices of one expert.
        biases: numbers in its biases.
        shared: parameters of what every token goes through beside the experts, in one layer.
    """

    is_sparse: Callable[["Sizes", int], bool] | None = None
    weights: Counter | None = None
    biases: Counter | None = None
    shared: Counter | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """How parameters are estimated, where that is not as in Llama. Norms and biases are left out.

    Attributes:
        mlp: parameters of a dense MLP.
        mixer: parameters of what a layer without keys and values has in place of attention. A family without it has no
            such layers.
        gated_attention: attention has a gate as wide as its queries.
        tied: whether one table serves both ends, where the file does not say so.
    """

    mlp: Counter | None = None
    mixer: Counter | None = None
    gated_attention: bool = False
    tied: Callable[["Sizes"], bool] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """All that is known of the models with one ``model_type``: how their config.json is read, planned and loaded.

    Only the name is needed. Then all layers keep keys and values, the fields have their usual names
    (`kvattn.families.sizes.NAMES`) and no defaults, parameters are estimated, and checkpoints are not read.

    Attributes:
        model_type: its name.
        defaults: what fields are that the file leaves out: those of transformers' config class. `blueprint` may read
            no other fields.
        aliases: more names that fields have, in transformers' attribute_map or in files that were published.
        nullable: fields that may be null though their default is something else. Windows always may.
        formerly: older names of the model_type, and the fields that each of them stands for.
        text_part_of: models of text and images whose text part is of this family, where it does not say so itself.
        blueprint: the decoder, and the tensors that become its parameters. None: this library cannot load it.
        is_quantized: `blueprint` reads quantization_config. Of other families, quantised weights are not loaded.
        layers: what each of so many layers keeps (`kvattn.families.kinds`), where the file has no list of them.
            None: all the same, everything.
        blocks: what each layer is, where MLPs are layers of their own; by the names of layers_block_type.
        has_states: every layer keeps a state of constant size beside its keys and values.
        kv_heads: K, from the fields and N. None: the field of that name, or N.
        head_dim: H. None: the field of that name, or D / N.
        params: parameters, counted exactly, tied ones once. None: they are estimated.
        estimate: how.
        experts: what is particular about them.
        is_certain: it is known which layers keep keys and values.

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
"""Every family that is known here, by model_type."""


def register(*families: Family) -> None:
    """Adds families: from then on `from_pretrained` loads those with a `blueprint`, and the planner plans them all.

    This library's own go in the same way (`kvattn.families.hf`).

    Args:
        families: new ones, or changed ones: ``dataclasses.replace(FAMILIES["llama"], model_type="mine", ...)``.

    Raises:
        ConfigError: a name that is taken.
        DTypeError: something that is no `Family`, or has no name.

    Example:
        >>> import dataclasses
        >>> from kvattn.families import FAMILIES, register
        >>> register(dataclasses.replace(FAMILIES["llama"], model_type="yours", aliases={"hidden_size": ("width",)}))
        >>> FAMILIES["yours"].defaults["rms_norm_eps"]
        1e-06
        >>> del FAMILIES["yours"]
    """
    for family in families:
        if not isinstance(family, Family):
            raise DTypeError(f"a family must be a kvattn.models.Family, got {family!r}.")
        if not isinstance(family.model_type, str) or not family.model_type:
            raise DTypeError(f"a family's model_type must be a text, got {family.model_type!r}.")
        for name in (family.model_type, *family.formerly):
            if (taken := find(name)) is not None:
                raise ConfigError(
                    f"model_type {name!r} is taken by the family {taken[0].model_type!r}: choose another name."
                )
        FAMILIES[family.model_type] = family


def find(model_type: str) -> tuple[Family, Mapping[str, Value]] | None:
    """The family of this name, now or formerly, and the fields that an older name stands for; None: it is not known."""
    if model_type in FAMILIES:
        return FAMILIES[model_type], {}
    return next(((x, x.formerly[model_type]) for x in FAMILIES.values() if model_type in x.formerly), None)
