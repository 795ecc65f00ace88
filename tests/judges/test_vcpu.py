"""
The judge is judged: a model that errs in one rule is found out, and the model as it is agrees on a short run.

``make vcpu`` is the long one.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from hwbpd_kvm import x86_view
from hwbpd_kvm.probe import execution_of_ring_0
from hwbpd_kvm.vcpu import Kvm, what_is_missing
from tests.judges import vcpu
from tests.judges.vcpu import Difference, compare

pytestmark = [
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="this guest is x86-64; run it on such a host"),
    pytest.mark.skipif(what_is_missing() is not None, reason=what_is_missing() or ""),
]

SEQUENCES = 25


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    with Kvm() as kvm:
        yield kvm


def test_the_model_agrees_with_a_real_vcpu(kvm: Kvm) -> None:
    # Given random sequences, when both sides do them, then they never differ; the message has the seed.
    run = compare(kvm, execution_of_ring_0(kvm), SEQUENCES, random.SystemRandom().randrange(2**32))
    assert (run.sequences, run.steps) == (SEQUENCES, SEQUENCES * vcpu.STEPS)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("_DR7_KEPT", 0xFFFF_23FF),  # RTM is not kept
        ("_DR6_KEPT", 0x0000_600F),  # BT is not
        ("_DR6_BIT_12", 0),  # it stays
        ("shown_rflags", lambda view, cpu: cpu.rflags),  # TF is not hidden
        ("breakpoint_at", lambda view, cpu, execution: None),  # there are none
    ],
)
def test_a_model_that_errs_is_found_out(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch, name: str, broken: int | Callable[..., object]
) -> None:
    # Given one rule that is wrong,
    monkeypatch.setattr(x86_view, name, broken)

    # when it is compared, then a difference is found before long, and told with its seed and its steps.
    with pytest.raises(Difference) as found:
        compare(kvm, execution_of_ring_0(kvm), 200, seed=7)
    told = str(found.value)
    assert "seed 7, sequence" in told
    assert "  model " in told
    assert "  vcpu  " in told


def test_a_run_that_met_too_little_gives_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Given a run in which nothing was ever stopped,
    monkeypatch.setattr(vcpu, "compare", lambda *_: vcpu.Run(1, 40, Counter({"ended": 40})))
    # when it is judged, then there is no verdict.
    assert vcpu.judge(1, 7) == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("no verdict: never met: ")
