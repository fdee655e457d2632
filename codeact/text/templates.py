"""How a conversation is written down as text: for scoring, for training, for generation.

Two kinds of templates. ``TEMPLATES`` and your own text with ``{question}`` put a question before an answer and nothing
more. ``CHAT_FORMATS`` (the paper's model types) and ``chat`` (the tokenizer's own template) also say where an answer
ends and with which token, so a model can be trained on them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from codeact.base.errors import InputError, one_of
from codeact.data.forms import Turn
from codeact.data.records import Record
from codeact.text.chat import ChatTemplate
from codeact.text.formats import CHAT_FORMATS, Rendered
from codeact.text.template_files import is_jinja, template_text
from codeact.text.tokenizers import leading_bos

TEMPLATES = {
    "qa": "Question:\n{question}\n\nAnswer:\n",
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{question}\n\n### Response:\n"
    ),
}
"""Prompts without an end of turn, by name."""


MODEL_TYPES = ("chat", *CHAT_FORMATS)
"""What a model can be trained on, beside a Jinja template of one's own; ``chat`` is the tokenizer's."""


def check_template(template: str) -> None:
    """Refuse a name that is none, before a model is loaded.

    Raises:
        InputError: it is no name, no text with ``{question}`` and no Jinja template.
    """
    template = template_text(template)
    if not is_jinja(template) and "{question}" not in template:
        one_of("template", template, [*TEMPLATES, *MODEL_TYPES])


class PromptBuilder:
    """Renders the question of a record the way the model will be asked it.

    Args:
        tokenizer: a transformers tokenizer.
        template: a name in ``TEMPLATES`` or ``CHAT_FORMATS``, ``chat``, text of your own with ``{question}``, or a file
            with that or with a Jinja template.

    Raises:
        InputError: the template is unknown, or the tokenizer lacks what it needs.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._conversations: ConversationTemplate | None = None
        check_template(template)
        template = template_text(template)
        if template in MODEL_TYPES or is_jinja(template):
            self._conversations = ConversationTemplate(tokenizer, template)
            self.text = self._conversations.text
        elif "{question}" in template:
            self.text = template
        else:
            self.text = TEMPLATES[template]

    @property
    def fingerprint(self) -> str:
        """Sha256 of the template's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render(self, record: Record) -> str:
        """Return the text that stands before the answer.

        Raises:
            ValueError: the template refuses this conversation.
        """
        return self.prompt(record.turns[:-1])

    def prompt(self, turns: Sequence[Turn]) -> str:
        """Return the text that stands before an answer to these turns; errors as of ``render``."""
        if self._conversations is not None:
            return self._conversations.prompt(turns)
        # Not str.format: questions and templates may hold braces of their own.
        return "".join(
            self.text.replace("{question}", text) if role == "user" else f"{text}\n\n" for role, text in turns
        )

    def runs(self, turns: Sequence[Turn], answers: Sequence[int]) -> list[list[tuple[int, str]]]:
        """These answers, each with the text before it, in runs: what one pass over the conversation reads.

        The first text of a run is the prompt of its answer, as ``render`` would write it were this answer the last.
        Every other one is what the template writes between the answer before and its own. So a run is ``text answer
        text answer ...`` with the answers as they are in the data; the template may write other white space around
        them. Where it writes a past answer otherwise (without its reasoning), or what came before it, another run
        begins.

        Raises:
            ValueError: the template refuses a part of this conversation.
        """
        runs: list[list[tuple[int, str]]] = []
        before, answer = "", ""
        for number in answers:
            prompt = self.prompt(turns[:number])
            between = _between(prompt, before, answer) if runs else None
            if between is None:
                runs.append([(number, prompt)])
            else:
                runs[-1].append((number, between))
            before, answer = prompt, turns[number][1]
        return runs


def _between(prompt: str, before: str, answer: str) -> str | None:
    """What follows ``before`` and the answer in a prompt; None: it does not begin with them, but for white space."""
    if not prompt.startswith(before):
        return None
    rest = prompt[len(before) :]
    if rest.startswith(answer):
        return rest[len(answer) :]
    rest, core = rest.lstrip(), answer.strip()
    return rest[len(core) :].removeprefix(answer[len(answer.rstrip()) :]) if rest.startswith(core) else None


class ConversationTemplate:
    """Writes whole conversations, and says which part of the text the model has to write.

    With a family the spans are known because the text is put together here; in what the tokenizer's own template writes
    they are found (`codeact.text.chat`). In both cases the end of turn belongs to the span.

    Args:
        tokenizer: a transformers tokenizer.
        model_type: one of ``MODEL_TYPES``, or a Jinja template or a file with one, which takes the place of "chat".

    ``own``: whether it is a template that was given, not the tokenizer's.

    Raises:
        InputError: the type is unknown, or the tokenizer lacks its tokens or has no template.
    """

    def __init__(self, tokenizer: Any, model_type: str) -> None:
        self.tokenizer = tokenizer
        text: Any = template_text(model_type)
        self.own = is_jinja(text)
        self.model_type = "chat" if self.own else one_of("model type", text, MODEL_TYPES)
        if self.model_type == "chat":
            if not self.own:
                text = tokenizer.chat_template
                text = text.get("default") if isinstance(text, dict) else text
            if not isinstance(text, str):
                others = ", ".join([*TEMPLATES, *CHAT_FORMATS])
                raise InputError(f"this tokenizer has no chat template; choose one of: {others}")
            self.text: str = text
            self._chat = ChatTemplate(tokenizer, text)
        else:
            self.family = CHAT_FORMATS[model_type].resolve(model_type, tokenizer)
            self.text = repr(self.family)

    @property
    def jinja(self) -> str:
        """The template in Jinja, which writes what is trained on, its BOS included: for whoever asks the model."""
        if self.model_type == "chat":
            return self.text
        return self.family.jinja(self.tokenizer.decode(leading_bos(self.tokenizer)))

    def prompt(self, turns: Sequence[Turn]) -> str:
        """Return the text after which the model answers; ``turns`` end with the user's.

        Raises:
            ValueError: the template refuses this conversation.
        """
        if self.model_type == "chat":
            return self._chat.write(turns, True)
        return self.family.write(turns).text + self.family.assistant

    def check_trainable(self) -> None:
        """Try one question and answer.

        Raises:
            InputError: the tokenizer's template does not tell where an answer begins, or never ends one.
        """
        (result,) = self.render([[("user", "a"), ("assistant", "b")]])
        if isinstance(result, Rendered) and not result.answers:
            result = "it marks no answer with {% generation %}"
        if isinstance(result, str):
            raise InputError(
                f"the chat template cannot be trained on: {result}; choose a model type: {', '.join(CHAT_FORMATS)}"
            )

    def render(self, conversations: Sequence[Sequence[Turn]]) -> list[Rendered | str]:
        """Write conversations; where the template refuses one, the reason in one line."""
        write = self._chat.find if self.model_type == "chat" else self.family.write
        results: list[Rendered | str] = []
        for turns in conversations:
            try:
                results.append(write(turns))
            except ValueError as error:
                results.append(" ".join(str(error).split()))
        return results


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts that the tokenizer reads as control tokens wherever they stand, the longest first."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted({*added, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
