"""What a GPU says of the account: CUDA's peak beside each counted one, and seconds of a step.

    python experiments/gpu.py             # some minutes of an H100; writes gpu.json
    python experiments/gpu.py --dry-run   # the same calls without a GPU, at small sizes

Peaks: the rows of Tables 1 and 3, eager as the paper; Table 1's (LST on T5-3B among them) also
fused, with checkpointing and with a bf16 backbone. Times: T5-base at Table 1's batch, in fp32 and
bf16: full fine-tuning, LoRA and LST, without and with checkpointing, and LST with states kept.
"""
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench_memory  # noqa: E402
from run.folder import write_json  # noqa: E402
from run.options import Parser  # noqa: E402
from run.report import exit_cleanly  # noqa: E402

RUNS = ("--table 1", "--table 1 --attention fused", "--table 1 --attention fused --checkpoint",
        "--table 1 --attention fused --dtype bf16", "--table 3",
        "--time --batch-size 100", "--time --batch-size 100 --attention fused --dtype bf16")
SMALL = "--batch-size 2 --source-length 8 --target-length 2 --r 2"


def measure(dry_run: bool) -> dict:
    runs = {}
    for line in RUNS:
        print(f"\npython bench_memory.py {line} --device cuda")
        arguments = f"{line} {SMALL}" if dry_run else f"{line} --device cuda"
        runs[line] = bench_memory.main(arguments.split())
    if dry_run:
        return runs
    smi = "nvidia-smi --query-gpu=driver_version --format=csv,noheader".split()
    about = {"hardware": torch.cuda.get_device_name(), "torch": torch.__version__,
             "cuda": torch.version.cuda, "driver": subprocess.check_output(smi, text=True).strip()}
    write_json(ROOT / "experiments" / "gpu.json", about | {"runs": runs})
    return runs


def main(argv: list[str] | None = None) -> dict:
    parser = Parser(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="small, no GPU, writes nothing")
    args = parser.parse_args(argv)
    if not (args.dry_run or torch.cuda.is_available()):
        parser.error("torch sees no CUDA device; --dry-run needs none")
    return exit_cleanly(lambda: measure(args.dry_run))


if __name__ == "__main__":
    main()
