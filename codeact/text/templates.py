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
        template = template_text(template)
        if template in MODEL_TYPES or is_jinja(template):
            self._conversations = ConversationTemplate(tokenizer, template)
            self.text = self._conversations.text
        elif "{question}" in template:
            self.text = template
        else:
            one_of("template", template, [*TEMPLATES, *CHAT_FORMATS, "chat"])
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
        if self._conversations is not None:
            return self._conversations.prompt((*record.history, ("user", record.question)))
        # Not str.format: questions and templates may hold braces of their own.
        parts = []
        for role, text in record.history:
            parts.append(self.text.replace("{question}", text) if role == "user" else f"{text}\n\n")
        return "".join(parts) + self.text.replace("{question}", record.question)


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
