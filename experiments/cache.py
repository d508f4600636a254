"""What --cache saves of a whole run: the same run without it and with it, one after the other.

    python experiments/cache.py sst2 --data glue   # beside nano: 20,000 phrases, three epochs
    python experiments/cache.py rte --data glue    # T5-base's sizes, twenty epochs; full, too

The T5-base has random weights (a step takes as long), and every 24th row of RTE's files stands for
all: 104 train, 12 validate and test. Prints and writes (experiments/cache.json) the seconds.
"""
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from bench_memory import SIZES  # noqa: E402
from model import NANO, T5, T5Config, load_tokenizer, save_t5  # noqa: E402
from run.folder import read_json, write_json  # noqa: E402
from run.options import Parser, path  # noqa: E402
from run.report import exit_cleanly  # noqa: E402

FILE = ROOT / "experiments" / "cache.json"
RUNS = {
    "sst2": {"without": "--max-train-rows 20000 --epochs 3 --cache 0 --fisher-samples 256",
             "kept": "--max-train-rows 20000 --epochs 3 --fisher-samples 256"},
    "rte": {"without": "--epochs 20 --batch-size 8 --init magnitude --cache 0",
            "kept": "--epochs 20 --batch-size 8 --init magnitude",
            "full": "--epochs 20 --batch-size 8 --method full"},
}


def random_t5_base(folder: Path) -> str:
    torch.manual_seed(0)
    vocabulary = load_tokenizer("nano").vocab_size
    save_t5(T5(T5Config(**SIZES["t5-base"], vocab_size=vocabulary)), folder)
    shutil.copy(NANO / "spiece.model", folder)
    return str(folder)


def thin(data: str, folder: Path) -> str:
    """A folder with every 24th row of RTE's files."""
    (folder / "RTE").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        header, *rows = (Path(data) / "RTE" / name).read_text(encoding="utf-8").splitlines(True)
        (folder / "RTE" / name).write_text("".join([header, *rows[::24]]), encoding="utf-8")
    return str(folder)


def measure(task: str, data: str) -> dict:
    found = {}
    with TemporaryDirectory() as folder:
        model = "nano"
        if task == "rte":
            data, model = thin(data, Path(folder)), random_t5_base(Path(folder) / "t5-base")
        for name, flags in RUNS[task].items():
            where = ["--model", model, "--data", data, "--out", f"{folder}/{name}"]
            results = train.main([*f"--task {task} --device cpu {flags}".split(), *where])
            found[name] = {"flags": flags, "hardware": results["hardware"],
                           **{key: results.get(key) for key in ("seconds", "cache", "val", "test")}}
    print(f"\n{task}: {'seconds':>15}  of those without   score")
    for name, run in found.items():
        share = run["seconds"] / found["without"]["seconds"]
        print(f"{name:10}{run['seconds']:11.1f}{share:18.2f}{run['test']['score']:8.2f}")
    write_json(FILE, (read_json(FILE) if FILE.exists() else {}) | {task: found})
    return found


def main(argv: list[str] | None = None) -> dict:
    parser = Parser(__doc__)
    parser.add_argument("task", choices=RUNS)
    parser.add_argument("--data", type=path, required=True, help="folder with GLUE's files")
    args = parser.parse_args(argv)
    return exit_cleanly(lambda: measure(args.task, args.data))


if __name__ == "__main__":
    main()
