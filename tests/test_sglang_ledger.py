"""Bytes of the arena: never handed out twice, and whole again when all are back."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rdkv.plugins.sglang.ledger import Ledger


@settings(suppress_health_check=[HealthCheck.too_slow])  # beside engines that start
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 60))))
def test_regions_never_overlap(steps: list[tuple[int, int]]) -> None:
    """Each step reserves for an owner, or takes back what that owner has."""
    ledger, held = Ledger(100), dict[str, slice]()
    for owner, size in steps:
        name = str(owner)
        if name in held:
            ledger.release(name)
            del held[name]
        elif ledger.reserve(name, size):
            region = ledger.region(name)
            assert region is not None
            assert (region.stop - region.start, region.stop <= 100) == (size, True)
            assert all(region.stop <= other.start or other.stop <= region.start for other in held.values())
            held[name] = region
        else:
            assert ledger.region(name) is None
        assert ledger.used == sum(r.stop - r.start for r in held.values())
        assert len(ledger) == len(held)
    for name in held:
        ledger.release(name)
    assert ledger.reserve("all", 100)


def test_full() -> None:
    ledger = Ledger(10)
    assert ledger.reserve("a", 6)
    assert not ledger.reserve("b", 5)
    ledger.release("nobody")
    ledger.release("a")
    assert ledger.reserve("b", 5)


def test_an_arena_that_is_not_there_has_no_room() -> None:
    assert not Ledger(0).reserve("a", 1)
