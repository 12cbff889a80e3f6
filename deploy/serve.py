"""Which class are these photos of, asked over HTTP? A server of trained models.

    python -m deploy.serve [NAME=]MODEL... [--port=8000] [--log=FILE.sqlite]
    curl -F file=@photo.jpg http://127.0.0.1:8000/v1/models/NAME/predict
    python -m deploy.serve --new_key=NAME

MODEL is the directory of a complete run, or what `deploy.export` wrote; NAME is that of the folder
if none is given (cnn_seed0 for a run); it may hold letters a-z, digits and ._-. / is a page to drop
photos on. --new_key prints an API key and the line for --keys_file that lets a server know it.
Without keys only this machine is answered, unless --open says otherwise. Every flag may be given as
ARCHCOMPARE_<FLAG> in the environment, the models as ARCHCOMPARE_MODELS and the lines of keys as
ARCHCOMPARE_KEYS; a flag wins. One process serves: batches form only where all requests meet.
docs/serving.md tells more.
Exit codes: 0 stopped by SIGTERM or SIGINT, 1 a model could not be run, 2 a mistake.
"""

import dataclasses
import os
import re
import shlex
import sys
from pathlib import Path

from absl import flags

from analysis.answer_log import AnswerLog
from analysis.predict import TARGETS, Predictor, predictor_of
from analysis.runs import load_run
from deploy.load import load, package
from deploy.service.keys import new_key, read_keys
from deploy.service.limits import Limits, is_loopback
from errors import UserError
from experiment.command import arguments, run_command

PREFIX = "ARCHCOMPARE_"
PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def named(arguments: list[str]) -> dict[str, Path]:
    """Returns the path of each model by its name; raises UserError for names that are no use."""
    found: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not (equals and NAME.fullmatch(name)):
            if equals and re.fullmatch(r"[\w .-]*", name) and not Path(argument).exists():
                raise UserError(
                    f"{name!r} cannot be the name of a model: at most 64 letters a-z, digits and "
                    "._-, and the first no sign"
                )
            name, path = "", argument
        path = Path(path).expanduser()
        if not name:
            whole = path.resolve()
            folder = whole.parent if whole.is_file() else whole
            is_run = (folder / "config.json").exists()
            name = f"{folder.parent.name}_{folder.name}" if is_run else folder.name
        if not NAME.fullmatch(name):
            raise UserError(
                f"{name!r} cannot be the name of a model (letters, digits, . _ -): give "
                f"NAME={argument}"
            )
        if name in found:
            raise UserError(f"two models are called {name}: give one of them as NAME=PATH")
        found[name] = path
    return found


def loaded_from(path: Path, target_accuracy: float, threads: int) -> Predictor:
    """Returns the model in any form; that of a run also knows the thresholds an export has."""
    if (path / "config.json").exists():
        from deploy.card import licence_of

        run = load_run(path)
        predictor = predictor_of(run, sorted({*TARGETS, target_accuracy}))
        licence = licence_of(run.summary.get("weights", "none"))
        facts = predictor.facts | {"licence": licence, "format": "run"}
        return dataclasses.replace(predictor, facts=facts)
    return load(path, target_accuracy, threads)


def check_limits(limits: Limits) -> None:
    """Raises UserError for limits that contradict each other."""
    if limits.queue < max(limits.max_images, limits.max_batch):
        raise UserError(
            f"--queue={limits.queue} is smaller than --max_images={limits.max_images} or "
            f"--max_batch={limits.max_batch}: a request or a batch would never fit"
        )
    if limits.max_pending_mb < limits.max_body_mb:
        raise UserError(
            f"--max_pending_mb={limits.max_pending_mb} is less than --max_body_mb="
            f"{limits.max_body_mb}: no such body would ever fit"
        )


def check_open(host: str, keys: dict[str, str], is_open: bool) -> None:
    """Raises UserError for a server that would answer anybody without saying so."""
    if not (is_loopback(host) or keys or is_open):
        raise UserError(
            f"--host={host} would answer whoever reaches it: give --keys_file (--new_key=NAME "
            "makes a key), or --open if that is meant"
        )


def serve(
    models: dict[str, Path], limits: Limits, keys: dict[str, str], log: str, host: str, port: int,
    threads: int = 0, drain: float = 0.0, local: bool = False,
) -> int:  # fmt: skip
    """Serves until a signal comes; returns the exit code."""
    for name in PACKAGES:
        package(name, "serve")
    from deploy.service.app import Service, create_app, load_workers
    from deploy.service.events import Recorder, say
    from deploy.service.metrics import Metrics
    from deploy.service.run import Server, listen

    bound = listen(host, port)  # before the models are read: a mistake is told at once
    metrics, failures = Metrics(), []
    recorder = Recorder(AnswerLog(log) if log else None, metrics)

    loaded = {
        name: loaded_from(path, limits.target_accuracy, threads) for name, path in models.items()
    }

    def failed(error: Exception) -> None:
        failures.append(error)
        server.stop()

    service = Service(load_workers(loaded, limits, metrics), limits, metrics, recorder, failed)
    gate = create_app(service, keys, local)
    server = Server(gate, limits.header_timeout_s, limits.timeout_s + limits.body_timeout_s, drain)
    place = f"[{host}]" if ":" in host else host
    url = f"http://{place}:{bound.getsockname()[1]}"
    say(event="listening", url=url, models=list(loaded), keys=len(keys))
    print(f"serving {', '.join(loaded)} on {url}", file=sys.stderr, flush=True)
    for name, predictor in loaded.items():
        if reason := predictor.not_promised(limits.target_accuracy):
            print(f"{name}: {reason}", file=sys.stderr, flush=True)
    server.run([bound])
    for error in failures:
        print(f"error: a model cannot be run: {error}", file=sys.stderr)
    say(event="stopped")
    return 1 if failures else 0


def from_environment(environment: dict[str, str]) -> None:
    """Sets the flags that the command line left out and the environment gives."""
    for name in OWN:
        value = environment.get(PREFIX + name.upper())
        if value is None or flags.FLAGS[name].present:
            continue
        try:
            flags.FLAGS[name].parse(value)
        except flags.Error as error:
            raise UserError(f"{PREFIX}{name.upper()}={value}: {error}") from error


def main(argv: list[str]) -> int:
    """Serves models until it is told to stop."""
    from_environment(dict(os.environ))
    if NEW_KEY.value:
        if not NAME.fullmatch(NEW_KEY.value):
            raise UserError(
                f"--new_key={NEW_KEY.value}: a name of letters, digits, . _ - is needed"
            )
        key, line = new_key(NEW_KEY.value)
        print(f"key, shown this once:       {key}\nline for --keys_file:       {line}")
        return 0
    given = argv[1:] or shlex.split(os.environ.get(PREFIX + "MODELS", ""))
    models = named(arguments([argv[0], *given], "deploy.serve [NAME=]MODEL...", most=None))
    limits = Limits(**{name: flags.FLAGS[name].value for name in LIMITS})
    check_limits(limits)
    keys = read_keys(KEYS_FILE.value, os.environ.get(PREFIX + "KEYS", ""))
    check_open(HOST.value, keys, OPEN.value)
    return serve(
        models, limits, keys, LOG.value, HOST.value, PORT.value, THREADS.value, DRAIN.value,
        local=not keys and not OPEN.value,
    )  # fmt: skip


LIMITS = {
    "target_accuracy": "Accuracy promised, by the validation images, of answers without review",
    "rate": "Requests a second of a key (without keys: of an address); 0 for any number",
    "burst": "Requests at once above that rate",
    "max_body_mb": "Size of a request",
    "max_pending_mb": "Size of all requests that are in memory at once",
    "max_images": "Images of a request",
    "max_megapixels": "Pixels of an image, in millions; JPEG of more are read at a smaller size",
    "queue": "Images of a model that may wait; more are answered with 503",
    "max_batch": "Images that a model is given at once",
    "max_wait_ms": "How long a batch waits for images that are being decoded",
    "header_timeout_s": "Seconds in which the head of a request has to arrive",
    "body_timeout_s": "Seconds in which its body has to arrive",
    "timeout_s": "Seconds from then to the answer",
}
OWN = (*LIMITS, "host", "port", "open", "keys_file", "log", "threads", "drain_s")

if __name__ == "__main__":
    for limit in dataclasses.fields(Limits):
        kind = flags.DEFINE_integer if limit.type is int else flags.DEFINE_float
        least = {"lower_bound": 0 if limit.name in ("rate", "max_wait_ms") else 0.001}
        if limit.type is int:
            least = {"lower_bound": 1}
        kind(limit.name, limit.default, LIMITS[limit.name], **least)
    HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on")
    PORT = flags.DEFINE_integer("port", 8000, "Port; 0 for a free one", 0, 65535)
    OPEN = flags.DEFINE_bool("open", False, "Answer other machines without keys")
    KEYS_FILE = flags.DEFINE_string("keys_file", "", "File of lines NAME:DIGEST")
    NEW_KEY = flags.DEFINE_string("new_key", "", "Print a key of this name, and stop")
    LOG = flags.DEFINE_string("log", "", "SQLite file that answers are logged in, never images")
    THREADS = flags.DEFINE_integer("threads", 0, "Of ONNX Runtime; 0 for all cores", 0)
    DRAIN = flags.DEFINE_float("drain_s", 0.0, "Seconds to answer on after a signal", 0)
    run_command(main)
