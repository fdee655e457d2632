"""Stage score: the data set's rows -> a table with the IFD of every one, or the reason why it has none."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from codeact.base.errors import InputError
from codeact.base.ledger import Entry, changes
from codeact.base.protocols import resolve_turns
from codeact.base.settings import Protocol, Settings, decisive, setting
from codeact.base.stage import Lines, Run, Stage
from codeact.base.trackers import check_trackers, report_figures
from codeact.data.settings import DataSettings
from codeact.text.template_files import Template

if TYPE_CHECKING:
    import pyarrow as pa

    from codeact.data.forms import Columns
    from codeact.scoring.ifd import IfdScorer
    from codeact.workers.choice import Engine
    from codeact.workers.engines import Job, Place

SCORES_FOLDER, TABLE, TURN_TABLE = "scores", "scores/scores.parquet", "scores/turns.parquet"
_NAMED_REFUSALS = 5
_HOW = {"template", "max_length", "tokens_per_pack", "protocol", "attention"}


class ScoreSettings(Settings):
    """How rows are scored; see ``codeact.scoring.ifd.IfdScorer``."""

    model: str = setting(..., "Causal language model: a folder or a hub name.")
    template: Template = setting(
        "qa", "qa, alpaca, chat (train's default), a chat format, a Jinja file, or text with {question}."
    )
    max_length: int | None = setting(
        None, "Tokens of a sequence; a longer answer is cut. Default: 2048, or what the model takes.", ge=2
    )
    dtype: str = setting("auto", "auto (bfloat16 where the hardware has it), float32, bfloat16 or float16.")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N.", place=True)
    tokens_per_pack: int | None = setting(
        None, "Tokens of a forward pass; default: by the device and the model.", place=True, ge=1
    )
    attention: str = setting(
        "auto", "Of transformers, such as sdpa or eager; auto: the best for packs that is here.", place=True
    )
    shard_size: int = setting(10_000, "Rows of a shard, which is what a kill can lose.", place=True, ge=1)
    protocol: Protocol = setting("exact", "exact, or paper: the numbers of the paper's scripts.")
    turns: Literal["all", "last"] | None = setting(
        None, "Answers of a conversation that are scored; default: all, under protocol paper the last."
    )
    keep_token_nll: bool = setting(
        False, "Keep the loss of every answer token, 4 bytes each: select --difficulty s_ifd needs it.", place=True
    )

    check_with: str | None = setting(
        None, "Larger model that scores a sample of the rows, too, to compare.", place=True
    )
    check_rows: int = setting(500, "Rows of that sample.", place=True, ge=2)
    check_ratio: float = setting(0.4, "Share of the rows whose overlap is told.", place=True, gt=0, le=1)
    report_to: str | None = setting(None, "Trackers of the figures: tensorboard, wandb, mlflow, ...", place=True)

    @model_validator(mode="after")
    def _within_the_protocol(self) -> ScoreSettings:
        resolve_turns(self.turns, self.protocol)
        if self.keep_token_nll and self.protocol == "paper":
            raise InputError("under protocol paper the two passes score different tokens; leave out --keep-token-nll")
        return self

    def turns_of(self, columns: Columns) -> str:
        """``turns``, or what it means for data of these columns: all the same where a row has one answer."""
        return resolve_turns(self.turns, self.protocol) if columns.several_answers else "last"


def prepare_scoring(
    data: DataSettings,
    settings: ScoreSettings,
    output: str | Path,
    overwrite: bool = False,
    strict: bool = False,
    place: Place | None = None,
    first: bool = True,
) -> Job:
    """Open the data, load the model and claim the folder.

    Arguments as in ``score_data`` and ``codeact.workers.engines.Begin``; errors as in the first.
    """
    from codeact.base.files import check_kind
    from codeact.data.records import BadRow
    from codeact.data.sources import absolute_name
    from codeact.models.loading import model_fingerprint
    from codeact.scoring.folder import ScoreFolder
    from codeact.workers.engines import Job

    if place is not None:
        settings = settings.model_copy(update={"device": place.take(settings.device)})
    check_kind(output, folder=True)
    records = data.open()
    if strict and first:
        for row in records:
            if isinstance(row, BadRow):
                raise InputError(f"{row.message} ({row.reason}); mend it, or leave out --strict to go on without it")
    turns = settings.turns_of(records.columns)
    model, scorer, device, dtype = _load_scorer(settings.model, settings, turns)
    folder = ScoreFolder(
        output,
        {
            "data": {
                **data.model_dump(),
                "source": absolute_name(data.source),
                "rows": len(records),
                "fingerprint": records.fingerprint,
            },
            "model": {"name": absolute_name(settings.model), "fingerprint": model_fingerprint(settings.model, model)},
            "template": scorer.prompts.text,
            "max_length": scorer.max_length,
            "dtype": dtype,
            "tokens_per_pack": scorer.tokens_per_pack,
            "device": device,
            "attention": scorer.attention,
            "protocol": settings.protocol,
            "turns": turns,
            "shard_size": settings.shard_size,
        },
    )
    folder.keep_token_nll = settings.keep_token_nll
    folder.claim(overwrite and first)
    return Job(folder, functools.partial(folder.score, records, scorer))


def _load_scorer(name: str, settings: ScoreSettings, turns: str) -> tuple[Any, IfdScorer, str, str]:
    """A model, what scores by it in the way of the settings, and the names of its device and dtype."""
    from codeact.base.console import say
    from codeact.base.devices import resolve_device, resolve_dtype
    from codeact.models.loading import load_causal_lm, quiet_transformers
    from codeact.scoring.ifd import IfdScorer
    from codeact.text.templates import check_template

    check_template(settings.template)
    quiet_transformers()
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    shown = str(dtype).removeprefix("torch.")
    say(f"loading {name}, {shown} on {device}")
    model, tokenizer = load_causal_lm(name, device, dtype)
    scorer = IfdScorer(model, tokenizer, **settings.model_dump(include=_HOW), turns=turns)
    return model, scorer, str(device), shown


def score_data(
    data: DataSettings,
    settings: ScoreSettings,
    output: str | Path,
    *,
    workers: int | None = None,
    engine: Engine = "local",
    address: str | None = None,
    overwrite: bool = False,
    strict: bool = False,
) -> dict[str, Any] | None:
    """Score a data set into the folder ``output``, doing only the shards that are missing.

    Whoever calls it with the same arguments while it runs, in other processes or on other machines that see the folder,
    shares the work.

    Args:
        data: the data set.
        settings: how.
        output: the folder; see ``codeact.scoring.folder``.
        workers: processes that score, one a GPU or an equal share of the CPUs each. Default: this one; of Ray as many
            as its cluster has GPUs, or nodes where it has none.
        engine: ``local``, processes of this machine; ``ray``, actors on a cluster; ``torchrun``, the processes that
            torchrun, accelerate or srun started, of which each is one worker (under them local is the same).
        address: of a Ray cluster, as ``HOST:PORT``; default: one is started on this machine for the time of the call.
        overwrite: discard scores made with other settings.
        strict: stop at the first bad row instead of counting it.

    Returns:
        The totals of the merged table, or None where another worker merges it.

    Raises:
        InputError: see the stages; or shards cannot be scored, all others being done: the first are named, with why.
    """
    from codeact.data.sources import absolute_name
    from codeact.scoring.folder import ScoreFolder
    from codeact.workers.choice import check_engine
    from codeact.workers.engines import Begin
    from codeact.workers.share import share_out

    check_trackers(settings.report_to)
    check_engine(engine, workers, address)
    if settings.check_with is not None:
        from codeact.models.loading import model_identity

        model_identity(settings.check_with)  # one that is not there is found before hours of scoring
    if engine == "ray":  # what its nodes see
        data = data.model_copy(update={"source": absolute_name(data.source)})
        settings = settings.model_copy(update={"model": absolute_name(settings.model)})
        output = Path(output).absolute()
    elif workers is not None and workers > 1:
        from codeact.models.weight_files import check_copies

        check_copies(settings.model, workers, 4 if settings.dtype == "float32" else 2)
    begin = Begin(
        folder=Path(output),
        prepare=functools.partial(prepare_scoring, data, settings, output, overwrite, strict),
        modules=("codeact.models.loading", "codeact.scoring.folder", "codeact.scoring.ifd"),
    )
    where: Any = {"workers": workers, "engine": engine, "address": address}
    return share_out(begin, lambda: ScoreFolder.open(output), **where)


# --------------------------------------------------------------------------------------------------- what is told of it


def require_scores(totals: dict[str, Any], folder: str | Path) -> None:
    """Refuse to go on where no row has a score.

    Raises:
        InputError: none has; says why, most frequent reason first.
    """
    if not totals["status"].get("ok", 0):
        reasons = sorted(totals["refused"].items(), key=lambda item: -item[1])
        told = ", ".join(f"{count:,} {name}" for name, count in reasons)
        raise InputError(
            f"none of {totals['rows']:,} rows has a score ({told}); each has its reason in {folder}/scores.parquet"
        )


def score_lines(totals: dict[str, Any], folder: str | Path) -> Lines:
    """Lines of the summary table about the scores."""
    import pyarrow.compute as pc

    from codeact.scoring.folder import ScoreFolder
    from codeact.scoring.length import correlation_text, rank_correlation

    table = ScoreFolder.open(folder).read()
    ifd = pc.fill_null(table["ifd"], float("nan"))
    ok = totals["status"].get("ok", 0)
    refused = totals["rows"] - ok
    reasons = ", ".join(f"{count:,} {name}" for name, count in sorted(totals["refused"].items())) or "none"
    lines = [
        ("rows in", f"{totals['rows']:,}"),
        ("tokens in", f"{totals['prompt_tokens']:,} question + {totals['answer_tokens']:,} answer"),
        ("rows scored", f"{ok:,} ({totals['truncated']:,} with a truncated answer)"),
        ("rows refused", f"{refused:,} ({reasons})"),
        ("length", correlation_text("ifd", rank_correlation(ifd, table["answer_tokens"]))),
    ]
    if totals["seconds"] and totals["tokens"]:
        rate = totals["tokens"] / totals["seconds"]
        lines += [
            ("scoring", f"{totals['seconds']:.1f} s, {rate:,.0f} tokens/s, {ok / totals['seconds']:.2f} rows/s"),
            ("packs", f"{totals['packs']:,}, {totals['tokens'] / totals['capacity_tokens']:.1%} full on average"),
            ("padding", f"0 tokens (batches of 16 in input order would be {_batch_padding(table, 16):.1%} padding)"),
        ]
    if shared := totals.get("shared_tokens"):
        share = shared / (shared + totals["tokens"])
        lines.append(("shared", f"{shared:,} tokens of beginnings that were computed once a pack, {share:.0%} of all"))
    named = table.filter(pc.is_valid(table["reason"]))["reason"]
    if "turns" in totals:
        lines += _turn_lines(totals)
    lines += [("refused", reason.as_py()) for reason in named[:_NAMED_REFUSALS]]
    if len(named) > _NAMED_REFUSALS:
        more = f"and {len(named) - _NAMED_REFUSALS:,} more, each with its reason in {Path(folder) / 'scores.parquet'}"
        lines.append(("", more))
    return lines


def report_scores(settings: ScoreSettings, totals: dict[str, Any], folder: Path) -> None:
    """Hand counts, speed and the quartiles of IFD to the trackers that are asked for; errors of ``report_figures``."""
    if settings.report_to is None:
        return
    import numpy as np

    from codeact.scoring.folder import ScoreFolder

    ifd = ScoreFolder.open(folder).read()["ifd"].drop_null().to_numpy()
    names = ("rows", "truncated", "prompt_tokens", "answer_tokens", "tokens", "packs", "seconds")
    figures = {name: totals[name] for name in names}
    figures |= {"rows_scored": len(ifd)} | {f"refused/{name}": count for name, count in totals["refused"].items()}
    if totals["seconds"]:
        figures["tokens_per_second"] = totals["tokens"] / totals["seconds"]
    if len(ifd):
        quartiles = np.quantile(ifd, (0.25, 0.5, 0.75)).tolist()
        figures |= dict(zip(("ifd_lower_quartile", "ifd_median", "ifd_upper_quartile"), quartiles, strict=True))
    report_figures(settings.report_to, "score", folder, settings, figures)


def _turn_lines(totals: dict[str, Any]) -> Lines:
    """Lines about the answers of conversations."""
    scored, answers = totals["turns"].get("ok", 0), sum(totals["turns"].values())
    others = sorted((name, count) for name, count in totals["turns"].items() if name != "ok")
    told = f"{scored:,} of {answers:,} scored" + "".join(f", {count:,} {name}" for name, count in others)
    tokens, apart = totals["tokens"] + totals.get("shared_tokens", 0), totals["apart_tokens"]
    if apart <= tokens:
        return [("answers", told)]
    saved = (
        f"{apart - tokens:,} of the {apart:,} tokens that turn by turn would take ({apart / tokens:.1f} times as many)"
    )
    return [("answers", told), ("saved", saved)]


def check_scores(data: DataSettings, settings: ScoreSettings, output: str | Path) -> Lines:
    """Score a sample of merged scores with ``settings.check_with``, too; what came of it as lines for the summary.

    Raises:
        InputError: the scores are not merged, or the model cannot be loaded or packed.
    """
    if settings.check_with is None:
        return []
    from codeact.models.loading import model_identity
    from codeact.scoring.check import OtherModel, agreement_lines, check_table, sample_rows
    from codeact.scoring.folder import ScoreFolder

    name = settings.check_with
    folder = ScoreFolder.open(output)
    places = sample_rows(folder.read(), settings.check_rows)
    records = data.open()
    turns = settings.turns_of(records.columns)
    other = OtherModel(name=name, identity=model_identity(name), load=lambda: _load_scorer(name, settings, turns)[1])
    checked = check_table(folder, records, places, other)
    return agreement_lines(folder, checked, settings.check_ratio)


def _batch_padding(table: pa.Table, batch: int) -> float:
    """Share of padding tokens, were the scored rows padded in batches in input order."""
    import numpy as np

    from codeact.data.chosen import row_tokens

    lengths = row_tokens(table)[np.asarray(table["status"]) == "ok"]
    if not len(lengths):
        return 0.0
    firsts = np.arange(0, len(lengths), batch)
    sizes = np.diff(firsts, append=len(lengths))
    padded = int((np.maximum.reduceat(lengths, firsts) * sizes).sum())
    return 1 - int(lengths.sum()) / padded


class Score(Stage):
    """In a run."""

    name = section = "score"
    settings, default = ScoreSettings, ...
    outputs, products = (SCORES_FOLDER,), (TABLE,)

    def inputs(self, run: Run) -> dict[str, Any]:
        """Data, model, and how."""
        settings = run.of(ScoreSettings)
        return {
            "data": run.data_fingerprint(),
            "model": run.identity(settings.model),
            **decisive(settings, "model", "turns"),
            **({"turns": "all"} if settings.turns_of(run.data_columns()) == "all" else {}),
        }

    def work(self, run: Run) -> Lines:
        """Score what is missing."""
        folder = run.output / SCORES_FOLDER
        where = {"workers": run.processes, "engine": run.engine, "address": run.address}
        totals = score_data(run.data, run.of(ScoreSettings), folder, **where)
        assert totals is not None, "nobody else works in a run's folder"
        require_scores(totals, folder)
        report_scores(run.of(ScoreSettings), totals, folder)
        return [*score_lines(totals, folder), *check_scores(run.data, run.of(ScoreSettings), folder)]

    def account(self, output: Path) -> Iterator[Entry]:
        """Rows of the data set -> records -> scored ones. Tokens are question + answer, by the model's tokenizer."""
        if not (output / TABLE).exists():
            return
        import numpy as np
        import pyarrow.compute as pc

        from codeact.data.chosen import row_tokens
        from codeact.scoring.folder import ScoreFolder

        folder = ScoreFolder.open(output / SCORES_FOLDER)
        table = folder.read()
        tokens = row_tokens(table)
        scored = np.asarray(pc.is_valid(table["ifd"]))
        # Of a row that held no record reading made no tokens; a template may refuse one that did.
        refused = pc.fill_null(pc.starts_with(table["reason"], "template_refused"), False)
        record = np.asarray((tokens > 0) | np.asarray(refused))
        yield Entry(
            stage="read",
            what="rows",
            after=None,
            rows_in=folder.rows,
            rows_out=int(record.sum()),
            lost=_refusals(table, ~record, None),
        )
        yield Entry(
            stage="score",
            what="rows",
            after="read",
            rows_in=int(record.sum()),
            rows_out=int(scored.sum()),
            tokens_in=int(tokens.sum()),
            tokens_out=int(tokens[scored].sum()),
            lost=_refusals(table, record & (np.asarray(table["status"]) != "ok"), tokens),
        )
        if not folder.by_turn:
            return
        from codeact.data.tables import read_table

        answers = read_table(output / TURN_TABLE, "score again", columns=["status", "answer_tokens", "ifd"])
        status, tokens = np.asarray(answers["status"]), np.asarray(answers["answer_tokens"], np.int64)
        scored = np.asarray(pc.is_valid(answers["ifd"]))
        others = {name: status == name for name in sorted({*status} - {"ok"})}
        yield Entry(
            stage="turns",
            what="answers",
            after=None,
            rows_in=len(status),
            rows_out=int(scored.sum()),
            tokens_in=int(tokens.sum()),
            tokens_out=int(tokens[scored].sum()),
            lost=changes({name: (int(rows.sum()), int(tokens[rows].sum())) for name, rows in others.items()}),
        )


def _refusals(table: pa.Table, rows: Any, tokens: Any) -> Any:
    """The losses among ``rows``, by the code that a reason begins with."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    codes = pc.list_element(pc.split_pattern(table["reason"].filter(pa.array(rows)), ":", max_splits=1), 0)
    lost: dict[str, tuple[int, int | None]] = {}
    for code in sorted(pc.unique(codes).to_pylist()):
        these = np.asarray(pc.equal(codes, code))
        lost[code] = (int(these.sum()), None if tokens is None else int(tokens[rows][these].sum()))
    return changes(lost)
