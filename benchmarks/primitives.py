"""codeact's small fast functions against what one would use instead, timed by pytest-benchmark.

    python -m benchmarks.primitives [--quick] [--json FILE]

Each primitive has arms, codeact's first. ``test_agreement`` compares what they return; only then ``test_arm`` times
them: in three repetitions, each in another (seeded) order of all arms of all primitives. A repetition's time is
pytest-benchmark's median of at least three calls, or of 0.1 s of them; the table has the median of the three, the least
and the most. Added memory is that of one call in a process of its own.

Floors: bytes that must be read and written at the speed at which one thread copies, or multiply-adds at the most that
the CPU's multipliers do (all threads), whichever ``Primitive.floor`` says:
- pack: 32 B a length (benchmarks.packing says which);
- token_nll, linear_cross_entropy: 2 and 6 T D V operations;
- varlen attention: 4 operations per head, head dimension and pair of a query and a key that it may see; 14 with the
  gradients (5 products more);
- laying a pack: 8 B of each id and label read, 24 B of ids, positions and labels written;
- select: 20 B a row read (status's offset, IFD, label, row), 8 B a chosen row written;
- sanitize: one ``ast.parse`` of the program that it returns, measured.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.measure import (
    Line,
    Report,
    Timing,
    added_memory,
    copy_bandwidth,
    interleave,
    main,
    mebibytes,
    multiplier_peak,
    share,
    table,
)

REPETITIONS = 3
# benchmarks.packing and benchmarks.nll have their memory.
MEASURED_ELSEWHERE = ("pack", "token_nll", "linear_cross_entropy")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Primitive:
    """Arms on one input, codeact's first; ``agree`` raises where their results differ; ``floor`` in seconds."""

    size: str
    arms: dict[str, Callable[[], Any]]
    agree: Callable[[dict[str, Any]], None]
    floor: Callable[[], float | None]


def operations(count: float, dtype: str) -> float | None:
    peak = multiplier_peak().get(dtype)
    return None if peak is None else count / peak


def moved(count: float) -> float:
    return count / copy_bandwidth()


def pack() -> Primitive:
    import codeact
    from benchmarks import first_fit
    from benchmarks.packing import BYTES_PER_ITEM, as_arrays, lognormal_lengths

    lengths = lognormal_lengths(100_000, 2048)

    def agree(results: dict[str, Any]) -> None:
        for ours, theirs in zip(as_arrays(results["codeact"]), results["numba ffd, tree"], strict=True):
            assert np.array_equal(ours, theirs)

    return Primitive(
        size="100,000 lengths into 2,048, ffd",
        arms={
            "codeact": lambda: codeact.pack(lengths, 2048, "ffd"),
            "numba ffd, tree": lambda: first_fit.tree(lengths, 2048),
        },
        agree=agree,
        floor=lambda: moved(BYTES_PER_ITEM * len(lengths)),
    )


def _losses_agree(results: dict[str, Any]) -> None:
    reference = results["PyTorch, all logits"]
    for result in results.values():
        assert float((result.float() - reference).abs().max()) < 0.1  # bfloat16 logits


def token_nll() -> Primitive:
    import codeact
    from benchmarks.nll import compiled, operands, plain

    given = operands((256, 576, 49152), "bfloat16")
    return Primitive(
        size="T 256, D 576, V 49,152, bfloat16",
        arms={
            "codeact": lambda: codeact.token_nll(*given),
            "PyTorch, all logits": lambda: plain(*given, "none"),
            "cut-cross-entropy, torch.compile": lambda: compiled(*given, "none"),
        },
        agree=_losses_agree,
        floor=lambda: operations(2 * 256 * 576 * 49152, "bfloat16"),
    )


def linear_cross_entropy() -> Primitive:
    import codeact
    from benchmarks.nll import compiled, operands, plain

    hidden, weight, targets = operands((256, 576, 49152), "bfloat16", gradients=True)

    def with_gradients(loss: Callable[[Any, Any, Any], Any]) -> Any:
        hidden.grad = weight.grad = None
        loss(hidden, weight, targets).backward()
        return hidden.grad.float()

    def agree(results: dict[str, Any]) -> None:
        reference = results["PyTorch, all logits"]
        for result in results.values():
            assert float((result - reference).abs().max() / reference.abs().max()) < 2e-2

    return Primitive(
        size="with gradients, T 256, D 576, V 49,152, bfloat16",
        arms={
            "codeact": lambda: with_gradients(codeact.linear_cross_entropy),
            "PyTorch, all logits": lambda: with_gradients(functools.partial(plain, reduction="mean")),
            "cut-cross-entropy, torch.compile": lambda: with_gradients(functools.partial(compiled, reduction="mean")),
        },
        agree=agree,
        floor=lambda: operations(6 * 256 * 576 * 49152, "bfloat16"),
    )


def _attention(gradients: bool) -> Primitive:
    """SmolLM2-135M's heads; 2,048 tokens in samples of lognormal length."""
    import torch
    import torch.nn.functional as F

    from benchmarks.packing import lognormal_lengths
    from codeact.ops.attention import varlen_attention

    heads, groups, width, tokens = 9, 3, 64, 2048
    ends = np.minimum(np.cumsum(lognormal_lengths(50, 512) // 4 + 1), tokens)
    bounds = np.unique([0, *ends, tokens])
    lengths = np.diff(bounds)
    samples = [slice(a, b) for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, n, tokens, width, generator=generator).to(torch.bfloat16).requires_grad_(gradients)
        for n in (heads, groups, groups)
    )
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.from_numpy(lengths))
    mask = (number[:, None] == number).tril()[None, None]
    layer = torch.nn.Module()

    def ours() -> Any:
        return varlen_attention(layer, query, key, value, None, cu_seq_lens_q=cu_seqlens)[0]

    def loop() -> Any:
        parts = [
            F.scaled_dot_product_attention(
                query[:, :, s], key[:, :, s], value[:, :, s], is_causal=True, enable_gqa=True
            )
            for s in samples
        ]
        return torch.cat(parts, 2).transpose(1, 2)

    def masked() -> Any:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    def call(attention: Callable[[], Any]) -> Any:
        if not gradients:
            with torch.no_grad():
                return attention()
        for tensor in (query, key, value):
            tensor.grad = None
        attention().float().square().sum().backward()
        return torch.cat([query.grad, key.grad, value.grad], 1)

    def agree(results: dict[str, Any]) -> None:
        reference = results["PyTorch, SDPA sample by sample"].float()
        for result in results.values():
            assert float((result.float() - reference).abs().max() / reference.abs().max()) < 2e-2

    pairs = float((lengths * (lengths + 1) // 2).sum())
    return Primitive(
        size=f"2,048 tokens in {len(lengths)} samples, 9 heads, bfloat16",
        arms={
            "codeact": lambda: call(ours),
            "PyTorch, SDPA sample by sample": lambda: call(loop),
            "PyTorch, SDPA with a block mask": lambda: call(masked),
        },
        agree=agree,
        floor=lambda: operations((14 if gradients else 4) * heads * width * pairs, "bfloat16"),
    )


def attention() -> Primitive:
    return _attention(gradients=False)


def attention_with_gradients() -> Primitive:
    return _attention(gradients=True)


def lay_pack() -> Primitive:
    """Samples to the inputs of one row, on both sides with position ids and cu_seqlens."""
    from transformers import DataCollatorWithFlattening

    from benchmarks.packing import lognormal_lengths
    from codeact.training.dataset import PackCollator

    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 49152, length) for length in lognormal_lengths(40, 2048)]
    samples = [SimpleNamespace(input_ids=ids, labels=ids.copy()) for ids in arrays]
    features = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in arrays]
    ours = PackCollator(supervised_only=False)
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)

    def agree(results: dict[str, Any]) -> None:
        for name in ("input_ids", "position_ids", "cu_seq_lens_q"):
            assert np.array_equal(np.asarray(results["codeact"][name]), np.asarray(results["transformers"][name]))

    tokens = sum(map(len, arrays))
    return Primitive(
        size=f"40 samples, {tokens:,} tokens",
        arms={"codeact": lambda: ours([samples]), "transformers": lambda: theirs(features)},
        agree=agree,
        floor=lambda: moved(40 * tokens),
    )


def select() -> Primitive:
    """The paper's choice of 40 % over 10 clusters."""
    import pandas as pd
    import pyarrow as pa

    import codeact

    rows = 100_000
    generator = np.random.default_rng(0)
    ifd, labels = generator.uniform(0.05, 0.99, rows), generator.integers(0, 10, rows).astype(np.int32)
    ids = [str(row) for row in range(rows)]
    tokens = np.ones(rows, np.int32)
    columns = {"id": ids, "row": np.arange(rows), "status": ["ok"] * rows, "ifd": ifd}
    scores = pa.table({**columns, "prompt_tokens": tokens, "answer_tokens": tokens})

    def with_pandas() -> list[str]:
        frame = pd.DataFrame({"id": ids, "ifd": ifd, "cluster": labels})
        frame = frame[frame.ifd < 1]
        rank = frame.groupby("cluster").ifd.rank(ascending=False, method="first")
        return frame.id[rank <= (frame.groupby("cluster").ifd.transform("size") * 0.4).round()].tolist()

    def agree(results: dict[str, Any]) -> None:
        # pandas rounds the quota of each cluster, codeact shares the whole budget: one row a cluster may differ.
        assert len(set(results["codeact"]) ^ set(results["pandas"])) <= 10

    return Primitive(
        size="40 % of 100,000 rows over 10 clusters",
        arms={"codeact": lambda: codeact.select(scores, labels, 0.4), "pandas": with_pandas},
        agree=agree,
        floor=lambda: moved(20 * rows + 8 * 0.4 * rows),
    )


def sanitize() -> Primitive:
    """An answer of a model: prose, a fence, twenty functions of which one is asked for."""
    from benchmarks.evaluation import evalplus_sanitize
    from codeact.evaluation.sanitize import sanitize as ours

    helpers = "".join(f"def helper_{n}(x):\n    return x + {n}\n\n\n" for n in range(20))
    answer = f"Sure! Here it is:\n\n```python\nimport math\n\n\n{helpers}def f(x):\n    return helper_3(x)\n```\nDone."
    theirs = evalplus_sanitize()

    def agree(results: dict[str, Any]) -> None:
        for program in results.values():
            names: dict[str, Any] = {}
            exec(program, names)  # of this file, not of a model
            assert names["f"](1) == 4

    text = ours(answer, "f")
    parse = functools.partial(ast.parse, text)
    return Primitive(
        size=f"an answer of {answer.count(chr(10)) + 1} lines",
        arms={"codeact": lambda: ours(answer, "f"), "evalplus": lambda: theirs(answer, "f")},
        agree=agree,
        floor=lambda: interleave({"parse": parse}, 9)["parse"].median,
    )


PRIMITIVES: dict[str, Callable[[], Primitive]] = {
    function.__name__: function
    for function in (
        pack,
        token_nll,
        linear_cross_entropy,
        attention,
        attention_with_gradients,
        lay_pack,
        select,
        sanitize,
    )
}
built = functools.cache(lambda name: PRIMITIVES[name]())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every arm once a repetition, in another order each time."""
    if "repetition" in metafunc.fixturenames:
        arms = [(name, arm) for name in PRIMITIVES for arm in built(name).arms]
        shuffle = random.Random(0)
        repetitions = int(os.environ.get("CODEACT_BENCH_REPETITIONS", REPETITIONS))
        cases = [(number, *case) for number in range(repetitions) for case in shuffle.sample(arms, len(arms))]
        metafunc.parametrize(("repetition", "primitive", "arm"), cases)


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_agreement(primitive: str) -> None:
    case = built(primitive)
    case.agree({name: arm() for name, arm in case.arms.items()})


def test_arm(benchmark: Any, repetition: int, primitive: str, arm: str) -> None:
    benchmark(built(primitive).arms[arm])


def timings(repetitions: int) -> dict[tuple[str, str], Timing]:
    """Run this file with pytest; medians by primitive and arm."""
    os.environ["CODEACT_BENCH_REPETITIONS"] = str(repetitions)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmarks.json"
        settings = "--benchmark-min-rounds=3 --benchmark-max-time=0.1 --benchmark-disable-gc --benchmark-quiet".split()
        status = pytest.main([__file__, "-x", "-q", "-p", "no:cacheprovider", f"--benchmark-json={output}", *settings])
        assert status == 0, "an arm disagrees or fails"
        found: dict[tuple[str, str], list[float]] = {}
        for entry in json.loads(output.read_text())["benchmarks"]:
            key = (entry["params"]["primitive"], entry["params"]["arm"])
            found.setdefault(key, []).append(entry["stats"]["median"])
    return {key: Timing(tuple(values)) for key, values in found.items()}


def prepare(primitive: str, arm: str) -> Callable[[], Any]:
    """For ``added_memory``."""
    call = built(primitive).arms[arm]
    call()
    return call


def rows_of(found: dict[tuple[str, str], Timing], peaks: dict[tuple[str, str], int | None]) -> Iterator[list[str]]:
    for (primitive, arm), timing in sorted(found.items(), key=lambda item: list(PRIMITIVES).index(item[0][0])):
        case = built(primitive)
        yield [
            f"{primitive}, {case.size}",
            arm,
            str(timing),
            share(case.floor(), timing),
            mebibytes(peaks.get((primitive, arm))),
        ]


def run(options: argparse.Namespace) -> Report:
    found = timings(1 if options.quick else REPETITIONS)
    peaks: dict[tuple[str, str], int | None] = {}
    lines = []
    for name in PRIMITIVES:
        case = built(name)
        others = {arm: found[name, arm] for arm in case.arms if arm != "codeact"}
        peer = min(others, key=lambda arm: others[arm].median)
        if not options.quick and name not in MEASURED_ELSEWHERE:
            peaks |= {(name, arm): added_memory(prepare, name, arm) for arm in ("codeact", peer)}
        lines.append(
            Line(
                what=f"{name}, {case.size}",
                ours=found[name, "codeact"],
                peer=peer,
                theirs=others[peer],
                floor=case.floor(),
                memory=peaks.get((name, "codeact")),
                peer_memory=peaks.get((name, peer)),
            )
        )
    columns = "primitive | |> median (least to most) |> share of the floor |> added memory"
    return Report(
        sections=["## Primitives", table(columns, rows_of(found, peaks))],
        lines=lines,
        figures={"records": [{"what": key, "seconds": timing.seconds} for key, timing in found.items()]},
    )


if __name__ == "__main__":
    main(run, __doc__)
