"""The report's use of what `deploy.profile` measured."""

from dataclasses import replace

import pandas as pd
import pytest

from analysis.compare import compare
from analysis.latency import AXES, FILE, latency_section, read_latencies, version_of
from analysis.page import pareto
from analysis.page.render import render
from analysis.report import CHAPTERS
from analysis.runs import load_run, load_runs
from errors import UserError
from tests.analysis.fabricate import write_run

TITLE = "p50 at batch 1, ms (onnx, 1 thread)"


@pytest.fixture
def workdir(tmp_path):
    for model, accuracy in (("cnn", 0.9), ("mlp", 0.8), ("linear", 0.6)):
        run_dir = write_run(tmp_path, model, 0, accuracy)
        (run_dir / "weights.safetensors").write_bytes(model.encode())
    return tmp_path


def row(workdir, model, p50, **changes):
    version = version_of(load_run(workdir / model / "seed0"))
    known = {
        "run": f"{model}/seed0", "runtime": "onnx", "threads": 1, "batch": 1, "machine": "here",
        "version": version, "date": "2026-01-02", "calls": 300, "p50_ms": p50, "p90_ms": 2 * p50,
        "p99_ms": float("nan"), "cpu_ms": 0.7, "cores_used": 0.99, "device_memory_mb": float("nan"),
    }  # fmt: skip
    return known | changes


def write(workdir, *rows):
    (workdir / FILE).parent.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(workdir / FILE, index=False)


def section_of(workdir):
    return latency_section(compare(workdir, load_runs(workdir)))


def axes(workdir):
    return section_of(workdir).data.get(AXES, {})


def test_two_models_of_one_setting_make_an_axis(workdir):
    assert section_of(workdir) is None  # nothing was measured
    write(
        workdir,
        row(workdir, "cnn", 4.0),
        row(workdir, "mlp", 1.0),
        row(workdir, "mlp", 3.0, batch=8),
    )
    comparison = compare(workdir, load_runs(workdir))
    section = latency_section(comparison)
    assert section.data == {AXES: {TITLE: {"cnn": 4.0, "mlp": 1.0}}} and not section.warnings
    assert "mlp answers one image fastest, in 1 ms; cnn slowest, in 4 ms" in section.finding
    assert section.tables[0].rows[0] == ["mlp", "1", "300", "1", "2", "–", "0.7"]
    assert section.tables[0].columns[-1] == "CPU ms"
    assert section.tables[0].caption.endswith("Not profiled so: linear.")
    assert str(FILE) in " ".join(section.text) and "in JAX" in " ".join(section.text)
    plot = next(p for p in pareto.plots(comparison, [section]) if p.title == TITLE)
    assert plot.missing == ["linear"] and {p.model for p in plot.points} == {"cnn", "mlp"}
    page = render(comparison, [replace(section, title="Latency", chart="pareto")])
    assert f">{TITLE}</label>" in page and ">Latency</h2>" in page
    assert latency_section in [chapter.make for chapter in CHAPTERS]


def test_one_model_alone_is_no_axis(workdir):
    write(workdir, row(workdir, "cnn", 4.0))
    comparison = compare(workdir, load_runs(workdir))
    titles = [p.title for p in pareto.plots(comparison, [latency_section(comparison)])]
    assert TITLE not in titles and "parameters" in titles


def test_machines_runtimes_and_threads_are_never_mixed(workdir):
    write(
        workdir,
        row(workdir, "cnn", 4.0), row(workdir, "mlp", 1.0),
        row(workdir, "linear", 0.1, machine="there"),
        row(workdir, "linear", 0.2, runtime="jax"), row(workdir, "linear", 0.3, threads=0),
    )  # fmt: skip
    assert axes(workdir) == {TITLE: {"cnn": 4.0, "mlp": 1.0}}
    write(
        workdir,
        row(workdir, "cnn", 4.0),
        row(workdir, "mlp", 1.0, machine="there", date="2026-01-03"),
    )
    section = section_of(workdir)  # of as many models each, the newest
    assert section.data == {AXES: {TITLE: {"mlp": 1.0}}}
    assert section.warnings == ["Not shown, for measured on another machine: cnn."]
    threads = [
        row(workdir, name, 2.0, threads=0, runtime="jax") for name in ("cnn", "mlp", "linear")
    ]
    write(workdir, row(workdir, "cnn", 4.0), row(workdir, "mlp", 1.0), *threads)
    assert list(axes(workdir)) == ["p50 at batch 1, ms (jax, all threads)"]


def test_rows_of_a_model_that_changed_are_left_out_with_a_warning(workdir):
    write(workdir, row(workdir, "cnn", 4.0), row(workdir, "mlp", 1.0), row(workdir, "linear", 0.5))
    (workdir / "mlp/seed0/weights.safetensors").write_bytes(b"trained again")
    (workdir / "linear/seed0/weights.safetensors").unlink()
    section = section_of(workdir)
    assert section.data == {AXES: {TITLE: {"cnn": 4.0}}}
    assert "linear/seed0 and mlp/seed0: trained or changed since" in section.warnings[0]
    (workdir / "cnn/seed0/weights.safetensors").write_bytes(b"trained again")
    assert section_of(workdir).tables == [] and "cnn/seed0" in section_of(workdir).warnings[0]


def test_a_model_of_too_few_calls_is_neither_fastest_nor_an_axis(workdir):
    few = row(workdir, "linear", float("nan"))
    write(workdir, few, row(workdir, "cnn", 4.0), row(workdir, "mlp", 1.0))
    assert axes(workdir) == {TITLE: {"cnn": 4.0, "mlp": 1.0}}
    section = section_of(workdir)
    assert "mlp answers one image fastest" in section.finding
    assert "Not profiled" not in section.tables[0].caption


def test_what_was_not_timed_in_turn_is_said_to_be_so(workdir):
    write(workdir, row(workdir, "cnn", 4.0), row(workdir, "mlp", 1.0, date="2026-01-03"))
    assert "several calls of deploy.profile, so not in turn" in section_of(workdir).warnings[0]


def test_calls_that_shared_their_core_are_said_to_be_so(workdir):
    rows = [row(workdir, "cnn", 4.0), row(workdir, "mlp", 1.0, cores_used=0.41)]
    write(workdir, *rows)
    section = section_of(workdir)
    assert "had 41 to 99 % of the cores that they asked for" in section.warnings[0]
    assert section.text[-1] == section.warnings[0]  # where the milliseconds are read, too
    write(workdir, *(r | {"device_memory_mb": 9.0} for r in rows))  # it waits for an accelerator
    assert not section_of(workdir).warnings


def test_digits_alone_are_a_version_and_a_damaged_table_spoils_no_report(workdir):
    write(workdir, row(workdir, "cnn", 4.0, version="0012345678901234"))
    assert read_latencies(workdir / FILE).version.tolist() == ["0012345678901234"]
    for text in ("run,batch\n1,2\n", "", (workdir / FILE).read_text().replace("4.0", "fast"), "\0"):
        (workdir / FILE).write_text(text)
        with pytest.raises(UserError, match=r"latency.csv .*: move it away"):
            read_latencies(workdir / FILE)
        assert "move it away" in section_of(workdir).warnings[0]
