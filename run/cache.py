"""--cache: a row passes the frozen backbone once, not once in every epoch (as in arXiv:2408.10746).

Before the first step the rows pass it, from short to long, in groups that depend on no training
batch. What the rungs read is kept in a file that has no name, so that it ends with the process, and
that is read, not mapped, so that it is not the process's memory. A row takes
(n_encoder S + n_decoder T) D numbers of the backbone's dtype, where n is the number of kept layers;
of a decoder-only model n (S + T - 1) D, where the last layer counts if the head reads it.
"""
import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor, nn

from data import Row, collate
from model import T5, Memory
from run.report import Progress, print0
from side import SideStack


def stacks_of(ladder: nn.Module) -> list[SideStack]:
    """Encoder and decoder of a T5's, or the one of a decoder-only backbone's."""
    return [stack for stack in ladder.children() if isinstance(stack, SideStack)]


class States:
    """Of each text what the rungs beside it read: of a source, of a target; or of both as one."""

    tokens = 1024  # that pass the backbone together: as much memory as a training step

    def __init__(self, ladder: nn.Module, rows: Sequence[Row], gigabytes: float, out: Path):
        self.file, self.gigabytes = TemporaryFile(dir=out, buffering=0), gigabytes
        self.places: dict[tuple, int] = {}  # (source,), (source, target): where its states begin
        began, progress, done = time.time(), Progress("hidden states, row", len(rows)), 0
        try:
            while done < len(rows):
                group = rows[done : done + max(1, self.tokens // len(rows[done].source))]
                group = group[: max(1, self.tokens // len(group[-1].source))]  # the longest
                if self.file.tell() < gigabytes * 1e9:
                    self.write(ladder, group)
                done += len(group)
                progress.step(done, f"{self.file.tell() / 1e9:.2f} GB")
        except OSError as error:
            print0(f"no room for hidden states, the run goes on without: {error}")
            self.places.clear()
            self.file.truncate(0)
        whole = len(stacks_of(ladder))
        self.about = {"rows": sum(len(text) == whole for text in self.places),
                      "bytes": self.file.seek(0, 2), "seconds": round(time.time() - began, 1)}

    def write(self, ladder: nn.Module, rows: Sequence[Row]) -> None:
        stacks, device = stacks_of(ladder), next(ladder.parameters()).device
        batch = [tensor.to(device) for tensor in collate(rows)[: 2 * len(stacks)]]
        for stack, keys, hidden in zip(stacks, texts(*batch), ladder.hidden_states(*batch)):
            for b, key in enumerate(keys):
                if key not in self.places:
                    self.places[key] = self.file.tell()
                    layers = [hidden[i + 1][b, : len(key[-1])] for i in stack.reads]
                    states = torch.stack(layers, dim=1).cpu()  # (S, n, D), its own S
                    if self.file.write(states.view(torch.uint8).numpy()) < states.nbytes:
                        raise OSError("the disk is full")

    def read(self, keys: list[tuple], words: Tensor, keep: Sequence[int],
             mask: Tensor | None) -> list | None:
        """words (B, S, D), then the layers in `keep`, 0 on padding. None if a row is not here."""
        if not self.places.keys() >= set(keys):
            return None
        states = torch.zeros(*words.shape[:2], len(keep), words.size(2), dtype=words.dtype)
        begins = [0] * len(keys) if mask is None else mask.int().argmax(dim=1).tolist()
        for key, own, begin in zip(keys, states, begins):
            self.file.seek(self.places[key])
            self.file.readinto(own[begin : begin + len(key[-1])].view(torch.uint8).numpy())
        kept = dict(zip(keep, states.to(words.device).unbind(dim=2)))
        return [words, *map(kept.get, range(max(kept) + 1))]


def texts(*batch: Tensor) -> list[list[tuple]]:
    """Ids and mask of sources, and of targets -> of each row (source,) and (source, target)."""
    columns, keys = [], []
    for ids, mask in zip(batch[::2], batch[1::2]):
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        columns.append([tuple(row[own].tolist()) for row, own in zip(ids, mask)])
        keys.append(list(zip(*columns)))
    return keys


@contextlib.contextmanager
def kept_states(ladder: nn.Module, states: States | None) -> Iterator[dict | None]:
    """While it lasts, kept rows do not pass the backbone. Yields what results.json says of it."""
    if states is None:
        yield None
        return
    backbone, compute, embed = ladder.backbone, ladder.hidden_states, ladder.backbone.embed

    def hidden_states(*batch: Tensor) -> tuple[list, ...]:
        words, reads = map(embed, batch[::2]), [stack.reads for stack in stacks_of(ladder)]
        found = tuple(map(states.read, texts(*batch), words, reads, batch[1::2]))
        return found if all(found) else compute(*batch)

    def encode(ids: Tensor, mask: Tensor, images=None, keep=()) -> tuple[list, Memory]:
        hidden = states.read(*texts(ids, mask), embed(ids), keep, mask)
        if hidden is None:
            return compute_encoder(ids, mask, images, keep)
        return hidden, Memory(backbone.encoder.finish(hidden[-1]), mask)

    ladder.hidden_states = hidden_states
    if isinstance(backbone, T5) and backbone.config.num_layers - 1 in ladder.encoder.keep:
        compute_encoder, backbone.encode = backbone.encode, encode  # the decoder reads its last
    try:
        yield states.about
    finally:
        del ladder.hidden_states
        backbone.__dict__.pop("encode", None)
