"""Questions about facts strewn over prose: what plain text lacks for training heads.

The paper's heads learn from LongAlpaca: long texts with questions about them. Prose alone teaches
which keys its own continuation looks at, and not that somebody may ask for what a text says once.
These facts are of ten everyday forms, in English, each with a question.
"""

from __future__ import annotations

import random
import re
from typing import Any

import torch

from locret.training import Example

# Words that make a fact; one is taken once in a text, so that a question has one answer.
WORDS = {
    "name": "Alma Boris Carla Dmitri Elena Farid Greta Hugo Ingrid Jamal Katya Liam Marta Nadia "
    "Oskar Paula Quentin Rosa Stefan Tomas Ursula Victor Wanda Yusuf Zelda".split(),
    "town": "Ashford Belmont Corwen Dunmore Eastlake Fairhaven Glenview Harwick Ivybridge Kelso "
    "Lowell Marlow Norwood Oakham Penrith Redcliff Stanton Thornbury Upton Wexford".split(),
    "thing": "violin passport ladder telescope bicycle suitcase lantern microscope saddle kettle "
    "typewriter compass trumpet camera umbrella drum".split(),
    "place": "attic cellar garage stable pantry workshop greenhouse boathouse library hallway "
    "chapel barn".split(),
    "building": "museum archive theatre hospital observatory brewery lighthouse mill courthouse "
    "bakery station academy".split(),
    "colour": "crimson turquoise violet amber olive ivory scarlet indigo beige maroon".split(),
    "food": "porridge pancakes herring omelette papaya muesli toast dumplings yoghurt figs".split(),
    "ship": "Aurora Meridian Halcyon Tempest Corsair Pelican Vanguard Nautilus Seahorse".split(),
}
# A fact and the question for it; {number}, {year} and {time} are drawn anew.
FORMS = (
    ("The {thing} of {name} is kept in the {place}.", "Where is the {thing} of {name} kept?",
     "In the {place}"),
    ("{name} was born in {year}.", "When was {name} born?", "In {year}"),
    ("The door of the {building} opens with the code {number}.",
     "Which code opens the door of the {building}?", "{number}"),
    ("{name} always eats {food} for breakfast.", "What does {name} eat for breakfast?", "{food}"),
    ("The bedroom of {name} is painted {colour}.", "In which colour is the bedroom of {name}?",
     "{colour}"),
    ("The last train to {town} leaves at {time}.", "When does the last train to {town} leave?",
     "At {time}"),
    ("A ticket for the {building} costs {number} crowns.",
     "What does a ticket for the {building} cost?", "{number} crowns"),
    ("The captain of the {ship} is {name}.", "Who is the captain of the {ship}?", "{name}"),
    ("{name} moved to {town} last spring.", "Where did {name} move?", "To {town}"),
    ("The telephone number of {name} is {number}.", "What is the telephone number of {name}?",
     "{number}"),
)  # fmt: skip


def facts(count: int, generator: random.Random) -> list[tuple[str, str]]:
    """`count` facts, each with its question and answer as one line; no word stands in two."""
    left = {kind: generator.sample(words, len(words)) for kind, words in WORDS.items()}
    drawn = {
        "number": lambda: str(generator.randrange(10_000, 10_000_000)),
        "year": lambda: str(generator.randrange(1900, 2010)),
        "time": lambda: f"{generator.randrange(1, 24)}:{generator.randrange(10, 60)}",
    }
    found = []
    for fact, question, answer in generator.choices(FORMS, k=count):
        values = {
            kind: drawn[kind]() if kind in drawn else left[kind].pop()
            for kind in re.findall(r"{(\w+)}", fact)
        }
        line = f"\nQuestion: {question} Answer: {answer}."
        found.append((fact.format(**values), line.format(**values)))
    return found


def strewn(text: str, tokenizer: Any, length: int, seed: int, number: int = 5) -> Example | None:
    """Facts between the sentences of a text, and all their questions at its end.

    Args:
        text: prose of at least `length` tokens.
        tokenizer: the model's.
        length: tokens of the whole, at most.
        seed: of the facts and their places.
        number: of facts; fewer where they and their questions would take more than half.

    Returns:
        the window, whose answer is the questions with their answers; None where not even one fits.
    """
    ids = lambda t: tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
    for count in range(number, 0, -1):
        generator = random.Random(seed)
        pairs = facts(count, generator)
        asked = [line for _, line in pairs]
        generator.shuffle(asked)
        end = ids("\n" + "".join(asked))
        room = length - len(end) - sum(len(ids(" " + fact)) for fact, _ in pairs)
        if 2 * room < length:
            continue
        prose = tokenizer.decode(ids(text)[:room])
        sentences = re.split(r"(?<=[.!?])\s+", prose)
        for fact, _ in pairs:
            sentences.insert(generator.randrange(len(sentences)), fact)
        # Joining may merge or split a token at a seam: what is over leaves at the front.
        start = ids(" ".join(sentences))[-(length - len(end)) :]
        return Example(torch.tensor(start + end), len(end))
    return None
