"""Reports: statistics against scipy and by hand, what is read from a folder, the table and the page."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from rlplugins.report import ReportError, load, write_html
from rlplugins.report.folder import Plan, PlannedCell, run_folder
from rlplugins.report.page import metric_groups
from rlplugins.report.results import read_metrics
from rlplugins.report.statistics import (
    Estimate,
    Series,
    area_under_curve,
    estimate,
    final_value,
    learning_curve,
    paired_difference,
)
from rlplugins.report.table import format_estimate


def series(*values, steps=None):
    return Series(np.array(steps or range(1, len(values) + 1), dtype=float), np.array(values, dtype=float))


def write_run(folder, rows, status="finished", config=None, **result):
    """The folder of one run."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config or {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if status == "finished":
        (folder / "result.json").write_text(json.dumps({"status": "finished", **result}))
    if status == "failed":
        (folder / "failure.json").write_text(json.dumps({"reason": "exit status 1", "exit_status": 1}))
        (folder / "log.txt").write_text("".join(f"line {number}\n" for number in range(100)) + "NaN reward\n")


def write_plan(folder, cells, seeds, metrics=(), baseline=None):
    """The plan of a study; a cell is a name, or a name with the reason for which it is refused."""
    planned = [PlannedCell(name=name, stack={"plugins": name.split("+")}, refused=why) for name, why in cells.items()]
    plan = Plan(
        name="arithmetic",
        trainer="local",
        baseline=baseline or next(iter(cells)),
        metrics=list(metrics),
        seeds=list(seeds),
        cells=planned,
    )
    folder.mkdir(exist_ok=True)
    plan.write(folder)


def rewards(*values, **more):
    return [{"step": step, "reward": value, **more} for step, value in enumerate(values, 1)]


@pytest.fixture
def study(tmp_path):
    """Two cells of three seeds, whose final rewards are 1, 2, 4 and 1.5, 3, 4.5; one refused cell."""
    folder = tmp_path / "study"
    write_plan(folder, {"grpo": None, "grpo+bapo": None, "spo+bnpo": "[claims] two owners"}, seeds=range(3))
    for name, finals in {"grpo": (1, 2, 4), "grpo+bapo": (1.5, 3, 4.5)}.items():
        for seed, final in enumerate(finals):
            write_run(run_folder(folder, name, seed), rewards(0, 0, final, entropy=0.5), seconds=12.5)
    return folder


def printed(results, width=200):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results.table())
    return console.export_text()


# Statistics

finite = st.floats(-1e3, 1e3)


@given(st.lists(finite, min_size=2, max_size=30))
def test_the_interval_is_students(values):
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95) if np.ptp(values) else (values[0], values[0])
    ours = estimate(values)
    assert ours.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert ours.mean - ours.half_width == pytest.approx(low, rel=1e-6, abs=1e-6)
    assert ours.mean + ours.half_width == pytest.approx(high, rel=1e-6, abs=1e-6)


def test_the_interval_by_hand():
    # t(0.975, 2) = 4.302653, s = 1, n = 3
    assert estimate([1, 2, 3]).half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_a_single_seed_has_no_interval():
    assert estimate([0.5]) == Estimate(0.5, None, 1)
    assert not estimate([0.5]).excludes_zero


def test_a_diverged_seed_is_not_hidden():
    assert np.isnan(estimate([0.5, float("nan"), 0.7]).mean)


@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=10))
def test_a_difference_is_paired_by_seed(pairs):
    ours = paired_difference(dict(enumerate(a for a, _ in pairs)), dict(enumerate(b for _, b in pairs)))
    assert ours == estimate([a - b for a, b in pairs])
    assert ours.count == len(pairs)


def test_pairing_takes_out_what_a_seed_does_to_both():
    base = {seed: float(seed**2) for seed in range(5)}
    better = {seed: value + 1 for seed, value in base.items()}
    assert paired_difference(better, base) == Estimate(1.0, 0.0, 5)
    assert not estimate([*better.values()]).half_width < 1


def test_only_common_seeds_are_compared():
    assert paired_difference({0: 5.0, 1: 7.0, 9: 100.0}, {1: 4.0, 0: 3.0, 2: -100.0}) == estimate([2.0, 3.0])
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_the_final_value_is_the_mean_of_the_last_tenth_of_the_steps():
    values = series(*range(100))
    assert final_value(values, values.steps) == np.mean(range(90, 100))
    assert final_value(series(1, 5), np.array([1.0, 2.0])) == 5


def test_the_final_value_of_what_is_recorded_now_and_then_is_the_last_one():
    assert final_value(series(0.1, 0.2, 0.3, steps=[20, 40, 60]), np.arange(1.0, 75.0)) == 0.3
    assert final_value(series(0.1, 0.2, 0.4, steps=[20, 95, 100]), np.arange(1.0, 101.0)) == pytest.approx(0.3)


def test_the_area_is_the_mean_height_of_the_curve():
    assert area_under_curve(series(0, 1, 1)) == 0.75
    assert area_under_curve(series(0, 1, 1, steps=[1, 2, 11])) == pytest.approx(9.5 / 10)
    assert area_under_curve(series(3)) == 3


def test_a_learning_curve_is_mean_and_interval_at_every_step():
    curve = learning_curve([series(1, 2, 3), series(3, 2, 7), series(5, 2, 2)])
    assert curve.steps.tolist() == [1, 2, 3]
    assert curve.mean.tolist() == [3, 2, 4]
    expected = [estimate(column).half_width for column in ([1, 3, 5], [2, 2, 2], [3, 7, 2])]
    assert curve.half_width == pytest.approx(expected)


def test_a_learning_curve_counts_the_seeds_that_reached_a_step():
    curve = learning_curve([series(1, 2, 3), series(3, 4)])
    assert curve.mean.tolist() == [2, 3, 3]
    assert np.isnan(curve.half_width).tolist() == [False, False, True]


def test_a_long_learning_curve_is_averaged_over_equal_spans():
    curve = learning_curve([series(*range(1000))], points=100)
    assert curve.mean == pytest.approx(np.arange(1000).reshape(100, 10).mean(1))
    assert curve.steps == pytest.approx(np.arange(1, 1001).reshape(100, 10).mean(1))


@pytest.mark.parametrize(
    ("given_estimate", "text"),
    [
        (Estimate(0.81234, 0.01432, 5), "0.812 ± 0.014"),
        (Estimate(0.81234, 0.00142, 5), "0.8123 ± 0.0014"),
        (Estimate(1234.4, 230.7, 5), "1234 ± 231"),
        (Estimate(0.81234, None, 1), "0.8123"),
        (Estimate(0.5, 0.0, 3), "0.5 ± 0"),
        (Estimate(1.23e-6, 1.2e-7, 3), "1.23e-06 ± 1.2e-07"),
        (Estimate(float("nan"), float("nan"), 3), "nan ± nan"),
        (None, "–"),
    ],
)
def test_numbers_are_written_to_the_digits_that_the_interval_supports(given_estimate, text):
    assert format_estimate(given_estimate) == text


def test_a_difference_has_a_sign():
    assert format_estimate(Estimate(0.03, 0.01, 3), sign=True) == "+0.030 ± 0.010"
    assert format_estimate(Estimate(-0.03, 0.01, 3), sign=True) == "-0.030 ± 0.010"


# Folders


def test_a_study_is_summarised_over_its_seeds(study):
    results = load(study)
    grpo, bapo, _ = results.cells
    summary = results.summary(bapo, "reward")
    assert summary.final == estimate([1.5, 3, 4.5])
    assert summary.difference == estimate([0.5, 1, 0.5])
    assert summary.area == estimate([1.5 / 4, 3 / 4, 4.5 / 4])
    assert summary.area_difference == estimate([0.5 / 4, 1 / 4, 0.5 / 4])
    assert results.summary(grpo, "reward").difference is None
    assert [run.seconds for run in results.runs] == [12.5] * 6


def test_what_is_not_a_number_is_left_out_and_a_step_counts_as_last_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        '{"step": 1, "reward": 0.5, "histogram": [1, 2], "note": "x", "nothing": null, "table": {"a": 1}}',
        '{"step": 2, "reward": 0.1}',
        '{"step": 2, "reward": 0.6, "solved": true}',
        '{"step": 2, "validation/reward": 0.9}',
        '{"reward": 7}',
        '{"step": 3, "rew',
    ]
    path.write_text("\n".join(rows))
    metrics, steps = read_metrics(path)
    assert {name: (s.steps.tolist(), s.values.tolist()) for name, s in metrics.items()} == {
        "reward": ([1, 2], [0.5, 0.6]),
        "solved": ([2], [1]),
        "validation/reward": ([2], [0.9]),
    }
    assert steps.tolist() == [1, 2]


def test_a_study_in_progress_tells_what_is_running_and_what_waits(study):
    folder = study.parent / "running"
    write_plan(folder, {"grpo": None, "spo": None}, seeds=range(3))
    write_run(run_folder(folder, "grpo", 0), rewards(1, 1))
    write_run(run_folder(folder, "grpo", 1), rewards(9), status="running")
    write_run(run_folder(folder, "spo", 0), rewards(4), status="running")
    results = load(folder)
    grpo, spo = results.cells
    assert [run.status for run in results.runs] == [
        "finished",
        "unfinished",
        "waiting",
        "unfinished",
        "waiting",
        "waiting",
    ]
    assert results.summary(grpo, "reward").final == Estimate(1.0, None, 1), "the unfinished run does not count yet"
    assert results.summary(spo, "reward").final == Estimate(4.0, None, 1), "there is no other yet"
    assert results.summary(spo, "reward").difference is None, "and it is not compared"
    assert "1/3, 1 unfinished" in printed(results)
    assert "have not finished" in printed(results)


def test_a_study_before_its_first_step_has_a_report(tmp_path):
    write_plan(tmp_path, {"grpo": None}, seeds=[0])
    assert "0/1" in printed(load(tmp_path))
    assert "grpo" in write_html(load(tmp_path), tmp_path / "report.html").read_text()


def test_a_failed_run_does_not_count_and_is_shown_with_the_end_of_its_log(study):
    bad = run_folder(study, "grpo", 3)
    write_plan(study, {"grpo": None, "grpo+bapo": None}, seeds=range(4))
    write_run(bad, rewards(1000), status="failed")
    results = load(study)
    assert results.summary(results.cells[0], "reward").final == estimate([1, 2, 4])
    [(cell, run)] = results.failed
    assert (cell.name, run.seed) == ("grpo", 3)
    assert run.failure.startswith("exit status 1\nline 81\n")
    assert run.failure.endswith("line 99\nNaN reward")
    assert "3/4, 1 failed" in printed(results)
    assert "NaN reward" in printed(results)


def test_the_folder_of_a_single_run_can_be_reported(tmp_path):
    write_run(tmp_path / "mine", rewards(0.5, 0.7), config={"stack": {"plugins": ["spo"]}, "seed": 3})
    results = load(tmp_path / "mine")
    [cell] = results.cells
    assert (cell.name, cell.stack, cell.runs[0].seed) == ("mine", {"plugins": ["spo"]}, 3)
    assert results.summary(cell, "reward").final == Estimate(0.7, None, 1)
    assert "vs" not in printed(results).split("Mean of")[0]
    assert "mine" in write_html(results, tmp_path / "report.html").read_text()


def test_a_folder_without_results_is_an_error_that_says_what_is_expected(tmp_path):
    with pytest.raises(ReportError, match=r"holds no study and no run: give the output folder of `rlplugins ablate`"):
        load(tmp_path)
    with pytest.raises(ReportError, match="is not a folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ReportError, match=r"plan\.json is not the plan of a study"):
        load(tmp_path)


# The table


def test_the_table_has_every_cell_and_the_reason_of_the_refused(study):
    text = printed(load(study))
    assert re.search(r"grpo +3/3 +2\.3 ± 3\.8 +– +0\.58 ± 0\.95 +0\.5 ± 0", text)
    assert re.search(r"grpo\+bapo +3/3 +3\.0 ± 3\.7 +\+0\.67 ± 0\.72", text)
    assert re.search(r"spo\+bnpo +refused", text)
    assert "[claims] two owners" in text


def test_metrics_that_do_not_fit_the_width_are_counted(study):
    assert "entropy" in printed(load(study), width=100)
    narrow = printed(load(study), width=60)
    assert "entropy" not in narrow
    assert "1 more of the metrics" in narrow
    assert max(map(len, narrow.splitlines())) <= 60


def test_a_study_chooses_the_metrics_of_its_table(study):
    write_plan(study, {"grpo": None, "grpo+bapo": None}, seeds=range(3), metrics=["entropy", "nowhere"])
    header = next(line for line in printed(load(study)).splitlines() if "stack" in line)
    assert header.split() == ["stack", "seeds", "entropy", "vs", "grpo", "area", "nowhere"]


def test_a_trainer_with_other_names_has_a_table_too(tmp_path):
    write_run(tmp_path / "run", [{"step": 1, "critic/score/mean": 0.25, "actor/kl": 1}])
    assert "critic/score/mean" in printed(load(tmp_path / "run"))


# The page


class Page(HTMLParser):
    """What a page loads and says."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.plots, self.text, self.scripts = [], [], [], {}
        self._script = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [value for name, value in attributes.items() if name in ("src", "href", "srcset", "action")]
        self.plots += [attributes["data-metric"]] if "data-metric" in attributes else []
        self._script = attributes.get("id", "") if tag == "script" else None
        assert tag not in ("link", "img", "iframe", "object", "base")

    def handle_data(self, data):
        if self._script is None:
            self.text.append(data)
        else:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def handle_endtag(self, tag):
        self._script = None

    @property
    def data(self):
        return json.loads(self.scripts["data"])


def page_of(folder):
    return Page(write_html(load(folder), folder / "report.html").read_text())


def test_the_page_loads_nothing_and_may_not(study):
    text = write_html(load(study), study / "report.html").read_text()
    assert Page(text).loads == []
    assert "default-src 'none'" in text
    assert "@import" not in text.split("</style>")[0]
    assert "url(" not in text.split("</style>")[0]
    assert text.count("plotly.js v") == 1


def test_the_page_has_every_cell_metric_refusal_and_run(study):
    page = page_of(study)
    words = " ".join(" ".join(page.text).split())
    assert page.plots == ["reward", "entropy"]
    for told in (
        "arithmetic",
        "grpo+bapo",
        "spo+bnpo",
        "[claims] two owners",
        "3.0 ± 3.7",
        "+0.67 ± 0.72",
        "grpo/seed-2",
    ):
        assert told in words
    assert set(page.data["curves"]["reward"]) == {"grpo", "grpo+bapo"}
    assert page.data["curves"]["reward"]["grpo"]["mean"] == [0, 0, pytest.approx(7 / 3, rel=1e-4)]
    assert page.data["curves"]["reward"]["grpo"]["half"][2] == pytest.approx(estimate([1, 2, 4]).half_width, rel=1e-4)


def test_names_and_logs_cannot_break_the_page(tmp_path):
    nasty = "</script><script>alert(1)</script>"
    write_plan(tmp_path, {"grpo": None, "x": nasty}, seeds=[0])
    write_run(run_folder(tmp_path, "grpo", 0), [{"step": 1, nasty: float("nan"), "reward": 1}])
    text = write_html(load(tmp_path), tmp_path / "report.html").read_text()
    assert "<script>alert" not in text
    assert Page(text).data["curves"][nasty]["grpo"]["mean"] == [None]


def test_every_curve_looks_different_and_the_baseline_keeps_its_colour(tmp_path):
    cells = {f"c{number}": None for number in range(20)}
    write_plan(tmp_path, cells, seeds=[0], baseline="c7")
    write_run(run_folder(tmp_path, "c0", 0), rewards(1))
    styles = page_of(tmp_path).data["styles"]
    assert len({tuple(style.values()) for style in styles.values()}) == 20
    assert styles["c7"] == {"colour": "#333333", "dash": "solid"}


def test_metrics_are_grouped_by_what_they_are_about():
    names = ["reward", "rlplugins/bapo/low", "validation/reward", "kl", "rlplugins/bapo/high", "rlplugins/d3s/kept"]
    groups = metric_groups([*names, "reward/max"], drawn_before=["reward"])
    assert [(group.title, group.metrics) for group in groups] == [
        ("Training", ["kl", "reward/max"]),
        ("Validation", ["validation/reward"]),
        ("Plugin bapo", ["rlplugins/bapo/low", "rlplugins/bapo/high"]),
        ("Plugin d3s", ["rlplugins/d3s/kept"]),
    ]


def test_the_page_of_a_large_study_stays_small(tmp_path):
    generator = np.random.default_rng(0)
    cells = {f"cell-{number}": None for number in range(8)}
    write_plan(tmp_path, cells, seeds=range(5))
    names = ["reward", "entropy", *(f"rlplugins/p{number // 7}/m{number}" for number in range(28))]
    for cell in cells:
        for seed in range(5):
            values = generator.normal(size=(300, len(names)))
            rows = [{"step": step, **dict(zip(names, row, strict=True))} for step, row in enumerate(values.tolist(), 1)]
            write_run(run_folder(tmp_path, cell, seed), rows)
    page = write_html(load(tmp_path), tmp_path / "report.html")
    assert page.stat().st_size < 6e6
    assert sorted(Page(page.read_text()).plots) == sorted(names)
