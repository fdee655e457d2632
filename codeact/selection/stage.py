"""Stage select: scores and clusters -> the chosen rows as conversations, and for every row why it was chosen or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeact.base.cards import figures_table, hub_name, public_name, settings_block, write_card, written_by
from codeact.base.errors import InputError, one_of
from codeact.base.ledger import Entry, changes
from codeact.base.settings import decisive
from codeact.base.stage import Lines, Run, Stage
from codeact.cleaning.stage import MARKS_FILE
from codeact.data.forms import FORMS
from codeact.data.settings import DataSettings
from codeact.embedding.stage import EMBEDDINGS_FILE
from codeact.scoring.stage import SCORES_FOLDER, ScoreSettings
from codeact.scoring.stage import TABLE as SCORE_TABLE
from codeact.selection.settings import BY_CLUSTER, SelectSettings

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from codeact.data.records import RecordSet
    from codeact.scoring.folder import ScoreFolder
    from codeact.selection.choose import Selection

SELECTED_FILE = "selected.jsonl"
_COUNTED_ROWS = 20_000  # read in a second, before the first stage


def select_rows(
    scores: str | Path,
    embeddings: str | Path | None,
    output: str | Path,
    settings: SelectSettings,
    source: str | None = None,
    form: str = "messages",
    marks: str | Path | None = None,
) -> Selection:
    """Choose rows and write them as conversations to ``output``; beside it ``NAME.rows.parquet`` and a data card.

    Args:
        scores: a merged score folder.
        embeddings: the embeddings of the same data; cdas needs them, the other strategies take none.
        output: JSON lines, or .parquet.
        settings: what to choose.
        source: where the data lies now, if not where it was scored.
        form: of a row; see ``write_selection``.
        marks: of ``codeact clean``; rows that it marked are not chosen.

    Raises:
        InputError: scores, embeddings, marks and data do not belong together or cannot be read.
    """
    from codeact.base.files import check_kind, keep_apart, locked_folder
    from codeact.scoring.folder import ScoreFolder
    from codeact.selection.audit import audit_path, write_audit
    from codeact.selection.choose import plan_selection, question_numbers, write_selection

    one_of("format", form, FORMS)
    check_kind(output, folder=False)
    keep_apart(audit_path(output), embeddings, marks)
    folder = ScoreFolder.open(scores)
    table = read_scores(folder, [settings.difficulty])
    records = open_scored_data(folder, source)
    choice = settings.choice()
    labels = None
    if embeddings is not None:
        backend, starts = settings.backend, 3
        if settings.protocol == "paper":  # whose script runs scikit-learn's k-means once
            backend, starts = "sklearn" if backend == "auto" else backend, 1
        clustered = cluster_rows(table, folder, embeddings, settings.clusters, settings.seed, backend, starts)
        labels = clustered.labels
        if settings.strategy == "facility_location":
            choice["vectors"] = clustered.vectors[clustered.places]
    elif settings.strategy in BY_CLUSTER:
        raise InputError(
            f"strategy {settings.strategy} chooses by cluster and needs --embeddings FILE.npy; make it with: "
            "codeact embed"
        )
    if settings.per_question is not None:
        choice["questions"] = question_numbers(records, table)
    if marks is not None:
        choice["left_out"] = marked_rows(table, folder, marks)
    selection = plan_selection(table, labels, settings.ratio, settings.strategy, **choice)
    if not len(selection.positions):
        reasons = Counter(selection.reasons)
        if reasons["below_budget"]:
            raise InputError(f"{settings.ratio} of {selection.rows_in:,} rows is no row; raise --ratio")
        told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        raise InputError(
            f"no row of {scores} can be chosen by strategy {settings.strategy} ({told}); choose by another --strategy "
            "or --difficulty"
        )
    with locked_folder(Path(output).parent, wait=True):  # or the two files could be of two processes
        write_selection(output, records, table, selection, labels, form)
        write_audit(output, table, selection, labels)
        write_data_card(Path(output), folder, selection, settings)
    return selection


def write_data_card(output: Path, folder: ScoreFolder, selection: Selection, settings: SelectSettings) -> bool:
    """Write README.md beside the chosen rows: what was chosen from what, and how; returns whether it was written.

    One that codeact did not write stays. A licence is not named: it is that of the source, and the user's to say.
    """
    source, model = folder.settings["data"]["source"], folder.settings.get("model", {}).get("name")
    chosen = len(selection.positions)
    size = next((name for most, name in _SIZES if chosen < most), "n>1M")
    on_hub = hub_name(source)
    metadata = {
        "task_categories": ["text-generation"],
        "size_categories": [size],
        "source_datasets": [on_hub] if on_hub else None,
        "tags": ["codeact", "instruction-tuning", "data-selection"],
        "configs": [{"config_name": "default", "data_files": output.name}],
    }
    reasons = Counter(reason for reason in selection.reasons if reason)
    lines = [*selection_lines(selection, settings), *((f"not chosen: {key}", f"{n:,}") for key, n in reasons.items())]
    said = {
        key: value for key, value in settings.model_dump().items() if value != SelectSettings.model_fields[key].default
    }
    return write_card(
        output.parent,
        metadata,
        [
            f"# {output.name}",
            f"{chosen:,} of {selection.rows_in:,} rows of `{public_name(source)}`, as conversations, chosen by "
            f"`{settings.strategy}`"
            + (f" on the scores of `{public_name(model)}`. " if model else ". ")
            + written_by("select"),
            figures_table(lines),
            "## Settings",
            "What is not said is at its default.",
            settings_block({"strategy": settings.strategy, **said}),
            "## License",
            "Not said: it is that of the source. Say it as `license:` above.",
        ],
    )


_SIZES = ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""The hub's names of sizes, each up to so many rows."""


def read_scores(folder: ScoreFolder, difficulties: Collection[str]) -> pa.Table:
    """The merged table of a score folder, with the column that one of these difficulties has beside it.

    Raises:
        InputError: it was not merged, or did not keep what a difficulty needs.
    """
    table = folder.read()
    return table.append_column("s_ifd", [folder.selective_ifd()]) if "s_ifd" in difficulties else table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClusteredRows:
    """``labels``: (rows of the score table,) int32, the cluster of each, -1 where there is no vector.

    ``vectors``: (N, D) float32, of those that have one; ``places``: (rows,) which of them is a row's, -1: none.
    """

    labels: NDArray[np.int32]
    vectors: NDArray[np.float32]
    places: NDArray[np.int32]


def cluster_rows(
    table: pa.Table,
    folder: ScoreFolder,
    embeddings: str | Path,
    clusters: int,
    seed: int,
    backend: str = "auto",
    starts: int = 3,
) -> ClusteredRows:
    """Cluster the questions of a score table by their embeddings.

    Args:
        table: of ``folder``.
        folder: says of which data it is.
        embeddings: the embeddings of the same data.
        clusters, seed, backend, starts: of ``codeact.selection.clustering.cluster``.

    Raises:
        InputError: scores and embeddings are not of the same data, or cannot be read.
    """
    import numpy as np

    from codeact.embedding.files import read_embeddings
    from codeact.selection.choose import UNCLUSTERED, join_labels
    from codeact.selection.clustering import cluster

    embedded = read_embeddings(embeddings)
    places = join_labels(
        table,
        embedded.rows,
        embedded.ids,
        np.arange(len(embedded.rows)),
        table_fingerprint=folder.settings["data"]["fingerprint"],
        embeddings_fingerprint=embedded.metadata.data_fingerprint,
    )
    names = cluster(embedded.vectors, clusters, seed, backend, n_init=starts)
    labels = np.append(names, np.int32(UNCLUSTERED))[places]  # the place of a row without a vector is -1, the last
    return ClusteredRows(labels=labels, vectors=embedded.vectors, places=places)


def marked_rows(table: pa.Table, folder: ScoreFolder, path: str | Path) -> NDArray[np.object_]:
    """What ``codeact clean`` marked the rows of a score table as, (rows,) text, empty where it is nothing.

    Raises:
        InputError: the marks are of other data, or cannot be read.
    """
    import numpy as np

    from codeact.cleaning.marks import MARKED, read_marks

    marks = read_marks(path)
    if marks.schema.metadata[b"fingerprint"].decode() != folder.settings["data"]["fingerprint"]:
        raise InputError(
            f"{path} and the scores are of different data; clean and score the same file, by the same columns"
        )
    status = np.array(marks["status"].to_pylist(), object)[np.asarray(table["row"])]
    return np.where(np.isin(status, MARKED), status, "")


def check_kept(run: Run, section: str, difficulties: Collection[str]) -> None:
    """Refuse a difficulty whose numbers the scoring of a run does not keep.

    Raises:
        InputError: it is s_ifd.
    """
    if "s_ifd" in difficulties and not run.of(ScoreSettings).keep_token_nll:
        raise InputError(f"{section}: difficulty s_ifd needs score: keep_token_nll: true")


def _check_clusters(clusters: int, data: DataSettings) -> None:
    """Refuse more clusters than there are questions; those of a large set are not counted."""
    from codeact.data.records import Record

    try:
        records = data.open()
    except InputError:
        return  # the first stage says so, or a plan is for where the data is
    questions = len(records)
    if clusters <= questions <= _COUNTED_ROWS:
        questions = sum(isinstance(row, Record) for row in records)
    if clusters > questions:
        raise InputError(
            f"--clusters {clusters} is more than the {questions:,} questions in {records.source}; lower it"
        )


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


def selection_lines(selection: Selection, settings: SelectSettings) -> Lines:
    """Lines of the summary table about the selection."""
    short = f" ({selection.shortfall:,} short: no eligible row is left)" if selection.shortfall else ""
    lines = [
        ("budget", f"{selection.budget:,} rows ({settings.told()})"),
        ("rows chosen", f"{len(selection.positions):,}{short}"),
        ("tokens chosen", f"{selection.tokens_chosen:,} of {selection.tokens_in:,}"),
        ("length", selection.length_line()),
    ]
    if selection.failed_chosen:
        lines.append(
            ("failed scores", f"{selection.failed_chosen:,} chosen, as the paper's script does: it has them as 0")
        )
    shared = settings.strategy in BY_CLUSTER and settings.protocol == "exact" and not selection.shortfall
    clustered = sum(c.size for c in selection.clusters) if shared else 0
    full = [c for c in selection.clusters if c.eligible == c.chosen < selection.budget * c.size // max(1, clustered)]
    if clustered and full:
        lines.append(
            ("small clusters", f"{len(full):,} of {len(selection.clusters):,} have fewer eligible rows than their "
                               "share, which others gave; a smaller budget or fewer --clusters keep the shares")
        )  # fmt: skip
    lines += [
        (f"cluster {c.label}", f"{c.chosen:,} chosen of {c.size:,} ({c.eligible:,} eligible)")
        for c in (selection.clusters if len(selection.clusters) > 1 else ())
    ]
    return lines


class Select(Stage):
    """In a run."""

    name = section = "select"
    settings, default = SelectSettings, SelectSettings()
    needs, takes = ("score", "embed"), ("clean",)
    outputs, products = (SELECTED_FILE, "selected.rows.parquet"), (SELECTED_FILE,)

    def check(self, run: Run) -> None:
        """The scoring of this run keeps the numbers of the difficulty, the backend is here, the rows suffice."""
        from codeact.selection.clustering import check_kmeans

        settings = run.of(SelectSettings)
        check_kept(run, self.section, [settings.difficulty])
        check_kmeans(settings.backend)
        if settings.strategy in BY_CLUSTER:
            _check_clusters(settings.clusters, run.data)

    def inputs(self, run: Run) -> dict[str, Any]:
        """Scores, vectors, and what to choose."""
        marks = run.digest("clean") if self._marks(run) else {}
        return {**run.digest(*self.needs), **marks, **decisive(run.of(SelectSettings))}

    def work(self, run: Run) -> Lines:
        """Choose and write."""
        files = (run.output / SCORES_FOLDER, run.output / EMBEDDINGS_FILE, run.output / SELECTED_FILE)
        settings = run.of(SelectSettings)
        return selection_lines(select_rows(*files, settings, run.data.source, marks=self._marks(run)), settings)

    def _marks(self, run: Run) -> Path | None:
        """Of the run's cleaning, where it is to leave rows out."""
        cleaning = run.section("clean")
        return run.output / MARKS_FILE if cleaning is not None and cleaning.drop else None

    def account(self, output: Path) -> Iterator[Entry]:
        """Scored rows -> chosen ones: the losses by the audit, what is left by the file of chosen rows itself."""
        if not (output / SELECTED_FILE).exists():
            return
        import numpy as np
        import pyarrow.compute as pc

        from codeact.data.chosen import chosen_ids, chosen_tokens, row_tokens
        from codeact.data.tables import read_table
        from codeact.selection.audit import audit_path

        table = read_table(output / SCORE_TABLE, "score again", columns=["prompt_tokens", "answer_tokens", "ifd"])
        tokens = row_tokens(table)
        scored = np.asarray(pc.is_valid(table["ifd"]))
        reasons = read_table(audit_path(output / SELECTED_FILE), "select again", columns=["reason"])["reason"]
        # the paper's script chooses rows without a score where no others are left
        unscored = np.asarray(pc.is_null(reasons)) & ~scored
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
            added=changes({"failed_score_chosen": (int(unscored.sum()), int(tokens[unscored].sum()))}),
        )
