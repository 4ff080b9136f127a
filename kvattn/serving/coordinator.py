"""JAX's coordinator in a process of its own, so that any process of a program may end without taking the others along.

`jax.distributed.initialize` starts the coordinator in process 0, and JAX aborts every process that loses it. Started
here instead, beside the program, it outlives process 0:

    python -m kvattn.serving.coordinator 10.0.0.1:1234 --processes 4

and in every process of the program, process 0 included:

    jax.distributed.initialize("10.0.0.1:1234", 4, number, coordinator_bind_address="127.0.0.1:0")

The last argument gives process 0's own coordinator, which nobody needs then, any free port. This one computes nothing,
and needs no accelerator. It says "ready" when processes may come, and runs until it is terminated. When it ends, JAX
aborts every process that is left.
"""

import argparse
import os
import signal
import socket
import sys

from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage] # it has no public name


def main() -> int:
    """Runs the coordinator that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="host:port at which processes find it; it listens at this address")
    parser.add_argument("--processes", type=int, required=True, help="how many the program has")
    parser.add_argument(
        "--heartbeat-timeout",
        type=int,
        default=100,
        help="seconds until a silent process counts as lost: the heartbeat_timeout_seconds of the processes",
    )
    parser.add_argument("--until-eof", action="store_true", help="end when standard input does, with who started it")
    args = parser.parse_args()
    if args.processes < 1:
        parser.error(f"--processes must be >= 1, got {args.processes}")
    host, _, port = args.address.rpartition(":")
    if not host or not port.isdecimal():
        parser.error(f"address must be host:port, got {args.address!r}")
    try:  # the service shares its port with others that do, and says nothing
        socket.create_server(
            (host.strip("[]"), int(port)), family=socket.AF_INET6 if "[" in host else socket.AF_INET
        ).close()
    except OSError as error:
        parser.error(f"cannot listen at {args.address}: {error}")
    for ends in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ends, lambda *_: os._exit(0))
    service = _jax.get_distributed_runtime_service(
        args.address, args.processes, heartbeat_timeout=args.heartbeat_timeout
    )
    print("ready", flush=True)
    if args.until_eof:
        while os.read(sys.stdin.fileno(), 1024):
            pass
    else:
        while True:
            signal.pause()
    del service  # held until here
    os._exit(0)  # at once: the service would wait for processes that are gone


if __name__ == "__main__":
    sys.exit(main())
