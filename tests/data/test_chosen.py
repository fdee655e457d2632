"""Chosen rows: other trainers read the files as they are, and we still read those of before."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from codeact.data.chosen import chosen_turns, write_chosen
from codeact.data.forms import form_columns
from codeact.data.records import open_records, write_jsonl

TURNS = [("system", "11"), ("user", "22"), ("assistant", "33"), ("user", "44"), ("assistant", "55")]


def test_the_column_of_before_is_read(tmp_path: Any) -> None:
    line = {"id": "7", **form_columns(TURNS, (), "messages"), "ifd": 0.5, "cluster": None, "extra": {}}
    old = {("conversation" if name == "messages" else name): value for name, value in line.items()}
    write_jsonl(tmp_path / "selected.jsonl", [old])
    assert chosen_turns(old) == chosen_turns(line) == tuple(TURNS)
    (record,) = open_records(tmp_path / "selected.jsonl")
    assert record.turns == tuple(TURNS)


@pytest.mark.parametrize("name", ["selected.jsonl", "selected.parquet"])
def test_trl_trains_on_it(tiny_model_path: Any, tmp_path: Any, name: str) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra dev)")
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    columns = {"ifd": 0.5, "cluster": None, "extra": {"tag": "t"}}
    rows = [{"id": str(n), **form_columns(TURNS, {2} if n else (), "messages"), **columns} for n in range(4)]
    write_chosen(tmp_path / name, iter(rows))
    kind = "parquet" if name.endswith("parquet") else "json"
    data = load_dataset(kind, data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "model"), max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no"
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype="float32")
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    assert trainer.train().training_loss > 0
    text = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    places = [text.index(said) for _, said in TURNS]
    assert all(a < b for a, b in pairwise(places))
