"""Compile the kernels for sm_90 on a machine without a GPU, and refuse spills and missing tensor-core instructions.

python -m gpu.sm90

The launches of CUDA C++ need cuda-bindings and NVRTC; without them a line says so.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attention.key_lists import spoken
from attention.skip_softmax_reference import BLOCK
from gpu import (
    audit_bounds,
    audit_errors,
    block_sampled,
    chosen,
    encode,
    exact_rows,
    gather,
    half_space,
    importance,
    listed,
    moments,
    pacing,
    prepare,
    relu,
    scan,
    skip_softmax,
)
from gpu.hopper import CODES_STAGES, STAGES
from gpu.launches import scan_warps

FLOATS = set("MAP MEANS SPREADS TRIM RHO BUDGET SIGMA TAU KEY_MAP MEAN CENTRE FLOOR HALF TOP PARTS SUMS LSE".split())
FLOATS |= set("STEPS SLACK REACH WIDTH LEVEL MOMENTS GREATEST DISTANCE LONGEST DIRECTIONS".split())
HALVES = set("Q K V NEW_K NEW_V OUTPUT".split())
WHOLE = set("PAGES LENGTHS SEEDS COUNTS FOUND STATUS LIMITS BITS IDS".split())
EIGHT = {"QUERIES": "*i8", "CODES": "*i8", "ROUNDED": "*i8", "KEEP": "*i8"}
EIGHT |= {"DRAWN": "*i64", "STARTS": "*i64", "PAIRS": "*i64", "LISTED": "*i64", "POWERS": "*i64", "REPORTED": "*i64"}
REAL = {"scale", "budget"}
SHARED = 232448  # bytes that a program may have on Hopper
SCALARS = 32  # spills of a consumer whose rows, scores, weights and sums of width 128 take 192 of 224 registers
DOUBLES = set("MIDDLE SPREAD THRESHOLDS SCORES SETTINGS LARGEST TOTALS VECTORS RADIUS CAST FACTS".split())


class Told(NamedTuple):
    """What became of a kernel with its settings; bad if it spills or lacks its instruction."""

    name: str
    settings: dict[str, Any]
    registers: int
    spilled: int
    bad: bool

    def line(self) -> str:
        """For a reader."""
        chosen = " ".join(f"{key} {value}" for key, value in self.settings.items())
        return (
            f"{'FAIL' if self.bad else 'ok  '} {self.name} registers {self.registers} spilled {self.spilled} {chosen}\n"
        )


@dataclass(frozen=True)
class Case:
    """A kernel with its compile-time settings, and the instruction that it must have."""

    kernel: Any
    settings: dict[str, Any]
    warps: int
    must: str
    kinds: dict[str, str] = field(default_factory=dict)  # of arguments whose names do not give them away
    stages: int = 3


def cases() -> Iterator[Case]:
    """The shapes that `gpu.sampled` launches by default."""
    common = {"GROW": 1, "ASM": True, "PDL": True}
    for R, ROW, P, nibbles, GP in ((32, 32, 2, 32, 8), (32, 24, 4, 16, 8), (64, 64, 2, 64, 8), (128, 128, 4, 64, 16)):
        for systematic in (True, False):
            shape = {"R": R, "ROW": ROW, "PLANES": P, "NIBBLES": nibbles, "GP": GP, "KEYS": 128, "TILES": 1}
            rest = {"STAGES": 3, "SYSTEMATIC": systematic, "REDRAW": True}
            yield Case(scan.scan, shape | rest | common, scan_warps(R), "MMA")
    for D, R, P, G in ((64, 32, 4, 7), (128, 32, 2, 4), (128, 64, 4, 4), (256, 64, 2, 16)):
        shape = {"D": D, "R": R, "ROW": R, "PLANES": P, "PAGE": 16 * (D == 128)}
        warps = max(4, R * D // 2048)
        yield Case(prepare.prepare, shape | {"G": G, "GP": 8 if G <= 8 else 16} | common, warps, "MMA")
        yield Case(encode.encode, shape, 4, "MMA")
        yield Case(encode.append, shape | {"PDL": True}, 4, "MMA")
        columns = {"R": R, "ROW": R - 8 * (P == 4), "PLANES": P, "NEWEST": False}
        yield Case(moments.codes, columns, 8, "")
        yield Case(prepare.begin, {"GP": 8 if G <= 8 else 16}, 1, "")
    for D in (64, 128, 256):
        yield Case(moments.accumulate, {"D": D, "PAGE": 16 * (D == 128)}, 4, "MMA")
        yield Case(moments.merge, {"D": D}, 8, "")
    for D, G in ((64, 7), (128, 4), (128, 1), (256, 16)):
        group = max(4, triton.next_power_of_2(G))
        shape = {"G": G, "GP": group, "D": D, "KEYS": min(64, 64 * 128 // D), "STAGES": 1, "PAGE": 16 * (D == 64)}
        yield Case(gather.gather, shape | common, 4, "HMMA")
        yield Case(gather.merge, {"G": G, "D": D, "SPLITS": 64, "GROW": 1, "PDL": True}, 4, "")
    yield from half_space_cases()
    yield from relu_cases()
    yield from listed_cases()
    yield from importance_cases()
    yield from chosen_cases()
    yield from skip_cases()
    yield from audit_cases()


def half_space_cases() -> Iterator[Case]:
    """The shapes that `gpu.half_space` launches, for narrow and wide keys and few and many queries."""
    for D in (3, 80, 128, 256, 512):
        R, ROW = half_space.padded(D), -(-D // 16) * 16
        yield Case(half_space.prepare, {"D": D, "R": R}, 1, "")
        for N in (8, 64):
            shape = {"ROW": ROW, "R": R, "N": N, "TILE": half_space.tile_keys(R)}
            yield Case(half_space.scan, shape, 4, "MMA")
        part = min(R, 128)
        yield Case(half_space.refine, {"D": D, "C": 2048 // part, "PART": part}, 4, "")
    for TILE, paired in ((64, True), (128, True)):
        yield Case(half_space.expand, {"TILE": TILE, "KEYS": half_space.SPAN, "PAIRED": paired}, 4, "")


def relu_cases() -> Iterator[Case]:
    """The shapes that `gpu.relu` launches; SPLITS is the most it merges."""
    for D, DV in ((3, 5), (64, 64), (128, 128), (192, 128), (512, 512)):
        R, RV = half_space.padded(D), half_space.padded(DV)
        shape = {"D": D, "R": R, "DV": DV, "RV": RV, "C": relu.held_keys(R, RV)}
        yield Case(relu.accumulate, shape, relu.warps(R, RV), "")
        yield Case(relu.merge, {"DV": DV, "RV": RV, "SPLITS": min(relu.PARTS // RV, 64)}, 4, "")


def listed_cases() -> Iterator[Case]:
    """The shapes that `gpu.listed` launches: lists of each kind, lists with sizes."""
    kinds = dict.fromkeys(("MEAN_K", "MEAN_V"), "*bf16") | dict.fromkeys(("LOG_WEIGHTS", "LSE"), "*fp32")
    kinds |= dict.fromkeys(("TOKEN_STARTS", "BLOCK_STARTS", "MEAN_STARTS"), "*i64")
    kinds |= dict.fromkeys(("Q_SIZES", "K_SIZES", "TOKENS", "BLOCKS", "MEANS"), "*i32")
    for D, (tile, stages) in listed.TILES.items():
        for all in (False, True):
            given = {"HAS_TOKENS": True, "HAS_BLOCKS": all, "HAS_MEANS": all, "SIZED": all}
            shape = {"G": 4, "D": D, "DV": D, "M": 128, "KEYS": 128, "N": tile, "STAGES": stages}
            yield Case(listed.listed, shape | given, 8, "MMA", kinds, stages)


def skip_cases() -> Iterator[Case]:
    """The shapes that `gpu.skip_softmax` launches."""
    kinds = {"LOST": "*fp32", "KEPT": "*i32", "SKIPPED": "*i32", "level": "fp32"}
    for D, stages in skip_softmax.STAGES.items():
        shape = {"G": 4, "D": D, "DV": D, "M": 128, "N": BLOCK, "STAGES": stages}
        yield Case(skip_softmax.skip_softmax, shape, 8, "HGMMA", kinds, stages)


def audit_cases() -> Iterator[Case]:
    """The shapes that `gpu.exact_rows`, `gpu.audit_errors` and `gpu.audit_bounds` launch."""
    doubles = dict.fromkeys("TOLERANCE VALUES SETTINGS PRIOR PRICES BEST LEVELS OVERALL".split(), "*fp64")
    for D, (M, N, stages, warps) in exact_rows.TILES.items():
        shape = {"G": 4, "D": D, "M": M, "N": N, "STAGES": stages}
        yield Case(exact_rows.pieces, shape, warps, "HGMMA", {"PLAN": "*i32"}, stages)
        shape = {"D": D, "M": M, "JOINED": exact_rows.JOINED}
        yield Case(exact_rows.join, shape, 4, "", {"PLAN": "*i32", "OUTPUT": "*fp32"})
        yield Case(audit_errors.errors, shape | {"G": 4}, 4, "", doubles | {"PLAN": "*i32"})
    yield Case(audit_bounds.bounds, audit_bounds.BOUNDS, audit_bounds.WARPS, "", doubles)
    yield Case(audit_bounds.overall, audit_bounds.OVERALL, 4, "", doubles)


def importance_cases() -> Iterator[Case]:
    """The shapes that `gpu.block_sampled` launches, keys read first, then their codes."""
    counts = {"HISTOGRAMS": "*i32", "TOTALS": "*i64", "CHANCES": "*i32", "STARTS": "*i32"}
    for D in (64, 128, 256):
        kinds = {"MEANS": "*bf16", "SHARES": "*fp32", "FAR": "*i8", "CODES": "*u8"}
        kinds |= {"CENTRES": "*fp32", "SQUARES": "*fp32", "QUERIES": "*bf16"}
        yield Case(importance.typical, {"DV": D, "KEYS": 128}, 8, "", kinds)
        yield Case(importance.pool, {"D": D, "DV": D, "KEYS": 128}, 8, "", kinds)
        fitting = block_sampled.stages(D)
        for R, causal in ((1, False), (2, False), (8, False), (8, True), (16, True)):
            own = {"D": D, "R": R, "ROWS": 128, "CAUSAL": causal}
            yield Case(importance.represent, own | {"S": spoken(R), "TAKEN": block_sampled.TAKEN}, 1, "", kinds)
            for together, lines in ((1, 1 << 20), (4, 1 << 20), *([(4, 64)] if R == 1 else ())):
                split = {"G": 4, "KEYS": 128, "LINES": block_sampled.lines_together(together, R, lines)}
                split |= {"TOGETHER": together, "PADDED": together}
                yield Case(importance.normalise, own | split, block_sampled.warps(D), "MMA", kinds, fitting)
            scored = {"G": 4, "D": D, "R": R, "ROWS": 128, "KEYS": 128, "LINES": block_sampled.COLUMNS // R}
            yield Case(importance.code, scored | {"STAGES": fitting}, 8, "MMA", kinds)
    tile = {"ROWS": 128, "KEYS": 128, "TILE": block_sampled.TILE}
    yield Case(block_sampled.count, tile, 4, "", counts | {"CODES": "*u8"})
    yield Case(block_sampled.threshold, {}, 4, "", counts | {"BUDGETS": "*fp64"})
    placed = {"FIRST": True, "TILE": block_sampled.PLACED}
    yield Case(block_sampled.places, placed, 16, "", {"LENGTHS": "*i64", "OFFSETS": "*i64"})
    yield Case(pacing.pace, {"LATER": pacing.AHEAD}, 1, "", {"OWN": "*i32", "EXPECTED": "*fp64", "LEFT": "*fp64"})
    yield Case(block_sampled.size, {}, 4, "", counts | {"LENGTHS": "*i64"})
    rest = {"CODES": "*u8", "OFFSETS": "*i64", "TOKENS": "*i32", "LOG_WEIGHTS": "*fp32"}
    yield Case(block_sampled.draw, tile, 4, "", counts | rest)


def chosen_cases() -> Iterator[Case]:
    """The shapes that `gpu.chosen` launches: lists of a query head and of a group, with log weights and means."""
    kinds = {"TOKENS": "*i32"} | dict.fromkeys(("LOG_WEIGHTS", "MEAN_K", "MEAN_V", "MEAN_LOGS"), "*fp32")
    for D, (tile, stages) in chosen.TILES.items():
        for G, LINES, weighted, means in ((1, 4, False, False), (7, 1, True, False), (16, 1, True, True)):
            shape = {"LINES": LINES, "G": G, "GP": max(chosen.ROWS, triton.next_power_of_2(G)), "D": D, "N": tile}
            shape |= {"STAGES": stages, "WEIGHTED": weighted, "HAS_MEANS": means}
            yield Case(chosen.chosen_parts, shape, chosen.warps(D), "HMMA", kinds, stages)
        yield Case(chosen.chosen_merge, {"D": D, "SPLITS": chosen.MOST}, chosen.warps(D), "")


def compiled(case: Case) -> tuple[int, int, str]:
    """Registers, spilled bytes and instructions, and the machine code."""
    names = case.kernel.arg_names
    kinds = {name: _kind(name) for name in names if name not in case.settings}
    if case.kernel in (encode.encode, encode.append, prepare.prepare, moments.codes):
        kinds["CODES"] = "*u8"
    kinds |= {name: kind for name, kind in case.kinds.items() if name in kinds}
    signature = {name: kinds.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in case.settings.items()}
    aligned = [["tt.divisibility", 16]]
    attributes = {(i,): aligned for i, name in enumerate(names) if kinds.get(name, "").startswith("*") or _even(name)}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    if built.metadata.shared > SHARED:
        raise RuntimeError(
            f"{case.kernel.__name__} needs {built.metadata.shared} bytes of shared memory: {case.settings}"
        )
    return inspected(built.asm["cubin"])


def inspected(cubin: bytes) -> tuple[int, int, str]:
    """Registers, spilled bytes and instructions, and the machine code of a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        usage, code = (
            subprocess.run(
                [str(tools / "cuobjdump"), option, str(binary)],
                capture_output=True, text=True, check=True, env={"PATH": f"{tools}:/usr/bin:/bin"},
            ).stdout
            for option in ("-res-usage", "-sass")
        )  # fmt: skip
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None
    return int(found[1]), int(found[2]) + _spills(code), code


def _spills(code: str) -> int:
    """Instructions that write or read registers kept in memory."""
    return len(re.findall(r"\b(?:STL|LDL)\b", code))


def step_settings() -> Iterator[dict[str, int]]:
    """What `step.cu` is compiled with: widths, heads, codes of nibbles and of 2-bit words, warps."""
    for D, G, nibbles, crumbs, warps in (
        (128, 4, 32, 0, 8), (128, 4, 16, 8, 12), (128, 4, 16, 8, 8), (128, 4, 32, 16, 8), (128, 8, 32, 0, 8),
        (64, 7, 16, 8, 12), (64, 1, 32, 0, 8), (256, 8, 64, 0, 8),
    ):  # fmt: skip
        for systematic, page in ((1, 0), (0, 16)):
            shape = {"D": D, "G": G, "NIBBLES": nibbles, "CRUMBS": crumbs, "WARPS": warps, "STAGES": 3}
            yield shape | {"SYSTEMATIC": systematic, "REDRAW": 1, "LISTING": 0, "GROW": 1, "PAGE": page, "BF16": 1}


def prefill_settings() -> Iterator[tuple[str, dict[str, int]]]:
    """What `listed.cu`, `importance.cu` and `codes.cu` are compiled with by `gpu.hopper`."""
    for D in STAGES:
        for BF16, *lists in ((0, 1, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (1, 1, 1, 1), (1, 0, 0, 0)):
            kinds = dict(zip(("TOKENS", "BLOCKS", "MEANS"), lists, strict=True))
            yield "listed.cu", {"D": D, "BF16": BF16, **kinds, "STAGES": STAGES[D]}
        for BF16, R in ((1, 1), (1, 2), (1, 4), (0, 8), (1, 8), (1, 16), (1, 32)):
            yield "importance.cu", {"D": D, "BF16": BF16, "R": R, "STAGES": CODES_STAGES[R]}
    yield "codes.cu", {}


def _kind(name: str) -> str:
    """Triton's type of an argument, which the kernels' names give away."""
    groups = ((FLOATS, "*fp32"), (DOUBLES, "*fp64"), (HALVES, "*bf16"), (WHOLE, "*i32"), (REAL, "fp32"))
    return EIGHT.get(name) or next((kind for names, kind in groups if name in names), "i32")


def _even(name: str) -> bool:
    """Strides and capacities, which are multiples of 16 here."""
    return bool(re.fullmatch(r"\w_[bhmnp]|stride_\w|room|cap", name))


def checks() -> list[Callable[[], Told]]:
    """One per kernel and setting; those of CUDA C++ only where its compiler is."""
    found: list[Callable[[], Told]] = [partial(_of_triton, case) for case in cases()]
    if importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None:
        found += [partial(_of_step, settings) for settings in step_settings()]
        found += [partial(_of_prefill, name, settings) for name, settings in prefill_settings()]
    return found


def _of_triton(case: Case) -> Told:
    registers, spilled, code = compiled(case)
    return Told(case.kernel.__name__, case.settings, registers, spilled, spilled > 0 or case.must not in code)


def _of_step(settings: dict[str, int]) -> Told:
    from gpu.compiled import machine_code  # only where cuda-bindings is

    registers, _, code = inspected(machine_code("step.cu", settings, "sm_90a"))
    spilled = _spills(code[code.find("IMMA") : code.rfind("HMMA")])  # a scalar kept in memory across it costs nothing
    return Told("step", settings, registers, spilled, spilled > 0 or "IMMA" not in code)


def _of_prefill(name: str, settings: dict[str, int]) -> Told:
    from gpu.compiled import machine_code  # only where cuda-bindings is

    registers, spilled, code = inspected(machine_code(name, settings, "sm_90a"))
    if settings:  # of the others the loop of tiles counts: a few numbers kept in memory outside cost nothing
        spilled = _spills(code[code.find("HGMMA") : code.rfind("HGMMA")])
    allowed = SCALARS if name == "listed.cu" and settings["D"] == 128 else 0
    return Told(name, settings, registers, spilled, spilled > allowed or (bool(settings) and "HGMMA" not in code))


def main() -> int:
    """Print a line per case; 1 if one spills or lacks its instruction."""
    work, failed = checks(), False
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:  # to which kernels need not be sent
        for told in pool.map(_run, range(len(work)), chunksize=4):
            sys.stdout.write(told.line())
            failed |= told.bad
    if not any(check.func is _of_step for check in work if isinstance(check, partial)):
        sys.stdout.write("none step: cuda-bindings is not installed\n")
    return int(failed)


def _run(i: int) -> Told:
    return checks()[i]()


if __name__ == "__main__":
    sys.exit(main())
