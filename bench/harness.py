"""What the benchmarks share: peers and fibrpc as servers and clients, brokers, CPU time, medians, tables."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "bench" / "peers"
BUILT = ROOT / "target" / "bench-peers"
FIBRPC = ROOT / "target" / "release" / "fibrpc"
URL = os.environ.get("AMQP_URL") or sys.exit("run this with: scripts/broker with-broker ... (see the Makefile)")
TICK_US = 1_000_000 / os.sysconf("SC_CLK_TCK")

# No run takes longer than this, whatever happens to it.
RUN_SECONDS_MAX = 300

# So that each `with` ends what it has started.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def say(*words):
    """Tells the person who waits; the tables alone go to stdout."""
    print(*words, file=sys.stderr, flush=True)


class Missing(Exception):
    """A peer cannot be installed or built here."""


def command(*words, **options):
    """Runs a build step quietly; what it said is the reason if it fails."""
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    except OSError as error:
        raise Missing(str(error)) from None
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise Missing(f"{' '.join(map(str, words[:3]))}: {last}")
    return done.stdout


def apt(needed, *packages):
    """Installs Debian packages unless what is `needed`, a command or a header, is there."""
    if shutil.which(needed) or Path("/usr/include", needed).exists() or Path("/usr/share", needed).exists():
        return
    if not shutil.which("apt-get"):
        raise Missing(f"needs {needed}")
    say(f"installing {' '.join(packages)} (apt-get), this happens once ...")
    root = [] if os.getuid() == 0 else ["sudo"]
    command(*root, "apt-get", "update", "-qq")
    quiet = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y", "-qq", "--no-install-recommends"]
    command(*root, *quiet, "-o", "DPkg::Lock::Timeout=300", *packages)


def build_librabbitmq():
    apt("gcc", "gcc", "libc6-dev")
    apt("amqp.h", "librabbitmq-dev")
    command("gcc", "-O2", "-o", BUILT / "librabbitmq", PEERS / "librabbitmq" / "peer.c", "-lrabbitmq")
    return [BUILT / "librabbitmq"]


def build_cargo(name):
    manifest = PEERS / name / "Cargo.toml"
    command("cargo", "build", "--release", "--locked", "--manifest-path", manifest, "--target-dir", BUILT / name)
    return [BUILT / name / "release" / f"{name}-peer"]


def build_go():
    apt("go", "golang-go")
    apt("gocode/src/github.com/rabbitmq/amqp091-go", "golang-github-rabbitmq-amqp091-go-dev")
    build = {"GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOCACHE": str(BUILT / "go-cache")}
    command("go", "build", "-o", BUILT / "go", PEERS / "go" / "peer.go", env={**os.environ, **build})
    return [BUILT / "go"]


def build_node():
    apt("node", "nodejs")
    apt("npm", "npm")
    folder = BUILT / "node"
    folder.mkdir(exist_ok=True)
    for name in ["package.json", "package-lock.json", "peer.js", "tutorial_client.js"]:
        shutil.copy(PEERS / "node" / name, folder)
    if not (folder / "node_modules" / "amqplib").exists():
        command("npm", "ci", "--silent", "--no-audit", "--no-fund", cwd=folder)
    return ["node", folder / "peer.js"]


def build_pika():
    return [sys.executable, PEERS / "pika" / "peer.py"]


LIBRABBITMQ, LAPIN = "C librabbitmq", "Rust lapin on tokio"
PEER_BUILDS = {
    LIBRABBITMQ: build_librabbitmq,
    "Rust amiquip, bare": lambda: build_cargo("amiquip"),
    LAPIN: lambda: build_cargo("lapin"),
    "Go amqp091": build_go,
    "JavaScript amqplib": build_node,
    "Python pika": build_pika,
}


def build_peers(names=tuple(PEER_BUILDS)):
    """The peers' commands by name, and why others are missing."""
    BUILT.mkdir(parents=True, exist_ok=True)
    peers, missing = {}, {}
    for name in names:
        say(f"building {name} ...")
        try:
            peers[name] = [str(word) for word in PEER_BUILDS[name]()]
        except Missing as reason:
            missing[name] = str(reason)
            say(f"{name} is missing: {reason}")
    return peers, missing


def build_example(name):
    """An example of ours, see Cargo.toml."""
    say(f"building {name} ...")
    command("cargo", "build", "--release", "--locked", "--example", name, cwd=ROOT)
    return ROOT / "target" / "release" / "examples" / name


def free_port():
    """A port that is free now; taken by whoever is quicker, which shows."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def make_certificates(folder):
    """An authority, ca.pem, and what it signs for the broker: broker.pem and broker.key."""
    names = folder / "names"
    names.write_text("subjectAltName = DNS:localhost, IP:127.0.0.1\n")
    new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command(*new, "-x509", "-days", "2", "-subj", "/CN=benchmark", "-keyout", "ca.key", "-out", "ca.pem", cwd=folder)
    command(*new, "-subj", "/CN=broker", "-keyout", "broker.key", "-out", "broker.csr", cwd=folder)
    signed = ["-req", "-in", "broker.csr", "-out", "broker.pem", "-days", "2", "-extfile", names]
    command("openssl", "x509", *signed, "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", cwd=folder)


@contextmanager
def tls_broker():
    """A private broker that listens with TLS, too: its amqps:// URL, and the file of its authority."""
    apt("openssl", "openssl")
    say("starting a broker with TLS ...")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_certificates(folder)
        port = free_port()
        settings = [f"listeners.ssl.1 = 127.0.0.1:{port}"]
        for option, file in [("cacertfile", "ca.pem"), ("certfile", "broker.pem"), ("keyfile", "broker.key")]:
            settings.append(f"ssl_options.{option} = {folder / file}")
        (folder / "settings").write_text("\n".join(settings) + "\n")
        ours = {**os.environ, "BROKER_SETTINGS": str(folder / "settings")}
        for other in ["AMQP_URL", "FIBRPC_TEST_URL", "BROKER_DIR"]:
            ours.pop(other, None)
        # It stops when its stdin ends, which is at our end at the latest.
        words = [ROOT / "scripts" / "broker", "with-broker", "sh", "-c", 'echo "$AMQP_URL"; exec cat']
        node = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ours)
        try:
            plain = node.stdout.readline().strip()
            if not plain:
                raise SystemExit("the broker with TLS did not start")
            yield re.sub(r"^amqp:(.*):\d+/", rf"amqps:\1:{port}/", plain), folder / "ca.pem"
        finally:
            node.stdin.close()
            node.wait()


@contextmanager
def hogs():
    """Every core is taken by a process that only computes, at normal priority; it does not outlive us."""
    loop = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(100_000): pass"
    processes = [subprocess.Popen([sys.executable, "-c", loop]) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def broker_pid():
    """The process id of the broker's Erlang VM, if it is ours."""
    done = subprocess.run([ROOT / "scripts" / "broker", "pid"], capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else None


def cpu_us(pids):
    """User plus system time of the processes and their living children, in microseconds."""
    total, family = 0, set(pids)
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has ended meanwhile
        stats[int(path.parent.name)] = (int(fields[1]), int(fields[11]) + int(fields[12]))
    for pid, (parent, ticks) in sorted(stats.items()):
        if pid in family or parent in family:
            family.add(pid)
            total += ticks
    return total * TICK_US


class Server:
    """A running server; ends with the `with` block."""

    def __init__(self, words):
        self.process = subprocess.Popen(
            list(map(str, words)), stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        line = self.process.stdout.readline()
        if "Awaiting" not in line:
            raise SystemExit(f"{words[0]} is not ready: {line!r}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def run_client(words):
    """Runs a client to its end; gives its stdout and its CPU time in us."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, text=True, timeout=RUN_SECONDS_MAX)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{words[0]} failed: {done.stdout}")
    spent = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e6
    return done.stdout, spent


def fibrpc_server(queue, workers, *options):
    words = [FIBRPC, "server", "--url", URL, "--queue", queue, "--workers", workers, "--quiet", *options]
    return Server(words)


def fibrpc_echo(queue, workers, *options, url=URL):
    words = [FIBRPC, "reply", "--echo", "--url", url, "--queue", queue, "--workers", workers, "--quiet", *options]
    return Server(words)


def slow_server(program, queue, workers, delay_ms):
    """Serves with `bench/slow.rs`."""
    load = ["--queue", queue, "--workers", workers, "--prefetch", 1, "--delay-ms", delay_ms]
    return Server([program, "--url", URL, *load])


def fibrpc_bench(queue, requests, in_flight, *options, url=URL):
    """Runs `fibrpc bench`; gives its JSON and its CPU time in us."""
    load = ["--queue", queue, *load_of(requests, in_flight)]
    stdout, spent = run_client([FIBRPC, "bench", "--url", url, *load, "--output", "json", *options])
    return json.loads(stdout), spent


def load_of(requests, in_flight):
    """The options for that many calls, after a tenth as many that are not measured."""
    return ["--requests", requests, "--warmup", warmup_of(requests), "--concurrency", in_flight]


def warmup_of(requests):
    return requests // 10 + 1


def peer_server(peer, queue, workers, *options, url=URL):
    words = [*peer, "server", "--url", url, "--queue", queue, "--workers", workers, "--prefetch", 1, *options]
    return Server(words)


def peer_client(peer, queue, requests, in_flight, *options, url=URL):
    """Runs a peer's client; gives its JSON and its CPU time in us."""
    load = ["--queue", queue, *load_of(requests, in_flight), *options]
    stdout, spent = run_client([*peer, "client", "--url", url, *load])
    return json.loads(stdout), spent


def chosen(parts):
    """The parts that the command line names; all of them if it names none."""
    names = sys.argv[1:] or list(parts)
    for name in names:
        if name not in parts:
            raise SystemExit(f"there is no '{name}'; choose from: {' '.join(parts)}")
    return [parts[name] for name in names]


def median(values):
    return statistics.median(values)


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def thousands(value):
    return f"{value:,.0f}"


def machine():
    """One line on where this ran."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    status = subprocess.run([FIBRPC, "--version"], capture_output=True, text=True).stdout.strip()
    return f"{status}, {os.cpu_count()} cores ({cpu.group(1) if cpu else 'unknown'}), {time.strftime('%Y-%m-%d')}"
