"""The memory of a step beside a decoder-only model: LST and xLadder, QLoRA, LoRA, everything.

A text has S tokens, and the last T of them are labelled. Only those positions reach the head.
"""
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from llm import LadderLM, Llama, LlamaConfig, nf4, quantize_
from llm.ladder import side_config
from memory import account, stories
from memory.environment import environment
from methods.qlora import QLoRA, add_qlora

GB = 10**9
SIZES = {  # V, D, intermediate_size, layers, H, G, K of the public models
    "llama-2-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128),
    "mistral-7b": LlamaConfig(32000, 4096, 14336, 32, 32, 8, 128),
    "smollm2-135m": LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, tie_word_embeddings=True),
}
METHODS = {"full": "full fine-tuning", "lora": "LoRA r 64", "qlora": "QLoRA r 64"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One training step: builds its network and its batch, and counts their bytes."""

    method: str
    model: str
    batch: tuple[int, int, int]  # B, S, T
    r: int
    dtype: str = "bf16"  # of the frozen backbone, or nf4: then the rest of it is in bf16
    checkpoint: bool = False
    keep: tuple[int, ...] = ()  # (): all
    free: int = 0
    end: str = "sum"
    side_dtype: str | None = None  # of a ladder

    @property
    def label(self) -> str:
        backbone = self.dtype.replace("nf4", "NF4")
        if self.method != "lst":
            return f"{METHODS[self.method]}, {backbone}" + ", checkpointing" * self.checkpoint
        name, shape = "xLadder" if self.free else "LST", ""
        if self.keep or self.free:
            shape = f", {len(self.keep) or self.config.num_hidden_layers} rungs"
            shape += f" + {self.free} free" * bool(self.free)
        end = ", end up" * (self.end == "up")
        return f"{name} r {self.r}{shape}, {backbone}, side {self.side_dtype}{end}"

    @property
    def config(self) -> LlamaConfig:  # without the model's own limit to a text's length
        return replace(SIZES[self.model], checkpoint=self.checkpoint,
                       max_position_embeddings=self.batch[1] + 1)

    def check(self) -> "Case":
        """ValueError where sizes do not go together: before the first row is counted."""
        (_, S, T), N, K = self.batch, self.config.num_hidden_layers, self.config.head_dim
        side_config(self.config, self.r)
        if K // self.r % 8:
            raise ValueError(f"--r {self.r}: fused heads are 8, 16, ... wide, not {K // self.r}")
        if not set(self.keep) <= set(range(N)):
            raise ValueError(f"keep is {[*self.keep]}, but the layers are 0 to {N - 1}")
        if T > S:
            raise ValueError(f"--target-length {T}: the labelled end of a text of {S} tokens")
        return self

    def build(self) -> nn.Module:
        llama = Llama(self.config).to(torch.bfloat16)
        if self.method == "full":
            return llama
        if self.method == "lora":
            llama.requires_grad_(False)
            return nf4.replace(llama, nn.Linear, lambda linear: QLoRA(linear, 0.0, 64, 16.0))
        if self.method == "qlora":
            return add_qlora(llama)
        if self.dtype == "nf4":
            quantize_(llama)
        keep, side_dtype = self.keep or None, DTYPES[self.side_dtype]
        return LadderLM(llama, self.r, keep, self.free, self.end, side_dtype)

    def make_batch(self, B: int | None = None) -> account.Batch:
        _, S, T = self.batch  # the first token that predicts a labelled one begins the target
        return account.make_batch(B or self.batch[0], S - T + 1, T, self.config.vocab_size)

    def account(self) -> dict:
        """Return the bytes of training, and of inference at batch 1."""
        B, S, T = self.batch
        with torch.device("meta"):
            total = sum(p.numel() for p in Llama(self.config).parameters())
            net = self.build()
            trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
            step = account.training_step(net, self.make_batch())
            generation = inference(net, S)
        return {**vars(self), "batch": B, "length": S, "labels": T,
                "trainable_params": trained, "trainable_percent": 100 * trained / total, **step,
                "inference": generation, "inference_peak_paper_gb": generation / account.GB,
                "peak_paper_gb": step["peak"] / account.GB,
                "paper_gb": None, "paper_inference_gb": None}


def inference(net: nn.Module, S: int) -> int:
    """Return the bytes at the peak of reading a text of S tokens and writing two more."""
    ids, mask = torch.zeros(1, S, dtype=torch.long), torch.ones(1, S, dtype=torch.bool)
    weights = [*net.eval().parameters(), *net.buffers()]
    with torch.no_grad(), environment(), account.Live([*weights, ids, mask]) as live:
        state = net.start(ids, mask)
        for _ in range(2):
            net.step(ids[:, :1], state)
    return account.bytes_of(weights) + live.most


def defaults(args: Namespace) -> dict:
    """Of these models' options; a side network's heads are 8 wide."""
    return dict(attention="fused", dtype=None, r=SIZES[args.model].head_dim // 8, batch_size=1,
                source_length=2048, target_length=args.source_length or 2048)


def choose(args: Namespace) -> list[Case]:
    """The rows of a model: those that the options leave."""
    N = SIZES[args.model].num_hidden_layers
    case = partial(Case, model=args.model, batch=args.batch, r=args.r, end=args.end)
    rows = [case("full"), case("lora"), case("qlora", dtype="nf4")]
    if args.checkpoint:
        rows = [replace(row, checkpoint=True) for row in rows]
    else:
        rows += [case("qlora", dtype="nf4", checkpoint=True)]
        ladders = [(args.keep or (), args.free or 0)]
        if args.keep is None and args.free is None:
            ladders += [(tuple(range(N // 2, N)), N // 2)]  # xLadder, as deep as the first
        side_dtypes = [args.side_dtype] if args.side_dtype else DTYPES
        rows += [case("lst", dtype=dtype, keep=keep, free=free, side_dtype=side_dtype)
                 for keep, free in ladders for dtype in ("bf16", "nf4")
                 for side_dtype in side_dtypes]
    rows = [row.check() for row in rows if args.method in (None, row.method)
            and args.dtype in (None, row.dtype)]
    if not rows:
        raise ValueError(f"no row of {args.model} is left: it has full and lora in bf16, qlora in "
                         "nf4, lst in either; --checkpoint is not for lst")
    return rows


def lengths_of(args: Namespace) -> str:
    _, S, T = args.batch
    return f"{S} tokens, " + ("all labelled" if T == S else f"the last {T} labelled")


def show(args: Namespace, cases: Sequence[Case]) -> dict:
    """Print the bytes of each row; draw bars with --plot."""
    rows = stories.count_all(cases, Case.account)
    title = f"Peak of a training step of {args.model}, {args.batch[0]} x {lengths_of(args)}"
    print(f"""
{title}
GB of 10^9 bytes; fused attention; what is added and AdamW's moments are in
float32; full fine-tuning keeps no float32 copy of its weights; infer: to read
such a text and to write on

weights  grads   Adam  saved  temp.   peak  infer  TFLOP""")
    for row in rows:
        numbers = [row[kind] / GB for kind in (*stories.KINDS, "peak", "inference")]
        numbers = "".join(f"{number:7.2f}" for number in numbers)
        print(f"{row['label']}\n{numbers}{row['flops'] / 1e12:7.1f}")
    if args.plot:
        stories.draw(args.plot, f"{title}; in GB", rows, GB)
    return {"rows": rows}


def fits(args: Namespace, cases: Sequence[Case]) -> dict:
    return stories.fits(args, cases, lengths_of(args))


STORIES = {"--fits": fits, "--table 1": show}
