"""A decoder in float64 NumPy, one sequence and one token at a time, whose caches are lists of tokens.

It goes by `DecoderConfig` and reads the parameters of a `Decoder`, and shares nothing else with it.
"""

import math

import numpy as np
from flax import nnx
from policy_oracles import softmax
from scipy.special import erf

import kvattn
from kvattn.models.parameters import parameters_of

ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


def rotated(rope, x, position):
    """[heads, H] turned to one position."""
    if rope is None:
        return x
    half = rope.num_pairs
    angle = position * rope.inv_freq
    cos, sin = np.cos(angle) * rope.attention_factor, np.sin(angle) * rope.attention_factor
    turned, rest = x[:, : 2 * half], x[:, 2 * half :]
    a, b = (turned[:, 0::2], turned[:, 1::2]) if rope.interleaved else (turned[:, :half], turned[:, half:])
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = np.stack([a, b], -1).reshape(turned.shape) if rope.interleaved else np.concatenate([a, b], -1)
    return np.concatenate([turned, rest], -1)


def int8(x):
    """What is left of [K, H] after a scale per head."""
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.round(x / np.where(scale == 0, 1, scale)) * scale


def routed(config, scores, added):
    """Which experts a token is given to, and by which weights: groups, then experts, in lists."""
    scores = softmax(scores) if config.expert_scores == "softmax" else 1 / (1 + np.exp(-scores))
    ranked, size = scores + added, config.num_experts // config.expert_groups
    groups = [list(range(first, first + size)) for first in range(0, config.num_experts, size)]
    groups.sort(key=lambda group: -sum(sorted(ranked[group])[-config.group_best :]))
    open_ones = [e for group in groups[: config.groups_per_token] for e in group]
    best = sorted(open_ones, key=lambda e: -ranked[e])[: config.experts_per_token]
    shares = scores[best] if config.expert_shares == "all" else scores[best] / scores[best].sum()
    return best, shares * config.expert_scale


class Layer:
    """One block with its list of tokens, per key/value head; or with that of an earlier layer, its owner."""

    def __init__(self, config, parameters, index, policy, codec, owner=None):
        self.owner = self if owner is None else owner
        self.kv_heads, self.size = config.layer_kv_heads[index], config.layer_head_dims[index]
        self.config, self.policy, self.codec, self.index = config, policy, codec, index
        start = f"layers.{index}."
        self.w = {name.removeprefix(start): x for name, x in parameters.items() if name.startswith(start)}
        self.rope, self.window, self.chunk = (
            config.rope_of(index), config.layer_windows[index], config.layer_chunks[index],
        )  # fmt: skip
        scale = config.layer_scales[index]
        size = config.qk_nope_head_dim + config.qk_rope_head_dim if config.is_latent else self.size
        self.scale = size**-0.5 if scale is None else scale
        self.slopes = None
        if config.positions == "alibi":
            self.slopes = config.alibi_slopes or np.asarray(kvattn.alibi_slopes(config.num_heads), np.float64)
        self.keys, self.values = {}, {}
        self.tokens = [[] for _ in range(self.kv_heads)]
        self.score = [{} for _ in range(self.kv_heads)]

    def norm(self, name, x):
        c = self.config
        if c.norm == "layer":
            x = x - x.mean()
        x = x / np.sqrt((x**2).mean() + c.norm_epsilon) * self.w[f"{name}.scale"]
        return x + self.w[f"{name}.bias"] if c.norm_bias else x

    def linear(self, name, x):
        y = np.tensordot(x, self.w[f"{name}.kernel"], axes=x.ndim)
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def mlp(self, x, before):
        c = self.config
        if not c.has_experts(self.index):
            return self.dense("mlp", x)
        if not c.experts_beside:
            return self.experts(x, x)
        y = self.norm("mlp.experts_post_norm", self.experts(self.norm("mlp.experts_norm", before), before))
        return y + self.norm("mlp.beside_norm", self.dense("mlp.beside", x))

    def experts(self, x, seen):
        c = self.config
        if c.router_scales:
            seen = seen / np.sqrt((seen**2).mean() + c.norm_epsilon) * self.w["mlp.router_scale"] / len(seen) ** 0.5
        best, shares = routed(c, self.linear("mlp.router", seen), self.w.get("mlp.score_bias", 0))
        if c.router_scales:
            shares = shares * self.w["mlp.expert_scale"][best]
        y = 0
        if c.shared_expert_dim:
            y = self.dense("mlp.shared", x)
            if c.shared_expert_gate:
                y = y / (1 + np.exp(-self.linear("mlp.shared_gate", x)))
        for share, e in zip(shares, best, strict=True):
            if c.expert_weighs == "input":
                given = share * x
                hidden = ACTIVATIONS[c.activation](given @ self.w["mlp.gate"][e]) * (given @ self.w["mlp.up"][e])
                y = y + hidden @ self.w["mlp.down"][e]
                continue
            if c.expert_kind == "gated":
                hidden = ACTIVATIONS[c.activation](x @ self.w["mlp.gate"][e]) * (x @ self.w["mlp.up"][e])
                y = y + share * (hidden @ self.w["mlp.down"][e])
                continue
            gate = np.minimum(x @ self.w["mlp.gate"][e] + self.w["mlp.gate_bias"][e], c.expert_limit)
            up = np.clip(x @ self.w["mlp.up"][e] + self.w["mlp.up_bias"][e], -c.expert_limit, c.expert_limit)
            hidden = (up + 1) * gate / (1 + np.exp(-c.expert_alpha * gate))
            y = y + share * (hidden @ self.w["mlp.down"][e] + self.w["mlp.down_bias"][e])
        return y

    def dense(self, name, x):
        up, act = self.linear(f"{name}.up", x), ACTIVATIONS[self.config.activation]
        return self.linear(f"{name}.down", act(self.linear(f"{name}.gate", x)) * up if self.config.gated else act(up))

    def head_norm(self, name, x):
        """Of queries or keys [heads, H]: one head at a time, or all together."""
        c = self.config
        axes = (0, 1) if c.qk_norm_heads == "joint" else (1,)
        if c.norm == "layer":
            x = x - x.mean(axes, keepdims=True)
        scale = 1 if c.qk_norm_heads == "unscaled" else self.w[f"attention.{name}.scale"]
        return x / np.sqrt((x**2).mean(axes, keepdims=True) + c.norm_epsilon) * scale

    def latent_norm(self, name, x):
        return x / np.sqrt((x**2).mean() + self.config.latent_norm_epsilon) * self.w[f"attention.{name}.scale"]

    def latents(self, x, t):
        """Queries [N, P + R]; of the token, one key [1, C + R]: its latent, and what the keys of all heads share."""
        c = self.config
        if c.q_lora_rank is None:
            q = self.linear("attention.query", x)
        else:
            low = self.latent_norm("query_norm", self.linear("attention.query_down", x))
            q = self.linear("attention.query_up", low)
        down = self.linear("attention.kv_down", x)
        latent, shared = self.latent_norm("kv_norm", down[: c.kv_lora_rank]), down[c.kv_lora_rank :]
        if self.codec:
            shared = rotated(self.rope_at(t), shared[None], t)[0]
        key = np.concatenate([latent, shared])[None]
        self.keys[t] = int8(key) if self.codec else key
        return q

    def queries(self, x, t):
        """Queries [N, H] of a token, whose key and value are kept where the layer has its own."""
        c = self.config
        if c.is_latent:
            return self.latents(x, t)
        q = self.clipped(self.linear("attention.query", x))
        q = self.head_norm("query_ln", q) if c.has_qk_norm(self.index) else q
        if c.temperature and self.rope is None:
            floor, scale = c.temperature
            q = q * (1 + scale * np.log(1 + (t + 1) // floor))
        if self.owner is self:
            self.keep(x, t)
        return q

    def value(self, n, head, token):
        """Of a token, as query head n sees it."""
        if self.config.is_latent:
            return self.keys[token][0, : self.config.kv_lora_rank] @ self.w["attention.value_up.kernel"][:, n]
        return self.owner.values[token][head]

    def attention(self, x, t):
        c, group, owner = self.config, self.config.num_heads // self.kv_heads, self.owner
        q = self.queries(x, t)
        out = np.zeros((c.num_heads, c.v_head_dim or self.size))
        for head, tokens in enumerate(owner.tokens):
            if owner is self:
                tokens.append(t)
            places = self.places(tokens, t)
            near = [i for i, p in enumerate(places) if self.window is None or places[-1] - p < self.window]
            near = [i for i in near if self.chunk is None or places[i] // self.chunk == t // self.chunk]
            mass = np.zeros(len(tokens))
            for n in range(head * group, (head + 1) * group):
                scores = np.array([self.product(q[n], n, head, tokens, places, i, t) for i in near]) * self.scale
                if c.softcap:
                    scores = np.tanh(scores / c.softcap) * c.softcap
                if self.slopes is not None:
                    scores = scores + self.slopes[n] * (np.array(places)[near] - places[-1])
                if c.sinks:
                    scores = np.append(scores, self.w["attention.sinks"][n])
                probs = softmax(scores)[: len(near)]
                out[n] = sum(p * self.value(n, head, tokens[i]) for p, i in zip(probs, near, strict=True))
                mass[near] += probs / group
            if owner is self:  # what other layers' queries attend to is of no account
                self.forget(head, t, mass)
        if c.output_gate:
            gate = 1 / (1 + np.exp(-self.linear("attention.gate", x)))
            out = out * gate.reshape(c.num_heads, -1)
        return self.linear("attention.out", out)

    def keep(self, x, t):
        """Keys and values of a token."""
        c = self.config
        k = v = self.clipped(self.linear("attention.key", x))
        if not c.layer_values_from_keys[self.index]:
            v = self.clipped(self.linear("attention.value", x))
        k = self.head_norm("key_ln", k) if c.has_qk_norm(self.index) else k
        v = v / np.sqrt((v**2).mean(-1, keepdims=True) + c.norm_epsilon) if c.value_norm else v
        self.keys[t], self.values[t] = k, v
        if self.codec:
            self.keys[t], self.values[t] = int8(rotated(self.rope_at(t), k, t)), int8(v)

    def clipped(self, y):
        limit = self.config.qkv_clip
        return np.clip(y, -limit, limit) if limit else y

    def product(self, query, n, head, tokens, places, i, t):
        """Of a query at position t, seen at the last of the places, and key i, at its own."""
        at, came = places[-1], places[i]
        if self.rope is not None and self.rope.depends_on_length and isinstance(self.policy, kvattn.StreamingLLM):
            # A key has the frequencies of the length it came at, and a query, but to the sinks, those of its own.
            came, at = tokens[i], at if tokens[i] < self.policy.num_sinks else t
        key, score = self.owner.keys[tokens[i]][head], 0.0
        if self.config.is_latent:
            plain, rank = self.config.qk_nope_head_dim, self.config.kv_lora_rank
            score = query[:plain] @ (key[:rank] @ self.w["attention.key_up.kernel"][:, n])
            query, key = query[plain:], key[rank:]
        query = rotated(self.rope_at(at), query[None], at)[0]
        return score + query @ (key if self.codec else rotated(self.rope_at(came), key[None], came)[0])

    def rope_at(self, position):
        """The frequencies of a row whose last token is at this position."""
        return None if self.rope is None else self.rope.for_length(position + 1)

    def places(self, tokens, t):
        """Where positions are counted; StreamingLLM lets go before it attends."""
        if isinstance(self.policy, kvattn.StreamingLLM):
            p = self.policy
            tokens[:] = [j for j in tokens if j < p.num_sinks or j > t - p.window]
            return list(range(len(tokens))) if p.positions_in == "cache" else list(tokens)
        return list(tokens)

    def forget(self, head, t, mass):
        """H2O lets go afterwards."""
        if not isinstance(self.policy, kvattn.H2O):
            return
        tokens, score, p = self.tokens[head], self.score[head], self.policy
        for j, m in zip(tokens, mass, strict=True):
            score[j] = score.get(j, 0.0) + m
        if len(tokens) > p.num_heavy + p.num_recent:
            tokens.remove(min((j for j in tokens if j <= t - p.num_recent), key=lambda j: (score[j], j)))

    def __call__(self, x, t, embedded=None):
        c, plain, scale = self.config, self.config.norm_position in ("post", "output"), self.config.residual_scale or 1
        inner = x if plain else self.norm("attention_norm", x)
        y = self.attention(inner, t)
        if c.parallel:
            return x + scale * (y + self.mlp(inner if c.shared_norm else self.norm("mlp_norm", x), x))
        for name, function in (("attention", None), ("mlp", self.mlp)):
            if function is not None:
                inner = x if plain else self.norm("mlp_norm", x)
                y = function(inner, x)
            if c.norm_position in ("sandwich", "output"):
                y = self.norm(f"{name}_post_norm", y)
            x = (inner if c.residual_after_norm else x) + scale * y
            if c.norm_position == "post":
                x = self.norm(f"{name}_norm", x)
        if embedded is not None:
            gate = ACTIVATIONS[c.activation](self.linear("own_embedding.gate", x))
            x = x + self.norm("own_embedding.norm", self.linear("own_embedding.out", gate * embedded))
        return x * self.w["scale"] if c.layer_scale else x


def logits_of(model: nnx.Module, tokens, policy=None, codec=None):
    """Logits [T, V] of one sequence, token by token, and the layers with the tokens they kept."""
    config = model.config
    parameters = {name: np.asarray(x, np.float64) for name, x in parameters_of(model).items()}
    layers = []
    for i, source in enumerate(config.layer_sources):
        layers.append(Layer(config, parameters, i, policy, codec, None if source == i else layers[source]))
    outer = Layer.__new__(Layer)
    outer.config, outer.w = config, parameters
    table, rows = parameters["embed.embedding"], []
    for t, token in enumerate(tokens):
        x = table[token] * (config.embedding_scale or 1)
        if config.embedding_dim is not None:
            x = x @ parameters["embed_in.kernel"]
        if config.positions == "learned":
            x = x + parameters["positions.embedding"][t]
        if config.embedding_norm:
            x = outer.norm("embed_norm", x)
        own = [None] * len(layers)
        if size := config.per_layer_dim:
            own = (x @ parameters["own_embeddings.projection.kernel"] / config.model_dim**0.5).reshape(-1, size)
            own = [outer.norm("own_embeddings.norm", row) for row in own]
            own = np.stack(own) + parameters["own_embeddings.table.embedding"][token].reshape(-1, size) * size**0.5
            own = own / 2**0.5
        for layer, embedded in zip(layers, own, strict=True):
            x = layer(x, t, embedded)
        if config.final_norm:
            x = outer.norm("norm", x)
        if config.embedding_dim is not None:
            x = x @ parameters["embed_out.kernel"]
        row = x @ (table.T if config.tie_embeddings else parameters["head.kernel"])
        row = row * (config.logit_scale or 1)
        cap = config.logit_softcap
        rows.append(np.tanh(row / cap) * cap if cap else row)
    return np.stack(rows), layers
