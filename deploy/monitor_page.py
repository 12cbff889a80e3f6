"""What the monitor found, in words and on a page in the report's style."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.page.figures import literal, plt, save, shortened
from analysis.page.render import page
from analysis.page.section import Picture, Section, Table
from analysis.page.tables import decimal, p_value, percent, percents, points
from analysis.uncertainty import wilson
from analysis.verdict import listed, plural
from deploy.drift import LEAST_CORRECTED, Sample, Test, strata
from deploy.window import Finding, iso, when
from experiment.files import write_json

DRAWN = 30  # classes with bars
BLOCKS, IN_BLOCK = 40, 20  # over time, at most; images in each, at least
COLOURS = {"validation": "#1f6fb5", "window": "#d9731a"}
HOW = {
    "class mix": "chi-squared of homogeneity",
    "confidence": "Kolmogorov-Smirnov",
    "features": "classifier two-sample test",
    "accuracy": "in strata of confidence",
}
MEANING = (
    "p is the share of random divisions of all images, into parts of the two sizes, that differ at "
    "least as much. Holm's correction makes all tests together keep the false-alarm rate.",
    "It holds for images that are independent. Photos of one scene in a row count as many, and "
    "alarm more often; so do photos that the model was trained on.",
    "Validation images chose the weights, so the model may do a little better on them than on any "
    "others. A large window notices even that.",
    "No alarm is no proof: small windows find only large changes.",
    "Accuracy is of corrected images alone. It is compared with validation images of the same "
    "confidence, so it does no harm that the least sure ones are corrected first. It does harm if "
    "only mistakes are reported.",
)


def effect_of(test: Test) -> str:
    """Returns in words how much differs."""
    number = _effect(test, test.effect)
    return {
        "class mix": f"total variation {number}",
        "confidence": f"largest difference of shares {number}",
        "features": f"a classifier tells them apart with AUC {number}",
        "accuracy": f"{number} than equally sure validation images",
    }[test.name]


def _effect(test: Test, value: float) -> str:
    if test.name == "accuracy":  # what is lost
        return f"{percent(abs(value), 1)} points {'less' if value >= 0 else 'more'}"
    return decimal(value)


def verdict(found: Finding) -> str:
    """Returns the result in one sentence."""
    alarms = [test.name for test in found.tests if test.alarm]
    text = f"Alarm by {listed(alarms)}: not as on validation images"
    if not alarms:
        names = listed([test.name for test in found.tests])
        text = f"No alarm: {names} may be as on validation images"
    text += "; features could not be compared" * ("features" in found.untested)
    return f"{text}. Where nothing changed, at most {100 * found.rate:g} % of windows alarm."


def accuracy_of(reference: Sample, window: Sample) -> str:
    """Returns what the corrections say, "" where there are none."""
    if np.isnan(window.correct).all():
        return ""
    of = strata(reference, window)
    images, right = int(of.images.sum()), int(of.right.sum())
    if images < LEAST_CORRECTED:
        return (
            f"Accuracy: {plural(images, 'corrected image')} of {LEAST_CORRECTED} that it takes to "
            "say anything."
        )
    text = (
        f"Of {images} corrected images {right} were right: {percent(right / images, 1)} % (95 % "
        f"interval {percents(*wilson(right, images), 1)}). Of validation images that the model is "
        f"as sure of, {percent(of.expected, 1)} % are right; of all, "
        f"{percent(reference.correct.mean(), 1)} %."
    )
    if not right:
        text += " If only mistakes are reported, this says nothing: confirm right answers, too."
    return text


def moved(found: Finding) -> pd.DataFrame:
    """Returns each class's share of answers on validation and in the window; z is their difference.

    z is in standard errors (the adjusted residual), largest first.
    """
    samples, names = (found.reference, found.window.sample), found.run.class_names
    counts = [np.bincount(sample.classes, minlength=len(names)) for sample in samples]
    (before, now), every = (c / c.sum() for c in counts), sum(counts) / sum(map(sum, counts))
    error = np.sqrt(every * (1 - every) * sum(1 / c.sum() for c in counts))
    z = np.divide(now - before, error, out=np.zeros(len(names)), where=error > 0)
    table = pd.DataFrame({"class": names, "validation": before, "window": now, "z": z})
    return table.sort_values("z", key=abs, ascending=False, kind="stable", ignore_index=True)


def window_of(found: Finding) -> str:
    """Returns how many images of which time the window holds."""
    first, last = map(when, found.window.table.time.iloc[[0, -1]])
    return f"{len(found.window.table):,} images, {first} to {last} UTC"


def left_out(found: Finding) -> list[str]:
    """Returns what of the log is not in the window."""
    lines, versions = [], found.window.versions
    if found.window.repeated:
        lines.append(f"{found.window.repeated:,} earlier answers to the same images count once")
    for other in versions[versions.version != found.version].itertuples():
        lines.append(f"{other.answers:,} answers of version {other.version} ({other.model})")
    return lines


def described(found: Finding) -> Iterator[str]:
    """Yields the lines that the command prints."""
    yield f"window: {window_of(found)}"
    yield from (f"left out: {line}" for line in left_out(found))
    for test in found.tests:
        p = f"p {p_value(test.p)}, by Holm {p_value(test.adjusted)}"
        yield f"{test.name}: {effect_of(test)}; {p}" + ": ALARM" * test.alarm
    yield from filter(None, (found.lack, accuracy_of(found.reference, found.window.sample)))
    yield verdict(found)


# --- the page -------------------------------------------------------------------------------------


def write_page(output: Path, found: Finding) -> Path:
    """Writes index.html, its pictures and monitor.json into a folder, and returns the page."""
    sections = [
        Section("Tests", tables=[_tests(found)], finding=_strongest(found)),
        _class_mix(output, found),
        _confidence(output, found),
        _over_time(output, found),
        Section("Versions", left_out(found), [_versions(found)], finding=_others(found)),
        Section("How to read this", list(MEANING), finding="What holds, and when it does not."),
    ]
    facts = [("model", f"{found.run.name}, {found.file.name}"), ("version", found.version)]
    facts += [("window", window_of(found))]
    facts += [("reference", f"{len(found.reference):,} validation images")]
    facts += [("made", f"{when(time.time())} UTC")]
    accuracy = accuracy_of(found.reference, found.window.sample)
    content = page(
        output,
        sections,
        title=found.run.name,
        kind="monitor",
        facts=facts,
        sentences=[text for text in (verdict(found), accuracy) if text],
        warnings=[found.lack] if found.lack else [],
        opened=[section.title for section in sections],
    )
    write_json(output / "monitor.json", numbers_of(found))
    (output / "index.html").write_text(content, encoding="utf-8")
    return output / "index.html"


def numbers_of(found: Finding) -> dict:
    """Returns the content of monitor.json; times are UTC, ISO 8601."""
    sample, table, versions = found.window.sample, found.window.table, found.window.versions
    corrected = np.isfinite(sample.correct)
    others = versions[versions.version != found.version]
    return {
        "alarm": any(test.alarm for test in found.tests),
        "verdict": verdict(found),
        "rate": found.rate,
        "made": iso(time.time()),
        "run": found.run.name,
        "model": found.run.model,
        "file": str(found.file),
        "version": found.version,
        "images": len(table),
        "window": {"first": iso(table.time.iloc[0]), "last": iso(table.time.iloc[-1])},
        "repeated": found.window.repeated,
        "other_versions": others[["version", "model", "answers"]].to_dict("records"),
        "reference_images": len(found.reference),
        "tests": [asdict(test) for test in found.tests],
        "not_tested": found.untested,
        "classes": moved(found).to_dict("records"),
        "corrections": {
            "images": int(corrected.sum()),
            "right": int(sample.correct[corrected].sum()),
        },
    }


def _tests(found: Finding) -> Table:
    columns = ["compared", "result", "p by Holm", "p", "effect", "by chance", "images", "test"]
    rows = [
        [test.name, "alarm" if test.alarm else "no alarm", p_value(test.adjusted),
         p_value(test.p), effect_of(test), _effect(test, test.chance), f"{test.images:,}",
         HOW[test.name]]
        for test in found.tests
    ]  # fmt: skip
    caption = "By chance: what the effect exceeds in 5 of 100 windows like validation."
    return Table(columns, rows, caption)


def _strongest(found: Finding) -> str:
    test = min(found.tests, key=lambda test: test.p)
    return f"The smallest p is that of {test.name}: {p_value(test.p)}, {effect_of(test)}."


def _class_mix(output: Path, found: Finding) -> Section:
    table = moved(found)
    shown = table[:DRAWN].sort_index(ascending=False)
    figure, axis = plt.subplots(figsize=(5.6, 1.2 + 0.36 * len(shown)))
    place = np.arange(len(shown))
    for shift, name in ((0.2, "validation"), (-0.2, "window")):
        axis.barh(place + shift, 100 * shown[name], 0.38, label=name, color=COLOURS[name])
    axis.set_yticks(place, [literal(shortened(name)) for name in shown["class"]])
    axis.set(xlabel="share of answers, %")
    axis.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    save(figure, output / "classes.svg")
    cells = zip(table["class"], table.validation.map(lambda x: percent(x, 1)),
                table.window.map(lambda x: percent(x, 1)),
                (table.window - table.validation).map(lambda x: points(x, 1)),
                table.z.map(lambda z: decimal(z, 1, "+")), strict=True)  # fmt: skip
    columns = ["class", "validation %", "window %", "points", "z"]
    caption = "z: the difference in standard errors; one class in 20 is beyond 2 by chance."
    far = [f"{row['class']} ({points(row.window - row.validation, 0)} points)"
           for _, row in table[:3].iterrows() if abs(row.z) > 2]  # fmt: skip
    finding = f"Moved most: {listed(far)}." if far else "No class stands out."
    picture = Picture("classes.svg", "Answers by class, on validation images and in the window.")
    return Section("Class mix", [], [Table(columns, list(map(list, cells)), caption)], [picture],
                   finding=finding, pictures_first=True)  # fmt: skip


def _confidence(output: Path, found: Finding) -> Section:
    samples = {"validation": found.reference, "window": found.window.sample}
    pictures = {"histogram": "images, %", "distribution": "images at or below, %"}
    for name, title in pictures.items():
        figure, axis = plt.subplots(figsize=(5.6, 2.8))
        for label, sample in samples.items():
            style = {"color": COLOURS[label], "label": label}
            values, share = np.sort(sample.confidence), 100 / len(sample)
            if name == "histogram":
                weights = np.full(len(values), share)
                axis.hist(values, 20, (0, 1), weights=weights, histtype="step", lw=1.5, **style)
            else:
                axis.step(values, share * np.arange(1, len(values) + 1), **style)
        axis.set(xlabel="confidence", ylabel=title, xlim=(0, 1))
        axis.legend(frameon=False, loc="upper left")
        save(figure, output / f"{name}.svg")
    before, now = (sample.confidence.mean() for sample in samples.values())
    captions = (
        "Confidence in the likeliest class.",
        "The same, summed up: what the test compares.",
    )
    return Section(
        "Confidence",
        pictures=[
            Picture(f"{name}.svg", text) for name, text in zip(pictures, captions, strict=True)
        ],
        finding=f"Mean {percent(before, 1)} % on validation, {percent(now, 1)} % in the window.",
    )


def _over_time(output: Path, found: Finding) -> Section:
    """Draws blocks of images in order of time, with the band of as large blocks of validation."""
    window, reference = found.window.sample, found.reference
    number = int(np.clip(len(window) // IN_BLOCK, 1, BLOCKS))
    blocks = np.array_split(np.arange(len(window)), number)
    measures = {"mean confidence": lambda sample, rows: sample.confidence[rows].mean()}
    if reference.features is not None:
        measures["shift of features"] = shift_from(reference.features)
    draw, size = np.random.default_rng(0), min(len(blocks[0]), len(reference))
    drawn = [draw.choice(len(reference), size, replace=False) for _ in range(400)]
    figure, axes = plt.subplots(len(measures), figsize=(7, 2.2 * len(measures)), squeeze=False)
    place = [block.mean() + 1 for block in blocks]
    for axis, (name, measure) in zip(axes[:, 0], measures.items(), strict=True):
        band = np.quantile([measure(reference, rows) for rows in drawn], [0.025, 0.975])
        axis.axhspan(*band, color=COLOURS["validation"], alpha=0.2, lw=0)
        values = [measure(window, rows) for rows in blocks]
        axis.plot(place, values, "o-", ms=3, lw=1, color=COLOURS["window"])
        ticks = np.unique(np.linspace(0, len(window) - 1, 6).astype(int))
        axis.set_xticks(ticks + 1, [])
        axis.set(ylabel=name)
    times = found.window.table.time.iloc[ticks].map(when)
    day = times.iloc[0][:10] if times.str[:10].nunique() == 1 else ""
    axes[-1, 0].set_xticklabels(times.str[11:] if day else times.str[5:16], fontsize=8)
    axes[-1, 0].set_xlabel(f"images in order of time, {day} UTC".replace("  ", " "))
    save(figure, output / "time.svg")
    caption = (
        f"Blocks of {len(blocks[0])} images. Shaded: where 95 of 100 such blocks of validation "
        "images lie. Shift: distance of the block's mean from that of validation images, in units "
        "of what chance gives."
    )
    return Section("Over time", pictures=[Picture("time.svg", caption)],
                   finding=f"{len(blocks)} blocks of images in order of time.")  # fmt: skip


def shift_from(features: np.ndarray) -> Callable[[Sample, np.ndarray], float]:
    """Returns how far the mean of rows of a sample is from that of features [N, D], as a function.

    It is the Mahalanobis distance by the square root of D / rows, so about 1 by chance.
    """
    mean, spread = features.mean(axis=0), np.cov(features.T)
    spread += (1e-3 * np.trace(spread) / len(spread) + 1e-12) * np.eye(len(spread))
    factor = np.linalg.cholesky(np.linalg.inv(spread)) / np.sqrt(len(spread))

    def shift(sample: Sample, rows: np.ndarray) -> float:
        moved = (sample.features[rows].mean(axis=0) - mean) @ factor
        return float(np.linalg.norm(moved) * np.sqrt(len(rows)))

    return shift


def _versions(found: Finding) -> Table:
    columns = ["version", "model", "answers", "first, UTC", "last, UTC"]
    rows = [[v.version, v.model, f"{v.answers:,}", when(v.first), when(v.last)]
            for v in found.window.versions.itertuples()]  # fmt: skip
    return Table(columns, rows, "Answers in the log of the window's time.")


def _others(found: Finding) -> str:
    number = len(found.window.versions) - 1
    return f"Others that answered in this time: {number}." if number else "No other version."
