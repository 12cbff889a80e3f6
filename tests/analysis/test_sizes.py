import json

import numpy as np
import pandas as pd
import pytest

from analysis import sizes
from analysis.compare import compare
from analysis.page.chapters import overview
from analysis.report import CHAPTERS
from analysis.runs import load_runs
from tests.analysis.fabricate import write_run

PARTS = (0.05, 0.1, 0.25, 0.5, 1.0)
POOL = 4000
STEEP = [1 - 0.05 * part**-0.7 for part in PARTS]  # 59 to 95 %
FLAT = [1 - 0.15 * part**-0.2 for part in PARTS]  # 73 to 85 %


def write_sized(workdir, model, seed, part, accuracy, variant="", **options):
    """A run on a part of 4,000 training images."""
    variant = ", ".join(filter(None, [variant, f"train_fraction={part:g}"]))
    folder = write_run(workdir, model, seed, round(accuracy, 3), variant, **options)
    config = json.loads((folder / "config.json").read_text())
    config["data"] |= {"train_fraction": part} | ({"train_seed": seed} if part < 1 else {})
    (folder / "config.json").write_text(json.dumps(config))
    dataset = json.loads((folder / "dataset.json").read_text())
    names = dataset["class_names"]
    dataset["counts"]["train"] = dict.fromkeys(names, int(part * POOL / len(names)))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


def write_curve(workdir, model, accuracies, seeds=(11, 12, 13), count=1200, **options):
    for part, accuracy in zip(PARTS, accuracies, strict=True):
        for seed in seeds:
            write_sized(workdir, model, seed, part, accuracy, count=count, **options)


def compared(workdir):
    (workdir / "report").mkdir(exist_ok=True)
    return compare(workdir, load_runs(workdir))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    write_curve(folder, "steep", STEEP)
    write_curve(folder, "flat", FLAT)
    write_sized(folder, "steep", 4, 0.05, 0.5, status="failed")
    return folder


@pytest.fixture(scope="module")
def section(workdir):
    return sizes.sizes_section(compared(workdir))


def test_only_runs_on_the_most_images_are_compared(workdir):
    comparison = compared(workdir)
    assert list(comparison.groups) == ["steep (train_fraction=1)", "flat (train_fraction=1)"]
    assert comparison.recommendation.use == "steep (train_fraction=1)"
    assert len(comparison.smaller) == 24 and len(comparison.runs) == 6
    assert not any("no seed is complete" in text for text in comparison.recommendation.warnings)
    text = str(comparison.recommendation)
    assert "0.5" not in text.replace("0.5 points", "")


def test_the_sentence_of_the_project_leader(section, workdir):
    steep, flat, guess, check = section.text
    assert check.startswith("Fitted without the largest size, the law missed it by ")
    assert check.count("(within its interval)") == 2
    assert steep.startswith(
        "Twice the training images, 8,000 instead of 4,000, would bring steep 1"
    )
    assert "would bring flat 1" in flat or "would bring flat 2" in flat
    assert guess == "What more than twice the images would bring is a guess."
    fits = pd.read_csv(workdir / "report" / "sizes_fits.csv").set_index("model")
    for name, rest, exponent in (("steep", 0.05, 0.7), ("flat", 0.15, 0.2)):
        row, gain = fits.loc[name], rest * (1 - 2**-exponent)
        assert row.gain_ci95_low < gain < row.gain_ci95_high
        assert row.twice_ci95_low < 1 - rest + gain < row.twice_ci95_high
        assert row.held and row.predicted_ci95_low < row.measured < row.predicted_ci95_high
        assert row.images == POOL and row.seeds == 3 and row.sizes == 5
    assert section.finding.startswith("Twice the training images would bring steep ")
    assert section.finding.count(". ") == 0 and section.finding.endswith(".")
    assert [row[0] for row in section.tables[0].rows] == ["steep", "flat"]
    assert all(row[-1].endswith(", within") for row in section.tables[0].rows)


def test_points_have_intervals_and_their_numbers_of_images(section, workdir):
    points = pd.read_csv(workdir / "report" / "sizes.csv")
    assert points.images.tolist() == [200, 400, 1000, 2000, 4000] * 2
    assert (points.ci95_low < points.score).all() and (points.score < points.ci95_high).all()
    assert points.score.to_numpy() == pytest.approx([*STEEP, *FLAT], abs=0.03)
    assert points.fitted.all() and (points.seeds == 3).all()
    assert (workdir / "report" / section.pictures[0].file).stat().st_size > 5000


def test_the_size_at_which_ranks_change_is_named(section, workdir):
    truth = POOL * (0.05 / 0.15) ** 2  # 444
    assert section.tables[1].rows[0][:3] == ["flat", "steep", "400 and 1,000"]
    assert float(section.tables[1].rows[0][3]) == pytest.approx(truth, rel=0.35)
    assert section.tables[1].rows[0][4] == "yes"
    assert "steep overtakes flat between 400 and 1,000 training images" in section.finding


def test_a_change_within_the_noise_is_not_established(tmp_path):
    write_curve(tmp_path, "a", [0.70, 0.75, 0.80, 0.83, 0.87])
    write_curve(tmp_path, "b", [0.72, 0.76, 0.80, 0.82, 0.86], seeds=(21, 22, 23))
    section = sizes.sizes_section(compared(tmp_path))
    assert section.finding.endswith("no change of rank is established.")
    assert all(row[-1] == "no" for table in section.tables[1:] for row in table.rows)


def test_a_curve_that_the_smaller_sizes_did_not_foresee_is_a_warning(tmp_path):
    write_curve(tmp_path, "cnn", [*STEEP[:4], STEEP[1]])
    section = sizes.sizes_section(compared(tmp_path))
    assert len(section.warnings) == 1 and "do not trust its extrapolation" in section.warnings[0]
    assert section.tables[0].rows[0][-1].endswith(", outside")


def test_too_few_sizes_and_sizes_at_chance_have_no_law(tmp_path):
    write_curve(tmp_path, "cnn", [0.0, 0.02, 0.05, 0.8, 0.9])
    section = sizes.sizes_section(compared(tmp_path))
    assert section.text == [
        "No law is fitted to cnn: it takes 3 sizes that share a seed, each established to be "
        "better than the most frequent class."
    ]
    assert section.finding == "1 model at several sizes; too few for a law." and not section.tables
    assert [row[-1] for row in section.details[0].table.rows] == ["no"] * 3 + ["yes"] * 2


def test_variants_have_curves_of_their_own_and_lost_seeds_are_left_out(tmp_path):
    write_curve(tmp_path, "cnn", STEEP, variant="epochs=5")
    write_curve(tmp_path, "cnn", FLAT, variant="epochs=9")
    write_sized(tmp_path, "cnn", 7, 0.1, 0.5, variant="epochs=9", count=1200)
    comparison = compared(tmp_path)
    curves = {c.kind: c for c in sizes.make_curves(comparison, sizes.families(comparison))}
    assert set(curves) == {"cnn (epochs=5)", "cnn (epochs=9)"}
    assert curves["cnn (epochs=9)"].points.seeds == 3
    assert curves["cnn (epochs=9)"].table.seeds.tolist() == [3, 4, 3, 3, 3]


def test_seeds_of_a_model_without_randomness_differ_on_parts(tmp_path):
    """Their training images do: so their scatter counts, but not that of the whole."""
    for part in PARTS:
        for seed in (0, 1):
            write_sized(tmp_path, "knn", seed, part, 0.8)
    of = sizes.families(compared(tmp_path))
    assert [bool(family.freedom) for _, family in of.values()] == [True] * 4 + [False]


def test_one_size_has_no_chapter_and_the_overview_points_to_it(tmp_path, workdir):
    write_run(tmp_path, "cnn", 0)
    assert sizes.sizes_section(compared(tmp_path)) is None
    assert [c.make for c in CHAPTERS if c.title == "Data size"] == [sizes.sizes_section]
    text = overview(compared(workdir)).text[0]
    assert text.startswith("Compared are the runs on 100 % of the training images, the most")


def test_a_model_also_trained_without_the_sweep_counts_once(tmp_path):
    write_curve(tmp_path, "cnn", STEEP)
    for seed in (11, 12, 13):
        write_run(tmp_path, "cnn", seed, 0.95, count=1200)
    (curve,) = sizes.make_curves(compared(tmp_path), sizes.families(compared(tmp_path)))
    assert curve.table.seeds.tolist() == [3] * 5


def test_fewer_than_all_images_can_be_the_most(tmp_path):
    for part in PARTS[:4]:
        write_sized(tmp_path, "cnn", 0, part, 0.8)
    comparison = compared(tmp_path)
    assert list(comparison.groups) == ["cnn (train_fraction=0.5)"]
    curve = sizes.make_curves(comparison, sizes.families(comparison))[0]
    assert curve.points.pool == POOL and np.diff(curve.points.sizes).min() > 0
