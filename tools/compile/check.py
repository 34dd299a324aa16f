"""Does a run fit, and how fast can it be?  Asks the compilers, on a CPU.

  pixel-jax compile-check --config=configs/rl.py:7b,v5p:4x4x4
    [--programs=update,decode] [--largest] [--num_slices=2] [--json=FILE]
    [--text=FOLDER]                also what the compiler made, to be read
  pixel-jax compile-check --config=configs/rl.py:7b --topology=v5p:4x4x4
    [--config.KEY=VALUE ...]       without a preset for that topology
  pixel-jax compile-check --table=docs/compiled [--cells=N]
                                   presets that the folder lacks, and the table

Compiles every program of the run, from the code and the config that training uses, at
its real shapes for devices that need not exist, and tells for each: peak memory of a
device with all that is alive beside it, what its loops send over the links, and the
roofline: the time that the chip's matmuls, memory and links need at least, and the share
of the peak FLOPs (MFU) that no run can pass.  FLOPs and bytes are formulas
(cost.py); memory and collectives are the compiler's.

Exit 0: all fits (peak <= 92 % of the memory); 1: something does not, and what to change;
2: a mistake in the command.  Needs the extra [tpu], or for h200:1 and h200:8 jax's CUDA
plugin and nvcc as wheels ([cuda]); no chip.
"""

import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import re
import sys
import time

import jax
from absl import flags
from jax.experimental import topologies
from tqdm import tqdm

from pixel_jax.run import settings, start
from pixel_jax.tools.compile import cost, hlo
from pixel_jax.tools.compile import engine as compile_engine
from pixel_jax.tools.compile import plan as compile_plan
from pixel_jax.tools.compile import programs as compile_programs
from pixel_jax.tools.compile import table as compile_table

TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5p:4x4x4 or h200:8.")
SLICES = flags.DEFINE_integer("num_slices", 1, "Slices of this topology.")
PROGRAMS = flags.DEFINE_list("programs", [], "Only those whose names begin so.")
LARGEST = flags.DEFINE_bool(
  "largest", False, "Of programs that differ in their bucket only the largest."
)
PLAN = flags.DEFINE_bool("plan", False, "Estimates a step of RL; compiles nothing.")
JSON = flags.DEFINE_string(
  "json", None, "Where the figures go; of the same run, those of other programs stay."
)
TEXT = flags.DEFINE_string(
  "text", None, "A folder: the optimized HLO of each program goes there, as text."
)
EFFORT = flags.DEFINE_float(
  "effort", 0.0, "Of the compiler: -1 takes half the time, for slower programs."
)
TABLE = flags.DEFINE_string("table", None, "A folder: checks what presets it lacks.")
CELLS = flags.DEFINE_integer("cells", 1000, "How many; 0 = only write the table.")
SHARE = 0.92  # of the memory: the rest is fragmentation and what jax itself needs
PACKAGES = ("jax", "jaxlib")
COMPILERS = {  # else libtpu; of CUDA 12 or 13, whichever is installed
  "h200": (
    "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12", "jax-cuda13-plugin",
    "nvidia-cuda-nvcc",
  )
}  # fmt: skip
# What the TPU compiler asks the machine and there is no machine to answer.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
H200 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 12 minor: 9 patch: 0 } device_description_str: "NVIDIA H200"
"""


def main(config):
  name = choose_topology(config)
  if name not in cost.TOPOLOGIES:
    known = ", ".join(cost.TOPOLOGIES)
    raise settings.ConfigError(f"--topology={name} is unknown; known: {known}")
  if PLAN.value:
    return compile_plan.main(config, name, JSON.value)
  chip = cost.CHIPS[name.partition(":")[0]]
  devices = open_devices(name, SLICES.value)
  set_effort(EFFORT.value)
  run = compile_programs.open_run(config, devices)
  found, refused = list(compile_programs.programs(run)), None
  if "engine" in config:
    refused = compile_engine.refusal(run, SHARE * chip.hbm)
    found = [] if refused else found + list(compile_engine.programs(run))
  if PROGRAMS.value and found:
    chosen = [p for p in found if p.name.startswith(tuple(PROGRAMS.value))]
    if not chosen:
      known = ", ".join(p.name for p in found)
      raise settings.ConfigError(f"--programs={PROGRAMS.value}: none of {known}")
    found = chosen
  if LARGEST.value:
    found = largest(found)
  report = {
    "command": " ".join(["pixel-jax compile-check", *sys.argv[1:]]),
    "date": now(),
    "versions": {
      p: importlib.metadata.version(p)
      for p in (*PACKAGES, *COMPILERS.get(name.partition(":")[0], ("libtpu",)))
      if _is_installed(p)
    },
    "effort": EFFORT.value,
    "programs_of": "the largest of each kind" if LARGEST.value else "every bucket",
    "topology": name,
    "accelerator": cost.TOPOLOGIES[name].accelerator,
    "chips": cost.TOPOLOGIES[name].chips * SLICES.value,
    "slices": SLICES.value,
    "devices": len(devices),
    "mesh": dict(run.mesh.shape),
    "hbm_bytes": int(chip.hbm),
    "config": json.loads(config.to_json_best_effort()),
  }
  show_head(report)
  rows = report["programs"] = []
  with tqdm(found, disable=None) as bar:
    for p in bar:
      bar.set_description(p.name)
      rows.append(check(p, chip, config, run))
      show(rows[-1])
  if refused:
    report["refused"] = refused
    print(f"refused: {refused}")
  for row in rows:
    if not row["fits"]:
      print(f"{row['name']} does not fit: {row['remedy']}")
  if JSON.value:
    report["programs"] = kept(pathlib.Path(JSON.value), report) + rows
    pathlib.Path(JSON.value).write_text(json.dumps(report, indent=1) + "\n")
    print(f"in {JSON.value}: all figures")
  if TEXT.value:
    print(f"in {TEXT.value}: what the compiler made")
  sys.exit(int(bool(refused) or not all(row["fits"] for row in rows)))


def kept(file: pathlib.Path, report: dict) -> list[dict]:
  """What `file` knows of other programs of this run: they may have taken an hour."""
  old = json.loads(file.read_text()) if file.exists() else {}
  same = ("topology", "slices", "versions", "effort", "config")
  if any(old.get(k) != report[k] for k in same):
    return []
  names = {r["name"] for r in report["programs"]}
  return [r for r in old["programs"] if r["name"] not in names]


def choose_topology(config) -> str:
  """The one that the config is made for, or the flag's."""
  if "topology" not in config:
    raise settings.ConfigError(
      "only configs/sft.py and configs/rl.py have a train step"
    )
  made, asked = config.topology, TOPOLOGY.value
  if made and asked and made != asked:
    raise settings.ConfigError(
      f"--topology={asked}: the config is laid out for {made}; name the size alone, or "
      f"{asked} in place of {made}"
    )
  return made or asked


def set_effort(effort: float) -> None:
  """How hard the compiler tries to make programs fast: 0 as ever, -1 the least."""
  if hasattr(jax.config, "jax_exec_time_optimization_effort"):
    jax.config.update("jax_exec_time_optimization_effort", effort)
  else:  # from jax 0.11 on there are levels alone
    jax.config.update("jax_optimization_level", "O1" if effort < 0 else "UNKNOWN")


def open_devices(name: str, slices: int) -> list[jax.Device]:
  """The devices of a topology as the compiler describes them; none is touched."""
  for key, value in ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  kind, _, shape = name.partition(":")
  if kind == "h200":
    os.environ["XLA_FLAGS"] = (
      os.environ.get("XLA_FLAGS", "")
      # Without a device nothing can be timed; from jax 0.11 on some fusions around a
      # matmul then find no kernel at all.
      + " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    )
  jax.config.update("jax_platforms", "cpu")
  try:
    if kind == "h200":
      from jax._src.cudnn import fused_attention_stablehlo as cudnn

      # jax asks the driver, which is not there; these are what runs need at least.
      cudnn.check_cudnn_version = lambda: 91200
      cudnn.check_compute_capability = lambda capability: True
      return topologies.get_topology_desc(
        platform="cuda", topology_name=name, target_config=H200, topology=f"1x1x{shape}"
      ).devices
    more = {"num_slices": slices} if slices > 1 else {}
    more["wrap"] = cost.wraps([int(n) for n in shape.split("x")])
    return topologies.get_topology_desc(
      platform="tpu", topology_name=name, **more
    ).devices
  except (RuntimeError, ValueError, ImportError) as error:
    needs = (
      "pixel_jax[cuda], or of it jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc"
    )
    needs = needs if kind == "h200" else "pixel_jax[tpu]"
    raise settings.ConfigError(
      f"--topology={name}: no compiler for it ({error}). Install {needs}."
    ) from error


def largest(found: list) -> list:
  """Buckets of a program share the first word of its name; the largest costs most."""
  best = {}
  for p in found:
    kind = p.name.partition(" ")[0]
    if kind not in best or p.cost.executed > best[kind].cost.executed:
      best[kind] = p
  return list(best.values())


def check(p: compile_programs.Program, chip: cost.Chip, config, run) -> dict:
  """Compiles one program; a row of the report."""
  row = {"name": p.name, "phase": p.phase, "date": now(), "resident_bytes": p.resident}
  begin = time.perf_counter()
  lowered = p.lower()
  row["lower_s"] = time.perf_counter() - begin
  begin = time.perf_counter()
  moved = 0
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    row["refused"] = str(error).partition("\n")[0]
    used = [
      float(n) * cost.GIB
      for n in re.findall(r"([\d.]+)G\)? (?:of|exceeds)", row["refused"])
    ]
    peak = max(used, default=chip.hbm)
  else:
    memory = compiled.memory_analysis()
    row |= {
      "argument_bytes": memory.argument_size_in_bytes,
      "output_bytes": memory.output_size_in_bytes,
      "alias_bytes": memory.alias_size_in_bytes,
      "temp_bytes": memory.temp_size_in_bytes,
    }
    peak = compile_programs.peak_bytes(memory)
    text = compiled.as_text()
    if TEXT.value:
      folder = pathlib.Path(TEXT.value)
      folder.mkdir(parents=True, exist_ok=True)
      (folder / f"{p.name.replace(' ', '-')}.hlo").write_text(text)
    collectives = hlo.collectives(text)
    moved = sum(c.total for c in collectives)
    row["collectives"] = hlo.summary(collectives)
  row["compile_s"] = time.perf_counter() - begin
  row["peak_bytes"] = int(peak + p.resident)
  row["share"] = row["peak_bytes"] / chip.hbm
  row["fits"] = "refused" not in row and row["share"] <= SHARE
  parts = p.cost.seconds(chip, moved)
  if p.contexts:
    row["contexts"] = {
      n: {"seconds": max(s.values()), "bound": max(s, key=s.get)}
      for n, c in p.contexts.items()
      for s in [c.seconds(chip, moved)]
    }
    row["tokens"] = p.tokens
  row["flops"], row["executed"] = p.cost.model, p.cost.executed
  row["bytes"], row["links_bytes"] = p.cost.bytes, moved
  row["seconds"] = parts
  row["bound"] = max(parts, key=parts.get)
  row["roofline_s"] = parts[row["bound"]]
  row["mfu_ceiling"] = (
    p.cost.model / chip.flops / row["roofline_s"] if row["roofline_s"] else 0.0
  )
  if not row["fits"]:
    row["remedy"] = remedy(row, chip, config, run)
  return row


def now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def remedy(row: dict, chip: cost.Chip, config, run) -> str:
  """Which knob, and how far: from what does not shrink and what shrinks with it."""
  limit = SHARE * chip.hbm
  state = compile_programs.device_bytes(run.state)
  over = (row["peak_bytes"] - limit) / cost.GIB
  told = f"{over:.1f} GiB too much"
  if state > limit * 0.75:
    need = math.ceil(run.mesh.size * state / (limit * 0.75))
    return (
      f"{told}: the train state alone takes {state / cost.GIB:.1f} GiB of each "
      f"device; use at least {need} such devices, or adapters (config.lora.rank=16)"
    )
  if row["phase"] == "train":
    rest = row["peak_bytes"] - state
    times = math.ceil(rest / (limit - state))
    per = config.rl.rows if "rl" in config else config.data.rows // config.micro_batches
    hosts = (
      len({d.process_index for d in run.mesh.devices.flat}) if "rl" in config else 1
    )
    mine = per * hosts // (run.mesh.size // run.mesh.shape["tensor"])
    if mine > 1:
      fewer = max(1, mine // times)
      if "rl" in config:
        knob = f"config.rl.rows={per * fewer // mine}"
      else:
        knob = f"config.micro_batches={config.micro_batches * mine // fewer}"
      return f"{told}: {knob}, {fewer} instead of {mine} rows a device at a time"
    section = "rl" if "rl" in config else "data"
    if config.model.remat != "full":
      return f"{told}: config.model.remat=full"
    return (
      f"{told} with one row a device: about 1/{times} of config.{section}.tokens and "
      f".patches, or config.mesh.tensor=2"
    )
  e = config.engine
  slot = compile_engine.slot_bytes(run)
  fit = int(e.slots - (row["peak_bytes"] - limit) / slot) // 8 * 8
  if fit >= 8:
    return f"{told}: config.engine.slots={fit} (now {e.slots})"
  return f"{told}, and less than 8 slots would be left: {compile_engine.wider(run)}"


def _is_installed(package: str) -> bool:
  return any(True for _ in importlib.metadata.distributions(name=package))


def show_head(report: dict) -> None:
  print(
    f"{report['topology']}"
    + f" x {report['slices']} slices" * (report["slices"] > 1)
    + f" ({report['accelerator']}): {report['chips']} chips, {report['devices']} devices "
    f"of {report['hbm_bytes'] / cost.GIB:.2f} GiB, mesh {report['mesh']}, "
    + ", ".join(f"{k} {v}" for k, v in report["versions"].items())
  )
  head = (
    "program",
    "peak GiB",
    "of HBM",
    "compile",
    "links GB",
    "at least",
    "by",
    "MFU",
  )
  print("{:24} {:>9} {:>7} {:>8} {:>9} {:>10} {:>7} {:>7}".format(*head))


def show(row: dict) -> None:
  print(
    f"{row['name']:24} {row['peak_bytes'] / cost.GIB:9.2f} {row['share']:7.1%} "
    f"{row['compile_s']:6.0f} s {row['links_bytes'] / 1e9:9.2f} "
    f"{row['roofline_s'] * 1e3:7.1f} ms {row['bound']:>7} {row['mfu_ceiling']:7.1%}"
    + "  does not fit"
    * (not row["fits"]),
    flush=True,
  )
  for n, at in row.get("contexts", {}).items():
    print(
      f"  {n} tokens in the cache: {at['seconds'] * 1e3:.1f} ms by {at['bound']}, "
      f"{row['tokens'] / at['seconds']:,.0f} tokens/s"
    )
  for c in row.get("collectives", ()):
    if c["in_loop"]:
      print(
        f"  in loops: {c['count']:5} {c['kind']} of {c['dtype']}, "
        f"{c['bytes'] / 1e9:.2f} GB"
      )


def table(argv: list[str]) -> None:
  flags.FLAGS(argv)
  compile_table.make(pathlib.Path(TABLE.value), CELLS.value, EFFORT.value)


if __name__ == "__main__":
  if any(a.startswith("--table") for a in sys.argv):  # of all configs, so without one
    table(sys.argv)
  else:
    start.run(main, needs_workdir=False)
