"""Frozen weights in four bits: NF4 with double quantisation (arXiv:2305.14314).

Each 64 weights are divided by the largest of them, absmax, and become the nearest of 16 quantiles
of a normal distribution (Sec. 3). Each 256 absmax, less their mean over the tensor, become 8 bits
and a float32: 0.5 + 1 / 64 + 4 / (64 * 256) = 0.516 bytes a weight. It is made again for each
product, since a frozen weight is only read. The codes are bitsandbytes', bit by bit.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NF4 = torch.tensor([  # App. E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0])
PAIRS = torch.view_as_complex(torch.cartesian_prod(NF4, NF4))  # both weights of a byte in a look-up


def dynamic_map() -> Tensor:
    """256 values, the finer the nearer to 0 (arXiv:1511.04561): means of neighbours among 2^i + 1
    numbers from 0.1 to 1, times 10^(i - 6), for i < 7, both signs; 0 and 1."""
    # Paper: absmax in 8-bit floats; the authors' code has this map.
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [means, -means]
    return torch.cat(values).sort().values


DYNAMIC = dynamic_map()


def blockwise(x: Tensor, code: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The nearest values of `code` to x (n,) / absmax, as uint8 (n,); and each block's absmax."""
    blocks = F.pad(x, (0, -len(x) % size)).view(-1, size)
    absmax = blocks.abs().amax(dim=1)
    middles = ((code[:-1] + code[1:]) / 2).to(x.device)
    nearest = torch.bucketize(blocks * (1 / absmax.clamp(min=1e-38))[:, None], middles)
    return nearest.to(torch.uint8).flatten()[: len(x)], absmax


class NF4Linear(nn.Module):
    """A frozen nn.Linear whose weight, of whole blocks of 64, is in NF4."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features, self.bias = *linear.weight.shape, linear.bias
        codes, absmax = blockwise(linear.weight.flatten().float(), NF4, 64)
        absmax_codes, scales = blockwise(absmax - absmax.mean(), DYNAMIC, 256)
        self.register_buffer("codes", codes[0::2] << 4 | codes[1::2])  # two in a byte
        self.register_buffer("absmax_codes", absmax_codes)
        self.register_buffer("scales", scales)
        self.register_buffer("mean", absmax.mean())

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), made again."""
        dynamic, pairs = DYNAMIC.to(self.codes.device), PAIRS.to(self.codes.device)
        absmax = dynamic.index_select(0, self.absmax_codes.int())
        absmax = absmax * self.scales.repeat_interleave(256)[: len(absmax)] + self.mean
        weight = torch.view_as_real(pairs.index_select(0, self.codes.int())).view(-1, 64)
        weight = weight.mul_(absmax[:, None]).to(dtype)  # in place: one copy in float32
        return weight.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        h = Product.apply(x, self)
        return h if self.bias is None else h + self.bias


class Product(torch.autograd.Function):
    """x W^T. Backward makes W again; autograd by itself would keep every W, in 16 bits or more."""

    @staticmethod
    def forward(context, x: Tensor, linear: NF4Linear) -> Tensor:
        context.linear = linear
        return F.linear(x, linear.weight(x.dtype))

    @staticmethod
    def backward(context, g: Tensor) -> tuple[Tensor, None]:
        return g @ context.linear.weight(g.dtype), None


def replace(net: nn.Module, kind: type, make) -> nn.Module:
    """Put make(module) in the place of each module of this kind in a net's blocks, or a block."""
    lists = [module for module in net.modules() if isinstance(module, nn.ModuleList)]
    for parent in [part for blocks in lists or [net] for part in blocks.modules()]:
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                setattr(parent, name, make(child))
    return net


@torch.no_grad()
def quantize_(net: nn.Module) -> nn.Module:
    """Store the linear maps of a frozen backbone's blocks in NF4, in place. No .to(dtype) may
    follow: it would round the scales."""
    return replace(net, nn.Linear, NF4Linear)
