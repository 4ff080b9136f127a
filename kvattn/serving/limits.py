"""What an engine refuses before anything is begun."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from kvattn.cache import PagedKVCache
from kvattn.errors import CapacityError, ConfigError, DTypeError, OutOfBlocksError, RangeError, UnsupportedError
from kvattn.families import DecoderConfig
from kvattn.models import prompts
from kvattn.models.decoder import Decoder
from kvattn.serving import checks
from kvattn.serving.prefixes import PrefixPool
from kvattn.serving.scheduler import SCHEDULES

MOST_GUESSED = 7
"""Tokens that a step verifies beside its own."""


def sizes(**given: int) -> None:
    """Checks numbers that are 1 or more.

    Raises:
        ConfigError, DTypeError: another one.
    """
    for name, value in given.items():
        checks.integer(name, value, 1, ConfigError)


def prefixes(schedule: str, prefix_cache: bool) -> None:
    """Checks in which order prompts are let in, and whether what was computed stays.

    Raises:
        ConfigError: an unknown schedule.
        DTypeError: no bool.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, got {schedule!r}.")
    if not isinstance(prefix_cache, bool):
        raise DTypeError(f"prefix_cache must be a bool, got {prefix_cache!r}.")


def guesses(most: int, can_go_back: bool, about: str) -> None:
    """Checks how many tokens are to be guessed.

    Args:
        most: at most so many at a time.
        can_go_back: whether the caches can take tokens back.
        about: what they are.

    Raises:
        RangeError, DTypeError: more than `MOST_GUESSED`, fewer than none, no int.
        UnsupportedError: caches that cannot.
    """
    if checks.integer("speculate", most, 0) > MOST_GUESSED:
        raise RangeError(f"speculate must be at most {MOST_GUESSED} tokens, got {most}.")
    if most and not can_go_back:
        raise UnsupportedError(
            "guessed tokens that were wrong are taken back, which policies that let tokens go, and codecs that encode "
            f"several together, cannot do: {about}. Leave speculate out."
        )


def caches(model: Decoder, layers: Sequence[PagedKVCache]) -> None:
    """Checks the caches of a model for what the host cannot manage.

    Raises:
        UnsupportedError: rows that are split over a mesh.
        ConfigError: pages of several sizes.
    """
    lengths = layers[0].lengths
    if lengths.sharding.shard_shape(lengths.shape) != lengths.shape:
        raise UnsupportedError(
            f"the model splits its caches by rows (by={model.split.by!r} over {model.split.mesh}), and their pages "
            'would have to lie with them: load it with by="heads" or by="sequence" and no "data" axis.'
        )
    sizes = sorted({layer.page_size for layer in layers})
    if len(sizes) > 1:
        raise ConfigError(
            f"pages must have one size in all layers, got {sizes}: give page_size, and codecs that take it."
        )


def hosts(model: Decoder, axis: str) -> None:
    """Checks that the caches of a model lie over an axis of hosts.

    Raises:
        ConfigError: a model without a mesh, or whose pages are split otherwise.
    """
    split = model.split
    if split.mesh is None:
        raise ConfigError(
            f'the model is on one device: load it with mesh=jax.make_mesh((n,), ({axis!r},)), by="sequence" and '
            f"axis={axis!r}, and give hosts={axis!r} then."
        )
    if axis not in split.mesh.axis_names:
        raise ConfigError(f"hosts must name one of the mesh axes {split.mesh.axis_names}, got {axis!r}.")
    if split.by != "sequence" or split.axis != axis:
        raise ConfigError(
            f"pages lie over the axis of hosts where a model is split by sequence along it: load it with "
            f'by="sequence", axis={axis!r}, got by={split.by!r}, axis={split.axis!r}.'
        )


def beams(width: int, most: int, num_samples: int, temperature: float, on_token: object) -> None:
    """Checks what is asked of a beam search.

    Raises:
        ConfigError: samples, a temperature or a callback; more than `most` beams.
    """
    if num_samples != 1 or temperature != 0:
        raise ConfigError(
            f"a beam search takes the most probable texts: it draws no samples, got {num_samples=}, {temperature=}. "
            "Leave them out, or leave beam_width out."
        )
    if on_token is not None:
        raise ConfigError("beams change until the search has ended, so there is no on_token: read request.tokens.")
    if width > most:
        raise ConfigError(
            f"beam_width must be at most {most}, the rows of the engine (max_batch) or the tokens of the model, got "
            f"{width}."
        )


def room(
    config: DecoderConfig,
    max_length: int,
    pool: PrefixPool,
    tokens: Int32[np.ndarray, " S"],
    max_new_tokens: int,
    width: int,
) -> None:
    """Checks that a prompt and its new tokens fit, if there is nothing else.

    Args:
        config: of the model.
        max_length: most tokens of a sequence.
        pool: of pages.
        tokens: of the prompt.
        max_new_tokens: most tokens that follow.
        width: sequences that must be there at once.

    Raises:
        CapacityError: more than `max_length`; OutOfBlocksError: more than the pool.
        RangeError: beyond what the model has learned.
    """
    length = len(tokens) + max_new_tokens
    if length > max_length:
        raise CapacityError(
            f"a prompt of {len(tokens)} tokens and {max_new_tokens} new ones are {length}, max_length is {max_length}: "
            "make the engine with a larger one, or ask for fewer."
        )
    held, lengths = np.zeros((1,), np.int32), np.array([len(tokens)], np.int32)
    prompts.reached(config, held, lengths, max_new_tokens, max(max_new_tokens - 1, 0))
    if not pool.fits_alone(length, width, len(tokens)):
        raise OutOfBlocksError(
            f"{'a sequence' if width == 1 else f'{width} beams'} of {length} tokens does not fit into "
            f"{[group.num_blocks for group in pool.pool.groups]} pages of {pool.pool.block_size}: make the engine with "
            "more pages, or ask for fewer tokens."
        )
