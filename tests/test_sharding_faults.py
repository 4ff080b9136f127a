"""Small wrong changes, each of which the checks of the other files must catch."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sharding
import test_sharding_pipeline
from sharding_cases import GQA, MQA, check_equal

import kvattn
from kvattn.cache.axes import along
from kvattn.sharding import attention, batch, heads, sequence, split

Share = sequence.Share


def plain_mean(self, out, lse):
    """Every device counts alike, however much it attended to."""
    return jax.lax.pmean(out, self.axis), jax.lax.pmax(lse, self.axis)


def own_maximum(self, out, lse):
    """Each device subtracts its own maximum: the weights are lost."""
    weight = jnp.where(jnp.isneginf(lse), 0.0, 1.0)
    total = jnp.maximum(jax.lax.psum(weight, self.axis), 1)
    return jax.lax.psum(out * weight[..., None], self.axis) / total[..., None], jax.lax.pmax(lse, self.axis)


def to_the_next(self, cache, slots, key, value, implementation="xla"):
    """Tokens go to the device behind the one whose slots they are."""
    rows = cache.layout.rows
    return WRITE(self, cache, jnp.where(slots < 0, -1, (slots + rows // self.size) % rows), key, value, implementation)


def gathered_backwards(self, cache, tree):
    return jax.tree.map(lambda x: x[:, :, ::-1], ALL_SLOTS(self, cache, tree))


def tiled(cache, copies):
    """Copies behind each other, not beside each other."""
    return along("heads", lambda x, axis: jnp.concatenate([x] * copies, axis=axis), cache, cache.axes)


def tiled_tokens(self, x, copies):
    return x if x is None or copies == 1 else jnp.concatenate([x] * copies, axis=2)


def without_offset(step, axes):
    return step


def view_of_all_pages(self, cache):
    return cache.view() if isinstance(cache, kvattn.PagedKVCache) else VIEW(self, cache)


def marked_by_one(self, cache, slots, key, value, implementation="xla"):
    """The status is that of the tokens which are stored here."""
    after = WRITE(self, cache, slots, key, value, implementation)
    here = jax.lax.axis_index(self.axis) == 0
    return after.replace(status=jnp.where(here, after.status, cache.status))


WRITE, VIEW, ALL_SLOTS = Share.write, Share.view, Share.all_slots
WHOLE_CHUNK = lambda self, key, value, positions: (key, value, positions)

FAULTS = {
    "every device counts alike": (Share, "joined", plain_mean, check_equal, ("full", GQA, "sequence", "auto", 1)),
    "own maxima": (Share, "joined", own_maximum, check_equal, ("full", GQA, "sequence", "auto", 1)),
    "the next device": (Share, "write", to_the_next, check_equal, ("full", GQA, "sequence", "auto", 1)),
    "all read the whole chunk": (Share, "of_chunk", WHOLE_CHUNK, check_equal, ("full", GQA, "sequence", "auto", 1)),
    "attention of other slots": (
        Share,
        "all_slots",
        gathered_backwards,
        check_equal,
        ("h2o", GQA, "sequence", "auto", 4),
    ),
    "copies decide alone": (
        heads.SomeOfGroup,
        "of_group",
        lambda self, tree: tree,
        check_equal,
        ("h2o", GQA, "heads", "auto", 4),
    ),
    "copies of the wrong head": (
        heads.Heads,
        "with_copies",
        tiled_tokens,
        check_equal,
        ("full", GQA, "heads", "auto", 1),
    ),
    "rows of another device": (
        split.Split,
        "rows",
        property(lambda self: (self.axis, self.data)),
        check_equal,
        ("window", MQA, "batch", "auto", 1, (2, 4)),
    ),
    "pages of the pool's beginning": (
        batch,
        "with_own_pages",
        without_offset,
        test_sharding.check_pages,
        ("batch", MQA, "auto", (8,), {}),
    ),
    "pages of nobody": (
        Share,
        "view",
        view_of_all_pages,
        test_sharding.check_pages,
        ("sequence", GQA, "auto", (8,), {}),
    ),
    "marked by one device": (
        Share,
        "write",
        marked_by_one,
        test_sharding.test_a_token_that_cannot_be_encoded_is_marked_once,
        (),
    ),
    "a microbatch too early": (
        sys.modules["kvattn.sharding.pipeline"],  # the package has the function by that name
        "_at",
        lambda x, number, microbatch: x[number, jnp.maximum(microbatch - 1, 0)],
        test_sharding_pipeline.check,
        ("full", "auto", 4),
    ),
}
QUICK = ("own maxima",)


def caught(name, monkeypatch):
    owner, attribute, fault, check, arguments = FAULTS[name]
    monkeypatch.setattr(owner, attribute, fault)
    attention._run.clear_cache()
    try:
        with pytest.raises(AssertionError):
            check(*arguments)
    finally:
        attention._run.clear_cache()


@pytest.mark.parametrize("name", QUICK)
def test_caught(name, monkeypatch):
    caught(name, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAULTS if name not in QUICK])
def test_caught_too(name, monkeypatch):
    caught(name, monkeypatch)


def test_copies_lie_beside_each_other(monkeypatch):
    cache = kvattn.KVCache.create(2, 2, 4, capacity=4, dtype=jnp.float32)
    new = [jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).normal(size=(2, 2, 3, 2, 4))]
    cache = cache.write(jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32), (2, 3)), *new)
    for copies, right in ((heads.repeated, True), (tiled, False)):
        for stored, given in zip(copies(cache, 2).dense(), new, strict=True):
            expected = np.repeat(np.asarray(given), 2, axis=2).swapaxes(1, 2)
            assert (np.asarray(stored)[:, :, :3] == expected).all() == right
