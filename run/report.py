"""What a run prints: how far it is, its scores, its memory, its gates, and how it ends."""
import contextlib
import platform
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from torch.distributed import DistError

from run.processes import rank, world_size


def print0(text: str) -> None:
    """Print in the first process only."""
    if rank() == 0:
        print(text, flush=True)


class Progress:
    """A line that is rewritten on a terminal; elsewhere one for each tenth."""

    def __init__(self, title: str, total: int, begin: int = 0):
        self.title, self.total, self.begin = title, total, begin
        self.start, self.tenths = time.time(), 0

    def step(self, done: int, detail: str = "") -> None:
        live = sys.stdout is not None and sys.stdout.isatty()  # the shell may have closed it
        tenths = done * 10 // self.total
        if rank() > 0 or not (live or tenths > self.tenths):
            return
        self.tenths = tenths
        left = int((time.time() - self.start) / (done - self.begin) * (self.total - done))
        line = f"{self.title} {done}/{self.total}  {detail}  {left // 60}:{left % 60:02d} left"
        if live:
            width = shutil.get_terminal_size().columns - 1
            line = f"\r{line[:width]:<{width}}"
        print(line, end="" if live and done < self.total else "\n", flush=True)


def scores(values: dict) -> str:
    """Metrics in percent, and what went wrong with the answers if anything did."""
    parts = [f"{name} {value:.2f}" for name, value in values.items()
             if name not in ("score", "invalid", "undefined")]
    parts += [f"score {values['score']:.2f}"] if len(parts) > 1 else []
    parts += [f"{values['invalid']} invalid answers"] if values["invalid"] else []
    return ", ".join(parts + ["correlation undefined, taken as 0"] * bool(values["undefined"]))


def gates(ladder) -> str:
    """One bar per rung: mu, the backbone's share of what the side block reads (Sec. 3.2)."""
    lines = ["learned gates: each rung's mu, the share of the backbone (1/2 at the start)"]
    for name, stack in (("encoder", ladder.encoder), ("decoder", ladder.decoder)):
        for i, block in zip(stack.keep, stack.blocks):
            mu = block.rung.mu.item()
            lines.append(f"  {name} layer {i:2d}  {'█' * round(30 * mu):░<30}  {mu:.2f}")
    return "\n".join(lines)


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
    with contextlib.suppress(OSError, IndexError):  # getrusage also counts what started the process
        kib = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
        return int(kib) * 1024, "the process's peak"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "the process's peak"


def versions() -> dict[str, str]:
    names = ("torch", "numpy", "safetensors", "sentencepiece")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.machine()
    with contextlib.suppress(OSError, IndexError):
        name = re.findall("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    return f"{torch.get_num_threads()} threads of {name}"


def exit_cleanly(run: Callable[[], dict]) -> dict:
    """Return run(), or end with a line and an exit code: bad input, a failing disk or too little
    memory with 2, a loss that is not finite with 1, Ctrl-C with 130, SIGTERM with 143."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # not every terminal can show a bar
    try:
        with stop_signals(at_once=True):
            return run()
    except KeyboardInterrupt as stop:
        line, code = "interrupted", 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except Exception as error:
        line, code = f"error: {explain(error)}", 1 if isinstance(error, FloatingPointError) else 2
    if world_size() > 1:
        line = f"[process {rank()}] {line}"
    print(line, file=sys.stderr)
    raise SystemExit(code)


def explain(error: Exception) -> str:
    """Return what the user can do about it in one line. Another error is raised again: a bug."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return text
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return "not enough memory: try a smaller --batch-size, or --accumulate for more passes"
    if "gloo" in text or isinstance(error, DistError):
        return "another process has ended; its own line says why"
    raise error


@contextlib.contextmanager
def stop_signals(at_once: bool = False) -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list, so that a step can end and be saved. The second one
    interrupts, but not under torchrun, which sends each again."""
    received: list[int] = []

    def receive(number: int, frame) -> None:
        if at_once or (received and world_size() == 1):
            raise KeyboardInterrupt(number)
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)
              if signal.getsignal(number) is not signal.SIG_IGN}  # of a job in the background
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
