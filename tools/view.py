"""Runs as a page of curves and trajectories: a file, or live as they go on.

  pixel-jax view DIR [DIR2 ...] --out=report.html
  pixel-jax view DIR [DIR2 ...] --serve [--port=7870]

A DIR is the workdir of one run, or the folder that launch/local.sh fills (base, sft,
rl, rl_alpha0, eval): every folder directly below it that holds a run is read too.  What
is not there is left out.  Runs with the same config but for the seed are drawn as a mean
and a band.  The file needs no server and no network; it holds --trajectories=400 of them,
and has --megabytes=5 at most.

With --serve the page grows while the runs go on, and all their trajectories can be looked
through: by verdict, step, data, advantage or word, each beside others of its question, and
token by token as the nearest checkpoint sees it (on the CPU).
--root=DIR: where the media lie, if not where the config says.  --index=FILE: what was read
of the trajectories, kept for the next start (else in ~/.cache/pixel_jax/view).
"""

import argparse
import hashlib
import os
import pathlib

import jax
import tqdm

from pixel_jax import api
from pixel_jax.chat import encode
from pixel_jax.data import media
from pixel_jax.evals import protocol
from pixel_jax.run import policies
from pixel_jax.trajectory import Trajectory
from pixel_jax.view import charts, report, runs
from pixel_jax.view.index import Index, Stored
from pixel_jax.view.trajectory import Scored


def open_trajectories(found: list[runs.Run], index: Index) -> list[runs.Run]:
  """The runs with what they played; of an evaluation, a run for each policy and mode."""
  files = runs.files(found)
  index.update(files, warn=runs.warn)
  names = dict.fromkeys(file.run for file in files)
  out = [run for run in found if run.metrics or run.config]
  for name in names:
    alone = next((run for run in out if run.name == name), None)
    if alone is None:
      out.append(runs.Run(name, trajectories=Stored(index, name)))
    else:
      alone.trajectories = Stored(index, name)
  return out


def open_codec(found: list[runs.Run]) -> encode.Codec | None:
  """The codec of the first run that kept its config and tokenizer."""
  for run in found:
    if "codec" in run.config and (run.folder / "tokenizer").exists():
      return policies.open_codec(run.folder)
  return None


def write_report(found: list[runs.Run], look, args: argparse.Namespace) -> None:
  shown = open_trajectories(found, Index(judge=protocol.judge))
  evaluations = [runs.read_json(run.folder / "evaluation.json") for run in found]
  evaluation = next((e for e in evaluations if e), None)
  html = report.report(
    shown, evaluation, look, codec=open_codec(found), title=args.title,
    most=args.trajectories, most_bytes=args.megabytes * 10**6,
  )  # fmt: skip
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text(html, encoding="utf-8")
  print(f"report: {args.out.resolve()} ({args.out.stat().st_size / 1e6:.1f} MB)")
  if args.figure:
    arms = {
      name: [run.metrics for run in alike]
      for name, alike in runs.arms([run for run in shown if run.is_rl])
    }
    args.figure.write_text(charts.trap_figure(arms), encoding="utf-8")
    print(f"figure: {args.figure.resolve()}")


class Trainer:
  """Asks checkpoints what they say of a trajectory, by the graph that trains."""

  def __init__(self, found: list[runs.Run], look):
    self._runs, self._look = {run.name: run for run in found}, look
    self._models: dict[pathlib.Path, api.Model] = {}

  def __call__(self, name: str, t: Trajectory) -> Scored:
    """By the checkpoint of the run that is nearest to the policy that sampled."""
    if name not in self._runs:
      raise ValueError("an evaluation has no checkpoints")
    run = self._runs[name]
    steps = [int(p.name) for p in (run.folder / "checkpoints").glob("[0-9]*")]
    if not steps:
      raise ValueError(f"{run.folder} has no checkpoint")
    step = min(steps, key=lambda s: (abs(s - t.policy_step), s))
    folder = run.folder / "checkpoints" / str(step)
    if folder not in self._models:
      self._models = {folder: api.load(folder)}  # one at a time: they may be large
    heat = run.config.get("rollout", {}).get("temperature", 1.0)
    logp, entropy = self._models[folder].score(t, self._look, temperature=heat)
    by = f"checkpoint {step}, the rollout was sampled after {t.policy_step} updates"
    return Scored(by, logp, entropy)


def serve(found: list[runs.Run], look, args: argparse.Namespace) -> None:
  from pixel_jax import hosting  # here: a file needs no server
  from pixel_jax.view import live

  listener = hosting.listen(args.host, args.port)
  names = "\n".join(str(run.folder) for run in found)
  home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
  known = hashlib.sha256(names.encode()).hexdigest()[:16]
  kept = args.index or home / "pixel_jax" / "view" / f"{known}.sqlite"
  index = Index(kept, judge=protocol.judge)
  files = runs.files(found)
  size = sum(f.path.stat().st_size for f in files)
  with tqdm.tqdm(total=size, unit="B", unit_scale=True, desc="trajectories") as bar:
    index.update(files, bar.update, runs.warn)
  hosts = live.LOOPBACK if hosting.is_loopback(listener) else ["*"]
  jax.config.update("jax_platforms", "cpu")  # the accelerator is the run's
  app = live.Live(
    found, index, look, open_codec(found), score=Trainer(found, look),
    title=args.title, hosts=hosts,
  )  # fmt: skip
  host, port = listener.getsockname()[:2]
  print(f"open http://{host}:{port} in a browser; index: {kept}; Ctrl-C ends it")
  hosting.run(app.app, listener)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("dirs", nargs="+", metavar="DIR", type=pathlib.Path)
  parser.add_argument("--out", default="report.html", type=pathlib.Path)
  parser.add_argument("--root", default="", help="where the media files lie")
  parser.add_argument("--title", default="")
  parser.add_argument(
    "--figure", type=pathlib.Path, help="also write the curves as SVG"
  )
  parser.add_argument("--trajectories", type=int, default=400, help="in the file, most")
  parser.add_argument("--megabytes", type=int, default=5, help="of the file, most")
  parser.add_argument(
    "--serve", action="store_true", help="a page that stays up to date"
  )
  parser.add_argument("--host", default="127.0.0.1")
  parser.add_argument("--port", type=int, default=7870, help="0 = a free one")
  parser.add_argument("--index", type=pathlib.Path, help="of the trajectories, a file")
  args = parser.parse_args()
  for folder in args.dirs:
    if not folder.is_dir():
      parser.error(f"{folder} is no folder; give the workdir of a run")
  found = runs.open_runs(runs.find(args.dirs))
  if not found:
    parser.error(
      f"nothing to show in {', '.join(map(str, args.dirs))}: no "
      f"{' or '.join(runs.PARTS)}"
    )
  roots = [run.config.get("data", {}).get("root", "") for run in found]
  look = media.Library(args.root or next(filter(None, roots), "")).load
  (serve if args.serve else write_report)(found, look, args)


if __name__ == "__main__":
  main()
