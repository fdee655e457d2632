"""Selection: both protocols against a plain restatement, hostile scores, the join with embeddings, the written file."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeact.base.errors import InputError
from codeact.data.forms import FORMS
from codeact.data.records import BadRow, Columns, open_records
from codeact.selection.choose import join_labels, plan_selection, select, write_selection
from tests.helpers.scored import score_table

NAN, INF = float("nan"), float("inf")


def chosen_rows(*args, **options):
    return [int(name.removeprefix("id")) for name in select(*args, **options)]


# ------------------------------------------------------------------- the rules once more, in plain Python


def restated(ifds, statuses, labels, *, ratio, strategy, protocol):
    if protocol == "paper":  # a score that failed is 0 there, and 0 is below 1
        failed = [ifd is None or np.isnan(ifd) or status != "ok" for ifd, status in zip(ifds, statuses, strict=True)]
        ifds = [0.0 if no_score else ifd for ifd, no_score in zip(ifds, failed, strict=True)]
        eligible = [row for row, ifd in enumerate(ifds) if ifd < 1 and labels[row] >= 0]
    else:
        eligible = [
            row
            for row, (ifd, status) in enumerate(zip(ifds, statuses, strict=True))
            if status == "ok" and ifd is not None and 0 < ifd < 1
        ]
    hardest = sorted(eligible, key=lambda row: (-ifds[row], row))
    budget = int(Fraction(str(ratio)) * len(ifds) + Fraction(1, 2))
    if strategy == "top_ifd":
        return sorted(hardest[: budget if protocol == "exact" else int(ratio * len(eligible))])
    members = {label: [row for row in hardest if labels[row] == label] for label in sorted(set(labels) - {-1})}
    if protocol == "paper":
        return sorted(row for rows in members.values() for row in rows[: int(ratio * len(rows))])
    quota = dict.fromkeys(members, 0)
    while budget > sum(quota.values()):
        left = budget - sum(quota.values())
        sizes = {label: labels.count(label) for label in members if quota[label] < len(members[label])}
        if not sizes:
            break
        exact = {label: Fraction(left * size, sum(sizes.values())) for label, size in sizes.items()}
        share = {label: int(value) for label, value in exact.items()}
        for label in sorted(exact, key=lambda name: (share[name] - exact[name], name))[: left - sum(share.values())]:
            share[label] += 1
        for label, more in share.items():
            quota[label] = min(quota[label] + more, len(members[label]))
    return sorted(row for label, rows in members.items() for row in rows[: quota[label]])


# few different values, so that ties are common; 1.0, NaN and the like must never be chosen
IFD = st.sampled_from([0.1, 0.25, 0.5, 0.5, 0.75, 0.999, 1.0, 1.5, 0.0, -0.5, NAN, INF, -INF, None])
ROW = st.tuples(IFD, st.sampled_from(["ok", "ok", "ok", "nonfinite", "prompt_too_long"]), st.integers(-1, 4))
RATIO = st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)


def unzip(rows):
    ifds = [ifd for ifd, _, _ in rows]
    statuses = [status for _, status, _ in rows]
    labels = [max(label, 0) if status == "ok" else label for _, status, label in rows]
    return ifds, statuses, labels


@settings(deadline=None)
@given(st.lists(ROW, max_size=60), RATIO, st.sampled_from(["cdas", "top_ifd"]), st.sampled_from(["exact", "paper"]))
def test_both_protocols_equal_their_plain_restatement(rows, ratio, strategy, protocol):
    ifds, statuses, labels = unzip(rows)
    table = score_table(ifds, statuses)
    got = chosen_rows(table, np.array(labels, dtype=np.int32), ratio, strategy, protocol=protocol)
    assert got == restated(ifds, statuses, labels, ratio=ratio, strategy=strategy, protocol=protocol)


@settings(deadline=None)
@given(
    st.lists(ROW, max_size=60),
    RATIO,
    st.sampled_from(["cdas", "top_ifd", "random"]),
    st.sampled_from(["exact", "paper"]),
)
def test_failed_scores_are_never_chosen_and_the_counts_add_up(rows, ratio, strategy, protocol):
    ifds, statuses, labels = unzip(rows)
    selection = plan_selection(score_table(ifds, statuses), labels, ratio, strategy, protocol=protocol)
    positions = selection.positions.tolist()
    assert positions == sorted(set(positions))
    failed = {row for row, ifd in enumerate(ifds) if statuses[row] != "ok" or ifd is None or not np.isfinite(ifd)}
    if protocol == "exact" or strategy == "random":
        assert not failed & set(positions)
        assert strategy == "random" or all(0 < ifds[position] < 1 for position in positions)
    else:
        assert all(position in failed or ifds[position] < 1 for position in positions)
    assert selection.failed_chosen == len(failed & set(positions))
    assert selection.budget == len(positions) + selection.shortfall
    assert sum(count.chosen for count in selection.clusters) == len(positions)
    assert all(count.chosen <= count.eligible <= count.size for count in selection.clusters)
    assert sum(count.size for count in selection.clusters) == sum(label >= 0 for label in labels)
    assert selection.rows_in == len(rows)
    assert selection.tokens_in == sum(row % 7 + row % 11 for row in range(len(rows)))
    assert selection.tokens_chosen == sum(row % 7 + row % 11 for row in positions)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 0.99), st.integers(0, 5)), min_size=1, max_size=80), RATIO)
def test_the_exact_budget_is_exact_and_within_one_of_every_clusters_share(rows, ratio):
    ifds, labels = [ifd for ifd, _ in rows], [label for _, label in rows]
    selection = plan_selection(score_table(ifds), labels, ratio)
    budget = int(Fraction(str(ratio)) * len(rows) + Fraction(1, 2))
    assert (len(selection.positions), selection.budget, selection.shortfall) == (budget, budget, 0)
    for count in selection.clusters:
        assert abs(count.chosen - Fraction(budget * count.size, len(rows))) < 1


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=50),
    st.integers(0, 1 << 30),
    st.sampled_from(["exact", "paper"]),
)
def test_renaming_the_clusters_changes_nothing_where_no_remainders_tie(labels, seed, protocol):
    rng = np.random.default_rng(seed)
    labels = np.array(labels * 10)  # ten of each and ratio 0.4: every quota is whole, so there are no remainders
    table = score_table(rng.permutation(len(labels)) / len(labels) / 2 + 0.1)
    renamed = rng.permutation(5)[labels]
    assert select(table, labels, 0.4, protocol=protocol) == select(table, renamed, 0.4, protocol=protocol)


@settings(deadline=None)
@given(st.lists(ROW, min_size=1, max_size=40), RATIO, st.sampled_from(["cdas", "top_ifd", "random"]), st.randoms())
def test_the_order_of_the_tables_rows_does_not_matter(rows, ratio, strategy, random):
    ifds, statuses, labels = unzip(rows)
    table = score_table(ifds, statuses)
    shuffle = random.sample(range(len(rows)), len(rows))
    shuffled = table.take(pa.array(shuffle))
    expected = select(table, labels, ratio, strategy)
    assert select(shuffled, [labels[index] for index in shuffle], ratio, strategy) == expected


# ------------------------------------------------------------------------------------------ by hand


def test_a_cluster_that_cannot_fill_its_share_gives_it_to_the_others_in_proportion():
    # sizes 4, 4, 2, budget 5: shares 2, 2, 1; cluster 0 has no eligible row, so its 2 go 4 : 2 -> 1.33 : 0.67 -> 1 : 1
    ifds = [1.2, 1.2, 1.2, 1.2, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    selection = plan_selection(score_table(ifds), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2], 0.5)
    assert [(c.label, c.size, c.eligible, c.chosen) for c in selection.clusters] == [
        (0, 4, 0, 0),
        (1, 4, 4, 3),
        (2, 2, 2, 2),
    ]
    assert selection.positions.tolist() == [5, 6, 7, 8, 9]


def test_a_shortfall_is_reported():
    selection = plan_selection(score_table([0.5, 1.5, NAN, 0.2]), [0, 0, 1, 1], 1.0)
    assert (selection.budget, selection.shortfall, selection.positions.tolist()) == (4, 2, [0, 3])


def test_equal_remainders_go_to_the_smaller_label_and_equal_scores_to_the_smaller_row():
    assert chosen_rows(score_table([0.5] * 4), [7, 7, 3, 3], 0.25) == [2]


def test_unreadable_rows_count_for_the_budget():
    statuses = ["ok"] * 6 + ["unreadable"] * 4
    table = score_table([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, None, None, None, None], statuses)
    labels = [0] * 6 + [-1] * 4
    assert chosen_rows(table, labels, 0.4) == [2, 3, 4, 5]
    assert chosen_rows(table, labels, 0.4, protocol="paper") == [4, 5]


@pytest.mark.parametrize(
    ("ratio", "rows", "exact", "paper"),
    [
        (0.29, 100, 29, 28),  # 0.29 * 100 is 28.999999999999996: the paper's script cuts it, exact does not
        (0.5, 5, 3, 2),  # half rounds up; Python's round would give 2
        (0.1, 5, 1, 0),
        ("0.4", 10, 4, 4),
        ("1/3", 9, 3, 3),
        (1, 7, 7, 7),
        (np.float32(0.3), 10, 3, 3),
    ],
)
@pytest.mark.parametrize("strategy", ["cdas", "top_ifd", "random"])
def test_the_budget_of_each_protocol(ratio, rows, exact, paper, strategy):
    table, labels = score_table([0.5] * rows), np.zeros(rows, np.int32)
    assert len(select(table, labels, ratio, strategy)) == exact
    assert len(select(table, labels, ratio, strategy, protocol="paper")) == paper


def test_the_old_word_for_the_papers_protocol_is_taken_and_said_to_be_old(caplog):
    table, labels = score_table([0.9, 0.8, 0.7, 0.2]), [0, 0, 1, 1]
    assert select(table, labels, 0.5, protocol="seed") == select(table, labels, 0.5, protocol="paper")
    assert "protocol seed is now called paper" in caplog.text


def test_random_is_seeded_nested_and_takes_scores_above_one_but_no_failures():
    ifds = [2.0, 0.5, NAN, 3.0, INF, 0.0, 0.7, None, 0.2, 0.9]
    statuses = ["ok"] * 9 + ["nonfinite"]
    table, labels = score_table(ifds, statuses), [0] * 10
    assert chosen_rows(table, labels, 1, "random") == [0, 1, 3, 5, 6, 8]
    small, large = (set(select(table, labels, ratio, "random", seed=7)) for ratio in (0.2, 0.4))
    assert small < large
    draws = {tuple(select(table, labels, 0.3, "random", seed=seed)) for seed in range(20)}
    assert len(draws) > 5
    assert select(table, labels, 0.3, "random", seed=1) == select(table, labels, 0.3, "random", seed=1)


def test_strategies_without_clusters_need_no_labels():
    table = score_table([0.1, 0.9, 0.5])
    assert chosen_rows(table, None, 0.34, "top_ifd") == [1]
    with pytest.raises(InputError, match="needs cluster labels"):
        select(table, None)


def test_no_rows():
    empty = plan_selection(score_table([]), np.empty(0, np.int32))
    assert (empty.budget, empty.shortfall, empty.clusters, len(empty.positions)) == (0, 0, (), 0)


def test_columns_in_several_chunks_and_large_strings():
    table = score_table([0.1, 0.9, 0.5, 0.3])
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    chunked = chunked.set_column(0, "id", chunked.column("id").cast(pa.large_string()))
    assert select(chunked, [0, 0, 0, 0], 0.5) == ["id1", "id2"]


@pytest.mark.parametrize("ratio", [0, -0.1, 1.0001, NAN, INF, "much", "1/0", None])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(InputError, match="ratio must be above 0 and at most 1"):
        select(score_table([0.5]), [0], ratio)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0], {}, r"labels have shape \(1,\), but the score table has 2 rows"),
        ([[0, 0]], {}, "labels have shape"),
        ([0.0, 1.0], {}, "labels must be integers"),
        ([0, -1], {}, "row 1 has no cluster"),
        ([0, -2], {}, "row 1 has no cluster"),
        ([0, 0], {"strategy": "cdsa"}, "'cdsa' is unknown; choose one of: cdas, "),
        ([0, 0], {"protocol": "sed"}, "'sed' is unknown; choose one of: paper, exact"),
        ([0, 0], {"strategy": "random", "seed": -1}, "seed must be 0 or more"),
    ],
)
def test_wrong_arguments_are_refused(labels, options, message):
    with pytest.raises(InputError, match=message) as caught:
        select(score_table([0.5, 0.6]), labels, **options)
    assert "\n" not in str(caught.value)


def test_a_table_of_another_form_is_refused():
    with pytest.raises(InputError, match="needs the columns id and score"):
        select(score_table([0.5]).drop_columns(["ifd"]), [0])
    with pytest.raises(InputError, match="row 4 is in the score table more than once"):
        select(score_table([0.5, 0.6], rows=[4, 4]), [0, 0])


# ------------------------------------------------------------------------------------------ the join


def test_labels_come_into_the_tables_order():
    table = score_table([0.5, None, 0.7, None], ["ok", "unreadable", "ok", "prompt_too_long"], rows=[3, 5, 9, 12])
    joined = join_labels(table, np.array([9, 3, 12]), ["id9", "id3", "id12"], np.array([2, 1, 0]))
    assert joined.tolist() == [1, -1, 2, 0]
    assert joined.dtype == np.int32
    chunked_ids = pa.chunked_array([["id9"], ["id3", "id12"]])
    assert join_labels(table, np.array([9, 3, 12]), chunked_ids, [2, 1, 0]).tolist() == [1, -1, 2, 0]


@pytest.mark.parametrize(
    ("rows", "ids", "message"),
    [
        ([0, 1, 7], ["id0", "id1", "id7"], r"row 7 \(id 'id7'\) has an embedding but no score"),
        ([0, 1, -1], ["id0", "id1", "x"], "row -1 .* has an embedding but no score"),
        ([0, 1, 2], ["id0", "other", "wrong"], "row 1 is 'id1' in the scores and 'other' in the embeddings"),
        ([0, 1, 2], ["id0", None, "id2"], "row 1 is 'id1' in the scores and None"),
        ([0, 2], ["id0", "id2"], r"row 1 \(id 'id1'\) has a score but no embedding"),
        ([0, 1, 1, 2], ["id0", "id1", "id1", "id2"], "row 1 has 2 embeddings"),
        ([], [], r"row 0 \(id 'id0'\) has a score but no embedding"),
    ],
)
def test_scores_and_embeddings_of_different_data_are_refused(rows, ids, message):
    with pytest.raises(InputError, match=message):
        join_labels(score_table([0.5, 0.6, 0.7]), np.array(rows, np.int64), ids, np.zeros(len(rows), np.int32))


def test_fingerprints_and_lengths_are_compared():
    table = score_table([0.5])
    with pytest.raises(InputError, match="fingerprints aaa and bbb"):
        join_labels(table, np.array([0]), ["id0"], [0], table_fingerprint="aaa", embeddings_fingerprint="bbb")
    assert join_labels(table, np.array([0]), ["id0"], [3], table_fingerprint="aaa").tolist() == [3]
    with pytest.raises(InputError, match="must be equally many"):
        join_labels(table, np.array([0]), ["id0"], [0, 1])
    assert join_labels(score_table([]), np.empty(0, np.int64), [], []).tolist() == []
    with pytest.raises(InputError, match="has an embedding but no score"):
        join_labels(score_table([]), np.array([0]), ["id0"], [0])


@settings(deadline=None)
@given(st.sets(st.integers(0, 100), min_size=1, max_size=30), st.randoms())
def test_the_join_restores_any_order(rows, random):
    rows = sorted(rows)
    table = score_table([0.5] * len(rows), rows=random.sample(rows, len(rows)))
    embedded = random.sample(rows, len(rows))
    joined = join_labels(table, np.array(embedded), [f"id{row}" for row in embedded], [row % 9 for row in embedded])
    assert joined.tolist() == [row % 9 for row in table.column("row").to_pylist()]


# ------------------------------------------------------------------------------------------ the file


def write_data(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_records(path, Columns(question="q", answer="a", id="id"))


def test_the_written_file_holds_the_conversations_in_input_order(tmp_path, monkeypatch):
    monkeypatch.setattr("codeact.selection.choose._BLOCK_ROWS", 3)
    data = [{"id": f"id{row}", "q": f"q{row}", "a": f"ä{row}", "tag": row} for row in range(11)]
    record_set = write_data(tmp_path / "data.jsonl", data)
    table = score_table([0.9 - row / 100 for row in range(11)])
    labels = np.array([row % 2 for row in range(11)])
    selection = plan_selection(table, labels, 0.6)
    write_selection(tmp_path / "out.jsonl", record_set, table, selection, labels)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [line["id"] for line in lines] == select(table, labels, 0.6)
    assert lines[0] == {
        "id": "id0",
        "messages": [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "ä0"}],
        "ifd": 0.9,
        "cluster": 0,
        "extra": {"tag": 0},
    }
    write_selection(tmp_path / "out.jsonl", record_set, table, plan_selection(table, None, 0.1, "top_ifd"), None)
    assert json.loads((tmp_path / "out.jsonl").read_text("utf-8"))["cluster"] is None


def test_history_comes_before_the_question(tmp_path):
    turns = [{"role": role, "content": text} for role, text in [("system", "s"), ("user", "u"), ("assistant", "a")]]
    turns = [turns[0], turns[1], {**turns[2], "weight": 0}, *turns[1:]]  # the first answer is context, and stays so
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"conversation": turns}) + "\n")
    record_set = open_records(path, Columns(conversation="conversation"))
    table = score_table([0.5]).set_column(0, "id", pa.array(["0"]))
    write_selection(tmp_path / "out.jsonl", record_set, table, plan_selection(table, [0], 1), [0])
    assert json.loads((tmp_path / "out.jsonl").read_text())["messages"] == turns
    (first,) = record_set
    for name, form in itertools.product(("out.jsonl", "out.parquet"), ("messages", "sharegpt")):
        write_selection(tmp_path / name, record_set, table, plan_selection(table, [0], 1), [0], form)
        (record,) = open_records(tmp_path / name)
        assert (record.turns, record.context) == (first.turns, first.context)
    with pytest.raises(InputError, match=r"row 0 \(id 0\): form alpaca cannot say answers that are not to be learnt"):
        write_selection(tmp_path / "no.jsonl", record_set, table, plan_selection(table, [0], 1), [0], "alpaca")
    with pytest.raises(InputError, match="format"):
        write_selection(tmp_path / "no.jsonl", record_set, table, plan_selection(table, [0], 1), [0], "csv")
    assert not (tmp_path / "no.jsonl").exists()


@pytest.mark.parametrize("form", FORMS)
def test_parquet_holds_what_the_lines_hold(tmp_path, monkeypatch, form):
    monkeypatch.setattr("codeact.data.chosen._BLOCK", 3)
    data = [{"id": f"id{row}", "q": f"q{row}", "a": f"ä{row}", "tag": row if row % 2 else "x"} for row in range(8)]
    record_set, table = write_data(tmp_path / "data.jsonl", data), score_table([0.5] * 8)
    for selection in (plan_selection(table, None, 1, "top_ifd"), plan_selection(table, None, 1e-9, "top_ifd")):
        for name in ("out.jsonl", "out.parquet"):
            write_selection(tmp_path / name, record_set, table, selection, None, form)
        lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
        rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
        assert [row.pop("extra") for row in rows] == [json.dumps(line.pop("extra")) for line in lines]
        for row in rows:
            for turn in row.get("messages", row.get("conversations", [])):
                assert turn.pop("weight") is None
        assert rows == lines
        assert len(rows) == len(selection.positions)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "id0", "q": "q", "a": "a"}], "row 1 was scored, but the data has 1 rows"),
        (
            [{"id": "id1", "q": "q", "a": "a"}, {"id": "id0", "q": "q", "a": "a"}],
            "row 0 is 'id1' in the data and 'id0'",
        ),
        (
            [{"id": "id0", "q": "q", "a": "a"}, {"id": "id1", "q": 5, "a": "a"}],
            "row 1 was scored, but cannot be read now",
        ),
    ],
)
def test_data_that_is_not_what_was_scored_is_refused_and_nothing_is_written(tmp_path, rows, message):
    record_set = write_data(tmp_path / "data.jsonl", rows)
    table = score_table([0.5, 0.6])
    with pytest.raises(InputError, match=message):
        write_selection(tmp_path / "out.jsonl", record_set, table, plan_selection(table, [0, 0], 1), [0, 0])
    assert [file.name for file in tmp_path.iterdir()] == ["data.jsonl"]
    assert isinstance(record_set.rows(0, 2)[-1], BadRow) or "cannot be read" not in message


SCORED = [{"id": f"r{n}", "score": n / 10} for n in range(9)]


@pytest.mark.parametrize(
    "form",
    [
        lambda rows: rows,
        lambda rows: {"id": [row["id"] for row in rows], "ifd": [row["score"] for row in rows]},
        pa.Table.from_pylist,
        lambda rows: pytest.importorskip("pandas").DataFrame(rows),
        datasets.Dataset.from_list,
        lambda rows: pytest.importorskip("polars").DataFrame(rows),
    ],
)
def test_any_table_of_ids_and_scores_is_taken(form):
    rows = [*SCORED, {"id": "none", "score": None}]
    assert select(form(rows), None, 0.3, "top_ifd") == ["r6", "r7", "r8"]
    assert select(form(rows), [0, 1] * 5, 0.2) == ["r7", "r8"]


@pytest.mark.parametrize(
    "table", [[], [{"id": "a"}], [{"score": 1.0}], "text", None, 5, {"id": ["a"], "score": [1, 2]}]
)
def test_what_is_no_table_of_scores_is_one_line(table):
    with pytest.raises(InputError, match="id and score"):
        select(table, None, 0.5, "top_ifd")


def test_lengths_are_asked_for_where_they_choose():
    with pytest.raises(InputError, match="answer_tokens"):
        select(SCORED, None, 0.5, "longest")
