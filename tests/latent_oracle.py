"""Latent attention written a second time: plain NumPy in float64, tokens in Python lists, one query at a time.

Nothing here imports kvattn. `attend` is what a cache must do whose values are the first numbers of its keys. `Latent`
is the layer as the paper writes it (DeepSeek-V2, arXiv:2405.04434, section 2.1), with the keys and values of every head
materialised. Notation: T tokens, N heads, C numbers of the latent, R rotary numbers, P numbers of a head without
positions, Hv of a value head.
"""

import numpy as np


def turned(x, position, begin=0, theta=10000.0, interleaved=False):
    """RoPE of x [..., H] in float64: the entries from `begin` on turn, in halves or in pairs of neighbours."""
    still, x = x[..., :begin], x[..., begin:]
    half = x.shape[-1] // 2
    phase = position * theta ** (-np.arange(half) / half)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    a, b = a * np.cos(phase) - b * np.sin(phase), b * np.cos(phase) + a * np.sin(phase)
    both = np.stack([a, b], -1).reshape(x.shape) if interleaved else np.concatenate([a, b], -1)
    return np.concatenate([still, both], -1)


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def attend(query, keys, places, at, size, scale=None, interleaved=False):
    """One query [N, H] at place `at` over the keys (a list of [H]) at `places`: what was rotated is no value.

    Args:
        query: before rotation.
        keys: before rotation; the first `size` numbers of each are its value.
        places: where each is seen.
        at: where the query is seen.
        size: of a value.
        scale: None: 1/sqrt(H).
        interleaved: which pairs turn.
    """
    query, keys = np.asarray(query, np.float64), np.asarray(keys, np.float64)
    scale = 1 / np.sqrt(query.shape[-1]) if scale is None else scale
    rotated = np.stack([turned(k, p, size, interleaved=interleaved) for k, p in zip(keys, places, strict=True)])
    out = [softmax(rotated @ turned(q, at, size, interleaved=interleaved) * scale) @ keys[:, :size] for q in query]
    return np.stack(out)


def kept_places(position, keeps=None, num_sinks=0):
    """The positions that a query at `position` sees, and the places it sees them at: those in the cache."""
    first = 0 if keeps is None else max(0, position - keeps + 1)
    seen = sorted({*range(min(num_sinks, position + 1)), *range(first, position + 1)})
    return seen, list(range(len(seen)))


class Latent:
    """The layer on one sequence, from its parameters: ``tree["kv_down"]["kernel"]`` and so on.

    Args:
        tree: nested dicts of arrays.
        rope_dim: R.
        interleaved: which pairs turn.
        scale: None: 1/sqrt(P + R).
        epsilon: of the norms.
    """

    def __init__(self, tree, rope_dim, interleaved=False, scale=None, epsilon=1e-6):
        self.tree = {name: {n: np.asarray(x, np.float64) for n, x in leaf.items()} for name, leaf in tree.items()}
        self.rope_dim, self.interleaved, self.epsilon = rope_dim, interleaved, epsilon
        head = self.tree["query_up" if "query_up" in tree else "query"]["kernel"].shape[-1]
        self.scale = 1 / np.sqrt(head) if scale is None else scale

    def norm(self, name, x):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + self.epsilon) * self.tree[name]["scale"]

    def bias(self, name):
        return self.tree[name].get("bias", 0.0)

    def __call__(self, x, rotates=True):
        """Features [T, D] to features [T, D]: every token sees those up to itself."""
        x, tree, rope_dim = np.asarray(x, np.float64), self.tree, self.rope_dim
        turn = lambda a, t: turned(a, t, a.shape[-1] - rope_dim, interleaved=self.interleaved) if rotates else a
        if "query_up" in tree:
            low = self.norm("query_norm", x @ tree["query_down"]["kernel"] + self.bias("query_down"))
            queries = np.einsum("tq,qnh->tnh", low, tree["query_up"]["kernel"])
        else:
            queries = np.einsum("td,dnh->tnh", x, tree["query"]["kernel"])
        down = x @ tree["kv_down"]["kernel"] + self.bias("kv_down")
        latent, shared = self.norm("kv_norm", down[:, :-rope_dim]), down[:, -rope_dim:]
        nope = np.einsum("tc,cnp->tnp", latent, tree["key_up"]["kernel"])
        values = np.einsum("tc,cnv->tnv", latent, tree["value_up"]["kernel"])
        heads = np.zeros(values.shape)
        keys = np.concatenate([nope, np.broadcast_to(shared[:, None], (*nope.shape[:2], rope_dim))], -1)
        keys = np.stack([turn(k, t) for t, k in enumerate(keys)])
        for t in range(len(x)):
            for n in range(values.shape[1]):
                heads[t, n] = softmax(keys[: t + 1, n] @ turn(queries[t, n], t) * self.scale) @ values[: t + 1, n]
        return np.einsum("tnv,nvd->td", heads, tree["out"]["kernel"]) + self.bias("out")
