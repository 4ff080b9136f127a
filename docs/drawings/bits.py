"""One token through each codec: what is stored, what is read back, and which numbers share a scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from svg import MARGIN, Picture

import kvattn
from kvattn.codecs import grouped

H, WIDE, LABEL = 8, 42, 84
TOKEN = np.array([0.31, -1.24, 0.05, 0.78, -0.42, 6.3, 0.11, -0.9], np.float32)


def sharing(stored_and_read, x):
    """For each number the first that it shares a scale with: each is changed, and the others that move are seen."""
    plain, owner = np.asarray(stored_and_read(x)), np.arange(x.size).reshape(x.shape)
    for i in np.ndindex(x.shape):
        for far in (40.0, -40.0):
            other = x.copy()
            other[i] = far
            moved = np.asarray(stored_and_read(other)) != plain
            moved[i] = True
            together = np.isin(owner, owner[moved])
            owner[together] = owner[together].min()
    return owner


def bits_at(codec, features=128):
    """Bits of a number, scales included, of a head of so many features."""
    stored = codec.encode(jnp.ones((features,)))
    return 8 * sum(x.nbytes for x in stored.values()) / features


def of_a_token(title, codec, meaning, codes, scales, note, usual=None):
    """Numbers, codes and numbers again of one token."""
    stored = codec.encode(jnp.asarray(TOKEN))
    read = np.asarray(codec.decode(stored, H, jnp.float32))
    draw = Picture(title, [type(codec)], __file__)
    draw.line("One token of one head, 8 channels", "head")
    groups = np.unique(sharing(jax.jit(lambda x: codec.decode(codec.encode(x), H, jnp.float32)), TOKEN))
    rows = [
        ("as it came", [f"{x:.2f}" for x in TOKEN], "kept"),
        (meaning, codes(stored), "own"),
        ("read back", [f"{x:.2f}" for x in read], "kept"),
    ]
    for label, words, kind in rows:
        draw.text(MARGIN, draw.y + 14, label, "small")
        for i, word in enumerate(words):
            draw.cell(MARGIN + LABEL + i * WIDE, draw.y, word, kind, WIDE)
        draw.y += 26
        if kind == "own":
            for name, numbers in scales(stored):
                draw.text(MARGIN, draw.y + 14, name, "small")
                spans = [(WIDE * H // len(numbers)) * i for i in range(len(numbers))]
                for x, number in zip(spans, numbers, strict=True):
                    draw.cell(MARGIN + LABEL + x, draw.y, f"{number:.4g}", "first", WIDE * H // len(numbers))
                draw.y += 26
                assert len(groups) == len(numbers), groups  # what was found by trying is what is stored
    draw.y += 12
    off = float(np.abs(read - TOKEN).max())
    draw.line(
        f"{bits_at(usual or codec):g} bits per number at 128 channels, scales included. Largest error here {off:.3f}.",
        wide=72,
    )
    draw.line(note, "small", 76)
    return draw.svg()


def kivi():
    """Which keys and values of a text are codes by now, and which of them share a scale."""
    codec, length, features = kvattn.KIVI(bits=2, group_size=4, residual=8), 21, 8
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, length, features)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=2)
    def read(keys, values, role):
        cache = kvattn.KVCache.create(1, 1, features, capacity=24, codec=codec, dtype=jnp.float32)
        x = [y[None, :, None] for y in (keys, keys, values)]
        _, cache = kvattn.cached_attention(*x, cache, implementation="xla")
        return cache.dense()[role][0, 0, :length], cache.positions[0, :length]

    draw = Picture("KIVI(bits=2, group_size=4, residual=8)", [kvattn.KIVI, kvattn.cached_attention], __file__)
    draw.line(f"{length} tokens of one head with {features} channels", "head")
    size = 15
    for role, name in enumerate(("keys", "values")):
        _, positions = read(keys, values, role)
        order = np.asarray(positions)
        assert (order == np.arange(length)).all()
        one = lambda x, role=role: read(*((x, values) if role == 0 else (keys, x)), role)[0]
        x = (keys, values)[role]
        exact = np.asarray(one(x)) == x
        draw.text(MARGIN, draw.y + 10, name, "head")
        draw.text(MARGIN + 46, draw.y + 10, "token 0 …", "small")
        draw.y += 16
        owner = sharing(one, x)
        for t, c in np.ndindex(x.shape):
            first = divmod(int(owner[t, c]), features)
            kind = (
                "empty" if exact[t].all() else f"d{(first[0] // 4 + first[1] + role * (first[0] + first[1] // 4)) % 4}"
            )
            draw.cell(MARGIN + 46 + t * size, draw.y + c * size, kind=kind, width=size, height=size)
        for c in range(features):
            draw.text(MARGIN, draw.y + c * size + 11, f"channel {c}", "foot")
        draw.y += features * size + 20
    draw.legend(("d0", "neighbours of one colour share a scale and a minimum"), ("empty", "as they came"))
    draw.line(
        "Keys are grouped along tokens within a channel, values along channels within a token. 21 mod 8 = 5 keys and "
        "the last 8 values are kept as they came.",
        "small",
        76,
    )
    return draw.svg()


def pictures():
    """Name of the file, and what is in it."""
    one = lambda stored: [("scale", np.asarray(stored["scale"]).ravel())]
    whole = lambda stored: [str(int(x)) for x in np.asarray(stored["data"])]
    yield "int8", of_a_token(
        "Int8()", kvattn.Int8(), "8-bit integer", whole, one,
        "One scale for all channels of the token: the large one makes steps coarse for the others.",
    )  # fmt: skip
    yield "float8", of_a_token(
        "Float8()", kvattn.Float8(), "8-bit float",
        lambda stored: [f"{x:g}" for x in np.asarray(stored["data"]).view(jnp.float8_e4m3fn).astype(np.float32)], one,
        "Three bits of mantissa: the error is relative, so small numbers beside a large one keep their digits.",
    )  # fmt: skip

    def pairs(stored):
        step, low = grouped.unpack_pair(stored["scale"], stored["minimum"])
        return [("scale", np.asarray(step)), ("minimum", np.asarray(low))]

    yield "int4", of_a_token(
        "Int4(group_size=4)", kvattn.Int4(group_size=4), "4-bit integer",
        lambda stored: [str(int(x)) for x in np.asarray(grouped.unpack(stored["data"], 4))[:H]], pairs,
        "A scale and a minimum for each group of channels: the large one spoils its own group only. "
        "Groups are 64 channels by default, of which the bits are; here they are 4.", kvattn.Int4(),
    )  # fmt: skip
    yield "kivi", kivi()
