"""Pre-trains the bundled backbone `assets/nano`: a small T5, from nothing, on movie reviews.

    torchrun --nproc-per-node 2 assets/make/make_nano.py --text train.jsonl.xz unsup.txt.xz

A text file is .txt (a review on each line) or .jsonl ({"text": ..., "label": 0 or 1} on each line),
as it is or packed (.xz). Five jobs, one after the other; the first four leave their results in
--work and are not done twice:

    1  vocabulary     SentencePiece unigram, lower-casing; the 100 sentinels come on top, as in T5
    2  packing        all reviews as piece ids, half of them in the style of the Penn Treebank
                      ("it 's", "does n't")
    3  teacher        a linear model learns what pieces and pairs of pieces say about a label
    4  word vectors   start from which pieces occur near which others, factorised: from random ones
                      they take a quarter of an hour to get there
    5  pre-training   span corruption (arXiv:1910.10683, Sec. 3.1.4) and, as in T5's own mixture
                      (Sec. 3.5.3), a supervised task, from which word vectors do not learn:
                      "imdb sentence: a few words or sentences" -> "positive" or "negative"

Ctrl-C ends it early, with what it has learned. Processes of one thread each beat one with threads.
Where fresh memory is slow (many virtual machines), MALLOC_MMAP_MAX_=0 and
MALLOC_TRIM_THRESHOLD_=100000000000 in the environment make a step faster.
"""
import argparse
import json
import lzma
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from model import EOS, PAD, SENTINELS, UNK, T5, T5Config, save_t5  # noqa: E402

PIECES = 8192 - SENTINELS  # so that the vocabulary, and with it the embedding, has 8192 rows
PROMPTS = "imdb sentence:", "review:", "sentence:"  # one of them before each sentiment batch
ANSWERS = "negative", "positive"
CONFIG = T5Config(vocab_size=8192, d_model=256, d_kv=32, d_ff=1024, num_layers=3, num_heads=8,
                  dropout_rate=0.0, attention="eager")
WINDOW, NOISE, SPANS = 106, 16, 5  # 15 % in spans of 3.2: 95 + 1 source, 22 + 1 target pieces
BUCKETS = 2**22  # of the teacher: single pieces keep their ids, pairs are hashed
SHARPEN = 2.6  # the teacher learned from whole reviews: too timid about crops, by held-out reviews


# ----------------------------------------------------------------------------- text and vocabulary

def reviews_in(paths: list[Path]) -> Iterator[tuple[list[str], int]]:
    """(sentences, label or -1) of each review; every other one, by lot, in treebank style."""
    rng = np.random.default_rng(0)
    for path in paths:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line) if ".jsonl" in path.name else {"text": line}
                text = re.sub(r"<br\s*/?>", " ", row["text"])
                # a full stop that lost its space
                text = re.sub(r"(?<=[a-z0-9)\"'][.!?])(?=[A-Z\"][A-Za-z' ])", " ", text)
                text = " ".join(text.split())
                text = treebank(text) if rng.random() < 0.5 else text
                yield re.split(r"(?<=[.!?])\s+(?=[^\s.!?'])", text), row.get("label", -1)


def treebank(text: str) -> str:
    """Make punctuation and clitics words of their own, as in the Penn Treebank."""
    auxiliary = "ca|wo|do|does|did|is|are|was|were|has|have|had|would|could|should|must|need|ai"
    text = re.sub(r'(^|[\s(])"', r"\1 `` ", text).replace('"', " '' ")
    text = re.sub(r"(\.\.\.+|--+|[!?;:,()\[\]])(?!\d)", r" \1 ", text)
    text = re.sub(r"(?<=[\w)'%])(?<!\bMr)(?<!\bMrs)(?<!\bDr)\.(?=\s|$)", " .", text)
    text = re.sub(rf"(?i)\b({auxiliary})(n't)\b", r"\1 \2", text)
    text = re.sub(r"(?i)(?<=\w)('s|'re|'ve|'ll|'d|'m)\b", r" \1", text)
    return " ".join(re.sub(r"(?<=s)'(?=\s)", " '", text).split())


def make_vocabulary(text: list[Path], work: Path) -> None:
    """T5's conventions: pad 0, end 1, unknown 2, no start."""
    spm.SentencePieceTrainer.train(
        sentence_iterator=(sentence for review, _ in reviews_in(text) for sentence in review),
        model_prefix=str(work / "spiece"), model_type="unigram", vocab_size=PIECES,
        input_sentence_size=400_000, shuffle_input_sentence=True, num_threads=2, pad_id=PAD,
        eos_id=EOS, unk_id=UNK, bos_id=-1, normalization_rule_name="nmt_nfkc_cf",
        character_coverage=0.9999, user_defined_symbols=["n't", "▁n't", "'s", "▁'s"],
        required_chars="0123456789.,;:!?'\"`()-/&%$#*+=@[]<>_")


def pack(text: list[Path], work: Path) -> None:
    """All reviews as one array of piece ids, and where words, sentences and reviews begin."""
    tokenizer = spm.SentencePieceProcessor(model_file=str(work / "spiece.model"))
    reviews = list(reviews_in(text))
    pieces = tokenizer.encode([part for review, _ in reviews for part in review], num_threads=2)
    begins_word = np.array([tokenizer.id_to_piece(i).startswith("▁") for i in range(PIECES)])
    flat = np.concatenate([np.array(ids, np.uint16) for ids in pieces])
    sentence = np.cumsum([0] + [len(ids) for ids in pieces])
    review = sentence[np.cumsum([0] + [len(review) for review, _ in reviews])]
    word = np.append(np.flatnonzero(begins_word[flat]), len(flat))
    label = np.array([label for _, label in reviews], np.int8)
    np.savez(work / "packed.npz", pieces=flat, word=word, sentence=sentence, review=review,
             label=label)


# ----------------------------------------------------------------------------------------- teacher

def pairs(ids: np.ndarray) -> np.ndarray:
    return (ids[..., :-1] * 1_000_003 + ids[..., 1:] * 8191 + PIECES) % BUCKETS


def teach(packed: dict, held_out: np.ndarray, work: Path) -> None:
    """Naive Bayes ratios times learned weights ("NB-SVM", Wang and Manning, ACL 2012).

    From the labelled reviews. Keeps what each bucket says, (BUCKETS,), and the probability that
    each review, labelled or not, is positive.
    """
    label, bags = packed["label"], []
    for start, end in zip(packed["review"][:-1], packed["review"][1:]):
        ids = packed["pieces"][start:end].astype(np.int64)
        bags.append(torch.from_numpy(np.unique(np.concatenate([ids, pairs(ids)]))))
    known = np.flatnonzero((label >= 0) & ~held_out)
    counts = torch.ones(2, BUCKETS)  # of reviews that hold it, plus one
    for row in known:
        counts[int(label[row]), bags[row]] += 1
    ratio = torch.log(counts[1] / counts[0])
    weight = torch.full((BUCKETS, 1), 0.02, requires_grad=True)
    optimizer = torch.optim.SparseAdam([weight], lr=2e-3)

    def logits(rows: np.ndarray) -> Tensor:
        ids = torch.cat([bags[row] for row in rows])
        offsets = torch.tensor([0] + [len(bags[row]) for row in rows[:-1]]).cumsum(0)
        return F.embedding_bag(ids, weight, offsets, mode="sum", sparse=True,
                               per_sample_weights=ratio[ids])[:, 0]

    rng = np.random.default_rng(0)
    for _ in range(4):
        for rows in np.array_split(rng.permutation(known), len(known) // 64):
            optimizer.zero_grad()
            labels = torch.from_numpy(label[rows]).float()
            F.binary_cross_entropy_with_logits(logits(rows), labels).backward()
            optimizer.step()
    with torch.no_grad():
        rows = np.array_split(np.arange(len(bags)), 100)
        review = torch.cat([logits(part) for part in rows]).sigmoid()
    weight = weight.detach()[:, 0] * ratio
    np.savez(work / "teacher.npz", weight=weight.numpy(), review=review.numpy())


def make_vectors(packed: dict, work: Path) -> None:
    """Positive pointwise mutual information of pieces at most five apart, its largest singular
    vectors (Levy and Goldberg, NeurIPS 2014): (PIECES, D), each vector of the same length."""
    pieces, D = packed["pieces"].astype(np.int64), CONFIG.d_model
    together = np.zeros(PIECES * PIECES, np.float32)
    for distance in range(1, 6):
        ids = pieces[:-distance] * PIECES + pieces[distance:]
        together += np.bincount(ids, minlength=PIECES**2) * (1 if distance <= 2 else 0.5)
    together = together.reshape(PIECES, PIECES)
    together += together.T
    often = together.sum(axis=1)
    context = often**0.75 / (often**0.75).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.log(together / often[:, None] / context)
    information = np.nan_to_num(information, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    u, s, _ = torch.svd_lowrank(torch.from_numpy(information), q=D + 24, niter=3)
    vectors = (u * s.sqrt())[:, :D]
    vectors = F.normalize(vectors - vectors.mean(dim=0), dim=1) * D**0.5
    np.save(work / "vectors.npy", vectors.numpy())


# ----------------------------------------------------------------------------------------- batches

def random_sums(rng: np.random.Generator, B: int, total: int, parts: int) -> np.ndarray:
    """B random ways to write `total` as a sum of `parts` whole numbers above zero: (B, parts)"""
    cuts = 1 + np.sort(rng.random((B, total - 1)).argsort(axis=1)[:, : parts - 1], axis=1)
    return np.diff(cuts, axis=1, prepend=0, append=total)


def span_corruption(rng: np.random.Generator, windows: np.ndarray) -> tuple[Tensor, Tensor]:
    """windows (B, WINDOW) -> source (B, S), target (B, T), both with the end token:
    thank you <X> me to your party <Y> week </s>  ->  <X> for inviting <Y> last <Z> </s>"""
    B = len(windows)
    lengths = np.empty((B, 2 * SPANS + 1), np.int64)  # kept, lost, kept, ..., lost, kept
    lengths[:, 0::2] = random_sums(rng, B, WINDOW - NOISE, SPANS + 1)
    lengths[:, 1::2] = random_sums(rng, B, NOISE, SPANS)
    segment = np.repeat(np.tile(np.arange(2 * SPANS + 1), B), lengths.ravel()).reshape(B, WINDOW)
    lost, first = segment % 2 == 1, np.diff(segment, axis=1, prepend=-1) != 0
    sentinel = PIECES + SENTINELS - 1 - segment // 2
    end = np.full((B, 1), EOS)
    source = np.where(lost, sentinel, windows)[~lost | first].reshape(B, -1)
    target = np.where(lost, windows, sentinel)[lost | first].reshape(B, -1)
    return torch.from_numpy(np.hstack([source, end])), torch.from_numpy(np.hstack([target, end]))


def crops(rng: np.random.Generator, packed: dict, reviews: np.ndarray, n: int) -> np.ndarray:
    """n rows (start, end, review): 35 % a phrase of 2 to 30 words, 45 % a sentence, 20 % two to
    four sentences. A third comes from a review's first or last sentences, which tell its label."""
    word, sentence, review = packed["word"], packed["sentence"], rng.choice(reviews, n)
    low, high = (np.searchsorted(sentence, packed["review"][review + i]) for i in (0, 1))
    at, edge, kind = rng.integers(low, high), rng.random(n), rng.random(n)
    last = high - 1 - rng.integers(0, 3, n)
    at = np.where(edge < 0.23, last, np.where(edge < 0.33, low, at)).clip(low, high - 1)
    many = np.where(kind < 0.2, rng.integers(2, 5, n), 1)
    start, end = sentence[at], sentence[np.minimum(at + many, high)]
    first, last = np.searchsorted(word, start), np.searchsorted(word, end)
    words = np.exp(rng.normal(1.9, 0.7, n)).astype(np.int64).clip(2, 30)
    phrase = first + (rng.random(n) * np.maximum(last - first - words, 1)).astype(np.int64)
    start = np.where(kind > 0.65, word[phrase], start)
    end = np.where(kind > 0.65, word[np.minimum(phrase + words, last)], end)
    return np.stack([start, np.minimum(end, start + 96), review], axis=1)


def sentiment_batches(rng: np.random.Generator, packed: dict, reviews: np.ndarray,
                      prompts: list[np.ndarray], size: int, share: float,
                      batches: int = 16) -> list[tuple[Tensor, Tensor]]:
    """`batches` times (source (B, S), belief (B,)) of about `size` pieces, crops of nearly one
    length. The belief that a crop is positive: `share` of it is its review's label, the rest what
    the teacher says about the crop."""
    rows = crops(rng, packed, reviews, batches * size // 12)
    extra = 4 + max(len(prompt) for prompt in prompts)
    rows = rows[np.cumsum(rows[:, 1] - rows[:, 0] + extra) < batches * size]
    rows = rows[np.argsort(rows[:, 1] - rows[:, 0], kind="stable")]
    cuts = np.cumsum(rows[:, 1] - rows[:, 0] + extra).searchsorted(np.arange(1, batches) * size)
    made, most = [], len(packed["pieces"]) - 1
    for start, end, review in (part.T for part in np.split(rows, cuts)):
        length, place = end - start, np.arange(max(end - start) + 1)
        inside = place < length[:, None]
        ids = packed["pieces"][(start[:, None] + place).clip(max=most)].astype(np.int64)
        linear = (packed["weight"][ids] * inside).sum(1)
        linear += (packed["weight"][pairs(ids)] * inside[:, 1:]).sum(1)
        belief = share * packed["positive"][review] + (1 - share) / (1 + np.exp(-SHARPEN * linear))
        ids = np.where(inside, ids, np.where(place == length[:, None], EOS, PAD))
        # noise in front, so that no word before "sentence:" matters
        noise = rng.integers(UNK + 1, PIECES, (len(start), rng.integers(0, 4)))
        prompt = np.tile(prompts[rng.integers(len(prompts))], (len(start), 1))
        source = torch.from_numpy(np.hstack([noise, prompt, ids]))
        made.append((source, torch.from_numpy(belief).float()))
    return [made[i] for i in rng.permutation(len(made))]


# ------------------------------------------------------------------------------------ pre-training

class Optimizer:
    """Muon (orthogonalised momentum, Jordan et al. 2024) for the matrices between activations, Adam
    for word vectors, norms and position bias.

    The weights are kept in float32 here; the model that computes is their bfloat16 copy. q and k
    take smaller steps: T5 has no 1 / sqrt(K), and attention would soon be one-hot.
    """

    def __init__(self, t5: T5, muon_lr: float, adam_lr: float):
        self.weights = {name: nn.Parameter(p.detach().clone()) for name, p in t5.named_parameters()}
        self.t5 = t5.to(torch.bfloat16)
        match, hidden, rest = [], [], []
        for name, p in self.weights.items():
            if p.ndim != 2 or "embed" in name or "pos_bias" in name:
                rest.append(p)
            else:
                (match if ".q." in name or ".k." in name else hidden).append(p)
        self.optimizers = (
            (torch.optim.Muon(match, lr=muon_lr, weight_decay=0.0), 0.2 * muon_lr),
            (torch.optim.Muon(hidden, lr=muon_lr, weight_decay=0.0), muon_lr),
            (torch.optim.Adam(rest, lr=adam_lr, betas=(0.9, 0.95), fused=True), adam_lr))

    @torch.no_grad()
    def step(self, scale: float) -> None:
        flat = torch.cat([p.grad.flatten() for p in self.t5.parameters()])  # bfloat16
        dist.all_reduce(flat)  # the sum over processes
        grads = flat.split([p.numel() for p in self.t5.parameters()])
        for own, p, grad in zip(self.weights.values(), self.t5.parameters(), grads):
            own.grad, p.grad = grad.view_as(p).float(), None
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        for optimizer, lr in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr * scale
            optimizer.step()
        for own, p in zip(self.weights.values(), self.t5.parameters()):
            p.copy_(own)


def export(weights: dict[str, Tensor], work: Path, out: Path) -> None:
    """The folder that `--model` reads, in float16: finer than bfloat16, and no weight overflows."""
    t5 = T5(replace(CONFIG, dropout_rate=0.1))  # for fine-tuning
    t5.load_state_dict(weights)
    save_t5(t5, out, torch.float16)
    shutil.copy(work / "spiece.model", out / "spiece.model")
    (out / "model.safetensors").chmod(0o644)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, nargs="+", required=True, metavar="FILE", help="reviews, see above")
    add("--minutes", type=float, default=80, help="of pre-training; the step size falls to zero")
    add("--work", type=Path, default=Path("nano-work"), help="what is kept between runs")
    add("--out", type=Path, default=ROOT / "assets" / "nano")
    add("--span-batch", type=int, default=2016, help="source pieces in a process's step")
    add("--sentiment-batch", type=int, default=2400, help="the same, of crops with a label")
    add("--label-share", type=float, default=0.4, help="what the label tells, not the teacher")
    add("--save-minutes", type=float, default=4, help="minutes between two exports")
    add("--muon-lr", type=float, default=0.01)
    add("--adam-lr", type=float, default=2e-3)
    args = parser.parse_args(argv)
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
                       "MASTER_PORT": "29500"}.items():
        os.environ.setdefault(key, value)  # without torchrun: one process
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same start in all processes
    dist.init_process_group("gloo")
    first, processes, work = dist.get_rank() == 0, dist.get_world_size(), args.work
    for folder in (work, args.out):
        folder.mkdir(parents=True, exist_ok=True)

    if first and not (work / "spiece.model").exists():
        make_vocabulary(args.text, work)
    if first and not (work / "packed.npz").exists():
        pack(args.text, work)
    dist.barrier()
    packed = dict(np.load(work / "packed.npz"))
    label, held_out = packed["label"], np.zeros(len(packed["label"]), bool)
    held_out[np.flatnonzero(label >= 0)[::25]] = True  # for measuring: not in the sentiment task
    if first and not (work / "teacher.npz").exists():
        teach(packed, held_out, work)
    if first and not (work / "vectors.npy").exists():
        make_vectors(packed, work)
    dist.barrier()
    teacher = np.load(work / "teacher.npz")
    packed["weight"], guess = teacher["weight"], teacher["review"]
    packed["positive"] = np.where(label >= 0, label == 1, guess > 0.5)
    sure = (label >= 0) | (abs(guess - 0.5) > 0.3)  # labelled, or guessed with confidence
    told = np.flatnonzero(~held_out & sure)

    tokenizer = spm.SentencePieceProcessor(model_file=str(work / "spiece.model"))
    prompts = [np.array(tokenizer.encode(prompt)) for prompt in PROMPTS]
    answers = torch.tensor([tokenizer.encode(answer) + [EOS] for answer in ANSWERS])  # (2, 2)
    t5 = T5(CONFIG)
    t5.embed.weight.data[:PIECES] = torch.from_numpy(np.load(work / "vectors.npy"))
    t5.embed.weight.data.mul_(0.5)  # quieter word vectors: the layers are heard sooner
    optimizer = Optimizer(t5, args.muon_lr, args.adam_lr)
    if first:
        right = ((guess > 0.5) == label)[held_out].mean()
        print(f"{sum(p.numel() for p in t5.parameters()):,} parameters, {len(packed['pieces']):,} "
              f"pieces, {len(label):,} reviews, {len(told):,} of them for sentiment; the teacher "
              f"is right on {right:.1%} of the held-out reviews", flush=True)

    def span_loss(rng: np.random.Generator) -> tuple[Tensor, int]:
        starts = rng.integers(0, len(packed["pieces"]) - WINDOW, args.span_batch // 96)
        windows = packed["pieces"][starts[:, None] + np.arange(WINDOW)].astype(np.int64)
        source, target = span_corruption(rng, windows)
        logits = t5(source, torch.ones_like(source).bool(), F.pad(target[:, :-1], (1, 0)))
        return F.cross_entropy(logits.flatten(0, 1), target.flatten()), source.numel()

    def sentiment_loss(source: Tensor, belief: Tensor) -> tuple[Tensor, float]:
        """Cross-entropy with the belief, and the share of crops with the believed answer."""
        positive = (belief > 0.5).long()
        logits = t5(source, source != PAD, F.pad(answers[positive, :1], (1, 0)))
        log_p = torch.log_softmax(logits.float(), dim=-1)  # (B, 2, V)
        no, yes = log_p[:, 0, answers[:, 0]].T
        loss = -(belief * yes + (1 - belief) * no + log_p[:, 1, EOS]).mean()
        return loss, (yes > no).eq(positive).float().mean().item()

    @torch.no_grad()
    def held_out_accuracy() -> float:
        """How often the label of a held-out review is said of its crops, always the same ones."""
        batches = sentiment_batches(np.random.default_rng(0), packed, np.flatnonzero(held_out),
                                    prompts[:1], 4096, share=1.0)
        return float(np.mean([sentiment_loss(*batch)[1] for batch in batches]))

    def report(row: dict) -> None:
        row = {"minutes": seconds / 60, "step": step, "pieces": seen} | row
        row = {key: round(float(value), 4) if isinstance(value, float) else value
               for key, value in row.items()}
        with open(args.out / "pretraining.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    step, seen, seconds, saved, stop, waiting, recent = 0, 0, 0.0, 0.0, [], [], []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(True))
    while True:
        began = time.monotonic()
        clock = torch.tensor([seconds, float(bool(stop))], dtype=torch.float64)
        dist.all_reduce(clock, dist.ReduceOp.MAX)  # all processes have one time, and stop together
        seconds = clock[0].item()
        if clock[1] or seconds >= 60 * args.minutes:
            break
        rng = np.random.default_rng((1, step, dist.get_rank()))
        waiting = waiting or sentiment_batches(rng, packed, told, prompts, args.sentiment_batch,
                                               args.label_share)
        source, belief = waiting.pop()
        sentiment, right = sentiment_loss(source, belief)
        sentiment.backward()
        t5.embed.weight.grad = None  # word vectors learn from span corruption only
        span, span_pieces = span_loss(rng)
        span.backward()
        # warm-up, then a straight line to zero
        optimizer.step(min(1, (step + 1) / 50) * (1 - seconds / (60 * args.minutes)))

        pieces, took = processes * (span_pieces + source.numel()), time.monotonic() - began
        step, seen, seconds = step + 1, seen + pieces, seconds + took
        recent.append((span.item(), sentiment.item(), right, pieces, took))
        if step % 50 == 0 and first:
            mean, recent = np.mean(recent, axis=0), []
            row = {"span_loss": mean[0], "sentiment_loss": mean[1], "sentiment_accuracy": mean[2],
                   "pieces_per_second": int(mean[3] / mean[4])}
            if seconds - saved > 60 * args.save_minutes:
                saved = seconds
                export(optimizer.weights, work, args.out)
                row["held_out_accuracy"] = held_out_accuracy()
            report(row)
    if first:
        export(optimizer.weights, work, args.out)
        report({"held_out_accuracy": held_out_accuracy()})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
