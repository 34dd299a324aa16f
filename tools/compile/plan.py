"""How long is a step of RL on machines that are not at hand?  An estimate, by rooflines.

  pixel-jax compile-check --config=configs/rl.py:7b --plan --topology=v5p:4x4x4
    [--trajectories=WORKDIR/trajectories | --rollouts=60:1400.1200/350,40:...]
    [--compiled=FILE] [--json=FILE]

Adds up what each phase of a step needs at least, for the lengths of a histogram of
rollouts, on 16 to 4,096 chips of the topology's kind, in one slice and in several.  Every
figure is labelled: *formula* (cost.py, and the bytes below), *compiled* (out of
the JSON of check.py), *read* or *given* (the histogram) or *assumption* (the
table ASSUMED).  What it leaves out makes real steps longer: operations and pictures on
the host, compiling, saving, evaluation, and what does not overlap.

How a step is laid out is train_rl's: engines of `config.fleet.tensor` devices, whole
groups on an engine, prompts computed once a group; then log-probs (unless every rollout is
used once), `minibatches` updates of micro-batches, weights sharded within a slice, copies
of them on every slice.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from absl import flags

from pixel_jax import trajectory
from pixel_jax.model import config as model_config
from pixel_jax.model import lora, qwen2_5_vl
from pixel_jax.rollout import engine
from pixel_jax.run import optim, settings
from pixel_jax.tools.compile import cost as compile_cost
from pixel_jax.tools.compile import programs as compile_programs

TRAJECTORIES = flags.DEFINE_string(
  "trajectories", None, "A folder of JSONL, or a file."
)
ROLLOUTS = flags.DEFINE_string(
  "rollouts",
  "50:1400.1200/300,30:1400.1200/250+600.550/300,20:4300.4096/250+600.550/250+600.550/300",
  "PARTS:FED.PICTURED/SAMPLED+...: tokens that a turn is fed, those of them that show a "
  "picture, and tokens it says.",
)
COMPILED = flags.DEFINE_string("compiled", None, "JSON of check.py.")

# What neither a formula nor a compiler knows.  dcn: bytes/s of one jax device to other
# slices, from the pages of the clouds (25, 50, 100, 100 and 400 Gbit/s a chip).
DCN = {"v5e": 3.1e9, "v5p": 6.2e9, "v6e": 12.5e9, "tpu7x": 6.2e9, "h200": 50e9}
LARGEST_SLICE = {"v5e": 256, "v5p": 4096, "v6e": 256, "tpu7x": 4096, "h200": 8}  # chips
ASSUMED = {
  "occupancy": 0.8,  # of the lanes that decode (docs/performance.md: .75 to .9)
  "fill": 0.9,  # of packed rows
  "calls": 0.7,  # of the rows of a prefill, later turns
}
CHIPS = (16, 64, 256, 1024, 4096)


class PlanError(ValueError):
  """A histogram that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Turn:
  """What a rollout is fed, and says then.  patches: of the pictures among it."""

  fed: int
  patches: int
  sampled: int


@dataclasses.dataclass(frozen=True)
class Rollouts:
  """A histogram: (share, turns) of each kind; shares add up to 1."""

  kinds: tuple[tuple[float, tuple[Turn, ...]], ...]
  largest: int  # patches of the largest picture
  label: str  # "given" or "read"

  def mean(self, f) -> float:
    return sum(share * f(turns) for share, turns in self.kinds)


def length(turns: Sequence[Turn]) -> int:
  return sum(t.fed + t.sampled for t in turns)


def parse(text: str) -> Rollouts:
  """--rollouts: "60:1400.1200/350,40:1400.1200/200+520.500/250"."""
  kinds = []
  for kind in text.split(","):
    m = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+\.\d+/\d+(?:\+\d+\.\d+/\d+)*)", kind.strip())
    if not m:
      raise PlanError(
        f"--rollouts: {kind!r} is not PARTS:FED.PICTURED/SAMPLED+..., such as "
        "60:1400.1200/350+520.500/250"
      )
    turns = []
    for turn in m[2].split("+"):
      fed, pictured, sampled = map(int, re.split(r"[./]", turn))
      if pictured > fed:
        raise PlanError(f"--rollouts: {turn!r} shows {pictured} tokens of {fed}")
      turns.append(Turn(fed, 4 * pictured, sampled))  # 2 x 2 patches a token
    kinds.append((float(m[1]), tuple(turns)))
  return _histogram(kinds, "given")


def read(path: str) -> Rollouts:
  """--trajectories: the rollouts of the newest step of a folder, or of a file."""
  root = pathlib.Path(path)
  files = sorted(root.glob("*.jsonl")) if root.is_dir() else [root]
  newest = files[-1].name.partition(".")[0] if files else ""
  files = [f for f in files if f.name.partition(".")[0] == newest]  # of every host
  kinds: dict[tuple[Turn, ...], int] = {}
  for file in files:
    if not file.is_file():
      raise PlanError(f"--trajectories: {file} does not exist")
    for t in trajectory.read_jsonl(file):
      turns = split(t)
      kinds[turns] = kinds.get(turns, 0) + 1
  if not kinds:
    raise PlanError(f"--trajectories: no rollout in {root}")
  return _histogram([(n, turns) for turns, n in kinds.items()], "read")


def split(t: trajectory.Trajectory) -> tuple[Turn, ...]:
  """The turns of a trajectory: runs of ids that were fed, then sampled."""
  turns, at = [], 0
  while at < len(t.ids):
    begin = at
    while at < len(t.ids) and not t.sampled[at]:
      at += 1
    said = at
    while at < len(t.ids) and t.sampled[at]:
      at += 1
    shown = sum(math.prod(s.grid) for s in t.slots if begin <= s.start < said)
    turns.append(Turn(said - begin, shown, at - said))
  return tuple(turns)


def _histogram(kinds, label) -> Rollouts:
  whole = sum(share for share, _ in kinds)
  if not whole:
    raise PlanError("--rollouts: the parts add up to nothing")
  largest = max(t.patches for _, turns in kinds for t in turns)
  return Rollouts(tuple((s / whole, turns) for s, turns in kinds), largest, label)


# ---- A step --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
  """What is planned: the model and how many numbers it has where."""

  config: model_config.ModelConfig
  numbers: int
  trained: dict[str, int]
  sizes: dict[str, int]

  @classmethod
  def of(cls, config: Any) -> "Model":
    fields = dict(config.model)
    preset = model_config.PRESETS[fields.pop("name")]
    asked = lora.Config(**config.lora) if config.lora.rank else None
    model = settings.call("model", dataclasses.replace, preset, **fields, lora=asked)
    abstract = qwen2_5_vl.abstract(model)
    trained = optim.split(abstract, settings.frozen(config))[0]
    sizes = compile_programs.sizes(abstract)
    return cls(model, sum(sizes.values()), compile_programs.sizes(trained), sizes)

  def below(self, prefix: str) -> int:
    return sum(n for path, n in self.sizes.items() if path.startswith(prefix))


@dataclasses.dataclass(frozen=True)
class Machine:
  """chips of all `slices`; `devices` of jax, two of which make a tpu7x chip."""

  kind: str
  chips: int
  slices: int

  @property
  def devices(self) -> int:
    return self.chips * (2 if self.kind == "tpu7x" else 1)

  @property
  def chip(self) -> compile_cost.Chip:
    return compile_cost.CHIPS[self.kind]


@dataclasses.dataclass
class Phase:
  """Seconds that the matmuls or HBM need, and the links within and between slices."""

  compute: float = 0.0
  ici: float = 0.0
  dcn: float = 0.0
  label: str = "formula"  # of what the links carry

  @property
  def seconds(self) -> float:
    return max(self.compute, self.ici, self.dcn)  # all of it overlaps, at best


def plan(
  config: Any, model: Model, machine: Machine, rollouts: Rollouts, compiled: dict
) -> dict[str, Phase]:
  """The phases of one step.

  Args:
    compiled: bytes over the links by program ("reshard", "logp", "gradient"), of a
      micro-batch of one device; what it lacks is a formula.
  """
  return _rollout(config, model, machine, rollouts, compiled) | _train(
    config, model, machine, rollouts, compiled
  )


def busy(config: Any, machine: Machine) -> tuple[int, int]:
  """(engines that have a group, groups of the fullest); groups are not divided."""
  engines = machine.devices // _tensor(config)
  groups = config.rl.prompts_per_step
  return min(engines, groups), -(-groups // engines)


def _rollout(config, model, machine, rollouts, compiled) -> dict[str, Phase]:
  chip, e, c = machine.chip, config.engine, model.config
  tensor, G = _tensor(config), config.rl.group_size
  _, groups = busy(config, machine)
  played = groups * G
  text, tower = model.below("text/blocks/"), model.below("vision/")

  def seconds(cost: compile_cost.Cost) -> float:
    return max(cost.seconds(chip, 0).values())

  # ---- Weights: narrowed, then gathered for each engine from the shards of its slice ----
  shards = machine.devices // machine.slices
  narrow = (4 if c.dtype == "float32" else 2) * model.numbers
  moved = compiled.get("reshard", narrow / tensor * (1 - tensor / shards))
  reshard = Phase(ici=moved / chip.ici, label=_label(compiled, "reshard"))

  # ---- Pictures: those of a prompt once a group, those of calls once each ----
  largest = max(rollouts.largest, 4)
  prompt = rollouts.mean(lambda turns: turns[0].patches)
  later = rollouts.mean(lambda turns: sum(t.patches for t in turns[1:]))
  patches = groups * prompt + played * later
  one = compile_cost.encode(
    c, tensor=tensor, weights=tower, patches=e.patches, largest=largest
  )
  vision = Phase(patches / e.patches * seconds(one))

  # ---- Prefill: padded to rows x length; the view is the smallest that holds it ----
  most = max(e.max_prompt, e.max_len - e.max_prompt)

  def prefill(kind: str, fed: list, used: float, before: int, most: int) -> float:
    """fed: (how often, tokens, reach into the longer segment of the cache)."""
    limit = e[f"{kind}_len"]
    rows = e.get(f"{kind}_rows") or engine.call_rows_of(e.slots, limit)
    total = 0.0
    for often, tokens, context in fed:
      view = min((v for v in (*e.views, most) if most >= v >= context), default=most)
      cost = compile_cost.extend(
        c, tensor=tensor, weights=text, rows=rows, tokens=min(limit, view),
        view=min(view, before) + view,
      )  # fmt: skip
      total += often * -(-tokens // limit) / (rows * used) * seconds(cost)
    return total

  first = [(share * groups, t[0].fed, t[0].fed) for share, t in rollouts.kinds]
  more = [
    (share * played, x.fed, max(turns[0].fed, length(turns[:i]) + x.fed - turns[0].fed))
    for share, turns in rollouts.kinds
    for i, x in enumerate(turns)
    if i and x.fed
  ]
  prompts = Phase(prefill("prompt", first, 1.0, 0, e.max_prompt))
  extend = Phase(prefill("extend", more, ASSUMED["calls"], e.max_prompt, most))

  # ---- Decode: a step gives every live lane a token; the longest rollout is a floor ----
  sampled = rollouts.mean(lambda turns: sum(t.sampled for t in turns))
  contexts = rollouts.mean(_contexts)
  lanes = min(e.slots, played)
  steps = max(
    played * sampled / (lanes * ASSUMED["occupancy"]),
    max(sum(t.sampled for t in turns) for _, turns in rollouts.kinds),
  )
  live = played * sampled / steps  # lanes that say something, on average
  view = contexts / max(sampled, 1) * live / lanes
  shared = rollouts.mean(lambda turns: turns[0].fed)  # read once a row of prompts
  rows = min(engine.prompt_rows_of(e.slots, G), groups)
  read = lanes * view - live * shared + rows * shared
  cost = compile_cost.decode(
    c, tensor=tensor, weights=text, lanes=lanes, view=view, read=read, steps=1
  )
  decode = Phase(steps * seconds(cost))
  names = ("reshard", "vision", "prefill", "extend", "decode")
  return dict(zip(names, (reshard, vision, prompts, extend, decode)))


def _contexts(turns: Sequence[Turn]) -> float:
  """Keys that all sampled tokens of a rollout read together."""
  return sum(
    t.sampled * (length(turns[:i]) + t.fed + t.sampled / 2) for i, t in enumerate(turns)
  )


def micro(config: Any, machine: Machine, rollouts: Rollouts) -> tuple[int, int]:
  """(micro-batches of a minibatch, rows of one): no more rows than there are to fill.

  config.rl.rows are those of a host; a device takes at least one at a time.
  """
  limit = config.rl.tokens * ASSUMED["fill"]
  played = config.rl.prompts_per_step * config.rl.group_size
  need = math.ceil(played / config.rl.minibatches * rollouts.mean(length) / limit)
  groups = machine.devices // config.mesh.tensor
  hosts = max(1, machine.devices // {"v5e": 4, "v5p": 4, "v6e": 4}.get(machine.kind, 8))
  most = max(config.rl.rows * hosts // groups, 1) * groups
  rows = min(most, -(-need // groups) * groups)
  return -(-need // rows), rows


def _train(config, model, machine, rollouts, compiled) -> dict[str, Phase]:
  chip, rl = machine.chip, config.rl
  shards = machine.devices // machine.slices // config.mesh.tensor  # of the weights
  batches, rows = micro(config, machine, rollouts)
  batches *= rl.minibatches
  pictured = rollouts.mean(lambda turns: sum(t.patches for t in turns))
  # A row holds a picture of a group once; groups lie together (design.md).
  once = pictured - rollouts.mean(lambda t: t[0].patches) * (1 - 1 / rl.group_size)
  patches = once / rollouts.mean(length) * rl.tokens * ASSUMED["fill"]
  weights = 2 * model.numbers / config.mesh.tensor * (1 - 1 / shards)  # bf16, gathered
  grads = 4 * sum(model.trained.values()) / (shards * config.mesh.tensor)

  def run(name: str, gathers: int, backward: bool) -> Phase:
    cost = compile_cost.train(
      model.config, devices=machine.devices, tensor=config.mesh.tensor,
      sizes=model.sizes, trained=model.trained, rows=rows, tokens=rl.tokens,
      patches=int(patches), largest=max(rollouts.largest, 4), backward=backward,
    )  # fmt: skip
    parts = cost.seconds(chip, compiled.get(name, gathers * weights))
    # Every micro-batch adds its gradient up over the slices: out and in again.
    between = 2 * (1 - 1 / machine.slices) * grads / DCN[machine.kind] * backward
    return Phase(
      batches * max(parts["matmul"], parts["hbm"]),
      batches * parts["links"],
      batches * between,
      _label(compiled, name),
    )

  # Gathered forward and backward; the gradient is scattered once.
  update = run("gradient", 3, True)
  apply = compile_cost.apply(machine.devices // machine.slices, model.trained)
  update.compute += rl.minibatches * max(apply.seconds(chip, 0).values())
  if rl.minibatches == 1:
    return {"logp": Phase(), "update": update}
  return {"logp": run("logp", 1, False), "update": update}


def _tensor(config: Any) -> int:
  return config.fleet.tensor if "fleet" in config else 1


def _label(compiled: dict, name: str) -> str:
  return "compiled" if name in compiled else "formula"


# ---- The report ----------------------------------------------------------------------


def machines(kind: str) -> list[Machine]:
  """16 to 4,096 chips: in as few slices as there can be, and in four.

  A slice of H200s is a node of eight.
  """
  found = []
  for chips in CHIPS:
    fewest = max(1, chips // LARGEST_SLICE[kind])
    several = fewest if kind == "h200" else max(4, fewest)  # nodes are never smaller
    found += [Machine(kind, chips, n) for n in sorted({fewest, several})]
  return found


def read_compiled(path: str | None, kind: str) -> dict[str, float]:
  """Bytes over the links by program, of a report of the same kind of chip."""
  if not path:
    return {}
  report = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  if report["topology"].partition(":")[0] != kind:
    raise PlanError(f"--compiled: {path} is of {report['topology']}, not of {kind}")
  links = {p["name"]: float(p["links_bytes"]) for p in report["programs"]}
  return {
    name: links[name] for name in ("reshard", "logp", "gradient") if name in links
  }


def row(
  config: Any, model: Model, machine: Machine, rollouts: Rollouts, compiled: dict
) -> dict:
  """A line of the table, as JSON; every figure says where it comes from."""
  phases = plan(config, model, machine, rollouts, compiled)
  step = sum(p.seconds for p in phases.values())
  played = config.rl.prompts_per_step * config.rl.group_size
  batches, rows = micro(config, machine, rollouts)
  used, groups = busy(config, machine)
  links = sum(p.ici + p.dcn for p in phases.values())

  def figure(value: float, label: str) -> dict:
    return {"value": value, "from": label}

  return {
    "chips": machine.chips,
    "slices": machine.slices,
    "phases": {
      name: {
        "seconds": figure(p.seconds, "estimate"),
        "compute_s": figure(p.compute, "formula"),
        "ici_s": figure(p.ici, p.label),
        "dcn_s": figure(p.dcn, "assumption"),
      }
      for name, p in phases.items()
    },
    "step_s": figure(step, "estimate"),
    "tokens_per_s_chip": figure(
      played * rollouts.mean(length) / step / machine.chips, "estimate"
    ),
    "communication_share": figure(
      links / sum(p.compute for p in phases.values()), "estimate"
    ),
    "engines": {"busy": used, "all": machine.devices // _tensor(config)},
    "groups_per_engine": groups,
    "micro_batches": {"count": batches, "rows": rows},
  }


def main(config: Any, topology: str, file: str | None) -> None:
  kind = topology.partition(":")[0]
  if "rl" not in config:
    raise settings.ConfigError(
      "--plan: a step of RL is planned; give configs/rl.py:SIZE"
    )
  try:
    if TRAJECTORIES.value:
      rollouts = read(TRAJECTORIES.value)
    else:
      rollouts = parse(ROLLOUTS.value)
    compiled = read_compiled(COMPILED.value, kind)
  except (PlanError, OSError, KeyError, TypeError, ValueError) as error:
    raise settings.ConfigError(str(error)) from error
  model = Model.of(config)
  rows = [row(config, model, m, rollouts, compiled) for m in machines(kind)]
  head = describe(config, model, kind, rollouts, compiled)
  print("\n".join(head))
  print(table(rows))
  if file:
    report = {
      "estimate": True,
      "head": head,
      "assumptions": ASSUMED | {"dcn_bytes_per_s": DCN[kind]},
      "rows": rows,
    }
    pathlib.Path(file).write_text(json.dumps(report, indent=1) + "\n")
    print(f"in {file}: all figures")


def describe(config, model, kind, rollouts, compiled) -> list[str]:
  mean = rollouts.mean
  assumed = ", ".join(f"{k} {v}" for k, v in ASSUMED.items())
  return [
    "An ESTIMATE by rooflines: no run is faster, and none was measured.",
    f"step        {config.rl.prompts_per_step} questions x {config.rl.group_size} "
    f"rollouts, {config.rl.minibatches} updates; {model.numbers:,} numbers on {kind}",
    f"rollouts    {rollouts.label}: {mean(len):.2f} turns, {mean(length):,.0f} tokens, "
    f"{mean(lambda t: sum(x.sampled for x in t)):,.0f} of them sampled, "
    f"{mean(lambda t: sum(x.patches for x in t)):,.0f} patches",
    "formula     matmuls, HBM, and what the links carry"
    + f"; compiled: links of {', '.join(sorted(compiled))}" * bool(compiled),
    f"assumption  {assumed}, {DCN[kind] / 1e9:.1f} GB/s a device between slices",
  ]


def table(rows: list[dict]) -> str:
  """Aligned text; seconds."""
  names = list(rows[0]["phases"])
  lines = [
    "{:>5} {:>6} ".format("chips", "slices")
    + "".join(f"{n:>9}" for n in names)
    + f"{'step s':>9}{'tok/s/chip':>12}{'links':>7}{'engines':>12}"
  ]
  for r in rows:
    lines.append(
      f"{r['chips']:5} {r['slices']:6} "
      + "".join(f"{p['seconds']['value']:9.2f}" for p in r["phases"].values())
      + f"{r['step_s']['value']:9.1f}{r['tokens_per_s_chip']['value']:12,.0f}"
      + f"{r['communication_share']['value']:7.0%}"
      + f"{r['engines']['busy']:6}/{r['engines']['all']}"
    )
  lines.append("links: seconds of communication against those of compute")
  return "\n".join(lines)
