"""Text by every policy on a tiny model; what is shown is what was read; what cannot be done is refused."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from attention import Certified, Sampled, TopR
from tests.cli.test_app import invoked

torch = pytest.importorskip("torch", reason="the model runs in torch")
transformers = pytest.importorskip("transformers", reason="the model is transformers'")
tokenizers = pytest.importorskip("tokenizers")

from benchmarks.cli import decoding, generate, language_model, policies, reading, terminal  # noqa: E402
from benchmarks.cli.decoding import Bound, Step  # noqa: E402
from hsr.errors import ArgumentError  # noqa: E402
from tests.tiny_llama import CONTEXT, HEADS, LAYERS, VOCABULARY, tiny_model  # noqa: E402

PROMPT, TOKENS = "keys that matter are few; " * 4, 6
TEMPLATE = "{% for turn in messages %}<{{ turn.content }}>{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights whose tokens are letters."""
    found = tmp_path_factory.mktemp("tiny")
    letters = {chr(32 + i): i for i in range(VOCABULARY - 1)} | {"?!": VOCABULARY - 1}
    reader = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="?!"))
    reader.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    reader.decoder = tokenizers.decoders.Fuse()
    transformers.PreTrainedTokenizerFast(tokenizer_object=reader, unk_token="?!").save_pretrained(found)
    model = tiny_model()
    model.generation_config.eos_token_id = None
    model.save_pretrained(found)
    return found


def generated(folder: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The text's lines, and the rows of the table."""
    status, out, err = invoked("generate", str(folder), PROMPT, "--tokens", str(TOKENS), *arguments)
    assert (status, err) == (0, "")
    text, _, table = out.partition("┌")
    rows = [line.split("│")[1:3] for line in table.splitlines() if line.startswith("│")]
    return text.splitlines(), {name.strip(): value.strip() for name, value in rows}


def plain(folder: Path, prompt: str) -> str:
    """What transformers' own greedy search writes."""
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = reader(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None)
    return reader.decode(made[0, ids["input_ids"].shape[1] :])


@pytest.mark.parametrize("arguments", [["--policy", "dense"], ["--policy", "certified", "--eps", "0"]])
def test_a_policy_that_keeps_every_key_writes_what_transformers_does(folder: Path, arguments: list[str]) -> None:
    text, rows = generated(folder, *arguments)
    assert text == plain(folder, PROMPT).splitlines()
    assert rows["tokens"] == f"{TOKENS} of {TOKENS}"
    assert rows["prompt"] == f"{len(PROMPT)} tokens, attention dense"
    dense = arguments[1] == "dense"
    assert rows["keys attended to"] == ("all: no step was sparse" if dense else f"100.0%, of {TOKENS - 1} sparse steps")
    assert rows["certificate"].startswith("dense: nothing" if dense else "deterministic: holds for every input")


def test_what_was_read_is_counted_and_what_is_known_is_said(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "page.html"
    _, rows = generated(
        folder, "--policy", "topr", "--r", "10", "--prefill", "block-sampled", "--prefill-set", "density=1", "--html",
        str(page),
    )  # fmt: skip
    visible = len(PROMPT) + TOKENS - 1
    heads = LAYERS * HEADS
    assert rows["of them, last step"].startswith(f"{10 * heads} of {visible * heads:,} ")
    assert rows["steps"] == "attention TopR(r=10)"
    assert rows["prompt"].endswith("attention BlockSampled(density=1.0)")
    assert 0 < float(rows["dropped mass, at most"]) < 1
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 1
    assert "<td>attention TopR(r=10)</td>" in text and f"<p>{reading.LEGEND}</p>" in text
    assert "keys read" not in text
    assert PROMPT.strip() in text


def test_a_page_shows_texts_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, answer, model, policy, value = (f"<script>{i} & {i}</script>" for i in range(5))
    monkeypatch.setattr("sys.argv", ["hsr", f"<script>{5} & {5}</script>"])
    setting = reading.Setting(model, policy, "dense", 9, 4)
    text = generate.report(setting, prompt, answer, [("name", value)], [Step(33, 0.5, 0, 0, None)], 1.0)
    assert "<script>" not in text
    for i in range(6):
        assert f"&lt;script&gt;{i} &amp; {i}&lt;/script&gt;" in text


def test_a_certificate_is_as_strong_as_its_policy(folder: Path) -> None:
    _, rows = generated(folder, "--budget", "8", "--set", "recent=4", "--seed", "3")
    assert rows["steps"] == "attention Sampled(budget=8.0, recent=4, seed=3)"
    assert rows["certificate"] == "statistical: each bound holds at about 95%"
    assert rows["dropped mass, at most"] == "made up for by the sample's weights"
    _, rows = generated(folder, "--policy", "quest", "--budget", "16", "--dense-layer", "1", "--dense-layer", "2")
    assert rows["certificate"] == "none: the policy claims nothing of its error"
    assert rows["of them, last step"] == f"{13 * HEADS} of {109 * HEADS} (11.9%)", "the newest page is not full"
    _, rows = generated(folder, "--dense-below", "999")
    assert rows["keys attended to"] == "all: no step was sparse"


def test_draws_follow_the_seed_and_prompts_come_from_files(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    arguments = ["--policy", "dense", "--temperature", "2"]
    first, second, third = (generated(folder, *arguments, "--seed", seed)[0] for seed in "112")
    assert first == second != third
    done = invoked("generate", str(folder), "and so", "--prompt-file", str(file), "--tokens", "1", "--policy", "dense")
    assert f"{len(PROMPT) + len('and so') + 2} tokens, attention dense" in done[1]


def test_a_turn_is_written_by_the_template(folder: Path) -> None:
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ArgumentError, match="has none"):
        language_model.encoded(reader, "hi", chat=True)
    reader.chat_template = TEMPLATE
    assert language_model.encoded(reader, "hi", chat=True) == reader("<hi>")["input_ids"]


def test_generation_ends_with_the_text(folder: Path) -> None:
    model = language_model.loaded(str(folder), None, "cpu", "auto", 20, stretch=False)

    def made() -> list[Step]:
        cache = generate.HSRCache(model.config, decode=TopR(3), dense_below=0)
        return list(decoding.steps(model, range(9), cache, TOKENS, 0.0, 0))

    tokens = [step.token for step in made()]
    assert len(tokens) == TOKENS
    model.generation_config.eos_token_id = [tokens[2]]
    assert [step.token for step in made()] == tokens[: tokens.index(tokens[2]) + 1]


def test_the_live_view_shows_the_end_of_the_text_and_vanishes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=110, height=20, color_system=None)
    monkeypatch.setattr(terminal, "results", lambda: console)
    steps = [Step(33 + i, 0.5, 100 * (i > 0), 7, Bound("deterministic", 1.0, 0.01, (0.1, math.inf))) for i in range(4)]
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    setting = reading.Setting("tiny", "TopR()", "dense", 9, 4)
    assert generate.shown(setting, reader, steps[:1], iter(steps[1:])) == ("ABCD", True)
    seen = screen.getvalue()
    for part in ("ABCD", "7.0%, of 3 sparse steps", "0.1, worst unbounded", "500"):
        assert part in seen
    assert seen.rstrip().endswith("ABCD")
    narrow = Console(width=60, height=30, file=io.StringIO(), record=True)
    narrow.print(reading.view("first\n" * 40 + "last", reading.rows(setting, steps), 60, 30))
    lines = narrow.export_text().splitlines()
    assert len(lines) <= 30
    assert any("last" in line for line in lines)


@pytest.mark.parametrize("seen", [True, False])
def test_who_stops_the_text_keeps_it(folder: Path, seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopping() -> Iterator[Step]:
        yield Step(34, 0.5, 0, 0, None)
        raise KeyboardInterrupt

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=seen, width=110, height=20, color_system=None)
    monkeypatch.setattr(terminal, "results", lambda: console)
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    setting, made = reading.Setting("tiny", "TopR()", "dense", 9, 4), [Step(33, 0.5, 0, 0, None)]
    assert generate.shown(setting, reader, made, stopping()) == ("AB", False)
    assert screen.getvalue().rstrip().endswith("AB") and len(made) == 2


def test_a_text_that_is_stopped_ends_with_its_figures_and_page(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = decoding.steps

    def stopping(*call: Any) -> Iterator[Step]:
        yield from itertools.islice(steps(*call), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "steps", stopping)
    page = tmp_path / "page.html"
    status, out, _ = invoked("generate", str(folder), PROMPT, "--policy", "topr", "--html", str(page))
    assert status == 130 and "3 of 64" in out and "3 tokens" in page.read_text()


def test_a_reading_of_the_last_step_alone_is_not_subtracted() -> None:
    summed, alone = (decoding.Reading(keys, keys // 2, steps, []) for keys, steps in ((30, 3), (12, 1)))
    none, two = decoding.Reading(0, 0, 0, []), decoding.Reading(20, 12, 2, [])
    assert decoding.read(two, summed) == (10, 3)
    assert decoding.read(none, alone) == (12, 6)
    assert decoding.read(alone, alone) == (12, 6), "as a step that is one launch on a GPU reports"
    assert decoding.read(none, none) == (0, 0)


def test_every_policy_can_be_named_and_has_its_options_listed() -> None:
    status, out, _ = invoked("generate", "--list")
    assert status == 0
    for name, entry in policies.table().items():
        stage = "decode" if entry.decode else "prefill"
        made = policies.policy(stage, name, {})
        assert (type(made) is entry.policy) or made is entry.policy is None
        assert f"│ {name} " in out
    assert {"quest", "tactic", "flex-prefill", "minference", "skip-softmax"} <= set(policies.table())


def test_options_become_what_the_dataclass_says() -> None:
    assert policies.policy("decode", "sampled", {}) == Sampled(eps=0.05)
    given = {"budget": "9", "redraw": "no", "draw": "independent", "bytes_per_key": "16"}
    assert policies.policy("decode", "sampled", given) == Sampled(
        budget=9.0, redraw=False, draw="independent", bytes_per_key=16
    )
    assert policies.policy("prefill", "certified", {"bytes_per_key": "none"}) == Certified()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--policy", "qest"], "the decode policy must be one of dense, topr, certified, sampled, "),
        (["--prefill", "quest"], "the prefill policy must be one of dense, topr, certified, sampled, block-sampled"),
        (["--policy", "topr", "--eps", "1"], "the decode policy topr has no option eps; its options are r"),
        (["--policy", "dense", "--set", "r=1"], "the decode policy dense has no option r; it has none"),
        (["--policy", "topr", "--r", "few"], "the option r must be int or none; got 'few'"),
        (["--set", "redraw=perhaps"], "the option redraw must be bool; got 'perhaps'"),
        (["--set", "redraw"], "must be NAME=VALUE; got 'redraw'"),
        (["--eps", "2"], "eps must be in "),
        (["--dense-below", "-1"], "--dense-below must be a number of tokens or auto; got '-1'"),
        (["--dense-layer", "7"], "dense_layers must be in 0..2; got 7"),
        (["--dtype", "int8"], "--dtype must be auto, float32, bfloat16, float16; got 'int8'"),
        (["--device", "nowhere"], "--device must be cpu or cuda, with a number where there are more; got 'nowhere'"),
        (["--device", "meta"], "--device must be cpu or cuda, with a number where there are more; got 'meta'"),
        (["--device", "mps"], "--device must be cpu or cuda, with a number where there are more; got 'mps'"),
        (["--tokens", "999"], f"must fit the model's context of {CONTEXT}; they are {len(PROMPT) + 999:,}"),
        (["--prompt-file", "no such file"], "--prompt-file must be a text file that can be read"),
        (["--chat"], "this one has none"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(folder: Path, arguments: list[str], reason: str) -> None:
    status, out, err = invoked("generate", str(folder), PROMPT, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("hsr generate: ")
    assert reason in err
    assert err.count("\n") == 1


def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "tokenizer", lambda *call: pytest.fail("the work was begun"))
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "page.html"):
        status, out, err = invoked("generate", str(folder), PROMPT, "--html", str(path))
        assert (status, out) == (2, "") and err.startswith("hsr generate: --html must name a file")


@pytest.mark.parametrize("temperature", ["5e-324", "1e-40", "1e300", "inf"])
def test_any_temperature_gives_a_text(folder: Path, temperature: str) -> None:
    """Near 0 it is the likeliest; no logits overflow."""
    text, _ = generated(folder, "--policy", "dense", "--temperature", temperature)
    if float(temperature) < 1:
        assert text == plain(folder, PROMPT).splitlines()


def test_a_model_that_is_not_there_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(*arguments: Any) -> str:
        status, out, err = invoked("generate", *map(str, arguments))
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        return err

    assert "MODEL must be given" in reason()
    assert "PROMPT or --prompt-file must be given" in reason(folder)
    assert "at least one token" in reason(folder, "")
    assert "a folder that exists" in reason(tmp_path / "none", "hi")
    assert "a file that exists where it ends with .gguf" in reason("none.gguf", "hi")
    for model in ("smollm2", "X.gguf"):
        assert f"--gguf needs a MODEL that is a folder or repository; got {model}" in reason(model, "hi", "--gguf", "y")
    said = reason(tmp_path, "hi")
    assert "could not be loaded" in said and not said.rstrip().endswith(":") and len(said) < 500
    monkeypatch.setattr(language_model.smollm, "MODEL_PACKAGE", "no_such_package")
    assert "make .venv/.demo" in reason("smollm2", "hi")
