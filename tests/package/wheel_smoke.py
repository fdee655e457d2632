"""Try an installed wheel: ``python tests/package/wheel_smoke.py``, also where no compiler is.

No test module: CI and ``make wheel-check`` run it on a wheel, tests/package/test_package.py on an unpacked one.
"""

from __future__ import annotations

import importlib.resources
import shutil
import sys
from pathlib import Path

sys.path.pop(0)  # this folder

import torch

import codeact
from codeact import _native

HERE = Path(__file__).resolve().parents[2]


def score() -> None:
    """Score two rows with a model of random weights, whose tokens are bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise)
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    rows = [("Add two numbers.", "def add(a, b):\n    return a + b"), ("Say hello.", "print('hello')")]
    records = [
        codeact.Record(id=str(row), row=row, question=question, answer=answer)
        for row, (question, answer) in enumerate(rows)
    ]
    table = codeact.score_ifd(LlamaForCausalLM(config).eval(), tokenizer, records)
    assert table["status"].to_pylist() == ["ok", "ok"]
    assert all(0.5 < ifd < 2 for ifd in table["ifd"].to_pylist())


def main() -> None:
    """Pack, compute losses by each way there is, score rows, and look for the data files."""
    home = Path(codeact.__file__).resolve()
    assert not home.is_relative_to(HERE / "codeact"), f"{home} is the source tree, not an installed wheel"
    packs = codeact.pack([7, 5, 4, 3, 1], 10)
    assert sorted(packs.indices.tolist()) == [0, 1, 2, 3, 4]
    assert len(packs) == 2

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 33, generator=generator) for size in (13, 101))
    targets = torch.randint(101, (13,), generator=generator)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    backends = ["auto", "torch", *(["native"] if _native.instruction_sets() else [])]
    for backend in backends:
        torch.testing.assert_close(codeact.token_nll(hidden, weight, targets, backend=backend), expected)

    score()
    files = importlib.resources.files("codeact")
    for name in ("py.typed", "_native.pyi", "configs/zero2.json", "configs/fsdp.yaml"):
        assert files.joinpath(name).is_file(), f"{name} is not in the wheel"
    compilers = [name for name in ("cc", "c++", "gcc", "g++", "clang") if shutil.which(name)]
    print(f"codeact {codeact.__version__} from {home.parent}: packs, scores, NLL by {', '.join(backends)}; ", end="")
    print(f"instruction sets {_native.instruction_sets()} of {_native.compiled_instruction_sets()}; ", end="")
    print(f"compilers on PATH: {compilers or 'none'}")


main()
