"""What every section of settings shares: a field is a key of a YAML file and a flag of a command, told once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from codeact.base.console import is_text
from codeact.base.files import refuse_address
from codeact.base.protocols import resolve_protocol


class Settings(BaseModel):
    """Unknown keys are errors, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _sane(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("the number is too large")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("the text holds a zero byte")
        if isinstance(value, str | Path) and not is_text(str(value)):
            raise ValueError("the text holds half of a surrogate pair")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _here(cls, value: Any) -> Any:
        if isinstance(value, Path):
            refuse_address(value)
        return value


_SAME_FLAGS = (
    ("max_length", "max_seq_len", "max_seq_length", "capacity"),
    ("model", "model_name_or_path"),
    ("data_path", "dataset_name"),
    ("output", "output_dir"),
    ("tokenizer", "tokenizer_name_or_path"),
    ("template", "model_type", "chat_template"),
    ("workers", "processes"),
)
"""Flags that mean the same, ours and those of transformers and TRL: where a command has one, it takes the others."""


def flag_name(name: str) -> str:
    """A flag's name without its dashes in front; of several that mean the same the first."""
    name = name.replace("-", "_")
    return next((names[0] for names in _SAME_FLAGS if name in names), name)


def same_flags(name: str) -> tuple[str, ...]:
    """All names of a flag."""
    return next((names for names in _SAME_FLAGS if name in names), (name,))


def setting(default: Any, text: str, *flags: str, command: bool = True, place: bool = False, **limits: Any) -> Any:
    """A field of a ``Settings`` class.

    Args:
        default: its value where nothing is said; ``...``: something has to be said.
        text: what it is, for ``--help``.
        flags: of the command; by default the field's own name.
        command: False: a key of a YAML file only.
        place: it says where and how fast, not what: results stay as they are when it changes.
        limits: of pydantic's ``Field``: ge, gt, le, lt.
    """
    more: Any = {"flags": list(flags), "command": command, "place": place}
    return Field(default, description=text, json_schema_extra=more, **limits)


def decisive(settings: Settings, *without: str) -> dict[str, Any]:
    """The fields that decide a result, as JSON values."""
    fields = type(settings).model_fields
    content = settings.model_dump(mode="json")
    places = {name for name, field in fields.items() if (field.json_schema_extra or {}).get("place")}  # type: ignore[union-attr]
    return {name: value for name, value in content.items() if name not in places and name not in without}


def _protocol(name: Any) -> Any:
    return resolve_protocol(name) if isinstance(name, str) else name


Protocol = Annotated[Literal["exact", "paper"], BeforeValidator(_protocol)]
"""A field of ``PROTOCOLS``; the old word "seed" is taken until the next release."""
