"""The pipeline: source -> traces -> packed rows, in an order that the seed decides.

The data is cut into logical shards: record i belongs to shard i % shards.  Each shard
has its own order (grain), is packed by itself a window of records at a time, and fills
a fixed block of rows of every batch.  A host owns a contiguous block of shards.  So 1,
2 and 4 hosts see the same global batches, and threads only decode and resize.

  records of a shard   |-- window 0 --|-- window 1 --|--      shuffled anew every epoch
  after first_fit      |row|row|row|  |row|row|row|row|
  batch 0, 1, ...       ^   ^   ^      ^                      state: window, next row

A record that cannot be used goes to WORKDIR/quarantine.jsonl with the reason, and the
run goes on until they are too many.  Batches are made ahead in a thread; the state
describes what was consumed.  Not here: what an example is (`chat/encode.py`), devices.
"""

import concurrent.futures
import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import grain
import numpy as np

from pixel_jax.chat import encode
from pixel_jax.data import formats, pack, records, sources
from pixel_jax.data.media import Held
from pixel_jax.data.quarantine import Bad, DataError, LeftOut, Quarantine, attempt
from pixel_jax.data.retell import retell
from pixel_jax.data.stream import Stream
from pixel_jax.fields import NonNegativeInt, PositiveInt, Seed, Share
from pixel_jax.trajectory import Task, Trajectory

# (tokens of a prompt, patches of each picture) -> why it has no room; "" where it has.
Refuses = Callable[[int, list[int]], str]


def open_batches(uri: str, codec: encode.Codec, **settings: Any) -> Stream:
  """`batches` of what a URI names: the arguments of `sources.open_source`, and theirs."""
  source, plan = _open(uri, codec, settings)
  return batches(source, codec, **plan)


def open_tasks(uri: str, codec: encode.Codec, **settings: Any) -> Stream:
  """`tasks` of what a URI names: the arguments of `sources.open_source`, and theirs."""
  source, plan = _open(uri, codec, settings)
  return tasks(source, **plan)


def open_fixed(
  uri: str, codec: encode.Codec, *, tasks: NonNegativeInt, **settings: Any
) -> "Questions":
  """The first `tasks` questions of what a URI names, as `fixed_tasks` takes them.

  0 takes all of them.
  """
  source, plan = _open(uri, codec, settings)
  return Questions(fixed_tasks(source, tasks or len(source), **plan), source.load_media)


def _open(uri, codec, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
  """The source of a URI, and those of the settings that are not its own."""
  own = inspect.signature(sources.open_source).parameters.keys() - {"uri", "codec"}
  mine = {k: v for k, v in settings.items() if k in own}
  source = sources.open_source(uri, codec=codec, **mine)
  return source, {k: v for k, v in settings.items() if k not in own}


def batches(
  source: Any,
  codec: encode.Codec,
  *,
  seed: Seed,
  rows: PositiveInt,
  tokens: PositiveInt,
  patches: PositiveInt,
  pack_window: PositiveInt = 256,
  shards: PositiveInt = 1,
  max_bad_share: Share = 0.01,
  changed: Literal["refuse", "accept"] = "refuse",
  workdir: str | pathlib.Path | None = None,
  host: int = 0,
  hosts: int = 1,
  threads: PositiveInt = 1,
  read_ahead: PositiveInt = 3,
  apart: bool = False,
  place: Callable[[dict], Any] | None = None,
) -> Stream:
  """Endless dicts of the fields of `Batch`: this host's block of `rows` packed rows.

  Beside them "names" lists the questions of its examples.

  Args:
    source: of traces, or of tasks with `synthesis`.
    rows: of the global batch; a multiple of `shards`.
    tokens: T of a row.
    patches: P of a row.
    pack_window: records of a shard that are packed together.
    max_bad_share: of the records of a shard; more is an error.
    changed: whether a run goes on whose data was changed (`Stream.set_state`).
    threads: that decode and resize; they do not change the batches.
    read_ahead: batches made in advance.
    apart: pictures instead of patches, as in `pack.collate`.
    place: puts a batch on the devices; what it returns is what the stream gives.
  """
  pack.check_limits(tokens, patches)
  mine = _own_shards(source, rows, shards, host, hosts, "rows")
  each = rows // shards
  quarantine = Quarantine(workdir, host, max_bad_share)
  pool = concurrent.futures.ThreadPoolExecutor(threads) if threads > 1 else None

  def make(index: int, rng: np.random.Generator):
    def work():
      example = _example(source, codec, index, rng)
      _refuse(source.filter.refuses(tokens=len(example.tokens)))
      pack.check_fits(example, tokens, patches)
      return example

    return attempt(index, work)

  def produce(state):
    streams = [
      _rows(
        _ordered(source, s, shards, seed, make),
        state["shards"][str(s)],
        quarantine.of_shard(s, len(range(s, len(source), shards))),
        pool.map if pool else map,
        (pack_window, tokens, patches),
      )
      for s in mine
    ]
    while True:
      taken = [next(stream) for stream in streams for _ in range(each)]
      batch = pack.collate(
        [r for r, _ in taken], tokens, patches, len(taken), apart=apart
      )
      after = [taken[(i + 1) * each - 1][1] for i in range(len(mine))]
      batch["names"] = np.array([e.name for r, _ in taken for e in r])
      yield batch, {**state, "shards": {str(s): a for s, a in zip(mine, after)}}

  layout = {
    "seed": seed,
    "shards": shards,
    "records": len(source),
    "pack_window": pack_window,
    "tokens": tokens,
    "patches": patches,
  }
  start = {"window": 0, "row": 0, "aside": [0, 0], "counts": [0, 0, 0]}
  return Stream(
    produce,
    layout,
    {str(s): start for s in mine},
    read_ahead,
    place,
    changed == "accept",
  )


def tasks(
  source: Any,
  *,
  seed: Seed,
  shards: PositiveInt,
  batch: PositiveInt,
  max_bad_share: Share = 0.01,
  changed: Literal["refuse", "accept"] = "refuse",
  workdir: str | pathlib.Path | None = None,
  host: int = 0,
  hosts: int = 1,
  read_ahead: PositiveInt = 1,
  refuses: Refuses | None = None,
) -> Stream:
  """Endless `Questions`: this host's block of `batch` of them.

  A question whose answer is missing, whose media cannot be read or which the engine has
  no room for is set aside, so that no rollout meets it.

  Args:
    changed: as in `batches`.
    refuses: why the engine does not take a prompt (`rollout.engine.Engine.refuses`).
  """
  mine = _own_shards(source, batch, shards, host, hosts, "batch")
  each = batch // shards
  quarantine = Quarantine(workdir, host, max_bad_share)

  def produce(state):
    def make(index: int, shard: int):
      return attempt(
        index, lambda: usable_task(source, index, held.load, shard, refuses)
      )

    streams = [
      _tasks(
        _ordered(source, s, shards, seed, lambda i, rng, s=s: make(i, s)),
        state["shards"][str(s)],
        quarantine.of_shard(s, len(range(s, len(source), shards))),
      )
      for s in mine
    ]
    while True:
      held = Held(source.load_media)
      taken = [next(stream) for stream in streams for _ in range(each)]
      after = [taken[(i + 1) * each - 1][1] for i in range(len(mine))]
      shards_after = {str(s): a for s, a in zip(mine, after)}
      asked = Questions([task for task, _ in taken], held.load)
      yield asked, {**state, "shards": shards_after}

  layout = {"seed": seed, "shards": shards, "records": len(source)}
  start = {"next": 0, "aside": [0, 0], "counts": [0, 0, 0]}
  shards_before = {str(s): start for s in mine}
  return Stream(produce, layout, shards_before, read_ahead, accept=changed == "accept")


@dataclasses.dataclass(frozen=True)
class Questions:
  """Questions to be answered, whose pictures were decoded when they were looked at."""

  tasks: list[Task]
  load_media: encode.LoadMedia = dataclasses.field(compare=False)


def usable_task(
  source: Any,
  index: int,
  load_media: encode.LoadMedia,
  shard: int = 0,
  refuses: Refuses | None = None,
) -> Task:
  """A record as a question; raises when no rollout could be made of it."""
  record = source[index]
  task = record.task if isinstance(record, Trajectory) else record
  formats.check_task(task)
  load_media = _watched(source, load_media)
  if source.codec:
    tokens, patches = encode.measure(source.codec, task, load_media)
    _refuse(source.filter.refuses(tokens=tokens))
    if why := refuses(tokens, patches) if refuses else "":
      raise records.BadRecord(f"task {task.id}: {why}")
  else:
    for media in task.media:
      load_media(media)
  return dataclasses.replace(task, shard=shard)


def _watched(source: Any, load_media: encode.LoadMedia) -> encode.LoadMedia:
  """`load_media`, which raises LeftOut for pictures that the source's filter refuses."""

  def load(media):
    loaded = load_media(media)
    picture = loaded.frames[0] if media.kind == "video" else loaded
    _refuse(source.filter.refuses(pixels=picture.width * picture.height))
    return loaded

  return load


def _refuse(why: str) -> None:
  if why:
    raise LeftOut(why)


def fixed_tasks(
  source: Any,
  count: int,
  *,
  workdir: str | pathlib.Path | None = None,
  shards: int = 1,
  host: int = 0,
  hosts: int = 1,
  refuses: Refuses | None = None,
) -> list[Task]:
  """This host's part of the first `count` questions that can be used, shard by shard.

  The others are set aside.  Of each logical shard the first that can be used, as many
  as it would give of `count` good records: no host reads those of another.
  """
  each = shards // hosts
  aside, good, wanted = Quarantine(workdir, host, 1.0), [], 0
  for shard in range(host * each, (host + 1) * each):
    left = len(range(shard, count, shards))
    wanted += left
    for i in range(shard, len(source), shards):
      if not left:
        break
      made = attempt(
        i, functools.partial(usable_task, source, i, source.load_media, shard, refuses)
      )
      if not isinstance(made, Bad):
        good.append(made)
        left -= 1
      elif not made.left_out:
        aside.add(made, -1)
  if not good and (wanted or not count):
    raise DataError(
      f"none of {len(source)} records is a usable question for {count} tasks; see "
      f"{aside.path or 'a quarantine file: give a workdir'}, and data.filter"
    )
  return good


def _own_shards(source, size, shards, host, hosts, name) -> range:
  """The shards of a host; refuses what does not divide."""
  if shards < 1 or shards % hosts or not 0 <= host < hosts:
    raise DataError(
      f"data.shards={shards} for host {host} of {hosts}; it must be a multiple of the "
      "number of hosts. Choose a multiple of every host count you will use."
    )
  if size < 1 or size % shards:
    raise DataError(
      f"{name}={size} cannot be divided among data.shards={shards}, each of which fills "
      f"as many; make {name} a multiple of {shards}"
    )
  if len(source) < shards:
    raise DataError(
      f"data.shards={shards}, and the source has {len(source)} records; every shard needs "
      "one, so lower data.shards or give more records"
    )
  each = shards // hosts
  return range(host * each, (host + 1) * each)


# ---- One shard -----------------------------------------------------------------------


def _ordered(source, shard: int, shards: int, seed: int, make: Callable):
  """grain's endless, random-access order of a shard, each record through `make`."""
  indices = range(shard, len(source), shards)
  # grain's seed is 32 bits; neighbours in (seed, shard) must not be neighbours in it.
  (mixed,) = np.random.SeedSequence((seed, shard)).generate_state(1)
  order = grain.MapDataset.source(indices).seed(int(mixed)).shuffle().repeat()
  return order.random_map(make)


def _rows(ordered, state, set_aside, mapper, limits) -> Iterator[tuple[list, dict]]:
  """The packed rows of a shard, each with the state behind it."""
  window, skip, aside = state["window"], state["row"], state["aside"]
  size, T, P = limits
  while True:
    first = window * size
    good = [
      made
      for made in mapper(ordered.__getitem__, range(first, first + size))
      if not set_aside.takes(made)
    ]
    now = set_aside.add_to(aside)
    set_aside.check(first + size, *now)
    rows = pack.first_fit(good, T, P)
    for r in range(skip, len(rows)):
      after = {
        "window": window,
        "row": r + 1,
        "aside": aside,
        "counts": [first + size, *now],
      }
      yield [good[i] for i in rows[r]], after
    window, skip, aside = window + 1, 0, now


def _tasks(ordered, state, set_aside) -> Iterator[tuple[Task, dict]]:
  at, aside = state["next"], state["aside"]
  while True:
    made = ordered[at]
    at += 1
    if set_aside.takes(made):
      aside = set_aside.add_to(aside)
      set_aside.check(at, *aside)
    else:
      yield made, {"next": at, "aside": aside, "counts": [at, *aside]}


def _example(source, codec, index: int, rng: np.random.Generator) -> encode.Example:
  """The example of a record: a trace as it is, or one synthesized for a task."""
  record, load_media = source[index], _watched(source, source.load_media)
  if isinstance(record, Trajectory):
    t = record
    formats.check_task(t.task)
    if t.turns and not t.ids:
      return encode.example(*retell(t, codec, load_media))
    lengths = {len(x) for x in (t.ids, t.sampled, t.weight, t.logp, t.position)}
    if len(lengths) > 1:
      raise records.BadRecord(
        f"task {t.task.id}: ids, sampled, weight, logp and position differ in length "
        f"({sorted(lengths)})"
      )
    if t.profile != codec.profile:
      raise records.BadRecord(
        f"the trace has the prompt profile {t.profile!r}, the run {codec.profile!r}"
      )
    if t.ids and max(t.ids) >= codec.tokenizer.vocab_size:
      raise records.BadRecord(
        f"the trace has token {max(t.ids)}, the tokenizer {codec.tokenizer.vocab_size} "
        "tokens; it was made with another tokenizer"
      )
    return encode.example(t, encode.redraw(t, codec, load_media))
  if source.synthesis is None:
    raise records.BadRecord(
      f"task {record.id} is a question without a trace; give the config a synthesis "
      "section, or a file of trajectories"
    )
  formats.check_task(record)
  return encode.example(*source.synthesis(codec, record, rng, load_media))
