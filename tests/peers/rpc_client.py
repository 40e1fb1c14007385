"""A client in the manner of the tutorial, with pika: a callback queue of its own, one call after
the other; prints each answer's body.

Usage: rpc_client.py URL QUEUE CORRELATION_ID N...

CORRELATION_ID: the text to send along, or uuid for a new one with each call.
"""

import sys
import uuid

import pika


def main(url, queue, correlation_id, *numbers):
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    callback = channel.queue_declare(queue="", exclusive=True).method.queue
    answers = {}

    def on_response(channel, method, properties, body):
        answers[properties.correlation_id] = body

    channel.basic_consume(queue=callback, on_message_callback=on_response, auto_ack=True)
    for n in numbers:
        mine = str(uuid.uuid4()) if correlation_id == "uuid" else correlation_id
        channel.basic_publish(
            exchange="",
            routing_key=queue,
            properties=pika.BasicProperties(reply_to=callback, correlation_id=mine),
            body=n,
        )
        while mine not in answers:
            connection.process_data_events(time_limit=1)
        print(answers.pop(mine).decode(), flush=True)
    connection.close()


main(*sys.argv[1:])
