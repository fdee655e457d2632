"""``paper-`` formats and prompts, token by token, as the paper's utils/dataset.py and benchmark/generate.py make them.

Written down here by hand; on 200 conversations and all tasks they were once held against the scripts themselves.
"""

from __future__ import annotations

import copy

import pytest

from codeact.data.records import Record
from codeact.evaluation.problems import Problem
from codeact.evaluation.prompts import PromptWriter
from codeact.scoring.tokens import tokenize
from codeact.text.conversations import IGNORE, Refused, Sample, encode_conversations
from codeact.text.formats import CHAT_FORMATS
from codeact.text.templates import ConversationTemplate, PromptBuilder
from tests.helpers.chat_tokenizers import family_tokenizer, llama2_tokenizer

# Of each: the first question, a later one, and whether later ones get the tokenizer's special tokens, too.
ROUNDS = {
    "codellama": ("[INST] {} [/INST]", "[INST] {} [/INST]", True),
    "codegemma": (
        "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
        False,
    ),
    "deepseek": ("### Instruction:\n{}\n### Response:\n", "\n### Instruction:\n{}\n### Response:\n", False),
    "starcoder2": ("### Instruction:\n{}\n### Response:\n", "\n### Instruction:\n{}\n### Response:\n", False),
    "codeqwen": (
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        True,
    ),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        False,
    ),
}
TALK = [
    ("user", " Hi {text} </s>"),
    ("assistant", "    return 1\n"),
    ("user", "Bye <|im_end|>"),
    ("assistant", "\nCiao"),
]


def row(turns, **more) -> dict:
    return {"messages": [{"role": role, "content": text, **more} for role, text in turns]}


def test_all_of_the_papers_model_types_are_here():
    assert {f"paper-{name}" for name in ROUNDS} == {name for name in CHAT_FORMATS if name.startswith("paper-")}


@pytest.mark.parametrize("llama2", [False, True], ids=["", "a space before every text"])
@pytest.mark.parametrize("name", ROUNDS)
def test_ids_and_labels(tokenizer, name, llama2):
    made = family_tokenizer(tokenizer, name)
    if llama2:  # whose every piece begins with a space that is not in the text
        made = llama2_tokenizer()
        made.add_tokens(list(CHAT_FORMATS[f"paper-{name}"].tokens[1:]), special_tokens=True)
    ids, labels = [], []
    for number, form, special in ((0, ROUNDS[name][0], True), (2, ROUNDS[name][1], ROUNDS[name][2])):
        prompt = made(form.replace("{}", TALK[number][1]), add_special_tokens=special)["input_ids"]
        answer = [*made(TALK[number + 1][1], add_special_tokens=False)["input_ids"], made.eos_token_id]
        ids += [*prompt, *answer]
        labels += [IGNORE] * len(prompt) + answer
    (sample,) = encode_conversations([row(TALK)], made, f"paper-{name}")
    assert isinstance(sample, Sample)
    assert (sample.input_ids.tolist(), sample.labels.tolist()) == (ids, labels)
    (cut,) = encode_conversations([row(TALK)], made, f"paper-{name}", len(ids) - 2)
    assert (cut.input_ids.tolist(), cut.cut_tokens) == (ids[:-2], 2)
    (last,) = encode_conversations([row(TALK)], made, f"paper-{name}", last_answer_only=True)
    first = len(labels) - labels[::-1].index(IGNORE)
    assert last.labels.tolist() == [IGNORE] * first + labels[first:]


def test_system_turns_are_refused(tokenizer):
    """The scripts leave them out and say nothing."""
    made = family_tokenizer(tokenizer, "deepseek")
    (refused,) = encode_conversations([row([("system", "Be brief."), *TALK])], made, "paper-deepseek")
    assert isinstance(refused, Refused)
    assert "the paper's scripts leave system turns out" in refused.message


def test_they_can_be_scored_and_asked_with(tokenizer):
    made = family_tokenizer(tokenizer, "deepseek")
    prompts = PromptBuilder(made, "paper-deepseek")
    record = Record(id="0", row=0, question="Q", answer="A and B", history=(("user", "a"), ("assistant", "b")))
    text = prompts.render(record)
    assert text == "### Instruction:\na\n### Response:\nb<|EOT|>\n### Instruction:\nQ\n### Response:\n"
    assert tokenize([record], made, prompts, 200)[0].status == "ok"
    assert (
        ConversationTemplate(made, "paper-deepseek").prompt([("user", "Q")]) == "### Instruction:\nQ\n### Response:\n"
    )


def problem(dataset: str, prompt: str) -> Problem:
    return Problem(
        task_id="1", dataset=dataset, prompt=prompt, entry_point="f", canonical_solution="", base_input=(),
        plus_input=None, tolerance=0.0,
    )  # fmt: skip


HUMANEVAL = problem("humaneval", '\ndef f(x):\n    """Add."""\n\n')
MBPP = problem("mbpp", '"""\nWrite a function.\nassert f(1) == 2\n"""\n')
ASKED = {
    "humaneval": "Please complete the following Python function in a markdown style code block:\n"
    '```python\n\ndef f(x):\n    """Add."""\n\n\n```',
    # with the script's own spelling
    "mbpp": "Please write the Python function in a markdown style code block that comply with the foolowing "
    'instruction.\n"""\nWrite a function.\nassert f(1) == 2\n"""\n',
}


@pytest.mark.parametrize("task", [HUMANEVAL, MBPP], ids=lambda task: task.dataset)
@pytest.mark.parametrize("bos", [False, True])
def test_what_the_scripts_ask(tokenizer, bos_tokenizer, task, bos):
    made = copy.deepcopy(bos_tokenizer if bos else tokenizer)
    made.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    asked = f"[user]{ASKED[task.dataset]}[assistant]```python"
    written = PromptWriter(made, "chat", "paper").write(task)
    assert list(written.ids) == made(asked, add_special_tokens=False)["input_ids"]  # no BOS that the template lacks
    base = PromptWriter(made, None, "paper").write(task)
    assert list(base.ids) == made(task.prompt)["input_ids"]
    assert base.prefix == task.prompt
    ours = PromptWriter(made, "chat").write(task)
    assert ours.ids != written.ids
