"""One token after the other through each policy: what its slots hold, and what each token attends to."""

import functools

import jax.numpy as jnp
import numpy as np
from svg import CELL, MARGIN, Picture

import kvattn

H = 16
LABEL = 62

# How strongly a token draws attention, by its position: the score that every query gives its key.
DRAWS = np.array([2.6, 0.2, 0.1, 1.7, 0.0, 0.3, 0.1, 0.2, 2.2, 0.1, 0.3, 0.0, 0.2, 0.1])


@functools.partial(kvattn.jit, static_argnames="implementation")
def step(query, key, value, cache, token_ids=None, implementation="xla"):
    return kvattn.cached_attention(
        query, key, value, cache, token_ids=token_ids, scale=1.0, implementation=implementation
    )


def token(position, draws):
    """Query, key and value of a token; its value is 1 at its own position, so outputs are attention by position."""
    key = np.zeros((1, 1, 1, H), np.float32)
    key[..., 0] = draws
    query, value = np.zeros_like(key), np.zeros_like(key)
    query[..., 0], value[..., position] = 1, 1
    return query, key, value


def run(policy, num_tokens, capacity=None):
    """(positions by slot, attention by position) after each token."""
    cache = kvattn.KVCache.create(1, 1, H, capacity=capacity, policy=policy, dtype=jnp.float32)
    for t in range(num_tokens):
        out, cache = step(*token(t, DRAWS[t]), cache)
        yield np.asarray(cache.positions).reshape(-1).tolist(), np.asarray(out)[0, 0, 0, :num_tokens]
    cache.check()


def shade(weight):
    """A few steps of opacity, so that rounding changes no picture."""
    return next(o for least, o in ((0.5, 1.0), (0.2, 0.8), (0.08, 0.6), (0.03, 0.45), (0, 0.3)) if weight > least)


def picture(title, policy, num_tokens, role, legend, capacity=None, note=""):
    """Both panels of a policy whose heads agree."""
    assert eval(title, vars(kvattn)) == policy
    ran = list(run(policy, num_tokens, capacity))
    draw = Picture(title, [type(policy), kvattn.cached_attention], __file__)
    draw.line("Position of the token in each slot, after each token", "head")
    num_slots = len(ran[0][0])
    before = []
    for s in range(num_slots):
        draw.text(MARGIN + LABEL + s * CELL + CELL / 2, draw.y, str(s), "small", "middle")
    draw.text(MARGIN, draw.y, "slot", "small")
    draw.y += 5
    for t, (slots, _) in enumerate(ran):
        draw.text(MARGIN, draw.y + 14, f"token {t}", "small")
        for s, position in enumerate(slots):
            kind = "empty" if position < 0 else "own" if position == t else role(position, t)
            draw.cell(MARGIN + LABEL + s * CELL, draw.y, "" if position < 0 else position, kind)
        left = sorted(set(before) - set(slots) - {-1})
        if left:
            draw.text(MARGIN + LABEL + num_slots * CELL + 8, draw.y + 14, f"{', '.join(map(str, left))} left", "small")
        before = slots
        draw.y += CELL - 2
    draw.y += 20
    draw.line("What each token attends to, by position; darker is more", "head")
    for p in range(num_tokens):
        draw.text(MARGIN + LABEL + p * CELL + CELL / 2, draw.y, str(p), "small", "middle")
    draw.y += 5
    gone = set()
    for t, (slots, weights) in enumerate(ran):
        draw.text(MARGIN, draw.y + 14, f"token {t}", "small")
        for p in range(t + 1):
            x = MARGIN + LABEL + p * CELL
            if weights[p] > 0:
                draw.cell(x, draw.y, kind="own" if p == t else role(p, t), opacity=shade(weights[p]))
            else:
                draw.cell(x, draw.y, kind="empty")
            if p not in slots and p not in gone:
                draw.cross(x, draw.y)
                gone.add(p)
        draw.y += CELL - 2
    draw.y += 18
    draw.legend(("own", "the token itself"), *legend, ("empty", "nothing"), ("leaves", "leaves the cache in this step"))
    if note:
        draw.line(note, "small", 72)
    return draw.svg()


def fastgen():
    """Heads of one prompt that need different things."""
    prompt, more, heads = 14, 3, ("special", "punctuation", "frequent", "local", "everything")
    ids = np.array([[1, 7, 7, 7, 13, 7, 7, 7, 7, 13, 7, 7, 7, 7]])
    at = np.arange(prompt + more)
    draws = {
        "special": np.where(at == 0, 8.0, 0),
        "punctuation": np.where(np.isin(at, (0, 4, 9)), 8.0, 0),
        "frequent": np.where(np.isin(at, (0, 2, 6)), 8.0, 0),
        "local": None,
        "everything": np.zeros(prompt + more),
    }

    def tokens(first, count):
        query, key = np.zeros((2, 1, count, len(heads), H), np.float32)
        for i, name in enumerate(heads):
            for t in range(count):
                p = first + t
                if draws[name] is None:  # -(p - q)², up to what is the same for all keys
                    query[0, t, i, :2], key[0, t, i, :2] = (8 * p, -4), (p, p * p)
                else:
                    query[0, t, i, 0], key[0, t, i, 0] = 1, draws[name][p]
        return query, key, key

    policy = kvattn.FastGen(0.9, special_tokens=(1,), punctuation_tokens=(13,), frequent=0.25, local=0.2)
    cache = kvattn.KVCache.create(1, len(heads), H, capacity=prompt + more, policy=policy, dtype=jnp.float32)
    _, cache = step(*tokens(0, prompt), cache, token_ids=jnp.asarray(ids))
    after = [np.asarray(cache.positions)[0]]
    for t in range(prompt, prompt + more):
        _, cache = step(*tokens(t, 1), cache, token_ids=jnp.full((1, 1), 7))
    after.append(np.asarray(cache.positions)[0])
    chosen = np.asarray(cache.state.choice)[0]
    names = ("special", "+ punctuation", "+ frequent", "+ local", "everything")

    draw = Picture("FastGen(0.9, frequent=0.25, local=0.2)", [kvattn.FastGen, kvattn.cached_attention], __file__)
    draw.line(
        f"Tokens kept by {len(heads)} heads, by position: after a prompt of {prompt}, and after {more} tokens more",
        "head",
        60,
    )
    wide = 18
    for moment, kept in enumerate(after):
        seen = prompt + moment * more
        draw.text(MARGIN, draw.y + 4, f"after {seen} tokens", "small")
        for p in range(seen):
            draw.text(MARGIN + 100 + p * wide + wide / 2, draw.y + 4, str(p), "small", "middle")
        draw.y += 9
        for head in range(len(heads)):
            draw.text(MARGIN, draw.y + 14, names[chosen[head]], "small")
            held = set(kept[head].tolist())
            for p in range(seen):
                kind = (
                    "first" if p < prompt and ids[0, p] == 1 else "shared" if p < prompt and ids[0, p] == 13 else "kept"
                )
                draw.cell(MARGIN + 100 + p * wide, draw.y, kind=kind if p in held else "empty", width=wide)
            draw.y += CELL - 2
        draw.y += 12
    draw.y += 6
    draw.legend(("first", "special token"), ("shared", "punctuation"), ("kept", "other token"), ("empty", "let go"))
    draw.line(
        "Each head took the first of the five ways that keeps 90 % of its own attention to the prompt.", "small", 72
    )
    return draw.svg()


def pictures():
    """Name of the file, and what is in it."""
    plain, keep = lambda p, t: "kept", ("kept", "kept")
    yield "full", picture("Full()", kvattn.Full(), 8, plain, [keep], capacity=8)
    turn = "Token t takes slot t mod 4: the ring turns, and no slot ever moves."
    yield "sliding_window", picture("SlidingWindow(4)", kvattn.SlidingWindow(4), 10, plain, [keep], note=turn)
    begins = "Where a chunk begins everything before it is out of sight, though slots are overwritten one by one."
    yield "chunked", picture("Chunked(4)", kvattn.Chunked(4), 10, plain, [keep], note=begins)

    sinks = lambda p, t: "first" if p < 2 else "kept"
    yield "streaming_llm", picture(
        "StreamingLLM(2, 4)", kvattn.StreamingLLM(2, 4), 11, sinks, [("first", "sinks"), ("kept", "window")],
        note="The oldest token of the window leaves before the new one attends, so 2 + 4 are attended to.",
    )  # fmt: skip
    recent = lambda count: lambda p, t: "kept" if p > t - count else "heavy"
    yield "h2o", picture(
        "H2O(2, 3)", kvattn.H2O(2, 3), 12, recent(3), [("heavy", "heavy hitters"), ("kept", "recent")],
        note="Tokens 0, 3 and 8 draw attention. Sums favour the old: 8 has to outgrow what 3 gathered before it came.",
    )  # fmt: skip
    scissors = kvattn.Scissorhands(6, num_recent=2, history=4, drop=3)
    yield "scissorhands", picture(
        "Scissorhands(6, num_recent=2, history=4, drop=3)", scissors, 12, recent(2),
        [("heavy", "important"), ("kept", "recent")],
        note="When the budget of 6 is full three leave at once: those that most of the last 4 queries gave "
        "less than an even share.",
    )  # fmt: skip
    yield "fastgen", fastgen()
