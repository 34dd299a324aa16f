// The demo: pictures in, a question out, and the answer's events drawn as they come.
// What the model writes is shown as text; HTML comes only from the server's renderer.
const MOST = 45e6; // bytes of all files: in base64 they are the 64 MB that the server takes
const { policies } = JSON.parse($("#known").textContent);
const form = $("#ask"), question = $("#question"), shown = $("#shown"), told = $("#told");
const stop = $("#stop"), blind = $("#blind"), running = new Set();
let files = [], example = null; // what is asked about: files, or an example of the page

const tell = (text, bad = false) => { told.textContent = text; told.classList.toggle("bad", bad); };

// ---- What is asked about
const drawShown = () => {
  shown.replaceChildren();
  const add = (picture, name, remove) => { const li = make("li"), x = make("button", "", "×");
    x.type = "button"; x.setAttribute("aria-label", "remove " + name); x.onclick = remove;
    li.append(picture, x); shown.append(li); };
  for (const f of files) {
    const is_clip = f.type.startsWith("video/"), e = make(is_clip ? "video" : "img");
    e.src = URL.createObjectURL(f);
    if (is_clip) { e.muted = true; e.controls = true; e.setAttribute("aria-label", f.name); } else e.alt = f.name;
    add(e, f.name, () => { URL.revokeObjectURL(e.src); files = files.filter(o => o !== f); drawShown(); });
  }
  if (example) for (const [i, img] of $$("img", example).entries()) {
    const e = make("img", "pixels"); e.src = img.src; e.alt = "example, picture " + (i + 1);
    if (!i) add(e, "the example", () => { example = null; drawShown(); });
    else { const li = make("li"); li.append(e); shown.append(li); }
  }
};
const take = chosen => {
  const fits = [];
  for (const f of chosen) {
    if (!/^(image|video)\//.test(f.type)) { tell(`${f.name} is neither a picture nor a clip.`, true); return; }
    fits.push(f);
  }
  const clips = [...files, ...fits].filter(f => f.type.startsWith("video/")).length;
  if (clips > 1) { tell("One clip at a time, please.", true); return; }
  const size = [...files, ...fits].reduce((n, f) => n + f.size, 0);
  if (size > MOST) { tell(`That is ${(size / 1e6).toFixed(0)} MB; ${MOST / 1e6} are allowed in all.`, true); return; }
  if (fits.length) { example = null; files.push(...fits); drawShown(); tell(""); question.focus(); }
};
$("#files").onchange = e => { take([...e.target.files]); e.target.value = ""; };
const drop = $("#drop");
for (const kind of ["dragenter", "dragover"]) document.addEventListener(kind, e => { e.preventDefault(); drop.classList.add("over"); });
document.addEventListener("dragleave", e => { if (!e.relatedTarget) drop.classList.remove("over"); });
document.addEventListener("drop", e => { e.preventDefault(); drop.classList.remove("over"); take([...e.dataTransfer.files]); });
document.addEventListener("paste", e => { if (e.clipboardData.files.length) { e.preventDefault(); take([...e.clipboardData.files]); } });
const readFile = f => new Promise((done, fail) => { const r = new FileReader();
  r.onload = () => done(r.result); r.onerror = () => fail(new Error(f.name + " cannot be read")); r.readAsDataURL(f); });

// ---- Asking
const gather = async () => {
  const content = [];
  for (const f of files) { const url = await readFile(f);
    content.push(f.type.startsWith("video/") ? { type: "video_url", video_url: { url } } : { type: "image_url", image_url: { url } }); }
  const text = question.value.trim();
  content.push({ type: "text", text });
  const seed = $("#seed").value;
  return { text, truth: example && example.dataset.question === text ? example.dataset.answer : null,
    body: { example: example ? example.dataset.name : null, messages: [{ role: "user", content }],
      temperature: +$("#temperature").value, top_p: +$("#top_p").value, seed: seed === "" ? null : +seed } };
};
const busy = () => { stop.disabled = !running.size; };
stop.onclick = () => { for (const one of [...running]) one.abort(); };

const openCard = (asked, policy, look, cards) => {
  const card = make("article", "card playing trajectory"), head = make("header"), turns = make("div"), foot = make("footer");
  head.append(make("h3", "", policies[policy]), make("span", "", look ? "may look closer" : "without looking closer"));
  const said = make("p", "said", "reading the question"); said.setAttribute("role", "status");
  card.append(head, said, turns, foot); cards.append(card);
  play(asked, policy, look, { card, said, turns, foot, cards });
};

const play = async (asked, policy, look, place) => {
  const { card, said, turns, foot, cards } = place, leave = new AbortController(), pictures = {};
  running.add(leave); busy(); card.className = "card playing trajectory"; foot.replaceChildren();
  let live = null;
  const grow = text => {
    if (!live) { const li = make("li", "turn policy live"); li.append(make("p", "who", "policy"), live = make("div", "words"));
      let list = $(".turns", turns); if (!list) turns.append(list = make("ol", "turns")); list.append(li); }
    live.textContent += text;
  };
  const draw = event => {
    Object.assign(pictures, event.pictures); live = null;
    turns.innerHTML = event.html; // of view/trajectory.py, which escapes all that it was told
    for (const i of $$("img[data-picture]", turns)) { i.src = pictures[i.dataset.picture]; i.removeAttribute("data-picture"); }
  };
  const end = event => {
    draw(event); said.replaceChildren();
    if (event.answer) said.append(make("strong", "", event.answer)); else said.append(make("strong", "", "no answer"), make("span", "", event.stop));
    if (asked.truth !== null) said.append(event.answer === asked.truth ? make("span", "correct", "✓ correct")
      : make("span", "wrong", `✗ it is ${asked.truth}`));
    const looks = event.looks + (event.looks === 1 ? " look" : " looks") + (event.errors ? `, ${event.errors} failed` : "");
    said.append(make("span", "", `${look ? looks + " · " : ""}${event.tokens} tokens · ${event.seconds} s`));
    const link = make("a", "", "open the trajectory"); link.href = event.link; link.target = "_blank"; foot.append(link);
  };
  const fail = text => { card.classList.add("failed"); said.textContent = text; };
  let over = false;
  try {
    const reply = await fetch("/ask", { method: "POST", signal: leave.signal, headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...asked.body, policy, look }) });
    if (!reply.ok) { let text = `the server said ${reply.status}`;
      try { text = (await reply.json()).error.message; } catch { /* no JSON */ } throw new Error(text); }
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { done, value } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n\n"); rest = parts.pop();
      for (const part of parts) { const event = JSON.parse(part.slice("data: ".length));
        if (event.kind === "text") { grow(event.text); said.textContent = "thinking"; }
        else if (event.kind === "turns") { draw(event); said.textContent = "looking"; }
        else if (event.kind === "wait") said.textContent = "others are before you";
        else if (event.kind === "error") { over = true; fail(event.text); }
        else { over = true; end(event); } }
    }
    if (!over) fail("the server left in the middle of it");
  } catch (error) {
    if (error.name === "AbortError") said.textContent = "stopped"; else fail(error.message);
  }
  for (const l of $$(".live", turns)) l.classList.remove("live");
  running.delete(leave); busy(); card.classList.remove("playing");
  const again = make("button", "", "again"), other = make("button", "", look ? "the same without looking" : "the same, looking closer");
  again.type = other.type = "button";
  again.onclick = () => { turns.replaceChildren(); said.textContent = "reading the question"; play(asked, policy, look, place); };
  other.onclick = () => { other.remove(); openCard(asked, policy, !look, cards); };
  foot.prepend(again, other);
};

form.onsubmit = async e => {
  e.preventDefault();
  if (!question.value.trim()) { tell("What do you want to know?", true); question.focus(); return; }
  let asked;
  try { asked = await gather(); } catch (error) { tell(error.message, true); return; }
  tell(""); $("#empty")?.remove();
  const section = make("section", "asked"), cards = make("div", "cards");
  section.append(make("h2", "", asked.text), cards); $("#answers").prepend(section);
  policies.forEach((_, i) => openCard(asked, i, !blind.checked, cards));
  if (section.getBoundingClientRect().top > innerHeight - 120) section.scrollIntoView({ block: "start" });
};
question.addEventListener("keydown", e => { if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); form.requestSubmit(); } });
for (const b of $$(".example")) b.onclick = () => { files = []; example = b; question.value = b.dataset.question; drawShown(); form.requestSubmit(); };
