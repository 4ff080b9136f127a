"""The ten meanings of the design: each is shown by a check, and each check fails on planted faults.

The checks are in `suites.py`; here they run over the variants, and `FAULTS` lists small wrong changes to the
package, planted at its seams (what a policy, a codec, a mask, the layout or the choice of implementation
answers), each with the check that must notice.
"""

import dataclasses
import functools
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
from suites import CODECS, IMPLEMENTATIONS, PLAIN, POLICIES, STEPS, Steps, by_id

import kvattn
from kvattn import codecs, masks, policies
from kvattn.attend import api, reference, step, xla
from kvattn.attend import tokens as new_tokens
from kvattn.cache import KVCache, Layout

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_policy = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c.quick else pytest.mark.slow) for c in POLICIES], ids=lambda c: c.id
)
each_codec = pytest.mark.parametrize("case", CODECS, ids=lambda c: c.id)
each_plain = pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.id)


def test_every_variant_has_a_line():
    # KIVI's tokens share their scales: it has no code of one token, and tests of its own in test_codecs.py.
    for registered, cases, elsewhere in (
        (policies.registered(), POLICIES, set()),
        (codecs.registered(), CODECS, {kvattn.KIVI}),
    ):
        known, shown = {entry.kind for entry in registered}, {type(case.make()) for case in cases} | elsewhere
        assert shown == known, f"add examples, or a line to tests/suites.py, for {known - shown or shown - known}"
    assert {"reference", "xla"} <= set(IMPLEMENTATIONS)


# The checks on the real code ------------------------------------------------------------------------------------------


@each_implementation
@each_policy
def test_policy_suite(case, implementation):
    if case.by_position:
        assert sum(suites.check_attendance(case, implementation, seed=seed) for seed in range(6)) >= 1000
        suites.check_oracle(case, implementation)
    for check in suites.POLICY_CHECKS:
        check(case, implementation)


@each_implementation
@pytest.mark.parametrize("case", by_id(POLICIES, "full", "ring5"), ids=lambda c: c.id)
def test_left_padding(case, implementation):
    for seed in range(3):
        suites.check_attendance(case, implementation, padding="left", seed=seed)
    suites.check_oracle(case, implementation, padding="left")
    suites.check_dirty_memory(case, implementation, padding="left")


@each_implementation
@pytest.mark.parametrize("case", by_id(POLICIES, "full", "ring5"), ids=lambda c: c.id)
def test_true_positions(case, implementation):
    suites.check_true_positions(case, implementation)


@each_implementation
def test_rules_of_a_call(implementation):
    case = by_id(POLICIES, "ring6-window2")[0]
    suites.check_oracle(case, implementation, scale=0.5, softcap=1.5, sinks=(0.5, -1.0, 3.0, -np.inf))


@each_implementation
@pytest.mark.parametrize("case", by_id(POLICIES, "full", "ring-short"), ids=lambda c: c.id)
def test_overflow(case, implementation):
    suites.check_overflow(case, implementation)
    suites.check_overflow(case, implementation, length=1)


@each_implementation
def test_ring_wraps_at_every_phase(implementation):
    suites.check_ring_phases(implementation)


@pytest.mark.parametrize(
    "policy, window, implementation",
    [
        (kvattn.SlidingWindow(8), None, "xla"),
        (kvattn.SlidingWindow(8), None, "reference"),
        (kvattn.Full(), 8, "xla"),
        pytest.param(kvattn.Full(), 8, "reference", marks=pytest.mark.slow),
    ],
)
def test_every_chunking(policy, window, implementation):
    suites.check_chunking(policy, window, implementation)


@pytest.mark.slow
@each_implementation
@pytest.mark.parametrize("policy, window", [(kvattn.SlidingWindow(8), None), (kvattn.Full(), 8)], ids=["ring", "full"])
def test_every_chunking_without_padding(policy, window, implementation):
    ways = [[n, suites.PROMPT - n] for n in (1, 2, 7, 8, 9, 15, 16, 17, 33, 96)] + [[8] * 12 + [1], [9] * 10 + [7]]
    suites.check_chunking(policy, window, implementation, ways=ways, padded=False)
    suites.check_chunking(policy, window, implementation, ways=suites.chunkings(seed=1, num_random=200))


@each_implementation
def test_empty_rows(implementation):
    suites.check_empty_rows(implementation)


@each_implementation
def test_logsumexp(implementation):
    suites.check_lse(implementation)


@each_codec
def test_codec_suite(case):
    suites.check_codec(case)


@each_implementation
@each_plain
def test_accuracy(case, implementation):
    suites.check_accuracy(case, implementation)


@each_implementation
@pytest.mark.parametrize("case", by_id(CODECS, "float16"), ids=lambda c: c.id)
def test_scores_beyond_the_storage_dtype(case, implementation):
    suites.check_large_scores(case, implementation)


@pytest.mark.parametrize("case, length", [("full", 1), ("ring5", suites.CHUNK)])
def test_cache_is_a_value(case, length):
    suites.check_explicit(by_id(POLICIES, case)[0], "reference", lengths=(length,))


@pytest.mark.parametrize("case", by_id(POLICIES, "full", "ring5"), ids=lambda c: c.id)
def test_decode_loop_compiles_once(case):
    suites.check_one_trace(case, None)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("policy", [kvattn.Full(), kvattn.SlidingWindow(4096)], ids=["full", "ring"])
def test_compiled_step_works_in_place(policy, dtype):
    suites.check_compiled_memory(policy, dtype, None)


def test_mask_rule():
    assert suites.check_mask_rule() > 2000


@each_implementation
def test_mirror_of_jax_nn(implementation):
    suites.check_mirror_probes(implementation)


# Planted faults -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fault:
    """A wrong change and the check that must fail on it.

    Attributes:
        meaning: number of the meaning in the design.
        name: what is wrong.
        plant: makes the change through `monkeypatch`.
        check: called with a `Steps`.
    """

    meaning: int
    name: str
    plant: Callable
    check: Callable


FAULTS = []
FULL, FULL3, RING5, RING62 = by_id(POLICIES, "full", "full-window3", "ring5", "ring6-window2")
F32, BF16, F16 = PLAIN


def fault(meaning, check, *args, **kwargs):
    """Registers the decorated function, which plants the fault."""

    def register(plant):
        takes_steps = "steps" in check.__code__.co_varnames[: check.__code__.co_argcount]

        def run(steps):
            check(*args, **kwargs, **({"steps": steps} if takes_steps else {}))

        FAULTS.append(Fault(meaning, plant.__name__, plant, run))
        return plant

    return register


def around(patch, owner, name, wrapper):
    """Replaces ``owner.name`` by ``wrapper(original, *args)``."""
    original = getattr(owner, name)
    patch.setattr(owner, name, functools.wraps(original)(lambda *a, **k: wrapper(original, *a, **k)))


def around_attend(patch, wrapper):
    """Replaces every implementation's answer by ``wrapper(attend, request, implementation)``."""
    around(patch, api, "attend", lambda attend, request, implementation=None: wrapper(attend, request, implementation))


# 1. Position: how many tokens came before, for ever.


@fault(1, suites.check_true_positions, RING5, "xla")
def positions_start_again_after_the_ring_wraps(patch):
    def advance(original, cache, num_new, too_many, bad_count):
        new = original(cache, num_new, too_many, bad_count)
        return dataclasses.replace(new, lengths=jnp.minimum(new.lengths, cache.num_slots))

    around(patch, KVCache, "advance", advance)


@fault(1, suites.check_true_positions, RING5, "xla")
def rotation_by_slot_number(patch):
    around(patch, kvattn.RoPE, "__call__", lambda original, rope, x, positions: original(rope, x, positions % 5))


@fault(1, suites.check_attendance, RING5, "xla")
def kept_is_taken_for_seen(patch):
    patch.setattr(kvattn.SlidingWindow, "kept", lambda self, state, lengths, num_slots: lengths)


@fault(1, suites.check_attendance, RING5, "xla")
def slots_tell_their_number_as_position(patch):
    def positions(original, policy, state, lengths, num_slots):
        held = original(policy, state, lengths, num_slots)
        return jnp.where(held < 0, held, held % num_slots)

    around(patch, kvattn.SlidingWindow, "positions", positions)


# 2. A window counts the query's own token; causality goes by position; heads are blocked.


def other_window(patch, change):
    def allowed(original, mask, *args, **kwargs):
        window = mask.window if mask.window is None else change(mask.window, args[0].shape[1])
        return original(dataclasses.replace(mask, window=window), *args, **kwargs)

    around(patch, masks.Mask, "allowed", allowed)


@fault(2, suites.check_attendance, FULL3, "xla")
def window_of_neighbours(patch):
    other_window(patch, lambda window, length: window + 1)


@fault(2, suites.check_mask_rule)
def window_one_too_small(patch):
    other_window(patch, lambda window, length: max(1, window - 1))


@fault(2, suites.check_attendance, FULL3, "reference")
def window_forgotten_when_decoding(patch):
    other_window(patch, lambda window, length: None if length == 1 else window)


@fault(2, suites.check_attendance, RING62, "xla")
def window_of_the_call_ignored(patch):
    patch.setattr(masks.Mask, "narrowed", lambda self, window: self)


@fault(2, suites.check_attendance, FULL, "xla")
def causality_from_the_top_left(patch):
    def attend(original, request, implementation):
        t = jnp.arange(request.positions.shape[1], dtype=jnp.int32)[None]
        positions = jnp.where(request.positions < 0, request.positions, t)
        return original(dataclasses.replace(request, positions=positions), implementation)

    around_attend(patch, attend)


@fault(2, suites.check_attendance, FULL, "reference")
def no_causality_inside_a_chunk(patch):
    def allowed(original, mask, *args, **kwargs):
        return original(masks.Mask(causal=False), *args, **kwargs)

    around(patch, masks.Mask, "allowed", allowed)


@fault(2, suites.check_attendance, FULL3, "xla")
def blocks_at_the_windows_edge_skipped(patch):
    def reachable(original, mask, q_positions, kv_positions):
        window = mask.window if mask.window is None else max(1, mask.window - 1)
        return original(dataclasses.replace(mask, window=window), q_positions, kv_positions)

    around(patch, masks.Mask, "reachable", reachable)


@fault(2, suites.check_attendance, FULL, "xla")
def heads_strided_instead_of_blocked(patch):
    def attend(original, request, implementation):
        heads, kv_heads = request.query.shape[2], request.view.num_kv_heads
        order = np.arange(heads).reshape(-1, kv_heads).T.ravel()
        changed = dataclasses.replace(request, query=request.query[:, :, order])
        out, lse, mass = original(changed, implementation)
        back = np.argsort(order)
        return out[:, :, back], lse[:, :, back], mass

    around_attend(patch, attend)


# 3. Nothing to attend to: 0 and -inf.


def change_results(patch, change):
    def attend(original, request, implementation):
        return (*change(request, *original(request, implementation)[:2]), None)

    around_attend(patch, attend)


@fault(3, suites.check_empty_rows, "xla")
def finite_logsumexp_of_empty_rows(patch):
    change_results(patch, lambda request, out, lse: (out, jnp.maximum(lse, -1e30)))


@fault(3, suites.check_empty_rows, "reference")
def empty_rows_give_a_mean(patch):
    change_results(patch, lambda request, out, lse: (jnp.where(jnp.isneginf(lse)[..., None], 0.125, out), lse))


@fault(3, suites.check_empty_rows, "xla")
def rows_of_pads_not_written(patch):
    def unwritten(request, out, lse):
        return jnp.where((request.positions < 0)[:, :, None, None], jnp.nan, out), lse

    change_results(patch, unwritten)


@fault(3, suites.check_oracle, RING62, "xla", scale=0.6, softcap=1.5, sinks=(0.5, -1.0, 3.0, -np.inf))
def sinks_left_out_of_the_sum(patch):
    patch.setattr(step, "add_sinks", lambda out, lse, sinks: (out, lse))


# 4. What lies in unused memory does not matter.


def masked_by_arithmetic(patch, module, scores=False, values=False):
    """`jnp.where` of one module masks scores by adding -inf, or values by multiplying with 0."""

    def where(condition, a, b):
        if scores and isinstance(b, float) and b == -np.inf and jnp.ndim(a) == 5:
            return a + jnp.where(condition, 0.0, -jnp.inf)
        if values and isinstance(b, int) and b == 0 and jnp.ndim(a) == 4:
            return a * condition.astype(a.dtype)
        return jnp.where(condition, a, b)

    changed = types.SimpleNamespace(**{n: getattr(jnp, n) for n in dir(jnp) if not n.startswith("_")})
    changed.where = where
    patch.setattr(module, "jnp", changed)


@fault(4, suites.check_dirty_memory, FULL, "xla", poisons=("nan",))
def scores_masked_by_adding(patch):
    masked_by_arithmetic(patch, xla, scores=True)


@fault(4, suites.check_dirty_memory, FULL, "xla", poisons=("inf",))
def values_masked_by_multiplying(patch):
    masked_by_arithmetic(patch, codecs.plain, values=True)


@fault(4, suites.check_dirty_memory, FULL, "reference", poisons=("nan",))
def tokens_of_the_reference_masked_by_multiplying(patch):
    masked_by_arithmetic(patch, reference, values=True)


@fault(4, suites.check_dirty_memory, RING5, "xla", poisons=("max",))
def empty_slots_of_the_ring_attended(patch):
    def positions(original, policy, state, lengths, num_slots):
        return jnp.maximum(original(policy, state, lengths, num_slots), 0)

    around(patch, kvattn.SlidingWindow, "positions", positions)


@fault(4, suites.check_codec, F32)
def values_mixed_without_a_select(patch):
    def mix(original, codec, probs, values, filled):
        return original(codec, probs, values, jnp.ones_like(filled))

    around(patch, codecs.Plain, "mix", mix)


# 5. Nothing clamps.


@fault(5, suites.check_overflow, FULL, "xla")
def writes_clamp_to_the_last_slot(patch):
    patch.setattr(kvattn.Full, "fits", lambda self, state, step: step.num_new >= 0)
    around(patch, kvattn.Full, "place", lambda original, *args: jnp.minimum(original(*args), args[-1].num_slots - 1))


@fault(5, suites.check_overflow, FULL, "xla")
def chunks_written_as_far_as_they_fit(patch):
    patch.setattr(kvattn.Full, "fits", lambda self, state, step: step.num_new >= 0)


@fault(5, suites.check_overflow, FULL, "xla")
def overflow_not_recorded(patch):
    around(patch, KVCache, "advance", lambda original, cache, n, fail, bad: original(cache, n, fail & False, bad))


@fault(5, suites.check_overflow, FULL, "xla")
def record_of_overflow_forgotten(patch):
    def advance(original, cache, *args):
        return original(dataclasses.replace(cache, status=jnp.zeros_like(cache.status)), *args)

    around(patch, KVCache, "advance", advance)


@fault(5, suites.check_overflow, FULL, "reference", length=1)
def overflow_outside_jit_not_raised(patch):
    patch.setattr(KVCache, "refuse_overflow", lambda self, fits, num_new: None)


@fault(5, suites.check_overflow, FULL, "xla")
def one_row_over_drops_all_rows(patch):
    around(patch, kvattn.Full, "fits", lambda original, *args: original(*args) & jnp.all(original(*args)))


@fault(5, suites.check_overflow, FULL, "xla")
def capacity_off_by_one(patch):
    def fits(self, state, step):
        return step.lengths + step.num_new < step.num_slots

    patch.setattr(kvattn.Full, "fits", fits)


# 6. float32 softmax; 1/sqrt(H).


def rounded_scores(patch):
    def scores(original, codec, query, *args):
        wide = original(codec, query, *args)
        return wide.astype(query.dtype).astype(wide.dtype)

    around(patch, codecs.Plain, "scores", scores)


@fault(6, suites.check_large_scores, F16, "xla")
def float16_scores(patch):
    rounded_scores(patch)


@fault(6, suites.check_accuracy, BF16, "xla", length=40)
def bfloat16_scores(patch):
    rounded_scores(patch)


@fault(6, suites.check_accuracy, BF16, "xla", length=40)
def scale_of_another_head_dim(patch):
    around_attend(patch, lambda original, r, i: original(dataclasses.replace(r, scale=r.scale / 2**0.5), i))


@fault(6, suites.check_accuracy, BF16, "xla")
def one_token_of_many_left_out(patch):
    def allowed(original, mask, q_positions, kv_positions, **kwargs):
        return original(mask, q_positions, kv_positions, **kwargs) & (kv_positions != 100)[:, :, None]

    around(patch, masks.Mask, "allowed", allowed)


# 7. Chunking does not matter.


@fault(7, suites.check_chunking, kvattn.SlidingWindow(8), None, "xla", ways=[[97], [13] * 7 + [6]])
def ring_written_before_it_is_read(patch):
    """The chunk takes its slots first, and the old tokens are read from what is left of them."""

    def attend(original, request, implementation):
        view = request.view
        written = jnp.sum(request.positions >= 0, axis=1).astype(jnp.int32)
        first = jnp.max(request.positions, axis=1) - written + 1
        if view.layout.num_slots == suites.PROMPT_WINDOW and request.positions.shape[1] > 1:
            # A kept token is gone if a token of the chunk went to its slot.
            kept = view.positions
            gone = (kept >= 0) & (kept + view.layout.num_slots < (first + written)[None, :, None, None])
            view = dataclasses.replace(view, positions=jnp.where(gone, -1, kept))
        return original(dataclasses.replace(request, view=view), implementation)

    around_attend(patch, attend)


@fault(7, suites.check_chunking, kvattn.SlidingWindow(8), None, "xla", ways=[[97], [13] * 7 + [6]])
def long_chunk_keeps_its_first_tokens(patch):
    def place(original, policy, state, step):
        t = jnp.arange(step.num_tokens, dtype=jnp.int32)[None]
        stays = (t < step.num_new[:, None]) & (t < step.num_slots)
        return jnp.where(stays, (step.lengths[:, None] + t) % step.num_slots, -1)

    around(patch, kvattn.SlidingWindow, "place", place)


@fault(7, suites.check_chunking, kvattn.Full(), 8, "xla", ways=[[97], [13] * 7 + [6]])
def cache_and_chunk_averaged(patch):
    def merge(original, out_a, lse_a, out_b, lse_b):
        _, lse = original(out_a, lse_a, out_b, lse_b)
        return (out_a + out_b) / 2, lse

    around(patch, step, "merge_states", merge)


@fault(7, suites.check_oracle, FULL, "xla", padding="left")
def left_padding_taken_for_right(patch):
    for module in (step, new_tokens):
        patch.setattr(module, "rotated_left", lambda x, by: x)


# 8. Neighbours do not matter.


@fault(8, suites.check_neighbours, FULL, "xla")
def a_trace_of_the_neighbours(patch):
    change_results(patch, lambda request, out, lse: (out + 1e-6 * jnp.mean(out, axis=0, keepdims=True), lse))


@fault(8, suites.check_neighbours, FULL, "xla")
def nan_of_a_neighbour(patch):
    def leak(request, out, lse):
        return out + jnp.where(jnp.any(jnp.isnan(out)), jnp.nan, 0.0), lse

    change_results(patch, leak)


@fault(8, suites.check_neighbours, RING5, "xla")
def rows_written_at_the_first_rows_slots(patch):
    def write(original, layout, blocks, slots, x, transposed):
        return original(layout, blocks, jnp.broadcast_to(slots[1:2], slots.shape), x, transposed)

    around(patch, Layout, "write", write)


# 9. The cache is an argument and a result.


@fault(9, suites.check_explicit, FULL, "reference", lengths=(1,))
def the_given_cache_is_changed(patch):
    given = []

    def remember(original, cache, *args):
        given.append(cache)
        return original(cache, *args)

    def advance(original, cache, *args):
        new = original(cache, *args)
        for old in given:
            object.__setattr__(old, "lengths", new.lengths)
        return new

    around(patch, KVCache, "refuse_overflow", remember)
    around(patch, KVCache, "advance", advance)


@fault(9, suites.check_explicit, FULL, "reference", lengths=(1,))
def something_is_remembered_between_calls(patch):
    last = []

    def attend(original, request, implementation):
        out, lse, mass = original(request, implementation)
        last.append(out)
        return out + (0 if len(last) == 1 else 1e-3 * jnp.mean(last[-2])), lse, mass

    around_attend(patch, attend)


# 10. One compilation, in place.


@fault(10, suites.check_one_trace, FULL, "xla", num_steps=200)
def a_dtype_drifts(patch):
    def advance(original, cache, *args):
        new = original(cache, *args)
        return dataclasses.replace(new, status=new.status.astype(jnp.int16))

    around(patch, KVCache, "advance", advance)


@fault(10, suites.check_one_trace, FULL, "xla", num_steps=200)
def nothing_donated(patch):
    patch.setattr(kvattn, "jit", jax.jit)


@fault(10, suites.check_compiled_memory, kvattn.Full(), jnp.bfloat16, "xla")
def whole_cache_computed_anew(patch):
    def view(original, cache, *positions, **held):
        view = original(cache, *positions)
        return dataclasses.replace(view, keys={n: jnp.tanh(x) for n, x in view.keys.items()})

    around(patch, KVCache, "view", view)


@fault(10, suites.check_compiled_memory, kvattn.Full(), jnp.bfloat16, "xla")
def cache_rebuilt_instead_of_updated(patch):
    def write(original, layout, blocks, *args):
        return jnp.roll(original(layout, jnp.roll(blocks, 1, axis=0), *args), -1, axis=0)

    around(patch, Layout, "write", write)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.meaning}-{f.name}")
def test_planted_fault(fault, monkeypatch):
    fault.check(STEPS)
    fault.plant(monkeypatch)
    with pytest.raises(AssertionError):
        fault.check(Steps(optimized=False))


def test_every_meaning_has_a_fault():
    assert {f.meaning for f in FAULTS} == set(range(1, 11))


@pytest.mark.parametrize("implementation", suites.IMPLEMENTATIONS)
def test_a_page_that_a_window_has_left_may_be_anothers(implementation):
    """Its new owner's NaN changes no bit of the row whose table names it still, nor of its gradient."""
    tokens = np.random.default_rng(0).normal(size=(3, 2, 12, 1, 8)).astype(np.float32)

    @jax.jit
    def step(new, cache, num_new):
        return kvattn.cached_attention(*new, cache, num_new=num_new, window=3, implementation=implementation)

    def run(poison):
        cache = kvattn.PagedKVCache.create(6, 4, 1, 8, batch_size=2, max_pages=4, dtype=jnp.float32)
        cache = cache.with_tables([[0, 1, 2, 5], [3, -1, -1, -1]], [0, 0])
        _, cache = step(tuple(tokens[:, :, :10]), cache, np.array([10, 2]))
        cache = cache.with_tables([[0, 1, 2, 5], [3, 0, -1, -1]], [10, 2])
        chunk = tokens[:, :, :4].copy()
        chunk[:, 1] = np.where(poison, np.nan, chunk[:, 1])
        _, cache = step(tuple(chunk), cache, np.array([0, 4]))
        last = lambda query: step((query, *tokens[1:, :, 11:]), cache, np.array([1, 0]))[0][0]
        return last(tokens[0, :, 11:]), jax.grad(lambda query: jnp.sum(last(query) ** 2))(tokens[0, :, 11:])[0]

    for clean, dirty in zip(run(False), run(True), strict=True):
        assert np.isfinite(clean).all()
        suites.assert_same_bits(clean, dirty)


@pytest.mark.parametrize("implementation", suites.IMPLEMENTATIONS)
@pytest.mark.parametrize("worst", [np.nan, np.inf, -np.inf])
def test_position_decides_whom_a_bad_value_reaches(implementation, worst):
    """A value that is not finite reaches the queries that may attend to it, feature by feature, and no others.

    Weights of what is hidden are 0, but 0 times NaN is NaN: within a chunk before the token, after it left the window.
    """
    rng, window, length = np.random.default_rng(0), 3, 8
    query, key, value = (rng.normal(size=(2, length, n, 8)).astype(np.float32) for n in (4, 2, 2))
    bad = value.copy()
    bad[0, 1, 1, 5] = bad[0, 5, 1, 2] = worst

    @jax.jit
    def run(value):
        cache = kvattn.KVCache.create(2, 2, 8, capacity=8, dtype=jnp.float32, layout=Layout(8, 4, True))
        outs = []
        for first, end in ((0, 4), (4, 7), (7, 8)):
            new = (x[:, first:end] for x in (query, key, value))
            out, cache = kvattn.cached_attention(*new, cache, window=window, implementation=implementation)
            outs.append(out)
        return jnp.concatenate(outs, axis=1)

    expected = np.array(run(value))
    for at, feature in ((1, 5), (5, 2)):
        expected[0, at : at + window, 2:, feature] = worst  # the query heads of that key/value head
    np.testing.assert_allclose(np.asarray(run(bad)), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_an_earlier_query_is_finite_beside_a_bad_value():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(1, 4, 2, 8)), jnp.float32) for _ in range(3))
    cache = kvattn.KVCache.create(1, 2, 8, capacity=4, dtype=jnp.float32)
    first = lambda query, value: jnp.sum(kvattn.cached_attention(query, key, value, cache)[0][:, :2] ** 2)
    clean, dirty = (jax.jit(jax.grad(first))(query, v)[:, :3] for v in (value, value.at[:, 3].set(jnp.nan)))
    suites.assert_same_bits(clean, dirty)
