"""Every chat format against text that was written down by hand from its source."""

from __future__ import annotations

import copy
import itertools
import random
import re

import jinja2
import pytest

from codeact.base.errors import InputError
from codeact.data.records import Record
from codeact.scoring.tokens import tokenize
from codeact.text import chat
from codeact.text.conversations import encode_conversations
from codeact.text.formats import CHAT_FORMATS
from codeact.text.templates import MODEL_TYPES, ConversationTemplate, PromptBuilder
from codeact.text.tokenizers import leading_bos
from tests.helpers.chat_tokenizers import family_tokenizer

TURNS = [
    ("system", "Be brief."),
    ("user", " Hi {text} {eos}"),
    ("assistant", "Hello\n"),
    ("user", "Bye"),
    ("assistant", "Ciao"),
]

# Of TURNS, then of [user "Q", assistant "A"].
GOLDEN = {
    # chat_completion in meta-llama/codellama, llama/generation.py: a pair is "[INST] {} [/INST] {} " between BOS and
    # EOS, texts are stripped, the system text goes into the first user turn between <<SYS>> marks.
    "codellama": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi {text} {eos} [/INST] Hello </s><s>[INST] Bye [/INST] Ciao </s>",
        "<s>[INST] Q [/INST] A </s>",
    ),
    # ai.google.dev/gemma/docs/formatting: turns, "\n" after <end_of_turn>, role "model"; no system turn, its text opens
    # the first user turn. The published template strips texts.
    "codegemma": (
        "<start_of_turn>user\nBe brief.\n\nHi {text} {eos}<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nCiao<end_of_turn>\n",
        "<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n",
    ),
    # deepseek-ai/DeepSeek-Coder, finetune/finetune_deepseekcoder.py: the prompt, and "{output}\n<|EOT|>"; several turns
    # as in the instruct models' own template, "\n" after <|EOT|>. (That template forgets the line break after a system
    # turn of yours.)
    "deepseek": (
        "Be brief.\n### Instruction:\n Hi {text} {eos}\n### Response:\nHello\n\n<|EOT|>\n"
        "### Instruction:\nBye\n### Response:\nCiao\n<|EOT|>\n",
        "You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeek Company, and "
        "you only answer questions related to computer science. For politically sensitive questions, security and "
        "privacy issues, and other non-computer science questions, you will refuse to answer.\n"
        "### Instruction:\nQ\n### Response:\nA\n<|EOT|>\n",
    ),
    # bigcode-project/starcoder2-self-align, src/star_align/prompt_template.py. It refuses system turns; here one takes
    # the place of the first sentence.
    "starcoder2": (
        "<|endoftext|>Be brief.\n\n### Instruction\n Hi {text} {eos}\n\n### Response\nHello\n<|endoftext|>\n\n"
        "### Instruction\nBye\n\n### Response\nCiao<|endoftext|>\n\n",
        "<|endoftext|>You are an exceptionally intelligent coding assistant that consistently delivers accurate and "
        "reliable responses to user instructions.\n\n### Instruction\nQ\n\n### Response\nA<|endoftext|>\n\n",
    ),
    # ChatML; the system text is that of the Qwen1.5 documentation (qwen.readthedocs.io, v1.5, inference/chat).
    "codeqwen": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi {text} {eos}<|im_end|>\n"
        "<|im_start|>assistant\nHello\n<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\nCiao<|im_end|>\n",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n",
    ),
    # ChatFormat in meta-llama/llama3, llama/tokenizer.py: header, "\n\n", the stripped text, <|eot_id|>. Its BOS is
    # written by the tokenizer.
    "llama3": (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi {text} {eos}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nCiao<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
    ),
}

ANSWERS = {
    "codellama": [" Hello </s>", " Ciao </s>"],
    "codegemma": ["Hello<end_of_turn>", "Ciao<end_of_turn>"],
    "deepseek": ["Hello\n\n<|EOT|>", "Ciao\n<|EOT|>"],
    "starcoder2": ["Hello\n<|endoftext|>", "Ciao<|endoftext|>"],
    "codeqwen": ["Hello\n<|im_end|>", "Ciao<|im_end|>"],
    "llama3": ["Hello<|eot_id|>", "Ciao<|eot_id|>"],
}


def test_every_family_has_its_golden_text():
    ours = {name for name in CHAT_FORMATS if not name.startswith("paper-")}  # those: test_paper_formats.py
    assert set(GOLDEN) == set(ANSWERS) == ours
    assert set(CHAT_FORMATS) == set(MODEL_TYPES) - {"chat"}


@pytest.mark.parametrize("name", GOLDEN)
class TestFamilies:
    def test_text(self, tokenizer, name):
        template = ConversationTemplate(family_tokenizer(tokenizer, name), name)
        long, short = template.render([TURNS, [("user", "Q"), ("assistant", "A")]])
        assert (long.text, short.text) == GOLDEN[name]

    def test_answers_hold_the_end_of_turn(self, tokenizer, name):
        (result,) = ConversationTemplate(family_tokenizer(tokenizer, name), name).render([TURNS])
        assert [result.text[start:end] for start, end in result.answers] == ANSWERS[name]

    def test_prompt_is_what_stands_before_the_answer(self, tokenizer, name):
        template = ConversationTemplate(family_tokenizer(tokenizer, name), name)
        (result,) = template.render([TURNS])
        assert template.prompt(TURNS[:-1]) == result.text[: result.answers[-1][0]]

    def test_prompts_for_scoring(self, tokenizer, name):
        made = family_tokenizer(tokenizer, name)
        prompts = PromptBuilder(made, name)
        record = Record(id="0", row=0, question="Q", answer="A and B", history=tuple(TURNS[:3]))
        text = prompts.render(record)
        assert text.endswith(ConversationTemplate(made, name).prompt([("user", "Q")])[-12:])
        (item,) = tokenize([record], made, prompts, 400)
        assert item.status == "ok"
        # one BOS, wherever it comes from, and one more before each further pair of CodeLlama's
        bos = 0 if name in ("codeqwen", "starcoder2") else 2 if name == "codellama" else 1
        if name != "starcoder2":  # its BOS is its EOS
            assert list(item.conditional).count(made.bos_token_id) == bos
        assert list(item.conditional)[:2].count(made.bos_token_id) == (name != "codeqwen")

    def test_fingerprints_differ(self, tokenizer, name):
        made = PromptBuilder(family_tokenizer(tokenizer, name), name)
        assert made.fingerprint != PromptBuilder(tokenizer, "chat").fingerprint
        assert made.fingerprint == PromptBuilder(family_tokenizer(tokenizer, name), name).fingerprint


HOSTILE = ["plain", " '\"\\n\\ {{ x }} {% if %} \n", "\n\n lines \t\n", "é → 要 \x00 {text} {bos}", "<|im_end|> </s>"]


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_the_format_in_jinja_writes_the_same(tokenizer, name):
    """What is saved with a trained model: with and without a system turn, whatever the texts, and as a prompt."""
    made = copy.deepcopy(family_tokenizer(tokenizer, name.removeprefix("paper-")))
    if name.startswith("paper-"):
        made.add_tokens(list(CHAT_FORMATS[name].tokens[1:]), special_tokens=True)
    template = ConversationTemplate(made, name)
    made.chat_template = template.jinja
    assert "\\u" not in template.jinja, "no other engine of Jinja knows that escape"
    assert set(re.findall(r"\\\\(.)", template.jinja)) <= {"n"}
    bos = made.decode(leading_bos(made))
    rng = random.Random(name)
    systems = [[]] if template.family.rounds else [[], [("system", "Be brief.")], [("system", " {{ }} ")]]
    for system, length in itertools.product(systems, (1, 2, 3, 6)):
        turns = [*system, *((("user", "assistant")[n % 2], rng.choice(HOSTILE)) for n in range(length))]
        messages = [{"role": role, "content": text} for role, text in turns]
        asked = turns[-1][0] == "user"
        written = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)
        (whole,) = [template.prompt(turns)] if asked else [result.text for result in template.render([turns])]
        if template.family.rounds == "all":  # a BOS begins each round, and then the end of the one before
            whole = whole if asked else whole.removesuffix(template.family.separator)
            assert written.replace(bos, "") == whole.replace(bos, "")
            between = template.family.separator + CHAT_FORMATS[name].user.partition("{text}")[0]
            assert written.count(bos + between) >= sum(role == "user" for role, _ in turns) - 1
        else:
            assert written == (whole if whole.startswith(bos) else bos + whole)
            assert made(written, add_special_tokens=False)["input_ids"][: len(leading_bos(made))] == leading_bos(made)


@pytest.mark.parametrize("name", ["codellama", "codegemma", "paper-deepseek"])
def test_the_format_in_jinja_refuses_what_the_format_cannot_write(tokenizer, name):
    made = copy.deepcopy(family_tokenizer(tokenizer, name.removeprefix("paper-")))
    template = ConversationTemplate(made, name)
    for roles in (
        ["user", "user"],
        ["assistant"],
        ["user", "system"],
        *([["system", "user"]] * bool(template.family.rounds)),
    ):
        turns = [(role, "x") for role in roles]
        with pytest.raises(ValueError) as ours:  # noqa: PT011
            template.family.write(turns)
        with pytest.raises(jinja2.TemplateError) as theirs:
            made.apply_chat_template(
                [{"role": role, "content": "x"} for role in roles], chat_template=template.jinja, tokenize=False
            )
        assert str(theirs.value) == str(ours.value)
    with pytest.raises(jinja2.TemplateError, match=r"knows the roles|have to alternate"):
        made.apply_chat_template([{"role": "tool", "content": "x"}], chat_template=template.jinja, tokenize=False)


class TestMissingTokens:
    @pytest.mark.parametrize(
        ("name", "missing"),
        [("codegemma", "<start_of_turn> and <end_of_turn>"), ("llama3", "<|start_header_id|> and <|end_header_id|>")],
    )
    def test_it_says_which(self, tokenizer, name, missing):
        for build in (ConversationTemplate, PromptBuilder):
            with pytest.raises(InputError) as error:
                build(tokenizer, name)
            assert f"template {name} needs {missing}" in str(error.value)

    def test_no_bos_or_eos(self, tokenizer):
        made = copy.deepcopy(family_tokenizer(tokenizer, "codellama"))
        made.bos_token = made.eos_token = None
        with pytest.raises(InputError, match="codellama needs a BOS token and an EOS token"):
            ConversationTemplate(made, "codellama")
        with pytest.raises(InputError, match="deepseek needs an EOS token"):
            ConversationTemplate(made, "deepseek")

    def test_a_token_that_is_read_in_pieces(self, tokenizer):
        """A tokenizer may name a token as its EOS that it does not read as one."""
        made = copy.deepcopy(family_tokenizer(tokenizer, "deepseek"))
        made.backend_tokenizer.encode_special_tokens = True
        made.split_special_tokens = True
        with pytest.raises(InputError, match="needs an EOS token"):
            ConversationTemplate(made, "deepseek")


class TestAlternation:
    @pytest.mark.parametrize("name", ["codellama", "codegemma"])
    @pytest.mark.parametrize(
        "roles", [["user", "user", "assistant"], ["assistant", "user", "assistant"], ["user", "system", "assistant"]]
    )
    def test_roles_that_the_format_cannot_write(self, tokenizer, name, roles):
        template = ConversationTemplate(family_tokenizer(tokenizer, name), name)
        (reason,) = template.render([[(role, "x") for role in roles]])
        assert "have to alternate" in reason
        with pytest.raises(ValueError, match="alternate"):
            template.prompt([("user", "a"), ("user", "b")])


MASKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + END }}{% endgeneration %}{{ REST }}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TestChat:
    def answers(self, tokenizer, text, turns=None):
        changed = tokenizer
        changed.chat_template = text
        template = ConversationTemplate(changed, "chat")
        template.check_trainable()
        (result,) = template.render([turns or TURNS])
        return result if isinstance(result, str) else [result.text[a:b] for a, b in result.answers]

    @pytest.fixture
    def own(self, tokenizer, monkeypatch):
        monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template)
        return tokenizer

    def test_its_own_template(self, own):
        assert self.answers(own, own.chat_template) == ["Hello\n<|im_end|>", "Ciao<|im_end|>"]

    def test_the_text_is_what_the_tokenizer_writes(self, own):
        messages = [{"role": role, "content": text} for role, text in TURNS]
        (result,) = ConversationTemplate(own, "chat").render([TURNS])
        assert result.text == own.apply_chat_template(messages, tokenize=False)

    @pytest.mark.parametrize(
        ("end", "rest"), [("'<|im_end|>'", "''"), ("''", "'<|im_end|>'"), ("'<|im_end|>\\n'", "''")]
    )
    def test_generation_marks(self, own, end, rest):
        """Whether the template marks the end of turn or not, it is labelled, and nothing after it."""
        text = MASKED.replace("END", end).replace("REST", rest)
        assert self.answers(own, text) == ["Hello\n<|im_end|>", "Ciao<|im_end|>"]

    def test_marks_without_an_end_of_turn_are_refused(self, own):
        with pytest.raises(InputError, match="no end-of-turn token"):
            self.answers(own, MASKED.replace("END", "''").replace("REST", "''"))

    def test_a_template_that_marks_nothing(self, own):
        with pytest.raises(InputError, match="marks no answer"):
            self.answers(own, "{% if false %}{% generation %}x{% endgeneration %}{% endif %}a<|im_end|>")

    def test_a_template_that_never_ends_an_answer(self, own):
        with pytest.raises(InputError, match=r"cannot be trained on: .* no end-of-turn token .* codellama, codegemma"):
            self.answers(own, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
                         "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip

    def test_a_template_whose_prompt_does_not_begin_the_whole(self, own):
        text = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
        assert self.answers(own, text) == ["Hello\n<|im_end|>", "Ciao<|im_end|>"]

    def test_a_template_that_rewrites_earlier_answers(self, own):
        text = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}"
            "{{ m['content'][1:] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        assert self.answers(own, text, TURNS[3:]) == ["Ciao<|im_end|>"]
        assert self.answers(own, text) == ["ello\n<|im_end|>", "Ciao<|im_end|>"]
        (result,) = ConversationTemplate(own, "chat").render([TURNS])
        assert result.changed == {0}

    @pytest.mark.parametrize("content", ["m['content'][:-1]", "m['content'] | length", "'<br>' + m['content'] | upper"])
    def test_a_template_that_changes_texts(self, own, content):
        with pytest.raises(
            InputError, match=r"cannot be trained on: (turn 0: .* leaves it out|.* depends on how|.* changes)"
        ):
            self.answers(own, f"{{% for m in messages %}}{{{{ {content} }}}}<|im_end|>{{% endfor %}}")

    def test_a_template_that_asks_and_writes_differently(self, own):
        text = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>bot\n{% endif %}"
        )
        with pytest.raises(
            InputError, match=r"turn 1: .* in another way than it writes one, so where it begins is ambig"
        ):
            self.answers(own, text)

    def test_a_template_that_refuses(self, own):
        text = "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}" + str(own.chat_template)
        assert "the chat template refuses it: too many" in self.answers(own, text)
        assert self.answers(own, text, TURNS[1:3]) == ["Hello\n<|im_end|>"]

    @pytest.mark.parametrize(
        "body",
        [
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% for a in range(99999) %}{% if range(99999) | list | length < 0 %}{% endif %}{% endfor %}",
            "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
            "{% set ns = namespace(x='ab') %}{% for a in range(99999) %}{% set ns.x = (ns.x + ns.x)[:9999] %}"
            "{% for b in range(9999) %}{% if 'c' in ns.x %}{% endif %}{% endfor %}{% endfor %}",
            "{% if messages | length > 1 %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
            "{% endfor %}"
            "{% endif %}",
        ],
        ids=["loops", "list", "recursion", "texts", "only_later"],
    )
    def test_a_template_without_end(self, own, body, monkeypatch):
        monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.3)
        with pytest.raises(
            InputError, match=r"cannot be .*: the chat template refuses it: (it does not end|maximum rec)"
        ):
            self.answers(own, body + str(own.chat_template))

    def test_a_template_that_does_not_end_for_one_row_is_not_tried_again(self, own, monkeypatch):
        monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.3)
        own.chat_template = (
            "{% if messages[0]['content'] == 'x' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
            "{% endfor %}{% endif %}" + str(own.chat_template)
        )
        good, bad = ([("user", text), ("assistant", "b")] for text in "ax")
        first, second, third, fourth = ConversationTemplate(own, "chat").render([good, bad, bad, good])
        assert first.answers
        assert second == "the chat template refuses it: it does not end within 0.3 s"
        assert third == fourth == "the chat template is not tried again: it did not end for an earlier row"

    @pytest.mark.parametrize("text", ["{{ 9 ** 9 ** 9 }}", "{% set x = 2**n %}"])
    def test_a_template_that_computes_powers(self, own, text):
        assert self.answers(own, "{{ '**bold**' }}** " + str(own.chat_template))
        with pytest.raises(InputError, match="computes powers"):
            self.answers(own, text)

    @pytest.mark.parametrize("text", ["{% for %}", "{{ 'a }}", "{% nonsense %}"])
    def test_a_broken_template(self, own, text):
        with pytest.raises(InputError, match="chat template"):
            self.answers(own, text)

    def test_none(self, own):
        own.chat_template = None
        with pytest.raises(InputError, match="no chat template; choose one of: qa, alpaca, codellama"):
            ConversationTemplate(own, "chat")

    def test_unknown_type(self, own):
        with pytest.raises(InputError, match="model type 'llama-3' is unknown; choose one of: llama3, "):
            ConversationTemplate(own, "llama-3")


# Cut to what the real templates do with texts; each is named with the part that made it hard.
REAL = {
    # Phi-3.5: EOS at the very end only.
    "phi": (
        "{% for m in messages %}{% if m['role'] == 'system' and m['content'] %}{{'<|system|>\n' + m['content'] + "
        "'<|end|>\n'}}{% elif m['role'] == 'user' %}{{'<|user|>\n' + m['content'] + '<|end|>\n'}}{% elif m['role'] == "
        "'assistant' %}{{'<|assistant|>\n' + m['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|system|> <|user|> <|assistant|> <|end|>",
        ["Hello\n<|end|>", "Ciao<|end|>"],
    ),
    # The first Phi-3, which leaves system turns out.
    "phi_without_system": (
        "{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{'<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n'}}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|end|>\n'}}{% endif %}{% endfor %}",
        "<|user|> <|assistant|> <|end|>",
        ["Hello\n<|end|>", "Ciao<|end|>"],
    ),
    # Qwen3: an empty <think> in the last answer alone.
    "qwen3": (
        "{% for m in messages %}{% set c = m['content'].split('</think>')[-1].lstrip('\n') %}"
        "{% if m['role'] == 'assistant' "
        "and loop.last %}<|im_start|>assistant\n<think>\n\n</think>\n\n{{ c }}"
        "{% else %}<|im_start|>{{ m['role'] }}\n{{ c }}"
        "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "",
        ["Hello\n<|im_end|>", "<think>\n\n</think>\n\nCiao<|im_end|>"],
    ),
    # DeepSeek-R1's distills: the prompt opens a thought that no written answer has.
    "r1": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
        "{% elif m['role'] == 'user' %}"
        "<|User|>{{ m['content'] }}{% else %}<|Assistant|>{{ m['content'].split('</think>')[-1] }}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        "<|User|> <|Assistant|> <|end|>",
        ["Hello\n<|end|>", "Ciao<|end|>"],
    ),
    # GLM-4: a turn ends as the next one opens.
    "glm4": (
        "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "[gMASK] <sop> <|system|> <|user|> <|assistant|>",
        ["\nHello\n<|user|>", "\nCiao<|user|>"],
    ),
    # Gemma: refuses a system turn, strips texts.
    "gemma": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<start_of_turn> <end_of_turn>",
        ["Hello<end_of_turn>", "Ciao<end_of_turn>"],
    ),
    # Cohere: two tokens close an answer; Nemotron: an empty thought that the prompt opens otherwise.
    "cohere": (
        "{% for m in messages %}<|T|>{{ m['role'] }}<|S|>{{ m['content'] }}<|E|><|T_END|>{% endfor %}"
        "{% if add_generation_prompt %}<|T|>assistant<|S|>{% endif %}",
        "<|T|> <|S|> <|E|> <|T_END|>",
        ["Hello\n<|E|><|T_END|>", "Ciao<|E|><|T_END|>"],
    ),
    "nemotron": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ '<think></think>' if m['role'] == 'assistant' else '' }}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        "",
        ["<think></think>Hello\n<|im_end|>", "<think></think>Ciao<|im_end|>"],
    ),
}


@pytest.fixture(scope="module")
def real(tokenizer, request):
    """A tokenizer with one of the REAL templates, and what its answers are."""
    text, tokens, answers = REAL[request.param]
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"eos_token": "<|endoftext|>", "additional_special_tokens": tokens.split()})
    made.chat_template = text
    return made, answers


@pytest.mark.parametrize("real", REAL, indirect=True)
class TestRealTemplates:
    def test_every_answer_is_found(self, real):
        made, answers = real
        template = ConversationTemplate(made, "chat")
        template.check_trainable()
        (result,) = template.render([TURNS])
        assert [result.text[start:end] for start, end in result.answers] == answers
        assert "Be brief." in result.text
        assert result.text.count("Be brief.") == result.text.count("Bye") == 1

    def test_what_stands_before_the_last_answer_is_what_is_asked(self, real):
        made, _ = real
        template = ConversationTemplate(made, "chat")
        (result,) = template.render([TURNS])
        asked, written = template.prompt(TURNS[:-1]), result.text[: result.answers[-1][0]]
        assert asked.startswith(written)
        assert asked.removeprefix(written) in ("", "<think>\n")

    def test_texts_at_their_worst(self, real):
        made, _ = real
        template = ConversationTemplate(made, "chat")
        for question in ("q", "q\n", " x", "Ciao", "</think>"):
            for answer in ("x", "  two\n  lines ", "<think>", "a </think> b", "\n\n```\nx\n```\n"):
                turns = [("user", question), ("assistant", "one"), ("user", question), ("assistant", answer)]
                (result,) = template.render([turns])
                assert not isinstance(result, str), (turns, result)
                labels = [result.text[start:end] for start, end in result.answers]
                assert len(labels) == 2
                assert "one" in labels[0]
                assert answer.strip().removeprefix("<think>").strip() in labels[1]


def test_the_reasoning_of_the_last_answer_is_learnt(tokenizer):
    """R1's template leaves out all reasoning, and asks for it: the last answer is written as it is asked for."""
    text, tokens, _ = REAL["r1"]
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"additional_special_tokens": tokens.split()})
    made.chat_template = text
    thought = "<think>\nhm\n</think>\n\n42"
    turns = [("user", "a"), ("assistant", thought), ("user", "b"), ("assistant", thought)]
    template = ConversationTemplate(made, "chat")
    (result,) = template.render([turns])
    labels = [result.text[start:end] for start, end in result.answers]
    assert labels == ["\n\n42<|end|>", "hm\n</think>\n\n42<|end|>"]
    assert result.changed == {0}
    assert result.text[: result.answers[-1][0]] == template.prompt(turns[:-1])


MARKED = {
    # Phi-3's of TRL: the end of all is marked beside the answers.
    "phi": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|end|>\n' }}{% endgeneration %}{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
        "{% else %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}",
        ["<think>one</think>1<|end|>", "<think>two</think>2<|end|>\n<|endoftext|>"],
    ),
    # Gemma's of TRL: a system turn is refused, answer and end are marked apart.
    "gemma": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}<|user|>"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}{% generation %}"
        "<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|user|>{% endif %}",
        ["<think>one</think>1<|end|>", "<think>two</think>2<|end|>"],
    ),
    # DeepSeek-V3's of TRL: marked are answers without the reasoning, of the last one, too.
    "deepseek": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}<|assistant|>"
        "{{ m['content'].split('</think>')[-1] }}<|end|>{% endgeneration %}{% else %}<|user|>{{ m['content'] }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
        ["1<|end|>", "two</think>2<|end|>"],
    ),
    # Qwen3.5 without thinking: the prompt closes the thought that the last answer opens in another form.
    "qwen": (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' and '</think>' in m['content'] %}"
        "{% set t = m['content'].split('</think>') %}"
        "{% if loop.last %}<think>\n{{ t[0].split('<think>')[-1] }}\n</think>\n\n{% endif %}{{ t[-1] }}"
        "{% else %}{{ m['content'] }}{% endif %}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n\n</think>\n\n{% endif %}",
        ["1<|end|>", "<think>\ntwo\n</think>\n\n2<|end|>"],
    ),
}


@pytest.mark.parametrize("name", MARKED)
def test_reasoning_in_every_turn(tokenizer, name):
    """The last answer is learnt whole; an earlier one that the template writes without its reasoning is context."""
    text, expected = MARKED[name]
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens(
        {
            "eos_token": "<|endoftext|>",
            "additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>", "<|system|>"],
        }
    )
    made.chat_template = text
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "<think>one</think>1")]
    turns += [("user", "b"), ("assistant", "<think>two</think>2")]
    template = ConversationTemplate(made, "chat")
    template.check_trainable()
    (result,) = template.render([turns])
    assert [result.text[start:end] for start, end in result.answers] == expected
    assert result.changed == (frozenset() if "one" in expected[0] else {0})
    assert result.text.count("Be brief.") == 1
    record = Record(id="0", row=0, question="b", answer=turns[-1][1], history=tuple(turns[:-2]))
    for last_only in (False, True):
        (sample,) = encode_conversations([record], made, last_answer_only=last_only)
        learnt = made.decode(sample.input_ids[sample.labels != -100])
        assert learnt == "".join(expected[1 if last_only or result.changed else 0 :])
        assert sample.changed == len(result.changed) * (not last_only)


def test_marks_of_what_is_left_out_are_no_answers(tokenizer):
    """Idefics3's template reads texts in parts only: it marked answers that were not there."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = (
        "{% for m in messages %}{% generation %}{{ m['content'].nothing }}<|im_end|>{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(InputError, match="turn 0: the chat template leaves it out"):
        ConversationTemplate(made, "chat").check_trainable()


def test_a_blank_system_text_keeps_the_templates_own_away(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nI am.<|im_end|>\n{% endif %}" + (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    own, blank = ConversationTemplate(made, "chat").render([TURNS[1:], [("system", ""), *TURNS[1:]]])
    assert "I am." in own.text
    assert "I am." not in blank.text
