"""Samples of retrieval tasks: as long as asked, the same for the same seed, solvable from their context alone."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from benchmarks import retrieval_tasks as tasks
from hsr.errors import ArgumentError

STEMS = ["".join(letters) for letters in zip("abcdefghijklmnopqrstu" * 19, "jumps" * 80, "nymph" * 80, strict=False)]
ESSAYS = [" ".join(f"It {word}{word} over{i} the {word}so." for i, word in enumerate(STEMS[i::4])) for i in range(4)]


def count(text: str) -> int:
    """Words, figures and marks."""
    return len(re.findall(r"[a-zA-Z]+|\d|[^\w\s]", text))


def drawn(task: str, tokens: int = 1500, seed: int = 0) -> tasks.Sample:
    return tasks.sample(task, tokens, seed, ESSAYS, count)


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("tokens", [1500, 3000])
def test_a_sample_is_as_long_as_asked_and_its_seed_decides(task: str, tokens: int) -> None:
    found = [drawn(task, tokens, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    for one in found:
        assert tokens - 70 < sum(count(part) for part in (one.context, one.question, one.reply)) <= tokens
        assert one.found(one.reply) == 1 and one.found("nothing") == 0 and one.found(one.answers[0]) > 0


def test_the_pass_key_stands_in_the_text_at_a_place_of_its_own() -> None:
    places = set()
    for seed in range(5):
        one = drawn("passkey", seed=seed)
        assert re.findall(r"pass key is (\d{5})", one.context) == [*one.answers] * 2
        places.add(one.context.index("The pass key") // 500)
    assert len(places) > 2


def test_the_word_that_is_asked_for_is_one_of_many() -> None:
    one = drawn("multi-key")
    numbers = dict(re.findall(r"magic number for (\w+) is (\d{5})\.", one.context))
    (asked,) = set(re.findall(r"magic number for (\w+)", one.question))
    assert len(numbers) == tasks.KEYS + 1 and (numbers[asked],) == one.answers


def test_the_chain_can_be_followed() -> None:
    one = drawn("variables")
    assigned: dict[str, str] = {}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", one.context):
        assigned[name] = assigned.get(value, value)
    number = re.findall(r"\d{5}", one.question)[0]
    assert tuple(name for name, value in assigned.items() if value == number) == one.answers
    assert len(one.answers) == tasks.HOPS + 1 and len(set(assigned.values())) == tasks.CHAINS + 1


def test_the_common_words_are_the_most_frequent_of_the_last_list() -> None:
    one = drawn("common-words", 3000)
    listed = re.findall(r"^\d+\. (\w+)$", one.context.rpartition("\n\n")[2], re.MULTILINE)
    counts = Counter(listed)
    assert {word for word, times in counts.items() if times == tasks.OFTEN} == set(one.answers)
    assert set(counts.values()) == {tasks.OFTEN, tasks.SELDOM} and one.answers[0] in one.context
    with pytest.raises(ArgumentError, match="tokens must fit"):
        drawn("common-words", 300)


def test_answers_count_as_whole_words_in_any_order() -> None:
    one = tasks.Sample("", "", ("123", "ab", "c"))
    assert one.reply == " 123, ab, c"
    assert one.found(" ab, 1234 and 123x; c") == pytest.approx(2 / 3)
