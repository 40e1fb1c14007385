"""How fibrpc's rate follows workers, prefetch, calls in flight, queue type and real work; a million calls; one call;
and the recursion beside C's. Prints tables, and draws docs/scaling.svg.

    make scaling [ROUNDS=5]
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from harness import (
    BUILT,
    FIBRPC,
    PEERS,
    ROOT,
    URL,
    Missing,
    apt,
    build_node,
    command,
    fibrpc_bench,
    fibrpc_server,
    machine,
    median,
    run_client,
    say,
    table,
    thousands,
)

ROUNDS = int(os.environ.get("ROUNDS", 5))
IN_FLIGHT = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1000, 3000, 10_000]


def queue_name(what):
    return f"scaling.{os.getpid()}.{what}"


def reports(what, server_options, workers, requests, in_flight, *options):
    """The reports of as many runs as there are rounds, on one server."""
    say(f"{what} ...")
    queue = queue_name(what.replace(" ", "-"))
    with fibrpc_server(queue, workers, *server_options):
        return [fibrpc_bench(queue, requests, in_flight, *options)[0] for _ in range(ROUNDS)]


def rate_and_p99(runs):
    return [thousands(median(run["rate"] for run in runs)), f"{median(run['latency_ms']['p99'] for run in runs):.1f}"]


def workers_table():
    rows = []
    for workers in [1, 2, 4, 8, 16]:
        quick = reports(f"{workers} workers", [], workers, 10_000, 64)
        real = reports(f"{workers} workers fib27", [], workers, 1_500, 64, "--argument", 27)
        rows.append([workers, *rate_and_p99(quick), *rate_and_p99(real)])
    return table(["workers", "fib(1) per s", "p99 ms", "fib(27) per s", "p99 ms"], rows)


def prefetch_table():
    rows = []
    for prefetch in [1, 4, 16, 64]:
        runs = reports(f"prefetch {prefetch}", ["--prefetch", prefetch], 4, 15_000, 256)
        rows.append([prefetch, *rate_and_p99(runs)])
    return table(["prefetch", "calls per s", "p99 ms"], rows)


def queue_type_table():
    rows = []
    for kind in ["transient", "classic", "quorum"]:
        runs = reports(kind, ["--queue-type", kind], 4, 10_000, 64)
        rows.append([kind, *rate_and_p99(runs)])
    return table(["queue type", "calls per s", "p99 ms"], rows)


def in_flight_table():
    rows, points = [], []
    for in_flight in IN_FLIGHT:
        runs = reports(f"{in_flight} in flight", [], 4, 4_000 if in_flight < 4 else 15_000, in_flight)
        rows.append([thousands(in_flight), *rate_and_p99(runs)])
        rate = median(run["rate"] for run in runs)
        points.append((in_flight, rate, median(run["latency_ms"]["p99"] for run in runs)))
    return table(["in flight", "calls per s", "p99 ms"], rows), points


def draw(points, path):
    import matplotlib

    matplotlib.use("svg")
    # Text stays text, and the same figures give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fibrpc", "font.size": 10})
    from matplotlib import pyplot

    in_flight, rate, p99 = zip(*points)
    figure, left = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    left.plot(in_flight, rate, "o-", color="#1f77b4")
    left.set(xscale="log", xlabel="calls in flight", ylim=(0, None))
    left.set_ylabel("calls per second", color="#1f77b4")
    right = left.twinx()
    right.plot(in_flight, p99, "s--", color="#d62728")
    right.set_yscale("log")
    right.set_ylabel("p99 latency, ms", color="#d62728")
    left.grid(alpha=0.3)
    left.set_title("fibrpc: 4 workers, prefetch 1, fib(1)")
    figure.savefig(path, metadata={"Date": None})


def resident_kib(pid, field):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise SystemExit(f"no {field} of {pid}")


def million():
    say("a million calls ...")
    queue = queue_name("million")
    with fibrpc_server(queue, 4) as server:
        fibrpc_bench(queue, 10_000, 256)
        before = resident_kib(server.process.pid, "VmRSS")
        words = [FIBRPC, "bench", "--url", URL, "--queue", queue, "--requests", 1_000_000, "--concurrency", 256]
        client = subprocess.Popen(list(map(str, words + ["--output", "json"])), stdout=subprocess.PIPE, text=True)
        memory = []
        while client.poll() is None:
            try:
                memory.append(resident_kib(client.pid, "VmRSS"))
            except (OSError, SystemExit):
                pass  # it has just ended
            time.sleep(1)
        if client.returncode:
            raise SystemExit(client.stdout.read())
        after = resident_kib(server.process.pid, "VmRSS")
    quarter = memory[len(memory) // 4]
    return table(
        ["one million calls", "early on, KiB", "at the end, KiB"],
        [["server", thousands(before), thousands(after)], ["client", thousands(quarter), thousands(memory[-1])]],
    )


def one_shot_table():
    say("one call ...")
    apt("time", "time")
    queue = queue_name("one")
    clients = {"fibrpc call 30": [FIBRPC, "call", "--url", URL, "--queue", queue, 30]}
    try:
        build_node()
        clients["JavaScript, amqplib"] = ["node", BUILT / "node" / "tutorial_client.js", URL, queue, 30]
    except Missing as reason:
        say(f"JavaScript is missing: {reason}")
    python = ROOT / "tests" / "peers" / "rpc_client.py"
    clients["Python, pika"] = [sys.executable, python, URL, queue, "uuid", 30]
    times, peaks = {name: [] for name in clients}, {}
    with fibrpc_server(queue, 4, "--algorithm", "fast"):
        for _ in range(10 * ROUNDS):
            for name, words in clients.items():
                began = time.monotonic()
                stdout, _ = run_client(words)
                times[name].append(time.monotonic() - began)
                if "832040" not in stdout:
                    raise SystemExit(f"{name} said {stdout!r}")
        for name, words in clients.items():
            measured = subprocess.run(
                ["/usr/bin/time", "-f", "%M", *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            peaks[name] = int(measured.stderr.splitlines()[-1])
    ours = median(times["fibrpc call 30"])
    rows = [
        [name, f"{median(t) * 1e3:.0f}", f"{median(t) / ours:.1f}", thousands(peaks[name])] for name, t in times.items()
    ]
    size = FIBRPC.stat().st_size / 2**20
    return table(["one call, whole process", "ms", "times ours", "peak KiB"], rows) + f"\n\nThe binary: {size:.1f} MiB."


N = 42


def fibonacci_table():
    say(f"fib({N}) ...")
    command("gcc", "-O2", "-o", BUILT / "fib", PEERS / "fib.c")
    command("cargo", "build", "--release", "--locked", "--example", "fib", cwd=ROOT)
    times = {"gcc -O2": [], "fibrpc": []}
    for _ in range(ROUNDS):
        for name, program in [("gcc -O2", BUILT / "fib"), ("fibrpc", ROOT / "target/release/examples/fib")]:
            _, spent = run_client([program, N])
            times[name].append(spent / 1e6)
    base = median(times["gcc -O2"])
    rows = [[name, f"{median(t):.2f}", f"{median(t) / base:.2f}"] for name, t in times.items()]
    return table([f"fib({N}), recursive", "CPU s", "times gcc's"], rows)


def main():
    BUILT.mkdir(parents=True, exist_ok=True)
    header = f"{machine()}; medians of {ROUNDS} runs; 4 workers, prefetch 1, fib(1), 64 in flight unless it says otherwise."
    print(header, flush=True)
    in_flight, points = in_flight_table()
    draw(points, ROOT / "docs" / "scaling.svg")
    print("\n" + in_flight, flush=True)
    for part in [workers_table, prefetch_table, queue_type_table, million, one_shot_table, fibonacci_table]:
        print("\n" + part(), flush=True)


main()
