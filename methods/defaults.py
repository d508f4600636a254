"""The settings of every method: Tables 5 and 6 of the paper, and ours beside nano."""

ANY = "any"
DEFAULTS = (  # Tables 5 and 6, and the authors' code. Of the lines that fit a run the last counts
    # data       model   method    (warmup_steps None: a tenth of all; epochs: the task's own)
    ("texts",    ANY,    ANY,      dict(lr=3e-4, batch_size=100, warmup_steps=500, r=8)),
    ("texts",    ANY,    ANY,      dict(weight_decay=0.0, epsilon=1e-8, beta2=0.999, max_norm=1.)),
    ("texts",    ANY,    "prompt", dict(lr=3e-1)),
    ("texts",    ANY,    "lst",    dict(lr=3e-3)),
    ("texts",    ANY,    "--side adapters", dict(r=16)),
    ("texts",    ANY,    "y-tuning", dict(lr=1e-3)),  # Paper: it does not name one
    # Paper: it has no decoder-only backbone; these are ours, QLoRA's rate is arXiv:2305.14314's.
    ("texts", "decoder-only", ANY, dict(lr=3e-4, batch_size=32, epochs=3, warmup_steps=None)),
    ("texts", "decoder-only", "qlora", dict(lr=2e-4)),
    ("texts", "wide heads", "lst", dict(r=16)),
    ("pictures", ANY,    ANY,      dict(lr=3e-4, batch_size=300, warmup_steps=None, r=4)),
    ("pictures", ANY,    ANY,      dict(weight_decay=0.01, epsilon=1e-6, beta2=0.999, max_norm=5.)),
    ("pictures", ANY,    "bitfit", dict(lr=3e-3)),
    ("pictures", ANY,    "prompt", dict(lr=3e-3)),
    ("pictures", ANY,    "lst",    dict(lr=3e-3, weight_decay=0.03)),
    ("gqa",      ANY,    ANY,      dict(batch_size=500)),
    ("nlvr2",    ANY,    ANY,      dict(batch_size=100)),
    ("coco",     ANY,    ANY,      dict(batch_size=250)),
    ("joint",    ANY,    ANY,      dict(batch_size=300)),
    # Paper: the rest is ours, so that a run beside the bundled backbone is done in minutes. With
    # BitFit's 3e-4 biases learn nothing in SST-2's 664 steps.
    ("texts",    "nano", ANY,      dict(warmup_steps=60)),
    ("text",     ANY,    ANY,      dict(batch_size=32, warmup_steps=None, max_length=512)),
    ("texts",    "nano", "bitfit", dict(lr=1e-2)),
    ("large",    "nano", ANY,      dict(epochs=1, fisher_samples=256)),
    ("bundled-sample", ANY, ANY,   dict(epochs=5, warmup_steps=None)),
    ("pictures", "nano", ANY,      dict(batch_size=32, epochs=3, dropout=0.0)),
    # Paper: 3e-3, 1e-6 and 0.999. With them this small side network ignores the pictures: after
    # early gradients 100 times as large, its queries' are about 1e-7, below that epsilon.
    ("pictures", "nano", "lst",    dict(batch_size=16, lr=5e-4, epsilon=1e-8, beta2=0.99)),
    ("easy-vqa", "nano", "lst",    dict(epochs=4)),
    ("nlvr2",    "nano", "lst",    dict(epochs=6)),
    ("vqa",      "nano", "lst",    dict(epochs=14)),
    ("gqa",      "nano", "lst",    dict(epochs=14)),
)
