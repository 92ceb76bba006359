"""Few-shot labels: what kind of request is it, by examples in the prompt, as LongBench has it in ``trec``."""

from __future__ import annotations

import random

from .sample import Draft, Recipe, Request

# Each label, and requests of it; braces are filled from `SLOTS`.
REQUESTS = {
    "weather": ("Will it rain in {city} on {day}?", "How cold does {city} get on {day}?", "Is {day} sunny in {city}?"),
    "travel": ("Find me a train to {city} on {day}.", "I need two seats to {city}.", "When does a bus leave {city}?"),
    "music": ("Play something by {name}.", "Put on songs for {meal}.", "Skip this track, I want {name}."),
    "alarm": ("Wake me at {hour} on {day}.", "Set a timer to {hour}.", "Cancel what rings at {hour}."),
    "calendar": ("Am I free on {day} at {hour}?", "Put {meal} with {name} on {day}.", "Move {name} to {day}."),
    "cooking": ("How long do I boil {food}?", "What goes well with {food}?", "Give me a recipe for {food}."),
    "shopping": ("Add {food} to my list.", "Order more {food} by {day}.", "Where is {food} on sale?"),
    "message": ("Tell {name} that I am late.", "Write {name} about {meal}.", "Read what {name} sent on {day}."),
    "banking": ("Send {name} {sum} dollars.", "Did {sum} dollars arrive on {day}?", "How much is left after {sum}?"),
    "sports": ("Who won in {city} on {day}?", "What was the score in {city}?", "When does {city} play again?"),
}
SLOTS = {
    "city": ("Lagos", "Quito", "Hanoi", "Oslo", "Perth", "Turin", "Dakar", "Lima", "Busan", "Porto"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "name": ("Ada", "Bela", "Chidi", "Dora", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jun"),
    "meal": ("breakfast", "lunch", "dinner", "a picnic"),
    "hour": ("six", "seven", "half past eight", "nine", "noon", "a quarter to ten"),
    "food": ("lentils", "rice", "trout", "plums", "spinach", "noodles", "eggs", "leeks"),
    "sum": ("12", "40", "75", "130", "260", "999"),
}


def labels(request: Request) -> Recipe:
    """Labelled requests, and one to label. Names of labels are random words, so that only the examples tell them."""
    draw = request.draw
    kinds = list(REQUESTS)
    named = dict(zip(kinds, draw.sample(NAMES, len(kinds)), strict=True))
    asked, seed = draw.choice(kinds), draw.random()
    wanted = _filled(asked, draw)
    intro = "Each request below has a label. Learn from the examples what the labels stand for.\n\n"

    def build(units: int) -> Draft:
        examples = random.Random(seed)  # the same examples again, however many are wanted
        lines: list[str] = []
        for place in range(len(kinds) + units):
            kind = kinds[place] if place < len(kinds) else examples.choice(kinds)  # each label once at least
            lines.append(f"Request: {_filled(kind, examples)}\nLabel: {named[kind]}\n\n")
        examples.shuffle(lines)
        return Draft(intro + "".join(lines), f"Request: {wanted}", "\nLabel:", (named[asked],))

    return Recipe(build)


NAMES = ("amber", "birch", "coral", "delta", "ember", "flint", "grove", "heron", "ivory", "jade", "kelp", "lotus")


def _filled(kind: str, draw: random.Random) -> str:
    """A request of one kind."""
    return draw.choice(REQUESTS[kind]).format(**{slot: draw.choice(words) for slot, words in SLOTS.items()})
