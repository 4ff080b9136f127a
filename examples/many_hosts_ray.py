"""`many_hosts.py` over the nodes of a Ray cluster: Ray says where the processes run, and starts them.

python examples/many_hosts_ray.py --processes 2
    a cluster that is this machine alone, and a small random model

python examples/many_hosts_ray.py --address auto --processes 4 --resources '{"TPU": 4}' --checkpoint DIR
    on nodes of a cluster that is running, each of which has kvattn and can read DIR

What runs there is `many_hosts.py`, and all other arguments are its own. Needs Ray: pip install "kvattn[ray]".
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import processes

HERE = Path(__file__).resolve().parent


class Host:
    """One process of the job, on the node where Ray has put it."""

    def address(self) -> tuple[str, int]:
        """Of the node, and a port that nobody has there just now."""
        import ray

        return ray.util.get_node_ip_address(), processes.free_port()

    def run(self, number: int, coordinator: str, arguments: list[str]) -> tuple[int, str]:
        """Runs process `number` to its end: its status, and its report in JSON, which process 0 writes."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            where = ["--coordinator", coordinator, "--process-id", str(number), "--out", str(report)]
            program = str(Path(processes.__file__).with_name("many_hosts.py"))
            ended = subprocess.run([sys.executable, program, *arguments, *where])
            return ended.returncode, report.read_text() if report.exists() else ""


def run(ray, count: int, arguments: list[str], resources: dict[str, float]) -> list[tuple[int, str]]:
    """Runs a job of `count` processes; what `Host.run` returned for each, status 1 where its node was lost."""
    actor = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(Host)
    hosts = [actor.options(resources=resources).remote() for _ in range(count)]
    addresses = ray.get([host.address.remote() for host in hosts])
    (first, port), nodes = addresses[0], {address for address, _ in addresses}
    coordinator = f"{first if len(nodes) > 1 else '127.0.0.1'}:{port}"
    running = [host.run.remote(i, coordinator, arguments) for i, host in enumerate(hosts)]
    ended = []
    for number, result in enumerate(running):  # a process that has lost another ends by itself
        try:
            ended.append(ray.get(result))
        except ray.exceptions.RayActorError as error:
            processes.say(f"process {number}: {error}")
            ended.append((1, ""))
    return ended


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--address", help="of the cluster, as ray.init takes it; default: this machine alone")
    p.add_argument("--processes", type=int, default=2)
    p.add_argument("--resources", type=json.loads, default={}, help="of each process, as Ray names them, in JSON")
    p.add_argument("--checkpoint", type=Path, help="a HuggingFace folder; default: a small random Llama")
    p.add_argument("--out", type=Path, help="a JSON file for what is printed")
    p.add_argument("--plot", type=Path, help="a picture: loans over time, and what lending is worth")
    args, others = p.parse_known_args()
    try:
        import ray
    except ImportError:
        raise SystemExit('this needs Ray: pip install "kvattn[ray]"') from None
    if args.address is not None and args.checkpoint is None:
        p.error("the nodes of a cluster need a --checkpoint that each can read")
    import many_hosts

    ray.init(address=args.address, runtime_env={"working_dir": str(HERE)} if args.address else None)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or many_hosts.random_checkpoint(Path(folder) / "model")
        arguments = ["--processes", str(args.processes), "--checkpoint", str(checkpoint), *others]
        ended = run(ray, args.processes, arguments, args.resources)
    ray.shutdown()
    if any(status for status, _ in ended):
        return 1
    reports = json.loads(ended[0][1])
    if args.out:
        args.out.write_text(json.dumps(reports, indent=1))
    if args.plot:
        many_hosts.plot(reports, args.plot)
    many_hosts.show(reports, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
