"""The suite of `on_device.py` for a GPU: values of the decode kernel, its times, its peers, its sizes.

`options["mode"]`: "device"; "interpret" looks at the values of everything in miniature on a CPU, in JAX's interpreter;
"lower" lowers every program for a GPU at its full size, on a CPU.
"""

import os
import sys
from typing import Any

import gpu_cases
import gpu_report
from gpu_cases import CASES, FIRST, VALUES, Case
from runner import Report, Stage, Task, UnfitError

LANES = 4
"""Values of so many cases are looked at at a time; times are taken one by one."""
SLOWER = 10
"""How much longer a task may take without a device."""
VALUE_CASES = {f"values: {case.name}": case for case in (FIRST, *VALUES)}
STEPS = {f"values: {name}": name.removeprefix("step of ") for name in gpu_cases.STEPS}
APPENDS = {f"values: append, {store}, {place}": (store, place) for store, place in gpu_cases.APPENDS}
ARRAYS = f"values: {gpu_cases.ARRAYS}"
BY_NAME = {case.name: case for case in CASES}


def stages(options: dict[str, Any]) -> list[Stage]:
    """What runs, in its order: values before times, ours before peers.

    Args:
        options: "mode"; "peers": names; "all": whether cases that are not `key` are timed too.
    """
    on_device = options["mode"] == "device"
    lanes, slower = (LANES, 1) if on_device else (1, SLOWER)

    def task(name: str, seconds: float, limit: float, *more: Any) -> Task:
        return Task(name, seconds, limit * slower, *more)

    first, *others = VALUE_CASES
    values = [task(name, 10, 60, ("",), (first,)) for name in (*others, *APPENDS, *STEPS, ARRAYS)]
    timed = [case for case in CASES if case.key] + [case for case in CASES if not case.key and options["all"]]
    times = [task("copy", 6, 40)] if on_device else []
    times += [task(f"time: {c.name}", 14, 75, ("",), needs_of(c)) for c in timed]
    whole = [task(f"whole: {name}", 12, 60, ("",), needs_of(BY_NAME[name])) for name in gpu_cases.WHOLE]
    # Nothing of the peers is lowered.
    peers = () if options["mode"] == "lower" else tuple(options["peers"])
    beside = [task(f"peers: {c.name}", 10 + 4 * len(peers), 90, peers, needs_of(c)) for c in CASES if c.peers]
    sizes = [task(f"sizes: {c.name}", 40, 45, tuple(gpu_cases.SIZES), needs_of(c)) for c in CASES if c.tuned]
    return [
        Stage("first", (task(first, 12, 75),)),
        Stage("values", tuple(values), lanes),
        Stage("times", tuple(times), quiet=True),
        Stage("whole", tuple(whole), quiet=True),
        Stage("peers", tuple(beside if peers else ()), quiet=True),
        Stage("sizes", tuple(sizes), quiet=True),
    ]


def needs_of(case: Case) -> tuple[str, ...]:
    """Values of what a timed case is made of."""
    alike = [
        name for name, value in VALUE_CASES.items()
        if (value.store, value.rule, value.query, value.shape) == (case.store, "plain", "bfloat16", "GQA")
        and bool(value.page_size) == bool(case.page_size)
    ]  # fmt: skip
    return (next(iter(VALUE_CASES)), *alike[:1])


def environment(options: dict[str, Any]) -> dict[str, str]:
    """For processes of this suite: what must be set before JAX is loaded."""
    found = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # PyTorch needs memory too
    if options["mode"] != "device":
        # The interpreter needs threads, more than there may be cores.
        return found | {"JAX_PLATFORMS": "cpu", "NPROC": "8"}
    if (platforms := os.environ.get("JAX_PLATFORMS")) and "cpu" not in platforms:
        found["JAX_PLATFORMS"] = f"{platforms},cpu"  # expected values come from there
    if options.get("packages"):
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (options["packages"], os.environ.get("PYTHONPATH"))))
    return found


def warm(options: dict[str, Any]) -> dict[str, Any]:
    """Loads everything and finds the device."""
    import gpu_work
    import jax

    import kvattn

    try:
        device = jax.local_devices()[0]
    except RuntimeError as error:
        raise UnfitError(f"JAX finds no device: {str(error).splitlines()[0]}") from error
    if options["mode"] == "device":
        why = "is no GPU" if device.platform != "gpu" else gpu_work.gpu_decode.device_refusal()
        if why is not None:
            raise UnfitError(
                "values and times need a GPU that the kernel takes; the default device here is "
                f"{device.device_kind!r}: {why}. --dry-run and --build run without one."
            )
    if options.get("table"):
        gpu_work.tuning.use(options["table"])
    gpu_work.jnp.zeros(8).block_until_ready()
    versions = {"python": sys.version.split()[0], "jax": jax.__version__, "kvattn": kvattn.__version__}
    return {"kind": device.device_kind, "platform": str(device.client.platform_version), "versions": versions}


def run(name: str, parts: list[str], report: Report, options: dict[str, Any]) -> None:
    """One task."""
    import gpu_work

    mode, (kind, _, rest) = options["mode"], name.partition(": ")
    if kind == "peers":
        gpu_work.peers(BY_NAME[rest], parts, report, mode, options.get("fa3"))
    elif kind == "sizes":
        gpu_work.sizes(BY_NAME[rest], parts, report, mode)
    else:
        try:
            if name == "copy":
                figures = gpu_work.copy()
            elif kind == "time":
                figures = gpu_work.times(BY_NAME[rest], mode)
            elif kind == "whole":
                figures = gpu_work.whole_step(BY_NAME[rest], mode)
            elif name in APPENDS:
                figures = gpu_work.append(*APPENDS[name], mode)
            elif name in STEPS:
                figures = gpu_work.step(STEPS[name], mode)
            elif name == ARRAYS:
                figures = gpu_work.arrays(mode)
            else:
                figures = gpu_work.values(VALUE_CASES[name], mode)
            report.end("ok", **figures)
        except gpu_work.Wrong as error:
            report.end("wrong", reason=str(error)[:300])


summary, save = gpu_report.summary, gpu_report.save
