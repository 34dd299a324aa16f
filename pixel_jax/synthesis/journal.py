"""The journal of a teacher: what was asked, answered and spent.  Cache and ledger.

One append-only file.  A reply is found again by the key of its request, a hash of
everything that it depends on, so nothing is asked twice, today or after a crash.  A
request that was sent and never answered (the run was killed) may have been billed: it
counts as the worst that it could have cost.

  {"event": "sent", "key": "5f1c...", "tokens": 2310}      before it leaves
  {"event": "reply", "key": "5f1c...", "tokens": 804, "text": ..., "refusal": ...}
  {"event": "failed", "key": "5f1c...", "tokens": 0}       429, 500, no connection
"""

import dataclasses
import fcntl
import json
import os
import pathlib

EVENTS = ("sent", "reply", "failed")


class JournalError(ValueError):
  """A journal that another run writes, or that is damaged."""


@dataclasses.dataclass(frozen=True)
class Reply:
  """What a teacher answered.  The text is a stranger's: see `prompts.py`."""

  text: str | None  # None: the reply had no text that can be used
  refusal: str = ""  # why it would not answer
  prompt_tokens: int = 0
  completion_tokens: int = 0

  @property
  def tokens(self) -> int:
    return self.prompt_tokens + self.completion_tokens


class Journal:
  """Opens, or makes, the file; only one process may have it open.

  In memory are keys and places, not texts.  `spent` is in tokens, over all runs.
  """

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      os.close(self._file)
      raise JournalError(
        f"{self.path} is in use by another run; wait for it, or give another --workdir"
      ) from None
    self._at: dict[str, tuple[int, int]] = {}  # key -> place of its reply
    self._open: dict[str, int] = {}  # key -> what it may cost
    self.spent = 0
    self._end = 0
    try:
      self._read()
    except JournalError:
      self.close()
      raise
    self.lost = len(self._open)  # by a run that was killed
    self.spent += sum(self._open.values())
    self._open.clear()

  def _read(self) -> None:
    with self.path.open("rb") as f:
      for number, line in enumerate(f, 1):
        if not line.endswith(b"\n"):  # a killed run leaves half a line
          os.ftruncate(self._file, self._end)
          return
        try:
          self._take(json.loads(line), len(line))
        except (ValueError, KeyError, TypeError) as error:
          raise JournalError(
            f"{self.path} line {number} is damaged ({error}); remove that line: what it "
            "answered will be asked again"
          ) from error

  def _take(self, d: dict, length: int) -> None:
    if d["event"] not in EVENTS:
      raise ValueError(f"event {d['event']!r}; allowed are {', '.join(EVENTS)}")
    if d["event"] == "sent":
      # The same request was sent before and never answered.
      self.spent += self._open.pop(d["key"], 0)
      self._open[d["key"]] = int(d["tokens"])
    else:
      self._open.pop(d["key"], None)
      self.spent += int(d["tokens"])
    if d["event"] == "reply":
      self._at[d["key"]] = (self._end, length)
    self._end += length

  def _write(self, **event) -> None:
    line = json.dumps(event, ensure_ascii=True).encode() + b"\n"
    os.write(self._file, line)
    self._take(event, len(line))

  def sent(self, key: str, tokens: int) -> None:
    """A request leaves; `tokens` is the most that it can cost."""
    self._write(event="sent", key=key, tokens=tokens)

  def failed(self, key: str, tokens: int) -> None:
    """It came to nothing and cost so much."""
    self._write(event="failed", key=key, tokens=tokens)

  def reply(self, key: str, reply: Reply) -> None:
    self._write(
      event="reply", key=key, tokens=reply.tokens, **dataclasses.asdict(reply)
    )

  def get(self, key: str) -> Reply | None:
    """What was answered to the request of this key."""
    if key not in self._at:
      return None
    start, length = self._at[key]
    d = json.loads(os.pread(self._file, length, start))
    return Reply(**{f.name: d[f.name] for f in dataclasses.fields(Reply)})

  def __len__(self) -> int:
    return len(self._at)

  def close(self) -> None:
    os.close(self._file)
