"""The chat formats of the paper's model types, as data: as the models' makers have them, and as its scripts do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from codeact.base.errors import InputError
from codeact.data.forms import Turn

ALTERNATE = "in this template user and assistant have to alternate, after one system turn at most"
ROLES = "this template knows the roles system, user and assistant"
NO_SYSTEM = "the paper's scripts leave system turns out; take them out of the data, or choose another"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation as text; ``answers`` are the spans ``[start, end)`` that the model writes, each with its end.

    ``changed`` numbers the answers that stand there otherwise than they were given, such as without their reasoning.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    changed: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """The chat format that a family of models was tuned with.

    Every part is text in which ``{bos}`` and ``{eos}`` stand for the tokenizer's own tokens, and ``{text}`` for that of
    the turn. A conversation is ``opening``, then each turn; an assistant turn is ``assistant`` (what the prompt ends
    with), ``lead`` + text + ``end`` (what the model has to write itself) and ``separator``.

    ``default_system`` is written where no turn is of the system. With ``system_in_user`` the system turn is a part of
    the first user turn, and user and assistant have to alternate. ``strip`` removes white space around every text, as
    the family's own code does. ``tokens`` must each be one token of the tokenizer.

    ``rounds``: as in the paper's script every round (separator and question, then answer) is tokenized by itself, with
    the tokenizer's own special tokens before the "first", or before "all"; there are no system turns.
    """

    opening: str = ""
    system: str
    default_system: str | None = None
    user: str
    assistant: str
    lead: str = ""
    end: str
    separator: str = ""
    system_in_user: bool = False
    strip: bool = False
    rounds: str = ""
    tokens: tuple[str, ...]

    def write(self, turns: Sequence[Turn]) -> Rendered:
        """Write a conversation, with a family whose ``{bos}`` and ``{eos}`` are resolved.

        Raises:
            ValueError: the turns do not alternate where they have to.
        """
        if self.system_in_user or self.rounds:
            _check_alternation(turns)
        if self.rounds and turns[0][0] == "system":
            raise ValueError(NO_SYSTEM)
        parts = [self.opening]
        if self.default_system is not None and all(role != "system" for role, _ in turns):
            parts.append(_fill(self.system, self.default_system))
        answers = []
        system = ""
        for role, raw in turns:
            text = raw.strip() if self.strip else raw
            if role == "assistant":
                parts.append(self.assistant)
                start = sum(map(len, parts))
                parts.append(self.lead + text + self.end)
                answers.append((start, start + len(parts[-1])))
                parts.append(self.separator)
            elif role == "user":
                parts.append(_fill(self.user, system + text))
                system = ""
            elif self.system_in_user:
                system = _fill(self.system, text)
            else:
                parts.append(_fill(self.system, text))
        return Rendered(text="".join(parts), answers=tuple(answers))

    def jinja(self, bos: str = "") -> str:
        """The same format as a chat template in Jinja, as tokenizers carry it and other servers and trainers read it.

        Args:
            bos: what the tokenizer puts before a text, if the format does not write it itself.
        """
        text = "message['content'] | trim" if self.strip else "message['content']"
        own = self.rounds == "all"  # every round has its BOS
        begins_with_bos = not bos or own or f"{self.opening}{self.user}".startswith(bos)
        opening = self.opening if begins_with_bos else bos + self.opening
        system = f"'' ~ {_jinja_fill(self.system, text)}"
        parts = ["{%- set ns = namespace(system='', next='user') -%}"]
        if opening:
            parts.append(_jinja_write(_quoted(opening)))
        if self.default_system is not None:
            given = _jinja_write(_quoted(_fill(self.system, self.default_system)))
            missing = "not messages | selectattr('role', 'equalto', 'system') | list"
            parts.append(f"{{%- if {missing} -%}}{given}{{%- endif -%}}")
        parts.append("{%- for message in messages -%}")
        if self.rounds:
            parts.append(_jinja_refuse("message['role'] == 'system' and loop.first", NO_SYSTEM))
        if self.system_in_user or self.rounds:
            system_first = "message['role'] == 'system' and loop.first"
            parts.append(_jinja_refuse(f"message['role'] != ns.next and not ({system_first})", ALTERNATE))
        separator = _quoted(self.end if own else self.end + self.separator)
        before = f"({_quoted(bos)} ~ ('' if loop.first else {_quoted(self.separator)})) ~ " if own else ""
        parts += [
            "{%- if message['role'] == 'assistant' -%}",
            _jinja_write(f"{_quoted(self.assistant + self.lead)} ~ ({text}) ~ {separator}"),
            "{%- set ns.next = 'user' -%}{%- elif message['role'] == 'user' -%}",
            _jinja_write(before + _jinja_fill(self.user, f"ns.system ~ ({text})")),
            "{%- set ns.system = '' -%}{%- set ns.next = 'assistant' -%}{%- elif message['role'] == 'system' -%}",
            f"{{%- set ns.system = {system} -%}}" if self.system_in_user else _jinja_write(system),
            "{%- endif -%}",
            _jinja_refuse("message['role'] not in ['system', 'user', 'assistant']", ROLES),
            "{%- endfor -%}",
        ]
        if self.assistant:
            parts.append(f"{{%- if add_generation_prompt -%}}{_jinja_write(_quoted(self.assistant))}{{%- endif -%}}")
        return "".join(parts)

    def encode_rounds(self, tokenizer: Any, turns: Sequence[Turn]) -> list[tuple[list[int], list[int]]]:
        """The ids of a question with what is around it, and of its answer with its end, for every round."""
        rounds = []
        for number in range(0, len(turns), 2):
            text = (self.separator if number else "") + _fill(self.user, turns[number][1])
            prompt = tokenizer(text, add_special_tokens=self.rounds == "all" or not number, verbose=False)
            answer = tokenizer(turns[number + 1][1], add_special_tokens=False, verbose=False)
            rounds.append((prompt["input_ids"], [*answer["input_ids"], tokenizer.eos_token_id]))
        return rounds

    def resolve(self, name: str, tokenizer: Any) -> ChatFormat:
        """Put in the tokenizer's BOS and EOS.

        Raises:
            InputError: the tokenizer lacks tokens of the family; ``name`` is for the message.
        """
        own = {"{bos}": tokenizer.bos_token, "{eos}": tokenizer.eos_token}
        missing = [
            {"{bos}": "a BOS token", "{eos}": "an EOS token"}.get(token, token)
            for token in self.tokens
            if not _is_token(tokenizer, own.get(token, token))
        ]
        if missing:
            raise InputError(
                f"template {name} needs {' and '.join(missing)}, which this tokenizer lacks; "
                "use a tokenizer of that family, or template chat"
            )

        def put(text: str) -> str:
            for place, token in own.items():
                text = text.replace(place, token or "")
            return text

        return replace(self, opening=put(self.opening), user=put(self.user), end=put(self.end))


def _paper(
    user: str, separator: str = "", *, rounds: str = "first", tokens: tuple[str, ...] = ("{eos}",)
) -> ChatFormat:
    return ChatFormat(
        system="", user=user, assistant="", end="{eos}", separator=separator, rounds=rounds, tokens=tokens
    )


# Where each format comes from stands beside its golden text in tests/text/test_templates.py.
CHAT_FORMATS = {
    "codellama": ChatFormat(
        system="<<SYS>>\n{text}\n<</SYS>>\n\n",
        user="{bos}[INST] {text} [/INST]",
        assistant="",
        lead=" ",
        end=" {eos}",
        system_in_user=True,
        strip=True,
        tokens=("{bos}", "{eos}"),
    ),
    "codegemma": ChatFormat(
        system="{text}\n\n",
        user="<start_of_turn>user\n{text}<end_of_turn>\n",
        assistant="<start_of_turn>model\n",
        end="<end_of_turn>",
        separator="\n",
        system_in_user=True,
        strip=True,
        tokens=("<start_of_turn>", "<end_of_turn>"),
    ),
    "deepseek": ChatFormat(
        system="{text}\n",
        default_system=(
            "You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeek Company, "
            "and you only answer questions related to computer science. For politically sensitive questions, security "
            "and privacy issues, and other non-computer science questions, you will refuse to answer."
        ),
        user="### Instruction:\n{text}\n",
        assistant="### Response:\n",
        # <|EOT|> is the EOS of the instruct models. Of the base models it is not: there generation stops at EOS only.
        end="\n{eos}",
        separator="\n",
        tokens=("{eos}",),
    ),
    "starcoder2": ChatFormat(
        opening="{bos}",
        system="{text}\n\n",
        default_system=(
            "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable "
            "responses to user instructions."
        ),
        user="### Instruction\n{text}\n\n",
        assistant="### Response\n",
        end="{eos}",
        separator="\n\n",
        tokens=("{bos}", "{eos}"),
    ),
    "codeqwen": ChatFormat(
        system="<|im_start|>system\n{text}<|im_end|>\n",
        default_system="You are a helpful assistant.",
        user="<|im_start|>user\n{text}<|im_end|>\n",
        assistant="<|im_start|>assistant\n",
        end="<|im_end|>",
        separator="\n",
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": ChatFormat(
        system="<|start_header_id|>system<|end_header_id|>\n\n{text}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        strip=True,
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # utils/dataset.py of the paper's repository: PROMPT_TEMPLATE and construct_prompt, and every answer ends with EOS.
    "paper-codellama": _paper("[INST] {text} [/INST]", rounds="all"),
    "paper-codegemma": _paper(
        "<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n",
        tokens=("{eos}", "<start_of_turn>", "<end_of_turn>"),
    ),
    "paper-deepseek": _paper("### Instruction:\n{text}\n### Response:\n", "\n"),
    "paper-starcoder2": _paper("### Instruction:\n{text}\n### Response:\n", "\n"),
    "paper-codeqwen": _paper(
        "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        "\n",
        rounds="all",
        tokens=("{eos}", "<|im_start|>", "<|im_end|>"),
    ),
    "paper-llama3": _paper(
        "<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        tokens=("{eos}", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
}
"""Formats by name, those of the paper's ``--model_type``; with ``paper-`` before it, as its scripts write them."""


def _is_token(tokenizer: Any, token: str | None) -> bool:
    """Whether the tokenizer reads this text as one token of its own, and not as its pieces or as unknown."""
    if not token:
        return False
    number = tokenizer.convert_tokens_to_ids(token)  # the unknown token's, or None, if there is no such token
    if number is None or tokenizer.convert_ids_to_tokens(number) != token:
        return False
    ids: list[int] = tokenizer(token, add_special_tokens=False)["input_ids"]
    return ids == [number]


def _fill(form: str, text: str) -> str:
    return form.replace("{text}", text, 1)


def _quoted(text: str) -> str:
    """A literal for any engine of Jinja: those in C++ and JavaScript know few escapes, and none of a code point."""
    return json.dumps(text, ensure_ascii=False)


def _jinja_fill(form: str, text: str) -> str:
    """An expression for a form around the text that another expression gives."""
    before, _, after = form.partition("{text}")
    return f"{_quoted(before)} ~ ({text}) ~ {_quoted(after)}"


def _jinja_write(expression: str) -> str:
    return "{{- " + expression + " -}}"


def _jinja_refuse(condition: str, reason: str) -> str:
    return f"{{%- if {condition} -%}}{{{{- raise_exception({_quoted(reason)}) -}}}}{{%- endif -%}}"


def _check_alternation(turns: Sequence[Turn]) -> None:
    roles = [role for role, _ in turns]
    if roles[:1] == ["system"]:
        del roles[0]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
        raise ValueError(ALTERNATE)
