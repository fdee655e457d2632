"""Training in every padding mode, and the paper's experiment in small, on SmolLM2-135M with LoRA and real rows.

    python -m benchmarks.training [--quick | --full] [--data FILE] [--json FILE]

Exactness is not timed away here: tests/training/test_trainer.py proves that every mode has the same loss and gradients.

Rows: ``--data`` (columns instruction, input, output), by default functions harvested from this Python's standard
library. Every arm trains in a process of its own, so that its peak memory is its own; its time and its peak are those
that `codeact.training.cost.CostMonitor` counts. bfloat16 autocast where the CPU computes it.

Modes: the same samples once through every mode, micro-batches of 16 as in the paper; every round in another order.
"dynamic_pad" is what transformers does: logits of every position. The modes of ``--full`` add our savings one by one.
"max_length" takes the first 8 samples only: all cost the same.

The floor: the model's own FLOPs (LoRA's, without recomputation) at the speed of a large matrix multiplication in the
training's dtype, which ``CostMonitor`` measures; the share is what is called model FLOPs utilisation.

The experiment: (a) all rows, dynamic_pad; (b) 40 % by CDAS, dynamic_pack; (c) 40 % random, dynamic_pack; (d) random
rows of as many tokens as (b), dynamic_pack; (e) the rows of (b) for as many tokens as (a) reads. A seed decides the
adapters, the order of the rows, and which rows are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import codeact
from benchmarks.measure import Line, Report, Timing, in_fresh_process, main, mebibytes, table
from codeact.base.devices import cpu_has_bf16
from codeact.data.harvest import write_harvest
from codeact.data.records import Columns, Record, open_records
from codeact.run import demo_models

MAX_SEQ_LEN = 1024
BATCH = 16
RATIO = 0.4
CLUSTERS = 5

PLAIN = {"pad_mode": "dynamic_pad", "fused_loss": False}
PACK = {"pad_mode": "dynamic_pack"}
# name: options of codeact.training.trainer, arguments of Trainer
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # 16 rows of 1024 tokens in one pass want more memory than this machine has.
    "max_length, 4 rows at a time": (
        {**PLAIN, "pad_mode": "max_length"},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    ),
    "dynamic_pad": (PLAIN, {}),
    "dynamic_pad, loss in blocks": ({"pad_mode": "dynamic_pad"}, {}),
    "dynamic_pad, sorted": (PLAIN, {"train_sampling_strategy": "group_by_length"}),
    "dynamic_pad, sorted, loss in blocks": (
        {"pad_mode": "dynamic_pad"},
        {"train_sampling_strategy": "group_by_length"},
    ),
    "dynamic_pack, all logits": ({**PACK, "fused_loss": False, "supervised_only": False}, {}),
    "dynamic_pack, supervised logits": ({**PACK, "fused_loss": False}, {}),
    "dynamic_pack": (PACK, {}),
    "dynamic_pack, batch scope": ({**PACK, "pack_scope": "batch"}, {}),
    "dynamic_pack, checkpointing": (PACK, {"activation_checkpointing": True}),
}
MAX_LENGTH, BASE, SORTED, OURS = "max_length, 4 rows at a time", "dynamic_pad", "dynamic_pad, sorted", "dynamic_pack"
# Modes of the default run, and those of its second round.
USUAL = (MAX_LENGTH, BASE, SORTED, OURS, "dynamic_pack, batch scope", "dynamic_pack, checkpointing")
TWICE = (BASE, SORTED, OURS)
MAX_LENGTH_SAMPLES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One training run."""

    options: dict[str, Any]
    arguments: dict[str, Any]
    samples: list[Any]
    held_out: list[Any] | None = None
    seed: int = 0
    evaluate_first: bool = False


def read_rows(data: Path | None, count: int, folder: Path) -> list[Record]:
    """The first ``count`` usable rows, evenly over the data."""
    columns = Columns(input="input")
    if data is None:
        data, columns = folder / "stdlib.jsonl", Columns()
        write_harvest("stdlib", data, limit=count)
    rows = [row for row in open_records(data, columns) if isinstance(row, Record)]
    return rows[:: max(1, len(rows) // count)][:count]


def run_arm(arm: Arm) -> dict[str, Any]:
    """Train once and say what it cost and came to; called in a process of its own."""
    import torch
    import transformers
    from transformers import PrinterCallback, TrainingArguments

    from codeact.models.adapters import add_lora
    from codeact.models.loading import load_causal_lm
    from codeact.training.cost import CostMonitor
    from codeact.training.options import LORA_TARGETS, PackOptions
    from codeact.training.trainer import PackTrainer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(arm.seed)
    half = cpu_has_bf16()
    model, _ = load_causal_lm(str(demo_models.causal_lm()), None, torch.bfloat16 if half else torch.float32)
    model = add_lora(model, 16, 32, 0.0, LORA_TARGETS)
    options = PackOptions(max_length=MAX_SEQ_LEN, **arm.options)
    epoch_packs = options.packs and options.pack_scope == "epoch"
    with tempfile.TemporaryDirectory() as folder:
        defaults = {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 1 if epoch_packs else BATCH,
            "per_device_eval_batch_size": 1 if epoch_packs else BATCH,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
        }
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=half,
            seed=arm.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **{**defaults, **arm.arguments},
        )
        monitor = CostMonitor(model, folder, peak_flops="measure")
        trainer = PackTrainer(model, arm.samples, arguments, options, eval_samples=arm.held_out, monitor=monitor)
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()["eval_loss"] if arm.evaluate_first else None
        outcome = trainer.train()
        after = trainer.evaluate()["eval_loss"] if arm.held_out else None
    report = monitor.report
    assert report is not None
    return {
        "seconds": report.seconds,
        "samples": report.samples,
        "tokens": report.tokens,
        "padding_share": report.padding_share,
        "peak_bytes": report.peak_resident_bytes,
        "steps": len(report.steps["seconds"]),
        "utilisation": report.model_utilisation or 0.0,
        "train_loss": outcome.training_loss,
        "held_out_before": before,
        "held_out_after": after,
    }


def in_own_process(arm: Arm) -> dict[str, Any]:
    """Run an arm where nothing ran before; the libraries are imported already."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    result: dict[str, Any] = in_fresh_process(run_arm, arm, preload=("codeact.training.stage", "peft"))
    return result


def modes(samples: Sequence[Any], names: Sequence[str], rounds: int, again: Sequence[str]) -> list[dict[str, Any]]:
    """Every mode on the same samples, once, and those of ``again`` in every round."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    shuffle = random.Random(0)
    for number in range(rounds):
        for name in shuffle.sample(names, len(names)):
            if number and name not in again:
                continue
            options, arguments = MODES[name]
            some = samples[:MAX_LENGTH_SAMPLES] if name == MAX_LENGTH else samples
            arm = Arm(options=options, arguments=arguments, samples=list(some), seed=number)
            results[name].append(in_own_process(arm))
            print(f"  {name}: {results[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    base = results[BASE]
    records = []
    for name, runs in results.items():
        speeds = [run["samples"] / run["seconds"] for run in runs]
        against = [one / (b["samples"] / b["seconds"]) for one, b in zip(speeds, base, strict=False)]
        peak = statistics.median(run["peak_bytes"] for run in runs)
        records.append(
            {
                "what": name,
                **runs[0],
                "seconds": [run["seconds"] for run in runs],
                "samples_per_s": statistics.median(speeds),
                "tokens_per_s": statistics.median(run["tokens"] / run["seconds"] for run in runs),
                "utilisation": statistics.median(run["utilisation"] for run in runs),
                "peak_bytes": peak,
                "times_dynamic_pad": statistics.median(against),
                "times_dynamic_pad_range": [min(against), max(against)],
                "memory_of_dynamic_pad": peak / statistics.median(run["peak_bytes"] for run in base),
            }
        )
    return records


def modes_table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown."""

    def spread(low: float, high: float) -> str:
        return f" ({low:.2f} to {high:.2f})" if low < high else ""

    return table(
        "mode |> samples/s |> real tokens/s |> padding |> share of the floor |> peak memory "
        "|> x dynamic_pad, samples/s "
        "|> x its memory",
        (
            (
                r["what"],
                f"{r['samples_per_s']:.2f}",
                f"{r['tokens_per_s']:,.0f}",
                f"{r['padding_share']:.1%}",
                f"{r['utilisation']:.0%}",
                mebibytes(r["peak_bytes"]),
                f"{r['times_dynamic_pad']:.2f}{spread(*r['times_dynamic_pad_range'])}",
                f"{r['memory_of_dynamic_pad']:.2f}",
            )
            for r in records
        ),
    )


def choose(rows: Sequence[Record]) -> list[int]:
    """Positions of 40 % of the rows by CDAS."""
    table = codeact.score_ifd(str(demo_models.causal_lm()), records=rows, template="chat", max_length=MAX_SEQ_LEN)
    vectors = codeact.embed([row.question for row in rows], model=str(demo_models.sentence_embedder()))
    labels = codeact.cluster(vectors, k=CLUSTERS)
    chosen = set(codeact.select(table, labels, ratio=RATIO))
    return [position for position, row in enumerate(rows) if row.id in chosen]


def experiment(samples: Sequence[Any], chosen: Sequence[int], held_out: list[Any], seeds: int) -> list[dict[str, Any]]:
    """The paper's arms over seeds; every record holds the figures of all seeds."""
    lengths = np.array([len(sample.input_ids) for sample in samples])
    cdas = [samples[i] for i in chosen]
    budget = int(lengths[list(chosen)].sum())
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        order = np.random.default_rng([seed, 1]).permutation(len(samples))
        fits = int(np.searchsorted(np.cumsum(lengths[order]), budget, side="right"))
        arms: dict[str, tuple[list[Any], dict[str, Any], dict[str, Any]]] = {
            "(a) all rows, dynamic_pad": (list(samples), PLAIN, {}),
            "(b) 40 % by CDAS, dynamic_pack": (cdas, PACK, {}),
            "(c) 40 % random, dynamic_pack": ([samples[i] for i in order[: len(cdas)]], PACK, {}),
            "(d) random, as many tokens as (b)": ([samples[i] for i in order[:fits]], PACK, {}),
            "(e) CDAS, as many tokens as (a)": (cdas, PACK, {"num_train_epochs": float(lengths.sum() / budget)}),
        }
        for name in random.Random(seed).sample(list(arms), len(arms)):
            rows, options, arguments = arms[name]
            first = not results  # before training all arms are the same
            arm = Arm(
                options=options,
                arguments=arguments,
                samples=rows,
                held_out=held_out,
                seed=seed,
                evaluate_first=first,
            )
            results.setdefault(name, []).append(in_own_process(arm))
            last = results[name][-1]
            print(f"  seed {seed} {name}: {last['seconds']:.1f} s, {last['held_out_after']:.4f}", file=sys.stderr)
    records = []
    base = results["(a) all rows, dynamic_pad"]
    for name, runs in sorted(results.items()):
        after = [run["held_out_after"] for run in runs]
        times = [run["seconds"] / reference["seconds"] for run, reference in zip(runs, base, strict=True)]
        memory = [run["peak_bytes"] / reference["peak_bytes"] for run, reference in zip(runs, base, strict=True)]
        against = [loss - reference["held_out_after"] for loss, reference in zip(after, base, strict=True)]
        records.append(
            {
                "what": name,
                "rows": runs[0]["samples"],
                "tokens": statistics.median(run["tokens"] for run in runs),
                "steps": statistics.median(run["steps"] for run in runs),
                "seconds": statistics.median(run["seconds"] for run in runs),
                "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
                "time_of_a": statistics.median(times),
                "memory_of_a": statistics.median(memory),
                "held_out_mean": statistics.mean(after),
                "held_out_deviation": statistics.stdev(after) if len(after) > 1 else 0.0,
                "against_a": [min(against), max(against)],
                "runs": runs,
            }
        )
    return records


def experiment_table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    return table(
        "arm |> tokens read |> steps |> time |> peak memory |> x time of (a) |> x memory of (a) |> held-out loss",
        (
            (
                r["what"],
                f"{r['tokens']:,.0f}",
                f"{r['steps']:.0f}",
                Timing(tuple(run["seconds"] for run in r["runs"])),
                mebibytes(r["peak_bytes"]),
                f"{r['time_of_a']:.3f}",
                f"{r['memory_of_a']:.2f}",
                f"{r['held_out_mean']:.4f} ± {r['held_out_deviation']:.4f}",
            )
            for r in records
        ),
    )


def verdict(by_name: dict[str, dict[str, Any]]) -> str:
    """How the arms compare, seed by seed."""
    losses = {name[:3]: [run["held_out_after"] for run in r["runs"]] for name, r in by_name.items()}

    def wins(one: str, other: str) -> str:
        pairs = list(zip(losses[one], losses[other], strict=True))
        return f"{one} below {other} in {sum(x < y for x, y in pairs)} of {len(pairs)} seeds"

    return "; ".join(wins(*pair) for pair in (("(b)", "(a)"), ("(b)", "(c)"), ("(b)", "(d)"), ("(e)", "(a)"))) + "."


def run(options: argparse.Namespace) -> Report:
    from transformers import AutoTokenizer

    from codeact.text.conversations import Sample, encode_conversations

    names, in_modes, rounds, trained, held, seeds = (USUAL, 32, 2, 48, 16, 3)
    if options.quick:
        names, in_modes, rounds, trained, held, seeds = ((BASE, SORTED, OURS), 4, 1, 6, 2, 1)
    elif options.full:
        names, in_modes, rounds, trained, held, seeds = (tuple(MODES), 48, 3, 240, 80, 3)
    tokenizer = AutoTokenizer.from_pretrained(demo_models.causal_lm())
    with tempfile.TemporaryDirectory() as folder:
        rows = read_rows(options.data, trained + held, Path(folder))
    results = encode_conversations(rows, tokenizer, "chat", MAX_SEQ_LEN)
    kept = [(row, one) for row, one in zip(rows, results, strict=True) if isinstance(one, Sample)]
    out = kept[:: max(2, len(kept) // held)][:held]
    rest = [pair for pair in kept if all(pair is not other for other in out)]
    records, samples = [row for row, _ in rest], [sample for _, sample in rest]

    by_mode = modes(samples[:in_modes], names, rounds, names if options.full else TWICE)
    chosen = choose(records)
    arms = experiment(samples, chosen, [sample for _, sample in out], seeds)
    before = next(run["held_out_before"] for r in arms for run in r["runs"] if run["held_out_before"] is not None)
    mean = statistics.mean(len(sample.input_ids) for sample in samples)
    mean_chosen = statistics.mean(len(samples[i].input_ids) for i in chosen)
    notes = (
        f"Held-out loss before training {before:.4f}. A row chosen by CDAS is {mean_chosen / mean - 1:+.0%} longer "
        f"than the mean. {verdict({record['what']: record for record in arms})}"
    )
    found = {r["what"]: r for r in by_mode}
    ours = found[OURS]
    lines = [
        Line(
            what=f"train, {ours['samples']} rows, LoRA; whole process",
            ours=Timing(tuple(ours["seconds"])),
            peer=name,
            theirs=Timing(tuple(found[name]["seconds"])),
            floor=statistics.median(ours["seconds"]) * ours["utilisation"],
            memory=ours["peak_bytes"],
            peer_memory=found[name]["peak_bytes"],
        )
        for name in (BASE, SORTED)
    ]
    title = f"## Training, {found[BASE]['samples']} rows, {found[BASE]['tokens']:,} tokens, LoRA r16 on SmolLM2-135M"
    small = f"## The paper's experiment in small: {len(samples)} rows, {len(out)} held out, {seeds} seeds"
    facts = {"bf16": cpu_has_bf16(), "max_length": MAX_SEQ_LEN, "batch": BATCH, "ratio": RATIO}
    return Report(
        sections=[title, modes_table(by_mode), small, experiment_table(arms), notes],
        lines=lines,
        figures={**facts, "modes": by_mode, "experiment": arms},
    )


if __name__ == "__main__":
    main(
        run,
        __doc__,
        data="Alpaca-form JSON; default: harvested functions",
        full="all modes, more rows, three rounds: half an hour",
    )
