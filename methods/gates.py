"""The ladder without its rungs: `--gates shut` (Fig. 8, "network compression")."""
import torch

from side import LadderT5


def shut_gates(ladder: LadderT5) -> LadderT5:
    """Set mu = 0 on every rung, for good: the side network without its ladders."""
    for stack in (ladder.encoder, ladder.decoder):
        for block in stack.blocks:
            torch.nn.init.constant_(block.rung.alpha, -torch.inf)
            block.rung.requires_grad_(False)
    return ladder
