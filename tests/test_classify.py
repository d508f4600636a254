"""Table 2: an encoder-only ladder with a classification head, and Y-tuning."""
import pytest
import torch

import train
from data import TASKS, Example
from methods.classify import EncoderLadder, YTuning
from model import T5, T5Config
from run.folder import trainable
from run.tasks import as_classes, class_texts
from workshop import refused

BASE = dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32100)
TINY = dict(d_model=24, d_kv=16, d_ff=80, num_layers=3, num_heads=3, vocab_size=50)
ANSWERS = torch.tensor([[5, 1, 0], [6, 7, 1]])
each_kind = pytest.mark.parametrize("kind", [EncoderLadder, YTuning])


def tiny(kind):
    torch.manual_seed(0)
    net = kind(T5(T5Config(**TINY)), ANSWERS, *([4] if kind is EncoderLadder else []))
    for p in trainable(net).values():
        torch.nn.init.normal_(p, std=0.3)
    return net.eval()


@pytest.mark.parametrize("kind, count", [(EncoderLadder, 2_956_238), (YTuning, 9_442_560)])
def test_beside_t5_base_they_train_so_many(kind, count):
    with torch.device("meta"):
        net = kind(T5(T5Config(**BASE)), ANSWERS)
    assert sum(p.numel() for p in trainable(net).values()) == count


def test_table_2s_counts_with_bart_large_by_formula():
    D, layers, d_ff, vocabulary, positions, r, C = 1024, 12, 4096, 50265, 1026, 8, 2
    d = D // r

    def block(width, inner, attentions):  # with biases, and a norm with scale and shift each
        attention = 4 * (width * width + width) + 2 * width
        return attentions * attention + 2 * width * inner + inner + width + 2 * width

    head = D * D + D + C * D + C
    encoder = vocabulary * D + positions * D + 2 * D + layers * block(D, d_ff, 1)
    assert encoder + head == 204_730_370
    ladder = (1 + layers) * (D * d + d) + layers + layers * block(d, d_ff // r, 1) + d * D + D
    assert ladder + head == 5_268_622 and round(100 * (ladder + head) / (encoder + head), 1) == 2.6
    y_tuning = block(D, d_ff, 2) + (C + 1) * D
    assert y_tuning == 16_799_744
    assert round(100 * y_tuning / (encoder + head + y_tuning), 1) == 7.6  # the paper: 7.7


@each_kind
def test_padding_changes_no_score_and_only_what_trains_has_a_gradient(kind):
    net, ids = tiny(kind), torch.randint(3, 50, (2, 7), generator=torch.manual_seed(1))
    short = net(ids[:, :4], torch.ones(2, 4).bool())
    mask = torch.arange(7).expand(2, 7) < 4
    torch.testing.assert_close(net(ids, mask), short)
    assert short.shape == (2, 1, 2)
    short.square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


@each_kind
def test_the_answer_is_the_text_of_the_best_class(kind):
    net, ids = tiny(kind), torch.randint(3, 50, (9, 7), generator=torch.manual_seed(1))
    mask = torch.ones(9, 7).bool()
    best = net(ids, mask)[:, 0].argmax(dim=-1)
    assert torch.equal(net.generate(ids, mask, max_new_tokens=20), ANSWERS[best])
    assert {*best.tolist()} == {0, 1}


@pytest.mark.parametrize("prompts", ["paper", "t5"])
@pytest.mark.parametrize("task", [name for name in TASKS if name != "stsb"])
def test_a_rows_target_becomes_the_number_of_its_class(backbone, task, prompts):
    tokenizer, labels = train.load_tokenizer(str(backbone)), range(len(TASKS[task].words))
    answers = class_texts(task, prompts, tokenizer)
    examples = [Example("a film", TASKS[task].target(label, prompts), label) for label in labels]
    rows = as_classes({task: TASKS[task].encode(examples, tokenizer)}, answers)[task]
    assert [row.target for row in rows] == [[label] for label in labels]
    texts = [tokenizer.decode(ids) for ids in answers.tolist()]
    assert texts == [example.target for example in examples]


@pytest.mark.slow
@pytest.mark.parametrize("more", ["--classify --init fisher --fisher-samples 8 --lr 2e-2",
                                  "--method y-tuning --lr 5e-3"])
def test_they_learn_the_easy_task(argv, more):
    line = "--epochs 10 --max-train-rows 96 --warmup-steps 10 --batch-size 8"
    results = train.main(argv(*more.split(), *line.split()))
    assert results["test"]["score"] > 80 and results["test"]["invalid"] == 0
    assert [*results.get("gates", [])] == (["encoder"] if "--classify" in more else [])


@pytest.mark.parametrize("more, words", [
    ("--classify --task stsb", "stsb"), ("--method y-tuning --task sst2,stsb", "stsb"),
    ("--classify --task vqa", "pictures"), ("--classify --keep 1", "--keep"),
    ("--classify --side last", "--side"), ("--classify --init distill", "distill"),
    ("--init {run} --classify", "it does not fit")])
def test_what_table_2_lacks_is_refused_in_one_line(argv, tmp_path, capsys, learned, more, words):
    refused(capsys, argv(*more.format(run=learned[0]).split()), words)
    assert not (tmp_path / "run").exists()


def test_the_frozen_encoder_has_no_dropout_while_labels_train():
    net = tiny(YTuning).train()
    assert net.training and not any(module.training for module in net.backbone.modules())
