"""Retrieval tasks after RULER (arXiv 2404.06654), made offline: a long context, a question, and what is to be found.

``passkey``: one sentence in the essays names a number.  ``multi-key``: several name numbers of different words, one
word is asked for.  ``variables``: chains of assignments among noise; all variables of one chain are asked for.
``common-words``: a numbered list in which few words come often and many seldom; the frequent ones are asked for.  The
last two open with a short solved example, as RULER's do.  Same task, length and seed, same sample.
"""

from __future__ import annotations

import bisect
import itertools
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from hsr.errors import ArgumentError

KEYS = 6  # sentences of multi-key, for each 1,000 tokens one more
CHAINS, HOPS = 1, 4  # of variables, as in RULER; a chain has HOPS + 1 of them
COMMON = 5  # words that come often
OFTEN, SELDOM = 30, 3  # times that these and the other words come
SLACK = 8  # tokens by which sums over sentences may be off
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "

Count = Callable[[str], int]  # tokens of a text


class Sample(NamedTuple):
    """The question's text ends where the answers begin; ``reply`` is how it goes on, in an order that may be any."""

    context: str
    question: str
    answers: tuple[str, ...]
    ordered: bool = True

    @property
    def reply(self) -> str:
        """The answers as the question asks for them."""
        return " " + ", ".join(self.answers)

    def reordered(self, text: str) -> bool:
        """Whether a text is all the answers and nothing else, where their order is free."""
        return not self.ordered and sorted(re.findall(r"\w+", text)) == sorted(self.answers)

    def found(self, text: str) -> float:
        """Share of the answers that stand in a text as whole words."""
        words = set(re.findall(r"\w+", text))
        return sum(answer in words for answer in self.answers) / len(self.answers)


def sample(task: str, tokens: int, seed: int, essays: Sequence[str], count: Count) -> Sample:
    """The sample of a seed; context, question and reply have at most ``tokens`` tokens, and nearly as many."""
    return TASKS[task](tokens, random.Random(f"{task} {tokens} {seed}"), essays, count)


def sentences(text: str) -> list[str]:
    """The sentences of a text, white space made single, in order."""
    return [part for part in re.split(r"(?<=[.?!])\s+", " ".join(text.split())) if part]


def words(essays: Sequence[str]) -> list[str]:
    """Their lower-case words of five to nine letters, each once."""
    return sorted({word for essay in essays for word in re.findall(r"\b[a-z]{5,9}\b", essay)})


def passkey(tokens: int, draw: random.Random, essays: Sequence[str], count: Count) -> Sample:
    """See the module."""
    key = _number(draw)
    needle = f"The pass key is {key}. Remember that the pass key is {key}."
    found = Sample("", "\n\nWhat is the pass key? Remember that the pass key is", (key,))
    return found._replace(context=_hidden([needle], _left(tokens, found, count), draw, _essay(draw, essays), count))


def multi_key(tokens: int, draw: random.Random, essays: Sequence[str], count: Count) -> Sample:
    """See the module."""
    chosen = draw.sample(words(essays), KEYS + tokens // 1000)
    numbers = [_number(draw) for _ in chosen]
    needles = [f"The special magic number for {word} is {key}." for word, key in zip(chosen, numbers, strict=True)]
    asked = chosen[0]
    question = f"\n\nWhat is the special magic number for {asked}? The special magic number for {asked} is"
    draw.shuffle(needles)
    found = Sample("", question, (numbers[0],))
    return found._replace(context=_hidden(needles, _left(tokens, found, count), draw, _essay(draw, essays), count))


def variables(tokens: int, draw: random.Random, essays: Sequence[str], count: Count) -> Sample:
    """See the module."""
    names = _names(draw, (CHAINS + 1) * (HOPS + 1))
    shown, *chains = (names[first : first + HOPS + 1] for first in range(0, len(names), HOPS + 1))
    number = _number(draw)
    example = f"{NOISE}{' '.join(_chain(shown, number))} {NOISE}{_asked(number)} {', '.join(shown)}."
    opening = f"Some sentences assign values to variables.\n\n{example}\n\n"
    numbers = [_number(draw) for _ in chains]
    order = [i for i in range(CHAINS) for _ in range(HOPS + 1)]
    draw.shuffle(order)  # chains are mixed, each keeps its own order
    lines = [iter(_chain(chain, key)) for chain, key in zip(chains, numbers, strict=True)]
    needles = [next(lines[i]) for i in order]
    found = Sample(opening, _asked(numbers[0]), tuple(chains[0]))
    noise = itertools.cycle(sentences(NOISE))
    return found._replace(context=opening + _hidden(needles, _left(tokens, found, count), draw, noise, count))


def common_words(tokens: int, draw: random.Random, essays: Sequence[str], count: Count) -> Sample:
    """See the module."""
    every = words(essays)
    draw.shuffle(every)
    shown, seldom, often, others = every[:COMMON], every[COMMON : 3 * COMMON], every[3 * COMMON :][:COMMON], every[20:]
    asked = f"\n\nQuestion: which {COMMON} words come most often in this list? Answer: the words are"
    example = _listed(draw, shown * 4 + seldom)
    opening = f"Here are two lists of words.\n\n{example}{asked} {', '.join(shown)}.\n\n"
    found = Sample(opening, asked, tuple(often), ordered=False)
    left = _left(tokens, found, count)

    def lines(many: int) -> str:
        """The list, with so many of the other words."""
        return _listed(random.Random(order), often * OFTEN + [word for word in others[:many] for _ in range(SELDOM)])

    order = draw.random()
    many = bisect.bisect_right(range(len(others) + 1), left, key=lambda many: count(lines(many))) - 1
    if not 0 <= many < len(others):
        raise ArgumentError(f"tokens must fit lists of {COMMON} to {len(others)} words; got {tokens}")
    return found._replace(context=opening + lines(many))


TASKS: dict[str, Callable[[int, random.Random, Sequence[str], Count], Sample]] = {
    "passkey": passkey,
    "multi-key": multi_key,
    "variables": variables,
    "common-words": common_words,
}


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10000, 100000))


def _names(draw: random.Random, many: int) -> list[str]:
    """Different variables of three capitals."""
    found: dict[str, None] = {}
    while len(found) < many:
        found["".join(draw.choices(string.ascii_uppercase, k=3))] = None
    return list(found)


def _chain(names: Sequence[str], number: str) -> list[str]:
    """Each of the names gets its value from the one before."""
    return [
        f"VAR {name} = {before}." for name, before in zip(names, [number, *(f"VAR {x}" for x in names)], strict=False)
    ]


def _asked(number: str) -> str:
    return f"\n\nQuestion: which {HOPS + 1} variables are assigned the value {number}? Answer: the variables are"


def _listed(draw: random.Random, chosen: Sequence[str]) -> str:
    """A numbered list in random order."""
    return "\n".join(f"{i}. {word}" for i, word in enumerate(draw.sample(chosen, len(chosen)), 1))


def _essay(draw: random.Random, essays: Sequence[str]) -> Iterator[str]:
    """Sentences without end, from the beginning of some essay on."""
    first = draw.randrange(len(essays))
    for essay in itertools.cycle([*essays[first:], *essays[:first]]):
        yield from sentences(essay)


def _left(tokens: int, found: Sample, count: Count) -> int:
    """Tokens that the rest of the context may have."""
    return tokens - SLACK - sum(count(text) for text in (found.context, found.question, found.reply))


def _hidden(needles: Sequence[str], tokens: int, draw: random.Random, text: Iterator[str], count: Count) -> str:
    """The needles in their order, at random places between as many sentences as fit."""
    used = sum(count(" " + needle) for needle in needles)
    kept: list[str] = []
    for sentence in text:
        used += count(" " + sentence)
        if used > tokens:
            break
        kept.append(sentence)
    places = sorted(draw.choices(range(len(kept) + 1), k=len(needles)))
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        kept.insert(place, needle)
    return " ".join(kept)
