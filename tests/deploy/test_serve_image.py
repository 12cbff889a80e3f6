"""The Dockerfile: what it copies exists and suffices, what it installs is known, who it runs as."""

import ast
import json
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def steps():
    """The instructions of the Dockerfile: pairs of name and arguments."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in lines]


def of(steps, name):
    return [arguments for step, arguments in steps if step == name]


def test_it_is_small_runs_as_nobody_and_names_no_other_place(steps):
    assert of(steps, "FROM") == ["python:3.12-slim"]
    assert of(steps, "USER") and of(steps, "USER")[-1] not in ("root", "0")
    names = [step for step, _ in steps]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert not re.search(
        r"https?://|index-url|curl|wget",
        (ROOT / "Dockerfile").read_text().replace("http.client", ""),
    )


def copied(steps):
    return [source for arguments in of(steps, "COPY") for source in arguments.split()[:-1]]


def test_what_is_copied_exists_and_is_not_ignored(steps):
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")
    }
    assert set(copied(steps)) == kept
    assert all((ROOT / source).exists() for source in kept)


def test_all_that_the_copied_code_imports_is_copied(steps):
    """Imports of this project, from deploy.serve on, through every module that they reach."""
    names = {path.stem for path in ROOT.glob("*.py")} | {
        path.parent.name for path in ROOT.glob("*/__init__.py")
    }
    copies, seen, todo = set(copied(steps)), set(), ["deploy.serve"]
    while todo:
        module = todo.pop()
        top, path = module.split(".")[0], ROOT / module.replace(".", "/")
        if top not in names or module in seen:
            continue
        seen.add(module)
        assert {top, f"{top}.py"} & copies, f"{module} is not copied"
        file = next(
            (f for f in (path.with_suffix(".py"), path / "__init__.py") if f.exists()), None
        )
        for node in ast.walk(ast.parse(file.read_text())) if file else ():
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    assert "training.weights" in seen


def test_what_is_installed_is_known_to_the_project(steps):
    (command,) = [run for run in of(steps, "RUN") if "pip install" in run]
    words = shlex.split(command)
    extras = re.fullmatch(r"\.\[(.*)\]", words[-1])[1].split(",")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"onnx", "serve"} == set(extras) <= set(known)
    assert words[words.index("-c") + 1] in copied(steps)


def test_the_server_is_reached_from_outside_and_stopped_by_its_signal(steps):
    environment = dict(word.split("=") for line in of(steps, "ENV") for word in line.split())
    assert environment["ARCHCOMPARE_HOST"] == "0.0.0.0"
    assert environment["ARCHCOMPARE_PORT"] == of(steps, "EXPOSE")[0]
    assert json.loads(of(steps, "ENTRYPOINT")[0]) == ["python", "-m", "deploy.serve"]
    assert of(steps, "STOPSIGNAL") == ["SIGTERM"] and not of(steps, "VOLUME")


def test_the_log_has_a_folder_that_the_server_owns_and_the_readme_costs_no_layer(steps):
    (made,) = [run for run in of(steps, "RUN") if "useradd" in run]
    user = shlex.split(made.split("&&")[0])[-1]
    assert f"chown {user} /data" in made and "mkdir /models /data" in made
    assert "LICENSE" in copied(steps) and "README.md" not in copied(steps)
    readme = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["readme"]
    (install,) = [run for run in of(steps, "RUN") if "pip install" in run]
    assert install.startswith(f"touch {readme} && ")


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_succeeds_only_while_the_server_answers(steps, status):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *words):
            pass

    check = json.loads(of(steps, "HEALTHCHECK")[0].split("CMD ")[1])
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    environment = {"ARCHCOMPARE_PORT": str(server.server_port), "http_proxy": "http://127.0.0.1:9"}
    run = lambda: subprocess.run([sys.executable, *check[1:]], env=environment, capture_output=True)  # noqa: E731
    assert (run().returncode == 0) == (status == 200)
    server.shutdown()
    server.server_close()
    assert run().returncode != 0
