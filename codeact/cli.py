"""One thin command a stage, its flags made from the stage's settings classes."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from codeact import __version__
from codeact.base.console import aligned, is_text, say, visible
from codeact.base.errors import InputError, MissingExtraError, import_extra, in_command, one_of
from codeact.base.files import refuse_address
from codeact.base.settings import Settings, flag_name
from codeact.base.stage import Lines
from codeact.base.stopping import end_as_stopped
from codeact.cleaning.stage import CleanSettings
from codeact.data.settings import DataSettings
from codeact.embedding.stage import EmbedSettings
from codeact.evaluation.settings import EvaluateSettings, GenerationSettings, VerifySettings
from codeact.integrations.launch import LaunchSettings
from codeact.run.flow import LedgerError, open_flow
from codeact.scoring.stage import ScoreSettings
from codeact.selection.settings import SelectSettings
from codeact.workers.choice import WorkerSettings, launched_rank

app = typer.Typer(
    help=(
        "Fine-tune a code model on the part of the data that teaches most. The flow: "
        "score (and merge) -> embed -> clean -> select -> train, then generate -> sanitize -> evaluate. "
        "Each command has --help."
    ),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: flag_name(name).replace("_", "-"),  # --max_seq_len is --max-length
    },
)


def flag(text: str, *names: str, **more: Any) -> Any:
    """A flag that belongs to a command alone."""
    return typer.Option(*names, help=text, **more)


def command(name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function; a parameter that is a ``Settings`` class becomes a flag for every field of it."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        parameters: list[inspect.Parameter] = []
        sections: dict[str, type[Settings]] = {}
        for parameter in inspect.signature(function).parameters.values():
            kind = hints[parameter.name]
            if isinstance(kind, type) and issubclass(kind, Settings):
                sections[parameter.name] = kind
                parameters += [_parameter(field, info) for field, info in kind.model_fields.items() if _told(info)]
            else:
                parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
        parameters.sort(key=lambda p: p.default is not inspect.Parameter.empty)

        def run(**given: Any) -> None:
            for section, kind in sections.items():
                values = {field: given.pop(field) for field, info in kind.model_fields.items() if _told(info)}
                given[section] = _checked(kind, {field: value for field, value in values.items() if value is not None})
            for value in given.values():
                if isinstance(value, Path):
                    refuse_address(value)
            function(**given)

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name)(run)
        return function

    return decorate


def _told(info: FieldInfo) -> bool:
    return isinstance(info.json_schema_extra, dict) and bool(info.json_schema_extra["command"])


def _flags(field: str, info: FieldInfo) -> list[str]:
    assert isinstance(info.json_schema_extra, dict)
    names: Any = info.json_schema_extra["flags"]
    dashed = f"--{field.replace('_', '-')}"
    return names or [f"{dashed}/--no-{dashed[2:]}" if info.default is True else dashed]


def _parameter(field: str, info: FieldInfo) -> inspect.Parameter:
    kind, names = info.annotation, _flags(field, info)
    options = [part for part in (kind, *get_args(kind)) if get_origin(part) is Literal]
    metavar = f"[{'|'.join(get_args(options[0]))}]" if options else None
    if options:
        kind = str if type(None) not in get_args(kind) else str | None
    default = inspect.Parameter.empty if info.is_required() else info.default
    if names[0].isupper():
        told = typer.Argument(metavar=names[0], help=info.description)
    else:
        told = typer.Option(*names, metavar=metavar, help=info.description)
    return inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, told])


def _checked(kind: type[Settings], values: dict[str, Any]) -> Settings:
    try:
        return kind(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        message = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:
            raise InputError(message) from None
        field = str(problem["loc"][0])
        name = _flags(field, kind.model_fields[field])[0]
        raise InputError(f"{name} {problem['input']!r}: {message[:1].lower()}{message[1:]}") from None


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, flag("Print the version and stop.", "--version")] = False) -> None:
    if version:
        print(f"codeact {__version__}")
        raise typer.Exit


@command()
def harvest(
    target: Annotated[str, typer.Argument(metavar="PACKAGE_OR_FOLDER", help="A package, a folder, or stdlib.")],
    output: Annotated[Path, flag("JSON lines to write: id, instruction, output, path, line.")],
    limit: Annotated[int | None, flag("So many rows, spread evenly over all.", min=1)] = None,
) -> None:
    """Make instruction rows from the functions with docstrings of Python code; the code is parsed, never run."""
    from codeact.data.harvest import write_harvest

    _tell(str(write_harvest(target, output, limit=limit)))


@command()
def score(
    data: DataSettings,
    settings: ScoreSettings,
    where: WorkerSettings,
    output: Annotated[Path, flag("Folder of the scores; a rerun does only what is missing there.")],
    overwrite: Annotated[bool, flag("Discard scores of other settings in --output.", "--overwrite")] = False,
    strict: Annotated[bool, flag("Stop at the first bad row.", "--strict")] = False,
) -> None:
    """Score every row by Instruction-Following Difficulty."""
    from codeact.scoring.stage import check_scores, report_scores, score_data

    totals = score_data(data, settings, output, **where.model_dump(), overwrite=overwrite, strict=strict)
    if totals is None:
        _tell(f"all shards are done; another worker makes {output}/scores.parquet")
    else:
        report_scores(settings, totals, output)
        _print_scores(output, totals, check_scores(data, settings, output))


@command()
def ppl(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="FILE.txt, or a file, folder or hub data set with texts.")
    ],
    model: Annotated[str, flag("Causal language model: a folder or a hub name.")],
    text_column: Annotated[str, flag("Column of the texts.")] = "text",
    max_length: Annotated[int | None, flag("Tokens of a window; default: all the model takes.", min=2)] = None,
    stride: Annotated[int | None, flag("From window to window; default: its length, no overlap.", min=1)] = None,
    dtype: Annotated[str, flag("auto (bfloat16 where the hardware has it), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, flag("auto, cpu, cuda or cuda:N.")] = "auto",
    split: Annotated[str | None, flag("Split of a folder or hub data set; default: the only one, or train.")] = None,
    config_name: Annotated[str | None, flag("Configuration of a folder or hub data set.")] = None,
) -> None:
    """Perplexity of a model on plain texts, by a sliding window."""
    from codeact.data.texts import read_texts
    from codeact.models.loading import quiet_transformers
    from codeact.scoring.loglikelihood import perplexity

    quiet_transformers()
    texts = list(read_texts(data, text_column, split, config_name))
    result = perplexity(model, texts, None, stride, max_length=max_length, dtype=dtype, device=device)
    mean = result.nll / result.tokens
    print(
        f"perplexity {result.value:.4f} ({mean:.4f} nats a token) of {result.tokens:,} tokens in {len(texts):,} texts"
    )


@command()
def merge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of codeact score.")],
    paper_json: Annotated[Path | None, flag("Also write the paper's JSON: a list of {question, answer, IFD}.")] = None,
    seed_json: Annotated[Path | None, flag("The old name of --paper-json.", hidden=True)] = None,
    data: Annotated[str | None, flag("Where the data lies now, for --paper-json.")] = None,
) -> None:
    """Join the shards of a score folder into scores.parquet; refuses while one is missing."""
    from codeact.scoring.folder import ScoreFolder
    from codeact.scoring.table import write_paper_json
    from codeact.selection.stage import open_scored_data

    if seed_json is not None:
        logging.getLogger("codeact").warning("--seed-json is now --paper-json; the old flag goes with the next release")
        paper_json = seed_json
    scores = ScoreFolder.open(folder)
    _print_scores(folder, scores.merge())
    if paper_json is not None:
        count, failed = write_paper_json(paper_json, scores.read(), open_scored_data(scores, data))
        _tell(f"{count:,} rows in {paper_json}" + (f", {failed:,} of them failed and with IFD 0" if failed else ""))


@command()
def status(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of codeact score or of a run, or FILE.npy of codeact embed.")
    ],
) -> None:
    """Say how far the workers of score or embed are, on all machines; it reads files only."""
    from codeact.run.status import status_text

    _tell(status_text(folder))


@command()
def launch(
    settings: LaunchSettings,
    system: Annotated[str, typer.Argument(metavar="slurm|ray|k8s", help="What the cluster runs.")],
    words: Annotated[list[str], typer.Argument(metavar="-- score|embed ...", help="The command of every worker.")],
    submitted: Annotated[bool, flag("Hand it to the cluster, by sbatch, ray or kubectl.", "--submit")] = False,
) -> None:
    """Print the job file by which a cluster starts the workers of codeact score or embed."""
    from codeact.integrations.launch import job_file, submit

    text = job_file(system, words, settings)
    if submitted:
        submit(system, text)
    else:
        print(text, end="")


@command()
def embed(
    data: DataSettings,
    settings: EmbedSettings,
    where: WorkerSettings,
    output: Annotated[Path, flag("FILE.npy to write; the row ids go to FILE.rows.parquet beside it.")],
) -> None:
    """Embed the questions; a rerun does only what is missing."""
    from codeact.embedding.stage import embed_data

    if embed_data(data, settings, output, **where.model_dump()) is None:
        _tell(f"all shards are done; another worker makes {output}")


@command()
def clean(
    data: DataSettings,
    settings: CleanSettings,
    output: Annotated[Path, flag("JSON lines to write; what became of every row goes to NAME.rows.parquet beside it.")],
    embeddings: Annotated[Path | None, flag("FILE.npy of codeact embed, to compare questions by, too.")] = None,
) -> None:
    """Mark rows that repeat others, give tasks of evaluation sets away, or hold code that does not parse."""
    from codeact.cleaning.stage import clean_data

    _print_lines(clean_data(data, settings, output, embeddings)[1])
    print(f"{'clean rows' if settings.drop else 'all rows, each with its status,'} in {output}")


@command()
def select(
    settings: SelectSettings,
    scores: Annotated[Path, flag("Merged folder of codeact score.")],
    output: Annotated[Path, flag("JSON lines, or FILE.parquet, to write: one conversation a row.")],
    form: Annotated[str, flag("messages, sharegpt or alpaca, as other trainers read them.", "--format")] = "messages",
    embeddings: Annotated[Path | None, flag("FILE.npy of codeact embed; cdas needs it.")] = None,
    marks: Annotated[Path | None, flag("NAME.rows.parquet of codeact clean: marked rows are left out.")] = None,
    data: Annotated[str | None, flag("Where the data lies now, if it was moved since scoring.")] = None,
) -> None:
    """Choose the difficult part of every cluster (CDAS)."""
    from codeact.selection.stage import select_rows, selection_lines

    selection = select_rows(scores, embeddings, output, settings, data, form, marks)
    _print_lines(selection_lines(selection, settings))
    _tell(f"{len(selection.positions):,} conversations in {output}")


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Fine-tune a model on conversations: packs without leaks, LoRA, QLoRA, FSDP, DeepSpeed."""
    from codeact.training.stage import train_command

    train_command(context.args)


@command("pack-stats")
def pack_stats(
    data: DataSettings,
    tokenizer: Annotated[str, flag("A model's folder or hub name.")],
    max_length: Annotated[int, flag("Tokens of a training row.", min=1)],
    batch_size: Annotated[int, flag("Samples of a padded batch.", min=1)] = 16,
    template: Annotated[str, flag("How conversations are written: chat, a chat format, or a Jinja file.")] = "chat",
    json_file: Annotated[Path | None, flag("Also write all figures here.", "--json")] = None,
    plot: Annotated[Path | None, flag("Also draw the packs into this PNG.")] = None,
) -> None:
    """Count padding, rows and memory of every padding and packing strategy on a data set."""
    from codeact.padding.figure import plot_packs
    from codeact.padding.stats import stats_for_data

    if plot is not None:  # before all else is computed
        import_extra("matplotlib", "report", "--plot")
    report = stats_for_data(data.open(), tokenizer, max_length, model_type=template, batch_size=batch_size)
    _tell(report.summary())
    _tell(report.table())
    if json_file is not None:
        report.write_json(json_file)
        _tell(f"all figures are in {json_file}")
    if plot is not None:
        plot_packs(report.lengths, max_length, plot, batch_size=batch_size)
        _tell(f"the picture is {plot}")


@command("pack")
def pack_rows(
    data: DataSettings,
    output: Annotated[Path, flag("Parquet file, or folder, to write; NAME.plan.parquet beside it says what is where.")],
    max_length: Annotated[int, flag("Tokens of a pack.", min=1)],
    form: Annotated[str, flag("index, trl, megatron, ms-swift or llama-factory.", "--format")] = "index",
    tokenizer: Annotated[str | None, flag("A model's folder or hub name; a DATA.npy of lengths needs none.")] = None,
    template: Annotated[str, flag("How conversations are written: chat, a chat format, or a Jinja file.")] = "chat",
    on_overflow: Annotated[str, flag("What becomes of a longer row: truncate, drop or error.")] = "truncate",
) -> None:
    """Pack rows for another trainer: a plan, and the packs in the form that its own reader takes."""
    import datasets

    from codeact.integrations.pack_files import FORMATS, write_packs
    from codeact.models.loading import load_tokenizer
    from codeact.text.conversations import OVERFLOWS

    one_of("format", form, FORMATS)
    one_of("on_overflow", on_overflow, OVERFLOWS)
    datasets.disable_progress_bars()
    rows = data.source if data.source.endswith(".npy") else data.open()
    encoder = None if tokenizer is None else load_tokenizer(tokenizer)
    files = write_packs(rows, output, form, max_length, encoder, template, on_overflow)
    _tell(files.summary())
    _tell(f"the packs are {files.output}" + ("" if form == "index" else f", the plan is {files.plan}"))


@command()
def generate(
    settings: GenerationSettings,
    output: Annotated[Path, flag("JSON lines to write; a rerun does only what is missing there.")],
    model: Annotated[str | None, flag("Folder or hub name of a causal language model, or name at --server.")] = None,
    adapter: Annotated[str | None, flag("LoRA adapter: a folder or a hub name.")] = None,
    tasks: Annotated[Path | None, flag("File of tasks of your own: --dataset own --data FILE.")] = None,
    limit: Annotated[int | None, flag("Only so many tasks.", min=1)] = None,
    overwrite: Annotated[bool, flag("Discard samples of other settings there.", "--overwrite")] = False,
) -> None:
    """Let a model write programs for the tasks of HumanEval, MBPP or a file."""
    from codeact.evaluation.stage import generate_programs

    if tasks is not None:
        settings = settings.model_copy(update={"dataset": "own", "data": tasks})
    _tell(generate_programs(settings, model, output, adapter=adapter, limit=limit, overwrite=overwrite))


@command()
def sanitize(
    samples: Annotated[Path, typer.Argument(metavar="FILE", help="Samples: JSON lines.")],
    output: Annotated[Path | None, flag("Default: NAME-sanitized.jsonl beside FILE.")] = None,
    data: Annotated[Path | None, flag("File of the problems, for samples of other tools.")] = None,
) -> None:
    """Keep of every answer the program: the entry point with its helpers and imports."""
    from codeact.evaluation.stage import sanitize_file

    target, count, changed = sanitize_file(samples, output, data)
    _tell(f"{count:,} samples, {changed:,} changed -> {target}")


@command()
def evaluate(
    settings: EvaluateSettings,
    samples: Annotated[Path, flag("JSON lines with task_id and solution (or completion), or a folder.")],
    dataset: Annotated[str | None, flag("humaneval or mbpp; or say --tasks.")] = None,
    data: Annotated[Path | None, flag("File of the problems; see docs/evaluate.md.")] = None,
    tasks: Annotated[Path | None, flag("File of tasks of your own, with their tests.")] = None,
    limit: Annotated[int | None, flag("Only so many tasks.", min=1)] = None,
    unsafe: Annotated[
        bool, flag("Where nothing isolates: run the programs all the same.", "--unsafe-no-sandbox")
    ] = False,
) -> None:
    """Run the programs on the tests, each alone in a sandbox, and report pass@k."""
    from codeact.evaluation.stage import evaluate_file

    if (dataset is None) == (tasks is None):
        raise InputError("say which tasks: --dataset humaneval, --dataset mbpp, or --tasks FILE")
    name, file = (dataset, data) if dataset is not None else ("own", tasks)
    results, files = evaluate_file(name, samples, settings, data=file, limit=limit, unsafe=unsafe)
    _tell(results.summary())
    _tell(f"\nevery task: {', '.join(map(str, files))}")


@command()
def verify(
    data: DataSettings,
    settings: VerifySettings,
    output: Annotated[Path, flag("JSON lines to write: every row, with pass_share and verdict.")],
    unsafe: Annotated[
        bool, flag("Where nothing isolates: run the programs all the same.", "--unsafe-no-sandbox")
    ] = False,
) -> None:
    """Run the programs in the answers of rows on the tests of each row; no row is left out for that."""
    from codeact.evaluation.verify import verify_rows

    _print_lines(verify_rows(data.open(), settings, output, unsafe))
    _tell(f"all rows, each with its pass share, in {output}")


@command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Settings of all stages: a file, or a name.")],
    first: Annotated[str | None, flag("Take the stages before as they are.", "--from", metavar="STAGE")] = None,
    last: Annotated[str | None, flag("Leave out the stages after.", "--until", metavar="STAGE")] = None,
    changes: Annotated[
        list[str] | None,
        flag("Instead of what the file says; may be repeated.", "--set", metavar="SECTION.KEY=VALUE"),
    ] = None,
    dry_run: Annotated[
        bool, flag("Only say what it would do, and estimate tokens, time and memory.", "--dry-run")
    ] = False,
) -> None:
    """Run the whole flow from one YAML file; what is done already for the same settings is kept."""
    flow = open_flow(config, changes=changes or ())
    say("codeact run: checking the settings; libraries load ...")
    if dry_run:
        from codeact.forecast import forecast

        _tell(forecast(flow, first, last).table())
        return
    flow.run(first, last)
    page = flow.output / "report.html"
    _tell(f"everything is in {flow.output}" + (f"; the report is {page}" if last is None else ""))


@command()
def lab(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Settings of a run, with a section lab.")],
) -> None:
    """Train on the choices of several strategies and compare them on held-out rows; a rerun does what is missing."""
    from codeact.lab.stage import lab_flow

    flow = lab_flow(config)
    say("codeact lab: checking the settings; libraries load ...")
    flow.run(None, "lab")


@command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of codeact run.")]) -> None:
    """Write one HTML page about a run; it needs nothing but itself."""
    from codeact.report.page import write_report

    _tell(f"the report is {write_report(folder)}")


@command()
def demo(
    output: Annotated[Path, flag("Folder to write to.")] = Path("demo-run"),
    rows: Annotated[int, flag("Rows to score.", min=10)] = 240,
) -> None:
    """Run the whole flow on small embedded models and this Python's standard library."""
    from codeact.run.demo import demo as run_demo

    run_demo(output, rows)


@command()
def doctor(as_json: Annotated[bool, flag("As JSON.", "--json")] = False) -> None:
    """Say what is here and works, and what to install for the rest."""
    from codeact.doctor.examine import run as examine

    raise typer.Exit(examine(as_json))


def _print_scores(folder: Path, totals: dict[str, Any], more: Sequence[tuple[str, str]] = ()) -> None:
    from codeact.scoring.stage import require_scores, score_lines

    _print_lines([*score_lines(totals, folder), *more])
    _tell(f"scores of all rows, refused ones with their reason, in {folder / 'scores.parquet'}")
    require_scores(totals, folder)


def _print_lines(lines: Lines) -> None:
    print(aligned(lines))


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


_UsageError: Any = typer.BadParameter.__bases__[0]  # click's, which newer typers bring themselves


def main() -> None:
    """Run the command line: exit code 2 and one line for what the user can mend, 130 for ^C, 143 for SIGTERM."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger().handlers[0].setFormatter(_Visible())
    logging.getLogger("codeact").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # transformers imports it wherever it is installed
    with in_command():
        _run()


def _run() -> None:
    try:
        for word in sys.argv:
            if not is_text(word):
                raise InputError(f"{word!r} is no UTF-8 text, which not all libraries bear; rename the file or folder")
        _refuse_launchers()
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if code == 128 + signal.SIGINT:  # newer typers' word for it
            raise KeyboardInterrupt
    except (InputError, MissingExtraError) as error:
        _stop(str(error))
    except _UsageError as error:
        _stop(error.format_message())
    except OSError as error:
        _stop(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except LedgerError as error:
        say(f"codeact: error: {error}")
        raise SystemExit(1) from None
    except (KeyboardInterrupt, typer.Abort):
        end_as_stopped()
    raise SystemExit(code or 0)


def _refuse_launchers() -> None:
    """Only scoring and training share their work under torchrun and srun; others would do it once a process."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    if launched_rank() is not None and command not in (None, "score", "embed", "status", "train", "doctor"):
        raise InputError(
            f"codeact {command} is the work of one process, and a launcher started several; leave that out"
        )


def _stop(message: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # else under torchrun every rank would say the same
        say(f"codeact: error: {' '.join(message.split())}")
    raise SystemExit(2)


def _tell(text: str) -> None:
    """A line of a result, which may hold anybody's names of files."""
    print(visible(text))
