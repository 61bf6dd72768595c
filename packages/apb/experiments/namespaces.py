"""Real hosts on one machine: network namespaces joined by rate-limited links, one process each.

Sets up a bridge and a namespace for each host, limits what each may send (tc tbf), delays it where
asked (netem, or `delay.py` where the kernel has none), runs every strategy over gloo on
SmolLM2-135M, and prints wall-clock by strategy; then kills a host in the middle of a prefill, times
the error, and starts all again. Needs root, `ip` and `tc`; elsewhere it says why it skips.
Everything that it makes is removed at the end.

    python packages/apb/experiments/namespaces.py --tokens 1024 --rate 1gbit --delay 1
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from delay import MTU, DelayedCables

PREFIX, PORT = "apbns", 29611
STRATEGIES = ("ring", "zigzag", "ulysses", "star", "apb", "spava")


def call(command: str, *, quiet: bool = False) -> None:
    """Run one command; RuntimeError with what it said."""
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode and not quiet:
        raise RuntimeError(f"{command}: {done.stderr.strip() or done.stdout.strip()}")


def set_up(hosts: int, rate: str, delay: float) -> DelayedCables | None:
    """Namespaces apbns0, apbns1, … at 10.231.0.1, 10.231.0.2, …, on one bridge.

    rate: that a host may send with, as tc writes it. delay: of what it sends, milliseconds.
    Returns the cables that have to be closed in the end, where Python does the delaying.
    """
    call(f"ip link add {PREFIX}br type bridge")
    call(f"ip link set {PREFIX}br up")
    names = [f"{PREFIX}{host}" for host in range(hosts)]
    for name in names:
        call(f"ip netns add {name}")
        call(f"ip link add {name}o type veth peer name {name}i")
    cables = None
    if delay and not netem(f"{names[0]}o"):
        for name in names:
            call(f"ip link del {name}o")
        cables = DelayedCables([(f"{name}i", f"{name}o") for name in names], delay / 1000)
        for name in names:
            call(f"ip link set {name}i mtu {MTU}")
            call(f"ip link set {name}o mtu {MTU}")
    for host, name in enumerate(names):
        inside = f"ip netns exec {name}"
        call(f"ip link set {name}i netns {name}")
        call(f"ip link set {name}o master {PREFIX}br up")
        call(f"{inside} ip addr add 10.231.0.{host + 1}/24 dev {name}i")
        call(f"{inside} ip link set {name}i up")
        call(f"{inside} ip link set lo up")
        if delay and cables is None:
            call(f"{inside} tc qdisc add dev {name}i root netem rate {rate} delay {delay}ms")
        else:
            call(f"{inside} tc qdisc add dev {name}i root tbf rate {rate} burst 1mb latency 50ms")
    return cables


def netem(device: str) -> bool:
    """Whether the kernel can delay packets."""
    try:
        call(f"tc qdisc add dev {device} root netem delay 1ms")
    except RuntimeError:
        return False
    call(f"tc qdisc del dev {device} root")
    return True


def tear_down(hosts: int, cables: DelayedCables | None = None) -> None:
    """Remove them; veth pairs go with their namespaces."""
    if cables is not None:
        cables.close()
    for host in range(hosts):
        call(f"ip netns del {PREFIX}{host}", quiet=True)
    call(f"ip link del {PREFIX}br", quiet=True)


def start(arguments: argparse.Namespace, folder: str, mode: str) -> list[subprocess.Popen]:
    """One process in each namespace."""
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", f"{PREFIX}{rank}", sys.executable, __file__, "--mode", mode,
             "--folder", folder, "--tokens", str(arguments.tokens),
             "--repeats", str(arguments.repeats)],
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(arguments.hosts),
                "MASTER_ADDR": "10.231.0.1", "MASTER_PORT": str(PORT),
                "GLOO_SOCKET_IFNAME": f"{PREFIX}{rank}i", "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(arguments.hosts)
    ]  # fmt: skip


def host(arguments: argparse.Namespace) -> None:
    """What runs in a namespace."""
    import torch
    import torch.distributed as dist

    import apb
    import testbed

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    group = apb.DistributedGroup()
    rank, folder = group.ranks[0], Path(arguments.folder)
    model, tokenizer = testbed.smollm2()
    text = "\n\n".join(d.text for d in testbed.corpus("wikipedia"))
    text = text[: arguments.tokens * 8]
    document = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.tokens]
    if arguments.mode == "kill":
        (folder / f"ready{rank}").touch()
        while True:
            try:
                apb.prefill(model, document, strategy="ring", hosts=group)
            except ConnectionError as error:
                (folder / f"error{rank}.txt").write_text(f"{time.time()} {error}", "utf-8")
                os._exit(1)
    seconds: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    sent = {}
    for turn in range(arguments.repeats + 1):
        for name in STRATEGIES:
            dist.barrier()
            began = time.perf_counter()
            context = apb.prefill(model, document, strategy=name, hosts=group)
            dist.barrier()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
            sent[name] = context.report.bytes_sent[rank]
    most = torch.tensor([sent[name] for name in STRATEGIES])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if rank == 0:
        rows = {
            name: {"seconds": statistics.median(seconds[name]), "most_bytes": int(most[i])}
            for i, name in enumerate(STRATEGIES)
        }
        (folder / "result.json").write_text(json.dumps(rows), "utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure(arguments: argparse.Namespace, folder: str) -> None:
    """Wall-clock by strategy."""
    codes = [process.wait(timeout=500) for process in start(arguments, folder, "time")]
    if any(codes):
        raise RuntimeError(f"hosts ended with {codes}")
    rows = json.loads((Path(folder) / "result.json").read_text("utf-8"))
    print(f"{arguments.hosts} hosts, {arguments.tokens} tokens, {arguments.rate}, "
          f"{arguments.delay:g} ms a direction, one thread each")  # fmt: skip
    for name, row in rows.items():
        print(f"{name:<8} {row['seconds']:8.3f} s   {row['most_bytes'] / 1e6:8.1f} MB a host")
    print(json.dumps(rows), flush=True)


def kill_one(arguments: argparse.Namespace, folder: str) -> None:
    """End the last host in the middle of prefills; time until the others say so."""
    processes = start(arguments, folder, "kill")
    while not all((Path(folder) / f"ready{r}").exists() for r in range(arguments.hosts)):
        time.sleep(0.1)
    time.sleep(1.0)
    killed = time.time()
    processes[-1].kill()
    for process in processes[:-1]:
        process.wait(timeout=200)
    for rank in range(arguments.hosts - 1):
        when, message = (Path(folder) / f"error{rank}.txt").read_text("utf-8").split(" ", 1)
        print(f"host {rank}: after {float(when) - killed:.2f} s: {message}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rate", default="1gbit", help="as tc writes it: 10gbit, 1gbit")
    parser.add_argument("--delay", type=float, default=0.0, help="of each packet, milliseconds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mode", default="all", choices=["all", "time", "kill"])
    parser.add_argument("--folder", default="", help="used by the hosts themselves")
    arguments = parser.parse_args()
    if arguments.hosts < 2 or arguments.tokens < arguments.hosts or arguments.repeats < 1:
        parser.error("expected --hosts of 2 or more, a token for each, and --repeats of 1 or more")
    if arguments.delay < 0:
        parser.error(f"--delay must be 0 ms or more, got {arguments.delay:g}")
    if "RANK" in os.environ and arguments.mode != "all":
        host(arguments)
        return
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        print("skipped: network namespaces need root, ip and tc")
        return
    tear_down(arguments.hosts)
    try:
        cables = set_up(arguments.hosts, arguments.rate, arguments.delay)
    except (RuntimeError, OSError) as error:
        tear_down(arguments.hosts)
        print(f"skipped: {error}")
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure(arguments, folder)
            kill_one(arguments, folder)
            print("all hosts again:")
            measure(arguments, folder)
    finally:
        tear_down(arguments.hosts, cables)


if __name__ == "__main__":
    main()
