"""Ours beside what a user would pick instead, timed in one process.

  pixel-jax bench preprocess|vision|prefill|decode|rollout|sft|rl
    [--json=FILE] [--size=30m|tiny|3b|7b] [--repeats=N] [--no-peer | --no-ours]
  pixel-jax bench accelerator --out=DIR       a GPU or TPU in ten minutes: accelerator.py

One process, one set of weights, as many threads on both sides; after a warm-up that
compiles, the sides take turns, each with an untimed call first: memory that a process
gives back goes to the host of a VM after two seconds, and to have 4 GiB of it again took
9 to 12 s here, where it takes 0.3 at once (free page reporting).  Steps of a run follow
one another; a side that waited for the other would pay for that alone.
`ratio` is the peer's median seconds over ours: higher is better.  Where the memory does
not hold both (--size=7b), measure one side at a time.  Before it is timed, what the two
return is compared; unequal work is an error.

The limit is max(FLOPs / ceiling, bytes / bandwidth): FLOPs by formula, without padding
and recomputation; the ceiling is the best square matmul of either side in this process;
the bandwidth is published for accelerators and measured on a CPU.  On some CPUs torch's
matmul is half as fast as XLA's (AMD); "equal matmul" is the ratio without that advantage,
for work that is all matmul.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from pixel_jax.model import qwen2_5_vl
from pixel_jax.run import metrics
from pixel_jax.tools.bench import cases, data

# Bytes/s of one jax device (limits.md 2.1; a v7x chip is two).
BANDWIDTH = {
  "TPU v5 lite": 0.819e12,
  "TPU v5e": 0.819e12,
  "TPU v5p": 2.765e12,
  "TPU v6 lite": 1.64e12,
  "TPU v6e": 1.64e12,
  "TPU7x": 3.69e12,
  "NVIDIA A100": 2.04e12,
  "NVIDIA H100": 3.35e12,
  "NVIDIA H200": 4.8e12,
}
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "numpy", "pillow")


def main(argv: list[str] | None = None) -> dict:
  args = parse(argv)
  # Half of a GPU's memory belongs to the other side.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  size = data.SIZES[args.size]
  with tempfile.TemporaryDirectory() as folder:
    b = open_bench(size, folder, with_ours=args.ours, with_peer=args.peer)
  limits = measure_limits(b.model is not None)
  rows = []
  for case in cases.CASES[args.name](b):
    rows += measure(case, args.repeats or case.repeats, limits)
  report = {
    "bench": args.name,
    "size": args.size,
    "dtype": b.config.dtype,
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": " ".join(["python", *sys.argv]) if argv is None else argv,
    "machine": machine(),
    "versions": {p: _version(p) for p in PACKAGES},
    "limits": limits,
    "rows": rows,
  }
  show(report)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
  return report


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("name", choices=list(cases.CASES))
  parser.add_argument("--size", choices=list(data.SIZES), default="30m")
  parser.add_argument("--json", help="file to write the figures to")
  parser.add_argument("--repeats", type=int, help="timed calls of each side")
  side = parser.add_mutually_exclusive_group()
  side.add_argument("--no-peer", dest="peer", action="store_false")
  side.add_argument("--no-ours", dest="ours", action="store_false")
  return parser.parse_args(argv)


def open_bench(size, folder, *, with_ours=True, with_peer=True) -> cases.Bench:
  """One set of random weights on both sides; bfloat16 where there is an accelerator."""
  cpu = jax.default_backend() == "cpu"
  codec = data.codec(size, folder)
  config = data.model(
    size, codec.tokenizer, dtype="float32" if cpu else "bfloat16",
    remat="none" if cpu else "full", logp_chunk=4096,
  )  # fmt: skip
  # Committed to its device, as in the trainer: else the second step compiles again.
  params = jax.device_put(qwen2_5_vl.init(config, jax.random.key(0)), jax.devices()[0])
  model = None
  if with_peer:
    from pixel_jax.tools.bench import peers

    model = peers.load(config, params)
  return cases.Bench(size, config, codec, params, model, with_ours)


# ---- Measuring -----------------------------------------------------------------------

_compiling = 0.0


def _on_duration(event: str, duration: float, **_) -> None:
  global _compiling
  if event == "/jax/core/compile/backend_compile_duration":
    _compiling += duration


jax.monitoring.register_event_duration_secs_listener(_on_duration)


def measure(case: cases.Case, repeats: int, limits: dict) -> list[dict]:
  """Warms up, compares, then times ours and every peer in turn; a row a peer."""
  sides = ({"ours": case.ours} if case.ours else {}) | dict(case.peers)
  seconds: dict[str, list[float]] = {name: [] for name in sides}
  before, first = _compiling, {}
  for name, run in sides.items():
    print(f"warm-up: {case.name}, {name}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    first[name] = run()
    took = time.perf_counter() - start
    if case.slow and name != "ours":
      seconds[name].append(took)
  compile_s = _compiling - before
  checks = {
    peer: case.check(first["ours"], first[peer])
    for peer in case.peers
    if case.ours and case.check
  }
  del first
  timed = [name for name in sides if not seconds[name]]
  for i in range(repeats):
    print(f"repeat {i + 1} of {repeats}: {case.name}", file=sys.stderr, flush=True)
    for name in timed[:: -1 if i % 2 else 1]:  # nobody is always first
      if i == 0 or not case.slow:
        sides[name]()
      start = time.perf_counter()
      sides[name]()
      seconds[name].append(time.perf_counter() - start)
  mine = spread(seconds["ours"], case.work) if case.ours else None
  floor = max(case.flops / limits["flops"], case.bytes / limits["bandwidth"])
  if mine:
    mine |= {"compile_s": compile_s, "share": floor / mine["median"]}
    mine["stats"] = dict(getattr(case.ours, "stats", {}))
  common = {
    "case": case.name, "unit": case.unit, "work": case.work, "flops": case.flops,
    "bytes": case.bytes, "note": case.note, "ours": mine,
  }  # fmt: skip
  equal = limits.get("matmul_torch", limits["flops"]) / limits["matmul_jax"]
  rows = []
  for name in case.peers or [None]:
    peer = spread(seconds[name], case.work) if name else None
    if peer:
      peer["share"] = floor / peer["median"]
    ratio = peer["median"] / mine["median"] if peer and mine else None
    rows.append(
      common
      | {
        "peer_name": name, "peer": peer, "check": checks.get(name, {}),
        "ratio": ratio,
        # What it would be if torch's matmuls were as fast as XLA's on this machine.
        "ratio_equal_matmul": ratio and ratio * equal,
        "target": case.target.get(name),
      }
    )  # fmt: skip
  return rows


def spread(seconds: list[float], work: float) -> dict:
  median = statistics.median(seconds)
  return {
    "seconds": seconds, "min": min(seconds), "median": median, "max": max(seconds),
    "per_s": work / median,
  }  # fmt: skip


def measure_limits(with_peer: bool) -> dict:
  """Matmul ceilings (FLOP/s) and bandwidth (bytes/s) of this machine."""
  cpu = jax.default_backend() == "cpu"
  n = 1024 if cpu else 8192
  x = jnp.ones((n, n), jnp.float32 if cpu else jnp.bfloat16)
  multiply = jax.jit(lambda a: a @ a)
  runs = {"jax": lambda: multiply(x).block_until_ready()}
  if with_peer:
    from pixel_jax.tools.bench import peers

    runs["torch"] = peers.ceiling(n)
  best = dict.fromkeys(runs, float("inf"))
  for _ in range(20):
    for name, run in runs.items():
      best[name] = min(best[name], _seconds(run))
  out = {f"matmul_{name}": 2 * n**3 / s for name, s in best.items()}
  kind = jax.devices()[0].device_kind
  known = [k for k in BANDWIDTH if kind.startswith(k)]
  if known:
    bandwidth = BANDWIDTH[max(known, key=len)]
  else:
    y = jnp.ones(64 << 20, jnp.float32)
    copy = jax.jit(lambda a: a + 1)
    bandwidth = (
      2
      * y.nbytes
      / min(_seconds(lambda: copy(y).block_until_ready()) for _ in range(6))
    )
  return out | {
    "flops": max(out.values()), "bandwidth": bandwidth, "peak_flops": metrics.peak_flops(),
  }  # fmt: skip


def _seconds(run) -> float:
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


# ---- Telling -------------------------------------------------------------------------


def machine() -> dict:
  model = platform.processor()
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  if cpuinfo.exists():
    names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
    model = names[0].split(":")[1].strip() if names else model
  return {
    "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
    "cpu": model,
    "cores": os.cpu_count(),
    "load": os.getloadavg()[0],
    "python": platform.python_version(),
  }


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def show(report: dict) -> None:
  """The table, for people."""
  limits, m = report["limits"], report["machine"]
  print(
    f"{report['bench']}, {report['size']}, {report['dtype']}: {m['cpu']}, {m['device']}"
  )
  ceilings = ", ".join(
    f"{k.removeprefix('matmul_')} {v / 1e9:.0f} GFLOP/s"
    for k, v in limits.items()
    if k.startswith("matmul_")
  )
  print(f"matmul {ceilings}; memory {limits['bandwidth'] / 1e9:.0f} GB/s")
  columns = [
    "case",
    "ours",
    "limit",
    "peer",
    "theirs",
    "limit",
    "ratio",
    "wanted",
    "equal matmul",
  ]
  table = [columns]
  for row in report["rows"]:
    table.append(
      [
        row["case"], *_side(row["ours"], row["unit"]), row["peer_name"] or "-",
        *_side(row["peer"], row["unit"]),
        "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        "-" if row["target"] is None else f">= {row['target']:g}",
        "-" if row["ratio"] is None else f"{row['ratio_equal_matmul']:.2f}",
      ]
    )  # fmt: skip
  widths = [max(len(r[i]) for r in table) for i in range(len(columns))]
  for row in table:
    print("  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip())
  for row in report["rows"]:
    facts = {k: f"{v:.2g}" for k, v in row["check"].items()}
    if row["ours"]:
      facts["compile_s"] = f"{row['ours']['compile_s']:.1f}"
    print(f"  {row['case']}, {row['peer_name'] or 'alone'}: {facts} {row['note']}")


def _side(side: dict | None, unit: str) -> list[str]:
  if side is None:
    return ["not measured", "-"]
  share = f"{side['share']:.0%}" if side["share"] else "-"
  return [f"{side['median']:.3f} s, {side['per_s']:.4g} {unit}/s", share]


if __name__ == "__main__":
  main()
