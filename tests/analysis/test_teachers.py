import json

import pytest

from analysis import compare
from analysis.page.tables import percent, points
from analysis.runs import load_run, load_runs
from analysis.teachers import teachers_section
from models.weights.download import digest
from tests.analysis.fabricate import write_run


@pytest.fixture
def workdir(tmp_path):
    """A model with and without a teacher, which is weaker, and another one that has no pair."""
    teacher = write_run(tmp_path / "T", "mlp", 0, 0.6)
    (teacher / "weights.safetensors").write_bytes(b"weights")
    told = {
        "run": "mlp/seed0",
        "path": str(teacher),
        "digest": digest(teacher / "weights.safetensors", "sha256"),
    }
    told = {"temperature": 4.0, "weight": 0.9, "teachers": [told]}
    for model, variants in {"cnn": ("teacher=none", "teacher=mlp_seed0"), "vit": ("x",)}.items():
        for i, variant in enumerate(variants):
            run = write_run(tmp_path / "W", model, 0, 0.95 - 0.1 * i, variant)
            if variant == "teacher=none":
                continue
            for name, content in (
                ("summary.json", {"distill": told, "phases": [{"stored_logits": False}]}),
                ("config.json", {"distill": {"teacher": f"run:{teacher}", "weight": 0.9}}),
            ):
                stored = json.loads((run / name).read_text())
                (run / name).write_text(json.dumps(stored | content))
    return tmp_path / "W"


def test_students_are_compared_with_the_same_model_without_a_teacher(workdir, tmp_path):
    comparison = compare.compare(workdir, load_runs(workdir))
    section = teachers_section(comparison)
    taught, alone = "cnn (teacher=mlp_seed0)", "cnn (teacher=none)"
    effects, lessons = ({row[0]: row for row in table.rows} for table in section.tables)
    of = comparison.table.set_index("label").test_accuracy_mean
    assert effects[taught][1:3] == [alone, points(of[taught] - of[alone])]
    low, _, high = effects[taught][3].partition(" to ")
    assert float(low) < float(effects[taught][2]) < float(high) and effects[taught][4] == "yes"
    assert effects["vit (x)"][1:] == ["–"] * 4 and f"{taught} {effects[taught][2]} points" in section.finding  # fmt: skip
    teacher = load_run(tmp_path / "T/mlp/seed0")
    assert lessons[taught][-2] == percent(teacher.correct.mean())
    (warning,) = section.warnings
    assert warning.startswith(f"{taught}: its teacher is weaker") and lessons[taught][-1] in warning


def test_of_a_teacher_that_was_trained_anew_no_accuracy_is_told(workdir, tmp_path):
    (tmp_path / "T/mlp/seed0/weights.safetensors").write_bytes(b"others")
    section = teachers_section(compare.compare(workdir, load_runs(workdir)))
    assert all(row[-2:] == ["–", "–"] for row in section.tables[1].rows)
    assert not section.warnings
