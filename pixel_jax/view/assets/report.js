// The file that a run becomes: trajectories to browse, all of them on the page.
document.documentElement.classList.add("js");
watchCharts(document);

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
