"""Models and data that the tests share. Real ones come from wheels of the package index; tiny ones are made here."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

# Before PyTorch loads OpenMP, which reads them: a worker of the suite has one CPU and shares it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from hypothesis import settings

from codeact.data.records import Columns, Record, RecordSet, open_records
from codeact.run import demo_models

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # Triton decides at its import whether its library and our kernels are interpreted: so before anything imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Triton has wheels for Linux only.
collect_ignore = [] if importlib.util.find_spec("triton") else ["kernels", "gpu", "scoring/test_cuda_route.py"]
# In CI the same examples every time: a failure there is a failure of the change, not of a lucky draw.
settings.register_profile("codeact", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("codeact")


def pytest_configure() -> None:
    """^C as in a terminal: a suite that a script starts in the background inherits that it is ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Files of half a minute and more: they come first, so that no worker is left with one of them at the end.
SLOW = (
    "sharding flow docs folder signals notebooks containers ray benchmarks ifd attacks lab compile_report isolation "
    "train linear_nll package results lm_eval"
).split()


_frozen = {"modules": 0}


def freeze_libraries() -> None:
    """What libraries made as they were loaded stays; else every training would look through it for garbage, twice."""
    if len(sys.modules) > _frozen["modules"] + 50:
        _frozen["modules"] = len(sys.modules)
        gc.collect()
        gc.freeze()


def pytest_collection_finish() -> None:
    freeze_libraries()


def pytest_runtest_teardown() -> None:
    freeze_libraries()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: places.get(item.path.stem, len(SLOW)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords have the names of folders too, the checkout's among them
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch on one thread, for as long as a module's tests run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def interpreted_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mend Triton's interpreter, whose ``tl.dot`` multiplies the bit patterns of bfloat16; on a device, do nothing."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    real = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return real(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def codeact(monkeypatch, capsys):
    """Run ``codeact ARGUMENTS`` in this process: (exit code, stdout, stderr), neither with the bar of any library."""
    from codeact.cli import main

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["codeact", *map(str, arguments)])
        capsys.readouterr()  # of what a fixture has loaded
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        assert "\r" not in captured.out + captured.err, "a bar is drawn where there is no terminal"
        return code, captured.out, captured.err

    return run


@pytest.fixture
def named_under_lock(monkeypatch):
    """``named_under_lock(folder)``: the names that files get from then on, each while nobody else may write there."""
    from codeact.base.errors import InputError
    from codeact.base.files import locked_folder

    def watch(folder: Path) -> list[str]:
        named: list[str] = []

        def replace(source, target, real=os.replace):
            with pytest.raises(InputError, match="another process"), locked_folder(folder, wait=False):
                pass
            named.append(Path(target).name)
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        return named

    return watch


@pytest.fixture
def isolated() -> None:
    """Skip where programs cannot be run in isolation."""
    from codeact.base.errors import InputError
    from codeact.evaluation.sandbox.sandbox import Limits, Sandbox

    try:
        Sandbox(Limits())
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets that may not be copied into the project."""
    folder = os.environ.get("CODEACT_SHARED_DATA")
    if not folder:
        pytest.skip("CODEACT_SHARED_DATA names no folder with code_alpaca_2k.json")
    return Path(folder)


@pytest.fixture(scope="session")
def shared_cases() -> Path:
    """The folder of inputs that once failed, each with what is right; not part of the project."""
    folder = os.environ.get("CODEACT_SHARED")
    if not folder or not (Path(folder) / "cases").is_dir():
        pytest.skip("CODEACT_SHARED names no folder with cases")
    return Path(folder) / "cases"


@pytest.fixture(scope="session")
def code_alpaca(shared_data: Path) -> RecordSet:
    return open_records(shared_data / "code_alpaca_2k.json", Columns(input="input"))


@pytest.fixture(scope="session")
def model_path() -> Path:
    """SmolLM2-135M-Instruct."""
    return demo_models.causal_lm()


@pytest.fixture(scope="session")
def embedder_path() -> Path:
    """all-MiniLM-L6-v2."""
    return demo_models.sentence_embedder()


@pytest.fixture(scope="session")
def human_eval_path() -> Path:
    """OpenAI's HumanEval.jsonl.gz."""
    return demo_models.human_eval()


@pytest.fixture(scope="session")
def model_tokenizer(model_path: Path):
    """SmolLM2's, whole: for what runs on ``model``."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, model_path: Path):
    """SmolLM2's first 8,192 tokens, the same ids: random models of few words need not compute 49,152 logits."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_path / name, folder)
    content = json.loads((model_path / "tokenizer.json").read_text(encoding="utf-8"))
    bpe = content["model"]
    bpe["vocab"] = {token: number for token, number in bpe["vocab"].items() if number < 8192}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in bpe["merges"])
    bpe["merges"] = [[left, right] for left, right in pairs if left + right in bpe["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def bos_tokenizer(tokenizer):
    """A tokenizer that writes its BOS itself, as Llama's does."""
    import copy

    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    return changed


@pytest.fixture(scope="session")
def model(model_path: Path):
    """SmolLM2 in float32 with PyTorch's own attention: what references run on."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A random two-layer Llama with grouped heads and SmolLM2's tokenizer: the same code paths in milliseconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # far from uniform, so that a leak between samples shows
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny_model_path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32, attn_implementation="sdpa").eval()


def make_records(count: int, seed: int = 0) -> list[Record]:
    """Questions and answers of very different lengths, deterministic."""
    import random

    rng = random.Random(seed)
    words = "def return list value for in range sorted key lambda print class self index tree node None True".split()

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    return [Record(id=str(n), row=n, question=text(1, 60), answer=text(2, 80)) for n in range(count)]


@pytest.fixture
def records() -> list[Record]:
    return make_records(12)
