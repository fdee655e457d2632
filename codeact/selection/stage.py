"""Stage select: scores and clusters -> the chosen rows as conversations, and for every row why it was chosen or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from codeact.base.errors import InputError
from codeact.base.ledger import Entry, changes
from codeact.base.settings import Protocol, Settings, decisive, setting
from codeact.base.stage import Lines, Run, Stage
from codeact.data.settings import DataSettings
from codeact.embedding.stage import EMBEDDINGS_FILE
from codeact.scoring.stage import SCORES_FOLDER
from codeact.scoring.stage import TABLE as SCORE_TABLE

if TYPE_CHECKING:
    from codeact.data.records import RecordSet
    from codeact.scoring.folder import ScoreFolder
    from codeact.selection.choose import Selection

SELECTED_FILE = "selected.jsonl"


class SelectSettings(Settings):
    """What is chosen; see ``codeact.selection.choose.plan_selection``."""

    ratio: float = setting(0.4, "Share of the rows to choose, above 0, at most 1.", gt=0, le=1)
    clusters: int = setting(10, "Number of clusters.", ge=1)
    strategy: Literal["cdas", "top_ifd", "random"] = setting("cdas", "cdas, top_ifd or random.")
    protocol: Protocol = setting("exact", "exact, or paper: the choice of the paper's scripts.")
    seed: int = setting(42, "Of k-means and of strategy random.", ge=0)
    backend: Literal["auto", "sklearn", "torch", "cuml"] = setting("auto", "k-means of: auto, sklearn, torch or cuml.")


def select_rows(
    scores: str | Path,
    embeddings: str | Path | None,
    output: str | Path,
    settings: SelectSettings,
    source: str | None = None,
) -> Selection:
    """Choose rows and write them as conversations to ``output``, and ``NAME.rows.parquet`` beside it.

    Args:
        scores: a merged score folder.
        embeddings: the embeddings of the same data; cdas needs them, the other strategies take none.
        output: JSON lines.
        settings: what to choose.
        source: where the data lies now, if not where it was scored.

    Raises:
        InputError: scores, embeddings and data do not belong together or cannot be read.
    """
    from codeact.embedding.vectors import read_embeddings
    from codeact.scoring.folder import ScoreFolder
    from codeact.selection.audit import write_audit
    from codeact.selection.choose import join_labels, plan_selection, write_selection
    from codeact.selection.clustering import cluster

    folder = ScoreFolder.open(scores)
    table = folder.read()
    records = open_scored_data(folder, source)
    labels = None
    if embeddings is not None:
        vectors = read_embeddings(embeddings)
        labels = join_labels(
            table,
            vectors.rows,
            vectors.ids,
            cluster(vectors.vectors, settings.clusters, settings.seed, settings.backend),
            table_fingerprint=folder.settings["data"]["fingerprint"],
            embeddings_fingerprint=vectors.metadata.data_fingerprint,
        )
    elif settings.strategy == "cdas":
        raise InputError(
            "strategy cdas chooses by cluster and needs --embeddings FILE.npy; make it with: codeact embed"
        )
    selection = plan_selection(
        table, labels, settings.ratio, settings.strategy, protocol=settings.protocol, seed=settings.seed
    )
    write_selection(output, records, table, selection, labels)
    write_audit(output, table, selection, labels)
    return selection


def open_scored_data(folder: ScoreFolder, source: str | None = None) -> RecordSet:
    """Open the data that a score folder was made from, and check that it is still the same.

    Raises:
        InputError: it is gone (say where it lies with ``--data``) or has changed.
    """
    kept = {key: value for key, value in folder.settings["data"].items() if key in DataSettings.model_fields}
    data = DataSettings(**{**kept, **({"source": source} if source else {})})
    try:
        records = data.open()
    except InputError as error:
        raise InputError(f"{error}; if the data has moved, say where with --data") from None
    if records.fingerprint != folder.settings["data"]["fingerprint"]:
        raise InputError(
            f"{data.source} is not the data that was scored: fingerprint {records.fingerprint[:16]}, scored "
            f"{folder.settings['data']['fingerprint'][:16]}; say where that lies with --data, or score again"
        )
    return records


def selection_lines(selection: Selection) -> Lines:
    """Lines of the summary table about the selection."""
    asked = f"{selection.strategy}, ratio {selection.ratio}, protocol {selection.protocol}"
    short = f" ({selection.shortfall:,} short: no eligible row is left)" if selection.shortfall else ""
    return [
        ("budget", f"{selection.budget:,} rows ({asked})"),
        ("rows chosen", f"{len(selection.positions):,}{short}"),
        ("tokens chosen", f"{selection.tokens_chosen:,} of {selection.tokens_in:,}"),
        *(
            (f"cluster {c.label}", f"{c.chosen:,} chosen of {c.size:,} ({c.eligible:,} eligible)")
            for c in (selection.clusters if len(selection.clusters) > 1 else ())
        ),
    ]


class Select(Stage):
    """In a run."""

    name = section = "select"
    settings, default = SelectSettings, SelectSettings()
    needs = ("score", "embed")
    outputs, products = (SELECTED_FILE, "selected.rows.parquet"), (SELECTED_FILE,)

    def inputs(self, run: Run) -> dict[str, Any]:
        """Scores, vectors, and what to choose."""
        return {**run.digest(*self.needs), **decisive(run.of(SelectSettings))}

    def work(self, run: Run) -> Lines:
        """Choose and write."""
        files = (run.output / SCORES_FOLDER, run.output / EMBEDDINGS_FILE, run.output / SELECTED_FILE)
        return selection_lines(select_rows(*files, run.of(SelectSettings), run.data.source))

    def account(self, output: Path) -> Iterator[Entry]:
        """Scored rows -> chosen ones: the losses by the audit, what is left by the file of chosen rows itself."""
        if not (output / SELECTED_FILE).exists():
            return
        import numpy as np
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        from codeact.data.chosen import chosen_ids, chosen_tokens
        from codeact.selection.audit import audit_path

        table = pq.read_table(output / SCORE_TABLE, columns=["prompt_tokens", "answer_tokens", "ifd"])
        tokens = np.asarray(table["prompt_tokens"], np.int64) + np.asarray(table["answer_tokens"], np.int64)
        scored = np.asarray(pc.is_valid(table["ifd"]))
        reasons = pq.read_table(audit_path(output / SELECTED_FILE), columns=["reason"])["reason"]
        lost = {}
        for reason in sorted(set(pc.unique(reasons).to_pylist()) - {None}):
            rows = np.asarray(pc.fill_null(pc.equal(reasons, reason), False)) & scored
            lost[reason] = (int(rows.sum()), int(tokens[rows].sum()))
        ids = chosen_ids(output / SELECTED_FILE)
        yield Entry(
            stage="select",
            what="rows",
            after="score",
            rows_in=int(scored.sum()),
            rows_out=len(ids),
            tokens_in=int(tokens[scored].sum()),
            tokens_out=chosen_tokens(output / SCORE_TABLE, ids),
            lost=changes(lost),
        )
