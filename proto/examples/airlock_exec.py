#!/usr/bin/env python3
"""Runs a command in a sandbox: a whole client of airlock's RPC, in the standard library and `protobuf`.

    protoc -I proto --python_out=proto/examples proto/agent.proto      # once: makes agent_pb2.py beside this file
    proto/examples/airlock_exec.py [-i] [--cwd DIR] [--user USER] [--env NAME=VALUE] [--timeout SECONDS]
                                   SOCKET COMMAND [ARGUMENT...]

SOCKET is the sandbox's vsock.sock. Both streams go where they belong; the exit status is the command's own, 128 + n
after signal n, 124 after a time-out, 126 or 127 if it could not be started, and 125 if its end is not known: a lost
connection is never a success. proto/README.md explains the protocol.
"""
import argparse
import errno
import os
import selectors
import socket
import struct
import sys
import uuid

try:
    import agent_pb2 as pb
except ImportError as error:
    sys.exit(f"{error}; make agent_pb2.py first: protoc -I proto --python_out=proto/examples proto/agent.proto")

AGENT_PORT = 1024
MAX_TO_AGENT = 3 << 20  # longest frame the agent accepts
MAX_FROM_AGENT = 192 << 10  # longest frame it sends; refused before anything is allocated for it
MAX_DATA = 128 << 10  # most bytes in one Stdin
CONNECT_TIMEOUT_S = 15


class Lost(Exception):
    """How the command ended is not known."""


def connect(path):
    """A byte stream to the agent, through the socket by which the VMM offers the guest's vsock."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(CONNECT_TIMEOUT_S)
    sock.connect(path)
    sock.sendall(b"CONNECT %d\n" % AGENT_PORT)
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)  # one by one: what follows the line is the agent's
        if not byte or len(line) > 32:
            raise Lost(f"nothing in the guest listens ({line!r})")
        line += byte
    if not line.startswith(b"OK "):
        raise Lost(f"{line!r} came where OK was expected")
    return sock


class Connection:
    """Frames: a u32 length, little-endian, then one message."""

    def __init__(self, sock):
        sock.setblocking(False)
        self.sock = sock
        self.inbox = bytearray()
        self.outbox = bytearray()

    def queue(self, **body):
        data = pb.ToAgent(**body).SerializeToString()
        if len(data) > MAX_TO_AGENT:
            raise Lost("the command line and environment are too long")
        self.outbox += struct.pack("<I", len(data)) + data

    def send_some(self):
        try:
            del self.outbox[: self.sock.send(self.outbox)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise Lost(f"sending failed: {error}") from error

    def receive_some(self):
        """The messages that have arrived whole."""
        try:
            data = self.sock.recv(256 << 10)
        except BlockingIOError:
            return
        if not data:
            raise Lost("the connection was closed")
        self.inbox += data
        while len(self.inbox) >= 4:
            (length,) = struct.unpack_from("<I", self.inbox)
            if length > MAX_FROM_AGENT:
                raise Lost(f"a frame of {length} bytes came")
            if len(self.inbox) < 4 + length:
                return
            message = pb.FromAgent.FromString(bytes(self.inbox[4 : 4 + length]))
            del self.inbox[: 4 + length]
            yield message


class Exec:
    """One command from its start to ExecDone."""

    def __init__(self, connection, start):
        self.connection = connection
        self.offsets = [0, 0]  # the next byte of each stream
        self.exited = None
        self.stdin_open = start.stdin == pb.STDIN_STREAM
        self.stdin_sent = 0
        self.stdin_credit = 0
        # The request may follow the Hello at once; the replies come in the same order.
        connection.queue(hello=pb.Hello(protocol_min=1, protocol_max=1, client="airlock_exec.py"))
        connection.queue(exec_start=start)

    def run(self):
        """The exit status."""
        watched = selectors.DefaultSelector()
        watched.register(self.connection.sock, selectors.EVENT_READ)
        reading_stdin = False
        while True:
            # The agent's credit bounds what of our own stdin is read: nothing piles up here or there.
            wants_stdin = self.stdin_open and self.stdin_credit > self.stdin_sent and not self.connection.outbox
            if wants_stdin != reading_stdin:
                reading_stdin = self.watch_stdin(watched, wants_stdin)
            write = selectors.EVENT_WRITE if self.connection.outbox else 0
            watched.modify(self.connection.sock, selectors.EVENT_READ | write)
            for key, events in watched.select():
                if key.fd == 0:
                    self.send_stdin()
                    continue
                if events & selectors.EVENT_WRITE:
                    self.connection.send_some()
                if events & selectors.EVENT_READ:
                    for message in self.connection.receive_some():
                        status = self.handle(message)
                        if status is not None:
                            return status

    def watch_stdin(self, watched, wanted):
        if not wanted:
            watched.unregister(0)
            return False
        try:
            watched.register(0, selectors.EVENT_READ)
        except PermissionError:  # a plain file is always readable and cannot be watched
            self.send_stdin()
            return False
        return True

    def send_stdin(self):
        data = os.read(0, min(MAX_DATA, self.stdin_credit - self.stdin_sent))
        self.connection.queue(stdin=pb.Stdin(offset=self.stdin_sent, data=data, eof=not data))
        self.stdin_sent += len(data)
        self.stdin_open = bool(data)

    def handle(self, message):
        """Takes one message; the exit status if it was the last."""
        kind = message.WhichOneof("body")
        if kind == "hello":
            if message.hello.protocol != 1:
                raise Lost(f"the agent speaks protocol {message.hello.protocol}")
        elif kind == "started":
            self.stdin_credit = message.started.stdin_credit
        elif kind == "output":
            output = message.output
            if output.offset != self.offsets[output.stream]:
                raise Lost("output is missing or came twice")
            self.offsets[output.stream] += len(output.data)
            write_all(1 + output.stream, output.data)
        elif kind == "stdin_credit":
            self.stdin_credit = max(self.stdin_credit, message.stdin_credit.up_to)
            self.stdin_open = self.stdin_open and not message.stdin_credit.closed
        elif kind == "leader_exited":
            self.exited = message.leader_exited
        elif kind == "stream_end":
            if message.stream_end.cut_bytes:
                print(f"airlock_exec: {message.stream_end.cut_bytes} bytes were cut", file=sys.stderr)
        elif kind == "exec_done":
            return self.status()
        elif kind == "spawn_failed":
            print(f"airlock_exec: {message.spawn_failed.message}", file=sys.stderr)
            if message.spawn_failed.stage == pb.SPAWN_RESOURCES:
                return 125  # the guest has no room: no fault of the command's
            lookup = message.spawn_failed.stage in (pb.SPAWN_LOOKUP, pb.SPAWN_EXEC)
            return 127 if lookup and message.spawn_failed.errno == errno.ENOENT else 126
        elif kind == "error":
            raise Lost(message.error.message)
        # Anything else is of a newer agent, and may be passed over.
        return None

    def status(self):
        kind = self.exited and self.exited.WhichOneof("status")
        if not kind:
            raise Lost("the agent reported no status")
        if self.exited.cause == pb.CAUSE_TIMEOUT:
            return 124
        return self.exited.code & 0xFF if kind == "code" else min(128 + self.exited.signal, 255)


def write_all(fd, data):
    # Blocks while our reader is slow; the connection then fills up, and the agent stops reading from the command.
    while data:
        data = data[os.write(fd, data) :]


def arguments():
    parser = argparse.ArgumentParser(description="Runs a command in an airlock sandbox.")
    parser.add_argument("-i", "--stdin", action="store_true", help="give the command this program's stdin")
    parser.add_argument("--cwd", default="")
    parser.add_argument("--user", default="")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--timeout", type=float, default=0, metavar="SECONDS")
    parser.add_argument("socket", help="the sandbox's vsock.sock")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if not options.command or any("=" not in variable for variable in options.env):
        parser.error("a command is needed, and --env takes NAME=VALUE")
    return options


def main():
    options = arguments()
    variables = (variable.split("=", 1) for variable in options.env)
    start = pb.ExecStart(
        id=f"py-{uuid.uuid4().hex}",  # ours to choose: sending it again cannot run the command twice
        argv=[os.fsencode(argument) for argument in options.command],
        env=[pb.EnvVar(name=os.fsencode(name), value=os.fsencode(value)) for name, value in variables],
        cwd=os.fsencode(options.cwd),
        user=options.user,
        timeout_ms=round(options.timeout * 1000),
        stdin=pb.STDIN_STREAM if options.stdin else pb.STDIN_NONE,
    )
    try:
        return Exec(Connection(connect(options.socket)), start).run()
    except BrokenPipeError:
        return 128 + 13  # whoever read our output is gone; closing the connection ends the command
    except (Lost, OSError) as error:
        print(f"airlock_exec: the command's end is not known: {error}", file=sys.stderr)
        return 125


if __name__ == "__main__":
    sys.exit(main())
