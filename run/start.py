"""Where a ladder starts from (Sec. 3.3 and 2.2)."""
import argparse

import torch

import prune
from methods.distill import distill
from model import Tokenizer, load_t5
from run.folder import load_trained
from run.options import INITS
from run.tasks import Rows, some
from side import LadderT5


def initialize(ladder: LadderT5, args: argparse.Namespace, rows: Rows,
               tokenizer: Tokenizer) -> None:
    """Sec. 3.3: the side network starts from the rows and columns of the backbone that matter; or
    from a distilled network (Sec. 2.2), another run's, or random weights, as --init says."""
    frozen, device = ladder.backbone, args.device
    if args.dtype == "nf4" and args.init in ("magnitude", "fisher"):
        ladder.backbone, device = load_t5(args.model), "cpu"  # the full weights, until it is pruned
    if args.init == "magnitude":
        prune.init_side(ladder, prune.magnitude(ladder.backbone), args.prune)
    elif args.init == "fisher":
        samples = some(rows, args.fisher_samples, args.seed, device)
        importance = prune.fisher(ladder.backbone, samples, args.fisher_samples)
        prune.init_side(ladder, importance, args.prune)
    elif args.init == "distill":
        torch.manual_seed(args.seed)  # the same start for every --side
        sentinel = tokenizer.vocab_size - 1  # <extra_id_0>
        distill(ladder, rows[args.task], sentinel, args.lr, args.batch_size, args.seed)
    elif args.init not in INITS:
        # Paper: always from the backbone. A side network trained on another task can help, too.
        load_trained(args.init, ladder)
    ladder.backbone = frozen
    if args.side == "cross" and args.init in {*INITS} - {"random"}:
        ladder.start_rungs()
