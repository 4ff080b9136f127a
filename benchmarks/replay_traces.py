"""Hit rates of request traces by the size of the pool, and how long a replay takes.

    python benchmarks/replay_traces.py conversation.jsonl synthetic.jsonl [--no-save]

The traces are Mooncake's (github.com/kvcache-ai/Mooncake, FAST25-release/traces, Apache-2.0); they are not part of this
repository. Writes ``benchmarks/results/replay_traces.json``.
"""

import argparse
import json
import pathlib
import platform
import time

from tqdm import tqdm

from kvattn.serving import read_trace, replay

SIZES = (None, 97_656, 30_000, 10_000, 5_860, 1_000)
"""Blocks of 512 tokens; 97,656 are 50 million tokens, 5,860 are 3 million: the sizes of Mooncake's paper."""

RESULTS = pathlib.Path(__file__).parent / "results" / "replay_traces.json"


def measure(path: pathlib.Path) -> dict:
    """What comes of one trace."""
    began = time.perf_counter()
    requests = read_trace(path)
    found = {"requests": len(requests), "read_seconds": round(time.perf_counter() - began, 3), "sizes": []}
    for size in tqdm(SIZES, desc=path.stem, leave=False):
        began = time.perf_counter()
        result = replay(requests, num_blocks=size)
        seconds = time.perf_counter() - began
        found["sizes"].append(
            {
                "num_blocks": size,
                "hit_rate": round(result.hit_rate, 6),
                "evicted": result.evicted,
                "peak_blocks": result.peak_blocks,
                "seconds": round(seconds, 3),
            }
        )
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("traces", type=pathlib.Path, nargs="+")
    p.add_argument("--no-save", action="store_true")
    args = p.parse_args()
    report = {"python": platform.python_version(), "traces": {path.stem: measure(path) for path in args.traces}}
    for name, found in report["traces"].items():
        print(f"{name}: {found['requests']:,} requests, read in {found['read_seconds']:.2f} s")
        for row in found["sizes"]:
            size = "unlimited" if row["num_blocks"] is None else f"{row['num_blocks']:,}"
            print(f"{size:>10}  {100 * row['hit_rate']:6.2f} %  {row['evicted']:>9,} evicted  {row['seconds']:.2f} s")
    if not args.no_save:
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
