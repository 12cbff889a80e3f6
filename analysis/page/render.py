"""Makes a page of chapters, such as index.html of a comparison: one file, complete in itself."""

import base64
import re
from dataclasses import dataclass
from mimetypes import guess_type
from pathlib import Path

import jinja2
from markupsafe import Markup

from analysis.compare import Comparison
from analysis.criterion import TITLES
from analysis.page import first, pareto
from analysis.page.glossary import GLOSSARY, term_of
from analysis.page.section import Matrix, Photo, Section, Table

FOLDER = Path(__file__).parent
ANSWERS = 4  # of a photo, by models; more are counted
SHOWN = 30  # rows of a long table before a reader asks for all


@dataclass(frozen=True)
class Names:
    """The numbers of models on the page, by which a script finds what belongs to them."""

    models: dict[str, int]
    pairs: dict[str, str]

    def of(self, cell: str) -> str:
        """Returns the numbers of the model or the pair that a cell names, "" for another text."""
        return str(self.models[cell]) if cell in self.models else self.pairs.get(cell, "")


def render(comparison: Comparison, sections: list[Section]) -> str:
    """Returns index.html of a comparison."""
    recommendation = comparison.recommendation
    summary = first.summary(comparison, sections)
    return page(
        comparison.output,
        sections,
        title=comparison.workdir.resolve().name,
        kind="comparison",
        facts=first.facts(comparison),
        sentences=recommendation.sentences,
        use=recommendation.use,
        criterion=TITLES[comparison.criterion],
        warnings=recommendation.warnings,
        reasons=comparison.reasons,
        summary=summary,
        plots=pareto.plots(comparison, sections),
        names=_names(comparison),
        glossary=GLOSSARY,
        term_of=term_of,
        opened=() if summary.rows else ("Data",),
    )


def page(
    output: Path, sections: list[Section], *, sentences: list[str], warnings: list[str], **content
) -> str:
    """Returns a page of chapters: pictures, style and script are inside it, every name is escaped.

    Args:
      output: the folder of the chapters' pictures.
      sections: the chapters; those whose titles are in `opened` are not folded.
      sentences: what it all comes to.
      warnings: beside those of chapters.
      content: what else the template takes; without models that is title, kind and facts.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def source(file: str) -> str:
        content = base64.b64encode((output / file).read_bytes()).decode()
        return f"data:{guess_type(file)[0]};base64,{content}"

    warned = [("", text) for text in warnings]
    warned += [(section.title, text) for section in sections for text in section.warnings]
    bare = {"use": "", "reasons": {}, "summary": {"rows": []}, "plots": [], "glossary": {}}
    bare |= {"names": Names({}, {}), "term_of": lambda heading: ""}
    return environment.get_template("report.html.j2").render(
        bare | content,
        sentences=sentences,
        warnings=warned,
        sections=sections,
        plot=pareto,
        style=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),  # noqa: S704 - our own
        script=Markup((FOLDER / "report.js").read_text(encoding="utf-8")),  # noqa: S704 - our own
        drawing=first,
        shown=SHOWN,
        source=source,
        slug=slug,
        has_words=has_words,
        shares=shares,
        answers=answers,
    )


def _names(comparison: Comparison) -> Names:
    models = {label: i for i, label in enumerate(comparison.groups)}
    pairs = {
        f"{a} − {b}": f"{models[a]} {models[b]}"
        for a, b in zip(*(comparison.pairs.get(k, []) for k in ("first", "second")), strict=True)
    }
    return Names(models, pairs)


def slug(title: str) -> str:
    """Returns the anchor of a title."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def has_words(table: Table, column: int) -> bool:
    """Returns whether a column holds words, which are set flush left, and not numbers."""
    return any(not re.match(r"([<>] |[+-])?\d|[–∞]$", row[column]) for row in table.rows)


def shares(matrix: Matrix) -> list[list[tuple[str, float]]]:
    """Returns each cell of a confusion matrix as text and as its share of the true class."""
    rows = []
    for row in matrix.counts:
        total = sum(row) or 1
        texts = ("" if not x else f"{x:.0f}" if x >= 1 else f"{x:.1f}" for x in row)
        rows.append([(text, round(x / total, 3)) for text, x in zip(texts, row, strict=True)])
    return rows


def answers(photo: Photo, classes: list[str]) -> list[tuple[str, str]]:
    """Returns (class, models that said so): the wrong answers, then how many models were right."""
    lines, right = [], 0
    by_class: dict[int, list[str]] = {}
    for model, said in photo.said.items():
        seeds = sum(said.values())
        right += said.get(photo.true, 0) == seeds
        for predicted, count in said.items():
            if predicted != photo.true:
                some = "" if count == seeds else f" {count}/{seeds}"
                by_class.setdefault(predicted, []).append(model + some)
    for predicted, models in sorted(by_class.items(), key=lambda item: -len(item[1])):
        more = f" and {len(models) - ANSWERS} more" if len(models) > ANSWERS else ""
        lines.append((classes[predicted], ", ".join(models[:ANSWERS]) + more))
    return [*lines, (f"{right} of {len(photo.said)} right", "")]
