"""One thin command per stage."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from codeact import __version__
from codeact.base.errors import InputError, MissingExtraError
from codeact.run import flow as pipeline
from codeact.run import stages as data_stages
from codeact.run.settings import DataSettings, EmbedSettings, ScoreSettings, SelectSettings, read_settings

app = typer.Typer(
    help=(
        "Fine-tune a code model on the part of the data that teaches most. The flow: "
        "score (and merge) -> embed -> select -> train, then generate -> sanitize -> evaluate. Each command has --help."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Data = Annotated[
    str, typer.Argument(metavar="DATA", help="File or folder (.json, .jsonl, .parquet), or a hub data set.")
]
Question = Annotated[str, typer.Option("--question-column", "--column", help="Column of the question.")]
Answer = Annotated[str, typer.Option("--answer-column", help="Column of the answer.")]
Input = Annotated[str | None, typer.Option("--input-column", help="Column appended to the question (Alpaca form).")]
Conversation = Annotated[
    str | None, typer.Option("--conversation-column", help="Column of turns, instead of question and answer.")
]
IdColumn = Annotated[str | None, typer.Option("--id-column", help="Column of unique ids; default: the row number.")]
Split = Annotated[str, typer.Option(help="Split of a hub data set.")]
ConfigName = Annotated[str | None, typer.Option("--config-name", help="Configuration of a hub data set.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 where the hardware has it), float32, bfloat16 or float16.")]
Protocol = Annotated[str, typer.Option(help="exact, or paper: the numbers of the paper's scripts.")]


def _data(
    source: str,
    question: str,
    answer: str,
    input_column: str | None,
    conversation: str | None,
    id_column: str | None,
    split: str,
    config_name: str | None,
) -> DataSettings:
    return DataSettings(
        source=source,
        question=question,
        answer=answer,
        input=input_column,
        conversation=conversation,
        id=id_column,
        split=split,
        config_name=config_name,
    )


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        print(f"codeact {__version__}")
        raise typer.Exit


@app.command()
def harvest(
    target: Annotated[str, typer.Argument(metavar="PACKAGE_OR_FOLDER", help="A package, a folder, or stdlib.")],
    output: Annotated[Path, typer.Option(help="JSON lines to write: id, instruction, output, path, line.")],
    limit: Annotated[int | None, typer.Option(min=1, help="So many rows, spread evenly over all.")] = None,
) -> None:
    """Make instruction rows from the functions with docstrings of Python code; the code is parsed, never run."""
    from codeact.data.harvest import write_harvest

    print(write_harvest(target, output, limit=limit))


@app.command()
def score(
    data: Data,
    model: Annotated[str, typer.Option(help="Causal language model: a folder or a hub name.")],
    output: Annotated[Path, typer.Option(help="Folder of the scores; a rerun does only what is missing there.")],
    question_column: Question = "instruction",
    answer_column: Answer = "output",
    input_column: Input = None,
    conversation_column: Conversation = None,
    id_column: IdColumn = None,
    split: Split = "train",
    config_name: ConfigName = None,
    template: Annotated[str, typer.Option(help="qa, alpaca, chat, a model family, or text with {question}.")] = "qa",
    max_length: Annotated[int, typer.Option(help="Tokens of a sequence; a longer answer is cut and marked.")] = 2048,
    dtype: Dtype = "auto",
    device: Device = "auto",
    tokens_per_pack: Annotated[
        int | None, typer.Option(help="Tokens of a forward pass; default 2048 on a CPU, 8192 on a GPU.")
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Rows of a shard, which is what a kill can lose.")] = 10_000,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Do every N-th shard from I (0 to N - 1), do not merge.")
    ] = "0/1",
    protocol: Protocol = "exact",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard scores of other settings in --output.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad row.")] = False,
) -> None:
    """Score every row by Instruction-Following Difficulty."""
    totals = data_stages.score(
        _data(data, question_column, answer_column, input_column, conversation_column, id_column, split, config_name),
        ScoreSettings(
            model=model,
            template=template,
            max_length=max_length,
            dtype=dtype,
            device=device,
            tokens_per_pack=tokens_per_pack,
            shard_size=shard_size,
            protocol=protocol,  # type: ignore[arg-type]  # pydantic checks it
        ),
        output,
        shard=data_stages.parse_shard(shard),
        overwrite=overwrite,
        strict=strict,
    )
    if totals is None:
        print(f"shards {shard} are done; when all are: codeact merge {output}")
    else:
        _print_scores(output, totals)


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of codeact score.")],
    paper_json: Annotated[
        Path | None, typer.Option(help="Also write the paper's JSON: a list of {question, answer, IFD}.")
    ] = None,
    seed_json: Annotated[Path | None, typer.Option(help="The old name of --paper-json.", hidden=True)] = None,
    data: Annotated[str | None, typer.Option(help="Where the data lies now, for --paper-json.")] = None,
) -> None:
    """Join the shards of a score folder into scores.parquet; refuses while one is missing."""
    from codeact.scoring.folder import ScoreFolder, write_paper_json

    if seed_json is not None:
        logging.getLogger("codeact").warning("--seed-json is now --paper-json; the next release forgets the old flag")
        paper_json = seed_json
    scores = ScoreFolder.open(folder)
    _print_scores(folder, scores.merge())
    if paper_json is not None:
        count = write_paper_json(paper_json, scores.read(), data_stages.open_scored_data(scores, data))
        print(f"{count:,} rows in {paper_json}")


@app.command()
def embed(
    data: Data,
    output: Annotated[Path, typer.Option(help="FILE.npy to write; the row ids go to FILE.rows.parquet beside it.")],
    model: Annotated[
        str, typer.Option(help="sentence-transformers model: a folder or a hub name.")
    ] = "sentence-transformers/all-mpnet-base-v2",
    question_column: Question = "instruction",
    answer_column: Answer = "output",
    input_column: Input = None,
    conversation_column: Conversation = None,
    id_column: IdColumn = None,
    split: Split = "train",
    config_name: ConfigName = None,
    batch_size: Annotated[int, typer.Option(help="Texts of a batch.")] = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Embed the questions."""
    data_stages.embed(
        _data(data, question_column, answer_column, input_column, conversation_column, id_column, split, config_name),
        EmbedSettings(model=model, batch_size=batch_size, dtype=dtype, device=device),
        output,
    )


@app.command()
def select(
    scores: Annotated[Path, typer.Option(help="Merged folder of codeact score.")],
    output: Annotated[Path, typer.Option(help="JSON lines to write: one conversation a line.")],
    embeddings: Annotated[Path | None, typer.Option(help="FILE.npy of codeact embed; cdas needs it.")] = None,
    ratio: Annotated[float, typer.Option(help="Share of the rows to choose, above 0, at most 1.")] = 0.4,
    clusters: Annotated[int, typer.Option(help="Number of clusters.")] = 10,
    strategy: Annotated[str, typer.Option(help="cdas, top_ifd or random.")] = "cdas",
    protocol: Protocol = "exact",
    seed: Annotated[int, typer.Option(help="Of k-means and of strategy random.")] = 42,
    backend: Annotated[str, typer.Option(help="k-means of: auto, sklearn or cuml.")] = "auto",
    data: Annotated[str | None, typer.Option(help="Where the data lies now, if it was moved since scoring.")] = None,
) -> None:
    """Choose the difficult part of every cluster (CDAS)."""
    settings = SelectSettings(
        ratio=ratio,
        clusters=clusters,
        strategy=strategy,  # type: ignore[arg-type]  # pydantic checks them
        protocol=protocol,  # type: ignore[arg-type]
        seed=seed,
        backend=backend,  # type: ignore[arg-type]
    )
    chosen = data_stages.select(scores, embeddings, output, settings, data)
    data_stages.print_table(data_stages.selection_lines(chosen))
    print(f"{len(chosen['positions']):,} conversations in {output}")


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Fine-tune a model on conversations: packs without leaks, LoRA, QLoRA, FSDP, DeepSpeed."""
    from codeact.training.stage import main as run_training

    run_training(context.args)


@app.command("pack-stats")
def pack_stats(
    data: Data,
    tokenizer: Annotated[str, typer.Option(help="A model's folder or hub name.")],
    capacity: Annotated[int, typer.Option(min=1, help="Tokens of a training row.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a padded batch.")] = 16,
    template: Annotated[str, typer.Option(help="How conversations are written: chat, or a model family.")] = "chat",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the packs into this PNG.")] = None,
    question_column: Question = "instruction",
    answer_column: Answer = "output",
    input_column: Input = None,
    conversation_column: Conversation = None,
    split: Split = "train",
    config_name: ConfigName = None,
) -> None:
    """Count padding, rows and memory of every padding and packing strategy on a data set."""
    from codeact.data.records import Columns
    from codeact.padding.figure import plot_packs, require_matplotlib
    from codeact.padding.stats import stats_for_data

    if plot is not None:
        require_matplotlib()
    columns = Columns(
        question=question_column, answer=answer_column, input=input_column, conversation=conversation_column
    )
    report = stats_for_data(
        data,
        tokenizer,
        capacity,
        columns=columns,
        split=split,
        config_name=config_name,
        model_type=template,
        batch_size=batch_size,
    )
    print(report.summary())
    print(report.table())
    if json_file is not None:
        report.write_json(json_file)
        print(f"all figures are in {json_file}")
    if plot is not None:
        plot_packs(report.lengths, capacity, plot, batch_size=batch_size)
        print(f"the picture is {plot}")


@app.command()
def generate(
    dataset: Annotated[str, typer.Option(help="humaneval or mbpp.")],
    model: Annotated[str, typer.Option(help="Causal language model: a folder or a hub name.")],
    output: Annotated[Path, typer.Option(help="JSON lines to write; a rerun does only what is missing there.")],
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter: a folder or a hub name.")] = None,
    instruct: Annotated[bool, typer.Option("--instruct", help="Ask as in a chat; else the model goes on.")] = False,
    template: Annotated[str, typer.Option(help="With --instruct: chat, or the model family of the training.")] = "chat",
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from so much of the probability.")] = 1.0,
    n: Annotated[int, typer.Option(help="Samples of a task.")] = 1,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 1024,
    batch_size: Annotated[int | None, typer.Option(help="Answers at a time; default: what memory allows.")] = None,
    data: Annotated[Path | None, typer.Option(help="File of the problems; see docs/evaluate.md.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many tasks.")] = None,
    backend: Annotated[str, typer.Option(help="hf or vllm.")] = "hf",
    dtype: Dtype = "auto",
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard samples of other settings there.")] = False,
) -> None:
    """Let a model write programs for the tasks of HumanEval or MBPP."""
    from codeact.evaluation import stage as eval_stages
    from codeact.evaluation.generate import GenerationSettings

    settings = GenerationSettings(
        template=template if instruct else None,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        samples=n,
        seed=seed,
    )
    print(
        eval_stages.generate_samples(
            dataset,
            model,
            output,
            settings,
            adapter=adapter,
            data=data,
            backend=backend,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            limit=limit,
            overwrite=overwrite,
        )
    )


@app.command()
def sanitize(
    samples: Annotated[Path, typer.Argument(metavar="FILE", help="Samples: JSON lines.")],
    output: Annotated[Path | None, typer.Option(help="Default: NAME-sanitized.jsonl beside FILE.")] = None,
    data: Annotated[Path | None, typer.Option(help="File of the problems, for samples of other tools.")] = None,
) -> None:
    """Keep of every answer the program: the entry point with its helpers and imports."""
    from codeact.evaluation import stage as eval_stages

    target, count, changed = eval_stages.sanitize_file(samples, output, data)
    print(f"{count:,} samples, {changed:,} changed -> {target}")


@app.command()
def evaluate(
    dataset: Annotated[str, typer.Option(help="humaneval or mbpp.")],
    samples: Annotated[Path, typer.Option(help="JSON lines with task_id and solution (or completion), or a folder.")],
    data: Annotated[Path | None, typer.Option(help="File of the problems; see docs/evaluate.md.")] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Programs at a time; default: half the cores.")] = None,
    base_only: Annotated[bool, typer.Option("--base-only", help="Leave out the plus tests.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many tasks.")] = None,
    unsafe: Annotated[
        bool, typer.Option("--unsafe-no-sandbox", help="Where nothing isolates: run the programs all the same.")
    ] = False,
) -> None:
    """Run the programs on the tests, each alone in a sandbox, and report pass@k."""
    from codeact.evaluation import stage as eval_stages

    report, files = eval_stages.evaluate_file(
        dataset, samples, data=data, parallel=parallel, base_only=base_only, limit=limit, unsafe=unsafe
    )
    print(report.summary())
    print(f"\nevery task: {', '.join(map(str, files))}")


@app.command()
def run(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG.yaml", help="Settings of all stages: a file, or a name."),
    ],
    first: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Take the stages before as they are.")
    ] = None,
    last: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Leave out the stages after.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would do, and estimate tokens, time and memory.")
    ] = False,
) -> None:
    """Run the whole flow from one YAML file; what is done already for the same settings is kept."""
    settings = read_settings(config)
    if dry_run:
        from codeact.forecast import forecast

        print(forecast(settings, first, last).table())
        return
    pipeline.run(settings, first, last)
    print(f"everything is in {settings.output}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of codeact run.")],
) -> None:
    """Write one HTML page about a run; it needs nothing but itself."""
    from codeact.report import write_report

    print(f"the report is {write_report(folder)}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("demo-run"),
    rows: Annotated[int, typer.Option(min=10, help="Rows to score.")] = 240,
) -> None:
    """Run the whole flow on small embedded models and this Python's standard library."""
    from codeact.run.demo import demo as run_demo

    run_demo(output, rows)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what is here and works, and what to install for the rest."""
    from codeact.doctor.examine import run as examine

    raise typer.Exit(examine(as_json))


def _print_scores(folder: Path, totals: dict[str, object]) -> None:
    data_stages.print_table(data_stages.score_lines(totals, folder))
    print(f"scores of all rows, refused ones with their reason, in {folder / 'scores.parquet'}")


def main() -> None:
    """Run the command line: exit code 2 and one line for what the user can mend, 130 for Ctrl-C."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("codeact").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # transformers imports it wherever it is installed
    try:
        app()
    except (InputError, MissingExtraError) as error:
        _stop(str(error))
    except ValidationError as error:
        problem = error.errors()[0]
        name = "-".join(str(part) for part in problem["loc"]).replace("_", "-")
        _stop(f"--{name} {problem['input']!r}: {problem['msg'].lower()}")
    except OSError as error:
        _stop(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except pipeline.LedgerError as error:
        print(f"codeact: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\ncodeact: stopped; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(130) from None


def _stop(message: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # else under torchrun every rank would say the same
        print(f"codeact: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)
