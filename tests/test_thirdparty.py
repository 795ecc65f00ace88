"""A backend that is not hwbpd's, on an architecture that hwbpd does not know, is found and served like any other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hwbp
from hwbpd.core.errors import NotSupported
from hwbpd.core.model import Access, Mode, Pool, Span
from hwbpd.debug_unit import Armed, MemoryAccess
from hwbpd.hookspecs import CpuFacts
from hwbpd.plugins import Plugins
from hwbpd_sim.workload import COUNTER
from tests import thirdparty
from tests.hardware.daemon import WAIT_S, Daemon
from tests.registers.writing import picture
from tests.test_tidy import PLUGIN_CONTRACT, imports, is_within, python_files

ROOT = Path(__file__).resolve().parent.parent
LITTLE, BIG = CpuFacts("pdq"), CpuFacts("pdq", watchpoints=3)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    """What is found while the example is installed."""
    with thirdparty.installed():
        return Plugins()


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """A daemon on two CPUs of one sort and one of another, of an architecture that it does not bring."""
    with thirdparty.installed() as path, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
        daemon = Daemon("[sim]\naccesses_per_s = 200\n")
        daemon.command += ["--machine", "sim", "--profile", "pdq1x2+pdq1-lite"]
        with daemon:
            yield daemon


def test_it_is_found_only_while_it_is_installed(plugins: Plugins) -> None:
    assert plugins.backend(BIG).slots() == {Pool.INST: 1, Pool.DATA: 3}
    with pytest.raises(NotSupported, match="no backend for pdq"):
        Plugins().backend(BIG)


def test_it_takes_from_the_daemon_what_the_contract_has_and_nothing_else() -> None:
    files = [path for path in python_files("tests") if path.parts[1] == "thirdparty" and len(path.parts) > 3]
    assert files
    taken = {module for path in files for _, module in imports(path) if not is_within(module, "hwbpd_pdq")}

    assert "hwbpd.hookspecs" in taken
    for module in taken - {"hwbpd.hookspecs"}:
        is_contract = any(is_within(module, part) for part in PLUGIN_CONTRACT)
        assert is_contract or module.split(".")[0] in sys.stdlib_module_names, module


def test_its_unlike_rules_hold(plugins: Plugins) -> None:
    # given a watchpoint on bytes in the middle of a line
    unit = plugins.backend(BIG).debug_unit()
    assert unit is not None
    (piece,) = plugins.backend(BIG).fit(Span(0x1003, 11), Access.WRITE, Mode()).pieces
    file = unit.reset()
    for write in unit.plan(file, {(Pool.DATA, 2): Armed(piece, kernel=False)}):
        file = unit.write(file, write.register, write.value)

    # then its mask has ones for those left out, and its registers are locked
    assert file["DMASK2"] == 0b1100_0000_0000_0111
    with pytest.raises(ValueError, match="DLINE2: locked"):
        unit.write(file, "DLINE2", 0x2000)

    # and the exception comes before the access, with its address, for user mode only
    trap = unit.check(file, [MemoryAccess(Access.WRITE, 0x1000, 4)])
    assert trap is not None
    assert (trap.before, trap.status) == (True, {"DSTAT": 0b1_0100, "DADDR": 0x1000})
    assert unit.check(file, [MemoryAccess(Access.WRITE, 0x1000, 4, kernel=True)]) is None
    assert unit.check(file, [MemoryAccess(Access.WRITE, 0x1000, 3)]) is None


def test_the_picture_of_its_control_register_is_the_one_its_table_draws(plugins: Plugins) -> None:
    control = sys.modules["hwbpd_pdq.control"]
    drawn = picture(control.FIELDS, reserved=control.FIXED_ONE)
    assert "".join(f"{line}\n" for line in drawn) in (control.__doc__ or "")


def test_a_span_takes_a_slot_for_each_line_and_a_refusal_names_what_would_do(plugins: Plugins) -> None:
    plan = plugins.backend(BIG).fit(Span(0x100A, 30), Access.READ, Mode())
    assert [(piece.span.address, piece.span.length_bytes) for piece in plan.pieces] == [
        (0x100A, 6),
        (0x1010, 16),
        (0x1020, 8),
    ]

    with pytest.raises(NotSupported, match=r"it takes 3 slots, and this CPU has 1: .*; nearest: mem:0x100a/6:r$"):
        plugins.backend(LITTLE).fit(Span(0x100A, 30), Access.READ, Mode())


def test_the_daemon_serves_it_with_what_each_cpu_has(daemon: Daemon) -> None:
    command = [sys.executable, "-m", "hwbpctl", "--socket", str(daemon.socket)]
    caps = subprocess.run([*command, "caps"], capture_output=True, text=True, timeout=WAIT_S, check=True, cwd=ROOT)

    assert "pdq" in caps.stdout
    assert daemon.logged("ready")["backend"] == "pdq"

    # a CPU of three watchpoints has three, one of one has one
    one, *others = (hwbp.parse_event(f"mem:{COUNTER + 8 * n:#x}/8:w:u") for n in range(4))
    with daemon.connect() as client:
        for cpu, watchpoints in ((0, 3), (2, 1)):
            held = [client.claim(event, cpus=[cpu], delivery="hold") for event in others[:watchpoints]]
            with pytest.raises(hwbp.NoFreeSlot):
                client.claim(one, cpus=[cpu], delivery="hold")
            for claim in held:
                claim.release()


def test_its_hits_come_to_whoever_watches(daemon: Daemon) -> None:
    with daemon.connect() as client:
        watched = client.claim(hwbp.parse_event(f"mem:{COUNTER:#x}/8:w:u"), pid=1000)
        called = client.claim(hwbp.parse_event("mem:0x401200/2:x:u"), pid=1000)

        seen: dict[int, set[int]] = {watched.claim_id: set(), called.claim_id: set()}
        for watch, hit in client.hits(timeout=WAIT_S):
            seen[watch.claim_id].add(hit.address)
            if all(seen.values()):
                break

    assert seen == {watched.claim_id: {COUNTER}, called.claim_id: {0x401200}}
