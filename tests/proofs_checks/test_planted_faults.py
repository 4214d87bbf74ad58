"""Every check passes for the library's operations and fails for each fault planted in its place."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, settings

import proofs_checks
from proofs_checks.check import OURS, PAPER, discover

CHECKS = discover()
FAULTS = [(name, fault) for name, check in CHECKS.items() for fault in check.faults]
OPERATIONS = [(name, operation) for name, check in CHECKS.items() for operation in check.operations]
LAST = "What this does not show."
PARTS = ("Source.", "Hypotheses.", "Conclusion.", "Check.", LAST)


@pytest.fixture
def unshrunk() -> Iterator[None]:
    """A failing input is expected and need not be made small."""
    before = settings.get_current_profile_name()
    settings.register_profile("unshrunk", settings.get_profile(before), phases=(Phase.explicit, Phase.generate))
    settings.load_profile("unshrunk")
    yield
    settings.load_profile(before)


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_planted_fault_is_seen(name: str, fault: str) -> None:
    with pytest.raises(AssertionError):
        CHECKS[name](CHECKS[name].faults[fault])


@pytest.mark.parametrize(("name", "operation"), OPERATIONS)
def test_the_librarys_operation_passes_a_few_examples(name: str, operation: str) -> None:
    constants = CHECKS[name](CHECKS[name].operations[operation], examples=15)
    assert constants, "a check measures something"


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_has_a_fault_a_source_and_a_reason_to_wait(name: str) -> None:
    check = CHECKS[name]
    assert check.faults
    assert check.source in (PAPER, OURS)
    assert check.operations or check.pending
    assert len({other.statement for other in CHECKS.values()}) == len(CHECKS)


def test_a_file_states_its_limits_last_and_only_statements_do() -> None:
    for path in Path(proofs_checks.__file__).parent.glob("*.py"):
        if path.stem.startswith("__"):
            continue
        text = importlib.import_module(f"proofs_checks.{path.stem}").__doc__ or ""
        assert (LAST in text) == (path.stem in CHECKS), f"{path.name}: a statement has a CHECK and says {LAST!r}"
        if path.stem in CHECKS:
            places = [text.find(f"\n\n{part}") for part in PARTS]
            assert -1 not in places, f"{path.name} lacks a part"
            assert places == sorted(places)
            assert "\n\n" not in text[places[-1] + 2 :].strip(), f"{path.name}: {LAST!r} is not its last paragraph"
