"""Trajectories of runs, found without being read: an index of their files in SQLite.

  index = Index(path)                     or Index(), in memory
  index.update(files)                     reads what is new; each file once
  rows, total = index.search(Wish(verdict="wrong", text="red"), limit=100)
  index.read(rows[0].number)              the whole trajectory, from its place in its file

A line of a 7B run has some 200 kB, nearly all of them lists of numbers.  They are cut out
before the rest is parsed, so that reading a run costs little more than its disk does.
"""

import dataclasses
import json
import pathlib
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence

from pixel_jax import trajectory as trajectories
from pixel_jax.trajectory import Trajectory
from pixel_jax.view import trajectory as view

# From the first list of numbers to the last: names in quotes that no text can hold, since
# JSON escapes the quotes in it.
NUMBERS = re.compile(rb'("policy_step": -?\d+), "ids": \[')
AFTER = b', "slots": ['
EMPTY = b', "ids": [], "sampled": [], "weight": [], "logp": [], "position": []'

SORTS = {
  "newest": "step DESC, number",
  "oldest": "step, number",
  "best": "advantage DESC, number",
  "worst": "advantage, number",
  "errors": "errors DESC, number",
}
LAYOUT = 1  # of the tables: an index of another one is made anew

TABLES = """
CREATE TABLE file (path TEXT PRIMARY KEY, run TEXT, size INTEGER, mtime INTEGER);
CREATE TABLE trajectory (
  number INTEGER PRIMARY KEY, file TEXT, start INTEGER, length INTEGER, run TEXT,
  step INTEGER, task TEXT, sample INTEGER, dataset TEXT, verdict TEXT, ops INTEGER,
  errors INTEGER, help TEXT, stop TEXT, advantage REAL, reward REAL, question TEXT,
  answer TEXT, text TEXT);
CREATE INDEX by_step ON trajectory (step, number);
CREATE INDEX by_task ON trajectory (task, run, step);
CREATE INDEX by_file ON trajectory (file);
CREATE INDEX by_run ON trajectory (run, step, number);
CREATE INDEX by_advantage ON trajectory (advantage);
"""


@dataclasses.dataclass(frozen=True)
class File:
  """A file of trajectories."""

  run: str
  path: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Row:
  """What the list shows of a trajectory."""

  number: int
  run: str
  step: int
  task: str
  sample: int
  verdict: str
  ops: int
  errors: int
  help: str  # "helped": it looked, and is right where those that did not were wrong
  stop: str
  advantage: float
  reward: float | None
  question: str
  answer: str


COLUMNS = ", ".join(f.name for f in dataclasses.fields(Row))


@dataclasses.dataclass(frozen=True)
class Wish:
  """What is looked for; a field that is empty allows all.

  Attributes:
    help: "helped" or "harmed".
    step: a number, as text.
    text: in the id, the question or the answer; case does not matter.
  """

  verdict: str = ""
  ops: bool = False
  errors: bool = False
  help: str = ""
  stop: str = ""
  run: str = ""
  dataset: str = ""
  step: str = ""
  text: str = ""
  sort: str = "newest"


class Index:
  """The trajectories of some files.  Any thread may ask.

  Args:
    path: of the database, which is made where there is none; None keeps it in memory.
    judge: gives "correct" where the file has no judgement, as evaluation's do not.
  """

  def __init__(
    self,
    path: pathlib.Path | None = None,
    judge: Callable[[Trajectory], float] | None = None,
  ):
    self._judge, self._lock = judge, threading.Lock()
    if path is not None:
      path.parent.mkdir(parents=True, exist_ok=True)
    self._db = sqlite3.connect(path or ":memory:", check_same_thread=False)
    (layout,) = self._db.execute("PRAGMA user_version").fetchone()
    if layout != LAYOUT:
      known = self._db.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table'"
      ).fetchall()
      for (name,) in known:
        self._db.execute(f"DROP TABLE {name}")
      self._db.executescript(TABLES)
      self._db.execute(f"PRAGMA user_version = {LAYOUT}")
    self.version = 0  # grows with every change
    self._choices: tuple[int, dict[str, list]] = (-1, {})  # of which version

  # ---- Reading files -----------------------------------------------------------------

  def update(
    self,
    files: Iterable[File],
    advance: Callable[[int], None] = lambda size: None,
    warn: Callable[[str], None] = lambda text: None,
  ) -> int:
    """Reads what is new or has changed, forgets what is gone; how many lines are new.

    Args:
      advance: told the bytes of each file that was read.
      warn: told of each line that does not parse (a killed run's); it is left out.
    """
    new, seen = 0, set()
    with self._lock:
      known = {p: (r, s, m) for p, r, s, m in self._db.execute("SELECT * FROM file")}
    for file in files:
      path = str(file.path)
      try:
        stat = file.path.stat()
      except OSError:
        continue
      seen.add(path)
      state = (file.run, stat.st_size, stat.st_mtime_ns)
      if known.get(path) == state:
        continue
      lines = list(self._lines(file, warn))
      with self._lock, self._db:
        self._forget(path)
        self._db.executemany(f"INSERT INTO trajectory VALUES (NULL{', ?' * 18})", lines)
        self._db.execute("INSERT INTO file VALUES (?, ?, ?, ?)", (path, *state))
        self._help(file)
        self.version += 1
      new += len(lines)
      advance(stat.st_size)
    with self._lock, self._db:
      for path in known.keys() - seen:
        self._forget(path)
        self.version += 1
    return new

  def _forget(self, path: str) -> None:
    self._db.execute("DELETE FROM trajectory WHERE file = ?", (path,))
    self._db.execute("DELETE FROM file WHERE path = ?", (path,))

  def _lines(self, file: File, warn):
    with file.path.open("rb") as lines:
      start = 0
      for number, line in enumerate(lines, 1):
        try:
          yield self._row(file, start, len(line), line)
        except (ValueError, TypeError, KeyError) as error:
          warn(f"{file.path}:{number} is left out: {error}")
        start += len(line)

  def _row(self, file: File, start: int, length: int, line: bytes) -> tuple:
    t = without_numbers(line)
    if self._judge is not None and "correct" not in t.reward:
      t.reward["correct"] = self._judge(t)
    answer, task = view.answer_of(t), t.task
    words = f"{task.id} {task.question} {answer}".lower()
    errors = t.ops_attempted - t.ops_succeeded
    dataset = task.id.rpartition("/")[0]
    return (
      str(file.path), start, length, file.run, t.policy_step, task.id, t.sample, dataset,
      view.verdict(t), t.ops_attempted, errors, "", t.stop, t.advantage,
      t.reward.get("total"), task.question[:200], answer[:80], words[:2000],
    )  # fmt: skip

  def _help(self, file: File) -> None:
    """Marks who looked and was right where those who did not were mostly wrong, and the
    reverse.  Of training, the others are the rest of the group; of an evaluation, the
    answers to the same question by the same policy when it could not operate."""
    policy, _, mode = file.run.rpartition(", ")
    looked = blind = ("file = ?", str(file.path))
    if mode in ("free", "forbidden"):
      looked = ("run = ?", f"{policy}, free")
      blind = ("run = ?", f"{policy}, forbidden")
    self._db.execute(
      f"""UPDATE trajectory SET help = CASE
            WHEN verdict = 'correct' AND blind.right < 0.5 THEN 'helped'
            WHEN verdict = 'wrong' AND blind.right > 0.5 THEN 'harmed' ELSE '' END
          FROM (SELECT task AS t, step AS s, avg(verdict = 'correct') AS right
                FROM trajectory WHERE {blind[0]} AND ops = 0 AND verdict != 'unjudged'
                GROUP BY task, step) AS blind
          WHERE {looked[0]} AND ops > errors AND task = blind.t AND step = blind.s""",
      (blind[1], looked[1]),
    )

  # ---- Asking ------------------------------------------------------------------------

  def search(
    self, wish: Wish = Wish(), *, limit: int = 100, offset: int = 0
  ) -> tuple[list[Row], int]:
    """A page of what fits the wish, and how many fit in all."""
    where, values = _where(wish)
    order = SORTS.get(wish.sort, SORTS["newest"])
    with self._lock:
      (total,) = self._db.execute(
        f"SELECT count(*) FROM trajectory {where}", values
      ).fetchone()
      found = self._db.execute(
        f"SELECT {COLUMNS} FROM trajectory {where} ORDER BY {order} LIMIT ? OFFSET ?",
        (*values, limit, offset),
      ).fetchall()
    return [Row(*x) for x in found], total

  def choices(self) -> dict[str, list]:
    """What can be asked for: runs, steps and datasets.  Every page asks every two seconds,
    so all rows are gone through once a version."""
    with self._lock:
      if self._choices[0] != self.version:
        self._choices = self.version, {
          name: [x for (x,) in self._db.execute(
            f"SELECT DISTINCT {name} FROM trajectory ORDER BY {name} LIMIT 1000")]
          for name in ("run", "step", "dataset")
        }  # fmt: skip
      return self._choices[1]

  def row(self, number: int) -> Row | None:
    with self._lock:
      found = self._db.execute(
        f"SELECT {COLUMNS} FROM trajectory WHERE number = ?", (number,)
      ).fetchone()
    return Row(*found) if found else None

  def same_question(self, row: Row) -> tuple[list[Row], list[Row]]:
    """(the samples of its group, those of other steps and runs, oldest first)."""
    with self._lock:
      found = self._db.execute(
        f"SELECT {COLUMNS} FROM trajectory WHERE task = ? ORDER BY run, step, sample "
        "LIMIT 500",
        (row.task,),
      ).fetchall()
    rows = [Row(*x) for x in found]
    group = [r for r in rows if (r.run, r.step) == (row.run, row.step)]
    return group, [r for r in rows if r not in group]

  def read(self, number: int) -> Trajectory:
    """The trajectory, whole; `KeyError` where its file has changed or is gone."""
    with self._lock:
      found = self._db.execute(
        "SELECT file, start, length FROM trajectory WHERE number = ?", (number,)
      ).fetchone()
    if found is None:
      raise KeyError(number)
    path, start, length = found
    try:
      with open(path, "rb") as f:
        f.seek(start)
        t = trajectories.from_json(f.read(length))
    except (OSError, ValueError, TypeError) as error:
      raise KeyError(f"{path}: {error}") from error
    if self._judge is not None:
      t.reward.setdefault("correct", self._judge(t))
    return t

  def close(self) -> None:
    self._db.close()


def _where(wish: Wish) -> tuple[str, list]:
  terms, values = [], []
  for name in ("verdict", "help", "stop", "run", "dataset"):
    if value := getattr(wish, name):
      terms.append(f"{name} = ?")
      values.append(value)
  if re.fullmatch(r"-?\d{1,9}", wish.step):
    terms.append("step = ?")
    values.append(int(wish.step))
  if wish.ops:
    terms.append("ops > 0")
  if wish.errors:
    terms.append("errors > 0")
  for word in wish.text.lower().split():
    terms.append("instr(text, ?) > 0")
    values.append(word)
  return f"WHERE {' AND '.join(terms)}" if terms else "", values


def without_numbers(line: bytes) -> Trajectory:
  """The trajectory of a line, its lists of a number a token left empty."""
  if found := NUMBERS.search(line):
    end = line.find(AFTER, found.end())
    if end > 0:
      line = line[: found.end(1)] + EMPTY + line[end:]
  return trajectories.from_dict(json.loads(line))


class Stored(Sequence):
  """The trajectories of a run, each read when it is asked for.

  Attributes:
    heads: (step, id of the task) of each.
  """

  def __init__(self, index: Index, run: str):
    self._index = index
    rows, _ = index.search(Wish(run=run, sort="oldest"), limit=-1)
    self.heads = [(row.step, row.task) for row in rows]
    self._numbers = [row.number for row in rows]

  def __len__(self) -> int:
    return len(self._numbers)

  def __getitem__(self, i):
    return self._index.read(self._numbers[i])
