"""A server of any bodies, with pika: one request at a time, reply, then ack.

Usage: bytes_server.py URL QUEUE BEHAVIOUR

BEHAVIOUR: echo (body, content type and headers come back as they are), upper (the body in upper
case), or empty.
"""

import sys

import pika


def main(url, queue, behaviour):
    channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
    channel.queue_declare(queue=queue)

    def on_request(channel, method, properties, body):
        reply = pika.BasicProperties(correlation_id=properties.correlation_id)
        if behaviour == "echo":
            reply.content_type = properties.content_type
            reply.headers = {**(properties.headers or {}), "length": len(body), "whole": True}
        answer = {"echo": body, "upper": body.upper(), "empty": b""}[behaviour]
        channel.basic_publish(exchange="", routing_key=properties.reply_to, properties=reply, body=answer)
        channel.basic_ack(delivery_tag=method.delivery_tag)

    channel.basic_qos(prefetch_count=1)
    channel.basic_consume(queue=queue, on_message_callback=on_request)
    print(" [x] Awaiting RPC requests", flush=True)
    channel.start_consuming()


main(*sys.argv[1:])
