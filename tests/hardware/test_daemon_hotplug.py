"""
A CPU goes and comes back under the daemon's claims. It disturbs the host and runs only if asked for: ``make hotplug``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

import hwbp
from examples.target import Target
from tests.hardware.daemon import Daemon, all_free, books_free, kernel_free
from tests.hardware.test_hotplug import SWITCH, offline
from tests.judges.opener import KernelOpener

pytestmark = [pytest.mark.hardware, pytest.mark.hotplug]

WAIT_S = 10.0


@pytest.fixture
def cpu(alone: None) -> int:
    cpu = max(all_free())
    if cpu == 0 or not (SWITCH / f"cpu{cpu}" / "online").exists():
        pytest.skip("no CPU of this host can be taken offline")
    return cpu


@pytest.fixture
def client(cpu: int) -> Iterator[hwbp.Client]:
    with Daemon() as daemon, daemon.connect() as client:
        yield client


def told(watch: hwbp.Watch, client: hwbp.Client, what: str, cpu: int) -> bool:
    """Wait until the owner is told of a change."""

    def seen() -> bool:
        client.slots()  # a round trip: what was told before it has come
        return any((change.what, change.cpu) == (what, cpu) for change in watch.changes())

    return await_true(seen)


def await_true(seen: Callable[[], bool]) -> bool:
    give_up = time.monotonic() + WAIT_S
    while not seen():
        assert time.monotonic() < give_up
    return True


def test_slots_on_a_cpu_that_goes_are_freed_and_taken_again_when_it_is_back(client: hwbp.Client, cpu: int) -> None:
    # given a claim on every CPU
    with Target() as target, client.claim(f"mem:{target.variable:#x}/8:w", cpus=None) as watch:
        # when a CPU goes
        with offline(cpu):
            # then the owner is told, the books know of no slot there, and the claim goes on elsewhere
            assert told(watch, client, "offline", cpu)
            assert books_free(client) == kernel_free() == dict.fromkeys(all_free(), 3)
            target.command("write 10")

        # and when it is back, so is the slot
        assert told(watch, client, "resumed", cpu)
        assert books_free(client) == kernel_free() == dict.fromkeys(all_free(), 3)
        target.command("write 10")
        assert watch.release().hits == 20
    assert kernel_free() == all_free()


def test_a_slot_that_somebody_took_meanwhile_suspends_the_claim_there(client: hwbp.Client, cpu: int) -> None:
    # given a claim on every CPU, and a CPU that goes
    opener = KernelOpener()
    with client.claim("mem:0x1000/8:w", cpus=None) as watch, Target() as target:
        with offline(cpu):
            assert told(watch, client, "offline", cpu)
            # when a thread takes all slots of that CPU for itself while it is away
            held = [opener.open(target.tid, cpu) for _ in range(4)]

        # then the owner is told that there is no room, and what the books say is true
        assert told(watch, client, "suspended", cpu)
        assert watch.ended is None
        for event in held:
            opener.close(event)
        assert books_free(client)[cpu] == kernel_free()[cpu] == 4
    assert kernel_free() == all_free()
