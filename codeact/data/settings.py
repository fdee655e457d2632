"""Which data, for every command and a run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from codeact.base.settings import Settings, setting

if TYPE_CHECKING:
    from codeact.data.records import RecordSet


class DataSettings(Settings):
    """Which data, and which columns of it."""

    source: str = setting(
        ..., "File or folder (JSON, CSV, Parquet, Arrow; packed or not), hub data set, or address.", "DATA"
    )
    question: str | None = setting(None, "Column of the question; default: found.", "--question-column", "--column")
    answer: str | None = setting(None, "Column of the answer; default: found.", "--answer-column")
    input: str | None = setting(None, "Column appended to the question (Alpaca form).", "--input-column")
    conversation: str | None = setting(
        None, "Column of turns, instead of question and answer.", "--conversation-column"
    )
    id: str | None = setting(None, "Column of unique ids; default: the row number.", "--id-column")
    system: str | None = setting(None, "Column of a system text.", "--system-column")
    history: str | None = setting(None, "Column of earlier questions and answers.", "--history-column")
    split: str | None = setting(None, "Split of a folder or hub data set; default: the only one, or train.")
    config_name: str | None = setting(None, "Configuration of a folder or hub data set.")

    def open(self) -> RecordSet:
        """Open the data set.

        Raises:
            InputError: it cannot be read, or lacks a column.
        """
        from codeact.data.forms import Columns
        from codeact.data.records import open_records

        columns = Columns(**self.model_dump(include={field.name for field in dataclasses.fields(Columns)}))
        return open_records(self.source, columns, split=self.split, config_name=self.config_name)
