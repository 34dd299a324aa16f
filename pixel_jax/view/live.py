"""The page of runs that go on: an ASGI app over their workdirs and an index.

  Live(runs, index, load_media, codec).app

It asks the workdirs at most once a second, however many look at it, and reads of them only
what is new.  Curves and tables come as the pieces of a page that the report is made of,
trajectories one by one, and each of their pictures when it is looked at.
"""

import asyncio
import base64
import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from pixel_jax.trajectory import Trajectory
from pixel_jax.view import curves, page, runs, table
from pixel_jax.view import trajectory as view
from pixel_jax.view.index import Index, Row, Wish
from pixel_jax.view.pictures import LoadMedia
from pixel_jax.view.text import escape

LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]
EVERY = 1.0  # seconds between two looks at the workdirs
PAGE = 100  # trajectories of one page of the list
KEPT = 64  # trajectories whose pictures are kept
SCRIPT = page.script("common.js", "charts.js", "live.js")
STYLE = page.asset("live.css")
LATEST = {  # what a run's line shows, where it has it
  "reward/correct": "correct",
  "ops/rapr": "RaPR",
  "eval/loss": "held-out loss",
  "eval/accuracy": "held out",
  "perf/tokens_per_s": "tokens/s",
  "perf/mfu": "MFU",
}


class Live:
  """The app.

  Args:
    found: the runs; their metrics are read on.
    index: of their trajectories.
    codec: None where no run kept its own: then crops are not drawn.
    score: asks the trainer's graph of a run for what it says of a trajectory; it may
      take seconds, and raise.  None = nobody is asked.
    hosts: names by which the page may be asked for; "*" = any.
  """

  def __init__(
    self,
    found: Sequence[runs.Run],
    index: Index,
    load_media: LoadMedia,
    codec,
    *,
    score: Callable[[str, Trajectory], view.Scored] | None = None,
    title: str = "",
    hosts: Sequence[str] = LOOPBACK,
  ):
    self._runs, self._index, self._look = list(found), index, load_media
    self._codec, self._score, self._title = codec, score, title or "Runs"
    self._asked, self._lock = 0.0, asyncio.Lock()
    self._scoring = threading.Lock()
    self._drawn = 0  # grows with the metrics
    self._pictures: collections.OrderedDict[int, dict[str, str]] = (
      collections.OrderedDict()
    )
    self.app = Starlette(
      routes=[
        Route("/", self.page),
        Route("/live.js", self.script),
        Route("/state", self.state),
        Route("/curves", self.curves),
        Route("/list", self.list),
        Route("/trajectory/{number:int}", self.trajectory),
        Route("/tokens/{number:int}", self.tokens),
        Route("/picture/{number:int}/{key}", self.picture),
      ],
      middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
    )

  # ---- The page ----------------------------------------------------------------------

  async def page(self, request: Request) -> Response:
    await self._update()
    evaluations = [runs.read_json(run.folder / "evaluation.json") for run in self._runs]
    evaluation = next((e for e in evaluations if e), None)
    before = f'<h2 id="table">Before and after</h2>{table.render(evaluation)}'
    html = page.document(
      self._title,
      f"""<main>
<h1>{escape(self._title)}</h1>
<ul class="runs" id="runs" aria-label="runs"></ul>
<nav class="top"><a href="#curves">curves</a><a href="#trajectories">trajectories</a>
<a href="#configs">configs</a></nav>
<div id="curves">{curves.draw(self._runs)}</div>
{before if evaluation else ""}
<h2 id="trajectories">Trajectories</h2>
<p class="aside">Blue is the policy's own text, grey is what came back; boxes carry the
number of their call, the dotted green box or the star is the reference. Helped: it looked,
and is right where those that did not look were wrong. <kbd>j</kbd> <kbd>k</kbd> or
<kbd>→</kbd> <kbd>←</kbd> next and previous, <kbd>c</kbd> correct, <kbd>w</kbd> wrong,
<kbd>o</kbd> used an operation, <kbd>e</kbd> error, <kbd>t</kbd> token probabilities,
<kbd>p</kbd> pin this one beside the next, <kbd>/</kbd> search.</p>
{_filters()}
<div class="browser"><div><ol class="list" id="list" aria-label="trajectories"></ol>
<button type="button" id="more" hidden>more</button></div>
<div class="panes"><div class="pane pinned" id="pinned" hidden></div>
<div class="pane" id="pane" aria-live="polite"><p class="empty">Nothing to show
yet.</p></div>
</div></div>
{curves.configs(self._runs)}
<footer>pixel_jax: Pixel Reasoner in JAX. This page reads the workdirs as they grow;
<code>pixel-jax view DIR --out=report.html</code> makes a file of them that needs no
server.</footer>
</main>
<script src="/live.js"></script>
""",
      style=STYLE,
      script="",
    )
    return _html(html)

  async def script(self, request: Request) -> Response:
    return Response(SCRIPT, media_type="text/javascript")

  # ---- What changes ------------------------------------------------------------------

  async def _update(self) -> None:
    """Reads what is new, once for all who ask."""
    async with self._lock:
      if time.monotonic() - self._asked >= EVERY:
        await run_in_threadpool(self._read)
        self._asked = time.monotonic()

  def _read(self) -> None:
    self._drawn += any([run.update() for run in self._runs])
    self._index.update(runs.files(self._runs))

  async def state(self, request: Request) -> Response:
    """How far each run is; what a page compares to know what it has to ask for again."""
    await self._update()
    return JSONResponse({
      "curves": self._drawn,
      "trajectories": self._index.version,
      "choices": await run_in_threadpool(self._index.choices),
      "runs": [_told(run) for run in self._runs if not _is_evaluation(run)],
    })  # fmt: skip

  async def curves(self, request: Request) -> Response:
    return _html(await run_in_threadpool(curves.draw, self._runs))

  # ---- Trajectories ------------------------------------------------------------------

  async def list(self, request: Request) -> Response:
    """A page of those that fit: ?verdict=wrong&text=red&offset=100."""
    given = dict(request.query_params)
    offset = given.pop("offset", "0")
    names = {f.name: f.type for f in dataclasses.fields(Wish)}
    wish = Wish(**{
      k: value == "1" if names[k] is bool else value[:200]
      for k, value in given.items()
      if k in names
    })  # fmt: skip
    begun = time.perf_counter()
    rows, total = await run_in_threadpool(
      self._index.search, wish, limit=PAGE,
      offset=min(int(offset), 10**9) if offset.isdigit() else 0,
    )  # fmt: skip
    return JSONResponse({
      "rows": [_line(row) for row in rows],
      "total": total,
      "seconds": time.perf_counter() - begun,
    })  # fmt: skip

  async def trajectory(self, request: Request) -> Response:
    number = request.path_params["number"]
    try:
      return _html(await run_in_threadpool(self._draw, number))
    except KeyError:
      return _html('<p class="missing">It is gone: its file has changed.</p>', 404)

  async def tokens(self, request: Request) -> Response:
    try:
      return _html(await run_in_threadpool(self._tell, request.path_params["number"]))
    except KeyError:
      return _html('<p class="missing">It is gone: its file has changed.</p>', 404)

  def _tell(self, number: int) -> str:
    """Its tokens one by one; one at a time asks the trainer."""
    row, t = self._index.row(number), self._index.read(number)
    if row is None:
      raise KeyError(number)
    if self._codec is None:
      return '<p class="note">No run kept its tokenizer.</p>'
    scored, failed = None, ""
    if self._score is not None:
      try:
        with self._scoring:
          scored = self._score(row.run, t)
      except Exception as error:  # a checkpoint that is being written, say
        failed = f'<p class="missing">the trainer cannot be asked: {escape(error)}</p>'
    return failed + view.token_table(t, self._codec, scored)

  async def picture(self, request: Request) -> Response:
    number, key = request.path_params["number"], request.path_params["key"]
    try:
      if number not in self._pictures:
        await run_in_threadpool(self._draw, number)
      head, data = self._pictures[number][key].split(";base64,")
    except KeyError:
      return Response(status_code=404)
    # The key is a digest of the picture: it never changes.
    lasting = {"Cache-Control": "max-age=86400, immutable"}
    return Response(
      base64.b64decode(data), media_type=head.removeprefix("data:"), headers=lasting
    )

  def _draw(self, number: int) -> str:
    """A trajectory among those of its question."""
    row, t = self._index.row(number), self._index.read(number)
    if row is None:
      raise KeyError(number)
    store: dict[str, str] = {}
    html = view.render(
      t, self._look, codec=self._codec, store=store, heading=f"{row.task} · {row.run}"
    )
    self._pictures[number] = store
    while len(self._pictures) > KEPT:
      self._pictures.popitem(last=False)
    beside = _chips(row, *self._index.same_question(row))
    tokens = (
      f'<details class="more tokens-of" data-tokens="{number}"><summary>every token of the '
      "policy: sampler and trainer</summary><p>asking …</p></details>"
    )
    return f'<div data-number="{number}">{beside}{html}{tokens}</div>'


def _is_evaluation(run: runs.Run) -> bool:
  return not run.metrics and "policies" in run.config


def _told(run: runs.Run) -> dict:
  """A run's line."""
  state = runs.progress(run)
  last = run.metrics[-1] if run.metrics else {}
  latest = {}
  for key, name in LATEST.items():
    rows = (row[key] for row in reversed(run.metrics) if key in row)
    value = next(rows, None) if key.startswith("eval/") else last.get(key)
    if isinstance(value, int | float):
      latest[name] = value
  told = dataclasses.asdict(state) if state else {"state": "nothing yet"}
  return {"name": run.name, "latest": latest, **told}


def _line(row: Row) -> dict:
  line = dataclasses.asdict(row)
  return line | {"question": row.question[:120]}


def _chips(here: Row, group: Sequence[Row], others: Sequence[Row]) -> str:
  """Links to others of the same question, with what became of them."""
  out = ""
  if len(group) > 1:
    out += f'<p class="group"><span>the group:</span>{_links(group, here)}</p>'
  places: dict[tuple, list[Row]] = {}
  for row in others:
    places.setdefault((row.run, row.step), []).append(row)
  if places:
    lines = "".join(
      f'<p class="group"><span>{escape(run)}{f", step {step}" if step >= 0 else ""}:</span>'
      f"{_links(rows, here)}</p>"
      for (run, step), rows in places.items()
    )
    out += (
      '<details class="more"><summary>the same question at other steps and in other runs '
      f"({len(places)})</summary>{lines}</details>"
    )
  return out


def _links(rows: Sequence[Row], here: Row) -> str:
  out = []
  for row in rows:
    mark = {"correct": "✓", "wrong": "✗"}.get(row.verdict, "·")
    css = f"{row.verdict}{' here' if row.number == here.number else ''}"
    told = f"sample {row.sample + 1}, said {row.answer!r}"
    out.append(
      f'<a class="{css}" href="#{row.number}" title="{escape(told)}">{mark}'
      f"{' ▣' if row.ops else ''}</a>"
    )
  return "".join(out)


def _filters() -> str:
  buttons = (
    ("verdict", "correct", "c", "correct"),
    ("verdict", "wrong", "w", "wrong"),
    ("ops", "1", "o", "used an operation"),
    ("errors", "1", "e", "error"),
    ("help", "helped", "", "helped"),
    ("help", "harmed", "", "harmed"),
    ("stop", "turns", "", "too many turns"),
  )
  pressed = "".join(
    f'<button type="button" data-key="{k}" data-value="{v}" data-press="{p}"'
    f' aria-pressed="false">{label}</button>'
    for k, v, p, label in buttons
  )
  selects = "".join(
    f'<select data-key="{key}" aria-label="{label}"><option value="">{label}</option>'
    "</select>"
    for key, label in (("run", "every run"), ("step", "every step"),
                       ("dataset", "all data"))
  )  # fmt: skip
  sorts = (
    ("newest", "newest first"), ("oldest", "oldest first"), ("best", "highest advantage"),
    ("worst", "lowest advantage"), ("errors", "most errors"),
  )  # fmt: skip
  options = "".join(f'<option value="{v}">{label}</option>' for v, label in sorts)
  return (
    f'<div class="filters" id="filters">{pressed}'
    '<button type="button" data-key="tokens" data-press="t" aria-pressed="false">'
    f"token probabilities</button>{selects}"
    f'<select data-key="sort" aria-label="order">{options}</select>'
    '<input type="search" placeholder="search" aria-label="search">'
    '<output id="count"></output></div>'
  )


def _html(text: str, status: int = 200) -> Response:
  text = text.encode("utf-8", "replace").decode()
  return HTMLResponse(text, status_code=status, headers=page.HEADERS)
