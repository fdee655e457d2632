"""Stage embed: the questions of a data set -> a vector each."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeact.base.errors import InputError
from codeact.base.ledger import Entry
from codeact.base.settings import Settings, decisive, setting
from codeact.base.stage import Lines, Run, Stage
from codeact.data.settings import DataSettings

if TYPE_CHECKING:
    from codeact.embedding.files import EmbeddingMetadata
    from codeact.workers.choice import Engine
    from codeact.workers.engines import Job, Place

EMBEDDINGS_FILE = "embeddings.npy"


class EmbedSettings(Settings):
    """How questions are embedded; see ``codeact.embedding.vectors.embed``."""

    model: str = setting(
        "sentence-transformers/all-mpnet-base-v2", "sentence-transformers model: a folder or a hub name."
    )
    batch_size: int = setting(64, "Texts of a batch.", place=True, ge=1)
    dtype: str = setting("auto", "auto (bfloat16 where the hardware has it), float32, bfloat16 or float16.")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N.", place=True)
    shard_size: int = setting(10_000, "Rows of a shard, which is what a kill can lose.", place=True, ge=1)


def prepare_embedding(
    data: DataSettings,
    settings: EmbedSettings,
    output: str | Path,
    place: Place | None = None,
    first: bool = True,
) -> Job:
    """Open the data, load the model and claim the folder of the shards.

    Arguments and errors as in ``embed_data``; ``place`` and ``first`` as in ``codeact.workers.engines.Begin``.
    """
    from codeact.embedding.folder import EmbeddingFolder, in_use
    from codeact.embedding.vectors import embedder_fingerprint, load_embedder
    from codeact.models.loading import quiet_transformers
    from codeact.workers.engines import Job

    if place is not None:
        settings = settings.model_copy(update={"device": place.take(settings.device)})
    records = data.open()
    quiet_transformers()
    encoder = load_embedder(settings.model, device=settings.device, dtype=settings.dtype)
    fingerprint = embedder_fingerprint(settings.model)
    known = {
        "data": {"source": data.source, "rows": len(records), "fingerprint": records.fingerprint},
        "model": {"name": settings.model, "fingerprint": fingerprint},
        "on_the_hub": "" if fingerprint else settings.model,
        "dtype": str(getattr(encoder, "dtype", "")).removeprefix("torch."),
        "shard_size": settings.shard_size,
    }
    folder = EmbeddingFolder(EmbeddingFolder.beside(output), known)
    folder.claim(overwrite=first and not in_use(folder.folder))
    return Job(folder, functools.partial(folder.embed, records, encoder, settings.batch_size))


def embed_data(
    data: DataSettings,
    settings: EmbedSettings,
    output: str | Path,
    *,
    workers: int | None = None,
    engine: Engine = "local",
    address: str | None = None,
) -> EmbeddingMetadata | None:
    """Embed the questions of a data set into ``output`` (.npy), doing only the shards that are missing.

    Done already for this data and model: nothing to do. Whoever calls it with the same arguments while it runs shares
    the work.

    Args:
        data: the data set.
        settings: how.
        output: the file; see ``codeact.embedding.files``.
        workers, engine, address: as in ``codeact.scoring.stage.score_data``.

    Returns:
        What the file holds; None where another worker puts it together.

    Raises:
        InputError: data or model cannot be read, ``output`` cannot be written, another process is at work on it with
            other settings; or shards cannot be embedded, all others being done.
    """
    from codeact.base.console import say
    from codeact.base.files import remove_leftovers
    from codeact.data.sources import absolute_name
    from codeact.embedding.files import read_metadata
    from codeact.embedding.folder import EmbeddingFolder, remove_made
    from codeact.workers.choice import check_engine
    from codeact.workers.engines import Begin
    from codeact.workers.share import share_out

    check_engine(engine, workers, address)
    folder = EmbeddingFolder.beside(output)
    known = _known(data, settings, Path(output)) if Path(output).exists() else None
    if known:
        say(f"{output} is up to date: {known.rows:,} embeddings")
        remove_made(folder)  # a kill may have come between
        return known
    if engine == "ray":  # what its nodes see
        data = data.model_copy(update={"source": absolute_name(data.source)})
        settings = settings.model_copy(update={"model": absolute_name(settings.model)})
        folder = folder.absolute()
    elif workers is not None and workers > 1:
        from codeact.models.weight_files import check_copies

        check_copies(settings.model, workers, 4 if settings.dtype == "float32" else 2)
    remove_leftovers(Path(output).parent)
    begin = Begin(
        folder=folder,
        prepare=functools.partial(prepare_embedding, data, settings, folder.with_suffix(".npy")),
        modules=("codeact.embedding.files", "codeact.embedding.folder", "sentence_transformers"),
    )
    where: Any = {"workers": workers, "engine": engine, "address": address}
    totals = share_out(begin, lambda: EmbeddingFolder.open(folder), **where)
    remove_made(folder)
    if totals is None:
        return None
    metadata = read_metadata(output)
    say(
        f"embedded {metadata.rows:,} questions ({metadata.tokens:,} tokens; {metadata.truncated:,} cut to the model's "
        f"length; {metadata.skipped:,} rows without a question skipped)"
    )
    if not metadata.rows:
        raise InputError(f"{data.source}: none of {metadata.skipped:,} rows holds a question that can be embedded")
    return metadata


def _known(data: DataSettings, settings: EmbedSettings, output: Path) -> EmbeddingMetadata | None:
    """What the file holds, if it is what would be made."""
    from codeact.base.devices import resolve_device, resolve_dtype
    from codeact.embedding.files import read_embeddings
    from codeact.embedding.vectors import embedder_fingerprint

    dtype = str(resolve_dtype(settings.dtype, resolve_device(settings.device))).removeprefix("torch.")
    fingerprint = data.open().fingerprint
    try:
        known = read_embeddings(output).metadata
    except InputError:
        return None  # of a killed or another run: made anew
    same = known.is_of(
        model=settings.model,
        data_fingerprint=fingerprint,
        model_fingerprint=embedder_fingerprint(settings.model),
        dtype=dtype,
    )
    return known if same and known.rows else None  # of no rows: refused again


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
        where = {"workers": run.processes, "engine": run.engine, "address": run.address}
        metadata = embed_data(run.data, run.of(EmbedSettings), run.output / EMBEDDINGS_FILE, **where)
        assert metadata is not None, "nobody else works in a run's folder"
        return [
            ("embedded", f"{metadata.rows:,} questions, {metadata.tokens:,} tokens"),
            ("cut", f"{metadata.truncated:,} to the embedder's length"),
        ]

    def account(self, output: Path) -> Iterator[Entry]:
        """Records -> vectors."""
        if not (output / EMBEDDINGS_FILE).exists():
            return
        from codeact.embedding.files import read_embeddings

        embeddings = read_embeddings(output / EMBEDDINGS_FILE)
        yield Entry(
            stage="embed",
            what="questions",
            after="read",
            rows_in=embeddings.metadata.rows,
            rows_out=len(embeddings.vectors),
        )
