"""A row of a history is one class, which reads what it writes, to the last bit, and names what is wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haq.store import history
from haq.store.history import HEADER, HistoryRow

ROW = HistoryRow("ddpg", 1, (8, 4, 8), (8, 3, 8), 0.925, 0.1 + 0.2, 1.5e-5, True, None)
LINE = "ddpg,1,8-4-8,8-3-8,0.925,0.30000000000000004,1.5e-05,1,\n"
WIDTHS = st.lists(st.sampled_from([*range(1, 9), 16, 32]), min_size=1, max_size=20).map(tuple)
POSITIVE = st.floats(0, 1e30, exclude_max=True)


def test_a_line_is_what_it_was() -> None:
    assert HEADER == "solver,evaluation,weight_bits,activation_bits,accuracy,loss,cost,within_budget,divergence\n"
    assert ROW.line() == LINE
    assert HistoryRow.parse(LINE[:-1], 3) == ROW


@given(
    st.builds(
        HistoryRow,
        st.sampled_from(["ddpg", "sensitivity", "mine:Solver", "my-solver_2.0"]),
        st.integers(1, 999_999_999),
        WIDTHS,
        WIDTHS,
        st.floats(0, 1),
        st.floats(-1e-3, 1e30),
        POSITIVE,
        st.booleans(),
        st.none() | POSITIVE,
        st.just(()),
        st.none() | st.integers(1, 999_999_999),
        st.just(()),
    )
)
def test_rows_are_read_as_they_are_written(row: HistoryRow) -> None:
    again = HistoryRow.parse(row.line(True).removesuffix("\n"), tells_images=True)
    assert again == row
    assert again.line(True) == row.line(True)
    whole = row._replace(images=None)
    assert HistoryRow.parse(whole.line().removesuffix("\n")) == whole


@given(st.lists(st.floats(0, 1, exclude_min=True), min_size=1, max_size=9).map(tuple))
def test_shares_of_channels_are_read_as_they_are_written(keep: tuple[float, ...]) -> None:
    line = ROW._replace(keep=keep, images=3).line(True)
    again = HistoryRow.parse(line.removesuffix("\n"), tells_images=True, tells_keep=True, groups=len(keep))
    assert again.keep == keep
    assert again.line(True) == line


def test_a_history_tells_what_is_kept_of_channels_where_some_are_pruned(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    rows = [ROW._replace(keep=(1.0, 0.125)), ROW._replace(evaluation=2, keep=(0.5, 1.0), others=(40.0,))]
    rows[0] = rows[0]._replace(others=(50.0,))
    history.write(path, rows[:1], others=("storage",), tells_keep=True)
    history.append(path, rows[1])
    assert path.read_text().splitlines()[0] == f"{HEADER.strip()},keep,storage"
    assert path.read_text().splitlines()[1].endswith(",1,,1-0.125,50.0")
    assert history.read(path, 3, groups=2) == rows
    assert history.read(path) == rows
    for groups, sentence in ((0, "has a column 'keep', and no channels are pruned"), (3, "of 2 groups of channels, the")):
        with pytest.raises(ValueError, match=sentence):
            history.read(path, 3, groups=groups)
    for wrong in ("1-0", "1-2", "0-1", "1", "1-0.5-", "1e-1-1", ""):
        path.write_text(path.read_text().replace("1-0.125", wrong))
        with pytest.raises(ValueError, match=r"history.csv, line 2: keep (is|has|of)"):
            history.read(path, 3, groups=2)
        path.write_text(path.read_text().replace(f",1,,{wrong},50", ",1,,1-0.125,50"))
    history.write(path, [ROW])
    with pytest.raises(ValueError, match="has no column 'keep', and channels are pruned here"):
        history.read(path, 3, groups=2)


def test_rows_are_added_and_a_line_that_has_no_end_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    history.write(path)
    assert path.read_text() == HEADER
    history.append(path, ROW)
    history.append(path, ROW._replace(evaluation=2, divergence=0.5))
    with path.open("a") as file:
        file.write(LINE[:20])
    rows = history.read(path, 3)
    assert [(row.evaluation, row.divergence) for row in rows] == [(1, None), (2, 0.5)]
    history.write(path, rows)
    assert path.read_text() == HEADER + "".join(row.line() for row in rows)


def test_what_is_worth_nothing_has_an_infinite_loss(tmp_path: Path) -> None:
    row = ROW._replace(accuracy=0.0, loss=math.inf, divergence=math.inf)
    history.write(tmp_path / "history.csv", [row])
    assert history.read(tmp_path / "history.csv") == [row]


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("solver", "a b", "the solver is 'a b'"),
        ("evaluation", "0", "the evaluation is '0', not a number from 1"),
        ("weight_bits", "9-9-9", "the weight bits are '9-9-9', not widths, 1 to 8, 16 or float, such as"),
        ("activation_bits", "8-8", "activation bits of 2 layers, the network has 3"),
        ("accuracy", "1.5", "the accuracy is '1.5', not a number from 0 to 1"),
        ("loss", "nan", "the loss is 'nan', not a number from 0"),
        ("loss", "-inf", "the loss is '-inf', not a number from 0"),
        ("cost", "1e999", "the cost is '1e999', not a number from 0"),
        ("cost", "-inf", "the cost is '-inf', not a number from 0"),
        ("cost", "much", "the cost is 'much', not a number from 0"),
        ("within_budget", "yes", "within_budget is 'yes', not 0 or 1"),
        ("divergence", "-1", "the divergence is '-1', not a number from 0"),
    ],
)
def test_a_cell_that_is_wrong_is_named(column: str, value: str, sentence: str, tmp_path: Path) -> None:
    cells = dict(zip(history.COLUMNS, LINE[:-1].split(","), strict=True)) | {column: value}
    path = tmp_path / "history.csv"
    path.write_text(HEADER + LINE + ",".join(cells.values()) + "\n")
    with pytest.raises(ValueError, match="history.csv, line 3: ") as error:
        history.read(path, 3)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ([("a", 1), ("a", 1)], "line 3: evaluation 1 of a is there twice"),
        ([("a", 1), ("b", 1), ("a", 2), ("b", 1)], "line 5: evaluation 1 of b is there twice"),
        ([("a", 1), ("a", 3)], "line 3: evaluation 3 of a, where its evaluation 2 must be"),
        ([("a", 2)], "line 2: evaluation 2 of a, where its evaluation 1 must be"),
        ([("a", 1), ("b", 2)], "line 3: evaluation 2 of b, where its evaluation 1 must be"),
    ],
)
def test_each_solvers_evaluations_are_counted(numbers: list[tuple[str, int]], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    history.write(path, [ROW._replace(solver=solver, evaluation=number) for solver, number in numbers])
    with pytest.raises(ValueError, match=f"history.csv, {sentence}; put the file back"):
        history.read(path)
    right = [("sensitivity", 1), ("a", 1), ("sensitivity", 2), ("a", 2)]
    history.write(path, [ROW._replace(solver=solver, evaluation=number) for solver, number in right])
    assert [(row.solver, row.evaluation) for row in history.read(path)] == right


def test_better_rows_come_first() -> None:
    worse = ROW._replace(accuracy=0.9)
    cheaper = ROW._replace(cost=1e-6)
    smaller_loss = ROW._replace(loss=0.2)
    assert sorted([worse, ROW, cheaper, smaller_loss], key=lambda row: row.rank) == [smaller_loss, cheaper, ROW, worse]


def test_16_bits_and_float_are_words_and_further_costs_stand_behind(tmp_path: Path) -> None:
    row = ROW._replace(weight_bits=(8, 16, 32), activation_bits=(8, 32, 16), others=(4e4, math.inf))
    assert row.line() == "ddpg,1,8-16-float,8-float-16,0.925,0.30000000000000004,1.5e-05,1,,40000.0,inf\n"
    path = tmp_path / "history.csv"
    history.write(path, others=("storage", "peak_memory"))
    assert path.read_text() == HEADER[:-1] + ",storage,peak_memory\n"
    history.append(path, row)
    assert history.read(path, 3) == history.read(path, 3, others=("storage", "peak_memory")) == [row]


@pytest.mark.parametrize(
    ("header", "others", "sentence"),
    [
        (HEADER, ("storage",), "tells what policies cost in no further metric, where it is storage that is limited"),
        (HEADER[:-1] + ",storage\n", (), "in storage, where it is no further metric that is limited"),
        (HEADER[:-1] + ",bops,storage\n", ("storage", "bops"), "in bops and storage, where it is storage and bops"),
        (HEADER[:-1] + ",money\n", None, "has the columns solver,evaluation,weight_bits"),
        (HEADER[:-1] + ",storage,storage\n", None, "has the columns solver,evaluation,weight_bits"),
    ],
)
def test_a_history_of_other_budgets_is_refused(
    header: str, others: tuple[str, ...] | None, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "history.csv"
    path.write_text(header)
    with pytest.raises(ValueError, match=sentence):
        history.read(path, others=others)
    path.write_text(HEADER[:-1] + ",storage\n" + LINE[:-1] + ",-1\n")
    with pytest.raises(ValueError, match="line 2: the storage is '-1', not a number from 0"):
        history.read(path)
