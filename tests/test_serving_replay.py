"""Replays of traces: against a search through lists, against the tree itself, and what the command prints."""

import json
import random
import re
from pathlib import Path

import pytest

from kvattn import errors
from kvattn.serving import BlockPool, RadixTree, TraceRequest, knee, read_trace, replay

ROOT = Path(__file__).resolve().parent.parent
TRACE = ROOT / "tests" / "golden" / "trace.jsonl"
"""Made up: 400 requests of chats that go on, few-shot prompts and single prompts, in blocks of 512."""

RATES = {20: 21.84, 60: 39.60, 200: 69.37, None: 84.03}


def requests_of(*prompts, size=4):
    """Requests whose blocks are all full."""
    return [TraceRequest(i, len(ids) * size, 1, tuple(ids)) for i, ids in enumerate(prompts)]


def made_up(seed, count, longest=6):
    """Prompts that are paths through a random forest: equal ids are equal prefixes."""
    rng, paths = random.Random(seed), [()]
    numbers = iter(range(10**9))
    for _ in range(count):
        path = rng.choice(paths[-12:])
        path = (*path[: rng.randint(0, len(path))], *(next(numbers) for _ in range(rng.randint(1, 3))))[:longest]
        paths.append(path)
    return requests_of(*paths[1:])


def searched(requests, room, size):
    """The rule as it is written, in a list whose first block was used longest ago."""
    held, hits, evicted, peak = [], 0, 0, 0
    for request in requests:
        count = 0
        while count < len(request.hash_ids) and request.hash_ids[count] in held:
            count += 1
        hits += min(count * size, request.input_length)
        ids = request.hash_ids
        if room is not None and len(ids) > room:
            evicted += len({*held, *ids[:-room]} - {*ids[-room:]})
            held, ids = [], ids[-room:]
        for block in reversed(ids):
            if block in held:
                held.remove(block)
            held.append(block)
        while room is not None and len(held) > room:
            held.pop(0)
            evicted += 1
        peak = max(peak, len(held))
    return hits, evicted, peak


@pytest.mark.parametrize("room", [1, 3, 6, 7, 10, 25, 60, 1000, None])
def test_a_replay_is_the_rule(room):
    for seed in range(5):
        requests = made_up(seed, 150)
        found = replay(requests, num_blocks=room, block_size=4)
        assert (found.hit_tokens, found.evicted, found.peak_blocks) == searched(requests, room, 4)
        assert found.ideal_tokens == searched(requests, None, 4)[0]
        assert found.hit_rate == found.hit_tokens / sum(request.input_length for request in requests)


@pytest.mark.parametrize("room", [6, 13, 40, 500])
def test_a_replay_is_what_pool_and_tree_do(room):
    """Requests one after the other on the memory manager itself, an id for a page."""
    requests = made_up(room, 400)
    pool, tree, hits, evicted = BlockPool(room, 1, watermark=0), RadixTree(1), 0, 0
    for number, request in enumerate(requests):
        hit = tree.match(request.hash_ids)
        hits += min(hit.length * 4, request.input_length)
        tree.lock(hit)
        while pool.can_allocate(len(request.hash_ids), prefix=hit.pages) != "now":
            gone = tree.evict(1)
            assert gone
            evicted += len(gone)
            pool.release(gone)
        pool.allocate(number, len(request.hash_ids), prefix=hit.pages)
        pool.hold(tree.adopt(request.hash_ids, pool.table(number)))
        pool.free(number)
        tree.unlock(hit)
    pool.check()
    found = replay(requests, num_blocks=room, block_size=4)
    assert (found.hit_tokens, found.evicted) == (hits, evicted)
    assert pool.usage().peak_blocks == found.peak_blocks


def test_the_last_block_may_be_short():
    requests = [TraceRequest(0, 7, 0, (1, 2)), TraceRequest(1, 7, 0, (1, 2)), TraceRequest(2, 9, 0, (1, 3, 4))]
    found = replay(requests, block_size=4)
    assert (found.hit_tokens, found.prompt_tokens) == (7 + 4, 23)


def test_a_block_is_no_hit_behind_a_gap():
    found = replay(requests_of([1, 2, 3], [9, 8], [1, 2, 3]), num_blocks=3, block_size=4)
    assert found.hit_tokens == 4  # the second request took the places of 3 and 2, the ends of the first


def test_a_request_larger_than_the_pool_passes_through():
    """Its last blocks stay, so it does not even find itself again."""
    first, second = [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]
    found = replay(requests_of([7, 8], first, second), num_blocks=3, block_size=4)
    assert (found.hit_tokens, found.peak_blocks) == (0, 3)
    assert found.evicted == 2 + 2 + 2  # 7 and 8; 1 and 2; 1 and 2 again
    assert replay(requests_of([7], [7, 8, 9]), num_blocks=2, block_size=4).hit_tokens == 4


def test_an_empty_trace():
    found = replay([], num_blocks=3)
    assert (found.hit_rate, found.ideal_hit_rate, found.peak_blocks) == (0, 0, 0)


def test_equal_prompts_of_one_moment():
    """The second finds what the first has computed: nothing is computed twice."""
    found = replay([TraceRequest(0, 8, 1, (1, 2)), TraceRequest(0, 8, 1, (1, 2))], block_size=4)
    assert found.hit_rate == found.ideal_hit_rate == 0.5


def test_progress_is_told():
    told = []
    replay(made_up(0, 2500), num_blocks=10, block_size=4, progress=lambda *done: told.append(done))
    assert told == [(1000, 2500), (2000, 2500), (2500, 2500)]
    read_trace(TRACE, progress=lambda *done: told.append(done))
    assert told[-1] == (TRACE.stat().st_size,) * 2


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"num_blocks": 0}, errors.ConfigError, "num_blocks must be >= 1"),
        ({"num_blocks": 2.0}, errors.DTypeError, "num_blocks must be an int"),
        ({"block_size": 0}, errors.ConfigError, "block_size must be >= 1"),
        ({"block_size": 3}, errors.ConfigError, "request 0 has 8 tokens, 3 blocks of 3, and 2 hash_ids"),
        ({"block_size": True}, errors.DTypeError, "block_size"),
    ],
)
def test_settings_that_cannot_work(settings, error, words):
    with pytest.raises(error, match=words):
        replay(requests_of([1, 2]), **{"block_size": 4} | settings)


# Knees ----------------------------------------------------------------------------------------------------------------


def test_the_knee_of_two_lines_is_where_they_meet():
    assert knee([1, 5, 10, 50, 100], [0.1, 0.5, 1.0, 1.01, 1.02]) == 10
    assert knee([1, 2], [0.0, 1.0]) == 1


@pytest.mark.parametrize(("sizes", "rates"), [([1], [0.5]), ([], []), ([2, 1], [0, 1]), ([1, 2], [0.5])])
def test_no_knee(sizes, rates):
    with pytest.raises(errors.ConfigError, match="two or more ascending sizes"):
        knee(sizes, rates)


# Reading --------------------------------------------------------------------------------------------------------------

GOOD = {"timestamp": 5, "input_length": 700, "output_length": 3, "hash_ids": [0, 1]}


def written(folder, *lines):
    path = folder / "trace.jsonl"
    text = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(text) + b"\n")
    return path


def test_a_trace_is_read(tmp_path):
    extra = GOOD | {"model": "m", "timestamp": 6}
    path = written(tmp_path, GOOD, b"", extra, b"  ")
    assert read_trace(path) == [TraceRequest(5, 700, 3, (0, 1)), TraceRequest(6, 700, 3, (0, 1))]
    assert read_trace(str(path))[0].hash_ids == (0, 1)
    assert read_trace(written(tmp_path)) == []


WRONG = {
    "no JSON": b"{",
    "cut off": json.dumps(GOOD).encode()[:-1],
    "no text": b"\xff\xfe",
    "a list": [1, 2],
    "a number": 7,
    "nothing inside": {},
    "no ids": {k: v for k, v in GOOD.items() if k != "hash_ids"},
    "ids that are no list": GOOD | {"hash_ids": "01"},
    "ids that are no ints": GOOD | {"hash_ids": [0, 1.0]},
    "ids that are bools": GOOD | {"hash_ids": [False, True]},
    "an id twice": GOOD | {"hash_ids": [1, 1]},
    "a negative length": GOOD | {"input_length": -1},
    "a length that is no int": GOOD | {"input_length": 700.0},
    "a bool as a length": GOOD | {"output_length": True},
    "a time that is no number": GOOD | {"timestamp": "5"},
    "tokens without ids": GOOD | {"hash_ids": []},
    "ids without tokens": GOOD | {"input_length": 0},
    "two objects": json.dumps(GOOD).encode() * 2,
    "deeper than Python goes": b"[" * 200_000,
}


@pytest.mark.parametrize("what", WRONG)
def test_a_malformed_line_is_an_error_with_its_number(tmp_path, what):
    with pytest.raises(errors.ConfigError, match=r"trace\.jsonl, line 3: ") as caught:
        read_trace(written(tmp_path, GOOD, b"", WRONG[what], GOOD))
    assert len(str(caught.value)) < 500


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "none.jsonl")


# The trace that is committed, and the command -------------------------------------------------------------------------


def test_rates_of_the_made_up_trace():
    """To four digits; as a search through lists says."""
    requests = read_trace(TRACE)
    for room in (20, 60, 200, 600, None):
        found = replay(requests, num_blocks=room)
        assert (found.hit_tokens, found.evicted, found.peak_blocks) == searched(requests, room, 512)
    rates = {room: round(100 * replay(requests, num_blocks=room).hit_rate, 2) for room in RATES}
    assert rates == RATES


typer_testing = pytest.importorskip("typer.testing", reason="typer is in the extra cli")


def call(*words):
    from kvattn.cli.app import app

    return typer_testing.CliRunner().invoke(app, ["replay", *map(str, words)])


def printed(*words):
    done = call(*words)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_screen():
    lines = printed(TRACE, "--blocks", 20, 60, "200", "--blocks", "1,000", "--model", "llama-3-8b").splitlines()
    assert max(map(len, lines)) <= 80 and not [line for line in lines if line != line.rstrip()]
    rows = [line.split() for line in lines if re.match(r"\s*[\d,]+ ", line)]
    requests = read_trace(TRACE)
    assert [row[0] for row in rows] == ["20", "60", "200", "1,000"]
    for row in rows:
        found = replay(requests, num_blocks=int(row[0].replace(",", "")))
        assert row[1] == f"{found.num_blocks * 512:,}"
        assert row[4:6] == [f"{100 * found.hit_rate:.2f}", "%"]
        assert f"{found.evicted:,}" in row
    assert sum("knee" in row for row in rows) == 1
    assert float(rows[0][2]) * 1e9 == pytest.approx(20 * 512 * 131072, rel=1e-2)


def test_sizes_by_halves():
    found = json.loads(printed(TRACE, "--json"))
    sizes = [row["num_blocks"] for row in found["sizes"]]
    assert sizes[-1] == found["distinct_blocks"] == len({i for r in read_trace(TRACE) for i in r.hash_ids})
    assert [a // b for a, b in zip(sizes[1:], sizes, strict=False)] == [2] * 7
    assert found["sizes"][-1]["hit_rate"] == found["ideal_hit_rate"] and found["knee"] in sizes


def test_a_plot(tmp_path):
    out = tmp_path / "curve.png"
    text = printed(TRACE, "--blocks", 20, 200, "--plot", out, "--model", "llama-3-8b")
    assert out.read_bytes().startswith(b"\x89PNG") and f"drawn: {out}" in text and "knee" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--blocks", 0), "--blocks must be >= 1, got 0"),
        (("--blocks", "many"), "--blocks must be an int >= 1, got 'many'"),
        ((7,), "sizes follow --blocks"),
        (("--block-size", 100), "give the block_size of the trace"),
        (("--model", "no-such"), "no-such"),
        (("--plot", "curve.doc"), "must end in one of"),
    ],
)
def test_refused(words, said):
    done = call(TRACE, *words)
    assert done.exit_code == 2 and said in " ".join(done.output.split())


def test_a_trace_that_cannot_be_read(tmp_path):
    for path, said in ((tmp_path / "none", "none"), (written(tmp_path), "holds no requests")):
        done = call(path)
        assert done.exit_code == 2 and said in done.output
    done = call(written(tmp_path, GOOD, b"{"))
    assert done.exit_code == 2 and "line 2" in done.output
