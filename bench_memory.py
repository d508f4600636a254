"""Where the memory of a training step goes (Sec. 3.1, Tables 1 and 3), and its time.

    python bench_memory.py                  # Section 3.1, Table 1, what makes our LST small
    python bench_memory.py --as-published   # Table 1 under the conventions of its environment
    python bench_memory.py --table 3        # Table 3, CLIP-T5: as published, and today; also 4
    python bench_memory.py --explain        # what one layer keeps for backward, and why
    python bench_memory.py --sweep length --plot length.svg    # also: batch, r, keep, freeze, size
    python bench_memory.py --fits 12        # the largest batch on a card of 12 GB
    python bench_memory.py --model llama-2-7b    # 1 x 2048 tokens: QLoRA, LST, xLadder; --fits 12
    python bench_memory.py --time           # seconds of a step at T5-base's sizes, random weights

No weights and no GPU are needed: memory/account.py counts bytes on torch's meta device. --model,
--method and what shapes a step (--batch-size, --attention, --checkpoint, ...) choose the rows.
"""
import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import methods
from llm import quantize_
from memory import account, formula, llm, stories
from memory.environment import OF_TABLE_1
from model import CLIPT5, T5, T5Config
from run import kernels
from run.options import Parser, numbers, positive, whole
from run.report import exit_cleanly, hardware
from run.settings import check_ladder
from side import Gate


# -------------------------------------------------------------------------- Section 3.1, an MLP

ACTIVATIONS = {  # sigma, its derivative, and what autograd computes that from: a = sigma(z), or z
    "ReLU": (torch.relu, lambda a: a > 0, "a"),
    "sigmoid": (torch.sigmoid, lambda a: a * (1 - a), "a"),
    "GELU": (F.gelu, lambda z: torch.special.ndtr(z) + z * torch.exp(-z * z / 2)
             / math.sqrt(2 * math.pi), "z"),
}


@torch.no_grad()
def backward_by_hand(a_0: Tensor, W: Sequence[Tensor], b: Sequence[Tensor],
                     activation: str) -> tuple[dict, dict, list, list]:
    """Return {i: dL/dW_i}, {i: dL/db_i} for L = sum(a_N), and what they read: {a}, {sigma'}.

    a_{i+1} = sigma(z_{i+1}) = sigma(W_i a_i + b_i). a_0 (B, D), W[i] (D, D), b[i] (D)
    """
    sigma, slope, source = ACTIVATIONS[activation]
    a, for_slope = [a_0], []
    for W_i, b_i in zip(W, b):
        z = a[-1] @ W_i.T + b_i  # (B, D)
        a.append(sigma(z))
        for_slope.append(z if source == "z" else a[-1])

    dL_dW, dL_db, dL_da = {}, {}, torch.ones_like(a[-1])
    for i in reversed(range(len(W))):
        error = dL_da * slope(for_slope[i])  # dL/dz_{i+1}: both equations read sigma'
        dL_dW[i] = error.T @ a[i]            # Eq. 1 reads a_i, too
        dL_db[i] = error.sum(dim=0)          # Eq. 1 does not, for b_i
        dL_da = error @ W[i]                 # Eq. 2: dL/da_i, by the chain rule
    return dL_dW, dL_db, a[:-1], for_slope


def mlp(method: str, activation: str, N: int, B: int, D: int, r: int) -> tuple[int, int]:
    """Return the bytes that Eq. 1 and 2 read, and those that autograd keeps.

    Of N layers of width D the method trains everything ("full"), the biases ("bias"), or a ladder
    beside them ("ladder").
    """
    d, ladder, (sigma, _, source) = D // r, method == "ladder", ACTIVATIONS[activation]
    with torch.device("meta"):
        backbone, side = (nn.ModuleList(nn.Linear(n, n) for _ in range(N)) for n in (D, d))
        rungs, down_emb = nn.ModuleList(Gate(D, d) for _ in range(N)), nn.Linear(D, d)
        a_0 = torch.randn(B, D)
    W, b = [layer.weight for layer in backbone], [layer.bias for layer in backbone]
    for tensor in (*W, *b):
        tensor.requires_grad_(method == "full" or method == "bias" and tensor.dim() == 1)

    def forward() -> Tensor:
        a, h = a_0, down_emb(a_0) if ladder else None
        for i in range(N):
            a = sigma(backbone[i](a))
            if ladder:
                h = sigma(side[i](rungs[i](h, a)))
        return h.sum() if ladder else a.sum()

    _, _, a, for_slope = backward_by_hand(a_0, W, b, activation)
    wide, narrow = 4 * B * D, 4 * B * d  # one activation of each width
    read = {
        "full": account.bytes_of({*a, *for_slope}),  # for ReLU and sigmoid most are in both
        "bias": account.bytes_of(for_slope),
        # a_0 ... a_N for down's weights; at each rung down(a), h and their mix, sigma', mu, 1 - mu
        "ladder": (N + 1) * wide + (3 * N + (N if source == "z" else 1)) * narrow + 8 * N,
    }[method]
    modules = nn.ModuleList([backbone, side, rungs, down_emb])
    return read, account.saved_bytes(forward, modules.parameters())


def show_section_3_1(N: int = 12, B: int = 100, D: int = 768, r: int = 8) -> list[dict]:
    print(f"Section 3.1: {N} layers of width {D}, batch {B}; bytes that Eq. 1 and 2 read\n"
          "= bytes that autograd keeps\n\n"
          f"{'':7}{'full fine-tuning':>24}{'only biases':>24}{f'a ladder, r = {r}':>24}")
    rows = []
    for name in ACTIVATIONS:
        row, line = {"activation": name}, f"{name:7}"
        for method in ("full", "bias", "ladder"):
            read, kept = mlp(method, name, N, B, D, r)
            row |= {f"{method}_formula": read, f"{method}_counted": kept}
            line += f"{read:>12,} {'=' if read == kept else '≠'} {kept:,}"
        rows.append(row)
        print(line)
    # Paper: a ladder's memory is 1/r of (|a| + |sigma'|). That leaves out the inputs of its
    # down-projections, which have the backbone's width.
    layer = formula.layer_formula(T5Config(**SIZES["t5-base"], attention="eager"), B=1, S=128)
    times = sum(row["bytes"] for row in layer) / (4 * 128 * SIZES["t5-base"]["d_model"])
    print(f"""
Training only biases reads no {{a}}: "up to 50 %" less. So it is for GELU. For
ReLU and sigmoid autograd computes sigma' from a_{{i+1}}, and only the input is
saved. A ladder needs 1/r of either, and also all the {{a}}: its down-projections
read them. In an MLP, which keeps little else, it saves little or nothing. But a
Transformer layer keeps {times:.1f} times its output, of which the ladder reads one.""")
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
    side: str = "ladder"  # or a variant (Table 4)
    r: int = 8
    keep: tuple[int, ...] | None = None  # None: as KEEP says; (): all
    freeze: int = 0
    size: int | None = None  # of adapters or LoRA
    attention: str = "eager"
    checkpoint: bool = False
    dtype: str = "fp32"  # of a frozen backbone; nf4: of its blocks' linear maps, else bf16
    batch: tuple[int, int, int] = (100, 128, 2)  # B, S, T
    images: bool = False  # Table 3's CLIP-T5
    conventions: tuple[str, ...] = ()  # of the environment of 2021
    title: str = ""

    @property
    def name(self) -> str:
        return METHODS[self.method] + f", {self.side}" * (self.side != "ladder")

    @property
    def label(self) -> str:
        return self.title or f"{self.name}, {self.model[3:]}"

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
        check_ladder(c, self.r, self.layers)
        if self.dtype == "nf4" and self.method != "lst":
            raise ValueError("--dtype nf4: beside a T5 in 4 bits only --method lst is counted")
        if self.freeze >= 2 * N:
            raise ValueError(f"--freeze {self.freeze} must be below {2 * N}: something must train")
        if self.method == "lst" and self.attention == "fused" and c.d_kv // self.r % 4 and on_cuda:
            raise ValueError(f"--r {self.r}: fused heads are 4, 8, ... wide: use --attention eager")
        return self

    def build(self) -> nn.Module:
        t5 = CLIPT5(self.config, channels=IMAGES[-1]) if self.images else T5(self.config)
        if self.dtype != "fp32":
            t5.to(torch.bfloat16)
        if self.dtype == "nf4":
            quantize_(t5)
        if self.images:
            t5.visual.float()
        if self.method == "lst":
            net = methods.SIDES[self.side](t5, self.r, self.layers or None)
        else:
            net = methods.apply(t5, self.method, self.conventions == OF_TABLE_1, self.freeze,
                                self.size)
        if "mask" not in self.conventions:
            kernels.install(net)  # as train.py does
        return net

    def make_batch(self, B: int | None = None) -> account.Batch:
        images, V = IMAGES if self.images else None, self.config.vocab_size
        return account.make_batch(B or self.batch[0], *self.batch[1:], V, images)

    def account(self) -> dict:
        """Return the bytes of training, and of inference at batch 1."""
        with torch.device("meta"):
            net, batch = self.build(), self.make_batch()
            trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
            counted = net if self.images else T5(self.config)  # Table 1's shares: of the backbone
            total = sum(p.numel() for p in counted.parameters())
            step = account.training_step(net, batch, self.conventions)
            if self.images and self.method == "lora":
                methods.merge(net)  # Paper: Table 3's 0.86 is of merged weights, Table 1's is not
            inference = account.inference(net, self.make_batch(1))
        published = replace(self, conventions=(), title="")
        paper, paper_inference = PAPER.get(published, (None, None))
        return {"batch": self.batch[0], "length": self.batch[1], "r": self.r,
                "keep": len(self.layers), "freeze": self.freeze, "size": self.size,
                "dtype": self.dtype, "trainable_params": trained,
                "trainable_percent": 100 * trained / total, **step,
                "peak_paper_gb": step["peak"] / account.GB, "paper_gb": paper,
                "inference_peak_paper_gb": inference / account.GB,
                "paper_inference_gb": paper_inference}


# Of Table 3's four tasks GQA has the largest step: batch 500, questions cut to 20 tokens, answers
# of up to 9 ("styrofoam": eight pieces and the end).
TABLE_3 = dict(r=4, keep=(), batch=(500, 20, 9), images=True)
PAPER = {  # GB of training and of inference in Tables 1, 3 and 4
    Case("full"): (17.6, 0.86), Case("adapters"): (13.0, 0.87), Case("lora"): (12.6, 0.86),
    Case("bitfit"): (10.7, 0.86), Case("prompt"): (22.2, 0.87), Case("lst"): (5.5, 0.88),
    Case("lst", "t5-large"): (12.2, 2.88), Case("lst", "t5-3b"): (22.4, 11.01),
    Case("full", **TABLE_3): (36.2, 0.86), Case("adapters", **TABLE_3): (28.4, 0.93),
    Case("lora", **TABLE_3): (27.9, 0.86), Case("bitfit", **TABLE_3): (22.7, 0.86),
    Case("prompt", **TABLE_3): (38.7, 0.87), Case("lst", **TABLE_3): (15.3, 0.93),
    Case("lst", keep=()): (7.0, None), Case("lst", keep=(), side="cross"): (10.4, None),
    Case("lst", keep=(), side="adapters", r=16): (6.5, None),
}
TABLES = {1: [*PAPER][:8], 3: [*PAPER][8:14], 4: [*PAPER][14:]}


def show_table_1(args: argparse.Namespace, cases: Sequence[Case]) -> dict:
    (B, S, T), attention = args.batch, f"{args.attention} attention"
    title = f"Peak of a training step, batch {B}, source {S}, target {T}, {attention}"
    return {"rows": stories.show_cases(args, title, cases)}


def show_everything(args: argparse.Namespace, cases: Sequence[Case]) -> dict:
    """Section 3.1, Table 1 and three of its rows with checkpointing, what makes our LST small."""
    again = [replace(case, checkpoint=True, title=f"{case.name}, checkpointing")
             for case in map(Case, ("full", "lora", "lst"))]
    return {"section_3_1": show_section_3_1(), **show_table_1(args, [*cases, *again]),
            "tricks": stories.tricks(Case("lst"))}


# --------------------------------------------------------------------------------- command line

SHAPE = "method source_length target_length r keep"
ROWS = f"{SHAPE} attention checkpoint dtype free end side_dtype"
STORIES = {  # what to show, and the options that it reads; any other is refused
    "--explain": (formula.explain, "model batch_size source_length r attention"),
    "--sweep": (stories.sweep, f"{ROWS} model batch_size freeze plot"),
    "--fits": (stories.fits, f"{ROWS} model freeze"),
    "--time": (stories.show_time,
               "model batch_size source_length target_length r keep attention dtype device"),
    "--table 3": (stories.show_twice, f"{ROWS} table as_published batch_size device plot"),
    "--table 4": (stories.show_twice, "source_length target_length attention checkpoint dtype "
                                      "table as_published batch_size device plot"),
    "--as-published": (show_table_1, f"{SHAPE} as_published model batch_size freeze plot"),
    "--table 1": (show_table_1, f"{ROWS} table model batch_size freeze device plot"),
    "no option": (show_everything, "plot"),
}
READERS = {**dict.fromkeys(("r", "keep", "free", "end", "side_dtype"), ["lst"]),
           "freeze": ["full", "adapters", "lora", "bitfit"], "size": ["adapters", "lora"],
           "dtype": [*METHODS, "qlora"][1:]}  # others ignore it
FAMILIES = {"a T5": "explain sweep time table as_published freeze attention device",
            "a decoder-only --model": "free end side_dtype"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    story = parser.add_mutually_exclusive_group().add_argument
    story("--table", type=int, choices=TABLES, help="the rows of this table of the paper")
    story("--explain", action="store_true", help="the tensors of one layer, and why they are kept")
    story("--sweep", choices=stories.SWEEPS, help="the peak over one of these")
    story("--fits", type=positive, metavar="GB", help="largest batch on a card, GB of 2^30 bytes")
    story("--time", action="store_true", help="seconds of a step on this machine")
    add = parser.add_argument
    add("--as-published", action="store_true", help="Table 1 as in its environment")
    add("--model", choices=(*SIZES, *llm.SIZES), help="all methods, instead of Table 1's rows")
    add("--method", choices=(*METHODS, "qlora"), help="only this method")
    add("--batch-size", type=positive, help="default: the paper's; 8 with --time")
    add("--source-length", type=positive, help="default: the paper's")
    add("--target-length", type=positive, help="default: the paper's")
    add("--r", type=positive, help="reduction factor; default: the paper's")
    add("--keep", type=lambda text: () if text == "all" else tuple(numbers(text)),
        help="0-based layers of the ladder, or all; default: the paper's; all with --time")
    add("--free", type=positive, metavar="N", help="xLadder: blocks without a rung on top")
    add("--end", choices=("sum", "up"), default="sum", help="of such a ladder, see docs/llm.md")
    add("--side-dtype", choices=llm.DTYPES, help="in which it computes; default: both")
    add("--freeze", type=whole, default=0, metavar="K", help="train no layer below K (Fig. 6)")
    add("--attention", choices=("eager", "fused"), default="eager", help="default: eager (paper)")
    add("--checkpoint", action="store_true", help="gradient checkpointing of every row")
    add("--dtype", choices=("fp32", "bf16", "nf4"), default="fp32", help="of the frozen backbone")
    add("--device", choices=("meta", "cuda"), default="meta", help="cuda: take steps of today, too")
    add("--json", type=stories.new_file, help="also write what is returned to this file")
    add("--plot", type=stories.new_file, help="also draw a table or a sweep, as SVG")
    args = parser.parse_args(argv)
    if args.model in llm.SIZES:  # again, with other defaults
        parser.set_defaults(**llm.defaults(args))
        args = parser.parse_args(argv)

    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    chosen = {"--explain": args.explain, "--sweep": args.sweep, "--fits": args.fits,
              "--time": args.time, f"--table {args.table}": args.table in (3, 4),
              "--as-published": args.as_published, "--table 1": {*given} - {"json", "plot"}}
    args.story = next((story for story, wanted in chosen.items() if wanted), "no option")
    check(parser, args, given)

    B, S, T = TABLE_3["batch"] if args.table == 3 else (8 if args.time else 100, 128, 2)
    args.batch = args.batch_size or B, args.source_length or S, args.target_length or T
    args.r = args.r or {3: TABLE_3["r"], 4: None}.get(args.table, 8)
    args.keep = () if args.time and args.keep is None else args.keep
    args.conventions = OF_TABLE_1 if args.story == "--as-published" else ()
    return args


def check(parser: Parser, args: argparse.Namespace, given: Sequence[str]) -> None:
    """Refuse an option that the story, the method or the kind of model does not read."""
    swept = {"batch": "batch_size", "length": "source_length"}.get(args.sweep, args.sweep)
    methods_here = [args.method] if args.method else READERS.get(swept, METHODS)
    family = "a decoder-only --model" if args.model in llm.SIZES else "a T5"
    here = {args.story, family, *(f"--method {name}" for name in methods_here)}
    for name in given:
        stories_of = {story for story, (_, options) in STORIES.items() if name in options.split()}
        stories_of -= {"--sweep"} if name == swept else set()
        key = swept if name == "sweep" else name
        methods_of = {f"--method {method}" for method in READERS.get(key, ())}
        families_of = {family for family, names in FAMILIES.items() if name in names.split()}
        for readers in (stories_of, methods_of, families_of):
            if readers and not readers & here:
                parser.error(f"--{name.replace('_', '-')} means nothing here, only with "
                             f"{' or '.join(sorted(readers))}: leave it out")
    if args.json and args.json == args.plot:
        parser.error("--json and --plot name the same file")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; without it no GPU is needed")


def choose(args: argparse.Namespace) -> list[Case]:
    """Return the cases of the command line: a table's rows, or methods at one size."""
    if args.model in llm.SIZES:
        return llm.choose(args)
    if args.method == "qlora":
        raise ValueError(f"--method qlora wants a --model among {', '.join(llm.SIZES)}")
    few = {"--sweep": READERS.get(args.sweep, ("full", "lora", "lst")),
           "--time": ("lst", "lora", "full"), "--explain": ("lst",)}
    if args.model or args.story in few:
        some = (args.method,) if args.method else few.get(args.story, METHODS)
        cases = [Case(method, args.model or "t5-base") for method in some]
    else:
        cases = [case for case in TABLES[args.table or 1] if args.method in (None, case.method)]
    options = "batch", "r", "keep", "freeze", "attention", "checkpoint", "dtype", "conventions"
    chosen = []
    for case in cases:
        given = {name: getattr(args, name) for name in options if getattr(args, name) is not None
                 and case.method in READERS.get(name, METHODS)}
        chosen.append(replace(case, **given).check(on_cuda=not args.time))
    return chosen


def run(args: argparse.Namespace) -> dict:
    show = llm.STORIES[args.story] if args.model in llm.SIZES else STORIES[args.story][0]
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
