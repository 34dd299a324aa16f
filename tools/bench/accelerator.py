"""One accelerator measured in ten minutes: `pixel-jax bench accelerator`.

  pixel-jax bench accelerator --out=DIR [--budget=540] [--size=full|tiny] [--only=CASE,...]

Runs the cases of `device.py` in the order of what they are worth, each in a process of
its own: what runs out of memory ends that case, which is tried again at its next smaller
size.  After each the figures go to DIR/report.json and all that was printed to
DIR/log.txt; at the end DIR/table.md is the table.  Typed again it skips what has been
measured, so a run that was cut off goes on.  This process touches no device.

  exact          numbers of the device against torch on the CPU; kernels; zoom; sampler
  sft-7b-lora    train steps of packed rows: text alone, then 30 % pictures with the tower
  sft-3b         the same, all of the text trained
  decode-7b      a chunk of tokens in 64 and 128 slots after 1k, 4k and 8k tokens
  prefill-7b     prompts into the cache
  vision-7b      pictures through the tower
  rollout-3b     the script of forced calls by the engine
  rollout-3b-hf  a part of it by `generate` of transformers, which the rate is compared with
  rl-3b-lora     one step of RL, part by part
  compile        the programs of sft-7b-lora and decode-7b, without a cache and with one
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

CASES = {  # seconds that each may take, start of the process and compiling included
  "exact": 110,
  "sft-7b-lora": 110,
  "sft-3b": 110,
  "decode-7b": 90,
  "prefill-7b": 60,
  "vision-7b": 60,
  "rollout-3b": 90,
  "rollout-3b-hf": 120,
  "rl-3b-lora": 120,
  "compile": 150,
}
NO_MEMORY = 75  # the exit code of a case that found no room at its size
NO_SMALLER = 76  # of one that was asked for a size that it does not have
PROBE = """
import jax, torch, transformers
import pixel_jax.tools.bench.device
d = jax.devices()[0]
limit = (d.memory_stats() or {}).get("bytes_limit", 0)
print()
print(d.platform, jax.device_count(), limit, d.device_kind, sep="\\t")
"""


def main(argv: list[str] | None = None) -> int:
  args = parse(argv)
  begin = time.monotonic()
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  with open(out / "log.txt", "a") as log:
    machine = probe(log)
    size = args.size or ("tiny" if machine["platform"] == "cpu" else "full")
    if size == "full" and machine["platform"] == "cpu":
      sys.exit("error: --size=full wants a GPU or a TPU, and jax sees the CPU alone")
    report = read(out / "report.json", machine | {"size": size})
    print(
      f"{machine['kind']} x {machine['count']}, "
      + f"{machine['memory'] / 2**30:.1f} GiB for a process, " * bool(machine["memory"])
      + f"size {size}, {args.budget:.0f} s"
    )
    for name in args.only or CASES:
      before = report["cases"].get(name)
      if before and "failed" not in before:
        print(f"{name:14} measured before")
        continue
      left = args.budget - (time.monotonic() - begin)
      told = {"failed": "no time was left"}
      if left >= 20:
        told = run(name, size, min(CASES[name], left), log)
      if "failed" in told and before and "rows" in before:
        told = max(before, told, key=lambda case: len(case.get("rows", ())))
      report["cases"][name] = told
      print(f"{name:14} {told.get('failed') or describe(told)}", flush=True)
      write(out / "report.json", json.dumps(report, indent=1))
      write(out / "table.md", table(report))
  print((out / "table.md").read_text())
  print(f"in {out}: report.json, table.md, log.txt")
  return int(any("failed" in case for case in report["cases"].values()))


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="pixel-jax bench accelerator", description=__doc__.split("\n")[0]
  )
  parser.add_argument("--out", required=True, help="folder of the report; may exist")
  parser.add_argument("--budget", type=float, default=540, help="seconds (540)")
  parser.add_argument("--size", choices=("full", "tiny"), help="tiny on a CPU")
  parser.add_argument("--only", type=lambda text: text.split(","), help="of the cases")
  args = parser.parse_args(argv)
  if unknown := set(args.only or ()) - set(CASES):
    parser.error(f"--only: {sorted(unknown)} are unknown; cases: {', '.join(CASES)}")
  return args


def probe(log) -> dict:
  """What jax sees, asked by a process that imports all that the cases do; seconds."""
  done = subprocess.run(
    [sys.executable, "-c", PROBE], env=environment(), capture_output=True, text=True,
    timeout=120,
  )  # fmt: skip
  log.write(done.stdout + done.stderr)
  if done.returncode:
    said = (done.stderr.strip() or "nothing").splitlines()[-1]
    sys.exit(
      f"error: {sys.executable} cannot begin: {said}.  launch/accelerator.sh brings along "
      "what a machine without network lacks; torch is the other side of the benchmark: "
      "pip install 'pixel_jax[parity]'"
    )
  platform, count, limit, kind = done.stdout.splitlines()[-1].split("\t")
  return {
    "platform": platform, "count": int(count), "memory": int(limit), "kind": kind,
    "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d"),
    "python": sys.version.split()[0],
  }  # fmt: skip


def environment(name: str = "") -> dict[str, str]:
  # All but a twentieth of a GPU, as the presets of configs/pods.py expect; but where
  # torch computes, the memory is torch's.
  ours = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
  theirs = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  # What a case that was cut off has compiled is there when it is tried again.
  kept = {"JAX_COMPILATION_CACHE_DIR": f"{tempfile.gettempdir()}/pixel_jax-bench"}
  return (theirs if name.endswith("-hf") else ours) | kept | os.environ


def run(name: str, size: str, limit: float, log) -> dict:
  """One case, at smaller and smaller sizes while its memory is not enough."""
  until, tried = time.monotonic() + limit, 0
  while True:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
      file = pathlib.Path(folder) / "rows.json"
      print(f"==== {name}, try {tried}", file=log, flush=True)
      command = [
        sys.executable, "-m", "pixel_jax.tools.bench.device", name, f"--size={size}",
        f"--attempt={tried}", f"--json={file}",
      ]  # fmt: skip
      try:
        done = subprocess.run(
          command, env=environment(name), stdout=log, stderr=log, timeout=until - begin
        )
      except subprocess.TimeoutExpired:
        told = {"failed": f"took more than the {limit:.0f} s that were left for it"}
        if file.exists():  # what it had measured until then
          told |= {"rows": json.loads(file.read_text()), "wall_s": limit}
        return told
      if done.returncode == 0:
        rows = json.loads(file.read_text())
        bad = [row["what"] for row in rows if row.get("equal") is False]
        wall = round(time.monotonic() - begin, 1)
        told = {"rows": rows, "wall_s": wall, "smaller": tried}
        return told | ({"failed": f"not equal: {', '.join(bad)}"} if bad else {})
    if done.returncode == NO_SMALLER:
      return {"failed": f"{tried} sizes, none of which the memory holds"}
    # A process that the kernel ends for its memory dies of SIGKILL.
    if done.returncode not in (NO_MEMORY, -9):
      return {"failed": f"exit code {done.returncode}; log.txt says why"}
    if until - time.monotonic() < 15:
      return {"failed": "out of memory, and no time was left for a smaller size"}
    tried += 1


def read(file: pathlib.Path, machine: dict) -> dict:
  """What was measured before on this kind of machine."""
  if file.exists():
    old = json.loads(file.read_text())
    if all(old["machine"][k] == machine[k] for k in ("kind", "size")):
      return {"machine": machine, "cases": old["cases"]}
  return {"machine": machine, "cases": {}}


def write(file: pathlib.Path, text: str) -> None:
  """All or nothing: the machine may be taken away at any time."""
  new = file.with_suffix(".new")
  new.write_text(text + "\n")
  new.replace(file)


def describe(case: dict) -> str:
  key = "rate" if any("rate" in row for row in case["rows"]) else "seconds"
  parts = [cell(row, key) for row in case["rows"] if key in row]
  return f"{case['wall_s']:.0f} s: {'; '.join(parts)}"


# ---- Table ---------------------------------------------------------------------------

COLUMNS = {
  "what": "case", "seconds": "time", "rate": "rate", "share": "of the limit",
  "goal": "wanted", "peak_bytes": "peak", "forecast_bytes": "forecast",
  "compile_s": "compiled in",
}  # fmt: skip
EXACT = {"what": "numbers", "gap": "largest difference", "allowed": "allowed"}


def table(report: dict) -> str:
  """Markdown, ready for docs/performance.md."""
  m, found = report["machine"], report["cases"]
  rows = [row for name in CASES for row in found.get(name, {}).get("rows", ())]
  lines = [
    f"{m['kind']} x {m['count']}, {m['date']}, Python {m['python']}, size {m['size']}; "
    "`pixel-jax bench accelerator`.",
    "",
    *grid(EXACT, [row for row in rows if "gap" in row]),
    "",
    *grid(COLUMNS, [row for row in rows if "gap" not in row]),
    "",
  ]
  ours, theirs = (
    next((row["rate"] for row in found.get(name, {}).get("rows", ())), None)
    for name in ("rollout-3b", "rollout-3b-hf")
  )
  if ours and theirs:
    lines.append(f"Rollout: {ours / theirs:.2f} times `generate`; wanted 8.")
  lines += [f"{k}: {case['failed']}." for k, case in found.items() if "failed" in case]
  if rest := [name for name in CASES if name not in found]:
    lines.append(f"Not run: {', '.join(rest)}.")
  return "\n".join(lines)


def grid(columns: dict[str, str], rows: list[dict]) -> list[str]:
  lines = [list(columns.values()), ["---"] * len(columns)]
  lines += [[cell(row, key) for key in columns] for row in rows]
  return ["| " + " | ".join(line) + " |" for line in lines]


def cell(row: dict, key: str) -> str:
  value = row.get(key)
  if value is None:
    return ""
  match key:
    case "seconds":
      return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"
    case "rate":
      return f"{value:,.0f} {row['unit']}"
    case "share":
      return f"{value:.0%} {row['of']}"
    case "goal":
      return f"{value:.0%}"
    case "peak_bytes" | "forecast_bytes":
      small = value < 2**30
      return f"{value / 2**20:.1f} MiB" if small else f"{value / 2**30:.1f} GiB"
    case "compile_s":
      return f"{value:.0f} s"
    case "gap" | "allowed":
      return f"{value:.1g}"
  return str(value)


if __name__ == "__main__":
  sys.exit(main())
