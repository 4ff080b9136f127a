"""Reading a config.json of HuggingFace: every field is honoured, known to change nothing, or refused by name."""

from collections.abc import Collection, Mapping
from typing import Any

from kvattn.errors import ConfigError, UnsupportedError

# About training, generation, files and devices: they change nothing that a forward pass computes.
_HARMLESS = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_softmax_in_fp32", "auto_map",
    "begin_suppress_tokens", "bias_dropout_fusion", "bos_token_id", "cache_implementation", "dtype", "emb_pdrop",
    "embd_pdrop", "attn_pdrop", "attention_dropout", "decoder_start_token_id", "dropout", "eos_token_id", "fc_dropout",
    "gradient_checkpointing", "hidden_dropout", "id2label", "init_config", "init_device", "init_std",
    "initializer_range", "initial_context_length", "keys_to_ignore_at_inference", "label2id", "layerdrop",
    "masked_softmax_fusion", "mlp_pdrop", "model_type", "name", "num_labels", "offset_alibi", "output_attentions",
    "output_hidden_states", "output_past", "output_router_logits", "pad_token_id", "prefix", "problem_type",
    "resid_pdrop", "return_dict", "router_aux_loss_coef", "scale_attention_softmax_in_fp32", "seq_length",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "task_specific_params", "tokenizer_class", "tokenizer_name", "torch_dtype", "transformers.js_config",
    "transformers_version", "unk_token_id", "unsloth_fixed", "unsloth_version", "use_cache", "use_mambapy", "verbose",
    "reorder_and_upcast_attn", "skip_bias_add", "skip_bias_add_qkv", "slow_but_exact", "pretraining_tp",
    "training_dtype", "word_embed_proj_dim_comment", "n_ctx", "n_special", "predict_special_tokens", "license",
}  # fmt: skip

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


class Fields:
    """The fields of one config.json, which must all have been asked for in the end.

    Args:
        fields: what the file holds.
        source: the file, for messages.
        ignore: names of fields that the caller takes responsibility for.
    """

    def __init__(self, fields: Mapping[str, Any], source: str, ignore: Collection[str] = ()):
        self.source = source
        self._fields = dict(fields)
        self._left = {name for name in fields if name not in _HARMLESS and name not in ignore}

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these fields that is there and not null, else `default`; all of them count as read."""
        self._left -= set(names)
        return next((self._fields[n] for n in names if self._fields.get(n) is not None), default)

    def need(self, *names: str) -> Any:
        """The first of these fields that is there.

        Raises:
            ConfigError: none of them is.
        """
        value = self.get(*names)
        if value is None:
            raise ConfigError(f"{self.source} lacks the field {' or '.join(map(repr, names))}.")
        return value

    def size(self, *names: str, default: int | None = None) -> int:
        """The same for a whole number >= 1; needed unless there is a `default`."""
        value = self.need(*names) if default is None else self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{self.source}: {names[0]} must be a whole number >= 1, got {value!r}.")
        return value

    def number(self, *names: str, default: float | None = None) -> Any:
        """A number; `default` where there is none or null.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(*names, default=default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{self.source}: {names[0]} must be a number, got {value!r}.")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A bool.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(name, default=default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.source}: {name} must be true or false, got {value!r}.")
        return value

    def only(self, name: str, *values: Any, why: str = "") -> None:
        """Checks a field that is supported with these values only; null and absent are fine.

        Raises:
            UnsupportedError: another value.
        """
        value = self.get(name)
        if value is not None and not any(value == known and type(value) is type(known) for known in values):
            known = " or ".join(map(repr, values)) or "null"
            raise UnsupportedError(
                f"{self.source}: {name} is {value!r}, supported is {known}{': ' + why if why else ''}."
            )

    def activation(self, *names: str, default: str) -> str:
        """The activation function, by the name that `DecoderConfig` has for it.

        Raises:
            UnsupportedError: an unknown one.
        """
        name = self.get(*names, default=default)
        if name not in ACTIVATIONS:
            raise UnsupportedError(
                f"{self.source}: {names[0]} is {name!r}; the known ones are {', '.join(map(repr, ACTIVATIONS))}."
            )
        return ACTIVATIONS[name]

    def rope(self, default_theta: float = 10000.0) -> dict[str, Any]:
        """`rope_theta` and `rope_scaling` for `DecoderConfig`, from either form that transformers has written."""
        newer, older, theta = self.get("rope_parameters"), self.get("rope_scaling"), self.get("rope_theta")
        most = self.get("max_position_embeddings", "n_positions")
        self.only("partial_rotary_factor", 1.0, 1)
        scaling = newer or older
        if scaling is None:
            return {"rope_theta": default_theta if theta is None else theta, "rope_scaling": None}
        if not isinstance(scaling, Mapping):
            raise ConfigError(f"{self.source}: rope_parameters must be an object, got {scaling!r}.")
        scaling = dict(scaling)
        turned = scaling.pop("partial_rotary_factor", None)
        if turned not in (None, 1.0):
            raise UnsupportedError(f"{self.source}: partial_rotary_factor is {turned!r}, supported is 1.0.")
        within = scaling.pop("rope_theta", None)
        theta = within if within is not None else default_theta if theta is None else theta
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind in ("dynamic", "yarn") and most is not None:
            # transformers takes from around the dict what is not within.
            scaling.setdefault("original_max_position_embeddings", most)
        return {
            "rope_theta": theta,
            "rope_scaling": None if kind in (None, "default") and len(scaling) <= 1 else scaling,
        }

    def windows(self, num_layers: int, window: Any, default: Any) -> tuple[int | None, ...] | None:
        """The window of each layer, from ``layer_types`` or, where that is not given, from `default` (bool per layer).

        Raises:
            ConfigError: too few or too many entries, or a windowed layer without a size.
            UnsupportedError: a kind of attention that is not known.
        """
        kinds = self.get("layer_types")
        if kinds is None:
            local = list(default)
        else:
            known = {"sliding_attention": True, "full_attention": False}
            for kind in kinds:
                if kind not in known:
                    raise UnsupportedError(f"{self.source}: layer_types holds {kind!r}; known are {', '.join(known)}.")
            local = [known[kind] for kind in kinds]
        if len(local) != num_layers:
            raise ConfigError(f"{self.source}: layer_types has {len(local)} entries for {num_layers} layers.")
        if any(local) and window is None:
            raise ConfigError(f"{self.source}: there are layers with a window, but sliding_window is null.")
        return tuple(window if here else None for here in local) if any(local) else None

    def finish(self) -> None:
        """Checks that nothing was left out.

        Raises:
            UnsupportedError: fields with a value that nothing here reads.
        """
        unread = {n: self._fields[n] for n in sorted(self._left) if self._fields[n] not in (None, False, [], {}, "")}
        if unread:
            raise UnsupportedError(
                f"{self.source} has fields that are not known for model_type {self._fields.get('model_type')!r} and "
                f"may change what the model computes: {unread}. If they do not, name them in ignore=, such as "
                f"from_pretrained(path, ignore={tuple(unread)!r})."
            )
