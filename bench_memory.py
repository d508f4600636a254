"""Where the memory of a training step goes (Sec. 3.1, Tables 1 and 3), and its time.

    python bench_memory.py                  # Section 3.1, Table 1, what makes our LST small
    python bench_memory.py --as-published   # Table 1 under the conventions of its environment
    python bench_memory.py --table 3        # Table 3, CLIP-T5: as published, and today
    python bench_memory.py --explain        # what one layer keeps for backward, and why
    python bench_memory.py --sweep length --plot length.svg    # also: batch, r, keep
    python bench_memory.py --fits 12        # the largest batch on a card of 12 GB
    python bench_memory.py --time           # seconds of a step at T5-base's sizes, random weights

No weights and no GPU are needed: memory/account.py counts bytes on torch's meta device. --model,
--method and what shapes a step (--batch-size, --attention, --checkpoint, ...) choose the rows.
"""
import argparse
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import methods
from memory import account, formula, plot, seconds, stories
from memory.account import GB
from memory.published import CONVENTIONS
from model import CLIPT5, T5, T5Config
from run import kernels
from run.arguments import Parser, numbers, positive, whole
from run.report import exit_cleanly, hardware
from side import Gate, LadderT5


# -------------------------------------------------------------------------- Section 3.1, an MLP

ACTIVATIONS = {"ReLU": torch.relu, "sigmoid": torch.sigmoid, "GELU": F.gelu}


def mlp(method: str, activation: Callable[[Tensor], Tensor], N: int, B: int, D: int,
        r: int) -> tuple[int, int]:
    """Return the bytes that an MLP keeps for backward, by formula and by count.

    Of N layers a_{i+1} = activation(W_{i+1} a_i + b_{i+1}) of width D the method trains everything
    ("full"), the biases ("bias"), or a ladder beside them ("ladder").
    Eq. 1: the gradient of W_{i+1} needs a_i. Eq. 2: that of a_i, and so that of b_i, needs the
    derivative of each activation above.
    """
    d, ladder = D // r, method == "ladder"
    with torch.device("meta"):
        backbone, side = (nn.ModuleList(nn.Linear(n, n) for _ in range(N)) for n in (D, d))
        rungs, down_emb = nn.ModuleList(Gate(D, d) for _ in range(N)), nn.Linear(D, d)
        a_0 = torch.randn(B, D)
    for layer in backbone:
        layer.weight.requires_grad_(method == "full")
        layer.bias.requires_grad_(not ladder)

    def forward() -> Tensor:
        a, h = a_0, down_emb(a_0) if ladder else None
        for i in range(N):
            a = activation(backbone[i](a))
            if ladder:
                h = activation(side[i](rungs[i](h, a)))
        return h.sum() if ladder else a.sum()

    wide, narrow = 4 * B * D, 4 * B * d  # one activation of each width
    # GELU's derivative needs its input z_i; ReLU's and sigmoid's their output, which is a_i
    of_input = activation is F.gelu
    predicted = {
        # a_0 ... a_{N-1}, and for the derivatives z_1 ... z_N, or only a_N
        "full": (2 * N if of_input else N + 1) * wide,
        # the derivatives: z_1 ... z_N, or a_1 ... a_N
        "bias": N * wide,
        # a_0 ... a_N for down's weights; at each rung down(a), h and their mix, the derivatives,
        # mu and 1 - mu
        "ladder": (N + 1) * wide + (3 * N + (N if of_input else 1)) * narrow + 8 * N,
    }[method]
    modules = nn.ModuleList([backbone, side, rungs, down_emb])
    return predicted, account.saved_bytes(forward, modules.parameters())


def show_section_3_1(N: int = 12, B: int = 100, D: int = 768, r: int = 8) -> list[dict]:
    print(f"Section 3.1: {N} layers of width {D}, batch {B}; bytes kept for backward, "
          "formula = count\n")
    print(f"{'':10}{'full fine-tuning':>24}{'only biases':>24}{f'a ladder, r = {r}':>24}")
    rows = []
    for name, activation in ACTIVATIONS.items():
        row, line = {"activation": name}, f"{name:10}"
        for method in ("full", "bias", "ladder"):
            predicted, counted = mlp(method, activation, N, B, D, r)
            row |= {f"{method}_formula": predicted, f"{method}_counted": counted}
            cell = f"{predicted:,} {'=' if predicted == counted else '≠'} {counted:,}"
            line += f"{cell:>24}"
        rows.append(row)
        print(line)
    t5_base = T5Config(**SIZES["t5-base"], attention="eager")
    times = formula.layer_bytes(t5_base, 1, 128) / (4 * 128 * t5_base.d_model)
    # Paper: a ladder's memory is 1/r of (|a| + |derivatives|). That leaves out the inputs of its
    # down-projections, which have the backbone's width.
    print(f"""
Eq. 1 and 2 need {{a}} and the derivatives; training only biases needs the derivatives: "up to
50 %" less. So it is for GELU. For ReLU and sigmoid autograd keeps one tensor for both, a_{{i+1}},
and only the input is saved. A ladder needs 1/r of either, and also all the {{a}}: the gradients of
its down-projections read them. In an MLP, which keeps little else, it saves little or nothing. But
a Transformer layer keeps {times:.0f} times its output, and of these the ladder reads one.
""")
    return rows


# ------------------------------------------------------------------------------------- Table 1

SIZES = {  # the public T5 v1.0 checkpoints
    "t5-small": dict(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8),
    "t5-base": dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12),
    "t5-large": dict(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16),
    "t5-3b": dict(d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32),
}
VOCABULARY = 32100  # the public files have 32,128 rows; the authors cut them to the tokenizer's
IMAGES = 1, 36, 2048  # N, P, C: an image is the grid of CLIP's RN101, pooled to 6 x 6 cells
METHODS = {"full": "full fine-tuning", "adapters": "adapters", "lora": "LoRA", "bitfit": "BitFit",
           "prompt": "prompt-tuning", "lst": "LST"}
KEEP = {  # the layers of Table 1's LST rows (supplement, Table 2); elsewhere all
    "t5-base": (1, 2, 3, 5, 6, 7, 9, 10, 11), "t5-large": tuple(range(1, 24, 2)), "t5-3b": (23,)}


@dataclass(frozen=True)
class Case:
    """One training step: builds its network and its batch, and counts their bytes."""

    method: str
    model: str = "t5-base"
    r: int = 8
    keep: tuple[int, ...] | None = None  # None: as KEEP says; (): all
    freeze: int = 0
    attention: str = "eager"
    checkpoint: bool = False
    dtype: str = "fp32"  # of a frozen backbone
    as_authors: bool = False
    batch: tuple[int, int, int] = (100, 128, 2)  # B, S, T
    images: bool = False  # Table 3's CLIP-T5

    @property
    def name(self) -> str:
        return METHODS[self.method]

    @property
    def label(self) -> str:
        return f"{self.name}, {self.model[3:]}"

    @property
    def layers(self) -> tuple[int, ...]:
        return KEEP.get(self.model, ()) if self.keep is None else self.keep

    @property
    def config(self) -> T5Config:
        V = VOCABULARY + 100 * self.images  # the authors add 100 words for the cells of an image
        return T5Config(**SIZES[self.model], vocab_size=V, attention=self.attention,
                        checkpoint=self.checkpoint)

    def check(self, on_cuda: bool = True) -> "Case":
        """ValueError where sizes do not go together: before the first row is counted."""
        c, N = self.config, self.config.num_layers
        if c.d_model % self.r or c.d_kv % self.r or c.d_ff % self.r:
            raise ValueError(f"--r {self.r} must divide d_model, d_kv and d_ff of {self.model}")
        if len(set(self.layers)) < len(self.layers) or max(self.layers, default=0) >= N:
            raise ValueError(f"--keep {self.layers} must name layers from 0 to {N - 1}, each once")
        if self.freeze >= 2 * N:
            raise ValueError(f"--freeze {self.freeze} must be below {2 * N}: something must train")
        if self.dtype == "bf16" and self.method == "full":
            raise ValueError("--dtype bf16 is for frozen backbones: give a --method but full")
        if self.method == "lst" and self.attention == "fused" and c.d_kv // self.r % 4 and on_cuda:
            raise ValueError(f"--r {self.r}: fused heads are 4, 8, ... wide: use --attention eager")
        return self

    def build(self, fast: bool = True) -> nn.Module:
        t5 = CLIPT5(self.config, channels=IMAGES[-1]) if self.images else T5(self.config)
        if self.dtype == "bf16":
            t5.to(torch.bfloat16)
        if self.images:
            t5.visual.float()
        if self.method == "lst":
            net = LadderT5(t5, self.r, self.layers or None)
        else:
            net = methods.apply(t5, self.method, self.as_authors, self.freeze)
        if fast:
            kernels.install(net)  # as train.py does
        return net

    def make_batch(self, B: int | None = None) -> account.Batch:
        images, V = IMAGES if self.images else None, self.config.vocab_size
        return account.make_batch(B or self.batch[0], *self.batch[1:], V, images)

    def account(self, conventions: Collection[str] = (), flops: bool = False,
                measure: bool = False) -> dict:
        """Return a row: the bytes of training, and of inference at batch 1."""
        with torch.device("meta"):
            net, batch = self.build(fast="mask" not in conventions), self.make_batch()
            trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
            counted = net if self.images else T5(self.config)  # Table 1's shares: of the backbone
            total = sum(p.numel() for p in counted.parameters())
            step = account.training_step(net, batch, conventions)
            more = {"flops": account.flops(net, batch)} if flops else {}
            if self.images and self.method == "lora":
                methods.merge(net)  # Paper: Table 3's 0.86 is of merged weights, Table 1's is not
            inference = account.inference(net, self.make_batch(1))
        if measure:
            more["measured_peak"] = seconds.measure_cuda(self)
        paper, paper_inference = PAPER.get(replace(self, as_authors=False), (None, None))
        return {"method": self.method, "model": self.model, "label": self.label,
                "dtype": self.dtype, "trainable_params": trained,
                "trainable_percent": 100 * trained / total, **step,
                "peak_paper_gb": step["peak"] / GB, "paper_gb": paper,
                "inference_peak_paper_gb": inference / GB, "paper_inference_gb": paper_inference,
                **more}


# Of Table 3's four tasks GQA has the largest step: batch 500, questions cut to 20 tokens, answers
# of up to 9 ("styrofoam": eight pieces and the end).
TABLE_3 = dict(r=4, keep=(), batch=(500, 20, 9), images=True)
PAPER = {  # GB of training and of inference in Tables 1 and 3
    Case("full"): (17.6, 0.86), Case("adapters"): (13.0, 0.87), Case("lora"): (12.6, 0.86),
    Case("bitfit"): (10.7, 0.86), Case("prompt"): (22.2, 0.87), Case("lst"): (5.5, 0.88),
    Case("lst", "t5-large"): (12.2, 2.88), Case("lst", "t5-3b"): (22.4, 11.01),
    Case("full", **TABLE_3): (36.2, 0.86), Case("adapters", **TABLE_3): (28.4, 0.93),
    Case("lora", **TABLE_3): (27.9, 0.86), Case("bitfit", **TABLE_3): (22.7, 0.86),
    Case("prompt", **TABLE_3): (38.7, 0.87), Case("lst", **TABLE_3): (15.3, 0.93),
}


def show_table_1(args: argparse.Namespace, cases: list[Case]) -> dict:
    """Table 1 or the chosen rows; without options also Section 3.1 and what makes our LST small."""
    result, (B, S, T) = {}, args.batch
    everything = args.story == "table_1" and args.keep is None and not any(
        (args.model, args.method, args.freeze, args.checkpoint, args.device == "cuda"))
    if everything:
        result["section_3_1"] = show_section_3_1(r=args.r)
        cases = cases + [replace(case, checkpoint=True) for case in cases
                         if case.model == "t5-base" and case.method in ("full", "lora", "lst")]
    rows = stories.count_all(cases, lambda case: case.account(
        CONVENTIONS if args.as_published else (), flops=True, measure=args.device == "cuda"))
    for case, row in zip(cases, rows):
        if case.checkpoint and not args.checkpoint:
            row["label"] = f"{case.name}, checkpointing"
    step = f"batch {B}, source {S}, target {T}, {args.attention} attention"
    stories.show_rows(args, f"Peak of a training step, {step}", rows)
    if args.as_published:
        print("conventions: 32,100 words; a GB is 1000 MiB; LoRA with the authors' biases; and",
              *(f"  - {words}" for words in CONVENTIONS.values()), sep="\n")
    if everything:
        lora, lst, again, lst_again = (row for row in rows if row["method"] in ("lora", "lst")
                                       and row["model"] == "t5-base")
        print(f"With checkpointing LoRA needs {again['peak_paper_gb']:.2f}, LST "
              f"{lst_again['peak_paper_gb']:.2f}. What remains is time: LoRA takes\n"
              f"{lora['flops'] / lst['flops']:.1f} times LST's operations, and with checkpointing, "
              "where the backbone runs forward\ntwice, "
              f"{again['flops'] / lst_again['flops']:.1f} times.\n")
        result["tricks"] = stories.tricks(Case("lst", r=args.r, batch=args.batch))
    return {"rows": rows, **result}


# --------------------------------------------------------------------------------- command line

ROWS = "method source_length target_length r keep attention checkpoint dtype"
STORIES = {  # what to show, and the options that it reads; any other is refused
    "as_published": (show_table_1, "table method plot"),
    "explain": (stories.explain, "model batch_size source_length r attention"),
    "sweep": (stories.sweep, f"{ROWS} model batch_size freeze as_authors plot"),
    "fits": (stories.fits, f"{ROWS} model freeze as_authors"),
    "time": (seconds.show, "model batch_size source_length target_length r keep attention rounds"),
    "table_1": (show_table_1, f"{ROWS} model batch_size freeze as_authors device plot"),
    "table_3": (stories.table_3, f"{ROWS} table batch_size device plot"),
}
READERS = {"r": {"lst"}, "keep": {"lst"}, "as_authors": {"lora", "prompt"},
           "freeze": {"full", "adapters", "lora", "bitfit"}}  # the other methods ignore these


def new_file(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: name a file in a folder")
    return path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    story = parser.add_mutually_exclusive_group().add_argument
    story("--as-published", action="store_true", help="Table 1 as in its environment")
    story("--explain", action="store_true", help="the tensors of one layer, and why they are kept")
    story("--sweep", choices=stories.SWEEPS, help="the peak over batch, source length, r or layers")
    story("--fits", type=positive, metavar="GB", help="largest batch on a card, GB of 2^30 bytes")
    story("--time", action="store_true", help="seconds of a step on this machine")
    add = parser.add_argument
    add("--table", type=int, choices=(1, 3), default=1, help="table of the paper (default 1)")
    add("--model", choices=SIZES, help="all methods at this size, in place of Table 1's rows")
    add("--method", choices=METHODS, help="only this method")
    add("--batch-size", type=positive, help="default: the paper's; 8 with --time")
    add("--source-length", type=positive, help="default: the paper's")
    add("--target-length", type=positive, help="default: the paper's")
    add("--r", type=positive, help="reduction factor; default: the paper's")
    add("--keep", type=lambda text: () if text == "all" else tuple(numbers(text)),
        help="0-based layers of the ladder, or all; default: the paper's; all with --time")
    add("--freeze", type=whole, default=0, metavar="K", help="train no layer below K (Fig. 6)")
    add("--attention", choices=("eager", "fused"), default="eager", help="default: eager (paper)")
    add("--checkpoint", action="store_true", help="gradient checkpointing of every row")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the frozen backbone")
    add("--as-authors", action="store_true", help="LoRA with biases, prompts from noise")
    add("--device", choices=("meta", "cuda"), default="meta", help="cuda: measure steps too")
    add("--rounds", type=positive, default=3, help="of --time, two timed steps each (default 3)")
    add("--json", type=new_file, help="also write what is returned to this file")
    add("--plot", type=new_file, help="also draw a table or a sweep, as SVG")
    args = parser.parse_args(argv)

    table = f"table_{args.table}"
    args.story = next((name for name in STORIES if getattr(args, name, None)), table)
    swept = {"batch": "batch_size", "length": "source_length"}.get(args.sweep, args.sweep)
    if swept in READERS:
        args.method = args.method or "lst"
    read = {args.story, "story", "sweep", "json", *STORIES[args.story][1].split()} - {swept}
    for name, value in vars(args).items():
        reads = name in read and args.method in {None, *READERS.get(name, METHODS)}
        if value != parser.get_default(name) and not reads:
            parser.error(f"--{name.replace('_', '-')} means nothing here: leave it out")
    if args.method not in {None, *READERS.get(swept, METHODS)}:
        parser.error(f"--sweep {args.sweep} is about the ladder: leave --method out")
    if args.json and args.json == args.plot:
        parser.error("--json and --plot name the same file")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; without it no GPU is needed")

    B, S, T = TABLE_3["batch"] if args.table == 3 else (8 if args.time else 100, 128, 2)
    args.batch = args.batch_size or B, args.source_length or S, args.target_length or T
    args.r = args.r or (TABLE_3["r"] if args.table == 3 else 8)
    args.keep = () if args.time and args.keep is None else args.keep
    args.as_authors = args.as_authors or args.as_published and args.table == 1
    return args


def choose(args: argparse.Namespace) -> list[Case]:
    """Return the cases of the command line: a table's rows, or methods at one size."""
    few = {"sweep": ("full", "lora", "lst"), "time": ("lst", "lora", "full"), "explain": ("lst",)}
    if args.model or args.story in few:
        some = (args.method,) if args.method else few.get(args.story, METHODS)
        cases = [Case(method, args.model or "t5-base") for method in some]
    else:
        cases = [case for case in PAPER if case.images == (args.table == 3)
                 and args.method in (None, case.method)]
    options = "batch", "r", "keep", "freeze", "attention", "checkpoint", "dtype", "as_authors"
    chosen = []
    for case in cases:
        given = {name: getattr(args, name) for name in options if getattr(args, name) is not None
                 and case.method in READERS.get(name, METHODS)}
        chosen.append(replace(case, **given).check(on_cuda=not args.time))
    return chosen


def run(args: argparse.Namespace) -> dict:
    show = stories.table_3 if args.table == 3 else STORIES[args.story][0]
    try:
        result = show(args, choose(args))
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ValueError("no 64-bit number of bytes is large enough: make the batch smaller")
    arguments = {name: value for name, value in vars(args).items() if name not in ("json", "plot")}
    result |= {"arguments": arguments, "torch": torch.__version__,
               "hardware": hardware("cuda" if args.device == "cuda" else "cpu")}
    text = json.dumps(result, indent=2)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    return json.loads(text)


def main(argv: Sequence[str] | None = None) -> dict:
    """Show what the command line asks for, and return what --json writes: {"rows": [...], ...}."""
    args = parse(argv)
    return exit_cleanly(lambda: run(args))


if __name__ == "__main__":
    main()
