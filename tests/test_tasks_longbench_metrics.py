"""LongBench's metrics, on answers whose score can be told by hand."""

from __future__ import annotations

import pytest

from bench.quality.tasks.longbench_metrics import classification, edit_similarity, f1, judge, number_share, rouge_l


def test_f1() -> None:
    assert f1("The cat, a DOG!", "cat dog") == 1.0
    assert f1("cat cat dog", "cat bird") == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert f1("the", "an") == f1("", "cat") == f1("bird", "cat") == 0.0


def test_rouge_l() -> None:
    assert rouge_l("the cat sat here", "the cat sat here") == pytest.approx(1, abs=1e-6)
    # The longest common subsequence is "police the gunman", of 4 and of 3 words.
    assert rouge_l("police kill the gunman", "police the gunman") == pytest.approx(2 * 0.75 / 1.75, abs=1e-6)
    assert rouge_l("", "cat") == rouge_l("...", "cat") == rouge_l("dog", "cat") == 0.0


def test_classification() -> None:
    classes = ["Date", "Date of birth", "Place"]
    assert classification("It is Place", "Place", classes) == 1.0
    assert classification("Place or Date", "Place", classes) == 0.5
    assert classification("Date of birth", "Date of birth", classes) == 1.0  # "Date" is a part of its name
    assert classification("Place", "Date", classes) == classification("", "Date", classes) == 0.0


def test_numbers() -> None:
    assert number_share("Paragraph 12", "Paragraph 12") == 1.0
    assert number_share("12, 3 or 12?", "Paragraph 12") == pytest.approx(2 / 3)
    assert number_share("none", "12") == number_share("112", "12") == 0.0


def test_edit_similarity() -> None:
    assert edit_similarity("\n# a comment\nreturn x\nreturn y", "return x") == 1.0
    assert edit_similarity("return z", "return x") == 0.88  # 7 of 8 letters on both sides, in whole per cent
    assert edit_similarity("`only`", "return x") == 0.0


def test_the_best_reference_counts() -> None:
    assert judge("f1", "cat", ["dog", "cat"]) == 1.0
    assert judge("f1", "\ncat\nand more words", ["cat"], line=True) == 1.0
    assert judge("f1", "cat\nand more words", ["cat"]) < 1
    assert judge("classification", "Place", ["Date", "Place"], ["Date", "Place"]) == 1.0
    assert judge("number", "7", ["7"]) == judge("edit", "a b", ["a b"]) == 1.0
    assert judge("rouge-l", "a b", ["a b"]) == pytest.approx(1, abs=1e-6)
