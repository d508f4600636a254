"""What a run prints: how far it is, its scores, its memory, its gates, and how it ends."""
import contextlib
import os
import platform
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.distributed import DistError

from run.processes import rank, world_size


def print0(text: str, end: str = "\n") -> None:
    """Print in the first process only."""
    if rank() == 0:
        print(text, end=end, flush=True)


class Progress:
    """A line that is rewritten on a terminal; elsewhere one for each tenth."""

    def __init__(self, title: str, total: int, begin: int = 0):
        self.title, self.total, self.begin = title, total, begin
        self.start, self.tenths = time.time(), 0

    def step(self, done: int, detail: str = "") -> None:
        left = int((time.time() - self.start) / (done - self.begin) * (self.total - done))
        line = f"{self.title} {done}/{self.total}  {detail}  {left // 60}:{left % 60:02d} left"
        before, self.tenths = self.tenths, 10 * done // self.total
        if sys.stdout and sys.stdout.isatty():
            print0(f"\r{line:<79.79}", end="" if done < self.total else "\n")  # of 80 columns
        elif self.tenths > before:
            print0(line)


def scores(values: dict) -> str:
    """Metrics in percent, and what went wrong with the answers if anything did."""
    parts = [f"{name} {value:.2f}" for name, value in values.items()
             if name not in ("score", "loss", "invalid", "undefined")]
    parts += [f"score {values['score']:.2f}"] if len(parts) > 1 else []
    parts += [f"loss {values['loss']:.4f}"] if "loss" in values else []
    parts += [f"{values['invalid']} invalid answers"] if values["invalid"] else []
    return ", ".join(parts + ["correlation undefined, taken as 0"] * bool(values["undefined"]))


def gates(ladder: nn.Module) -> dict[str, list[float]]:
    """Print one bar per gate: mu, the backbone's share of what the side block reads (Sec. 3.2)."""
    values = {name: [module.mu.item() for module in part.modules() if hasattr(module, "mu")]
              for name, part in ladder.named_children()}
    values = {name: mus for name, mus in values.items() if mus}
    if values:
        print0("learned gates: each rung's mu, the share of the backbone (1/2 at the start)")
    for name, mus in values.items():
        for i, mu in zip(getattr(ladder.get_submodule(name), "keep", [0]), mus):
            print0(f"  {name} layer {i:2d}  {'█' * round(30 * mu):░<30}  {mu:.2f}")
    return values


def reset_peak(device: str) -> None:
    """Begin a new peak, where the system can (Linux, CUDA): each of several runs has its own."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> tuple[int, str]:
    """Return bytes, and what they are the peak of."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device), "CUDA's peak"
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on a Mac
    with contextlib.suppress(OSError, IndexError):  # getrusage also counts what started the process
        kib = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return kib * (1 if sys.platform == "darwin" else 1024), "the process's peak"


def free_memory() -> int:
    """Bytes that a new process could take; where the system does not tell, half of all."""
    with contextlib.suppress(OSError):
        return 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def versions() -> dict[str, str]:
    names = ("torch", "numpy", "safetensors", "sentencepiece")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # Linux
    names = re.findall("model name\\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{torch.get_num_threads()} threads of {[*names, platform.machine()][0]}"


def exit_cleanly(run: Callable[[], dict]) -> dict:
    """Return run(), or end with one line and an exit code: 2 for wrong input, a failing disk or too
    little memory, 1 for a loss that is not finite, 130 for Ctrl-C, 143 for SIGTERM."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # not every terminal can show a bar
    try:
        with stop_signals(at_once=True):
            return run()
    except KeyboardInterrupt as stop:
        line, code = "interrupted", 128 + (stop.args or [signal.SIGINT])[0]
    except (ValueError, OSError, FloatingPointError) as error:
        line, code = f"error: {error}", 1 if isinstance(error, FloatingPointError) else 2
    except (MemoryError, RuntimeError) as error:
        if "MemoryError" in repr(error) or "allocate memory" in str(error):
            line, code = "error: not enough memory: try a smaller --batch-size, or --accumulate", 2
        elif isinstance(error, DistError) or "gloo" in str(error):
            line, code = "error: another process has ended; its own line says why", 2
        else:
            raise
    line = f"[process {rank()}] " * (world_size() > 1) + " ".join(line.split())
    print("".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
    raise SystemExit(code)


@contextlib.contextmanager
def stop_signals(at_once: bool = False) -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list, so that a step can end and be saved. The second one
    interrupts, but not under torchrun, which sends each again."""
    received: list[int] = []

    def receive(number: int, frame) -> None:
        if at_once or (received and world_size() == 1):
            raise KeyboardInterrupt(number)
        received.append(number)

    with contextlib.ExitStack() as at_the_end:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # of a job in the background
                at_the_end.callback(signal.signal, number, signal.signal(number, receive))
        yield received
