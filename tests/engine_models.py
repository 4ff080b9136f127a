"""An engine's device without a model: pages hold tokens, and the next token is a number made of all that a row reads.

What is read goes through tables and pages like keys and values, so a page that is freed too early, shared and written
to, not copied or filled twice changes what comes out. `continued` says what should.
"""

import zlib

import numpy as np

from kvattn.models import Decoder, DecoderConfig
from kvattn.serving import engine
from kvattn.serving.device import AT_ONCE, Came, Candidates, Device

V = 50
POISON = -7
UNSOUND = 49
"""A token after which there are no logits."""


def scores_after(tokens, stream=0):
    """One number per next token, from all tokens before it."""
    seed = zlib.crc32(np.asarray(tokens, np.int32).tobytes() + bytes([stream % 251]))
    return np.random.default_rng(seed).random(V).astype(np.float32) * (np.arange(V) != UNSOUND) + 1e-6


def next_token(tokens, stream=0):
    """What the device chooses: cheaper than `scores_after`."""
    return zlib.crc32(np.asarray(tokens, np.int32).tobytes() + bytes([stream % 251])) % UNSOUND


def repeating(tokens, stream=0):
    """A text that repeats itself, for guesses: mostly what came eight tokens before."""
    return next_token(tokens, stream) if len(tokens) % 11 == 0 or len(tokens) < 8 else int(tokens[-8])


def continued(prompt, count, stream=0, stop=(), next_token=next_token):
    """The oracle."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, stream))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


class TextDevice(Device):
    """`Device` over pages of tokens."""

    fails = None  # called before everything it does
    next_token = staticmethod(next_token)

    def restart(self, cache):
        super().restart(cache)
        self.memory = [np.full((group.num_pages, group.page_size), POISON, np.int64) for group in self.groups]
        self.lengths = np.zeros((self.num_rows,), int)
        self.new = np.full((self.num_rows,), -1, int)
        self.running = np.zeros((self.num_rows,), bool)
        self.drawn = np.zeros((self.num_rows,), int)
        self.read_tokens = self.steps = self.accepted = self.restored = self.read_together = 0

    def _happens(self, what):
        if self.fails is not None:
            self.fails(what)

    def _text(self, tables, row, length):
        """What a row reads: of every group what its window shows; they must agree."""
        texts = []
        for group, memory, table in zip(self.groups, self.memory, tables, strict=True):
            size = group.page_size
            window = group.policy.mask().window if group.policy.in_order else None
            slots = length if group.policy.in_order else 0
            first = 0 if window is None else max(length - window, 0)
            pages = table[row]
            text = [
                memory[pages[t // size], t % size] if pages[t // size] >= 0 else POISON for t in range(first, slots)
            ]
            texts.append((first, text))
        return texts

    def _next(self, tables, row, length, stream):
        """The next token, from all groups; those with windows are held to the first."""
        (_, text), *others = self._text(tables, row, length)
        for first, part in others:
            assert part == text[first:], (part, text[first:])
        assert POISON not in text
        return text, self.next_token(text, stream)

    def _write(self, tables, row, at, tokens):
        for group, memory, table in zip(self.groups, self.memory, tables, strict=True):
            for i, token in enumerate(tokens, at):
                page = table[row][i // group.page_size]
                assert page >= 0, (row, i, table[row])
                memory[page, i % group.page_size] = token

    def _choose(self, tables, row, forced):
        stream = int(self._settings.sampler.stream[row]) if self._settings.sampler.temperature[row] > 0 else 0
        token = self._next(tables, row, self.lengths[row], stream)[1]
        token = forced if forced >= 0 else token
        if UNSOUND in self._text(tables, row, self.lengths[row])[0][1]:
            token = -2
        self.new[row], self.drawn[row] = token, self.drawn[row] + 1
        if token < 0:
            self.running[row] = False
            return
        words = self._settings.stop[row]
        is_stop = bool(words[token // 32] >> (token % 32) & 1)
        self.running[row] = not is_stop and self.drawn[row] < self._settings.limit[row]

    def _came(self, rows):
        new = np.full((self.num_rows,), -1, np.int32)
        new[rows] = self.new[rows]
        return Came(new, np.zeros((self.num_rows,), np.float32), np.zeros((self.num_rows,), np.int32))

    def copy(self, copies):
        self._happens("copy")
        for g, memory in enumerate(self.memory):
            pairs = [pair for each in copies for pair in each[g]]
            assert len({target for _, target in pairs}) == len(pairs)
            before = memory.copy()
            for source, target in pairs:
                memory[target] = before[source]

    def step(self, tables, held, goes, forced, shared=None):
        self._happens("step")
        for table, levels in zip(tables, shared or (), strict=shared is not None):
            for members, begin, end in (span for level in levels or () for span in zip(*level, strict=True)):
                rows = [row for row in members if row >= 0]
                assert set(rows) <= set(goes)
                assert all((table[row][begin:end] == table[rows[0]][begin:end]).all() for row in rows)
                assert all(end * self.groups[0].page_size <= self.lengths[row] for row in rows)
                self.read_together += len(rows) > 1
        rows = [row for row in goes if self.running[row]]
        assert set(goes) <= set(held) and len(set(held)) == len(held)
        for row in rows:
            self._write(tables, row, self.lengths[row], [self.new[row]])
            self.lengths[row] += 1
        for row in rows:
            self._choose(tables, row, forced.get(row, -1))
        self.steps += 1
        return self._came(rows)

    def verify(self, tables, held, goes, guesses, most):
        self._happens("verify")
        new = np.full((self.num_rows, most + 1), -1, np.int32)
        rows = [row for row in goes if self.running[row]]
        for row in rows:
            guess = guesses.get(row, [])
            assert len(guess) <= most
            self._write(tables, row, self.lengths[row], [self.new[row], *guess])
        for row in rows:
            for i, guess in enumerate([*guesses.get(row, []), None]):
                self.lengths[row] += 1
                self._choose(tables, row, -1)
                new[row, i] = self.new[row]
                self.accepted += i > 0
                if self.new[row] != guess or not self.running[row]:
                    break
        self.steps += 1
        return Came(new, np.zeros(new.shape, np.float32), np.zeros((self.num_rows,), np.int32))

    def read(self, tables, pieces):
        self._happens("read")
        of_piece = list(zip(pieces.tokens, pieces.num_new, pieces.lengths, strict=True))
        for i, (tokens, count, length) in enumerate(of_piece):
            self._write(tables, i, length, tokens[:count])
            self.read_tokens += int(count)
        chosen = []
        for row in range(self.num_rows):
            i = pieces.source[row]
            if i < 0:
                continue
            self.lengths[row] = pieces.lengths[i] + pieces.num_new[i]
            if pieces.ends[row]:
                self.drawn[row] = pieces.drawn[row]
                where = [np.repeat(table[i][None], self.num_rows, axis=0) for table in tables]
                self._choose(where, row, pieces.forced[row])
                chosen.append(row)
        return self._came(chosen)

    def grow(self, tables, held, given, count):
        self._happens("grow")
        tokens = np.zeros((self.num_rows, count), np.int32)
        logprobs = np.zeros((self.num_rows, count), np.float32)
        for row, token in given.items():
            self._write(tables, row, self.lengths[row], [token])
            self.lengths[row] += 1
        for row in given:
            text = self._next(tables, row, self.lengths[row], 0)[0]
            scores = np.log(scores_after(text))
            best = np.argsort(-scores, kind="stable")[:count]
            tokens[row], logprobs[row] = best, scores[best]
        return Candidates(tokens, logprobs, np.zeros((self.num_rows,), np.int32))

    def arrays(self):
        return {f"{g}.tokens": ("offsets", (group.page_size,), "int64", g) for g, group in enumerate(self.groups)}

    def fetch(self, pages):
        self._happens("fetch")
        found = []
        for start in range(0, len(pages[0]), AT_ONCE):
            part = {}
            for g, column in enumerate(pages):
                some = [*column[start : start + AT_ONCE], *[0] * AT_ONCE][:AT_ONCE]
                part[f"{g}.tokens"] = self.memory[g][np.maximum(some, 0)].copy()
            found.append(part)
        return found

    def restore(self, pages, held):
        self._happens("restore")
        for i, page in enumerate(held):
            for g, column in enumerate(pages):
                if f"{g}.tokens" in page and column[i] >= 0:
                    self.memory[g][column[i]] = page[f"{g}.tokens"]
                    self.restored += 1

    def move(self, source):
        self._happens("move")
        before = self.lengths.copy()
        for row, other in source.items():
            self.lengths[row] = before[other]


def model(**settings):
    """A model that nobody computes."""
    from flax import nnx

    sizes = dict(vocab_size=V, model_dim=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, mlp_dim=2)
    return Decoder(DecoderConfig(**{**sizes, **settings}), rngs=nnx.Rngs(0))


def text_engine(monkeypatch, model, **settings):
    """An engine whose device holds text."""
    monkeypatch.setattr(engine, "Device", TextDevice)
    settings = {"num_pages": 40, "page_size": 4, "max_length": 64, "max_batch": 4, "prefill_chunk": 16, **settings}
    return engine.Engine(model, **settings)


def check(engine):
    """Counts everything anew; and what is found as a prefix lies in its pages, in every group that has them."""
    engine._scheduler.check()
    memory = engine._device.memory
    tree = engine._scheduler.pool.tree
    for leaving in tree.leaves() if tree is not None else ():
        text = np.frombuffer(leaving.text, np.int32).reshape(-1, engine.page_size)[-len(leaving.pages) :]
        for tokens, page in zip(text, leaving.pages, strict=True):
            for g, number in enumerate(page if isinstance(page, tuple) else (page,)):
                assert number < 0 or memory[g][number].tolist() == tokens.tolist()
