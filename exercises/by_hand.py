"""Assignment 8: ten questions about memory, with numbers drawn for you.

    python by_hand.py ada     # writes answers.txt: put a number behind each "answer:"
"""
import math
import random
import re
import sys
from hashlib import sha256
from pathlib import Path

TEXTS = (Path(__file__).parent / "questions.txt").read_text(encoding="utf-8").splitlines()
VARIANTS = 8  # of each question
CHOICES = dict(N=(4, 6, 8, 12), D=(256, 384, 512, 640, 768, 1024), B=(12, 20, 40, 100),
               S=(48, 96, 128, 200), H=(8, 12, 16), K=(32, 64, 128), d_ff=(1024, 2048, 3072, 4096),
               r=(2, 4, 8, 16), k=(1, 2, 3))


def numbers(question: int, variant: int) -> dict[str, int]:
    chance = random.Random(100 * question + variant)
    names = re.findall(r"(?<!{){(\w+)}", TEXTS[question])
    return {name: chance.choice(CHOICES[name]) for name in dict.fromkeys(names)}


def variant_of(student: str, question: int) -> int:
    return int(sha256(f"{question} {student}".encode()).hexdigest(), 16) % VARIANTS


def marks(question: int, variant: int, value: float, reach: int = 0) -> set[str]:
    """Hashes of a value in steps of 0.01 %, and of `reach` steps on both sides of it."""
    middle = round(1e4 * math.log(value))
    return {sha256(f"{question} {variant} {step}".encode()).hexdigest()[:16]
            for step in range(middle - reach, middle + reach + 1)}


def sheet(student: str, answers: dict[int, float] = {}) -> str:
    sheet = f"student: {student}\nNumbers are float32. Parameters do not count as kept.\n"
    for question, text in enumerate(TEXTS):
        text = text.format(**numbers(question, variant_of(student, question)))
        sheet += f"\n{question + 1}. {text}\nanswer: {answers.get(question, '')}\n"
    return sheet


def answer(question: int, N=1, D=32, B=1, S=1, H=1, K=32, d_ff=32, r=2, k=1) -> int:
    """The answer, by the account behind bench_memory.py."""
    import torch

    import bench_memory
    from memory import account, formula
    from model import Block, T5Config
    from side import Gate, side_config

    mlps = ("full", "GELU"), ("bias", "GELU"), ("full", "ReLU"), ("ladder", "ReLU")
    if question < len(mlps):
        return bench_memory.mlp(*mlps[question], N, B, D, r)[1]
    config = T5Config(d_model=D, d_kv=K, d_ff=d_ff, num_heads=H, attention="eager")
    rows = formula.layer_formula(config, B, S) + formula.layer_formula(config, B, S, D)[:1]
    kept = {row["what"]: row["bytes"] for row in rows}
    with torch.device("meta"):
        gate, block = Gate(D, D // r), Block(side_config(config, r), is_decoder=False)
        ends = torch.nn.Sequential(torch.nn.Linear(D, D // r), torch.nn.Linear(D // r, D))
    of_gate, of_block, of_ends = (account.bytes_of(module.parameters())
                                  for module in (gate, block, ends))
    return [of_gate // 4, (of_gate + of_block) // 4, kept["softmax map"] + kept["dropped map"],
            kept["dropout mask, wi"] + kept["relu"], (k + 1) * kept["h_backbone"],
            3 * (k * of_gate + of_ends)][question - len(mlps)]


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path("answers.txt").exists():
        sys.exit("python by_hand.py STUDENT, in a folder without an answers.txt")
    Path("answers.txt").write_text(sheet(sys.argv[1]), encoding="utf-8")
