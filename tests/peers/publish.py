"""Publishes a message, with pika: a body, and no properties unless a correlation id is given. It waits for nothing.

Usage: publish.py URL QUEUE BODY [CORRELATION_ID]
"""

import sys

import pika


def main(url, queue, body, correlation_id=None):
    connection = pika.BlockingConnection(pika.URLParameters(url))
    properties = pika.BasicProperties(correlation_id=correlation_id)
    connection.channel().basic_publish(exchange="", routing_key=queue, properties=properties, body=body)
    connection.close()


main(*sys.argv[1:])
