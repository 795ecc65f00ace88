"""
For tracers: slots that the tracer takes itself, by ptrace, and that the daemon keeps the books of.

A debugger that writes DRn (``PTRACE_POKEUSER`` on x86, ``NT_ARM_HW_WATCH`` on Arm) takes a slot of its thread without
asking anybody, and learns only then whether there was one. With a claim it has asked before, so the daemon has kept the
place, and whoever wants it is told by whom it is held:

    import hwbp

    def poke() -> None:  # raises OSError as ptrace(2) fails; first the address, then the bits that arm it
        ptrace.pokeuser(tid, offset_of_dr(0), 0x404040)
        ptrace.pokeuser(tid, offset_of_dr(7), dr7)

    with hwbp.connect() as client:
        with client.tracer_claim(tid, "mem:0x404040/8:w", wait=5.0) as slot:
            slot.take(poke)
            ...  # the thread runs and stops; its debugger sees the traps, the daemon does not
            ptrace.pokeuser(tid, offset_of_dr(7), 0)

The steps of ``take``: until it is called the daemon holds the slot with an event of its own that is not armed, the
placeholder. ``taking`` has it give that up; the books keep the place. The tracer pokes, and says how it went:
``taken``, or ``take_failed`` with the errno. Between the two anybody outside the daemon may be quicker; then the
debuggee is unharmed, the claim is over, and the daemon looks who it was (``Slot.stolen_by``).

What a tracer has once taken stays with the thread until it exits or runs another program, whatever is written to DR7:
so says Linux. After the release it is listed as residue, and the next tracer of that thread has it for the asking.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from hwbp.connection import Connection
from hwbp.errors import HwbpError
from hwbp.values import Change, Counts, Ended
from hwbp.watch import Watch, deadline_after


class Slot:
    """
    A granted claim of a tracer; made by ``Client.tracer_claim``. As a context manager it releases the claim at the end.

    ``watch`` is the claim as any other is: its id, its pieces (what goes into each address register), its end, and what
    happens to it. As long as there is a placeholder it can be asked to give way, and be suspended.
    """

    def __init__(self, connection: Connection, watch: Watch, placeholder: bool) -> None:
        self.watch = watch
        self.is_taken = False
        self._connection = connection
        self._has_placeholder = placeholder
        self._stolen_by: Change | None = None

    @property
    def claim_id(self) -> int:
        return self.watch.claim_id

    def take(self, poke: Callable[[], None]) -> None:
        """
        Let the daemon give up its placeholder, call ``poke``, and say how that went.

        Where ``poke`` fails with ``OSError`` the claim is over and the error is raised on; with ENOSPC somebody else
        had the slot first. After any other exception nobody knows whether the slot was taken. Then it is said to be:
        the daemon must not count less than the kernel does.

        :param poke: writes the debug registers of the thread.
        :raises BadClaim: when the claim is suspended, or taken already; nothing was poked.
        :raises HwbpError: when the daemon could not be asked, or could not be told: the claim is over.
        """
        claim = self.watch.claim_id
        if self._has_placeholder:
            self._connection.request("taking", claim=claim)
        try:
            poke()
        except OSError as refused:
            self._tell_failure(refused)
            raise
        except BaseException:
            with suppress(HwbpError):  # what went wrong in the tracer is what counts
                self._tell_taken()
            raise
        self._tell_taken()

    def _tell_taken(self) -> None:
        self._connection.request("taken", claim=self.watch.claim_id)
        self.is_taken = True

    def _tell_failure(self, refused: OSError) -> None:
        claim, number = self.watch.claim_id, refused.errno or errno.EIO
        self._connection.look_into(claim, number == errno.ENOSPC)
        try:
            self._connection.request("take_failed", claim=claim, errno=number)
        except HwbpError:  # it is over already, with its thread or with the session
            self._connection.look_into(claim, False)
            return
        sentence = f"its tracer could not take the slot: {refused}"
        self._connection.end_claim(claim, Ended("take failed", sentence), Counts(0, 0, 0, 0))

    def stolen_by(self, timeout: float | None = None) -> Change | None:
        """
        Return what was found out about who took the slot first, after ``take`` has failed with ENOSPC.

        :param timeout: seconds to wait for it; the daemon looks at most once a second. None waits for ever.
        :return: its ``sentence`` and ``holders``; None when nothing was told in time, or there is nothing to be told.
        """
        deadline_ns = deadline_after(timeout)
        while self._connection.is_looked_into(self.claim_id):
            if not self._connection.wait(deadline_ns):
                break
        told = [change for change in self.watch.changes() if change.what == "foreign"]
        self._stolen_by = told[-1] if told else self._stolen_by
        return self._stolen_by

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        if self.watch.ended is None:
            self.watch.__exit__(*details)
