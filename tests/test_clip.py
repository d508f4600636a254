"""clip.py against `transformers` and open_clip: by fixtures that they made (make_clip_fixtures.py), and live where they are installed."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clip import CLIP_PUBLIC, ModifiedResNet, ResNetConfig, ViT, ViTConfig, load_clip
from make_clip_fixtures import FIXTURES, TEXT, random_images, randomise

WEIGHTS = {"clip-vit": "model.safetensors", "clip-vit-open": "open_clip_model.safetensors", "clip-resnet": "open_clip_model.safetensors"}
each_fixture = pytest.mark.parametrize("name", WEIGHTS)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """No test reaches the network or the Hugging Face cache of whoever runs it."""
    for name in ("HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-huggingface-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def expected(name):
    saved = load_file(FIXTURES / name / "expected.safetensors")
    return saved["images"].float(), saved["tokens"]


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 2e-6 * max(1, theirs.abs().max())


def folder_with(folder, name, weights=None, **settings):
    """A copy of a fixture; `weights` changes its dict of tensors, settings its config's part about the image tower."""
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    if weights:
        state = load_file(folder / WEIGHTS[name])
        save_file(weights(state) or state, folder / "new.safetensors")
        os.replace(folder / "new.safetensors", folder / WEIGHTS[name])
    for path in folder.glob("*config.json"):
        raw = json.loads(path.read_text())
        (raw["vision_config"] if "vision_config" in raw else raw["model_cfg"]["vision_cfg"]).update(settings)
        path.write_text(json.dumps(raw))
    return folder


def as_openai(state):
    """Hugging Face's keys of an image tower in OpenAI's naming, spelled out here a second time."""
    vision = {key.removeprefix("vision_model."): tensor for key, tensor in state.items() if key.startswith("vision_model.")}
    new = {"visual.conv1.weight": vision["embeddings.patch_embedding.weight"], "visual.class_embedding": vision["embeddings.class_embedding"],
           "visual.positional_embedding": vision["embeddings.position_embedding.weight"], "logit_scale": state["logit_scale"],
           "visual.proj": state["visual_projection.weight"].T.contiguous()}
    layers = {int(key.split(".")[2]) for key in vision if key.startswith("encoder.")}
    for end in ("weight", "bias"):
        new |= {f"visual.ln_pre.{end}": vision[f"pre_layrnorm.{end}"], f"visual.ln_post.{end}": vision[f"post_layernorm.{end}"]}
        for i in layers:
            block, layer = f"visual.transformer.resblocks.{i}", f"encoder.layers.{i}"
            new[f"{block}.attn.in_proj_{end}"] = torch.cat([vision[f"{layer}.self_attn.{x}_proj.{end}"] for x in "qkv"])
            for theirs, ours in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
                                 ("mlp.fc2", "mlp.c_proj")):
                new[f"{block}.{ours}.{end}"] = vision[f"{layer}.{theirs}.{end}"]
    return new


def openai_folder(folder, state, **model_cfg):
    folder.mkdir()
    save_file(as_openai(state), folder / "model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    return folder


# ---------------------------------------------------------------------------------------------- the same numbers as others

@each_fixture
def test_tokens_equal_those_of_public_implementations(name):
    images, tokens = expected(name)
    assert_close(load_clip(FIXTURES / name)(images), tokens)


def test_both_namings_load_to_the_same_tower(tmp_path):
    folder = openai_folder(tmp_path / "openai", load_file(FIXTURES / "clip-vit" / "model.safetensors"), quick_gelu=True,
                           vision_cfg={"image_size": 12, "patch_size": 4, "width": 16, "layers": 2, "head_width": 4})
    tower, other = load_clip(FIXTURES / "clip-vit"), load_clip(folder)
    images, _ = expected("clip-vit")
    assert tower.config == other.config
    assert torch.equal(tower(images), other(images))
    assert all(torch.equal(p, q) for p, q in zip(tower.parameters(), other.parameters(), strict=True))


def test_every_norm_has_the_published_epsilon():
    norms = [module for module in load_clip(FIXTURES / "clip-vit").modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 1 + 2 * 2 and {norm.eps for norm in norms} == {1e-5}  # the fixtures' activations are too large to tell it from 1e-6


def random_vision(seed):
    draw = random.Random(seed)
    heads, patch, size = draw.randint(1, 5), draw.randint(2, 5), draw.randint(2, 5)
    return dict(hidden_size=heads * draw.randint(2, 9), num_attention_heads=heads, patch_size=patch, image_size=patch * size,
                num_hidden_layers=draw.randint(1, 4), intermediate_size=draw.randint(5, 60), hidden_act=("gelu", "quick_gelu")[seed % 2])


@pytest.mark.parametrize("seed", range(6))
def test_random_vits_equal_transformers_live(seed, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = random_vision(seed)
    reference = randomise(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config)), seed)  # alone, without the text tower
    reference.save_pretrained(tmp_path)
    images = random_images(seed, 2, config["image_size"], config["image_size"])
    with torch.no_grad():
        assert_close(load_clip(tmp_path)(images), reference(images).last_hidden_state[:, 1:])


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_random_resnets_equal_open_clip_live(seed, tmp_path):
    draw = random.Random(seed)
    vision = dict(layers=[draw.randint(1, 3) for _ in range(4)], width=2 * draw.randint(1, 6), image_size=32 * draw.randint(1, 3),
                  head_width=32, patch_size=None)
    reference = randomise(pytest.importorskip("open_clip.model").CLIP(embed_dim=6, vision_cfg=vision, text_cfg=TEXT), seed)
    save_file({key: tensor.contiguous() for key, tensor in reference.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    tower, visual, images = load_clip(tmp_path), reference.visual, random_images(seed, 2, vision["image_size"], vision["image_size"])
    assert tower.config == ResNetConfig(vision["image_size"], vision["width"], tuple(vision["layers"]))
    assert_close(tower(images), visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images))))).flatten(2).mT)


# ------------------------------------------------------------------------------------------------------- the published sizes

PUBLISHED = {  # config, P, C, parameters here, pooled width, parameters of the whole image tower: counted in open_clip 3.3.0, as OpenAI's
    "RN50": (ResNetConfig(layers=(3, 4, 6, 3)), 49, 2048, 23_527_264, 1024, 38_316_896),
    "RN101": (ResNetConfig(), 49, 2048, 42_519_392, 512, 56_259_936),
    "RN50x4": (ResNetConfig(288, 80, (4, 6, 10, 6)), 81, 2560, 65_619_640, 640, 87_137_080),
    "RN50x16": (ResNetConfig(384, 96, (6, 8, 18, 8)), 144, 3072, 136_202_640, 768, 167_328_912),
    "RN50x64": (ResNetConfig(448, 128, (3, 15, 36, 10)), 196, 4096, 365_034_176, 1024, 420_380_352),
    "ViT-B/32": (ViTConfig(), 49, 768, 87_454_464, 512, 87_849_216),
    "ViT-B/16": (ViTConfig(patch_size=16), 196, 768, 85_797_888, 512, 86_192_640),
    "ViT-L/14": (ViTConfig(224, 14, 1024, 24, 16, 4096), 256, 1024, 303_177_728, 768, 303_966_208),
    "ViT-L/14@336": (ViTConfig(336, 14, 1024, 24, 16, 4096), 576, 1024, 303_505_408, 768, 304_293_888),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_and_token_shapes_are_those_of_the_published_towers(name):
    config, P, C, count, pooled, whole = PUBLISHED[name]
    with torch.device("meta"):
        tower = ModifiedResNet(config) if isinstance(config, ResNetConfig) else ViT(config)
        tokens = tower(torch.empty(1, 3, config.image_size, config.image_size))
    assert tokens.shape == (1, P, C) and tower.channels == C
    assert sum(p.numel() for p in tower.parameters()) == count
    dropped = 2 * C + C * pooled if isinstance(config, ViTConfig) else (P + 1) * C + 3 * (C * C + C) + C * pooled + pooled
    assert count + dropped == whole


# ------------------------------------------------------------------------------------------------------------------- frozen

@each_fixture
def test_a_loaded_tower_is_frozen_and_deterministic(name):
    tower, (images, _) = load_clip(FIXTURES / name), expected(name)
    assert not tower.training and not any(p.requires_grad for p in tower.parameters())
    before, first = {key: tensor.clone() for key, tensor in tower.state_dict().items()}, tower(images)
    assert not first.requires_grad
    assert torch.equal(tower(images), first)
    assert_close(tower(images[:1]), first[:1])
    assert torch.equal(tower.train()(images), first), "a model around it may be in train mode"
    assert all(torch.equal(tensor, before[key]) for key, tensor in tower.state_dict().items())


@each_fixture
def test_bfloat16_is_loaded_and_close(name):
    tower, (images, tokens) = load_clip(FIXTURES / name, dtype=torch.bfloat16), expected(name)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tower.state_dict().values())
    ours = tower(images)
    assert ours.dtype == torch.bfloat16
    assert 1e-4 < (ours.float() - tokens).abs().mean() < 0.02 * tokens.std()


@each_fixture
def test_images_of_another_shape_are_refused(name):
    tower, (images, _) = load_clip(FIXTURES / name), expected(name)
    for wrong in (images[0], images[:, :1], images[..., :-1], images[:, :, :-1]):
        with pytest.raises(AssertionError, match=r"images must be .* are \["):
            tower(wrong)


@pytest.mark.parametrize("naming", ["hugging face", "openai"])
def test_float32_weights_stay_mapped(tmp_path, naming):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists what is mapped")
    file = FIXTURES / ("clip-vit/model.safetensors" if naming == "hugging face" else "clip-vit-open/open_clip_model.safetensors")
    tower = load_clip(file.parent)
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps.read_text().splitlines() if line.endswith(str(file))]
    assert all(any(low <= p.data_ptr() < high for low, high in ranges) for p in tower.parameters()), "a weight was copied"


# ------------------------------------------------------------------------------------------------------------------ loading

@each_fixture
def test_an_image_tower_alone_is_enough(tmp_path, name):
    def image_only(state):
        return {key: tensor for key, tensor in state.items() if key.startswith(("visual.", "vision_model.")) and
                not any(part in key for part in ("attnpool", "visual.proj", "ln_post", "post_layernorm", "num_batches", "position_ids"))}
    images, tokens = expected(name)
    assert_close(load_clip(folder_with(tmp_path, name, image_only))(images), tokens)


def test_the_image_size_of_a_resnet_is_that_of_its_attention_pool_or_else_of_its_config(tmp_path):
    assert load_clip(FIXTURES / "clip-resnet").config.image_size == 64
    whole = folder_with(tmp_path / "whole", "clip-resnet")
    (whole / "open_clip_config.json").unlink()  # the pool's positions tell it
    assert load_clip(whole).config == ResNetConfig(64, 4, (1, 2, 3, 1))

    def without_pool(state):
        return {key: tensor for key, tensor in state.items() if "attnpool" not in key}
    folder = folder_with(tmp_path / "part", "clip-resnet", without_pool, image_size=96)
    assert load_clip(folder).config == ResNetConfig(96, 4, (1, 2, 3, 1))
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(ValueError, match="lacks open_clip_config.json, which tells the size of the images"):
        load_clip(folder)


def test_activation_and_heads_come_from_the_config(tmp_path):
    assert load_clip(FIXTURES / "clip-vit").config.activation == "quick_gelu"  # left out there, as in OpenAI's own config.json
    assert load_clip(FIXTURES / "clip-vit-open").config.activation == "gelu"  # left out there, as in most open_clip_config.json
    folder = folder_with(tmp_path / "1", "clip-vit", hidden_act="gelu", num_attention_heads=2)
    assert load_clip(folder).config == ViTConfig(12, 4, 16, 2, 2, 20, "gelu")
    assert load_clip(folder_with(tmp_path / "2", "clip-vit-open", head_width=3)).config == ViTConfig(9, 3, 24, 3, 8, 36, "gelu")
    state = load_file(FIXTURES / "clip-vit" / "model.safetensors")
    with pytest.raises(ValueError, match="num_heads is 0"):  # heads are 64 wide where nothing else is said, and this tower only 16
        load_clip(openai_folder(tmp_path / "3", state, quick_gelu=True, vision_cfg={"width": 16}))


@each_fixture
def test_missing_unexpected_and_misshapen_keys_are_named_up_to_three(tmp_path, name):
    lost, extra = {"clip-vit": (".self_attn.", "vision_model.more"), "clip-vit-open": (".attn.", "visual.more"),
                   "clip-resnet": (".bn2.", "visual.more")}[name]

    def without(state):
        return {key: tensor for key, tensor in state.items() if lost not in key or "text" in key or key.startswith("transformer.")}
    with pytest.raises(ValueError, match=r"does not fit: missing \[('vis[^,]*'(, )?){3}\], unexpected \[\], misshapen \[\]"):
        load_clip(folder_with(tmp_path / "missing", name, without))
    with pytest.raises(ValueError, match=rf"missing \[\], unexpected \['{extra}.0', '{extra}.1', '{extra}.2'\], misshapen \[\]"):
        load_clip(folder_with(tmp_path / "unexpected", name, lambda state: state.update({f"{extra}.{i}": torch.zeros(1) for i in range(5)})))
    key = {"clip-vit": "vision_model.encoder.layers.1.self_attn.k_proj.bias", "clip-vit-open": "visual.transformer.resblocks.1.attn.in_proj_bias",
           "clip-resnet": "visual.layer3.2.bn3.running_var"}[name]
    with pytest.raises(ValueError, match=rf"missing \[\], unexpected \[\], misshapen \['{key} \[5\] not \["):
        load_clip(folder_with(tmp_path / "misshapen", name, lambda state: state.update({key: torch.ones(5)})))


@pytest.mark.parametrize("name, key", [
    *(("clip-resnet", key) for key in ("visual.attnpool.o_proj.weight", "visual.attnpool.q_proj.scale", "visual.layer1.0.bn1.num_batches",
                                      "visual.fc.weight", "visual.layer5.0.conv1.weight", "transformers.0.weight", "logit_scales", "bn1.weight")),
    *(("clip-vit-open", key) for key in ("visual.projection", "visual.ln_post.scale", "visual.conv1.bias", "visual.transformer.resblocks.0.ls_1.gamma",
                                         "visual.transformer.resblocks.9.ln_1.weight", "vision_tower.proj")),
    *(("clip-vit", key) for key in ("vision_model.post_layernorm.scale", "vision_model.head.weight", "vision_model.encoder.layers.0.layer_norm3.weight",
                                    "visual.conv1.weight", "texts.weight", "vision_model.embeddings.patch_embedding.bias")),
])
def test_a_key_that_only_resembles_a_known_one_is_unexpected(tmp_path, name, key):
    with pytest.raises(ValueError, match=f"unexpected .*{key}"):
        load_clip(folder_with(tmp_path, name, lambda state: state.update({key: torch.zeros(2)})))


def used(state):
    """Keys that nobody may lose: the stem or the embeddings, the first layer and the last."""
    first_or_last = ("visual.conv", "visual.bn", "visual.layer1.0", "visual.layer4.0.downsample", "visual.class", "visual.positional", "visual.ln_pre",
                     "visual.transformer.resblocks.0", "vision_model.embeddings", "vision_model.pre", "vision_model.encoder.layers.1")
    return [key for key in state if key.startswith(first_or_last) and not key.endswith(("num_batches_tracked", "position_ids"))]


@each_fixture
def test_a_lost_key_is_a_value_error_whichever_it_is(tmp_path, name):
    whole = load_file(FIXTURES / name / WEIGHTS[name])
    folder_with(tmp_path, name)
    for lost in used(whole):
        save_file({key: tensor for key, tensor in whole.items() if key != lost}, tmp_path / "lost.safetensors")
        os.replace(tmp_path / "lost.safetensors", tmp_path / WEIGHTS[name])
        with pytest.raises(ValueError, match=lost):
            load_clip(tmp_path)


@pytest.mark.slow
@each_fixture
def test_a_reshaped_key_is_a_value_error_whichever_it_is(tmp_path, name):
    whole = load_file(FIXTURES / name / WEIGHTS[name])
    folder_with(tmp_path, name)
    for key in used(whole):
        for shape in ([], [0], [7], [2, 2, 2, 2]):
            save_file(whole | {key: torch.zeros(shape)}, tmp_path / "new.safetensors")
            os.replace(tmp_path / "new.safetensors", tmp_path / WEIGHTS[name])
            with pytest.raises(ValueError):
                load_clip(tmp_path)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_resnet_without_a_stage_is_refused(tmp_path, stage):
    folder = folder_with(tmp_path, "clip-resnet", lambda state: {key: tensor for key, tensor in state.items() if f".layer{stage}." not in key})
    with pytest.raises(ValueError, match=f"layer{stage} is 0"):
        load_clip(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_integer_weights_are_refused(tmp_path, dtype):
    folder = folder_with(tmp_path, "clip-vit", lambda state: state.update({"vision_model.embeddings.class_embedding": torch.ones(16, dtype=dtype)}))
    with pytest.raises(ValueError, match="class_embedding holds"):
        load_clip(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="choose float32 or bfloat16"):
        load_clip(FIXTURES / "clip-vit", dtype=dtype)


def test_other_models_are_no_clip(tmp_path):
    save_file({"conv1.weight": torch.zeros(2, 3, 3, 3), "layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no CLIP image tower.*conv1.weight"):
        load_clip(tmp_path)
    with pytest.raises(ValueError, match="holds no CLIP image tower"):
        load_clip(FIXTURES / "relu-tied")


def test_missing_files_and_unknown_names_are_value_errors(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor one of: nano, clip-rn101, "):
        load_clip("clip-rn102")
    with pytest.raises(ValueError, match="neither open_clip_model.safetensors nor model.safetensors"):
        load_clip(tmp_path)
    for name, config in (("clip-vit", "config.json"), ("clip-vit-open", "open_clip_config.json")):
        (folder_with(tmp_path / name, name) / config).unlink()
        with pytest.raises(ValueError, match=f"lacks {config}, which tells"):
            load_clip(tmp_path / name)


@pytest.mark.parametrize("name, wrong, says", [
    ("clip-vit", dict(hidden_act="relu"), "activation is 'relu', choose from"), ("clip-vit", dict(hidden_act=["gelu"]), "activation"),
    ("clip-vit", dict(hidden_act=None), "activation is None"), ("clip-vit", dict(num_attention_heads=3), "num_heads 3 must divide width 16"),
    ("clip-vit", dict(num_attention_heads=0), "num_heads is 0"), ("clip-vit", dict(num_attention_heads="4"), "num_heads is '4'"),
    ("clip-vit", dict(num_attention_heads=2.0), "num_heads is 2.0"), ("clip-vit", dict(hidden_size=32), "its width is 32, that of the weights 16"),
    ("clip-vit-open", dict(head_width=0), "does not describe a CLIP"), ("clip-vit-open", dict(head_width="12"), "does not describe a CLIP"),
    ("clip-vit-open", dict(head_width=-12), "num_heads is -2"), ("clip-vit-open", dict(head_width=5.5), "num_heads is 4.0"),
    ("clip-vit-open", dict(width=48), "another CLIP's"),
])
def test_a_config_with_wrong_values_is_a_value_error(tmp_path, name, wrong, says):
    with pytest.raises(ValueError, match=says):
        load_clip(folder_with(tmp_path, name, **wrong))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"<html>", b"{}", b"1" * 5000, b"[" * 100_000, b'{"model_cfg": 5}',
                                     b'{"vision_config": 5}', b'{"vision_config": null}', b'{"model_cfg": {"vision_cfg": []}}'])
def test_a_config_that_is_none_is_a_value_error(tmp_path, content):
    for name, config in (("clip-vit", "config.json"), ("clip-vit-open", "open_clip_config.json")):
        (folder_with(tmp_path / name, name) / config).write_bytes(content)
        with pytest.raises(ValueError):
            load_clip(tmp_path / name)


@pytest.mark.parametrize("content, says", [
    (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"), (b"<!DOCTYPE html>", "HTML page"), (b"", "damaged"), (b"\x00" * 50, "damaged"),
])
def test_a_file_that_is_no_checkpoint_is_named_for_what_it_is(tmp_path, content, says):
    (folder_with(tmp_path, "clip-vit") / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load_clip(tmp_path)


@pytest.mark.parametrize("name", CLIP_PUBLIC)
def test_an_existing_hugging_face_cache_is_used(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        load_clip(name)
    repo, revision, weights, _ = CLIP_PUBLIC[name]
    cache, commit = tmp_path / "hub" / f"models--{repo.replace('/', '--')}", revision
    if revision == "main":
        commit = "0123456789abcdef0123456789abcdef01234567"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text(commit)
    fixture = "clip-resnet" if weights.startswith("open_clip") else "clip-vit"
    shutil.copytree(FIXTURES / fixture, cache / "snapshots" / commit)
    images, tokens = expected(fixture)
    assert_close(load_clip(name)(images), tokens)


def test_public_weights_are_asked_for_with_their_hash(monkeypatch):
    asked = []

    def hub_file(repo, filename, revision, sha256=None):
        asked.append((filename, revision, sha256))
        return FIXTURES / "clip-vit" / filename
    monkeypatch.setattr("clip.hub_file", hub_file)
    load_clip("clip-vit-base-patch32")
    _, revision, weights, sha256 = CLIP_PUBLIC["clip-vit-base-patch32"]
    assert asked == [(weights, revision, sha256), ("config.json", revision, None)] and len(sha256) == 64
