// The file that a run becomes: charts to read values from, trajectories to browse.
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
