"""Which labels look wrong, how many are, and what changes once a person has reviewed them?

    python -m analysis.labels WORKDIR [--count=60] [--data=PATH] [--output=DIR]
    python -m analysis.labels WORKDIR --review=FILE

The first writes WORKDIR/labels/suspects.csv, test and validation images that the models contradict
together, and suspects.png with the first `count` of the test part. A person fills in `verdict` (ok,
wrong or unclear), and `new_label` where the right class is not `likely` ("-": no class fits). The
second keeps the verdicts in WORKDIR/labels/review.csv, and every report from then on shows both;
`python -m analysis.report WORKDIR --reviewed` makes the whole report of the reviewed labels.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from absl import flags

from analysis.compare import Comparison, compare, compare_workdir
from analysis.label_noise import Votes, contradictions
from analysis.page.figures import draw_photos, save, shortened
from analysis.page.section import Details, Picture, Section, Table
from analysis.page.tables import NONE, decimal, percent, percents
from analysis.review import COLUMNS, NO_CLASS, read_review, stored_review
from analysis.runs import FinishedRun, incomplete
from analysis.stress.photos import TestPart
from analysis.uncertainty import wilson
from analysis.verdict import listed
from errors import UserError
from experiment.command import arguments, output_folder, run_command

SHOWN = 24  # photos in the report
PHOTO = 128  # pixels of the shorter side


def draw_suspects(run: FinishedRun, suspects: pd.DataFrame, data_path: str = ""):
    """Draws the photos of suspects, each with its label, the likely one and who agrees.

    Raises UserError where the data cannot be found.
    """
    part = TestPart.of(run, data_path)
    photos = part.stored(pd.Index(run.test["ids"]).get_indexer(suspects["id"]), PHOTO)
    titles = [
        f"{i}. {shortened(row.label)}\n{shortened(row.likely)}? {row.models_agree} of {row.models}"
        for i, row in enumerate(suspects.itertuples(), 1)
    ]
    return draw_photos(photos, titles)


def suspects_of(votes: Sequence[Votes], review: pd.DataFrame) -> pd.DataFrame:
    """Returns suspects.csv: the suspects of all parts with the verdicts that are known."""
    table = pd.concat([part.suspects for part in votes], ignore_index=True)
    verdicts = review[["id", "verdict", "new_label"]]
    table = table.drop(columns="margin").merge(verdicts, "left", "id")
    return table.fillna({"verdict": "", "new_label": ""}).round({"confidence": 4})


# --- reviewed labels ------------------------------------------------------------------------------


def reviewed(runs: list[FinishedRun], review: pd.DataFrame) -> list[FinishedRun]:
    """Returns the runs with reviewed labels, without images that are unclear or of no class."""
    return [_reviewed(run, review) for run in runs]


def with_review(workdir: Path, runs: list[FinishedRun]) -> list[FinishedRun]:
    """Returns the runs of a workdir, the complete ones with its reviewed labels."""
    lost = incomplete(workdir, runs)
    complete = [run for run in runs if run.name not in lost]
    review = stored_review(workdir, complete)
    if review.empty:
        raise UserError(
            f"{workdir} has no reviewed labels: python -m analysis.labels {workdir} lists what to "
            "review, and takes the review with --review=FILE"
        )
    return [*reviewed(complete, review), *(run for run in runs if run.name in lost)]


def _reviewed(run: FinishedRun, review: pd.DataFrame) -> FinishedRun:
    other, number = replace(run), {name: i for i, name in enumerate(run.class_names)}
    lost = (review.verdict == "unclear") | (review.new_label == NO_CLASS)
    wrong = review[(review.verdict == "wrong") & ~lost]
    correct = dict(zip(wrong["id"], wrong.new_label.map(number), strict=True))
    left_out = review["id"][lost].tolist()
    for part in ("test", "validation"):
        data = getattr(run, part)
        pairs = zip(data["ids"].tolist(), data["labels"].tolist(), strict=True)
        labels = np.array([correct.get(name, label) for name, label in pairs], np.int32)
        kept = ~np.isin(data["ids"], left_out)
        # Takes the place of what the cached property would read.
        other.__dict__[part] = {k: v[kept] for k, v in (data | {"labels": labels}).items()}
    return other


def _figures(comparison: Comparison) -> dict[str, tuple[str, ...]]:
    """Returns each model's figures, its rank by its score on the test images, and its letters."""
    table = comparison.table
    tied = table.score.duplicated(keep=False).map({True: "=", False: ""})
    columns = (
        table.test_accuracy_mean.map(percent),
        table.balanced_accuracy_mean.map(percent),
        table.nll_mean.map(decimal),
        table.ece_mean.map(percent),
        table.score.rank(ascending=False, method="min").astype(int).astype(str) + tied,
        table.group.replace("", NONE),
    )
    return dict(zip(table.label, zip(*columns, strict=True), strict=True))


def _established(comparison: Comparison) -> set[tuple[str, str]]:
    """Returns the pairs (better, worse) whose difference is established."""
    if comparison.pairs.empty:
        return set()
    own = comparison.pairs[comparison.pairs.established]
    return {(p.first, p.second) if p.difference > 0 else (p.second, p.first)
            for p in own.itertuples()}  # fmt: skip


def review_table(before: Comparison, after: Comparison) -> Table:
    """Returns each model's figures with the labels as they are, and as reviewed."""
    columns = ["model", "accuracy %", "balanced accuracy %", "NLL", "ECE %", "rank on test"]
    columns.append("group")
    old, new = _figures(before), _figures(after)
    rows = [[label, *(f"{a} → {b}" for a, b in zip(cells, new[label], strict=True))]
            for label, cells in old.items()]  # fmt: skip
    images = [len(c.runs[0].test["ids"]) for c in (before, after)]
    caption = f"Labels as they are → as reviewed; {images[0]} and {images[1]} test images."
    return Table(columns, rows, caption)


def changes(before: Comparison, after: Comparison) -> str:
    """Returns whether a review changes ranking, established differences and recommendation."""

    def order(comparison: Comparison) -> list[str]:
        ranked = comparison.table.sort_values(["score", "label"], ascending=[False, True])
        return ranked.label.tolist()

    first, last = order(before), order(after)
    text = "The ranking on the test images stays as it was"
    if first != last:
        text = f"The ranking on the test images changes from {listed(first)} to {listed(last)}"
    old, new = _established(before), _established(after)
    for pairs, word in ((new - old, "now"), (old - new, "no longer")):
        if pairs:
            text += f"; {word} established: {listed([f'{a} above {b}' for a, b in sorted(pairs)])}"
    text += ", with the same established differences." if old == new else "."
    use = before.recommendation.use, after.recommendation.use
    if use[0] == use[1]:
        return text
    return f"{text} Recommended is {use[1] or 'no model'} in place of {use[0] or 'none'}."


def _review_section(
    section: Section, before: Comparison, review: pd.DataFrame, votes: Votes
) -> str:
    """Adds what a review changes to a section, and returns its result in a sentence."""
    runs = reviewed(before.runs, review)
    after = compare(before.workdir, runs, before.options, before.data_path)
    counts = review.verdict.value_counts()
    wrong, ok, unclear = (int(counts.get(name, 0)) for name in ("wrong", "ok", "unclear"))
    tested = before.runs[0].test["ids"]
    found = int((review["id"].isin(tested) & (review.verdict == "wrong")).sum())
    result = changes(before, after)
    section.text += [
        f"{len(review)} images were reviewed: {wrong} labels are wrong, {ok} right, {unclear} "
        f"unclear. At least {percent(found / len(tested), 1)} % of the test labels are wrong.",
        *_confirmed(review, votes),
        result,
        "Only labels that the models contradict were looked at, so the review can only find errors "
        "in the models' favour: reviewed accuracies are somewhat too high.",
    ]
    section.tables.append(review_table(before, after))
    return f"Of {len(review)} reviewed labels {wrong} are wrong. {result}"


def _confirmed(review: pd.DataFrame, votes: Votes) -> list[str]:
    """Says how many of the suspects a review confirms, and what that makes of the estimate."""
    clear = review["id"].isin(votes.suspects["id"]) & (review.verdict != "unclear")
    wrong, count = int((review.verdict[clear] == "wrong").sum()), int(clear.sum())
    if not count:
        return []
    share = f"{percent(wrong / count, 0)} % ({percents(*wilson(wrong, count), 0)})"
    return [
        f"Of {count} clear cases among the reviewed suspects of the test part {wrong} are wrong: "
        f"{share}. The estimate takes the others for wrong labels, too. Were all that the models "
        f"contradict like these, {percent(wrong / count * votes.wrong.value, 1)} % of the test "
        "labels would be wrong."
    ]


# --- the chapter ----------------------------------------------------------------------------------


def ceiling(votes: Votes) -> str:
    """Returns what the estimate means for the accuracy that can be expected."""
    value, (low, high) = votes.wrong.value, votes.wrong.interval
    share = f"{percent(value, 1)} % (95 % interval {percents(low, high, 1)})"
    if not votes.voters:
        return f"No model is good enough to judge the {votes.part} labels."
    if value == 0:
        return f"No sign of wrong {votes.part} labels: {share}."
    return (
        f"{share} of the {votes.part} labels look wrong; if they are, no model can be expected "
        f"above {percent(1 - value, 1)} % accuracy."
    )


MEANING = (
    "Confident learning (Northcutt, Jiang and Chuang 2021) on the models' mean probabilities: the "
    "value comes from the most confident quarter of each class; the upper end counts every "
    "confident contradiction as a wrong label.",
    "In simulations with several models of 80 to 95 % accuracy, the interval holds the truth in at "
    "least 90 of 100 cases if label errors do not depend on how hard a photo is, and less often "
    "with a single weak model.",
    "Hard photos that every model gets wrong look like wrong labels: the value is then too high. "
    "Where people and models mistake the same photos for the same class, it is far too low, as "
    "such labels contradict no model. Only a person can tell.",
)


def _votes(comparison: Comparison) -> list[Votes]:
    """Returns what is said of each part; cross-validation tests the validation images as well."""
    parts = ("test",) if comparison.folds else ("test", "validation")
    return [contradictions(comparison.groups, part) for part in parts]


def labels_section(comparison: Comparison) -> Section | None:
    """Returns which labels look wrong, how many, and what a review of them changes."""
    if not comparison.groups:
        return None
    votes = _votes(comparison)
    review = stored_review(comparison.workdir, comparison.runs)
    section = Section(finding=ceiling(votes[0]))
    if votes[0].silent:
        silent = "; ".join(f"{label} ({why})" for label, why in votes[0].silent.items())
        section.text.append(f"Without a vote: {silent}.")
    rows = [
        [v.part, str(len(v.labels)), str(len(v.suspects)), percent(v.wrong.value, 1),
         percents(*v.wrong.interval, 1)]
        for v in votes
    ]  # fmt: skip
    columns = ["part", "images", "suspects", "wrong labels %", "95 % interval"]
    caption = (
        "Suspects: images whose label the models together confidently contradict. (Validation "
        "images also chose the weights; test images chose nothing.)"
    )
    if comparison.folds:
        caption = "Suspects: images whose label the models together confidently contradict, each "
        caption += "predicted by the fold that was not trained on it."
    if votes[0].voters:
        caption += f" Voting: {listed(votes[0].voters)}."
    section.tables = [Table(columns, rows, caption)]
    shown = votes[0].suspects.head(SHOWN)
    if len(shown):
        _add_photos(section, comparison, shown, len(votes[0].suspects))
    if len(review):
        section.finding += " " + _review_section(section, comparison, review, votes[0])
    elif len(shown):
        command = f"python -m analysis.labels {comparison.workdir}"
        section.text.append(
            f"To review them, fill in the table that this command writes: {command}"
        )
    section.details.append(Details("How wrong labels are estimated", list(MEANING)))
    section.data = {v.part: {"wrong": v.wrong.value, "ci95": v.wrong.interval} for v in votes}
    return section


def _add_photos(section: Section, comparison: Comparison, shown: pd.DataFrame, count: int) -> None:
    first = comparison.runs[0]
    try:
        save(draw_suspects(first, shown, comparison.data_path), comparison.output / "suspects.png")
    except UserError as error:
        section.text.append(f"Without photos: {error}.")
        return
    caption = (
        f"The {len(shown)} of {count} suspects in the test part that the models contradict most: "
        "the label, the likely one, and how many of the voting models are confident of it."
    )
    lines = [f"{i}. {name}" for i, name in enumerate(shown["id"], 1)]
    section.details.append(Details("Files of these photos", lines))
    section.pictures = [Picture("suspects.png", caption, wide=True)]


def write_suspects(comparison: Comparison, output: Path, count: int) -> list[str]:
    """Writes suspects.csv and suspects.png into a folder, and returns what there is to say.

    Verdicts stay: those of the review, and those filled into the file that is there.
    """
    runs, file = comparison.runs, output / "suspects.csv"
    review = stored_review(comparison.workdir, runs)
    if file.exists():
        review = pd.concat([read_review(file, runs), review]).drop_duplicates("id")
    votes = _votes(comparison)
    suspects_of(votes, review)[list(COLUMNS)].to_csv(file, index=False)
    lines, shown = [*map(ceiling, votes), f"suspects: {file}"], votes[0].suspects.head(count)
    if len(shown):
        picture = output / "suspects.png"
        try:
            save(draw_suspects(runs[0], shown, comparison.data_path), picture)
            lines.append(f"photos: {picture}")
        except UserError as error:
            lines.append(f"without photos: {error}")
    return lines


def take_review(comparison: Comparison, path: Path) -> list[str]:
    """Keeps the verdicts of a file in the workdir, and returns what they change."""
    file = output_folder(comparison.workdir / "labels") / "review.csv"
    review = read_review(path, comparison.runs)
    if review.empty:
        raise UserError(f"{path}: no row has a verdict; fill in ok, wrong or unclear")
    review.to_csv(file, index=False)
    section = Section()
    _review_section(section, comparison, review, contradictions(comparison.groups))
    (table,) = section.tables
    return [*section.text, str(table), table.caption, f"kept in {file}: reports now show both"]


def main(argv: list[str]) -> None:
    """Lists the suspects of a workdir, or takes in a review of them."""
    usage = "analysis.labels WORKDIR [--count=60] [--data=PATH] [--output=DIR] [--review=FILE]"
    comparison = compare_workdir(*arguments(argv, usage), DATA.value)
    if REVIEW.value:
        lines = take_review(comparison, Path(REVIEW.value).expanduser())
    else:
        folder = output_folder(OUTPUT.value or comparison.workdir / "labels")
        lines = write_suspects(comparison, folder, COUNT.value)
    print("\n".join(lines))


if __name__ == "__main__":
    COUNT = flags.DEFINE_integer("count", 60, "Photos of suspects", lower_bound=1)
    DATA = flags.DEFINE_string("data", "", "Where the data lies now, if it was moved")
    OUTPUT = flags.DEFINE_string("output", "", "Folder of suspects.csv and suspects.png")
    REVIEW = flags.DEFINE_string("review", "", "A filled-in suspects.csv")
    run_command(main)
