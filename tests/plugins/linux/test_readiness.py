"""Whatever a host refuses, the sentence says what is missing and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from hwbpd.core.errors import NotSupported
from hwbpd_linux import machine, perf_event, readiness


def refusing(number: int, unless: Callable[[bool], bool] = lambda read_lost: False) -> Callable[..., int]:
    """An open that fails, except for calls that ``unless`` lets pass: they get a descriptor of something else."""

    def open_breakpoint(*_: int, read_lost: bool = True, **__: int) -> int:
        if unless(read_lost):
            return os.open(os.devnull, os.O_RDONLY)
        raise OSError(number, os.strerror(number))

    return open_breakpoint


@pytest.mark.parametrize(
    ("number", "euid", "sentence"),
    [
        (errno.ENOSYS, 0, readiness.NO_PERF),
        (errno.EACCES, 1000, readiness.NOT_PERMITTED),
        (errno.EPERM, 0, readiness.NOT_PERMITTED_ROOT),
        (errno.ENOENT, 0, readiness.NO_BREAKPOINTS),
        (errno.EINVAL, 0, readiness.NO_BREAKPOINTS),
        (errno.EMFILE, 0, "perf_event_open refuses a breakpoint: Too many open files"),
    ],
)
def test_each_refusal_has_its_remedy(monkeypatch: pytest.MonkeyPatch, number: int, euid: int, sentence: str) -> None:
    monkeypatch.setattr(perf_event, "open_breakpoint", refusing(number))
    monkeypatch.setattr(os, "geteuid", lambda: euid)

    assert readiness.what_is_missing() == sentence
    with pytest.raises(NotSupported) as refused:
        machine.make({})
    assert str(refused.value) == sentence


def test_an_old_kernel_is_told_from_one_without_breakpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_event, "open_breakpoint", refusing(errno.EINVAL, unless=lambda read_lost: not read_lost))

    assert readiness.what_is_missing() == readiness.TOO_OLD


def test_a_host_whose_slots_are_all_taken_lacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_event, "open_breakpoint", refusing(errno.ENOSPC))

    assert readiness.what_is_missing() is None


def test_breakpoints_that_never_fire_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_event, "open_breakpoint", refusing(0, unless=lambda read_lost: True))
    monkeypatch.setattr(perf_event, "enable", lambda fd: None)
    monkeypatch.setattr(perf_event, "disable", lambda fd: None)
    monkeypatch.setattr(perf_event, "read_counts", lambda fd: perf_event.Counts(0, 1, 1, 0))

    assert readiness.what_is_missing() == readiness.NEVER_FIRES


def test_a_host_that_needs_a_fence_and_has_none_is_told_which_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_event, "FENCE_IS_NEEDED", True)
    monkeypatch.setattr(perf_event, "fence", None)

    assert readiness.what_is_missing() == readiness.NO_ATOMIC
