"""Samples in tokens: what each protocol compresses, batches of one length, halves."""

from __future__ import annotations

from dataclasses import replace

from bench.quality.sample import Sample, batches, half_of

SAMPLE = Sample("task", 0, 0, (1, 2, 3), (4, 5), (6,), 8)
CONTINUED = replace(SAMPLE, question=())


def test_protocols() -> None:
    assert SAMPLE.protocols == ("seen", "after")
    assert (SAMPLE.compressed("seen"), SAMPLE.asked("seen")) == ((1, 2, 3, 4, 5), ())
    assert (SAMPLE.compressed("after"), SAMPLE.asked("after")) == ((1, 2, 3), (4, 5))
    assert CONTINUED.protocols == ("seen",)


def test_halves_are_of_one_size_and_stable() -> None:
    for task in ("niah_single_1", "longbench/qasper"):
        halves = [half_of(task, index, 0) for index in range(40)]
        assert all({halves[i], halves[i + 1]} == {"tune", "report"} for i in range(0, 40, 2))
        assert len({tuple(halves[i : i + 2]) for i in range(0, 40, 2)}) == 2  # not every other one
    known = [half_of("niah_single_1", index, 0) for index in range(8)]
    # What was tuned on must never be reported on, whatever version of this code chose.
    assert known == ["tune", "report", "report", "tune", "tune", "report", "report", "tune"]


def test_digest_follows_the_tokens() -> None:
    assert SAMPLE.digest == replace(SAMPLE, answer_tokens=9).digest
    changed = [replace(SAMPLE, context=(1, 2)), replace(SAMPLE, question=(4,)), replace(SAMPLE, answer=(7,))]
    assert len({SAMPLE.digest, *(sample.digest for sample in changed)}) == 4


def test_batches_are_of_one_length() -> None:
    short, long = SAMPLE, replace(SAMPLE, context=(1, 2, 3, 4))
    same = replace(SAMPLE, context=(1, 2, 3, 4), question=(5,))  # as long as `short` if the question is seen
    assert batches([short, long, same, short], "seen", 2, False) == [[short, same], [long], [short]]
    assert batches([short, long, same, short], "after", 3, False) == [[short, short], [long, same]]
    assert batches([short, long, same, short], "after", 3, True) == [[short, short], [long], [same]]
