"""How often does the monitor alarm, on unchanged photos and on changed ones?

    python -m tests.deploy.drift_study RUN [--data=PATH] [--windows=200]

Windows are drawn from the test part, without replacement; photos are changed as the model sees
them (half as many windows). The reference is the validation images, as in the monitor; but with
"both from test" it is as many other test images, drawn anew for each window, so that nothing but
chance differs, and with "halves" reference and window are halves of the validation images.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image, ImageFilter

from analysis.confidence import softmax
from analysis.forward import load_images
from analysis.runs import load_run
from analysis.uncertainty import wilson
from deploy.drift import Sample, compare_samples
from deploy.load import load
from experiment.command import arguments, run_command

SIZES, RATE = (50, 100, 200, 500), 0.05
DIVISIONS = 299  # 300 times a third of the rate is whole, so no level is lost


def darker(factor: float) -> Callable:
    return lambda images: np.round(images * factor).astype(np.uint8)


def blurred(radius: float) -> Callable:
    """A Gaussian of that many pixels' standard deviation."""
    blur = ImageFilter.GaussianBlur(radius)
    return lambda images: np.stack([np.asarray(Image.fromarray(x).filter(blur)) for x in images])


def noisy(deviation: float) -> Callable:
    draw = np.random.default_rng(0)
    return lambda x: np.clip(np.round(x + draw.normal(0, deviation, x.shape)), 0, 255).astype(np.uint8)  # fmt: skip


CHANGES = {
    **{f"{100 * (1 - f):.0f} % darker": darker(f) for f in (0.9, 0.7, 0.5)},
    **{f"blurred, {r} pixels": blurred(r) for r in (0.5, 0.75)},
    **{f"noise of {d} of 255": noisy(d) for d in (2, 4, 8)},
}


def answers(predictor, images: np.ndarray, labels: np.ndarray) -> Sample:
    parts = [predictor.answer(x) for x in np.array_split(images, -(-len(images) // 128))]
    logits, features = (np.concatenate([p[k] for p in parts]) for k in ("logits", "features"))
    probabilities = softmax(logits, predictor.facts["temperature"])
    correct = (logits.argmax(axis=1) == labels).astype(float)
    return Sample(logits.argmax(axis=1), probabilities.max(axis=1), features, correct)


def unknown(sample: Sample) -> Sample:
    """The sample without what is right: nobody corrected these answers."""
    return Sample(sample.classes, sample.confidence, sample.features, sample.correct * np.nan)


def pairs(
    name: str, validation: Sample, test: Sample, labels: np.ndarray, size: int, windows: int
) -> Iterator[tuple[Sample, Sample]]:
    """Yields reference and window."""
    for seed in range(windows):
        draw = np.random.default_rng([size, seed])
        if name == "both from test":
            order = draw.permutation(len(test))
            reference, rows = test.rows(order[: len(validation)]), order[len(validation) :]
            yield reference, unknown(test.rows(rows[:size]))
        elif name == "halves":
            order, half = draw.permutation(len(validation)), len(validation) // 2
            yield validation.rows(order[:half]), unknown(validation.rows(order[half:][:size]))
        else:
            tripled = name == "one class tripled"
            weight = np.where((labels == draw.choice(labels)) & tripled, 3.0, 1.0)
            rows = draw.choice(len(test), size, replace=False, p=weight / weight.sum())
            yield validation, unknown(test.rows(rows))


def main(argv: list[str]) -> None:
    """Prints a line for each change and size of a window: alarms, and those of each test alone."""
    (path,) = arguments(argv, "tests.deploy.drift_study RUN [--data=PATH]")
    run, predictor = load_run(Path(path)), load(Path(path))
    images = load_images(run, "test", DATA.value)
    labels = run.test["labels"]
    validation = answers(
        predictor, load_images(run, "validation", DATA.value), run.validation["labels"]
    )
    clean = answers(predictor, images, labels)
    nothing = dict.fromkeys(("both from test", "halves", "unchanged", "one class tripled"))
    for name, change in {**nothing, **CHANGES}.items():
        test = clean if change is None else answers(predictor, change(images), labels)
        windows = WINDOWS.value if change is None else max(1, WINDOWS.value // 2)
        print(f"{name}, {windows} windows: accuracy {test.correct.mean():.3f}", flush=True)
        for size in SIZES:
            if name == "halves" and size > len(validation) // 2:
                continue
            found = [
                compare_samples(*pair, RATE, DIVISIONS)
                for pair in pairs(name, validation, test, labels, size, windows)
            ]
            alarms = sum(any(t.alarm for t in tests) for tests in found)
            low, high = wilson(alarms, len(found))
            alone = ", ".join(
                f"{tests[0].name} {np.mean([t.p <= RATE for t in tests]):.3f}"
                for tests in zip(*found, strict=True)
            )
            share = f"{alarms / len(found):.3f} ({low:.3f} to {high:.3f})"
            print(f"  {size} images: {share}; alone at {RATE}: {alone}", flush=True)


if __name__ == "__main__":
    DATA = flags.DEFINE_string("data", "", "Where the run's data lies now, if it was moved")
    WINDOWS = flags.DEFINE_integer("windows", 200, "Windows of each kind", lower_bound=1)
    run_command(main)
