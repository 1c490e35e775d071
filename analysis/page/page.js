"use strict";
// Sorting, filtering, runs on demand, light and dark. Everything shown is set as text, never as markup.

const COLOURS = 7; // --line-0 ... of the style sheet
const DASHES = 4; // no remainder in common with COLOURS: 28 lines are told apart

function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// -- sorting and filtering --------------------------------------------------------------

function sortBy(header) {
  const body = header.closest("table").tBodies[0];
  const ascending = header.getAttribute("aria-sort") !== "ascending";
  for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const keyed = [...body.rows].map((row) => [keyOf(row.cells[header.cellIndex]), row]);
  keyed.sort(([a], [b]) => compare(a, b, ascending ? 1 : -1));
  body.append(...keyed.map(([, row]) => row));
}

function keyOf(cell) {
  const value = cell.dataset.value;
  return value === "" || Number.isNaN(Number(value)) ? value : Number(value);
}

// Numbers before words; what is missing comes last in either direction.
function compare(a, b, sign) {
  if (a === "" || b === "") return (a === "") - (b === "");
  if (typeof a !== typeof b) return sign * (typeof a === "number" ? -1 : 1);
  return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
}

function filterRows(field) {
  const words = field.value.toLowerCase().split(/\s+/);
  const rows = [...document.getElementById(field.dataset.table).tBodies[0].rows];
  for (const row of rows) {
    const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
  field.parentNode.querySelector("output").value = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
}

// -- opened runs ------------------------------------------------------------------------

const opened = []; // numbers of runs, in the order in which they were opened
const unpacked = new Map(); // number: promise of what is known of the run

function unpack(number) {
  if (!unpacked.has(number)) {
    const text = document.getElementById(`packed-${number}`).textContent;
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(number, new Response(stream).json());
  }
  return unpacked.get(number);
}

function buttonOf(number) {
  return document.querySelector(`.open[data-run="${number}"]`);
}

async function setOpen(number, open) {
  if (open && !opened.includes(number)) opened.push(number);
  if (!open && opened.includes(number)) opened.splice(opened.indexOf(number), 1);
  await showOpened();
}

async function showOpened() {
  const numbers = [...opened];
  for (const button of document.querySelectorAll(".open")) {
    button.setAttribute("aria-expanded", numbers.includes(Number(button.dataset.run)));
  }
  const runs = await Promise.all(numbers.map(unpack));
  if (numbers.join() !== opened.join()) return; // something else was opened or closed meanwhile
  const unfolded = new Set([...document.querySelectorAll("#details details[open]")].map((part) => part.dataset.part));
  document.getElementById("charts").replaceChildren(...chartsOf(runs));
  document.getElementById("details").replaceChildren(...runs.map((run, i) => detailsOf(run, numbers[i], unfolded)));
  document.getElementById("close-all").hidden = numbers.length === 0;
  document.getElementById("opened-state").textContent = numbers.length
    ? `${numbers.length === 1 ? "1 run" : `${numbers.length} runs`} shown: ${runs.map((run) => run.name).join(", ")}`
    : "None: choose a run by its name in the table.";
}

async function follow(number) {
  const row = document.getElementById(`run-${number}`);
  if (row === null) return;
  if (row.hidden) {
    const field = document.querySelector(`[data-table="${row.closest("table").id}"]`);
    field.value = "";
    filterRows(field);
  }
  await setOpen(number, true);
  document.getElementById(`opened-${number}`)?.focus();
  document.getElementById("opened").scrollIntoView();
}

function detailsOf(run, number, unfolded) {
  const close = make("button", { type: "button", class: "close", "aria-label": `Close ${run.name}` }, "Close");
  close.addEventListener("click", () => {
    setOpen(number, false);
    buttonOf(number).focus();
  });
  const title = make("h4", { id: `opened-${number}`, tabindex: -1 }, run.name);
  const article = make("article", { class: "run", "aria-labelledby": title.id });
  article.append(make("div", { class: "top" }, title, close));
  article.append(make("h5", {}, "This command continues it, or does nothing if it is finished"));
  article.append(make("pre", { class: "command", tabindex: 0 }, run.command));
  if (run.problems.length) {
    article.append(make("h5", {}, "What does not add up"));
    article.append(make("ul", {}, ...run.problems.map((problem) => make("li", {}, problem))));
  }
  const parts = { Configuration: [make("pre", { tabindex: 0 }, run.config || "config.yaml is missing or unusable")] };
  parts[`Provenance (attempts: ${run.attempts.length})`] = run.attempts.length
    ? run.attempts.flatMap(attemptOf)
    : [make("p", {}, "provenance.json is missing or unusable")];
  if (run.traceback) parts["End of the traceback"] = [make("pre", { tabindex: 0 }, run.traceback)];
  for (const [name, content] of Object.entries(parts)) {
    const part = make("details", { "data-part": `${number} ${name}` }, make("summary", {}, name), ...content);
    part.open = unfolded.has(part.dataset.part);
    article.append(part);
  }
  return article;
}

function attemptOf(pairs, index) {
  const list = make("dl");
  for (const [name, value] of pairs) list.append(make("dt", {}, name), make("dd", {}, value));
  return [make("h5", {}, `Attempt ${index + 1}`), list];
}

// -- curves -----------------------------------------------------------------------------

const SIZE = { width: 380, height: 220, left: 56, right: 12, top: 10, bottom: 40 };

function chartsOf(runs) {
  const axes = new Map(runs.flatMap((run) => Object.entries(run.curves)).map(([tag, curve]) => [tag, curve.axis]));
  const tags = [...axes.keys()].sort((a, b) => axes.get(a).localeCompare(axes.get(b))); // epochs before steps
  return tags.map((tag) => {
    const lines = runs.map((run, index) => ({ run, index, curve: run.curves[tag] })).filter((line) => line.curve);
    return chartOf(tag, axes.get(tag), lines.map((line) => ({ ...line, points: pointsOf(line.curve) })));
  });
}

// [[step, value]]; the steps are stored as increments.
function pointsOf(curve) {
  let step = 0;
  return curve.y.map((value, i) => [(step += curve.x[i]), value]);
}

function chartOf(tag, unit, lines) {
  const drawn = lines.filter((line) => line.points.length);
  const [x, y] = [0, 1].map((axis) => scaleOf(drawn.flatMap((line) => line.points.map((point) => point[axis])), axis));
  const svg = draw("svg", { viewBox: `0 0 ${SIZE.width} ${SIZE.height}`, role: "img", "aria-label": words(tag, drawn, unit) });
  if (drawn.length) svg.append(...axesOf(x, y, unit));
  svg.append(...drawn.flatMap((line) => lineOf(line, x, y)));
  const key = make("ul", { class: "key" }, ...lines.map((line) => keyLineOf(line, unit)));
  return make("figure", { class: "chart", "data-tag": tag }, make("h4", {}, tag), svg, make("figcaption", {}, key));
}

function words(tag, lines, unit) {
  const ends = lines.map(({ run, points }) => {
    const [first, last] = [points[0], points[points.length - 1]];
    return `${run.name} from ${show(first[1])} at ${unit} ${show(first[0])} to ${show(last[1])} at ${unit} ${show(last[0])}`;
  });
  return `${tag}: ${ends.join("; ") || "no finite point"}`;
}

// A linear scale over these numbers: {low, high, ticks, at}.
function scaleOf(numbers, axis) {
  let low = numbers.reduce((a, b) => Math.min(a, b), Infinity);
  let high = numbers.reduce((a, b) => Math.max(a, b), -Infinity);
  if (low === high) [low, high] = [low - (Math.abs(low) / 10 || 1), high + (Math.abs(high) / 10 || 1)];
  const margin = axis ? 0.05 * (high - low) : 0;
  [low, high] = [low - margin, high + margin];
  const [from, to] = axis ? [SIZE.height - SIZE.bottom, SIZE.top] : [SIZE.left, SIZE.width - SIZE.right];
  return { ticks: ticksOf(low, high, axis ? 0 : 1), at: (value) => from + ((value - low) / (high - low)) * (to - from) };
}

// Three to six round numbers (fewer where `least` is the smallest step between them).
function ticksOf(low, high, least) {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(least, power * [1, 2, 5, 10].find((factor) => factor * power >= rough));
  const ticks = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) ticks.push(k * step);
  return ticks;
}

function axesOf(x, y, unit) {
  const bottom = SIZE.height - SIZE.bottom;
  const right = SIZE.width - SIZE.right;
  const parts = y.ticks.flatMap((tick) => [
    draw("line", { class: "grid-line", x1: SIZE.left, x2: right, y1: y.at(tick), y2: y.at(tick) }),
    draw("text", { x: SIZE.left - 6, y: y.at(tick) + 4, "text-anchor": "end" }, show(tick)),
  ]);
  parts.push(draw("line", { class: "axis-line", x1: SIZE.left, x2: right, y1: bottom, y2: bottom }));
  for (const tick of x.ticks) {
    parts.push(draw("text", { x: x.at(tick), y: bottom + 15, "text-anchor": "middle" }, show(tick)));
  }
  parts.push(draw("text", { x: (SIZE.left + right) / 2, y: SIZE.height - 5, "text-anchor": "middle" }, unit));
  return parts;
}

function lineOf({ index, points }, x, y) {
  const path = points.map(([step, value], i) => `${i ? "L" : "M"}${x.at(step).toFixed(2)} ${y.at(value).toFixed(2)}`);
  const [step, value] = points[points.length - 1];
  return [
    draw("path", { class: lineClass(index), d: path.join("") }),
    draw("circle", { class: `dot-${index % COLOURS}`, cx: x.at(step), cy: y.at(value), r: 3 }),
  ];
}

function lineClass(index) {
  return `line line-${index % COLOURS} dash-${index % DASHES}`;
}

function keyLineOf({ run, index, curve, points }, unit) {
  const sample = draw("svg", { viewBox: "0 0 36 10", "aria-hidden": "true" });
  sample.append(draw("path", { class: lineClass(index), d: "M0 6H36" }));
  const said = [];
  if (points.length) {
    const [step, value] = points[points.length - 1];
    said.push(`last ${show(value)} at ${unit} ${show(step)}`);
  }
  const finite = curve.points - curve.infinite;
  if (points.length < finite) said.push(`${show(points.length)} of ${show(finite)} points drawn`);
  if (curve.infinite) said.push(`${show(curve.infinite)} not finite, left out`);
  return make("li", {}, sample, make("div", {}, `${run.name} `, make("span", {}, said.join("; "))));
}

function show(value) {
  const small = value !== 0 && Math.abs(value) < 1e-4;
  return small ? value.toExponential(3) : (value || 0).toLocaleString("en", { maximumSignificantDigits: 6 });
}

// -- light and dark ---------------------------------------------------------------------

const SCHEMES = ["system", "light", "dark"];

function nextScheme(button) {
  const root = document.documentElement;
  const next = SCHEMES[(SCHEMES.indexOf(root.dataset.theme ?? "system") + 1) % SCHEMES.length];
  if (next === "system") delete root.dataset.theme;
  else root.dataset.theme = next;
  button.textContent = `Theme: ${next}`;
}

// -- what listens -----------------------------------------------------------------------

function followHash() {
  const found = /^#run-(\d+)$/.exec(location.hash);
  if (found) follow(Number(found[1]));
}

document.addEventListener("click", (event) => {
  const target = event.target.closest("button, a");
  if (target === null) return;
  if (target.matches(".sort")) sortBy(target.closest("th"));
  if (target.matches(".open")) setOpen(Number(target.dataset.run), target.getAttribute("aria-expanded") !== "true");
  if (target.matches("#theme")) nextScheme(target);
  if (target.matches("#close-all")) {
    opened.length = 0;
    showOpened();
  }
  // the address does not change where the same link is chosen again
  if (target.matches("a[href^='#run-']") && target.getAttribute("href") === location.hash) followHash();
});
for (const field of document.querySelectorAll("input[data-table]")) {
  field.addEventListener("input", () => filterRows(field));
}
addEventListener("hashchange", followHash);
document.getElementById("theme").hidden = false;
const panel = document.getElementById("opened");
if (panel !== null) panel.hidden = false;
followHash();
