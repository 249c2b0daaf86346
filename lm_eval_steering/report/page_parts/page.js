"use strict";
// What comes from the data is only ever put in place as text.
const $ = (id) => document.getElementById(id);
const TABLE_PAGE = 50, SAMPLE_PAGE = 10;
const CONTROLS = /([\u202A-\u202E\u2066-\u2069\u200E\u200F\u0000-\u0008\u000B\u000C\u000E-\u001F])/;

async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function pager(place, page, pages, go) {
  place.replaceChildren();
  if (pages < 2) return;
  const button = (label, to) => {
    const made = make("button", "", label);
    made.type = "button";
    made.disabled = to < 0 || to >= pages;
    made.addEventListener("click", () => go(to));
    return made;
  };
  place.append(button("← Previous", page - 1), make("span", "", `page ${page + 1} of ${pages}`), button("Next →", page + 1));
}

// --- tables ---------------------------------------------------------------------------------------------------------

const state = { tables: [], table: 0, column: -1, down: false, page: 0 };

function shown(value) {
  if (value === null) return "";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(4)));
}

function order(first, second) {
  if (first === null || second === null) return first === second ? 0 : first === null ? 1 : -1;  // blanks last
  const sign = state.down ? -1 : 1;
  const numbers = typeof first === "number" && typeof second === "number";
  return sign * (numbers ? first - second : String(first).localeCompare(String(second), "en", { numeric: true }));
}

function visibleRows(table) {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  let rows = table.rows;
  if (words.length) rows = rows.filter((row) => {
    const text = row.map((value) => value === null ? "" : String(value)).join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  return state.column < 0 ? rows : [...rows].sort((a, b) => order(a[state.column], b[state.column]));
}

function drawTable() {
  const table = state.tables[state.table];
  if (!table) return;
  const rows = visibleRows(table);
  const numeric = table.columns.map((_, place) => table.rows.some((row) => typeof row[place] === "number"));
  const head = make("tr");
  table.columns.forEach((name, place) => {
    const cell = make("th", numeric[place] ? "n" : "");
    cell.scope = "col";
    cell.setAttribute("aria-sort", place !== state.column ? "none" : state.down ? "descending" : "ascending");
    const button = make("button", "", name);
    button.type = "button";
    button.addEventListener("click", () => {
      state.down = place === state.column ? !state.down : false;
      state.column = place;
      state.page = 0;
      drawTable();
      $("table").querySelectorAll("th button")[place].focus();
    });
    cell.append(button);
    head.append(cell);
  });
  const body = make("tbody");
  for (const row of rows.slice(state.page * TABLE_PAGE, (state.page + 1) * TABLE_PAGE)) {
    const line = make("tr");
    row.forEach((value, place) => {
      const cell = make("td", numeric[place] ? "n" : "", shown(value));
      if (value !== null) cell.title = String(value);
      line.append(cell);
    });
    body.append(line);
  }
  const thead = make("thead");
  thead.append(head);
  $("table").replaceChildren(thead, body);
  const more = table.total > table.rows.length ? ` (of ${table.total.toLocaleString("en")}; all in tables/)` : "";
  $("about-table").textContent = `${table.about} ${rows.length.toLocaleString("en")} rows${more}.`;
  pager($("table-pager"), state.page, Math.ceil(rows.length / TABLE_PAGE), (to) => { state.page = to; drawTable(); });
}

function chooseTable(number, focus) {
  Object.assign(state, { table: number, column: -1, down: false, page: 0 });
  [...$("tabs").children].forEach((tab, place) => {
    tab.setAttribute("aria-selected", String(place === number));
    tab.tabIndex = place === number ? 0 : -1;
  });
  if (focus) $("tabs").children[number].focus();
  drawTable();
}

async function startTables() {
  state.tables = await unpack("data-tables");
  state.tables.forEach((table, number) => {
    const tab = make("button", "", table.title);
    tab.type = "button";
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", "panel");
    tab.addEventListener("click", () => chooseTable(number, false));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) chooseTable((number + step + state.tables.length) % state.tables.length, true);
    });
    $("tabs").append(tab);
  });
  $("filter").addEventListener("input", () => { state.page = 0; drawTable(); });
  chooseTable(0, false);
}

// --- samples --------------------------------------------------------------------------------------------------------

const explorer = { names: {}, index: [], loaded: new Map(), page: 0, asked: 0 };

async function itemsOf(number) {
  if (!explorer.loaded.has(number)) {
    const parts = [];
    for (let part = 0; $(`data-${number}-${part}`); part++) parts.push(await unpack(`data-${number}-${part}`));
    explorer.loaded.set(number, parts.flat());
  }
  return explorer.loaded.get(number);
}

function textOf(text, wanted) {
  const place = make("div", text ? "text" : "text empty");
  place.dir = "auto";
  if (!text) place.textContent = "(empty)";
  for (const part of text.split(CONTROLS)) {
    if (CONTROLS.test(part)) {
      place.append(make("span", "control", "U+" + part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")));
      continue;
    }
    const low = part.toLowerCase();
    let from = 0;
    // Letters whose lower case is longer would shift the mark: then nothing is marked.
    const at = () => wanted && low.length === part.length ? low.indexOf(wanted, from) : -1;
    for (let found = at(); found >= 0; found = at()) {
      place.append(part.slice(from, found), make("mark", "", part.slice(found, found + wanted.length)));
      from = found + wanted.length;
    }
    place.append(part.slice(from));
  }
  return place;
}

function drawItem(item, group, wanted) {
  const [doc, prompt, outputs] = item;
  const card = make("article", "item");
  const top = make("div", "prompt");
  top.append(make("small", "", `document ${doc}`), textOf(prompt, wanted));
  const row = make("div", "outputs");
  row.tabIndex = 0;
  row.setAttribute("aria-label", "outputs by factor");
  outputs.forEach((output, place) => {
    const box = make("div", "output");
    const head = make("header");
    head.append(make("b", "", group.factors[place]));
    if (output) head.append(make("span", `pill ${output[2]}`, explorer.names[output[1]] || "not identified"));
    box.append(head, output ? textOf(output[0], wanted) : make("div", "empty", "not evaluated"));
    row.append(box);
  });
  card.append(top, row);
  return card;
}

async function drawSamples() {
  const asked = ++explorer.asked;
  const number = Number($("group").value);
  const group = explorer.index[number];
  const items = await itemsOf(number);
  if (asked !== explorer.asked) return;  // another choice was made meanwhile
  const wanted = $("search").value.trim().toLowerCase();
  const verdict = $("verdict").value;
  const found = items.filter(([, prompt, outputs]) =>
    (!verdict || outputs.slice(1).some((output) => output && output[2] === verdict)) &&
    (!wanted || prompt.toLowerCase().includes(wanted) || outputs.some((output) => output && output[0].toLowerCase().includes(wanted))));
  const pages = Math.ceil(found.length / SAMPLE_PAGE);
  explorer.page = Math.max(0, Math.min(explorer.page, pages - 1));
  const start = explorer.page * SAMPLE_PAGE;
  $("items").replaceChildren(...found.slice(start, start + SAMPLE_PAGE).map((item) => drawItem(item, group, wanted)));
  $("found").textContent = `${found.length.toLocaleString("en")} of ${items.length.toLocaleString("en")} prompts`;
  pager($("sample-pager"), explorer.page, pages, (to) => {
    explorer.page = to;
    drawSamples().then(() => $("samples").scrollIntoView());
  });
}

function fillGroups() {
  const options = [];
  explorer.index.forEach((group, number) => {
    if (group.steered !== $("steered").value) return;
    const option = make("option", "", `${group.task} · ${group.kind}`);
    option.value = String(number);
    options.push(option);
  });
  $("group").replaceChildren(...options);
}

async function startSamples() {
  [explorer.names, explorer.index] = await Promise.all([unpack("data-names"), unpack("data-index")]);
  const name = (code) => code.split("+").map((part) => explorer.names[part] || part).join(" + ");
  for (const code of new Set(explorer.index.map((group) => group.steered))) {
    const option = make("option", "", name(code));
    option.value = code;
    $("steered").append(option);
  }
  fillGroups();
  const again = () => { explorer.page = 0; return drawSamples(); };
  $("steered").addEventListener("change", () => { fillGroups(); again(); });
  let waiting;
  $("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(again, 150); });
  for (const id of ["group", "verdict"]) $(id).addEventListener("change", again);
  await drawSamples();
}

$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
startTables();
if ($("samples")) startSamples();
