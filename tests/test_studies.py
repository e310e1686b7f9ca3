"""Studies: files, cells, evidence, statistics and the ledger's rules."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from vramlab.regimes.sharded import weights_hash
from vramlab.studies import STUDIES, claims, measurements, runner
from vramlab.studies import estimates as evidence
from vramlab.studies import run_all as batch
from vramlab.studies.claims import NOT_REPRODUCED, REPRODUCED, UNTESTED, Claim, decide
from vramlab.studies.estimates import Figure, NotRun, by_seed, corrected, ratio_by_seed, two_level
from vramlab.studies.gallery import read_figures
from vramlab.studies.plan import PARAMS, StudyCell, read_plan
from vramlab.studies.records import Records
from vramlab.studies.study import Lab

SMOKE = {
    "recipe": "smoke",
    "steps": 3,
    "train_items": 40,
    "val_items": 20,
    "test_items": 20,
    "measure": False,
    "batch_size": 2,
    "max_length": 128,
    "threads": 1,
}


def _file(tmp_path, **changes):
    said = {
        "name": "lomo",
        "says": "a test",
        "module": "notebooks/studies/lomo.py",
        "defaults": SMOKE,
        "pairs": {
            "lomo against full": {
                "arm": "quality",
                "one": {"regime": "lomo"},
                "other": {"regime": "full"},
                "equal": "tokens",
            }
        },
        "runs": {
            "quality": {
                "grid": {
                    "with": [{"regime": "full"}, {"regime": "lomo", "lr": 0.1}],
                    "seed": [0, 1],
                }
            },
            "again": {"grid": {"regime": ["full"], "seed": [1]}},
            "bytes": {
                "call": "vramlab.studies.measurements:predicted",
                "defaults": {"model": "tiny", "seq": 64},
                "grid": {"regime": ["full", "lomo"]},
            },
        },
        **changes,
    }
    path = tmp_path / "small.yml"
    path.write_text(yaml.safe_dump(said, sort_keys=False))
    return path


def test_plan_has_every_combination_once(tmp_path):
    plan = read_plan(_file(tmp_path))
    assert [cell.params.get("lr") for cell in plan.arms["quality"]] == [None, None, 0.1, 0.1]
    assert "with" not in plan.arms["quality"][0].params
    assert plan.arms["bytes"][0].params == {"model": "tiny", "seq": 64, "regime": "full"}
    assert len(plan.every_cell()) == 7  # full at seed 1 stands in two arms


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"speed": 1}, "may have name"),
        ({"runs": {"a": {"grid": {"seed": []}}}, "pairs": {}}, "give a list"),
        ({"runs": {"a": {"grid": {"stepps": [1]}}}, "pairs": {}}, "unknown parameter 'stepps'"),
        ({"pairs": {"x": {"arm": "nowhere", "one": {}, "other": {}, "equal": "tokens"}}}, "no arm"),
    ],
)
def test_plan_refuses(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        read_plan(_file(tmp_path, **changes))


def test_records_from_runs_and_from_the_gallery_agree(tmp_path):
    plan = read_plan(_file(tmp_path))
    # a failing cell says so, and does not stop the others
    broken = StudyCell(
        "bytes",
        {"model": "tiny", "seq": 64, "regime": "lomo", "axes": {"acts": "nothing"}},
        "vramlab.studies.measurements:predicted",
    )
    assert "acts is 'nothing': use one of keep" in runner.run_cell((tmp_path / "runs", broken))
    assert [runner.run_cell((tmp_path / "runs", cell)) for cell in plan.every_cell()] == [""] * 7
    assert runner.due([(tmp_path / "runs", cell) for cell in [*plan.every_cell(), broken]]) == [
        (tmp_path / "runs", broken)
    ]
    made = Records.of(plan, tmp_path / "runs")
    made.write(tmp_path / "gallery")
    for records in (made, Records.read(tmp_path / "gallery")):
        full, lomo = (records.select("quality", regime=name) for name in ("full", "lomo"))
        assert list(full["seed"]) == [0, 1] and set(records.tables["bytes"]["regime"]) == {
            "full",
            "lomo",
        }
        assert full["weights_hash"].nunique() == 2 and set(full["weights_hash"]).isdisjoint(
            lomo["weights_hash"]
        )
        right, labels = records.right(full, "news", "none", "yesno")
        assert right.shape == (2, 20)
        for row, run in zip(right, full["run_id"], strict=True):  # noqa: B007  as `statistics.summarise` counted them
            wanted = records.accuracy.query(
                "run_id == @run and domain == 'news' and shift == 'none' and scoring == 'yesno' "
                "and metric == 'balanced_accuracy'"
            )["value"].item()
            assert np.isclose((row[labels == 1].mean() + row[labels == 0].mean()) / 2, wanted)
        assert records.difference(full, full, "news", "tokens").value == 0
        assert len(records.steps.query("run_id == @run")) == 3
    with pytest.raises(NotRun, match="adam"):
        made.select("quality", regime="adam")


def test_a_forecasts_flops_are_told_by_phase():
    row = measurements.predicted("tiny", "full", 32, axes={"acts": "checkpoint"}).iloc[0]
    flops = json.loads(row["phase_flops"])
    assert sum(flops.values()) == row["flops"] and 0 < flops["recompute"] < flops["forward"]


def test_same_weights_have_the_same_hash():
    model = torch.nn.Linear(3, 2).bfloat16()
    before = weights_hash(model)
    assert before == weights_hash(model)
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert before != weights_hash(model)


def test_two_level_holds_both_variances():
    """Against the variance that the model of the data has: seeds' means vary with sd .03, items are
    Bernoulli."""
    rng, spreads, errors = np.random.default_rng(0), [], []
    labels = np.repeat([0, 1], 500)
    for _ in range(40):
        means = rng.normal(0.7, 0.03, size=5)
        figure = two_level(rng.random((5, 1000)) < means[:, None], labels)
        spreads.append((figure.high - figure.low) / 2 / stats.t.ppf(0.975, 4))
        errors.append(figure.value - 0.7)
    # seeds: .03² / 5, and of items the part that differs between seeds
    expected = math.sqrt(0.03**2 / 5 + 0.7 * 0.3 / 5000)
    assert np.mean(spreads) == pytest.approx(expected, rel=0.15) and np.std(
        errors
    ) == pytest.approx(expected, rel=0.3)


def test_two_level_of_a_constant_shift_is_certain_about_seeds_only():
    labels = np.repeat([0, 1], 50)
    one = np.tile(np.arange(100) % 2 == 0, (5, 1))
    same = two_level(one, labels, one)
    assert (same.value, same.low, same.high, same.p) == (
        0,
        0,
        0,
        1,
    ) and same.contains == evidence.BOTH
    assert two_level(one[:1], labels).contains == evidence.ITEMS
    with pytest.raises(ValueError, match="label 0"):
        two_level(one, np.ones(100))


def test_by_seed_is_students_paired_t():
    one, other = [1.0, 1.2, 0.9, 1.4, 1.1], [0.8, 1.1, 0.95, 1.0, 1.0]
    found, oracle = by_seed(one, other), stats.ttest_rel(one, other)
    interval = oracle.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx(
        (oracle.pvalue, interval.low, interval.high)
    )
    assert ratio_by_seed([2.0, 4.0], [1.0, 2.0]).value == pytest.approx(2.0)
    assert not math.isfinite(by_seed([1.0]).low)


@pytest.mark.parametrize(
    "figure, rule, word",
    [
        (
            Figure(0.1, "learned", low=0.05, high=0.15, seeds=5, n=1000),
            {"above": {"figure": "x"}},
            REPRODUCED,
        ),
        (
            Figure(0.1, "learned", low=0.05, high=0.15, seeds=5, n=1000, p=0.01, p_holm=0.2),
            {"above": {"figure": "x"}},
            UNTESTED,
        ),
        (
            Figure(0.1, "learned", low=-0.05, high=0.15, seeds=5, n=1000),
            {"above": {"figure": "x"}},
            UNTESTED,
        ),
        (
            Figure(-0.1, "learned", low=-0.15, high=-0.05, seeds=5, n=1000),
            {"above": {"figure": "x"}},
            NOT_REPRODUCED,
        ),
        (
            Figure(0.1, "learned", low=0.05, high=0.15, seeds=1, n=1000),
            {"above": {"figure": "x"}},
            UNTESTED,
        ),
        (
            Figure(0.1, "learned", low=0.05, high=0.15, seeds=5, n=500),
            {"above": {"figure": "x"}},
            UNTESTED,
        ),
        (Figure(13.5, "predicted"), {"at_most": {"figure": "x", "bound": 13.72}}, REPRODUCED),
        (
            Figure(13.5, "predicted"),
            {"within": {"figure": "x", "low": 14, "high": 15}},
            NOT_REPRODUCED,
        ),
        (Figure(0.0, "learned", seeds=5), {"equal": {"figure": "x", "to": 0}}, REPRODUCED),
        (Figure(math.nan, "predicted"), {"at_most": {"figure": "x", "bound": 1}}, UNTESTED),
        (Figure(1.0, "predicted"), {"untestable": "no GPU"}, UNTESTED),
        (None, {"above": {"figure": "x"}}, UNTESTED),
    ],
)
def test_rules(figure, rule, word):
    claim = Claim("c", "lomo", "s", "w", "m", [rule])
    verdict = decide(claim, {"x": figure} if figure else {})
    assert verdict.word == word and verdict.why
    assert claims.table([verdict])["verdict"].item() == word


def test_a_claim_fails_if_one_condition_fails_and_never_by_one_seed():
    yes, no, open_ = ({"at_most": {"figure": name, "bound": 1}} for name in ("yes", "no", "open"))
    figures = {
        "yes": Figure(0, "predicted"),
        "no": Figure(2, "predicted"),
        "open": Figure(0, "learned", seeds=1),
    }
    rules = [yes, no, open_], [yes, open_], [yes, yes]
    words = [decide(Claim("c", "lomo", "s", "w", "m", rule), figures).word for rule in rules]
    assert words == [NOT_REPRODUCED, UNTESTED, REPRODUCED]
    with pytest.raises(ValueError, match="unknown condition"):
        Claim("c", "lomo", "s", "w", "m", [{"maybe": "x"}])


def test_holm_is_over_the_family():
    found = corrected(
        {
            "a": Figure(1, "learned", p=0.01),
            "b": Figure(1, "learned", p=0.04),
            "c": Figure(1, "learned"),
        }
    )
    assert found["a"].p_holm == 0.02 and found["b"].p_holm == 0.04 and math.isnan(found["c"].p_holm)


def test_a_line_for_each_cell_that_failed_and_none_for_the_others(tmp_path, monkeypatch, capsys):
    cells = [(tmp_path / "lomo", StudyCell("bytes", {"seq": seq}, "m:f")) for seq in range(3)]
    ended = list(
        zip(cells, ("", "ValueError: no", None), ("", "", "its process was killed"), strict=True)
    )
    monkeypatch.setattr(
        runner, "side_by_side", lambda _, asked, jobs: [one for one in ended if one[0] in asked]
    )
    lines = [
        f"lomo, bytes, {cells[1][1].name}: ValueError: no",
        f"lomo, bytes, {cells[2][1].name}: its process was killed",
    ]
    assert (
        runner.make(cells, jobs=2, progress=False) == lines
        and capsys.readouterr().err.splitlines() == lines
    )


@pytest.mark.slow
def test_what_is_timed_comes_last_with_nothing_beside_it(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        runner,
        "side_by_side",
        lambda _, asked, jobs: seen.append(([cell.arm for _, cell in asked], jobs)) or (),
    )
    plan = read_plan("lomo")
    runner.make(
        [(tmp_path, cell) for cell in plan.every_cell() if cell.call], jobs=2, progress=False
    )
    (shared, many), alone = seen
    assert (
        alone == (["seconds"], 1) and many == 2 and "seconds" not in shared and "loaded" in shared
    )
    timed = {
        cell.call.rpartition(":")[2]
        for study in STUDIES
        for cell in read_plan(study).every_cell()
        if cell.alone
    }
    assert timed == {"timed", "cost"}


@pytest.fixture
def small_lomo(tmp_path):
    """The study of LOMO with two values of each grid, runs of seconds and no measurements."""
    said = yaml.safe_load((PARAMS / "lomo.yml").read_text())
    arms = {name: arm for name, arm in said["runs"].items() if "call" not in arm}
    for arm in arms.values():
        arm["grid"] = {axis: values[:2] for axis, values in arm["grid"].items()}
        arm["defaults"] = {**arm.get("defaults", {}), **SMOKE}
    path = tmp_path / "lomo.yml"
    path.write_text(yaml.safe_dump({**said, "runs": arms, "pairs": {}}, sort_keys=False))
    return path


@pytest.mark.slow
def test_a_study_goes_from_its_file_to_the_gallery_and_a_second_time_runs_nothing(
    small_lomo, tmp_path
):
    (first,) = batch.run([small_lomo], tmp_path / "out", tmp_path / "gallery", jobs=1, quiet=True)
    assert not first["failed"] and not first["reason"] and first["due"] == first["cells"]
    assert {row["verdict"] for row in first["verdicts"]} == {
        UNTESTED
    }  # two seeds and few items decide nothing
    assert (
        Lab.committed(small_lomo, tmp_path / "gallery").figures.keys()
        == read_figures(tmp_path / "gallery" / "lomo").keys()
    )
    (again,) = batch.run([small_lomo], tmp_path / "out", dry_run=True)
    assert again["due"] == 0
