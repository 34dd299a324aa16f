"""The chaos campaign: runs that are killed, interrupted, starved of disk and damaged.

  python tests/chaos.py                            all of it, about half an hour
  python tests/chaos.py --only=kill --times=5      one part: kill, signal, disk, damage

Every run is SFT or RL (with replay and two minibatches) of the tiny world, and must end as
one that nobody disturbed: the same metrics and the same weights, bit for bit.
  kill     SIGKILL at so many random moments of a run
  signal   SIGINT and SIGTERM at random moments, also while programs are compiled
  disk     a file system that fills while checkpoints and trajectories are written
  damage   every file of the newest checkpoint cut in half, one at a time
Exit code 1 says that a run was lost or came out otherwise.
"""

import argparse
import contextlib
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from test_train import assert_same_run, read_metrics, start

from pixel_jax.run import checkpoint

SFT = ("train_sft", "configs/sft.py:tiny")
RL = ("train_rl", "configs/rl.py:tiny")
COMMON = {"init": "tiny_base", "optim.warmup_steps": 1, "save_every": 2}
RUNS = {
  "sft": (SFT, {**COMMON, "total_steps": 24, "eval_every": 8}),
  "rl": (
    RL,
    {
      **COMMON, "total_steps": 10, "eval_every": 5, "keep_trajectories_every": 1,
      "rl.prompts_per_step": 8, "rl.rows": 8, "rl.minibatches": 2, "replay.refill": True,
      "eval.tasks": 16, "engine.slots": 64,
    },
  ),
}  # fmt: skip
# Exit codes that a signal may have: saved, or before the program could listen.
FINE = {0, -signal.SIGINT, -signal.SIGTERM, 130, 1}


class Lost(Exception):
  """A run that ended otherwise than it should."""


def play(name, workdir, after=None, number=None):
  """Starts a run, and sends it a signal `after` so many seconds -> exit code, output."""
  entry, settings = RUNS[name]
  process = start(entry, workdir, **settings)
  if after is not None:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(timeout=after)
    process.send_signal(number)
  out, _ = process.communicate(timeout=600)
  return process.returncode, out


def finish(name, workdir, straight):
  code, out = play(name, workdir)
  if code:
    raise Lost(f"{name} does not go on: {out[-600:]}")
  assert_same_run(workdir, straight)


def kill(name, straight, seconds, root, times, rng):
  """SIGKILL, again and again on one run; a run that got through is begun anew."""
  workdir, done, runs = root / f"kill_{name}", 0, 0
  reached = []
  while done < times:
    code, out = play(name, workdir, rng.uniform(0, seconds), signal.SIGKILL)
    if code == -signal.SIGKILL:
      done += 1
      steps = checkpoint.complete_steps(workdir / "checkpoints")
      reached.append(max(steps, default=0))
    elif code:
      raise Lost(f"{name} ended with {code}: {out[-600:]}")
    else:
      assert_same_run(workdir, straight)
      shutil.rmtree(workdir)
      runs += 1
  finish(name, workdir, straight)
  print(
    f"kill    {name}: {times} x SIGKILL, with step {reached} saved; {runs + 1} runs equal"
  )


def interrupt(name, straight, seconds, root, times, rng):
  """SIGINT and SIGTERM, each on a run with an empty cache of programs or a full one."""
  codes = {}
  for number in (signal.SIGINT, signal.SIGTERM):
    for i in range(times):
      workdir = root / f"signal_{name}" / f"run_{i}"
      code, out = play(name, workdir, rng.uniform(0, seconds), number)
      if code not in FINE or "Segmentation" in out:
        raise Lost(f"{name}, {number.name} at {i}: exit code {code}: {out[-600:]}")
      if code == 0 and "stopped by a signal" not in out and "done:" not in out:
        raise Lost(f"{name}, {number.name}: left without a word: {out[-600:]}")
      codes[number.name, code] = codes.get((number.name, code), 0) + 1
      finish(name, workdir, straight)
      shutil.rmtree(
        workdir if i % 2 else workdir.parent
      )  # every other time the cache, too
  told = ", ".join(f"{n} -> {c}: {k}" for (n, c), k in sorted(codes.items()))
  print(f"signal  {name}: {told}; all runs equal")


def disk(name, straight, seconds, root, times, rng):
  """A disk that is too small; the run ends in one line, and goes on when there is room."""
  place = root / f"disk_{name}"
  place.mkdir()
  told = []
  for size in ("2m", "80m", "95m"):
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
      print("disk    skipped: this user may not mount a tmpfs")
      return
    try:
      code, out = play(name, place / "run")
      last = out.strip().splitlines()[-1]
      if code == 0 or "Traceback" in out or not last.startswith("error: "):
        raise Lost(f"{name} on a disk of {size}: exit code {code}: {out[-900:]}")
      told.append(f"{size}: {last[:100]}")
      subprocess.run(["mount", "-o", "remount,size=2g", str(place)], check=True)
      finish(name, place / "run", straight)
    finally:
      subprocess.run(["umount", "-l", str(place)], check=True)
  print(f"disk    {name}: " + "; ".join(told) + "; all runs equal once there was room")


def damage(name, straight, seconds, root, times, rng):
  """Each file of the newest checkpoint, cut in half."""
  whole = root / f"damage_{name}"
  while not checkpoint.complete_steps(whole / "checkpoints")[1:]:
    play(name, whole, seconds * 0.8, signal.SIGTERM)
  newest = str(checkpoint.complete_steps(whole / "checkpoints")[-1])
  folder = whole / "checkpoints" / newest
  files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
  back = 0
  for file in files:
    workdir = root / "damaged"
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(whole, workdir)
    at = workdir / "checkpoints" / newest / file
    at.write_bytes(at.read_bytes()[: at.stat().st_size // 2])
    finish(name, workdir, straight)
    back += (workdir / "damaged").is_dir()
  print(
    f"damage  {name}: {len(files)} files of step {newest}, one at a time; {back} times the "
    "step before it was taken, all runs equal"
  )


PARTS = {"kill": kill, "signal": interrupt, "disk": disk, "damage": damage}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--only", choices=PARTS, action="append")
  parser.add_argument("--run", choices=RUNS, action="append")
  parser.add_argument("--times", type=int, help="20 kills, 10 of each signal")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args(argv)
  rng, lost = random.Random(args.seed), 0
  with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
    for name in args.run or RUNS:
      root = pathlib.Path(folder)
      straight = root / f"straight_{name}"
      play(name, straight)  # compiles
      shutil.rmtree(straight)
      begun = time.monotonic()
      code, out = play(name, straight)
      seconds = time.monotonic() - begun
      if code:
        print(out)
        return 1
      print(
        f"        {name}: {len(read_metrics(straight))} steps in {seconds:.1f} s",
        flush=True,
      )
      for part in args.only or PARTS:
        times = args.times or (20 if part == "kill" else 10)
        try:
          PARTS[part](name, straight, seconds, root, times, rng)
        except (Lost, AssertionError) as error:
          lost += 1
          print(f"{part:7} {name}: LOST: {error}")
        sys.stdout.flush()
  return int(bool(lost))


if __name__ == "__main__":
  sys.exit(main())
