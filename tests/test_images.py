"""Pictures and what CLIP sees in them: files good and bad, geometry, and features on the disk."""

import importlib.util
import io
import multiprocessing
import os
import random
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import checkpoint
import images
from data_vl import load
from images import features, find_images, pool, preprocess, read_image
from workshop import one_line, put

needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="needs Pillow: pip install -r requirements-vl.txt")


def picture(key, side=8):
    """A drawn picture that is another one for each key."""
    return torch.randint(0, 256, (side, side + 1, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(int(key)))


# -------------------------------------------------------------------------------------------------------------- pictures

def test_pictures_are_found_in_any_sub_folder(tmp_path):
    for name in ("1.png", "images/2.JPG", "images/train/7/dev-1-0-img0.png", "train2014/3.jpeg", "notes.txt", "images/.hidden/1.png", "__MACOSX/1.png", "5.png"):
        put(tmp_path, name, b"x")
    (tmp_path / "images/again").symlink_to(tmp_path)  # a circle
    (tmp_path / "val2014").symlink_to(put(tmp_path / ".elsewhere", "4.png", b"x"))
    found = find_images(tmp_path, ["1", "2", "3", "4", "dev-1-0-img0", "1"])
    assert {key: str(path.relative_to(tmp_path)) for key, path in found.items()} == {
        "1": "1.png", "4": "val2014/4.png", "2": "images/2.JPG", "3": "train2014/3.jpeg", "dev-1-0-img0": "images/train/7/dev-1-0-img0.png"}


def test_missing_and_double_pictures_are_one_line(tmp_path):
    put(tmp_path, "images/1.png", b"x")
    with pytest.raises(ValueError) as error:
        find_images(tmp_path, ["1", "2", "3"])
    one_line(error, "2 of 3 pictures", "2.jpg", str(tmp_path / "images"))
    put(tmp_path, "train/1.jpg", b"x")
    with pytest.raises(ValueError) as error:
        find_images(tmp_path, ["1"])
    one_line(error, "1.png", "1.jpg", "same name")


def saved(path, image, **how):
    image.save(path, **how)
    return path


@needs_pillow
def test_every_kind_of_picture_becomes_rgb(tmp_path):
    from PIL import Image
    colour = Image.new("RGB", (5, 3), (200, 100, 50))
    grey = Image.new("L", (5, 3), 77)
    cases = {
        "rgb.png": (colour, {}, (200, 100, 50)), "rgb.bmp": (colour, {}, (200, 100, 50)), "rgb.webp": (colour, {"lossless": True}, (200, 100, 50)),
        "palette.png": (colour.convert("P", palette=Image.Palette.ADAPTIVE), {}, (200, 100, 50)),
        "palette.gif": (colour.convert("P", palette=Image.Palette.ADAPTIVE), {}, (200, 100, 50)),
        "grey.png": (grey, {}, (77, 77, 77)), "grey.jpg": (grey, {"quality": 100}, (77, 77, 77)),
        "bits.png": (Image.new("1", (5, 3), 1), {}, (255, 255, 255)),
        "grey16.png": (Image.fromarray(np.full((3, 5), 77 * 257, dtype=np.uint16)), {}, (77, 77, 77)),
        "opaque.png": (colour.convert("RGBA"), {}, (200, 100, 50)),
        "clear.png": (Image.new("RGBA", (5, 3), (10, 20, 30, 0)), {}, (255, 255, 255)),
        "half.png": (Image.new("RGBA", (5, 3), (0, 0, 0, 51)), {}, (204, 204, 204)),  # a fifth of black on white
        "greyalpha.png": (Image.new("LA", (5, 3), (0, 51)), {}, (204, 204, 204)),
        "cmyk.jpg": (Image.new("CMYK", (5, 3), (0, 255, 255, 0)), {"quality": 100}, (255, 0, 0)),
    }
    for name, (image, how, expected) in cases.items():
        pixels = read_image(saved(tmp_path / name, image, **how))
        assert pixels.shape == (3, 5, 3) and pixels.dtype == torch.uint8, name
        assert (pixels.int() - torch.tensor(expected)).abs().max() <= (2 if name.endswith("jpg") else 0), (name, pixels[0, 0])


@needs_pillow
def test_a_transparent_palette_is_read_without_a_warning(tmp_path):
    from PIL import Image
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 8, 7] + [0] * 762)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(saved(tmp_path / "a.png", image, transparency=bytes([255, 255]))).unique().tolist() == [7, 8, 9]
        assert read_image(saved(tmp_path / "b.png", image, transparency=1)).unique().tolist() == [255]


@needs_pillow
def test_the_cameras_rotation_is_not_applied_as_in_clip(tmp_path):
    from PIL import Image
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    assert read_image(saved(tmp_path / "turned.jpg", Image.new("RGB", (6, 2)), exif=exif)).shape == (2, 6, 3)


@needs_pillow
def test_a_cameras_jpeg_with_a_preview_is_its_first_picture(tmp_path):
    from PIL import Image
    path = saved(tmp_path / "a.jpg", Image.new("RGB", (6, 2), "white"), format="MPO", save_all=True, append_images=[Image.new("RGB", (3, 1))])
    assert Image.open(path).format == "MPO" and read_image(path).float().mean() > 250


@needs_pillow
def test_one_pixel_is_a_picture(tmp_path):
    from PIL import Image
    pixels = read_image(saved(tmp_path / "a.png", Image.new("RGB", (1, 1), (1, 2, 3))))
    assert pixels.tolist() == [[[1, 2, 3]]] and preprocess([pixels], 32).shape == (1, 3, 32, 32)


@needs_pillow
def test_what_is_no_picture_is_one_line_that_names_the_file(tmp_path, capfd):
    from PIL import Image
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    frames = dict(save_all=True, append_images=[Image.new("RGB", (50, 40), "red")])
    for name, how in (("moving.gif", {}), ("moving.png", {}), ("moving.webp", {})):
        with pytest.raises(ValueError, match="animated") as error:
            read_image(saved(tmp_path / name, noise, **frames, **how))
        one_line(error, name)
    for name in ("cut.png", "cut.jpg", "cut.gif", "cut.bmp", "cut.webp"):
        whole = saved(tmp_path / name, noise).read_bytes()
        for share in (0.02, 0.1, 0.5, 0.9):
            (tmp_path / name).write_bytes(whole[:int(len(whole) * share)])
            with pytest.raises(ValueError) as error:
                read_image(tmp_path / name)
            one_line(error, name)
    buffer = io.BytesIO()
    noise.save(buffer, "TIFF")
    (tmp_path / "folder.png").mkdir()
    for name, content in (("empty.png", b""), ("text.jpg", b"hello"), ("page.jpg", b"<html>404</html>"), ("tiff.png", buffer.getvalue()),
                          ("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ("zeros.png", bytes(9999))):
        with pytest.raises(ValueError) as error:
            read_image(put(tmp_path, name, content) / name)
        one_line(error, name)
    for name in ("folder.png", "missing.png"):
        with pytest.raises(ValueError) as error:
            read_image(tmp_path / name)
        one_line(error, name)
    assert capfd.readouterr() == ("", "")


@needs_pillow
@pytest.mark.parametrize("side", [9000, 12000, 30000])  # Pillow says nothing, warns, refuses
def test_a_huge_picture_is_refused_before_it_is_unpacked(tmp_path, side):
    import zlib
    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
    head = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=r"pixels") as error:
            read_image(put(tmp_path, "bomb.png", bomb) / "bomb.png")
    one_line(error, "bomb.png")
    assert not said


@needs_pillow
@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "webp", "bmp"])
def test_a_damaged_picture_is_read_or_refused_in_one_line(tmp_path, ending, capfd):
    from PIL import Image
    path = saved(tmp_path / f"a.{ending}", Image.fromarray(picture(1, 30).numpy()))
    whole, dice = path.read_bytes(), random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(dice.randint(1, 4)):
                damaged[dice.randrange(min(len(whole), 200) if dice.random() < 0.5 else len(whole))] = dice.randrange(256)
            path.write_bytes(damaged)
            try:
                assert read_image(path).shape[2] == 3
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)
    assert capfd.readouterr() == ("", "")


def test_without_pillow_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError) as error:
        read_image(tmp_path / "a.png")
    one_line(error, "a.png", "pip install -r requirements-vl.txt")


def test_preprocessing_computed_by_hand():
    """Bicubic with a = -1/2 from 2 to 4 columns: weights 1.088235, -0.088235 and 0.792857, 0.207143 -> 41, 71, 129, 159."""
    image = torch.tensor([[[50, 0, 255], [150, 0, 255]]] * 2, dtype=torch.uint8)
    red, green, blue = preprocess([image], 4)[0]
    expected = torch.tensor([41, 71, 129, 159]).expand(4, 4)
    assert torch.equal(((red * 0.26862954 + 0.48145466) * 255).round().int(), expected.int())
    assert torch.allclose(green, torch.tensor(-0.4578275 / 0.26130258)) and torch.allclose(blue, torch.tensor((1 - 0.40821073) / 0.27577711))


@needs_pillow
@pytest.mark.parametrize("size", [(48, 64), (64, 64), (1, 1), (1, 50), (30, 7), (200, 150), (32, 32), (33, 31), (300, 30)])
def test_preprocessing_is_pillows_resize(size):
    from PIL import Image
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3), dtype=np.uint8)).resize(size[::-1], Image.Resampling.BILINEAR)
    ours = preprocess([torch.from_numpy(np.array(smooth))], 32)[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.CLIP_MEAN, images.CLIP_STD))
    theirs = torch.from_numpy(np.array(smooth.resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert ((ours * std + mean) * 255 - theirs).abs().max() <= 2.01


# -------------------------------------------------------------------------------------------------------------- features

def test_pooling_computed_by_hand():
    grid = torch.arange(49.0).view(1, 49, 1)
    # cell i of 6 covers floor(7 i / 6) to ceil(7 (i + 1) / 6): the two columns i and i + 1
    assert torch.equal(pool(grid)[0, :, 0].view(6, 6), torch.tensor([[7.0 * (i + 1) + j + 1 for j in range(6)] for i in range(6)]))
    assert torch.equal(pool(-grid)[0, :, 0].view(6, 6), torch.tensor([[-7.0 * i - j for j in range(6)] for i in range(6)]))
    small, same = torch.randn(2, 9, 5), torch.randn(2, 36, 5)
    assert pool(small) is small and torch.equal(pool(same), same) and pool(torch.randn(2, 49, 5)).shape == (2, 36, 5)
    with pytest.raises(AssertionError, match="square"):
        pool(torch.randn(2, 50, 5))


class Clip:
    """Stands for CLIP: (B, 3, 14, 14) -> the means of 7 x 7 patches, three channels; counts pictures, and stops after some."""

    def __init__(self, last=None, scale=1.0):
        self.seen, self.last, self.scale = 0, last, scale

    def __call__(self, images):
        self.seen += len(images)
        if self.last is not None and self.seen > self.last:
            raise KeyboardInterrupt
        return self.scale * torch.nn.functional.avg_pool2d(images, 2).flatten(2).transpose(1, 2)


def run(folder, clip, count=10, made_by="clip a", **how):
    keys = [str(i) for i in range(count)]
    return features(clip, picture, keys, folder, made_by, size=how.pop("size", 14), batch_size=3, **how)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(images, "SHARD", 4)


def right(found, count=10, scale=1.0):
    """What is looked up is what CLIP says, as fp16, for pictures one by one."""
    for i in range(count):
        expected = pool(Clip(scale=scale)(preprocess([picture(i)], 14)))
        assert torch.equal(found.lookup([(str(i),)])[0], expected.half().float())
    return True


def test_features_are_looked_up(tmp_path, small_shards, capsys):
    clip = Clip()
    found = run(tmp_path, clip)
    assert clip.seen == 10 and right(found) and len(list(tmp_path.glob("shard-*.safetensors"))) == 3
    pairs = found.lookup([("3", "1"), ("9", "9")])
    assert pairs.shape == (2, 2, 36, 3) and pairs.dtype == torch.float32
    assert torch.equal(pairs[0, 1], found.lookup([("1",)])[0, 0]) and torch.equal(pairs[1, 0], pairs[1, 1])
    assert "10/10" in capsys.readouterr().out
    with pytest.raises(KeyError):
        found.lookup([("10",)])
    with pytest.raises(AssertionError, match="same number"):
        found.lookup([("1",), ("1", "2")])


def test_clip_sees_each_picture_once(tmp_path, small_shards, capsys):
    keys = ["1", "2", "1", "0"]
    clip = Clip()
    features(clip, picture, keys, tmp_path, "clip a", size=14)
    assert clip.seen == 3
    found = run(tmp_path, clip)  # more pictures: the first three are there already
    assert clip.seen == 10 and right(found)
    capsys.readouterr()
    assert right(run(tmp_path, clip)) and clip.seen == 10 and capsys.readouterr().out == ""
    assert right(run(tmp_path, clip, count=5), count=10)  # fewer take nothing away


def test_a_run_cut_off_goes_on_behind_its_last_whole_shard(tmp_path, small_shards):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Clip(last=9))
    assert sorted(path.name for path in tmp_path.glob("shard*")) == ["shard-00000.safetensors", "shard-00001.safetensors"]
    clip = Clip()
    assert right(run(tmp_path, clip)) and clip.seen == 2


def killed(folder, number):
    """A child's work: killed while its shard `number` is not yet in its place."""
    images.SHARD, replace, calls = 4, os.replace, iter(range(99))
    os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == number else replace(*paths)
    run(folder, Clip())


@pytest.mark.parametrize("number", [0, 2])
def test_a_killed_run_leaves_whole_shards_alone(tmp_path, small_shards, children, number):
    child = multiprocessing.get_context("forkserver").Process(target=killed, args=(tmp_path, number))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL and len(list(tmp_path.glob("*.partial"))) == 1
    clip = Clip()
    assert right(run(tmp_path, clip)) and clip.seen == 10 - 4 * number and not list(tmp_path.glob("*.partial"))


def test_each_damaged_byte_is_noticed_and_its_shard_made_again(tmp_path, small_shards, capsys):
    run(tmp_path, Clip())
    path, dice = tmp_path / "shard-00001.safetensors", random.Random(0)
    whole = path.read_bytes()
    damages = [whole[:place] + bytes([whole[place] ^ 1 << dice.randrange(8)]) + whole[place + 1:] for place in dice.sample(range(len(whole)), 40)]
    for damaged in [b"", whole[:-1], whole[:len(whole) // 2], whole + b"\0", bytes(len(whole)), *damages]:
        path.write_bytes(damaged)
        clip = Clip()
        capsys.readouterr()
        assert right(run(tmp_path, clip)) and clip.seen == 4
        said = capsys.readouterr().out.splitlines()[0]
        assert str(tmp_path) in said and "made again" in said and "shard-00001.safetensors" in said


def test_another_clip_and_foreign_files_are_made_again(tmp_path, small_shards, capsys):
    run(tmp_path, Clip())
    clip = Clip(scale=2.0)
    assert right(run(tmp_path, clip, made_by="clip b"), scale=2.0) and clip.seen == 10
    assert "shard-00000.safetensors and 2 more" in capsys.readouterr().out
    clip = Clip()
    assert run(tmp_path, clip, size=28).shape == (36, 3) and clip.seen == 10  # another size of the pictures
    clip = Clip()
    assert run(tmp_path, clip, size=28, g=3).shape == (9, 3) and clip.seen == 10
    for path in tmp_path.glob("shard-*"):
        path.unlink()
    save_file({"x": torch.zeros(3)}, tmp_path / "shard-00000.safetensors")
    checkpoint.write_tensors(tmp_path / "shard-00001.safetensors", {"features": torch.zeros(1, 36, 3).half()}, {"config": "{}"})
    (tmp_path / "notes.txt").write_text("stays")
    assert right(run(tmp_path, clip := Clip())) and clip.seen == 10 and (tmp_path / "notes.txt").read_text() == "stays"


def test_a_new_version_makes_all_features_again(tmp_path, small_shards, monkeypatch):
    run(tmp_path, Clip())
    monkeypatch.setattr(images, "VERSION", images.VERSION + 1)
    run(tmp_path, clip := Clip())
    assert clip.seen == 10


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")])
def test_a_full_disk_is_one_line_and_whole_shards_stay(tmp_path, small_shards, monkeypatch, error):
    real, calls = checkpoint.save_file, []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise error
        real(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ValueError) as raised:
        run(tmp_path, Clip())
    one_line(raised, str(tmp_path), "No space left", "make room")
    assert [path.name for path in tmp_path.glob("shard*")] == ["shard-00000.safetensors"]
    assert right(run(tmp_path, clip := Clip())) and clip.seen == 6


def test_too_small_a_disk_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(images.shutil, "disk_usage", lambda path: SimpleNamespace(free=2000))
    with pytest.raises(ValueError) as error:
        run(tmp_path, clip := Clip())
    one_line(error, str(tmp_path), "room for 0.0 GB")
    assert clip.seen == 3


def test_features_that_fp16_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError) as error:
        run(tmp_path, Clip(scale=1e6))
    one_line(error, "pictures 0 to 2", "not finite")
    assert not list(tmp_path.glob("shard*"))


def test_a_file_cut_while_in_use_is_noticed(tmp_path):
    found = run(tmp_path, Clip())
    path = tmp_path / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError) as error:
        found.lookup([("9",)])
    one_line(error, str(path))


def test_a_picture_that_cannot_be_read_stops_with_its_name(tmp_path, small_shards):
    with pytest.raises(ValueError, match="7.png"):
        features(Clip(), lambda key: read_image(tmp_path / "7.png") if key == "7" else picture(key), "0123456789", tmp_path / "cache", "clip a", size=14)
    assert len(list((tmp_path / "cache").glob("shard*"))) == 1


# ------------------------------------------------------------------------------------------------------------- real data

@pytest.mark.skipif("EASY_VQA" not in os.environ, reason="needs EASY_VQA=<folder with questions.json and images/>")
@needs_pillow
def test_the_real_easy_vqa():
    dataset = load("easy-vqa", os.environ["EASY_VQA"])
    parts = [{example.images[0] for example in part} for part in (dataset.train, dataset.val, dataset.test)]
    assert len(dataset.train) + len(dataset.val) + len(dataset.test) == 38_575 and dataset.skipped == 0
    assert [len(part) for part in parts] == [3200, 400, 400] and len(set.union(*parts)) == 4000
    paths = find_images(dataset.folder, set.union(*parts))
    assert {tuple(read_image(paths[key]).shape) for key in sorted(parts[1])} == {(64, 64, 3)}
    assert len({answer for example in dataset.train for answer in example.answers}) == 13
