"""Messages name flags within a command, and arguments elsewhere."""

from __future__ import annotations

import pickle
import re

import pytest

from codeact.base.errors import InputError, MissingExtraError, in_arguments, in_command
from tests.docs.test_docs import string_constants


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ("lower --max-length (now 5)", "lower max_length (now 5)"),
        ("--budget-rows and --ratio are 2 budgets", "budget_rows and ratio are 2 budgets"),
        ("say --attention sdpa, which", "say attention sdpa, which"),
        ("score again with codeact score --keep-token-nll", "score again with codeact score --keep-token-nll"),
        ("make it with: codeact embed --model m; or leave out --from embed",
         "make it with: codeact embed --model m; or leave out from embed"),
        ("pip install flash-attn --no-build-isolation", "pip install flash-attn --no-build-isolation"),
        ("cannot read /a--b/--c.json", "cannot read /a--b/--c.json"),
    ],
)  # fmt: skip
def test_the_same_error_for_both_readers(flags, arguments):
    error = pickle.loads(pickle.dumps(InputError(flags)))  # as it comes back from another process
    assert str(error) == arguments
    with in_command():
        assert str(error) == flags
        assert str(InputError(str(error))) == flags
    assert str(error) == arguments
    assert str(MissingExtraError("vllm", "vllm", "--backend vllm")).startswith("backend vllm needs vllm")


def test_no_message_keeps_a_flag_for_those_who_come_from_python():
    told = [text for text in string_constants() if " --" in text and not text.lstrip().startswith(("-", "<"))]
    assert len(told) > 40
    for text in told:
        left = re.sub(r"\b(codeact|pip|python) [a-z][^;,:()]*", "", in_arguments(text))
        assert "\n" in text or " --" not in left, text


def test_the_command_line_names_flags_and_python_arguments(codeact, tiny_model_path, tiny_model, tokenizer, tmp_path):
    from codeact.scoring.ifd import score_ifd

    rows = [{"instruction": "q", "output": "a b"}]
    with pytest.raises(InputError, match=r"^max_length is 9999; this model takes 2 to 512 tokens; lower it"):
        score_ifd(tiny_model, tokenizer, rows, max_length=9999)
    data = tmp_path / "d.csv"
    data.write_text("instruction,output\nq,a b\n")
    arguments = ("score", data, "--model", tiny_model_path, "--output", tmp_path / "s")
    code, _, err = codeact(*arguments, "--max-length", 9999)
    assert code == 2
    assert "error: --max-length is 9999; this model takes 2 to 512 tokens; lower it" in err


def test_nothing_said_is_what_the_model_takes(tiny_model, tokenizer, caplog):
    from codeact.scoring.ifd import IfdScorer, score_ifd

    assert score_ifd(tiny_model, tokenizer, [{"instruction": "q", "output": "a b"}])["status"].to_pylist() == ["ok"]
    with caplog.at_level("INFO"):
        assert IfdScorer(tiny_model, tokenizer).max_length == 512
    assert "sequences of at most 512 tokens: the model has no more positions" in caplog.text
