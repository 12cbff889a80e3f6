import json

from analysis.page.section import Details, Picture, Section, Table, remembered
from analysis.runs import load_runs
from tests.analysis.fabricate import write_run


def test_a_section_is_remembered_until_its_runs_or_options_change(tmp_path):
    path = write_run(tmp_path, "cnn", 0)
    calls = []

    def make_section():
        calls.append(1)
        (tmp_path / "p.png").write_bytes(b"")
        picture = Picture("p.png", "caption")
        return Section(
            "title", ["text"], [Table(["a"], [["b"]])], [picture], [Details("d", picture=picture)]
        )

    def ask(count=1):
        return remembered(
            tmp_path / "name.json", load_runs(tmp_path), {"count": count}, make_section
        )

    assert ask() == ask() and len(calls) == 1
    ask(count=2)
    assert len(calls) == 2
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"trained": "anew"}))
    ask(count=2)
    assert len(calls) == 3
    (tmp_path / "p.png").unlink()
    ask(count=2)
    assert len(calls) == 4
    (tmp_path / "name.json").write_text("{")
    ask(count=2)
    assert len(calls) == 5
