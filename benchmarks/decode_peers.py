"""One decode step on CPU beside PyTorch's and JAX's attention: a process each, taken in turns, in one run.

    make bench-peers
    python benchmarks/decode_peers.py --python .venv-peers/bin/python [--rounds 15] [--no-save]

Shape: B8 N32 K8 H128, 4096 tokens. A turn is a few steps of one process while all others wait, so a busy moment of the
machine hits all alike; every ratio is the median over rounds of the ratio within a round. Outputs are compared with
each other first. Writes ``benchmarks/results/decode_peers.json`` and a picture.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import decode_peer
import numpy as np
from tqdm import tqdm

RESULTS = pathlib.Path(__file__).parent / "results"
PEERS = ("torch", "torch gqa", "jax.nn")
OURS = (
    "kvattn",
    "kvattn@512/4096",
    "kvattn:Int8",
    "kvattn:Float8",
    "kvattn:Int4",
    "kvattn@1000/1024",
    "kvattn@1000/32768",
)
TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3}
"""Of outputs, whose standard deviation is about 1/64."""


class Peer:
    """One process, which takes steps when it is asked to."""

    def __init__(self, python: str, kind: str, dtype: str, folder: str):
        self.kind, self.out = kind, pathlib.Path(folder) / f"{kind.replace('/', '_')}.npy"
        command = [python, decode_peer.__file__, kind, dtype, str(self.out)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.line("ready")

    def line(self, expected: str = "") -> str:
        """What it says next."""
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        if not said or not said.startswith(expected):
            raise SystemExit(f"{self.kind} ended: {said!r}")
        return said

    def turn(self, steps: int) -> list[float]:
        """Seconds of so many steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return json.loads(self.line())

    def end(self) -> None:
        """Waits until it has ended."""
        self.process.communicate()


def measured(dtype: str, python: str, rounds: int, steps: int) -> dict:
    """Milliseconds of every kind, and ratios."""
    with tempfile.TemporaryDirectory() as folder:
        kinds = ["read", *OURS, *PEERS]
        start = lambda kind: Peer(python if kind.startswith("torch") else sys.executable, kind, dtype, folder)
        peers = [start(kind) for kind in tqdm(kinds, desc=f"{dtype}: compiling", leave=False, disable=None)]
        outputs = {peer.kind: np.load(peer.out) for peer in peers if peer.kind in ("kvattn", *PEERS)}
        times = {kind: [] for kind in kinds}
        for number in tqdm(range(rounds), desc=f"{dtype}: turns", leave=False, disable=None):
            for peer in peers if number % 2 else peers[::-1]:
                times[peer.kind].append(peer.turn(steps))
                time.sleep(0.1)  # threads of a library that wait for more work by spinning
        for peer in peers:
            peer.end()
    errors = {kind: float(np.abs(outputs[kind] - outputs["kvattn"]).max()) for kind in PEERS}
    if max(errors.values()) > TOLERANCE[dtype]:
        raise SystemExit(f"outputs differ: {errors}")
    by_round = {kind: np.median(each, axis=1) for kind, each in times.items()}
    ratio = lambda a, b: round(float(np.median(by_round[a] / by_round[b])), 3)
    return {
        "median_ms": {kind: round(float(np.median(each)) * 1e3, 2) for kind, each in times.items()},
        "least_ms": {kind: round(float(np.min(each)) * 1e3, 2) for kind, each in times.items()},
        "share_of_read_bandwidth": {kind: ratio("read", kind) for kind in ("kvattn", *PEERS)},
        "kvattn_is_faster_than": {kind: ratio(kind, "kvattn") for kind in PEERS},
        "of_kvattn": {kind: ratio(kind, "kvattn") for kind in OURS[1:5]},
        "capacity_32768_of_1024": ratio("kvattn@1000/32768", "kvattn@1000/1024"),
        "largest_difference": errors,
    }


def picture(report: dict, path: pathlib.Path) -> None:
    """A bar for every way of taking the step; the line is reading keys and values once."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, (dtype, found) in zip(figure.subplots(1, 2), report["step"].items(), strict=True):
        names = {"kvattn": "kvattn", "torch": "PyTorch, group as queries", "torch gqa": "PyTorch, enable_gqa"}
        bars = axes.barh(list(names.values())[::-1], [found["median_ms"][kind] for kind in names][::-1])
        axes.bar_label(bars, fmt=" %.1f")
        axes.axvline(found["median_ms"]["read"], color="#e6550d", label="reading keys and values once")
        axes.set(title=dtype, xlabel="ms per step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measures, prints, and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="an interpreter that has torch and numpy")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--no-save", dest="save", action="store_false")
    args = parser.parse_args()
    version = "import torch; print(torch.__version__)"
    torch = subprocess.run([args.python, "-c", version], capture_output=True, text=True, check=True).stdout.strip()
    import jax

    import kvattn

    report = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch, "jax": jax.__version__, "kvattn": kvattn.__version__},
        "date": datetime.date.today().isoformat(),
        "shape": {"B": decode_peer.B, "N": decode_peer.N, "K": decode_peer.K, "H": decode_peer.H, "S": decode_peer.S},
        "step": {dtype: measured(dtype, args.python, args.rounds, args.steps) for dtype in TOLERANCE},
    }
    print(json.dumps(report, indent=2))
    if args.save:
        (RESULTS / "decode_peers.json").write_text(json.dumps(report, indent=2) + "\n")
        picture(report, RESULTS / "decode_peers.png")


if __name__ == "__main__":
    main()
