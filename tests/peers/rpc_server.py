"""A server in the manner of the tutorial, with pika: one request at a time, reply, then ack.

Usage: rpc_server.py URL QUEUE [DECLARATION] [BEHAVIOUR]

DECLARATION: plain (the tutorial's), durable, quorum, limited, or none (it must exist).
BEHAVIOUR: fib, or empty (how some ports answer when they fail).
"""

import sys

import pika

DECLARATIONS = {
    "plain": {},
    "durable": {"durable": True},
    "quorum": {"durable": True, "arguments": {"x-queue-type": "quorum"}},
    "limited": {"arguments": {"x-max-length": 1000}},
}


def fib(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


def main(url, queue, declaration="plain", behaviour="fib"):
    channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
    if declaration != "none":
        channel.queue_declare(queue=queue, **DECLARATIONS[declaration])

    def on_request(channel, method, properties, body):
        print(f" [.] fib({int(body)})", flush=True)
        answer = str(fib(int(body))) if behaviour == "fib" else ""
        channel.basic_publish(
            exchange="",
            routing_key=properties.reply_to,
            properties=pika.BasicProperties(correlation_id=properties.correlation_id),
            body=answer,
        )
        channel.basic_ack(delivery_tag=method.delivery_tag)

    channel.basic_qos(prefetch_count=1)
    channel.basic_consume(queue=queue, on_message_callback=on_request)
    print(" [x] Awaiting RPC requests", flush=True)
    channel.start_consuming()


main(*sys.argv[1:])
