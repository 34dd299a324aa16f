"""`pixel-jax bench accelerator`: it goes on, goes down in size, and tells what it saw."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from pixel_jax.tools.bench import accelerator, device

ROWS = [{"what": "a", "seconds": 2.0, "rate": 3.0, "unit": "tokens/s"}]


@pytest.fixture
def machine(monkeypatch):
  """Processes that end as a list says; what was asked of them."""
  asked, ends = [], []

  def run(command, **kwargs):
    if command[1] == "-c":  # the probe
      text = "\ncpu\t1\t0\tcpu\n"
      return subprocess.CompletedProcess(command, 0, text, "")
    asked.append(command[3:6])
    end = ends.pop(0) if ends else 0
    file = next(word for word in command if word.startswith("--json="))
    rows = end if isinstance(end, list) else ROWS
    if end in (0, "slow") or isinstance(end, list):
      pathlib.Path(file.removeprefix("--json=")).write_text(json.dumps(rows))
    if end == "slow":  # after its first row
      raise subprocess.TimeoutExpired(command, kwargs["timeout"])
    code = end if isinstance(end, int) else 0
    return subprocess.CompletedProcess(command, code)

  monkeypatch.setattr(accelerator.subprocess, "run", run)
  return asked, ends


def names(asked):
  return [words[0] for words in asked]


def test_a_second_call_measures_what_is_missing(machine, tmp_path, capsys):
  asked, ends = machine
  out = f"--out={tmp_path}"
  ends += [0, 1, "slow"]
  assert accelerator.main([out, "--only=exact,sft-3b,decode-7b"]) == 1
  told = json.loads((tmp_path / "report.json").read_text())["cases"]
  assert told["exact"]["rows"] == ROWS and "exit code 1" in told["sft-3b"]["failed"]
  assert "took more than the 90 s" in told["decode-7b"]["failed"]
  assert told["decode-7b"]["rows"] == ROWS
  ends += [1]  # a worse try does not take away what was measured
  assert accelerator.main([out, "--only=decode-7b"]) == 1
  told = json.loads((tmp_path / "report.json").read_text())["cases"]
  assert told["decode-7b"]["rows"] == ROWS
  assert "took more" in told["decode-7b"]["failed"]
  asked.clear()
  assert accelerator.main([out]) == 0
  assert names(asked) == [name for name in accelerator.CASES if name != "exact"]
  table = (tmp_path / "table.md").read_text()
  assert table.count("| a | 2.00 s | 3 tokens/s |") == len(accelerator.CASES)
  assert "1.00 times `generate`" in table and "Not run" not in table
  assert "measured before" in capsys.readouterr().out


def test_what_has_no_room_is_tried_smaller(machine, tmp_path):
  asked, ends = machine
  ends += [accelerator.NO_MEMORY, -9, 0, accelerator.NO_MEMORY, accelerator.NO_SMALLER]
  accelerator.main([f"--out={tmp_path}", "--only=sft-3b,rl-3b-lora"])
  tries = [(words[0], words[2]) for words in asked]
  first = [("sft-3b", f"--attempt={k}") for k in range(3)]
  assert tries == [*first, *(("rl-3b-lora", f"--attempt={k}") for k in range(2))]
  told = json.loads((tmp_path / "report.json").read_text())["cases"]
  assert told["sft-3b"]["smaller"] == 2
  assert "none of which the memory holds" in told["rl-3b-lora"]["failed"]


def test_unequal_numbers_are_a_failure(machine, tmp_path):
  _, ends = machine
  ends += [[{"what": "logits", "gap": 0.5, "allowed": 1e-4, "equal": False}]]
  assert accelerator.main([f"--out={tmp_path}", "--only=exact"]) == 1
  table = (tmp_path / "table.md").read_text()
  assert "| logits | 0.5 | 0.0001 |" in table and "not equal: logits" in table


def test_no_time_is_left(machine, tmp_path):
  asked, _ = machine
  assert accelerator.main([f"--out={tmp_path}", "--budget=1", "--only=exact"]) == 1
  assert not asked and "no time was left" in (tmp_path / "table.md").read_text()


def test_mistakes_in_the_command(machine, tmp_path, capsys):
  with pytest.raises(SystemExit):
    accelerator.main([f"--out={tmp_path}", "--only=decode"])
  assert "cases: exact, sft-7b-lora" in capsys.readouterr().err
  with pytest.raises(SystemExit, match="wants a GPU or a TPU"):
    accelerator.main([f"--out={tmp_path}", "--size=full"])


def test_a_case_measures_and_says_when_there_is_no_smaller_one(tmp_path):
  file = tmp_path / "rows.json"
  words = ["prefill-7b", "--size=tiny", f"--json={file}"]
  assert device.main(words) == 0
  (row,) = json.loads(file.read_text())
  assert row["rate"] == pytest.approx(2 * 64 / row["seconds"])
  assert row["forecast_bytes"] > 2 * 64 * 2 * 4  # the cache at least
  assert device.main([*words, "--attempt=1"]) == accelerator.NO_SMALLER


def test_the_forecast_decides_before_anything_runs(monkeypatch):
  class Small:
    def memory_stats(self):
      return {"bytes_limit": 1000, "peak_bytes_in_use": 1}

  with monkeypatch.context() as patch:
    patch.setattr(device.jax, "devices", lambda: [Small()])
    with pytest.raises(device.NoRoom):
      device.check_room(1001)
    device.check_room(1000)


def test_room_is_told_from_other_errors():
  class OutOfMemoryError(RuntimeError):
    """As torch's."""

  full = device.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
  assert all(map(device.is_room, (device.NoRoom(), OutOfMemoryError(), full)))
  other = device.jax.errors.JaxRuntimeError("INTERNAL: no kernel")
  assert not any(map(device.is_room, (other, RuntimeError("RESOURCE_EXHAUSTED"))))


@pytest.mark.slow
@pytest.mark.torch
def test_the_rehearsal(tmp_path):
  """All ten cases, as on a card but tiny."""
  command = [
    sys.executable, "-m", "pixel_jax", "bench", "accelerator", f"--out={tmp_path}",
    "--budget=1500",
  ]  # fmt: skip
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1600)
  assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()
  report = json.loads((tmp_path / "report.json").read_text())
  assert list(report["cases"]) == list(accelerator.CASES)
  rows = [row for case in report["cases"].values() for row in case["rows"]]
  assert all(row["equal"] for row in rows if "gap" in row)
  assert all(row["rate"] > 0 for row in rows if "rate" in row)


def test_the_script_wants_its_wheels(tmp_path):
  """Typed from another folder, and typed wrong."""
  script = pathlib.Path(__file__).parent.parent / "launch/accelerator.sh"

  def told(*words, root=script):
    done = subprocess.run([root, *words], cwd=tmp_path, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr

  assert told("--help")[0] == 0 and "accelerator.sh pack" in told("--help")[1]
  assert told("rum")[0] == 2 and told("run")[0] == 2
  copy = tmp_path / "launch" / script.name
  copy.parent.mkdir()
  copy.write_bytes(script.read_bytes())
  copy.chmod(0o755)
  code, said = told("run", "figures", root=copy)
  assert code == 2 and "holds no wheels" in said and "pack" in said
