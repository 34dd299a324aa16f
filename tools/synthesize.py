"""Seeds and a teacher -> trajectories for SFT, with what was dropped and why.

  pixel-jax synthesize --config=configs/synthesize.py --workdir=DIR

The same command again goes on: what was answered is not asked twice.  Writes into DIR
  trajectories.jsonl   read by train_sft --config.data.uri=jsonl:DIR/trajectories.jsonl
  pixel_reasoner/      the same as PixelReasoner-SFT-Data: release.json, images/, videos/
  dropped.jsonl        every other seed, with the reason
  report.json          how many of each, the shares of the kinds, what it cost
  teacher.jsonl        the journal of requests: cache and ledger
See docs/synthesis.md.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import time
from typing import TypedDict

from tqdm import tqdm

from pixel_jax import parallel, trajectory
from pixel_jax.chat import encode, tokenizer
from pixel_jax.data import sources, world
from pixel_jax.fields import NonNegativeInt, Seed
from pixel_jax.model.config import ModelConfig
from pixel_jax.rollout import engine, placement
from pixel_jax.run import bucket, checkpoint, policies, settings, start
from pixel_jax.synthesis import distill, export, journal, teacher
from pixel_jax.trajectory import Media, Task


def main(config, workdir):
  if bucket.behind(workdir) != workdir:
    raise settings.ConfigError(
      "--workdir: the journal of what the teacher was paid for is written line by line, "
      "which a bucket cannot take; give a local folder"
    )
  settings.check(config, SECTIONS)
  start.open_workdir(workdir, config)
  codec = open_codec(config, workdir)
  source = settings.call("data", sources.open_source, codec=codec, **config.data)
  recipe = settings.call("recipe", distill.Recipe, seed=config.seed, **config.recipe)
  try:
    report = asyncio.run(synthesize_all(config, workdir, codec, source, recipe))
  except (teacher.TeacherError, journal.JournalError) as error:
    raise settings.ConfigError(
      f"{error}. What was answered so far is kept; the same command goes on."
    ) from error
  except KeyboardInterrupt:
    raise settings.ConfigError("stopped; the same command goes on") from None
  print(table(report))
  print(
    f"in {workdir}: trajectories.jsonl, pixel_reasoner/, dropped.jsonl, report.json, "
    "teacher.jsonl"
  )
  if report["open"]:
    print(
      f"{report['open']} seeds are open ({report['open_detail']}); the same command asks "
      "for these alone"
    )


class Fields(TypedDict):
  """The fields outside of sections."""

  seed: Seed
  seeds: NonNegativeInt
  init: str
  local: str


SECTIONS = {  # what takes the fields of each section of the config
  "": (Fields,),
  "codec": (encode.Codec, settings.Named),
  "data": (sources.open_source,),
  "recipe": (distill.Recipe,),
  "teacher": (teacher.Teacher,),
  "endpoint": (teacher.endpoint,),
  "model": (ModelConfig, settings.Model),
  "engine": (engine.Engine,),
}


def open_codec(config, workdir) -> encode.Codec:
  """The tokenizer and the prompt profile that the trajectories are written for."""
  if config.init:
    return policies.open_codec(config.init, config.codec)
  if not sources.is_world(config.data.uri):
    raise settings.ConfigError(
      "config.init is empty: ids need the tokenizer of the model to be trained. Give a "
      "converted checkpoint (pixel-jax convert import --hf=DIR --out=DIR)"
    )
  words = tokenizer.make_tiny(workdir / "tokenizer", world.scaffolds())
  return policies.make_codec(words, config.codec)


async def synthesize_all(config, workdir, codec, source, recipe) -> dict:
  """Every seed through the teacher; writes the files and returns the report."""
  async with contextlib.AsyncExitStack() as stack:
    notes = stack.enter_context(
      contextlib.closing(journal.Journal(workdir / "teacher.jsonl"))
    )
    model, complete = await open_teacher(config, workdir, stack)
    master = settings.call(
      "teacher", teacher.Teacher, complete, notes, **{**config.teacher, "model": model}
    )
    return await write(config, workdir, codec, source, recipe, master)


async def open_teacher(config, workdir, stack) -> tuple[str, teacher.Complete]:
  """The teacher's name, which is part of every key, and what completes a request."""
  if config.local:
    local = Local(config, workdir)
    return f"{config.local}@{local.weights}", local.complete
  name = config.teacher.model
  opened = settings.call("endpoint", teacher.endpoint, name, **config.endpoint)
  return name, await stack.enter_async_context(opened)


async def write(config, workdir, codec, source, recipe, master) -> dict:
  """The files of all outcomes, each complete or as it was; the report."""
  notes, begun, spent = master.journal, time.monotonic(), master.journal.spent
  count = min(config.seeds or len(source), len(source))
  counts, kinds = collections.Counter(), collections.Counter()
  open_detail = ""
  good, bad = (workdir / f"{n}.jsonl.partial" for n in ("trajectories", "dropped"))
  with contextlib.ExitStack() as stack:
    files = [stack.enter_context(p.open("w", encoding="utf-8")) for p in (good, bad)]
    layout = export.PixelReasoner(workdir / "pixel_reasoner", config.data.root)
    stack.enter_context(layout)
    bar = stack.enter_context(tqdm(total=count, desc="seeds", disable=None))
    async for outcome in distill.distill(source, codec, master, recipe, count):
      if outcome.trace:
        files[0].write(trajectory.to_json(outcome.trace.trajectory) + "\n")
        layout.add(outcome.index, outcome.trace)
        kinds[outcome.kind] += 1
      elif outcome.is_open:
        open_detail = outcome.detail
      else:
        files[1].write(dropped(outcome) + "\n")
      counts[outcome.reason or "written"] += 1
      bar.update()
      bar.set_postfix_str(
        f"{counts['written']} written, {notes.spent:,} of {master.budget:,} tokens"
      )
  good.replace(workdir / "trajectories.jsonl")
  bad.replace(workdir / "dropped.jsonl")
  written, is_open = counts.pop("written", 0), counts.pop("open", 0)
  wanted, of = collections.Counter(), collections.Counter()
  for kind, share in recipe.kinds.items():  # within images, within videos
    wanted[kind.split("/")[0]] += share
    of[kind.split("/")[0]] += kinds[kind]
  report = {
    "seeds": count,
    "written": written,
    "dropped": dict(sorted(counts.items())),
    "open": is_open,
    "open_detail": open_detail,
    "kinds": {
      k: {
        "written": kinds[k],
        "share": kinds[k] / max(of[k.split("/")[0]], 1),
        "wanted": v / (wanted[k.split("/")[0]] or 1.0),
      }
      for k, v in recipe.kinds.items()
    },
    "teacher": {
      "model": master.model,
      "tokens": notes.spent,
      "tokens_of_this_run": notes.spent - spent,
      "lost_requests": notes.lost,
      **dict(sorted(master.stats.items())),
    },
    "seconds": round(time.monotonic() - begun, 1),
  }
  (workdir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
  return report


def dropped(outcome: distill.Outcome) -> str:
  task, prose = outcome.task, outcome.prose
  return json.dumps(
    {
      "index": outcome.index,
      "reason": outcome.reason,
      "detail": outcome.detail,
      "kind": outcome.kind,
      "task": task and dataclasses.asdict(task),
      "prose": prose and dataclasses.asdict(prose),
    },
    ensure_ascii=False,
  )


def table(report: dict) -> str:
  """The report as aligned text."""
  t, lines = report["teacher"], []
  lines.append(f"{report['seeds']:>7} seeds in {report['seconds']} s")
  lines.append(f"{report['written']:>7} written")
  for kind, k in report["kinds"].items():
    if k["written"]:
      share = f"{k['share']:.1%} (wanted {k['wanted']:.0%})"
      lines.append(f"{k['written']:>11} {kind:<15} {share}")
  lines.append(f"{sum(report['dropped'].values()):>7} dropped (dropped.jsonl says why)")
  lines += [f"{n:>11} {reason}" for reason, n in report["dropped"].items()]
  lines.append(f"{report['open']:>7} open")
  lines.append(
    f"{t['tokens']:>7,} tokens, {t['tokens_of_this_run']:,} of them now; requests: "
    f"{t.get('sent', 0)} sent, {t.get('known', 0)} known, {t['lost_requests']} lost by "
    "runs that were killed"
  )
  retries = {k[6:]: n for k, n in t.items() if k.startswith("retry/")}
  if retries:
    lines.append(f"        retries {retries}")
  return "\n".join(lines)


class Local:
  """A checkpoint of ours as the teacher: requests that wait are played together."""

  def __init__(self, config, workdir):
    self.policy = policies.open_policy(
      config.local,
      model=config.model,
      codec=config.codec,
      mesh=parallel.make_mesh(),
      seed=0,
      workdir=workdir,
    )
    self.weights = checkpoint.fingerprint(config.local)
    codec = dataclasses.replace(self.policy.codec, tools=False)
    self.engine = settings.call(
      "engine", engine.Engine, self.policy.config, codec, **config.engine
    )
    self._waiting: list[tuple[teacher.Request, asyncio.Future]] = []
    self._playing = asyncio.Lock()

  async def complete(self, request: teacher.Request) -> journal.Reply:
    future = asyncio.get_running_loop().create_future()
    self._waiting.append((request, future))
    async with self._playing:
      if not future.done():
        await asyncio.sleep(0.05)  # others come along
        batch, self._waiting = self._waiting, []
        try:
          replies = await asyncio.to_thread(self._play, [r for r, _ in batch])
        except ValueError as error:  # no prompt fits
          raise teacher.Fatal(f"config.engine: {error}") from error
        for (_, waiting), reply in zip(batch, replies):
          waiting.set_result(reply)
    return await future

  def _play(self, requests: list[teacher.Request]) -> list[journal.Reply]:
    pictures, tasks = {}, []
    for i, r in enumerate(requests):
      media = [Media("image", f"{i}/{n}") for n in range(len(r.views))]
      pictures |= {m.path: view for m, view in zip(media, r.views)}
      # The key of its sampling is the task's id: of the request, not of its place.
      tasks.append(Task(f"{r.key('')}", f"{r.system}\n\n{r.text}", "-", media))
    groups = self.engine.run(
      placement.to_engines(self.policy.params)[0],
      tasks,
      seed=0,
      step=0,
      group_size=1,
      load_media=lambda media: pictures[media.path],
      max_turns=1,
      max_new_tokens=max(r.max_tokens for r in requests),
      temperature=requests[0].temperature,
      fixed_batch=True,  # what one says does not depend on who is asked beside it
    )
    replies = []
    for (finished,) in groups:
      t = finished.trajectory
      text = t.turns[-1]["text"] if t.stop == "answer" else None
      replies.append(
        journal.Reply(text, "", len(t.ids) - sum(t.sampled), sum(t.sampled))
      )
    return replies


if __name__ == "__main__":
  start.run(main)
