"""
How a backend says no: what was asked for, the rule that this breaks, and what would do instead. For plugins that bring
a backend.

    mem:0x404040/4:r: R/W of DR7 has no code for reads alone; rw reports reads and writes; nearest: mem:0x404040/4:rw

1. Requests are written as people write them, in perf's syntax, so that the nearest can be copied and tried.
2. The nearest request keeps every rule. Where it holds some of the bytes of data that were asked for, the sentence says
   how many; where it holds none, of data or of an instruction, it helps nobody and is left out.
"""

from __future__ import annotations

from msgspec import Struct

from hwbpd.core.model import Access, Mode, Span


class Asked(Struct, frozen=True):
    """What a claim asks of a backend."""

    span: Span
    access: Access
    mode: Mode

    def __str__(self) -> str:
        """``mem:ADDR/LEN:ACCESS``, and a modifier where not every hit is seen (``h``: neither user's nor kernel's)."""
        modifiers = {(True, True): "", (True, False): ":u", (False, True): ":k", (False, False): ":h"}
        letters = f":{self.access.letters}" if self.access else ""
        seen = modifiers[self.mode.user, self.mode.kernel]
        return f"mem:{self.span.address:#x}/{self.span.length_bytes}{letters}{seen}"


def sentence(asked: Asked, rule: str, nearest: Asked) -> str:
    """
    Return what people read of a refusal.

    :param rule: which rule of which register is broken.
    :param nearest: the request that keeps all of them and is nearest.
    """
    said = f"{asked}: {rule}"
    covered = _common_bytes(asked.span, nearest.span)
    if covered == 0 and asked.span.length_bytes > 0:
        return said
    said += f"; nearest: {nearest}"
    if nearest.access != Access.EXECUTE and covered < asked.span.length_bytes:
        said += f", {covered} of the {asked.span.length_bytes} bytes"
    return said


def _common_bytes(one: Span, other: Span) -> int:
    first = max(one.address, other.address)
    end = min(one.address + one.length_bytes, other.address + other.length_bytes)
    return max(0, end - first)
