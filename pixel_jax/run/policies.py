"""The policy: what can talk.  Its config, parameters, tokenizer and codec belong together.

It comes from a workdir, a converted checkpoint or a Hugging Face folder, or fresh from a
preset.  The codec holds the prompt profile and the pixel budgets.
"""

import dataclasses
import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from pixel_jax import parallel
from pixel_jax.chat import encode, tokenizer
from pixel_jax.data import world
from pixel_jax.model import config as model_config
from pixel_jax.model import hf, lora, qwen2_5_vl, table
from pixel_jax.run import bucket, checkpoint
from pixel_jax.run.settings import ConfigError, call, imported

KERNELS = {"splash": "tpu", "cudnn": "gpu"}  # of attention, and where they run
RANDOM = "random"  # `config.init` of fresh weights
# The base of the tiny world that ships with the package; README.md says how it was made.
TINY_BASE = pathlib.Path(__file__).resolve().parents[1] / "data" / "tiny_base"


@dataclasses.dataclass(frozen=True)
class Policy:
  """What can talk."""

  config: model_config.ModelConfig
  codec: encode.Codec
  mesh: jax.sharding.Mesh
  read: Callable[[], dict]  # reads the parameters
  source: str  # where the parameters come from
  base: str | None = None  # the Hugging Face folder they were first imported from

  @functools.cached_property
  def params(self) -> dict:
    """A pure dict, sharded over the mesh; read when it is first asked for, so that a
    mistake in the settings is told before."""
    return self.read()

  @functools.cached_property
  def abstract(self) -> dict:
    """What `params` will be, as `abstract` has it."""
    return abstract(self.config, self.mesh)

  @property
  def extra(self) -> dict:
    """Stored beside every checkpoint: what it takes to open it without a config."""
    adapters = self.config.lora
    return {
      "model": model_config.to_hf(self.config),
      "lora": dataclasses.asdict(adapters) if adapters else None,
      "hf": self.base,
    }


def open_policy(
  init: str,
  *,
  model: dict,
  codec: dict | None,
  mesh,
  seed: int = 0,
  workdir: pathlib.Path | None = None,
  adapters: dict | None = None,
) -> Policy:
  """The policy of `init`, or of "random" a fresh one with the tiny tokenizer.

  `init` is what `find` understands: a workdir, a converted checkpoint, an HF folder.
  `model`, `codec` and `adapters` (`config.lora`) are the config sections: name, dtype,
  remat, ..., profile, budgets, ... and rank, alpha, targets.  The tokenizer is copied
  into the workdir, so that every run can talk.

  Args:
    codec: None = that of `init` (`open_codec`).
    workdir: None = nothing is written.
    adapters: rank > 0 trains those of `init`, or new ones where it has none; rank 0
      trains the whole model, those of `init` merged into it.  None = nothing is
      trained: they are merged too, and the weights may be bfloat16.
  """
  model = dict(model)
  name = model.pop("name", "")
  asked, extra = None, {}
  if adapters and adapters["rank"]:
    asked = call("lora", lora.Config, **adapters)
  if init and init != RANDOM:
    root = find(init)
    if not root.is_dir():
      raise ConfigError(
        f"config.init: {root} does not exist; give a workdir, a Hugging Face folder or "
        "what `pixel-jax convert` wrote"
      )
    if not (hf.is_checkpoint(root) or checkpoint.holds_params(root)):
      raise ConfigError(
        f"config.init: {root} holds no policy: neither a step that a run has saved, nor "
        "what `pixel-jax convert` wrote, nor config.json and *.safetensors of Hugging Face"
      )
    words = _load_tokenizer(_words_of(root))
    if hf.is_checkpoint(root):
      extra = {"model": call("init", hf.read_config, root), "hf": str(root)}
    else:
      extra = checkpoint.load_extra(root)
    config = call("init", model_config.from_hf, extra["model"])
  elif init and name == "tiny" and workdir:
    if bucket.is_writer(workdir):
      tokenizer.make_tiny(workdir / "tokenizer", world.scaffolds())
    parallel.barrier("tokenizer")
    words = tokenizer.load(workdir / "tokenizer")
    config = model_config.tiny(
      words.vocab_size,
      image_token=words.image_pad,
      video_token=words.video_pad,
      vision_start=words.vision_start,
      vision_end=words.vision_end,
      bos_token=words.endoftext,
      eos_token=words.im_end,
    )
  elif init:
    raise ConfigError(
      f"config.init=random: the {name} model has no tokenizer of its own; give the folder "
      "of a Hugging Face checkpoint, or a workdir: --config.init=DIR"
    )
  else:
    raise ConfigError(
      "config.init is empty; give the folder of a Hugging Face checkpoint, or a workdir: "
      "--config.init=DIR.  The tiny model can begin with --config.init=tiny_base, which "
      "ships with the package, or with fresh weights: --config.init=random"
    )
  if workdir and bucket.is_writer(workdir) and not (workdir / "tokenizer").exists():
    # With what lies beside it: an export wants the processor's files too.
    if hf.is_checkpoint(root):
      hf.copy_companions(root, workdir / "tokenizer")
    else:
      bucket.fetch(_words_of(root), workdir / "tokenizer")
  config = call("model", dataclasses.replace, config, **model, lora=asked)
  needs, here = KERNELS.get(config.attention, ""), mesh.devices.flat[0].platform
  if needs and here != needs:
    raise ConfigError(
      f"config.model.attention={config.attention} needs a {needs.upper()}, and this runs "
      f"on a {here.upper()}; use xla"
    )
  call("lora", table.adapted, config)  # a target that matches nothing is told now
  if init != RANDOM:
    found = extra.get("lora") and lora.Config(**extra["lora"])
    whole = adapters is not None and asked is None
    read = functools.partial(
      load, root, config, found, mesh=mesh, seed=seed, whole=whole
    )
  else:
    place = layout(config, mesh)
    read = functools.partial(qwen2_5_vl.init, config, jax.random.key(seed), place)
  if codec is None:
    codec = read_codec(root)
  talk = make_codec(words, codec, config.vision)
  return Policy(config, talk, mesh, read, init, extra.get("hf"))


def make_codec(
  words: tokenizer.Tokenizer,
  section: Mapping[str, Any],
  vision: model_config.VisionConfig | None = None,
) -> encode.Codec:
  """A tokenizer, `config.codec` and how a model cuts pictures; None = as Qwen's."""
  v = vision or model_config.VisionConfig()
  names = ("window", "patch", "temporal", "merge", "tokens_per_second")
  cut = {name: getattr(v, name) for name in names}
  named = section.get("operations", ())
  own = tuple(imported("codec.operations", path) for path in named)
  section = {**section, "operations": own}
  return call("codec", encode.Codec, tokenizer=words, **cut, **section)


def open_codec(
  root: str | pathlib.Path, section: Mapping[str, Any] | None = None
) -> encode.Codec:
  """That of a workdir, a converted checkpoint or a Hugging Face folder.

  Args:
    section: a `config.codec`; None = that which lies there, else the released budgets.
  """
  root = pathlib.Path(find(root))
  words, vision = tokenizer.load(_words_of(root)), None
  if section is None:
    section = read_codec(root)
  if hf.is_checkpoint(root):
    vision = model_config.from_hf(hf.read_config(root)).vision
  elif checkpoint.holds_params(root):
    vision = model_config.from_hf(checkpoint.load_extra(root)["model"]).vision
  return make_codec(words, section, vision)


# Beside the tokenizer of an exported model: the codec it was trained with.
OURS = "pixel_jax.json"


def read_codec(root: bucket.Folder) -> dict[str, Any]:
  """The `config.codec` that a folder was trained with; {} where it does not say."""
  root = run_of(root)
  for file in (root / OURS, root / "tokenizer" / OURS, root / "config.json"):
    if file.is_file():
      section = json.loads(file.read_text(encoding="utf-8")).get("codec", {})
      if section:
        budgets = {k: tuple(v) for k, v in section.get("budgets", {}).items()}
        return section | ({"budgets": budgets} if budgets else {})
  return {}


def find(init: str | pathlib.Path) -> bucket.Folder:
  """The folder that `config.init` names; "tiny_base" is the one in the package."""
  return TINY_BASE if init == "tiny_base" else bucket.behind(init)


def _words_of(root: bucket.Folder) -> bucket.Folder:
  """Where the tokenizer of a policy lies; of RUN/checkpoints/50 it is that of the run."""
  if hf.is_checkpoint(root):
    return root
  return run_of(root) / "tokenizer"


def run_of(root: bucket.Folder) -> bucket.Folder:
  """RUN of RUN/checkpoints/50; else the folder itself."""
  is_step = root.parent.name == "checkpoints" and not (root / "tokenizer").is_dir()
  return root.parent.parent if is_step else root


def _load_tokenizer(folder: bucket.Folder) -> tokenizer.Tokenizer:
  if isinstance(folder, pathlib.Path):
    return tokenizer.load(folder)
  with tempfile.TemporaryDirectory() as local:  # transformers reads local files
    bucket.fetch(folder, pathlib.Path(local) / "tokenizer")
    return tokenizer.load(pathlib.Path(local) / "tokenizer")


def load(
  root: bucket.Folder,
  config: model_config.ModelConfig,
  found: lora.Config | None,
  *,
  mesh,
  seed: int,
  whole: bool,
) -> dict:
  """The parameters at `root` as those of `config`: adapters kept, merged or added.

  Args:
    found: the adapters that are stored there.
    whole: every weight is to be trained, so all must be f32; else bfloat16 ones stay so.
      Those of a Hugging Face folder become f32.
  """
  stored = dataclasses.replace(config, lora=found)
  if found and config.lora:
    same = table.adapted(stored) == table.adapted(config)
    if not same or (found.rank, found.alpha) != (config.lora.rank, config.lora.alpha):
      raise ConfigError(
        f"config.lora: {root} has adapters of rank={found.rank}, alpha={found.alpha}, "
        f"targets={found.targets}; go on with the same, or merge them first: "
        "pixel-jax convert export, then import"
      )
  if hf.is_checkpoint(root):
    half = not whole and hf.read_config(root).get("torch_dtype") == "bfloat16"
    dtype = "bfloat16" if half else "float32"
    with tqdm.tqdm(
      desc=f"reading {root.name}", unit="B", unit_scale=True, unit_divisor=1000,
      leave=False, disable=True if jax.process_index() else None,
    ) as bar:  # fmt: skip

      def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

      there = layout(stored, mesh)
      params = call("init", hf.import_checkpoint, root, stored, there, dtype, progress)
  else:
    want = table.unnest(qwen2_5_vl.abstract(stored))
    have = table.unnest(checkpoint.stored(root))
    half = [
      path
      for path in want.keys() & have.keys()
      if have[path].dtype == jnp.bfloat16 and not lora.is_adapter(path)
    ]
    if half and whole:
      raise ConfigError(
        f"config.init: {root} holds bfloat16 weights, and training all of them wants "
        "float32; import them so (pixel-jax convert import, without --dtype), or train "
        "adapters: --config.lora.rank=32"
      )
    for path in half:
      want[path] = want[path].update(dtype=jnp.bfloat16)
    params = checkpoint.load_params(root, table.nest(want), layout(stored, mesh))[0]
  if found and not config.lora:
    return qwen2_5_vl.merge(stored, params)
  if config.lora and not found:
    return qwen2_5_vl.adapt(config, params, jax.random.key(seed), layout(config, mesh))
  return params


def abstract(config: model_config.ModelConfig, mesh) -> dict:
  """The parameters of a model that is to be trained, without numbers.

  Beside adapters the weights stay as most are released, in bfloat16 (`load`).
  """
  flat = table.unnest(qwen2_5_vl.abstract(config))
  if config.lora:
    flat = {
      path: x if lora.is_adapter(path) else x.update(dtype=jnp.bfloat16)
      for path, x in flat.items()
    }
  return parallel.place(table.nest(flat), layout(config, mesh))


def layout(config: model_config.ModelConfig, mesh) -> dict:
  """The sharding of every parameter, in a tree like that of the parameters."""
  abstract = qwen2_5_vl.abstract(config)
  return parallel.shardings(mesh, hf.logical_axes(config), abstract)
