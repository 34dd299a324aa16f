"""The rules of benchmarks against what the programs that they are named after returned."""

import json
import pathlib
import time

import pytest

from pixel_jax.evals import rules

GOLDEN = pathlib.Path(__file__).parent / "golden" / "rules"


def given(family):
  if family.startswith("anls_"):
    cases = json.loads((GOLDEN / "anls.json").read_text())
    which = family.removeprefix("anls_")
    return [({k: c[k] for k in ("prediction", "answers")}, c[which]) for c in cases]
  cases = json.loads((GOLDEN / f"{family}.json").read_text())
  return [
    ({k: v for k, v in c.items() if k != "expected"}, c["expected"]) for c in cases
  ]


@pytest.mark.parametrize("family", rules.FAMILIES)
def test_every_case_of_the_oracle(family):
  wrong = []
  for fields, expected in given(family):
    got = rules.FAMILIES[family](**fields)
    if got != expected:
      wrong.append((fields, expected, got))
  assert not wrong, f"{len(wrong)} of them, the first: {wrong[0]}"


def test_the_oracle_has_a_file_for_every_rule():
  files = {f.stem for f in GOLDEN.glob("*.json")} - {"anls"}
  assert files == {f for f in rules.FAMILIES if not f.startswith("anls_")}


def test_half_a_similarity_counts():
  assert rules.anls("a", ["ab"]) == 0.5


HOSTILE = (
  "9" * 10**6, "{" * 10**6, "\\boxed{" * 10**5, "<box>" * 2 * 10**5, "[1," * 10**5,
  "(A) " * 10**5, "answer is " * 10**5, "a, " * 10**5, "\\text{" * 10**5, " " * 10**6,
  "<box>[" + "9" * 10**6 + ",1,2,3]</box>",
)  # fmt: skip


@pytest.mark.parametrize("family", rules.FAMILIES)
def test_hostile_answers_cost_little(family):
  fields, _ = given(family)[0]
  if "prediction" not in fields:
    return
  for text in HOSTILE:
    begun = time.process_time()
    rules.FAMILIES[family](**{**fields, "prediction": text})
    assert time.process_time() - begun < 30  # quadratic time would be minutes
