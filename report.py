"""What a run says: to a wrong argument, how far it is, its scores, its memory, and what its gates learned."""
import argparse
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


class Parser(argparse.ArgumentParser):
    """A wrong argument is answered with one line, without the usage."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        self.exit(2, f"error: {message}; --help lists every option\n")


def positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:12]) <= 10**9:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number from 1 to 10^9")
    return int(text)


def guarded(run: Callable[[], dict]) -> dict:
    """Run a program's work.  What the user can mend ends with one line and exit code 2, a loss that is not finite with 1, Ctrl-C with 130."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch on Linux: memory in huge pages, so that fresh tensors cost less time
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a bar should not cost the results
    try:
        return run()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        hint = "; try a smaller --batch-size" if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"error: {str(error).splitlines()[0] if hint else error}{hint}", file=sys.stderr)
        raise SystemExit(2) from None
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def say(text: str) -> None:
    print(text, flush=True)


def layers(text: str) -> list[int]:
    if not all(part.isascii() and part.isdecimal() and len(part) < 5 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of 0-based layers such as 1,3,5")
    return [int(part) for part in text.split(",")]


def whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text[:12]) > 10**9:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number from 0 to 10^9")
    return int(text)


class Progress:
    """One line that is rewritten on a terminal; elsewhere a plain line every tenth of the way, and at least every 30 s."""

    def __init__(self, title: str, total: int):
        self.title, self.total = title, total
        self.start = self.shown = time.time()
        self.live, self.tenths = sys.stdout.isatty(), 0

    def step(self, done: int, detail: str = "") -> None:
        now, tenths = time.time(), done * 10 // self.total
        if not (now - self.shown > (0.2 if self.live else 30) or done == self.total or (tenths > self.tenths and not self.live)):
            return
        self.shown, self.tenths = now, tenths
        seconds = int((now - self.start) / done * (self.total - done))
        line = f"{self.title} {done}/{self.total}  {detail}{'  ' if detail else ''}{seconds // 60}:{seconds % 60:02d} left"
        print(f"\r{line:<100}" if self.live else line, end="\n" if done == self.total or not self.live else "", flush=True)


def scores(values: dict) -> str:
    """Metrics in percent, and what went wrong with the answers if anything did."""
    parts = [f"{name} {value:.2f}" for name, value in values.items() if name not in ("score", "invalid", "undefined")]
    parts += [f"score {values['score']:.2f}"] if len(parts) > 1 else []
    parts += [f"{values['invalid']} invalid answers"] if values["invalid"] else []
    parts += ["correlation undefined, taken as 0"] if values["undefined"] else []
    return ", ".join(parts)


def peak_memory(device: str) -> tuple[int, str]:
    """Bytes, and what they are the peak of."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device), "CUDA's peak"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024), "the process's peak"


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
