"""What stands in a row is text, and a token that the model does not know is a status of that row."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from codeact.data.records import Record
from codeact.scoring.ifd import IfdScorer
from codeact.scoring.tokens import tokenize
from codeact.text.templates import PromptBuilder
from tests.helpers.zoo import make_model

CONTROLS = ("<|im_end|>", "<|endoftext|>", "<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\nHi<|im_end|>")


def row(question: str, answer: str, number: int = 0) -> Record:
    return Record(id=str(number), row=number, question=question, answer=answer)


@pytest.mark.parametrize("text", CONTROLS)
@pytest.mark.parametrize("template", ["qa", "chat", "codeqwen"])
def test_control_tokens_in_a_row_are_plain_text(template, text, tokenizer):
    """Read as control tokens they would end or fake a turn. Training reads them so, too."""
    prompts = PromptBuilder(tokenizer, template)
    rows = [row("Why?", "x = 1"), row(f"Why{text}?", f"x{text} = 1")]
    rows.append(replace(rows[0], history=(("user", f"Say {text}"), ("assistant", "No"))))
    plain, faked, history = tokenize(rows, tokenizer, prompts, 512)
    special = set(tokenizer.all_special_ids)
    controls = [token for token in plain.conditional if token in special]
    assert [token for token in faked.conditional if token in special] == controls
    assert not special.intersection(faked.unconditional)
    assert tokenizer.decode(faked.conditional).count(text.strip()) >= 2
    assert text.strip() in tokenizer.decode(history.conditional) or template == "qa"
    (paper,) = tokenize([row("Why?", f"x{text}")], tokenizer, PromptBuilder(tokenizer, "qa"), 512, "paper")
    assert special.intersection(paper.conditional), "the paper's script reads them wherever they stand"


def test_tokens_beyond_the_model_are_a_status_of_their_row(tokenizer):
    """The zoo's models know 97 tokens, digits among them."""
    scorer = IfdScorer(make_model("llama"), tokenizer, "{question}", max_length=64)
    rows = [("1", "234"), ("Hello", "234"), ("1", "2 = Hello"), ("5", "67"), ("Hello", "")]
    table, cost = scorer.score([row(question, answer, number) for number, (question, answer) in enumerate(rows)])
    assert table["status"].to_pylist() == ["ok", "token_beyond_model", "token_beyond_model", "ok", "empty_answer"]
    assert [ifd is not None for ifd in table["ifd"].to_pylist()] == [True, False, False, True, False]
    assert "row 1: token " in table["reason"][1].as_py()
    assert table["reason"][1].as_py().endswith("is beyond the 97 of the model")
    assert cost.sequences == 4


@pytest.mark.parametrize("special", [False, True])
def test_words_added_to_the_tokenizer_alone(special, tiny_model, tokenizer):
    """As CodeLlama-34b's; a control token's text is plain in a row, so that only the paper's protocol meets its id."""
    from tokenizers import AddedToken

    wider = copy.deepcopy(tokenizer)
    wider.add_tokens([AddedToken("<|frobnicate|>", special=special)], special_tokens=special)
    rows = [row("Why?", "x = 1", 0), row("Why?", "x = <|frobnicate|> + 1", 1)]
    statuses = {
        protocol: IfdScorer(tiny_model, wider, max_length=128, protocol=protocol).score(rows)[0]["status"].to_pylist()
        for protocol in ("exact", "paper")
    }
    assert statuses["paper"] == ["ok", "token_beyond_model"]
    assert statuses["exact"] == ["ok", "ok" if special else "token_beyond_model"]
