"""
Hostile connections: what can be done to a daemon below the level of messages.

Each visit is one way to misbehave on a connection of its own, and ends with what docs/protocol.md says of it: the
connection is dropped, or the message is refused with a reason, or nothing at all. Wherever something must come of it,
the visit waits for that; being hung up on is an answer that a visitor has to expect at any time (``EOFError``).
"""

from __future__ import annotations

import os
import random
import signal
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

import msgpack

from tests.fuzz.judge import Broken, Judge
from tests.fuzz.mouth import MESSAGE_BYTES_MAX, Mouth
from tests.fuzz.said import Said
from tests.raw_zmtp import COMMAND, DEALER_V2, MORE, SIGNATURE, TIMEOUT_S, RawPeer

LONG = 2
CROWD = 40  # connections that are left open half-way
STORM = 100  # connections of one storm
UNREAD = 700  # requests of one who does not read: more than wait for it on the way
NOBODY_UID = 60009


class Visitor(RawPeer):
    """A raw peer that waits while the daemon's queue of new connections is full, and can send long frames."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.socket.settimeout(TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def say(self, data: bytes) -> None:
        """Send one message of one frame, or as much of it as is taken; raises ``EOFError`` when nobody listens."""
        self.pour(framed(data))

    def say_all(self, messages: list[bytes]) -> None:
        """Send many at once."""
        self.pour(b"".join(map(framed, messages)))

    def pour(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise EOFError("the other side has hung up") from None

    def hear(self) -> Any:
        return msgpack.unpackb(self.receive_frame(), strict_map_key=False)

    def await_end(self) -> None:
        """Read until the other side hangs up; raises ``TimeoutError`` when it does not."""
        with suppress(EOFError):
            while True:
                self._receive(1)


def framed(data: bytes, flags: int = 0) -> bytes:
    return bytes([flags | LONG]) + len(data).to_bytes(8, "big") + data


class Visits:
    """All of them, drawn at random. ``messages``, ``replies`` and ``dropped`` (connections) are counted."""

    def __init__(self, rng: random.Random, path: str, mouth: Mouth, uid: int) -> None:
        self._rng = rng
        self._path = path
        self._mouth = mouth
        self._crowd: deque[Visitor] = deque()
        self.messages = self.replies = self.dropped = 0
        self._ways: list[Callable[[], None]] = [
            self.garbage,
            self.half_a_handshake,
            self.half_a_frame,
            self.too_long,
            self.old_version,
            self.forged_properties,
            self.several_frames,
            self.frames_without_end,
            self.chosen_name,
            self.commands,
            self.storm,
            self.no_hello,
            self.never_reads,
            self.dies_in_the_middle,
            self.comes_back,
        ]
        if uid == 0:
            self._ways.append(self.becomes_somebody_else)

    def one(self) -> None:
        """Make one visit."""
        try:
            self._rng.choice(self._ways)()
        except EOFError:
            self.dropped += 1

    def close(self) -> None:
        while self._crowd:
            self._crowd.popleft().socket.close()

    # --- before there is a connection --------------------------------------------------------------------------------

    def garbage(self) -> None:
        with Visitor(self._path) as visitor:
            visitor.pour(self._rng.choice([b"", SIGNATURE, b"\xff", b"GET / "]) + self._rng.randbytes(100))

    def half_a_handshake(self) -> None:
        visitor = self._leave_open(Visitor(self._path))
        visitor.pour((SIGNATURE + b"\x03\0NULL" + bytes(48))[: self._rng.randint(0, 64)])

    def old_version(self) -> None:
        with Visitor(self._path) as visitor:
            revision = self._rng.choice([bytes([0, DEALER_V2]), bytes([1, DEALER_V2]), b""])
            visitor.pour((SIGNATURE + revision + bytes([0, 0])) if revision else b"\x01\0" + b"\x05\0abcd")
            visitor.await_end()
        self.dropped += 1

    def forged_properties(self) -> None:
        """Whatever one says of oneself, the kernel's word counts."""
        with Visitor(self._path) as visitor:
            forged = {"Peer_Address": b"localhost:0:0:1", "__fd": b"3", "User_Id": b"root", "Resource": b"\xff" * 30}
            names = self._rng.sample(list(forged), 2)
            visitor.shake_hands(**{name: forged[name] for name in names})
            self._opens_a_session(visitor)

    def chosen_name(self) -> None:
        names = [b"abc", b"\0abcd", b"\xff\xfe", b"\0", b"x" * 200, b"\0" + self._rng.randbytes(4)]
        with Visitor(self._path) as first, Visitor(self._path) as second:
            name = self._rng.choice(names)
            for visitor in (first, second):  # libzmq leaves the second of one name without a word
                visitor.shake_hands(Identity=name)
                visitor.say(self._mouth.speak().data)
                self.messages += 1

    def storm(self) -> None:
        for _ in range(STORM):
            with Visitor(self._path) as visitor:
                match self._rng.randrange(4):
                    case 0:
                        visitor.offer_hand()
                    case 1 if self._rng.random() < 0.2:
                        visitor.shake_hands()

    # --- frames ------------------------------------------------------------------------------------------------------

    def half_a_frame(self) -> None:
        visitor = self._leave_open(Visitor(self._path))
        visitor.shake_hands()
        frame = framed(self._mouth.speak().data)
        visitor.pour(frame[: self._rng.randrange(len(frame))])

    def too_long(self) -> None:
        with Visitor(self._path) as visitor:
            visitor.shake_hands()
            self._opens_a_session(visitor)
            self.messages += 1
            if self._rng.random() < 0.5:
                with suppress(EOFError):
                    visitor.say(bytes(MESSAGE_BYTES_MAX + 1))
            else:
                visitor.pour(bytes([LONG]) + self._rng.choice([2**63 - 1, 2**64 - 1, 2**32]).to_bytes(8, "big"))
            visitor.await_end()
        self.dropped += 1

    def several_frames(self) -> None:
        with Visitor(self._path) as visitor:
            visitor.shake_hands()
            count = self._rng.randint(2, 20)
            visitor.send(*(self._rng.randbytes(self._rng.randint(0, 100)) for _ in range(count)))
            self.messages += 1
            reply = visitor.hear()
            self.replies += 1
            wanted = {"op": "error", "id": 0, "errno": "EBADMSG", "sentence": f"a message is one frame, not {count}"}
            if {name: reply.get(name) for name in wanted} != wanted:
                raise Broken(f"{count} frames were answered with {reply!r:.300}")

    def frames_without_end(self) -> None:
        with Visitor(self._path) as visitor:
            visitor.shake_hands()
            for _ in range(16):
                visitor.pour(framed(self._rng.randbytes(MESSAGE_BYTES_MAX), MORE))

    def commands(self) -> None:
        bodies = [b"\x04PING\0\0ctx", b"\x04PING\xff\xff" + bytes(100), b"\x04PONG", b"\x05READY", b"\x05ERROR\x03no!"]
        bodies += [b"\x09SUBSCRIBEx", b"\x06CANCEL", b"\xff", b"", self._rng.randbytes(50)]
        with Visitor(self._path) as visitor:
            visitor.shake_hands()
            for _ in range(3):
                body = self._rng.choice(bodies)
                visitor.pour(bytes([COMMAND | self._rng.choice([0, MORE, 0x80]), len(body)]) + body)

    # --- sessions ----------------------------------------------------------------------------------------------------

    def no_hello(self) -> None:
        """Nothing is done for somebody without a session."""
        with self._visitor() as visitor:
            visitor.shake_hands()
            for _ in range(10):
                said = self._mouth.right()
                if said.op == "hello":
                    continue
                reply = self._asks(visitor, said)
                if (reply["op"], reply["errno"]) != ("error", "ESTALE"):
                    raise Broken(f"without hello {said.op} was answered with {reply!r:.300}")

    def never_reads(self) -> None:
        with self._visitor() as visitor:
            visitor.shake_hands()
            visitor.say(self._mouth.hello().data)
            self.messages += UNREAD
            for _ in range(UNREAD):
                visitor.say(self._mouth.marker(0).data)

    def dies_in_the_middle(self) -> None:
        """A process with claims is killed in the middle of a message."""
        said = [self._mouth.hello(), *(self._mouth.right() for _ in range(5))]
        self.messages += len(said)
        self._in_a_child(lambda: self._say_and_die(said))

    def _say_and_die(self, said: list[Said]) -> None:
        visitor = self._visitor()
        visitor.shake_hands()
        for one in said:
            visitor.say(one.data)
        visitor.pour(framed(bytes(1000))[:500])
        os.kill(os.getpid(), signal.SIGKILL)

    def becomes_somebody_else(self) -> None:
        """A process connects, changes its user and says hello: it may be neither of the two."""
        self.messages += 1
        self._in_a_child(self._change_and_hello)

    def _change_and_hello(self) -> None:
        visitor = self._visitor()
        visitor.shake_hands()
        os.setresuid(NOBODY_UID, NOBODY_UID, NOBODY_UID)
        visitor.say(self._mouth.hello().data)
        reply = visitor.hear()
        os._exit(0 if (reply["op"], reply.get("errno")) == ("error", "EPERM") else 1)

    def comes_back(self) -> None:
        """A session that lost its connection has lost all, and can begin anew."""
        for _ in range(2):
            with self._visitor() as visitor:
                visitor.shake_hands()
                stale = self._asks(visitor, self._mouth.marker(0))
                if stale["errno"] != "ESTALE":
                    raise Broken(f"a session outlived its connection: {stale!r:.300}")
                self._opens_a_session(visitor)
                visitor.say(self._mouth.right().data)
                self.messages += 1

    # --- what they share ---------------------------------------------------------------------------------------------

    def _visitor(self) -> Visitor:
        """Somebody who speaks as docs/protocol.md says, by whichever way in."""
        return Visitor(self._path)

    def _leave_open(self, visitor: Visitor) -> Visitor:
        if len(self._crowd) == CROWD:
            self._crowd.popleft().socket.close()
        self._crowd.append(visitor)
        return visitor

    def _opens_a_session(self, visitor: Visitor) -> None:
        reply = self._asks(visitor, self._mouth.hello())
        if reply["op"] != "welcome":
            raise Broken(f"hello was answered with {reply!r:.300}")

    def _asks(self, visitor: Visitor, said: Said) -> Any:
        visitor.say(said.data)
        self.messages += 1
        judge = Judge()
        judge.said(said)
        reply = visitor.hear()
        judge.hear(reply)
        self.replies += 1
        return reply

    @staticmethod
    def _in_a_child(act: Callable[[], None]) -> None:
        """Let a child process act; raises ``Broken`` when it exits with a status other than 0."""
        child = os.fork()
        if child == 0:
            try:
                act()
            finally:
                os._exit(2)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 1:
            raise Broken("a peer that changed its user after it had connected was not refused with EPERM")
