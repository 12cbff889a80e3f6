"""The shape of the house: imports go one way, files and functions stay short."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Each may import itself and those after it.
ORDER = (
    "main", "deploy", "analysis", "train", "training", "experiment", "configs", "input_pipeline",
    "data", "models", "errors",
)  # fmt: skip
MODULES = sorted(
    path
    for name in ORDER
    for path in ((ROOT / name).rglob("*.py") if (ROOT / name).is_dir() else [ROOT / f"{name}.py"])
)


def imported(tree: ast.Module) -> set[str]:
    """The top-level packages that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way_and_nothing_grows_too_long(path):
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    later = ORDER[ORDER.index(own) :]
    assert imported(tree) & {*ORDER, "tests"} <= set(later)
    assert len(source.splitlines()) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and own != "configs":  # those are lists of fields
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


def test_every_module_stands_in_the_order_or_among_the_tests():
    tracked = {path.stem for path in ROOT.glob("*.py")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert tracked == {"main", "train", "input_pipeline", "errors"}
    assert packages - {"tests"} | tracked == set(ORDER)


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "__init__"], ids=lambda p: p.name)
def test_no_module_bears_a_name_of_the_standard_library(path):
    # `python -m deploy.profile` never has deploy/ itself on its path: it hides no module.
    assert path.stem not in sys.stdlib_module_names or path == ROOT / "deploy" / "profile.py"


def test_nothing_but_the_dependencies_is_installed():
    settings = (ROOT / "pyproject.toml").read_text()
    assert "packages = []" in settings and "py-modules = []" in settings


def test_models_can_be_used_alone():
    """Models load neither training nor analysis: they can be used alone."""
    code = "import sys, models; print([m for m in sys.modules if m.split('.')[0] in ('training', 'analysis', 'orbax')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_training_does_not_wait_for_the_libraries_of_the_report():
    code = "import sys, main; print([m for m in ('sklearn', 'statsmodels', 'scipy.stats') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
