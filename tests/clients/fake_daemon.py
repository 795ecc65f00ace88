"""
A daemon that says what a test tells it to, written from docs/protocol.md; it holds no slots and keeps no books.

It runs in a thread, so that the client under test can block. What it answers to a request is the list of messages that
``answers`` gives for the request's ``op``: a reply gets the request's id, a notice gets its number.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import zmq

Message = dict[str, Any]
Answer = Callable[[Message], list[Message]]

EPOCH = 0xFEED
NOTICES = frozenset(
    {"hits", "lost", "guarded", "resumed", "suspended", "closing", "decision", "news", "revoke", "spared", "contended"}
)


def message(op: str, **fields: Any) -> Message:
    return {"op": op} | fields


def notice(op: str, **fields: Any) -> Message:
    """A notice that has the name of a reply."""
    return message(op, n=0, **fields)


def error(errno_name: str, sentence: str = "no", **fields: Any) -> Message:
    return message("error", errno=errno_name, sentence=sentence, **fields)


def always(*messages: Message) -> Answer:
    """Answer every request of that name with these messages."""
    return lambda _request: list(messages)


def record(
    ip: int = 0x401136, *, tid: int = 813, time_ns: int = 1, mode: int = 2, cpu: int = 1, chain: list[int] | None = None
) -> bytes:
    """One hit record, of process 812, for a slot that holds 0x404040."""
    tail = b"" if chain is None else struct.pack(f"={len(chain) + 1}Q", len(chain), *chain)
    return struct.pack("=IHHQIIQQII", 9, mode, 48 + len(tail), ip, 812, tid, time_ns, 0x404040, cpu, 0) + tail


def hits(claim: int, *records: bytes, lost: int = 0, dropped: int = 0) -> Message:
    return message("hits", claim=claim, count=len(records), records=b"".join(records), lost=lost, dropped=dropped)


def totals(hits: int = 0, delivered: int = 0, lost: int = 0, dropped: int = 0, filtered: int = 0) -> Message:
    counts = {"hits": hits, "delivered": delivered, "lost": lost, "dropped": dropped}
    return counts | ({"filtered": filtered} if filtered else {})


def gone(claim: int, reason: str = "exit", **counts: int) -> Message:
    """The notice that a claim is over."""
    sentence = "tid 813 exited" if reason == "exit" else "root released it"
    return message("lost", claim=claim, reason=reason, sentence=sentence, **totals(**counts))


def offline(claim: int, cpu: int) -> Message:
    """The notice that a claim has lost its slot on one CPU, and goes on."""
    sentence = f"cpu {cpu} went offline"
    return message("lost", claim=claim, reason="offline", sentence=sentence, cpu=cpu, **totals())


def guarded(claim: int) -> Message:
    """The notice that a claim is silenced."""
    return message("guarded", claim=claim, sentence="silenced: more than 10000 hits a second")


def decision(what: str = "granted", claim: int = 1, **fields: Any) -> Message:
    """The notice of a decision about gdb[812]."""
    owner = {"session": 1, "pid": 812, "comm": "gdb", "uid": 0}
    return message("decision", what=what, at_ns=1_000_000_000, claim=claim, **owner | fields)


def final(op: str = "released", claim: int = 1, **counts: int) -> Message:
    return message(op, claim=claim, **totals(**counts))


GDB = {"pid": 812, "comm": "gdb", "uid": 0, "kind": "ptrace", "slots": 1, "place": "on tid 813"} | {
    "claim_ids": [4], "evidence": "books",
}  # fmt: skip


def queued(claim: int = 1, position: int = 2) -> Message:
    """The reply to a claim that waits behind gdb[812]."""
    sentence = "no slot on tid 813: 4 of 4 held"
    return message("queued", claim=claim, position=position, errno="ENOSPC", sentence=sentence, holders=[GDB])


def room(claim: int = 1) -> Message:
    """The notice that a claim which waited is granted."""
    piece = {"address": 0x404040, "length": 8, "access": "w", "pool": "any"}
    return notice("granted", claim=claim, pieces=[piece], ring_bytes=4096, kind="perf", guard=10_000)


def revoke(claim: int = 1, deadline_ns: int = 7) -> Message:
    """The notice that a claim has to give way to gdb[812]."""
    return message("revoke", claim=claim, by=GDB, sentence="has to give way to claim 4", deadline_ns=deadline_ns)


def suspended(claim: int = 1) -> Message:
    return message("suspended", claim=claim, sentence="it has given way")


def resumed(claim: int = 1) -> Message:
    return message("resumed", claim=claim, sentence="it has its slots again")


WAITING_ROW = {"claim": 9, "pid": 97, "comm": "perf", "uid": 1000, "kind": "perf", "label": "", "priority": 0} | {
    "state": "waiting", "position": 1, "age_ns": 1_500_000_000, "deadline_ns": 0, "address": 0x404048, "length": 8,
    "access": "w", "target": "tid 813", "blockers": [1],
}  # fmt: skip
CLAIM_ROW = {"claim": 1, "pid": 812, "comm": "gdb", "uid": 0, "kind": "ptrace", "label": "", "state": "armed"} | {
    "age_ns": 65_000_000_000, "hits": 3, "lost": 0, "dropped": 0,
}  # fmt: skip
RESOURCE_ROW = {"resource": 1, "address": 0x404040, "length": 8, "access": "w", "pool": "any", "user": True} | {
    "kernel": True, "delivery": "hits", "tid": 813, "cpus": None, "claims": [CLAIM_ROW],
}  # fmt: skip
CAPABILITIES = {"machine": "fake", "backend": "x86", "architecture": "x86_64", "pools": {"any": 4}} | {
    "cpus_possible": [0, 1], "cpus_online": [0, 1], "limits": {"claims_max": 64},
    "registers": {
        "lengths": {"w": [1, 2, 4, 8], "rw": [1, 2, 4, 8], "x": [8]},
        "default_lengths": {"w": 4, "rw": 4, "x": 8},
        "reports": {"w": "after", "rw": "after", "x": "before"},
        "notes": ["reads alone cannot be watched"],
    },
}  # fmt: skip


class FakeDaemon:
    """
    Listens while it is open as a context manager. ``requests`` are those it got, hello and goodbye included.

    :param offers_seqpacket: besides ZeroMQ.
    """

    def __init__(self, path: Path, offers_seqpacket: bool = False) -> None:
        self.path = path
        self.offers_seqpacket = offers_seqpacket
        self.paths = [path, path.with_name(path.name + ".seq")][: 1 + offers_seqpacket]
        self.epoch = EPOCH
        self.machine = "fake"
        self.requests: list[Message] = []
        self._claims = 0
        self._notices = 0
        self._answer_to: Callable[[list[bytes]], object] = lambda _: None  # the way to whoever spoke last
        self.answers: dict[str, Answer] = {
            "hello": self._welcome,
            "claim": self._grant,
            "release": lambda request: [final(claim=request["claim"])],
            "counts": lambda request: [final("counts", claim=request["claim"])],
            "slots": always(message("slots", pools={"any": 4}, cpus=[], resources=[], more=False)),
            "rearm": lambda request: [message("rearmed", claim=request["claim"])],
            "fit": self._fit,
            "plan": self._plan,
            "foreign": always(message("foreign", holders=[])),
            "capabilities": always(message("capabilities", **CAPABILITIES)),
            "why": self._why,
            "follow": always(message("following")),
            "yield": lambda request: [message("yielded", claim=request["claim"])],
            "taking": lambda request: [message("take", claim=request["claim"])],
            "taken": lambda request: [message("taken", claim=request["claim"])],
            "take_failed": lambda request: [message("take_failed", claim=request["claim"])],
            "goodbye": always(message("bye")),
        }

    def _welcome(self, _request: Message) -> list[Message]:
        return [message("welcome", version=1, epoch=self.epoch, session=1, machine=self.machine, backend="x86")]

    def _grant(self, request: Message) -> list[Message]:
        self._claims += 1
        piece = {name: request[name] for name in ("address", "length", "access")} | {"pool": "any"}
        kind, guard = request.get("kind", "perf"), request.get("guard", 10_000)
        return [message("granted", claim=self._claims, pieces=[piece], ring_bytes=4096, kind=kind, guard=guard)]

    @staticmethod
    def _why(request: Message) -> list[Message]:
        if "errno" in request:
            return [message("why", claim=0, state="", lines=["tid 813: 4 of 4 slots are held", "claim 9 waits"])]
        return [message("why", claim=request["claim"], state="armed", lines=["asked", "armed"])]

    @staticmethod
    def _fit(request: Message) -> list[Message]:
        piece = {name: request[name] for name in ("address", "length", "access")} | {"pool": "any"}
        return [message("fit", fits=True, pieces=[piece])]

    @staticmethod
    def _plan(request: Message) -> list[Message]:
        halves = [
            {"address": request["address"] + offset, "length": request["length"] // 2}
            | {"access": request["access"], "pool": "any"}
            for offset in (0, request["length"] // 2)
        ]
        return [message("plan", pieces=halves, slots={"any": 2}, pools={"any": 4})]

    def asked(self, op: str) -> list[Message]:
        """The requests of that name, oldest first."""
        return [request for request in self.requests if request["op"] == op]

    def push(self, *messages: Mapping[str, Any]) -> None:
        """Send messages, unasked, to whoever spoke last."""
        self._control.send(msgpack.packb(messages))

    def push_bytes(self, *frames: bytes) -> None:
        """Send frames that may be no message at all."""
        self._control.send(msgpack.packb({"frames": frames}))

    def __enter__(self) -> FakeDaemon:
        self._context = zmq.Context()
        self._control = self._context.socket(zmq.PAIR)
        self._control.bind("inproc://control")
        listening = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(listening,))
        self._thread.start()
        listening.wait()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening and drop every connection; the socket file stays, as after a crash."""
        self._control.send(msgpack.packb("stop"))
        self._thread.join()
        self._control.close()
        self._context.term()

    def _serve(self, listening: threading.Event) -> None:
        with contextlib.ExitStack() as stack:
            router = stack.enter_context(self._context.socket(zmq.ROUTER))
            control = stack.enter_context(self._context.socket(zmq.PAIR))
            router.linger = 1000
            for path in self.paths:
                path.unlink(missing_ok=True)
            router.bind(f"ipc://{self.path}")
            control.connect("inproc://control")
            poller = zmq.Poller()
            poller.register(router, zmq.POLLIN)
            poller.register(control, zmq.POLLIN)
            lines: dict[int, socket.socket] = {}
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            if self.offers_seqpacket:
                listener.bind(str(self.paths[1]))
                listener.listen()
                poller.register(listener.fileno(), zmq.POLLIN)
            listening.set()
            while True:
                readable = dict(poller.poll())
                if router in readable:
                    routing_id, frame = router.recv_multipart()
                    self._answer_to = partial(_send_frames, router, routing_id)
                    self._answer(frame)
                if listener.fileno() in readable:
                    line = stack.enter_context(listener.accept()[0])
                    lines[line.fileno()] = line
                    poller.register(line.fileno(), zmq.POLLIN)
                for fd in lines.keys() & readable.keys():
                    packet = b""
                    with contextlib.suppress(ConnectionResetError):  # a client that did not read all
                        packet = lines[fd].recv(65537)
                    if packet:
                        self._answer_to = partial(_send_packets, lines[fd])
                        self._answer(packet)
                    else:
                        poller.unregister(fd)
                        lines.pop(fd).close()
                if control in readable:
                    order = msgpack.unpackb(control.recv())
                    if order == "stop":
                        return
                    self._obey(order)

    def _answer(self, frame: bytes) -> None:
        request = msgpack.unpackb(frame)
        self.requests.append(request)
        if request["op"] == "hello":
            self._notices = 0
        for answer in self.answers[request["op"]](request):
            self._send(answer, request["id"])

    def _obey(self, order: Any) -> None:
        if isinstance(order, dict):
            self._answer_to(order["frames"])
            return
        for notice in order:
            self._send(notice, 0)

    def _send(self, answer: Message, request_id: int) -> None:
        if answer["op"] in NOTICES or "n" in answer:
            self._notices += 1
            answer = answer | {"n": self._notices}
        else:
            answer = {"id": request_id} | answer
        self._answer_to([msgpack.packb(answer)])


def _send_frames(router: zmq.Socket[bytes], routing_id: bytes, frames: list[bytes]) -> None:
    router.send_multipart([routing_id, *frames])


def _send_packets(line: socket.socket, packets: list[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that has had enough
        for packet in packets:
            line.send(packet)
