"""What a setting may be, told in the signature of the function that takes it.

  def make(*, lr: PositiveFloat, schedule: Literal["cosine", "constant"] = "cosine")

`checked` functions refuse what their hints do not allow, and `run/settings.py` asks the
same of every field of a config before a run begins.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import (
  Annotated,
  Any,
  Literal,
  TypeVar,
  Union,
  get_args,
  get_origin,
  get_type_hints,
)

from annotated_types import Ge, Gt, Le, Len, Lt


@dataclasses.dataclass(frozen=True)
class ZeroOrAbove:
  """A bound for what is off at 0."""

  above: float


Number = float | int
PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[Number, Gt(0)]
NonNegativeFloat = Annotated[Number, Ge(0)]
Share = Annotated[Number, Ge(0), Le(1)]
Seed = Annotated[int, Ge(0), Lt(2**31)]

Function = TypeVar("Function", bound=Callable)


def checked(function: Function) -> Function:
  """A function, or an `__init__`, with a ValueError for what its hints do not allow."""
  signature = inspect.signature(function)

  @functools.wraps(function)
  def call(*args, **kwargs):
    check(function, signature.bind(*args, **kwargs).arguments)
    return function(*args, **kwargs)

  return call


def check(function: Callable, arguments: Mapping[str, Any]) -> None:
  """ValueError where an argument is not what a hint of a function or class says.

  Hints without a range and without choices are left to the function.
  """
  for name, hint in hints(function).items():
    given = name in arguments and _is_declared(hint)
    if why := refusal(hint, arguments[name]) if given else "":
      raise ValueError(f"{name}={arguments[name]!r}: {why}")


@functools.cache
def hints(function: Callable) -> dict[str, Any]:
  """What the arguments of a function, or the fields of a class, may be."""
  if isinstance(function, type) and function.__init__ is not object.__init__:
    fields = getattr(function, "__dataclass_fields__", None)
    if fields is None and not hasattr(function, "__required_keys__"):  # a TypedDict
      function = function.__init__
  return get_type_hints(function, include_extras=True)


def refusal(hint: Any, value: Any) -> str:
  """What was expected, and what is near, where `value` is not what `hint` says; ""."""
  if allows(hint, value):
    return ""
  told = f"expected {words(hint)}"
  wrong = [value] if isinstance(value, str) else value
  if isinstance(wrong, list | tuple):
    known = choices(hint)
    for word in (w for w in wrong if isinstance(w, str) and w not in known):
      if near := difflib.get_close_matches(word, known, 1, cutoff=0.6):
        return f"{told}; did you mean {near[0]}?"
  return told


def allows(hint: Any, value: Any) -> bool:
  """Whether `value` is what `hint` says.  An int is a float, a bool is neither; NaN and
  infinities are no numbers."""
  origin, args = get_origin(hint), get_args(hint)
  if hint is Any:
    return True
  if origin is Annotated:
    return allows(args[0], value) and all(_within(m, value) for m in args[1:])
  if origin in (Union, types.UnionType):
    return any(allows(a, value) for a in args)
  if origin is Literal:
    return any(type(value) is type(a) and value == a for a in args)
  if hint in (int, float):
    return (
      isinstance(value, int if hint is int else int | float)
      and not isinstance(value, bool)
      and math.isfinite(value)
    )
  if _is_sequence(hint):
    return isinstance(value, list | tuple) and all(allows(args[0], x) for x in value)
  if origin is Mapping or hint is Mapping:
    # A ConfigDict has items, but is no Mapping.
    return hasattr(value, "items") and all(
      allows(args[0], k) and allows(args[1], v) for k, v in value.items() if args
    )
  return value is None if hint in (None, type(None)) else isinstance(value, hint)


def flat(
  tree: Mapping[str, Any], separator: str = ".", before: str = ""
) -> dict[str, Any]:
  """The leaves of nested mappings by path: {"optim.lr": .001, ...}."""
  found: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      found |= flat(value, separator, f"{before}{key}{separator}")
    else:
      found[before + key] = value
  return found


def words(hint: Any) -> str:
  """What a hint allows, as the end of "expected ..."."""
  origin, args = get_origin(hint), get_args(hint)
  if origin is Annotated:
    return " ".join([words(args[0]), *filter(None, map(_bound, args[1:]))])
  if origin in (Union, types.UnionType):
    parts = [a for a in args if not (a is int and float in args) and not _is_array(a)]
    return " or ".join(dict.fromkeys(map(words, parts)))
  if origin is Literal:
    return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
  if _is_sequence(hint):
    return f"a tuple, each {words(args[0])}"
  if origin is Mapping or hint is Mapping:
    return f"a mapping to {words(args[1])}" if args else "a mapping"
  plain = {
    bool: "True or False", int: "a whole number", float: "a number", str: "a text",
    pathlib.Path: "a path", None: "None", type(None): "None",
  }  # fmt: skip
  return plain.get(hint) or f"a {hint.__name__}"


def choices(hint: Any) -> list[str]:
  """The words that a hint allows, to name the nearest of them."""
  if get_origin(hint) is Literal:
    return [a for a in get_args(hint) if isinstance(a, str)]
  return [c for a in get_args(hint) for c in choices(a)]


def _is_declared(hint: Any) -> bool:
  """Whether a hint has a range or choices."""
  if get_origin(hint) in (Annotated, Literal):
    return True
  return any(_is_declared(a) for a in get_args(hint))


def _is_sequence(hint: Any) -> bool:
  """tuple[X, ...] or Sequence[X]."""
  return get_origin(hint) in (tuple, list, Sequence)


def _is_array(hint: Any) -> bool:
  return isinstance(hint, type) and hint.__module__.startswith("jax")


def _within(bound: Any, value: Any) -> bool:
  match bound:
    case Gt(gt):
      return value > gt
    case Ge(ge):
      return value >= ge
    case Lt(lt):
      return value < lt
    case Le(le):
      return value <= le
    case ZeroOrAbove(above):
      return value == 0 or value > above
    case Len(fewest, most):
      return fewest <= len(value) <= (math.inf if most is None else most)
  return True


def _bound(bound: Any) -> str:
  match bound:
    case Gt(gt):
      return f"above {gt}"
    case Ge(ge):
      return f"of {ge} or more"
    case Lt(lt):
      return f"below {lt}"
    case Le(le):
      return f"up to {le}"
    case ZeroOrAbove(above):
      return f"that is 0 or above {above}"
    case Len(fewest, most):
      return f"({fewest} of them)" if fewest == most else f"({fewest} or more of them)"
  return ""
