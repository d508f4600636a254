"""vision/clip.py against transformers 4 and 5 and open_clip: by files that these libraries wrote
(fixtures/make_clip.py), and live where transformers is installed."""
import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.make_clip import FIXTURES, random_images, randomise
from run.hub import sha256_of
from vision.clip import CLIP_PUBLIC, ModifiedResNet, ViT, clip_files, load_clip

KINDS = ("model", "shards", "CLIPVisionModel", "CLIPVisionModelWithProjection")
SAVED = ["clip-vit", "clip-vit-open", "clip-resnet", "clip-open/custom", "clip-open/tower",
         *(f"clip-transformers{version}/{kind}" for version in (4, 5) for kind in KINDS)]
WEIGHTS = {"clip-vit": "model.safetensors", "clip-vit-open": "open_clip_model.safetensors",
           "clip-resnet": "open_clip_model.safetensors"}
each_tower = pytest.mark.parametrize("name", WEIGHTS)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """No test reaches the network or the Hugging Face cache of whoever runs it."""
    for name in ("HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-huggingface-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def expected(name):
    path = FIXTURES / name / "expected.safetensors"
    saved = load_file(path if path.exists() else path.parent.parent / path.name)
    return saved["images"].float(), saved["tokens"]


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 2e-6 * max(1, theirs.abs().max())


def folder_with(folder, name, weights=None, **settings):
    """A copy of a fixture; `weights` changes its tensors, `settings` what its config says."""
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    if weights:
        state = load_file(folder / WEIGHTS[name])
        save_file(weights(state) or state, folder / "new.safetensors")
        os.replace(folder / "new.safetensors", folder / WEIGHTS[name])
    for path in folder.glob("*config.json"):
        raw = json.loads(path.read_text())
        clip = raw.get("model_cfg", raw)
        clip.get("vision_cfg", clip.get("vision_config", clip)).update(settings)
        path.write_text(json.dumps(raw))
    return folder


# ------------------------------------------------------------------ the same numbers as others

@pytest.mark.parametrize("name", SAVED)
def test_tokens_equal_those_of_the_library_that_saved_the_tower(name):
    images, tokens = expected(name)
    assert_close(load_clip(FIXTURES / name)(images), tokens)


@pytest.mark.parametrize("name, eps", [
    ("clip-vit", 1e-5), ("clip-vit-open", 1e-5), ("clip-open/custom", 0.01),
    ("clip-transformers4/CLIPVisionModel", 0.01), ("clip-transformers5/CLIPVisionModel", 0.01)])
def test_the_epsilon_of_the_norms_is_that_of_the_config_or_the_published_one(tmp_path, name, eps):
    images, tokens = expected(name)
    modules = list(load_clip(FIXTURES / name).modules())
    assert {m.eps for m in modules if isinstance(m, torch.nn.LayerNorm)} == {eps}
    other = {"norm_kwargs": {"eps": 0.1}} if "open" in name else {"layer_norm_eps": 0.1}
    tower = load_clip(folder_with(tmp_path, name, **other))
    assert (tower(images) - tokens).abs().max() > 0.01, "the fixture does not tell"


def random_vision(seed):
    draw = random.Random(seed)
    heads, patch, size = draw.randint(1, 5), draw.randint(2, 5), draw.randint(2, 5)
    return dict(hidden_size=heads * draw.randint(2, 9), num_attention_heads=heads,
                patch_size=patch, image_size=patch * size, num_hidden_layers=draw.randint(1, 4),
                intermediate_size=draw.randint(5, 60), hidden_act=("gelu", "quick_gelu")[seed % 2],
                layer_norm_eps=draw.choice([1e-5, 1e-6, 0.1]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_vits_equal_transformers_live(seed, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = random_vision(seed)
    reference = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config))
    randomise(reference, seed).save_pretrained(tmp_path)
    images = random_images(seed, 2, config["image_size"], config["image_size"])
    with torch.no_grad():
        assert_close(load_clip(tmp_path)(images), reference(images).last_hidden_state[:, 1:])


# --------------------------------------------------------------------------- the published sizes

PUBLISHED = {  # tower, P, C, its parameters; pooled width and parameters of the whole image tower
    "RN50": (ModifiedResNet, (224, 64, (3, 4, 6, 3)), 49, 2048, 23_527_264, 1024, 38_316_896),
    "RN101": (ModifiedResNet, (), 49, 2048, 42_519_392, 512, 56_259_936),
    "RN50x4": (ModifiedResNet, (288, 80, (4, 6, 10, 6)), 81, 2560, 65_619_640, 640, 87_137_080),
    "RN50x16": (ModifiedResNet, (384, 96, (6, 8, 18, 8)), 144, 3072, 136_202_640, 768, 167_328_912),
    "RN50x64": (ModifiedResNet, (448, 128, (3, 15, 36, 10)), 196, 4096, 365_034_176, 1024,
                420_380_352),
    "ViT-B/32": (ViT, (), 49, 768, 87_454_464, 512, 87_849_216),
    "ViT-B/16": (ViT, (224, 16), 196, 768, 85_797_888, 512, 86_192_640),
    "ViT-L/14": (ViT, (224, 14, 1024, 24, 16, 4096), 256, 1024, 303_177_728, 768, 303_966_208),
    "ViT-L/14@336": (ViT, (336, 14, 1024, 24, 16, 4096), 576, 1024, 303_505_408, 768, 304_293_888),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_and_token_shapes_are_those_of_the_published_towers(name):
    """The counts are those of open_clip 3.3.0, which are OpenAI's."""
    kind, sizes, P, C, count, pooled, whole = PUBLISHED[name]
    with torch.device("meta"):
        tower = kind(*sizes)
        tokens = tower(torch.empty(1, 3, tower.image_size, tower.image_size))
    assert tokens.shape == (1, P, C) and tower.channels == C
    assert sum(p.numel() for p in tower.parameters()) == count
    attention_pool = (P + 1) * C + 3 * (C * C + C) + C * pooled + pooled
    assert count + (2 * C + C * pooled if kind is ViT else attention_pool) == whole


# ---------------------------------------------------------------------------------------- frozen

@each_tower
def test_a_loaded_tower_is_frozen_and_deterministic(name):
    tower, (images, _) = load_clip(FIXTURES / name), expected(name)
    assert not tower.training and not any(p.requires_grad for p in tower.parameters())
    before, first = {key: t.clone() for key, t in tower.state_dict().items()}, tower(images)
    assert not first.requires_grad
    assert torch.equal(tower(images), first)
    assert_close(tower(images[:1]), first[:1])
    assert all(torch.equal(tensor, before[key]) for key, tensor in tower.state_dict().items())


# --------------------------------------------------------------------------------------- loading

@each_tower
def test_what_pools_or_reads_texts_may_be_missing(tmp_path, name):
    beside = ("attnpool", "visual.proj", "ln_post", "post_layernorm", "num_batches", "position_ids")

    def image_only(state):
        return {key: tensor for key, tensor in state.items()
                if key.startswith(("visual.", "vision_model.")) and
                not any(part in key for part in beside)}
    images, tokens = expected(name)
    assert_close(load_clip(folder_with(tmp_path, name, image_only))(images), tokens)


def test_what_no_shape_tells_comes_from_the_config(tmp_path):
    def tower(name, **settings):
        return load_clip(folder_with(tmp_path / str(settings), name, **settings))
    assert load_clip(FIXTURES / "clip-vit").blocks[0].quick  # left out, as in OpenAI's config.json
    assert not load_clip(FIXTURES / "clip-vit-open").blocks[0].quick  # in most of open_clip's, too
    assert not tower("clip-vit", hidden_act="gelu").blocks[0].quick
    assert tower("clip-vit", num_attention_heads=2).blocks[1].H == 2
    assert tower("clip-vit-open", head_width=3).blocks[2].H == 8


def test_the_hash_is_over_weights_and_config_and_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    def hash_of(folder):
        return sha256_of(*clip_files(folder))

    hashes = {hash_of(folder_with(tmp_path / "1", "clip-vit", hidden_act="gelu")),
              hash_of(folder_with(tmp_path / "2", "clip-vit", hidden_act="quick_gelu")),
              hash_of(folder_with(tmp_path / "3", "clip-vit", lambda state: state.update(
                  {"vision_model.pre_layrnorm.bias": torch.zeros(16)}), hidden_act="gelu"))}
    assert len(hashes) == 3
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_clip("~/1").channels == 16 and hash_of("~/1") in hashes


@pytest.mark.parametrize("name, key, ours", [
    ("clip-vit", "vision_model.encoder.layers.1.self_attn.k_proj.bias", "blocks.1.k.bias"),
    ("clip-vit-open", "visual.transformer.resblocks.1.attn.in_proj_bias", "blocks.1.q.bias"),
    ("clip-resnet", "visual.layer3.2.bn3.running_var", "layer3.2.bn3.running_var")])
def test_missing_unexpected_and_misshapen_keys_are_named(tmp_path, name, key, ours):
    more = f"{key.partition('.')[0]}.more"
    for number, (change, says) in enumerate([
            (lambda state: state.pop(key) is None, f'Missing.*"{ours}"'),
            (lambda state: state.update({more: torch.zeros(1)}), 'Unexpected.*"more"'),
            (lambda state: state.update({key: torch.ones(5)}), f"size mismatch for {ours}")]):
        with pytest.raises(ValueError, match=says) as error:
            load_clip(folder_with(tmp_path / str(number), name, change))
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_other_models_and_missing_files_are_value_errors(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor one of: nano, clip-rn101, "):
        load_clip("clip-rn102")
    with pytest.raises(ValueError, match="has no model.safetensors"):
        load_clip(tmp_path)
    with pytest.raises(ValueError, match="no CLIP that fits config.json"):
        load_clip(FIXTURES / "relu-tied")
    (folder_with(tmp_path / "web", "clip-vit") / "model.safetensors").write_text("<!DOCTYPE html>")
    with pytest.raises(ValueError, match="no safetensors file.*download it again"):
        load_clip(tmp_path / "web")
    for name, config in (("clip-vit", "config.json"), ("clip-vit-open", "open_clip_config.json")):
        (folder_with(tmp_path / name, name) / config).unlink()
        with pytest.raises(ValueError, match="config.json"):
            load_clip(tmp_path / name)
    shards = folder_with(tmp_path / "shards", "clip-transformers5/shards")
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="00002-of-00003.safetensors is missing"):
        load_clip(shards)


@pytest.mark.parametrize("name, wrong", [
    *(("clip-vit", dict(hidden_act=value)) for value in ("relu", ["gelu"], None)),
    *(("clip-vit", {key: value}) for key in ("hidden_size", "patch_size", "num_hidden_layers",
                                             "image_size") for value in (32, -1, "16")),
    *(("clip-vit-open", {key: 48}) for key in ("width", "mlp_ratio", "norm_kwargs", "layers")),
    *(("clip-resnet", dict(layers=value)) for value in ([1, 2, 3], [1, 2, 3, 2])),
])
def test_a_config_that_does_not_fit_is_a_value_error_of_one_line(tmp_path, name, wrong):
    with pytest.raises(ValueError, match="no CLIP that fits") as error:
        load_clip(folder_with(tmp_path, name, **wrong))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"\xff\xfe{}", b"{}", b'{"model_cfg": 5}', b'{"vision_config": null}'])
def test_a_config_that_is_none_is_a_value_error(tmp_path, content):
    for name, config in (("clip-vit", "config.json"), ("clip-vit-open", "open_clip_config.json")):
        (folder_with(tmp_path / name, name) / config).write_bytes(content)
        with pytest.raises(ValueError, match="no CLIP that fits"):
            load_clip(tmp_path / name)


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
    asked = set()

    def hub_file(repo, filename, revision, sha256=None):
        asked.add((filename, revision, sha256))
        return FIXTURES / "clip-vit" / filename
    monkeypatch.setattr("vision.clip.hub_file", hub_file)
    load_clip("clip-vit-base-patch32")
    _, revision, weights, sha256 = CLIP_PUBLIC["clip-vit-base-patch32"]
    assert asked == {(weights, revision, sha256), ("config.json", revision, None)}
    assert len(sha256) == 64
