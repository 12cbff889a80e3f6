"""How long does an answer take where it runs? What `deploy.profile` measured of the runs."""

from contextlib import suppress
from pathlib import Path

import pandas as pd

from analysis.compare import Comparison
from analysis.evaluate import sets_fitted_to, temperature_of
from analysis.page.pareto import AXES
from analysis.page.section import Section, as_table
from analysis.page.tables import NONE, scaled
from analysis.predict import Predictor
from analysis.runs import FinishedRun
from analysis.verdict import listed
from errors import UserError
from experiment.files import plain
from training.weights import find_weights

FILE = Path("deploy", "latency.csv")  # in a workdir
KEY = ["run", "runtime", "threads", "batch", "machine"]  # what a row is of; a later one replaces it
PERCENTILES = ["p50_ms", "p90_ms", "p99_ms"]
UNDISTURBED = 80  # percent of the cores that calls ask for which they have, if they are alone
READ = {  # columns that the report reads; the file has more
    **dict.fromkeys(["run", "runtime", "machine", "version", "date"], str),
    **dict.fromkeys(["threads", "batch", "calls"], int),
    **dict.fromkeys([*PERCENTILES, "cores_used", "device_memory_mb"], float),
}
HOW = (
    "Each call is timed from pixels, uint8, to logits and features, in a process that may use as "
    "many cores as threads; models take turns. CPU ms: the mean processor time of a call, which "
    "other processes do not lengthen. {file} holds more: memory, first calls, decoding, "
    "other settings.",
    "Accuracy and cost times predictions in JAX, with all that the machine has: another model may "
    "be the fastest there.",
)


def read_latencies(path: Path) -> pd.DataFrame:
    """Returns the rows of a table that `deploy.profile` wrote; none where there is no file."""
    if not path.exists():
        return pd.DataFrame(columns=list(READ))
    try:
        rows = pd.read_csv(path, dtype=READ, encoding_errors="surrogateescape")
        absent = [name for name in READ if name not in rows]
    except (OSError, ValueError) as error:  # no CSV, no text
        raise UserError(f"{path} cannot be read ({error}): move it away") from error
    if absent:
        raise UserError(
            f"{path} is no table of deploy.profile, for it has no {absent[0]}: move it away"
        )
    return rows


def disturbed(rows: pd.DataFrame) -> str:
    """Returns a remark on calls that had to share their core with other processes, or ""."""
    return busy(rows.cores_used[(rows.threads == 1) & rows.device_memory_mb.isna()])


def busy(shares: pd.Series) -> str:
    """Returns that remark of the shares, in 0..1, of the cores asked for that calls had."""
    least, most = (round(100 * x) if pd.notna(x) else 100 for x in (shares.min(), shares.max()))
    if least >= UNDISTURBED:
        return ""
    return (
        f"The machine was busy: calls had {least}{f' to {most}' * (most > least)} % of the cores "
        "that they asked for. Milliseconds are too long, and best measured again; models were "
        "timed in turn."
    )


def version_of(run: FinishedRun) -> str:
    """Returns `Predictor.version` of a complete run, for which no model is made."""
    fitted = plain({"temperature": temperature_of(run), "sets": sets_fitted_to(run)})
    return Predictor(fitted, find_weights(run.path), answer=None).version


def latency_section(comparison: Comparison) -> Section | None:
    """The calls of one machine and setting, that of most models, and its axis for the chart.

    Rows of models that were trained again since are left out with a warning.
    """
    path = comparison.workdir / FILE
    try:
        rows = read_latencies(path)
    except UserError as error:
        return Section(finding="Not shown.", warnings=[str(error)])
    runs = {
        single.name: (label, single)
        for label, group in comparison.groups.items()
        for run in group
        for single in run.folds or (run,)
    }
    rows = rows[rows.run.isin(runs)]
    now = {}
    for name in rows.run.unique():
        with suppress(UserError):  # without weights or predictions it is another model
            now[name] = version_of(runs[name][1])
    old = rows.version != rows.run.map(now)
    warnings = [
        f"{listed(sorted(rows.run[old].unique()))}: trained or changed since the latency was "
        "measured, which is not shown: python -m deploy.profile measures it again"
    ] if old.any() else []  # fmt: skip
    rows = rows[~old].assign(label=lambda r: [runs[name][0] for name in r.run])
    rows, setting, more = _one_setting(rows)
    if rows.empty:
        return Section(finding="Not shown.", warnings=warnings) if warnings else None
    if more:
        warnings.append(f"Not shown, for measured on another machine: {more}.")
    title = f"p50 at batch 1, ms ({setting})"
    single = rows[rows.batch == 1].groupby("label", sort=False)
    costs = single.p50_ms.median().dropna().to_dict()  # NaN: too few calls
    if rows.date[rows.batch == 1].nunique() > 1:
        warnings.append(f"{title}: measured in several calls of deploy.profile, so not in turn.")
    shared = [remark for remark in [disturbed(rows)] if remark]
    finding = f"Milliseconds of one call, measured by deploy.profile: {setting}."
    if len(costs) > 1:
        low, high = min(costs, key=costs.get), max(costs, key=costs.get)
        finding += f" {low} answers one image fastest, in {costs[low]:.3g} ms; {high} slowest, in "
        finding += f"{costs[high]:.3g} ms."
    shown = rows.sort_values(["batch", "p50_ms"])
    cells = {name.replace("_", ", "): shown[name].map(scaled) for name in PERCENTILES}
    if "cpu_ms" in shown:  # not in tables of older versions
        cells["CPU ms"] = shown.cpu_ms.map(scaled)
    caption = f"Of {rows.machine.iloc[0]}. {NONE}: too few calls for that percentile."
    if absent := [label for label in comparison.groups if label not in set(rows.label)]:
        caption += f" Not profiled so: {', '.join(absent)}."
    table = as_table(
        {"model": shown.label, "images": shown.batch, "calls": shown.calls, **cells}, caption
    )
    return Section(
        text=[*(line.format(file=FILE) for line in HOW), *shared],
        tables=[table],
        warnings=warnings + shared,
        finding=finding,
        data={AXES: {title: costs}},
    )


def _one_setting(rows: pd.DataFrame) -> tuple[pd.DataFrame, str, str]:
    """Returns the rows of the machine, runtime and threads that most models have at one image.

    Of equal ones: the newest machine, ONNX Runtime, one thread. Also the setting in words, and the
    models that other machines alone have measured.
    """
    if rows.empty:
        return rows, "", ""
    single = rows[rows.batch == 1] if (rows.batch == 1).any() else rows
    machines = single.groupby("machine").agg(models=("label", "nunique"), newest=("date", "max"))
    machine = machines.sort_values(["models", "newest"]).index[-1]
    here = single[single.machine == machine]
    settings = here.groupby(["runtime", "threads"]).label.nunique()
    runtime, threads = max(settings.index, key=lambda k: (settings[k], k[0] == "onnx", k[1] == 1))
    alone = sorted(set(rows.label) - set(rows.label[rows.machine == machine]))
    words = f"{threads} thread{'s' * (threads > 1)}" if threads else "all threads"
    kept = (rows.machine == machine) & (rows.runtime == runtime) & (rows.threads == threads)
    return rows[kept], f"{runtime}, {words}", listed(alone) if alone else ""
