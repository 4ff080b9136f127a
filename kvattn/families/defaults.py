"""Defaults that families share: those of transformers' config classes (5.23 and 5.24).

Older releases write only what differs from them. A field that is null is not left out: it stays null if transformers
accepts that, and is refused otherwise.
"""

from kvattn.families.settings import Value

ROPE: dict[str, Value] = {
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
}
"""What `Fields.rope` reads."""


def usual(
    *,
    vocab: int,
    dim: int,
    heads: int,
    layers: int | None = None,
    length: int | None = None,
    mlp: int | None = None,
    kv_heads: int | None = None,
    tied: bool = False,
) -> dict[str, Value]:
    """Sizes under the names that most families use, without those that are None."""
    named = {
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": length,
        "tie_word_embeddings": tied,
    }
    return {name: value for name, value in named.items() if value is not None}
