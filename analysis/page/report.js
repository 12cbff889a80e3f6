"use strict";
document.documentElement.classList.add("script");
// What the page does beyond being read: sort, filter, hide, compare configs, find photos of a cell.
const all = (query, from = document) => [...from.querySelectorAll(query)];
function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

// A click on a column's name sorts by it: numbers (with k, M, G) by size, words by name.
const units = { k: 1e3, M: 1e6, G: 1e9 };
function value(cell) {
  if (cell.dataset.v !== undefined) return cell.dataset.v === "" ? null : Number(cell.dataset.v);
  const text = (cell.querySelector(".name") || cell).textContent.trim(), number = text.replace(/(\d),(?=\d{3})/g, "$1").match(/^([<>] )?([+-]?\d+(?:\.\d+)?)(?: ([kMG])\b)?/);
  if (text === "–" || text === "") return null;
  if (text === "∞") return Infinity;
  return number && !cell.classList.contains("words") ? number[2] * (units[number[3]] || 1) : text.toLowerCase();
}
function sort(head) {
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const down = head.getAttribute("aria-sort") !== "descending" && !(column === 0 && !head.hasAttribute("aria-sort"));
  for (const other of all("th", table.tHead)) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...body.rows].map(row => [value(row.cells[column]), row]);
  rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : (down ? -1 : 1) * ((a > b) - (a < b)));
  body.append(...rows.map(([, row]) => row));
}
for (const head of all("#summary thead th"))
  head.querySelector(".head").append(make("button", { type: "button", title: "Sort", ariaLabel: `Sort by ${head.querySelector(".head").textContent}` }));
for (const button of all(".data th button")) button.addEventListener("click", () => sort(button.closest("th")));

// Long tables show their first rows until a reader asks for all.
function cap(table) {
  const count = table.tBodies[0].rows.length, scroll = table.closest(".scroll") || table;
  if (count <= 30) return;
  table.classList.add("capped");
  const more = make("button", { type: "button", className: "more", textContent: `Show all ${count.toLocaleString("en")} rows` });
  more.addEventListener("click", () => { table.classList.remove("capped"); more.remove(); });
  scroll.after(more);
}

// Columns of a wide table, and models everywhere, can be hidden.
function menu(title, names, change) {
  const boxes = names.map((name, i) => {
    const box = make("input", { type: "checkbox", checked: true });
    box.addEventListener("change", () => change(i, box.checked));
    return make("label", {}, box, ` ${name}`);
  });
  return make("details", {}, make("summary", { textContent: title }), make("div", { className: "menu" }, ...boxes));
}
function columns(table) {
  const heads = [...table.tHead.rows[0].cells], name = head => (head.querySelector(".head") || head.querySelector("button")).textContent;
  return menu("Columns", heads.slice(1).map(name), (i, on) => {
    for (const row of table.rows) row.cells[i + 1].classList.toggle("off", !on);
  });
}
const summary = document.querySelector("#summary"), hidden = new Set();
let query = "";
const models = summary ? [...summary.tBodies[0].rows].map(row => row.querySelector(".name").textContent) : [];
function show() {
  const gone = i => hidden.has(i) || !models[i].toLowerCase().includes(query);
  for (const part of all("[data-m]")) {
    const of = part.dataset.m.split(" ").filter(Boolean).map(Number);
    part.classList.toggle("off", of.some(gone));
  }
  if (query) for (const table of all(".capped")) table.classList.remove("capped");
}
if (summary) {
  const tools = document.querySelector("#tools"), search = make("input", { type: "search", placeholder: "Filter models", ariaLabel: "Filter models" });
  search.addEventListener("input", () => { query = search.value.trim().toLowerCase(); show(); });
  const chooser = menu("Models", models, (i, on) => { hidden[on ? "delete" : "add"](i); show(); }), boxes = all("input", chooser);
  for (const [text, on] of [["All", true], ["None", false]]) {
    const button = make("button", { type: "button", textContent: text });
    button.addEventListener("click", () => boxes.forEach((box, i) => { box.checked = on; hidden[on ? "delete" : "add"](i); }) || show());
    chooser.querySelector(".menu").append(button);
  }
  const chapters = all(".chapter"), open = make("button", { type: "button", textContent: "Open all chapters" });
  open.addEventListener("click", () => {
    const opening = chapters.some(chapter => !chapter.open);
    for (const chapter of chapters) chapter.open = opening;
    open.textContent = opening ? "Close all chapters" : "Open all chapters";
  });
  tools.append(search, chooser, columns(summary), open);
  if (document.querySelector("#configs")) tools.append(make("a", { href: "#configs", textContent: "Compare configs" }));
  tools.hidden = false;
}
for (const table of all(".data")) {
  cap(table);
  const scroll = table.closest(".scroll");
  if (scroll && table.tHead.rows[0].cells.length > 7) {
    const chooser = columns(table);
    chooser.classList.add("columns");
    scroll.before(chooser);
  }
}

// The fields in which the configs of two models differ.
const configs = document.querySelector("#configs");
if (configs && configs.tBodies[0].rows.length > 1) {
  const rows = [...configs.tBodies[0].rows], fields = all("thead button", configs).map(button => button.textContent);
  const choice = number => make("select", { ariaLabel: number ? "Second model" : "First model" }, ...rows.map((row, i) => make("option", { value: i, textContent: row.cells[0].textContent, selected: i === number })));
  const chosen = [choice(0), choice(1)], result = make("div", { className: "scroll", id: "difference" });
  const compare = () => {
    const [a, b] = chosen.map(select => rows[select.value]), cell = (name, text) => make(name, { textContent: text, className: "words" });
    const lines = fields.map((field, i) => [field, a.cells[i].textContent, b.cells[i].textContent]).filter(([, x, y], i) => i && x !== y);
    const table = make("table", { className: "data" }, make("thead", {}, make("tr", {}, ...["field", a.cells[0].textContent, b.cells[0].textContent].map(text => cell("th", text)))),
      make("tbody", {}, ...lines.map(line => make("tr", {}, ...line.map(text => cell("td", text))))));
    result.replaceChildren(lines.length ? table : "Their configs are the same.");
  };
  for (const select of chosen) select.addEventListener("change", compare);
  const before = configs.closest(".scroll");
  before.before(make("p", { className: "compare" }, "Compare the configs of ", chosen[0], " and ", chosen[1]), result);
  compare();
}

// A click on a cell of a confusion matrix shows its photos.
const photos = all(".photos figure"), status = document.querySelector(".status");
function filter(link) {
  const model = link?.closest("[data-model]")?.dataset.model, { t, p } = link?.dataset || {};
  for (const chosen of all(".chosen")) chosen.classList.remove("chosen");
  link?.classList.add("chosen");
  let count = 0;
  for (const photo of photos) {
    const said = photo.dataset.c.split(" ").map(pair => pair.split(":"));
    const fits = !link || photo.dataset.t === t && said.some(([m, c]) => c === p && (model === undefined || m === model));
    photo.classList.toggle("off", !fits);
    count += fits;
  }
  status.textContent = "";
  if (!link) return;
  const back = make("button", { type: "button", className: "more", textContent: "Show all photos" });
  back.addEventListener("click", () => filter(null));
  status.append(`${model === undefined ? "All models" : models[model]}: ${count} photo${count === 1 ? "" : "s"}, ${link.title}. `, back);
}
for (const link of all("a[data-t]")) link.addEventListener("click", event => {
  event.preventDefault();
  filter(link);
  document.querySelector("#photos").scrollIntoView({ block: "nearest" });
});

// Definitions appear where the keyboard or the pointer is.
const tip = make("div", { id: "tip", role: "tooltip", hidden: true });
document.body.append(tip);
for (const term of all(".term")) {
  const text = term.title;
  term.removeAttribute("title");
  term.setAttribute("aria-describedby", "tip");
  const open = () => {
    const place = term.getBoundingClientRect();
    tip.textContent = text;
    tip.hidden = false;
    tip.style.left = `${Math.max(8, Math.min(place.left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${place.bottom + tip.offsetHeight + 12 < innerHeight ? place.bottom + 6 : place.top - tip.offsetHeight - 6}px`;
  };
  for (const name of ["mouseenter", "focus"]) term.addEventListener(name, open);
  for (const name of ["mouseleave", "blur"]) term.addEventListener(name, () => { tip.hidden = true; });
}

// A link opens the chapter that it leads to; print opens all; what is cut off says so.
function reveal() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
  if (target) target.scrollIntoView();
}
for (const link of all("a[href^='#']:not([data-t])")) link.addEventListener("click", () => setTimeout(reveal));
reveal();
addEventListener("beforeprint", () => { for (const chapter of all(".chapter")) chapter.open = true; });
const watch = new ResizeObserver(entries => {
  for (const { target } of entries) {
    const cut = target.scrollWidth > target.clientWidth + 1, hint = target.nextElementSibling;
    if (cut) target.tabIndex = 0;
    if (hint?.classList.contains("hint")) hint.hidden = !cut;
    else if (cut) target.after(make("p", { className: "hint", textContent: "Scroll sideways to see the rest →" }));
  }
});
for (const scroll of all(".scroll")) watch.observe(scroll);
