"""Draws assets/gates.svg: the gates that a run has learned, and how its loss fell as loss.svg.

    python assets/make/draw_gates.py runs/sst2-lst-0
"""
import json
import sys
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ASSETS.parent))

import train  # noqa: E402
from memory.plot import stacked_bars  # noqa: E402
from run.options import Parser  # noqa: E402
from run.report import exit_cleanly  # noqa: E402


def draw(folder: str) -> dict:
    results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    layers = results["config"]["keep"] or range(10**3)
    bars = [(f"{stack}, layer {i}", [mu, 1 - mu], 0.5) for stack, gates in results["gates"].items()
            for i, mu in zip(layers, gates)]
    title = f"{results['task']}: what each side block reads; mark: the start"
    stacked_bars(ASSETS / "gates.svg", title, ["the backbone (mu)", "the side network"], bars)
    return train.main(["--out", folder, "--plot", str(ASSETS / "loss.svg")])


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("folder", help="a run of LST that has ended")
    args = parser.parse_args()
    exit_cleanly(lambda: draw(args.folder))
