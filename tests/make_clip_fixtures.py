"""How tests/fixtures/clip-* was made: tiny random CLIPs and what two public implementations compute with them.

    pip install torch==2.13.0 torchvision==0.28.0 transformers==4.57.6 open_clip_torch==3.3.0 && python tests/make_clip_fixtures.py

Only this script and the live tests need them; the tests read the files.  Each folder holds a whole CLIP, text tower included, under its
public names with its public config, and expected.safetensors: images and the tokens of the image tower.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"

# No two sizes are equal where the architecture lets them differ.
TEXT = dict(context_length=5, vocab_size=11, width=8, heads=2, layers=1)
RESNET = dict(image_size=64, layers=[1, 2, 3, 1], width=4, head_width=32, patch_size=None)  # 7 bottlenecks, a grid of 2 x 2
OPEN_VIT = dict(image_size=9, layers=3, width=24, head_width=12, mlp_ratio=1.5, patch_size=3)
# As the public config.json is written: what equals ViT-B/32's is left out, so hidden_act must be read as quick_gelu.
VISION = dict(image_size=12, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20)


@torch.no_grad()
def randomise(model, seed: int):
    """Weights that all matter: matrices and convolutions near gain one, norms, statistics and positions far from their start."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            tensor.fill_(7)  # counters, if anything
        elif name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.6, generator=generator)
        elif tensor.ndim < 2 or "embedding" in name and "patch" not in name:
            tensor.normal_(std=0.6, generator=generator)
        else:
            tensor.normal_(std=(1.4 if tensor.ndim == 2 else 0.7) * tensor[0].numel() ** -0.5, generator=generator)
    return model.eval()


def random_images(seed: int, B: int, height: int, width: int) -> Tensor:
    return torch.randn(B, 3, height, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def output_of(module, run) -> Tensor:
    """What a module inside a model hands on while the model runs."""
    seen = []
    handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    run()
    handle.remove()
    return seen[0]


def write(name: str, weights: dict[str, Tensor], config: tuple[str, dict], expected: dict[str, Tensor], weights_file: str) -> None:
    folder = FIXTURES / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in weights.items()}, folder / weights_file)
    save_file({key: tensor.contiguous() for key, tensor in expected.items()}, folder / "expected.safetensors")
    (folder / config[0]).write_text(json.dumps(config[1], indent=2) + "\n", encoding="utf-8")
    tokens = {key: f"{list(tensor.shape)} of size {tensor.std():.2f}" for key, tensor in expected.items() if key.startswith("tokens")}
    print(name, tokens, sum(file.stat().st_size for file in folder.iterdir()), "bytes")


def hugging_face_vit() -> None:
    from transformers import CLIPConfig, CLIPModel
    text = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=5)
    model = randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=6)), seed=1)
    images = random_images(1, 3, 12, 12)
    with torch.no_grad():
        tokens = model.vision_model(images).last_hidden_state[:, 1:]
    stray = {"vision_model.embeddings.position_ids": torch.arange(10)[None], "text_model.embeddings.position_ids": torch.arange(5)[None]}
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 6, "text_config": text, "vision_config": VISION}
    write("clip-vit", model.state_dict() | stray, ("config.json", config), dict(images=images, tokens=tokens), "model.safetensors")


def open_clip_towers() -> None:
    from open_clip.model import CLIP
    for name, vision, quick_gelu in (("clip-vit-open", OPEN_VIT, False), ("clip-resnet", RESNET, True)):
        model = randomise(CLIP(embed_dim=6, vision_cfg=vision, text_cfg=TEXT, quick_gelu=quick_gelu), seed=2)
        visual, size, resnet = model.visual, vision["image_size"], name == "clip-resnet"
        config = {"model_cfg": {"embed_dim": 6, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": TEXT}}
        if resnet:
            model.half().float()  # kept in half precision, as OpenAI's own files are
            images = random_images(2, 2, size, size + 32).half().float()  # wider than high: rows and columns must not be mixed up
            with torch.no_grad():  # all that comes before the attention pool
                tokens = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images))))).flatten(2).mT
        else:
            images = random_images(2, 3, size, size)
            tokens = output_of(visual.transformer, lambda: visual(images))[:, 1:]
            del config["model_cfg"]["quick_gelu"]  # most public configs with plain GELU do not speak of it
        weights = {key: tensor.half() if resnet and tensor.is_floating_point() else tensor for key, tensor in model.state_dict().items()}
        expected = dict(images=images.half() if resnet else images, tokens=tokens)
        write(name, weights, ("open_clip_config.json", config), expected, "open_clip_model.safetensors")


if __name__ == "__main__":
    hugging_face_vit()
    open_clip_towers()
