"""Stage embed: the questions of a data set -> a vector each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeact.base.errors import InputError
from codeact.base.ledger import Entry
from codeact.base.settings import Settings, decisive, setting
from codeact.base.stage import Lines, Run, Stage
from codeact.data.settings import DataSettings

if TYPE_CHECKING:
    from codeact.embedding.vectors import EmbeddingMetadata

EMBEDDINGS_FILE = "embeddings.npy"


class EmbedSettings(Settings):
    """How questions are embedded; see ``codeact.embedding.vectors.embed``."""

    model: str = setting(
        "sentence-transformers/all-mpnet-base-v2", "sentence-transformers model: a folder or a hub name."
    )
    batch_size: int = setting(64, "Texts of a batch.", place=True, ge=1)
    dtype: str = setting("auto", "auto (bfloat16 where the hardware has it), float32, bfloat16 or float16.")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N.", place=True)


def embed_data(data: DataSettings, settings: EmbedSettings, output: str | Path) -> EmbeddingMetadata:
    """Embed the questions of a data set into ``output`` (.npy); done already for this data and model: nothing to do.

    Returns:
        What the file holds.

    Raises:
        InputError: data or model cannot be read, or ``output`` cannot be written.
    """
    from codeact.base.console import say
    from codeact.base.devices import resolve_device, resolve_dtype
    from codeact.base.files import remove_leftovers
    from codeact.embedding.vectors import embed_records, embedder_fingerprint, read_embeddings
    from codeact.models.loading import quiet_transformers

    records = data.open()
    if Path(output).exists():
        dtype = str(resolve_dtype(settings.dtype, resolve_device(settings.device))).removeprefix("torch.")
        decides = (records.fingerprint, settings.model, embedder_fingerprint(settings.model), dtype)
        try:
            known = read_embeddings(output).metadata
        except InputError:
            known = None  # of a killed or another run: made anew
        known = known if known and known.rows else None  # of no rows: refused again
        if known and (known.data_fingerprint, known.model, known.model_fingerprint, known.dtype) == decides:
            say(f"{output} is up to date: {known.rows:,} embeddings")
            return known
    quiet_transformers()
    remove_leftovers(Path(output).parent)
    metadata = embed_records(
        records,
        output,
        settings.model,
        batch_size=settings.batch_size,
        device=settings.device,
        dtype=settings.dtype,
        progress=True,
    )
    say(
        f"embedded {metadata.rows:,} questions ({metadata.tokens:,} tokens; {metadata.truncated:,} cut to the model's "
        f"length; {metadata.skipped:,} rows without a question skipped)"
    )
    if not metadata.rows:
        raise InputError(f"{data.source}: none of {metadata.skipped:,} rows holds a question that can be embedded")
    return metadata


class Embed(Stage):
    """In a run."""

    name = section = "embed"
    settings, default = EmbedSettings, EmbedSettings()
    outputs, products = (EMBEDDINGS_FILE, "embeddings.rows.parquet"), (EMBEDDINGS_FILE,)
    told = False

    def check(self, run: Run) -> None:
        """The model is there, and the device."""
        from codeact.base.devices import check_device

        settings = run.of(EmbedSettings)
        check_device(settings.device, settings.dtype)
        run.identity(settings.model)

    def inputs(self, run: Run) -> dict[str, Any]:
        """Data, model, and how."""
        settings = run.of(EmbedSettings)
        return {"data": run.data_fingerprint(), "model": run.identity(settings.model), **decisive(settings, "model")}

    def work(self, run: Run) -> Lines:
        """Embed them all."""
        metadata = embed_data(run.data, run.of(EmbedSettings), run.output / EMBEDDINGS_FILE)
        return [
            ("embedded", f"{metadata.rows:,} questions, {metadata.tokens:,} tokens"),
            ("cut", f"{metadata.truncated:,} to the embedder's length"),
        ]

    def account(self, output: Path) -> Iterator[Entry]:
        """Records -> vectors."""
        if not (output / EMBEDDINGS_FILE).exists():
            return
        from codeact.embedding.vectors import read_embeddings

        embeddings = read_embeddings(output / EMBEDDINGS_FILE)
        yield Entry(
            stage="embed",
            what="questions",
            after="read",
            rows_in=embeddings.metadata.rows,
            rows_out=len(embeddings.vectors),
        )
