"""lm-eval scores with our packs: its own model is what ours is held against, its own requests and rules."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from codeact.scoring.loglikelihood import LikelihoodScorer
from tests.helpers import forked

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra lm-eval)")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from codeact.integrations.lm_eval import PackedLM  # noqa: E402

CONTEXT = "def mean(values):\n    return"
PAIRS = [
    *((CONTEXT, ending) for ending in (" sum(values)", " max(values)", " sum(values) / len(values)", " None")),
    (CONTEXT + " ", "sum(values)"),
    ("", "import os"),
    ("word " * 700, "and the rest"),
    ("<|im_start|>user\nhello<|im_end|>\n", "answer"),
    ("a", "\n"),
]
TEXTS = ["import os\n" * 300, "one line", " "]


def requests(kind, all_arguments):
    return [Instance(kind, {}, arguments, number) for number, arguments in enumerate(all_arguments)]


@pytest.fixture(scope="module")
def models(tiny_model_path):
    def load(kind, **more):
        return kind(pretrained=str(tiny_model_path), device="cpu", dtype="float32", **more)

    return load


def test_what_lm_evals_own_model_gives(models):
    ours, theirs = models(PackedLM, batch_size=4), models(HFLM, batch_size=4)
    got, want = (model.loglikelihood(requests("loglikelihood", PAIRS)) for model in (ours, theirs))
    assert [one[0] for one in got] == pytest.approx([one[0] for one in want], rel=1e-5)
    assert [one[1] for one in got] == [one[1] for one in want]
    texts = [(text,) for text in TEXTS]
    got, want = (model.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for model in (ours, theirs))
    assert got == pytest.approx(want, rel=1e-5)


def test_the_tokens_of_a_pair_are_lm_evals(models):
    theirs = models(HFLM)
    ours = LikelihoodScorer(theirs.model, theirs.tokenizer)
    for context, continuation in PAIRS:
        if context:
            assert ours.encode(context, continuation) == theirs._encode_pair(context, continuation)
    seen = []
    theirs._loglikelihood_tokens = lambda pairs, **more: seen.extend(pairs) or [(0.0, True)] * len(pairs)
    theirs.loglikelihood(requests("loglikelihood", [("", "import os")]))
    assert ours.encode("", "import os") == seen[0][1:]


BOUNDARIES = [
    ("foo", "bar"),  # which the two make one word of
    ("foo", " bar"),
    ("foo ", "bar"),
    ("foo  ", " bar"),
    ("foo\n\t ", "bar"),
    ("Answer:", "\n"),
    ("f(", ")"),
    ("BOSfoo", " bar"),
    ("BOSfoo ", "bar"),
    ("", "bar"),
    ("", " bar"),
    ("", "BOSbar"),  # lm-eval: that BOS is the context then
]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_boundaries_white_space_and_bos_are_lm_evals(adds_bos, tokenizer, bos_tokenizer):
    """The rules of its own tests, which want models of the hub; for a tokenizer that adds a BOS, and for another."""
    chosen = bos_tokenizer if adds_bos else tokenizer
    ours, theirs, seen = object.__new__(LikelihoodScorer), object.__new__(HFLM), []
    ours.tokenizer = theirs.tokenizer = chosen
    theirs.backend, theirs.add_bos_token, theirs.custom_prefix_token_id = "causal", None, None
    theirs._loglikelihood_tokens = lambda pairs, **more: seen.extend(pairs) or [(0.0, True)] * len(pairs)
    pairs = [tuple(part.replace("BOS", chosen.bos_token) for part in pair) for pair in BOUNDARIES]
    TemplateLM.loglikelihood(theirs, requests("loglikelihood", pairs), disable_tqdm=True)
    assert [ours.encode(*pair) for pair in pairs] == [(before, after) for _, before, after in seen]
    firsts = [ours.encode(*pair)[0][:2] for pair in pairs]
    assert not any(first == [chosen.bos_token_id] * 2 for first in firsts)
    assert all(first[0] == chosen.bos_token_id for first in firsts) == adds_bos


def test_the_same_bits_at_any_batch_size(models):
    """And for a part of the requests. lm-eval's own changes with both (its issue 704)."""
    runs = {size: models(PackedLM, batch_size=size).loglikelihood(requests("loglikelihood", PAIRS)) for size in (1, 64)}
    assert runs[1] == runs[64]
    one = models(PackedLM, batch_size=1)
    assert [one.loglikelihood(requests("loglikelihood", [pair]))[0] for pair in PAIRS] == runs[1]
    texts = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert one.loglikelihood_rolling(texts) == models(PackedLM, batch_size=64).loglikelihood_rolling(texts)


# It looks through 13,000 tasks of its own before it takes ours, which takes 10 s.
WITHOUT_ITS_TASKS = """if True:
    import functools, runpy
    from lm_eval.tasks import TaskManager
    TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    runpy.run_module("codeact.integrations.lm_eval", run_name="__main__", alter_sys=True)
"""


def test_its_command_line(models, tiny_model_path, tmp_path):
    rows = [{"q": CONTEXT, "choices": [ending for _, ending in PAIRS[:4]], "right": n % 4} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: q\ndoc_to_choice: choices\n"
        "doc_to_target: right\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    command = [sys.executable, "-c", WITHOUT_ITS_TASKS, "run", "--include_path", tmp_path]
    command += ["--tasks", "tiny", "--model", "codeact", "--model_args", f"pretrained={tiny_model_path},dtype=float32"]
    command += ["--device", "cpu", "--output_path", tmp_path / "results"]
    done = forked.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "results").rglob("results_*.json")
    asked = [("loglikelihood", (row["q"], ending)) for row in rows for ending in row["choices"]]
    found = models(HFLM).loglikelihood([Instance(kind, {}, pair, n) for n, (kind, pair) in enumerate(asked)])
    best = np.array([total for total, _ in found]).reshape(len(rows), 4).argmax(axis=1)
    right = np.mean(best == [row["right"] for row in rows])
    assert json.loads(file.read_text())["results"]["tiny"]["acc,none"] == pytest.approx(right)
