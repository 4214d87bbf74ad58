"""Policies by name, with their options as text: our own, and every selector of `attention.selectors`.

An option is a field of the policy's dataclass that holds a number, a word or a truth value.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attention import BlockSampled, Certified, Sampled, SkipSoftmax, TopR
from attention.decode_selector import DecodeSelector
from attention.selector import Selector
from attention.selectors import catalogue
from hsr.errors import ArgumentError

SCALARS = (bool, int, float, str)
TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Entry:
    """What a name stands for.

    Attributes:
        policy: the class; None is torch's dense attention.
        decode, prefill: whether it serves decode steps, prompts.
        usual: options that hold where none of them is given, nor one of ``instead``.
        instead: options that say the same in another way.
    """

    policy: type[Any] | None
    decode: bool
    prefill: bool
    usual: Mapping[str, str] = dataclasses.field(default_factory=dict)
    instead: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """Types of the options by name."""
        if self.policy is None:
            return {}
        hints = typing.get_type_hints(self.policy)
        names = [field.name for field in dataclasses.fields(self.policy) if field.init]
        return {name: hints[name] for name in names if set(_parts(hints[name])) <= {*SCALARS, types.NoneType}}

    @property
    def can_be_named(self) -> bool:
        """Whether every field without a default is an option."""
        unset = dataclasses.MISSING
        fields = dataclasses.fields(self.policy) if self.policy else ()
        return {each.name for each in fields if each.default is unset and each.default_factory is unset} <= set(
            self.options
        )


def table() -> dict[str, Entry]:
    """Every policy by name: the dispatch table of ``--policy`` and ``--prefill``."""
    ours = {
        "dense": Entry(None, True, True),
        "topr": Entry(TopR, True, True),
        "certified": Entry(Certified, True, True),
        "sampled": Entry(Sampled, True, True, {"eps": "0.05"}, ("budget",)),
        "block-sampled": Entry(BlockSampled, False, True, {"density": "0.25"}, ("error", "seconds")),
        "skip-softmax": Entry(SkipSoftmax, False, True, {"threshold": "0.001"}, ("factor",)),
    }
    theirs = {_hyphened(name): Entry(found, True, False) for name, found in catalogue(DecodeSelector).items()}
    theirs |= {_hyphened(name): Entry(found, False, True) for name, found in catalogue(Selector).items()}
    return {name: entry for name, entry in (ours | theirs).items() if entry.can_be_named}


def policy(stage: str, name: str, given: Mapping[str, str]) -> Any:
    """The policy of that name, None for dense attention.

    Args:
        stage: "decode" or "prefill".
        name: of `table`.
        given: option -> text.

    Raises:
        ArgumentError: no such policy or option, with those there are; a value that the policy refuses.
    """
    fitting = {known: entry for known, entry in table().items() if getattr(entry, stage)}
    entry = fitting.get(name.lower())
    if entry is None:
        raise ArgumentError(f"the {stage} policy must be one of {', '.join(fitting)}; got {name!r}")
    types_of = entry.options
    unknown = [option for option in given if option not in types_of]
    if unknown:
        held = f"its options are {', '.join(types_of)}" if types_of else "it has none"
        raise ArgumentError(f"the {stage} policy {name} has no option {', '.join(unknown)}; {held}")
    if entry.policy is None:
        return None
    chosen = dict(given)
    if not set(chosen) & {*entry.usual, *entry.instead}:
        chosen |= entry.usual
    return entry.policy(**{option: value(option, text, types_of[option]) for option, text in chosen.items()})


def value(option: str, text: str, kind: Any) -> Any:
    """An option's text as its type."""
    kinds = _parts(kind)
    if types.NoneType in kinds and text.lower() == "none":
        return None
    if bool in kinds and text.lower() in TRUTHS:
        return TRUTHS[text.lower()]
    for scalar in (int, float, str):
        try:
            if scalar in kinds:
                return scalar(text)
        except ValueError:
            continue
    wanted = " or ".join(part.__name__.replace("NoneType", "none") for part in kinds)
    raise ArgumentError(f"the option {option} must be {wanted}; got {text!r}")


def listing() -> list[tuple[str, str, str]]:
    """Name, what it serves, options with their defaults; for each policy."""
    rows = []
    for name, entry in table().items():
        serves = ", ".join(stage for stage in ("decode", "prefill") if getattr(entry, stage))
        defaults = {field.name: field.default for field in dataclasses.fields(entry.policy)} if entry.policy else {}
        options = (f"{option}={entry.usual.get(option, defaults[option])}" for option in entry.options)
        rows.append((name, serves, ", ".join(options)))
    return rows


def _parts(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _hyphened(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()
