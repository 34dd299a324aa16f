"""The model as a library: a question about pictures, answered with operations.

  import pixel_jax
  model = pixel_jax.load("CKPT")
  answer = model.ask("Which symbol is on the red panel?", "photo.jpg")
  print(answer.text)

Not here: how turns are sampled (`rollout/engine.py`), what is said around pictures
(`chat/encode.py`).  Many questions at once are faster by `pixel-jax evaluate`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from pixel_jax import answers, parallel
from pixel_jax.chat import encode
from pixel_jax.data import pack
from pixel_jax.model import qwen2_5_vl
from pixel_jax.pixels import image, ops, video
from pixel_jax.rollout import engine
from pixel_jax.run import policies
from pixel_jax.trajectory import Media, Task, Trajectory
from pixel_jax.view import page
from pixel_jax.view import pictures as view
from pixel_jax.view import trajectory as turns_of

CLIPS = (".mp4", ".webm", ".mkv", ".avi", ".mov")
PATCHES = 4  # of one token
OF_OBSERVATION = 64  # tokens of the text around what an operation returns, at most


@dataclasses.dataclass(frozen=True)
class Answer:
  """What was said and seen.

  Attributes:
    text: the last turn, in which the answer stands.
    answer: what stands in its \\boxed{}; "" where nothing does.
    pictures: those that the operations returned, in order.
    trajectory: every turn, call and sampled id.

  A notebook shows it as the viewer does, with its calls drawn on the pictures.
  """

  text: str
  answer: str
  pictures: list[Image.Image]
  trajectory: Trajectory
  draw: Callable[[], str] = dataclasses.field(repr=False, compare=False)

  def _repr_html_(self) -> str:
    return self.draw()


class Model:
  """A policy that answers questions; `load` makes one."""

  def __init__(self, policy: policies.Policy):
    self.policy = policy
    self._engines: dict[tuple, engine.Engine] = {}

  def ask(
    self,
    question: str,
    pictures: Any = (),
    *,
    operations: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
    max_turns: int = 5,
    max_new_tokens: int = 1024,
  ) -> Answer:
    """Answers a question, looking closer where the model likes.

    Programs are compiled for lengths that are powers of two: the first question takes
    longest, and those of about its length share what was compiled.

    Args:
      pictures: an image, or a list of them: PIL images or paths.  Or a clip: a path that
        ends with .mp4, .webm, .mkv, .avi or .mov, or a `pixels.video.Video`.
      operations: False answers from the first look alone: the prompt is the same, but no
        call can be begun, as in evaluation's mode "forbidden".
      temperature: 0 takes the likeliest token every time, 1 samples as training does.
      seed: of the sampling.
      max_turns: of the model.
      max_new_tokens: of one turn.
    """
    codec = self.policy.codec
    many = pictures if isinstance(pictures, list | tuple) else [pictures]
    opened = [_open(p, codec.video_frames) for p in many]
    names = [str(p) if _is_path(p) else f"picture {i + 1}" for i, p in enumerate(many)]
    shown = dict(zip(names, opened))
    kinds = ["video" if isinstance(x, video.Video) else "image" for x in opened]
    task = Task("question", question, "", [*map(Media, kinds, names)])

    def load_media(media: Media):
      return shown[media.path]

    prompt = encode.Conversation(codec, task, load_media)
    ids = prompt.trajectory.ids
    turns = max_turns if operations else 1
    player = self._engine(codec, len(ids), prompt.pixels, turns, max_new_tokens)
    played = player.run(
      self.policy.params, [task], seed=seed, step=0, group_size=1,
      load_media=load_media, max_turns=max_turns, max_new_tokens=max_new_tokens,
      temperature=temperature, force=None if operations else "answer",
    )[0][0].trajectory  # fmt: skip
    text = played.turns[-1]["text"]
    returned = view.replay(played, codec, load_media).returned
    seen = [s.image for call in returned for s in call]
    draw = functools.partial(_draw, played, load_media, codec)
    return Answer(text, answers.boxed(text) or "", seen, played, draw)

  def score(
    self,
    trajectory: Trajectory,
    load_media: encode.LoadMedia,
    *,
    temperature: float = 1.0,
  ) -> tuple[list[float], list[float]]:
    """How likely the policy's own tokens are to this model, by the graph that trains.

    Args:
      load_media: gives the pictures that the trajectory names; what its operations
        returned is drawn again.
      temperature: at which they were sampled.

    Returns:
      The log-prob of each id, and the entropy of what it was drawn from; 0 where the id
      was not sampled.
    """
    policy = self.policy
    pixels = encode.redraw(trajectory, policy.codec, load_media)
    example = encode.example(trajectory, pixels)
    sampled = np.array(trajectory.sampled, np.float32)
    example = dataclasses.replace(example, weight=sampled)  # those not learned, too
    T = _round_up(len(trajectory.ids))
    P = _round_up(sum(pack.distinct(example).values()))
    batch = parallel.to_devices(
      policy.mesh, pack.collate([[example]], T, P, num_rows=1)
    )
    out = _token_logp(policy.config, policy.params, batch, temperature)
    n = len(trajectory.ids)
    return tuple(np.asarray(x)[0, :n].tolist() for x in out)

  def _engine(self, codec, prompt, pixels, max_turns, max_new_tokens) -> engine.Engine:
    """An engine with room for a prompt of so many tokens and for what may follow it."""
    most = {role: codec.budgets[role][1] // codec.patch**2 for role in encode.ROLES}
    looks = (max_turns - 1) * codec.tools
    frames = ops.MAX_FRAMES if any(p.grid[0] > 1 for p in pixels) else 1
    observation = max(most["crop"], frames * most["frame"]) // PATCHES + OF_OBSERVATION
    patches = [p.num_patches for p in pixels]
    patches += [most["crop"], most["frame"]] if looks else []
    sizes = (
      _round_up(prompt),
      _round_up(max_turns * max_new_tokens + looks * observation),
      _round_up(max(patches, default=PATCHES)),
    )
    key = (codec.tools, *sizes)
    if key not in self._engines:
      before, after, largest = sizes
      self._engines[key] = engine.Engine(
        self.policy.config, codec, slots=1, max_prompt=before, max_len=before + after,
        prompt_len=min(before, 2048), extend_len=min(after, 512), patches=largest,
        views=(512, 2048, 8192),
      )  # fmt: skip
    return self._engines[key]


def load(
  folder: str | pathlib.Path,
  *,
  dtype: str = "float32",
  attention: str = "xla",
  codec: Mapping[str, Any] | None = None,
) -> Model:
  """The policy of a workdir, of a converted checkpoint or of a Hugging Face folder.

  Its weights lie on the first device of this machine.

  Args:
    folder: or "tiny_base", the model of the tiny world that ships with the package.
    dtype: it computes in this; "float32" is exact to `transformers`, "bfloat16" is what
      accelerators are fast at.
    attention: "xla", "splash" (TPU) or "cudnn" (GPU, in bfloat16).
    codec: fields of `chat.encode.Codec`, such as profile and budgets; None = those that
      it was trained with where the folder tells, else the published ones.
  """
  parallel.initialize()
  policy = policies.open_policy(
    str(folder), model=dict(dtype=dtype, attention=attention), codec=codec,
    mesh=parallel.make_mesh(1, 1, 1),
  )  # fmt: skip
  return Model(policy)


@functools.partial(jax.jit, static_argnames=("config", "temperature"))
def _token_logp(config, params, batch, temperature):
  where = batch.weight > 0
  return qwen2_5_vl.token_logp(config, params, batch, temperature, where)


def _draw(played: Trajectory, load_media, codec) -> str:
  turns = turns_of.render_turns(played, load_media, codec=codec, store=None)
  style = page.asset("trajectory.css")
  return f'<style>{style}</style><div class="trajectory">{turns}</div>'


def _is_path(picture: Any) -> bool:
  return isinstance(picture, str | pathlib.Path)


def _open(picture: Any, num_frames: int) -> Image.Image | video.Video:
  if isinstance(picture, video.Video):
    return picture
  if _is_path(picture) and pathlib.Path(picture).suffix.lower() in CLIPS:
    return video.read_video(picture, num_frames=num_frames)
  return image.load_image(picture)


def _round_up(n: int) -> int:
  """The next power of two, 64 at least, so that few lengths are compiled."""
  return 1 << max(n - 1, 63).bit_length()
