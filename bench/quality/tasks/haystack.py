"""Haystacks: noise sentences, or the words of a text; and how needles are put into them."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path

from rdkv.runtime.errors import ConfigError

# The filler of the pass-key test (Mohtashami and Jaggi 2023, arXiv 2305.16300), which RULER and InfiniteBench use.
NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")


def read_texts(path: Path) -> str:
    """The text of a file, or of all ``.txt`` files of a folder and its folders, in order of their paths.

    Raises:
        ConfigError: There is no text.
    """
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    try:
        text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the haystack text {path}: {error}") from error
    if not text.strip():
        raise ConfigError(f"no haystack text in {path}: name a text file, or a folder with .txt files")
    return text


def noise(count: int) -> list[str]:
    """So many sentences of filler."""
    return list(islice(cycle(NOISE), count))


class Text:
    """The words of a text, which begins again where it ends."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = text.split()
        if not self.words:
            raise ConfigError("the haystack text is empty: give a text with sentences")

    @cached_property
    def starts(self) -> list[int]:
        """Where sentences begin: indices of words."""
        return sentence_ends(self.words[:-1])

    @cached_property
    def vocabulary(self) -> list[str]:
        """The different words of four letters and more, in lower case and in alphabetical order."""
        words = {word.strip(".,;:!?()\"'").lower() for word in self.words}
        return sorted(word for word in words if len(word) >= 4 and word.isascii() and word.isalpha())

    @cached_property
    def _places(self) -> list[int]:
        """Where each word begins in the text, and where the text ends."""
        return [*(found.start() for found in re.finditer(r"\S+", self.text)), len(self.text)]

    def passage(self, start: int, count: int) -> str:
        """So many words from one on as they stand in the text, with the space between them; it must not end before."""
        return self.text[self._places[start] : self._places[start + count]].rstrip()

    def take(self, start: int, count: int) -> list[str]:
        """So many words from one on."""
        return list(islice(cycle(self.words), start, start + count))


def sentence_ends(words: Sequence[str]) -> list[int]:
    """The gaps between words where a sentence ends, and the one before the first word."""
    return [0, *(i + 1 for i, word in enumerate(words) if word[-1] in ".!?")]


def put(units: Sequence[str], needles: Sequence[str], depths: Sequence[float], places: Sequence[int]) -> list[str]:
    """Units with each needle at its depth, 0 to 1, moved back to the last of ``places`` (ascending, the first is 0).

    Needles at one place keep their order.
    """
    at = [places[bisect_right(places, int(depth * (len(units) + 1))) - 1] for depth in depths]
    mixed: list[str] = []
    done = 0
    for place, needle in sorted(zip(at, needles, strict=True), key=lambda pair: pair[0]):
        mixed += [*units[done:place], needle]
        done = place
    return mixed + list(units[done:])


def depths(draw: random.Random, count: int) -> list[float]:
    """Random depths for needles, ascending."""
    return sorted(draw.random() for _ in range(count))
