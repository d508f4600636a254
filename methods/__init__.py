"""What Section 4 compares LST with: full fine-tuning, adapters, LoRA, BitFit and prompt-tuning.

    t5 = apply(load_t5("t5-base"), "lora")     # changes t5 and returns it

    method     what trains                                          T5-base, V = 32100
    full       everything                                                  222,882,048
    adapters   a bottleneck behind self-attention and feed-forward           3,625,728
    lora       a product of two thin matrices beside each q and v            3,538,944
    bitfit     a bias, where T5 has none                                       280,932
    prompt     100 vectors in front of the source                               76,800

All of them sit inside the backbone, so gradients flow back through all above the lowest trained
parameter (Sec. 3.1). What trains has `requires_grad`; what is added is float32, whatever the
backbone is. Of a CLIP-T5 each also trains the visual embedding, and the modules have the sizes of
VL-Adapter (arXiv:2112.06825), as in Table 3.
"""
from methods.adapters import add_adapters
from methods.bitfit import add_biases
from methods.lora import add_lora, merge
from methods.prompt import add_prompt
from methods.sides import SIDES
from model import CLIPT5, T5, Block

__all__ = ["METHODS", "SIDES", "apply", "merge"]


def unfreeze(t5: T5, layers: list[Block], as_authors=False, size=None) -> None:
    """Full fine-tuning of these layers and of what is above the lowest of them."""
    t5.requires_grad_(True)
    # The embedding lies below layer 0. With a frozen layer it stays as it is, and so does the
    # head of T5 v1.0, which is the same matrix.
    t5.embed.requires_grad_(t5.encoder.blocks[0] in layers)
    for stack in (t5.encoder, t5.decoder):
        for block in stack.blocks:
            block.requires_grad_(block in layers)
        # What a stack's layers share goes with its first layer or with its last.
        stack.pos_bias.requires_grad_(stack.blocks[0] in layers)
        stack.final_norm.requires_grad_(stack.blocks[-1] in layers)


METHODS = {"full": unfreeze, "adapters": add_adapters, "lora": add_lora, "bitfit": add_biases,
           "prompt": add_prompt}


def apply(t5: T5, method: str, as_authors=False, freeze=0, size: int | None = None) -> T5:
    """Make `t5` a baseline of Section 4, in place.

    as_authors: LoRA with every bias, prompts from noise; the others have one reading.
    freeze: the lowest layers, the encoder's first, stay as they are and get no module (Fig. 6).
    size: the adapters' reduction, LoRA's rank, the number of prompts (Fig. 5); None: the paper's.
    """
    layers = [*t5.encoder.blocks, *t5.decoder.blocks]
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, choose from {', '.join(METHODS)}")
    if not 0 <= freeze <= len(layers):
        raise ValueError(f"freeze is {freeze}, but there are {len(layers)} layers")
    if method == "prompt" and freeze:
        raise ValueError(f"freeze is {freeze}, but prompts sit below every layer: leave it out")
    if any(type(module).__module__.startswith("methods.") for module in t5.modules()):
        raise ValueError("this T5 was made a baseline before; load it again")

    t5.requires_grad_(False)
    METHODS[method](t5, layers[freeze:], as_authors, size)
    if isinstance(t5, CLIPT5):
        t5.visual.requires_grad_(True)  # trained by every method (arXiv:2112.06825, Sec. 3.1)
    if not any(p.requires_grad for p in t5.parameters()):
        raise ValueError(f"freeze is {freeze}, which leaves {method} nothing to train")
    return t5.to(t5.embed.weight.device).train(t5.training)  # the new modules follow
