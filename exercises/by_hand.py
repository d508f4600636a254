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
    lines = [f"student: {student}", "All numbers are float32 of 4 bytes, if a question does not say "
             "otherwise. Parameters do not count as kept.", ""]
    for question, text in enumerate(TEXTS):
        text = text.format(**numbers(question, variant_of(student, question)))
        lines += [f"{question + 1}. {text}", f"answer: {answers.get(question, '')}", ""]
    return "\n".join(lines)


def answer(question: int, N=1, D=32, B=1, S=1, H=1, K=32, d_ff=32, r=2, k=1) -> int:
    """The answer, by the account behind bench_memory.py."""
    import torch
    from torch import nn

    from bench_memory import mlp
    from memory import account, formula
    from model import T5, Block, T5Config
    from side import Gate, LadderT5, SideBlock, side_config

    def bytes_of(*modules: nn.Module) -> int:
        return account.bytes_of(nn.ModuleList(modules).parameters())

    def rows(*names: str) -> int:
        found = formula.layer_formula(config, B, S)
        return sum(row["bytes"] for row in found if row["what"] in names)

    def states() -> int:
        ids, mask, decoder_ids, _ = account.make_batch(B, S, 1, config.vocab_size)
        ladder = LadderT5(T5(config), r, range(N - k, N))
        return account.bytes_of(h for h in ladder.hidden_states(ids, mask, decoder_ids)[0]
                                if h is not None)

    config = T5Config(d_model=D, d_kv=K, d_ff=d_ff, num_heads=H, num_layers=N, attention="eager",
                      num_decoder_layers=1)
    with torch.device("meta"):
        gate, block = Gate(D, D // r), Block(side_config(config, r), is_decoder=False)
        return [lambda: mlp("full", "GELU", N, B, D, r)[1],
                lambda: mlp("bias", "GELU", N, B, D, r)[1],
                lambda: mlp("full", "ReLU", N, B, D, r)[1],
                lambda: mlp("ladder", "ReLU", N, B, D, r)[1],
                lambda: bytes_of(gate) // 4,
                lambda: bytes_of(SideBlock(gate, block)) // 4,
                lambda: rows("softmax map", "dropped map"),
                lambda: rows("dropout mask, wi", "relu"),
                states,
                lambda: 3 * (k * bytes_of(gate)
                             + bytes_of(nn.Linear(D, D // r), nn.Linear(D // r, D)))][question]()


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path("answers.txt").exists():
        sys.exit("python by_hand.py STUDENT, in a folder without an answers.txt")
    Path("answers.txt").write_text(sheet(sys.argv[1]), encoding="utf-8")
