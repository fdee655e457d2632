"""Strategies, difficulties and budgets against plain restatements, on awkward tables; the paper's script to the row."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import DatasetCard
from hypothesis import given, settings
from hypothesis import strategies as st

from codeact.base.errors import InputError
from codeact.base.ledger import Ledger
from codeact.scoring.folder import SCHEMA, ScoreFolder
from codeact.scoring.length import rank_correlation
from codeact.scoring.token_losses import write_losses
from codeact.selection import facility
from codeact.selection.choose import plan_selection
from codeact.selection.difficulty import difficulty_scores
from codeact.selection.facility import facility_location
from codeact.selection.settings import SelectSettings
from codeact.selection.stage import Select, selection_lines
from tests.helpers.scored import make_scored, score_table

NAN, INF = float("nan"), float("inf")

# ------------------------------------------------------------------------------------------ the paper's script


def papers_script(rows, vectors, clusters, ratio):
    """CDAS/select_data.py of the paper's repository, said again: its data, its k-means, its rule."""
    from sklearn.cluster import KMeans

    labels = KMeans(n_clusters=clusters, random_state=42).fit_predict(vectors)
    chosen = []
    for label in range(clusters):
        cluster = [row for row, its in zip(rows, labels, strict=True) if its == label and row["IFD"] < 1.0]
        cluster.sort(key=lambda row: row["IFD"], reverse=True)
        chosen += cluster[: int(len(cluster) * ratio)]
    return {row["id"] for row in chosen}


@pytest.mark.parametrize("ratio", [0.4, 0.29, 0.1, 1.0])
def test_the_papers_protocol_chooses_the_papers_rows(tmp_path, codeact, ratio):
    rng = np.random.default_rng(0)
    count = 299
    centres = rng.normal(size=(13, 16))
    vectors = centres[rng.integers(0, 13, count)] + rng.normal(size=(count, 16))  # clusters that are not clear-cut
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    ifd = np.round(rng.uniform(0.3, 1.2, count), 2)  # rounded, so that there are ties
    data = [{"id": f"r{row}", "instruction": f"q{row}", "output": f"a{row}"} for row in range(count)]
    statuses = np.full(count, "ok", object)
    statuses[::7] = rng.choice(["prompt_too_long", "answer_too_short", "token_beyond_model", "nonfinite"], 43)
    for row in (5, 90):
        data[row]["output"], statuses[row] = "", "empty_answer"  # the script leaves these out
    data[41]["instruction"], statuses[41] = "", "empty_question"
    failed = statuses != "ok"
    ids = [row["id"] for row in data]
    table = score_table(np.where(failed, None, ifd).tolist(), statuses.tolist(), id=ids)
    _, scores, embeddings = make_scored(tmp_path, data, table, vectors)

    seen = [row for row in range(count) if data[row]["instruction"] and data[row]["output"]]
    theirs = [{"id": ids[row], "IFD": 0 if failed[row] else ifd[row]} for row in seen]
    expected = papers_script(theirs, vectors[seen], 10, ratio)
    output = tmp_path / "selected.jsonl"
    arguments = ("--scores", scores, "--embeddings", embeddings, "--ratio", ratio, "--output", output)
    code, out, err = codeact("select", *arguments, "--protocol", "paper")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert {line["id"] for line in lines} == expected
    # a failed score is chosen by the paper's protocol alone, is told, and is no number
    chosen_failed = [line for line in lines if failed[ids.index(line["id"])]]
    assert bool(chosen_failed) == (ratio == 1.0) == ("failed scores" in out)
    assert all(line["ifd"] is None for line in chosen_failed)
    if ratio == 0.4:  # it does matter: without the failed ones other rows are chosen
        without = [row for row in theirs if row["IFD"]]
        assert papers_script(without, vectors[[ids.index(row["id"]) for row in without]], 10, ratio) != expected


def test_a_perplexity_that_is_no_number_is_0_in_the_papers_protocol_and_an_infinite_one_is_above_1():
    table = score_table([0.9, 0.8, None, NAN, INF, 1.0, -0.5], ["ok"] * 2 + ["nonfinite"] + ["ok"] * 4)
    # below 1: 0.9, 0.8, 0 (failed), 0 (no number), -0.5; int(0.6 * 5) of them
    assert plan_selection(table, [0] * 7, 0.6, protocol="paper").positions.tolist() == [0, 1, 2]
    assert plan_selection(table, [0] * 7, 1.0, protocol="paper").positions.tolist() == [0, 1, 2, 3, 6]
    assert plan_selection(table, None, 0.6, "top_ifd", protocol="paper").positions.tolist() == [0, 1, 2]
    assert plan_selection(table, [0] * 7, 1.0).positions.tolist() == [0, 1]


# ------------------------------------------------------------------------------------------ difficulties


def measures(row):
    """Every difficulty of a row by its definition, in plain Python; (value, may be chosen)."""
    loss, alone = row["cond"] / row["scored"], row["uncond"] / row["uncond_scored"]
    quotient = loss / alone if alone else NAN
    return {
        "ifd": (row["ifd"], 0 < row["ifd"] < 1),
        "loss": (loss, True),
        "loss_gain": (alone - loss, alone - loss > 0),
        "ifd_loss": (quotient, 0 < quotient < 1),
    }


def adjusted(rows, neighbours=41):
    """The rank of every row's IFD among the rows next in length, one row at a time."""
    pool = sorted((row for row in rows if 0 < row["ifd"] < 1), key=lambda row: (row["tokens"], row["row"]))
    window = min(neighbours, len(pool))
    ranks = {}
    for place, row in enumerate(pool):
        first = min(max(place - window // 2, 0), len(pool) - window)
        others = [other for other in pool[first : first + window] if other is not row]
        easier = [o for o in others if (o["ifd"], -o["row"]) < (row["ifd"], -row["row"])]
        ranks[row["row"]] = len(easier) / len(others) if others else 1.0
    return ranks


SUM = st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 3.5, 7.0])
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "ifd": st.sampled_from([0.1, 0.5, 0.5, 0.75, 0.999, 1.0, 1.5, 0.0, -0.5]),
            "cond": SUM,
            "uncond": SUM,
            "scored": st.integers(1, 4),
            "uncond_scored": st.integers(1, 4),
            "tokens": st.integers(1, 5),
            "prompt": st.integers(0, 3),
            "label": st.integers(0, 3),
            "question": st.integers(0, 4),
        }
    ),
    min_size=1,
    max_size=70,
)


def table_of(rows):
    for number, row in enumerate(rows):
        row["row"] = number
    return score_table(
        [row["ifd"] for row in rows],
        cond_nll_sum=[row["cond"] for row in rows],
        uncond_nll_sum=[row["uncond"] for row in rows],
        scored_tokens=[row["scored"] for row in rows],
        uncond_scored_tokens=[row["uncond_scored"] for row in rows],
        answer_tokens=[row["tokens"] for row in rows],
        prompt_tokens=[row["prompt"] for row in rows],
    )


@given(ROWS)
def test_every_difficulty_is_its_definition(rows):
    table = table_of(rows)
    for name in ("ifd", "loss", "loss_gain", "ifd_loss"):
        values, reasons = difficulty_scores(table, name)
        for row, value, reason in zip(rows, values, reasons, strict=True):
            expected, allowed = measures(row)[name]
            assert value == expected or (math.isnan(value) and not math.isfinite(expected))
            assert (reason == "") == allowed
    values, reasons = difficulty_scores(table, "ifd_length_adjusted")
    ranks = adjusted(rows)
    assert {row: value for row, value in enumerate(values) if not math.isnan(value)} == ranks
    assert [row for row, reason in enumerate(reasons) if reason == ""] == sorted(ranks)


def test_the_length_adjusted_rank_does_not_follow_the_length():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 400, 2_000)
    ifd = np.clip(0.2 + 0.1 * np.log(tokens) + rng.normal(0, 0.04, 2_000), 0.01, 0.99)
    table = score_table(ifd, answer_tokens=tokens)
    assert rank_correlation(ifd, tokens) > 0.8
    values, _ = difficulty_scores(table, "ifd_length_adjusted")
    assert abs(rank_correlation(values, tokens)) < 0.1
    assert values.min() == 0
    assert values.max() == 1


def test_the_gain_turns_ifd_round_and_the_two_quotients_differ():
    rng = np.random.default_rng(0)
    cond, uncond = rng.uniform(0.1, 2, 100), rng.uniform(1, 3, 100)
    table = score_table(np.exp(cond - uncond), cond_nll_sum=cond, uncond_nll_sum=uncond)
    gain, quotient = (difficulty_scores(table, name)[0] for name in ("loss_gain", "ifd_loss"))
    assert np.array_equal(np.argsort(gain), np.argsort(-table["ifd"].to_numpy()))
    assert not np.array_equal(np.argsort(quotient), np.argsort(table["ifd"].to_numpy()))


@pytest.mark.parametrize("name", ["loss", "loss_gain", "ifd_loss", "s_ifd"])
@pytest.mark.parametrize("old", ["no column", "nothing in it"])
def test_a_difficulty_without_its_columns_names_them_and_the_remedy(name, old):
    table = score_table([0.5, 0.6])
    if old == "no column":
        table = table.drop_columns(["cond_nll_sum", "uncond_nll_sum"])
    else:
        table = table.set_column(9, "cond_nll_sum", pa.nulls(2, pa.float64()))
    with pytest.raises(
        InputError, match=f"difficulty {name} needs .*which these scores lack; score again with codeact"
    ):
        plan_selection(table, None, 0.5, "top_ifd", difficulty=name)


# ------------------------------------------------------------------------------------------ strategies and budgets


def shares(budget, sizes, room):
    """The largest-remainder rule for clusters, in fractions."""
    quota = dict.fromkeys(room, 0)
    while budget > sum(quota.values()) and any(quota[c] < room[c] for c in room):
        left = budget - sum(quota.values())
        open_ = {c: sizes[c] for c in room if quota[c] < room[c]}
        exact = {c: Fraction(left * size, sum(open_.values())) for c, size in open_.items()}
        whole = {c: int(value) for c, value in exact.items()}
        for c in sorted(exact, key=lambda c: (whole[c] - exact[c], c))[: left - sum(whole.values())]:
            whole[c] += 1
        for c, more in whole.items():
            quota[c] = min(quota[c] + more, room[c])
    return quota


def restated(rows, strategy, difficulty, easiest, budget_rows, budget_tokens, per_question):
    """The rules once more, row by row."""
    ranks = adjusted(rows) if difficulty == "ifd_length_adjusted" else None
    score, allowed = {}, set()
    for row in rows:
        value, fine = (ranks.get(row["row"], NAN), row["row"] in ranks) if ranks else (0, False)
        if ranks is None:
            value, fine = measures(row)[difficulty]
        score[row["row"]] = value
        if strategy == "longest" or fine:
            allowed.add(row["row"])
    if per_question is not None:
        kept = {}
        for number in sorted(allowed):
            row = rows[number]
            key = {
                "best_fit": row["cond"] / row["scored"],
                "hardest": INF if math.isnan(score[number]) else -score[number],
                "first": number,
            }[per_question]
            kept[row["question"]] = min(kept.get(row["question"], (INF, INF)), (key, number))
        allowed = {number for _, number in kept.values()}
    cost = {row["row"]: row["prompt"] + row["tokens"] for row in rows}
    if budget_tokens is not None:
        allowed = {number for number in allowed if cost[number] <= budget_tokens}

    def key(number):
        if strategy == "longest":
            return (-rows[number]["tokens"], number)
        return (score[number] if easiest else -score[number], number)

    cluster = {row["row"]: row["label"] if strategy == "cdas" else 0 for row in rows}
    groups = {c: sorted((n for n in allowed if cluster[n] == c), key=key) for c in set(cluster.values())}
    sizes = {c: sum(value == c for value in cluster.values()) for c in groups}
    if budget_tokens is None:
        quota = shares(budget_rows, sizes, {c: len(members) for c, members in groups.items()})
        return sorted(n for c, members in groups.items() for n in members[: quota[c]])
    turns = sorted(
        (Fraction(2 * place + 1, 2 * sizes[c]), c, n) for c, ms in groups.items() for place, n in enumerate(ms)
    )
    chosen, used = [], 0
    for _, _, number in turns:
        if used + cost[number] > budget_tokens:
            break
        chosen.append(number)
        used += cost[number]
    return sorted(chosen)


@settings(max_examples=300)
@given(
    ROWS,
    st.sampled_from(["cdas", "top_ifd", "longest"]),
    st.sampled_from(["ifd", "ifd_length_adjusted", "loss", "loss_gain", "ifd_loss"]),
    st.booleans(),
    st.sampled_from([None, "best_fit", "hardest", "first"]),
    st.booleans(),
    st.integers(1, 80),
)
def test_every_strategy_and_budget_is_its_plain_restatement(
    rows, strategy, difficulty, easiest, which, in_tokens, size
):
    table = table_of(rows)
    easiest = easiest and strategy != "longest"
    difficulty = "ifd" if strategy == "longest" and which != "hardest" else difficulty
    budget = {"budget_tokens": 2 * size} if in_tokens else {"budget_rows": size}
    options = {"difficulty": difficulty, "easiest": easiest, "per_question": which, **budget}
    expected = restated(
        rows, strategy, difficulty, easiest, *(budget.get(f"budget_{u}") for u in ("rows", "tokens")), which
    )
    labels, questions = [row["label"] for row in rows], np.array([row["question"] for row in rows])
    if in_tokens and not expected and restated(rows, strategy, difficulty, easiest, None, 10**9, which):
        with pytest.raises(InputError, match="below the shortest row"):
            plan_selection(table, labels, 0.4, strategy, questions=questions, **options)
        return
    selection = plan_selection(table, labels, 0.4, strategy, questions=questions, **options)
    assert selection.positions.tolist() == expected
    assert [row for row, reason in enumerate(selection.reasons) if not reason] == expected
    if in_tokens:
        assert selection.tokens_chosen <= 2 * size


def test_a_shuffled_table_has_the_same_choice():
    rng = np.random.default_rng(1)
    table = score_table(rng.uniform(0.1, 1.1, 60), answer_tokens=rng.integers(1, 50, 60))
    shuffle = rng.permutation(60)
    labels, questions = rng.integers(0, 4, 60), rng.integers(0, 30, 60)
    vectors = rng.normal(size=(60, 4)).astype(np.float32)
    for strategy in ("cdas", "top_ifd", "random", "longest", "facility_location"):
        options = {"budget_tokens": 400, "per_question": "hardest"}
        one = plan_selection(table, labels, 0.4, strategy, questions=questions, vectors=vectors, **options)
        two = plan_selection(
            table.take(pa.array(shuffle)),
            labels[shuffle],
            0.4,
            strategy,
            questions=questions[shuffle],
            vectors=vectors[shuffle],
            **options,
        )
        assert one.positions.tolist() == shuffle[two.positions].tolist()
        for name in ("score", "reasons", "scored", "answer_tokens"):
            np.testing.assert_array_equal(getattr(one, name)[shuffle], getattr(two, name))


def test_random_by_tokens_is_nested_exact_to_the_row_and_reaches_above_1():
    rng = np.random.default_rng(2)
    table = score_table(rng.uniform(0.5, 1.5, 200), answer_tokens=rng.integers(1, 80, 200))
    tokens = table["prompt_tokens"].to_numpy() + table["answer_tokens"].to_numpy()
    small, large = (plan_selection(table, None, 0.4, "random", budget_tokens=n, seed=3) for n in (1_000, 2_000))
    assert set(small.positions) < set(large.positions)
    assert (table["ifd"].to_numpy()[large.positions] >= 1).any()
    for selection, budget in ((small, 1_000), (large, 2_000)):
        assert selection.tokens_chosen == tokens[selection.positions].sum() <= budget
        assert budget - selection.tokens_chosen < tokens.max()  # the next one did not fit
    cdas = plan_selection(table, rng.integers(0, 5, 200), 0.3)
    matched = plan_selection(table, None, 0.4, "random", budget_tokens=cdas.tokens_chosen)
    assert 0 <= cdas.tokens_chosen - matched.tokens_chosen < tokens.max()


def test_drawing_in_proportion_draws_in_proportion_and_is_nested():
    scores = np.array([0.1, 0.2, 0.3, 0.4] * 2)
    table, labels = score_table(scores), [0] * 4 + [1] * 4
    counts = np.zeros(8)
    for seed in range(1_500):
        counts[plan_selection(table, labels, sampling="proportional", budget_rows=2, seed=seed).positions] += 1
    assert counts[:4].sum() == counts[4:].sum() == 1_500  # one of each cluster
    np.testing.assert_allclose(counts / 1_500, scores, atol=0.04)
    two, four = (plan_selection(table, labels, sampling="proportional", budget_rows=n).positions for n in (2, 4))
    assert set(two) < set(four)
    # a loss of 0 comes last, not never
    zero = score_table([0.5] * 3, cond_nll_sum=[0.0, 1.0, 2.0])
    options = {"difficulty": "loss", "sampling": "proportional"}
    assert all(
        plan_selection(zero, [0] * 3, budget_rows=2, seed=s, **options).positions.tolist() == [1, 2] for s in range(9)
    )
    assert len(plan_selection(zero, [0] * 3, budget_rows=3, **options).positions) == 3


# ------------------------------------------------------------------------------------------ facility location


def greedy(vectors, count):
    """The definition: at every step the row that adds most to the sum of similarities to the nearest chosen one."""
    similar = np.maximum(vectors @ vectors.T, 0)
    nearest, chosen = np.zeros(len(vectors), np.float32), []
    for _ in range(min(count, len(vectors))):
        gains = [facility._gain(similar[row], nearest) if row not in chosen else -1.0 for row in range(len(vectors))]
        chosen.append(int(np.argmax(gains)))  # the first of equal ones
        nearest = np.maximum(nearest, similar[chosen[-1]])
    return chosen


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 1 << 30), st.booleans(), st.integers(1, 40))
def test_the_lazy_greedy_choice_is_the_greedy_one(rows, features, seed, twins, count):
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, (rows, features)).astype(np.float32)  # whole numbers: many ties, exact sums
    if twins:
        vectors = np.repeat(vectors, 2, axis=0)
    assert facility_location(vectors, count).tolist() == greedy(vectors, count)


def test_facility_location_takes_one_of_each_kind_before_a_twin_and_shares_by_cluster():
    kinds = np.repeat(np.eye(4, dtype=np.float32), 5, axis=0)
    selection = plan_selection(score_table([2.0] * 20), [0] * 20, 0.2, "facility_location", vectors=kinds)
    assert selection.positions.tolist() == [0, 5, 10, 15]
    halves = plan_selection(score_table([0.5] * 20), [0] * 5 + [1] * 15, 0.4, "facility_location", vectors=kinds)
    assert [c.chosen for c in halves.clusters] == [2, 6]
    with pytest.raises(InputError, match="needs the vectors of the questions"):
        plan_selection(score_table([0.5] * 20), [0] * 20, 0.2, "facility_location")


def test_facility_location_says_when_memory_is_short(monkeypatch):
    monkeypatch.setattr(facility, "free_memory", lambda: 100)
    with pytest.raises(InputError, match=r"20 rows need .* half of the free memory is .* raise clusters"):
        facility_location(np.eye(20, dtype=np.float32), 3)


# ------------------------------------------------------------------------------------------ length


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.5, 1.0, 2.0, NAN, INF])), max_size=30))
def test_the_rank_correlation_is_scipys(pairs):
    from scipy.stats import spearmanr

    a, b = [a for a, _ in pairs], [b for _, b in pairs]
    good = [(x, y) for x, y in pairs if math.isfinite(y)]
    if len(good) < 2 or any(len(set(side)) == 1 for side in zip(*good, strict=True)):
        assert rank_correlation(a, b) is None
    else:
        assert rank_correlation(a, b) == pytest.approx(spearmanr(*zip(*good, strict=True)).statistic, abs=1e-12)


def test_the_line_about_length_counts():
    table = score_table([0.9, 0.8, 0.3, 0.2, None], ["ok"] * 4 + ["nonfinite"], answer_tokens=[10, 40, 20, 30, 99])
    selection = plan_selection(table, None, budget_rows=2, strategy="top_ifd")
    assert selection.among_longest().tolist() == [False, True, False, True, False]
    assert selection.length_line() == (
        "Spearman(ifd, answer tokens) -0.40; 1 of 2 chosen are among the 2 longest answers (by chance 1)"
    )
    assert "is not defined" in plan_selection(score_table([0.5] * 3), None, 0.4, "longest").length_line()


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "longst"}, "strategy 'longst' is unknown; choose one of: longest"),
        ({"difficulty": "los"}, "difficulty 'los' is unknown; choose one of: loss"),
        ({"sampling": "kmq"}, "sampling 'kmq' is unknown"),
        ({"budget_rows": 3, "budget_tokens": 5}, "budget_rows and budget_tokens are 2 budgets; say one of them"),
        ({"ratio": 0.3, "budget_rows": 5}, "budget_rows and ratio are 2 budgets"),
        ({"budget_rows": 0}, "budget_rows must be 1 or more, not 0"),
        ({"budget_tokens": 4}, "4 tokens is below the shortest row that may be chosen, row 0 with 5; raise"),
        ({"strategy": "random", "easiest": True}, "easiest is about the difficulty, which strategy random does not"),
        ({"strategy": "longest", "sampling": "proportional"}, "sampling is about the difficulty"),
        ({"strategy": "longest", "difficulty": "loss"}, "strategy longest chooses by no difficulty loss; leave it out"),
        ({"strategy": "facility_location", "difficulty": "ifd_loss"}, "strategy facility_location chooses by no diff"),
        ({"strategy": "random", "difficulty": "loss", "per_question": "first"}, "strategy random chooses by no diff"),
        ({"easiest": True, "sampling": "proportional"}, "leave out easiest"),
        ({"protocol": "paper", "strategy": "longest"}, "knows no strategy longest; leave out protocol paper"),
        ({"protocol": "paper", "difficulty": "loss", "budget_rows": 1}, "no difficulty loss and no budget_rows"),
        ({"per_question": "first"}, "per_question needs the number of its question for each of 2 rows"),
        ({"per_question": "last", "questions": np.zeros(2, int)}, "per_question 'last' is unknown"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(options, message):
    table = score_table([0.5, 0.6], answer_tokens=[5, 9], prompt_tokens=[0, 0])
    with pytest.raises(InputError, match=message) as caught:
        plan_selection(table, [0, 0], **options)
    assert "\n" not in str(caught.value)


def test_clusters_that_are_smaller_than_their_share_are_told():
    """Two of ten rows are cluster 0, whose share of five is one; neither of them may be chosen."""
    table = score_table([1.2, 1.3, *np.linspace(0.1, 0.9, 8)], answer_tokens=[5] * 10)
    labels = [0, 0, *[1] * 8]
    settings = SelectSettings(ratio=0.5, clusters=2)
    lines = dict(selection_lines(plan_selection(table, labels, 0.5), settings))
    assert lines["small clusters"].startswith("1 of 2 have fewer eligible rows than their share, which others gave; ")
    assert "fewer --clusters" in lines["small clusters"]
    for strategy, ratio in (("cdas", 0.1), ("top_ifd", 0.5), ("cdas", 1.0)):
        selection = plan_selection(table, labels, ratio, strategy)
        told = dict(selection_lines(selection, SelectSettings(ratio=ratio, strategy=strategy)))
        assert "small clusters" not in told, "it has its share, there are no shares, or nothing is left to give"


def test_no_eligible_row_is_one_line_with_the_remedy(tmp_path, codeact):
    data = [{"id": f"r{row}", "instruction": "q", "output": "a"} for row in range(3)]
    table = score_table([1.5, 1.2, 1.1], id=[row["id"] for row in data])
    _, scores, embeddings = make_scored(tmp_path, data, table, np.eye(3))
    files = ("--scores", scores, "--embeddings", embeddings, "--clusters", 1, "--output", tmp_path / "out.jsonl")
    code, _, err = codeact("select", *files)
    assert (code, err.count("\n")) == (2, 1)
    assert "can be chosen by strategy cdas (3 ifd_at_least_1); choose by another --strategy or --difficulty" in err


def test_a_forecast_knows_about_how_many_rows_a_budget_is():
    assert SelectSettings().rows_of(100, 50.0) == 40
    assert SelectSettings(budget_rows=7).rows_of(100, 50.0) == 7
    assert SelectSettings(budget_rows=700).rows_of(100, 50.0) == 100
    assert SelectSettings(budget_tokens=1_000).rows_of(100, 50.0) == 20


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture
def scored(tmp_path):
    rng = np.random.default_rng(5)
    data = [{"id": f"r{row}", "instruction": f"q{row // 2}", "output": f"a{row}"} for row in range(40)]
    vectors = rng.normal(size=(40, 6))
    cond = rng.uniform(0.1, 2, 40)
    columns = {"id": [row["id"] for row in data], "answer_tokens": rng.integers(5, 60, 40), "cond_nll_sum": cond}
    return make_scored(tmp_path, data, score_table(np.exp(cond - 1.5), uncond_nll_sum=[1.5] * 40, **columns), vectors)


def test_the_command_takes_them_all_and_the_audit_says_why(scored, tmp_path, codeact):
    _, scores, embeddings = scored
    output = tmp_path / "out.jsonl"
    common = ("select", "--scores", scores, "--embeddings", embeddings, "--clusters", 3, "--output", output)
    for strategy in ("cdas", "top_ifd", "random", "longest", "facility_location"):
        code, out, err = codeact(*common, "--strategy", strategy, "--budget-tokens", 300)
        assert (code, err) == (0, "")
        assert f"{strategy}, at most 300 tokens, protocol exact" in out
        assert "Spearman(ifd, answer tokens)" in out
    code, out, _ = codeact(
        *common, "--per-question", "best_fit", "--difficulty", "loss", "--easiest", "--budget-rows", 10
    )
    assert code == 0
    assert "10 rows (cdas by loss, easiest first, best_fit of a question, protocol exact)" in out
    chosen = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    audit = pq.read_table(tmp_path / "out.rows.parquet")
    assert audit.schema.metadata[b"length"].decode() in out
    rows = audit.to_pylist()
    assert [row["id"] for row in rows if row["chosen"]] == chosen
    assert [row["reason"] for row in rows].count("same_question") == 20
    assert [row["reason"] for row in rows].count("below_budget") == 10
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        lost = max(one, other, key=lambda row: row["score"])  # the loss: the likelier answer of a question stays
        assert lost["reason"] == "same_question"


def test_a_data_card_says_what_was_chosen_of_what(scored, tmp_path, codeact):
    _, scores, embeddings = scored
    output = tmp_path / "out" / "chosen.jsonl"
    common = ("select", "--scores", scores, "--embeddings", embeddings, "--clusters", 3, "--output", output)
    assert codeact(*common, "--budget-rows", 10, "--seed", 7)[0] == 0
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "task_categories": ["text-generation"],
        "size_categories": ["n<1K"],
        "tags": ["codeact", "instruction-tuning", "data-selection"],
        "configs": [{"config_name": "default", "data_files": "chosen.jsonl"}],
    }
    assert "10 of 40 rows of" in card.text
    assert yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0]) == {
        "strategy": "cdas", "budget_rows": 10, "clusters": 3, "seed": 7,
    }  # fmt: skip
    below = pq.read_table(tmp_path / "out" / "chosen.rows.parquet")["reason"].to_pylist().count("below_budget")
    assert f"| not chosen: below_budget | {below} |" in card.text
    assert str(tmp_path) not in card.text

    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    assert codeact(*common, "--budget-rows", 10)[0] == 0
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine\n"


def test_the_ledger_counts_every_reason_and_failed_scores_of_the_papers_protocol(scored, tmp_path, codeact):
    _, scores, embeddings = scored
    table = ScoreFolder.open(scores).read()
    failed = np.arange(40) % 8 == 0
    status = np.where(failed, "prompt_too_long", "ok").tolist()
    table = table.set_column(2, "status", pa.array(status)).set_column(11, "ifd", pa.array(table["ifd"], mask=failed))
    pq.write_table(table.cast(SCHEMA), scores / "scores.parquet")
    for more in ((), ("--per-question", "first"), ("--budget-tokens", 20), ("--protocol", "paper", "--ratio", 1)):
        output = tmp_path / "selected.jsonl"
        arguments = ("--scores", scores, "--embeddings", embeddings, "--clusters", 3, "--output", output)
        code, _, err = codeact("select", *arguments, *more)
        assert code == 0, err
        (entry,) = Select().account(tmp_path)
        assert Ledger(entries=(entry,)).complaints() == []
        assert entry.rows_in == 35
        reasons = {change.reason for change in entry.lost}
        assert ("same_question" in reasons) == ("first" in more)
        assert ("longer_than_budget" in reasons) == (20 in more)
        assert [change.reason for change in entry.added] == (["failed_score_chosen"] if "paper" in more else [])


def test_selective_ifd_comes_from_the_kept_losses(scored, tmp_path, codeact):
    _, scores, embeddings = scored
    move = np.linspace(-3, 0.5, 40)  # one scored token a row; half of the moves are below 1.3, and count for nothing
    folder = ScoreFolder.open(scores)
    write_losses(folder.path(0), np.stack([4 + move, np.full(40, 4.0)]).astype(np.float16))
    files = ("--scores", scores, "--embeddings", embeddings, "--output", tmp_path / "out.jsonl")
    code, out, _ = codeact("select", *files, "--strategy", "top_ifd", "--difficulty", "s_ifd", "--budget-rows", 30)
    assert code == 0
    assert "top_ifd by s_ifd" in out
    rows = pq.read_table(tmp_path / "out.rows.parquet").to_pylist()
    moved = np.abs(move) > np.sort(np.abs(move))[19]
    assert [row["chosen"] for row in rows] == moved.tolist()
    assert rows[0]["score"] == pytest.approx(np.exp(-3))
    assert rows[39]["reason"] == "s_ifd_at_least_1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strategy", "longst"), "--strategy 'longst'"),
        (("--difficulty", "s_ifd"), "difficulty s_ifd needs"),
        (("--budget-tokens", 2), "a budget of 2 tokens is below the shortest row that may be chosen, row"),
        (("--budget-tokens", 900, "--budget-rows", 2), "are 2 budgets; say one of them"),
        (
            ("--clusters", 41),
            "k must be a whole number from 1 to the number of vectors (40), not 41; change --clusters",
        ),
        (("--protocol", "paper", "--strategy", "facility_location"), "the paper's script knows no --strategy facility"),
        (("--ratio", 0.001), "0.001 of 40 rows is no row; raise --ratio"),
        (("--format", "sharegtp", "--clusters", 41), "format 'sharegtp' is unknown; choose one of: sharegpt"),
    ],
)
def test_the_command_refuses_in_one_line(scored, tmp_path, codeact, arguments, message):
    _, scores, embeddings = scored
    code, _, err = codeact(
        "select", "--scores", scores, "--embeddings", embeddings, "--output", tmp_path / "o", *arguments
    )
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "o").exists()
