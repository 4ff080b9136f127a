"""What the records of a run on a GPU say: a short table, goals, a table of sizes, a picture. Needs no JAX."""

import json
from pathlib import Path
from typing import Any

from gpu_cases import AGAINST, CASES

Records = list[dict[str, Any]]
WIDTH, MOST_BAD = 118, 20


def latest(records: Records) -> dict[tuple[str, str], dict[str, Any]]:
    """The last record of every (task, part) that says what became of it."""
    return {(r["task"], r["part"]): r for r in records if "status" in r}


def rows_of(records: Records) -> dict[str, dict[str, Any]]:
    """What was measured of ours, by case: with per cent of a copy, and the floor in microseconds."""
    found = latest(records)
    copy = found.get(("copy", ""), {}).get("tb_per_s")
    rows = {}
    for (task, _), record in found.items():
        if not task.startswith("time: ") or "us" not in record:
            continue
        row = dict(record)
        row["tb_per_s"] = row["valid_bytes"] / row["us"] / 1e6
        if copy:
            row |= {"percent_of_copy": 100 * row["tb_per_s"] / copy, "floor_us": row["valid_bytes"] / copy / 1e6}
        rows[task.removeprefix("time: ")] = row
    return rows


def peers_of(records: Records) -> dict[str, dict[str, dict[str, Any]]]:
    """Records of peers by case, then by name, with how many times slower than ours."""
    ours, found = rows_of(records), {}
    for (task, part), record in latest(records).items():
        if not task.startswith("peers: "):
            continue
        case, row = task.removeprefix("peers: "), dict(record)
        if "us" in row and case in ours:
            # By one clock: sums of kernels where both have them, else spans.
            clock = "kernels_us" if "kernels_us" in row and "kernels_us" in ours[case] else "span_us"
            row["times_slower"] = row[clock] / ours[case][clock]
        found.setdefault(case, {})[part] = row
    return found


def split(kernels: dict[str, float]) -> tuple[float, float, float, int]:
    """Microseconds of decode, of merge, of all else, and how many kernels that is."""
    decode = sum(us for name, us in kernels.items() if "kvattn_gpu_decode" in name)
    merge = sum(us for name, us in kernels.items() if "kvattn_gpu_merge" in name)
    rest = [us for name, us in kernels.items() if "kvattn_gpu" not in name]
    return decode, merge, sum(rest), len(rest)


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    """Columns, the first one to the left, all others to the right."""
    if not lines:
        return []
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    pad = lambda i, text: text.ljust(widths[i]) if i == 0 else text.rjust(widths[i])
    return ["  ".join(pad(i, text) for i, text in enumerate(line)).rstrip() for line in [head, *lines]]


def goals(records: Records) -> list[list[str]]:
    """Case, goal, figure, and whether it is reached."""
    rows, lines = rows_of(records), []
    for case in CASES:
        for goal in case.goals:
            found = goal.measured(case.name, rows)
            if found is not None:
                lines.append([case.name, str(goal), f"{found[0]:.2f}", "reached" if found[1] else "missed"])
    for start, least in AGAINST.items():
        slower = [
            (peer["times_slower"], f"{case} ({name})")
            for case, peers in peers_of(records).items()
            for name, peer in peers.items()
            if name.startswith(start) and "times_slower" in peer
        ]
        if slower:
            value, where = min(slower)
            word = "reached" if value >= least else "missed"
            lines.append([f"least in {where}", f">= {least:g}x faster than {start}", f"{value:.2f}", word])
    return lines


def sizes_of(records: Records) -> dict[str, Any]:
    """The fastest sizes, as `kvattn.pallas.tuning.use` takes them from a file; empty if none were measured."""
    best: dict[str, dict[str, Any]] = {}
    for (task, _), record in latest(records).items():
        if task.startswith("sizes: ") and "us" in record:
            key = record["key"]
            best[key] = min(best.get(key, record), record, key=lambda r: r["us"])
    device = next((r["device"] for r in records if "device" in r), {})
    if not best:
        return {}
    return {
        "device": device.get("kind", ""),
        "jax": device.get("versions", {}).get("jax", ""),
        "sizes": {key: record["config"] for key, record in sorted(best.items())},
    }


def summary(records: Records) -> str:
    """A short text: what went wrong, times, peers, goals, sizes."""
    found, lines = latest(records), []
    device = next((r["device"] for r in records if "device" in r), None)
    if device:
        lines.append(f"{device['kind']}, jax {device['versions']['jax']}")
    states = [r["status"] for r in found.values()]
    lines.append(", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)))
    values = [r for (task, _), r in found.items() if task.startswith("values: ")]
    right = sum(r["status"] == "ok" for r in values)
    lines.append(f"values: {right} of {len(values)} right")
    bad = [
        f"{record['status'].upper()} {task}{', ' if part else ''}{part}: {record.get('reason', '')}"
        for (task, part), record in found.items()
        if record["status"] not in ("ok", "not there", "not run")
    ]
    lines += [line[: 2 * WIDTH] for line in bad[:MOST_BAD]]
    lines += [f"... and {len(bad) - MOST_BAD} more in results.jsonl"] if len(bad) > MOST_BAD else []
    lines += times_table(records) + whole_table(records) + peers_table(records)
    reached = goals(records)
    lines += ["", *table(["goal of", "goal", "figure", ""], reached)] if reached else []
    for key, config in sizes_of(records).get("sizes", {}).items():
        lines.append(f"fastest sizes of {key}: {config}")
    reasons: dict[str, list[str]] = {}
    for (task, part), record in found.items():
        if record["status"] in ("not there", "not run") and not task.startswith("sizes: "):
            name = part or task
            if name not in reasons.setdefault(f"{record['status']} ({record.get('reason', '')[:80]})", []):
                reasons[f"{record['status']} ({record.get('reason', '')[:80]})"].append(name)
    lines += [f"{reason}: {', '.join(names)}"[: 3 * WIDTH] for reason, names in reasons.items()]
    return "\n".join(lines)


def times_table(records: Records) -> list[str]:
    """Ours: the sum of the kernels and how it is made up, the span, bandwidth."""
    lines = []
    for name, row in rows_of(records).items():
        parts = ["-"] * 3
        if "kernels" in row:
            decode, merge, rest, count = split(row["kernels"])
            parts = [f"{decode:.1f}", f"{merge:.1f}", f"{rest:.1f} ({count})"]
        floor = [f"{row[n]:.1f}" if n in row else "-" for n in ("floor_us", "percent_of_copy")]
        figures = [f"{row['us']:.1f}", *parts, f"{row['span_us']:.1f}", floor[0], f"{row['tb_per_s']:.2f}", floor[1]]
        compile_s = row.get("compile", {}).get("first_call")
        lines.append([name, *figures, f"{row['error']:.0e}", "-" if compile_s is None else f"{compile_s:.1f}"])
    head = ["step", "us", "decode", "merge", "rest", "span", "floor", "TB/s", "% copy", "error", "first s"]
    clocks = sorted({row["clock"] for row in rows_of(records).values()})
    found = ["", *table(head, lines), f"clock: {'; '.join(clocks)}"] if lines else []
    if copy := latest(records).get(("copy", ""), {}).get("tb_per_s"):
        found.append(f"floor: valid keys and values at the {copy} TB/s of a copy in this run")
    return found


def whole_table(records: Records) -> list[str]:
    """Whole steps: each of their kernels."""
    lines = []
    for (task, _), row in latest(records).items():
        if task.startswith("whole: ") and row.get("kernels"):
            us = {
                word: sum(us for name, us in row["kernels"].items() if f"kvattn_gpu_{word}" in name)
                for word in ("append", "decode", "merge")
            }
            rest = [us for name, us in row["kernels"].items() if "kvattn_gpu" not in name]
            parts = [f"{x:.1f}" for x in us.values()] + [f"{sum(rest):.1f} ({len(rest)})"]
            lines.append([task.removeprefix("whole: "), f"{row['kernels_us']:.1f}", *parts, f"{row['error']:.0e}"])
    head = ["whole step", "us", "append", "decode", "merge", "rest", "error"]
    return ["", *table(head, lines)] if lines else []


def peers_table(records: Records) -> list[str]:
    """Peers: microseconds, and how many times slower than ours."""
    lines = []
    for case, peers in peers_of(records).items():
        for name, row in peers.items():
            if "us" in row:
                slower = f"{row['times_slower']:.2f}x" if "times_slower" in row else "-"
                lines.append([f"{case}: {name}", f"{row['us']:.1f}", f"{row['span_us']:.1f}", slower])
    return ["", *table(["peer", "us", "span", "ours is faster"], lines)] if lines else []


def save(records: Records, out: Path) -> None:
    """``table.txt`` and, if sizes were measured, ``sizes.json``."""
    (out / "table.txt").write_text(summary(records) + "\n")
    if sizes := sizes_of(records):
        (out / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n")


def picture(records: Records, path: Path) -> None:
    """Bars of per cent of a copy, and of times against the fastest peer. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, peers = rows_of(records), peers_of(records)
    device = next((r["device"]["kind"] for r in records if "device" in r), "")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.32 * len(rows) + 1.6), sharey=True)
    names = list(rows)[::-1]
    bars = left.barh(names, [rows[n].get("percent_of_copy", 0) for n in names], color="#3182bd")
    left.bar_label(bars, [f" {rows[n]['us']:.1f} us" for n in names], fontsize=8)
    left.set_xlabel("keys and values read, % of a copy in the same run")
    left.set_xlim(0, 120)
    left.axvline(100, color="#999999", linewidth=0.8)
    best = {}
    for name in names:
        found = {p: r["times_slower"] for p, r in peers.get(name, {}).items()
                 if "times_slower" in r and not p.startswith("kvattn")}  # fmt: skip
        if found:
            best[name] = min(found.items(), key=lambda item: item[1])
    bars = right.barh(names, [best[n][1] if n in best else 0 for n in names], color="#e6550d")
    right.bar_label(bars, [f" {best[n][1]:.2f}x {best[n][0]}" if n in best else "" for n in names], fontsize=8)
    right.axvline(1, color="#999999", linewidth=0.8)
    right.set_xlabel("times faster than the fastest peer that ran")
    right.margins(x=0.4)
    figure.suptitle(f"One decode step, {device}, cold L2")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
