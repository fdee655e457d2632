"""Everything that a GPU has to show, in one command on a bare machine without network.

    python -m benchmarks.device [--device cpu] [--small] [--only STAGE,...] [--budget SECONDS]
    python -m benchmarks.device --wheels FOLDER

Checks first (loss, attention, scoring, training, embedding, k-means: each against float64 or the CPU), then figures.
Every stage is a process with a limit of its own, all of them end within ``--budget`` seconds, and ``$OUT/device.json``
(``$OUT``: the current folder) is rewritten after each, what failed first, so that a kill leaves what was done;
``$OUT/device.log`` has what the stages printed. Exit code 1: a stage failed.

Models have random weights and a tokenizer of bytes, made there. What such a machine lacks beside PyTorch, Triton and
transformers comes as wheels: ``--wheels FOLDER`` downloads them where there is a network, for Python 3.12 on Linux
x86-64, and says whether they and the tree stay under 64 MiB; a folder ``wheels`` in the current one is installed into
a folder of its own, beside the machine's packages.

``--device cpu --small`` runs the same code in small, in seconds. Not run on a device by its authors.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHEELS = (
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "typer", "click",
    "datasets", "dill", "multiprocess", "xxhash", "httpx", "httpcore", "h11", "anyio",
    "pytest", "pluggy", "iniconfig", "hypothesis", "sortedcontainers", "liger-kernel", "cut-cross-entropy",
)  # fmt: skip
CARRIED = 64 * 2**20  # bytes of wheels and tree together

Figures = dict[str, Any]
WORDS = [random.Random(0).choices("abcdefghij (=):\n", k=length) for length in range(2, 10)]


class NotHereError(Exception):
    """A stage that this machine has nothing for; the message says why."""


def needs_gpu(device: str) -> None:
    if device == "cpu":
        raise NotHereError("needs a GPU")


# ------------------------------------------------------------------------------------------------------- the machine


def facts(device: str, small: bool) -> Figures:
    """Versions, driver, and what the device copies and multiplies in a second."""
    import torch
    import transformers

    from codeact.base.machine import cpu_name, versions

    size = 256 if small else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(1 << (20 if small else 31), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied, multiplied = (milliseconds(call, device) for call in (lambda: target.copy_(source), lambda: a @ b))
    smi = "nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.draw,memory.total --format=csv,noheader"
    return {
        **versions(),
        "transformers": transformers.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", None),
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "smi": subprocess.run(smi, shell=True, capture_output=True, text=True, check=False).stdout.strip(),
        "copy_bytes_per_second": 2e3 * len(source) / copied,
        "bf16_flops_per_second": 2e3 * size**3 / multiplied,
    }


def build(device: str, small: bool) -> Figures:
    """The compiled core, if it is not built yet."""
    if importlib.util.find_spec("codeact._native") is None:
        run("setup.py", "-q", "build_ext", "--inplace")
    return json.loads(run("-c", "import codeact._native as n, json; print(json.dumps({'sets': n.instruction_sets()}))"))


def doctor(device: str, small: bool) -> Figures:
    """What ``codeact doctor`` finds."""
    return dict(json.loads(run("-m", "codeact", "doctor", "--json")))


def gpu_tests(device: str, small: bool) -> Figures:
    """The tests that want a device, and those of the kernels, which run there instead of in the interpreter."""
    needs_gpu(device)
    tests = ("tests/gpu", "tests/kernels", "--deselect", "tests/kernels/test_compile_report.py")
    return {"summary": run("-m", "pytest", "-q", *tests).splitlines()[-1]}


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


# ------------------------------------------------------------------------------------------------------------- checks


def loss(device: str, small: bool) -> Figures:
    """``token_nll`` and ``linear_cross_entropy`` with its gradients against float64."""
    import torch
    import torch.nn.functional as F

    from codeact.ops.cross_entropy import linear_cross_entropy
    from codeact.ops.nll import nll_backend, token_nll

    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, targets = head(*((64, 32, 300) if small else (512, 512, 32_256)), dtype, device)
        exact = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none")
        off = float((token_nll(hidden, weight, targets).double() - exact).abs().max())
        assert off < 1e-4, f"token_nll in {dtype} is off by {off}"
        h, w = (t.detach().requires_grad_() for t in (hidden, weight))
        linear_cross_entropy(h, w, targets).backward()
        wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        F.cross_entropy(wide[0] @ wide[1].T, targets).backward()
        slopes = [relative(ours.grad, theirs.grad) for ours, theirs in zip((h, w), wide, strict=True)]
        assert max(slopes) < (1e-4 if dtype == torch.float32 else 2e-2), f"gradients in {dtype} are off by {slopes}"
        figures[str(dtype)] = {"backend": nll_backend(hidden), "loss_off": off, "gradients_off": slopes}
    return figures


def attention(device: str, small: bool) -> Figures:
    """Packs with every layout of heads, forward and backward, against SDPA in float64 by sample; twice: same bits."""
    import torch
    import torch.nn.functional as F

    lengths = [1, 7, 33] if small else [1, 7, 128, 129, 700]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    figures = {}
    for heads, groups, width in ((4, 4, 64), (8, 2, 128), (9, 3, 64)):
        generator = torch.Generator().manual_seed(heads)
        layout = [(heads, sum(lengths)), (groups, sum(lengths)), (groups, sum(lengths)), (sum(lengths), heads)]
        *qkv, slope = (torch.randn(1, *shape, width, generator=generator).bfloat16() for shape in layout)
        wide = [t.double().requires_grad_() for t in qkv]
        exact = torch.cat(
            [
                F.scaled_dot_product_attention(*(t[:, :, a:b] for t in wide), is_causal=True, enable_gqa=True)
                for a, b in itertools.pairwise(bounds.tolist())
            ],
            2,
        ).transpose(1, 2)
        exact.backward(slope.double())
        first, second = (attend(qkv, slope, bounds, max(lengths), device) for _ in range(2))
        off = [relative(x, y) for x, y in zip(first, [exact.detach(), *(t.grad for t in wide)], strict=True)]
        assert max(off) < 1e-2, f"{heads} heads, {groups} of keys: off by {off}"
        same = [bool(torch.equal(x, y)) for x, y in zip(first, second, strict=True)]
        figures[f"{heads}, {groups} heads of {width}"] = {"off": off, "same_bits_twice": same}
    return figures


def attend(qkv: list[Any], slope: Any, bounds: Any, longest: int, device: str) -> list[Any]:
    """Output of codeact's attention and gradients of its operands."""
    from codeact.ops.attention import varlen_attention

    operands = [t.clone().to(device).requires_grad_() for t in qkv]
    module: Any = SimpleNamespace(is_causal=True)
    bounds = bounds.to(device)
    output = varlen_attention(module, *operands, None, cu_seq_lens_q=bounds, max_length_q=longest)[0]
    output.backward(slope.to(device))
    return [output.detach(), *(t.grad for t in operands)]


def scoring(device: str, small: bool) -> Figures:
    """``IfdScorer`` on the device in bfloat16 against the CPU in float32; the same rows in two packings."""
    import numpy as np
    import torch

    from codeact.scoring.ifd import IfdScorer

    rows = records(8 if small else 64)
    scores = {}
    for name, place, dtype, tokens in (
        ("cpu", "cpu", torch.float32, 512),
        ("device", device, torch.bfloat16, 4096),
        ("small packs", device, torch.bfloat16, 512),
    ):
        scorer = IfdScorer(llama(small=True).to(place, dtype), tokenizer(), max_length=512, tokens_per_pack=tokens)
        scores[name] = np.asarray(scorer.score(rows)[0]["cond_nll_sum"])
    off = float(np.abs(scores["device"] / scores["cpu"] - 1).max())
    packs = float(np.abs(scores["device"] / scores["small packs"] - 1).max())
    assert off < 0.02, f"scores are off by {off}"
    return {"route": scorer.route, "off_the_cpu": off, "packs_differ_by": packs}


def training(device: str, small: bool) -> Figures:
    """Full, LoRA and recomputed: the held-out loss falls; a run that was cut goes on to the same end."""
    modes: dict[str, Figures] = {"full": {}, "LoRA": {"lora": True}}
    modes |= {} if small else {"recomputed": {"activation_checkpointing": True}}
    figures: Figures = {}
    for name, flags in modes.items():
        with tempfile.TemporaryDirectory() as folder:
            result, _ = train(device, True, folder, eval_ratio=0.2, eval_on_start=True, learning_rate=5e-3, **flags)
        before, after = result["held_out_loss_before"], result["held_out_loss_after"]
        assert after < before, f"{name}: the held-out loss went from {before} to {after}"
        figures[name] = {"held_out_loss": [before, after], "training_loss": result["train_loss"]}
    with tempfile.TemporaryDirectory() as folder:
        flags = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 99, "max_steps": 10}
        whole, _ = train(device, True, folder, **flags)
        model, known = (Path(folder) / "out" / name for name in ("model.safetensors", "training.json"))
        weights = model.read_bytes()
        for path in (model, *known.parent.glob("checkpoint-[89]*"), *known.parent.glob("checkpoint-10")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        known.write_text(json.dumps({**json.loads(known.read_text()), "result": None}))
        again, _ = train(device, True, folder, **flags)
        same = model.read_bytes() == weights
        figures["resumed"] = {"loss": [whole["train_loss"], again["train_loss"]], "same_bits": same}
        assert math.isclose(whole["train_loss"], again["train_loss"], rel_tol=1e-3), figures["resumed"]
    return figures


def embedding(device: str, small: bool) -> Figures:
    """A random BERT on the device against the CPU."""
    import torch
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel

    from codeact.embedding.vectors import embed

    torch.manual_seed(0)
    words = tokenizer()
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        words.save_pretrained(folder)
        encoder = models.Transformer(folder, max_seq_length=256)
    encoder = SentenceTransformer(modules=[encoder, models.Pooling(64)], device="cpu")
    texts = [record.question for record in records(16 if small else 256)]
    exact = embed(texts, encoder)
    vectors = embed(texts, encoder.to(device))
    off = float(abs(vectors - exact).max())
    assert off < 1e-2, f"vectors are off by {off}"
    return {"off_the_cpu": off}


def kmeans(device: str, small: bool) -> Figures:
    """``cluster`` twice, its inertia against scikit-learn's, and its time at the size of a large data set."""
    import numpy as np

    from benchmarks.clustering import inertia_of, vectors_of
    from codeact.selection.clustering import cluster

    vectors = vectors_of(500 if small else 20_000)
    labels, again = (cluster(vectors, 10, backend="torch") for _ in range(2))
    assert np.array_equal(labels, again), "two runs differ"
    ratio = inertia_of(vectors, labels) / inertia_of(vectors, cluster(vectors, 10, backend="sklearn"))
    assert ratio < 1.001, f"inertia is {ratio} x scikit-learn's"
    figures: Figures = {"inertia_of_sklearn": ratio, "seconds": {}}
    for rows, k in ((1000, 10),) if small else ((200_000, 10), (200_000, 1000)):
        vectors = vectors_of(rows)
        for backend in ("torch", "cuml"):
            if backend == "torch" or importlib.util.find_spec("cuml"):
                begin = time.perf_counter()
                cluster(vectors, k, backend=backend)
                figures["seconds"][f"{rows:,} rows, k {k}, {backend}"] = time.perf_counter() - begin
    return figures


# ------------------------------------------------------------------------------------------------------------ figures


def tiles(device: str, small: bool) -> Figures:
    """K1 over the candidates of ``tiles.toml`` and groups; all have to agree, the fastest is written into a new one.

    On the CPU two tiny tiles in Triton's interpreter, and nothing is written.
    """
    import torch
    from codeact_kernels import linear_nll as k1
    from codeact_kernels import tiles as table

    on_gpu = device == "cuda"
    sizes = (40, 32, 70) if small or not on_gpu else (8192, 4096, 128_256)
    hidden, weight, targets = head(*sizes, torch.bfloat16 if on_gpu else torch.float32, device)
    architecture = table.architecture_of(hidden.device)
    records, first, best = [], None, (math.inf, table.candidates_for(architecture)[0])
    for shape, group in itertools.product(table.candidates_for(architecture), (8, 16, 32) if on_gpu else (8,)):
        tile = replace(shape, group_t=group)
        k1.tile_for = lambda *_, tile=tile: tile
        record: Figures = {"tile": asdict(tile)}
        try:
            losses = k1.linear_nll(hidden, weight, targets)
            first = losses if first is None else first
            record["off"] = float((losses - first).abs().max())
            record["ms"] = milliseconds(lambda: k1.linear_nll(hidden, weight, targets), device)
            record["tflops"] = 2e-9 * math.prod(sizes) / record["ms"]
            best = min(best, (record["ms"], tile), key=lambda pair: pair[0])
        except Exception as error:  # a tile that does not fit the chip
            record["error"] = str(error)[:200]
        records.append(record)
    assert all(record.get("off", 0) < 1e-3 for record in records), records
    if on_gpu and best[0] < math.inf:
        source = f"the fastest on {torch.cuda.get_device_name()} at T, D, V {sizes}: {best[0]:.2f} ms"
        text = table.with_tile(table.TABLE.read_text(), architecture, best[1], source)
        (Path(os.environ.get("OUT", ".")) / "tiles.toml").write_text(text)
    return {"sizes": sizes, "tiles": records}


def loss_speed(device: str, small: bool) -> Figures:
    """Losses per token beside their peers, by ``benchmarks.nll_cuda``."""
    needs_gpu(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nll.json"
        run("-m", "benchmarks.nll_cuda", "--json", str(path), *(["--quick"] if small else []))
        return dict(json.loads(path.read_text()))


def gradient_speed(device: str, small: bool) -> Figures:
    """The loss with its gradients, its peak of memory, and the peers that are installed."""
    import torch

    from codeact.ops.cross_entropy import linear_cross_entropy

    arms: dict[str, Callable[..., Any]] = {"codeact": linear_cross_entropy}
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        arms["Liger"] = liger_fused_linear_cross_entropy
    if device == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        arms["cut-cross-entropy"] = cut
    figures: Figures = {}
    for sizes in ((64, 32, 300),) if small else ((8192, 4096, 32_256), (8192, 4096, 128_256)):
        hidden, weight, targets = head(*sizes, torch.bfloat16, device)
        for name, arm in arms.items():
            h, w = (t.detach().requires_grad_() for t in (hidden, weight))

            def step(arm: Any = arm, h: Any = h, w: Any = w, targets: Any = targets) -> None:
                h.grad = w.grad = None
                arm(h, w, targets).backward()

            ms = milliseconds(step, device)
            record = {"ms": ms, "tflops": 6e-9 * math.prod(sizes) / ms}
            if device == "cuda":
                h.grad = w.grad = None
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                record["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            figures[f"{name}, T, D, V {sizes}"] = record
    return figures


def scoring_speed(device: str, small: bool) -> Figures:
    """Tokens a second over tokens per pack, and how long the device was idle, by PyTorch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from codeact.base.devices import default_tokens_per_pack
    from codeact.scoring.ifd import IfdScorer

    model = llama(small).to(device, torch.bfloat16)
    rows = records(8 if small else 600)
    figures: Figures = {"default": default_tokens_per_pack(device, model.num_parameters())}
    for tokens in (256,) if small else (2048, 8192, 16_384, 32_768, 65_536):
        scorer = IfdScorer(model, tokenizer(), max_length=512, tokens_per_pack=tokens)
        _, cost = scorer.score(rows)
        begin = time.perf_counter()
        scorer.score(rows)
        seconds = time.perf_counter() - begin
        figures[f"{tokens}"] = {"tokens_per_second": cost.tokens / seconds, "tokens_per_pack": scorer.tokens_per_pack}
        if device == "cuda":
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                scorer.score(rows)
            busy = sum(event.self_device_time_total for event in trace.key_averages()) / 1e6
            figures[f"{tokens}"]["idle_share"] = 1 - busy / seconds
    return figures


def training_speed(device: str, small: bool) -> Figures:
    """Tokens a second, utilisation and padding of packs against padding, full and with LoRA."""
    arms: dict[str, Figures] = {"packs": {}, "padding": {"pad_mode": "dynamic_pad"}}
    if not small:
        arms["packs, LoRA"] = {"lora": True}
        arms["padding by length"] = {"pad_mode": "dynamic_pad", "train_sampling_strategy": "group_by_length"}
    names = ("tokens_per_second", "padding_share", "model_utilisation", "peak_cuda_allocated_bytes")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in arms.items():
            steps = {"max_steps": 2 if small else 12, "overwrite_output_dir": True}
            _, cost = train(device, small, folder, **steps, **flags)
            figures[name] = {key: cost.get(key) for key in names}
    return figures


# ------------------------------------------------------------------------------------------------ what the stages share


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """The median time of a call; on a GPU by Triton, with a cold L2."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=10, rep=60, return_mode="median"))
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def relative(ours: Any, exact: Any) -> float:
    return float((ours.cpu().double() - exact.cpu()).norm() / exact.cpu().norm())


def head(tokens: int, width: int, vocabulary: int, dtype: Any, device: str) -> tuple[Any, Any, Any]:
    """Hidden states, the head's weight, targets."""
    import torch

    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype)
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype)
    return hidden, weight, torch.randint(vocabulary, (tokens,), device=device)


def tokenizer() -> Any:
    """Of bytes, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    made = PreTrainedTokenizerFast(tokenizer_object=bytes_only, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = template
    return made


def llama(small: bool) -> Any:
    """Random weights: a toy, or half a billion of them in eight layers of a 1B's width."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = (64, 128, 2, 4, 2) if small else (2048, 5632, 8, 16, 4)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(
        vocab_size=320 if small else 32_256, max_position_embeddings=2048, **dict(zip(names, sizes, strict=True))
    )
    return LlamaForCausalLM(config).eval()


def records(count: int) -> list[Any]:
    """Rows of words, their lengths as widely spread as those of real answers; the same every time."""
    from codeact.data.records import Record

    draw = random.Random(0)

    def words(mean: float) -> str:
        return " ".join(
            "".join(draw.choice(WORDS)) for _ in range(max(1, int(draw.lognormvariate(math.log(mean), 0.7))))
        )

    return [Record(row=row, id=str(row), question=words(12), answer=words(30)) for row in range(count)]


def train(device: str, small: bool, folder: str, **flags: Any) -> tuple[Figures, Figures]:
    """The result and the costs of ``codeact train`` in ``folder``; packs of 512 or 4,096 tokens."""
    import torch

    from codeact.data.records import write_jsonl
    from codeact.training.flags import parse_mapping
    from codeact.training.train import train_from_settings

    base, rows, out = (Path(folder) / name for name in ("base", "rows.jsonl", "out"))
    if not base.exists():
        llama(small).to(torch.bfloat16).save_pretrained(base)
        tokenizer().save_pretrained(base)
        write_jsonl(rows, [{"instruction": r.question, "output": r.answer} for r in records(24 if small else 400)])
    given = {"model_name_or_path": str(base), "data_path": str(rows), "output_dir": str(out)}
    common = {"max_length": 512 if small else 4096, "num_train_epochs": 1, "bf16": True, "save_strategy": "no"}
    settings = {**given, **common, "disable_tqdm": True, "use_cpu": device == "cpu", **flags}
    train_from_settings(parse_mapping(settings, "train"))
    result, cost = (json.loads((out / f"{name}.json").read_text()) for name in ("training", "cost"))
    return result["result"], cost


# --------------------------------------------------------------------------------------------------------- the command

Stage = Callable[[str, bool], Figures]
STAGES: dict[str, tuple[Stage, float]] = {
    stage.__name__: (stage, seconds)
    for stage, seconds in (
        (facts, 40), (build, 120), (loss, 40), (attention, 40), (scoring, 60), (training, 90), (kmeans, 60),
        (embedding, 40), (gpu_tests, 150), (doctor, 60), (loss_speed, 120), (tiles, 90), (gradient_speed, 60),
        (scoring_speed, 90), (training_speed, 120),
    )
}  # fmt: skip
"""In the order in which they run, with the seconds that each may take."""

_WORST = ("failed", "too slow", "no time left", "not here", "ok")


def run_stage(name: str, device: str, small: bool, limit: float, log: Path) -> Figures:
    """Run a stage in a process of its own; its status, its seconds, and its figures or the end of its log."""
    # Forked, a stage has what is imported already; a GPU, which some library may have touched by then, forbids it.
    context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_process, args=(name, device, small, sender, log))
    begin, offset = time.monotonic(), log.stat().st_size
    process.start()
    sender.close()
    record: Figures = {}
    try:
        if receiver.poll(limit):
            record = receiver.recv()
        else:
            record = {"status": "too slow", "why": f"not done in {limit:.0f} s"}
    except EOFError:
        process.join()
        record = {"status": "failed", "why": f"the process ended with exit code {process.exitcode}"}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what the stage started: it leads a group of its own
        process.kill()
        process.join()
    record["seconds"] = round(time.monotonic() - begin, 1)
    if record["status"] in ("failed", "too slow"):
        record["log"] = log.read_bytes()[offset:].decode(errors="replace")[-2000:]
    return record


def _in_process(name: str, device: str, small: bool, sender: Any, log: Path) -> None:
    os.setsid()
    sys.stdout = sys.stderr = file = log.open("a", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    try:
        record = {"status": "ok", "figures": STAGES[name][0](device, small)}
    except NotHereError as error:
        record = {"status": "not here", "why": str(error)}
    except BaseException as error:
        traceback.print_exc()
        record = {"status": "failed", "why": f"{type(error).__name__}: {error}"[:500]}
    sender.send(record)
    os._exit(0)  # what a library does at its end may hang


def install_wheels(wheels: Path, site: Path) -> None:
    """Install what lies in ``wheels`` into ``site``, for this process and those that it starts."""
    if wheels.is_dir() and (files := sorted(map(str, wheels.glob("*.whl")))):
        if importlib.util.find_spec("pip"):
            run("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site), *files)
        else:  # an environment made by uv
            for file in files:
                with zipfile.ZipFile(file) as archive:
                    archive.extractall(site)
        sys.path.insert(1, str(site))
    paths = [str(ROOT), str(ROOT / "kernels"), str(site), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    sys.path[1:1] = paths[:2]


def preload() -> None:
    """Import once what the stages need."""
    import sentence_transformers  # noqa: F401
    from sklearn.cluster import KMeans  # noqa: F401
    from transformers import BertModel, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    import codeact.training.train  # noqa: F401


def download_wheels(folder: Path) -> None:
    """Fetch ``WHEELS`` for a machine with Python 3.12; exits with 1 where they and the tree are too much to carry."""
    place = ("--only-binary", ":all:", "--python-version", "3.12", "--platform", "manylinux_2_28_x86_64")
    places = (*place, "--platform", "manylinux_2_17_x86_64", "--platform", "manylinux2014_x86_64")
    run("-m", "pip", "download", "-q", "--no-deps", *places, "-d", str(folder.resolve()), *WHEELS)
    wheels, tree = carried_bytes(folder)
    print(f"{wheels / 2**20:.1f} MiB of wheels and {tree / 2**20:.1f} MiB of files in the tree")
    if wheels + tree > CARRIED:
        sys.exit(f"that is more than the {CARRIED >> 20} MiB that are carried")


def carried_bytes(folder: Path) -> tuple[int, int]:
    """Bytes of the wheels in ``folder``, and of the files that git knows; of all where the tree is no checkout."""
    try:
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        files = [ROOT / name for name in names.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        files = [*ROOT.rglob("*")]
    return sum(w.stat().st_size for w in folder.glob("*.whl")), sum(f.stat().st_size for f in files if f.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes: does everything still run?")
    parser.add_argument("--only", help="stages, comma-separated: " + ", ".join(STAGES))
    parser.add_argument("--budget", type=float, default=570, help="seconds of all stages together")
    parser.add_argument(
        "--wheels", type=Path, help="download the wheels to carry into this folder, and do nothing else"
    )
    options = parser.parse_args()
    if options.wheels:
        return download_wheels(options.wheels)
    names = options.only.split(",") if options.only else list(STAGES)
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"no stage is called {', '.join(unknown)}; there are {', '.join(STAGES)}")
    out = Path(os.environ.get("OUT", "."))
    out.mkdir(parents=True, exist_ok=True)
    log = out / "device.log"
    log.write_bytes(b"")
    end = time.monotonic() + options.budget
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as site:
        install_wheels(Path("wheels"), Path(site))
        if options.device == "cpu":
            preload()
        stages: dict[str, Figures] = {}
        for name in names:
            limit = min(STAGES[name][1], end - time.monotonic())
            stages[name] = (
                run_stage(name, options.device, options.small, limit, log)
                if limit > 1
                else {"status": "no time left", "why": f"--budget is {options.budget:.0f} s", "seconds": 0.0}
            )
            worst_first = sorted(stages.items(), key=lambda item: _WORST.index(item[1]["status"]))
            content = {
                "device": options.device,
                "small": options.small,
                "said": "run on a device" if options.device == "cuda" else "not run on a device: the CPU stood in",
                "stages": dict(worst_first),
            }
            (out / "device.json").write_text(json.dumps(content, indent=1) + "\n")
            print(
                f"{name:15} {stages[name]['status']:13} {stages[name]['seconds']:6.1f} s", stages[name].get("why", "")
            )
    sys.exit(int(any(stage["status"] not in ("ok", "not here") for stage in stages.values())))


if __name__ == "__main__":
    main()
