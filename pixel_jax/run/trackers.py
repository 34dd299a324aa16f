"""Where a run's metrics and pictures go besides metrics.jsonl: TensorBoard, W&B, MLflow.

  for tracker in open_trackers(workdir, ...):
    tracker.write(step, numbers); tracker.show(step, pictures); tracker.close()

TensorBoard is always there; the others by one setting each, and a run of theirs goes on
where that of the workdir did.  Not trackio: it wants Pillow below 13, and crops are exact
to the one Pillow that is pinned.
"""

import math
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from pixel_jax import fields
from pixel_jax.run.settings import ConfigError

Numbers, Pictures = Mapping[str, float], Mapping[str, Image.Image]
# What the table of runs is sorted by, in TensorBoard's tab of hyper-parameters.
MAIN = ("loss", "reward/correct", "ops/rapr", "eval/accuracy", "eval/loss")


class Tracker(Protocol):
  """One of them."""

  def write(self, step: int, numbers: Numbers) -> None: ...
  def show(self, step: int, pictures: Pictures) -> None: ...
  def close(self) -> None: ...


def open_trackers(
  root: pathlib.Path,
  *,
  first_step: int,
  config: Mapping[str, Any],
  wandb: Mapping[str, str],
  mlflow: Mapping[str, str],
) -> list[Tracker]:
  """Those that the settings name.

  Args:
    first_step: of the checkpoint that the run goes on from.
    config: of the run.
    wandb, mlflow: keyword arguments of `Wandb` and `Mlflow`; without a project, or a
      uri, there is none.
  """
  found: list[Tracker] = [TensorBoard(root, first_step, config)]
  if wandb.get("project"):
    found.append(Wandb(root, config, **wandb))
  if mlflow.get("uri"):
    found.append(Mlflow(root, config, **mlflow))
  return found


def _missing(setting: str, package: str) -> ConfigError:
  return ConfigError(
    f"config.{setting} is set, but {package} is not installed: pip install "
    f"'pixel_jax[{package}]'"
  )


class TensorBoard:
  """WORKDIR/tensorboard: scalars, pictures, and the config as hyper-parameters."""

  def __init__(self, root: pathlib.Path, first_step: int, config: Mapping[str, Any]):
    import tensorboardX  # here: it imports torch where that is installed, a second

    # The suffix: names count in seconds, and a quick restart would overwrite a file.
    self._board = tensorboardX.SummaryWriter(
      str(root / "tensorboard"), filename_suffix=f".{first_step}"
    )
    if config and not first_step:
      told = {
        k: v if isinstance(v, bool | int | float | str) else str(v)
        for k, v in fields.flat(config).items()
      }
      parts = tensorboardX.summary.hparams(told, dict.fromkeys(MAIN, math.nan))
      for part in parts:
        self._board.file_writer.add_summary(part)

  def write(self, step: int, numbers: Numbers) -> None:
    for k, v in numbers.items():
      self._board.add_scalar(k, v, step)
    self._board.flush()  # by itself every two minutes: a kill would take them along

  def show(self, step: int, pictures: Pictures) -> None:
    for name, picture in pictures.items():
      pixels = np.asarray(picture.convert("RGB"))
      self._board.add_image(f"trajectories/{name}", pixels, step, dataformats="HWC")

  def close(self) -> None:
    self._board.close()


class Wandb:
  """A run of W&B (extra [wandb]); that of this workdir goes on, its id lies in wandb_id.

  Args:
    project: "" = no W&B.
    entity: user or team; "" = the default of the account.
    name: of the run; "" = that of the workdir.
    mode: "offline" writes into WORKDIR/wandb, which `wandb sync` uploads.
  """

  def __init__(
    self,
    root: pathlib.Path,
    config: Mapping[str, Any],
    *,
    project: str,
    entity: str = "",
    name: str = "",
    mode: Literal["online", "offline"] = "online",
  ):
    try:
      import wandb
    except ImportError as error:
      raise _missing("wandb.project", "wandb") from error
    file = root / "wandb_id"
    known = file.read_text().strip() if file.exists() else secrets.token_hex(4)
    try:
      self.run = wandb.init(
        dir=str(root), id=known, resume="allow", project=project, entity=entity or None,
        name=name or root.name, mode=mode, config=dict(config),
      )  # fmt: skip
    except Exception as error:  # no key, no network
      raise ConfigError(
        f"config.wandb: {error}; `wandb login`, or --config.wandb.mode=offline"
      ) from error
    file.write_text(known + "\n")
    self._image = wandb.Image

  def write(self, step: int, numbers: Numbers) -> None:
    self.run.log(dict(numbers), step=step)

  def show(self, step: int, pictures: Pictures) -> None:
    drawn = {f"trajectories/{k}": self._image(x) for k, x in pictures.items()}
    self.run.log(drawn, step=step)

  def close(self) -> None:
    self.run.finish()


class Mlflow:
  """A run of MLflow (extra [mlflow]); that of this workdir goes on, by mlflow_id.

  Args:
    uri: of the tracking server, such as "http://host:5000"; "" = no MLflow.
    experiment: "" = "pixel_jax".
    name: of the run; "" = that of the workdir.
  """

  def __init__(
    self,
    root: pathlib.Path,
    config: Mapping[str, Any],
    *,
    uri: str,
    experiment: str = "",
    name: str = "",
  ):
    try:
      from mlflow import MlflowClient
      from mlflow.entities import Metric, Param
    except ImportError as error:
      raise _missing("mlflow.uri", "mlflow") from error
    self._metric, file = Metric, root / "mlflow_id"
    try:
      self._client = MlflowClient(uri)
      if file.exists():
        self.id = file.read_text().strip()
        self._client.update_run(self.id, "RUNNING")
        return
      name = name or root.name
      experiment = experiment or "pixel_jax"
      known = self._client.get_experiment_by_name(experiment)
      place = (
        known.experiment_id if known else self._client.create_experiment(experiment)
      )
      self.id = self._client.create_run(place, run_name=name).info.run_id
      params = [Param(k, str(v)[:6000]) for k, v in fields.flat(config).items()]
      for i in range(0, len(params), 100):  # of one request, at most
        self._client.log_batch(self.id, params=params[i : i + 100])
    except Exception as error:  # no server, no such run
      raise ConfigError(f"config.mlflow: {error}") from error
    file.write_text(self.id + "\n")

  def write(self, step: int, numbers: Numbers) -> None:
    rows = [self._metric(k, v, 0, step) for k, v in numbers.items() if math.isfinite(v)]
    self._client.log_batch(self.id, metrics=rows)

  def show(self, step: int, pictures: Pictures) -> None:
    for name, picture in pictures.items():
      self._client.log_image(self.id, picture, key=f"trajectories/{name}", step=step)

  def close(self) -> None:
    self._client.set_terminated(self.id)
