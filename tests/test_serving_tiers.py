"""Records and their names, tiers in host memory and stacks of tiers, against plain models."""

import dataclasses
import hashlib
import itertools
import math
import pathlib
import random
import threading
import time
import types

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tier_cases
from tier_cases import DEFAULT, PAGE, chance, damaged, dtype_of, parts, record, records, right, same, sealed, sized_kind

from kvattn import errors
from kvattn.serving import ArraySpec, DiskTier, HostTier, PageName, Record, Tiers, encoding, kinds, page_names
from kvattn.serving import disk as disk_module
from kvattn.serving import records as names_module
from kvattn.serving.workers import Worker

FULL_RUN = pytest.mark.slow

# Names ----------------------------------------------------------------------------------------------------------------


def with_length(part):
    return len(part).to_bytes(8, "little") + part


def spelled(namespace):
    if isinstance(namespace, str):
        return with_length(b"string") + with_length(namespace.encode())
    return with_length(b"tuple") + b"".join(with_length(part.encode()) for part in namespace)


def test_a_key_is_a_hash_of_kind_namespace_prefix_and_tokens():
    """Written down once more; tokens are int32, little-endian."""
    tokens, parent = [1, -2, 3, 2**31 - 1], b""
    for name in page_names(DEFAULT, ("a", "bc"), tokens * 3):
        text = b"".join(i.to_bytes(4, "little", signed=True) for i in tokens)
        start = with_length(b"kvattn page") + with_length(DEFAULT.digest) + with_length(spelled(("a", "bc")))
        assert name.key == hashlib.sha256(start + with_length(parent) + with_length(text)).digest()
        assert (name.parent, name.tokens) == (parent, tuple(tokens))
        assert name == PageName(DEFAULT, ("a", "bc"), parent, tuple(tokens))
        parent = name.key


def test_nothing_that_differs_has_one_key():
    """Namespaces that are the same once they are joined, parts that move to the next, every field of a kind."""
    namespaces = [
        "",
        "abc",
        ("abc",),
        ("a", "bc"),
        ("ab", "c"),
        ("a", "b", "c"),
        (),
        ("",),
        ("", ""),
        "a\0bc",
        "\ud800",
    ]
    texts = [[1, 2, 3, 4], [1, 3, 2, 4], [4, 3, 2, 1], [-1, -1, -1, -1]]
    keys_spec, scales = tier_cases.KEYS, tier_cases.SCALES
    layouts = [
        {"keys": dataclasses.replace(keys_spec, axes="heads layers offsets features"), "scales": scales},
        {"keys": dataclasses.replace(keys_spec, dtype="float16"), "scales": scales},
        {"keys": dataclasses.replace(keys_spec, shape=(2, 2, PAGE, 4)), "scales": scales},
        {"keys": keys_spec, "scale": scales},
        {"keys": keys_spec, "scales": dataclasses.replace(scales, group=1)},
    ]
    changes = [{}, {"model": "b"}, {"dtype": "b"}, {"codec": "b"}, {"policy": "b"}, {"windows": (None, 7)}]
    kinds_ = [tier_cases.kind(**c) for c in [*changes, {"page_size": 2}, *({"arrays": a} for a in layouts)]]
    names = [
        name
        for kind in kinds_
        for namespace in namespaces
        for text in texts
        for name in page_names(kind, namespace, text * 2)
    ]
    assert len({name.key for name in names}) == len(names) == sum(11 * 4 * 2 * 4 // k.page_size for k in kinds_)


def test_another_version_of_the_format_has_other_keys(monkeypatch):
    old = page_names(tier_cases.kind(), "", [1, 2, 3, 4])[0].key
    monkeypatch.setattr(kinds, "FORMAT", 2)
    assert page_names(tier_cases.kind(), "", [1, 2, 3, 4])[0].key != old


def test_names_go_on_where_others_end():
    tokens = list(range(19))
    all_names = page_names(DEFAULT, "a", np.array(tokens))
    assert len(all_names) == 4 and page_names(DEFAULT, "a", tokens[:3]) == []
    for count in range(5):
        assert page_names(DEFAULT, "a", tokens, known=all_names[:count]) == all_names
    for wrong in (page_names(DEFAULT, "b", tokens), page_names(DEFAULT, "a", tokens[1:])):
        with pytest.raises(errors.ConfigError, match="known"):
            page_names(DEFAULT, "a", tokens, known=wrong[:1])
    with pytest.raises(errors.ConfigError, match="known"):
        page_names(DEFAULT, "a", tokens[:8], known=all_names)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda: page_names(DEFAULT, 7, [1] * 4), errors.DTypeError, "namespace"),
        (lambda: page_names(DEFAULT, "", [1.0] * 4), errors.DTypeError, "tokens"),
        (lambda: page_names(DEFAULT, "", [2**31] * 4), errors.RangeError, "int32"),
        (lambda: PageName(DEFAULT, "", b"", (1, 2, 3)), errors.ShapeError, "a full page of 4"),
        (lambda: PageName(DEFAULT, "", b"", (1,) * 5), errors.ShapeError, "got 5"),
        (lambda: PageName(DEFAULT, "", b"short", (1,) * 4), errors.ConfigError, "32 bytes"),
        (lambda: tier_cases.kind(model=b"x"), errors.DTypeError, "model"),
        (lambda: tier_cases.kind(page_size=0), errors.ConfigError, "page_size"),
        (lambda: tier_cases.kind(windows=(None,)), errors.ConfigError, "one per group"),
        (lambda: tier_cases.kind(windows=(None, 0)), errors.RangeError, "windows"),
        (lambda: ArraySpec("a a", (1, 1), "int8"), errors.ConfigError, "once"),
        (lambda: ArraySpec("a b", (1,), "int8"), errors.ShapeError, "(1,)"),
        (lambda: ArraySpec("a", (-1,), "int8"), errors.RangeError, "-1"),
        (lambda: ArraySpec("a", (1,), "object"), errors.ConfigError, "object"),
    ],
)
def test_what_is_no_name_or_kind(make, error, word):
    with pytest.raises(error) as caught:
        make()
    assert type(caught.value) is error and word in str(caught.value)


def test_secrets_are_not_shown():
    """A namespace may be a salt; tokens are somebody's text."""
    made = record(page_names(DEFAULT, "secret", [77777] * 4)[0])
    content = encoding.encode(made)
    shown = [repr(made), repr(made.name), content.decode("latin-1")]
    with pytest.raises(errors.CacheCorruptionError) as caught:
        encoding.decode(content, page_names(DEFAULT, "other", [77777] * 4)[0])
    shown.append(str(caught.value))
    assert not any("secret" in text for text in shown) and not any("77777" in text for text in shown[:2])


# Records --------------------------------------------------------------------------------------------------------------


def test_a_record_is_its_own():
    """What it was made of may change: `np.asarray` of a JAX array is the device's memory, which is donated later."""
    name = page_names(DEFAULT, "", range(4))[0]
    given = {n: np.array(x) for n, x in record(name).arrays.items()}
    made, wanted = Record(name, given), record(name)
    for array in given.values():
        array.view(np.uint8)[...] = 99
    assert same(made, wanted)
    with pytest.raises(ValueError, match="read-only"):
        made.arrays["keys"][0] = 0
    on_device = jnp.arange(math.prod(tier_cases.SCALES.shape), dtype=jnp.float32).reshape(tier_cases.SCALES.shape)
    made = Record(name, {**wanted.arrays, "scales": np.asarray(on_device)})
    assert not np.shares_memory(made.arrays["scales"], np.asarray(on_device))
    again = Record(name, made.arrays)
    assert all(again.arrays[n] is made.arrays[n] for n in made.arrays)  # but what is its own is not copied


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"other": np.zeros(1)}, errors.ConfigError, "'other'"),
        ({"keys": [1.0]}, errors.DTypeError, "NumPy"),
        ({"keys": jnp.zeros((2, 2, PAGE, 3), jnp.bfloat16)}, errors.DTypeError, "NumPy"),
        ({"keys": np.zeros((2, 2, PAGE, 3), np.float32)}, errors.DTypeError, "bfloat16"),
        ({"scales": np.zeros((2, PAGE, 2), np.float32)}, errors.ShapeError, "layers heads offsets"),
        ({"scales": None}, errors.ConfigError, "scales"),
        ({"scales": None, "keys": None}, errors.ConfigError, "group 0"),
    ],
)
def test_what_is_no_record(changes, error, word):
    name = page_names(DEFAULT, "", range(4))[0]
    arrays = {n: x for n, x in {**record(name).arrays, **changes}.items() if x is not None}
    with pytest.raises(error) as caught:
        Record(name, arrays)
    assert type(caught.value) is error and word in str(caught.value)


def test_a_group_with_a_window_may_lack_a_page():
    name = page_names(DEFAULT, "", range(4))[0]
    made = record(name, groups=(0,))
    assert made.has(0) and not made.has(1) and record(name).has(1)
    assert same(encoding.decode(encoding.encode(made), name), made)


@pytest.mark.parametrize("dtype", kinds.DTYPES)
def test_every_dtype_comes_back_bit_by_bit(dtype):
    specs = [ArraySpec("a b", (3, 5), dtype), ArraySpec("", (), dtype), ArraySpec("a b", (0, 5), dtype)]
    kind = tier_cases.kind(arrays={f"x{i}": spec for i, spec in enumerate(specs)}, windows=(None,))
    made = record(page_names(kind, "", range(4))[0])
    content = encoding.encode(made)
    assert len(content) == encoding.encoded_size(made)
    again = encoding.decode(content, made.name)
    assert same(again, made) and not again.arrays["x0"].flags.writeable
    assert {spec.nbytes for spec in specs} == {x.nbytes for x in made.arrays.values()}


def test_dtypes_are_those_of_caches():
    codes = {
        "bfloat16",
        "float16",
        "float32",
        "float64",
        "int8",
        "uint8",
        "int32",
        "float8_e4m3fn",
        "float8_e5m2",
        "int4",
    }
    assert codes <= set(kinds.DTYPES) and kinds.DTYPES["int4"] == ml_dtypes.int4
    assert all(not dtype.hasobject for dtype in kinds.DTYPES.values())


def test_every_flipped_bit_and_every_cut_is_seen():
    """Rows 119 and 120, all of a record: table and data, and the header bit by bit."""
    made = records(2, namespace="a")[1]
    content = encoding.encode(made)
    for end in range(len(content)):
        with pytest.raises(errors.CacheCorruptionError) as caught:
            encoding.decode(content[:end], made.name)
        assert type(caught.value) is errors.CacheCorruptionError
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(errors.CacheCorruptionError) as caught:
            encoding.decode(changed, made.name)
        assert type(caught.value) is errors.CacheCorruptionError
    assert same(encoding.decode(content, made.name), made)


def test_what_a_checksum_vouches_for_is_looked_at_all_the_same():
    """Bytes after a forged table are changed at random and sealed again: never another record, never another error."""
    rng = chance("forged")
    made, name = records(1)[0], records(1)[0].name
    content = encoding.encode(made)
    table, data = parts(content)
    text = encoding.json.dumps(table).encode()
    for _ in range(2000):
        changed = damaged(text, rng)
        try:
            found = encoding.decode(sealed(changed, data), name)
        except errors.CacheCorruptionError:
            continue
        assert same(found, made)


# One tier -------------------------------------------------------------------------------------------------------------


class PlainTier:
    """Names with sizes in a list, the one used longest ago first."""

    def __init__(self, max_bytes):
        self.max_bytes, self.entries = max_bytes, []

    def touch(self, name):
        found = [entry for entry in self.entries if entry[0] == name]
        self.entries = [entry for entry in self.entries if entry[0] != name] + found
        return bool(found)

    def put(self, name, size):
        if self.touch(name):
            return []
        if size > self.max_bytes:
            return [name]
        self.entries.append((name, size))
        gone = []
        while sum(size for _, size in self.entries) > self.max_bytes:
            gone.append(self.entries.pop(0)[0])
        return gone


POOL = [record(page_names(sized_kind(size), "", [size] * PAGE)[0]) for size in (0, 40, 100, 100, 250, 400, 900)]
POOL += [record(page_names(sized_kind(100), "", [i] * PAGE)[0]) for i in range(5)]
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "get", "touch", "remove"]), st.integers(0, len(POOL) - 1)), max_size=60
)


def run_operations(tier, size_of, operations, passes_on):
    plain = PlainTier(tier.max_bytes)
    stored = evicted = hits = misses = 0
    for what, number in operations:
        made = POOL[number]
        known = made.name.key in tier
        if what == "put":
            gone, wanted = tier.put(made), plain.put(made.name, size_of(made))
            itself = wanted == [made.name] and not known
            expected = wanted if passes_on or itself else []
            assert [r.name for r in gone] == expected
            stored += not known and not itself
            evicted += 0 if itself else len(wanted)
        elif what == "get":
            found = tier.get(made.name)
            assert right(found, made) and (found is not None) == plain.touch(made.name) == known
            hits, misses = hits + known, misses + (not known)
        elif what == "touch":
            tier.touch(made.name.key)
            plain.touch(made.name)
        else:
            tier.remove(made.name.key)
            plain.entries = [entry for entry in plain.entries if entry[0] != made.name]
        assert {r.name for r in POOL if r.name.key in tier} == {name for name, _ in plain.entries}
        assert tier.nbytes == sum(size for _, size in plain.entries) <= tier.max_bytes
    counters = dataclasses.asdict(tier.counters)
    wanted = {"stored": stored, "evicted": evicted, "hits": hits, "misses": misses}
    assert counters == {**dict.fromkeys(counters, 0), **wanted}
    return plain


@hypothesis.given(OPERATIONS, st.integers(1, 1500))
def test_host_memory_is_a_list_by_use(operations, max_bytes):
    tier = HostTier(max_bytes)
    plain = run_operations(tier, lambda r: r.nbytes, operations, passes_on=True)
    assert [r.name for r in tier.records()] == [name for name, _ in plain.entries]


@hypothesis.settings(max_examples=40)
@hypothesis.example(operations=[("put", 7), ("put", 8), ("get", 7), ("put", 9), ("get", 8)], max_bytes=1200)
@hypothesis.given(operations=OPERATIONS, max_bytes=st.integers(1, 5000))
def test_a_disk_is_the_same_list(tmp_path_factory, operations, max_bytes):
    """And another one of the same directory finds it."""
    folder = tmp_path_factory.mktemp("tier")
    with DiskTier(folder, max_bytes) as tier:
        plain = run_operations(tier, encoding.encoded_size, operations, passes_on=False)
    names = {name for name, _ in plain.entries}
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert files == {f"{name.key.hex()}.kv": size for name, size in plain.entries}
    with DiskTier(folder, max_bytes) as tier:
        assert {r.name for r in POOL if r.name.key in tier} == names and tier.nbytes == sum(files.values())
        assert all(same(tier.get(r.name), r) for r in POOL if r.name in names)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda _: HostTier(0), errors.ConfigError, "max_bytes"),
        (lambda _: HostTier(1.5), errors.DTypeError, "max_bytes"),
        (lambda path: DiskTier(path, -1), errors.ConfigError, "max_bytes"),
        (lambda path: DiskTier(path, 9, deadline=0), errors.ConfigError, "deadline"),
        (lambda path: DiskTier(path, 9, deadline=math.nan), errors.ConfigError, "deadline"),
        (lambda path: DiskTier(path, 9, deadline="1"), errors.DTypeError, "deadline"),
        (lambda path: DiskTier(path, 9, queue_bytes=0), errors.ConfigError, "queue_bytes"),
        (lambda path: Tiers([DiskTier(path / "a", 9), HostTier(9)]), errors.ConfigError, "the last"),
        (lambda _: Tiers([tier := HostTier(9), tier]), errors.ConfigError, "different"),
        (lambda _: Tiers([HostTier]), errors.DTypeError, "HostTier"),
        (lambda _: HostTier(9).remove("a"), errors.ConfigError, "key"),
    ],
)
def test_what_is_no_tier(make, error, word, tmp_path):
    with pytest.raises(error) as caught:
        make(tmp_path)
    assert type(caught.value) is error and word in str(caught.value)


def test_a_tier_may_be_full(tmp_path):
    """To the last byte."""
    made = records(2)
    host = HostTier(sum(r.nbytes for r in made))
    with DiskTier(tmp_path, sum(map(encoding.encoded_size, made))) as disk:
        for tier in (host, disk):
            assert [tier.put(r) for r in made] == [[], []] and tier.nbytes == tier.max_bytes
            assert all(same(tier.get(r.name), r) for r in made)


@pytest.mark.parametrize("where", ["host", "disk"])
def test_a_record_with_more_groups_takes_the_place_of_one_with_fewer(where, tmp_path):
    """A page that a window had left when it was stored, and that is computed again as the end of another prompt."""
    name = records(1)[0].name
    poor, rich = record(name, groups=(0,)), record(name)
    tier = HostTier(10**6) if where == "host" else DiskTier(tmp_path, 10**6)
    for made, wanted in ((poor, poor), (rich, rich), (poor, rich), (rich, rich)):
        assert tier.put(made) == [] and same(tier.get(name), wanted)
        tier.flush()
        assert same(tier.get(name), wanted)
    assert tier.counters.stored == 2 and tier.counters.evicted == tier.counters.failed == 0
    assert tier.nbytes == (rich.nbytes if where == "host" else encoding.encoded_size(rich))
    tier.close()


def test_a_disk_needs_posix(monkeypatch, tmp_path):
    """And what needs none can be imported all the same."""
    monkeypatch.setattr(disk_module, "os", types.SimpleNamespace(name="nt"))
    with pytest.raises(errors.UnsupportedError, match="'nt': use a HostTier"):
        DiskTier(tmp_path, 9)
    for path in (pathlib.Path(disk_module.__file__).parent).glob("*.py"):
        lines = path.read_text().splitlines()
        assert path.name == "files.py" or not [
            x for x in lines if x.startswith(("import fcntl", "from kvattn.serving.files"))
        ]


# Several tiers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    with DiskTier(tmp_path / "disk", 10**6) as tier:
        yield tier


def test_what_falls_out_of_one_tier_sinks_to_the_next(disk):
    texts = records(6)
    names = [r.name for r in texts]
    host = HostTier(2 * texts[1].nbytes)
    with Tiers([host, disk]) as tiers:
        tiers.store(texts)
        assert [n.key in host for n in names] == [True, True, *[False] * 4]  # the end of a text leaves first
        assert [n.key in disk for n in names] == [False, False, *[True] * 4]
        assert tiers.find(names) == 6 and tiers.find(names[3:]) == 3
        assert all(map(same, tiers.load(names), texts))
        assert [n.key in host for n in names] == [True, True, *[False] * 4]  # the start counts as used last
        assert (host.counters.hits, disk.counters.hits, host.counters.misses) == (2, 4, 4)
        assert all(map(same, tiers.load(names[4:]), texts[4:]))  # what is hit rises
        assert [n.key in host for n in names] == [*[False] * 4, True, True]
        assert [n.key in disk for n in names] == [True] * 6
        assert disk.counters.stored == 6  # none was written twice


def test_a_text_is_found_up_to_its_first_gap():
    texts = records(4)
    names = [r.name for r in texts]
    tiers = Tiers([HostTier(10**6)])
    tiers.store(texts)
    tiers.tiers[0].remove(names[2].key)
    assert tiers.find(names) == len(tiers.load(names)) == 2 and len(tiers.load(names[3:])) == 1


def test_a_thread_comes_back_when_there_is_something_to_do():
    worker = Worker("test", daemon=True, linger=0.01)
    for i in range(3):
        assert worker.submit(lambda i=i: i).result(10) == i
        while "test" in {thread.name for thread in threading.enumerate()}:
            time.sleep(0.01)


def test_flush_brings_all_to_the_disk(disk):
    texts = records(3)
    tiers = Tiers([HostTier(10**6), disk])
    tiers.store(texts)
    assert not disk.nbytes
    tiers.flush()
    assert all(same(disk.read(r.name), r) for r in texts)
    assert all(r.name.key in tiers.tiers[0] for r in texts)


def test_a_record_larger_than_a_tier_passes_through(disk):
    (made,) = records(1)
    small, host = HostTier(9), HostTier(10**6)
    Tiers([small, host]).store([made])
    assert made.name.key in host and made.name.key not in small
    Tiers([small, disk]).store([made])
    assert made.name.key in disk
    Tiers([small]).store([made])  # and is lost where there is none
    assert Tiers([small]).load([made.name]) == []


def test_a_stack_of_host_and_disk_against_a_plain_one(tmp_path):
    """Random texts of few tokens; what is found, and what is lost, is what two lists say."""
    rng = random.Random(5)
    some = tier_cases.records(1)[0]
    host, disk = HostTier(4 * some.nbytes), DiskTier(tmp_path, 12 * encoding.encoded_size(some))
    tiers, plain = Tiers([host, disk]), [PlainTier(host.max_bytes), PlainTier(disk.max_bytes)]
    sizes = [lambda r: r.nbytes, encoding.encoded_size]
    made = {}

    def put(name, level):
        sinking = [name]
        for tier, size in list(zip(plain, sizes, strict=True))[level:]:
            sinking = [gone for each in sinking for gone in tier.put(each, size(made[each]))]

    for _ in range(400):
        tokens = [rng.choice([1, 2]) for _ in range(rng.randrange(5) * PAGE)]
        tokens = [tokens[i // PAGE * PAGE] for i in range(len(tokens))]
        names = page_names(DEFAULT, rng.choice(["", "a"]), tokens)
        has = lambda name: any(name in dict(tier.entries) for tier in plain)
        count = sum(1 for _ in itertools.takewhile(has, names))
        assert tiers.find(names) == count
        what = rng.choice(["store", "load", "touch"])
        if what == "store":
            made |= {name: record(name) for name in names}
            tiers.store([made[name] for name in names])
            for name in reversed(names):
                put(name, 0)
        elif what == "load":
            assert len(tiers.load(names)) == count
            for name in names[: count + 1]:  # each is looked for from the top
                plain[0].touch(name) or plain[1].touch(name)
            for name in reversed(names[:count]):
                put(name, 0)
            for name in reversed(names[:count]):
                [tier.touch(name) for tier in plain]
        else:
            tiers.touch(names)
            for name in reversed(names):
                [tier.touch(name) for tier in plain]
        for tier, model in zip((host, disk), plain, strict=True):
            assert tier.nbytes == sum(size for _, size in model.entries)
    disk.close()
    assert disk.counters.evicted > 20 and host.counters.hits > 20


def usable(pages, windows, size):
    """The largest n after which every group has all pages from the first whose tokens the next query sees."""
    fits = lambda n: all(
        all(g in pages[i] for i in range(n) if window is None or (i + 1) * size > n * size - (window - 1))
        for g, window in enumerate(windows)
    )
    return max(n for n in range(len(pages) + 1) if fits(n))


@pytest.mark.parametrize("windows", [(None, 1), (None, 2), (None, 5), (None, 6), (None, 10), (3, 9)])
def test_a_hit_has_what_every_window_sees(windows):
    """Against the definition, token by token, for all choices of pages that a window lacks."""
    specs = {"full": ArraySpec("a", (1,), "int8", 0), "window": ArraySpec("a", (1,), "int8", 1)}
    kind = tier_cases.kind(arrays=specs, windows=windows)
    count = 4
    names = page_names(kind, "", range(count * PAGE))
    free = 2 if windows[0] is not None else 1
    for lacks in itertools.product([False, True], repeat=count * free):
        pages = [{g for g in (0, 1) if g < 2 - free or not lacks[i * free + g - (2 - free)]} for i in range(count)]
        tiers = Tiers([HostTier(10**6)])
        tiers.store([record(name, groups) for name, groups in zip(names, pages, strict=True)])
        assert tiers.find(names) == count
        assert len(tiers.load(names)) == usable(pages, windows, PAGE), pages


# Namespaces -----------------------------------------------------------------------------------------------------------


def common_pages(a, b):
    """How many first pages of two texts are the same."""
    return sum(a[:end] == b[:end] for end in range(PAGE, len(a) + 1, PAGE))


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=FULL_RUN)])
def test_namespaces_share_nothing(count):
    """Equal texts in namespaces that look alike: found in their own, never in another."""
    rng = random.Random(count)
    kind = tier_cases.kind(arrays={"x": ArraySpec("a", (1,), "int8")}, windows=(None,))
    namespaces = ["", "ab", ("ab",), ("a", "b"), ("", "ab"), ("ab", ""), "a", ("a",), "ba", ("b", "a")]
    texts = [[rng.choice([1, 2]) for _ in range(3 * PAGE)] for _ in range(8)]
    tiers, stored = Tiers([HostTier(10**9)]), set()
    names = {(n, i): page_names(kind, n, text) for n in namespaces for i, text in enumerate(texts)}
    for namespace, i in names:
        if rng.random() < 0.5:
            stored.add((namespace, i))
            tiers.store([record(name) for name in names[namespace, i]])
    hits = 0
    for _ in range(count):
        namespace, i = rng.choice(namespaces), rng.randrange(len(texts))
        wanted = max((common_pages(texts[i], texts[j]) for n, j in stored if n == namespace), default=0)
        found = tiers.find(names[namespace, i])
        assert found == wanted
        hits += found
    assert hits > count / 4


def test_keys_that_collide_are_a_miss(monkeypatch, tmp_path):
    """With keys of four bits, whatever is found is what was asked for."""
    whole = names_module.page_key
    monkeypatch.setattr(names_module, "page_key", lambda *a: bytes(31) + bytes([whole(*a)[0] & 15]))
    made = [r for start in range(100) for r in records(1, start=start, namespace=str(start % 3))]
    for tier in (HostTier(10**6), DiskTier(tmp_path, 10**6)):
        tiers, found = Tiers([tier]), 0
        for r in made:
            tiers.store([r])
        for r in made:
            for got in tiers.load([r.name]):
                assert same(got, r)
                found += 1
        assert 0 < found <= 16
        tier.close()


def test_dtype_of_cases():
    assert dtype_of(tier_cases.KEYS) == ml_dtypes.bfloat16 and dtype_of(tier_cases.SCALES) == np.float32
