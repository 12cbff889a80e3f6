"""Has the world changed since the model was trained? Looks at the log of its answers.

    python -m deploy.monitor RUN LOG.sqlite [--model=EXPORTED_FILE] [--since=7d] [--until=TIME]
        [--last=N] [--corrections=FILE.csv] [--rate=0.05] [--data=PATH] [--output=DIR]
        [--export=DIR] [--forget_before=TIME]

LOG.sqlite is what `deploy.serve` or `analysis.predict --log` wrote. The window, answers of this
model's version alone, is compared with the model's answers to RUN's validation images: class mix,
confidence, features, and accuracy where corrections are known. --model names the export of RUN that
answers, if it is not RUN itself. A TIME is 2026-11-26, 2026-11-26T08:30 (UTC unless it says
otherwise), or so long ago: 90m, 12h, 7d. --corrections is a table with the columns image (hash or
name in the log) and label. --export writes to_label.csv, the least sure images first; filled in, it
is such a table. The page goes to --output, RUN's workdir/deploy/monitor if there is none.
Without RUN's images, features are not compared; where --data is given, that is a mistake. Exit
codes: 0 no alarm, 1 alarm (where nothing changed, of at most a share --rate of windows), 2 else.
"""

import re
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from absl import flags

from analysis.answer_log import AnswerLog
from analysis.runs import load_run
from deploy.load import load
from deploy.monitor_page import described, write_page
from deploy.window import check_origin, examine, read_corrections, read_window, write_to_label
from errors import UserError
from experiment.command import arguments, output_folder, run_command

WHERE = {
    "predict": "  rows of source predict: `name` is the image's path",
    "serve": "  rows of source serve: `name` is what the client sent; the client has the image, "
    "whose SHA-256 is `image`",
}
UNITS = {"m": 60, "h": 3600, "d": 86400}  # seconds


def read_time(text: str, option: str, now: float) -> float:
    """Returns seconds since 1970 of a date, a time, or so long ago, such as 7d."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", text):
        return now - float(match[1]) * UNITS[match[2]]
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"--{option}={text!r} is no time: give such as 2026-11-26, 2026-11-26T08:30+01:00, 7d"
        ) from error


def _folder(path: Path | str, option: str) -> Path:
    folder = Path(path).expanduser()
    if (folder / "config.json").exists():
        raise UserError(f"{option}={folder} is the directory of a run: name another folder")
    if (folder / "index.html").exists() and not (folder / "monitor.json").exists():
        raise UserError(f"{option}={folder} holds another page: name another folder")
    return output_folder(folder, option)


def guarded(argv: list[str]) -> int:
    """Runs `main`; what nobody foresaw gives 2, for 1 is an alarm."""
    try:
        return main(argv)
    except UserError:
        raise
    except Exception:
        traceback.print_exc()
        return 2


def main(argv: list[str]) -> int:
    """Compares a window of a log with validation; returns 1 on an alarm."""
    usage = "deploy.monitor RUN LOG.sqlite [--since=7d] [--export=DIR] [--corrections=FILE.csv]"
    folder, path = (Path(text).expanduser() for text in arguments(argv, usage, 2, 2))
    run, now = load_run(folder), time.time()
    times = {flag.name: read_time(flag.value, flag.name, now) for flag in TIMES if flag.value}
    if not path.is_file():
        raise UserError(f"{path} does not exist: give what --log of predict or of serve names")
    predictor = load(Path(MODEL.value).expanduser() if MODEL.value else folder)
    if MODEL.value:
        check_origin(predictor, run)
    output = _folder(OUTPUT.value or run.path.resolve().parents[1] / "deploy/monitor", "--output")
    exported = _folder(EXPORT.value, "--export") if EXPORT.value else None
    log = AnswerLog(path)
    if CORRECTIONS.value:
        file = Path(CORRECTIONS.value).expanduser()
        pairs = read_corrections(file, log, run.class_names)
        print(f"corrections: {log.correct(pairs)} images of {file}")
    since, until = times.get("since", 0), times.get("until", np.inf)
    window = read_window(log, predictor, since, until, LAST.value)
    found = examine(run, predictor, window, RATE.value, DATA.value)
    print(*described(found), sep="\n")
    print(f"page: {write_page(output, found)}")
    if exported:
        file = write_to_label(window, exported)
        print(f"to label: {file}: fill in `label` and give it back with --corrections={file}")
        print(*(WHERE[name] for name in WHERE if (window.table.source == name).any()), sep="\n")
    if "forget_before" in times:
        print(f"forgotten: {log.forget(times['forget_before']):,} older answers")
    log.close()
    return int(any(test.alarm for test in found.tests))


if __name__ == "__main__":
    MODEL = flags.DEFINE_string("model", "", "Exported file or folder that answers, if not RUN")
    SINCE = flags.DEFINE_string("since", "", "Answers from this time on")
    UNTIL = flags.DEFINE_string("until", "", "Answers before this time")
    older = "Afterwards, remove answers before this time from the log"
    TIMES = (SINCE, UNTIL, flags.DEFINE_string("forget_before", "", older))
    LAST = flags.DEFINE_integer("last", 0, "The newest answers alone, so many", lower_bound=0)
    CORRECTIONS = flags.DEFINE_string("corrections", "", "CSV file with columns image and label")
    rate = "Share of windows like validation that may alarm"
    RATE = flags.DEFINE_float("rate", 0.05, rate, lower_bound=0.001, upper_bound=0.5)
    DATA = flags.DEFINE_string("data", "", "Where the run's data lies now, if it was moved")
    OUTPUT = flags.DEFINE_string("output", "", "Folder of the page")
    EXPORT = flags.DEFINE_string("export", "", "Folder for to_label.csv")
    run_command(guarded)
