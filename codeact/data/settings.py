"""Which data, for every command and a run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from codeact.base.settings import Settings, setting

if TYPE_CHECKING:
    from codeact.data.records import RecordSet


class DataSettings(Settings):
    """Which data, and which columns of it."""

    source: str = setting(..., "File or folder (.json, .jsonl, .parquet), or a hub data set.", "DATA")
    question: str = setting("instruction", "Column of the question.", "--question-column", "--column")
    answer: str = setting("output", "Column of the answer.", "--answer-column")
    input: str | None = setting(None, "Column appended to the question (Alpaca form).", "--input-column")
    conversation: str | None = setting(
        None, "Column of turns, instead of question and answer.", "--conversation-column"
    )
    id: str | None = setting(None, "Column of unique ids; default: the row number.", "--id-column")
    split: str = setting("train", "Split of a hub data set.")
    config_name: str | None = setting(None, "Configuration of a hub data set.")

    def open(self) -> RecordSet:
        """Open the data set.

        Raises:
            InputError: it cannot be read, or lacks a column.
        """
        from codeact.data.records import Columns, open_records

        columns = Columns(**self.model_dump(include={field.name for field in dataclasses.fields(Columns)}))
        return open_records(self.source, columns, split=self.split, config_name=self.config_name)
