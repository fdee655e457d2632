"""The documentation holds: its commands run, its options are the real ones, its links lead somewhere.

A block that cannot run here has a comment directly above it, ``<!-- not run: REASON -->``; what it says must still be
possible: commands, flags, modules, extras and files have to exist. Every other console, python and yaml block is run
in the order of its page, with small models in the place of those that `make demo` leaves.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

from codeact.base.settings import same_flags
from codeact.cli import app
from codeact.data.records import write_jsonl
from tests.conftest import make_records
from tests.docs.markdown_pages import (
    PAGES,
    ROOT,
    Block,
    Command,
    anchors,
    blocks,
    commands,
    inline_code,
    links,
    name_of,
    prose,
    rows,
    sections,
)
from tests.docs.shell import EMBEDDER, MODEL, PROGRAMS, Shell, compare, file_name, without_settings

# On which page a command's options are told, below a heading "Options of `codeact NAME`".
OPTIONS = {
    "harvest": "data.md",
    "score": "score.md",
    "ppl": "score.md",
    "merge": "score.md",
    "status": "score.md",
    "launch": "cluster.md",
    "embed": "embed.md",
    "clean": "clean.md",
    "select": "select.md",
    "train": "train.md",
    "pack-stats": "pack-stats.md",
    "pack": "pack.md",
    "generate": "evaluate.md",
    "sanitize": "evaluate.md",
    "evaluate": "evaluate.md",
    "verify": "evaluate.md",
    "run": "run.md",
    "lab": "lab.md",
    "report": "report.md",
    "doctor": "backends.md",
    "demo": "run.md",
}

# only ever in blocks that are not run
FOREIGN = {"apt-get", "git", "trl", "axolotl", "docker", ".", "srun", "sbatch", "kubectl", "ray"}

by_name = pytest.mark.parametrize("page", PAGES, ids=name_of)


# ------------------------------------------------------------------------------------------------ what the pages run on


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small_model(tmp_path_factory, tokenizer) -> Path:
    """As ``tiny_model_path``, with positions for the lengths that the pages use."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small-llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=8192, initializer_range=0.3, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small_embedder(tmp_path_factory, embedder_path) -> Path:
    """One random layer in the place of MiniLM's six, and its tokenizer."""
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel

    encoder = SentenceTransformer(str(embedder_path), device="cpu")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    encoder[0].auto_model = BertModel(config)
    folder = tmp_path_factory.mktemp("small-embedder")
    encoder.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def eval_data(tmp_path_factory) -> Path:
    """Two tasks of each data set."""
    folder = tmp_path_factory.mktemp("eval-data")
    for name, prefix in (("HumanEvalPlus", "HumanEval"), ("MbppPlus", "Mbpp")):
        tasks = [
            {
                "task_id": f"{prefix}/{n}",
                "prompt": f'def f{n}(x):\n    """Add {n}."""\n',
                "entry_point": f"f{n}",
                "canonical_solution": f"    return x + {n}\n",
                "base_input": [[1]],
                "plus_input": [[2], [2.5]],
                "atol": 0,
            }
            for n in (90, 91)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return folder


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys, caplog, small_model, small_embedder, eval_data) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CODEACT_EVAL_DATA", str(eval_data))
    monkeypatch.setenv("CODEACT_CACHE", str(tmp_path / "cache"))
    write_selected(tmp_path / "selected.jsonl")
    return Shell(monkeypatch, capsys, caplog, {MODEL: str(small_model), EMBEDDER: str(small_embedder)})


def write_selected(path: Path) -> None:
    """What codeact select would have left, for the pages after it."""
    turns = [(("user", record.question), ("assistant", record.answer)) for record in make_records(30)]
    write_jsonl(
        path,
        [
            {"id": str(n), "messages": [{"role": r, "content": c} for r, c in pair], "ifd": 0.5, "cluster": 0}
            for n, pair in enumerate(turns)
        ],
    )


# ------------------------------------------------------------------------------------------------------------ the tests


@by_name
def test_the_page_runs(page, shell):
    if page.name in ("clean.md", "coming-from.md"):
        pytest.importorskip("rensa", reason="rensa is in the extra clean")
    for block in blocks(page):
        if "not run" not in block.marks:
            shell.run(block)
    if shell.left_out:
        pytest.skip(f"nothing isolates programs here: {'; '.join(shell.left_out)}")


@by_name
def test_what_is_not_run_could_be(page):
    for block in blocks(page):
        if block.language == "yaml":
            check_yaml(block)
        elif block.language == "console" and "not run" in block.marks:
            for command in commands(block):
                check_command(command)
        elif block.language == "python":
            compile(block.text, block.place, "exec")


def check_yaml(block: Block) -> None:
    content = yaml.safe_load(block.text)
    if "not run" not in block.marks:
        users = [c.text for b in blocks(block.page) if b.language == "console" for c in commands(b)]
        name = file_name(block)
        assert any(name and name in text for text in users), f"{block.place}: no command of the page uses {name}"
    elif "axolotl" not in block.marks["not run"]:
        for name in content:
            assert f"--{name}" in train_flags(), f"{block.place}: codeact train has no flag {name}"


def check_command(command: Command) -> None:
    place = f"{command.block.place}: $ {command.text}"
    _, words = without_settings(command.words())
    if not words:
        return
    for word in words:
        if word.startswith(("codeact/", "benchmarks/", "docs/")):
            assert (ROOT / word).exists(), f"{place}: there is no {word}"
    program = words[0]
    if program == "codeact":
        check_codeact(place, words[1:])
    elif program in ("python", "torchrun", "accelerate"):
        at = words.index("-m")
        assert importlib.util.find_spec(words[at + 1]), f"{place}: there is no module {words[at + 1]}"
        if words[at + 1] == "codeact":
            check_codeact(place, words[at + 2 :])
    elif program in ("pip", "uv"):
        check_pip(place, words[1:])
    elif program == "make":
        for target in words[1:]:
            assert "=" in target or re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), place
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests")), place
    else:
        assert program in PROGRAMS | FOREIGN, f"{place}: an unknown program"


def check_codeact(place: str, words: list[str]) -> None:
    name, *rest = words
    if name == "train":
        unknown = [w for w in rest if w.startswith("--") and w.split("=")[0] not in train_flags()]
        assert not unknown, f"{place}: codeact train has no {unknown[0]}"
        return
    command = cli_command(name)
    assert command is not None, f"{place}: there is no codeact {name}"
    try:
        command.make_context(name, list(rest))
    except Exception as error:  # typer's own, of its private copy of click
        raise AssertionError(f"{place}: {error}") from None


def check_pip(place: str, words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        for extra in (
            name for group in re.findall(r"^(?:codeact|\.)\[([\w,-]+)\]$", word) for name in group.split(",")
        ):
            assert extra in extras, f"{place}: there is no extra {extra}"
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file(), place


@functools.cache
def cli_command(name: str) -> Any:
    return typer.main.get_command(app).commands.get(name)  # type: ignore[attr-defined]


def train_parser() -> Any:
    from codeact.training.flags import flag_parser

    return flag_parser()


@functools.cache
def train_flags() -> set[str]:
    return set(train_parser()._option_string_actions)


def own_train_options() -> dict[str, Any]:
    """Flags of our own with their defaults."""
    from codeact.training.flags import OWN

    return {f"--{field.name}": field.default for part in OWN for field in dataclasses.fields(part)}


def cli_options(name: str) -> dict[str, Any]:
    """Flags of a command with their defaults; a flag of several names by the first."""
    if name == "train":
        return own_train_options()
    found: dict[str, Any] = {}
    for option in cli_command(name).params:
        if option.param_type_name == "option" and option.name != "help" and not option.hidden:
            found[option.opts[0]] = "required" if option.required else option.default
    return found


@pytest.mark.parametrize("command", sorted(typer.main.get_command(app).commands))  # type: ignore[attr-defined]
def test_every_option_is_told_with_its_default(command):
    assert command in OPTIONS, f"which page tells the options of codeact {command}?"
    page = ROOT / "docs" / OPTIONS[command]
    told = {}
    for first, default, *_ in rows(sections(page).get(f"Options of `codeact {command}`", "")):
        told[inline_code(first)[0]] = default
    real = cli_options(command)
    assert set(told) == set(real), f"{name_of(page)} differs from codeact {command} --help"
    for flag, default in real.items():
        wanted = {"required": "required", "False": "off", "True": "on"}.get(str(default), f"`{default}`")
        if command == "train" and isinstance(default, bool):
            wanted = f"`{default}`"
        assert default is None or told[flag] == wanted, f"{flag}: the page says {told[flag]}, the command {default}"


@by_name
def test_flags_and_commands_in_the_text_exist(page):
    known = {option for name in OPTIONS if cli_command(name) for option in _opts(name)} | train_flags()
    known |= {f"--{other}" for option in known for other in same_flags(option.removeprefix("--"))}
    known |= {"--help", "--help_all", "--version", "--nproc_per_node", "--config_file"}
    known |= {"--quick", "--full", "--wheels", "--newest", "--tests"}  # of the benchmarks and the matrix
    known |= {"--cap-add", "--security-opt", "--index-url", "--no-build-isolation"}  # of docker and pip
    text = prose(page)
    if page.name in ("coming-from.md", "CHANGELOG.md"):  # whose first columns are other tools' flags
        text = re.sub(r"^\|[^|\n]*\|", "|", text, flags=re.M)
    for code in inline_code(text):
        for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", code):
            assert flag in known, f"{name_of(page)}: {code}: no command has {flag}"
        if named := re.match(r"codeact ([a-z][a-z-]*)\b(?! \|)", code):
            assert cli_command(named[1]), f"{name_of(page)}: there is no {code}"


def _opts(name: str) -> list[str]:
    return [opt for option in cli_command(name).params for opt in (*option.opts, *option.secondary_opts)]


@by_name
def test_messages_are_those_of_the_code(page):
    """Left of a remedy stands a message of ours, "..." where it varies."""
    texts = string_constants()
    for title, body in sections(page).items():
        if title.startswith("What goes wrong"):
            for first, *_ in rows(body):
                for message in inline_code(first):
                    for part in filter(None, message.split("...")):
                        assert any(part in text for text in texts), f"{name_of(page)}: no message has {part!r}"


@functools.cache
def string_constants() -> list[str]:
    found = []
    for path in [*(ROOT / "codeact").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "setup.py"]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    return found


def test_every_environment_variable_is_told():
    used = {
        name
        for folder in ("codeact", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"\bCODEACT_[A-Z_]+", path.read_text(encoding="utf-8"))
    }
    assert used == {
        name
        for row in rows(sections(ROOT / "docs/backends.md")["Environment variables"])
        for name in re.findall(r"\bCODEACT_[A-Z_]+", row[0])
    }


@by_name
def test_links_lead_somewhere(page):
    for target in links(page):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)}: {target} leads nowhere"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)}: {target}: no such heading"


def test_every_page_is_reached_from_the_readme():
    reached = {(ROOT / target.partition("#")[0]).resolve() for target in links(ROOT / "README.md")}
    assert set(PAGES) - {ROOT / "README.md"} <= reached


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```console\n$ codeact sccore x\n```\n", "there is no codeact sccore"),
        ("```console\n$ codeact score x --model M --output O --max-lenght 5\n```\n", "--max-lenght"),
        ("```console\n$ torchrun --nproc_per_node 8 -m codeact train --lorra True\n```\n", "--lorra"),
        ("```console\n$ python -m benchmarks.nothing\n```\n", "nothing"),
        ("```console\n$ pip install 'codeact[evil]'\n```\n", "evil"),
        ("```console\n$ curl example.org\n```\n", "unknown program"),
    ],
)
def test_a_wrong_block_is_seen(tmp_path, monkeypatch, text, message):
    page = tmp_path / "wrong.md"
    page.write_text(f"# Wrong\n\n<!-- not run: needs a device -->\n{text}")
    monkeypatch.setattr("tests.docs.markdown_pages.ROOT", tmp_path)
    with pytest.raises((AssertionError, ModuleNotFoundError), match=message):
        test_what_is_not_run_could_be(page)


def test_output_that_differs_is_seen():
    compare("", ["96 conversations in selected.jsonl"], "12 conversations in selected.jsonl\n")
    compare("", ["codeact: error: row 12 of ... is 3.5"], "codeact: error: row 7 of /tmp/x is 1,000\n")
    with pytest.raises(AssertionError, match="96 chosen in"):
        compare("", ["96 chosen in selected.jsonl"], "12 conversations in selected.jsonl\n")
    with pytest.raises(AssertionError):
        compare("", ["codeact: error: row 12 is bad"], "codeact: error: row 12 is bad; mend it\n")
