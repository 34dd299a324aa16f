"""What the text of a compiled program says: collectives and the largest arrays.

Reads `compiled.as_text()`, the scheduled program of one device.  A collective inside a
loop is counted as often as the loop turns, where the loop says how often: layers do;
the loop over scored tokens, whose end is data, counts once and holds none.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

SIZES = {
  "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4,
  "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
CLOSE = re.compile(r"\}(, execution_thread=.*)?$")  # of a v5p's sparse core, too
LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
CALL = re.compile(r"(calls|to_apply|body|condition)=%?([\w.\-]+)")
ALONE = re.compile(r"replica_groups=(\{\{\d+\}|\[\d+,1\])")  # moves nothing
CALLS = re.compile(r"(branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Op:
  name: str
  kind: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, shape) of what it gives
  rest: str  # operands and attributes

  @property
  def bytes(self) -> int:
    return sum(SIZES.get(d, 0) * math.prod(shape) for d, shape in self.arrays)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One line of the program.

  times: how often it runs, as far as loops tell; loop: it lies in one; bytes: that come
  in over the links each time.
  """

  kind: str
  dtype: str
  shape: tuple[int, ...]  # of its largest array
  bytes: int
  times: int
  loop: bool
  where: str  # the op_name that jax gave it

  @property
  def total(self) -> int:
    return self.bytes * self.times


def parse(text: str) -> tuple[dict[str, list[Op]], str]:
  """(computation -> its lines, the name of the entry)."""
  program: dict[str, list[Op]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if current is None:
      if head := HEADER.match(line):
        current = program.setdefault(head[2], [])
        entry = head[2] if head[1] else entry
    elif CLOSE.match(line):  # texts inside attributes have lines that begin with one
      current = None
    elif m := LINE.match(line):
      name, result, kind, rest = m.groups()
      arrays = tuple(
        (d, tuple(int(x) for x in s.split(",") if x)) for d, s in ARRAY.findall(result)
      )
      current.append(Op(name, kind, arrays, rest))
  return program, entry


def collectives(text: str) -> list[Collective]:
  """All that a run of the program executes, wherever they hide."""
  program, entry = parse(text)
  return list(_collectives(program, entry, 1, False))


def _collectives(program, name, times, loop) -> Iterator[Collective]:
  ops = program[name]
  sizes = {op.name: op.bytes for op in ops}
  for op in ops:
    kind = op.kind.removesuffix("-start")
    if kind in KINDS and not ALONE.search(op.rest):
      operands = re.findall(r"%([\w.\-]+)", op.rest.split(")")[0])
      given = sum(sizes.get(o, 0) for o in operands)
      got = op.bytes - given * (op.kind != kind)  # of "-start": (operands, results)
      d, shape = max(op.arrays, key=lambda a: SIZES.get(a[0], 0) * math.prod(a[1]))
      moved = {"all-reduce": 2 * given, "reduce-scatter": given}.get(kind, got)
      where = re.search(r'op_name="([^"]*)"', op.rest)
      yield Collective(kind, d, shape, moved, times, loop, where[1] if where else "")
    called = [c for how, c in CALL.findall(op.rest) if how != "condition"]
    for _, names in CALLS.findall(op.rest):
      called += re.findall(r"%?([\w.\-]+)", names)
    turns = _turns(program, op) if op.kind == "while" else 1
    for c in called:
      if c in program:
        yield from _collectives(program, c, times * turns, loop or op.kind == "while")


def _turns(program, loop: Op) -> int:
  """How often a loop turns; 1 where its end is not a constant."""
  if known := re.search(r"known_trip_count[^0-9]*(\d+)", loop.rest):
    return int(known[1])
  condition = dict(CALL.findall(loop.rest))["condition"]
  ops = {op.name: op for op in program.get(condition, ())}
  for op in ops.values():
    if op.kind != "compare":
      continue
    for name in re.findall(r"%([\w.\-]+)", op.rest.split(")")[0]):
      if name in ops and ops[name].kind == "constant":
        return int(ops[name].rest.split(")")[0])
  return 1


def arrays(text: str) -> collections.Counter:
  """(dtype, shape) -> lines that write such an array to memory; not inside fusions."""
  program, _ = parse(text)
  fused = {
    c
    for ops in program.values()
    for op in ops
    if op.kind == "fusion"
    for how, c in CALL.findall(op.rest)
    if how == "calls"
  }
  return collections.Counter(
    a
    for name, ops in program.items()
    if name not in fused
    for op in ops
    if op.kind not in ("parameter", "get-tuple-element", "tuple", "bitcast")
    for a in op.arrays
  )


def summary(found: list[Collective], smallest: int = 2**20) -> list[dict]:
  """Those of at least `smallest` bytes in all, added up by kind, dtype and loop."""
  total: dict[tuple, list[int]] = {}
  for c in found:
    count = total.setdefault((c.kind, c.dtype, c.loop), [0, 0])
    count[0] += c.times
    count[1] += c.total
  return [
    dict(kind=kind, dtype=dtype, in_loop=loop, count=count, bytes=size)
    for (kind, dtype, loop), (count, size) in sorted(total.items())
    if size >= smallest
  ]
