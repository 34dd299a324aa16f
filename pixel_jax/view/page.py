"""The page's clothes: style sheet and script, as text.  No framework, nothing fetched."""
# ruff: noqa: E501

from pixel_jax.view import charts

# What one trajectory needs; the demo uses it alone.
TRAJECTORY_STYLE = """
:root { color-scheme: light dark;
  --paper: #fbf9f4; --card: #fffefb; --ink: #24211c; --soft: #5f594f; --faint: #77726a;
  --rule: #e4dfd4; --wash: #f2eee5; --blue: #0b62a4; --blue-wash: #e9f1f8;
  --good: #00694f; --bad: #ad3300; --bad-wash: #fbeee7; --box: #ff9d00;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "URW Palladio L", Georgia,
    "Liberation Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace }
@media (prefers-color-scheme: dark) { :root {
  --paper: #171614; --card: #1e1d1a; --ink: #ece8df; --soft: #b3ac9f; --faint: #968f83;
  --rule: #35322d; --wash: #262420; --blue: #6db5ee; --blue-wash: #1a2733;
  --good: #3fca9f; --bad: #ff8b5c; --bad-wash: #34211a; --box: #ffb13d } }
.trajectory { font: 15px/1.5 var(--sans); color: var(--ink) }
.trajectory h3 { font: 600 17px/1.3 var(--mono); margin: 0 0 6px; overflow-wrap: anywhere }
.trajectory h4 { font: 600 11px/1 var(--sans); letter-spacing: .08em; color: var(--faint);
  text-transform: uppercase; margin: 0 0 8px }
.trajectory .facts, .trajectory .reward { margin: 0 0 6px; display: flex; flex-wrap: wrap;
  gap: 2px 16px; font-size: 13.5px; color: var(--soft) }
.trajectory .facts b, .trajectory .reward b { color: var(--ink); font-weight: 600;
  font-variant-numeric: tabular-nums }
.verdict { font-weight: 650 } .verdict.correct { color: var(--good) }
.verdict.wrong { color: var(--bad) }
.turns { list-style: none; margin: 14px 0 0; padding: 0 }
.turn { border-left: 3px solid var(--rule); padding: 10px 0 10px 16px; margin: 0 0 10px;
  unicode-bidi: isolate }
.turn.policy { border-color: var(--blue); background: var(--blue-wash); padding-right: 14px;
  border-radius: 0 6px 6px 0 }
.turn.policy h4 { color: var(--blue) }
.turn.tool { background: var(--wash); padding-right: 14px; border-radius: 0 6px 6px 0;
  border-left-style: double }
.turn.failed { border-color: var(--bad); background: var(--bad-wash) }
.turn.failed h4 { color: var(--bad) } .kind { text-transform: none; letter-spacing: 0 }
.turn.system { padding: 0 0 0 16px } .turn.system summary { color: var(--faint);
  font-size: 13px; cursor: pointer }
.words { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
.turn.tool .words, .turn.system pre, .call pre, .tokens { font: 13px/1.5 var(--mono) }
.turn pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0 }
.guidelines { color: var(--faint); font-size: 13px } summary { cursor: pointer }
.boxed { border: 1.5px solid currentColor; border-radius: 4px; padding: 0 7px;
  font-family: var(--mono) }
.call { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 12px; margin: 4px 0;
  font: 13.5px/1.5 var(--mono); white-space: normal }
.call dl { display: flex; flex-wrap: wrap; gap: 0 14px; margin: 0 } .call dt { color: var(--faint) }
.call dd { margin: 0 0 0 -6px } .call em { font: 12.5px var(--sans); color: var(--bad) }
.call pre { margin: 0; flex-basis: 80% }
.call.unrun em { color: var(--faint) }
.call .tag { position: static }
.strip { display: flex; flex-wrap: wrap; gap: 12px; margin: 4px 0 10px }
.picture { margin: 0 } .canvas { position: relative; line-height: 0; overflow: hidden;
  border-radius: 3px }
.picture img { display: block; width: 100%; height: auto; image-rendering: pixelated;
  background: var(--wash) }
.picture.source img { image-rendering: auto }
.picture figcaption { font: 12px/1.4 var(--sans); color: var(--faint); margin-top: 4px }
.picture.source { width: min(100%, 300px) } .picture.view { width: min(100%, 300px) }
.picture.returned { width: min(100%, 168px) }
.strip.film { gap: 4px } .strip.film .picture { width: 78px }
.strip.film .picture.returned { width: 78px }
.film .chosen img { outline: 3px solid var(--box); outline-offset: -3px }
.film .chosen .canvas { box-shadow: 0 0 0 3px var(--box) }
.film .wanted figcaption { color: var(--good); font-weight: 650 }
.film .wanted figcaption::after { content: " ★" }
.small { font: 12px var(--sans); color: var(--faint); margin: 6px 0 2px }
.canvas svg { position: absolute; inset: 0; width: 100%; height: 100% }
.canvas rect { fill: none; stroke: var(--box); stroke-width: 2.5;
  vector-effect: non-scaling-stroke; filter: drop-shadow(0 0 1px #000a) }
.canvas rect.error { stroke: var(--bad); stroke-dasharray: 5 4 }
.canvas rect.reference { stroke: #4dffce; stroke-width: 2; stroke-dasharray: 3 3 }
.tag { font: 700 11px/16px var(--sans); min-width: 16px; padding: 0 3px; text-align: center;
  box-sizing: border-box; border-radius: 3px; color: #1d1500; background: var(--box);
  position: absolute; left: 0; top: 0; display: inline-block }
.tag.error { background: var(--bad); color: var(--paper) }
.tokens { display: none; white-space: pre-wrap; overflow-wrap: anywhere; margin-top: 8px }
.tokens i { font-style: normal; border-radius: 2px; box-shadow: inset 0 -1px var(--rule);
  background: color-mix(in srgb, var(--bad) calc(var(--doubt) * 70%), transparent) }
.tokens .unlearned { text-decoration: line-through }
.show-tokens .tokens { display: block }
.missing { color: var(--bad) }
"""

STYLE = (
  TRAJECTORY_STYLE
  + charts.STYLE
  + """
* { box-sizing: border-box }
html { background: var(--paper); scroll-padding-top: 12px }
body { margin: 0; font: 16px/1.55 var(--sans); color: var(--ink); background: var(--paper) }
main { max-width: 1200px; margin: 0 auto; padding: 48px 28px 80px }
h1 { font: 500 38px/1.15 var(--serif); margin: 0 0 10px; letter-spacing: -.01em }
h2 { font: 500 25px/1.25 var(--serif); margin: 60px 0 6px }
.lede { font: 19px/1.5 var(--serif); color: var(--soft); max-width: 46em; margin: 0 0 8px }
.aside, .note { color: var(--soft); font-size: 14px; max-width: 52em; margin: 4px 0 14px }
.note { font-size: 12.5px; margin: 2px 0 0; color: var(--faint) }
code, kbd { font: .88em var(--mono) }
kbd { border: 1px solid var(--rule); border-radius: 3px; padding: 0 5px; background: var(--card) }
nav.top { font-size: 14px; display: flex; gap: 18px; margin-top: 18px }
a { color: var(--blue); text-decoration-thickness: 1px; text-underline-offset: 3px }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%;
  margin: 14px 0 8px }
th { font: 600 13px/1.3 var(--sans); color: var(--soft); text-align: left; vertical-align: bottom;
  padding: 6px 14px 8px 0; border-bottom: 1.5px solid var(--ink) }
th small { display: block; font-weight: 400; color: var(--faint) }
td { padding: 10px 14px 10px 0; border-bottom: 1px solid var(--rule); vertical-align: top }
td.name { font-weight: 600; white-space: nowrap } td b { font-weight: 600; font-size: 17px }
td small { color: var(--faint); font-size: 12.5px; white-space: nowrap; display: block }
td .whisker { display: block; width: 100px; height: 10px; margin-top: 3px }
.whisker .base { stroke: var(--rule); stroke-width: 1 }
.whisker .ci { stroke: var(--blue); stroke-width: 2 } .whisker circle { fill: var(--blue) }
td.none { color: var(--faint) } .best b { color: var(--blue) }
details.more { margin: 8px 0 } details.more > summary { cursor: pointer; color: var(--soft);
  font-size: 14px } details.more table { font-size: 14px } details.more td { padding: 5px 18px 5px 0 }
details.more pre { font: 12px/1.5 var(--mono); overflow: auto; max-height: 420px;
  background: var(--wash); padding: 12px; border-radius: 6px }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr));
  gap: 26px 22px; margin: 14px 0 }
.chart { margin: 0; position: relative; min-width: 0 } .chart svg { display: block }
.chart > svg { width: 100%; height: auto; touch-action: pan-y }
.chart figcaption { font-size: 14.5px; margin-bottom: 6px }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; font-size: 12.5px; color: var(--soft) }
.legend span { display: inline-flex; gap: 6px; align-items: center }
.cursor line { stroke: var(--faint); stroke-dasharray: 2 2 } .cursor circle { fill: var(--c);
  stroke: var(--paper); stroke-width: 1.5 }
.hover { position: absolute; pointer-events: none; background: var(--ink); color: var(--paper);
  font: 12px/1.45 var(--sans); border-radius: 5px; padding: 5px 9px; white-space: nowrap;
  font-variant-numeric: tabular-nums; z-index: 2 }
.hover b { float: right; margin-left: 14px } .hover div { display: block }
.filters { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin: 14px 0;
  font-size: 13.5px }
.filters button, .filters select, .filters input { font: inherit; color: var(--ink);
  background: var(--card); border: 1px solid var(--rule); border-radius: 15px;
  padding: 3px 12px; height: 30px }
.filters button { cursor: pointer }
.filters button[aria-pressed=true] { background: var(--ink); color: var(--paper);
  border-color: var(--ink) }
.filters input { width: 150px } .filters output { color: var(--faint); margin-left: auto }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px }
.browser { display: grid; grid-template-columns: 300px minmax(0, 1fr); gap: 28px;
  border-top: 1.5px solid var(--ink); align-items: start }
.list { list-style: none; margin: 0; padding: 8px 0; max-height: 92vh; overflow: auto;
  position: sticky; top: 0; font-size: 13px }
.list a { display: grid; grid-template-columns: 16px 1fr auto; gap: 8px; padding: 5px 8px;
  border-radius: 5px; color: inherit; text-decoration: none; align-items: baseline }
.list li.first:not(:first-child) { border-top: 1px solid var(--rule); margin-top: 4px;
  padding-top: 4px }
.list .looks { color: var(--faint); margin-left: 4px } .list .n { color: var(--faint) }
.list a:hover { background: var(--wash) }
.list a[aria-current=true] { background: var(--ink); color: var(--paper) }
.list a[aria-current=true] span { color: inherit }
.list .ok { color: var(--good) } .list .ko { color: var(--bad) }
.list .what { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.list .when { color: var(--faint); font-variant-numeric: tabular-nums; white-space: nowrap }
.pane { padding: 18px 0; min-height: 60vh }
.js .pane > div[id] { display: none } .js .pane > div.open { display: block }
.group { display: flex; flex-wrap: wrap; gap: 5px; align-items: center; font-size: 13px;
  color: var(--soft); margin: 12px 0 0 }
.group a { min-width: 24px; text-align: center; text-decoration: none; border: 1px solid var(--rule);
  border-radius: 4px; padding: 0 5px } .group a.here { border-color: var(--ink); border-width: 2px }
.empty { color: var(--faint) }
footer { margin-top: 70px; color: var(--faint); font-size: 13px;
  border-top: 1px solid var(--rule); padding-top: 14px }
@media (max-width: 760px) { main { padding: 28px 16px } h1 { font-size: 30px }
  .browser { grid-template-columns: 1fr; gap: 8px } .list { position: relative; max-height: 220px } }
@media print { .filters, .list, nav.top { display: none } .browser { display: block }
  .js .pane > div[id] { display: block; break-inside: avoid } }
"""
)

SCRIPT = r"""
(() => {
"use strict";
document.documentElement.classList.add("js");
const $ = (s, e = document) => e.querySelector(s), $$ = (s, e = document) => [...e.querySelectorAll(s)];
const make = (tag, css, text) => { const e = document.createElement(tag);
  if (css) e.className = css; if (text !== undefined) e.textContent = text; return e; };
const svg = (cursor, tag, at) => { const e = document.createElementNS(cursor.namespaceURI, tag);
  for (const k in at) e.setAttribute(k, at[k]); cursor.append(e); };
const show = v => v === 0 ? "0" : Math.abs(v) >= 1e4 || Math.abs(v) < 1e-3
  ? v.toPrecision(3) : String(+v.toPrecision(4));

// ---- Charts: the nearest step of every line under the pointer or the arrow keys
for (const fig of $$(".chart")) {
  const { frame: f, lines } = JSON.parse(fig.dataset.chart);
  const plot = $(":scope > svg", fig), cursor = $(".cursor", plot), box = make("div", "hover");
  box.hidden = true; fig.append(box); plot.tabIndex = 0;
  const place = (x, y) => { y = f.log ? Math.log10(Math.max(y, 1e-300)) : y;
    const up = Math.min(Math.max((y - f.y[0]) / ((f.y[1] - f.y[0]) || 1), -.02), 1.02);
    return [f.left + (x - f.x[0]) / ((f.x[1] - f.x[0]) || 1) * f.width, f.top + (1 - up) * f.height]; };
  let at = f.x[1];
  const draw = x => {
    at = Math.min(Math.max(x, f.x[0]), f.x[1]);
    cursor.replaceChildren(); box.replaceChildren(); box.hidden = false;
    let step = null;
    const near = (f.x[1] - f.x[0]) / 40; // a line that has ended says nothing
    const here = lines.filter(l => at >= l.x[0] - near && at <= l.x[l.x.length - 1] + near);
    if (!here.length) { box.hidden = true; return; }
    const rows = here.map(l => { let i = 0;
      l.x.forEach((v, j) => { if (Math.abs(v - at) < Math.abs(l.x[i] - at)) i = j; });
      if (step === null || Math.abs(l.x[i] - at) < Math.abs(step - at)) step = l.x[i];
      return [l, i]; });
    const [px] = place(step, 1);
    svg(cursor, "line", { x1: px, x2: px, y1: f.top, y2: f.top + f.height });
    box.append(make("div", "", "step " + show(step)));
    for (const [l, i] of rows) {
      const [cx, cy] = place(l.x[i], l.y[i]);
      svg(cursor, "circle", { cx, cy, r: 3.6, class: "c" + l.slot });
      const row = make("div", "", l.name); row.append(make("b", "", show(l.y[i]))); box.append(row);
    }
    const scale = plot.clientWidth / 356, left = px * scale;
    const top = plot.getBoundingClientRect().top - fig.getBoundingClientRect().top;
    box.style.top = top + f.top * scale + "px";
    if (left > plot.clientWidth / 2) { box.style.left = "auto"; box.style.right = plot.clientWidth - left + 10 + "px"; }
    else { box.style.right = "auto"; box.style.left = left + 10 + "px"; }
  };
  const hide = () => { box.hidden = true; cursor.replaceChildren(); };
  plot.addEventListener("pointermove", e => { const r = plot.getBoundingClientRect();
    draw(f.x[0] + ((e.clientX - r.left) / r.width * 356 - f.left) / f.width * (f.x[1] - f.x[0])); });
  plot.addEventListener("pointerleave", hide); plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", e => { const d = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (d) { draw(at + d * (f.x[1] - f.x[0]) / 60); e.preventDefault(); e.stopPropagation(); } });
}

// ---- Trajectories
const data = $("#pictures"), pictures = data ? JSON.parse(data.textContent) : {};
const links = $$(".list a"), panes = new Map($$(".pane > div[id]").map(p => [p.id, p]));
const fill = pane => { for (const i of $$("img[data-picture]", pane)) {
  i.src = pictures[i.dataset.picture]; i.removeAttribute("data-picture"); } };
window.addEventListener("beforeprint", () => panes.forEach(fill));
const groups = new Map();
for (const l of links) { const g = l.dataset.group; groups.has(g) || groups.set(g, []); groups.get(g).push(l); }
let current = null;
const visible = () => links.filter(l => !l.parentElement.hidden);
const open = (link, asked) => {
  if (!link) return;
  const id = link.hash.slice(1), pane = panes.get(id);
  if (current) { current.removeAttribute("aria-current"); panes.get(current.hash.slice(1)).classList.remove("open"); }
  current = link; link.setAttribute("aria-current", "true"); fill(pane); pane.classList.add("open");
  const row = link.parentElement, list = row.parentElement;
  if (row.offsetTop < list.scrollTop || row.offsetTop + row.offsetHeight > list.scrollTop + list.clientHeight)
    list.scrollTop = row.offsetTop - list.clientHeight / 2;
  const siblings = groups.get(link.dataset.group), bar = $(".group", pane);
  if (bar && siblings.length > 1 && !bar.children.length) {
    bar.append(make("span", "", "same question, same policy:"));
    for (const s of siblings) { const a = make("a", s === link ? "here" : "", s.querySelector(".mark").textContent
        + (+s.dataset.ops ? " ▣" : "")); a.href = s.hash; a.title = s.title; bar.append(a); }
  }
  if (!asked) return; // the page's own choice leaves the address and the scroll alone
  history.replaceState(null, "", "#" + id);
  const top = $(".pane").getBoundingClientRect().top;
  if (top < 0) window.scrollBy(0, top - 8);
};
const state = { verdict: "", ops: false, error: false, run: "", step: "", text: "" };
const filter = () => {
  for (const l of links) { const d = l.dataset;
    l.parentElement.hidden = !((!state.verdict || d.verdict === state.verdict) && (!state.ops || +d.ops)
      && (!state.error || +d.errors) && (!state.run || d.run === state.run) && (!state.step || d.step === state.step)
      && (!state.text || d.text.includes(state.text))); }
  const seen = visible(); $("#count").textContent = `${seen.length} of ${links.length}`;
  $(".empty").hidden = seen.length > 0;
  if (seen.length && !seen.includes(current)) open(seen[0]);
};
const bar = $(".filters");
if (bar) {
  const buttons = $$("button", bar);
  const press = b => { const { key, value } = b.dataset, on = b.getAttribute("aria-pressed") !== "true";
    if (key === "verdict") for (const o of buttons) if (o.dataset.key === key) o.setAttribute("aria-pressed", "false");
    b.setAttribute("aria-pressed", on);
    if (key === "tokens") return document.body.classList.toggle("show-tokens", on);
    state[key] = key === "verdict" ? (on ? value : "") : on; filter(); };
  buttons.forEach(b => b.addEventListener("click", () => press(b)));
  $$("select", bar).forEach(s => s.addEventListener("change", () => { state[s.dataset.key] = s.value; filter(); }));
  const find = $("input", bar);
  find.addEventListener("input", () => { state.text = find.value.toLowerCase(); filter(); });
  document.addEventListener("click", e => { const a = e.target.closest(".list a, .group a");
    if (a) { e.preventDefault(); open(links.find(l => l.hash === a.hash), true); } });
  document.addEventListener("keydown", e => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    if (e.target.matches("input, select")) { if (e.key === "Escape") e.target.blur(); return; }
    const all = visible(), i = all.indexOf(current);
    const move = d => { open(all[Math.min(Math.max(i + d, 0), all.length - 1)], true); e.preventDefault(); };
    const k = e.key;
    if (k === "j" || k === "ArrowRight") move(1); else if (k === "k" || k === "ArrowLeft") move(-1);
    else if (k === "/") { find.focus(); e.preventDefault(); }
    else { const b = buttons.find(b => b.dataset.press === k); if (b) press(b); }
  });
  const named = links.find(l => l.hash === location.hash);
  filter(); open(named || links[+$(".browser").dataset.start] || links[0]);
  if (named) $(".browser").scrollIntoView();
}
})();
"""
