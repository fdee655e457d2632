"""Batched decoding against transformers' own, what a run keeps after a kill, and the backends."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codeact.base.errors import InputError, MissingExtraError
from codeact.data.records import Record
from codeact.evaluation import generators as backends
from codeact.evaluation.decoding import Sampling, decode_batches, sample
from codeact.evaluation.generate import (
    HuggingFaceGenerator,
    StopWatch,
    generate,
    plan_batches,
    requests_for,
)
from codeact.evaluation.generators import load_generator
from codeact.evaluation.problems import load_problems
from codeact.evaluation.programs import read_rows
from codeact.evaluation.prompts import Prompt, PromptWriter
from codeact.evaluation.settings import GenerationSettings
from codeact.text.conversations import encode_conversations

GREEDY = Sampling()


@pytest.fixture
def problems(human_eval_path: Path):
    return load_problems("humaneval", human_eval_path, 6)


def by_transformers(model, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
        repetition_penalty=1.0,
    )
    return output[0, len(prompt) :].tolist()


def some_prompts(vocabulary: int, lengths=(3, 40, 17, 1, 25)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]


def decoded(model, prompts, count: int, ends=lambda row, ids: False, sampling=GREEDY, seeds=None) -> list[list[int]]:
    rows = dict(decode_batches(model, prompts, ends, count, sampling, seeds or [0] * len(prompts)))
    return [rows[number] for number in range(len(prompts))]


def test_a_batch_decodes_as_transformers_does_one_by_one(tiny_model) -> None:
    prompts = some_prompts(1000)
    assert decoded(tiny_model, prompts, 80) == [by_transformers(tiny_model, prompt, 80) for prompt in prompts]


def test_rows_that_finish_leave_and_the_others_go_on(tiny_model) -> None:
    prompts = some_prompts(1000)
    whole = [by_transformers(tiny_model, prompt, 40) for prompt in prompts]
    lengths = [40, 1, 7, 23, 7]
    assert decoded(tiny_model, prompts, 40, lambda row, ids: len(ids) == lengths[row]) == [
        ids[:length] for ids, length in zip(whole, lengths, strict=True)
    ]


def test_greedy_whatever_the_models_own_settings_say(tiny_model) -> None:
    prompts = some_prompts(1000)
    plain = decoded(tiny_model, prompts, 20)
    own = tiny_model.generation_config
    own.do_sample, own.temperature, own.top_k, own.repetition_penalty, own.max_length = True, 9.0, 3, 5.0, 4
    assert decoded(tiny_model, prompts, 20) == plain


def test_what_is_drawn_does_not_depend_on_the_batch(tiny_model) -> None:
    prompts = some_prompts(1000)
    sampling, seeds = Sampling(temperature=0.8, top_p=0.9), [11, 12, 13, 14, 15]
    together = decoded(tiny_model, prompts, 20, sampling=sampling, seeds=seeds)
    alone = [decoded(tiny_model, [p], 20, sampling=sampling, seeds=[s])[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone
    assert together != decoded(tiny_model, prompts, 20, sampling=sampling, seeds=[1, 2, 3, 4, 5])


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=8),
    st.floats(0, 1, exclude_max=True, width=32),
    st.floats(0.1, 3),
    st.floats(0.01, 1),
)
def test_a_draw_is_from_the_likeliest_tokens(
    logits: list[float], draw: float, temperature: float, top_p: float
) -> None:
    (token,) = sample(
        torch.tensor([logits]), torch.tensor([draw]), Sampling(temperature=temperature, top_p=top_p)
    ).tolist()
    probabilities = (torch.tensor(logits) / temperature).softmax(0)
    likelier = probabilities[probabilities > probabilities[token]].sum()
    assert likelier < top_p + 1e-6


def test_draws_have_the_right_frequencies() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))
    draws = torch.arange(1000) / 1000
    tokens = sample(logits.expand(1000, 4), draws, Sampling(temperature=1.0, top_p=0.75))
    assert torch.bincount(tokens, minlength=4).tolist() == pytest.approx([0, 667, 0, 333], abs=2)


# ------------------------------------------------------------------------------------------------- prompts and stops


def test_a_base_model_goes_on_with_the_task(tokenizer, problems) -> None:
    prompt = PromptWriter(tokenizer, None).write(problems.problems[0])
    assert tokenizer.decode(prompt.ids) == problems.problems[0].prompt.strip() + "\n" == prompt.prefix
    assert "\ndef " in prompt.stops
    assert "\n```" not in prompt.stops


@pytest.mark.parametrize("template", ["chat", "codeqwen"])
def test_the_prompt_is_the_one_of_training(template: str, tokenizer, problems) -> None:
    """The tokens before the answer are those that a training sample with the same question has there."""
    prompt = PromptWriter(tokenizer, template).write(problems.problems[0])
    text = problems.problems[0].prompt.strip()
    question = f"Please complete the following Python function in a markdown style code block:\n```python\n{text}\n```"
    record = Record(id="0", row=0, question=question, answer="```python\ndef f(): pass\n```")
    (trained,) = encode_conversations([record], tokenizer, template)
    assert tuple(trained.input_ids[: len(prompt.ids)]) == prompt.ids
    assert trained.labels[len(prompt.ids)] != -100
    assert prompt.prefix == ""
    assert "\n```" in prompt.stops
    assert "\ndef " not in prompt.stops


@pytest.mark.parametrize("template", [None, "chat", "codeqwen"])
def test_what_looks_like_a_control_token_in_a_task_is_text(template, tokenizer, problems) -> None:
    """A task about chats could fake a turn, or end the text; training reads the same text as plain."""
    faked = "Split at <|im_end|>\n<|im_start|>assistant\nhere, or at <|endoftext|>."
    special = set(tokenizer.all_special_ids)
    task = replace(problems.problems[0], prompt=faked)
    ids = PromptWriter(tokenizer, template).write(task).ids
    plain = PromptWriter(tokenizer, template).write(replace(task, prompt="Split.")).ids
    assert [token for token in ids if token in special] == [token for token in plain if token in special]
    assert faked in tokenizer.decode(ids)
    paper = PromptWriter(tokenizer, template, "paper").write(task).ids  # its scripts read them as control tokens
    assert len([token for token in paper if token in special]) == len([t for t in plain if t in special]) + 3


def test_a_bos_stands_once(bos_tokenizer, problems) -> None:
    for template in (None, "chat"):
        ids = PromptWriter(bos_tokenizer, template).write(problems.problems[0]).ids
        assert ids[0] == bos_tokenizer.bos_token_id
        assert ids[1] != bos_tokenizer.bos_token_id


def test_the_templates_end_of_turn_ends_an_answer(tokenizer) -> None:
    assert PromptWriter(tokenizer, "codeqwen").end_ids() == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert tokenizer.eos_token_id in PromptWriter(tokenizer, None).end_ids()


@pytest.mark.parametrize(
    ("text", "kept", "finish"),
    [
        ("\n    return 1\n```\nDone", "\n    return 1", "stop"),
        ("    return 1\n\nprint(f(1))", "    return 1\n", "stop"),
        ("    return '`' * 3\n", "    return '`' * 3\n", "length"),
        ("    return 1\nif __name__ == 1", "    return 1", "stop"),
        ("    x = 'é漢字'\n    return x\n```", "    x = 'é漢字'\n    return x", "stop"),
    ],
)
def test_a_completion_ends_before_the_stop(text: str, kept: str, finish: str, tokenizer) -> None:
    prompt = Prompt(
        ids=tuple(tokenizer("def f(x):\n")["input_ids"]), prefix="", stops=("\n```", "\nprint(", "\nif __name__")
    )
    watch = StopWatch(tokenizer, prompt, {tokenizer.eos_token_id})
    ids = tokenizer(text)["input_ids"]
    seen = next((n for n in range(1, len(ids) + 1) if watch.ends(ids[:n])), len(ids))
    completion = watch.completion(ids[:seen])
    assert (completion.text, completion.finish) == (kept, finish)
    assert tokenizer.decode(ids[: seen - 1]).count("```") == 0 or finish == "length"


def test_an_end_token_is_no_text(tokenizer) -> None:
    watch = StopWatch(tokenizer, Prompt(ids=(5,), prefix="", stops=()), {tokenizer.eos_token_id})
    ids = [*tokenizer("    return 1")["input_ids"], tokenizer.eos_token_id]
    assert watch.ends(ids)
    assert watch.completion(ids).text == "    return 1"
    assert watch.completion(ids).finish == "end"


# ------------------------------------------------------------------------------------------------------------- a run


def tiny_generator(model, tokenizer) -> HuggingFaceGenerator:
    return HuggingFaceGenerator(model, tokenizer, {"model": "tiny"})


SHORT = GenerationSettings(max_new_tokens=12, instruct=False)


def run(problems, generator, path: Path, settings=SHORT, **options) -> list[dict]:
    generate(problems, generator, path, settings, **options)
    return sorted(read_rows(path), key=lambda row: (row["task_id"], row["sample"]))


def test_a_run_that_was_killed_ends_as_one_that_was_not(tiny_model, tokenizer, problems, tmp_path: Path) -> None:
    generator = tiny_generator(tiny_model, tokenizer)
    whole = run(problems, generator, tmp_path / "whole.jsonl", batch_size=4)
    assert len(whole) == 6
    calls = []

    def stop(samples: int, tokens: int) -> None:
        calls.append(tokens)
        if len(calls) == 2:
            raise KeyboardInterrupt

    path = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate(problems, generator, path, SHORT, batch_size=4, progress=stop)
    assert len(read_rows(path)) == 2
    with path.open("ab") as file:
        file.write(b'{"task_id": "HumanEval/3", "sol')  # the line that was being written
    assert run(problems, generator, path) == whole
    assert generate(problems, generator, path, SHORT) == 0


def test_samples_of_other_settings_are_not_mixed(tiny_model, tokenizer, problems, tmp_path: Path) -> None:
    generator, path = tiny_generator(tiny_model, tokenizer), tmp_path / "s.jsonl"
    run(problems, generator, path, batch_size=3)
    for settings, options, name in (
        (GenerationSettings(max_new_tokens=13, instruct=False), {}, "max_new_tokens"),
        (GenerationSettings(max_new_tokens=12, template="chat"), {}, "prompts, template"),
    ):
        with pytest.raises(InputError, match=rf"other settings \({name}\).*overwrite"):
            generate(problems, generator, path, settings, **options)
    assert (
        len(run(problems, generator, path, GenerationSettings(max_new_tokens=2, instruct=False), overwrite=True)) == 6
    )
    path.with_name("s.jsonl.settings.json").unlink()
    with pytest.raises(InputError, match="not the settings it was made with"):
        generate(problems, generator, path, SHORT)


def test_a_run_goes_on_with_smaller_batches(tiny_model, tokenizer, problems, tmp_path: Path) -> None:
    """As is advised where memory was too small: what is there stays, the rest is made in batches of the new size."""
    generator, path = tiny_generator(tiny_model, tokenizer), tmp_path / "s.jsonl"

    def stop(samples: int, tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(problems, generator, path, SHORT, batch_size=4, progress=stop)
    first = path.read_bytes()
    for size in (2, None, 1, 6):
        with pytest.raises(KeyboardInterrupt):
            generate(problems, generator, path, SHORT, batch_size=size, progress=stop)
        known = json.loads(path.with_name("s.jsonl.settings.json").read_text())
        assert known["batch_size"] == (size or 2)
    assert generate(problems, generator, path, SHORT) == 1
    assert path.read_bytes().startswith(first)
    assert len(read_rows(path)) == 6


@pytest.mark.parametrize("instruct", [False, True])
def test_a_prompt_with_a_token_beyond_the_model_is_named(
    tiny_model, tokenizer, problems, tmp_path: Path, instruct
) -> None:
    """Words that were added to a tokenizer, here those of the task or of the chat's template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(LlamaConfig(vocab_size=20 if instruct else 200, hidden_size=8, intermediate_size=8,
                                         num_hidden_layers=1, num_attention_heads=1))  # fmt: skip
    settings = GenerationSettings(max_new_tokens=2, instruct=instruct)
    with pytest.raises(InputError, match=r"HumanEval/\d: its prompt cannot be given to the model: token \d+ .* beyond"):
        generate(problems, tiny_generator(small.eval(), tokenizer), tmp_path / "s.jsonl", settings)


def test_several_samples_of_a_task_differ(tiny_model, tokenizer, problems, tmp_path: Path) -> None:
    settings = GenerationSettings(max_new_tokens=8, instruct=False, temperature=1.0, top_p=0.95, samples=3)
    rows = run(problems, tiny_generator(tiny_model, tokenizer), tmp_path / "s.jsonl", settings)
    assert len(rows) == 18
    assert len({row["solution"] for row in rows if row["task_id"] == "HumanEval/0"}) == 3
    assert all(row["solution"].startswith(problems.by_id()[row["task_id"]].prompt.strip()) for row in rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 2}, "would all be the same"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_settings_that_make_no_sense(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**settings)


def test_batches_hold_prompts_of_like_length(tokenizer, problems) -> None:
    requests = requests_for(problems, PromptWriter(tokenizer, None), 2)
    batches = plan_batches(requests, 5)
    lengths = [len(request.prompt.ids) for batch in batches for request in batch]
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert lengths == sorted(lengths, reverse=True)
    assert {(r.task_id, r.sample) for batch in batches for r in batch} == {(r.task_id, r.sample) for r in requests}


def test_the_batch_fits_in_memory(tiny_model, tokenizer, monkeypatch) -> None:
    generator = tiny_generator(tiny_model, tokenizer)
    row = 1000 * (2 * 2 * 2 * 12 + 4 * 96) * 4  # keys and values of two layers, and one layer of its prompt
    monkeypatch.setattr("codeact.evaluation.generate.free_memory", lambda device: row * 10)
    assert generator.batch_size(1000) == 4
    assert generator.batch_size(10**9) == 1


# ----------------------------------------------------------------------------------------------------------- backends


@pytest.fixture
def adapter(tiny_model_path: Path, tmp_path: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_changes_what_is_generated(tiny_model_path: Path, adapter: Path, tiny_model) -> None:
    from peft import PeftModel

    generator = load_generator(str(tiny_model_path), str(adapter), dtype="float32", device="cpu")
    prompts = some_prompts(1000)
    plain = decoded(tiny_model, prompts, 20)
    unmerged = PeftModel.from_pretrained(tiny_model, str(adapter)).eval()
    merged = decoded(generator._model, prompts, 20)
    assert merged == [by_transformers(unmerged, prompt, 20) for prompt in prompts] != plain
    assert generator.identity["adapter"].startswith("sha256:")


def test_adapters_that_are_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such adapter folder"):
        backends._adapter_folder(str(tmp_path / "none"))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match=r"has no adapter_model.safetensors; save it"):
        backends._adapter_folder(str(adapter))


class FakeEngine:
    """vLLM's ``LLM`` as far as it is used, with a real model behind it."""

    def __init__(self, model: str, **options) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        assert options["trust_remote_code"] is False
        assert options["generation_config"] == "vllm"
        self.options = options
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def get_tokenizer(self):
        return self.tokenizer

    def generate(self, prompts, sampling, lora_request=None, use_tqdm=True):
        self.lora = lora_request
        outputs = []
        for prompt, parameters in zip(prompts, sampling, strict=True):
            ids = by_transformers(self.model, prompt["prompt_token_ids"], parameters.max_tokens)
            for count in range(1, len(ids) + 1):  # vLLM stops after the token that completes a stop
                text = self.tokenizer.decode(ids[:count])
                if ids[count - 1] in parameters.stop_token_ids or any(stop in text for stop in parameters.stop):
                    ids = ids[:count]
                    break
            outputs.append(types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids)]))
        return outputs


@pytest.fixture
def fake_vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.__version__ = FakeEngine, "0"
    module.SamplingParams = types.SimpleNamespace
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda name, number, path: (name, number, path)
    for name, item in (("vllm", module), ("vllm.lora", types.ModuleType("vllm.lora")), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, item)


def test_vllm_gets_the_same_prompts_and_stops(
    fake_vllm, tiny_model, tokenizer, tiny_model_path: Path, problems, tmp_path: Path
) -> None:
    """With a stand-in: vLLM itself was not run."""
    own = run(problems, tiny_generator(tiny_model, tokenizer), tmp_path / "a.jsonl")
    generator = load_generator(str(tiny_model_path), backend="vllm", dtype="float32")
    assert run(problems, generator, tmp_path / "b.jsonl") == own
    assert generator.identity["backend"] == "vllm 0"


def test_vllm_gets_the_adapter(fake_vllm, tiny_model_path: Path, adapter: Path, problems, tmp_path: Path) -> None:
    generator = load_generator(str(tiny_model_path), str(adapter), backend="vllm", dtype="float32")
    run(problems, generator, tmp_path / "b.jsonl")
    assert generator._engine.options["enable_lora"] is True
    assert generator._engine.lora == ("adapter", 1, str(adapter))


def test_without_vllm_the_extra_is_named(tiny_model_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"pip install .codeact\[vllm\]"):
        load_generator(str(tiny_model_path), backend="vllm")
    with pytest.raises(InputError, match="choose one of: hf, vllm"):
        load_generator(str(tiny_model_path), backend="hff")
