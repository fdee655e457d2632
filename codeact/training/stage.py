"""Stage train: chosen rows and a model -> a fine-tuned model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from codeact.base.errors import InputError, in_file
from codeact.base.files import atomic_path
from codeact.base.ledger import Entry, changes
from codeact.base.machine import usable_cpus
from codeact.base.parsing import read_json
from codeact.base.settings import flag_name
from codeact.base.stage import Lines, Run, Stage
from codeact.text.template_files import template_text

MODEL_FOLDER, SELECTED, SCORE_TABLE = "model", "selected.jsonl", "scores/scores.parquet"
_FROM_THE_RUN = ("model_name_or_path", "data_path", "output_dir")
_COLUMNS = ("question_column", "answer_column", "input_column", "conversation_column", "split", "config_name")
TAKEN_FLAGS = (*_FROM_THE_RUN, *_COLUMNS)
"""Flags that follow from the rest of a run's settings: the chosen rows are a file of messages."""


def train_command(argv: Sequence[str]) -> None:
    """Run ``codeact train`` with these flags.

    Raises:
        InputError: see ``codeact.training.flags.parse`` and ``codeact.training.train.train_from_settings``.
    """
    from codeact.training.flags import is_file_of_flags, parse

    with in_file() if is_file_of_flags(argv) else nullcontext():
        settings = parse(argv)
        if isinstance(settings, str):
            print(settings)
            return
        import torch

        from codeact.training.train import train_from_settings

        try:
            train_from_settings(settings)
        finally:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def check_training(
    values: Mapping[str, Any], where: str, taken: Collection[str] | Mapping[str, Any], model: str
) -> None:
    """``codeact.training.flags.check_flags``, and whether the flags fit the model's tokenizer and configuration."""
    from codeact.training.data import check_data_and_adapters, load_trainable
    from codeact.training.flags import check_flags, told_of

    flags = check_flags(values, where, taken=taken, model=model, trial=True)
    with told_of(where):
        load_trainable(model, flags, flags)
        check_data_and_adapters(model, flags)


class Train(Stage):
    """In a run; its section holds flags of ``codeact train``."""

    name = section = "train"
    settings = dict[str, Any]
    needs = ("select",)
    outputs, products = (MODEL_FOLDER,), (f"{MODEL_FOLDER}/*.safetensors", f"{MODEL_FOLDER}/*config.json")
    told = False

    def check(self, run: Run) -> None:
        """Flags, their types, and what they ask for."""
        check_training(run.section("train"), "train", self._taken(run), run.model)

    def inputs(self, run: Run) -> dict[str, Any]:
        """Chosen rows, model, flags."""
        flags = {
            name: template_text(str(value)) if flag_name(name) == "template" else value
            for name, value in run.section("train").items()
        }
        return {**run.digest("select"), "model": run.identity(run.model), "flags": flags}

    def work(self, run: Run) -> Lines:
        """Train; in several processes under torchrun."""
        flags = {**run.section("train"), **self._taken(run)}
        if run.processes == 1:
            from codeact.training.flags import parse_mapping
            from codeact.training.train import train_from_settings

            train_from_settings(parse_mapping(flags, "train"))
        else:
            path = run.output / "train.yaml"
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(flags), encoding="utf-8")  # JSON is YAML
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", str(run.processes), "-m", "codeact", "train", str(path)]
            threads = int(os.environ.get("OMP_NUM_THREADS") or usable_cpus()) // run.processes
            environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, threads))}
            code = subprocess.run(command, env=environment, check=False).returncode
            if code:
                raise InputError(f"training in {run.processes} processes ended with exit code {code}; see above")
        result = _record(run.output)["result"]
        lines = [("trained", f"{result['steps']:,} steps, into {result['output']}")]
        before, after = result["held_out_loss_before"], result["held_out_loss_after"]
        if after is not None:
            lines.append(("held-out loss", ("" if before is None else f"{before:.4f} before, ") + f"{after:.4f} after"))
        return lines

    def _taken(self, run: Run) -> dict[str, str | None]:
        """Flags that follow from the rest of the run's settings."""
        values = (run.model, str(run.output / SELECTED), str(run.output / MODEL_FOLDER))
        return {**dict.fromkeys(TAKEN_FLAGS), **dict(zip(_FROM_THE_RUN, values, strict=True))}

    def account(self, output: Path) -> Iterator[Entry]:
        """Chosen rows -> samples. Writing them in the model's format adds tokens; what is cut or held out is lost."""
        if not (output / MODEL_FOLDER / "training.json").exists():
            return
        from codeact.data.chosen import chosen_ids, chosen_tokens

        known = _record(output)
        counts = known["conversations"]
        tokens_in = chosen_tokens(output / SCORE_TABLE, chosen_ids(output / SELECTED))
        formatted = counts["tokens"] + counts["cut_tokens"] - tokens_in
        lost = {reason: (rows, None) for reason, rows in sorted(counts["refused"].items())}
        if not known["held_out_of_others"]:
            lost["held out to measure the loss"] = (known["held_out"], known["held_out_tokens"])
        lost[f"cut from {counts['truncated']:,} samples to fit"] = (0, counts["cut_tokens"])
        lost["the chat's format"] = (0, max(0, -formatted))
        yield Entry(
            stage="train",
            what="samples",
            after="select",
            rows_in=counts["rows"],
            rows_out=known["trained_on"],
            tokens_in=tokens_in,
            tokens_out=known["trained_on_tokens"],
            lost=changes(lost),
            added=changes({"the chat's format": (0, max(0, formatted))}),
        )


def _record(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(output / MODEL_FOLDER / "training.json")
    return content
