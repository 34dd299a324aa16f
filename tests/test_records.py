"""Records: parquet with large row groups, and folders and zips of bare pictures."""

import collections
import concurrent.futures
import os
import warnings
import zipfile

import layouts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixel_jax.data import pipeline, records, sources
from pixel_jax.trajectory import Media

# ---- Parquet -------------------------------------------------------------------------


def write_groups(path, n=50, group=17):
  """Texts and numbers, nested bytes, and a column that is stored as a dictionary."""
  noise = np.random.default_rng(0)
  table = pa.table(
    {
      "question": [f"{i}?" for i in range(n)],
      "number": [i if i % 3 else None for i in range(n)],
      "images": [[{"bytes": noise.bytes(300 + i), "path": None}] for i in range(n)],
      "kind": pa.array([f"kind {i % 3}" for i in range(n)]).dictionary_encode(),
    }
  )
  pq.write_table(table, path, row_group_size=group)
  return [records.plain(row) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("block", [1, 2500, 1 << 20])  # one row, some, whole groups
def test_large_row_groups_are_unpacked_once(block, tmp_path, monkeypatch):
  want = write_groups(tmp_path / "x.parquet")
  monkeypatch.setattr(records, "SMALL_GROUP", 100)
  monkeypatch.setattr(records, "BLOCK", block)
  read, once = collections.Counter(), pq.ParquetFile.iter_batches

  def counted(self, size, row_groups, **how):
    read.update(row_groups)
    return once(self, size, row_groups=row_groups, **how)

  monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
  monkeypatch.setattr(pq.ParquetFile, "read_row_group", None)
  rows = records.open_records("parquet:x.parquet", tmp_path)
  order = np.random.default_rng(1).permutation(np.tile(np.arange(50), 4)).tolist()
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    got = list(pool.map(rows.__getitem__, order))
  assert got == [want[i] for i in order]
  assert read == {0: 1, 1: 1, 2: 1}
  assert os.listdir(tmp_path) == ["x.parquet"]


def test_without_room_on_the_disk_groups_are_read_whole(tmp_path, monkeypatch):
  want = write_groups(tmp_path / "x.parquet")
  monkeypatch.setattr(records, "SMALL_GROUP", 100)

  def full(self, g):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(records._Parquet, "_unpack", full)
  rows = records.open_records("parquet:x.parquet", tmp_path)
  with pytest.warns(UserWarning, match=r"No space left.*TMPDIR.*ParquetWriter"):
    assert rows[20] == want[20]
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # told once a group
    assert [rows[i] for i in range(17, 34)] == want[17:34]


# ---- Bare pictures -------------------------------------------------------------------

NAMES = ("b/ä ö.png", "a.JPG", "b/c/d.webp", "b/c/#1 (x).jpeg", "z,z.png")


def write_pictures(root):
  (root / "photos" / "b" / "c").mkdir(parents=True)
  for i, name in enumerate(NAMES):
    kind = {"JPG": "JPEG", "jpeg": "JPEG"}.get(name.rpartition(".")[2])
    layouts.picture(i).save(root / "photos" / name, kind)
  for name in ("notes.txt", "b/.hidden.jpg", "b/._d.jpg"):
    (root / "photos" / name).write_text("no picture")


def zip_pictures(root):
  with zipfile.ZipFile(root / "photos.zip", "w") as z:
    for path in sorted((root / "photos").rglob("*")):
      z.write(path, path.relative_to(root / "photos"))


@pytest.mark.parametrize(
  "uri", ["images:photos", "images:photos/", "images:photos.zip"]
)
def test_bare_pictures_of_a_folder_or_a_zip(uri, tmp_path):
  write_pictures(tmp_path)
  zip_pictures(tmp_path)
  source = sources.open_source(uri, root=tmp_path)
  tasks = [source[i] for i in range(len(source))]
  start = "zip:photos.zip!" if "zip" in uri else "photos/"
  assert [t.id for t in tasks] == [start + name for name in sorted(NAMES)]
  sizes = {name: layouts.picture(i).size for i, name in enumerate(NAMES)}
  for t, name in zip(tasks, sorted(NAMES)):
    assert (t.question, t.answer, t.media) == ("", "", [Media("image", t.id)])
    assert source.load_media(t.media[0]).size == sizes[name]


def test_the_root_itself_may_be_the_folder_and_links_lead_nowhere(tmp_path):
  root = tmp_path / "root"
  root.mkdir()
  write_pictures(root)
  layouts.picture(0).save(tmp_path / "secret.png")
  (root / "folder").symlink_to(tmp_path)
  (root / "link.png").symlink_to(tmp_path / "secret.png")
  source = sources.open_source("images:.", root=root)
  assert len(source) == len(NAMES) + 1
  with pytest.raises(records.BadRecord, match=r"link.png.*outside of the root"):
    source[0]
  assert source[1].id == "photos/a.JPG"


def test_a_name_that_is_no_text_is_set_aside(tmp_path):
  layouts.picture(0).save(tmp_path / "a.png")
  os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
  source = sources.open_source("images:.", root=tmp_path)
  with pytest.raises(records.BadRecord, match="surrogates not allowed"):
    source[0]


@pytest.mark.parametrize(
  ("uri", "says"),
  [
    ("images:none", "No such file.*expected a folder, or a whole zip"),
    ("images:empty", r"no picture \(.jpg"),
    ("images:cut.zip", "not a zip file; expected a folder, or a whole zip"),
    ("images:..", "outside of the root"),
    ("images:/etc", "outside of the root"),
  ],
)
def test_what_holds_no_pictures(uri, says, tmp_path):
  write_pictures(tmp_path)
  zip_pictures(tmp_path)
  (tmp_path / "empty").mkdir()
  whole = (tmp_path / "photos.zip").read_bytes()
  (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(sources.SourceError, match=says):
    sources.open_source(uri, root=tmp_path)


def test_nobody_trains_on_a_picture_without_a_question(tmp_path):
  write_pictures(tmp_path)
  source = sources.open_source("images:photos", root=tmp_path)
  stream = pipeline.tasks(source, seed=0, shards=1, batch=2)
  with pytest.raises(pipeline.DataError, match="bare image; `pixel-jax synthesize`"):
    next(stream)
