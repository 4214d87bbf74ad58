"""Selectors of published systems: policies of `attention.prefill`, or of `attention.DecodeSession`; they need torch.

The folder is the catalogue: ``from attention.selectors import FlexPrefill`` finds the class in whichever file has it.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from attention.decode_selector import DecodeSelector
from attention.selector import Selector


def catalogue(kind: type[Any] = Selector) -> dict[str, type[Any]]:
    """Every selector of the folder by its name, of prompts unless ``kind`` says `DecodeSelector`."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    classes = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, kind) and value.__module__ == module.__name__
    ]
    return {found.__name__: found for found in classes}


def __getattr__(name: str) -> type[Any]:
    found = (catalogue(Selector) | catalogue(DecodeSelector)).get(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
