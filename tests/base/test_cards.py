"""Cards: read as the hub's own library reads them; a README.md of the user's stays as it is."""

from __future__ import annotations

import pytest
from huggingface_hub import DatasetCard, ModelCard

from codeact.base.cards import CARD, card_metadata, figures_table, hub_name, public_name, settings_block, write_card


def test_a_card_is_read_by_the_hubs_library_and_written_again(tmp_path):
    metadata = {"tags": ["a", "ü: b"], "datasets": ["org/name"], "license": None, "metrics": []}
    assert write_card(tmp_path, metadata, ["# First"])
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.to_dict() == {"tags": ["a", "ü: b"], "datasets": ["org/name"]}
    assert card.text.rstrip().endswith("# First")
    assert card_metadata(tmp_path) == card.data.to_dict()
    assert write_card(tmp_path, {}, ["# Second"])
    assert "First" not in (tmp_path / CARD).read_text()
    assert DatasetCard.load(tmp_path / CARD).data.to_dict() == {}
    assert card_metadata(tmp_path) == {}


@pytest.mark.parametrize("content", [b"", b"# Mine\n", b"---\nlicense: mit\n---\n", b"\xff\xfe", None])
def test_one_of_the_users_stays(tmp_path, content):
    path = tmp_path / CARD
    if content is None:
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_bytes(content)
    assert not write_card(tmp_path, {}, ["# Ours"])
    assert path.is_symlink() if content is None else path.read_bytes() == content
    assert card_metadata(tmp_path) == {}


def test_one_that_the_user_took_over_stays(tmp_path):
    write_card(tmp_path, {"tags": ["a"]}, ["# Ours"])
    text = "".join(line for line in (tmp_path / CARD).read_text().splitlines(True) if "Written by codeact" not in line)
    (tmp_path / CARD).write_text(text)
    assert not write_card(tmp_path, {}, ["# Again"])
    assert (tmp_path / CARD).read_text() == text


def test_what_lies_here_is_named_by_its_last_name_and_is_none_of_the_hubs(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    assert public_name(str(tmp_path / "rows.jsonl")) == "rows.jsonl"
    assert public_name(str(tmp_path / "gone" / "model")) == "model"
    assert (public_name("org/name"), public_name("cdas"), public_name(0.4)) == ("org/name", "cdas", 0.4)
    names = {
        "org/name": True,
        "gpt2": True,
        str(tmp_path): False,
        "./rows": False,
        "a/b/c": False,
        "https://x/y": False,
    }
    assert {name: hub_name(name) == name for name in names} == names
    assert hub_name(None) is None
    assert settings_block({"model": str(tmp_path), "seed": 1, "none": None}) == (
        f"```yaml\nmodel: {tmp_path.name}\nseed: 1\n```"
    )


def test_a_table_survives_what_is_in_it():
    assert figures_table([("a|b", "1\n2")]) == "| | |\n|:--|:--|\n| a\\|b | 1 2 |"
