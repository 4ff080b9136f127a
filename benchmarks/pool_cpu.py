"""What the memory manager costs the host in a step of 256 sequences.

Each step appends a token to every sequence and asks for the tables; some sequences end, and others begin. Prompts are
1,024 tokens, of which half are found in the tree. Medians of many steps, in milliseconds, blocks of 16.

    python benchmarks/pool_cpu.py [--steps 300] [--batch 256] [--no-save]
"""

import argparse
import json
import pathlib
import platform
import statistics
import time
from collections import defaultdict

from tqdm import tqdm

from kvattn.serving import BlockPool, RadixTree

PROMPT, BLOCK, ANSWER = 1024, 16, 256
RESULTS = pathlib.Path(__file__).parent / "results" / "pool_cpu.json"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--no-save", action="store_true")
    args = p.parse_args()
    width = (PROMPT + ANSWER) // BLOCK
    pool = BlockPool(args.batch * width * 2, BLOCK)
    tree = RadixTree(BLOCK)
    seconds = defaultdict(list)
    numbers = iter(range(10**9))
    shared = [next(numbers) for _ in range(PROMPT // 2)]
    hits = {}

    def begin(seq: int) -> None:
        text = shared + [next(numbers) for _ in range(PROMPT // 2)]
        start = time.perf_counter()
        hit = tree.match_prompt(text)
        tree.lock(hit)
        found = time.perf_counter()
        pool.allocate(seq, PROMPT, prefix=hit.pages)
        allocated = time.perf_counter()
        pool.hold(tree.adopt(text, pool.table(seq)))
        seconds["tree: match, lock, adopt, for one prompt"].append(found - start + time.perf_counter() - allocated)
        seconds["allocate one prompt"].append(allocated - found)
        hits[seq] = hit

    def end(seq: int) -> None:
        start = time.perf_counter()
        pool.free(seq)
        tree.unlock(hits.pop(seq))
        seconds["free one"].append(time.perf_counter() - start)

    for seq in range(args.batch):
        begin(seq)
    for step in tqdm(range(args.steps), leave=False):
        start = time.perf_counter()
        for seq in range(args.batch):
            pool.append(seq)
        appended = time.perf_counter()
        pool.page_table(range(args.batch), width)
        seconds["append to all"].append(appended - start)
        seconds["tables of all"].append(time.perf_counter() - appended)
        seq = step % args.batch
        end(seq)
        if pool.can_allocate(PROMPT) != "now":
            pool.release(tree.evict(64))
        begin(seq)
        seconds["a step: append, tables, one prompt allocated"].append(
            seconds["append to all"][-1] + seconds["tables of all"][-1] + seconds["allocate one prompt"][-1]
        )
    pool.check()
    report = {name: round(1e3 * statistics.median(times), 4) for name, times in seconds.items()}
    for name, milliseconds in report.items():
        print(f"{milliseconds:8.4f} ms  {name}")
    if not args.no_save:
        settings = {"batch": args.batch, "prompt": PROMPT, "block_size": BLOCK, "python": platform.python_version()}
        RESULTS.write_text(json.dumps(settings | {"median_milliseconds": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
