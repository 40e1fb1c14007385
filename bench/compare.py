"""fibrpc beside other libraries, on one broker, in turn, several rounds: prints medians, ratios, latencies and CPU
times; and how fast bodies of several sizes are echoed, plain and over TLS.

    make compare [ROUNDS=5]
    scripts/broker with-broker target/peers/bin/python bench/compare.py [calls | bodies]...
"""

import os

from harness import (
    LAPIN,
    LIBRABBITMQ,
    URL,
    broker_pid,
    build_peers,
    chosen,
    cpu_us,
    fibrpc_bench,
    fibrpc_echo,
    fibrpc_server,
    machine,
    median,
    peer_client,
    peer_server,
    say,
    table,
    thousands,
    tls_broker,
    warmup_of,
)

ROUNDS = int(os.environ.get("ROUNDS", 5))
WORKERS = 4
# Calls in flight, and how many requests take one to three seconds.
RUNS = [(1, 4_000), (16, 15_000), (256, 15_000)]
# The same for bodies of so many octets.
BODIES = [
    ("100 B", 100, 16, 20_000),
    ("1,000 B", 1_000, 16, 20_000),
    ("16 KiB", 16 << 10, 16, 15_000),
    ("256 KiB", 256 << 10, 8, 3_000),
    ("4 MiB", 4 << 20, 4, 200),
]
TLS_BODIES = [("4 MiB over TLS", 4 << 20, 4, 100)]
OURS = "**fibrpc**"
# The C client once more, with requests like ours: they expire, and come back if there is no queue. That is work for the
# broker, which the tutorial's requests do not make.
SAME_MESSAGE = LIBRABBITMQ + ", requests like ours"
LIKE_OURS = ["--expiration", 30_000, "--mandatory", 1]
WHO = ["server", "client", "broker"]


def in_turn(libraries):
    """Each round's number and the libraries' names; the next round begins with the next library."""
    names = list(libraries)
    for number in range(1, ROUNDS + 1):
        say(f"round {number} of {ROUNDS} ...")
        shift = number % len(names)
        yield number, names[shift:] + names[:shift]


def queue_name(what, name, number):
    return f"compare.{os.getpid()}.{what}.{number}.{abs(hash(name))}"


def measure(name, peer, number):
    """One round of one library: for each run, the report, and CPU us per call of server, client and broker."""
    queue = queue_name("calls", name, number)
    broker = broker_pid()
    results = {}
    with fibrpc_server(queue, WORKERS) if peer is None else peer_server(peer, queue, WORKERS) as server:
        for in_flight, requests in RUNS:
            before = [cpu_us([server.process.pid]), cpu_us([broker] if broker else [])]
            if peer is None:
                report, client = fibrpc_bench(queue, requests, in_flight)
            else:
                more = LIKE_OURS if name == SAME_MESSAGE else []
                report, client = peer_client(peer, queue, requests, in_flight, "--argument", 1, *more)
            after = [cpu_us([server.process.pid]), cpu_us([broker] if broker else [])]
            calls = requests + warmup_of(requests)
            spent = [after[0] - before[0], client, after[1] - before[1]]
            results[in_flight] = report, [us / calls for us in spent]
    return results


def calls_tables():
    peers, missing = build_peers()
    libraries = {OURS: None}
    for name, words in peers.items():
        libraries[name] = words
        if name == LIBRABBITMQ:
            libraries[SAME_MESSAGE] = words
    rounds = []
    for number, names in in_turn(libraries):
        rounds.append({name: measure(name, libraries[name], number) for name in names})

    in_flights = [in_flight for in_flight, _ in RUNS]

    def rate(measured, name, in_flight):
        return measured[name][in_flight][0]["rate"]

    def latency(measured, name, in_flight, quantile):
        return measured[name][in_flight][0]["latency_ms"][quantile]

    rates, ratios, latencies, cpus = [], [], [], []
    for name in libraries:
        rates.append([name, *(thousands(median(rate(r, name, i) for r in rounds)) for i in in_flights)])
        times = [median(rate(r, OURS, i) / rate(r, name, i) for r in rounds) for i in in_flights]
        times.append(median(latency(r, OURS, 1, "p50") / latency(r, name, 1, "p50") for r in rounds))
        ratios.append([name, *(f"{ratio:.2f}" for ratio in times)])
        quantiles = [(i, quantile) for i in in_flights for quantile in ["p50", "p99"]]
        latencies.append([name, *(f"{median(latency(r, name, *which) for r in rounds):.3g}" for which in quantiles)])
        cpus.append([name, *(f"{median(r[name][16][1][who] for r in rounds):.0f}" for who in range(3))])
    for name, reason in missing.items():
        rates.append([name, f"missing: {reason}", "", ""])

    header = [f"{i} in flight" for i in in_flights]
    print("\nFibonacci, n = 1:\n")
    print(table(["calls per second", *header], rates), end="\n\n")
    print(table(["fibrpc's rate as a multiple of", *header, "its p50, 1 in flight"], ratios[1:]), end="\n\n")
    print(table(["latency in ms, by calls in flight", *(f"{i}: {q}" for i, q in quantiles)], latencies), end="\n\n")
    print(table(["CPU us per call, 16 in flight", *WHO], cpus), flush=True)


def echo_rates(libraries, bodies, ca=None, url=URL):
    """By body and library, the rates of all rounds. `ca` is the file of the broker's authority."""
    rates = {label: {name: [] for name in libraries} for label, *_ in bodies}
    with_ca, ours_with_ca = (["--ca", ca], ["--tls-ca", ca]) if ca else ([], [])
    for number, names in in_turn(libraries):
        for name in names:
            peer, queue = libraries[name], queue_name("bodies", name, number)
            ours = peer is None
            with (
                fibrpc_echo(queue, WORKERS, *ours_with_ca, url=url)
                if ours
                else peer_server(peer, queue, WORKERS, "--echo", 1, *with_ca, url=url)
            ):
                for label, size, in_flight, requests in bodies:
                    load = [queue, requests, in_flight, "--size", size]
                    report, _ = (
                        fibrpc_bench(*load, "--expect-echo", *ours_with_ca, url=url)
                        if ours
                        else peer_client(peer, *load, *with_ca, url=url)
                    )
                    rates[label][name].append(report["rate"])
    return rates


def bodies_table():
    peers, missing = build_peers([LIBRABBITMQ, LAPIN])
    libraries = {OURS: None, **peers}
    say("bodies ...")
    rates = echo_rates(libraries, BODIES)
    with tls_broker() as (url, ca):
        with_tls = {name: words for name, words in libraries.items() if name != LIBRABBITMQ}
        rates |= echo_rates(with_tls, TLS_BODIES, ca, url)

    rows = []
    for label, _, in_flight, _ in BODIES + TLS_BODIES:
        ours = rates[label][OURS]
        row = [f"{label} ({in_flight})"]
        row += [thousands(median(rates[label][name])) if name in rates[label] else "" for name in [*peers, OURS]]
        for name in peers:
            theirs = rates[label].get(name)
            row.append(f"{median(a / b for a, b in zip(ours, theirs)):.2f}" if theirs else "")
        rows.append(row)
    print("\nEcho, calls per second; lapin and fibrpc have rustls:\n")
    print(table(["body (in flight)", *peers, OURS, *(f"fibrpc / {name}" for name in peers)], rows), flush=True)
    for name, reason in missing.items():
        print(f"\n{name} is missing: {reason}")


def main():
    parts = chosen({"calls": calls_tables, "bodies": bodies_table})
    print(f"{machine()}; {WORKERS} workers, prefetch 1; medians of {ROUNDS} rounds.", flush=True)
    for part in parts:
        part()


main()
