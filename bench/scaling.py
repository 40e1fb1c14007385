"""How fibrpc's rate follows calls in flight, threads, connections, workers, prefetch, queue type and real work; what spinning gains
and costs; memory over a million calls; one call; and the recursion beside C's. Prints tables, and draws docs/scaling.svg.

    make scaling [ROUNDS=5]
    scripts/broker with-broker target/peers/bin/python bench/scaling.py [TABLE]...

The tables are: in-flight (which draws), threads, connections, spin, workers, prefetch, queue-type, memory, one-call, fibonacci.
CALLS=10000000 is how many calls `memory` makes, a million otherwise.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from harness import (
    BUILT,
    FIBRPC,
    PEERS,
    ROOT,
    URL,
    Missing,
    apt,
    build_example,
    build_node,
    chosen,
    command,
    fibrpc_bench,
    fibrpc_server,
    hogs,
    machine,
    median,
    run_client,
    say,
    slow_server,
    table,
    thousands,
    warmup_of,
)

ROUNDS = int(os.environ.get("ROUNDS", 5))
CALLS = int(os.environ.get("CALLS", 1_000_000))
IN_FLIGHT = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1000, 3000, 10_000]
THREADS = [1, 4, 16, 64, 256, 1000]
# What a server does, the milliseconds it waits before it answers, how many requests take one to three seconds, and
# whether something else wants every core.
SPIN_CASES = [
    ("fib(1)", None, 8_000, False),
    ("after 1 ms", 1, 1_000, False),
    ("after 10 ms", 10, 150, False),
    ("after 100 ms", 100, 20, False),
    ("fib(1), every core taken by a hog", None, 4_000, True),
]
SPINS = {"off": ["--spin", "0"], "on": []}


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
    draw(points, ROOT / "docs" / "scaling.svg")
    return table(["in flight", "calls per s", "p99 ms"], rows)


def threads_table():
    """Threads that share a client beside as many calls in flight from one thread, in turn."""
    program = build_example("threads")
    rows = []
    for threads in THREADS:
        say(f"{threads} threads ...")
        queue, requests = queue_name(f"threads.{threads}"), 4_000 if threads < 4 else 15_000
        load = ["--queue", queue, "--requests", requests, "--warmup", warmup_of(requests), "--threads", threads]
        many, one = [], []
        with fibrpc_server(queue, 4):
            for _ in range(ROUNDS):
                stdout, _ = run_client([program, "--url", URL, *load])
                many.append(json.loads(stdout))
                one.append(fibrpc_bench(queue, requests, threads)[0])
        rows.append([thousands(threads), *rate_and_p99(many), *rate_and_p99(one)])
    header = ["threads, or calls in flight", "threads: calls per s", "p99 ms", "one thread: calls per s", "p99 ms"]
    return table(header, rows)


def connections_table():
    rows = []
    for connections in [1, 4, 16]:
        row = [connections]
        for in_flight in [64, 256]:
            what = f"{connections} connections {in_flight}"
            row += rate_and_p99(reports(what, [], 4, 15_000, in_flight, "--connections", connections))
        rows.append(row)
    return table(["connections", "64 in flight: calls per s", "p99 ms", "256 in flight: calls per s", "p99 ms"], rows)


def spin_table():
    """One call at a time with and without spinning, in turn."""
    slow = build_example("slow")
    rows = []
    for what, delay_ms, requests, busy in SPIN_CASES:
        say(f"{what}, spinning and not ...")
        queue = queue_name(f"spin.{delay_ms}.{busy}")
        measured = {spin: [] for spin in SPINS}
        plain = delay_ms is None
        with (
            fibrpc_server(queue, 4) if plain else slow_server(slow, queue, 4, delay_ms),
            hogs() if busy else nullcontext(),
        ):
            start_us = median(fibrpc_bench(queue, 1, 1, *SPINS["off"])[1] for _ in range(5))
            for number in range(ROUNDS):
                for spin in list(SPINS) if number % 2 else reversed(SPINS):
                    report, spent = fibrpc_bench(queue, requests, 1, *SPINS[spin])
                    measured[spin].append((report, (spent - start_us) / (requests + warmup_of(requests))))
        for spin, runs in measured.items():
            rate = median(report["rate"] for report, _ in runs)
            quantiles = [median(report["latency_ms"][q] for report, _ in runs) for q in ["p50", "p99"]]
            cpu = median(us for _, us in runs)
            rows.append([what, spin, thousands(rate), *(f"{ms:.3f}" for ms in quantiles), f"{max(cpu, 0):.0f}"])
    return table(["answer", "spin", "calls per s", "p50 ms", "p99 ms", "client CPU us per call"], rows)


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


def memory_table():
    say(f"{thousands(CALLS)} calls ...")
    queue = queue_name("memory")
    with fibrpc_server(queue, 4) as server:
        fibrpc_bench(queue, 10_000, 256)
        before = resident_kib(server.process.pid, "VmRSS")
        words = [FIBRPC, "bench", "--url", URL, "--queue", queue, "--requests", CALLS, "--concurrency", 256]
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
        [f"{thousands(CALLS)} calls", "early on, KiB", "at the end, KiB"],
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
    ours = build_example("fib")
    times = {"gcc -O2": [], "fibrpc": []}
    for _ in range(ROUNDS):
        for name, program in [("gcc -O2", BUILT / "fib"), ("fibrpc", ours)]:
            _, spent = run_client([program, N])
            times[name].append(spent / 1e6)
    base = median(times["gcc -O2"])
    rows = [[name, f"{median(t):.2f}", f"{median(t) / base:.2f}"] for name, t in times.items()]
    return table([f"fib({N}), recursive", "CPU s", "times gcc's"], rows)


TABLES = {
    "in-flight": in_flight_table,
    "threads": threads_table,
    "connections": connections_table,
    "spin": spin_table,
    "workers": workers_table,
    "prefetch": prefetch_table,
    "queue-type": queue_type_table,
    "memory": memory_table,
    "one-call": one_shot_table,
    "fibonacci": fibonacci_table,
}


def main():
    BUILT.mkdir(parents=True, exist_ok=True)
    parts = chosen(TABLES)
    header = f"{machine()}; medians of {ROUNDS} runs; 4 workers, prefetch 1, fib(1), 64 in flight unless it says otherwise."
    print(header, flush=True)
    for part in parts:
        print("\n" + part(), flush=True)


main()
