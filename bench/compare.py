"""fibrpc beside other libraries, on one broker, in turn, several rounds: prints medians, ratios and CPU times.

    make compare [ROUNDS=5]
"""

import os

from harness import (
    broker_pid,
    build_peers,
    cpu_us,
    fibrpc_bench,
    fibrpc_server,
    machine,
    median,
    peer_client,
    peer_server,
    say,
    table,
    thousands,
    warmup_of,
)

ROUNDS = int(os.environ.get("ROUNDS", 5))
WORKERS = 4
# Calls in flight, and how many requests take one to three seconds.
RUNS = [(1, 4_000), (16, 15_000), (256, 15_000)]
OURS = "**fibrpc**"
WHO = ["server", "client", "broker"]


def measure(name, peer, round_number):
    """One round of one library: for each run, the rate, and CPU us per call of server, client and broker."""
    queue = f"compare.{os.getpid()}.{round_number}.{abs(hash(name))}"
    broker = broker_pid()
    results = {}
    with fibrpc_server(queue, WORKERS) if peer is None else peer_server(peer, queue, WORKERS) as server:
        for in_flight, requests in RUNS:
            before = [cpu_us([server.process.pid]), cpu_us([broker] if broker else [])]
            if peer is None:
                report, client = fibrpc_bench(queue, requests, in_flight)
            else:
                report, client = peer_client(peer, queue, requests, in_flight)
            after = [cpu_us([server.process.pid]), cpu_us([broker] if broker else [])]
            calls = requests + warmup_of(requests)
            spent = [after[0] - before[0], client, after[1] - before[1]]
            results[in_flight] = report["rate"], [us / calls for us in spent]
    return results


def main():
    peers, missing = build_peers()
    libraries = {OURS: None, **peers}
    rounds = []
    for number in range(1, ROUNDS + 1):
        say(f"round {number} of {ROUNDS} ...")
        # The next round begins with the next library, so that none is always first.
        names = list(libraries)
        shift = number % len(names)
        rounds.append({name: measure(name, libraries[name], number) for name in names[shift:] + names[:shift]})

    in_flights = [in_flight for in_flight, _ in RUNS]
    rates, ratios, cpus = [], [], []
    for name in libraries:
        rate = {i: median(r[name][i][0] for r in rounds) for i in in_flights}
        ratio = {i: median(r[OURS][i][0] / r[name][i][0] for r in rounds) for i in in_flights}
        rates.append([name, *(thousands(rate[i]) for i in in_flights)])
        ratios.append([name, *(f"{ratio[i]:.2f}" for i in in_flights)])
        cpus.append([name, *(f"{median(r[name][16][1][who] for r in rounds):.0f}" for who in range(3))])
    for name, reason in missing.items():
        rates.append([name, f"missing: {reason}", "", ""])

    header = [f"{i} in flight" for i in in_flights]
    print(f"{machine()}; {WORKERS} workers, prefetch 1, n = 1; medians of {ROUNDS} rounds.\n")
    print(table(["calls per second", *header], rates), end="\n\n")
    print(table(["fibrpc's rate as a multiple of", *header], ratios[1:]), end="\n\n")
    print(table(["CPU us per call, 16 in flight", *WHO], cpus))


main()
