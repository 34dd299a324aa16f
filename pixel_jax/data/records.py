"""Records: random access to the rows of a file, each a dict; what they mean is
`formats.py`.

  jsonl:FILE          a JSON object a line; only where the lines begin is kept
  json:FILE           one JSON list of objects; only where these begin is kept
  tsv:FILE            columns with tabs between, as pandas writes them; the first row names
                      them, and only where the others begin is kept
  parquet:FILE        few row groups are kept in memory; large ones unpacked in TMPDIR
  arrayrecord:FILE    JSON objects, one a record
  tfds:NAME/SPLIT     a prepared data set of TFDS in ArrayRecord; no TensorFlow
  images:FOLDER       bare pictures, {"image": path} each: a folder with those below it,
                      or a zip

FILE may be a pattern (train-*.parquet); the files then follow each other by name.  A
record has a name that finds it again: `parquet:train-0.parquet#12`, and so has a value
in it: `parquet:train-0.parquet#12/images/0/bytes`.  Nulls are left out.
"""

import array
import base64
import binascii
import bisect
import collections
import csv
import functools
import io
import itertools
import json
import os
import pathlib
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

SCHEMES = ("jsonl", "json", "tsv", "parquet", "arrayrecord", "tfds", "images")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Of parquet, in bytes: row groups that are kept, those that are read whole for one record
# (9 ms for 3 MB), and what is read for one record of the others.
KEPT = 256 << 20
SMALL_GROUP = 4 << 20
BLOCK = 1 << 20
MOST_CELL = 256 << 20  # of a table: a picture of 8K in base64 has 50 MB
REWRITE = (
  "write the file again with small ones: f = pyarrow.parquet.ParquetFile(OLD); "
  "w = pyarrow.parquet.ParquetWriter(NEW, f.schema_arrow); "
  "[w.write_batch(b) for b in f.iter_batches(32)]; w.close()"
)


class SourceError(ValueError):
  """A source that cannot be opened."""


class BadRecord(ValueError):
  """One record that cannot be used; it is set aside, the others are not."""


def open_records(uri: str, root: str | pathlib.Path = "") -> "Records":
  """The records of a URI, its paths below `root`; or SourceError."""
  rows = Records(list(_open(uri, root)))
  if not len(rows):
    raise SourceError(f"{uri}: no record is there; it needs one at least")
  return rows


class Records:
  """The rows of a URI, file after file."""

  def __init__(self, files: list[tuple[str, Any]]):
    """`files`: the URI of each and its rows."""
    self._files = files
    self._starts = [0, *itertools.accumulate(len(rows) for _, rows in files)]

  def __len__(self) -> int:
    return self._starts[-1]

  def __getitem__(self, i: int) -> dict:
    _, file, at = self._at(i)
    try:
      record = plain(file[at])
    except Exception as error:  # a damaged file: its reader raises anything
      raise BadRecord(f"{self.name(i)}: {_short(error)}") from error
    if not isinstance(record, dict):
      raise BadRecord(
        f"{self.name(i)}: expected a JSON object, got {type(record).__name__}"
      )
    return record

  def name(self, i: int) -> str:
    """`SCHEME:FILE#ROW`: the record, also when files are added before its own."""
    file, _, at = self._at(i)
    return f"{file}#{at}"

  def parts(self) -> dict[str, "Records"]:
    """The single files, by their URIs."""
    return {file: Records([(file, rows)]) for file, rows in self._files}

  def _at(self, i: int) -> tuple[str, Any, int]:
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of {len(self)}")
    k = bisect.bisect_right(self._starts, i) - 1
    return *self._files[k], int(i) - self._starts[k]


def value(record: Any, keys: list[str], name: str) -> bytes:
  """The bytes at a path of keys in a record: as they are, or out of base64."""
  for key in keys:
    try:
      record = record[int(key)] if isinstance(record, list) else record[key]
    except (KeyError, IndexError, TypeError, ValueError) as error:
      raise BadRecord(f"media {name!r}: the record has no {key!r}") from error
  if isinstance(record, str) and (record.startswith("data:") or is_base64(record)):
    try:
      text = record.partition("base64,")[2] if record.startswith("data:") else record
      record = base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
      raise BadRecord(f"media {name[:80]!r}: {error} in its base64") from error
  if not isinstance(record, bytes) or not record:
    raise BadRecord(
      f"media {name!r}: expected bytes or a data: URI with base64, got "
      f"{'none' if record == b'' else type(record).__name__}"
    )
  return record


# How pictures begin in base64: JPEG, PNG, GIF, WebP, BMP and TIFF of either byte order.
ENCODED = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkqA", "TU0AK")
LONGEST_PATH = 255  # a picture is longer than that in base64, the name of a file is not


def is_base64(text: str) -> bool:
  """Whether a text is a picture in base64 without data: before it."""
  return len(text) > LONGEST_PATH and text.startswith(ENCODED)


def plain(x: Any) -> Any:
  """Dicts, lists, text, numbers and bytes; nulls of dicts are left out."""
  if isinstance(x, Mapping):
    return {str(k): plain(v) for k, v in x.items() if v is not None}
  if isinstance(x, np.ndarray):
    x = x.tolist()
  if isinstance(x, list | tuple):
    return [plain(v) for v in x]
  return x.item() if isinstance(x, np.generic) else x


def resolve(
  path: str, root: str | pathlib.Path = "", what: str = "media path"
) -> pathlib.Path:
  """`path` below `root`, links followed."""
  base = pathlib.Path(root or ".").resolve()
  if "\0" in path:
    raise BadRecord(f"{what} {path[:80]!r} holds a NUL; paths are text")
  full = (base / path).resolve()
  if not full.is_relative_to(base):
    raise BadRecord(
      f"{what} {path!r} leads to {full}, outside of the root {base}; use paths "
      "below it, or set data.root"
    )
  return full


# ---- Files ---------------------------------------------------------------------------


def _open(uri: str, root) -> Iterator[tuple[str, Any]]:
  """(URI, rows) of every file of a URI."""
  scheme, _, rest = uri.partition(":")
  if scheme == "tfds":
    yield uri, _Tfds(rest, root)
    return
  if scheme == "images":
    yield uri, _Images(rest, root)
    return
  reader = {
    "jsonl": _Lines,
    "json": _List,
    "tsv": _Table,
    "parquet": _Parquet,
    "arrayrecord": _ArrayRecord,
  }[scheme]
  base = pathlib.Path(root or ".")
  found = sorted(base.glob(rest)) if is_pattern(rest) else [base / rest]
  for path in found:
    if not path.is_file():
      raise SourceError(
        f"{uri}: no file {path.absolute()}; check data.uri and data.root"
      )
    name = str(path.relative_to(base)) if is_pattern(rest) else rest
    try:
      rows = reader(path)
    except (OSError, ValueError, RuntimeError) as error:
      raise SourceError(
        f"{scheme}:{name}: cannot be read ({_short(error)}); expected a whole file of "
        f"that kind"
      ) from error
    yield f"{scheme}:{name}", rows


def is_pattern(path: str) -> bool:
  return not pathlib.PurePath(path).is_absolute() and any(c in path for c in "*?")


def _short(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).partition("\n")[0][:300]


# Offsets while they are gathered: a list of pairs would take nine times their 16 bytes.
numbers = functools.partial(array.array, "q")


class _Spans:
  """JSON texts that lie in a file between offsets."""

  def __init__(self, path: pathlib.Path, spans: array.array):
    self._spans = np.array(spans, np.int64).reshape(-1, 2)
    self._file = os.open(path, os.O_RDONLY)

  def __del__(self, close=os.close):  # when the interpreter ends, `os` is gone first
    if hasattr(self, "_file"):
      close(self._file)

  def __len__(self) -> int:
    return len(self._spans)

  def __getitem__(self, i: int) -> Any:
    start, end = (int(x) for x in self._spans[i])
    # pread has no file position, so threads may read at the same time.
    # The mark (BOM) that Windows puts before the first line is no part of it.
    return json.loads(os.pread(self._file, end - start, start).decode("utf-8-sig"))


class _Lines(_Spans):
  def __init__(self, path: pathlib.Path):
    spans, at = numbers(), 0
    with path.open("rb") as f:
      for line in f:
        if line.strip():
          spans.extend((at, at + len(line)))
        at += len(line)
    super().__init__(path, spans)


class _List(_Spans):
  def __init__(self, path: pathlib.Path):
    # Latin-1: a character is a byte, so that what the parser counts are offsets, and
    # what it looks for ([]{}",) is the same as in UTF-8.
    text = path.read_bytes().decode("latin-1")
    scan, spaces = json.JSONDecoder().raw_decode, " \t\r\n"

    def skip(at: int) -> int:
      while at < len(text) and text[at] in spaces:
        at += 1
      return at

    at, spans = skip(3 if text.startswith("\xef\xbb\xbf") else 0), numbers()
    if text[at : at + 1] != "[":
      raise SourceError("expected a list [...] of objects; a line each is jsonl:")
    at = skip(at + 1)
    while text[at : at + 1] != "]":
      try:
        _, end = scan(text, at)
      except RecursionError as error:
        raise SourceError(f"record {len(spans) // 2} is nested too deeply") from error
      spans.extend((at, end))
      at = skip(end)
      if text[at : at + 1] not in ("]", ","):
        raise SourceError(f"expected , or ] behind record {len(spans) // 2 - 1}")
      at = skip(at + (text[at] == ","))
    super().__init__(path, spans)


class _Table(_Spans):
  """A row begins behind a line break that stands in no quotes: base64 has none of either,
  so gigabytes are scanned without a parser.  Empty cells are left out."""

  def __init__(self, path: pathlib.Path):
    spans, at, begin, quotes = numbers(), 0, 0, 0
    with path.open("rb") as f:
      for line in f:
        at += len(line)
        quotes += line.count(b'"')
        if quotes % 2 == 0:
          spans.extend((begin, at))
          begin = at
    if quotes % 2:
      raise SourceError("a quote is opened and never closed")
    super().__init__(path, spans)
    self._names = self._cells(0) if spans else []
    self._spans = self._spans[1:]

  def __getitem__(self, i: int) -> dict[str, str]:
    cells = self._cells(i)
    if len(cells) != len(self._names):
      raise BadRecord(f"{len(cells)} cells; expected {len(self._names)}")
    return {k: v for k, v in zip(self._names, cells) if v != ""}

  def _cells(self, i: int) -> list[str]:
    start, end = (int(x) for x in self._spans[i])
    text = os.pread(self._file, end - start, start).decode("utf-8-sig")
    csv.field_size_limit(MOST_CELL)
    return next(csv.reader(io.StringIO(text, newline=""), delimiter="\t"), [])


class _Parquet:
  """Parquet reads whole row groups.  Small ones are kept; a large one is unpacked once
  into a file without a name in TMPDIR, some rows at a time, and read from there."""

  def __init__(self, path: pathlib.Path):
    import pyarrow.parquet as pq

    self._path = path
    # Buffered, not mapped: the pages of a mapped file count as memory of the process.
    self._file = pq.ParquetFile(path, memory_map=False, buffer_size=1 << 20)
    about = self._file.metadata
    self._groups = [about.row_group(g) for g in range(about.num_row_groups)]
    self._starts = [0, *itertools.accumulate(g.num_rows for g in self._groups)]
    self._kept: collections.OrderedDict[int, Any] = collections.OrderedDict()
    self._bytes = 0
    # Of a group that is unpacked: the first rows of its blocks, and where these end.
    self._unpacked: dict[int, tuple[list[int], list[int]]] = {}
    self._blocks: Any = None  # the file they are in
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._starts[-1]

  def __getitem__(self, i: int) -> dict:
    g = bisect.bisect_right(self._starts, i) - 1
    rows, at = self._rows(g, i - self._starts[g])
    return rows.slice(at, 1).to_pylist()[0]

  def _rows(self, g: int, at: int) -> tuple[Any, int]:
    """Some rows of a group, and the place of its row `at` among them."""
    import pyarrow as pa

    with self._lock:
      if self._groups[g].total_byte_size <= SMALL_GROUP:
        return self._group(g), at
      if g not in self._unpacked:
        try:
          self._unpacked[g] = self._unpack(g)
        except OSError as error:
          warnings.warn(
            f"{self._path}: a row group cannot be unpacked into {tempfile.gettempdir()} "
            f"({error}), so it is read whole for one record, which is slow. Give TMPDIR "
            f"a larger disk, or {REWRITE}",
            stacklevel=2,
          )
          self._unpacked[g] = ([], [])
      firsts, ends = self._unpacked[g]
      if not firsts:
        return self._group(g), at
    k = bisect.bisect_right(firsts, at) - 1
    start, end = ends[k], ends[k + 1]
    # pread has no file position, so threads may read at the same time.
    block = os.pread(self._blocks.fileno(), end - start, start)
    return pa.ipc.open_stream(block).read_all(), at - firsts[k]

  def _group(self, g: int):
    if g not in self._kept:
      self._kept[g] = self._file.read_row_group(g, use_threads=False)
      self._bytes += self._kept[g].nbytes
    self._kept.move_to_end(g)
    while len(self._kept) > 1 and self._bytes > KEPT:
      self._bytes -= self._kept.popitem(last=False)[1].nbytes
    return self._kept[g]

  def _unpack(self, g: int) -> tuple[list[int], list[int]]:
    """Writes a group as Arrow streams of some rows each: first rows, ends."""
    import pyarrow as pa

    if self._blocks is None:
      self._blocks = tempfile.TemporaryFile()  # noqa: SIM115
    file, about = self._blocks, self._groups[g]
    size = max(1, BLOCK * about.num_rows // about.total_byte_size)
    firsts, ends = [0], [file.seek(0, os.SEEK_END)]
    batches = self._file.iter_batches(size, row_groups=[g], use_threads=False)
    for batch in batches:
      with pa.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch)
      firsts.append(firsts[-1] + len(batch))
      ends.append(file.tell())
    file.flush()
    pa.default_memory_pool().release_unused()  # a page may be as large as the group
    return firsts, ends


class _Images:
  """Names of pictures, in the order of their letters; links to folders are not followed."""

  def __init__(self, rest: str, root):
    base = pathlib.Path(root or ".").resolve()
    try:
      full = resolve(rest, root, "folder")
      if full.is_dir():
        found = [
          (pathlib.Path(folder) / name).relative_to(base).as_posix()
          for folder, _, names in os.walk(full)
          for name in names
          if _shows(name)
        ]
      else:
        with zipfile.ZipFile(full) as archive:
          found = [f"zip:{rest}!{name}" for name in archive.namelist() if _shows(name)]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
      raise SourceError(
        f"images:{rest}: {_short(error)}; expected a folder, or a whole zip"
      ) from error
    if not found:
      raise SourceError(
        f"images:{rest}: no picture ({', '.join(PICTURES)}) is in {full}"
      )
    self._names = sorted(found)

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, i: int) -> dict:
    name = self._names[i]
    name.encode()  # a name that is no UTF-8 could not be written down
    return {"id": name, "image": name}


def _shows(name: str) -> bool:
  """Whether a file is a picture, by its name; ._a.jpg is what macOS puts beside it."""
  last = name.rpartition("/")[2]
  return last.lower().endswith(PICTURES) and not last.startswith(".")


class _ArrayRecord:
  def __init__(self, path: pathlib.Path):
    from array_record.python import array_record_data_source as array_record

    self._rows = array_record.ArrayRecordDataSource(str(path))

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> Any:
    return json.loads(self._rows[i].decode("utf-8"))


class _Tfds:
  def __init__(self, rest: str, root):
    import tensorflow_datasets as tfds

    name, _, split = rest.rpartition("/")
    folder = pathlib.Path(root or ".") / name
    try:
      if (folder / "dataset_info.json").is_file():
        builder = tfds.builder_from_directory(str(folder))
      else:
        builder = tfds.builder(name, data_dir=str(root) if root else None)
      pictures = {
        key: _undecoded(tfds)
        for key, feature in builder.info.features.items()
        if isinstance(getattr(feature, "feature", feature), tfds.features.Image)
      }
      self._rows = builder.as_data_source(split, decoders=pictures or None)
    except Exception as error:  # tfds raises a class of its own for every mistake
      raise SourceError(
        f"tfds:{rest}: {_short(error)}; expected tfds:NAME/SPLIT or tfds:FOLDER/SPLIT, "
        "prepared with file_format=array_record"
      ) from error

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> dict:
    return _texts(self._rows[i])


def _undecoded(tfds):
  """Pictures stay the bytes they are stored as; tfds forgot this for lists of them."""

  class Undecoded(tfds.decode.SkipDecoding):
    def decode_batch_example_np(self, example):
      return example

  return Undecoded()


def _texts(x: Any) -> Any:
  """Bytes that are UTF-8 become text: TFDS does not tell texts from pictures."""
  if isinstance(x, dict):
    return {k: _texts(v) for k, v in x.items()}
  if isinstance(x, np.ndarray):
    x = x.tolist()
  if isinstance(x, list):
    return [_texts(v) for v in x]
  if isinstance(x, bytes):
    try:
      return x.decode("utf-8")
    except UnicodeDecodeError:  # encoded pictures: PNG, JPEG and WebP never are
      return x
  return x
