"""The tokenizer's own chat template: a program that writes a conversation, in which the answers have to be found."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, takewhile
from typing import Any

from codeact.base.errors import InputError
from codeact.data.forms import Turn
from codeact.text.formats import CHAT_FORMATS, Rendered

TEMPLATE_SECONDS = 10.0
"""Of the processor, for one conversation: a template may have no end."""

_THOUGHT = "</think>"
_NO_THOUGHT = re.compile(r"\s*(<think>\s*(</think>)?)?\s*")
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """Writes conversations by a tokenizer's template.

    Where the template marks answers with ``{% generation %}`` its marks are taken. Otherwise every answer is found in
    the whole text: behind every turn's text a mark is written, a character that stands nowhere else. An answer begins
    where the prompt before it ends, so that what the template writes itself (an empty ``<think>``) is learnt too, and
    it ends with what the template writes after it whether another turn follows or not. The end of turn belongs to it.
    An earlier answer that the template changes, most often by leaving out its reasoning, is context: it stands there as
    the model will see it, and to learn it so would teach to answer without reasoning.

    A template that refuses or leaves out a system turn gets it as the beginning of the first user turn, as Gemma's own
    later templates have it.

    Raises:
        InputError: the template is broken, or computes what may take for ever.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        from jinja2 import Environment, TemplateSyntaxError

        self._tokenizer, self._text = tokenizer, text
        try:
            # No limit of time holds inside of one operation on numbers.
            powers = any(token[1:] == ("operator", "**") for token in Environment().lex(text))
        except TemplateSyntaxError as error:
            raise InputError(f"the chat template is broken: {error}") from None
        if powers:
            raise InputError("the chat template computes powers (**), which may take for ever; mend it")
        # Longest first, so that of two tokens where one begins the other the regular expression takes the right one.
        added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens} - {""}
        self._tokens = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
        self._last_ends: dict[str, tuple[str, int]] = {}
        self._endless, self._writes_system = False, True
        try:
            self._writes_system = "\U000f0000" in self.write([("system", "\U000f0000"), ("user", "a")], True)
        except ValueError as error:
            self._writes_system = False
            if self._endless:
                raise InputError(f"the chat template cannot be used: {error}; choose a model type") from None

    def write(self, turns: Sequence[Turn], generation_prompt: bool) -> str:
        """The whole conversation as text.

        Raises:
            ValueError: the template refuses it, or does not end.
        """
        messages = self._messages(turns)
        with self._refusals():
            return str(
                self._tokenizer.apply_chat_template(
                    messages, chat_template=self._text, tokenize=False, add_generation_prompt=generation_prompt
                )
            )

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, str]]:
        if not self._writes_system and len(turns) > 1 and (turns[0][0], turns[1][0]) == ("system", "user"):
            turns = [("user", f"{turns[0][1]}\n\n{turns[1][1]}"), *turns[2:]]
        return [{"role": role, "content": text} for role, text in turns]

    def find(self, turns: Sequence[Turn]) -> Rendered:
        """The whole conversation, and where its answers are.

        Raises:
            ValueError: the template refuses it, or leaves open where an answer begins or ends.
        """
        if _MARKS_ANSWERS.search(self._text):
            rendered = self._marked(turns)
            spans = [rendered.text[start:end] for start, end in rendered.answers]
            answers = [text for role, text in turns if role == "assistant"]
            pairs = [(text, rendered.text) for role, text in turns if role == "user"]
            # Marks of a part of the answers are meant; those of something else than the answers are not.
            pairs += zip(answers, spans, strict=True) if len(answers) == len(spans) else []
            if len(answers) >= len(spans) and all(_dense(text) in _dense(place) for text, place in pairs):
                return rendered
        return self._searched(turns)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """A template is a program: it may raise anything, or not end; once it did not, no other row waits for that."""
        if self._endless:
            raise ValueError("the chat template is not tried again: it did not end for an earlier row")
        try:
            with time_limit(TEMPLATE_SECONDS):
                yield
        except Exception as error:
            self._endless = isinstance(error, TimeoutError)
            raise ValueError(f"the chat template refuses it: {str(error) or type(error).__name__}") from None

    # ------------------------------------------------------------------------------------------ answers that are found

    def _searched(self, turns: Sequence[Turn]) -> Rendered:
        talk = _MarkedTalk(turns)
        whole, places = talk.take_out(self.write(talk.marked, False))
        if whole != self.write(turns, False):
            raise ValueError("the chat template depends on how a turn's text ends, so the answers cannot be found")
        for index, core in enumerate(talk.cores):
            if core and index not in places:
                raise ValueError(f"turn {index}: the chat template leaves it out")
        answers: list[tuple[int, int]] = []
        changed = set()
        for index in (index for index, (role, _) in enumerate(turns) if role == "assistant"):
            answer, end = talk.cores[index], places[index]
            start = end - len(answer)
            if index:
                if index - 1 not in places:
                    raise ValueError(f"turn {index - 1} is blank, so the answer after it cannot be found")
                previous = places[index - 1]
                prompt = talk.behind(index - 1, self.write(talk.marked[:index], True))
                written = whole[previous:end]
                if index + 1 == len(turns) and _THOUGHT in answer and _start(written, answer) is None:
                    # Templates of reasoning models leave out all reasoning; that of the last answer is to be learnt.
                    opened = prompt.rstrip().endswith("<think>")
                    written = prompt + (answer.removeprefix("<think>").lstrip("\n") if opened else answer)
                    whole, end = whole[:previous] + written + whole[end:], previous + len(written)
                begin = _start(written, answer)
                if begin is None and index + 1 < len(turns):
                    changed.add(len(answers))
                    start = previous + _common(prompt, written)
                else:
                    start = previous + _prompt_length(prompt, written, begin, answer, index)
            if index + 1 < len(turns):
                following = places.get(index + 1, end) - len(talk.cores[index + 1])
                length = self._end(
                    whole[end:following], talk.behind(index, self.write(talk.marked[: index + 1], False))
                )
            else:
                whole, length = self._last_end(whole, end, talk)
            if not length:
                raise ValueError(
                    "the chat template writes no end-of-turn token after an answer, so a model never stops"
                )
            answers.append((start, end + length))
        return Rendered(text=whole, answers=tuple(answers), changed=frozenset(changed))

    def _end(self, region: str, other: str) -> int:
        """How much of what stands behind an answer ends it: to the last token that stands there in another place, too.

        ``region`` goes to the next turn's text or to the end of all, ``other`` is what the template writes where that
        is not so. Where the two have no token in common it is the first one: a turn that ends where the next one opens.
        """
        tokens = [token.end() for token in self._tokens.finditer(region)]
        common = _common(region, other)
        return max([end for end in tokens if end <= common] or tokens[:1], default=0)

    def _last_end(self, whole: str, end: int, talk: _MarkedTalk) -> tuple[str, int]:
        """The text, and the length of its end; where a turn ends only as the next one opens, that is put behind it."""
        region = whole[end:]
        if region not in self._last_ends:
            try:
                followed = talk.behind(len(talk.marked) - 1, self.write([*talk.marked, ("user", "a")], False))
            except ValueError:  # a template for one question alone
                followed = ""
            length = self._end(region, followed)
            opening = self._end(followed, region)
            self._last_ends[region] = (region, length) if length else (followed[:opening], opening)
        region, length = self._last_ends[region]
        return whole[:end] + region, length

    # -------------------------------------------------------------------------------- answers that the template marks

    def _marked(self, turns: Sequence[Turn]) -> Rendered:
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = self._messages(turns)
        with self._refusals():
            (whole,), (marks,) = render_jinja_template(
                conversations=[messages],
                chat_template=self._text,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        answers = []
        terminators = {self._tokenizer.eos_token, *(family.end for family in CHAT_FORMATS.values())}
        joined: list[list[int]] = []  # some templates mark an answer and its end one after the other
        for start, end in marks:
            if joined and not whole[joined[-1][1] : start].strip():
                joined[-1][1] = end
            else:
                joined.append([start, end])
        for start, marked_end in joined:
            end = marked_end
            # Some templates mark the text of the answer only. A model that never sees the end never stops.
            following = self._tokens.search(whole, end)
            if (
                not self._tokens.search(whole, start, end)
                and following
                and following[0] in terminators
                and not whole[end : following.start()].strip()
            ):
                end = following.end()
            stop = max((match.end() for match in self._tokens.finditer(whole, start, end)), default=start)
            if stop == start or whole[stop:end].strip():
                raise ValueError(
                    "the chat template writes no end-of-turn token after an answer, so a model never stops"
                )
            answers.append((start, stop))
        return Rendered(text=whole, answers=tuple(answers))


class _MarkedTalk:
    """Turns with a mark behind the text of each, before the white space that a template may strip."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        self.cores = [text.strip() for _, text in turns]
        texts = "".join(self.cores)
        free = (mark for mark in map(chr, count(0xF0000)) if mark not in texts)
        self._marks = [next(free) for _ in turns]
        self._any = re.compile("[" + "".join(self._marks) + "]")
        self.marked = [
            # A system text that is blank stays so: it keeps a template's own one away.
            (role, text if role == "system" and not core else text.rstrip() + mark + text[len(text.rstrip()) :])
            for (role, text), core, mark in zip(turns, self.cores, self._marks, strict=True)
        ]

    def take_out(self, text: str) -> tuple[str, dict[int, int]]:
        """The text without marks, and where that of each turn stood."""
        found = list(self._any.finditer(text))
        return self._any.sub("", text), {
            self._marks.index(match[0]): match.start() - number for number, match in enumerate(found)
        }

    def behind(self, index: int, text: str) -> str:
        """What follows the mark of a turn."""
        _, mark, rest = text.rpartition(self._marks[index])
        if not mark:
            raise ValueError(f"turn {index}: the chat template leaves it out")
        return self._any.sub("", rest)


def _prompt_length(prompt: str, written: str, begin: int | None, answer: str, index: int) -> int:
    """How much of ``written``, which ends with the answer from ``begin`` on, stands in the prompt and is not learnt."""
    if begin is None:  # its reasoning may be what the prompt or the template wrote itself
        begin = _start(written, answer.rpartition(_THOUGHT)[2])
    if begin is None:
        raise ValueError(
            f"turn {index}: the chat template changes this answer; take out of the data what it changes, or choose a "
            "model type"
        )
    if written.startswith(prompt):
        return len(prompt)
    # A prompt can open more than an answer of the past has, such as <think>.
    head = written[:begin]
    length = _common(prompt, head)
    if prompt[:length].rstrip().endswith("<think>"):
        length = prompt.rindex("<think>", 0, length)
    if not _NO_THOUGHT.fullmatch(head, length) or not _NO_THOUGHT.fullmatch(prompt, length):
        raise ValueError(
            f"turn {index}: the chat template asks for an answer in another way than it writes one, so where it "
            "begins is ambiguous; choose a model type"
        )
    return length


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _dense(text: str) -> str:
    """Without white space."""
    return "".join(text.split())


def _start(written: str, answer: str) -> int | None:
    """Where the answer begins that the text ends with, but for white space; None: it does not end with it."""
    if written.endswith(answer):
        return len(written) - len(answer)
    place = len(written)
    for character in reversed(_dense(answer)):
        place -= 1
        while place >= 0 and written[place].isspace():
            place -= 1
        if place < 0 or written[place] != character:
            return None
    return place


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError once the block has used so much of the processor; only the main thread can be stopped so."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    late = TimeoutError(f"it does not end within {seconds:g} s")

    def stop(*_: object) -> None:
        raise late

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and cause is not late:  # Jinja may stumble over it where a line of code has no number
            cause = cause.__context__
        raise cause or error from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
