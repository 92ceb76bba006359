"""Two tasks over running text: reciting an earlier passage, and going on where the text stops."""

from __future__ import annotations

from .sample import Draft, Recipe, Request

CUE, RECITED, CONTINUED = 20, 50, 100  # words


def recitation(request: Request) -> Recipe:
    """The first words of a passage come again at the end; the answer is how the passage goes on."""
    start, most = _room(request, CUE + RECITED)
    depth, text = request.draw.random(), request.source.haystack

    def build(units: int) -> Draft:
        count = units + CUE + RECITED  # the passage has to be there
        at = start + int(depth * units)
        cue, rest = text.passage(at, CUE), text.passage(at + CUE, RECITED)
        question = "\n\nHere is a passage of the text once more, word for word:\n\n"
        return Draft(text.passage(start, count), question, cue, (rest,))

    return Recipe(build, most)


def continuation(request: Request) -> Recipe:
    """Plain text without a question, for perplexity and KL on what follows it."""
    start, most = _room(request, CONTINUED)
    text = request.source.haystack

    def build(units: int) -> Draft:
        return Draft(text.passage(start, units), "", "", (text.passage(start + units, CONTINUED),))

    return Recipe(build, most)


def _room(request: Request, reserve: int) -> tuple[int, int]:
    """A random first word, and how many words may follow before those kept in reserve; a token has a word at most."""
    words = len(request.source.haystack.words)
    start = request.draw.randrange(max(1, words - request.length - reserve))
    return start, max(0, words - start - reserve)
