import re

from analysis.page.glossary import GLOSSARY, term_of
from analysis.page.render import answers, has_words, shares, slug
from analysis.page.section import Matrix, Photo, Table


def test_links_lead_somewhere_and_ids_are_unique(page):
    text = page.read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    links = set(re.findall(r'href="#([^"]+)"', text))
    assert links and links <= set(ids)
    assert {f"term-{slug(name)}" for name in GLOSSARY} <= set(ids)
    assert "&lt;b&gt;net" in text and "<b>net" not in text and "nan" not in text.lower().split()


def test_every_photo_stands_once_and_every_chapter_is_folded(page):
    text = page.read_text(encoding="utf-8")
    photos = re.findall(r'<img src="(data:image/(?:png|jpeg);[^"]+)"', text)
    assert len(photos) > 20 and len(set(photos)) == len(photos)
    chapters = re.findall(r'<details class="chapter"( open)?>\s*<summary><h2>(.+?)</h2>', text)
    assert len(chapters) >= 8 and not any(opened for opened, _ in chapters)
    assert text.index('id="summary"') < text.index('<details class="chapter"')


def test_terms_are_explained():
    assert term_of("ECE % scaled") == "ECE" and term_of("95 % over seeds") == "95 % interval"
    assert term_of("kept %") == "Kept" and term_of("model") == ""
    assert all(term_of(name) in (name, "") or name for name in GLOSSARY)
    assert all(meaning.endswith(".") for meaning in GLOSSARY.values())


def test_cells_of_a_matrix_are_shares_of_the_true_class():
    rows = shares(Matrix("a", [[3, 1, 0], [0, 0, 0], [0.33, 0, 12.6]]))
    assert rows[0] == [("3", 0.75), ("1", 0.25), ("", 0)] and rows[1] == [("", 0)] * 3
    assert [text for text, _ in rows[2]] == ["0.3", "", "13"]


def test_a_photo_says_what_models_made_of_it():
    said = {"a": {1: 2}, "b": {0: 1, 1: 1}, "c": {0: 2}, "d": {2: 1, 1: 1}}
    lines = answers(Photo("", "", 0, said), ["x", "y", "z"])
    assert lines == [("y", "a, b 1/2, d 1/2"), ("z", "d 1/2"), ("1 of 4 right", "")]
    many = {f"m{i}": {1: 1} for i in range(9)}
    assert answers(Photo("", "", 0, many), ["x", "y"])[0] == ("y", "m0, m1, m2, m3 and 5 more")


def test_words_are_told_from_numbers():
    table = Table(["a", "b", "c"], [["x", "+1.5", "–"], ["2", "< 0.1", "3 to 4"]])
    assert [has_words(table, i) for i in range(3)] == [True, False, False]
