"""Records on a disk: bad input by the numbers of bad_inputs.txt, system calls that fail, files that are damaged."""

import ast
import contextlib
import errno
import os
import pathlib
import pickle
import stat
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
import tier_cases
from bad_input_table import Table, run
from tier_cases import System, chance, damaged, failing, half, parts, path_of, record, records, right, same, sealed

from kvattn import errors
from kvattn.serving import ArraySpec, BlockPool, DiskTier, HostTier, PageName, Tiers, encoding, page_names

ROOT = pathlib.Path(__file__).resolve().parent.parent
FULL_RUN = pytest.mark.slow
ROOM = 10**6
CORRUPT, VERSION, OFFLOAD, CONFIG = (
    errors.CacheCorruptionError,
    errors.CacheVersionError,
    errors.OffloadError,
    errors.ConfigError,
)
TABLE = Table()
bad, defined = TABLE.bad, TABLE.defined


@contextlib.contextmanager
def folder():
    in_memory = "/dev/shm"  # where there is such a thing: these tests wait for the disk more than for anything else
    with tempfile.TemporaryDirectory(dir=in_memory if os.access(in_memory, os.W_OK) else None) as name:
        yield pathlib.Path(name) / "tier"


@contextlib.contextmanager
def stored(count=1, **options):
    """A tier with these records, which are on the disk."""
    with folder() as path, DiskTier(path, ROOM, **options) as tier:
        made = records(count)
        for each in made:
            tier.write(each)
        yield tier, path, made


def open_in(path):
    """Descriptors this process holds of a folder and of the files in it, removed ones too; [] where nobody says."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for each in pathlib.Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(each))
    return [name for name in found if name.startswith(str(path))]


def read(change):
    """Reads a record whose file is changed before, by what is given its bytes."""
    with stored() as (tier, path, (made,)):
        path_of(path, made.name).write_bytes(change(encoding.encode(made)))
        tier.read(made.name)


def decode(change, made=None):
    """Decodes a record whose bytes are changed before."""
    made = made or records(1)[0]
    encoding.decode(change(encoding.encode(made)), made.name)


def forged(change):
    """A record whose table is changed by what is given it, under a checksum that is right."""

    def apply(content):
        table, data = parts(content)
        return sealed(change(table) or table, data)

    return apply


# Damage ---------------------------------------------------------------------------------------------------------------

HEAD = encoding.HEADER.size
for size in (0, 1, 7, 8, HEAD - 1, HEAD, HEAD + 1, HEAD + 31, HEAD + 32, 600, -33, -32, -1):
    bad(119, f"a file that ends at {size}", CORRUPT)(lambda size=size: read(lambda content: content[:size]))
bad(119, "a file with a byte too many", CORRUPT, "got 896")(lambda: read(lambda content: content + b"\0"))


@defined(119, "a file that is cut while it is read")
def _():
    with stored() as (tier, path, (made,)):

        def cut(number, name, call):
            result = call()
            if name == "fstat":
                os.truncate(path_of(path, made.name), 100)
            return result

        with System(cut), pytest.raises(CORRUPT, match="cut"):
            tier.read(made.name)


for at in (0, 9, 13, 17, 40, 500, 700, -1):
    flip = lambda content, at=at: bytes(b ^ (16 if i == at % len(content) else 0) for i, b in enumerate(content))
    bad(120, f"a flipped bit at {at}", CORRUPT)(lambda flip=flip: read(flip))

for what, table_bytes, data_bytes in (
    ("2^63", 100, 2**63),
    ("2^64 - 1", 100, 2**64 - 1),
    ("a table of 2^32 - 1", 2**32 - 1, 176),
    ("sums that are right only modulo 2^64", 100, 2**64 - 100),
    ("one byte less", 0, 0),
):
    head = encoding.HEADER.pack(encoding.MAGIC, encoding.FORMAT, table_bytes, data_bytes)
    bad(121, f"a header that says {what}", CORRUPT, "says that it has")(
        lambda head=head: read(lambda content: head + content[HEAD:])
    )


@defined(121, "a file of a tebibyte, as its header says, and one larger than the tier")
def _():
    with stored() as (tier, path, (made,)):
        size = 2**40
        head = encoding.HEADER.pack(encoding.MAGIC, encoding.FORMAT, 100, size - HEAD - 132)
        path_of(path, made.name).write_bytes(head)
        os.truncate(path_of(path, made.name), size)
        with pytest.raises(CORRUPT, match="more than the 1000000 allowed"):
            tier.read(made.name)
        with pytest.raises(CORRUPT, match="says that it has"):  # a table beyond the limit
            encoding.check_lengths(encoding.HEADER.pack(encoding.MAGIC, 1, 2**25, 0), HEAD + 2**25 + 32)


def set_array(number, **changes):
    return lambda table: table["arrays"][number].update(changes)


def without(*path):
    def change(table):
        *above, last = path
        for key in above:
            table = table[key]
        del table[last]

    return change


TWICE = lambda table: table["arrays"].append(dict(table["arrays"][0], offset=176))
for what, change, words in (
    ("arrays that overlap", set_array(1, offset=90), ["must lie at 96"]),
    ("arrays with a hole", set_array(2, offset=161), ["must lie at 160"]),
    ("a negative offset", set_array(0, offset=-1), ["must lie at 0"]),
    ("an offset beyond the data", set_array(0, offset=10**30), ["must lie at 0"]),
    ("a size that is not the shape's", set_array(2, size=15), ["with 16 bytes", "with 15"]),
    ("data of another size", without("arrays", 2), ["160 bytes", "176"]),
    ("a negative shape", set_array(0, shape=[-2, 2, -4, 3]), ["shape"]),
    ("a shape of huge numbers", set_array(0, shape=[2**62, 2**62], size=2**125), ["must lie at 42535295865117"]),
    ("a shape that is no ints", set_array(0, shape=[2.0, 2, 4, 3]), ["shape"]),
    ("an array twice", TWICE, ["twice"]),
    ("an unknown dtype", set_array(0, dtype="object"), ["unknown dtype"]),
    ("a dtype of fields", set_array(0, dtype="i4,O"), ["unknown dtype"]),
    ("a dtype that is no string", set_array(0, dtype=["i4"]), ["dtype"]),
    ("other axes of the same sizes", set_array(0, axes="heads layers offsets features"), ["heads layers"]),
    ("an array that the kind has not", set_array(0, name="other"), ["other"]),
    ("a shape that the kind has not", set_array(0, shape=[2, 2, 3, 4]), ["[2, 2, 3, 4]"]),
    ("a field more", lambda table: table.update(more=1), ["must have"]),
    ("a field less", without("tokens"), ["must have"]),
    ("an array with a field less", without("arrays", 0, "axes"), ["must have"]),
    ("tokens that are no list", lambda table: table.update(tokens="1"), ["tokens"]),
    ("a key twice", lambda table: b'{"kind": 1, "kind": 2}', ["twice"]),
    ("a table that is no object", lambda table: b"[]", ["must have"]),
    ("a table that is no JSON", lambda table: b"{", ["no JSON"]),
    ("a table that is no text", lambda table: b"\xff\xfe\x00", ["no JSON"]),
    ("a table of brackets", lambda table: b"[" * 10**6, ["no JSON"]),
    ("a number of a million digits", lambda table: b"1" * 10**6, ["no JSON"]),
):
    bad(122, what, CORRUPT, *words)(lambda change=change: decode(forged(change)))
bad(122, "a group of which an array is missing", CORRUPT, "lacks", "scales")(
    lambda: decode(lambda content: sealed(*without_scales(content)))
)


def without_scales(content):
    table, data = parts(content)
    del table["arrays"][1]
    table["arrays"][1]["offset"] = 96
    return table, data[:96] + data[160:]


# Other kinds, other texts ---------------------------------------------------------------------------------------------

OTHER = {
    "model": {"model": "another"},
    "dtype": {"dtype": "float32"},
    "codec": {"codec": "Int8()"},
    "policy": {"policy": "SlidingWindow(8)"},
    "page_size": {"page_size": 2},
    "windows": {"windows": (None, 7)},
    "digest": {
        "arrays": {"keys": tier_cases.KEYS, "scales": tier_cases.SCALES, "window": ArraySpec("a", (2,), "int8", 1)}
    },
}


def kind_and_name(changes):
    """A record of another kind, and the name of one that is wanted."""
    other = tier_cases.kind(**changes)
    return record(page_names(other, "", range(4))[0]), page_names(tier_cases.DEFAULT, "", range(4))[0]


for field, changes in OTHER.items():

    @bad(123, f"a record of another {field}", VERSION, field)
    def _(changes=changes):
        other, name = kind_and_name(changes)
        encoding.decode(encoding.encode(other), name)


@bad(123, "a record of the next version of the format", VERSION, "version 2", "expected 1")
def _():
    made = records(1)[0]
    encoding.decode(sealed(*parts(encoding.encode(made)), version=2), made.name)


@bad(123, "a version whose table is none of this one's", VERSION, "version 7")
def _():
    encoding.decode(sealed(b"\x82\xa5", b"123", version=7), records(1)[0].name)


@defined(123, "the file of another kind is refused, counted and removed")
def _():
    for changes in OTHER.values():
        with stored() as (tier, path, (made,)):
            other, name = kind_and_name(changes)
            assert other.name.key != name.key == made.name.key  # it is not even found, unless somebody renames it
            path_of(path, name).write_bytes(encoding.encode(other))
            assert tier.get(name) is None and name.key not in tier
            assert (tier.counters.refused, tier.counters.misses, tier.counters.damaged) == (1, 1, 0)
            tier.flush()
            assert not list(path.iterdir())


@defined(123, "the file of another text, namespace or place in a text is damage")
def _():
    wanted = page_names(tier_cases.DEFAULT, "a", range(8))
    others = [
        page_names(tier_cases.DEFAULT, "a", [0, 1, 2, 9])[0],
        page_names(tier_cases.DEFAULT, "b", range(8))[0],
        page_names(tier_cases.DEFAULT, ("a",), range(8))[0],
        wanted[1],
        PageName(tier_cases.DEFAULT, "a", wanted[1].key, wanted[0].tokens),
    ]
    for other in others:
        with folder() as path, DiskTier(path, ROOM) as tier:
            tier.write(record(wanted[0]))
            path_of(path, wanted[0]).write_bytes(encoding.encode(record(other)))
            with pytest.raises(CORRUPT, match="is not that of the page"):
                tier.read(wanted[0])
            assert tier.get(wanted[0]) is None and tier.counters.damaged == 1


class Planted:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@defined(124, "a pickle and an array of pickled objects")
def _():
    with stored() as (tier, path, (made,)):
        trap = path / "executed"
        for write in (
            lambda file: pickle.dump(Planted(str(trap)), file),
            lambda file: np.save(file, np.array([Planted(str(trap))], object)),
            lambda file: np.savez(file, x=np.array([Planted(str(trap))], object)),
            lambda file: np.save(file, np.zeros(300)),
        ):
            with path_of(path, made.name).open("wb") as file:
                write(file)
            with pytest.raises(CORRUPT, match="starts with"):
                tier.read(made.name)
        assert not trap.exists()


def test_nothing_is_unpickled_mapped_or_evaluated():
    for path in (ROOT / "kvattn" / "serving").glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        never = {"pickle", "marshal", "shelve", "mmap", "subprocess", "socket", "ctypes"}
        never -= {"socket"} if path.name == "coordinator.py" else set()  # a program that listens
        assert not names & never, path
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"eval", "exec", "np.load", "np.memmap", "np.fromfile"}, path
        assert not any(name.endswith(".tofile") for name in called), path


# The disk -------------------------------------------------------------------------------------------------------------

FAILURES = [("open", errno.EROFS), ("open", errno.EMFILE), ("open", errno.EACCES), ("flock", errno.EIO)]
FAILURES += [("write", errno.ENOSPC), ("write", errno.EIO), ("write", errno.EDQUOT), ("fsync", errno.EIO)]
FAILURES += [("rename", errno.EIO), ("rename", errno.ENOSPC), ("close", errno.EDQUOT)]


@defined(125, "a write that fails at any call: OffloadError with errno, and nothing of it is there")
def _():
    for done in (False, True):
        for call, code in FAILURES:
            with stored(2) as (tier, path, made):
                new = records(1, start=50)[0]
                with failing(call, code, done=done and call != "open"), pytest.raises(OFFLOAD) as caught:
                    tier.write(new)
                assert caught.value.errno == code and os.strerror(code) in str(caught.value)
                assert new.name.key not in tier and tier.read(new.name) is None
                assert {p.name for p in path.iterdir()} == {path_of(path, r.name).name for r in made}
                assert tier.counters.failed == 1 and all(same(tier.get(r.name), r) for r in made)
                tier.write(new)
                assert same(tier.read(new.name), new)


@defined(125, "what an engine calls raises none of it")
def _():
    for call, code in FAILURES:
        with stored() as (tier, path, (made,)):
            new = records(1, start=50)[0]
            tiers = Tiers([HostTier(1), tier])
            with failing(call, code):
                tiers.store([new])
                tiers.flush()
                assert tiers.load([new.name]) == []
            assert tier.counters.failed == 1 and new.name.key not in tiers
            assert len(list(path.iterdir())) == 1 and same(tier.get(made.name), made)


@defined(125, "short writes, and one that writes nothing")
def _():
    with folder() as path, DiskTier(path, ROOM) as tier:
        made = records(1)[0]
        with System(lambda number, name, call: half(call)) as system:
            tier.write(made)
        assert system.log.count("write") > 5
        assert path_of(path, made.name).read_bytes() == encoding.encode(made)
        with System(lambda number, name, call: half(call)):
            assert same(tier.read(made.name), made)
        with System(lambda number, name, call: 0 if name == "write" else call()), pytest.raises(OFFLOAD) as caught:
            tier.write(records(1, start=9)[0])
        assert caught.value.errno == errno.EIO


@defined(125, "a limit on the size of files, by the system")
def _():
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with stored() as (tier, path, (made,)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        try:
            with pytest.raises(OFFLOAD) as caught:
                tier.write(records(1, start=9)[0])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.errno == errno.EFBIG
        assert len(list(path.iterdir())) == 1 and same(tier.read(made.name), made)


@defined(125, "a directory that is not there, or no longer")
def _():
    with folder() as path:
        with pytest.raises(OFFLOAD) as caught:
            DiskTier(path / "in" / "nothing", ROOM)
        assert caught.value.errno == errno.ENOENT and "nothing" in str(caught.value)
        with DiskTier(path, ROOM) as tier:
            path.rmdir()
            with pytest.raises(OFFLOAD) as caught:
                tier.write(records(1)[0])
            assert caught.value.errno == errno.ENOENT


@defined(125, "a record larger than the tier")
def _():
    made = records(1)[0]
    with folder() as path, DiskTier(path, 500) as tier:
        with pytest.raises(OFFLOAD, match="larger than max_bytes, 500") as caught:
            tier.write(made)
        assert caught.value.errno == errno.EFBIG and tier.put(made) == [made] and not tier.nbytes


@defined(125, "a tier that is closed")
def _():
    with stored() as (tier, _, (made,)):
        tier.close()
        tier.close()
        for call in (tier.get, tier.read):
            with pytest.raises(OFFLOAD, match="closed"):
                call(made.name)
        for call in (tier.put, tier.write):
            with pytest.raises(OFFLOAD, match="closed"):
                call(made)


@defined(126, "a file that is gone before it is read, removed or evicted")
def _():
    with stored(4) as (tier, path, made):
        for each in made:
            path_of(path, each.name).unlink()
        assert tier.read(made[0].name) is None and made[0].name.key in tier
        assert tier.get(made[0].name) is None and made[0].name.key not in tier
        tier.remove(made[1].name.key)
        tier.remove(made[1].name.key)
        tier.flush()
        assert (tier.counters.misses, tier.counters.failed, tier.counters.damaged) == (1, 0, 0)
    with stored(2) as (tier, path, made):
        path_of(path, made[0].name).unlink()
        tier.max_bytes = tier._recent.max_bytes = tier.nbytes
        tier.put(records(1, start=5)[0])
        tier.flush()
        assert tier.counters.evicted == 1 and tier.counters.failed == 0


def linked(make):
    with folder() as path:
        path.mkdir()
        (path / "real").mkdir(mode=0o700)
        make(path)


bad(127, "a directory that is a link", CONFIG, "symbolic link")(
    lambda: linked(lambda path: [(path / "a").symlink_to(path / "real"), DiskTier(path / "a", ROOM)])
)
bad(127, "a link with a slash after it", CONFIG, "symbolic link")(
    lambda: linked(lambda path: [(path / "a").symlink_to(path / "real"), DiskTier(f"{path}/a/", ROOM)])
)
bad(127, "a directory that is a file", CONFIG, "must be a directory")(
    lambda: linked(lambda path: [(path / "a").touch(), DiskTier(path / "a", ROOM)])
)
bad(127, "a path with ..", CONFIG, "'..'")(lambda: linked(lambda path: DiskTier(path / "real" / ".." / "a", ROOM)))
bad(127, "a directory that everybody may write to", CONFIG, "everybody", "777")(
    lambda: linked(lambda path: [(path / "real").chmod(0o777), DiskTier(path / "real", ROOM)])
)
bad(127, "the like with a sticky bit", CONFIG, "1777")(
    lambda: linked(lambda path: [(path / "real").chmod(0o1777), DiskTier(path / "real", ROOM)])
)
for key in ("../x", b"../x", b"", b"a" * 31, "a" * 32, None):
    bad(127, f"the key {key!r}", CONFIG, "32 bytes")(
        lambda key=key: linked(lambda p: key in DiskTier(p / "real", ROOM))
    )
    bad(127, f"the key {key!r} is removed", CONFIG, "32 bytes")(
        lambda key=key: linked(lambda p: DiskTier(p / "real", ROOM).remove(key))
    )


@defined(127, "a link, a pipe or a directory in place of a record: not followed, not waited for")
def _():
    for make in (
        lambda path, target: path.symlink_to(target),
        lambda path, target: os.mkfifo(path),
        lambda path, target: path.mkdir(),
    ):
        with stored(2) as (tier, path, made):
            file, target = path_of(path, made[0].name), path.parent / "target"
            file.rename(target)
            make(file, target)
            with pytest.raises(OFFLOAD) as caught:
                tier.read(made[0].name)
            assert caught.value.errno in (errno.ELOOP, errno.EINVAL)
            with DiskTier(path, ROOM) as other:
                assert made[0].name.key not in other and made[1].name.key in other
            assert tier.get(made[0].name) is None and tier.counters.failed == 1
            tier.flush()
            assert target.read_bytes() == encoding.encode(made[0])


@defined(128, "two tiers of one directory")
def _():
    made = records(30)
    with folder() as path, DiskTier(path, ROOM) as one, DiskTier(path, ROOM) as two:
        for each in made:
            one.put(each)
            two.put(each)
        one.flush()
        two.flush()
        assert all(same(tier.read(r.name), r) for r in made for tier in (one, two))
        assert len(list(path.iterdir())) == 30
        one.remove(made[0].name.key)
        one.flush()
        assert two.get(made[0].name) is None and two.counters.misses == 1
        two.put(made[0])
        two.flush()
        assert one.get(made[0].name) is None  # it finds it when it is started next
        with DiskTier(path, ROOM) as three:
            assert same(three.get(made[0].name), made[0])


def kills(*arguments):
    with folder() as path:
        command = [sys.executable, "-W", "ignore", ROOT / "tests" / "tier_kills.py", path, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split()[-1])


@defined(128, "several processes that store and remove the same records")
def _():
    assert kills("race", 3) == 3


@defined(129, "killed at every system call")
def _():
    assert kills("calls", 1) >= 15


@FULL_RUN
def test_killed_at_every_call_before_it_and_in_it():
    assert kills("calls", 2) >= 30


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=FULL_RUN)])
def test_killed_at_random_times(count):
    """Row 129: afterwards each record is absent or right, and nothing else lies about."""
    assert kills("random", count) == count


@defined(130, "records that are loaded, and a pool without room for them")
def _():
    with stored(3) as (tier, _, made):
        names = [r.name for r in made]
        tiers = Tiers([HostTier(ROOM), tier])
        pool = BlockPool(2, tier_cases.PAGE)
        found = tiers.load(names)
        with pytest.raises(errors.OutOfBlocksError):
            pool.allocate("a", len(found) * tier_cases.PAGE)
        assert pool.num_free == 2 and tiers.find(names) == 3
        assert all(map(same, tiers.load(names), made))


@defined(131, "a sequence of no tokens")
def _():
    name = PageName(tier_cases.DEFAULT, "a", b"", ())
    made = record(name)
    with folder() as path:
        with DiskTier(path, ROOM) as tier:
            tier.write(made)
            assert 0 < tier.nbytes == len(encoding.encode(made))
        with DiskTier(path, ROOM) as tier:
            found = tier.get(name)
            assert same(found, made) and not found.arrays and not found.name.tokens
    host = HostTier(ROOM)
    assert host.put(made) == [] and same(host.get(name), made) and host.nbytes > 0
    assert (
        page_names(tier_cases.DEFAULT, "a", []) == [] and Tiers([host]).find([]) == 0 and Tiers([host]).load([]) == []
    )


class Gate(System):
    """A system in which calls of a name wait until the gate is opened."""

    def __init__(self, name):
        self.opened, self.reached = threading.Event(), threading.Event()

        def at(number, at_name, call):
            if at_name == name:
                self.reached.set()
                assert self.opened.wait(20)
            return call()

        super().__init__(at)

    def __exit__(self, *args):
        self.opened.set()
        super().__exit__(*args)


@defined(132, "a read that stalls: OffloadError after the deadline, a miss, and no wait for the next ones")
def _():
    with stored(3, deadline=0.1) as (tier, _, made):
        with Gate("readv") as gate:
            start = time.monotonic()
            with pytest.raises(OFFLOAD, match=r"a read from .* not done in 0.1 s") as caught:
                tier.read(made[0].name)
            assert caught.value.errno == errno.ETIMEDOUT and 0.1 <= time.monotonic() - start < 5
            with pytest.raises(OFFLOAD, match="not tried: an earlier one stalls") as caught:
                tier.read(made[1].name)
            assert caught.value.errno == errno.EBUSY
            assert Tiers([HostTier(ROOM), tier]).load([made[1].name]) == []
            assert made[1].name.key in tier  # it was not tried
            assert (tier.counters.failed, tier.counters.misses) == (1, 1)
            gate.opened.set()
            tier._reader._last.exception(20)
        assert same(tier.get(made[1].name), made[1])
    with stored(1, deadline=0.1) as (tier, _, (made,)), Gate("open"):
        assert tier.get(made.name) is None and made.name.key not in tier
        assert (tier.counters.failed, tier.counters.misses) == (1, 1)


@pytest.mark.parametrize("row", TABLE.parameters())
def test_rows(row):
    run(row)


def test_numbers():
    assert TABLE.numbers() == set(range(119, 133))


# Writing --------------------------------------------------------------------------------------------------------------


def test_what_is_written_in_which_order():
    """The file's bytes are on the disk before it has its name, and the name is before anybody is told."""
    calls = []

    def at(number, name, call):
        calls.append((name, call.args[0] if call.args else None))
        return call()

    made = records(1)[0]
    with folder() as path, DiskTier(path, ROOM) as tier, System(at):
        tier.write(made)
        assert [name for name, _ in calls] == ["open", "flock", "write", "fsync", "rename", "fsync", "close"]
        (_, temporary), (_, fd), _, (_, synced), (_, renamed), (_, directory), (_, closed) = calls
        assert temporary == renamed and temporary.startswith("tmp-") and fd == synced == closed != directory
        assert stat.S_ISDIR(os.fstat(directory).st_mode)


def test_only_the_user_may_read():
    """Whatever the umask says."""
    before = os.umask(0)
    try:
        with folder() as path, DiskTier(path, ROOM) as tier:
            tier.write(records(1)[0])
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
            assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}
    finally:
        os.umask(before)


def test_what_waits_is_found():
    """While nothing can be written, all that was put is there, and nobody waits."""
    made = records(5)
    names = [r.name for r in made]
    with folder() as path, DiskTier(path, ROOM) as tier, Gate("write") as gate:
        tiers = Tiers([tier])
        tiers.store(made)
        assert gate.reached.wait(20)
        assert tiers.find(names) == 5 and all(map(same, tiers.load(names), made))
        assert tier.nbytes == sum(encoding.encoded_size(r) for r in made)
        assert not list(path.glob("*.kv"))
        gate.opened.set()
        tiers.flush()
        assert len(list(path.glob("*.kv"))) == 5


def test_what_leaves_while_it_waits_comes_back():
    """A record that is evicted before it is written, and put again, is on the disk in the end."""
    one, two = records(2)
    with folder() as path, DiskTier(path, encoding.encoded_size(two) + 9) as tier, Gate("write") as gate:
        for made in (one, two, one, two, one):
            assert tier.put(made) == []
        assert gate.reached.wait(20) and two.name.key not in tier
        assert tier.get(two.name) is None and tier.read(two.name) is None
        gate.opened.set()
        tier.flush()
        assert same(tier.get(one.name), one)
        assert [file.name for file in path.iterdir()] == [path_of(path, one.name).name]


def test_a_queue_that_is_full():
    """`put` waits for room, not for ever; the record that found none is lost and counted."""
    made = records(4)
    size = max(map(encoding.encoded_size, made))
    with folder() as path, DiskTier(path, ROOM, deadline=0.1, queue_bytes=2 * size) as tier:
        with Gate("write") as gate:
            tier.put(made[0])
            tier.put(made[1])
            start = time.monotonic()
            assert tier.put(made[2]) == [] and 0.1 <= time.monotonic() - start < 5
            assert made[2].name.key not in tier and tier.counters.failed == 1 and tier.counters.stored == 2
            with pytest.raises(OFFLOAD) as caught:
                tier.write(made[3])
            assert caught.value.errno == errno.ETIMEDOUT and made[3].name.key not in tier
        tier.flush()
        with Gate("write") as gate:
            tier.deadline = 20
            tier.put(made[2])
            tier.put(made[3])
            threading.Timer(0.03, gate.opened.set).start()
            tier.put(records(1, start=99)[0])  # waits until there is room
        tier.flush()
        assert tier.counters.failed == 1 and tier.counters.stored == 5
        assert all(same(tier.get(r.name), r) for r in [*made, *records(1, start=99)])
    with folder() as path, DiskTier(path, ROOM, deadline=0.1, queue_bytes=1) as tier:
        tier.put(made[0])  # one may exceed it
        tier.flush()
        assert same(tier.get(made[0].name), made[0])


def test_a_disk_that_has_stopped_is_waited_for_once():
    """Not by every record that follows; and it is tried again when there is room."""
    made = records(9)
    with folder() as path, DiskTier(path, ROOM, deadline=0.2, queue_bytes=1) as tier, Gate("write") as gate:
        tier.put(made[0])
        start = time.monotonic()
        for each in made[1:]:
            assert tier.put(each) == []
        assert 0.2 <= time.monotonic() - start < 2 * 0.2 and tier.counters.failed == 8
        gate.opened.set()
        tier.flush()
        tier.put(made[1])
        assert same(tier.get(made[1].name), made[1])


def test_where_no_thread_can_be_started(monkeypatch):
    """As at the end of the interpreter: all works, but is waited for."""

    def refused(thread):
        raise RuntimeError("can't start new thread")

    made = records(3)
    with folder() as path:
        with monkeypatch.context() as patch, DiskTier(path, ROOM) as tier:
            patch.setattr(threading.Thread, "start", refused)
            for each in made:
                assert tier.put(each) == []
            tier.remove(made[0].name.key)
            assert same(tier.get(made[1].name), made[1]) and tier.get(made[0].name) is None
            tier.flush()
            assert len(list(path.iterdir())) == 2
        with DiskTier(path, ROOM) as tier:
            assert [right(tier.get(r.name), r) and r.name.key in tier for r in made] == [False, True, True]


def test_written_when_the_process_ends():
    """Without `close`."""
    with folder() as path:
        code = (
            "import sys; sys.path[:0] = ['tests', '.']; import tier_cases as t; from kvattn.serving import DiskTier;"
            "tier = DiskTier(sys.argv[1], 10**6); [tier.put(r) for r in t.records(200)]"
        )
        done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        with DiskTier(path, ROOM) as tier:
            made = records(200)
            assert all(same(tier.get(r.name), r) for r in made)


# Starting -------------------------------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_leaves_first_after_a_restart():
    """The order of writing is all that files say."""
    made = records(4)
    with folder() as path:
        with DiskTier(path, ROOM) as tier:
            for each in made:
                tier.write(each)
        for i, each in enumerate(made):
            os.utime(path_of(path, each.name), ns=(i, [30, 10, 40, 20][i]))
        sizes = [path_of(path, r.name).stat().st_size for r in made]
        with DiskTier(path, sizes[0] + sizes[2]) as tier:
            assert [r.name.key in tier for r in made] == [True, False, True, False]
            tier.flush()
            assert len(list(path.iterdir())) == 2
        small, large = (records(1, kind=tier_cases.sized_kind(size))[0] for size in (10, 5000))
        with DiskTier(path, ROOM) as tier:
            tier.write(small)
            tier.write(large)
        with DiskTier(path, encoding.encoded_size(small)) as tier:  # what never fits leaves, and nothing else for it
            assert small.name.key in tier and large.name.key not in tier
        with DiskTier(path, 9) as tier:
            assert not tier.nbytes
        assert not list(path.iterdir())


def test_a_start_reads_no_record():
    with stored(5) as (_, path, _), System() as system, DiskTier(path, ROOM) as tier:
        assert (
            tier.nbytes and set(system.log) == {"mkdir", "open", "fstat", "scandir"} and system.log.count("open") == 1
        )


def test_what_dead_processes_left_is_cleared_away():
    """And nothing else: not what a living one is writing, not what is somebody else's."""
    made = records(1)[0]
    with stored() as (_, path, _):
        others = ["notes.txt", f"{'0' * 64}.kv.bak", f"{'F' * 64}.kv", f"x{'0' * 64}.kv"]
        for name in ["tmp-1-dead", "tmp-", *others]:
            (path / name).write_text("x")
        (path / f"{'0' * 64}.kv").mkdir()
        with DiskTier(path, ROOM) as tier:
            assert {p.name for p in path.iterdir()} == {*others, f"{'0' * 64}.kv", path_of(path, made.name).name}
            assert tier.nbytes == path_of(path, made.name).stat().st_size
            with Gate("write") as gate:
                new = records(1, start=9)[0]
                tier.put(new)
                assert gate.reached.wait(20) and len(list(path.glob("tmp-*"))) == 1
                gate.opened.set()
                with Gate("fsync") as later:
                    later.opened.wait(0.05)
                    with DiskTier(path, ROOM):
                        pass
                tier.flush()
            assert same(tier.read(new.name), new) and not list(path.glob("tmp-*"))


# Faults by the number of the call -------------------------------------------------------------------------------------


def life_of_a_tier(path):
    """All calls an engine makes. Gives the tier, or None where there is no directory."""
    made = records(4)
    names = [r.name for r in made]
    try:
        tier = DiskTier(path, ROOM)
    except OFFLOAD:
        return None
    with Tiers([HostTier(made[1].nbytes), tier]) as tiers:
        tiers.store(made)
        tiers.flush()
        assert all(map(right, tiers.load(names), made))
        tier.remove(made[3].name.key)
        tier.flush()
        tiers.find(names)
        assert all(right(tier.get(r.name), r) for r in made)
    return tier


KINDS = {
    "EIO": lambda number: failing(number=number, code=errno.EIO),
    "ENOSPC, after it was done": lambda number: failing(number=number, code=errno.ENOSPC, done=True),
    "EINTR": lambda number: failing(number=number, code=errno.EINTR),
    "by half": lambda number: System(lambda at, name, call: half(call) if at == number else call()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_fails_once(kind):
    """Nothing raises; a record is absent or right, at most one is lost, nothing else lies about."""
    with folder() as path, System() as system:
        life_of_a_tier(path)
    made, failed = records(4), 0
    for number in range(len(system.log)):
        with folder() as path:
            with KINDS[kind](number):
                tier = life_of_a_tier(path)
            assert tier is not None or not open_in(path), number
            if tier is None:
                continue
            failed += tier.counters.failed
            with DiskTier(path, ROOM) as again:
                found = [again.get(r.name) for r in made]
                assert all(map(right, found, made)), number
                assert sum(r is not None for r in found) >= 2 and again.counters.damaged == 0, number
                left = {file.name for file in path.iterdir()}
                assert left == {path_of(path, r.name).name for r in found if r is not None}, number
            del tier
            assert not open_in(path), number
    assert len(system.log) > 40 and (failed > 10 or kind == "by half")


# Files that are damaged -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=FULL_RUN)])
def test_damaged_files(count):
    """Bits, pieces and whole files: a record is refused or what it was; a tier drops it and goes on."""
    rng = chance("damaged files", count)
    with stored(3) as (tier, path, made):
        contents = [encoding.encode(r) for r in made]
        refused = 0
        for i in range(count):
            at = rng.randrange(3)
            changed = damaged(contents[at], rng)
            file = path_of(path, made[at].name)
            file.write_bytes(changed)
            try:
                found = tier.read(made[at].name)
            except CORRUPT as error:
                assert type(error) is CORRUPT
                refused += 1
            else:
                assert same(found, made[at])
            if i % 10 == 0:
                dropped = tier.counters.damaged
                assert right(tier.get(made[at].name), made[at])
                if changed != contents[at]:
                    assert tier.counters.damaged == dropped + 1 and made[at].name.key not in tier
                    tier.put(made[at])
                    tier.flush()
            file.write_bytes(contents[at])
        assert refused > 0.95 * count
        assert all(same(tier.get(r.name), r) for r in made)
