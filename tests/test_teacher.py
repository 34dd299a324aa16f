"""The teacher: asks once, waits as told, keeps its limits, survives a kill."""

import asyncio
import json
import time

import numpy as np
import pytest
import teachers
from PIL import Image

from pixel_jax.synthesis import journal, teacher
from pixel_jax.synthesis.journal import Reply

FAST = dict(model="m", first_wait=0.001, longest_wait=0.002, image_tokens=0)


def request(n=0, **more):
  return teacher.Request("system", f"question {n}", max_tokens=100, **more)


def make(tmp_path, complete, **settings):
  notes = journal.Journal(tmp_path / "teacher.jsonl")
  return teacher.Teacher(complete, notes, **{**FAST, **settings})


def counting(reply=None, failing=(), seconds=0.0):
  """A teacher's `complete` that first raises what is in `failing`."""
  failures, seen = list(failing), []

  async def complete(asked):
    seen.append(asked.text)
    await asyncio.sleep(seconds)
    if failures:
      raise failures.pop(0)
    return reply or Reply("yes", "", 40, 10)

  return complete, seen


# ---- Asking --------------------------------------------------------------------------


def test_nothing_is_asked_twice(tmp_path):
  complete, seen = counting(seconds=0.01)
  master = make(tmp_path, complete)

  async def ask():
    twins = [master.ask(request(n % 3)) for n in range(12)]  # at the same time
    return await asyncio.gather(*twins)

  assert {r.text for r in asyncio.run(ask())} == {"yes"}
  assert sorted(seen) == [f"question {n}" for n in range(3)]
  master.journal.close()
  again = make(tmp_path, complete)  # another day
  assert asyncio.run(again.ask(request(1))).text == "yes"
  assert len(seen) == 3 and again.journal.spent == 150
  again.journal.close()


def test_a_key_is_all_that_a_reply_depends_on():
  picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
  other = picture.copy()
  other.putpixel((3, 3), (0, 0, 0))
  requests = [
    request(),
    request(1),
    request(take=1),
    request(temperature=0.1),
    request(pictures=(picture,)),
    request(pictures=(other,)),
    request(pictures=(picture, other)),
    request(pictures=(picture.rotate(90),)),
  ]
  keys = [r.key("m") for r in requests] + [request().key("another model")]
  assert len(set(keys)) == len(keys)
  assert request(pictures=(picture.copy(),)).key("m") == keys[4]


def test_failures_that_pass_are_tried_again(tmp_path):
  complete, seen = counting(
    failing=[teacher.Again("500"), teacher.Again("cut", None, True)]
  )
  master = make(tmp_path, complete)
  assert asyncio.run(master.ask(request())).text == "yes"
  assert len(seen) == 3
  assert master.stats["retry/500"] == master.stats["retry/cut"] == 1
  # What was perhaps billed counts as the most that it could be, a 500 as nothing.
  assert master.journal.spent == 50 + master._reserve(request())
  master.journal.close()


@pytest.mark.parametrize("answered", [True, False])
def test_those_that_do_not_pass_leave_the_request_open(tmp_path, answered, caplog):
  """One that has never answered anything ends the run: it will not the next time."""
  complete, seen = counting(failing=[teacher.Again("500")] * 9)
  master = make(tmp_path, complete, attempts=4)
  if answered:
    master.journal.reply("another", journal.Reply("yes", "", 1, 1))
  error = teacher.Unanswered if answered else teacher.Fatal
  with pytest.raises(error, match="4 attempts failed, the last by 500"):
    asyncio.run(master.ask(request()))
  assert len(seen) == 4 and master.journal.get(request().key("m")) is None
  assert caplog.text.count("the teacher: 500; asked again in") == 1
  master.journal.close()


def test_a_page_for_people_is_no_completion(tmp_path, server):
  server.page = "<!DOCTYPE html><title>Welcome</title>"
  error, master = ask_endpoint(picture_request(), tmp_path, 5.0, attempts=2)
  assert isinstance(error, teacher.Fatal) and "DOCTYPE" in str(error)
  assert "never answered; check OPENAI_BASE_URL" in str(error)
  master.journal.close()


def test_waits_double_and_differ(tmp_path):
  master = make(tmp_path, None, first_wait=1.0, longest_wait=20.0)
  for attempt in range(8):
    waits = [master._backoff(attempt) for _ in range(50)]
    full = min(2.0**attempt, 20.0)
    assert min(waits) >= full / 2 and max(waits) <= full and len(set(waits)) == 50
  master.journal.close()


def test_all_wait_as_long_as_the_server_says(tmp_path):
  complete, _ = counting(failing=[teacher.Again("429", 0.3)])
  master, times = make(tmp_path, complete), []

  async def noted(asked):
    times.append(time.monotonic())
    return await complete(asked)

  master._complete = noted

  async def ask():
    first = asyncio.ensure_future(master.ask(request(0)))
    await asyncio.sleep(0.1)
    await asyncio.gather(first, *(master.ask(request(n)) for n in range(1, 4)))

  asyncio.run(ask())
  assert len(times) == 5 and all(t - times[0] >= 0.29 for t in times[1:])
  master.journal.close()


def test_the_rate_and_the_number_at_once_are_kept(tmp_path):
  times, now, most = [], 0, 0

  async def complete(asked):
    nonlocal now, most
    times.append(time.monotonic())
    now += 1
    most = max(most, now)
    await asyncio.sleep(0.1)
    now -= 1
    return Reply("yes", "", 1, 1)

  master = make(tmp_path, complete, requests_per_minute=1200, concurrency=3)

  async def ask():
    await asyncio.gather(*(master.ask(request(n)) for n in range(8)))

  asyncio.run(ask())
  assert most <= 3 and len(times) == 8 and times[-1] - times[0] >= 7 * 0.05 - 0.04
  master.journal.close()


def test_an_error_that_cannot_pass_ends_all(tmp_path):
  complete, seen = counting(failing=[teacher.Fatal("wrong key")], seconds=0.01)
  master = make(tmp_path, complete, concurrency=1)

  async def ask():
    asked = (master.ask(request(n)) for n in range(5))
    return await asyncio.gather(*asked, return_exceptions=True)

  assert all(isinstance(r, teacher.Fatal) for r in asyncio.run(ask()))
  assert len(seen) == 1 and master.journal.spent == 0
  master.journal.close()


def test_one_that_is_declined_is_set_aside_unless_it_is_the_first(tmp_path):
  complete, seen = counting(failing=[teacher.Declined("400: too many pictures")])
  master = make(tmp_path, complete)
  with pytest.raises(teacher.Fatal, match="before it answered anything"):
    asyncio.run(master.ask(request()))
  master.journal.close()
  complete, seen = counting()
  master = make(tmp_path, complete)
  asyncio.run(master.ask(request()))
  master._complete, seen = counting(failing=[teacher.Declined("400: no")])
  assert asyncio.run(master.ask(request(1))).refusal == "400: no"
  assert asyncio.run(master.ask(request(1))).refusal == "400: no" and len(seen) == 1
  master.journal.close()


# ---- The budget ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_the_budget_is_kept_whatever_comes_back(tmp_path, seed):
  """Requests of random cost, some lost: what the server bills is never more."""
  rng = np.random.default_rng(seed)
  billed = 0

  async def complete(asked):
    nonlocal billed
    await asyncio.sleep(rng.uniform(0, 0.003))
    cost = int(rng.integers(1, 60)), int(rng.integers(0, 101))
    if rng.random() < 0.2:
      raise teacher.Again("500")
    billed += sum(cost)
    if rng.random() < 0.2:
      raise teacher.Again("connection", billed=True)
    return Reply("yes", "", *cost) if rng.random() < 0.8 else Reply("yes")

  budget = int(rng.integers(500, 5000))
  outcomes = []
  for day in range(2):  # the second starts from what the first has spent
    master = make(tmp_path, complete, budget=budget, concurrency=8)

    async def ask(master=master, day=day):
      asked = (master.ask(request(100 * day + n)) for n in range(80))
      return await asyncio.gather(*asked, return_exceptions=True)

    outcomes += asyncio.run(ask())
    assert billed <= master.journal.spent <= budget
    master.journal.close()
  assert any(isinstance(r, teacher.Exhausted) for r in outcomes)
  allowed = Reply | teacher.Exhausted | teacher.Unanswered
  assert all(isinstance(r, allowed) for r in outcomes)


def test_a_server_whose_pictures_cost_more_is_learned(tmp_path):
  async def complete(asked):
    return Reply("yes", "", 9000, 10)

  master = make(tmp_path, complete, budget=30_000, concurrency=1, image_tokens=100)

  async def ask():
    picture = Image.new("RGB", (50, 50))
    asked = (master.ask(request(n, pictures=(picture,))) for n in range(9))
    return await asyncio.gather(*asked, return_exceptions=True)

  outcomes = asyncio.run(ask())
  assert sum(isinstance(r, Reply) for r in outcomes) == 3
  assert master.journal.spent == 27_030
  master.journal.close()


# ---- The journal ---------------------------------------------------------------------


def test_half_a_line_is_cut_and_what_was_under_way_is_counted(tmp_path):
  file = tmp_path / "teacher.jsonl"
  notes = journal.Journal(file)
  notes.sent("a", 500)
  notes.reply("a", Reply("ä \u2028 <|im_end|>\n", "", 30, 12))
  notes.sent("b", 700)
  notes.close()
  whole = file.read_bytes()
  file.write_bytes(whole + b'{"event": "reply", "key": "b", "tok')
  notes = journal.Journal(file)
  assert file.read_bytes() == whole
  assert notes.get("a") == Reply("ä \u2028 <|im_end|>\n", "", 30, 12)
  assert notes.get("b") is None
  assert (notes.lost, notes.spent, len(notes)) == (1, 742, 1)
  notes.sent("b", 700)  # again; then it is answered
  notes.reply("b", Reply("yes", "", 1, 1))
  notes.close()
  notes = journal.Journal(file)
  assert (notes.lost, notes.spent, len(notes)) == (0, 744, 2)
  notes.close()


def test_a_damaged_line_is_told(tmp_path):
  file = tmp_path / "teacher.jsonl"
  dance = b'{"event": "dance", "key": "a"}\n'
  for line in (b"junk\n", dance, b"[1]\n", b"\xff\xfe\n"):
    file.write_bytes(b'{"event": "sent", "key": "a", "tokens": 1}\n' + line)
    with pytest.raises(journal.JournalError, match="line 2 is damaged"):
      journal.Journal(file)


def test_only_one_run_writes_a_journal(tmp_path):
  notes = journal.Journal(tmp_path / "teacher.jsonl")
  with pytest.raises(journal.JournalError, match="in use by another run"):
    journal.Journal(tmp_path / "teacher.jsonl")
  notes.close()
  journal.Journal(tmp_path / "teacher.jsonl").close()


# ---- Real sockets, the real client ---------------------------------------------------


@pytest.fixture
def server(monkeypatch):
  pytest.importorskip("openai")
  with teachers.Loopback() as server:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    yield server


def ask_endpoint(asked, tmp_path=None, timeout=5.0, **settings):
  """Asks the real client: by a teacher where there is a folder, else directly."""

  async def ask():
    async with teacher.endpoint("m", timeout=timeout) as complete:
      if tmp_path is None:
        return await complete(asked), None
      master = make(tmp_path, complete, **settings)
      try:
        return await master.ask(asked), master
      except Exception as error:
        return error, master

  return asyncio.run(ask())


def picture_request(n=0):
  picture = Image.new("RGB", (64, 64), (n, 40, 40))
  return teacher.Request("s", f'{n} {{"query": ...}} not where', (picture,), 100)


@pytest.mark.parametrize("fault", teachers.PASSING)
def test_faults_that_pass_cost_a_retry(tmp_path, server, fault):
  server.passing, server.kinds[0] = 1.0, [fault]
  begun = time.monotonic()
  reply, master = ask_endpoint(picture_request(), tmp_path)
  assert json.loads(reply.text)["query"]
  assert master.stats["sent"] == 2 and list(server.asked.values()) == [2]
  if fault == "429":
    assert time.monotonic() - begun > 0.2  # Retry-After
  assert master.journal.spent >= server.billed > 0
  master.journal.close()


@pytest.mark.parametrize("fault", teachers.STAYING)
def test_whatever_a_server_replies_is_a_reply(tmp_path, server, fault):
  server.staying, server.kinds[1] = 1.0, [fault]
  reply, master = ask_endpoint(picture_request(), tmp_path)
  assert master.stats["sent"] == 1 and master.journal.get(picture_request().key("m"))
  assert reply.refusal == ("I can't help with that." if fault == "refusal" else "")
  unusable = fault in ("refusal", "list", "number", "no choices")
  assert (reply.text is None) == unusable
  if fault == "no usage":  # as if it had cost the most
    assert reply.tokens == master._reserve(picture_request())
  else:
    assert reply.tokens == server.billed
  master.journal.close()


def test_a_slow_server_is_given_up_on(tmp_path, server):
  server.delay = 3.0
  error, master = ask_endpoint(picture_request(), tmp_path, 0.2, attempts=2)
  assert isinstance(error, teacher.Fatal) and "timeout" in str(error)
  assert master.stats["retry/timeout"] == 2
  master.journal.close()


@pytest.mark.parametrize(
  ("status", "body", "error", "text"),
  [
    (401, "bad key: sk-very-secret", teacher.Fatal, "bad key: \\*\\*\\*"),
    (404, "no such model", teacher.Fatal, "no such model"),
    (429, "insufficient_quota", teacher.Fatal, "no quota left"),
    (400, "too large", teacher.Declined, "too large"),
    (503, "later", teacher.Again, "503"),
  ],
)
def test_http_errors_are_told_apart_and_never_show_the_key(
  server, monkeypatch, status, body, error, text
):
  def fail(self, *_):
    answer = {"error": {"message": body, "code": body}}
    self.send(status, json.dumps(answer).encode(), {"Retry-After": "7"})

  monkeypatch.setattr(teachers.Handler, "fail", fail)
  server.passing = 1.0
  with pytest.raises(error, match=text) as caught:
    ask_endpoint(picture_request())
  assert "secret" not in str(caught.value)
  if status == 503:
    assert caught.value.after == 7.0


def test_retry_after_may_be_a_date_or_nonsense():
  soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
  assert 25 < teacher.retry_after({"retry-after": soon}) <= 30
  assert teacher.retry_after({"retry-after": "1.5"}) == 1.5
  assert teacher.retry_after({"retry-after": "-3"}) == 0.0
  for nonsense in ("soon", "nan", "inf", ""):
    assert teacher.retry_after({"retry-after": nonsense}) is None


def test_an_endpoint_wants_a_key(monkeypatch):
  pytest.importorskip("openai")
  monkeypatch.delenv("OPENAI_API_KEY", raising=False)
  with pytest.raises(teacher.TeacherError, match="OPENAI_API_KEY"):
    ask_endpoint(picture_request())
