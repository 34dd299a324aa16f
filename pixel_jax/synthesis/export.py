"""Traces in the layout of PixelReasoner-SFT-Data, for users of PyTorch.

A folder: release.json, a list of {"qid", "message_list"}, and what it names, relative
to the folder (pixel_reasoner.md 2.1).  Turns are system, user, then assistant and user
in turns; a user's text stands before its pictures; crops and frames are files, so that
nobody has to run an operation again.

  {"role": "user", "content": [{"text": "Which ..."}, {"image": "images/2-0.png"}]}

Pictures are stored without loss; a file that reads as the picture it is (upright, RGB)
is copied as it is.  Not here: which traces are written.
"""

import json
import pathlib
import shutil

from PIL import Image

from pixel_jax.chat import template, tools
from pixel_jax.chat.encode import Conversation
from pixel_jax.data import records
from pixel_jax.trajectory import Media

ORIENTATION = 0x0112  # EXIF


class PixelReasoner:
  """Writes beside `folder` and takes its place when closed; use it in `with`."""

  def __init__(self, folder: str | pathlib.Path, root: str | pathlib.Path = ""):
    self.folder, self.root = pathlib.Path(folder), root
    self._partial = self.folder.with_name(self.folder.name + ".partial")
    shutil.rmtree(self._partial, ignore_errors=True)  # of a run that was killed
    for name in ("images", "videos"):
      (self._partial / name).mkdir(parents=True)
    self._file = (self._partial / "release.json").open("w", encoding="utf-8")
    self._file.write("[")
    self._count = 0

  def __enter__(self) -> "PixelReasoner":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    self._file.write("\n]\n")
    self._file.close()
    if kind is None:
      shutil.rmtree(self.folder, ignore_errors=True)
      self._partial.rename(self.folder)

  def add(self, index: int, trace: Conversation) -> None:
    """One item; `index` names its files."""
    item = {
      "qid": trace.trajectory.task.id,
      "message_list": self._messages(index, trace),
    }
    self._file.write(",\n" if self._count else "\n")
    self._file.write(json.dumps(item, ensure_ascii=False))
    self._count += 1

  def _messages(self, index: int, trace: Conversation) -> list[dict]:
    t, shown = trace.trajectory, list(trace.seen.pictures)
    files = 0

    def store(picture: Image.Image, folder: str, media: Media | None) -> str:
      nonlocal files
      files += 1
      return self._store(picture, f"{folder}/{index}-{files - 1}", media)

    question = t.task.question + tools.user_suffix(t.profile)
    content = [{"text": question}]
    for media in t.task.media:
      picture = shown.pop(0)
      if picture.kind == "video":
        frames = [store(frame, "videos", None) for frame in picture.source]
        content.append({"video": frames})
      else:
        content.append({"image": store(picture.source, "images", media)})
    system = {"role": "system", "content": [{"text": tools.system_prompt(t.profile)}]}
    messages = [system, {"role": "user", "content": content}]
    for turn in t.turns[2:]:
      text, pads = turn["text"], 0
      while turn["role"] == "user" and text.endswith(template.IMAGE):
        text, pads = text.removesuffix(template.IMAGE), pads + 1
      returned = [shown.pop(0) for _ in range(pads)]
      content = [{"text": text}]
      content += [{"image": store(p.source, "images", None)} for p in returned]
      messages.append({"role": turn["role"], "content": content})
    return messages

  def _store(self, picture: Image.Image, name: str, media: Media | None) -> str:
    original = self._original(media, picture.size) if media else None
    if original:
      name += original.suffix.lower()
      shutil.copyfile(original, self._partial / name)
    else:
      name += ".png"
      picture.save(self._partial / name)
    return name

  def _original(self, media: Media, size: tuple[int, int]) -> pathlib.Path | None:
    """The file of a picture, where any reader sees in it what we see."""
    try:
      path = records.resolve(media.path, self.root)
      with Image.open(path) as opened:
        upright = opened.getexif().get(ORIENTATION, 1) == 1
        same = opened.mode == "RGB" and opened.size == size
    except (OSError, ValueError, TypeError):
      return None  # drawn, in a zip, ...
    return path if upright and same else None
