"""What the columns of a row mean: the usual forms of instruction data, found by the names of their columns.

    Alpaca, LLaMA-Factory   instruction, input, output, system, history [[question, answer], ...]
    pairs                   prompt or question, and completion, response or answer; system, history
    ShareGPT, messages      conversation(s) or messages [{role, content} or {from, value}, ...]; system

Every command and Python read rows by this file alone. What it does not read, such as calls of tools, is refused by
name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from codeact.data.sources import RowError, kind, listing, refusal, show

Turn = tuple[str, str]
"""Role (system, user or assistant) and text."""

_Heard = tuple[str, str, bool]  # and whether it is learnt, if it is an answer

_ROLES = {
    **{"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"},
    **{"system": "system", "developer": "system"},
}
_SHAREGPT = ("conversations", "from", "value")
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_TURN_COLUMNS = ("messages", "conversations", "conversation")  # the last is what select wrote before
_PAIRS = [("instruction", "output"), ("instruction", "response")]
_PAIRS += [(question, answer) for question in ("prompt", "question") for answer in ("completion", "response", "answer")]
_CONTEXT = ("system", "history", "tools")
_NOT_READ = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "images", "audio", "refusal")
_TOOLS = "write tools into the system text, calls and results into the texts of assistant and user"
_TAKE = "or take the row out"
_MEND = f"write it, {_TAKE}"
_LEARN_KEYS = ("weight", "train", "training", "trainable", "train_on_turn", "loss")
_LEARN_OTHERWISE = ("mask", "loss_mask", "train_detail", "training_detail")  # of parts of a text, or either way round
_TURN_KEYS = {"role", "content", "from", "value", *_NOT_READ, *_LEARN_KEYS, *_LEARN_OTHERWISE}
FORMS = ("messages", "sharegpt", "alpaca")
"""What rows are written in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns hold what; a part that is None is found by its usual name, if neither pair nor turns are named.

    ``input`` is the Alpaca form's third column: where it is not blank the question becomes
    ``question + "\\n" + input``. ``conversation`` holds a list of turns, ``{role, content}`` or ShareGPT's
    ``{from, value}``, and takes the place of ``question`` and ``answer``. ``system`` and ``history`` (pairs of question
    and answer, or turns) come before either. A row that has ``tools`` is refused: they are not read. In ``input``,
    ``system``, ``history`` and ``tools`` absent, null and blank mean none.

    Raises:
        InputError: ``input`` beside ``conversation``, or two names for one column.
    """

    question: str | None = None
    answer: str | None = None
    input: str | None = None
    conversation: str | None = None
    id: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None

    def __post_init__(self) -> None:
        if self.conversation is not None and (self.input is not None or self.history is not None):
            raise refusal("an input or history column joins a question, not a conversation; name one of the two")
        if self.conversation is not None and (self.question is not None or self.answer is not None):
            raise refusal("a conversation takes the place of question and answer; name one of the two")
        names = self.names()
        if len(set(names)) < len(names):
            raise refusal(f"one column is named twice: {listing(names)}; every part needs its own column")

    @property
    def several_answers(self) -> bool:
        """Whether a row can hold more than one."""
        return self.conversation is not None or self.history is not None

    def names(self) -> list[str]:
        """The columns that are named."""
        return [name for field in fields(self) if (name := getattr(self, field.name)) is not None]

    def found_in(self, rows: Iterable[Mapping[str, Any]]) -> Columns:
        """Fill in what is not named, by what these rows have; ``instruction`` and ``output`` where nothing fits."""
        seen: dict[str, Any] = {}
        for row in rows:
            seen.update((name, value) for name, value in row.items() if seen.get(name) is None)
        named = {self.question, self.answer, self.input, self.conversation} != {None}
        free = {name: value for name, value in seen.items() if name not in self.names()}
        context = {name: getattr(self, name) or (name if name in free and not named else None) for name in _CONTEXT}
        turns = next((name for name in _TURN_COLUMNS if isinstance(free.get(name), list)), None)
        if self.conversation is not None or (turns is not None and not named):
            history = self.history if self.conversation is None else None
            return replace(self, **{**context, "history": history, "conversation": self.conversation or turns})
        question, answer = next((pair for pair in _PAIRS if {*pair} <= free.keys()), _PAIRS[0])
        if self.question is not None or self.answer is not None:
            question, answer = _PAIRS[0]
        more = self.input or ("input" if question == "instruction" and "input" in free and not named else None)
        return replace(self, question=self.question or question, answer=self.answer or answer, input=more, **context)

    def required(self, named: Columns) -> list[str]:
        """The columns without which no row is a record: the pair or the turns, and what ``named`` names."""
        needed = [self.conversation] if self.conversation is not None else [self.question, self.answer]
        return list(dict.fromkeys(name for name in [*needed, *named.names()] if name is not None))

    def told(self, rows: Collection[Mapping[str, Any]]) -> tuple[str, list[str]]:
        """What is read of these rows, for a person, and what is not, columns that usually hold context first."""
        seen = dict.fromkeys(name for row in rows for name in row)
        if self.conversation is not None:
            parts = [self.system, f"the turns in {listing([self.conversation])}"]
        else:
            question = listing([name for name in (self.question, self.input) if name is not None])
            parts = [self.system, self.history, f"{question} -> {listing([self.answer or ''])}"]
        unused = [name for name in seen if name not in self.names()]
        unused.sort(key=lambda name: name not in (*_CONTEXT, *_TURN_COLUMNS, "input"))
        listed = (row.get(name) for row in rows for name in (self.conversation, self.history) if name is not None)
        talks = [talk for talk in listed if isinstance(talk, list)]
        turns = [turn for talk in talks for turn in talk if isinstance(turn, Mapping)]
        keys = dict.fromkeys(key for turn in turns for key, value in turn.items() if value is not None)
        unused += [f"{key} of turns" for key in keys if key not in _TURN_KEYS]
        return ", ".join(part for part in parts if part is not None), unused


@dataclass(frozen=True, slots=True)
class Talk:
    """What a row says: turns, the last two a question and its answer; which of them are answers not to be learnt."""

    turns: tuple[Turn, ...]
    context: frozenset[int]


def read_talk(raw: Mapping[str, Any], columns: Columns) -> Talk:
    """Read a row.

    Raises:
        RowError: it holds no question with an answer, or what is not read.
    """
    if columns.tools is not None and not _is_blank(raw.get(columns.tools)):
        raise RowError("tool_use", f"column {show(columns.tools)} describes tools, which are not read; {_TOOLS}")
    turns = _dialogue(raw, columns) if columns.conversation is not None else _pair(raw, columns)
    if system := _text_or_none(raw, columns.system):
        if turns[:1] and turns[0][0] == "system":
            if turns[0][1].strip() != system.strip():
                raise RowError(
                    "bad_conversation", f"column {show(columns.system or '')} and turn 0 are two system texts"
                )
        else:
            turns.insert(0, ("system", system, True))
    if [role for role, _, _ in turns[-2:]] != ["user", "assistant"]:
        roles = listing([role for role, _, _ in turns[-2:]]) or "no turn"
        raise RowError("bad_conversation", f"an answer must follow a user turn; the last two here: {roles}; {_MEND}")
    for (_, text, _), part in zip(turns[-2:], ("question", "answer"), strict=True):
        if not text.strip():
            raise RowError(f"empty_{part}", f"the {part} is blank; {_MEND}")
    context = frozenset(number for number, (role, _, learn) in enumerate(turns) if role == "assistant" and not learn)
    return Talk(tuple((role, text) for role, text, _ in turns), context)


def form_columns(turns: Sequence[Turn], context: Collection[int], form: str) -> dict[str, Any]:
    """The columns that say these turns in one of ``FORMS``, as `read_talk` reads them again.

    Raises:
        RowError: alpaca has no words for it.
    """
    if form != "alpaca":
        column, role_key, text_key = ("messages", "role", "content") if form == "messages" else _SHAREGPT
        names = {} if form == "messages" else {"user": "human", "assistant": "gpt"}
        said = [{role_key: names.get(role, role), text_key: text} for role, text in turns]
        return {column: [{**turn, **({"weight": 0} if at in context else {})} for at, turn in enumerate(said)]}
    system = turns[0][1] if turns[0][0] == "system" else ""
    talk = turns[1:] if turns[0][0] == "system" else turns
    if context or [role for role, _ in talk] != ["user", "assistant"] * (len(talk) // 2):
        why = "answers that are not to be learnt" if context else "turns that are no pairs of question and answer"
        raise RowError("bad_conversation", f"form alpaca cannot say {why}; write messages or sharegpt")
    pairs = [[talk[at][1], talk[at + 1][1]] for at in range(0, len(talk), 2)]
    (question, answer), history = pairs[-1], pairs[:-1]
    return {"instruction": question, "input": "", "output": answer, "system": system, "history": history}


def _pair(raw: Mapping[str, Any], columns: Columns) -> list[_Heard]:
    question, answer = (_text(_value(raw, name or ""), name or "") for name in (columns.question, columns.answer))
    more = _text_or_none(raw, columns.input)
    if more is not None and question.strip():
        question = f"{question}\n{more}"
    return [*_history(raw, columns.history), ("user", question, True), ("assistant", answer, True)]


def _dialogue(raw: Mapping[str, Any], columns: Columns) -> list[_Heard]:
    """The turns up to the last answer that is to be learnt: nothing of what follows it is."""
    column = columns.conversation or ""
    turns = _turns(_value(raw, column), column)
    answers = [number for number, (role, _, _) in enumerate(turns) if role == "assistant"]
    learnt = [number for number in answers if turns[number][2]]
    if answers and not learnt:
        raise RowError("bad_conversation", f"no answer is to be learnt: each has weight 0; give one weight 1, {_TAKE}")
    return turns[: learnt[-1] + 1] if learnt else turns


def _turns(value: object, column: str) -> list[_Heard]:
    if not isinstance(value, list):
        raise RowError("wrong_type", f"column {show(column)} is {kind(value)}, not a list of turns")
    return [_turn(turn, number) for number, turn in enumerate(value)]


def _turn(turn: object, number: int) -> _Heard:
    """Role, text, and whether it is to be learnt if it is an answer."""
    if not isinstance(turn, Mapping):
        raise RowError("bad_conversation", f"turn {number} is {kind(turn)}, not an object")
    # Arrow gives every turn of a mixed column all the keys, null where the row had none.
    role_key, text_key = ("from", "value") if turn.get("role") is None else ("role", "content")
    role, text = turn.get(role_key), turn.get(text_key)
    more = next((key for key in _NOT_READ if not _is_blank(turn.get(key))), None)
    if role in _TOOL_ROLES or more in ("tool_calls", "function_call"):
        raise RowError(
            "tool_use", f"turn {number} calls or answers a tool ({more or role}), which is not read; {_TOOLS}"
        )
    if more is not None:
        raise RowError("bad_conversation", f"turn {number} has {more}, which is not read; put it into its text")
    if not isinstance(role, str) or role not in _ROLES:
        shown = show(role) if isinstance(role, str) else kind(role)
        raise RowError("bad_conversation", f"the role of turn {number} is {shown}, not one of {', '.join(_ROLES)}")
    if isinstance(text, list):
        text = "".join(_part(part, number) for part in text)
    if not isinstance(text, str):
        raise RowError("bad_conversation", f"the {text_key} of turn {number} is {kind(text)}, not text")
    return _ROLES[role], text, _learn(turn, number)


def _part(part: object, number: int) -> str:
    """A part of a content that is a list."""
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    what = part.get("type") if isinstance(part, Mapping) else None
    shown = show(what) if isinstance(what, str) else kind(part)
    raise RowError("bad_conversation", f"turn {number} has a part that is {shown}, not text; only text is read")


def _learn(turn: Mapping[str, Any], number: int) -> bool:
    for key in _LEARN_KEYS:
        value = turn.get(key)
        if value is None or (key == "loss" and isinstance(value, float)):  # a loss that was measured
            continue
        if value not in (0, 1):
            shown = repr(value) if isinstance(value, int | float) else kind(value)
            raise RowError("bad_conversation", f"the {key} of turn {number} is {shown}, neither 0 nor 1")
        if not value:
            return False
    if other := next((key for key in _LEARN_OTHERWISE if turn.get(key) is not None), None):
        text = f"turn {number} has {other}, which is not read; give every answer a weight of 0 or 1 instead, {_TAKE}"
        raise RowError("bad_conversation", text)
    return True


def _history(raw: Mapping[str, Any], column: str | None) -> list[_Heard]:
    value = None if column is None else raw.get(column)
    if column is None or _is_blank(value):
        return []
    if not isinstance(value, list):
        raise RowError("wrong_type", f"column {show(column)} is {kind(value)}, not a list of questions with answers")
    if all(isinstance(turn, Mapping) for turn in value):
        return _turns(value, column)
    turns = []
    for number, pair in enumerate(value):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError("wrong_type", f"item {number} of column {show(column)} is no pair of question and answer")
        turns += [("user", pair[0], True), ("assistant", pair[1], True)]
    return turns


def _is_blank(value: object) -> bool:
    return value is None or value in ({}, []) or (isinstance(value, str) and value.strip() in ("", "[]", "{}"))


def _text_or_none(raw: Mapping[str, Any], column: str | None) -> str | None:
    value = None if column is None else raw.get(column)
    text = "" if value is None else _text(value, column or "")
    return text if text.strip() else None


def _value(raw: Mapping[str, Any], column: str) -> object:
    if column not in raw:
        raise RowError("missing_column", f"column {show(column)} is missing; the row has: {listing(raw) or 'nothing'}")
    return raw[column]


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong_type", f"column {show(column)} is {kind(value)}, not text")
    return value


def read_id(raw: Mapping[str, Any], column: str) -> str:
    """The id of a row.

    Raises:
        RowError: there is none, or it is neither text nor a whole number.
    """
    value = _value(raw, column)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise RowError("wrong_type", f"the id column {show(column)} is {kind(value)}, not text or a whole number")
    return str(value)
