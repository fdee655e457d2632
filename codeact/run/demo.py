"""``make demo``: the whole flow on small embedded models and on functions of this Python's standard library."""

from __future__ import annotations

import importlib.util
import sys
from importlib.resources import files
from pathlib import Path

from codeact.base.devices import cpu_has_bf16
from codeact.base.errors import InputError, MissingExtraError
from codeact.data.harvest import write_harvest
from codeact.evaluation.settings import GenerationSettings
from codeact.run import demo_models
from codeact.run.flow import STAGES, Flow
from codeact.run.settings import read_settings, settings_class, write_settings


def demo(output: Path, rows: int) -> None:
    """Run it; settings from ``configs/demo.yaml``.

    Args:
        output: the folder of the run.
        rows: how many rows to score.
    """
    for library in ("torch", "transformers", "sentence_transformers", "peft", "matplotlib", "gguf"):
        if importlib.util.find_spec(library) is None:  # not only after the download
            raise MissingExtraError(library, "demo", "the demo")
    shipped = read_settings(str(files("codeact") / "configs" / "demo.yaml"), settings_class(STAGES))
    data, config = output / "stdlib.jsonl", output / "run.yaml"
    print(write_harvest("stdlib", data, limit=rows), file=sys.stderr)
    changes = {
        "output": output,
        "data": shipped.data.model_copy(update={"source": str(data)}),
        "score": shipped.score.model_copy(update={"model": str(demo_models.causal_lm())}),
        "embed": shipped.embed.model_copy(update={"model": str(demo_models.sentence_embedder())}),
        "train": {**(shipped.train or {}), "bf16": cpu_has_bf16()},
        "generate": shipped.of(GenerationSettings).model_copy(update={"data": demo_models.human_eval()}),
    }
    settings = shipped.model_copy(update=changes)
    try:
        Flow(settings).check()
    except InputError as error:  # nothing isolates programs on this machine
        print(f"HumanEval is left out: {error}", file=sys.stderr)
        settings = settings.model_copy(update={"generate": None, "evaluate": None})
    write_settings(settings, config)
    Flow(settings).run()
    print(f"""\
The files are in {output}:
  {"report.html":<18}all of it on one page, to open in a browser
  {data.name:<18}the rows, harvested from the standard library of this Python
  {"scores/":<18}IFD of every row: scores.parquet, and manifest.json with settings, versions and totals
  {"embeddings.npy":<18}question vectors; their row ids in embeddings.rows.parquet
  {"selected.jsonl":<18}the chosen rows as conversations; why every row was chosen or not in selected.rows.parquet
  {"model/":<18}LoRA adapters trained on four fifths of them, and what that cost: cost.json, training.json
  {"evaluation/":<18}programs for a few easy tasks of HumanEval before and after, and what became of them; of all 164
                    a model of 135M parameters solves few, about 6 %, and a minute of training need not add any
  {config.name:<18}the settings of this run

Next, with your own rows and model (or a name on the hub): edit a copy of {config}, then
  codeact run COPY --dry-run       what it would cost
  codeact run COPY""")
