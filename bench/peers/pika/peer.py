"""The RPC with pika: a process for each worker, since one process is one thread. pika sets TCP_NODELAY by itself.
SelectConnection, without the blocking layer on top, is its faster form. See ../README.md for the arguments."""

import multiprocessing
import sys
import time

import pika


def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)


def run(url, opened):
    """Opens a connection and a channel, and runs its loop; `opened` gets the channel."""

    def fail(*arguments):
        sys.exit(f"pika: {arguments[-1]!r}")

    def connected(connection):
        connection.channel(on_open_callback=opened)

    pika.SelectConnection(
        pika.URLParameters(url), on_open_callback=connected, on_open_error_callback=fail, on_close_callback=fail
    ).ioloop.start()


def work(url, queue, ready):
    def answer(channel, method, properties, body):
        reply = pika.BasicProperties(correlation_id=properties.correlation_id, content_type="text/plain")
        channel.basic_publish("", properties.reply_to, str(fib(int(body))).encode(), reply)
        channel.basic_ack(method.delivery_tag)

    def opened(channel):
        channel.queue_declare(queue)
        channel.basic_qos(prefetch_count=1)
        channel.basic_consume(queue, answer, callback=lambda _: ready.release())

    run(url, opened)


def server(url, queue, workers):
    ready = multiprocessing.Semaphore(0)
    for _ in range(workers):
        multiprocessing.Process(target=work, args=(url, queue, ready), daemon=True).start()
    for _ in range(workers):
        ready.acquire()
    print("ready", flush=True)
    for process in multiprocessing.active_children():
        process.join()


class Client:
    def __init__(self, queue, requests, in_flight):
        self.queue, self.requests, self.in_flight = queue, requests, in_flight
        self.total, self.warm = requests // 10 + 1, False
        self.open, self.sent, self.answered, self.begin = set(), 0, 0, 0.0

    def opened(self, channel):
        self.channel = channel
        channel.queue_declare("", exclusive=True, auto_delete=True, callback=self.declared)

    def declared(self, frame):
        self.callback_queue = frame.method.queue
        self.channel.basic_consume(self.callback_queue, self.take, auto_ack=True, callback=lambda _: self.fill())

    def fill(self):
        while self.sent < self.total and self.sent - self.answered < self.in_flight:
            correlation_id = str(self.sent)
            self.open.add(correlation_id)
            properties = pika.BasicProperties(
                reply_to=self.callback_queue, correlation_id=correlation_id, content_type="text/plain"
            )
            self.channel.basic_publish("", self.queue, b"1", properties)
            self.sent += 1

    def take(self, _channel, _method, properties, body):
        if properties.correlation_id not in self.open or body != b"1":
            sys.exit("pika: a wrong answer")
        self.open.remove(properties.correlation_id)
        self.answered += 1
        if self.answered == self.total:
            if self.warm:
                print(f"{time.monotonic() - self.begin:.6f}")
                sys.exit(0)
            self.warm, self.total, self.sent, self.answered = True, self.requests, 0, 0
            self.begin = time.monotonic()
        self.fill()


if __name__ == "__main__":
    role, url, queue, *numbers = sys.argv[1:]
    if role == "server":
        server(url, queue, int(numbers[0]))
    else:
        run(url, Client(queue, int(numbers[0]), int(numbers[1])).opened)
