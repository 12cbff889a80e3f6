"""What the script of the page does, in a browser without a window."""

import html
import json
import re
import subprocess

import pytest

from tests.browser import BROWSER, Browser

ACTIONS = """
try {
const rows = () => all("#summary tbody tr:not(.off) .name").map(part => part.textContent);
const seen = {}, box = text => all("#tools label").find(label => label.textContent.trim() === text).querySelector("input");
seen.before = rows();
const heads = all("#summary thead th"), sorted = head => { head.querySelector("button").click(); return rows(); };
seen.names = sorted(heads[0]);
seen.descending = sorted(heads[1]);
seen.ascending = sorted(heads[1]);
const search = document.querySelector("#tools input[type=search]");
const find = text => { search.value = text; search.dispatchEvent(new Event("input")); };
find("M");
seen.found = rows();
seen.points = all(".pareto g:not(.off)").length / all(".pareto").length;
find("");
box("cnn").click();
seen.hidden = rows();
seen.pairs = all("#pairs-of-models tbody tr:not(.off)").length;
box("cnn").click();
box("Cost").click();
seen.columns = all("#summary thead th:not(.off)").length;
const link = document.querySelector(".matrix a"), photos = () => all(".photos figure:not(.off)");
seen.all = photos().length;
link.click();
seen.cell = [link.closest("table").dataset.model, link.dataset.t, link.dataset.p];
seen.chosen = photos().map(photo => [photo.dataset.t, photo.dataset.c.trim().split(" ")]);
seen.status = document.querySelector(".status").textContent;
document.querySelector(".status button").click();
seen.again = photos().length;
const differing = () => all("#difference tbody tr").map(row => [...row.cells].map(cell => cell.textContent));
seen.difference = differing();
const second = all(".compare select")[1];
second.value = 0;
second.dispatchEvent(new Event("change"));
seen.same = document.querySelector("#difference").textContent;
const term = document.querySelector("#summary .term");
term.dispatchEvent(new Event("focus"));  // a page without a window has no focus
seen.reachable = term.tabIndex;
seen.tip = document.querySelector("#tip:not([hidden])").textContent;
const rest = Array.from({ length: 35 }, () => make("tr", {}, make("td", { textContent: "x" })));
const long = make("table", {}, make("tbody", {}, ...rest));
document.body.append(long);
cap(long);
const visible = () => rest.filter(row => getComputedStyle(row).display !== "none").length;
seen.values = ["1,020", "< 0.0001", "> 99", "∞", "+2.5 to +3", "20 k", "–"].map(text => value(make("td", { textContent: text })));
seen.capped = [visible(), long.nextSibling.textContent];
long.nextSibling.click();
seen.uncapped = visible();
dispatchEvent(new Event("beforeprint"));
seen.open = all(".chapter").every(chapter => chapter.open);
document.body.append(make("pre", { id: "seen", textContent: JSON.stringify(seen) }));
} catch (error) { document.body.append(make("pre", { id: "seen", textContent: error.stack })); }
"""


@pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed")
def test_the_script_sorts_filters_hides_compares_and_finds_photos(page, tmp_path):
    text = page.read_text(encoding="utf-8").replace(
        "</script>\n</body>", ACTIONS + "</script></body>"
    )
    file = tmp_path / "acted.html"
    file.write_text(text, encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'chrome'}",
    ]
    done = subprocess.run(
        [BROWSER, *flags, "--dump-dom", f"file://{file}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-500:]
    seen = html.unescape(found[1])
    assert seen.startswith("{"), seen  # or an error of the script
    seen = json.loads(seen)
    names = ["<b>net", "always plain", "cnn", "mlp"]
    assert sorted(seen["before"]) == seen["names"] == names
    assert seen["descending"] == seen["ascending"][::-1] != names
    assert seen["found"] == ["mlp"] and seen["points"] == 1
    assert sorted(seen["hidden"]) == [names[0], names[1], "mlp"] and seen["pairs"] == 1
    assert seen["columns"] == 4  # of model, accuracy, group, cost, calibration
    assert len(seen["chosen"]) > 0 and len(seen["chosen"]) < seen["all"] == seen["again"]
    model, true, predicted = seen["cell"]
    for t, said in seen["chosen"]:
        assert t == true and f"{model}:{predicted}" in said
    assert f": {len(seen['chosen'])} photo" in seen["status"] and "taken for" in seen["status"]
    assert ["model.name", *seen["before"][:2]] in seen["difference"]
    assert seen["values"] == [1020, 0.0001, 99, None, 2.5, 20000, None]  # JSON has no infinity
    assert seen["capped"] == [30, "Show all 35 rows"] and seen["uncapped"] == 35
    assert "the same" in seen["same"] and seen["tip"] and seen["reachable"] == 0 and seen["open"]


@pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed")
def test_an_open_menu_fits_a_telephone(page, tmp_path):
    menus = "[...document.querySelectorAll('details:has(> .menu)')]"
    with Browser(tmp_path / "profile", 420, 800) as browser:
        browser.call("Page.navigate", url=page.as_uri())
        browser.until(f"{menus}.length > 3")
        browser.run("document.querySelectorAll('.chapter').forEach(one => { one.open = true })")
        browser.run(
            f"{menus}.forEach(one => one.querySelector('label').append(' long'.repeat(30)))"
        )
        for i in range(browser.run(f"{menus}.length")):
            browser.run(f"{menus}.forEach((one, i) => {{ one.open = i === {i} }})")
            assert browser.run("document.documentElement.scrollWidth") <= 420
