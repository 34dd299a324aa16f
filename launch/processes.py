#!/usr/bin/env python3
"""One command as several processes of this machine, joined as the hosts of a pod are.

  python launch/processes.py 2 DIR/logs python -m pixel_jax.train_sft ...

Each writes to DIR/logs/process_<i>.log, and process 0 to the terminal, too.  SIGTERM and
Ctrl-C go to all of them.  When one fails the others are stopped, which could not go on
without it, and it is told which one failed and why; the exit code is that of the first.
"""

import argparse
import os
import pathlib
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

LAST = 20  # lines of a log that are shown


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("count", type=int, help="processes, 1 or more")
  parser.add_argument("logs", type=pathlib.Path, help="folder of their logs")
  parser.add_argument("command", nargs=argparse.REMAINDER)
  args = parser.parse_args()
  if args.count < 1 or not args.command:
    parser.error("give a number of processes, 1 or more, and a command")
  args.logs.mkdir(parents=True, exist_ok=True)
  logs = [args.logs / f"process_{rank}.log" for rank in range(args.count)]
  port, began = free_port(), time.monotonic()
  running = [start(rank, log, port, args) for rank, log in enumerate(logs)]
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: send(running, number))
  ended: queue.SimpleQueue[int] = queue.SimpleQueue()  # ranks, the first to end first
  watchers = [
    threading.Thread(target=watch, args=(rank, process, logs[rank], ended))
    for rank, process in enumerate(running)
  ]
  for watcher in watchers:
    watcher.start()
  failed = next(
    (r for r in (ended.get() for _ in running) if running[r].returncode), -1
  )
  if failed < 0:
    return 0
  send(running, signal.SIGKILL)  # nothing can be saved without the one that failed
  for watcher in watchers:
    watcher.join()
  code = running[failed].returncode
  after = f"after {time.monotonic() - began:.0f} s"
  tell(failed, code, logs, after)
  return 128 - code if code < 0 else code


def start(
  rank: int, log: pathlib.Path, port: int, args: argparse.Namespace
) -> subprocess.Popen:
  joined = {
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": str(args.count),
    "JAX_PROCESS_ID": str(rank),
  }
  with log.open("ab") as file:
    file.write(f"\n$ {shlex.join(args.command)}\n".encode())
    file.flush()
    return subprocess.Popen(
      args.command,
      env=os.environ | (joined if args.count > 1 else {}),
      stdout=file if rank else subprocess.PIPE,
      stderr=subprocess.STDOUT,
      start_new_session=True,  # Ctrl-C reaches it from here alone
    )


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def watch(
  rank: int, process: subprocess.Popen, log: pathlib.Path, ended: queue.SimpleQueue
) -> None:
  """Copies what process 0 says to its log and the terminal; tells when it has ended."""
  if process.stdout:
    with log.open("ab") as file:
      while data := process.stdout.read1(1 << 16):
        file.write(data)
        file.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
  process.wait()
  ended.put(rank)


def send(running: list[subprocess.Popen], number: int) -> None:
  for process in running:
    if process.poll() is None:
      process.send_signal(number)


def tell(rank: int, code: int, logs: list[pathlib.Path], after: str) -> None:
  why = (
    f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
  )
  lines = logs[rank].read_text(encoding="utf-8", errors="replace").splitlines()[-LAST:]
  print(
    f"error: process {rank} of {len(logs)} {why} {after}; the others were stopped.\n"
    f"The end of {logs[rank]}:",
    *(f"  {line}" for line in lines),
    "The same command goes on from the last checkpoint.",
    sep="\n", file=sys.stderr,
  )  # fmt: skip


if __name__ == "__main__":
  sys.exit(main())
