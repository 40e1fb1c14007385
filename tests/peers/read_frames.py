"""Reads frames from stdin with pika, and prints a line for each: the channel, and the method with all its arguments in
alphabetical order, the properties that are set with the body's size, or the body. What is text or bytes is in hexadecimal
digits, and a table is NAME:TYPEVALUE,...
"""

import sys

from pika import frame


def shown(value):
    if isinstance(value, dict):
        return ",".join(sorted(f"{name.encode().hex()}:{typed(field)}" for name, field in value.items()))
    if isinstance(value, (str, bytes)):
        return (value.encode() if isinstance(value, str) else value).hex()
    return str(int(value))


def typed(field):
    if not isinstance(field, str):
        raise TypeError(f"not a long string: {field!r}")
    return "S" + shown(field)


def arguments(of):
    return "".join(f" {name}={shown(value)}" for name, value in sorted(vars(of).items()) if value is not None)


def line(read):
    if isinstance(read, frame.Method):
        return f"{read.channel_number} {read.method.NAME}{arguments(read.method)}"
    if isinstance(read, frame.Header):
        return f"{read.channel_number} properties{arguments(read.properties)} of {read.body_size}"
    if isinstance(read, frame.Body):
        return f"{read.channel_number} body {read.fragment.hex()}"
    raise TypeError(f"unexpected: {read!r}")


content = sys.stdin.buffer.read()
at = 0
while at < len(content):
    # Nothing of ours is longer than this.
    consumed, read = frame.decode_frame(content[at : at + (1 << 18)])
    if read is None:
        sys.exit("the last frame is not whole")
    at += consumed
    print(line(read))
