"""The README says what the code says: its generated blocks are current and its Python runs."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pytest

from benchmarks.readme_table import README, blocks, decode, inserted, performance

FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_generated_blocks_are_current() -> None:
    text = README.read_text()
    assert inserted(text, blocks()) == text, "run python -m benchmarks.readme_table"


def test_python_fences_run_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = README.read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    fences = list(FENCE.finditer(text))
    assert fences, "the README shows no Python"
    for fence in fences:
        line = text.count("\n", 0, fence.start(1))
        if ">>>" not in fence[1]:
            exec(compile("\n" * line + fence[1], "README.md", "exec"), names)
            continue
        example = doctest.DocTestParser().get_doctest(fence[1], names, "README.md", "README.md", line)
        output: list[str] = []
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=output.append, clear_globs=False)
        assert not output, "".join(output)
        names.update(example.globs)


def test_a_block_replaces_what_stood_between_its_markers() -> None:
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n"
    new = inserted(text, {"x": "new"})
    assert new == "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb\n"
    assert inserted(new, {"x": "new"}) == new


@pytest.mark.parametrize(
    "text", ["", "<!-- x:begin -->", "<!-- x:end --> <!-- x:begin -->", "<!-- x:begin --> <!-- x:end -->" * 2]
)
def test_broken_markers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must have <!-- x:begin -->"):
        inserted(text, {"x": "new"})


def test_the_performance_table_shows_the_best_of_each_side() -> None:
    times = {"numpy": 4.0, "faiss": 2.0, "brute": 1.0, "reference": 8.0}
    rows = [
        {"n": 1024, "d": 2, "reported": 10, "m": m, "method": method, "ms": ms, "speedup_vs_best_baseline": 2.0 / ms}
        for m in (1, 64)
        for method, ms in times.items()
    ]
    measured = {"cpu": "a CPU", "threads": 2, "commit": "0123456789abcdef", "command": "a command", "rows": rows}
    table = performance(json.loads(json.dumps(measured)))
    assert "| 1,024 | 2 | 10 | 2 (faiss) | 1 (brute) | 2.0x | 2 (faiss) | 1 (brute) | 2.0x |" in table
    assert "a CPU, 2 threads, commit 0123456789, `a command`" in table


def test_the_decode_table_shows_the_fastest_sample_of_each_size() -> None:
    head = {"cpu": "chip", "threads": 2, "commit": "0123456789abcdef", "command": "run", "device": "board"}
    times = {"dense": 9.0, "sampled-32B+append": 2.0, "sampled-16B+append": 1.0, "sampled-16B": 0.5, "topr": 0.1}
    shown = {"shape": "llama-3.1-8b", "n": 8192, "dtype": "float32", "dense_best_ms": 5.0, "rel_err": 0.009}
    cpu = [
        shown | {"policy": policy, "ms": ms, "speedup": 5.0 / ms, "keys_per_head": 1234.0}
        for policy, ms in times.items()
    ]
    cpu += [row | {"shape": "smollm2-135m"} for row in cpu]
    measured = {
        "B": 1,
        "d": 128,
        "dense_best_us": 30.0,
        "us": 10.0,
        "speedup": 3.0,
        "rel_err": 0.05,
        "union_keys": 700.4,
    }
    gpu = [measured | {"n": n, "policy": policy} for n in (16384, 32768) for policy in ("fast", "quality", "nibbles")]
    lines = decode(head | {"rows": cpu}, head | {"rows": gpu}).splitlines()
    assert lines[2:5] == [
        "| CPU | 8,192 | float32 | 5 ms | 1 ms | 5.0x | 0.90% | 1,234 |",
        "| GPU, fast | 32,768 | bfloat16 | 30 us | 10 us | 3.0x | 5.00% | 768 |",
        "| GPU, quality | 32,768 | bfloat16 | 30 us | 10 us | 3.0x | 5.00% | 768 |",
    ]
    assert lines[5] == ""
    assert "chip" in lines[6]
    assert "board" in lines[6]
    assert "down to 2.5x on the CPU (d = 64) and 3.0x on the GPU" in lines[6]
