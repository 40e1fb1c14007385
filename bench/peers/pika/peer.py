"""Tutorial six (RPC) in Python with pika: the server and the client of the benchmark.

    peer.py server --url URL --queue Q --workers W --prefetch P
    peer.py client --url URL --queue Q --requests N --warmup M --concurrency C --argument n

What makes it fast:
- SelectConnection in place of BlockingConnection, which polls the socket for each message.
- pika sets TCP_NODELAY itself, but writes each frame with a system call of its own: four for a
  reply and its ack. GatheringConnection makes it one for all that one read leads to.
- A process for each worker, because of Python's global lock.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time

import pika

# A reply that takes longer will not come.
REPLY_TIMEOUT_S = 60
CONTENT_TYPE = "text/plain"


def die(what, why):
    print(f"peer: {what}: {why}", file=sys.stderr)
    os._exit(1)


def fib(n):
    """The tutorial's recursion, slow on purpose."""
    return n if n < 2 else fib(n - 1) + fib(n - 2)


class GatheringConnection(pika.SelectConnection):
    """Writes what the handling of one read has published at its end, in one piece.

    Both methods are pika's seams to the adapter below it: what comes in, and what goes out.
    """

    def __init__(self, *args, **kwargs):
        self._gathered = None  # a list while a read is being handled
        super().__init__(*args, **kwargs)

    def _proto_data_received(self, data):
        self._gathered = []
        super()._proto_data_received(data)
        gathered, self._gathered = self._gathered, None
        if gathered:
            super()._adapter_emit_data(b"".join(gathered))

    def _adapter_emit_data(self, data):
        if self._gathered is None:
            super()._adapter_emit_data(data)
        else:
            self._gathered.append(data)


def run(url, on_channel):
    """Connects, calls back with a channel, and handles events for ever."""
    connection = GatheringConnection(
        pika.URLParameters(url),
        on_open_callback=lambda connection: connection.channel(on_open_callback=on_channel),
        on_open_error_callback=lambda connection, error: die("connect", repr(error)),
        on_close_callback=lambda connection, reason: die("connection", repr(reason)),
    )
    connection.ioloop.start()


# --- Server --------------------------------------------------------------------------------------


def server(options):
    ready, tell = os.pipe()
    children = []
    for _ in range(options.workers):
        child = os.fork()
        if child == 0:
            os.close(ready)
            work(options, tell)
        children.append(child)
    os.close(tell)  # so that the read ends if the workers die before they are ready

    def stop(*_):
        for child in children:
            with contextlib.suppress(ProcessLookupError):  # it may have got the signal, too
                os.kill(child, signal.SIGTERM)
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    for _ in children:
        if os.read(ready, 1) == b"":
            die("server", "no worker is left")
    print(" [x] Awaiting RPC requests", flush=True)
    os.wait()  # workers end only by failing
    stop()


def work(options, ready):
    def on_request(channel, method, properties, body):
        channel.basic_publish(
            "",
            properties.reply_to,
            str(fib(int(body))).encode(),
            pika.BasicProperties(
                content_type=CONTENT_TYPE, correlation_id=properties.correlation_id
            ),
        )
        channel.basic_ack(method.delivery_tag)

    def on_channel(channel):
        channel.add_on_close_callback(lambda channel, reason: die("channel", repr(reason)))
        channel.queue_declare(options.queue)
        channel.basic_qos(prefetch_count=options.prefetch)
        channel.basic_consume(
            options.queue, on_request, callback=lambda consuming: os.write(ready, b".")
        )

    run(options.url, on_channel)


# --- Client --------------------------------------------------------------------------------------


class Client:
    """Keeps `concurrency` calls in flight; the warm-up's first, then the measured ones.

    Correlation ids are numbers in decimal, counted over all calls.
    """

    def __init__(self, options):
        self.options = options
        self.body = str(options.argument).encode()
        self.expected = str(fib(options.argument)).encode()
        self.next_id = 0
        self.warming_up = True

    def on_channel(self, channel):
        self.channel = channel
        channel.add_on_close_callback(lambda channel, reason: die("channel", repr(reason)))
        channel.queue_declare("", exclusive=True, auto_delete=True, callback=self.on_callback_queue)

    def on_callback_queue(self, declared):
        self.callback_queue = declared.method.queue
        self.channel.basic_consume(
            self.callback_queue, self.on_reply, auto_ack=True, callback=self.on_consuming
        )

    def on_consuming(self, _):
        self.start(self.options.warmup)
        self.watch()

    def watch(self):
        if time.perf_counter() - self.replied_s > REPLY_TIMEOUT_S:
            die("client", "no reply came in time")
        self.channel.connection.ioloop.call_later(1, self.watch)

    def start(self, count):
        self.left = count
        self.sent_s = {}  # when, by correlation id
        self.latencies_s = []
        self.ok = 0
        self.began_s = self.replied_s = time.perf_counter()
        if count == 0:
            self.end()
        for _ in range(min(count, self.options.concurrency)):
            self.send()

    def send(self):
        self.left -= 1
        correlation_id = str(self.next_id)
        self.next_id += 1
        self.sent_s[correlation_id] = time.perf_counter()
        self.channel.basic_publish(
            "",
            self.options.queue,
            self.body,
            pika.BasicProperties(
                content_type=CONTENT_TYPE,
                correlation_id=correlation_id,
                reply_to=self.callback_queue,
            ),
        )

    def on_reply(self, channel, method, properties, body):
        sent_s = self.sent_s.pop(properties.correlation_id, None)
        if sent_s is None:
            return  # nobody's, or a call's second
        self.replied_s = time.perf_counter()
        self.latencies_s.append(self.replied_s - sent_s)
        self.ok += body == self.expected
        if self.left > 0:
            self.send()
        elif not self.sent_s:
            self.end()

    def end(self):
        if self.warming_up:
            self.warming_up = False
            self.start(self.options.requests)
            return
        seconds = self.replied_s - self.began_s
        requests = self.options.requests
        latencies_s = sorted(self.latencies_s)
        report = {
            "requests": requests,
            "ok": self.ok,
            "wrong": requests - self.ok,
            "seconds": round(seconds, 6),
            "rate": round(requests / seconds, 1),
            "latency_ms": {
                f"p{p}": round(latencies_s[requests * p // 100] * 1e3, 4) for p in (50, 99)
            },
        }
        print(json.dumps(report, separators=(",", ":")), flush=True)
        os._exit(0 if self.ok == requests else 1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["server", "client"])
    parser.add_argument("--url", required=True)
    parser.add_argument("--queue", required=True)
    for name in ["workers", "prefetch", "requests", "warmup", "concurrency", "argument"]:
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    if options.role == "server":
        server(options)
    else:
        run(options.url, Client(options).on_channel)


main()
