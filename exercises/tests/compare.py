"""What the tests share: one line about a difference, and what autograd keeps."""
import torch


def equal(what, found, expected):
    assert found == expected, f"{what}: {found!r:.80}, expected {expected!r:.80}"


def same(what, found, expected, tolerance=1e-4):
    """AssertionError if two tensors differ: in shape, or where they differ most."""
    assert isinstance(found, torch.Tensor), f"{what}: {found!r:.60}, expected a tensor"
    equal(f"{what}, shape", tuple(found.shape), tuple(expected.shape))
    found, expected = found.detach().double(), expected.detach().double()
    gap = ((found - expected).abs() - tolerance * expected.abs()).nan_to_num(torch.inf)
    if gap.numel() and gap.max() > tolerance:
        place = torch.unravel_index(gap.argmax(), gap.shape)
        at, numbers = [int(i) for i in place], (found[place], expected[place])
        raise AssertionError("{} at {}: {:.5g}, expected {:.5g}".format(what, at, *numbers))


def kept_bytes(forward, left_out):
    """The bytes of the tensors that autograd keeps of `forward`, each counted once."""
    kept, place = {}, lambda tensor: tensor.untyped_storage().data_ptr()
    save = lambda tensor: kept.setdefault(place(tensor), tensor)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        _graph = forward()  # held, so that no place is used twice
    return sum(kept[i].untyped_storage().nbytes() for i in kept.keys() - {*map(place, left_out)})
