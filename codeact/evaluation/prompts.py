"""What a model is asked for a problem, and where its answer ends: base models go on writing, instruct models answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from codeact.base.errors import InputError
from codeact.evaluation.problems import Problem
from codeact.text.formats import Rendered
from codeact.text.spans import ControlTexts, SpanEncoder
from codeact.text.templates import ConversationTemplate, special_tokens

# The paper's: what follows a finished function in an answer. The first two groups hold in both modes.
_STOPS = ("\nif __name__", "\ndef main(", "\nprint(", "\nassert")
_BASE_STOPS = {"humaneval": ("\ndef ", "\nclass ", "\nimport ", "\nfrom "), "mbpp": ('\n"""',)}
_CLOSING_FENCE = ("\n```",)

# The paper's questions; the answer begins with the opening of a code block, so that its first closing fence ends it.
_QUESTIONS = {
    "humaneval": (
        "Please complete the following Python function in a markdown style code block:\n```python\n{prompt}\n```"
    ),
    "mbpp": (
        "Please write the Python function in a markdown style code block that comply with the following instruction."
        "\n{prompt}"
    ),
}
# As the paper's scripts ask: to the byte.
_PAPER_QUESTIONS = {**_QUESTIONS, "mbpp": _QUESTIONS["mbpp"].replace("following instruction", "foolowing instruction")}
_ANSWER_START = "```python"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """``ids``: what the model reads; ``prefix``: what stands in the program before what it writes."""

    ids: tuple[int, ...]
    prefix: str
    stops: tuple[str, ...]


class PromptWriter:
    """Writes prompts for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        template: None for a base model; else one of `codeact.text.templates.MODEL_TYPES`, the one it was trained with.
        protocol: "exact", or "paper": wording, white space and token ids of the paper's benchmark/generate.py.

    Raises:
        InputError: the tokenizer does not fit the template.
    """

    def __init__(self, tokenizer: Any, template: str | None, protocol: str = "exact") -> None:
        self._paper = protocol == "paper"
        self._tokenizer = tokenizer
        self._template = None if template is None else ConversationTemplate(tokenizer, template)
        self._encoder = SpanEncoder(tokenizer)
        # What looks like a control token in a problem is plain text, as in training; the paper's scripts obey it.
        self._controls = ControlTexts([] if self._paper else special_tokens(tokenizer))

    def write(self, problem: Problem) -> Prompt:
        """Return the prompt of a problem."""
        prompt = problem.prompt if self._paper else problem.prompt.strip()
        if self._template is None:
            prefix = prompt if self._paper else (prompt or problem.question.strip()) + "\n"
            (text,), marks = self._controls.hide([prefix])
            stops = (*_STOPS, *_BASE_STOPS.get(problem.dataset, _BASE_STOPS["humaneval"]))
        else:
            prefix, forms = "", _PAPER_QUESTIONS if self._paper else _QUESTIONS
            question = problem.question or forms.get(problem.dataset, forms["humaneval"]).replace("{prompt}", prompt)
            (question,), marks = self._controls.hide([question])
            try:
                asked = self._template.prompt([("user", question)])
            except ValueError as error:
                raise InputError(f"{problem.task_id}: {error}; choose another --template") from None
            lead = "" if self._template.model_type == "chat" else self._template.family.lead
            text = asked + lead + _ANSWER_START
            script = problem.own is not None and problem.own.script  # which may have all of these
            stops = _CLOSING_FENCE if script else (*_STOPS, *_CLOSING_FENCE)
        ((ids, _),) = self._encoder.encode([self._controls.show(text, marks)])
        if self._paper and self._template is not None and self._template.model_type == "chat":
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)[
                "input_ids"
            ]  # the template's BOS alone
        return Prompt(ids=tuple(map(int, ids)), prefix=prefix, stops=stops)

    def end_ids(self) -> set[int]:
        """Return the tokens that end an answer: EOS, and what the template ends a turn with."""
        ends = {self._tokenizer.eos_token_id} - {None}
        if self._template is not None:
            (shown,) = self._template.render([[("user", "a"), ("assistant", "b")]])
            if isinstance(shown, Rendered) and shown.answers:
                start, end = shown.answers[0]
                ends.add(self._tokenizer(shown.text[start:end], add_special_tokens=False)["input_ids"][-1])
        return ends
