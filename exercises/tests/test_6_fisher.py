"""Assignment 6: empirical Fisher information, against slopes of the loss (Sec. 3.3)."""
import copy
from random import randint

import prune
import torch
import torch.nn.functional as F
from compare import equal, same
from model import T5, T5Config

V, S, T = 20, 6, 4


def backbone():
    sizes = dict(vocab_size=V, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    return T5(T5Config(**sizes, dropout_rate=0.5)).eval()


def batch(*lengths):
    """(source_ids, source_mask, decoder_ids, decoder_mask, labels): a row for each length."""
    masks = [torch.arange(longest) < torch.tensor(lengths)[:, None] for longest in (S, T)]
    source_ids, decoder_ids, labels = (torch.randint(3, V, masks[i].shape) for i in (0, 1, 1))
    return source_ids, masks[0], decoder_ids, masks[1], labels.masked_fill(~masks[1], -100)


def test_it_is_the_square_of_the_slope_of_a_samples_loss():
    t5, (*inputs, labels) = backbone(), batch(randint(2, T))
    found, exact = prune.fisher(t5, [(*inputs, labels)]), copy.deepcopy(t5).double()
    names = [name for name, p in t5.named_parameters() if p.dim() == 2 and "pos_bias" not in name]
    equal("the matrices that are pruned, and the embedding", sorted(found), sorted(names))
    for name, values in found.items():
        place, losses = torch.unravel_index(values.argmax(), values.shape), []
        for move in (1e-5, -2e-5, 1e-5):
            exact.get_parameter(name).data[place] += move
            losses.append(F.cross_entropy(exact(*inputs)[0], labels[0]))
        slope = (losses[0] - losses[1]) / 2e-5
        same(f"{name} {[int(i) for i in place]}", values[place], slope * slope, 1e-2)


def test_each_sample_is_squared_then_as_many_as_asked_for_are_summed():
    t5, many = backbone(), batch(4, 3, 2, 4, 3)
    each = [prune.fisher(t5, [[tensor[b : b + 1] for tensor in many]]) for b in range(3)]
    batches = [[tensor[:2] for tensor in many], [tensor[2:] for tensor in many]]
    for name, values in prune.fisher(t5, batches, samples=3).items():
        expected = sum(one[name] for one in each)
        same(f"{name}, 3 samples, batches of 2 and 3", values, expected)


def test_the_model_stays_as_it_was_and_drops_nothing():
    t5, samples = backbone().requires_grad_(False), [batch(3)]
    expected = prune.fisher(t5, samples)
    for name, values in prune.fisher(t5.train(), samples).items():
        same(f"{name} of a model in training mode", values, expected[name])
    equal("the model's training mode after it", t5.training, True)
    trained = [name for name, p in t5.named_parameters() if p.requires_grad or p.grad is not None]
    equal("frozen parameters that train now, or have a gradient", trained, [])
