"""Pictures and what CLIP sees in them: files good and bad, geometry, and features on disk."""
import importlib.util
import multiprocessing
import os
import random
import signal
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch

import vision.features
from data import Dataset
from vision.features import MEAN, STD, Features, find_images, pool, preprocess, read_image
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

def test_pictures_are_found_in_any_sub_folder_and_missing_ones_are_one_line(tmp_path):
    for name in ("1.png", "images/2.JPG", "images/train/7/dev-1-0-img0.png", "train2014/3.jpeg",
                 "3.txt", "images/.hidden/1.png", "__MACOSX/._1.png"):
        put(tmp_path, name, b"x")
    (tmp_path / "val2014").symlink_to(put(tmp_path / ".elsewhere", "4.png", b"x"))
    found = find_images(tmp_path, ["1", "2", "3", "4", "dev-1-0-img0", "1"])
    assert {key: str(path.relative_to(tmp_path)) for key, path in found.items()} == {
        "1": "1.png", "2": "images/2.JPG", "3": "train2014/3.jpeg", "4": "val2014/4.png",
        "dev-1-0-img0": "images/train/7/dev-1-0-img0.png"}
    with pytest.raises(ValueError) as error:
        find_images(tmp_path, ["1", "5", "6"])
    one_line(error, "2 pictures", "5.jpg", str(tmp_path))


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
              ("cmyk.jpg", Image.new("CMYK", (5, 3), (0, 255, 255, 0)), [255, 0, 0])]
    for name, image, expected in kinds:
        pixels = read_image(saved(tmp_path / name, image, quality=100, lossless=True))
        assert pixels.shape == (3, 5, 3) and pixels.dtype == torch.uint8, name
        wrong = (pixels.int() - torch.tensor(expected)).abs().max()
        assert wrong <= (2 if name.endswith("jpg") else 0), (name, pixels[0, 0])


@needs_pillow
@pytest.mark.parametrize("mode, colour, transparency, expected", [
    ("RGBA", (10, 20, 30, 0), None, 255), ("RGBA", (0, 0, 0, 51), None, 204),
    ("LA", (0, 51), None, 204), ("L", 7, 7, 255), ("RGB", (1, 2, 3), (1, 2, 3), 255),
    ("RGB", (7, 7, 7), (1, 2, 3), 7), ("P", 1, 1, 255), ("P", 1, b"\xff\x33", 204)])
def test_what_is_transparent_lies_on_white(tmp_path, mode, colour, transparency, expected):
    image = Image.new(mode, (2, 1), colour)
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 0, 0])  # red and black
    clear = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's about palettes
        pixels = read_image(saved(tmp_path / "a.png", image, **clear))
    assert pixels.tolist() == [[[expected] * 3] * 2]


def grey_png(path, depth, greys, key):
    """A PNG of one row of eight greys in so many bits each, of which `key` is transparent."""
    row = int("".join(f"{grey:0{depth}b}" for grey in greys), 2).to_bytes(depth, "big")
    head = struct.pack(">IIBBBBB", 8, 1, depth, 0, 0, 0, 0)
    chunks = {b"IHDR": head, b"tRNS": struct.pack(">H", key), b"IDAT": zlib.compress(b"\0" + row),
              b"IEND": b""}
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()))
    return path


@needs_pillow
@pytest.mark.parametrize("depth, scale", [(1, 255), (2, 85), (4, 17), (8, 1), (16, 1 / 256)])
def test_a_transparent_grey_lies_on_white_in_every_bit_depth(tmp_path, depth, scale):
    most = 2 ** depth - 1
    for key in (0, 1, most // 3, most - 1, most):
        greys = [key, 0, 1, most // 3, most // 2, most - 2 * (depth > 1), most - 1, most]
        expected = [255 if grey == key else int(grey * scale) for grey in greys]
        pixels = read_image(grey_png(tmp_path / "a.png", depth, greys, key))
        assert pixels.tolist() == [[[value] * 3 for value in expected]]


@needs_pillow
def test_what_is_no_picture_is_one_line_that_names_the_file(tmp_path, monkeypatch, capfd):
    def refused(name, *words):
        with pytest.raises(ValueError) as error:
            read_image(tmp_path / name)
        one_line(error, str(tmp_path / name), *words)
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for name in ("cut.png", "cut.jpg", "cut.gif", "cut.bmp", "cut.webp"):
        whole = saved(tmp_path / name, Image.fromarray(noise)).read_bytes()
        for share in (0.02, 0.5, 0.9):
            (tmp_path / name).write_bytes(whole[:int(len(whole) * share)])
            refused(name)
    for name, content in (("empty.png", b""), ("page.jpg", b"<html>404</html>"),
                          ("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")):
        put(tmp_path, name, content)
        refused(name)
    refused("missing.png")
    saved(tmp_path / "bomb.png", Image.new("RGB", (30, 30)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # Pillow's is 89 million, and twice allowed
    refused("bomb.png", "900 pixels")  # before it is unpacked
    assert capfd.readouterr() == ("", "")


@needs_pillow
@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "webp", "bmp"])
def test_a_damaged_picture_is_read_or_refused_in_one_line(tmp_path, ending, capfd):
    path = saved(tmp_path / f"a.{ending}", Image.fromarray(picture(1, 30).numpy()))
    whole, dice = path.read_bytes(), random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(150):
            damaged = bytearray(whole)
            for end in (len(whole), 200, 200):
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
@pytest.mark.parametrize("size", [(48, 64), (1, 1), (1, 50), (200, 150), (33, 31), (300, 30)])
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
    assert torch.equal(pool(small), small) and torch.equal(pool(same), same)


def said(key):
    """What CLIP says of a picture, (P, C): another thing for each key."""
    return torch.randn(36, 3, generator=torch.Generator().manual_seed(int(key)))


def filled(folder, keys=range(10)):
    """The features of these pictures, which are right, and for how many CLIP was asked."""
    found, asked = Features(), []

    def see(some):
        asked.extend(some)
        return torch.stack([said(key) for key in some])

    found.fill(folder, map(str, keys), see)
    for key in keys:
        assert torch.equal(found.lookup([(str(key),)])[0, 0], said(key).half().float())
    return found, len(asked)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(vision.features, "SHARD", 4)


def test_clip_sees_each_picture_once_and_features_are_looked_up(tmp_path, capsys):
    assert filled(tmp_path, [1, 2, 0])[1] == 3 and "3/3" in capsys.readouterr().out
    assert filled(tmp_path)[1] == 7  # three of them are there already
    capsys.readouterr()
    found, asked = filled(tmp_path, range(5))  # fewer take nothing away
    assert asked == 0 and capsys.readouterr().out == ""
    pairs = found.lookup([("3", "1"), ("9", "9")])
    assert pairs.shape == (2, 2, 36, 3) and pairs.dtype == torch.float32
    assert torch.equal(pairs[0, 1], found.lookup([("1",)])[0, 0])
    assert torch.equal(pairs[1, 0], pairs[1, 1])
    found.hidden = True  # as if every picture were blank
    assert torch.equal(found.lookup([("3", "1"), ("9", "9")]), torch.zeros_like(pairs))


def killed(folder, number):
    """A child's work: killed while its shard `number` is not yet in its place."""
    vision.features.SHARD, replace, calls = 4, os.replace, iter(range(99))

    def killing(*paths):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
    os.replace = killing
    filled(folder)


@pytest.mark.parametrize("number", [0, 2])
def test_a_killed_run_leaves_whole_shards_only(children, tmp_path, number):
    context = multiprocessing.get_context("forkserver")
    child = context.Process(target=killed, args=(tmp_path, number))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL and len(list(tmp_path.glob("*.partial"))) == 1
    assert filled(tmp_path)[1] == 10 - 4 * number
    assert not list(tmp_path.glob("*.partial"))


def test_each_damaged_byte_is_noticed_and_its_shard_made_again(tmp_path):
    (tmp_path / "notes.txt").write_text("stays")
    filled(tmp_path)
    path, dice = tmp_path / "shard-0.safetensors", random.Random(0)
    whole = path.read_bytes()
    damages = [b"", whole[:-1], whole[:len(whole) // 2], whole + b"\0", bytes(len(whole))]
    for place in dice.sample(range(len(whole)), 40):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << dice.randrange(8)
        damages.append(bytes(damaged))
    for damaged in damages:
        path.write_bytes(damaged)
        assert filled(tmp_path)[1] == 4
    assert (tmp_path / "notes.txt").read_text() == "stays"


def test_a_home_folder_that_cannot_be_written_is_one_line_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(vision.features, "CACHE", put(tmp_path, "home", b"") / "home" / "features")
    with pytest.raises(ValueError) as error:
        nothing = Dataset([], [], [], "scenes", tmp_path, "", 0, None)
        vision.features.clip_features({"vqa": nothing}, "nano", "cpu")
    one_line(error, str(tmp_path / "home"), "set HOME")
