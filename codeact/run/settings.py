"""What a run is told, and the YAML file that tells it: a section for every stage that has settings."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model, model_validator

from codeact.base.errors import InputError, in_arguments
from codeact.base.files import atomic_path
from codeact.base.settings import Settings
from codeact.base.stage import Stage
from codeact.base.yaml_files import line_of, read_value, read_yaml
from codeact.data.settings import DataSettings

if TYPE_CHECKING:
    from codeact.cleaning.stage import CleanSettings
    from codeact.embedding.stage import EmbedSettings
    from codeact.evaluation.settings import EvaluateSettings, GenerationSettings
    from codeact.scoring.stage import ScoreSettings
    from codeact.selection.settings import SelectSettings

S = TypeVar("S", bound=Settings)


class ForecastSettings(Settings):
    """What ``--dry-run`` assumes where it cannot look: data or model are elsewhere, or the run is for other devices."""

    rows: int | None = Field(default=None, ge=1)
    question_tokens: float | None = Field(default=None, gt=0)  # of a row, on average
    answer_tokens: float | None = Field(default=None, gt=0)
    parameters: float | None = Field(default=None, gt=0)  # of the model
    devices: int = Field(default=1, ge=1)
    device: str | None = None  # as A100 or H100; default: this machine, calibrated


class RunSettings(Settings):
    """One run: its data and the folder it writes to; ``settings_class`` adds a section for every stage."""

    output: Path
    data: DataSettings
    processes: int = Field(default=1, ge=1)  # that score, embed and train at the same time: one a GPU
    engine: Literal["local", "ray"] = "local"  # that scores and embeds
    address: str | None = None  # of a Ray cluster
    forecast: ForecastSettings = ForecastSettings()
    if TYPE_CHECKING:  # the sections of codeact's own stages
        score: ScoreSettings
        embed: EmbedSettings
        clean: CleanSettings | None
        select: SelectSettings
        train: dict[str, Any] | None  # flags of codeact train; data, model and output folder follow from the rest
        generate: GenerationSettings | None
        evaluate: EvaluateSettings | None

    def of(self, settings: type[S]) -> S:
        """The section that is of this class.

        Raises:
            KeyError: the file has none.
        """
        for name in type(self).model_fields:
            if isinstance(section := getattr(self, name), settings):
                return section
        raise KeyError(settings.__name__)


def settings_class(stages: Sequence[Stage]) -> type[RunSettings]:
    """``RunSettings`` with the sections of these stages."""
    sections: dict[str, Any] = {}
    for stage in stages:
        if stage.settings is not None and stage.section not in sections:
            kind = stage.settings if stage.default is not None else stage.settings | None
            sections[stage.section] = (kind, stage.default)

    def stages_follow_each_other(self: RunSettings) -> RunSettings:
        section_of = {stage.name: stage.section for stage in stages}
        for stage in stages:
            for need in stage.needs if getattr(self, stage.section, None) is not None else ():
                if getattr(self, section_of[need]) is None:
                    raise ValueError(f"{stage.section} needs a section {section_of[need]}, whose results it takes in")
        return self

    check: Any = model_validator(mode="after")(stages_follow_each_other)
    return create_model("RunSettings", __base__=RunSettings, __validators__={"follow": check}, **sections)


def read_settings(path: str | Path, kind: type[RunSettings], changes: Sequence[str] = ()) -> RunSettings:
    """Read a run's YAML file, or one that codeact brings, by its name without ``.yaml``.

    Args:
        path: the file or the name.
        kind: of the settings; see ``settings_class``.
        changes: ``section.key=value`` each, the value in YAML; they win over the file.

    Raises:
        InputError: it cannot be read, or a key is unknown, missing, there twice or of a wrong type; the message names
            the line, and the closest key there is.
    """
    path = shipped(Path(path))
    content, tree = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no settings; it needs output, data and score")
    for change in changes:
        _change(content, change)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        told = "; ".join(_complaint(item, tree, kind) for item in error.errors())
        raise InputError(f"{path}{', ' if told.startswith('line ') else ': '}{told}") from None


def _change(content: dict[str, Any], change: str) -> None:
    name, given, text = change.partition("=")
    *parents, key = name.split(".")
    if not (given and key and all(parents)):
        raise InputError(f"--set {change}: write section.key=value, such as select.ratio=0.5")
    for parent in parents:
        if not isinstance(content.setdefault(parent, {}), dict):
            content[parent] = {}
        content = content[parent]
    content[key] = read_value(text)


def write_settings(settings: RunSettings, path: Path) -> None:
    """Write settings as the YAML file that ``read_settings`` reads; what has its default is left out."""
    content = settings.model_dump(mode="json", exclude_defaults=True)
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def shipped_configs() -> list[str]:
    """Names of the runs that codeact brings."""
    folder = files("codeact") / "configs"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if _is_run(entry))


def _is_run(entry: Any) -> bool:
    return entry.name.endswith(".yaml") and "\noutput:" in entry.read_text(encoding="utf-8")


def shipped(path: Path) -> Path:
    """The file of that path, or that codeact brings under that name."""
    names = shipped_configs()
    known = str(path) in names  # a name may hold a dot: 6.7b
    if path.is_file() or (not known and (path.suffix or path.exists())):
        return path
    if not known:
        raise InputError(f"no such file: {path}; codeact brings {', '.join(names)}")
    return Path(str(files("codeact") / "configs" / f"{path}.yaml"))


def _complaint(item: Any, tree: Any, kind: type[BaseModel]) -> str:
    keys = [str(part) for part in item["loc"]]
    where = f"line {line_of(tree, keys)}: {'.'.join(keys)}" if keys else ""
    if item["type"] == "model_type":
        return (
            f"{where}: it holds keys of its own, such as {next(iter(_section(kind, keys).model_fields))}: ..., below it"
        )
    if item["type"] != "extra_forbidden":
        return ": ".join(filter(None, (where, in_arguments(item["msg"].removeprefix("Value error, ")).lower())))
    kind = _section(kind, keys[:-1])
    closest = difflib.get_close_matches(keys[-1], kind.model_fields, n=1, cutoff=0.0)[0]
    return f"{where}: unknown key; did you mean {closest}?"


def _section(kind: type[BaseModel], keys: Sequence[str]) -> type[BaseModel]:
    """The settings below these keys."""
    for key in keys:
        annotation: Any = kind.model_fields[key].annotation
        models = [part for part in (annotation, *get_args(annotation)) if isinstance(part, type)]
        kind = next(model for model in models if issubclass(model, BaseModel))
    return kind
