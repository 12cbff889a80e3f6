"""The frame of every command: flags, arguments, and mistakes that print one message."""

import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from configs import base
from errors import UserError
from experiment.fields import Text, flatten

# Fields that a config need not mention, so absl does not know them: it depends on the model which
# there are. `experiment.grid` reads their text by their types.
OPEN = re.compile(r"--?(no)?config\.((?:model|per_model|phase)\.[^=]+)(?:=(.*))?", re.DOTALL)
_given: dict[str, Text] = {}  # by this process's command line


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Runs `main(argv)` under absl; a user's mistake prints one message and exits with 2."""

    def guarded(argv: list[str]) -> int | None:
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped by Ctrl-C", file=sys.stderr)
            return 130

    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=_parse_flags)


def arguments(argv: list[str], usage: str, least: int = 1, most: int | None = 1) -> list[str]:
    """Returns what stands beside options on a command line; raises UserError with its usage.

    Args:
      argv: as `run_command` gives it, the program first.
      usage: such as "analysis.compare WORKDIR".
      least, most: how many arguments there may be; None for any number.
    """
    given = argv[1:]
    if len(given) < least or (most is not None and len(given) > most):
        raise UserError(f"usage: python -m {usage}")
    return given


def output_folder(path: Path | str, option: str = "--output") -> Path:
    """Returns a folder, made if need be; raises UserError where it cannot be."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {option}={folder}: {error.strerror}") from error
    return folder


def config_overrides(flag: flags.FlagHolder) -> dict[str, Any]:
    """Returns what the command line set in a config flag, by dotted path."""
    return dict(config_flags.get_override_values(flags.FLAGS[flag.name])) | _given


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; absl and ml_collections raise many types here, all of them user mistakes."""
    command = sys.argv
    try:
        if "config" in flags.FLAGS:
            argv = _take_open_fields(flags.FLAGS.read_flags_from_files(argv))
            sys.argv = argv  # where ml_collections looks for fields
        return flags.FLAGS(argv)
    except Exception as error:  # noqa: BLE001
        text = str(error.__cause__ if isinstance(error.__cause__, UserError) else error)
        if isinstance(error, flags.UnrecognizedFlagError):
            text = f"no such option: --{error.flagname}." + _nearest(error.flagname, flags.FLAGS)
        elif isinstance(error, (AttributeError, KeyError)):
            text = _unknown_field(argv) or text
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    finally:
        sys.argv = command


def _take_open_fields(argv: list[str]) -> list[str]:
    """Returns argv without the flags of open fields, whose values are kept."""
    rest, words = [], list(argv)
    while words:
        word = words.pop(0)
        match = OPEN.fullmatch(word)
        if not match:
            rest.append(word)
            continue
        negated, path, value = match.groups()
        if value is None:  # a flag that is set, or the value is the next word
            follows = not negated and words and not words[0].startswith("--")
            value = words.pop(0) if follows else "false" if negated else "true"
        _given[path] = Text(value)
    return rest


def _unknown_field(argv: list[str]) -> str:
    """Returns what is wrong with the first --config.field that does not exist, or ""."""
    given = [a[9:].partition("=")[0] for a in argv if a.startswith("--config.")]
    known = flatten(base.get_config())
    for path in given:
        if path not in known:
            return (
                f"no such config field: {path!r}.{_nearest(path, known)} "
                "Every field is explained in configs/base.py."
            )
    return ""


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
