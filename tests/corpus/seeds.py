"""Makes the first inputs for the fuzzer, from which it makes others (scripts/fuzz): what RabbitMQ says to pika, frames
that pika writes, and hostile ones.

    scripts/broker with-broker target/peers/bin/python tests/corpus/seeds.py

An input for `frames` and `socket` is eight octets that say where the stream is cut, and the stream (`pieces` in
src/bytes/assembled.rs). One for `message` is the length of the properties in two octets, those, and the body.
"""

import datetime
import decimal
import os
import pathlib
import socket
import struct
import threading

import pika
from pika import frame, spec

CORPUS = pathlib.Path(__file__).parent
END = b"\xce"
METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
CUTS = {"octets": bytes(8), "odd": b"\x06\x01\x80\x00\x0c\x33\xff\x03"}


def save(target, name, content):
    (CORPUS / target / name).write_bytes(content)


def stream(name, content, cuts="odd"):
    for target in ("frames", "socket"):
        save(target, name, CUTS[cuts] + content)


def message(name, head, body=b""):
    save("message", name, struct.pack(">H", len(head)) + head + body)


def framed(kind, channel, payload, length=None):
    length = len(payload) if length is None else length
    return struct.pack(">BHI", kind, channel, length) + payload + END


def deliver(channel=1, tag=1):
    return frame.Method(channel, spec.Basic.Deliver("fibrpc", tag, False, "", "rpc_queue")).marshal()


def header(size, properties=None, channel=1):
    return frame.Header(channel, size, properties or spec.BasicProperties()).marshal()


def body(content, channel=1):
    return framed(BODY, channel, content)


def head(properties):
    """The part of a content header that holds the properties: behind class, weight and the body's size."""
    return header(0, properties)[7 + 12 : -1]


def nested(depth, kind=b"F"):
    table = b""
    for _ in range(depth):
        name = b"\x01k" if kind == b"F" else b""
        table = name + kind + struct.pack(">I", len(table)) + table
    if kind == b"A":
        table = b"\x01k" + table
    return struct.pack(">I", len(table)) + table


class Relay:
    """Stands between a client and the broker, and keeps what the broker says."""

    def __init__(self, host, port):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.broker = (host, port)
        self.said = b""
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        client, _ = self.listener.accept()
        broker = socket.create_connection(self.broker)
        threading.Thread(target=self.forward, args=(client, broker), daemon=True).start()
        while content := broker.recv(65536):
            self.said += content
            client.sendall(content)
        client.close()

    def forward(self, client, broker):
        while content := client.recv(65536):
            broker.sendall(content)

    def since(self, before):
        return self.said[before:]


def capture():
    """What RabbitMQ says in the life of a connection."""
    parameters = pika.URLParameters(os.environ["FIBRPC_TEST_URL"])
    relay = Relay(parameters.host, parameters.port)
    parameters.host, parameters.port = relay.listener.getsockname()
    connection = pika.BlockingConnection(parameters)
    stream("rabbitmq-handshake", relay.said)
    before = len(relay.said)
    channel = connection.channel()
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.basic_qos(prefetch_count=1)
    got = []
    tag = channel.basic_consume(queue, lambda *delivery: got.append(delivery))
    for content in (b"30", b"", b"x" * 9000):
        channel.basic_publish("", queue, content, everything())
    while len(got) < 3:
        connection.process_data_events(time_limit=1)
        for delivery in got:
            if channel.is_open and delivery[1].delivery_tag:
                channel.basic_ack(delivery[1].delivery_tag)
                delivery[1].delivery_tag = 0
    channel.basic_cancel(tag)
    channel.close()
    stream("rabbitmq-deliveries", relay.since(before))
    before = len(relay.said)
    channel = connection.channel()
    channel.confirm_delivery()
    try:
        channel.basic_publish("", "fibrpc.nobody", b"anybody?", mandatory=True)
    except pika.exceptions.UnroutableError:
        pass
    channel.basic_publish("amq.fanout", "", b"taken")
    try:
        channel.queue_declare("fibrpc.nobody", passive=True)
    except pika.exceptions.ChannelClosedByBroker:
        pass
    connection.close()
    stream("rabbitmq-return-confirm-404", relay.since(before))


def everything():
    """Every property, and every type of a field that pika writes."""
    time = datetime.datetime(2026, 1, 2, 3, 4, 5)
    return spec.BasicProperties(
        content_type="application/json",
        content_encoding="gzip",
        headers={
            "text": "ünï✓",
            "bytes": b"\xff\x00",
            "true": True,
            "int": -1,
            "long": 1 << 40,
            "decimal": decimal.Decimal("1.25"),
            "time": time,
            "none": None,
            "table": {"in": {"in": 1}},
            "array": [1, "two", [3]],
        },
        delivery_mode=2,
        priority=3,
        correlation_id="c" * 32,
        reply_to="amq.gen-callback",
        expiration="30000",
        message_id="m-1",
        timestamp=1767323045,
        type="t",
        user_id="guest",
        app_id="a",
    )


def hostile_streams():
    whole = deliver() + header(4) + body(b"body")
    stream("delivery", whole, "octets")
    stream("two-channels-mingle", deliver(1) + deliver(2, 7) + header(3, channel=2) + header(3) + body(b"two", 2) + body(b"one"))
    stream("body-in-two-frames", deliver() + header(8) + body(b"body") + body(b"more"))
    stream("body-shorter-than-told", deliver() + header(9) + body(b"body") + whole)
    stream("body-longer-than-told", deliver() + header(3) + body(b"body"))
    stream("body-of-no-bytes", deliver() + header(4) + body(b"") + body(b"body"), "octets")
    stream("body-without-header", deliver() + body(b"body"))
    stream("header-twice", deliver() + header(4) + header(4))
    stream("deliver-twice", deliver() + deliver())
    stream("content-without-method", header(4) + body(b"body"))
    stream("end-missing", whole[:-1] + b"\x00" + whole)
    stream("end-of-a-method-missing", deliver()[:-1] + b"\x00" + header(0))
    stream("claims-64-bits", deliver() + header((1 << 64) - 1) + body(b"x" * 300), "octets")
    three = b"".join(deliver(n) + header(128 << 20, channel=n) for n in (1, 2, 3))
    stream("three-claim-the-most", three + body(b"x" * 100, 2))
    many = b"".join(deliver(n) + header((64 << 10) - 1, channel=n) for n in range(1, 200))
    stream("many-claim-a-little", many)
    stream("large-body", deliver() + header(66000) + body(b"x" * 60000) + body(b"y" * 6000) + whole)
    stream("large-body-cut", deliver() + header(100000) + body(b"x" * 9000) + framed(BODY, 1, b"y" * 100, 91000)[:-1])
    stream("close-amid-a-message", deliver() + header(4) + frame.Method(1, spec.Channel.Close(404, "NOT_FOUND - no queue", 50, 10)).marshal() + whole)
    stream("close-ok-amid-a-frame", deliver() + header(70000) + framed(BODY, 1, b"x" * 8, 69000)[:-1])
    for kind in (METHOD, HEADER, BODY, HEARTBEAT):
        stream(f"empty-{kind}", whole + framed(kind, 1, b"") + whole)
        stream(f"of-64-mib-{kind}", framed(kind, 1, b"\x00" * 40, 64 << 20))
    stream("unknown-kind", whole + framed(5, 0, b"what"))
    stream("http", b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
    stream("another-version", b"AMQP\x00\x01\x00\x00")
    for name, tune in (("zeros", (0, 0, 0)), ("most", (65535, 64 << 20, 60)), ("least", (1, 1, 1))):
        stream(f"tune-{name}", frame.Method(0, spec.Connection.Tune(*tune)).marshal())
    stream("close", frame.Method(0, spec.Connection.Close(320, "CONNECTION_FORCED - bye", 0, 0)).marshal())
    too_large = "PRECONDITION_FAILED - message size 20 is larger than configured max size 16"
    stream("too-large", frame.Method(1, spec.Channel.Close(406, too_large, 60, 40)).marshal())
    stream("blocked", frame.Method(0, spec.Connection.Blocked("low on memory")).marshal() + frame.Method(0, spec.Connection.Unblocked()).marshal())
    stream("text-is-none", framed(METHOD, 1, b"\0\x14\0\x28\x01\x94\x04\xff\xfe\x80\xc0\0\x3c\0\x14"))
    events = [spec.Channel.OpenOk(), spec.Queue.DeclareOk("q", 7, 2), spec.Basic.QosOk(), spec.Confirm.SelectOk(), spec.Basic.ConsumeOk("t"), spec.Basic.CancelOk("t"), spec.Basic.Cancel("t"), spec.Basic.Ack(9, True), spec.Basic.Nack(8, False), spec.Channel.CloseOk(), spec.Basic.GetEmpty()]
    stream("events", b"".join(frame.Method(n + 1, event).marshal() for n, event in enumerate(events)))
    properties = struct.pack(">H", 1 << 13) + nested(300)
    stream("nested", deliver() + framed(HEADER, 1, struct.pack(">HHQ", 60, 0, 0) + properties))
    start = struct.pack(">HHBB", 10, 10, 0, 9) + nested(300) + struct.pack(">I", 5) + b"PLAIN" + struct.pack(">I", 5) + b"en_US"
    stream("nested-in-the-handshake", framed(METHOD, 0, start))


def hostile_messages():
    message("everything", head(everything()), b"30")
    message("nothing", b"")
    message("no-properties", bytes(2), b"body")
    ours = spec.BasicProperties("text/plain", headers={"x-user": "ada"}, correlation_id="7", reply_to="q", expiration="5000")
    message("ours", head(ours), b"hello")
    for kind in ("internal", "no-such-user", "Not A Kind", ""):
        message(f"error-{kind.replace(' ', '-')}", head(spec.BasicProperties(headers={"x-error-kind": kind})), b"why")
    message("error-is-no-text", head(spec.BasicProperties(headers={"x-error-kind": [1]})), b"\xff\xfe")
    message("error-is-long", head(spec.BasicProperties(headers={"x-error-kind": "internal"})), "ü".encode() * 33000)
    for expiration in ("0", "-1", "soon", "18446744073709551615", "99999999999999999999"):
        message(f"expires-{expiration}", head(spec.BasicProperties(expiration=expiration, reply_to="q")))
    message("only-a-message-id", head(spec.BasicProperties(message_id="m", reply_to="q")))
    message("reserved", head(spec.BasicProperties(headers={"CC": ["a"], "BCC": "b", "": "no name"})))
    texts = b"\xff" * 255
    no_text = struct.pack(">H", 0b1000_0110 << 8) + (bytes([255]) + texts) * 3
    message("no-text", no_text, texts)
    table = b"".join(bytes([1, 255]) + b"S" + struct.pack(">I", 2) + b"\xff\xc0" for _ in range(9))
    message("fields-are-no-text", struct.pack(">HI", 1 << 13, len(table)) + table)
    numbers = b"\x01ad\x00\x00\x00\x00\x00\x00\x00\x01\x01bd\x7f\xef\xff\xff\xff\xff\xff\xff\x01cD\xff\x7f\xff\xff\xff\x01df\x7f\xc0\x00\x00\x01ed\xff\xf0\x00\x00\x00\x00\x00\x00"
    message("odd-numbers", struct.pack(">HI", 1 << 13, len(numbers)) + numbers)
    tiny = b"\x00t\x01" * 2000
    message("many-tiny-fields", struct.pack(">HI", 1 << 13, len(tiny)) + tiny)
    long_numbers = b"\x00d\x00\x00\x00\x00\x00\x00\x00\x01" * 600
    message("many-long-numbers", struct.pack(">HI", 1 << 13, len(long_numbers)) + long_numbers)
    for depth in (3, 2000):
        message(f"nested-{depth}", struct.pack(">H", 1 << 13 | 1 << 9) + nested(depth) + b"\x01q")
    message("nested-arrays", struct.pack(">H", 1 << 13 | 1 << 9) + nested(900, b"A") + b"\x01q")
    message("table-longer-than-told", struct.pack(">HI", 1 << 13 | 1 << 9, 3) + b"\x01kt\x01" + b"\x01q")
    message("table-claims-4-gib", struct.pack(">HI", 1 << 13 | 1 << 9, 0xFFFFFFFF) + b"\x01kt\x01")
    message("text-claims-4-gib", struct.pack(">HI", 1 << 13, 8) + b"\x01kS\xff\xff\xff\xff\x00")
    message("unknown-type", struct.pack(">HI", 1 << 13 | 1 << 9, 4) + b"\x01kz\x01" + b"\x01q")
    message("all-flags-no-values", b"\xff\xff")


for target in ("frames", "socket", "message"):
    (CORPUS / target).mkdir(exist_ok=True)
capture()
hostile_streams()
hostile_messages()
