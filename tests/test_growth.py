"""tools/bench/growth.py and parts.py: slopes, pictures and sums are what was measured."""

import json
import xml.etree.ElementTree as xml

import pytest

from pixel_jax.tools.bench import growth, parts


def test_slopes():
  sizes = (10, 100, 1000, 10_000)
  assert growth.slope([(n, 3.0 * n) for n in sizes]) == pytest.approx(1)
  assert growth.slope([(n, n**2 / 7) for n in sizes]) == pytest.approx(2)
  # What costs the same at first and then grows: the larger half counts.
  assert growth.slope([(n, max(1.0, n / 100)) for n in sizes]) == pytest.approx(1)
  assert growth.slope([(n, 5.0) for n in (1, 2, 4)]) == pytest.approx(0)


def test_the_report_shows_what_was_measured(tmp_path, monkeypatch, capsys):
  asked = []

  def measure(n):
    asked.append(n)
    return n / 100

  for name in ("rows", "memory"):
    case = growth.CASES[name]
    case = growth.dataclasses.replace(case, sizes=(2, 4, 8), measure=measure)
    monkeypatch.setitem(growth.CASES, name, case)
  assert growth.main([f"--out={tmp_path}", "--only=memory"]) == 0
  assert growth.main([f"--out={tmp_path}", "--only=rows"]) == 0  # the other one stays
  assert asked == [2, 4, 8] * 2
  told = json.loads((tmp_path / "growth.json").read_text())
  assert told["cases"]["rows"] == [[2, 0.02], [4, 0.04], [8, 0.08]]
  table = (tmp_path / "growth.md").read_text()
  assert "| Train step | rows | 20 ms at 2 | 80 ms at 8 | 1.00 |" in table
  assert "| Memory of a source | records | 0.02 MiB at 2 | 0.08 MiB at 8 |" in table
  drawn = xml.fromstring((tmp_path / "growth.svg").read_text())
  text = [node.text for node in drawn.iter() if node.tag.endswith("text")]
  assert "Train step" in text and "records" in text and "8" in text
  with pytest.raises(SystemExit):
    growth.main([f"--out={tmp_path}", "--only=row"])
  assert "cases: rows, context" in capsys.readouterr().err


def test_a_source_is_opened_and_read(tmp_path, capsys):
  growth.write_records(tmp_path / "all.jsonl", 25)
  growth.open_here(str(tmp_path))
  told = json.loads(capsys.readouterr().out)
  assert 0 < told["seconds"] < 600 and told["mib"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("name", growth.CASES)
def test_every_case_is_measured(name):
  case = growth.CASES[name]
  assert case.measure(min(case.sizes)) > 0


TEXT = """HloModule jit_update

%fused (p0: f32[8,4], p1: f32[4,2]) -> f32[8,2] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = f32[4,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,2]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[8,4], b: f32[4,2]) -> f32[8,2] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[4,2]{1,0} parameter(1)
  %ynn_fusion = f32[8,2]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused, metadata={op_name="jit(update)/BTD,DF->BTF/dot_general"}
  %dot.7 = f32[8,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(update)/BTD,DV->BTV/dot_general"}
  %copy_fusion = f32[2,8]{1,0} fusion(%dot.7), kind=kLoop, calls=%other, metadata={op_name="jit(update)/x"}
  ROOT %while.3 = f32[8,2]{1,0} while(%dot.7), condition=%c, body=%fused
}
"""  # noqa: E501


def test_parts_add_up_to_what_was_spent():
  names = ("ynn_fusion", "dot.7", "copy_fusion", "while.3")
  spent = dict(zip(names, (3.0, 2.0, 0.5, 9.0)))
  found = parts.add_up(TEXT, spent, dict.fromkeys(names, 10))
  by = {part["part"]: part for part in found}
  assert [p["seconds"] for p in found] == [3.0, 2.0, 0.5]  # a loop's time is its body's
  each = 2 * 8 * 2 * 4 * 10 / 1e9
  assert by["matmuls with weights"]["gflop"] == pytest.approx(each)
  assert by["matmuls of the head"]["gflop"] == pytest.approx(each)
  assert by["copies and transposes"]["gflop"] == 0
  assert "55%" in list(parts.cells(by["matmuls with weights"], 5.5, 1.0))
