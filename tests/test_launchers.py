"""Launchers of pods: with programs on PATH that record how they were called, a real run
executes exactly what its dry run printed; docs/launch.md shows that; secrets stay hidden.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOC = ROOT / "docs" / "launch.md"
JOB = ["train_rl", "--config=configs/rl.py:7b", "--workdir=gs://bucket/rl",
       "--config.policies=RL alpha=0=x"]  # fmt: skip
VM = ["launch/tpu_vm.sh", "--name=pod", "--zone=us-east5-a"]
QUEUE = [*VM, "--accelerator=v5p-128", "--slices=2", "--spot"]
GKE = ["launch/gke.sh", "--name=pod", "--cluster=c", "--zone=us-east5-a", "--project=p",
       "--accelerator=v5p-128", "--slices=2"]  # fmt: skip
SLURM = ["launch/slurm.sbatch"]
SECRET = "s3cr3t with 'quotes' $HOME"

# Writes its arguments, then does what the cloud would, or what the real program does.
FAKE = """#!{python} -S
import json, os, pathlib, subprocess, sys
name, args, here = pathlib.Path(sys.argv[0]).name, sys.argv[1:], pathlib.Path({here!r})
real = {{"git": {git!r}, "tar": {tar!r}}}.get(name)
if real is None or "archive" in args or name == "tar":
  with (here / "calls").open("a") as f:
    f.write(json.dumps([name, *args]) + "\\n")
if real:
  sys.exit(subprocess.run([real, *args]).returncode)
def take(file, default):
  lines = (here / file).read_text().splitlines() if (here / file).exists() else []
  (here / file).write_text("".join(x + "\\n" for x in lines[1:]))
  return lines[0] if lines else default
if "describe" in args:
  state = take("states", "ACTIVE")
  print(state)
  sys.exit(state == "")
if "scp" in args:
  secrets = pathlib.Path(args[args.index("scp") + 2])
  (here / "sent").write_text(oct(secrets.stat().st_mode & 0o777) + secrets.read_text())
if "ssh" in args or name == "srun":
  sys.exit(int(take("codes", "0")))
if name == "xpk":
  files = pathlib.Path(next(a for a in args if a.startswith("--script-dir"))[13:])
  env = pathlib.Path(next(a for a in args if a.startswith("--env-file"))[11:])
  (here / "sent").write_text(env.read_text() + str((files / "launch/worker.sh").exists()))
"""


class Cloud:
  """A PATH on which gcloud, xpk and SLURM only say that they were called."""

  def __init__(self, here: pathlib.Path):
    self.here = here
    (here / "bin").mkdir()
    text = FAKE.format(
      python=sys.executable, here=str(here),
      git=shutil.which("git"), tar=shutil.which("tar"),
    )  # fmt: skip
    for name in ("gcloud", "xpk", "srun", "env", "git", "tar", "scontrol", "scancel"):
      (here / "bin" / name).write_text(text)
      (here / "bin" / name).chmod(0o755)

  def launch(self, *command, **env):
    drop = ("SLURM", "XDG", "WANDB", "OPENAI")
    keep = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    return subprocess.run(
      ["bash", *command], cwd=ROOT, capture_output=True, text=True, timeout=600,
      env=keep | {"HOME": str(self.here), "HF_TOKEN": SECRET, "PIXEL_JAX_POLL": "0",
                  "PATH": f"{self.here / 'bin'}:{os.environ['PATH']}"} | env,
    )  # fmt: skip

  def calls(self):
    file = self.here / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    file.write_text("")
    return [json.loads(line) for line in lines]

  def say(self, file, *lines):
    (self.here / file).write_text("".join(f"{x}\n" for x in lines))


@pytest.fixture
def cloud(tmp_path):
  return Cloud(tmp_path)


def printed(done):
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  return [shlex.split(line) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("command", [VM, QUEUE, GKE, SLURM])
def test_a_real_run_executes_what_the_dry_run_printed(command, cloud):
  shown = cloud.launch(*command, "--dry-run", *JOB)
  assert not cloud.calls() and not (cloud.here / ".cache").exists()
  if command == QUEUE:
    cloud.say("states", "", "ACTIVE")
  done = cloud.launch(*command, *JOB, SLURM_JOB_ID="7")
  assert done.returncode == 0, done.stderr
  calls = cloud.calls()
  if command == QUEUE:  # a real run first asks whether it is there
    assert "describe" in calls.pop(1)
  assert calls == printed(shown)


@pytest.mark.parametrize("command", [VM, QUEUE, GKE, SLURM])
def test_secrets_are_neither_shown_nor_put_on_a_command_line(command, cloud):
  shown = cloud.launch(*command, "--dry-run", *JOB)
  done = cloud.launch(*command, *JOB, SLURM_JOB_ID="7")
  said = shown.stdout + shown.stderr + done.stdout + done.stderr + str(cloud.calls())
  assert done.returncode == 0 and "s3cr3t" not in said
  if command in (VM, QUEUE):
    sent = (cloud.here / "sent").read_text()
    assert sent.startswith("0o600")
    told = subprocess.run(
      ["bash", "-c", sent.removeprefix("0o600") + 'printf %s "$HF_TOKEN"'],
      capture_output=True, text=True,
    )  # fmt: skip
    assert told.stdout == SECRET
    assert not list(cloud.here.rglob("secrets.env"))
  if command == GKE:  # a name: xpk takes the value from the environment
    assert (cloud.here / "sent").read_text() == "HF_TOKEN\nTrue"


def test_what_was_preempted_is_queued_again(cloud):
  cloud.say(
    "states", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"
  )
  cloud.say("codes", "255", "0")
  done = cloud.launch(*QUEUE, *JOB)
  assert done.returncode == 0, done.stderr
  verbs = [c[4] for c in cloud.calls() if c[0] == "gcloud"]
  first = ["describe", "describe", "scp", "ssh", "describe"]
  assert verbs == [*first, "describe", "delete", "create", "describe", "scp", "ssh"]


@pytest.mark.parametrize("code", ["143", "255"])
def test_what_was_told_to_stop_or_lost_its_connection_goes_on(code, cloud):
  cloud.say("codes", code, "0")
  done = cloud.launch(*QUEUE, *JOB)
  assert done.returncode == 0, done.stderr
  verbs = [c[4] for c in cloud.calls() if c[0] == "gcloud"]
  assert verbs == ["describe", "scp", "ssh", "describe", "describe", "scp", "ssh"]


def test_a_program_that_fails_is_not_run_again(cloud):
  cloud.say("codes", "3")
  done = cloud.launch(*QUEUE, *JOB)
  assert done.returncode == 3 and "ended with 3" in done.stderr
  assert sum("ssh" in c for c in cloud.calls()) == 1


@pytest.mark.parametrize("code, requeued", [("0", 0), ("143", 1), ("1", 0)])
def test_slurm_queues_what_was_told_to_stop_again(code, requeued, cloud):
  cloud.say("codes", code)
  done = cloud.launch(*SLURM, *JOB, SLURM_JOB_ID="7")
  assert done.returncode == int(code)
  assert cloud.calls().count(["scontrol", "requeue", "7"]) == requeued


@pytest.mark.parametrize(
  "command, told",
  [
    ([*VM, "--fast", *JOB], "--fast"),
    ([*VM, "train_dpo"], "train_dpo"),
    ([*VM, JOB[0], JOB[1], "--workdir=/tmp/x"], "share no disk"),
    ([*VM, JOB[0], JOB[2]], "--config="),
    ([*SLURM, JOB[0], JOB[1]], "--workdir="),
    (["launch/tpu_vm.sh", "--name=a;b", *JOB], "--name=a;b"),
    ([*VM, "--accelerator=v9-8", *JOB], "--runtime"),
    ([*VM, "--slices=2", *JOB], "--accelerator"),
    ([*GKE[:2], *JOB], "--cluster"),
    ([*VM, JOB[0], "--config=configs/rll.py:7b", JOB[2]], "no file configs/rll.py"),
    (
      [*VM, "--accelerator=v5p-64", JOB[0], "--config=rl:7b,v5p:4x4x4", JOB[2]],
      "rl:7b,v5p:4x4x4 is laid out for v5p-128",
    ),
    ([*SLURM, *JOB], "sbatch"),
  ],
)
def test_a_mistake_is_told_in_a_line(command, told, cloud):
  done = cloud.launch(*command)
  assert done.returncode == 2 and told in done.stderr and not cloud.calls()
  assert done.stderr.count("\n") == 1


# ---- docs/launch.md ------------------------------------------------------------------


def transcripts():
  blocks = re.findall(
    r"^```\n\$ (\./launch/.*?)^```", DOC.read_text(), flags=re.M | re.S
  )
  return [tuple(b.partition("\n")[::2]) for b in blocks]


@pytest.mark.parametrize("command, output", transcripts())
def test_the_docs_show_what_a_dry_run_prints(command, output, cloud):
  done = cloud.launch(*shlex.split(command), HOME="/home/you")
  assert done.returncode == 0, done.stderr
  said = re.sub(r"\b[0-9a-f]{12}\b", "0123456789ab", done.stdout)
  assert said == output


def test_the_docs_show_every_launcher():
  shown = {command.split()[0] for command, _ in transcripts()}
  assert shown == {"./launch/tpu_vm.sh", "./launch/gke.sh", "./launch/slurm.sbatch"}


# ---- XPK -----------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("xpk"), reason="xpk is not installed")
def test_xpk_takes_the_command(cloud):
  """Its own dry run: the manifest has our command, two slices and the environment."""
  (line,) = (c for c in printed(cloud.launch(*GKE, "--dry-run", *JOB)) if c[0] == "xpk")
  box = cloud.here / ".cache" / "pixel_jax" / "pod"
  (box / "code").mkdir(parents=True)
  (box / "env").write_text("HF_TOKEN\n")
  done = subprocess.run(
    [*line, "--dry-run", "--skip-validation"], capture_output=True, text=True, timeout=600,
    env=os.environ | {"HF_TOKEN": "dummy"},
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  command = next(w for w in line if w.startswith("--command="))[10:]
  assert f"({command}) & PID=$!" in done.stdout and "exec launch/worker.sh" in command
  assert 'name: HF_TOKEN\n                  value: "dummy"' in done.stdout
  assert re.search(r"replicas: 2\b", done.stdout) and "tpu-v5p-slice" in done.stdout
  assert re.search(r"values: \[.*\b143\b", done.stdout)  # is started again


# ---- launch/worker.sh ----------------------------------------------------------------

PROGRAM = """
import os, signal, sys, time
print("arguments", sys.argv[1:], flush=True)
print({k: v for k, v in os.environ.items() if k.startswith("JAX_")}, flush=True)
print("token", os.environ.get("HF_TOKEN") == "hush", flush=True)
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
if "--wait" in sys.argv: time.sleep(60)
sys.exit(3 if "--fail" in sys.argv else 0)
"""


@pytest.fixture
def worker(tmp_path):
  """Starts launch/worker.sh with a venv whose `python -m pixel_jax...` is PROGRAM."""
  venv = tmp_path / "venv" / "bin"
  venv.mkdir(parents=True)
  (tmp_path / "program.py").write_text(PROGRAM)
  (venv / "python").write_text(
    f'#!/bin/bash\n[ "$1" != -m ] || {{ shift 2; set -- {tmp_path}/program.py "$@"; }}\n'
    f'exec {sys.executable} "$@"\n'
  )
  (venv / "pip").write_text("#!/bin/bash\n")
  (tmp_path / "scontrol").write_text("#!/bin/bash\necho node7; echo node8\n")
  for file in (venv / "python", venv / "pip", tmp_path / "scontrol"):
    file.chmod(0o755)

  def start(*arguments, **env):
    return subprocess.Popen(
      ["bash", "launch/worker.sh", "train_sft", f"--workdir={tmp_path}/run", *arguments],
      cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env=os.environ | {
        "PYTHON": sys.executable, "VENV": os.path.relpath(venv.parent, ROOT),
        "TMPDIR": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}",
      } | env,
    )  # fmt: skip

  return start


def ends(process, timeout=600):
  said, _ = process.communicate(timeout=timeout)
  return process.returncode, said


def wait_for(condition, timeout=600):
  until = time.monotonic() + timeout
  while not condition():
    assert time.monotonic() < until, "timed out"
    time.sleep(0.05)


def test_a_worker_runs_the_program_and_keeps_its_log(worker, tmp_path):
  secrets = tmp_path / "secrets.env"
  secrets.write_text("HF_TOKEN=hush\n")
  code, said = ends(worker("--config.x=a b", SECRETS=str(secrets)))
  assert code == 0 and "'--config.x=a b'" in said and "token True" in said
  assert "hush" not in said and not secrets.exists()
  (log,) = (tmp_path / "run" / "logs").iterdir()
  assert "token True" in log.read_text()
  assert ends(worker("--fail"))[0] == 3


def test_a_worker_that_was_told_to_stop_says_so(worker, tmp_path):
  """And one that is started a second time follows the first."""
  process = worker("--wait")
  logs = lambda: [f.read_text() for f in tmp_path.glob("pixel_jax-*/*/log")]  # noqa: E731
  wait_for(lambda: any("token" in text for text in logs()))
  other = worker("--wait")
  assert "following" in other.stdout.readline()
  process.send_signal(signal.SIGTERM)
  code, said = ends(process)
  assert code == 143 and "saved" in said and "ended with 0" in said
  assert ends(other)[0] == 143


def test_slurm_gives_a_process_all_gpus_of_its_node(worker):
  code, said = ends(
    worker(
      SLURM_NTASKS="2", SLURM_PROCID="1", SLURM_JOB_ID="8195", SLURM_GPUS_ON_NODE="4",
      SLURM_JOB_NODELIST="node[7-8]",
    )
  )  # fmt: skip
  assert code == 0
  for told in ("node7:61443", "'JAX_NUM_PROCESSES': '2'", "'JAX_PROCESS_ID': '1'",
               "'JAX_LOCAL_DEVICE_IDS': '0,1,2,3'"):  # fmt: skip
    assert told in said
