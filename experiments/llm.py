"""Run ladders and QLoRA beside SmolLM2-135M on GLUE, and print the table.

    python assets/make/smollm2.py smollm2                              # the folder, once
    python experiments/llm.py --data glue --model smollm2              # what llm.json lacks
    python experiments/llm.py --data glue --model smollm2 --only rte-lst,rte-qlora
    python experiments/llm.py                                          # only print the table

"Untrained" is the backbone as it is: of the words of the classes the likelier one is its answer, as
it does not know yet that an answer ends there. "Majority" is the most frequent label.
"""
import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import TASKS, collate, in_order  # noqa: E402
from experiments import runs  # noqa: E402
from experiments.runs import Variant  # noqa: E402
from llm import load_llm, load_tokenizer  # noqa: E402
from run.folder import write_json  # noqa: E402
from run.metrics import glue_score  # noqa: E402
from run.options import Parser  # noqa: E402
from run.report import exit_cleanly, hardware  # noqa: E402

THIRD = "--keep 2,5,8,11,14,17,20,23,26,29"
METHODS = {  # trained parameters of lst and xladder: 2,993,214 and 2,979,879
    "lst": ("LST, r = 8", "--cache 16"),
    "third": ("LST, r = 8, every third layer", THIRD),
    "xladder": ("xLadder, 15 rungs, 26 blocks free", f"--keep {','.join(map(str, range(15, 30)))} "
                "--free 26 --cache 16"),
    "qlora": ("QLoRA, rank 64", "--method qlora"),
}
VARIANTS = {}
for task, title in (("sst2", "SST-2"), ("rte", "RTE"), ("cola", "CoLA")):
    rows = " --max-train-rows 20000" * (task == "sst2")
    for name, (of, flags) in METHODS.items():
        if name == "qlora" and task != "rte":  # three would take up to two hours
            of, flags = of + ", one epoch", flags + " --epochs 1"
        command = f"--task {task}{rows} --model smollm2 --data glue {flags}".strip()
        seeds = 3 if (task, name) == ("sst2", "third") else 1
        VARIANTS[f"{task}-{name}"] = Variant(f"{title}: {of}", command, seeds=seeds)
runs.TABLES["llm"] = (VARIANTS, {})


@torch.no_grad()
def untrained(model: str, task_name: str, data: str, device: str) -> dict:
    """Scores of the backbone's likelier word, and of the most frequent label."""
    task, tokenizer = TASKS[task_name], load_tokenizer(model)
    lm = load_llm(model, device, torch.bfloat16)
    examples = task.load(data, "plain").test
    rows, words = task.encode(examples, tokenizer), range(len(task.words))
    first = [tokenizer.encode(tokenizer.space + task.target(i, "plain"))[0] for i in words]
    chosen = {}
    for indices in in_order(rows, 32):
        batch = collate([rows[i] for i in indices])
        logits = lm(*(tensor.to(device) for tensor in batch[:3]))[:, 0, first]  # (B, C)
        chosen |= zip(indices, logits.argmax(dim=-1).tolist())
    labels = [example.label for example in examples]
    most = Counter(labels).most_common(1)[0][0]
    return {"untrained": glue_score(task.name, [chosen[i] for i in range(len(rows))], labels),
            "majority": glue_score(task.name, [most] * len(rows), labels),
            "hardware": hardware(device)}


class Together(runs.Runs):
    """experiments/llm.json. The seeds of a variant are one command: they share the kept states."""

    def make_all(self, name: str, seeds: list[int], data: str, model: str) -> None:
        here = self.here | {"glue": data, "smollm2": model}
        command = [here.get(word, word) for word in self.variants[name].command(seeds).split()]
        out = ROOT / "runs" / "llm" / name
        if code := subprocess.run([*command, "--out", out, "--resume"], cwd=ROOT).returncode:
            sys.exit(code)  # it has said why
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        for run in results.get("runs", [results]):
            self.keep(name, run, jobs=1)


def main(args: argparse.Namespace) -> dict:
    found, without = Together("llm"), ROOT / "experiments" / "llm_untrained.json"
    if args.data and not args.only and not without.exists():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tasks = dict.fromkeys(name.partition("-")[0] for name in VARIANTS)
        write_json(without, {task: untrained(args.model, task, args.data, device)
                             for task in tasks})
    for name in (args.only or VARIANTS) if args.data else ():
        seeds = list(range(VARIANTS[name].seeds))
        if VARIANTS[name].command(seeds[-1:]) not in {run["command"] for run in found.current()}:
            found.make_all(name, seeds, args.data, args.model)
    print(found.table(VARIANTS))
    print(without.read_text() if without.exists() else "")
    return {}


if __name__ == "__main__":
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", help="folder of GLUE's official folders; without it nothing is run")
    add("--model", help="the folder that assets/make/smollm2.py writes")
    add("--only", type=lambda text: text.split(","), help=f"of {', '.join(VARIANTS)}")
    arguments = parser.parse_args()
    if bool(arguments.data) != bool(arguments.model):
        parser.error("--data and --model go together")
    if arguments.data:
        arguments.data, arguments.model = map(os.path.abspath, (arguments.data, arguments.model))
    if unknown := {*(arguments.only or [])} - VARIANTS.keys():
        parser.error(f"{min(unknown)!r} is no variant; choose from {', '.join(VARIANTS)}")
    exit_cleanly(lambda: main(arguments))
