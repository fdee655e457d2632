"""`codeact train` as a person types it: what is trained, saved, reported, refused, and gone on from."""

from __future__ import annotations

import json
import resource
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from codeact.base.devices import cpu_has_bf16
from codeact.base.errors import InputError, in_command
from codeact.base.files import locked_folder
from codeact.data.records import write_jsonl
from codeact.training import train as training
from codeact.training.flags import parse, parse_mapping
from tests.conftest import make_records

FEW = (
    "--max_length",
    256,
    "--learning_rate",
    1e-2,
    "--num_train_epochs",
    1,
    "--disable_tqdm",
    "True",
    "--bf16",
    "False",
)


def weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_what_select_wrote_is_trained_on_as_it_is(train, selected, tiny_model_path, tmp_path):
    out = tmp_path / "out"
    options = ("--eval_ratio", 0.2, "--eval_on_start", "True", "--save_strategy", "no", "--logging_steps", 1)
    code, text, err = train("--data_path", selected, "--output_dir", out, *FEW, *options)
    assert code == 0, err
    assert "30 in " in text
    assert "0 (none)" in text
    assert "6 of them" in text
    assert "packs of 256 tokens" in text
    assert "0 tokens, 0.0% of all computed" in text
    result = json.loads((out / "training.json").read_text())
    losses = result["result"]
    assert losses["held_out_loss_after"] < losses["held_out_loss_before"]
    assert f"{losses['held_out_loss_before']:.4f} before, {losses['held_out_loss_after']:.4f} after" in text
    assert result["conversations"]["samples"] == 30
    costs = json.loads((out / "cost.json").read_text())
    assert costs["samples"] == 24
    assert costs["padding"] == 0
    assert len(costs["steps"]["seconds"]) == losses["steps"]
    assert text.count("learning rate") == losses["steps"]
    logged = {name: [e["step"] for e in result["log"] if name in e] for name in ("loss", "learning_rate", "eval_loss")}
    steps = list(range(1, losses["steps"] + 1))
    assert logged == {"loss": steps, "learning_rate": steps, "eval_loss": [0, losses["steps"]]}
    assert not torch.equal(weights(out), weights(tiny_model_path))
    saved = AutoModelForCausalLM.from_pretrained(out)
    assert saved.config.use_cache
    assert saved.config._attn_implementation == "sdpa"
    end = AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|im_end|>")
    ends = saved.generation_config.eos_token_id
    assert end in (ends if isinstance(ends, list) else [ends])


@pytest.mark.parametrize("mode", ["dynamic_pack", "dynamic_pad", "max_length"])
@pytest.mark.parametrize("scope", ["epoch", "batch"])
def test_modes(train, selected, tmp_path, mode, scope):
    if mode != "dynamic_pack" and scope == "batch":
        return
    options = ("--pad_mode", mode, "--pack_scope", scope, "--save_strategy", "no", "--per_device_train_batch_size", 5)
    code, text, err = train("--data_path", selected, "--output_dir", tmp_path, *FEW, *options)
    assert code == 0, err
    costs = json.loads((tmp_path / "cost.json").read_text())
    assert costs["samples"] == 30
    assert len(costs["steps"]["seconds"]) == (6 if (mode, scope) != ("dynamic_pack", "epoch") else 3)
    assert (costs["padding"] == 0) == (mode == "dynamic_pack")
    assert mode in text or "packs of" in text


def test_how_far_it_is_is_said(train, selected, tmp_path):
    options = ("--save_strategy", "no", "--disable_tqdm", "False", "--logging_steps", 1)
    code, text, err = train("--data_path", selected, "--output_dir", tmp_path, *FEW, *options)
    assert code == 0, err
    steps = len(json.loads((tmp_path / "cost.json").read_text())["steps"]["seconds"])
    told = [line for line in err.splitlines() if line.endswith("to do")]
    assert told == [f"tokenizing {selected}: 30 rows to do", f"training: {steps} steps to do"]
    assert f"step {steps}/{steps}  loss" in text


def test_a_file_of_flags_is_the_same_as_flags(train, selected, tmp_path, tiny_model_path):
    flags = {
        "model_name_or_path": str(tiny_model_path),
        "data_path": str(selected),
        "max_length": 256,
        "learning_rate": "1e-2",
        "num_train_epochs": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-4},
        "report_to": ["none"],
        "deepspeed": None,
    }
    (tmp_path / "flags.yaml").write_text(yaml.safe_dump({**flags, "output_dir": str(tmp_path / "yaml")}))
    (tmp_path / "flags.json").write_text(json.dumps({**flags, "output_dir": "nowhere"}))
    code, _, err = train(tmp_path / "flags.yaml", model=None)
    assert code == 0, err
    code, _, err = train(tmp_path / "flags.json", "--output_dir", tmp_path / "json", model=None)
    assert code == 0, err
    assert torch.equal(weights(tmp_path / "yaml"), weights(tmp_path / "json"))


def stop_at(monkeypatch, step):
    """Stop the process of a run after a step, as Ctrl-C would."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == step:
                raise KeyboardInterrupt

    real = training.CardTrainer
    monkeypatch.setattr(training, "CardTrainer", lambda *a, **k: real(*a, **k, callbacks=[Stop()]))
    return lambda: monkeypatch.setattr(training, "CardTrainer", real)


@pytest.mark.parametrize("adapters", [(), ("--lora", "True", "--lora_dropout", 0.2)], ids=["full", "lora"])
def test_the_same_command_after_a_kill_ends_where_an_unbroken_run_does(
    train, selected, tmp_path, monkeypatch, adapters
):
    options = ("--data_path", selected, *FEW, "--save_steps", 4, "--per_device_train_batch_size", 1, *adapters)
    name = "adapter_model.safetensors" if adapters else "model.safetensors"
    assert train("--output_dir", tmp_path / "whole", *options)[0] == 0
    go_on = stop_at(monkeypatch, 7)
    assert train("--output_dir", tmp_path / "parts", *options)[0] == 130
    go_on()
    # A checkpoint that a kill left half written is not gone on from.
    shutil.copytree(tmp_path / "parts" / "checkpoint-4", tmp_path / "parts" / "checkpoint-6")
    (tmp_path / "parts" / "checkpoint-6" / "trainer_state.json").write_text('{"epoch"')
    code, text, err = train("--output_dir", tmp_path / "parts", *options)
    assert code == 0, err
    assert "going on from" in text
    assert "checkpoint-4" in text
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # Done already: nothing is trained again, and the files stay.
    monkeypatch.setattr(training, "CardTrainer", None)
    code, text, err = train("--output_dir", tmp_path / "parts", *options)
    assert code == 0, err
    assert "done already" in text
    go_on()
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    code, _, err = train("--output_dir", tmp_path / "parts", *options, "--learning_rate", 1e-3)
    assert code == 2
    assert "holds a run with another learning_rate (0.01, now 0.001)" in err
    code, text, err = train("--output_dir", tmp_path / "parts", *options, "--max_steps", 1, "--overwrite_output_dir")
    assert code == 0, err
    assert "going on from" not in text
    assert sorted(path.name for path in (tmp_path / "parts").glob("checkpoint-*")) == ["checkpoint-1"]


def test_a_mistake_does_not_claim_the_folder(train, selected, tmp_path):
    """Whatever stopped a run before it made anything, the corrected command may have its folder."""
    options = ("--data_path", selected, "--output_dir", tmp_path / "o", *FEW, "--save_strategy", "no")
    code, _, err = train(*options, "--max_length", 100_000)
    assert (code, "is more than the 512 positions" in err) == (2, True)
    code, _, err = train(*options, "--max_steps", 1)
    assert code == 0, err


def test_lora_is_merged_into_a_full_model(train, selected, tmp_path, tiny_model_path):
    from peft import PeftModel

    options = ("--lora", "True", "--merge", "True", "--save_strategy", "no", "--lora_target_modules", "all-linear")
    code, text, err = train("--data_path", selected, "--output_dir", tmp_path, *FEW, *options)
    assert code == 0, err
    assert "the merged model" in text
    assert not (tmp_path / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("def f(x): return", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, got = adapted(ids).logits, merged(ids).logits
        with adapted.disable_adapter():
            before = adapted(ids).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (expected - before).abs().max() > 1e-2  # the adapters do something


@pytest.mark.parametrize(
    ("quantize", "more"),
    [
        ("nf4", ()),
        ("nf4", ("--activation_checkpointing", "True", "--bf16", "True")),
        ("int8", ("--activation_checkpointing", "True")),
    ],
)
def test_qlora(train, selected, tmp_path, quantize, more, even_model_path):
    pytest.importorskip("bitsandbytes")
    options = ("--lora", "True", "--quantize", quantize, "--merge", "True", "--save_strategy", "no", *more)
    held_out = ("--eval_ratio", 0.2, "--eval_on_start", "True", "--per_device_train_batch_size", 2)
    data = ("--data_path", selected, "--output_dir", tmp_path)
    code, text, err = train(*data, *FEW, *options, *held_out, model=even_model_path)
    assert code == 0, err
    assert "packs of 256 tokens" in text
    losses = json.loads((tmp_path / "training.json").read_text())["result"]
    assert losses["held_out_loss_after"] < losses["held_out_loss_before"] - 0.1
    # The merged model is the original, not what 4 or 8 bits left of it, and an update of the adapters' rank.
    before = AutoModelForCausalLM.from_pretrained(even_model_path, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    kept = before["model.embed_tokens.weight"]
    if "--bf16" in more and cpu_has_bf16():
        kept = kept.bfloat16().float()
    assert torch.equal(after["model.embed_tokens.weight"], kept)
    layer = "model.layers.0.mlp.up_proj.weight"
    assert (after[layer] - before[layer]).abs().max() > 1e-3
    if "--bf16" not in more or not cpu_has_bf16():
        assert torch.linalg.matrix_rank(after[layer] - before[layer], rtol=1e-3) == 8


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_gradients_below_quantised_layers_are_those_of_the_weights_they_stand_for(even_model_path, quantize):
    bnb = pytest.importorskip("bitsandbytes")
    from codeact.models.adapters import add_lora, quantization_config
    from codeact.models.loading import load_causal_lm

    def load():
        torch.manual_seed(0)
        quantization = quantization_config(quantize, torch.float32)
        model, _ = load_causal_lm(str(even_model_path), None, torch.float32, quantization)
        return add_lora(model, 4, 8, 0.0, "q_proj,up_proj")

    ids = torch.arange(1, 41)[None]
    quantised, plain = load(), load()
    with torch.no_grad():
        quantised.eval()(ids)  # an evaluation before must change nothing
    for module in list(plain.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, bnb.nn.Linear4bit):
                full = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            elif isinstance(layer, bnb.nn.Linear8bitLt):
                full = layer.weight.CB.float() * layer.weight.SCB[:, None] / 127
            else:
                continue
            replaced = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            replaced.weight = torch.nn.Parameter(full.reshape(layer.out_features, layer.in_features).float(), False)
            setattr(module, name, replaced)
    gradients = []
    for model in (quantised, plain):
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if "lora_B" in name})
    assert len(gradients[0]) == 4
    for name, expected in gradients[1].items():
        similar = torch.nn.functional.cosine_similarity(gradients[0][name].flatten(), expected.flatten(), dim=0)
        assert similar > (0.9999 if quantize == "nf4" else 0.99), (name, similar)  # int8 rounds activations as well


class TestConversations:
    def rows(self, path, *answers, question="q"):
        write_jsonl(path, [{"instruction": question, "output": answer} for answer in answers])
        return path

    def test_dropped_and_cut_ones_are_reported(self, train, tmp_path):
        long = "word " * 60
        path = self.rows(tmp_path / "rows.jsonl", "a b c", "", long, "d e f")
        with path.open("a") as lines:
            lines.write('{"instruction": "q"}\n{broken\n')
            lines.write(json.dumps({"instruction": long * 2, "output": "never seen"}) + "\n")
        options = (*FEW, "--max_length", 64, "--save_strategy", "no")
        code, text, err = train("--data_path", path, "--output_dir", tmp_path / "o", *options)
        assert code == 0, err
        assert "7 in " in text
        assert "4 (1 broken_json, 1 empty_answer, 1 missing_column, 1 no_label_left)" in text
        assert "1 to the maximum length" in text
        assert "row 1 (line 2): the answer is blank" in text
        counts = json.loads((tmp_path / "o" / "training.json").read_text())["conversations"]
        assert (counts["rows"], counts["samples"], counts["truncated"]) == (7, 3, 1)
        code, text, err = train("--data_path", path, "--output_dir", tmp_path / "d", *options, "--on_overflow", "drop")
        assert code == 0, err
        assert "2 too_long" in text
        code, _, err = train("--data_path", path, "--output_dir", tmp_path / "e", *options, "--on_overflow", "error")
        assert code == 2
        assert "row 2 (id 2): " in err
        assert "tokens are more than 64" in err

    def test_nothing_to_train_on(self, train, tmp_path):
        path = self.rows(tmp_path / "rows.jsonl", "", "")
        code, _, err = train("--data_path", path, "--output_dir", tmp_path / "o", *FEW)
        assert code == 2
        assert "none of 2 rows can be trained on; the first: " in err
        assert err.count("\n") == 1
        (tmp_path / "empty.jsonl").write_text("")
        code, _, err = train("--data_path", tmp_path / "empty.jsonl", "--output_dir", tmp_path / "o", *FEW)
        assert code == 2
        assert "empty.jsonl" in err

    def test_columns(self, train, tmp_path):
        write_jsonl(tmp_path / "rows.jsonl", [{"q": r.question, "a": r.answer} for r in make_records(8)])
        options = (
            "--data_path",
            tmp_path / "rows.jsonl",
            "--output_dir",
            tmp_path / "o",
            *FEW,
            "--save_strategy",
            "no",
        )
        code, _, err = train(*options)
        assert code == 2
        assert "rows.jsonl" in err
        assert "instruction" in err
        code, _, err = train(*options, "--question_column", "q", "--answer_column", "a")
        assert code == 0, err

    def test_other_held_out_conversations(self, train, selected, tmp_path):
        path = self.rows(tmp_path / "rows.jsonl", "a b c", "", "d e f")
        options = ("--eval_path", path, "--eval_strategy", "epoch", "--save_strategy", "no")
        code, text, err = train("--data_path", selected, "--output_dir", tmp_path / "o", *FEW, *options)
        assert code == 0, err
        assert "2 other conversations (1 dropped and 0 cut)" in text
        result = json.loads((tmp_path / "o" / "training.json").read_text())["result"]
        assert result["held_out_loss_before"] is None
        assert f"{result['held_out_loss_after']:.4f}" in text


class TestTokenizers:
    @pytest.fixture
    def changed(self, tiny_model_path, tmp_path):
        """A copy of the tiny model with another tokenizer."""

        def make(change):
            folder = tmp_path / "changed"
            shutil.copytree(tiny_model_path, folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            change(tokenizer)
            (folder / "chat_template.jinja").unlink(missing_ok=True)
            tokenizer.save_pretrained(folder)
            return folder

        return make

    @pytest.mark.parametrize("pad", [None, "id 0"])
    @pytest.mark.parametrize("mode", ["dynamic_pack", "dynamic_pad"])
    def test_without_a_pad_token_or_with_id_0(self, train, selected, tmp_path, changed, pad, mode):
        def change(tokenizer):
            tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(0)

        options = ("--data_path", selected, *FEW, "--pad_mode", mode, "--save_strategy", "no")
        code, _, err = train("--output_dir", tmp_path / "other", *options, model=changed(change))
        assert code == 0, err
        code, _, err = train("--output_dir", tmp_path / "same", *options)
        assert code == 0, err
        assert torch.equal(weights(tmp_path / "other"), weights(tmp_path / "same"))

    def test_without_a_template(self, train, selected, tmp_path, changed):
        def change(tokenizer):
            tokenizer.chat_template = None

        model = changed(change)
        code, _, err = train("--data_path", selected, "--output_dir", tmp_path / "o", *FEW, model=model)
        assert code == 2
        assert "no chat template; choose one of: " in err
        assert "deepseek" in err
        options = ("--model_type", "deepseek", "--save_strategy", "no")
        code, _, err = train("--data_path", selected, "--output_dir", tmp_path / "o", *FEW, *options, model=model)
        assert code == 0, err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--learning_rat", 1), "unknown flag --learning_rat; did you mean --learning_rate?"),
        (("--use_peft_lora", "True"), "unknown flag --use_peft_lora; here it is --lora True"),
        (("--use_4bit_quantization",), "here it is --quantize nf4"),
        (("--use-flash-attn", "True"), "here it is --attention flash_attention_2"),
        (("--learning_rate", "fast"), "invalid float value: 'fast'"),
        (("--bf16", "perhaps"), "--bf16"),
        (("--eval_strategy", "sometimes"), "invalid choice: 'sometimes'"),
        (("--bf16", "True", "--fp16", "True"), "--bf16 and --fp16 are two dtypes to compute in"),
        (("--pad_mode", "pack"), "pad_mode 'pack' is unknown; choose one of: dynamic_pack"),
        (("--pack_scope", "step"), "pack_scope 'step' is unknown"),
        (("--on_overflow", "cut"), "on_overflow 'cut' is unknown"),
        (("--model_type", "codelama"), "model_type 'codelama' is unknown; choose one of: codellama"),
        (("--dtype", "int8"), "dtype 'int8' is unknown"),
        (("--deepspeed", "zero4"), "deepspeed configuration (or file) 'zero4' is unknown; choose one of: zero"),
        (("--quantize", "nf4"), "add --lora True"),
        (("--merge", "True"), "without --lora True"),
        (("--eval_ratio", 1), "--eval_ratio 1.0 must be"),
        (("--eval_ratio", 0.01), "--eval_ratio 0.01 of 30 samples"),
        (("--eval_ratio", 0.5, "--eval_path", "x"), "give one of the two"),
        (("--max_length", 513), "--max_length 513 is more than the 512 positions"),
        (("--lora", "True", "--lora_target_modules", "q_proj,c_fc"), "has no layer named c_fc; its linear layers are"),
        (("--attention", "flash_attention_9"), "attention 'flash_attention_9' is unknown; choose one of: "),
        (("--resume_from_checkpoint", "nowhere"), "--resume_from_checkpoint nowhere is no checkpoint"),
        (("--data_path", "/nowhere.jsonl"), "/nowhere.jsonl"),
        (("stray",), "'stray' belongs to no flag"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(train, selected, tmp_path, flags, message):
    options = ("--data_path", selected, "--output_dir", tmp_path / "o", *FEW)
    code, _, err = train(*options, *flags) if flags[0] != "stray" else train(*flags, *options)
    assert code == 2, err
    assert message in err
    assert err.strip().count("\n") == 0
    assert "Traceback" not in err


@pytest.mark.parametrize("missing", ["model_name_or_path", "data_path", "output_dir"])
def test_what_is_needed_is_named(missing):
    flags = {"model_name_or_path": "m", "data_path": "d", "output_dir": "o"}
    del flags[missing]
    with pytest.raises(InputError, match=f"{missing} is missing"):
        parse_mapping(flags, "here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "flags.yaml, line 1: unknown flag --learning_rat; did you mean --learning_rate?"),
        ("# rates\n\nlearning_rate: fast", "flags.yaml, line 3: argument --learning_rate"),
        ("seed: 1\neval_strategy: epoch", "flags.yaml, line 2: --eval_strategy needs held-out conversations"),
        ("seed: 1\nreport_to:\n- tensorbord", "flags.yaml, line 2: --report_to 'tensorbord' is unknown"),
        ("- 1", "holds no flags"),
        ("", "holds no flags"),
        ("a: [", "cannot read"),
    ],
)
def test_a_mistake_in_a_file_of_flags_names_the_file(tmp_path, content, message):
    path = tmp_path / "flags.yaml"
    path.write_text(content)
    with in_command(), pytest.raises(InputError) as caught:
        parse([str(path), "--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o"])
    assert message in caught.value.args[0]
    assert "flags.yaml" in str(caught.value)
    with pytest.raises(InputError, match="cannot read"):
        parse([str(tmp_path / "other.yaml")])


def test_help(train):
    code, text, _ = train("--help", model=None)
    assert code == 0
    for word in ("--pad_mode", "--lora_target_modules", "--on_overflow", "--deepspeed zero1|zero2|zero3", "--help_all"):
        assert word in text
    assert "--adam_beta2" not in text
    code, text, _ = train("--help_all", model=None)
    assert code == 0
    assert "--adam_beta2" in text
    assert "--pad_mode" in text


def test_a_pass_that_does_not_fit_is_refused_before_the_first_step(train, selected, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "free_memory", lambda device: 5e6)
    options = ("--data_path", selected, "--output_dir", tmp_path / "o", *FEW, "--save_strategy", "no")
    code, text, err = train(*options, "--per_device_train_batch_size", 8)
    assert code == 2
    assert "a pass         up to 2,0" in text
    assert "codeact: error: a step of 2,0" in err
    assert "lower --per_device_train_batch_size" in err
    monkeypatch.undo()
    assert train(*options, "--max_steps", 1)[0] == 0, "the folder is still free"


@pytest.mark.parametrize(
    ("most_bytes", "flags"),
    [
        (100_000, ("--save_strategy", "no")),  # the weights
        (100_000, ("--save_strategy", "no", "--lora", "True", "--lora_target_modules", "q_proj")),  # the tokenizer
        (4_500_000, ("--save_steps", 1, "--save_total_limit", 1)),  # the optimizer's states, in a checkpoint
    ],
)
def test_a_full_disk_is_one_line_that_names_the_file(train, selected, tmp_path, most_bytes, flags):
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        code, _, err = train("--data_path", selected, "--output_dir", out, *FEW, "--max_steps", 1, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert "Traceback" not in err
    assert f"codeact: error: cannot write {out}" in err
    assert train("--data_path", selected, "--output_dir", out, *FEW, "--max_steps", 1, *flags)[0] == 0


@pytest.mark.parametrize("more", [(), ("--overwrite_output_dir", "True"), ("--seed", 7)])
def test_a_folder_that_another_training_writes_to_is_refused(train, selected, tmp_path, more):
    out = tmp_path / "out"
    with locked_folder(out, wait=False):
        code, _, err = train("--data_path", selected, "--output_dir", out, *FEW, "--save_strategy", "no", *more)
    assert code == 2
    assert f"another process writes to {out}; wait for it" in err
    assert not [*out.iterdir()]
