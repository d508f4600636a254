"""Pictures and what CLIP sees in them: files good and bad, geometry, and features on disk."""
import importlib.util
import io
import multiprocessing
import os
import random
import signal
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import run.files
import vision.features
from vision.features import MEAN, STD, features, find_images, pool, preprocess, read_image
from workshop import one_line, put

pillow = importlib.util.find_spec("PIL") is not None
needs_pillow = pytest.mark.skipif(not pillow, reason="pip install -r requirements-vl.txt")
if pillow:
    from PIL import Image


def picture(key, side=8):
    """A drawn picture that is another one for each key."""
    generator = torch.Generator().manual_seed(int(key))
    return torch.randint(0, 256, (side, side + 1, 3), dtype=torch.uint8, generator=generator)


# -------------------------------------------------------------------------------------- pictures

def test_pictures_are_found_in_any_sub_folder(tmp_path, monkeypatch):
    for name in ("1.png", "images/2.JPG", "images/train/7/dev-1-0-img0.png", "train2014/3.jpeg",
                 "notes.txt", "images/.hidden/1.png", "__MACOSX/._1.png", "5.png"):
        put(tmp_path, name, b"x")
    (tmp_path / "images/again").symlink_to(tmp_path)  # a circle
    (tmp_path / "val2014").symlink_to(put(tmp_path / ".elsewhere", "4.png", b"x"))
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    found = find_images(f"~/{tmp_path.name}", ["1", "2", "3", "4", "dev-1-0-img0", "1"])
    assert {key: str(path.relative_to(tmp_path)) for key, path in found.items()} == {
        "1": "1.png", "2": "images/2.JPG", "3": "train2014/3.jpeg", "4": "val2014/4.png",
        "dev-1-0-img0": "images/train/7/dev-1-0-img0.png"}


def test_missing_and_double_pictures_are_one_line(tmp_path):
    put(tmp_path, "images/1.png", b"x")
    with pytest.raises(ValueError) as error:
        find_images(tmp_path, ["1", "2", "3"])
    one_line(error, "2 of 3 pictures", "2.jpg", str(tmp_path))
    put(tmp_path, "train/1.jpg", b"x")
    with pytest.raises(ValueError) as error:
        find_images(tmp_path, ["1"])
    one_line(error, "1.png", "1.jpg", "same name")


def saved(path, image, **how):
    image.save(path, **how)
    return path


@needs_pillow
def test_every_kind_of_picture_becomes_rgb(tmp_path):
    colour, grey = Image.new("RGB", (5, 3), (200, 100, 50)), Image.new("L", (5, 3), 77)
    palette = colour.convert("P", palette=Image.Palette.ADAPTIVE)
    grey16 = Image.fromarray(np.full((3, 5), 77 * 257, dtype=np.uint16))
    kinds = [(f"{i}{ending}", image, colour.getpixel((0, 0))) for i, (ending, image) in enumerate([
        (".png", colour), (".bmp", colour), (".png", palette), (".gif", palette), (".jpg", colour),
        (".webp", colour), (".png", colour.convert("RGBA"))])]
    kinds += [("grey.png", grey, [77] * 3), ("grey.jpg", grey, [77] * 3),
              ("grey16.png", grey16, [77] * 3), ("bits.png", Image.new("1", (5, 3), 1), [255] * 3),
              ("cmyk.jpg", Image.new("CMYK", (5, 3), (0, 255, 255, 0)), [255, 0, 0]),
              ("clear.png", Image.new("RGBA", (5, 3), (10, 20, 30, 0)), [255] * 3),
              ("half.png", Image.new("RGBA", (5, 3), (0, 0, 0, 51)), [204] * 3),
              ("greyalpha.png", Image.new("LA", (5, 3), (0, 51)), [204] * 3)]
    for name, image, expected in kinds:
        pixels = read_image(saved(tmp_path / name, image, quality=100, lossless=True))
        assert pixels.shape == (3, 5, 3) and pixels.dtype == torch.uint8, name
        wrong = (pixels.int() - torch.tensor(expected)).abs().max()
        assert wrong <= (2 if name.endswith("jpg") else 0), (name, pixels[0, 0])


def png(depth, kind, samples, transparency=None, palette=None):
    """A PNG of one row, byte by byte. samples: one number or tuple for each pixel."""
    def chunk(name, content):
        check = zlib.crc32(name + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + name + content + check
    bits = "".join(f"{value:0{depth}b}" for value in np.ravel(samples))
    bits += "0" * (-len(bits) % 8)
    head = struct.pack(">IIBBBBB", len(samples), 1, depth, kind, 0, 0, 0)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    parts = [(b"IHDR", head), (b"PLTE", palette), (b"tRNS", transparency),
             (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    chunks = [chunk(name, content) for name, content in parts if content is not None]
    return b"".join([b"\x89PNG\r\n\x1a\n", *chunks])


COLOURS = bytes([10, 20, 30, 200, 100, 50])  # a palette
TRANSPARENT = [  # bits, kind of PNG (grey, RGB, palette, with alpha), samples, tRNS, what is read
    *((depth, 0, [0, 1, 2**depth - 1], struct.pack(">H", 1), [[0] * 3, [255] * 3, [255] * 3], None)
      for depth in (1, 2, 4, 8, 16)),
    (2, 0, [2, 3], struct.pack(">H", 3), [[170] * 3, [255] * 3], None),
    (4, 0, [2, 3], struct.pack(">H", 2), [[255] * 3, [51] * 3], None),
    (16, 0, [0x1234, 0x1235], struct.pack(">H", 0x1234), [[255] * 3, [0x12] * 3], None),
    (8, 2, [(1, 2, 3), (3, 2, 1)], struct.pack(">HHH", 1, 2, 3), [[255] * 3, [3, 2, 1]], None),
    (16, 2, [(256, 512, 768), (768, 512, 256)], struct.pack(">HHH", 256, 512, 768),
     [[255] * 3, [3, 2, 1]], None),
    (16, 4, [(0, 0), (0, 0xFFFF), (0, 0x3333)], None, [[255] * 3, [0] * 3, [204] * 3], None),
    (16, 6, [(0, 0, 0, 0), (0, 256, 512, 0xFFFF)], None, [[255] * 3, [0, 1, 2]], None),
    *((depth, 3, [0, 1], alpha, expected, COLOURS) for depth in (1, 2, 4, 8)
      for alpha, expected in ((b"\x00", [[255] * 3, [200, 100, 50]]),
                              (b"\xff\x00", [[10, 20, 30], [255] * 3]),
                              (b"\xff\x33", [[10, 20, 30], [244, 224, 214]]))),
]


@needs_pillow
@pytest.mark.parametrize("depth, kind, samples, transparency, expected, palette", TRANSPARENT)
def test_what_is_transparent_is_white_in_every_bit_depth(tmp_path, depth, kind, samples,
                                                         transparency, expected, palette):
    put(tmp_path, "a.png", png(depth, kind, samples, transparency, palette))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's about palettes
        assert read_image(tmp_path / "a.png").tolist() == [expected]


@needs_pillow
def test_one_pixel_is_a_picture_and_the_cameras_rotation_is_not_applied(tmp_path):
    pixels = read_image(saved(tmp_path / "a.png", Image.new("RGB", (1, 1), (1, 2, 3))))
    assert pixels.tolist() == [[[1, 2, 3]]] and preprocess([pixels], 32).shape == (1, 3, 32, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn, which CLIP's preprocessing ignores, too
    assert read_image(saved(tmp_path / "a.jpg", Image.new("RGB", (6, 2)), exif=exif)).size(0) == 2


@needs_pillow
def test_what_is_no_picture_is_one_line_that_names_the_file(tmp_path, capfd):
    def refused(name, *words):
        with pytest.raises(ValueError) as error:
            read_image(tmp_path / name)
        one_line(error, str(tmp_path / name), *words)
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    noise, buffer = Image.fromarray(noise), io.BytesIO()
    for name in ("moving.gif", "moving.png", "moving.webp", "preview.mpo"):
        noise.save(tmp_path / name, save_all=True, append_images=[noise.rotate(180)])
        refused(name, "animated, or several")
    for name in ("cut.png", "cut.jpg", "cut.gif", "cut.bmp", "cut.webp"):
        whole = saved(tmp_path / name, noise).read_bytes()
        for share in (0.02, 0.1, 0.5, 0.9):
            (tmp_path / name).write_bytes(whole[:int(len(whole) * share)])
            refused(name)
    noise.save(buffer, "TIFF")
    for name, content in (
            ("empty.png", b""), ("text.jpg", b"hello"), ("page.jpg", b"<html>404</html>"),
            ("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
            ("tiff.png", buffer.getvalue()), ("zeros.png", bytes(9999))):
        put(tmp_path, name, content)
        refused(name)
    refused(".")
    refused("missing.png")
    assert capfd.readouterr() == ("", "")


@needs_pillow
@pytest.mark.parametrize("side", [9500, 12000, 30000])  # Pillow warns, warns, refuses
def test_a_huge_picture_is_refused_before_it_is_unpacked(tmp_path, side):
    bomb = png(8, 2, [(0, 0, 0)])
    bomb = bomb.replace(struct.pack(">II", 1, 1), struct.pack(">II", side, side))
    head = bomb[12:29]
    bomb = bomb[:29] + zlib.crc32(head).to_bytes(4, "big") + bomb[33:]
    with warnings.catch_warnings(record=True) as said, pytest.raises(ValueError) as error:
        warnings.simplefilter("always")
        read_image(put(tmp_path, "bomb.png", bomb) / "bomb.png")
    one_line(error, "bomb.png", f"{side * side} pixels")
    assert not said


@needs_pillow
@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "webp", "bmp"])
def test_a_damaged_picture_is_read_or_refused_in_one_line(tmp_path, ending, capfd):
    path = saved(tmp_path / f"a.{ending}", Image.fromarray(picture(1, 30).numpy()))
    whole, dice = path.read_bytes(), random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(dice.randint(1, 4)):
                end = min(len(whole), 200) if dice.random() < 0.5 else len(whole)
                damaged[dice.randrange(end)] = dice.randrange(256)
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
    """Bicubic with a = -1/2 from 2 to 4 columns: weights 1.088235, -0.088235 and 0.792857,
    0.207143 -> 41, 71, 129, 159."""
    image = torch.tensor([[[50, 0, 255], [150, 0, 255]]] * 2, dtype=torch.uint8)
    red, green, blue = preprocess([image], 4)[0]
    expected = torch.tensor([41, 71, 129, 159]).expand(4, 4)
    assert torch.equal(((red * 0.26862954 + 0.48145466) * 255).round().int(), expected.int())
    assert torch.allclose(green, torch.tensor(-0.4578275 / 0.26130258))
    assert torch.allclose(blue, torch.tensor((1 - 0.40821073) / 0.27577711))


@needs_pillow
@pytest.mark.parametrize("size", [(48, 64), (64, 64), (1, 1), (1, 50), (30, 7), (200, 150),
                                  (32, 32), (33, 31), (300, 30)])
def test_preprocessing_is_pillows_resize(size):
    noise = np.random.default_rng(0).integers(
        0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize(size[::-1], Image.Resampling.BILINEAR)
    ours = preprocess([torch.from_numpy(np.array(smooth))], 32)[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    theirs = torch.from_numpy(np.array(smooth.resize((32, 32), Image.Resampling.BICUBIC)))
    assert ((ours * std + mean) * 255 - theirs.permute(2, 0, 1)).abs().max() <= 2.01


# -------------------------------------------------------------------------------------- features

def test_pooling_computed_by_hand():
    grid = torch.arange(49.0).view(1, 49, 1)
    # cell i of 6 covers floor(7 i / 6) to ceil(7 (i + 1) / 6): the two columns i and i + 1
    largest = [[7.0 * (i + 1) + j + 1 for j in range(6)] for i in range(6)]
    smallest = [[-7.0 * i - j for j in range(6)] for i in range(6)]
    assert pool(grid)[0, :, 0].view(6, 6).tolist() == largest
    assert pool(-grid)[0, :, 0].view(6, 6).tolist() == smallest
    small, same = torch.randn(2, 9, 5), torch.randn(2, 36, 5)
    assert pool(small) is small and torch.equal(pool(same), same)
    with pytest.raises(AssertionError, match="square"):
        pool(torch.randn(2, 50, 5))


class Clip:
    """Stands for CLIP: (B, 3, 14, 14) -> the means of 7 x 7 patches; counts pictures."""

    def __init__(self, scale=1.0):
        self.seen, self.scale = 0, scale

    def __call__(self, images):
        self.seen += len(images)
        means = torch.nn.functional.avg_pool2d(images, 2)
        return self.scale * means.flatten(2).transpose(1, 2)


def run_clip(folder, clip, count=10):
    return features(clip, picture, map(str, range(count)), folder, size=14, batch_size=3)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(vision.features, "SHARD", 4)


def right(found, count=10):
    """What is looked up is what CLIP says, as fp16, for pictures one by one."""
    for i in range(count):
        expected = pool(Clip()(preprocess([picture(i)], 14)))
        assert torch.equal(found.lookup([(str(i),)])[0], expected.half().float())
    return True


def shards(folder):
    return sorted(folder.glob("shard-*.safetensors"))


def test_features_are_looked_up(tmp_path, small_shards, capsys):
    clip = Clip()
    found = run_clip(tmp_path, clip)
    assert clip.seen == 10 and right(found) and len(shards(tmp_path)) == 3
    pairs = found.lookup([("3", "1"), ("9", "9")])
    assert pairs.shape == (2, 2, 36, 3) and pairs.dtype == torch.float32
    assert torch.equal(pairs[0, 1], found.lookup([("1",)])[0, 0])
    assert torch.equal(pairs[1, 0], pairs[1, 1])
    assert "10/10" in capsys.readouterr().out
    with pytest.raises(KeyError):
        found.lookup([("10",)])
    found.hidden = True  # as if every picture were blank
    assert found.lookup([("3", "1"), ("9", "9")]).shape == pairs.shape
    assert not found.lookup([("3", "1")]).any()


def test_clip_sees_each_picture_once(tmp_path, small_shards, capsys):
    clip = Clip()
    features(clip, picture, ["1", "2", "1", "0"], tmp_path, size=14)
    assert clip.seen == 3
    assert right(run_clip(tmp_path, clip)) and clip.seen == 10  # three of them are there already
    capsys.readouterr()
    assert right(run_clip(tmp_path, clip)) and clip.seen == 10 and capsys.readouterr().out == ""
    assert right(run_clip(tmp_path, clip, count=5), count=10)  # fewer take nothing away


def killed(folder, number):
    """A child's work: killed while its shard `number` is not yet in its place."""
    vision.features.SHARD, replace, calls = 4, os.replace, iter(range(99))

    def killing(*paths):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
    os.replace = killing
    run_clip(folder, Clip())


@pytest.mark.parametrize("number", [0, 2])
def test_a_killed_run_leaves_whole_shards_only(tmp_path, small_shards, number):
    child = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path, number))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL and len(list(tmp_path.glob("*.partial"))) == 1
    clip = Clip()
    assert right(run_clip(tmp_path, clip)) and clip.seen == 10 - 4 * number
    assert not list(tmp_path.glob("*.partial"))


def test_each_damaged_byte_is_noticed_and_its_shard_made_again(tmp_path, small_shards, capsys):
    run_clip(tmp_path, Clip())
    path, dice = shards(tmp_path)[0], random.Random(0)
    whole = path.read_bytes()
    count = len(run.files.read_tensors(path)[0]["features"])
    damages = [b"", whole[:-1], whole[:len(whole) // 2], whole + b"\0", bytes(len(whole))]
    for place in dice.sample(range(len(whole)), 40):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << dice.randrange(8)
        damages.append(bytes(damaged))
    for damaged in damages:
        path.write_bytes(damaged)
        clip = Clip()
        capsys.readouterr()
        assert right(run_clip(tmp_path, clip)) and clip.seen == count
        assert capsys.readouterr().out.startswith(f"{path} is damaged")


def test_foreign_files_are_made_again_or_left_alone(tmp_path, capsys):
    save_file({"x": torch.zeros(3)}, tmp_path / "shard-0.safetensors")
    run.files.write_tensors(tmp_path / "shard-1.safetensors", {"x": torch.zeros(1)}, {"keys": "{}"})
    (tmp_path / "notes.txt").write_text("stays")
    assert right(run_clip(tmp_path, Clip())) and (tmp_path / "notes.txt").read_text() == "stays"
    assert capsys.readouterr().out.count("made again") == 2 and len(shards(tmp_path)) == 1


def test_a_full_disk_is_one_line_and_whole_shards_stay(tmp_path, small_shards, monkeypatch):
    real, calls = run.files.save_file, []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise SafetensorError("No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(run.files, "save_file", full)
    with pytest.raises(ValueError) as raised:
        run_clip(tmp_path, Clip())
    one_line(raised, str(tmp_path), "No space left", "make room")
    assert len(list(tmp_path.glob("shard*"))) == 1
    clip = Clip()
    assert right(run_clip(tmp_path, clip)) and clip.seen == 6


def test_a_home_folder_that_cannot_be_written_to_is_one_line_with_advice(tmp_path):
    (tmp_path / "home").write_text("a file, because root may write everywhere")
    with pytest.raises(ValueError) as error:
        run_clip(tmp_path / "home" / ".cache" / "features", Clip())
    one_line(error, str(tmp_path / "home"), "set HOME")


def test_features_that_fp16_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="features of 0 to 2 are not finite"):
        run_clip(tmp_path, Clip(scale=1e6))
    assert not list(tmp_path.glob("shard*"))


def test_a_picture_that_cannot_be_read_stops_with_its_name(tmp_path, small_shards):
    def read(key):
        return read_image(tmp_path / "7.png") if key == "7" else picture(key)
    with pytest.raises(ValueError, match="7.png"):
        features(Clip(), read, "0123456789", tmp_path / "cache", size=14)
    assert len(shards(tmp_path / "cache")) == 1
