"""Behaviour of nox.py: pictures in and out, formulas against numpy, training that survives, weights, command line."""

import contextlib
import dataclasses
import errno
import functools
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, gate_layer, keras, mistake, names, noise, nox, randomized, read, run, write
from keras import ops

TINY = ["--width", "4", "--levels", "2", "--patch-size", "32", "--batch-size", "4", "--crops", "4", "--lr", "3e-3",
        "--warmup", "2", "--workers", "1"]  # fmt: skip
ARCHITECTURE = nox.Architecture(width=4, levels=2)

# --------------------------------------------------------------------------------------------------------------------
# Helpers
# --------------------------------------------------------------------------------------------------------------------


def shell(*arguments, timeout=120, **environment):
    """The real command line; the result has returncode, stdout and stderr."""
    line = [sys.executable, str(ROOT / "nox.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, env=os.environ | environment)


def make_pairs(folder, count=6, size=48, channels=3):
    """Pairs of a gradient with a few Gaussian stars, and without."""
    folder.mkdir()
    y, x = np.mgrid[:size, :size]
    for i in range(count):
        rng = np.random.default_rng(i)
        sky = np.repeat((40 + 80 * x / size * rng.random())[..., None], channels, axis=2)
        stars = sum(
            rng.uniform(50, 300) * np.exp(-((x - rng.random() * size) ** 2 + (y - rng.random() * size) ** 2) / 3)
            for _ in range(12)
        )
        write(folder / f"y{i}.png", np.rint(sky).astype(np.uint8))
        write(folder / f"x{i}.png", np.rint(sky + stars[..., None]).clip(0, 255).astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("data") / "pairs")


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


def test_help_lists_each_setting_with_its_default_before_keras_loads(tmp_path):
    for module in "keras", "tensorflow":
        (tmp_path / f"{module}.py").write_text("raise SystemExit('loaded')")
    result = shell("train", "--help", PYTHONPATH=str(tmp_path), COLUMNS="300")
    assert result.returncode == 0, result.stderr
    texts = {text.split()[0]: " ".join(text.split()) for text in re.split(r"\n  (?=-)", result.stdout)}
    for field in nox.dataclasses.fields(nox.Training):
        flag = "--" + field.name.replace("_", "-")
        assert texts[flag + "," * (field.type is bool)].endswith(f"(default: {field.default})")


@pytest.mark.parametrize(
    "arguments",
    [
        "train --epochs 0",
        "train --patch-size 0",
        "train --batch-size 0",
        "train --lr 0",
        "train --lr nan",
        "train --ema 1",
        "train --weight-ema -0.1",
        "train --seed -1",
        "train --vgg-weight nan",
        "train --n-channels 2",
        "train --width four",
        "train --network other",
        "infer a.png --stride 0",
        "infer a.png --patch-size 64 --stride 65",
        "infer a.png --batch-size 0",
        "infer a.png --target 1",
        "infer a.png --strength 1.1",
        "infer a.png --depth 12",
        "infer a.png -o out --other b.png",
        "train more",
        "neither",
        "",
    ],
)
def test_a_command_line_out_of_range_ends_with_status_2_and_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        nox.parse_arguments(arguments.split())
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def unusable(kind):
    """Make a file that is no picture; returns its name."""
    contents = {"empty.png": b"", "text.png": b"no picture at all\n" * 20}
    whole = cv2.imencode(".png", noise(60, 60, 3))[1].tobytes()
    contents |= {"half.png": whole[: len(whole) // 2], "half.tif": cv2.imencode(".tif", noise(60, 60, 3))[1][:5000]}
    if kind == "folder.png":
        Path(kind).mkdir()
    elif kind != "missing.png":
        Path(kind).write_bytes(bytes(contents[kind]))
    return kind


@pytest.mark.parametrize("kind", ["missing.png", "folder.png", "empty.png", "text.png", "half.png", "half.tif"])
def test_a_file_that_is_no_picture_is_named_and_nothing_written(kind, infer, folder, capfd):
    name = unusable(kind)
    before = names(folder)
    with pytest.raises(SystemExit, match=f"nox.py: {name}: .+"):
        infer(name)
    assert names(folder) == before
    assert capfd.readouterr().err == ""


def test_the_command_itself_tells_a_bad_picture_in_one_line_with_a_status(folder):
    result = shell("infer", unusable("text.png"))
    assert result.returncode == 1
    assert re.fullmatch(r"nox.py: text.png: .+\n", result.stderr)
    assert names(folder) == ["text.png"]


def foreign_weights(kind):
    """Make a file that holds no weights of nox; returns its name."""
    if kind == "random.h5":
        Path(kind).write_bytes(random.Random(0).randbytes(5000))
    elif kind == "other.h5":
        with h5py.File(kind, "w") as file:
            file["table"] = np.arange(10)
    elif kind == "model.h5":
        model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(2, 3)])
        with warnings.catch_warnings(action="ignore"):
            model.save(kind)
    elif kind == "half.h5":
        nox.save_weights(nox.build_generator(ARCHITECTURE), ARCHITECTURE, kind)
        Path(kind).write_bytes(Path(kind).read_bytes()[: Path(kind).stat().st_size // 2])
    elif kind == "mixed.h5":
        nox.save_weights(nox.build_generator(ARCHITECTURE), nox.Architecture(width=5, levels=2), kind)
    return kind


@pytest.mark.parametrize("kind", ["missing.h5", "random.h5", "other.h5", "model.h5", "half.h5", "mixed.h5"])
def test_weights_that_are_none_are_named_and_nothing_written(kind, folder):
    write("a.png", noise(40, 40, 3))
    name = foreign_weights(kind)
    before = names(folder)
    assert name in mistake("infer", "a.png", "--weights", name)
    assert names(folder) == before


def test_a_full_disk_for_temporary_files_is_not_told_as_a_fault_of_the_weights(folder, weights, monkeypatch):
    write("a.png", noise(40, 40, 3))

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(nox.shutil, "copyfile", full)
    message = mistake("infer", "a.png", "--weights", weights["random", 3])
    assert os.strerror(errno.ENOSPC) in message and "random3.h5" not in message


def test_weights_for_the_other_kind_of_picture_are_told_with_the_flag_that_helps(folder, weights):
    write("gray.png", noise(40, 40, 1))
    write("color.png", noise(40, 40, 3))
    for channels, name in (3, "gray.png"), (1, "color.png"):
        message = mistake("infer", name, "--weights", weights["random", channels])
        assert f"--n-channels {channels}" in message
        run("infer", name, "--weights", weights["random", channels], "--n-channels", channels)


# --------------------------------------------------------------------------------------------------------------------
# Pictures in and out
# --------------------------------------------------------------------------------------------------------------------

PNG = [(".png", dtype, channels) for dtype in ("uint8", "uint16") for channels in (1, 2, 3, 4)]
TIFF = [(".tif", dtype, channels) for dtype in ("uint8", "uint16", "float32") for channels in (1, 3, 4)]
JPEG = [(".jpg", "uint8", channels) for channels in (1, 3)]


@pytest.mark.parametrize("extension, dtype, channels", PNG + TIFF + JPEG)
def test_starry_is_a_copy_and_starless_of_the_same_kind(extension, dtype, channels, infer):
    source = write("in" + extension, noise(37, 45, channels, dtype))
    before = source.read_bytes()
    infer(source)
    assert source.read_bytes() == before == Path("starry" + extension).read_bytes()
    old, new = read(source), read("starless" + extension)
    assert (new.dtype, new.shape) == (old.dtype, old.shape)
    colors = slice(None) if channels in (1, 3) else slice(-1)
    assert not np.array_equal(new[..., colors], old[..., colors])
    if channels in (2, 4):
        np.testing.assert_array_equal(new[..., -1], old[..., -1])
    if extension == ".png":  # the header's byte that tells gray, gray with alpha, colour and colour with alpha
        assert Path("starless.png").read_bytes()[25] == before[25]


@pytest.mark.parametrize("extension, dtype, channels", [*PNG, *TIFF, (".tif", "float64", 3), (".tif", "int16", 1)])
def test_a_network_without_effect_gives_back_the_very_bits(extension, dtype, channels, infer):
    source = write("in" + extension, noise(37, 45, channels, dtype))
    infer(source, kind="identity")
    np.testing.assert_array_equal(read("starless" + extension), read(source))


def test_float_pixels_above_1_below_0_and_missing_ones_stay(infer):
    pixels = noise(30, 30, 3, "float32") * 40 - 2
    pixels[3, 4] = np.nan
    source = write("in.tif", pixels)
    infer(source, kind="identity")
    np.testing.assert_array_equal(read("starless.tif"), pixels)


def test_gray_with_alpha_is_written_as_other_programs_read_it():
    from PIL import Image  # comes with matplotlib

    pixels = noise(5, 7, 2)
    with Image.open(io.BytesIO(nox.encode_gray_alpha(pixels))) as image:
        assert image.mode == "LA"
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_a_network_that_is_off_by_much_never_leaves_the_range():
    picture = nox.Picture(noise(9, 9, 3, "uint16"), None)
    for light in np.full((9, 9, 3), 2.0), np.full((9, 9, 3), -2.0):
        assert set(np.unique(picture.without(light))) == {0 if light[0, 0, 0] > 0 else 65535}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_light_is_taken_away_in_the_units_of_the_picture(dtype):
    pixels = (np.array([[[100], [50], [20]]]) * (1 if dtype != "float32" else 0.01)).astype(dtype)
    white = 1 if dtype == "float32" else np.iinfo(dtype).max
    light = np.array([[[10], [0], [-5]]]) * (1 / white if dtype != "float32" else 0.01)
    expected = np.array([[[90], [50], [25]]]) * (1 if dtype != "float32" else 0.01)
    np.testing.assert_allclose(nox.Picture(pixels, None).without(light), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["a.tiff", "a.TIF", "a.jpeg", "a.PNG"])
def test_the_extension_follows_the_input_in_its_short_form(name, infer, folder):
    source = write(name, noise(30, 30, 3))
    infer(source)
    extension = {"a.tiff": ".tif", "a.TIF": ".tif", "a.jpeg": ".jpg", "a.PNG": ".png"}[name]
    assert {"starry" + extension, "starless" + extension} <= set(names(folder))
    assert Path("starry" + extension).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (5, 3), (31, 33), (32, 32), (64, 96), (80, 32), (101, 77)])
def test_pictures_of_any_size_keep_it(size, infer):
    source = write("in.png", noise(*size, 3))
    infer(source)
    assert read("starless.png").shape == (*size, 3)


def test_with_eight_views_it_is_the_same_how_a_picture_lies(infer):
    pixels, differences = noise(24, 24, 3), {}
    for views in 1, 8:
        found = []
        for turns in 0, 1:
            infer(write("in.png", np.ascontiguousarray(np.rot90(pixels, turns))), "--views", views, "--overwrite")
            found.append(np.rot90(read("starless.png").astype(int), -turns))
        differences[views] = np.abs(found[0] - found[1]).max()
    assert differences[8] <= 1 < differences[1]


@pytest.mark.parametrize("name", ["Pferdekopf-Nebel ümlaut.png", "星雲.png", "a b  c.png", "-x.png", "two.dots.png"])
def test_names_beyond_ascii_and_with_blanks(name, infer, folder):
    (folder / "Bilder äöü").mkdir()
    source = write(folder / "Bilder äöü" / name, noise(30, 30, 3))
    infer(source)
    infer(source, "-o", folder / "Bilder äöü" / ("ohne " + name))
    np.testing.assert_array_equal(read("starless.png"), read(folder / "Bilder äöü" / ("ohne " + name)))


def test_an_output_of_ones_own_name_comes_without_a_copy(infer, folder):
    infer(write("in.png", noise(30, 30, 3)), "-o", "out.tif")
    assert names(folder) == ["in.png", "out.tif"]


def test_an_output_without_extension_gets_the_inputs(infer, folder):
    infer(write("in.tiff", noise(30, 30, 3)), "-o", "out")
    assert names(folder) == ["in.tiff", "out.tif"]


def test_an_output_that_exists_is_replaced_only_on_demand(infer):
    write("in.png", noise(30, 30, 3))
    Path("out.png").write_text("precious")
    with pytest.raises(SystemExit, match="out.png: exists; --overwrite"):
        infer("in.png", "-o", "out.png")
    assert Path("out.png").read_text() == "precious"
    infer("in.png", "-o", "out.png", "--overwrite")
    assert read("out.png").shape == (30, 30, 3)


@pytest.mark.parametrize("output", ["in.png", "./in.png", "link.png", "sub/../in.png", "in"])
def test_the_picture_itself_is_never_overwritten(output, infer, folder):
    before = write("in.png", noise(30, 30, 3)).read_bytes()
    os.link("in.png", "link.png")
    (folder / "sub").mkdir()
    with pytest.raises(SystemExit, match="never overwritten"):
        infer("in.png", "-o", output, "--overwrite")
    assert (folder / "in.png").read_bytes() == before


def test_starless_png_as_the_picture_is_refused_without_a_name_for_the_output(infer, folder):
    before = write("starless.png", noise(30, 30, 3)).read_bytes()
    with pytest.raises(SystemExit, match="starless.png: is the picture itself"):
        infer("starless.png")
    assert names(folder) == ["starless.png"] and Path("starless.png").read_bytes() == before


@pytest.mark.parametrize("flags", [(), ("--n-channels", 1)])
def test_starry_png_as_the_picture_stays_as_it_is(flags, infer, folder):
    before = write("starry.png", noise(30, 30, 3)).read_bytes()
    infer("starry.png", *flags)
    assert names(folder) == ["starless.png", "starry.png"] and Path("starry.png").read_bytes() == before


@pytest.mark.parametrize("option", ["-o", "--stars", "--mask", "--preview"])
@pytest.mark.parametrize("output", ["missing/out.png", "in.png/out.png", "taken.png", "out.xyz", "out.webp", "in.png/"])
def test_an_output_that_cannot_be_is_told_before_the_work(output, option, infer, folder, monkeypatch):
    monkeypatch.setattr(nox, "starlight", lambda *arguments: pytest.fail("worked in vain"))
    (folder / "taken.png").write_text("precious")
    write("in.png", noise(30, 30, 3, "uint16"))
    with pytest.raises(SystemExit, match=f"nox.py: {Path(output).parts[0]}"):
        infer("in.png", option, output)
    assert names(folder) == ["in.png", "taken.png"]


@pytest.mark.parametrize(
    "output, flags", [("out.jpg", ()), ("out.fits", ()), ("out.png", ("--depth", "32f")), ("out.jpg", ("--depth", 16))]
)
def test_an_output_whose_format_cannot_hold_the_picture_is_told_before_the_work(
    output, flags, infer, folder, monkeypatch
):
    monkeypatch.setattr(nox, "starlight", lambda *arguments: pytest.fail("worked in vain"))
    write("in.png", noise(30, 30, 3 if flags else 4, "uint16"))
    with pytest.raises(SystemExit, match=f"nox.py: {output}: .*cannot hold"):
        infer("in.png", "-o", output, *flags)
    assert names(folder) == ["in.png"]


def test_a_copy_that_fails_leaves_no_half_file(folder, monkeypatch):
    Path("out.png").write_text("precious")
    monkeypatch.setattr(nox.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(nox.BadInput, match="out.png: cannot be written"):
        nox.write_bytes("out.png", b"new")
    assert names(folder) == ["out.png"] and Path("out.png").read_text() == "precious"


@pytest.mark.parametrize("channels, alpha", [(3, False), (4, True), (1, False)])
def test_one_channel_turns_colour_into_its_luminance(channels, alpha, infer):
    source = write("in.png", noise(30, 30, channels))
    infer(source, "--n-channels", 1, kind="identity")
    old, new = read(source), read("starless.png")
    luminance = cv2.cvtColor(old[..., :3], cv2.COLOR_BGR2GRAY) if channels > 1 else old[..., 0]
    assert np.abs(new[..., 0].astype(int) - luminance).max() <= 1
    assert Path("starless.png").read_bytes()[25] == (4 if alpha else 0)
    np.testing.assert_array_equal(read("starry.png"), new)
    assert (Path("starry.png").read_bytes() == source.read_bytes()) == (channels == 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_without_a_picture_a_random_pair_is_shown_and_scored(channels, data, infer, capsys):
    infer_pair = ["infer", "--data", data, "--n-channels", channels, "--patch-size", 32, "--stride", 24]
    with contextlib.suppress(SystemExit):
        infer("missing.png")  # sets the weights
    run(*infer_pair)
    starry, starless, truth = (read(name).astype(float) for name in ("input.png", "output.png", "gt.png"))
    assert starry.shape == starless.shape == truth.shape == (48, 48, channels)
    before, after = map(float, re.findall(r"(-?\d+\.\d+) dB", capsys.readouterr().out))
    expected = cv2.PSNR(starry, truth, 255), cv2.PSNR(starless, truth, 255)
    assert (before, after) == pytest.approx(expected, abs=0.1)
    assert (starless != starry).any()
    run(*infer_pair, "--strength", 0)
    np.testing.assert_array_equal(read("output.png"), read("input.png"))


def test_without_a_picture_gray_is_the_luminance_and_gray_pairs_get_the_grayscale_weights(folder, weights, monkeypatch):
    monkeypatch.setattr(nox, "weights_for", lambda settings, channels: weights["random", channels])
    for name, color in ("colour", (100, 150, 200)), ("gray", (150, 150, 150)):
        Path(name).mkdir()
        for letter in "xy":
            pixels = np.full((32, 32, 3), color, np.uint8)
            write(f"{name}/{letter}0.png", pixels if name == "colour" else pixels[..., :1])
    for name, flags, expected in ("colour", ["--n-channels", 1], 159), ("gray", [], 150):  # 0.114 B + 0.587 G + 0.299 R
        run("infer", "--data", name, *flags)
        assert read("input.png").shape == (32, 32, 1)
        assert (read("input.png") == expected).all()


@pytest.mark.parametrize("flags", [("--exclude", "a.png"), ("--overwrite",), ("--depth", "8"), ("--linear", "yes")])
def test_what_needs_a_picture_is_refused_without_one(flags, data, capsys):
    with pytest.raises(SystemExit):
        nox.parse_arguments(["infer", "--data", str(data), *flags])
    assert f"{flags[0]} needs a picture" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# Tiles
# --------------------------------------------------------------------------------------------------------------------


@functools.cache
def half_and_less():
    """A network whose answer tells how often and where each pixel went through it: x -> x / 2 - 0.1."""
    image = keras.Input((None, None, 3))
    return keras.Model(image, keras.layers.Rescaling(0.5, -0.1)(image))


@pytest.mark.parametrize("size", [(1, 1), (7, 40), (32, 32), (64, 96), (61, 83), (33, 31)])
@pytest.mark.parametrize("patch, stride, batch", [(32, 24, 1), (32, 32, 1), (32, 7, 3), (40, 33, 2), (20, 16, 64)])
def test_each_pixel_goes_through_the_network_once_and_stays_in_its_place(size, patch, stride, batch):
    image = np.random.default_rng(1).random((*size, 3), np.float32)
    settings = nox.Inference(patch_size=patch, stride=stride, batch_size=batch)
    light = nox.stellar_light(half_and_less(), ARCHITECTURE, image, settings)
    assert light.shape == image.shape
    np.testing.assert_allclose(light, image / 2 + 0.1, atol=1e-6)


@pytest.mark.parametrize("patch, stride", [(32, 32), (32, 24), (32, 5), (32, 1), (30, 20)])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 200])
def test_feathered_tiles_cover_a_side_with_weights_that_sum_to_1(length, patch, stride):
    tile, starts, indices = nox.tiles_along(length, nox.Inference(patch_size=patch, stride=stride), 4)
    overlap = tile - starts.step
    weights = nox.feather(len(indices), starts, tile, overlap)
    total = np.zeros(len(indices))
    for start, weight in zip(starts, weights):
        total[start : start + tile] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert weights.min() > 0
    assert tile % 4 == 0 and tile <= 32
    assert indices[overlap // 2 :][:length].tolist() == list(range(length))


def test_tiles_share_a_side_evenly_instead_of_reaching_far_beyond_it():
    settings = nox.Inference(patch_size=1024, stride=960)
    for length in 300, 1000, 1100, 2000, 5000:
        tile, starts, indices = nox.tiles_along(length, settings, 32)
        assert len(starts) == -(-length // 960)
        assert len(indices) - length < 64 + 32 * len(starts)


class Recorder:
    """Stands for a network that changes nothing and whose device holds so many tiles at once; notes what it is given."""

    def __init__(self, holds=100, message="OOM when allocating tensor"):
        self.holds, self.message, self.shapes = holds, message, []

    def predict_on_batch(self, tiles):
        self.shapes.append(tiles.shape)
        if len(tiles) > self.holds:
            raise RuntimeError(self.message)
        return tiles


class Leaning:
    """Stands for a network whose answer depends on how a picture lies: it smears it down, and less to the right."""

    def predict_on_batch(self, tiles):
        return tiles + np.roll(tiles, 1, axis=1) + np.roll(tiles, 1, axis=2) / 2


@pytest.mark.parametrize("way", range(8))
def test_tiles_are_laid_back_as_they_were(way):
    tiles = batch(2, 5, 7, 3)
    np.testing.assert_array_equal(nox.laid_back(nox.laid(tiles, way), way), tiles)


@pytest.mark.parametrize("way", range(1, 8))
def test_of_eight_views_the_answer_turns_with_the_picture(way):
    tiles = batch(2, 6, 6, 3)
    turned = nox.answer(Leaning(), nox.laid(tiles, way), 8)
    np.testing.assert_allclose(nox.laid_back(turned, way), nox.answer(Leaning(), tiles, 8), rtol=1e-5)
    one = nox.answer(Leaning(), nox.laid(tiles, way), 1)
    assert np.abs(nox.laid_back(one, way) - nox.answer(Leaning(), tiles, 1)).max() > 0.1


@pytest.mark.parametrize("views", [2, 4, 8])
def test_views_are_averaged(views):
    tiles = batch(2, 6, 9, 3)
    answers = [nox.laid_back(Leaning().predict_on_batch(nox.laid(tiles, way)), way) for way in range(views)]
    np.testing.assert_allclose(nox.answer(Leaning(), tiles, views), np.mean(answers, axis=0), rtol=1e-5)


def light_found_by(network, size, batch):
    image = np.random.default_rng(1).random((*size, 3), np.float32)
    settings = nox.Inference(patch_size=32, stride=24, batch_size=batch)
    return nox.stellar_light(network, ARCHITECTURE, image, settings)


@pytest.mark.parametrize("size", [(9, 9), (50, 70), (101, 173)])
@pytest.mark.parametrize("batch", [1, 3])
def test_all_batches_of_a_picture_are_of_one_shape(size, batch):
    network = Recorder()
    light_found_by(network, size, batch)
    assert len(set(network.shapes)) == 1


def test_a_batch_that_the_memory_does_not_hold_is_halved_until_it_does():
    network = Recorder(holds=2)
    light = light_found_by(network, (70, 260), batch=8)
    assert light.shape == (70, 260, 3) and not light.any()
    assert [shape[0] for shape in network.shapes[:3]] == [8, 4, 2]
    assert {shape[0] for shape in network.shapes[3:]} == {2}


def test_a_tile_that_the_memory_does_not_hold_is_told():
    with pytest.raises(nox.BadInput, match="out of memory; lower --patch-size"):
        light_found_by(Recorder(holds=0), (70, 260), batch=8)


def test_errors_that_a_smaller_batch_does_not_mend_are_told():
    with pytest.raises(RuntimeError, match="something else"):
        light_found_by(Recorder(2, "something else"), (70, 260), batch=8)


def test_a_tiles_edge_counts_less_than_its_middle():
    weights = nox.feather(56, range(0, 48, 24), 32, 8)
    assert weights[0, -1] < 0.1 < 0.9 < weights[0, 20]
    assert weights[1, 0] < 0.1 < 0.9 < weights[1, 20]


def burnt_out(channels=3, side=200):
    """(starry, starless, disc): a saturated disc on grain, and what a network makes of it that draws its grid there."""
    rng, (y, x) = np.random.default_rng(5), np.indices((side, side))
    sky = 0.2 + cv2.GaussianBlur(rng.normal(0, 0.04, (side, side, channels)).astype(np.float32), (0, 0), 0.7)
    sky = sky.reshape(side, side, channels)
    disc = np.hypot(x - side / 2, y - side / 2) < 35
    grid = 0.2 + np.float32(0.02) * (x % 2 == y % 2)
    return *(np.where(disc[..., None], fill, sky) for fill in (np.float32(1), grid[..., None])), disc


def inside(disc, pixels=6):
    return cv2.erode(disc.astype(np.uint8), np.ones((2 * pixels + 1, 2 * pixels + 1))) > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_a_saturated_disc_gets_the_grain_of_its_surroundings_for_the_networks_grid(channels):
    starry, starless, disc = burnt_out(channels)
    mended, (y, x) = nox.with_grain(starry, starless), np.indices(disc.shape)
    within, grid = inside(disc), 2.0 * (x % 2 == y % 2) - 1
    assert mended.shape == starless.shape and mended.dtype == np.float32
    assert mended[within].std() == pytest.approx(starless[~disc].std(), rel=0.25)
    assert abs(np.mean(grid * (mended[..., 0] - 0.2), where=within)) < 0.1 * 0.01  # of the amplitude it had
    assert np.array_equal(mended[~disc], starless[~disc])


def test_a_star_with_grain_of_its_own_keeps_what_the_network_found():
    starry, starless, disc = burnt_out()
    starry[disc] -= noise(*starry.shape, "float32")[disc]
    assert np.array_equal(nox.with_grain(starry, starless), starless)


def test_grain_is_not_cloned_from_knots():
    starry, starless, disc = burnt_out()
    y, x = np.indices(disc.shape)
    knots = (y % 6 == 0) & (x % 6 == 0) & ~disc
    starry[knots] = starless[knots] = 0.9
    mended = nox.with_grain(starry, starless)
    assert mended[inside(disc)].max() < 0.5


def test_without_surroundings_to_clone_from_the_networks_grid_is_smoothed_away():
    starless = 0.2 + 0.02 * (np.indices((30, 40)).sum(axis=0)[..., None] % 2) + np.zeros(3)
    starless = starless.astype(np.float32)
    mended = nox.with_grain(np.ones_like(starless), starless)
    assert mended[5:-5, 5:-5].std() < 0.2 * starless.std()


class ShortSighted:
    """Stands for a network that takes the more of the light the nearer it is to a core: all there, 12 pixels away none."""

    def __init__(self):
        self.shapes = []

    def predict_on_batch(self, tiles):
        self.shapes.append(tiles.shape)
        return np.stack([self.starless(tile) for tile in tiles])

    def starless(self, tile):
        away = cv2.distanceTransform(np.uint8(tile.max(axis=2) < 0.9), cv2.DIST_L2, 5)
        return tile - (1 - (away / 12) ** 2).clip(0, 1)[..., None] * (tile - np.median(tile, axis=(0, 1)))


def giant(dtype="uint8", height=240, width=300, channels=3, core=20):
    """(a picture of a burnt-out star with a wide halo, the distance of each pixel from its middle)."""
    r = np.hypot(*(np.indices((height, width)) - np.array([110, 140])[:, None, None]))
    star = np.where(r < core, 1, 0.25 * np.exp(-((r / core / 2) ** 2)))
    sky = 0.1 + 0.01 * noise(height, width, channels, "float32")
    pixels = (sky + star[..., None]).clip(0, 1)
    scale = 1 if dtype.startswith("float") else np.iinfo(dtype).max
    return nox.Picture(np.rint(pixels * scale).astype(dtype) if scale > 1 else pixels.astype(dtype)), r


def looked_at(picture, second_look, kinds=("starless",), excluded=None, **settings):
    """(what is made of a picture, with or without a second look; the shapes that the network was given)."""
    network, architecture = ShortSighted(), nox.Architecture(width=4, levels=2, n_channels=picture.pixels.shape[2])
    settings = nox.Inference(second_look=second_look, **settings)
    layers = nox.layers_of(
        picture, kinds, lambda same: same, excluded, settings, None, lambda _: (network, architecture)
    )
    return {kind: layer.pixels for kind, layer in layers.items()}, network.shapes


def light_left(pixels, dark, picture, near):
    """Mean light of a part of the picture above that of another, in units of white."""
    unit = picture.with_pixels(pixels).unit()
    return unit[near].mean() - unit[dark].mean()


@pytest.mark.parametrize("size", [(240, 300), (241, 302)])
@pytest.mark.parametrize(
    "dtype, channels, settings",
    [("uint8", 3, {}), ("uint16", 1, {}), ("float32", 3, {"linear": "yes"}), ("uint8", 1, {"upsample": True})],
)
def test_a_second_look_takes_the_light_that_a_giant_leaves(dtype, channels, settings, size):
    picture, r = giant(dtype, *size, channels)
    once, twice = (looked_at(picture, second, **settings)[0]["starless"] for second in (False, True))
    before, after = (light_left(pixels, r > 120, picture, (r > 30) & (r < 45)) for pixels in (once, twice))
    assert before > 0.04 and abs(after) < 0.6 * before
    assert (twice <= once).all()
    assert np.array_equal(twice[r > 80], once[r > 80])  # 20 + 3 * 12, the blur, and a pixel of the small picture


def test_where_there_is_no_giant_the_network_looks_once_and_the_bits_are_the_same():
    for picture in giant(core=4)[0], nox.Picture(noise(50, 60, 3)), giant(height=115, width=150, core=1)[0]:
        (once, shapes), (twice, same) = (looked_at(picture, second) for second in (False, True))
        assert shapes == same
        assert np.array_equal(once["starless"], twice["starless"])
    assert len(looked_at(giant()[0], True)[1]) == 2


def test_a_second_look_leaves_what_is_transparent_or_to_stay():
    picture, r = giant()
    apart = np.arange(300) < 140
    excluded = np.zeros((*r.shape, 1), np.float32)
    excluded[:, apart] = 1
    (whole, stays) = (looked_at(picture, True, excluded=mask)[0]["starless"] for mask in (None, excluded))
    assert np.array_equal(stays[:, apart], picture.pixels[:, apart])
    assert np.array_equal(stays[:, ~apart], whole[:, ~apart])
    picture.alpha = np.uint8(255 * ~apart) + np.zeros((240, 1), np.uint8)
    clear = looked_at(picture, True)[0]["starless"]
    assert np.array_equal(clear[:, apart], picture.pixels[:, apart])


def test_what_a_second_look_takes_is_in_the_stars_and_the_mask():
    picture, r = giant()
    kinds = "starless", "stars", "mask"
    once, twice = (looked_at(picture, second, kinds)[0] for second in (False, True))
    assert np.array_equal(twice["starless"] + twice["stars"], picture.pixels)
    assert (twice["mask"] >= once["mask"]).all() and (twice["mask"] > once["mask"])[(r > 35) & (r < 45)].all()


def test_a_gray_picture_in_colour_stays_gray_under_a_second_look():
    picture, _ = giant(channels=1)
    starless = looked_at(picture.with_pixels(picture.pixels.repeat(3, axis=2)), True)[0]["starless"]
    assert (starless == starless[..., :1]).all()


def test_the_glow_of_a_giant_is_told_from_a_galaxy_in_it_and_from_what_is_apart():
    r, beside, apart = (np.hypot(*(np.indices((90, 200)) - np.array([[[45]], [[x]]]))) for x in (45, 70, 150))
    glow = np.float32(0.2 * np.exp(-r / 15))
    galaxies = np.float32(0.5 * np.exp(-((beside / 5) ** 2)) + 0.5 * np.exp(-((apart / 5) ** 2)))
    second = (glow + galaxies)[..., None]
    found = nox.glow_of(np.uint8(r < 5), np.zeros_like(second), second)[..., 0]
    assert np.abs(found - glow)[(r > 8) & (r < 35) & (beside > 12)].max() < 0.01
    assert found[beside < 8].max() < 0.1  # 0.5 stand out of 0.04
    assert not found[apart < 12].any()


def test_the_way_to_a_ring_leads_over_what_the_first_look_took():
    r = np.hypot(*(np.indices((120, 120)) - 60))[..., None]
    first, ring = np.float32(0.5 * (r < 29)), np.float32(0.1 * ((r > 25) & (r < 40)))
    found = nox.glow_of(np.uint8(r[..., 0] < 5), first, first + ring)
    assert found[(r > 30) & (r < 35)].min() > 0.08
    assert not nox.glow_of(np.uint8(r[..., 0] < 5), np.zeros_like(first), ring).any()


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (64, 61), (129, 67), (200, 30)])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_an_image_that_comes_in_rows_is_shrunk_and_enlarged_without_seams(size, rows):
    image = np.random.default_rng(1).random((*size, 3), np.float32)
    squares = nox.Squares(image.shape)
    for part in nox.bands(len(image), rows=rows):
        squares.add(part, image[part])
    small = squares.means()
    for y, x in (0, 0), (len(small) - 1, small.shape[1] - 1):
        np.testing.assert_allclose(small[y, x], image[3 * y : 3 * y + 3, 3 * x : 3 * x + 3].mean((0, 1)), rtol=1e-5)
    parts = list(nox.enlarged_rows(small, image.shape))
    assert [part.start for part, _ in parts] == list(range(0, len(image), 63))
    whole = cv2.resize(small, None, fx=3, fy=3, interpolation=cv2.INTER_LINEAR)[: size[0], : size[1]]
    np.testing.assert_allclose(np.concatenate([part for _, part in parts]), whole, atol=1e-6)


def test_bfloat16_rounds_the_network_but_not_the_picture(folder, weights):
    source = write("in.png", noise(37, 45, 3, "uint16"))
    try:
        for kind in "identity", "random":
            flags = ["--weights", weights[kind, 3], "--patch-size", 32, "--stride", 24]
            for precision in "bfloat16", "float32":
                run("infer", source, *flags, "--precision", precision, "-o", f"{kind}_{precision}.png")
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_array_equal(read("identity_bfloat16.png"), read(source))
    rounding = np.abs(read("random_bfloat16.png") / 65535 - read("random_float32.png") / 65535)
    assert 0 < rounding.max() < 0.05


def test_training_in_bfloat16_shows_the_network_unrounded_pictures():
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        model = nox.Nox(ARCHITECTURE, nox.Training())
        starry = batch(1, 32, 32, 3)
        np.testing.assert_array_equal(model(starry)[0], model.generator(starry))
        assert not np.array_equal(model(starry)[0], model(nox.ops.cast(starry, "bfloat16"))[0])
    finally:
        keras.config.set_dtype_policy("float32")


# --------------------------------------------------------------------------------------------------------------------
# Formulas, against numpy
# --------------------------------------------------------------------------------------------------------------------


def batch(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def test_psnr():
    a, b = batch(20, 30, 3), batch(20, 30, 3, seed=1)
    assert nox.psnr(a, b) == pytest.approx(cv2.PSNR(a, b, 1), abs=1e-4)
    assert nox.psnr(a, a) == 100


def test_texture_error_asks_for_grain_of_the_right_strength():
    rng = np.random.default_rng(0)
    truth, other = (0.3 + 0.05 * rng.standard_normal((1, 96, 96, 3)).astype(np.float32) for _ in range(2))
    starry, plug = truth.copy(), truth.copy()
    starry[:, 24:72, 24:72] += 0.3
    plug[:, 24:72, 24:72] = 0.3
    error = lambda starless: float(nox.texture_error(starry, truth, starless))  # noqa: E731
    assert error(truth) == 0
    assert error(plug) > 0.7
    assert error(np.where(starry != truth, other, truth)) < 0.25
    assert error(np.where(starry == truth, 0.3, truth)) < 0.1  # what lies elsewhere has no say but at the rim
    assert error(np.where(starry != truth, 0.3 + 1.5 * (truth - 0.3), truth)) == pytest.approx(0.5, abs=0.1)
    assert error(np.where(starry != truth, 0.3 + 9 * (truth - 0.3), truth)) == pytest.approx(1, abs=0.1)  # no more


def test_relative_l1():
    starry, truth, starless = (batch(2, 8, 8, 3, seed=seed) for seed in range(3))
    starry[:, :4] = truth[:, :4]

    def mean(image, side):  # over the pixels that there are
        sums = (
            cv2.boxFilter(part, -1, (side, side), normalize=False, borderType=cv2.BORDER_CONSTANT)
            for part in (image, np.ones_like(image))
        )
        return np.divide(*sums)

    knots = np.stack([np.abs(mean(image, 5) - mean(image, 17)) for image in truth]) - 0.02
    assert knots.min() < 0 < 0.05 < knots.max()
    error, before = np.zeros(2), np.zeros(2)
    for place in np.ndindex(2, 8, 8):
        stars, knot = np.abs(starry[place] - truth[place]).max(), max(knots[place].max(), 0)
        stars, knot = (min(light / 0.02, 1) * 0.3 / (0.1 + light) for light in (stars, knot))
        weight = 1 + 5 * (stars + knot / 3)
        error[place[0]] += weight * np.abs(starless[place] - truth[place]).sum() / 192
        before[place[0]] += weight * np.abs(starry[place] - truth[place]).sum() / 192
    expected = np.mean(error / (before + 0.005))
    assert float(nox.relative_l1(starry, truth, starless, 5.0)) == pytest.approx(expected, rel=1e-5)


def test_cross_entropy():
    logits = np.linspace(-8, 8, 33, dtype=np.float32)
    probability = 1 / (1 + np.exp(-logits.astype(float)))
    assert float(nox.cross_entropy(logits, True)) == pytest.approx(-np.log(probability).mean(), rel=1e-5)
    assert float(nox.cross_entropy(logits, False)) == pytest.approx(-np.log(1 - probability).mean(), rel=1e-5)


def test_local_contrast():
    x = batch(1, 24, 21, 2)
    found = [2 * x - 1]
    for side in 5, 17:
        reach, mean, square = side // 2, np.empty_like(x), np.empty_like(x)
        for i, j in np.ndindex(24, 21):
            window = x[0, max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1]
            mean[0, i, j], square[0, i, j] = window.mean(axis=(0, 1)), (window**2).mean(axis=(0, 1))
        found.append((x - mean) / (2 * np.sqrt(square - mean**2 + 1e-4)))
    np.testing.assert_allclose(nox.LocalContrast()(x), np.concatenate(found, axis=-1), atol=1e-4)


def test_gate_and_fill_are_clipped_and_their_gradient_goes_on_weakly():
    tf = pytest.importorskip("tensorflow")
    starry = tf.constant([0.9, 0.9, 0.9, 0.9, 0.9])
    gate, fill = tf.constant([-0.5, 0.0, 0.5, 1.7, 0.5]), tf.constant([0.2, 0.2, 0.2, 0.2, -3.0])
    with tf.GradientTape() as tape:
        tape.watch([starry, gate, fill])
        starless = nox.Gate()([starry, gate, fill])
    np.testing.assert_allclose(starless, [0.9, 0.9, 0.55, 0.2, 0.45], atol=1e-6)
    by_starry, by_gate, by_fill = tape.gradient(starless, [starry, gate, fill])
    np.testing.assert_allclose(by_gate, [-0.14, -0.7, -0.7, -0.14, -0.9], atol=1e-6)
    np.testing.assert_allclose(by_fill, [0, 0, 0.5, 1, 0.1], atol=1e-6)
    np.testing.assert_allclose(by_starry, [1, 1, 0.5, 0, 0.5], atol=1e-6)


def test_a_shut_gate_leaves_the_very_bits():
    starry = batch(1, 9, 9, 3)
    starless = nox.Gate()([starry, np.full_like(starry, -0.3), np.full_like(starry, 7.7)])
    np.testing.assert_array_equal(starless, starry)


def plug(n_channels, height=128, width=120):
    """(flat sky with a star of 0.9, what a network left: a spot of a strange brightness and colour)."""
    starry = np.full((1, height, width, n_channels), 0.2, np.float32)
    starless, spot = starry.copy(), np.s_[:, 40:72, 40:72]
    starry[spot], starless[spot] = 0.9, np.linspace(0.2, 0.5, n_channels + 1)[1:]
    return starry, starless


@pytest.mark.parametrize("n_channels", [1, 3])
def test_the_spot_of_a_large_star_takes_on_its_surroundings(n_channels):
    starry, starless = plug(n_channels)
    mended = keras.ops.convert_to_numpy(nox.PullPush(5)([starry, starless]))
    before, after = (np.abs(image - 0.2)[:, 48:64, 48:64] for image in (starless, mended))
    assert after.max() < 0.3 * before.max()


def test_colour_takes_on_its_surroundings_more_than_brightness():
    starry, starless = plug(3)
    starry[starry > 0.5] = 0.57  # light of 0.17 in the mean: of the order of both scales
    mended = keras.ops.convert_to_numpy(nox.PullPush(5)([starry, starless]))
    spot, kept = np.s_[0, 56, 56], []
    for image in starless, mended:
        kept.append((image[spot].mean() - 0.2, image[spot].max() - image[spot].min()))
    (gray, colour), (gray_mended, colour_mended) = kept
    assert colour_mended / colour < 0.9 * gray_mended / gray


def test_pixels_of_which_no_light_was_taken_keep_their_bits():
    starry, starless = plug(3, 96, 160)  # of 4 x 4 pixels, an odd number when halved three times
    noise = np.random.default_rng(0).random(starry.shape, np.float32)
    starry, starless = starry * noise, starless * noise
    same = (starry == starless).all(axis=-1)
    mended = keras.ops.convert_to_numpy(nox.PullPush(5)([starry, starless]))
    np.testing.assert_array_equal(mended[same], starry[same])
    assert (mended[~same] != starless[~same]).any()


def test_grain_of_the_spot_of_a_star_stays():
    starry, starless = plug(3)
    grain = np.random.default_rng(0).normal(0, 0.02, (1, 128, 120, 1)).astype(np.float32)
    mended = keras.ops.convert_to_numpy(nox.PullPush(5)([starry, starless + grain]))
    flat = keras.ops.convert_to_numpy(nox.PullPush(5)([starry, starless]))
    spot = np.s_[:, 44:68, 44:68]
    assert 0.9 < (mended - flat)[spot].std() / grain[spot].std() < 1.1


def test_a_fill_behind_a_shut_gate_is_pulled_back_when_it_runs_away():
    model = nox.Nox(ARCHITECTURE, nox.Training())
    x, y = batch(1, 16, 16, 3), batch(1, 16, 16, 3, seed=1)
    gate = gate_layer(model.generator)
    l1, fill = (float(model.losses_of(x, y, *model(x))[name]) for name in ("l1", "fill"))
    assert float(model.compute_loss(x, y, model(x))) == pytest.approx(l1 + 5 * fill)
    kernel, bias = gate.get_weights()
    gate.set_weights([0 * kernel, bias - 4])  # 3.95 below 0, that is 2.95 below -1
    loss = float(model.compute_loss(x, y, model(x)))
    assert loss == pytest.approx(float(model.losses_of(x, y, x)["l1"]) + 5 * fill + 2.95**2, rel=1e-4)


def test_the_fill_learns_the_truth_behind_a_shut_gate_too():
    model = nox.Nox(ARCHITECTURE, nox.Training())
    gate = gate_layer(model.generator)
    shut = [np.zeros(gate.kernel.shape), np.full(3, -0.5)]
    x, y = batch(1, 16, 16, 3), batch(1, 16, 16, 3, seed=1)
    model.compile(optimizer=nox.Muon(learning_rate=0.01))
    errors = []
    for _ in range(12):
        gate.set_weights(shut)
        starless, fill = (np.array(ops.convert_to_numpy(image)) for image in model(x))
        np.testing.assert_array_equal(starless, x)
        errors.append(np.square(fill - y).mean())
        assert float(model.losses_of(x, y, starless, fill)["fill"]) == pytest.approx(errors[-1], rel=1e-4)
        model.train_on_batch(x, y)
    assert errors[-1] < 0.9 * errors[0]


def test_a_network_without_a_fill_has_no_term_for_it():
    model = nox.Nox(nox.Architecture(network="starnet", width=4, levels=2), nox.Training())
    x, y = batch(1, 16, 16, 3), batch(1, 16, 16, 3, seed=1)
    assert list(model.losses_of(x, y, *model(x))) == ["l1"]
    assert "fill" not in [metric.name for metric in model.metrics]


def test_qualities(tmp_path):
    truth, starless = batch(2, 24, 24, 3), batch(2, 24, 24, 3, seed=1)
    starry = truth.copy()
    starry[0, 4:9, 4:9, 1] += 0.2
    found = {name: float(value) for name, (value, _) in nox.qualities(starry, truth, starless).items()}
    error = np.square(starless - truth).mean(axis=3)
    stars = np.zeros((2, 24, 24), bool)
    stars[0, 4:9, 4:9] = True
    assert found["psnr"] == pytest.approx(np.mean([cv2.PSNR(a, b, 1) for a, b in zip(truth, starless)]), abs=1e-3)
    assert found["psnr_stars"] == pytest.approx(-10 * np.log10(error[stars].mean()), abs=1e-3)
    assert found["psnr_background"] == pytest.approx(-10 * np.log10(error[~stars].mean()), abs=1e-3)
    assert found["ssim"] == pytest.approx(np.mean([ssim(a, b) for a, b in zip(truth, starless)]), abs=1e-4)
    assert {name: float(weight) for name, (_, weight) in nox.qualities(truth, truth, starless).items()} == {
        "psnr": 1, "psnr_stars": 0, "psnr_background": 1, "ssim": 1,
    }  # fmt: skip


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) with Gaussian windows of sigma 1.5 that lie inside the images."""

    def blur(x):
        return cv2.GaussianBlur(x.astype(np.float64), (11, 11), 1.5)[5:-5, 5:-5]

    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    index = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
    return (index / ((mean_a**2 + mean_b**2 + 1e-4) * (variances + 9e-4))).mean()


def test_the_vgg_term_is_the_distance_of_features_as_keras_prepares_them(tmp_path):
    keras.utils.set_random_seed(0)
    vgg = keras.applications.VGG19(include_top=False, weights=None)
    vgg.save_weights(tmp_path / "vgg.weights.h5")
    settings = nox.Training(vgg_weight=0.5, vgg_weights=str(tmp_path / "vgg.weights.h5"))
    for channels in 1, 3:
        model = nox.Nox(nox.Architecture(width=4, levels=3, n_channels=channels), settings)
        a, b = batch(1, 32, 32, channels), batch(1, 32, 32, channels, seed=1)
        features = keras.Model(vgg.input, vgg.get_layer("block3_conv4").output)
        prepared = [keras.applications.vgg19.preprocess_input(np.repeat(x, 3 // channels, 3) * 255) for x in (a, b)]
        expected = np.abs(features(prepared[0]) - features(prepared[1])).mean()
        assert float(model.losses_of(a, b, a)["vgg"]) == pytest.approx(expected, rel=1e-4)
        without = float(model.losses_of(a, b, a)["l1"])
        assert float(model.compute_loss(a, b, [a])) == pytest.approx(without + 0.5 * expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["missing", "foreign"])
def test_vgg_weights_that_are_none_end_with_the_advice(kind, data, folder):
    if kind == "foreign":
        Path(kind).write_bytes(random.Random(0).randbytes(5000))
    before = names(folder)
    message = mistake("train", "--data", data, *TINY, "--vgg-weight", 1, "--vgg-weights", kind)
    assert kind in message and "--vgg-weights FILE, or --vgg-weight 0" in message
    assert names(folder) == before


def test_each_network_learns_from_its_own_terms_alone():
    tf = pytest.importorskip("tensorflow")
    model = nox.Nox(ARCHITECTURE, nox.Training())
    model.adversarial = True
    x, y = batch(2, 32, 32, 3), batch(2, 32, 32, 3, seed=1)
    ours, theirs = model.generator.trainable_variables, model.discriminator.trainable_variables
    with tf.GradientTape(persistent=True) as tape:
        images = model(x)
        terms = model.losses_of(x, y, *images)
        total = model.compute_loss(x, y, images)
        generators = terms["l1"] + 5 * terms["fill"] + 0.2 * terms["features"] + 0.005 * terms["adversarial"]

    def steps(loss, variables):
        return [0 * v if g is None else g for g, v in zip(tape.gradient(loss, variables), variables)]

    for term in "l1", "features", "adversarial":
        assert all(np.all(g == 0) for g in steps(terms[term], theirs))
        assert any(np.any(g != 0) for g in steps(terms[term], ours))
    assert all(np.all(g == 0) for g in steps(terms["discriminator"], ours))
    assert all(np.any(g != 0) for g in steps(terms["discriminator"], theirs)[::2])
    for loss, variables in (generators, ours), (terms["discriminator"], theirs):
        for part, whole in zip(steps(loss, variables), steps(total, variables)):
            np.testing.assert_allclose(part, whole, rtol=1e-4, atol=1e-7)


def test_smoothed_metrics_are_the_exponential_average_corrected_for_its_start(tmp_path):
    values, ema, steps = [4.0, 2.0, 3.0, 1.0], 0.9, 5
    history = nox.History(tmp_path / "a.csv", tmp_path / "b.csv", ema, steps, 0)
    history.set_model(fake_model())
    for epoch, value in enumerate(values):
        history.on_epoch_end(epoch, {"generator": value, "psnr": 10 * value})
    single = np.repeat(values, steps)  # step by step instead of epoch by epoch
    weights = ema ** np.arange(len(single))[::-1]
    table = pd.read_csv(tmp_path / "b.csv")
    assert table["ema_generator"].iloc[-1] == pytest.approx((weights * single).sum() / weights.sum(), rel=1e-9)
    assert table["ema_psnr"].iloc[0] == pytest.approx(40)


def test_smoothed_metrics_start_anew_with_the_adversary(tmp_path):
    history = nox.History(tmp_path / "a.csv", tmp_path / "b.csv", 0.9, 5, 0)
    history.set_model(model := fake_model())
    history.on_epoch_end(0, {"generator": 1.0})
    model.adversarial = True
    history.on_epoch_end(1, {"generator": 7.0, "discriminator": 0.5})
    assert pd.read_csv(tmp_path / "b.csv")["ema_generator"].tolist() == [1, 7]


def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_written(tmp_path):
    history = nox.History(tmp_path / "a.csv", tmp_path / "b.csv", 0.9, 5, 0)
    history.set_model(fake_model())
    with pytest.raises(nox.BadInput, match="the loss of epoch 1 is nan; the epoch before is kept"):
        history.on_epoch_end(0, {"generator": np.nan, "psnr": 30.0})
    assert names(tmp_path) == []


def fake_model():
    model = keras.Model()
    model.adversarial = False
    model.optimizer = keras.optimizers.Adam(1.0)
    return model


def test_the_learning_rate_falls_at_the_same_epochs_when_a_run_is_interrupted_at_each(tmp_path):
    losses = [5, 4, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 2, 4, 4, 4, 4, 4]

    def rates(folder, interrupted):
        model, seen = fake_model(), []
        (tmp_path / folder).mkdir()
        for epoch, loss in enumerate(losses):
            if interrupted or not epoch:
                history = nox.History(tmp_path / folder / "a.csv", tmp_path / folder / "b.csv", 0.0, 1, epoch)
                plateau = nox.Plateau(history, monitor="ema_generator", patience=2, cooldown=1)
                for callback in history, plateau:
                    callback.set_model(model)
                plateau.on_train_begin()
            logs = {"generator": float(loss)}
            history.on_epoch_end(epoch, logs)
            plateau.on_epoch_end(epoch, logs)
            seen.append(float(model.optimizer.learning_rate))
        return seen

    whole = rates("whole", False)
    assert len(set(whole)) > 3
    assert rates("interrupted", True) == whole


@pytest.mark.parametrize("shape", [(90, 20), (20, 90), (16, 16)])
def test_orthogonalizing_keeps_the_singular_vectors_and_evens_the_values(shape):
    left, _, right = np.linalg.svd(np.random.default_rng(1).normal(size=shape), full_matrices=False)
    matrix = (left * np.geomspace(1, 30, min(shape))) @ right
    turned = ops.convert_to_numpy(nox.orthogonalized(ops.convert_to_tensor(matrix.astype(np.float32))))
    values = left.T @ turned @ right.T
    assert np.abs(values - np.diag(np.diag(values))).max() < 0.01
    assert np.diag(values).min() > 0.6 and np.diag(values).max() < 1.3


def test_the_first_step_moves_kernels_by_muon_the_rest_by_adam_and_the_discriminator_by_a_quarter():
    kernel, head, bias, slow = (
        keras.Variable(np.zeros(s, np.float32)) for s in ((3, 3, 16, 32), (4, 4, 3, 32), (32,), (32,))
    )
    optimizer = nox.Muon(slow=[slow], learning_rate=0.01)
    rng = np.random.default_rng(0)
    gradients = [ops.convert_to_tensor(rng.normal(size=v.shape).astype(np.float32)) for v in (kernel, head, bias, slow)]
    optimizer.apply(gradients, [kernel, head, bias, slow])
    moved = [np.sqrt(np.mean(ops.convert_to_numpy(v) ** 2)) for v in (kernel, head, bias, slow)]
    np.testing.assert_allclose(moved[1:], [0.01, 0.01, 0.0025], rtol=1e-3)  # Adam's first step is the learning rate
    assert 0.7 * 0.2 * 0.01 < moved[0] < 1.2 * 0.2 * 0.01


# --------------------------------------------------------------------------------------------------------------------
# Pairs
# --------------------------------------------------------------------------------------------------------------------


def test_an_orphan_is_named(folder):
    make_pairs(folder / "pairs", 3)
    (folder / "pairs" / "y1.png").unlink()
    assert re.search(r"x1\.png: its partner pairs/y1\.png is missing", mistake("train", "--data", "pairs", *TINY))
    assert names(folder) == ["pairs"]


def test_pairs_in_the_folders_that_starnet_uses(folder):
    make_pairs(folder / "pairs", 3)
    for letter, place in ("x", "original"), ("y", "starless"):
        (folder / "pairs" / place).mkdir()
        for i in range(3):
            pixels = read(folder / "pairs" / f"{letter}{i}.png").astype(np.uint16) * 257
            write(folder / "pairs" / place / f"sky {i}.tif", pixels)
            (folder / "pairs" / f"{letter}{i}.png").unlink()
    found = nox.find_pairs("pairs")
    assert [(x.parent.name, x.name, y.parent.name, y.name) for x, y in found] == [
        ("original", f"sky {i}.tif", "starless", f"sky {i}.tif") for i in range(3)
    ]
    starry, starless = nox.Pairs(found, nox.Training(patch_size=32, batch_size=3), 3, False)[0]
    assert starless.min() >= 0 and 0.1 < starless.mean() < starry.mean() < starry.max() <= 1
    (folder / "pairs" / "original" / "sky 2.tif").unlink()
    assert mistake("train", "--data", "pairs", *TINY).endswith("sky 2.tif: its partner original/sky 2.tif is missing")


def test_float_pairs_are_named(folder):
    make_pairs(folder / "pairs", 2)
    for letter in "xy":
        (folder / "pairs" / f"{letter}1.png").unlink()
        write(folder / "pairs" / f"{letter}1.tif", noise(48, 48, 3).astype(np.float32))
    assert "pairs are of 8 or 16 bits, not float32" in mistake("train", "--data", "pairs", *TINY)


def test_a_lack_of_memory_is_told_with_the_advice(data, folder, monkeypatch):
    def fit(*arguments, **options):
        raise RuntimeError("Graph execution error: OOM when allocating tensor with shape[64,256,256,32]")

    monkeypatch.setattr(nox.Nox, "fit", fit)
    assert "out of memory; lower --batch-size" in mistake("train", "--data", data, *TINY)


@pytest.mark.parametrize("change", [(40, 48, 3, "uint8"), (48, 48, 1, "uint8"), (48, 48, 3, "uint16")])
def test_a_mismatched_pair_is_named(change, folder):
    make_pairs(folder / "pairs", 2)
    write(folder / "pairs" / "y1.png", noise(*change))
    message = mistake("train", "--data", "pairs", *TINY)
    assert "x1.png" in message and "not of the same size, channels and depth" in message
    assert names(folder) == ["pairs"]


def test_pairs_smaller_than_a_patch_are_named_with_the_flag_that_helps(folder):
    make_pairs(folder / "pairs", 2, size=30)
    assert re.search(r"x\d\.png: 30x30 .* --patch-size", mistake("train", "--data", "pairs", *TINY))
    assert names(folder) == ["pairs"]


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_a_folder_without_pairs_is_named(kind, folder):
    (folder / "empty").mkdir()
    assert re.search(f"{kind}: no .*GenerateStars.py", mistake("train", "--data", kind, *TINY))
    assert names(folder) == ["empty"]


def test_one_pair_needs_validation_off(folder):
    make_pairs(folder / "pairs", 1)
    assert "--no-validation" in mistake("train", "--data", "pairs", *TINY)


def test_a_patch_that_the_network_cannot_halve_is_told(data, folder):
    assert "multiple of 4" in mistake("train", "--data", data, *TINY, "--patch-size", 34)
    assert names(folder) == []


def some_pairs(count):
    return [(f"x{i}.png", f"y{i}.png") for i in range(count)]


@pytest.mark.parametrize("count, fewest, most", [(2, 1, 1), (3, 1, 2), (23, 1, 9), (1000, 150, 250)])
def test_about_a_fifth_is_held_back_the_same_for_the_same_seed(count, fewest, most):
    pairs, splits = some_pairs(count), set()
    for seed in range(6):
        training, held = nox.split_pairs(pairs, True, seed)
        assert fewest <= len(held) <= most
        assert sorted(training + held) == sorted(pairs)
        assert (training, held) == nox.split_pairs(pairs, True, seed)
        splits.add(tuple(held))
    assert len(splits) > 1


def test_pairs_that_are_added_leave_the_others_where_they_are():
    (training, held), (more, also) = (nox.split_pairs(some_pairs(count), True, 1) for count in (40, 60))
    assert set(training) < set(more) and set(held) < set(also)


def test_pairs_come_in_the_order_of_their_numbers(folder):
    for i in 0, 2, 10:
        for letter in "xy":
            (folder / f"{letter}{i}.png").touch()
    assert [x.name for x, _ in nox.find_pairs(folder)] == ["x0.png", "x2.png", "x10.png"]


def seen_in_an_epoch(folder, epoch, monkeypatch):
    """The names of the pairs that one epoch reads, in its order."""
    seen = []
    original = nox.read_pair
    monkeypatch.setattr(nox, "read_pair", lambda paths, n: seen.append(paths[0].name) or original(paths, n))
    batches = nox.Pairs(nox.find_pairs(folder), nox.Training(patch_size=32, crops=2, batch_size=4), 3, True)
    for step in range(batches.steps):
        batches[epoch * batches.steps + step]
    monkeypatch.undo()
    return seen


def test_every_pair_is_read_once_an_epoch_in_another_order_each_time(data, monkeypatch):
    first, second = (seen_in_an_epoch(data, epoch, monkeypatch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == [f"x{i}.png" for i in range(6)]
    assert first != second


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_the_same_for_the_same_seed_and_epoch(channels, data):
    batches = nox.Pairs(nox.find_pairs(data), nox.Training(patch_size=32, batch_size=3), channels, True)
    starry, starless = batches[1]
    assert starry.shape == starless.shape == (3, 32, 32, channels) and starry.dtype == np.float32
    assert min(starry.min(), starless.min()) >= 0 and max(starry.max(), starless.max()) <= 1
    np.testing.assert_array_equal(starry, batches[1][0])
    assert not np.array_equal(starry, batches[1 + batches.steps][0])
    later = batches[1 + 2 * batches.steps][0]
    batches.start = 2
    np.testing.assert_array_equal(later, batches[1][0])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_augmentation_leaves_both_pictures_the_same_but_for_the_stars(dtype):
    starless = (batch(8, 16, 16, 3) * 128).astype(dtype)
    starless[:, 8:10, 8:10] = np.iinfo(dtype).max  # burnt out without a star
    starry = starless.copy()
    starry[:, 4:6, 4:6] += 100
    for seed in range(10):
        new_starry, new_starless = nox.augmented(np.random.default_rng(seed), list(zip(starry, starless)))
        differ = (new_starry != new_starless).any(axis=(0, 3))
        assert differ[4:6, 4:6].all() and differ.sum() == 4


def test_crops_lie_in_all_eight_ways():
    square = noise(5, 5, 3)
    ways = {nox.laid(square, way).tobytes() for way in range(8)}
    turned = [np.rot90(side, turns) for side in (square, square[:, ::-1]) for turns in range(4)]
    assert ways == {np.ascontiguousarray(image).tobytes() for image in turned}


def test_pairs_are_decoded_once_as_far_as_they_fit_the_cache(data, monkeypatch):
    pairs, decoded = nox.find_pairs(data), []
    original = nox.read_pair
    monkeypatch.setattr(nox, "read_pair", lambda paths, n: decoded.append(paths) or original(paths, n))
    size, seen = 2 * 48 * 48 * 3, []
    for room, expected in (0, 12), (3 * size, 9), (6 * size, 6):
        batches = nox.Pairs(pairs, nox.Training(patch_size=32, batch_size=4, cache=room / 2**30), 3, True)
        seen.append([batches[i] for i in range(2 * batches.steps)])
        assert len(decoded) == expected and set(decoded) == set(pairs)
        np.testing.assert_array_equal(seen[-1], seen[0])
        decoded.clear()


def test_a_pair_that_two_threads_read_at_once_takes_its_room_in_the_cache_once(data, monkeypatch):
    (paths, *_), batches = nox.find_pairs(data), nox.Pairs(nox.find_pairs(data), nox.Training(cache=1), 3, True)
    original, inner = nox.read_pair, []

    def read_pair(*arguments):
        if not inner:
            inner.append(None)
            batches.read(paths)  # what another thread does meanwhile
        return original(*arguments)

    monkeypatch.setattr(nox, "read_pair", read_pair)
    batches.read(paths)
    assert batches.room == 2**30 - 2 * 48 * 48 * 3


def test_of_tiff_pairs_that_keep_white_as_zero_white_is_white(folder):
    pixels = noise(32, 32, 1, "uint16")
    for letter in "xy":
        nox.write_tiff(nox.Picture(65535 - pixels, black=65535.0, white=0.0), f"{letter}0.tif")
    for image in nox.read_pair(nox.find_pairs(".")[0], 1):
        np.testing.assert_array_equal(image, pixels)


def test_files_that_no_pair_can_be_made_of_are_named_or_left_out(folder):
    make_pairs(folder / "pairs", 2)
    (folder / "pairs" / "._x0.png").write_bytes(b"of macOS")
    (folder / "pairs" / "x\u00b2.png").write_bytes((folder / "pairs" / "x0.png").read_bytes())
    (folder / "pairs" / "y\u00b2.png").write_bytes((folder / "pairs" / "y0.png").read_bytes())
    assert [x.name for x, _ in nox.find_pairs("pairs")] == ["x0.png", "x1.png", "x\u00b2.png"]
    (folder / "pairs" / "x0.tif").write_bytes(b"another")
    assert "x0.png and x0.tif: which of them" in mistake("train", "--data", "pairs", *TINY)
    for place in "original", "starless":
        (folder / "net" / place).mkdir(parents=True)
        (folder / "net" / place / "a.png").touch()
    (folder / "net" / "original" / "._a.png").touch()
    assert len(nox.find_pairs("net")) == 1


@pytest.mark.parametrize("size", [16, 32, 50])
def test_resizing_keeps_the_light(size):
    x = np.zeros((32, 32, 1), np.float32)
    x[8:24, 8:24] = 1
    y = nox.resized(x, size, size)
    assert y.shape == (size, size, 1)
    assert y.mean() == pytest.approx(0.25, rel=0.03)


def test_crops_come_in_several_scales(tmp_path):
    """Stripes two pixels wide, seen at scales from two thirds to two."""
    for letter in "xy":
        write(tmp_path / f"{letter}0.png", np.tile(np.array([0, 0, 255, 255], np.uint8)[:, None], (24, 96))[..., None])
    settings = nox.Training(patch_size=32, crops=1, batch_size=1)
    batches = nox.Pairs(nox.find_pairs(tmp_path), settings, 1, True)
    crops = [batches[i][0][0, ..., 0] for i in range(60)]
    periods = set()
    for crop in crops:
        lines = crop.mean(axis=0) if np.ptp(crop.mean(axis=0)) > np.ptp(crop.mean(axis=1)) else crop.mean(axis=1)
        periods.add(round(32 / max(1, np.abs(np.fft.rfft(lines - lines.mean())).argmax())))
    assert 4 in periods and min(periods) < 4 < max(periods)


# --------------------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------------------


def test_a_weights_file_is_half_the_size_and_loads_to_the_same_output(tmp_path):
    architecture = nox.Architecture(width=24, levels=3)
    generator = nox.build_generator(architecture)
    nox.save_weights(generator, architecture, tmp_path / "ours.h5", "a run")
    generator.save_weights(tmp_path / "full.weights.h5")
    assert (tmp_path / "ours.h5").stat().st_size < 0.55 * (tmp_path / "full.weights.h5").stat().st_size
    loaded, found = nox.load_generator(tmp_path / "ours.h5")
    assert found == architecture
    assert nox.inspect_weights(tmp_path / "ours.h5") == (architecture, "a run")
    x = batch(1, 32, 32, 3)
    np.testing.assert_allclose(loaded(x), generator(x), atol=1e-3)


@pytest.mark.parametrize("network, levels, channels", [("nox", 2, 1), ("nox", 4, 3), ("starnet", 3, 3)])
def test_settings_travel_in_the_weights_file(network, levels, channels, tmp_path):
    architecture = nox.Architecture(network, 4, levels, channels)
    generator = randomized(nox.build_generator(architecture))
    nox.save_weights(generator, architecture, tmp_path / "a.h5")
    loaded, found = nox.load_generator(tmp_path / "a.h5")
    assert found == architecture
    for ours, theirs in zip(loaded.get_weights(), generator.get_weights()):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def save_legacy(model, path, layout):
    """Save as the original did: the whole model, or its weights only."""
    with warnings.catch_warnings(action="ignore"):
        if layout == "model":
            model.compile("adam", "mse")
            model.save(path)
        else:
            legacy = importlib.import_module("keras.src.legacy.saving.legacy_h5_format")
            with h5py.File(path, "w") as file:
                legacy.save_weights_to_hdf5_group(file, model)


@pytest.mark.parametrize("layout", ["model", "weights"])
@pytest.mark.parametrize("channels", [1, 3])
def test_weights_in_the_originals_format_give_the_same_output(layout, channels, tmp_path, recwarn):
    generator = randomized(nox.build_starnet(4, 8, channels))
    save_legacy(generator, tmp_path / "old.h5", layout)
    loaded, found = nox.load_generator(tmp_path / "old.h5")
    assert found == nox.Architecture("starnet", 4, 8, channels)
    x = batch(1, 256, 256, channels)
    np.testing.assert_allclose(loaded(x), generator(x), atol=1e-6)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_the_originals_network_has_54_million_parameters():
    widths = np.array([1.0, 2.0, 4.0])
    counts = [nox.build_starnet(int(width), 8, 3).count_params() for width in widths]
    quadratic = np.linalg.solve(np.vander(widths), counts)  # biases grow with the width, kernels with its square
    assert np.polyval(quadratic, 64) == pytest.approx(54.4e6, abs=0.05e6)
    assert np.polyval(quadratic, 8) == pytest.approx(nox.build_starnet(8, 8, 3).count_params())


def started_from(path, network, levels):
    architecture = nox.Architecture(network, 4, levels, 1)
    generator = nox.build_generator(architecture)
    nox.start_from(generator, architecture, path)
    return generator


@pytest.mark.parametrize("network, levels", [("nox", 3), ("starnet", 3)])
def test_colour_weights_start_a_grayscale_network_that_gives_their_mean(network, levels, tmp_path):
    architecture = nox.Architecture(network, 4, levels, 3)
    color = randomized(nox.build_generator(architecture), 0.05 if network == "starnet" else 0.02)
    if network == "nox":  # a product of means is the mean of products when one factor is the same in all channels;
        # and small weights keep the fill within 0..1, where it is not clipped
        gate = gate_layer(color)
        gate.set_weights([np.repeat(w.mean(min(w.ndim - 1, 2), keepdims=True), 3, -1 if w.ndim == 1 else 2)
                          for w in gate.get_weights()])  # fmt: skip
    else:  # nor is the mean taken through the ReLU, which must have nothing to clip
        last = [x for x in color.layers if isinstance(x, keras.layers.Conv2DTranspose)][-1]
        last.set_weights([last.get_weights()[0], np.array([3.0, 4.0, 5.0])])
    nox.save_weights(color, architecture, tmp_path / "color.h5")
    color, _ = nox.load_generator(tmp_path / "color.h5")
    gray, x = started_from(tmp_path / "color.h5", network, levels), batch(1, 32, 32, 1)
    found = color(np.repeat(x, 3, axis=3))
    assert np.ptp(found, axis=3).max() > 1e-2
    np.testing.assert_allclose(gray(x)[..., 0], np.mean(found, axis=3), atol=1e-5)


def test_training_starts_from_weights(weights, data, folder):
    run("train", "--data", data, *TINY, "--epochs", 1, "--lr", 1e-9, "--weights", weights["random", 3])
    assert_close_weights("generator_color.h5", weights["random", 3])


def assert_close_weights(*files):
    ours, theirs = (nox.load_generator(file)[0].get_weights() for file in files)
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("flags, message", [(("--width", 5), "--width 4"), (("--levels", 1), "--levels 2")])
@pytest.mark.parametrize("channels", [1, 3])
def test_weights_of_another_network_are_told_with_the_flags_that_fit(flags, message, channels, weights, data, folder):
    asked = [*TINY, *flags, "--n-channels", channels]
    told = mistake("train", "--data", data, *asked, "--weights", weights["random", 3])
    assert message in told and f"--n-channels {channels}" in told


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_of_more_levels_goes_on_from_one_of_fewer(channels, data, folder):
    shallow = nox.Architecture(width=4, levels=3)
    nox.save_weights(randomized(nox.build_generator(shallow), 0.02), shallow, "shallow.h5")
    deeper = ["--levels", 5, "--n-channels", channels]
    run("train", "--data", data, *TINY, *deeper, "--epochs", 1, "--lr", 1e-9, "--weights", "shallow.h5")
    began = nox.build_generator(dataclasses.replace(shallow, n_channels=channels))
    nox.start_from(began, dataclasses.replace(shallow, n_channels=channels), "shallow.h5")
    became, found = nox.load_generator(nox.Architecture(n_channels=channels).weights_name)
    assert found.levels == 5
    x = batch(1, 32, 32, channels)
    gates = [keras.Model(net.input, gate_layer(net).output)(x) for net in (became, began)]
    np.testing.assert_allclose(*gates, atol=2e-3)  # what comes after it knows the number of levels
    assert np.std(gates[1]) > 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_of_twice_the_width_goes_on_from_the_narrower_one(channels, tmp_path):
    narrow, wide = (nox.Architecture(width=width, levels=3, n_channels=channels) for width in (4, 8))
    nox.save_weights(randomized(nox.build_generator(narrow), 0.1), narrow, tmp_path / "narrow.h5")
    began, became = (nox.build_generator(architecture) for architecture in (narrow, wide))
    for generator, architecture in (began, narrow), (became, wide):
        nox.start_from(generator, architecture, tmp_path / "narrow.h5")
    x = batch(1, 32, 32, channels)
    np.testing.assert_allclose(became(x), began(x), atol=1e-5)
    assert np.std(np.array(began(x)) - x) > 0.01  # which is not to leave everything as it was
    halves = np.split(became.get_layer("up0_found").kernel, 2, axis=2)
    assert np.abs(halves[0] - halves[1]).max() > 0.01  # alike, they would stay so in training


def test_a_network_of_fewer_levels_cannot_go_on_from_one_of_more(data, folder):
    deep = nox.Architecture(width=4, levels=4)
    nox.save_weights(nox.build_generator(deep), deep, "deep.h5")
    message = mistake("train", "--data", data, *TINY, "--levels", 3, "--weights", "deep.h5")
    assert "--levels 4" in message


def test_grayscale_weights_cannot_start_the_colour_network(weights, data, folder):
    message = mistake("train", "--data", data, *TINY, "--weights", weights["random", 1])
    assert "cannot start the colour network" in message
    assert names(folder) == []


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------

RUN = [*TINY, "--crops", "8", "--epochs", "8", "--adversarial-from", "5", "--save-freq", "3", "--patience", "2"]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """(folder, numbers of epochs after which pictures were written) of a run that nothing interrupts."""
    folder, shown = tmp_path_factory.mktemp("whole"), []
    original = nox.show_pair

    def show_pair(*arguments):
        shown.append(len(pd.read_csv("history.csv")))
        return original(*arguments)

    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nox, "show_pair", show_pair)
        run("train", "--data", data, *RUN)
    return folder, shown


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory):
    """(folder, last words) of the same run, interrupted within its seventh epoch and issued again."""
    folder = tmp_path_factory.mktemp("resumed")

    def on_train_batch_begin(history, step, logs=None):
        if len(history.rows()) == 6 and step == 2:
            raise KeyboardInterrupt

    with contextlib.chdir(folder):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
            patch.setattr(nox.History, "on_train_batch_begin", on_train_batch_begin)
            run("train", "--data", data, *RUN)
        run("train", "--data", data, *RUN)
    return folder, caught.value.code


def test_training_leaves_history_plot_pictures_and_weights(whole):
    folder, _ = whole
    pictures = ["gt.png", "input.png", "output.png", "training.png"]
    assert names(folder) == sorted(["checkpoint", "generator_color.h5", "history.csv", *pictures])
    for name in pictures:
        assert read(folder / name).shape[0] == (48 if name != "training.png" else 900)
    assert nox.load_generator(folder / "generator_color.h5")[1] == ARCHITECTURE


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_network_of_the_original_trains(precision, data, folder):
    flags = "--network", "starnet", "--epochs", 2, "--adversarial-from", 1, "--precision", precision
    run("train", "--data", data, *TINY, *flags)
    assert np.isfinite(pd.read_csv("history.csv")["ema_val_generator"]).all()
    assert nox.load_generator("generator_color.h5")[1] == nox.Architecture("starnet", 4, 2)


def test_history_has_each_epoch_once_with_every_term(whole):
    table = pd.read_csv(whole[0] / "history.csv")
    assert table["epoch"].tolist() == list(range(8))
    for name in "generator", "l1", "fill", "psnr", "ema_generator", "ema_psnr":
        assert np.isfinite(table[name]).all() and np.isfinite(table[name.replace("ema_", "ema_val_")]).all()
    for name in "discriminator", "features", "adversarial", "val_discriminator":
        assert table[name].notna().tolist() == [False] * 5 + [True] * 3


def test_the_reported_loss_is_the_weighted_sum_of_its_terms(whole):
    table = pd.read_csv(whole[0] / "history.csv").fillna(0)
    expected = table["l1"] + 5 * table["fill"] + 0.2 * table["features"] + 0.005 * table["adversarial"]
    np.testing.assert_allclose(table["generator"], expected, rtol=1e-4)


def test_the_loss_falls(whole):
    table = pd.read_csv(whole[0] / "history.csv")
    assert table["val_l1"][4] < 0.8 * table["val_l1"][0]
    assert table["val_psnr"][4] > table["val_psnr"][0]


def test_pictures_come_every_save_freq_epochs_and_at_the_end(whole):
    assert whole[1] == [3, 6, 8]


def test_saved_weights_are_the_average_not_the_last_step(whole, data):
    folder, _ = whole
    saved = nox.load_generator(folder / "generator_color.h5")[0]
    model, settings = nox.Nox(ARCHITECTURE, nox.Training()), nox.Training()
    optimizer = nox.Muon(learning_rate=settings.lr, beta_2=0.99, use_ema=True, ema_momentum=settings.weight_ema)
    model.compile(optimizer=optimizer)
    optimizer.build(model.trainable_variables)
    nox.Checkpoint(folder / "checkpoint" / "generator_color").restore(model)
    average = nox.build_generator(ARCHITECTURE)
    nox.take_average(average, model)
    weights = zip(saved.get_weights(), average.get_weights(), model.generator.get_weights())
    apart = [(np.abs(a - b).max(), np.abs(a - c).max()) for a, b, c in weights]
    assert max(to_average for to_average, _ in apart) < 1e-3 < 1e-2 < max(to_last for _, to_last in apart)


def state(folder):
    """Every array of a run's last state by name: both networks and the optimizer."""
    arrays = {}
    (file,) = (folder / "checkpoint" / "generator_color").glob("epoch*.weights.h5")
    with h5py.File(file) as source:
        source.visititems(lambda name, item: arrays.update({name: item[()]} if isinstance(item, h5py.Dataset) else {}))
    return file.name, arrays


def assert_same_run(*folders):
    """That two runs came to the same history and the same last state."""
    ours, theirs = (pd.read_csv(folder / "history.csv") for folder in folders)
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4)
    (name, arrays), (other_name, others) = map(state, folders)
    assert name == other_name == "epoch8.weights.h5"
    assert arrays.keys() == others.keys() and len(arrays) > 50
    for key, array in arrays.items():
        np.testing.assert_allclose(others[key], array, atol=1e-4, err_msg=key)


def test_a_run_interrupted_and_resumed_equals_one_that_was_not(whole, resumed):
    assert_same_run(whole[0], resumed[0])


def test_another_learning_rate_takes_effect_when_a_run_goes_on(whole, data, tmp_path):
    shutil.copytree(whole[0], tmp_path / "copy")
    with contextlib.chdir(tmp_path / "copy"):
        run("train", "--data", data, *RUN, "--epochs", 9)
        run("train", "--data", data, *RUN, "--epochs", 10, "--lr", 1e-5)
        run("train", "--data", data, *RUN, "--epochs", 11, "--lr", 1e-5)
        rates = pd.read_csv("history.csv")["learning_rate"].tolist()
    assert rates[8] in (rates[7], rates[7] / 2)
    assert rates[9] == pytest.approx(1e-5)
    assert rates[10] in (rates[9], rates[9] / 2)  # a plateau may have come


def test_an_interruption_ends_with_one_line_that_says_how_to_go_on(resumed):
    assert resumed[1].strip() == "nox.py: interrupted; the same command goes on from the last epoch"


def test_a_finished_run_issued_again_changes_nothing(whole, data):
    def contents():
        return {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file() and path != weights}

    weights = whole[0] / "generator_color.h5"  # written again: HDF5 puts the time into its files
    before, arrays = contents(), nox.load_generator(weights)[0].get_weights()
    with contextlib.chdir(whole[0]):
        run("train", "--data", data, *RUN)
    assert contents() == before
    for array, now in zip(arrays, nox.load_generator(weights)[0].get_weights()):
        np.testing.assert_array_equal(array, now)


@pytest.mark.parametrize("flags", [("--width", 5), ("--levels", 3), ("--network", "starnet")])
def test_a_changed_architecture_is_told_and_nothing_changes(flags, whole, data):
    before = {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()}
    with contextlib.chdir(whole[0]):
        assert "--network nox --width 4 --levels 2" in mistake("train", "--data", data, *RUN, *flags)
    assert {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("record", ["no record", "{}", '{"architecture": {"depth": 3}}'])
def test_a_record_of_a_run_that_cannot_be_read_is_told(record, data, folder):
    checkpoint = folder / "checkpoint" / "generator_color"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.json").write_text(record)
    assert "run.json: cannot be read" in mistake("train", "--data", data, *TINY)
    assert names(folder) == ["checkpoint"]
    assert (checkpoint / "run.json").read_text() == record


def test_other_weights_to_start_from_are_refused_once_a_run_has_begun(whole, weights, data):
    before = {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()}
    with contextlib.chdir(whole[0]):
        assert "begun from random weights" in mistake("train", "--data", data, *RUN, "--weights", weights["random", 3])
    assert {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()} == before


def test_a_run_interrupted_in_its_first_epoch_still_starts_from_its_weights(weights, data, folder, monkeypatch):
    shutil.copy(weights["random", 3], "generator_color.h5")
    line = ["train", "--data", data, *TINY, "--epochs", 1, "--lr", 1e-9, "--weights", "generator_color.h5"]

    def on_train_batch_begin(history, step, logs=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nox.History, "on_train_batch_begin", on_train_batch_begin)
        assert "goes on" in mistake(*line)
    run(*line)
    assert_close_weights("generator_color.h5", weights["random", 3])


def test_pairs_that_changed_are_told_in_a_line_and_the_run_goes_on(whole, data, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path / "copy")
    make_pairs(tmp_path / "more", 8)
    told = []
    with contextlib.chdir(tmp_path / "copy"):
        for source, last in (data, 9), (tmp_path / "more", 10), (tmp_path / "more", 11):
            capsys.readouterr()
            run("train", "--data", source, *RUN, "--epochs", last)
            told.append("pairs have changed" in capsys.readouterr().out)
    assert told == [False, True, False]


def test_with_other_weights_of_the_loss_its_average_starts_anew(whole, data, tmp_path):
    shutil.copytree(whole[0], tmp_path / "copy")
    with contextlib.chdir(tmp_path / "copy"):
        for last in 9, 10:
            run("train", "--data", data, *RUN, "--epochs", last, "--star-weight", 20)
        table = pd.read_csv("history.csv")
    for name in "generator", "val_generator":
        anew = np.isclose(table[f"ema_{name}"], table[name], rtol=1e-6)
        assert anew[[0, 5, 8]].all() and not anew[[1, 6, 9]].any()  # 5: the adversary


def test_a_run_that_has_trained_on_all_pairs_has_none_left_to_judge_by(data, folder):
    run("train", "--data", data, *TINY, "--epochs", 1)
    run("train", "--data", data, *TINY, "--epochs", 2, "--no-validation")
    assert "has trained on all pairs; go on with --no-validation" in mistake("train", "--data", data, *TINY)
    run("train", "--data", data, *TINY, "--epochs", 3, "--no-validation")


def test_a_finished_run_whose_weights_are_gone_writes_them_again(whole, weights, data, tmp_path):
    shutil.copytree(whole[0], tmp_path / "copy")
    with contextlib.chdir(tmp_path / "copy"):
        shutil.copy(weights["random", 3], "generator_color.h5")
        run("train", "--data", data, *RUN)
        assert Path("generator_color.1.h5").read_bytes() == weights["random", 3].read_bytes()
        assert_close_weights("generator_color.h5", whole[0] / "generator_color.h5")


def test_weights_to_start_from_stay_where_they_are_until_a_state_is_written(weights, data, folder, monkeypatch):
    shutil.copy(weights["random", 3], "generator_color.h5")
    with monkeypatch.context() as patch:
        patch.setattr(nox.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
        assert "no room on the disk" in mistake("train", "--data", data, *TINY, "--weights", "generator_color.h5")
    run("train", "--data", data, *TINY, "--epochs", 1, "--weights", "generator_color.h5")
    assert Path("generator_color.1.h5").read_bytes() == weights["random", 3].read_bytes()


@pytest.mark.parametrize("change", ["cut", "settings"])
def test_a_state_that_does_not_load_is_named(change, whole, data, folder):
    nox.shutil.copytree(whole[0] / "checkpoint", "checkpoint")
    file = Path("checkpoint/generator_color/epoch8.weights.h5")
    if change == "cut":
        file.write_bytes(file.read_bytes()[:20000])
    flags = ("--weight-ema", 0) if change == "settings" else ()
    assert str(file) in mistake("train", "--data", data, *RUN, "--epochs", 9, *flags)
    assert file.exists()


@pytest.fixture(scope="module")
def gray(data, tmp_path_factory):
    """(folder, what was printed) of a grayscale run of one epoch, batch size 1, no validation, in a used folder."""
    folder, printed = tmp_path_factory.mktemp("gray"), io.StringIO()
    flags = ["--n-channels", 1, "--batch-size", 1, "--no-validation", "--epochs", 1, "--crops", 1, "--weight-ema", 0]
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        Path("generator_grayscale.h5").write_bytes(b"shipped")
        Path("generator_grayscale.1.h5").write_bytes(b"earlier")
        Path("history.csv").write_text("precious")
        run("train", "--data", data, *TINY, *flags)
    return folder, printed.getvalue()


def test_a_grayscale_run_without_validation_at_batch_size_1(gray):
    table = pd.read_csv(gray[0] / "history.csv")
    assert len(table) == 1 and not [name for name in table if "val" in name]
    assert read(gray[0] / "output.png").shape == (48, 48, 1)
    assert nox.inspect_weights(gray[0] / "generator_grayscale.h5")[0].n_channels == 1


def test_files_that_the_run_did_not_write_are_kept_aside(gray):
    folder, printed = gray
    assert (folder / "generator_grayscale.1.h5").read_bytes() == b"earlier"
    assert (folder / "generator_grayscale.2.h5").read_bytes() == b"shipped"
    assert (folder / "history.1.csv").read_text() == "precious"
    assert "generator_grayscale.h5 was not written by this run and is kept as generator_grayscale.2.h5\n" in printed


def test_a_damaged_history_is_named_and_can_be_moved_away(data, folder):
    run("train", "--data", data, *TINY, "--epochs", 1)
    history = Path("checkpoint/generator_color/history.csv")
    history.write_text("epoch,generator\nsoon,1\n")
    assert f"{history}: cannot be read; move it away" in mistake("train", "--data", data, *TINY, "--epochs", 2)
    history.unlink()
    run("train", "--data", data, *TINY, "--epochs", 2)
    assert list(pd.read_csv("history.csv")["epoch"]) == [1]


def test_a_disk_without_room_for_the_next_state_ends_the_run_and_keeps_the_last(data, folder, monkeypatch):
    run("train", "--data", data, *TINY, "--epochs", 1)
    full = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr(nox.shutil, "disk_usage", lambda path: full)
    assert "no room on the disk" in mistake("train", "--data", data, *TINY, "--epochs", 2)
    assert names("checkpoint/generator_color") == ["epoch1.weights.h5", "history.csv", "run.json"]


def test_a_run_goes_on_with_its_own_seed_and_weights_however_these_are_spelled(data, weights, folder):
    start = Path(nox.shutil.copy(weights["random", 3], "start.h5"))
    flags = "train", "--data", data, *TINY, "--epochs"
    run(*flags, 1, "--seed", 1, "--weights", start)
    assert "--seed 1; go on with it" in mistake(*flags, 2, "--seed", 2)
    run(*flags, 2, "--seed", 1, "--weights", start.resolve())
    assert len(pd.read_csv("history.csv")) == 2


def test_weights_put_into_the_folder_of_a_run_are_kept_aside_its_own_are_not(folder, weights, capsys):
    checkpoint = Path("checkpoint")
    record = nox.open_run(checkpoint, ARCHITECTURE)
    nox.save_weights(nox.build_generator(ARCHITECTURE), ARCHITECTURE, "generator_color.h5", record["id"])
    assert nox.open_run(checkpoint, ARCHITECTURE) == record
    nox.clear_the_way(checkpoint, ARCHITECTURE, record)
    assert names() == ["checkpoint", "generator_color.h5"]
    nox.shutil.copy(weights["random", 3], "generator_color.h5")
    nox.clear_the_way(checkpoint, ARCHITECTURE, record)
    assert Path("generator_color.1.h5").read_bytes() == weights["random", 3].read_bytes()
    assert names() == ["checkpoint", "generator_color.1.h5"]
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_pair_that_breaks_during_training_is_named_and_the_last_epoch_kept(data, folder, monkeypatch):
    # a name that the backends have for a lack of memory
    nox.shutil.copytree(data, "OOM")

    def on_epoch_begin(history, epoch, logs=None):
        if epoch == 1:
            for path in Path("OOM").glob("y*.png"):
                path.write_bytes(path.read_bytes()[:100])

    monkeypatch.setattr(nox.History, "on_epoch_begin", on_epoch_begin)
    message = mistake("train", "--data", "OOM", *TINY, "--epochs", 3, "--batch-size", 1, "--crops", 12, "--cache", 0)
    assert re.fullmatch(r"nox.py: OOM/y\d.png: not a picture that can be read", message)
    assert pd.read_csv("history.csv")["epoch"].tolist() == [0]


# --------------------------------------------------------------------------------------------------------------------
# The real command line: interruptions, backends, what reaches the terminal
# --------------------------------------------------------------------------------------------------------------------


STOPPED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from conftest import run
name, number, *line = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background processes ignore it
def stop(event, names):
    if event in ("os.rename", "os.remove") and name in map(str, names):
        if event == "os.rename":
            os.truncate(names[0], os.path.getsize(names[0]) // 2)
        os.kill(os.getpid(), int(number))
sys.addaudithook(stop)
run(*line)
"""


@pytest.fixture(scope="module")
def survivor(data, tmp_path_factory):
    """(folder, what each attempt ended with) of a run stopped at each step of saving: a file half written, the next to go.

    Each attempt goes on where the last one was killed; the very last is interrupted, and the run then ends in peace.
    """
    folder, ends = tmp_path_factory.mktemp("survivor"), []
    states = [f"checkpoint/generator_color/epoch{done}.weights.h5" for done in range(3)]
    record = "checkpoint/generator_color/run.json"  # written before the first state and after each
    names = [record, states[0], record, "history.csv", states[1], states[0], record, "generator_color.h5"]
    script = STOPPED.format(tests=str(ROOT / "tests"))
    for name, how in *((name, signal.SIGKILL) for name in names), ("history.csv", signal.SIGINT):
        line = [sys.executable, "-uc", script, name, str(int(how)), "train", "--data", str(data), *RUN]
        ends.append(subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=200))
    with contextlib.chdir(folder):
        run("train", "--data", data, *RUN)
    return folder, ends


def test_ctrl_c_ends_with_one_line(survivor):
    *_, end = survivor[1]
    assert end.stderr.strip() == "nox.py: interrupted; the same command goes on from the last epoch"
    assert end.returncode == 1


def test_a_run_killed_at_each_step_of_saving_equals_one_that_was_not(survivor, whole):
    folder, ends = survivor
    assert [end.returncode for end in ends[:-1]] == [-signal.SIGKILL] * 8
    done = [re.search(r"(\d) of 8 epochs done", end.stdout) for end in ends]
    assert [match and int(match[1]) for match in done] == [None, None, None, 0, 0, 0, 1, 2, 2]
    assert_same_run(folder, whole[0])
    assert [name for name in names(folder) if not name.startswith(".")] == names(whole[0])


def test_infer_shows_its_bar_and_nothing_else(folder, weights):
    write("a.png", noise(40, 50, 3))
    result = shell("infer", "a.png", "--weights", weights["random", 3])
    assert (result.returncode, result.stdout) == (0, "")
    assert "100%" in result.stderr
    assert all(line.startswith("a.png: ") for line in re.split(r"[\r\n]+", result.stderr) if line)
    assert names() == ["a.png", "starless.png", "starry.png"]


def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(infer, folder, monkeypatch):
    write("a.png", noise(40, 50, 3))
    monkeypatch.setattr(nox, "both_looks", None)
    monkeypatch.setattr(nox.os, "access", lambda path, mode: False)
    assert "nox.py: .: this folder cannot be written to" in mistake("infer", "a.png")


def test_a_path_that_cannot_be_looked_at_does_not_stop_the_others(infer, folder, capsys):
    write("a.png", noise(40, 50, 3))
    with pytest.raises(SystemExit, match="1 of 2 pictures failed"):
        infer("n" * 300 + ".png", "a.png", "-o", "out")
    assert len(capsys.readouterr().err.splitlines()[0]) > 300
    assert names("out") == ["a_starless.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="closes streams by the shell")
@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-"])
def test_infer_works_with_its_output_closed(closed, folder, weights):
    write("a.png", noise(40, 50, 3))
    line = [sys.executable, ROOT / "nox.py", "infer", "a.png", "--weights", weights["random", 3]]
    assert subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *line], timeout=120).returncode == 0
    assert names() == ["a.png", "starless.png", "starry.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_an_interruption_while_keras_loads_shows_nothing_of_it(folder):
    (folder / "keras.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(60)"
    )
    write("a.png", noise(40, 50, 3))
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background ignores it
    line = [sys.executable, str(ROOT / "nox.py"), "infer", "a.png"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    result = subprocess.run(line, capture_output=True, timeout=120, env=environment, preexec_fn=heeding)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, b"")


def test_a_backend_that_keras_does_not_know_is_named(folder):
    result = shell("train", KERAS_BACKEND="pytorch")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert "KERAS_BACKEND=pytorch" in result.stderr


def test_weights_missing_beside_the_script_are_named(folder):
    (folder / "alone").mkdir()
    nox.shutil.copy(ROOT / "nox.py", "alone")
    write("a.png", noise(40, 50, 1))
    line = [sys.executable, "alone/nox.py", "infer", "a.png"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert re.fullmatch(r"nox.py: .*alone/generator_grayscale.h5: no such weights file\n", result.stderr)
    assert names() == ["a.png", "alone"]


DEVICES = """
import sys
sys.path.insert(0, {root!r})
if {backend!r} == "tensorflow":
    import tensorflow as tf
    parts = [tf.config.LogicalDeviceConfiguration()] * {count}
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], parts)
import nox
nox.main(nox.parse_arguments(sys.argv[1:]))
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_two_devices_learn_what_one_does(backend, data, tmp_path):
    """Though the one validation crop does not divide among them."""
    pytest.importorskip(backend)
    nox.save_weights(nox.build_generator(ARCHITECTURE), ARCHITECTURE, tmp_path / "start.h5")
    line = ["train", "--data", data, *TINY, "--epochs", 2, "--adversarial-from", 0, "--clip", 0]  # each clips its part
    line += ["--weights", tmp_path / "start.h5"]
    tables = []
    for count in 1, 2:
        folder = tmp_path / str(count)
        folder.mkdir()
        command = [sys.executable, "-c", DEVICES.format(root=str(ROOT), backend=backend, count=count), *map(str, line)]
        environment = {"KERAS_BACKEND": backend}
        if backend == "jax":
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
        options = {"env": os.environ | environment, "capture_output": True, "text": True, "timeout": 400}
        result = subprocess.run(command, cwd=folder, **options)
        assert result.returncode == 0, result.stderr[-2000:]
        tables.append(pd.read_csv(folder / "history.csv"))
    one, two = tables
    for name in "l1", "psnr", "val_l1", "val_psnr", "discriminator":
        np.testing.assert_allclose(two[name], one[name], rtol=1e-3)


def machines(lines, timeout=400):
    """Run a command on each of several machines, here processes; returns their (exit status, stderr)."""
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in lines]
        for some in free:
            some.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{some.getsockname()[1]}" for some in free]
    runs = []
    for index, line in enumerate(lines):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = os.environ | {"KERAS_BACKEND": "tensorflow", "TF_CONFIG": json.dumps(task)}
        command = [sys.executable, str(ROOT / "nox.py"), *map(str, line)]
        runs.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    try:
        return [(run.returncode, text.decode()) for run in runs for _, text in [run.communicate(timeout=timeout)]]
    finally:
        for run in runs:
            run.kill()


def test_two_machines_learn_what_one_does(data, folder):
    """Interrupted and resumed, in one folder, from paths that are relative to it."""
    pytest.importorskip("tensorflow")
    shutil.copytree(data, "pairs")
    line = ["train", "--data", "pairs", *TINY, "--adversarial-from", 1, "--clip", 0]  # each device clips its own part
    for epochs in 1, 2:
        for status, text in machines([[*line, "--epochs", epochs]] * 2):
            assert status == 0, text[-2000:]
    Path("alone").mkdir()
    os.chdir("alone")
    result = shell(*line[:2], "../pairs", *line[3:], "--epochs", 2, KERAS_BACKEND="tensorflow")
    assert result.returncode == 0, result.stderr
    alone, first, second = (pd.read_csv(f) for f in ("history.csv", "../history.csv", "../worker1/history.csv"))
    for table in first, second:
        for name in "l1", "psnr", "val_l1", "val_psnr", "discriminator":
            np.testing.assert_allclose(table[name], alone[name], rtol=1e-3)


def test_machines_that_differ_are_told(data, folder):
    pytest.importorskip("tensorflow")
    line = ["train", "--data", data, *TINY, "--epochs", 1]
    for status, text in machines([line, [*line, "--seed", 3]]):
        assert (status, text.strip().splitlines()[-1]) == (
            1,
            "nox.py: TF_CONFIG: the machines differ in their options",
        )
    assert names() == ["worker1"] and names("worker1") == []


def test_a_machine_that_is_gone_is_told(data, folder, monkeypatch):
    errors = pytest.importorskip("tensorflow").errors

    def fit(*arguments, **options):
        raise errors.UnavailableError(None, None, "Collective ops is aborted by: /job:worker/task:1\nis unhealthy")

    monkeypatch.setattr(nox.Nox, "fit", fit)
    assert "another machine is gone; the last epoch is kept" in mistake("train", "--data", data, *TINY)


@pytest.mark.parametrize("config", ["nonsense", "[]", "{}", '{"cluster": {"worker": ["localhost"]}}'])
def test_a_cluster_that_tensorflow_cannot_read_is_told(config, data, folder, monkeypatch):
    pytest.importorskip("tensorflow")
    monkeypatch.setenv("TF_CONFIG", config)
    assert re.fullmatch(
        r"nox.py: TF_CONFIG: not as TensorFlow wants it \(.+\)", mistake("train", "--data", data, *TINY)
    )
    assert names() == []


def test_several_machines_need_tensorflow(data, folder, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "{}")
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    message = mistake("train", "--data", data, *TINY)
    assert "TF_CONFIG: several machines need KERAS_BACKEND=tensorflow" in message
    assert names() == []


def test_training_on_openvino_is_refused(data, folder):
    pytest.importorskip("openvino")
    result = shell("train", "--data", data, *TINY, KERAS_BACKEND="openvino")
    assert result.returncode == 1 and "KERAS_BACKEND=openvino: cannot train" in result.stderr
    assert names() == []


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_an_epoch_on_another_backend(backend, data, folder):
    pytest.importorskip(backend)
    result = shell(
        "train", "--data", data, *TINY, "--epochs", 2, "--adversarial-from", 1, KERAS_BACKEND=backend, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert np.isfinite(pd.read_csv("history.csv")["ema_val_generator"]).all()
    assert nox.load_generator("generator_color.h5")[1] == ARCHITECTURE


@pytest.mark.parametrize("backend", ["torch", "jax", "openvino"])
def test_another_backend_gives_the_same_picture(backend, folder):
    pytest.importorskip(backend)
    crop = read(ROOT / "nox data" / "x4.png")[:150, :200].astype(np.uint16) * 257
    source, flags = write("in.png", crop), ["--patch-size", 128, "--stride", 96]
    result = shell("infer", source, *flags, "-o", "other.png", KERAS_BACKEND=backend, timeout=600)
    assert result.returncode == 0, result.stderr
    run("infer", source, *flags, "-o", "ours.png")
    ours, other = (read(name) / 257 for name in ("ours.png", "other.png"))  # in 8-bit steps
    assert np.abs(ours - crop / 257).max() > 20
    assert np.abs(ours - other).max() < 0.25


# --------------------------------------------------------------------------------------------------------------------
# The shipped weights
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_the_shipped_weights_take_the_stars_of_the_shipped_pairs(channels, folder):
    generator, architecture = nox.load_generator(ROOT / nox.weights_name(channels))
    gains = []
    for i in range(5):
        pair = nox.read_pair([ROOT / "nox data" / f"{letter}{i}.png" for letter in "xy"], channels)
        images = [nox.to_unit(pixels)[..., :channels] for pixels in pair]
        before, after = nox.show_pair(generator, architecture, *images, nox.Inference())
        gains.append(after - before)
    assert np.mean(gains) > 8 and min(gains) > 3  # dB


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("noise", [0.0003, 0.001, 0.003])
def test_a_linear_frame_without_stars_comes_back_as_it_was(noise, channels, folder):
    """A gradient that the stretch clips at its dark end leaves specks of noise, which look like stars."""
    rng = np.random.default_rng(4)
    y, x = np.mgrid[:300, :400] / 400
    sky = 0.02 * (1 + 0.3 * x + 0.2 * y)[..., None] + noise * rng.standard_normal((300, 400, channels))
    pixels = np.rint(sky * 65535).astype("uint16")
    write("in.png", pixels)
    run("infer", "in.png", "--linear", "yes")
    assert np.array_equal(read("starless.png"), pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_where_a_burnt_out_star_was_is_grain_as_around_it(channels, folder):
    y, x = np.mgrid[:300, :300] - 150
    grain = cv2.GaussianBlur(np.random.default_rng(3).normal(0, 0.04, (300, 300, channels)), (0, 0), 0.7)
    star = 40 / (1 + (x**2 + y**2) / 10**2) ** 3
    pixels = np.rint((0.15 + grain.reshape(300, 300, channels) + star[..., None]).clip(0, 1) * 65535).astype("uint16")
    write("in.png", pixels)
    run("infer", "in.png")
    starless = read("starless.png").reshape(300, 300, channels) / 65535
    within, grain = np.hypot(x, y) < 10, starless - cv2.blur(starless, (5, 5)).reshape(starless.shape)
    assert pixels[within].min() == 65535 and starless[within].max() < 0.5
    assert grain[within].std() / grain[np.hypot(x, y) > 80].std() == pytest.approx(1, abs=0.3)
