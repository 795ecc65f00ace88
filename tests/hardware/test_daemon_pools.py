"""
A CPU with a pool for breakpoints and one for watchpoints, through the daemon: each fills up by itself.

How many there are is what the kernel gives when nobody has any, so the tests fit every arm64 machine.
"""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import pytest

import hwbp
from examples.target import Target
from hwbpd.core.model import Pool
from tests.hardware.common import X86
from tests.hardware.daemon import MARKS, WAIT_S, Daemon, own_name
from tests.judges.opener import KernelOpener
from tests.judges.users import wait_until

pytestmark = [*MARKS, pytest.mark.skipif(X86, reason="x86 has one pool for both: run this on an arm64 machine")]

EVENTS = {Pool.INST: "mem:{function:#x}/4:x:u", Pool.DATA: "mem:{variable:#x}/8:w:u"}


@pytest.fixture(scope="module")
def daemon(host: None) -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture
def client(alone: None, daemon: Daemon) -> Iterator[hwbp.Client]:
    with daemon.connect() as client:
        yield client


def kernel_free(tid: int) -> Mapping[Pool, int]:
    """How many the kernel has left for a thread, by asking it until it refuses."""
    opener, free = KernelOpener(), {}
    for pool in EVENTS:
        with ExitStack() as held:
            free[pool] = 0
            try:
                while True:
                    held.callback(opener.close, opener.open(tid, -1, pool))
                    free[pool] += 1
            except OSError as refusal:
                if refusal.errno != errno.ENOSPC:
                    raise
    return free


def event(pool: Pool, target: Target, number: int = 0) -> str:
    """Another one for each number: equal ones would share a slot."""
    return EVENTS[pool].format(function=target.function + 4 * number, variable=target.variable + 8 * number)


@pytest.mark.parametrize(("full", "other"), [(Pool.INST, Pool.DATA), (Pool.DATA, Pool.INST)])
def test_a_full_pool_is_named_and_the_other_still_has_room(
    client: hwbp.Client, target: Target, full: Pool, other: Pool
) -> None:
    # given a thread that has every slot of a pool
    slots = kernel_free(target.tid)
    for number in range(slots[full]):
        client.claim(event(full, target, number), tid=target.tid)

    # when one more is asked for
    with pytest.raises(hwbp.NoFreeSlot) as refused:
        client.claim(event(full, target, slots[full]), tid=target.tid)

    # then the pool and its holder are named, and the kernel says the same of both
    assert f"{slots[full]} of {slots[full]} held ({own_name()}" in str(refused.value)
    assert f" {full}" in str(refused.value)
    assert kernel_free(target.tid) == {full: 0, other: slots[other]}
    client.claim(event(other, target), tid=target.tid)
    assert kernel_free(target.tid) == {full: 0, other: slots[other] - 1}


def test_books_and_kernel_count_both_pools_alike(client: hwbp.Client, target: Target) -> None:
    slots = kernel_free(target.tid)
    for number in range(2):
        client.claim(event(Pool.INST, target, number), tid=target.tid)
    client.claim(event(Pool.DATA, target), tid=target.tid)

    told = client.slots()

    assert told.pools == {str(pool): count for pool, count in slots.items()}
    assert all(row.busiest_task == {"inst": 2, "data": 1} for row in told.cpus if row.online)


def test_somebody_outside_is_counted_in_the_pool_he_is_in(client: hwbp.Client, target: Target) -> None:
    # given somebody outside who has every breakpoint of a thread, and no watchpoint
    opener = KernelOpener()
    with ExitStack() as outside:
        for _ in range(kernel_free(target.tid)[Pool.INST]):
            outside.callback(opener.close, opener.open(target.tid, -1, Pool.INST))

        # when a breakpoint and a watchpoint are asked for
        with pytest.raises(hwbp.NoFreeSlot) as refused:
            client.claim(event(Pool.INST, target), tid=target.tid)
        granted = client.claim(event(Pool.DATA, target), tid=target.tid)

    # then only the breakpoint is refused, and those outside are told of
    assert any(holder.evidence != "books" for holder in refused.value.holders)
    granted.release()


def test_one_program_is_watched_and_stopped_at_by_one_command(daemon: Daemon, alone: None, target: Target) -> None:
    words = [sys.executable, "-m", "hwbpctl", "--socket", str(daemon.socket), "--json", "watch"]
    events = [word for pool in EVENTS for word in ("-e", event(pool, target))]
    command = [*words, *events, "-t", str(target.tid), "-c", "7"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch, ExitStack() as at_last:
        at_last.callback(watch.kill)
        with daemon.connect() as client:
            wait_until(lambda: len(client.slots().resources) == len(EVENTS), "both are watched")
        target.command("write 3")
        target.command("call 4")
        output, _ = watch.communicate(timeout=WAIT_S)

    hits = [line for line in map(json.loads, output.splitlines()) if line["type"] == "hit"]
    at = [int(hit["address"], 16) for hit in hits]
    assert (at.count(target.variable), at.count(target.function)) == (3, 4)
