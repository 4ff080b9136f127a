"""Where tokens lie: contiguous caches and pages, copy-on-write, trees of prefixes, hosts that lend, tiers."""

import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np
from svg import CELL, MARGIN, Picture

import kvattn
from kvattn.serving import (
    ArraySpec,
    BlockPool,
    DiskTier,
    HostTier,
    Kind,
    Ledger,
    RadixTree,
    Record,
    Tiers,
    page_names,
    shared_prefixes,
    tokens_read,
)

COLOURS = {"a": "d0", "b": "d1", "c": "d2", "d": "d3"}


def filled(cache, lengths):
    """A cache after one chunk of so many tokens in each row."""
    x = jnp.ones((len(lengths), max(lengths), cache.num_kv_heads, 8))
    return kvattn.cached_attention(x, x, x, cache, num_new=jnp.asarray(lengths), implementation="xla")[1]


def pages():
    """The same three sequences in a contiguous cache and in pages."""
    names, lengths, capacity, size = "abc", [10, 5, 3], 12, 4
    whole = filled(kvattn.KVCache.create(3, 1, 8, capacity=capacity, dtype=jnp.float32), lengths)
    draw = Picture("Contiguous, and in pages of 4", [kvattn.KVCache, kvattn.PagedKVCache, BlockPool], __file__)
    draw.line("KVCache: every row has room for the longest", "head")
    for row, positions in enumerate(np.asarray(whole.positions)):
        draw.text(MARGIN, draw.y + 14, f"row {names[row]}", "small")
        for s, p in enumerate(positions):
            draw.cell(MARGIN + 48 + s * CELL, draw.y, p if p >= 0 else "", f"d{row}" if p >= 0 else "empty")
        draw.y += CELL - 2
    draw.y += 18
    pool = BlockPool(num_blocks=9, block_size=size)
    for name, length in zip(names, lengths, strict=True):
        pool.allocate(name, length)
    table = pool.page_table(names)
    paged = kvattn.PagedKVCache.create(9, size, 1, 8, batch_size=3, max_pages=3, dtype=jnp.float32)
    paged = filled(paged.with_tables(table, [0, 0, 0]), lengths)
    draw.line("PagedKVCache: a pool of pages, and a table for each row", "head")
    positions = np.asarray(paged.positions)
    at = {}
    for row in range(3):
        for column, page in enumerate(table[row]):
            if page >= 0:
                at[int(page)] = (row, positions[row, column * size : (column + 1) * size])
    for page in range(9):
        x, y = MARGIN + (page % 3) * (4 * CELL + 14), draw.y + (page // 3) * (CELL + 18)
        draw.text(x, y + 8, f"page {page}", "small")
        row, held = at.get(page, (None, [-1] * size))
        for s, p in enumerate(held):
            draw.cell(x + s * CELL, y + 12, p if p >= 0 else "", f"d{row}" if p >= 0 else "empty")
    draw.y += 3 * (CELL + 18) + 14
    for row, name in enumerate(names):
        draw.text(MARGIN, draw.y, f"table of {name}: {pool.table(name)}", "small")
        draw.cell(MARGIN + 120, draw.y - 11, kind=f"d{row}", width=14, height=14)
        draw.y += 17
    usage = pool.usage()
    draw.line(
        f"{sum(lengths)} tokens take {3 * capacity} slots contiguously and {usage.used_blocks * size} in pages; "
        f"{pool.num_free} pages are free for whoever comes next.", "small", 72,
    )  # fmt: skip
    return draw.svg()


def pool_row(draw, pool, names):
    """Every block of a pool, with the sequences whose tables name it."""
    tables = {name: pool.table(name) for name in names if name in pool}
    for block in range(8):
        users = [name for name, table in tables.items() if block in table]
        x = MARGIN + block * 44
        draw.text(x + 2, draw.y + 8, str(block), "small")
        kind = "empty" if not users else "shared" if len(users) > 1 else COLOURS[users[0]]
        draw.cell(x, draw.y + 11, "+".join(users), kind, 42)
    draw.y += 46
    words = [f"{name}: {table}, {pool.length(name)} tokens" for name, table in tables.items()]
    for line in words or ["no sequence"]:
        draw.text(MARGIN, draw.y, line, "small")
        draw.y += 14
    draw.y += 12


def pages_in_time():
    """A prompt, two samples of it, and what each call does to the pool."""
    pool = BlockPool(num_blocks=8, block_size=4)
    draw = Picture("Pages, table and copies over time", [BlockPool], __file__)
    draw.line("A pool of 8 blocks of 4 tokens. In a block: the sequences whose tables name it.", "small", 72)
    calls = [
        ("pool.allocate('a', 7)", "a prompt of 7 tokens takes two blocks; the second has room for one more"),
        ("pool.fork('a', 'b')", "a second sample shares both, and nothing is copied"),
        ("pool.append('b')", "b writes its eighth token. Block 1 is shared, so b gets a copy"),
        ("pool.append('a')", "nobody else has block 1 now: a writes where it is"),
        ("pool.append('a', 2)", "a is full at 8 and takes a new block"),
        ("pool.free('b')", "what only b had comes free; block 0 stays a's"),
        (
            "pool.allocate('c', 9, prefix=pool.table('a')[:1])",
            "c begins with a's first 4 tokens, and shares their block",
        ),
    ]
    for time, (call, words) in enumerate(calls, 1):
        draw.text(MARGIN, draw.y, f"Time {time}   {call}", "head")
        draw.y += 15
        copies = eval(call, {"pool": pool})
        if copies:
            words += ": copy " + ", ".join(f"{s} → {t}" for s, t in copies)
        draw.line(words, "small", 76)
        draw.y -= 4
        pool_row(draw, pool, "abc")
        pool.check()
    draw.legend(("d0", "a"), ("d1", "b"), ("d2", "c"), ("shared", "shared"), ("empty", "free"))
    return draw.svg()


def window_pages():
    """What a window has left behind goes back to the pool."""
    window, size = 6, 4
    policy = kvattn.policies.OrderedWindow(window)
    pool = BlockPool(num_blocks=8, block_size=size)
    draw = Picture(f"OrderedWindow({window}) in pages of {size}", [BlockPool, kvattn.policies.OrderedWindow], __file__)
    draw.line(
        "Columns of one sequence's table, token by token. A page whose tokens no query sees again goes back.",
        "small",
        72,
    )
    pool.allocate("a", 1)
    most = 0
    for t in range(18):
        if t:
            pool.append("a")
            pool.forget("a", max(t + 1 - (policy.window - 1) - 1, 0))
        draw.text(MARGIN, draw.y + 13, f"token {t}", "small")
        table = pool.table("a")
        for column, page in enumerate(table):
            x = MARGIN + 58 + column * 64
            draw.cell(x, draw.y, f"page {page}" if page >= 0 else "", "d0" if page >= 0 else "empty", 62, 18)
        most = max(most, sum(page >= 0 for page in table))
        draw.y += 20
    draw.y += 14
    draw.line(f"At most {most} pages at once, however long the text: what was given back is taken again.", "small", 72)
    return draw.svg()


def radix_tree():
    """Texts that begin alike, as a tree of pages."""
    size, tree, pool = 2, RadixTree(page_size=2), BlockPool(num_blocks=12, block_size=2)
    letters = lambda text: [ord(x) for x in text]
    draw = Picture("A radix tree over pages of 2 tokens", [RadixTree, BlockPool], __file__)

    def keep(name, text):
        hit = tree.match_prompt(letters(text))
        pool.allocate(name, len(text), prefix=hit.pages)
        pool.hold(tree.adopt(letters(text), pool.table(name)))
        pool.free(name)
        return hit.length

    def show():
        def node(at, x, y, above):
            for child in sorted(at.children.values(), key=lambda n: n.edge):
                words = "".join(map(chr, np.frombuffer(child.edge, np.int32)))
                if above is not None:
                    draw.wire((x - 20, above), (x - 12, above), (x - 12, y + 10), (x - 2, y + 10))
                for i, page in enumerate(child.columns[0]):
                    draw.cell(x + i * 36, y, words[i * size : (i + 1) * size], "own" if child.locks else "kept", 34)
                    draw.text(x + i * 36 + 17, y + 31, f"page {page}", "foot", "middle")
                y = max(node(child, x + child.num_pages * 36 + 20, y, y + 10), y + 42)
            return y

        draw.y = node(tree._roots[""], MARGIN, draw.y, None) + 8

    def time(number, call, words):
        draw.text(MARGIN, draw.y, f"Time {number}   {call}", "head")
        draw.y += 15
        draw.line(words, "small", 76)
        show()

    keep("first", "You are kind.")
    time(1, 'insert "You are kind."', "13 tokens fill 6 pages; the last token fills none and is not kept.")
    found = keep("second", "You are rude!!")
    time(
        2,
        'insert "You are rude!!"',
        f"match_prompt finds {found} tokens, so {found // 2} pages are shared and the node is split there.",
    )
    hit = tree.match_prompt(letters("You are kind?"))
    tree.lock(hit)
    time(
        3,
        'lock(match_prompt("You are kind?"))',
        f"a request that is running reads {hit.length} tokens of it: blue pages stay.",
    )
    gone = tree.evict(5)
    pool.release(gone)
    time(
        4,
        "evict(5)",
        f"the ends of texts used longest ago leave, and nothing that is locked: pages {gone}, {len(gone)} of the 5.",
    )
    return draw.svg()


def shared_prefix():
    """Rows whose tables begin alike read those pages together."""
    size = 4
    table = np.array(
        [[0, 1, 2, 3, 8], [0, 1, 2, 3, 9], [0, 1, 4, 5, 10], [0, 1, 4, 5, 11], [0, 1, 4, 5, 12], [0, 1, 6, 7, 13]]
    )
    lengths = np.full(6, 18)
    shared = shared_prefixes(table, lengths, page_size=size, fewest=0)
    draw = Picture("Rows that share pages read them together", [shared_prefixes], __file__)
    draw.line("Page tables of six rows. A frame is a span: its pages are read once for all its members.", "small", 72)
    top = draw.y
    for row, pages_of in enumerate(table):
        draw.text(MARGIN, draw.y + 14, f"row {row}", "small")
        for column, page in enumerate(pages_of):
            draw.cell(MARGIN + 46 + column * 50, draw.y, page, "kept", 48)
        draw.y += CELL - 2
    for level, spans in enumerate(shared):
        for members, begin, end in zip(spans.members, spans.begin, spans.end, strict=True):
            rows = [int(r) for r in members if r >= 0]
            rows = sorted({r for r in rows if r < len(table)})
            if end <= begin or len(rows) < 2:
                continue
            assert rows == list(range(rows[0], rows[-1] + 1))
            kind = ("first", "heavy")[level]
            for r in rows:
                for c in range(begin, end):
                    draw.cell(MARGIN + 46 + c * 50, top + r * (CELL - 2), table[r, c], kind, 48)
            draw.cell(
                MARGIN + 44 + begin * 50,
                top + rows[0] * (CELL - 2) - 2,
                kind="frame",
                width=(end - begin) * 50,
                height=len(rows) * (CELL - 2) + 1,
            )
    draw.y += 18
    draw.legend(("first", "level 1"), ("heavy", "level 2"), ("kept", "read by the row alone"))
    alone, together = tokens_read(lengths, size, None), tokens_read(lengths, size, shared)
    draw.line(f"Tokens read in a step: {alone} row by row, {together} together.", wide=72)
    return draw.svg()


def ledger():
    """Who holds which block on which host, as hosts lend to each other."""
    book = Ledger(num_hosts=3, blocks_per_host=6, watermark=0.17)
    draw = Picture("Blocks of three hosts, lent to each other", [Ledger], __file__)
    draw.line("6 blocks a host, of which each keeps 1 for itself. In a block: the sequence that has it.", "small", 72)

    def show(number, call, words, moves=()):
        draw.text(MARGIN, draw.y, f"Time {number}   {call}", "head")
        draw.y += 15
        moved = ", ".join(f"{s} → {t}" for s, t in moves)
        draw.line(words + (f" Moves: {moved}." if moved else ""), "small", 76)
        tables = {name: book.table(name) for name in book.sequences}
        for host in book.hosts:
            draw.text(MARGIN, draw.y + 13, f"host {host}", "small")
            for i in range(6):
                block = host * 6 + i
                user = next((name for name, table in tables.items() if block in table), None)
                draw.cell(MARGIN + 46 + i * 40, draw.y, user or "", COLOURS.get(user, "empty"), 38, 18)
                if user and book.home(user) != host:
                    draw.cell(MARGIN + 46 + i * 40, draw.y, kind="frame", width=38, height=18)
            draw.y += 21
        loans = ", ".join(f"{n} of host {c} to host {d}" for (c, d), n in sorted(book.loans.items()))
        draw.text(MARGIN, draw.y + 12, f"lent: {loans or 'nothing'}", "small")
        draw.y += 32

    book.allocate("a", 3, home=0)
    book.allocate("b", 3, home=0)
    book.allocate("c", 2, home=1)
    show(1, "allocate a and b at home on host 0, c on host 1", "Each takes the blocks of its home.")
    book.append("a", 4)
    show(2, "append 4 to a", "Nothing is left at home: they come one by one from the host with most free blocks.")
    book.free("b")
    show(3, "free b", "There is room at a's home again. Nothing moves by itself.")
    show(4, "repay(limit=8)", "Borrowed blocks are copied home, the oldest loans first.", book.repay(8))
    show(5, "remove_host(2)", "What it has is copied to the others, and the host can go.", book.remove_host(2))
    draw.legend(("d0", "a"), ("d1", "b"), ("d2", "c"), ("frame", "borrowed"), ("empty", "free"))
    return draw.svg()


def tiers():
    """Pages that leave the device sink from tier to tier, and rise when they are hit."""
    spec = ArraySpec("layers heads offsets features", (1, 1, 2, 8), "float32")
    kind = Kind(model="drawing", dtype="float32", codec="Plain()", policy="Full()", page_size=2, arrays={"keys": spec})
    names = page_names(kind, namespace="", tokens=list(range(12)))
    array = lambda: {"keys": np.zeros(spec.shape, np.float32)}
    draw = Picture("Tiers: host memory above a disk", [HostTier, DiskTier, Tiers], __file__)
    draw.line("Six pages of a text leave the device. Host memory has room for three records.", "small", 72)
    with tempfile.TemporaryDirectory() as folder, DiskTier(pathlib.Path(folder) / "tier", max_bytes=2**20) as disk:
        probe = HostTier(max_bytes=2**20)
        probe.put(Record(names[0], array()))
        host = HostTier(max_bytes=int(3.5 * probe.nbytes))
        stack = Tiers([host, disk])

        def show(number, call, words):
            draw.text(MARGIN, draw.y, f"Time {number}   {call}", "head")
            draw.y += 15
            draw.line(words, "small", 76)
            for label, tier, colour in (("host", host, "d0"), ("disk", disk, "d1")):
                draw.text(MARGIN, draw.y + 13, label, "small")
                for i, name in enumerate(names):
                    there = name.key in tier
                    draw.cell(
                        MARGIN + 46 + i * 50, draw.y, f"page {i}" if there else "", colour if there else "empty", 48, 18
                    )
                draw.y += 21
            draw.y += 14

        stack.store([Record(name, array()) for name in names[:3]])
        show(1, "store pages 0, 1, 2", "Records come in at the top.")
        stack.store([Record(name, array()) for name in names[3:]])
        show(2, "store pages 3, 4, 5", "The top is full: what has to leave it sinks to the disk.")
        found = stack.find(names)
        show(3, "find(names)", f"{found} pages of the text are there, wherever they lie.")
        loaded = stack.load(names[:2])
        show(4, "load pages 0, 1", f"{len(loaded)} records were read from the disk and rose; others sank to make room.")
    return draw.svg()


def pictures():
    """Name of the file, and what is in it."""
    for draw in (pages, pages_in_time, window_pages, radix_tree, shared_prefix, ledger, tiers):
        yield draw.__name__, draw()
