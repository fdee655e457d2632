"""YAML that people write, also with ill will: one line about each, at once, and nothing read that is not there."""

from __future__ import annotations

import os

import pytest

from codeact.base.errors import InputError
from codeact.base.yaml_files import line_of, read_yaml

LAUGHS = "\n".join(
    ["l0: &l0 [x,x,x,x,x,x,x,x,x,x]", *(f"l{n}: &l{n} [{','.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 9))]
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LAUGHS, "it holds more than 100,000 values, aliases written out"),
        ("a: &a\n  b: *a\n", "it holds more than 100,000 values"),
        ("a: &a [*a]\n", "it holds more than 100,000 values"),
        (f"a: {'[' * 5000}{']' * 5000}\n", "nested too deeply"),
        (f"a: {'{b: ' * 3000}1{'}' * 3000}\n", "nested too deeply"),
        (f"a: {'9' * 5000}\n", "5000 digits"),
        ("a: 1\nb: 2\na: 3\n", "x.yaml, line 3: the key a is there twice; remove one"),
        ("a:\n  - {b: 1, b: 2}\n", "line 2: the key b is there twice"),
        ("a: [", "expected the node content"),
        ("a: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
        ("\x00", "special characters"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, content, message):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=r"x\.yaml") as caught:
        read_yaml(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo, lambda path: path.write_bytes(b"a: \xff\n")])
def test_what_is_no_text_file(tmp_path, make):
    make(tmp_path / "x.yaml")
    with pytest.raises(InputError, match="cannot read"):
        read_yaml(tmp_path / "x.yaml")


def test_what_people_write(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "\ufeffshared: &shared {lr: 5e-5, tags: [a, b]}\none: *shared\ntwo:\n  <<: *shared\n  lr: 1\n"
        "day: 2020-13-01\nother: 2026-01-02\n"
    )
    content, tree = read_yaml(path)
    assert content["two"] == {"lr": 1, "tags": ["a", "b"]}
    assert (content["day"], content["other"]) == ("2020-13-01", "2026-01-02")  # text: no calendar has the first
    assert [line_of(tree, keys) for keys in (["two"], ["two", "lr"], ["two", "no"], ["none"])] == [3, 5, 3, 1]
