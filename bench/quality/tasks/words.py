"""Random keys and values: hyphenated words, numbers, and identifiers."""

from __future__ import annotations

import random
import uuid

ADJECTIVE_LIST = """
amber ancient bitter blue brave bright broken calm careful clever cold copper crimson curious daring dark deep dusty
eager early empty faded fancy fierce gentle giant golden grand gray green happy heavy hidden hollow honest humble icy
idle jolly keen kind large late lively lonely loud lucky mellow mild modern muddy narrow noble odd pale patient plain
polite proud purple quick quiet rapid rare red rough round rusty sacred sandy sharp shiny silent silver simple sleepy
slow small smooth snowy solid stormy strange sturdy subtle sunny swift tall tender tidy tiny vast violet warm wild wise
wooden young
"""
NOUN_LIST = """
anchor apple arrow badger basket beacon bell bird blanket boat bottle branch bread bridge brook bucket button cabin
camel candle canyon carpet castle cedar chair cherry circle clock cloud coast comet copper coral cotton crane cricket
crown dancer desert dolphin door dragon drum eagle engine falcon farmer feather fiddle field flame flower forest
fountain fox garden gate glacier glove grape hammer harbor hawk helmet hill horse island jacket jewel kettle kitten
ladder lake lantern lemon letter lion lizard market meadow mirror monkey moon mountain needle nest ocean olive orchard
otter owl palace panda paper parrot peach pebble pencil piano pillow pine planet pocket pond prairie puzzle rabbit
raven ribbon river rocket rose sailor shadow ship shore signal sparrow spider spoon spring stone street summit table
teacher temple thunder tiger tower train tulip tunnel turtle valley village violin wagon walnut whale wheel willow
window winter wolf zebra
"""
ADJECTIVES, NOUNS = ADJECTIVE_LIST.split(), NOUN_LIST.split()


def compound(draw: random.Random) -> str:
    """An adjective and a noun with a hyphen, as RULER's keys are."""
    return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"


def number(draw: random.Random) -> str:
    """Seven digits, the first not 0."""
    return str(draw.randrange(1_000_000, 10_000_000))


def identifier(draw: random.Random) -> str:
    """A UUID of version 4: 36 characters."""
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))
