"""What hostile input has found, each in the smallest form that shows it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress

import pytest

from hwbpd.core.errors import NotPermitted
from hwbpd.peers import Peer
from tests.fakes import Rig
from tests.fuzz.judge import Broken
from tests.fuzz.mouth import MESSAGE_BYTES_MAX
from tests.fuzz.visits import Visitor, framed
from tests.hardware.daemon import MARKS, Daemon
from tests.raw_zmtp import MORE

STRANGER = 60001
TID = 812
MIB = 2**20


def test_a_peer_that_is_somebody_else_at_hello_gets_no_session_and_may_hang_up() -> None:
    """Who has other ids than at connect, or has exited by then, is refused only after its session was entered."""

    def nobody(peer: Peer) -> bool:
        raise NotPermitted("your process connected as uid 0, gid 0 and is now uid 60001, gid 60001; connect again")

    # given a peer whose rights cannot be told
    rig = Rig()
    rig.rights.is_privileged = nobody  # type: ignore[method-assign]
    descriptors = len(os.listdir("/proc/self/fd"))
    client = rig.client(hello=False)

    # when it says hello and hangs up
    reply = rig.ask(client, "hello", version=1)
    client.cut()
    rig.turn()

    # then it was refused, and nothing of it is kept
    assert reply["errno"] == "EPERM"
    assert len(rig.sessions) == 0
    assert len(os.listdir("/proc/self/fd")) == descriptors + 1, "the fake process of the client"
    rig.stop()


def test_who_says_hello_again_behind_a_flood_has_the_replies_to_what_it_asked_before() -> None:
    """Every request has its one reply; that the old session is over is no reason to drop those that wait for room."""
    # given a client with a watch, whose side takes no more messages
    rig = Rig()
    rig.machine.start_task(TID)
    client = rig.client(room=1)
    claim = int(rig.ask(client, "claim", address=0x404040, length=8, access="w", tid=TID, guard=0)["claim"])
    rig.machine.hit(rig.arbiter.books.claims[claim].resource_ids[0], 5)
    rig.clock.wind(1)
    rig.turn()
    assert [message["op"] for message in client.inbox] == ["hits"]

    # when it asks something, and then begins anew
    asked = client.ask("counts", claim=claim)
    again = client.ask("hello", version=1)
    rig.turn()

    # then it gets both answers once it reads
    replies = []
    for _ in range(4):
        replies += [message["id"] for message in client.read() if "n" not in message]
        rig.turn()
    assert replies == [asked, again]
    rig.stop()


def as_stranger(act: Callable[[], None]) -> None:
    """Act as an unprivileged user, in a child process; raises ``Broken`` when that fails."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setresgid(STRANGER, STRANGER, STRANGER)
            os.setresuid(STRANGER, STRANGER, STRANGER)
            act()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if status:
        raise Broken(f"the stranger ended with status {status}")


@pytest.mark.hardware
@pytest.mark.skipif(MARKS[1].args[0] or MARKS[2].args[0], reason="root makes the strangers, on x86-64")
class TestStrangers:
    """Any local user may connect; none may bring the daemon down. Nothing here takes a slot."""

    def test_connections_beyond_the_descriptors_of_the_daemon_leave_it_alive(self) -> None:
        """libzmq ends the process when accept() says EMFILE, so it must never come to that."""
        daemon = Daemon()
        daemon.command = ["sh", "-c", 'ulimit -n 4096; exec "$@"', "sh", *daemon.command]

        def crowd() -> None:
            held = []
            with suppress(OSError):
                for _ in range(6000):
                    held.append(socket.socket(socket.AF_UNIX))
                    held[-1].connect(str(daemon.socket))

        with daemon, daemon.connect() as honest:
            as_stranger(crowd)

            assert honest.slots().resources == ()

    def test_a_message_that_never_ends_does_not_fill_the_memory(self) -> None:
        """The bound on a message is one on its frames: of frames that announce one more, any number is kept."""
        sent_mib, kept_mib = 1024, 128

        def endless() -> None:
            with Visitor(str(daemon.socket)) as visitor, suppress(EOFError):
                visitor.shake_hands()
                for _ in range(sent_mib * MIB // MESSAGE_BYTES_MAX):
                    visitor.pour(framed(bytes(MESSAGE_BYTES_MAX), MORE))

        daemon = Daemon(f"[limits]\nmemory_bytes = {kept_mib * MIB}")
        with daemon, daemon.connect() as honest:
            as_stranger(endless)
            assert honest.slots().resources == ()

            assert peak_mib(daemon.pid) < sent_mib / 2


def peak_mib(pid: int) -> float:
    """The most memory that a process has had resident."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024
