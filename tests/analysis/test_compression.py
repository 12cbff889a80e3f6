"""The paired difference of a compressed model, and the chapter of the report."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from analysis import compression, report
from analysis.compare import compare
from analysis.compression import FILE, paired, speed_name, weights_digest
from analysis.runs import load_run, load_runs
from errors import UserError
from tests.analysis.fabricate import write_run


def logits_of(classes, count=3):
    return np.eye(count, dtype=np.float32)[classes]


def pair_of(both, lost, won, neither):
    """Labels and logits of so many images that both get right, only the first, ..."""
    labels = np.zeros(both + lost + won + neither, int)
    before = np.repeat([0, 0, 1, 1], [both, lost, won, neither])
    after = np.repeat([0, 1, 0, 2], [both, lost, won, neither])
    return labels, logits_of(before), logits_of(after)


# --- the difference -------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(80, 9, 2, 9), (500, 0, 0, 20), (30, 3, 8, 1), (90, 25, 3, 0)])
def test_the_difference_its_interval_and_p_are_those_of_the_textbooks(counts):
    both, lost, won, neither = counts
    found, n = paired(*pair_of(*counts)), sum(counts)
    assert found["difference"] == pytest.approx((won - lost) / n)
    assert found["accuracy_after"] - found["accuracy_before"] == pytest.approx(found["difference"])
    assert (found["lost"], found["won"], found["changed"]) == (lost, won, lost + won + neither)
    exact = mcnemar([[both, lost], [won, neither]], exact=True).pvalue
    assert found["p"] == pytest.approx(min(1.0, exact))
    # Bonett and Price 2012, equations 4 and 5, with t and n + 1 degrees in place of z
    one, other = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    error = math.sqrt((one + other - (one - other) ** 2) / (n + 1))
    half = stats.t.isf(0.025, n - 1) * error
    ends = found["ci95_low"], found["ci95_high"]
    assert ends == pytest.approx((one - other - half, one - other + half), abs=1e-4)
    assert found["established"] == (ends[0] > 0 or ends[1] < 0)


def test_the_interval_holds_the_true_difference_of_few_changed_answers():
    """300 test parts of 500 images, of which 2 % are lost and 0.5 % won in truth."""
    draws = np.random.default_rng(0).multinomial(500, [0.9, 0.02, 0.005, 0.075], 300)
    held = [row["ci95_low"] <= -0.015 <= row["ci95_high"] for row in (paired(*pair_of(*d)) for d in draws)]  # fmt: skip
    assert np.mean(held) > 0.95 - 3 * math.sqrt(0.95 * 0.05 / len(draws))


def test_images_of_one_group_count_as_one():
    labels, before, after = pair_of(60, 12, 0, 0)
    alone = paired(labels, before, after)
    together = paired(labels, before, after, np.repeat(np.arange(6), 12))
    assert alone["established"] and not together["established"]
    assert together["difference"] == alone["difference"]
    assert alone["p"] < 0.001 and math.isnan(together["p"])  # it would contradict the interval


# --- the chapter ----------------------------------------------------------------------------------


def row_of(run, method, counts=(90, 1, 1, 8), size=(4_000_000, 1_000_000), **changes):
    row = {"run": run, "method": method, "weights": "0" * 16, "cpu": "a CPU, 2 cores"}
    row |= {"bytes_before": size[0], "bytes_after": size[1], **paired(*pair_of(*counts))}
    for batch in compression.BATCHES:
        for threads in compression.THREADS:
            for side in compression.SIDES:
                for suffix, value in (("", 2.5), ("_q25", 2.25), ("_q75", 3.0)):
                    row[speed_name(batch, threads, side) + suffix] = value
    return row | changes


def write_rows(workdir, *rows):
    (workdir / "deploy").mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(workdir / FILE, index=False)


@pytest.fixture
def workdir(tmp_path):
    for model in ("cnn", "mlp"):
        run_dir = write_run(tmp_path, model, 0)
        (run_dir / "weights.safetensors").write_bytes(model.encode())
    return tmp_path


def section_of(workdir):
    return compression.compression_section(compare(workdir, load_runs(workdir)))


def digest_of(workdir, name):
    return weights_digest(load_run(workdir / name))


def test_the_page_shows_what_was_measured_and_hides_no_loss(workdir):
    assert "<h2>Compression</h2>" not in report.write_report(workdir, models=False).page.read_text()
    write_rows(
        workdir,
        row_of(
            "cnn/seed0",
            "int8",
            (60, 30, 0, 10),
            weights=digest_of(workdir, "cnn/seed0"),
            **{speed_name(1, 1, "after"): 2.0},
        ),  # fmt: skip
        row_of("mlp/seed0", "int8", weights=digest_of(workdir, "mlp/seed0")),
        row_of("mlp/seed0", "float16", size=(4e6, 4.1e6), weights=digest_of(workdir, "mlp/seed0")),
    )
    made = report.write_report(workdir, models=False)
    page = made.page.read_text()
    assert "<h2>Compression</h2>" in page and "Compression:" not in made.text
    finding = (
        "int8 is 4 times smaller, float16 is not smaller. Not faster with one image and one "
        "thread: int8 of mlp/seed0; float16. A loss of accuracy is established for "
        "cnn/seed0 as int8 (-30.00 points); of the others, it may be up to "
    )
    assert finding in page
    for cell in (
        "4 → 1",
        "4 times smaller",
        "not smaller",
        "90.00 → 60.00",
        "-30.00 (-",
        "2.5 → 2",
    ):
        assert cell in page, cell
    assert "2.5 (2.25 to 3) → 2.5 (2.25 to 3)" in page and "a CPU, 2 cores" in page


def test_sizes_are_never_rounded_to_more_and_spans_are_sentences():
    def said(*after):
        rows = [row_of("mlp/seed0", "int8", size=(4e6, 4e6 / ratio)) for ratio in after]
        return compression._finding(pd.DataFrame(rows)).split(". ")[0]

    assert (
        said(3.9999) == "int8 is 3.99 times smaller"
        and said(12345) == "int8 is 12,300 times smaller"
    )
    assert said(1.9, 3.5) == "int8 is 1.9 to 3.5 times smaller"
    assert said(1, 1.9) == "int8 is at most 1.9 times smaller"
    assert said(1, 0.5) == "int8 is at most 2 times larger"
    assert said(0.5, 1.5) == "int8 is 2 times larger to 1.5 times smaller"
    rows = pd.DataFrame([row_of("mlp/seed0", "int8")])
    rows = rows.drop(columns=[name for name in rows if name.startswith("ms_")])
    assert "faster" not in compression._finding(rows)


def test_rows_of_other_weights_and_of_runs_that_are_gone_are_named(workdir):
    fresh = digest_of(workdir, "mlp/seed0")
    write_rows(
        workdir,
        row_of("cnn/seed0", "int8", (60, 30, 0, 10)),
        row_of("mlp/seed0", "int8", weights=fresh),
        row_of("vgg16/seed1", "int8"),
    )
    comparison = compare(workdir, load_runs(workdir))
    assert compression.compression_section(replace(comparison, folder="reviewed")) is None
    section = compression.compression_section(comparison)
    text = "\n".join(section.warnings)
    assert "Compression: cnn/seed0: measured of other weights than the run now has" in text
    assert "Compression: vgg16/seed1: measured of a run not here" in text
    assert "mlp/seed0: measured" not in text
    assert [row[0] for row in section.tables[0].rows] == ["mlp/seed0"]
    assert "(-30" not in section.finding and "vgg16" not in section.finding
    assert "ONNX Runtime unknown (unknown)" in section.details[-1].lines[-1]  # an old row
    write_rows(workdir, row_of("vgg16/seed1", "int8"))
    assert section_of(workdir).tables == [] and section_of(workdir).warnings


def test_rows_of_two_machines_are_told_apart_and_a_busy_one_is_named(workdir):
    known = {"weights": digest_of(workdir, "mlp/seed0"), "date": "2026-01-02 03:04:05 +0000"}
    rows = [
        row_of("mlp/seed0", "int8", **known, onnxruntime="1.2.3", cores_had=0.99),
        row_of("mlp/seed0", "float16", **known, onnxruntime="1.2.4", cores_had=0.45, cpu="another"),
    ]
    write_rows(workdir, rows[0])
    section = section_of(workdir)
    assert "machine" not in section.tables[0].columns and not section.warnings
    write_rows(workdir, *rows)
    section = section_of(workdir)
    machines = [row[section.tables[0].columns.index("machine")] for row in section.tables[0].rows]
    assert machines == ["a CPU, 2 cores", "another"]
    assert "1.2.3 and 1.2.4 (2026-01-02)" in section.details[-1].lines[-1]
    assert "calls had 45 to 99 % of the cores" in section.warnings[0]


def test_a_damaged_file_spoils_no_report(workdir):
    (workdir / "deploy").mkdir()
    (workdir / FILE).write_text("run,method\ncnn/seed0,int8\n")
    with pytest.raises(
        UserError, match="compression.csv cannot be read .* compress the runs again"
    ):
        compression.read_rows(workdir)
    assert "Not made: " in section_of(workdir).finding
