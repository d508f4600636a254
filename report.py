"""What a run says: to a wrong argument, how far it is, its scores, its memory, where it ran, and what its gates learned."""
import argparse
import contextlib
import importlib.metadata
import os
import platform
import resource
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import distributed


# ------------------------------------------------------------------------------------------------------------ arguments

class Parser(argparse.ArgumentParser):
    """A wrong argument is answered with one line, without the usage."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        self.exit(2, f"error: {message}; --help lists every option\n")


def positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 10 or not 1 <= int(text) <= 10**9:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number from 1 to 10^9")
    return int(text)


def whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 10 or int(text) > 10**9:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number from 0 to 10^9")
    return int(text)


def layers(text: str) -> list[int]:
    if not all(part.isascii() and part.isdecimal() and len(part) < 5 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of 0-based layers such as 1,3,5")
    return [int(part) for part in text.split(",")]


def seeds(text: str) -> list[int]:
    numbers = [whole(part) for part in text.split(",")]
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return numbers


# ---------------------------------------------------------------------------------------------------------- how it ends

def guarded(run: Callable[[], dict]) -> dict:
    """Run a program's work.  What the user can mend ends with one line and exit code 2, a loss that is not finite with 1, Ctrl-C with 130,
    SIGTERM with 143."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch on Linux: memory in huge pages, so that fresh tensors cost less time
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by the shell
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a bar should not cost the results
    try:
        with on_signals(_interrupt, signal.SIGTERM):
            return run()
    except (ValueError, OSError) as error:
        _end(f"error: {' '.join(str(error).split())}", 2)
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)):  # the last: on a CPU
            raise
        _end("error: there is not enough memory for this; try a smaller --batch-size, or --accumulate to cut a batch into passes", 2)
    except FloatingPointError as error:
        _end(f"error: {error}", 1)
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        _end("interrupted" if number == signal.SIGINT else "terminated", 128 + number)


def _end(line: str, code: int) -> None:
    print(line if distributed.processes() == 1 else f"[process {distributed.rank()}] {line}", file=sys.stderr)
    raise SystemExit(code) from None


def _interrupt(number: int, frame) -> None:
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def on_signals(handler: Callable, *numbers: int) -> Iterator[None]:
    """These signals go to `handler`; Python allows that in the main thread only, elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # a job in a script's background
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list, into which Ctrl-C and SIGTERM put their number, so that a step can end in peace.  The second time they interrupt at once,
    but not under torchrun, which passes on what the processes may have had already."""
    asked: list[int] = []

    def ask(number: int, frame) -> None:
        if asked and distributed.processes() == 1:
            raise KeyboardInterrupt(number)
        asked.append(number)

    with on_signals(ask, signal.SIGINT, signal.SIGTERM):
        yield asked


# ------------------------------------------------------------------------------------------------------------- progress

def say(text: str) -> None:
    if distributed.rank() == 0:
        print(text, flush=True)


class Progress:
    """One line that is rewritten on a terminal; elsewhere a plain line every tenth of the way, and at least every 30 s."""

    def __init__(self, title: str, total: int, begin: int = 0):
        self.title, self.total, self.begin = title, total, begin
        self.start = self.shown = time.time()
        self.live, self.tenths = sys.stdout.isatty(), 0

    def step(self, done: int, detail: str = "") -> None:
        now, tenths = time.time(), done * 10 // self.total
        if distributed.rank() > 0 or not (now - self.shown > (0.2 if self.live else 30) or done == self.total or (tenths > self.tenths and not self.live)):
            return
        self.shown, self.tenths = now, tenths
        seconds = int((now - self.start) / (done - self.begin) * (self.total - done))
        line = f"{self.title} {done}/{self.total}  {detail}{'  ' if detail else ''}{seconds // 60}:{seconds % 60:02d} left"
        print(f"\r{line:<100}" if self.live else line, end="\n" if done == self.total or not self.live else "", flush=True)


# --------------------------------------------------------------------------------------------- what came out, and where

def scores(values: dict) -> str:
    """Metrics in percent, and what went wrong with the answers if anything did."""
    parts = [f"{name} {value:.2f}" for name, value in values.items() if name not in ("score", "invalid", "undefined")]
    parts += [f"score {values['score']:.2f}"] if len(parts) > 1 else []
    parts += [f"{values['invalid']} invalid answers"] if values["invalid"] else []
    parts += ["correlation undefined, taken as 0"] if values["undefined"] else []
    return ", ".join(parts)


HIGH_WATER = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux: read the process's peak, begin a new one


def reset_peak(device: str) -> None:
    """So that each of several runs, one after the other in a process, has its own peak; elsewhere than on Linux and CUDA they share one."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        HIGH_WATER[1].write_text("5")


def peak_memory(device: str) -> tuple[int, str]:
    """Bytes, and what they are the peak of."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device), "CUDA's peak"
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in HIGH_WATER[0].read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024, "the process's peak"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024), "the process's peak"


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in ("torch", "numpy", "safetensors", "sentencepiece")}


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.is_file() else []
    return f"{torch.get_num_threads()} threads of {names[0] if names else platform.machine()}"


def gates(ladder) -> str:
    """One bar for each rung: mu, the backbone's share in what the side block reads."""
    lines = ["what was learned: each rung's gate mu, the share of the backbone (1/2 at the start)"]
    for name, stack in (("encoder", ladder.encoder), ("decoder", ladder.decoder)):
        for i, rung in zip(stack.keep, stack.ladders):
            lines.append(f"  {name} layer {i:2d}  {'█' * round(30 * rung.mu.item()):░<30}  {rung.mu.item():.2f}")
    return "\n".join(lines)


def summary(runs: list[dict]) -> dict:
    """Mean and deviation over seeds of each task's score, and the mean of the tasks (Table 1's last column)."""
    tasks = {}
    for run in runs:
        tasks.setdefault(run["task"], {"seeds": [], "scores": []})
        tasks[run["task"]]["seeds"].append(run["seed"])
        tasks[run["task"]]["scores"].append(run["test"]["score"])
    for task in tasks.values():
        # Paper: the authors' script prints the population's deviation too (and by mistake reads seed 0 alone)
        task |= {"mean": statistics.mean(task["scores"]), "deviation": statistics.pstdev(task["scores"])}
    return {"tasks": tasks, "average": statistics.mean(task["mean"] for task in tasks.values())}


def table(runs: list[dict], names: dict[str, str]) -> str:
    """The runs as a row of Table 1, in Markdown.  names: task -> title of its column, in the paper's order."""
    all_tasks = summary(runs)
    columns = [name for name in names if name in all_tasks["tasks"]]
    cells = [f"{task['mean']:.2f} ± {task['deviation']:.2f}" for task in (all_tasks["tasks"][name] for name in columns)]
    first = runs[0]
    memory = max(run["peak_memory_bytes"] for run in runs) / 2**20
    rows = [["", "trained", "memory", *(names[name] for name in columns), "average"],
            [f"{first['method']} on {first['model']}", f"{first['trainable_percent']:.2f} %", f"{memory:.0f} MiB", *cells, f"{all_tasks['average']:.2f}"]]
    width = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * n for n in width])
    return "\n".join("| " + " | ".join(f"{cell:<{n}}" for cell, n in zip(row, width)) + " |" for row in rows)
