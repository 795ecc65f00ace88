"""What of the Arm judges runs anywhere: their archives, their tallies, and that they notice."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from msgspec import structs

from hwbpd.core.model import Pool
from hwbpd_arm.linux import EXECUTE, Request
from hwbpd_linux.registers import from_resource_info
from tests.judges.arm64 import __main__ as command
from tests.judges.arm64 import debian, qemu
from tests.judges.arm64.armhf import DATA, Judge, Orders
from tests.judges.arm64.cases import Case, Model
from tests.judges.arm64.cpio import Archive
from tests.judges.arm64.instructions import INSTRUCTIONS
from tests.judges.arm64.verdict import Verdict, generator

CORTEX_A15 = from_resource_info(0x0508_0405)


# --- archives --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio reads the archive again: apt-get install cpio")
def test_an_archive_is_what_cpio_unpacks(tmp_path: Path) -> None:
    # given a tree with a program, a link, a folder that is left out, and files of every remainder of four bytes
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "left out").mkdir()
    (tree / "left out" / "file").touch()
    (tree / "bin" / "run").write_bytes(b"#!/bin/sh\n")
    (tree / "bin" / "run").chmod(0o755)
    (tree / "bin" / "also").symlink_to("run")
    for length in range(4):
        (tree / f"file{length}").write_bytes(b"x" * length)

    # when it is packed, and unpacked by somebody else
    packed = io.BytesIO()
    archive = Archive(packed)
    archive.add_tree(tree, "at", lambda path: path.name != "left out")
    archive.add_file("deep/down/here", b"yes")
    archive.close()
    into = tmp_path / "unpacked"
    into.mkdir()
    unpack = ["cpio", "--extract", "--make-directories", "--no-preserve-owner", "--quiet"]
    subprocess.run(unpack, input=packed.getvalue(), cwd=into, check=True)

    # then it is all there
    assert sorted(str(path.relative_to(into)) for path in into.rglob("*")) == [
        *("at", "at/bin", "at/bin/also", "at/bin/run", "at/file0", "at/file1", "at/file2", "at/file3"),
        *("deep", "deep/down", "deep/down/here"),
    ]
    assert (into / "at/bin/run").stat().st_mode & 0o777 == 0o755
    assert (into / "at/bin/also").readlink() == Path("run")
    assert [(into / f"at/file{length}").read_bytes() for length in range(4)] == [b"", b"x", b"xx", b"xxx"]


def test_what_follows_an_archive_starts_where_the_kernel_looks_for_it() -> None:
    packed = io.BytesIO()
    archive = Archive(packed)
    archive.add_file("one", b"1")
    archive.close()

    assert len(packed.getvalue()) % 512 == 0


def test_the_guest_gets_every_package_that_hwbpd_and_its_tests_import() -> None:
    packages = [name.split(">")[0] for name in debian.python_packages()]

    assert {"pyzmq", "msgspec", "pluggy", "pytest", "hypothesis"} <= set(packages)
    assert not {"mypy", "ruff"} & set(packages)


def test_without_qemu_the_package_that_has_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    for board in (qemu.ARM64, qemu.ARMHF):
        assert "apt-get install qemu-system-arm" in (qemu.missing(board) or "")
    assert command.main(["--cases", "1"]) == 2


# --- tallies ---------------------------------------------------------------------------------------------------------


def test_every_judges_last_line_counts_and_no_other() -> None:
    tally = command.Tally()

    for line in (
        "operations=100 admitted=60 refused=10 policy=2 differences=0",
        "judge=traced cases=20 differences=1 breakpoint:5 nothing:15",
        "100 of 300 operations",
        "difference 1 of traced, case 3 (nothing):",
        "3 failed, 40 passed, 2 skipped in 71.00s (0:01:11)",
        "5 passed, 2 deselected, 2 errors in 3.20s",
        "1 error in 0.20s",
        "guest: status 1",
    ):
        tally.hear(line)

    assert (tally.cases, tally.differences) == (100 + 20 + 43 + 7 + 1, 1 + 3 + 2 + 1)
    assert tally.status == "1"


def test_a_judge_that_does_not_get_done_is_no_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # given a guest in which one judge agrees, and another ends without a verdict
    lines = ["judge=traced cases=20 differences=0", "no verdict: somebody else uses breakpoints", "guest: status 1"]
    monkeypatch.setattr(command, "provided", lambda *_: None)
    monkeypatch.setattr(command, "arm64", lambda *_: command.judged(iter(lines)))

    assert command.main(["--cases", "20"]) == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("no verdict: a judge did not get done")


def test_all_cases_are_given_to_some_judge() -> None:
    told = command.script(1000, 7, tests=False)

    words = told.split()
    asked = [int(words[words.index(word) + 1]) for word in ("--accesses", "--regsets", "--operations")]
    assert sum(asked) == 1000
    assert min(asked) > 0
    assert "pytest" not in told
    assert "-m hotplug" in command.script(1000, 7, tests=True)


# --- they notice -----------------------------------------------------------------------------------------------------


def case(name: str, address: int, *requests: Request) -> Case:
    index = next(index for index, one in enumerate(INSTRUCTIONS) if one.name == name)
    return Case(index, 0x40_0000, address, requests)


def test_a_wide_store_that_touches_two_watchpoints_may_be_either_ones_hit() -> None:
    model = Model(6, 4, version=8)
    both = case("stp x", 0x1000, Request(2, 0x1000, 4), Request(2, 0x1008, 4))

    predicted = model.predict(both, both.requests)

    assert predicted.met == {0, 1}
    whose = {model.attributed(predicted, both.requests, at) for at in predicted.may_report}
    assert whose == {frozenset({0}), frozenset({1})}


def test_a_breakpoint_on_the_instruction_and_behind_it_are_told_apart() -> None:
    model = Model(6, 4, version=8)
    stopped = case("ldr8", 0x1000, Request(EXECUTE, 0x40_0000, 4), Request(EXECUTE, 0x40_0004, 4))

    predicted = model.predict(stopped, stopped.requests)

    assert (predicted.fetched, predicted.behind, predicted.met) == (frozenset({0}), frozenset({1}), frozenset())


def test_more_than_there_are_is_refused_for_want_of_room() -> None:
    model, watch = Model(6, 4, version=8), Request(2, 0x1000, 4)

    assert [model.errno(watch, [watch] * held) for held in (3, 4)] == [0, 28]
    assert model.errno(Request(EXECUTE, 0x1000, 4), [watch] * 4) == 0


def test_a_case_that_differs_is_told_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = Verdict("accesses")

    agrees = [verdict.decide("kind", "expected", seen, lambda: "the case") for seen in ("expected", "something else")]

    assert agrees == [True, False]
    assert verdict.told() == "judge=accesses cases=2 differences=1 kind:2"
    assert "the case" in capsys.readouterr().out


ANSWERS: dict[str, dict[str, object]] = {
    "where it stops": {"pc": 4},
    "the register named": {"number": -3},
    "before or after": {"done": True},
    "what is refused": {"refused": [0, 22]},
    "no exception": {"code": 1},
}


@pytest.mark.parametrize("wrong", [None, *ANSWERS])
def test_a_false_answer_of_the_32_bit_kernel_is_noticed(wrong: str | None) -> None:
    # given a watchpoint for writes on the word that STR is about to store to
    verdicts = {"ran": Verdict("ran")}
    judge = Judge(CORTEX_A15, verdicts)
    at_str = 5 * 12
    order = ["run", at_str, 64, [[-1, ["data", 64]], [-2, 1 | 2 << 3 | 0xF << 5]]]
    true = {"refused": [0, 0], "code": 4, "pc": at_str, "done": False, "number": -1, "address": [64, 12345]}

    # when the kernel tells the truth, or something else
    judge.judge(order, true if wrong is None else {**true, **ANSWERS[wrong]})

    # then the judge can tell
    assert verdicts["ran"].differences == (wrong is not None)


def test_a_slot_too_many_of_the_32_bit_kernel_is_noticed() -> None:
    verdicts = {"opened": Verdict("opened")}
    judge = Judge(CORTEX_A15, verdicts)
    order = ["open", [[3, ["data", 0], 4, "task"]] * 5]

    judge.judge(order, [0, 0, 0, 0, 28])
    judge.judge(order, [0, 0, 0, 0, 0])

    assert (verdicts["opened"].cases, verdicts["opened"].differences) == (2, 1)


def test_the_same_seed_asks_the_same() -> None:
    def drawn(seed: int) -> list[object]:
        orders = Orders(generator(seed, "armhf"))
        return [orders.opened(), orders.numbered(), orders.ran()]

    assert drawn(7) == drawn(7) != drawn(8)


def test_orders_never_reach_beyond_the_data_of_the_child() -> None:
    orders = Orders(random.Random(7))

    for _ in range(200):
        _, _, x, writes = orders.ran()
        assert 64 <= x < 80
        assert all(value[1] >= 0 for _, value in writes[::2] if value[0] == "data")
    assert DATA % 4096 == 0


def test_a_kernel_with_other_counts_is_another_model() -> None:
    few = structs.replace(CORTEX_A15, slots={Pool.INST: 1, Pool.DATA: 1}, breakpoints=2, watchpoints=1)
    verdicts = {"opened": Verdict("opened")}

    Judge(few, verdicts).judge(["open", [[3, ["data", 0], 4, "task"]] * 2], [0, 28])

    assert verdicts["opened"].differences == 0
