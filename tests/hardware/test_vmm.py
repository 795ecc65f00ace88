"""A VMM on /dev/kvm with the real daemon: two owners contend for its vCPU's slots, and none of the host's is taken."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from subprocess import run

import pytest

import hwbp
from examples.vmm import PLACES, SLOTS, Vmm, contend
from hwbp.kvm import Kvm, what_is_missing
from tests.hardware.daemon import MARKS, WAIT_S, Daemon

pytestmark = [
    *MARKS,
    pytest.mark.skipif(what_is_missing() is not None, reason=what_is_missing() or ""),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="the guest is x86-64 code"),
]


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


def test_a_stub_and_a_fuzzer_contend_for_the_slots_of_a_real_vcpu(daemon: Daemon) -> None:
    # given a VMM whose guest executes six places, and a fuzzer that has breakpoints on four of them
    with hwbp.connect(daemon.socket) as client, Kvm() as kvm, Vmm(client, kvm) as vmm:
        # when a stub comes that wants two more, and goes
        laps = contend(lambda name: hwbp.connect(daemon.socket, name=name), vmm)

        # then the guest stopped at what each of them had, and each had its own hits: two of the fuzzer's gave way and
        # came back
        assert laps == [("the fuzzer alone", 4, 0), ("the stub has two", 2, 2), ("the stub is gone", 4, 0)]

        # and nothing is left, in the vCPU or of the host
        vmm.settle(())
        assert vmm.lap() == []
        assert client.slots().resources == ()


def test_a_vcpu_ends_with_its_thread(daemon: Daemon) -> None:
    # given a vCPU of a thread, and a claim on it
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    with hwbp.connect(daemon.socket) as client:
        vcpu = client.vm().vcpu(0, thread.native_id)
        watch = client.claim("mem:0x1000/8:x", vcpu=vcpu.vcpu_id)

        # when the thread ends, then so do both
        stop.set()
        thread.join()
        while watch.ended is None:
            assert client.wait(WAIT_S)
        assert watch.ended.reason == "exit"
        assert client.vms()[0].vcpus == ()


def test_operators_see_the_vcpu_with_its_counts(daemon: Daemon) -> None:
    # given a VMM that has run, with a claim on its vCPU
    with hwbp.connect(daemon.socket) as client, Kvm() as kvm, Vmm(client, kvm) as vmm:
        client.claim(hwbp.Event(PLACES[0], None, "x"), vcpu=vmm.vcpu.vcpu_id, kind="perf", label="guest")
        vmm.settle(PLACES[:1])
        assert vmm.lap() == [PLACES[0]]
        first = client.vms()[0].vcpus[0].entries
        while (entries := client.vms()[0].vcpus[0].entries) == first:  # it is told once a second
            vmm.lap()

        # when an operator looks
        words = [sys.executable, "-m", "hwbpctl", "--socket", str(daemon.socket), "--json", "kvm", "ls"]
        listing = run(words, capture_output=True, text=True, check=True, timeout=60)

        # then it is there, with its thread, its slots, and what its VMM has counted
        ((row,),) = [vm["vcpus"] for vm in json.loads(listing.stdout)]
        assert (row["tid"], row["held"], row["pools"]) == (os.getpid(), {"any": 1}, {"any": SLOTS})
        assert row["loaded"]
        assert row["entries"] == entries > 3
        assert row["owner"] == "vmm"
