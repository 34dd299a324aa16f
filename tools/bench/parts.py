"""Where a program's time goes on a CPU: its parts beside the best matmul of the machine.

  python -m pixel_jax.tools.bench.parts sft|decode [--size=30m|tiny] [--json=FILE]

Runs our side of a benchmark under jax's profiler and adds up what each operation took, by
what it is: matmuls with weights, attention, the head, and what is no matmul at all (copies,
slices, elementwise).  Seconds are those of threads, so parts that run side by side add up
to more than the wall.  GFLOP/s of a part is to be held against the machine's best matmul.
"""

import argparse
import collections
import glob
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from pixel_jax.tools.compile import hlo

DOT = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
MODULES = {"sft": "jit_update", "decode": "jit_decode"}


def main(argv: Sequence[str] | None = None) -> dict:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("name", choices=list(MODULES))
  parser.add_argument("--size", choices=("30m", "tiny"), default="30m")
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    # Read when the backend starts: before anything asks for a device.
    os.environ["XLA_FLAGS"] = (
      os.environ.get("XLA_FLAGS", "") + f" --xla_dump_to={folder}/text "
      f"--xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*{MODULES[args.name]}.*"
    )
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # what it holds is not dumped
    report = measure(args.name, args.size, folder)
  show(report)
  if args.json:
    args.json.write_text(json.dumps(report, indent=1) + "\n")
  return report


def measure(name: str, size: str, folder: str) -> dict:
  import jax

  from pixel_jax.tools.bench import cases, compare, data

  shape = data.SIZES[size]
  b = compare.open_bench(shape, folder, with_peer=False)
  made = cases.CASES[name](b)
  case = made[1 if name == "sft" else 0]  # the pass over packed data, tower in the step
  for _ in range(2):  # compiles; then memory that was given back is there again
    case.ours()
  begin = time.perf_counter()
  case.ours()
  wall = time.perf_counter() - begin
  with jax.profiler.trace(f"{folder}/trace"):
    case.ours()
  (trace,) = glob.glob(f"{folder}/trace/**/*.xplane.pb", recursive=True)
  # The last one: where a state is given back in another place, a first compile is not used.
  text = max(glob.glob(f"{folder}/text/*{MODULES[name]}*cpu_after_optimizations.txt"))
  spent, count = read_trace(trace, MODULES[name])
  parts = add_up(pathlib.Path(text).read_text(), spent, count)
  limits = compare.measure_limits(False)
  return {
    "case": case.name, "wall_s": wall, "matmul": limits["matmul_jax"],
    "bandwidth": limits["bandwidth"], "machine": compare.machine(), "parts": parts,
  }  # fmt: skip


def read_trace(path: str, module: str) -> tuple[dict[str, float], dict[str, int]]:
  """Seconds of threads, and calls, of every operation of the module."""
  import jax

  spent: dict[str, float] = collections.Counter()
  count: dict[str, int] = collections.Counter()
  for plane in jax.profiler.ProfileData.from_file(path).planes:
    for line in plane.lines:
      for event in line.events:
        stats = dict(event.stats)
        if stats.get("hlo_module") == module and "hlo_op" in stats:
          spent[stats["hlo_op"]] += event.duration_ns / 1e9
          count[stats["hlo_op"]] += 1
  return spent, count


def flops(dot: hlo.Op, around: Sequence[hlo.Op]) -> float:
  """Of one matmul, an operation of the computation `around`."""
  left = re.search(r"%([\w.\-]+)", dot.rest)[1]
  ((_, lengths),) = next(op.arrays for op in around if op.name == left)
  contracted = [int(n) for n in DOT.search(dot.rest)[1].split(",") if n]
  ((_, shape),) = dot.arrays
  return 2.0 * math.prod(shape) * math.prod(lengths[i] for i in contracted)


def add_up(text: str, spent: dict, count: dict) -> list[dict]:
  """Parts by their time: seconds, calls and FLOPs.

  Args:
    text: of the compiled module.
  """
  found, _ = hlo.parse(text)
  parts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  for around in found.values():
    for op in around:
      if op.name not in spent or op.kind in ("while", "conditional", "call"):
        continue  # the time of a loop is that of what it holds
      held = dict(hlo.CALL.findall(op.rest)).get("calls")
      inner = found.get(held, [])
      work = sum(flops(dot, inner) for dot in inner if dot.kind == "dot")
      work += flops(op, around) if op.kind == "dot" else 0
      parts[part_of(op, work)].update(
        seconds=spent[op.name], calls=count[op.name],
        gflop=work * count[op.name] / 1e9,
      )  # fmt: skip
  ordered = sorted(parts.items(), key=lambda item: -item[1]["seconds"])
  return [{"part": name, **values} for name, values in ordered]


def part_of(op: hlo.Op, work: float) -> str:
  """What an operation is for: by its equation where it is a matmul, else by its kind."""
  scope = m[1] if (m := re.search(r'op_name="([^"]*)"', op.rest)) else ""
  if work:
    if re.search(r"window_attention|[BR]?K[A-Z]*S|BN[A-Z]*,BN", scope):
      return "matmuls of attention"
    if re.search(r"V,|V-|V/", scope):
      return "matmuls of the head"
    return "matmuls with weights"
  if re.match(r"slice|.*dynamic-(update-)?slice", op.name):
    return "slices of stacked layers and of the cache"
  if "copy" in op.name or "transpose" in op.name:
    return "copies and transposes"
  return "elementwise and sums"


def show(report: dict) -> None:
  best = report["matmul"] / 1e9
  total = sum(part["seconds"] for part in report["parts"])
  print(
    f"{report['case']}: {report['wall_s']:.2f} s; best matmul {best:.0f} GFLOP/s, memory "
    f"{report['bandwidth'] / 1e9:.0f} GB/s, {report['machine']['cpu']}"
  )
  print("| part | seconds of threads | share | GFLOP | GFLOP/s | of the best matmul |")
  print("|---|---|---|---|---|---|")
  for part in report["parts"]:
    print("| " + " | ".join(cells(part, total, best)) + " |")


def cells(part: dict, total: float, best: float) -> Iterator[str]:
  yield part["part"]
  yield f"{part['seconds']:.2f}"
  yield f"{part['seconds'] / total:.0%}"
  if part["gflop"]:
    rate = part["gflop"] / part["seconds"]
    yield from (f"{part['gflop']:.0f}", f"{rate:.0f}", f"{rate / best:.0%}")
  else:
    yield from ("", "", "")


if __name__ == "__main__":
  sys.exit(main() is None)
