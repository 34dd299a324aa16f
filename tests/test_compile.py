"""tools/compile/check.py: its programs are training's, and what it reads is right."""

import contextlib
import importlib.util
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from pixel_jax import parallel
from pixel_jax.configs import pods, rl, sft
from pixel_jax.rollout import placement
from pixel_jax.tools.compile import check as compile_check
from pixel_jax.tools.compile import cost, hlo, table
from pixel_jax.tools.compile import engine as compile_engine
from pixel_jax.tools.compile import programs as compile_programs

FLOATS = ("bf16", "f32")
EFFORTS = ("jax_exec_time_optimization_effort", "jax_optimization_level")
HAS_TPU_COMPILER = importlib.util.find_spec("libtpu") is not None


def open_tiny(module, devices, **mesh):
  config = module.get_config("tiny")
  config.mesh.update(mesh)
  config.model.update(scan_layers=True, dtype="bfloat16")
  return compile_programs.open_run(config, devices)


def compile_update(run):
  (update,) = compile_programs.programs(run)
  return hlo.collectives(update.lower().compile().as_text())


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False])
def test_rows_stay_where_they_are(told, monkeypatch):
  """Left alone XLA cut the tower along its weights and gave all rows to all devices."""
  if not told:  # as it was: the test can fail
    monkeypatch.setattr(parallel, "on", lambda mesh: contextlib.nullcontext())
  run = open_tiny(sft, jax.devices(), fsdp=8)
  found = compile_update(run)
  data, vocab = run.config.data, run.model.text.vocab
  head = [c for c in found if vocab in c.shape]
  rest = [c for c in found if vocab not in c.shape]
  rows = [c for c in rest if c.dtype in FLOATS and c.shape[:1] == (data.rows,)]
  assert bool(rows) != told
  # The head is gathered once and its gradient added up once, not chunk by chunk.
  assert head and any(c.loop for c in head) != told


def test_every_program_of_a_run_is_found():
  """As many of the engine as it declares, all of which lower with these arguments."""
  run = open_tiny(rl, jax.devices()[:1])
  train = list(compile_programs.programs(run))
  assert [p.name for p in train] == ["logp", "gradient", "apply"]
  rollout = list(compile_engine.programs(run))
  names = [p.name for p in rollout]
  assert len(set(names)) == len(names)
  e = run.config.engine
  longest = e.max_prompt, max(e.max_prompt, e.max_len - e.max_prompt)
  views = sum(len({n, *(v for v in e.views if v < n)}) for n in longest)
  lanes = len({e.slots, e.slots // 2, e.slots // 4})
  sizes = len(compile_engine.pictures.row_sizes(e.patches))
  once = {"reshard", "open", "move", "place"}
  assert once <= set(names)
  assert len(names) == len(once) + sizes + views + lanes  # Engine.declared
  for kind in (
    "vision",
    "prompt",
    "turn",
    "decode",
    "move",
    "place",
    "open",
    "reshard",
  ):
    next(p for p in rollout if p.name.startswith(kind)).lower()
  for p in train:
    p.lower()


@pytest.mark.parametrize("tensor", [1, 4])
def test_the_weights_reach_an_engine_of_a_mesh_narrow(tensor):
  run = open_tiny(rl, jax.devices(), fsdp=8)
  run.config.fleet.tensor = tensor
  reshard, *rest = compile_engine.programs(run)
  assert reshard.name == "reshard"
  found = hlo.collectives(reshard.lower().compile().as_text())
  numbers = sum(compile_programs.sizes(run.state["params"]).values())
  # On CPUs XLA widens bf16 to move it; what did not divide stays where it is.
  moved = sum(c.total for c in found)
  assert 3.5 * numbers / tensor < moved < 4.5 * numbers / tensor + 2e6
  # The train state's part and the weights stay beside the engine's own.
  assert min(p.resident for p in rest[1:]) >= numbers / tensor
  decode = next(p for p in rest if p.name.startswith("decode"))
  decode.lower()


def test_an_engine_without_room_is_refused_before_it_is_compiled():
  config = rl.get_config("72b")
  config.fleet.tensor, config.engine.slots = 4, 8
  run = compile_programs.open_run(config, jax.devices())
  need = 102.4 + 34.2 + 6.9  # state / 8, weights / 4, eight slots / 4 (GiB)
  said = compile_engine.refusal(run, (need - 3) * cost.GIB)
  assert "train state 102" in said and "weights 34" in said and "8 slots 6.9" in said
  assert "fleet.tensor" not in said  # four devices are the most
  assert compile_engine.refusal(run, (need + 3) * cost.GIB) is None


def test_collectives_are_counted_as_often_as_loops_turn():
  text = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %g = bf16[32,8]{1,0:T(8,128)(2,1)} all-gather(%x), backend_config={"debug":"
}  a text that ends no computation
"}, metadata={op_name="jit(f)/while/body/dot"}
  %s = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) all-reduce-start(%x), to_apply=%add
  %d = bf16[4,8]{1,0} all-reduce-done(%s)
  ROOT %t = (s32[], bf16[4,8]) tuple(%x, %d)
}

%sparse (p: s32[8]) -> s32[8] {
  ROOT %q = s32[8]{0} parameter(0)
}, execution_thread="sparsecore"

%cond (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %n = s32[]{:T(128)} constant(28)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[16]) -> f32[2] {
  %a = f32[16]{0} parameter(0)
  %w = (s32[], bf16[4,8]{1,0}) while(%a), condition=%cond, body=%body
  ROOT %r = f32[2]{0} reduce-scatter(%a), to_apply=%add
}
"""
  got = hlo.collectives(text)
  assert [(c.kind, c.dtype, c.bytes, c.times, c.loop) for c in got] == [
    ("all-gather", "bf16", 512, 28, True),
    ("all-reduce", "bf16", 128, 28, True),
    ("reduce-scatter", "f32", 64, 1, False),
  ]
  assert sum(c.total for c in got) == 28 * 640 + 64
  assert ("bf16", (32, 8)) in hlo.arrays(text)


def test_topologies_are_named_as_the_cloud_does():
  known = cost.TOPOLOGIES
  assert known["v5p:4x4x4"] == cost.Topology("v5p-128", 64)
  assert known["v5e:16x16"] == cost.Topology("v5litepod-256", 256)
  assert known["tpu7x:4x4x4"].chips == 64
  assert {name.partition(":")[0] for name in known} == set(cost.CHIPS)


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_presets_are_laid_out_for_their_machines(kind):
  module, presets = {"sft": (sft, pods.SFT), "rl": (rl, pods.RL)}[kind]
  for size, topology in presets:
    c, pod = module.get_config(f"{size},{topology}"), pods.PODS[topology]
    known = cost.TOPOLOGIES[topology]
    assert (c.accelerator, c.chips) == (known.accelerator, known.chips)
    hosts = pod.devices // pod.host
    assert c.data.shards % hosts == 0  # each reads whole shards
    if kind == "sft":
      groups = pod.devices // c.mesh.tensor
      assert c.data.rows % groups == 0 and c.data.rows % c.data.shards == 0
    else:
      engines = pod.devices // c.fleet.tensor
      assert pod.host % c.fleet.tensor == 0 and c.data.shards % engines == 0
      assert c.rl.prompts_per_step % c.data.shards == 0
      assert c.rl.rows * hosts % pod.devices == 0
  assert sft.get_config("7b").topology == "" and not sft.get_config("7b").compiler
  with pytest.raises(ValueError, match="no rl preset of 72b for v5e:8x8; presets of"):
    rl.get_config("72b,v5e:8x8")
  with pytest.raises(ValueError, match="'v9:2' is unknown; known: v5e:8x8, "):
    sft.get_config("7b,v9:2")


def test_the_table_says_what_was_not_compiled(tmp_path):
  row = dict(
    name="update", peak_bytes=64 * 2**30, share=0.5, fits=True, roofline_s=2.0,
    mfu_ceiling=0.75,
  )  # fmt: skip
  report = dict(
    programs=[row], date="2026-01-02T03:04", versions={"jax": "1.2"}, effort=-1.0,
    devices=8, mesh={"tensor": 1}, slices=1,
    config=json.loads(sft.get_config("7b,h200:8").to_json_best_effort()),
  )  # fmt: skip
  cell = table.Cell("sft", "7b", "h200:8")
  (tmp_path / cell.file).write_text(json.dumps(report))
  bad = table.Cell("rl", "72b", "v5e:8x8")
  (tmp_path / bad.file).write_text(
    json.dumps(report | {"programs": [], "refused": "too small"})
  )
  lines = table.table(tmp_path).splitlines()
  assert any("64 cells 1 were compiled and 1 refused" in x for x in lines)
  h200 = [x for x in lines if x.startswith("| h200:8 ")]
  assert "| 3 x 8192 | dots | 64.0* | 50% | update | 2000 ms | 75% |" in h200[0]
  assert sum("no: too small" in x for x in lines) == 1
  assert sum("| not compiled" in x for x in lines) == 62


def check(*args, timeout=900):
  command = [sys.executable, "-m", "pixel_jax", "compile-check", *args]
  return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def test_the_effort_is_set_in_any_jax():
  """Its name went with jax 0.11, and with it the whole command on Python 3.12."""
  names = [k for k in jax.config.values if k in EFFORTS]
  before = {k: jax.config.values[k] for k in names}
  compile_check.set_effort(-1.0)
  assert {k: jax.config.values[k] for k in names} != before
  compile_check.set_effort(0.0)
  assert {k: jax.config.values[k] for k in names} == before


def test_an_unknown_topology_is_answered_with_the_known_ones():
  done = check("--config=configs/sft.py:7b", "--topology=v9:2x2")
  assert done.returncode == 2
  said = "error: --topology=v9:2x2 is unknown; known: v5e:2x2"
  assert done.stderr.splitlines()[-1].startswith(said)


# ---- With the compiler of TPUs (extra [tpu]) -----------------------------------------

tpu = pytest.mark.skipif(not HAS_TPU_COMPILER, reason="libtpu is not installed")


@tpu
@pytest.mark.slow
def test_7b_does_not_fit_eight_v5e(tmp_path):
  """The negative control: seconds, because the compiler refuses before it optimises."""
  file = tmp_path / "check.json"
  done = check(
    "--config=configs/sft.py:7b", "--config.model.attention=splash",
    "--topology=v5e:2x4", "--programs=update", f"--json={file}",
  )  # fmt: skip
  assert done.returncode == 1, done.stderr
  assert "update does not fit" in done.stdout and "at least 9 such" in done.stdout
  (row,) = json.loads(file.read_text())["programs"]
  assert not row["fits"] and "RESOURCE_EXHAUSTED" in row["refused"]


@pytest.fixture
def hurry():
  """Half the time to compile, which is what is tested; the run may be the slower."""
  compile_check.set_effort(-1.0)
  yield
  compile_check.set_effort(0.0)


def compiled(folder, config, *args):
  """Rows of the report; what the compiler made lies in the folder, as text.

  In a process of its own: the compiler keeps gigabytes of what it has seen.
  """
  file = folder / "check.json"
  done = check(
    f"--config={config}", *args, "--effort=-1", f"--json={file}", f"--text={folder}"
  )
  assert done.returncode == 0, done.stderr
  return json.loads(file.read_text())["programs"]


def open_preset(module, arg):
  """A preset on the devices it is made for, as the compiler of TPUs describes them."""
  config = module.get_config(arg)
  devices = compile_check.open_devices(config.topology, 1)
  return compile_programs.open_run(config, devices)


@tpu
def test_devices_of_a_torus_come_as_they_lie_on_it():
  """Engines are still on a host, of which a v5p has a block of 2 x 2."""
  for topology, tensor in {"v5p:4x4x4": 4, "tpu7x:4x4x4": 8, "v6e:8x8": 2}.items():
    mesh = parallel.make_mesh(
      fsdp=-1, data=1, among=compile_check.open_devices(topology, 1)
    )
    at = [(*reversed(d.coords), d.core_on_chip) for d in mesh.devices.flat]
    assert at == sorted(at)
    engines = placement.engine_mesh(mesh, tensor).devices
    assert engines.shape == (mesh.size // tensor, tensor)
    assert {d.id for d in engines.flat} == {d.id for d in mesh.devices.flat}
    assert all(len({d.process_index for d in row}) == 1 for row in engines)


@tpu
@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v6e:8x8"])
def test_the_head_is_gathered_narrow(topology, hurry):
  """Else the compiler of v6e gathered it in f32, that of v5p added up whole heads."""
  devices = compile_check.open_devices(topology, 1)
  mesh = parallel.make_mesh(data=1, fsdp=-1, among=devices)
  cut = jax.NamedSharding(mesh, jax.P("fsdp"))
  rows = jax.NamedSharding(mesh, parallel.ROWS)
  head = jax.ShapeDtypeStruct((3584, 152064), jnp.float32, sharding=cut)  # of the 7B
  hidden = jax.ShapeDtypeStruct((64, 128, 3584), jnp.bfloat16, sharding=rows)

  def loss(head, x):
    with parallel.on(mesh):
      narrow = head.astype(x.dtype)
      return parallel.map_rows(
        lambda x, head: jax.nn.logsumexp(x @ head, -1), x, whole=narrow, axis=0
      ).sum()

  step = jax.jit(jax.grad(loss), out_shardings=cut).lower(head, hidden).compile()
  large = [c for c in hlo.collectives(step.as_text()) if c.bytes > 2**20]
  assert sorted((c.kind, c.dtype) for c in large) == [
    ("all-gather", "bf16"),
    ("all-reduce", "bf16"),  # of the gradient
  ]


@tpu
@pytest.mark.slow
def test_7b_on_v5p_holds_and_moves_what_it_should(tmp_path):
  """A whole step of the 7B on 64 chips with the tower in it: minutes of compiling."""
  (update,) = compiled(
    tmp_path, "sft:7b,v5p:4x4x4", "--config.features.gib=0", "--config.model.remat=full"
  )
  assert update["share"] < 0.25
  run = open_preset(sft, "7b,v5p:4x4x4")
  text = (tmp_path / "update.hlo").read_text()
  found = hlo.collectives(text)
  inside = [c for c in found if c.loop]
  # All but the gradients of norms: weights and their gradients travel in bf16.
  assert sum(c.total for c in inside if c.dtype != "bf16") < 1e7
  assert 40e9 < sum(c.total for c in inside) < 60e9
  # Gathered twice, forward and backward; the compiler adds up gradients, then cuts them.
  gathered = sum(c.total for c in inside if c.kind == "all-gather")
  assert 0.45 < gathered / sum(c.total for c in inside) < 0.55
  large = {c.dtype for c in found if c.bytes > 2**20}
  assert large & set(FLOATS) == {"bf16"}
  # Logits exist for a chunk of tokens, never for those of a row.
  vocab, data = run.model.text.vocab, run.config.data
  logits = [
    math.prod(shape) // vocab
    for dtype, shape in hlo.arrays(text)
    if dtype == "f32" and vocab in shape and run.model.text.width not in shape
  ]
  assert logits and max(logits) < data.tokens
  assert "window_attention" in text
  assert not [c for c in found if "window_attention" in c.where]


@tpu
def test_an_engine_that_cannot_be_routed_is_refused():
  devices = compile_check.open_devices("v5e:8x8", 1)
  config = rl.get_config("3b")
  config.fleet.tensor, config.engine.slots = 2, 8
  run = compile_programs.open_run(config, devices)
  limit = compile_check.SHARE * cost.CHIPS["v5e"].hbm
  assert "no route among 2 devices" in compile_engine.refusal(run, limit)
  run.config.fleet.tensor = 1
  assert compile_engine.refusal(run, limit) is None


@tpu
@pytest.mark.slow
def test_the_cache_is_written_in_place(tmp_path):
  """An engine of two v6e; its weights travel in bf16."""
  run = open_preset(rl, "7b,v6e:8x8")
  slots = run.config.engine.slots
  _, decode = compiled(
    tmp_path, "rl:7b,v6e:8x8", f"--programs=reshard,decode {slots}", "--largest"
  )
  moved = hlo.collectives((tmp_path / "reshard.hlo").read_text())
  # What is exchanged before it is gathered, a 64th of it, is f32.
  large = {c.dtype for c in moved if c.bytes > 2**20 and c.kind != "all-to-all"}
  assert large == {"bf16"}
  e = compile_engine.open_engine(run)
  cache = slots * e.max_own * cost.cache_bytes(run.model) / run.config.fleet.tensor
  assert decode["alias_bytes"] >= cache
  assert decode["temp_bytes"] < cache / 4
  text = (tmp_path / f"decode-{slots}.hlo").read_text()
  # Activations travel between the two, never keys and values of a layer.
  sums = [c for c in hlo.collectives(text) if c.loop]
  assert sums and max(c.bytes for c in sums) < cache / run.model.text.depth
