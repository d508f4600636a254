"""A ladder beside a decoder-only backbone (Sec. 3.2), and xLadder (arXiv:2512.14237).

    ids -> embed ---> layer 0 ---> layer 1 ---> ... ---> layer N-1 ---> norm --.     frozen, width D
             | down      | down       | down                | down             v
            side -----> gate ------> gate ------> ... ---> gate ---> up -----> + --> frozen head
                         + block 0    + block 1             + block N-1

The SideStack of side.py with other blocks. The later paper's text, which has ladders beside 7B
models in 4 bits, could not be had: xLadder follows its abstract and secondary descriptions.
"""
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llm.llama import Block, CausalLM, Llama, LlamaConfig, context
from model import RMSNorm
from side import Gate, SideStack


def side_config(config: LlamaConfig, r: int) -> LlamaConfig:
    """Sec. 3.2: every width divided by r; the heads stay. ValueError: r does not divide them."""
    D, inner, K = config.hidden_size, config.intermediate_size, config.head_dim
    if D % r or inner % r or K % (2 * r):
        raise ValueError(f"r is {r}, but it must divide hidden_size {D}, intermediate_size {inner} "
                         f"and half of head_dim {K}")
    return replace(config, hidden_size=D // r, intermediate_size=inner // r, head_dim=K // r)


class LadderLM(CausalLM):
    """A frozen Llama and the ladder side network beside it. Same forward and generate.

    r, keep, free, rung: as LadderT5's. end: "sum" or "up", see `states`. Starts at random.
    side_dtype: in which the side network computes; its parameters are float32.
    """

    def __init__(self, backbone: Llama, r=8, keep: Collection[int] | None = None, free=0,
                 end="sum", side_dtype=torch.float32, rung=Gate, dropout=0.0):
        super().__init__()
        self.config, self.narrow = backbone.config, side_config(backbone.config, r)
        self.r, self.end, self.side_dtype = r, end, side_dtype
        D, d, N = self.config.hidden_size, self.narrow.hidden_size, len(backbone.layers)
        layers = sorted(range(N) if keep is None else set(keep))
        blocks = [Block(self.narrow) for _ in range(len(layers) + free)]
        norm = RMSNorm(d, self.config.rms_norm_eps)
        self.side = SideStack(blocks, norm, D, d, layers, rung, dropout, self.config.checkpoint)
        self.up = nn.Linear(d, D)
        if end == "sum":
            self.side.reads = tuple(sorted({*layers, N - 1}))
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        self.to(backbone.embed.weight.device)
        self.backbone = backbone.requires_grad_(False).eval()  # Llamas have no dropout
        self.depths = [N, len(blocks)]

    def hidden_states(self, ids: Tensor, mask: Tensor) -> tuple[list]:
        """What rungs read: frozen word embeddings, then layers' outputs, (B, T, D) each."""
        with torch.no_grad():  # Sec. 3.1: autograd sees nothing of the backbone
            return (self.backbone.hidden_states(ids, mask, keep=self.side.reads),)

    def states(self, ids: Tensor, mask: Tensor, T: int, caches=(None, None)) -> Tensor:
        cache, side_cache = caches
        if cache:
            hidden = self.backbone.hidden_states(ids, mask, cache, self.side.reads)
        else:
            hidden, = self.hidden_states(ids, mask)  # or what --cache has kept of them
        around = context(self.narrow, mask, ids.size(1), self.side_dtype)
        h_side = in_dtype(self.side, self.side_dtype, hidden, *around, cache=side_cache)
        h = in_dtype(self.up, self.side_dtype, h_side[:, -T:])  # (B, T, D)
        if self.end == "sum":
            # Paper: LST's head reads up(h) only, as with "up". Here `up` starts at 0 and the
            # backbone's end is added: training starts at the pretrained model. QST
            # (arXiv:2401.07159) meant that; its code starts with 0.73 of the backbone's end.
            h = self.backbone.norm(hidden[-1][:, -T:]) + h
        return h.to(self.backbone.embed.weight.dtype)

    def logits(self, h: Tensor) -> Tensor:
        return self.backbone.logits(h)


def in_dtype(module: nn.Module, dtype: torch.dtype, *inputs, **more) -> Tensor:
    """module(*inputs) in this dtype; gradients are those of its float32 parameters (mixed
    precision, arXiv:1710.03740). bfloat16 has float32's range and needs no loss scale."""
    parameters = {name: p.to(dtype) for name, p in module.named_parameters()}
    return functional_call(module, parameters, inputs, more)
