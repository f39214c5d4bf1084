"""The pictures of runs and sweeps: they say what they are of, bars are standard errors, and nothing covers anything else."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from haq.reporting import pictures
from haq.store.records import FinishedSweepRecord, PolicyRecord, ProblemRecord, SweepRecord
from tests.reporting.judged_runs import DICE, PSNR, write_sweep
from tests.reporting.written_runs import change, write_run, write_wide_run
from tests.store.test_records import sweep as one_search

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEEP = tuple(f"features.{i}.conv.{part}" for i in range(18) for part in ("expand", "depthwise", "project"))
LONG = ("stem", "encoder.layers.encoder_layer_11.self_attention.scaled_dot_product.values_and_probabilities")


def policy_picture(run: Path) -> Figure:
    return pictures.draw_policy(ProblemRecord.read(run / "problem.json"), PolicyRecord.read(run / "policy.json"))


def sweep_picture(content: dict[str, Any]) -> Figure:
    sweep = SweepRecord.from_dict(content)
    assert isinstance(sweep, FinishedSweepRecord)
    return pictures.draw_sweep(sweep)


def written_sweep(folder: Path, judged: Any = DICE) -> dict[str, Any]:
    content = json.loads((write_sweep(folder, judged) / "sweep.json").read_text())
    assert isinstance(content, dict)
    return content


def texts(figure: Figure) -> Iterator[Any]:
    """All texts that are seen: an axis has labels beyond its ends, too, which aren't."""
    from matplotlib.text import Text

    beyond = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            beyond |= {
                label for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high for label in (tick.label1,)
            }
    for text in figure.findobj(Text):
        if text not in beyond and text.get_visible() and text.get_text().strip():
            yield text


def check_room(figure: Figure) -> None:
    """Nothing is cut off, and no text covers another one."""
    figure.canvas.draw()
    whole = figure.bbox
    boxes = []
    for text in texts(figure):
        box = text.get_window_extent()
        assert whole.x0 - 1 <= box.x0 <= box.x1 <= whole.x1 + 1, text
        assert whole.y0 - 1 <= box.y0 <= box.y1 <= whole.y1 + 1, text
        boxes.append((text.get_text(), box))
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        width = min(first.x1, second.x1) - max(first.x0, second.x0)
        height = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert min(width, height) <= 1.5, (one, other)


@pytest.mark.parametrize("layers", [("stem", "body", "head"), DEEP, LONG], ids=["few", "many", "long"])
def test_a_policy_says_what_it_is_of_and_has_room(layers: tuple[str, ...], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", layers=layers)
    long = "a data set with a long name, as folders of photographs have them, in a folder of a folder (files): 10 classes"
    change(run / "problem.json", network="mobilenet-mini", data=long)
    figure = policy_picture(run)
    problem = ProblemRecord.read(run / "problem.json")
    title = " ".join(figure.get_suptitle().split())
    assert title.startswith(f"mobilenet-mini on {long.partition(' (')[0]}, judged by accuracy on {problem.images:,} images")
    assert f"{problem.target.name}: " in title
    assert " of " in title
    assert "latency, " in title
    assert "(estimated)" in title
    check_room(figure)


def test_a_policy_has_no_error_bars(tmp_path: Path) -> None:
    from matplotlib.container import ErrorbarContainer

    figure = policy_picture(write_run(tmp_path / "run"))
    assert not any(isinstance(one, ErrorbarContainer) for axes in figure.axes for one in axes.containers)


def test_wide_bars_have_room_too(tmp_path: Path) -> None:
    check_room(policy_picture(write_wide_run(tmp_path / "run")))


def test_the_widest_picture_can_be_written() -> None:
    assert pictures.WIDEST * pictures.DPI < 2**16  # what matplotlib can do


def bars_of(figure: Figure, solver: str) -> list[float]:
    """Half the lengths of a solver's error bars on the first panel; none where there are no bars."""
    from matplotlib.container import ErrorbarContainer

    for one in figure.axes[0].containers:
        if isinstance(one, ErrorbarContainer) and one.get_label() == solver:
            if not one.has_yerr:
                return []
            segments = one[2][0].get_segments()
            return [(ends[1][1] - ends[0][1]) / 2 for ends in segments if len(ends)]
    raise AssertionError(f"{solver} is not drawn")


def test_the_bars_of_a_sweep_are_standard_errors_over_seeds(tmp_path: Path) -> None:
    figure = sweep_picture(written_sweep(tmp_path / "swept"))
    # Two seeds, 0.02 apart: a standard deviation of 0.01 * sqrt(2), of their mean 0.01; drawn in points.
    assert bars_of(figure, "ilp") == pytest.approx([1.0] * 3)
    assert "standard error of the mean over 2 seeds" in figure.get_suptitle()
    assert figure.get_suptitle().startswith("small on digits, judged by mIoU")
    check_room(figure)


def test_the_bars_of_single_runs_are_of_the_test_split() -> None:
    figure = sweep_picture(one_search(images={"test": 400, "search": 4}))
    assert bars_of(figure, "ilp") == pytest.approx([100 * math.sqrt(0.8 * 0.2 / 400)])
    assert "standard error of one run on 400 test images" in figure.get_suptitle()
    check_room(figure)


def test_what_has_no_known_error_has_no_bars(tmp_path: Path) -> None:
    content = written_sweep(tmp_path / "swept", PSNR)
    for target in content["targets"].values():
        for found in target["found"]:
            found["runs"] = found["runs"][:1]
    figure = sweep_picture(content)
    assert bars_of(figure, "ilp") == []
    assert "no standard error is known" in figure.get_suptitle()
    content["targets"]["edge"]["found"][0]["test_psnr_error"] = 0.25
    figure = sweep_picture(content)
    assert bars_of(figure, "ilp") == pytest.approx([0.25])
    assert "standard error of one run on 1,000 test images" in figure.get_suptitle()


def test_solvers_differ_in_more_than_colour(tmp_path: Path) -> None:
    figure = sweep_picture(written_sweep(tmp_path / "swept"))
    lines = {str(line.get_label()): line for axes in figure.axes[:1] for line in axes.lines}
    containers = {str(one.get_label()): one[0] for one in figure.axes[0].containers}
    seen = {(line.get_marker(), line.get_linestyle()) for line in containers.values()}
    assert len(seen) == len(containers) == 2
    assert "float" in lines
    greys = [
        sum(weight * int(color[i : i + 2], 16) for weight, i in ((0.3, 1), (0.59, 3), (0.11, 5)))
        for color in (pictures.BEFORE, pictures.AFTER)
    ]
    assert greys[0] - greys[1] > 60
