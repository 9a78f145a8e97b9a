"""nox.py: remove the stars from astrophotographs with a neural network, and train that network.

    python nox.py infer image.png    writes starry.png (a copy) and starless.png into the current folder
    python nox.py infer              tries the weights on a random pair of "nox data"
    python nox.py train              trains on "nox data", which GenerateStars.py makes; resumes when repeated

Convention: an image is float32 RGB (or gray), shape (height, width, channels), 0..1; lengths are pixels. OpenCV's BGR
and integer depths exist only in read_picture and encode_picture; the networks' -1..1 only inside the networks.

The encoder-decoder, trained with an adversary and feature matching, is StarNet's (Nikita Misiura, MIT licence); layer
normalization in it and training on synthetic stars are the original nox's (Christopher Harvey, MIT licence).
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import random
import re
import shutil
import struct
import sys
import tempfile
import uuid
import warnings
import zlib
from pathlib import Path

# --------------------------------------------------------------------------------------------------------------------
# Settings: one field a line; the command line is derived from them
# --------------------------------------------------------------------------------------------------------------------


def setting(default, text, **options):
    """A dataclass field with its default and the reason or meaning that --help shows."""
    return dataclasses.field(default=default, metadata={"help": text, **options})


PRECISIONS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a generator is built from; it travels inside the weights file."""

    network: str = setting(
        "nox", "nox: residual blocks at every level; starnet: the original's", choices=("nox", "starnet")
    )
    width: int = setting(32, "channels of the first level; the original's network has 64")
    levels: int = setting(0, "times the resolution is halved; 0: 5 for nox, 8 for starnet")
    n_channels: int = setting(3, "3 trains the colour network, 1 the grayscale one", choices=(1, 3))

    def __post_init__(self):
        if not self.levels:
            object.__setattr__(self, "levels", {"nox": 5, "starnet": 8}[self.network])

    @property
    def weights_name(self):
        return weights_name(self.n_channels)

    @property
    def multiple(self):
        """Heights and widths that the network takes are multiples of this."""
        return 2**self.levels


@dataclasses.dataclass(frozen=True)
class Training:
    data: str = setting("nox data", "folder of pairs x*.png (starry) and y*.png (star-free)")
    epochs: int = setting(100, "passes over the pairs in all; a finished run goes on when it is raised")
    patch_size: int = setting(256, "side of the random crops: wide enough for the halo of a bright star")
    crops: int = setting(2, "crops of each pair in an epoch: decoding a PNG costs as much as a small crop")
    batch_size: int = setting(4, "crops a step: small ones learn more from the same pictures on a CPU")
    lr: float = setting(
        2e-4, "learning rate of the generator, higher ones diverge sooner; the discriminator's is a quarter"
    )
    clip: float = setting(
        0.2, "largest norm of the gradient, four times the usual one: one odd batch must not ruin a run"
    )
    warmup: int = setting(200, "steps over which the learning rate rises from nothing")
    l1_weight: float = setting(1.0, "weight of the mean absolute error")
    star_weight: float = setting(5.0, "how much more star pixels count in it, faint ones the most")
    adversarial_from: int = setting(80, "epoch that brings in the discriminator; before, it costs nothing")
    adversarial_weight: float = setting(0.0005, "weight of fooling the discriminator")
    feature_weight: float = setting(0.02, "weight of matching the discriminator's features")
    vgg_weight: float = setting(
        0.0, "weight of matching VGG19's features; 0: off, it needs a download or --vgg-weights"
    )
    vgg_weights: str = setting("imagenet", "file of VGG19 weights without top, or imagenet: downloaded by Keras")
    ema: float = setting(0.9999, "smoothing of the reported loss and PSNR, per step")
    weight_ema: float = setting(0.999, "averaging of the weights that are saved, per step; the average is less noisy")
    patience: int = setting(8, "epochs without a better smoothed loss before the learning rate is halved")
    cooldown: int = setting(4, "epochs to wait after that")
    validation: bool = setting(True, "hold back a fifth of the pairs to judge by")
    save_freq: int = setting(1, "epochs between saved weights, plots and sample pictures")
    seed: int = setting(0, "seed of crops, order and split")
    workers: int = setting(2, "threads that read and augment pairs while the network runs")
    precision: str = setting("float32", "bfloat16 is faster on GPUs and on CPUs with AMX", choices=PRECISIONS)
    weights: str = setting("", "weights file to start from; colour weights can start the grayscale network")


@dataclasses.dataclass(frozen=True)
class Inference:
    patch_size: int = setting(1024, "side of a tile: few tiles, little overlap")
    stride: int = setting(960, "step between tiles; they overlap, feathered, by the difference or a little more")
    batch_size: int = setting(1, "tiles at once; more helps GPUs only")
    n_channels: int = setting(0, "1 converts a colour picture to gray first; 0 leaves it as it is", choices=(0, 1, 3))
    weights: str = setting("", "weights file; by default generator_color.h5 or generator_grayscale.h5 beside nox.py")
    precision: str = setting(
        "float32", "bfloat16 is faster on GPUs and on CPUs with AMX, but rounds bright stars", choices=PRECISIONS
    )
    data: str = setting("nox data", "folder of pairs for a call without a picture")


class BadInput(Exception):
    """A user's mistake, told in one line."""


def weights_name(n_channels):
    return "generator_color.h5" if n_channels == 3 else "generator_grayscale.h5"


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, without the list of all options."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def add_settings(parser, *classes):
    """An option for each field of the dataclasses, with its default."""
    for field in (field for cls in classes for field in dataclasses.fields(cls)):
        options = {"default": field.default, **field.metadata}
        options |= {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def parse_arguments(arguments=None):
    """The command line's values; exits with status 2 and one line for a mistake in it."""
    parser = Parser(prog="nox.py", description="Remove the stars from astrophotographs.")
    commands = parser.add_subparsers(dest="command", required=True)
    form = argparse.ArgumentDefaultsHelpFormatter
    infer = commands.add_parser("infer", help="remove the stars from a picture", formatter_class=form)
    infer.add_argument("image", nargs="?", help="PNG, TIFF or JPEG; without one, a random pair of the data")
    infer.add_argument("-o", "--output", metavar="FILE", help="the starless picture; then no copy of the input is made")
    infer.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    add_settings(infer, Inference)
    train = commands.add_parser("train", help="train the network on pairs", formatter_class=form)
    add_settings(train, Architecture, Training)
    values = parser.parse_args(arguments)
    check_arguments(commands.choices[values.command], values)
    return values


def check_arguments(parser, values):
    """End with one line for a number out of range."""
    at_least = dict(patch_size=1, stride=1, batch_size=1, epochs=1, width=1, levels=0, crops=1, save_freq=1, workers=1)
    at_least |= dict(patience=1, cooldown=0, warmup=0, adversarial_from=0, seed=0, clip=0)
    at_least |= {name: 0 for name in ("l1_weight", "star_weight", "adversarial_weight", "feature_weight", "vgg_weight")}
    for name, least in at_least.items():
        if not least <= getattr(values, name, least) < 2**31:  # nor not-a-number
            parser.error(f"--{name.replace('_', '-')} must be at least {least} and below 2^31")
    for name in ("ema", "weight_ema"):
        if not 0 <= getattr(values, name, 0) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 0 and below 1")
    if not 0 < getattr(values, "lr", 1) <= 1:
        parser.error("--lr must be above 0 and at most 1")
    if values.command == "infer" and values.stride > values.patch_size:
        parser.error("--stride must not exceed --patch-size, or tiles would leave gaps")


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # answers --help and mistakes before Keras takes its seconds to load

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's notes on the machine are no concern of the user
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # it warns of every TIFF with alpha
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # off by default on CPUs without AVX-512; 1.5 times faster there

import cv2  # noqa: E402
import h5py  # noqa: E402
import matplotlib.figure  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from tqdm import tqdm  # noqa: E402


@contextlib.contextmanager
def silenced():
    """Nothing reaches the error stream: TensorFlow, libpng and libjpeg write there from C++, whatever they are told.

    Not for use in several threads at once.
    """
    sys.stderr.flush()
    keep, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(keep, 2)
        os.close(keep)
        os.close(sink)


with silenced():
    import keras
    from keras import layers, ops

# --------------------------------------------------------------------------------------------------------------------
# Images: read, write
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Picture:
    """A picture as its file holds it: pixels of shape (height, width, 1 or 3) in RGB and their alpha, or None."""

    pixels: np.ndarray
    alpha: np.ndarray | None

    @functools.cached_property
    def white(self):
        """The value that stands for 1: an integer's largest; of float pixels 1, or the brightest if above 1."""
        if self.pixels.dtype.kind in "ui":
            return float(np.iinfo(self.pixels.dtype).max)
        return max(float(row.max(where=np.isfinite(row), initial=1)) for row in self.pixels)

    def image(self, window=np.s_[:]):
        """The picture, or the part that an index of numpy's names, as an image."""
        return (np.nan_to_num(self.pixels[window], posinf=0, neginf=0) / self.white).astype(np.float32).clip(0, 1)

    def without(self, light, window=np.s_[:]):
        """The pixels less the light taken away (an image), in their own depth; where that is 0, the very same bits."""
        pixels = self.pixels[window]
        rest = pixels - light.astype(np.float64) * self.white
        if pixels.dtype.kind in "ui":
            rest = np.rint(rest).clip(0, self.white)
        return np.where(light != 0, rest, pixels).astype(pixels.dtype)

    def gray(self):
        """The luminance (ITU-R BT.601) of a colour picture, as a picture of one channel."""
        if self.pixels.shape[2] == 1:
            return self
        luminance = self.pixels.astype(np.float64) @ np.array([[0.299], [0.587], [0.114]])
        luminance = np.rint(luminance) if self.pixels.dtype.kind in "ui" else luminance
        return Picture(luminance.astype(self.pixels.dtype), self.alpha)

    def corner(self):
        """Its first pixel, to try out what files can hold it."""
        return Picture(self.pixels[:1, :1], None if self.alpha is None else self.alpha[:1, :1])


def read_picture(path):
    """The picture in a PNG, TIFF or JPEG file; raises BadInput with the file's name and the reason."""
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"{path}: is a folder, not a picture")
    try:
        data = np.fromfile(path, np.uint8)  # cv2.imread cannot open non-ASCII names on Windows
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if not data.size:
        raise BadInput(f"{path}: the file is empty")
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise BadInput(f"{path}: not a picture that can be read (PNG, TIFF or JPEG)")
    if pixels.dtype.kind not in "uif":
        raise BadInput(f"{path}: pixels of type {pixels.dtype} are not supported")
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if data[:8].tobytes() == PNG_SIGNATURE and data[25] == PNG_GRAY_ALPHA and pixels.shape[2] == 4:
        pixels = pixels[..., 2:]  # OpenCV repeats gray to three channels
    channels = pixels.shape[2]
    alpha = pixels[..., -1] if channels in (2, 4) else None
    color = pixels[..., :1] if channels < 3 else pixels[..., 2::-1]
    return Picture(np.ascontiguousarray(color), alpha)


PNG_SIGNATURE, PNG_GRAY_ALPHA = b"\x89PNG\r\n\x1a\n", 4
HOLDS = {
    ".png": "uint8 uint16 alpha",
    ".tif": "uint8 uint16 uint32 int8 int16 int32 float32 float64 alpha",
    ".jpg": "uint8",
    ".bmp": "uint8",
}  # what OpenCV writes as it is; anything else it turns into 8 bits without a word
HOLDS |= {".tiff": HOLDS[".tif"], ".jpeg": HOLDS[".jpg"]}


def encode_picture(picture, extension):
    """The bytes of a file of that extension; raises BadInput when it cannot hold the picture."""
    if extension not in HOLDS:
        raise BadInput(f"{extension or 'nameless'} files are not written; name a .png, .tif or .jpg file with -o")
    needed = [str(picture.pixels.dtype)] + ["alpha"] * (picture.alpha is not None)
    for need in needed:
        if need not in HOLDS[extension].split():
            raise BadInput(f"a {extension} file cannot hold {need}; name a .tif file with -o")
    pixels = picture.pixels[..., ::-1]
    if picture.alpha is not None:
        if pixels.shape[2] == 1 and extension == ".png":
            return encode_gray_alpha(np.dstack([pixels, picture.alpha]))
        pixels = np.dstack([*np.broadcast_to(pixels, (*pixels.shape[:2], 3)).transpose(2, 0, 1), picture.alpha])
    quality = [cv2.IMWRITE_JPEG_QUALITY, 98, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    try:
        done, data = cv2.imencode(extension, np.ascontiguousarray(pixels), quality if "jp" in extension else [])
    except cv2.error:
        done = False
    if not done:
        raise BadInput(f"the picture cannot be written as {extension}; name a .png, .tif or .jpg file with -o")
    return data.tobytes()


def encode_gray_alpha(pixels):
    """The bytes of a PNG file of gray and alpha, shape (height, width, 2), which OpenCV reads but does not write."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, PNG_GRAY_ALPHA, 0, 0, 0)
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(height, -1)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))  # 0: a row without filter
    chunks = (b"IHDR" + header, b"IDAT" + body, b"IEND")
    return PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def write_bytes(path, data):
    """Write to a temporary file, then rename: nobody ever sees half a file."""
    path = Path(path)
    temporary = path.with_name(f".nox{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_image(path, image):
    """Write an image as an 8-bit file."""
    pixels = np.rint(np.asarray(image).clip(0, 1) * 255).astype(np.uint8)
    write_bytes(path, encode_picture(Picture(pixels, None), Path(path).suffix))


def psnr(image, truth):
    """Peak signal-to-noise ratio of two images in dB, at most 100."""
    return float(-10 * np.log10(max(np.mean(np.square(image - truth, dtype=np.float64)), 1e-10)))


# --------------------------------------------------------------------------------------------------------------------
# Pairs: find, split, augment
# --------------------------------------------------------------------------------------------------------------------


def find_pairs(folder):
    """[(starry path, star-free path)] of a folder's x*.png and y*.png in the order of their numbers.

    Raises BadInput for a folder that is missing or empty and for an x or y without its partner.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder of pairs; python GenerateStars.py makes one")
    found = {letter: {f.stem[1:]: f for f in folder.glob(f"{letter}*.png")} for letter in "xy"}
    for letter, other in ("xy", "yx"):
        for stem in sorted(found[letter].keys() - found[other].keys()):
            raise BadInput(f"{found[letter][stem]}: its partner {other}{stem}.png is missing")
    if not found["x"]:
        raise BadInput(f"{folder}: no pairs x*.png, y*.png in it; python GenerateStars.py makes them")
    order = sorted(found["x"], key=lambda stem: (int(stem) if stem.isdigit() else sys.maxsize, stem))
    return [(found["x"][stem], found["y"][stem]) for stem in order]


def split_pairs(pairs, validation, seed):
    """(training, validation) pairs: a fifth is held back, the same for the same seed; none without validation."""
    if not validation:
        return pairs, []
    if len(pairs) < 2:
        raise BadInput("validation needs two pairs at least; give more, or --no-validation")
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    held = max(1, len(pairs) // 5)
    return shuffled[held:], shuffled[:held]


def read_pair(paths, n_channels):
    """Both pictures of a pair as arrays of the file's type, shape (height, width, n_channels).

    A colour pair read for one channel keeps all three, of which a crop takes one.
    """
    pair = [read_picture(path).pixels for path in paths]
    if pair[0].shape != pair[1].shape or pair[0].dtype != pair[1].dtype:
        raise BadInput(f"{paths[0]} and {paths[1]}: not of the same size, channels and depth")
    return [np.repeat(p, 3, axis=2) if n_channels == 3 and p.shape[2] == 1 else p for p in pair]


def to_unit(pixels):
    return pixels.astype(np.float32) / np.iinfo(pixels.dtype).max


class Pairs(keras.utils.PyDataset):
    """An endless run of batches (starry, star-free): float32 crops, shape (batch, size, size, n_channels), 0..1.

    Every pair is read once an epoch, which has self.steps batches. Training crops are random and augmented; validation
    crops are the centres. Epoch and step are told from the running number of the batch, counted from the epoch
    self.start: Keras reads ahead into the next epoch before any callback could say that it has begun.
    A pair that cannot be used raises BadInput and stays in self.broken: raised in a worker, it reaches the caller of
    fit as some error of the backend's.
    """

    num_batches = None  # endless, to Keras

    def __init__(self, pairs, settings, n_channels, augment):
        super().__init__(workers=settings.workers, max_queue_size=8)
        self.pairs, self.settings, self.n_channels, self.augment = pairs, settings, n_channels, augment
        self.crops = settings.crops if augment else 1
        self.steps = -(-len(pairs) * self.crops // settings.batch_size)
        self.start = 0
        self.broken = None

    def __getitem__(self, index):
        seed, (epoch, step) = self.settings.seed, divmod(index + self.start * self.steps, self.steps)
        jobs = list(range(len(self.pairs) * self.crops))
        if self.augment:  # whole pairs are shuffled, so that the crops of one stand together and it is read once
            order = np.random.default_rng([seed, epoch]).permutation(len(self.pairs))
            jobs = [pair for pair in order for _ in range(self.crops)]
        jobs = jobs[step * self.settings.batch_size : (step + 1) * self.settings.batch_size]
        rng = np.random.default_rng([seed, epoch, step])
        try:
            read = {job: read_pair(self.pairs[job], self.n_channels) for job in dict.fromkeys(jobs)}
            crops = [self.crop(rng, self.pairs[job], *read[job]) for job in jobs]
        except BadInput as error:
            self.broken = error
            raise
        starry, starless = (np.stack(images) for images in zip(*crops))
        return augmented(rng, starry, starless) if self.augment else (starry, starless)

    def crop(self, rng, paths, starry, starless):
        size, (height, width) = self.settings.patch_size, starry.shape[:2]
        if height < size or width < size:
            raise BadInput(f"{paths[0]}: {width}x{height} pixels are less than the patch size {size}; see --patch-size")
        room = height - size, width - size
        top, left = (rng.integers(r + 1) for r in room) if self.augment else (r // 2 for r in room)
        channel = slice(None)
        if self.n_channels == 1 and starry.shape[2] == 3:
            channel = [int(rng.integers(3)) if self.augment else 1]
        window = np.s_[top : top + size, left : left + size, channel]
        pair = to_unit(starry[window]), to_unit(starless[window])
        if not self.augment:
            return pair
        turns, flip = rng.integers(4), rng.integers(2)
        return [np.rot90(im[:, ::-1] if flip else im, turns) for im in pair]


RECOMBINED = 0.2  # share of crops that get another crop's stars
DIMMED = 0.3  # share of crops that are dimmed or lifted


def augmented(rng, starry, starless):
    """The batch with channels permuted, some crops under another crop's stars, some dimmed or lifted."""
    starry, starless = starry.copy(), starless.copy()
    light = 1 - (1 - starry) / np.maximum(1 - starless, 1 / 255)  # the stars as a screen-blended layer
    for i in range(len(starry)):
        order = rng.permutation(starry.shape[-1])
        starry[i], starless[i] = starry[i][..., order], starless[i][..., order]
        if rng.random() < RECOMBINED:
            other = light[rng.integers(len(starry))]
            starry[i] = np.where(other != 0, 1 - (1 - starless[i]) * (1 - other.clip(0, 1)), starless[i])
        if rng.random() < DIMMED:
            gain = rng.uniform(0.5, 1.0)
            lift = rng.uniform(0, 1 - gain) * rng.integers(2)
            starry[i], starless[i] = gain * starry[i] + lift, gain * starless[i] + lift
    return starry, starless


# --------------------------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------------------------


def build_generator(architecture):
    """The generator: images (batch, height, width, n_channels) to the same without stars, any multiple of 2^levels."""
    build = {"nox": build_nox, "starnet": build_starnet}[architecture.network]
    return build(architecture.width, architecture.levels, architecture.n_channels)


def build_starnet(width, levels, n_channels):
    """StarNet's encoder-decoder with layer normalization; at width 64 and 8 levels that of the original nox.

    Stride-2 convolutions 4x4, skip connections, and a residual that can only take light away.
    """
    filters = [width * min(2**level, 8) for level in range(levels)]
    initial = keras.initializers.RandomNormal(0, 0.02)
    options = dict(kernel_size=4, strides=2, padding="same", kernel_initializer=initial)
    starry = keras.Input((None, None, n_channels), name="starry")
    x = scaled = layers.Rescaling(2, -1)(starry)
    skips = []
    for level in range(levels):
        x = layers.LeakyReLU(negative_slope=0.2)(x) if level else x
        x = layers.Conv2D(filters[level], **options)(x)  # (batch, height / 2^(level+1), ..., filters[level])
        x = layers.LayerNormalization()(x) if level else x
        skips.append(x)
    skips.pop()
    for skip in reversed(skips):
        x = layers.Conv2DTranspose(skip.shape[-1], **options)(layers.ReLU()(x))
        x = layers.LayerNormalization()(x)
        x = layers.Concatenate()([x, skip])
    light = layers.Conv2DTranspose(n_channels, **options)(layers.ReLU()(x))
    starless = layers.Subtract()([scaled, layers.ReLU()(light)])
    return keras.Model(starry, layers.Rescaling(0.5, 0.5)(starless), name="generator")


class LocalContrast(layers.Layer):
    """[x, and for each side k: (x - mean) / standard deviation over k x k pixels], channels concatenated.

    Local contrast normalization (Jarrett et al. 2009): a faint star on a bright nebula and one on black sky look alike
    from the first layer on. Without it the network spends its first thousand steps on learning as much.
    """

    SIDES = (5, 17)  # a star, and its surroundings
    FLOOR = 1e-4  # variance of flat parts: 1% of the range

    def call(self, x):
        found = [2 * x - 1]
        for side in self.SIDES:
            mean, square = local_mean(x, side), local_mean(ops.square(x), side)
            variance = ops.relu(square - ops.square(mean))
            found.append((x - mean) / (2 * ops.sqrt(variance + self.FLOOR)))
        return ops.concatenate(found, axis=-1)


def local_mean(x, side):
    """Mean over side x side pixels, along one axis after the other."""
    rows = ops.average_pool(x, (side, 1), strides=1, padding="same")
    return ops.average_pool(rows, (1, side), strides=1, padding="same")


class Gate(layers.Layer):
    """starless = starry - gate * (starry - fill), from (starry, gate, fill); the gate is clipped to 0..1.

    A gate of 0 leaves the very bits of a pixel, a gate of 1 puts the fill in its place: a saturated core is painted
    from its surroundings, a dark ring is lifted. Below 0 the gradient passes unchanged: a sigmoid, or a gate whose
    gradient ends there, soon stays shut everywhere (measured). Above 1 it ends, and the fill is clipped to 0..1: what
    nothing holds runs away, and the training with it (measured).
    """

    def call(self, inputs):
        starry, gate, fill = inputs
        gate = ops.minimum(gate + ops.stop_gradient(ops.relu(gate) - gate), 1)
        return starry - gate * (starry - ops.clip(fill, 0, 1))


def residual_block(x):
    """x + conv(relu(conv(norm(x)))), 3x3; starts as the identity. Without the norm, whole layers of ReLUs died."""
    channels = x.shape[-1]
    y = layers.RMSNormalization()(x)
    y = layers.Conv2D(channels, 3, padding="same", activation="relu", kernel_initializer="he_normal")(y)
    return layers.Add()([x, layers.Conv2D(channels, 3, padding="same", kernel_initializer="zeros")(y)])


def build_nox(width, levels, n_channels):
    """StarNet's encoder-decoder with a residual block at each level, half resolution on, and a gated fill.

    Most stars are 2 to 4 pixels wide: what finds them must convolve at high resolution, where StarNet has but one
    layer on the way down and one on the way up. Skip connections add; channels grow by width a level up to 6 widths.
    """
    filters = [width * min(level + 1, 6) for level in range(levels)]
    starry = keras.Input((None, None, n_channels), name="starry")
    exact = {"dtype": "float32"}  # bfloat16 would round the picture itself
    x = LocalContrast(**exact)(starry)
    skips = []
    for level, count in enumerate(filters):
        kernel = 2 if level else 4
        x = layers.Conv2D(count, kernel, 2, padding="same", kernel_initializer="lecun_normal")(x)
        x = residual_block(x)  # (batch, height / 2^(level+1), ..., width * (level+1))
        skips.append(x)
    x = residual_block(skips.pop())
    quiet = keras.initializers.VarianceScaling(0.05)  # at first the fine levels speak, the coarse ones whisper
    for skip in reversed(skips):
        x = layers.Conv2DTranspose(skip.shape[-1], 2, 2, kernel_initializer=quiet)(x)
        x = residual_block(layers.Add()([x, skip]))
    x = layers.LeakyReLU(negative_slope=0.2)(x)
    options = {"kernel_size": 4, "strides": 2, "padding": "same", "kernel_initializer": quiet}
    gate = layers.Conv2DTranspose(n_channels, bias_initializer=keras.initializers.Constant(0.05), **options)(x)
    fill = layers.Conv2DTranspose(n_channels, **options)(x)
    # from the start near the right answer
    fill = layers.Add(**exact)([fill, local_mean(starry, LocalContrast.SIDES[-1])])
    return keras.Model(starry, Gate(**exact)([starry, gate, fill]), name="generator")


def build_discriminator(n_channels, width=32):
    """Patch discriminator: images to [features of each level ..., logits of being a true star-free picture]."""
    image = keras.Input((None, None, n_channels), name="image")
    x, features = layers.Rescaling(2, -1)(image), []
    for level in range(4):
        x = layers.Conv2D(width * 2**level, 4, 2, padding="same", kernel_initializer="he_normal")(x)
        x = layers.LayerNormalization()(x) if level else x
        x = layers.LeakyReLU(negative_slope=0.2)(x)  # (batch, height / 2^(level+1), ..., width * 2^level)
        features.append(x)
    return keras.Model(image, [*features, layers.Conv2D(1, 3, padding="same")(x)], name="discriminator")


def first_line(error):
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]


def build_vgg(weights, n_channels):
    """Frozen features of VGG19 (block 3, before pooling) of images; weights: a file without top, or "imagenet"."""
    try:
        vgg = keras.applications.VGG19(include_top=False, weights=weights)
    except Exception as error:  # no network, no such file, or a foreign one: Keras raises various types
        reason = first_line(error) if weights == "imagenet" or Path(weights).is_file() else "no such file"
        raise BadInput(f"VGG19 weights {weights}: {reason}; give --vgg-weights FILE, or --vgg-weight 0") from None
    image = keras.Input((None, None, n_channels))
    rgb = image if n_channels == 3 else ops.repeat(image, 3, axis=-1)
    caffe = ops.flip(rgb, axis=-1) * 255 - ops.convert_to_tensor([103.939, 116.779, 123.68])
    body = keras.Model(vgg.input, vgg.get_layer("block3_conv4").output)
    model = keras.Model(image, body(caffe), name="vgg")
    model.trainable = False
    return model


# --------------------------------------------------------------------------------------------------------------------
# Losses and the model
# --------------------------------------------------------------------------------------------------------------------


def frozen(network, x):
    """The network's output with gradients that reach x, but not the network's own weights."""
    fixed = [ops.stop_gradient(variable) for variable in network.trainable_variables]
    return network.stateless_call(fixed, network.non_trainable_variables, x)[0]


def star_weighted_l1(starry, truth, starless, star_weight):
    """Mean absolute error in which a star's pixels weigh more, those of faint light the most.

    light: how much the stars add; 0.02 of it makes a full star pixel; the quotient makes faint light weigh 3 times
    light of half the range. Pixels without stars weigh 1 and hold the background where it is.
    """
    light = ops.max(ops.abs(starry - truth), axis=-1, keepdims=True)
    weight = 1 + star_weight * ops.clip(light / 0.02, 0, 1) * 0.3 / (0.1 + light)
    return ops.mean(weight * ops.abs(starless - truth))


def cross_entropy(logits, real):
    """Binary cross-entropy of logits against all real or all fake."""
    return ops.mean(ops.softplus(-logits if real else logits))


class Nox(keras.Model):
    """Generator and discriminator with every term of the loss in compute_loss, for training and validation alike."""

    TERMS = ("generator", "l1", "features", "adversarial", "discriminator", "vgg", "psnr")

    def __init__(self, architecture, settings):
        super().__init__(name="nox")
        self.settings = settings
        self.generator = build_generator(architecture)
        self.discriminator = build_discriminator(architecture.n_channels)
        self.vgg = build_vgg(settings.vgg_weights, architecture.n_channels) if settings.vgg_weight else None
        self.adversarial = False  # whether the discriminator has come in
        self.trackers = {name: keras.metrics.Mean(name=name) for name in self.TERMS}
        self.build((None, None, None, architecture.n_channels))

    def build(self, input_shape):
        self.built = True  # the networks come built

    def call(self, starry, training=None):
        return self.generator(starry, training=training)

    @property
    def metrics(self):
        idle = () if self.adversarial else ("features", "adversarial", "discriminator")
        idle += () if self.vgg else ("vgg",)
        return [tracker for name, tracker in self.trackers.items() if name not in idle]

    def losses_of(self, starry, truth, starless):
        """Each term by name, unweighted."""
        terms = {"l1": star_weighted_l1(starry, truth, starless, self.settings.star_weight)}
        if self.adversarial:
            *fake, fake_logits = frozen(self.discriminator, starless)
            *real, _ = frozen(self.discriminator, truth)
            terms["features"] = sum(ops.mean(ops.abs(f - r)) for f, r in zip(fake, real))
            terms["adversarial"] = cross_entropy(fake_logits, True)
            seen_fake, seen_real = self.discriminator(ops.stop_gradient(starless))[-1], self.discriminator(truth)[-1]
            terms["discriminator"] = (cross_entropy(seen_fake, False) + cross_entropy(seen_real, True)) / 2
        if self.vgg:
            terms["vgg"] = ops.mean(ops.abs(self.vgg(starless) - self.vgg(truth)))
        return terms

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The scalar both networks descend; each sees only its own part of it (see frozen)."""
        s, terms = self.settings, self.losses_of(x, y, ops.cast(y_pred, "float32"))
        weights = {
            "l1": s.l1_weight,
            "features": s.feature_weight,
            "adversarial": s.adversarial_weight,
            "vgg": s.vgg_weight,
        }
        generator = sum(weights[name] * value for name, value in terms.items() if name in weights)
        error = ops.mean(ops.square(ops.cast(y_pred, "float32") - y), axis=(1, 2, 3))
        terms |= {"generator": generator, "psnr": ops.mean(-10 * ops.log10(ops.maximum(error, 1e-10)))}
        for name, value in terms.items():
            self.trackers[name].update_state(value)
        if self.adversarial:
            return generator + terms["discriminator"]
        # every weight needs a gradient, if only of zero, on all backends
        return generator + 0.0 * sum(ops.sum(v) for v in self.discriminator.trainable_variables)


class TwoRateAdam(keras.optimizers.Adam):
    """Adam with a warm-up, whose learning rate for the discriminator is a quarter of the generator's."""

    def __init__(self, slow=(), warmup=0, **options):
        super().__init__(**options)
        self.slow, self.warmup = {id(v) for v in slow}, warmup

    def update_step(self, gradient, variable, learning_rate):
        if self.warmup:
            learning_rate = learning_rate * ops.minimum(1.0, (ops.cast(self.iterations, "float32") + 1) / self.warmup)
        super().update_step(gradient, variable, learning_rate / 4 if id(variable) in self.slow else learning_rate)

    def finalize_variable_values(self, variables):
        """Nothing: Keras would put the averages in place of the weights when fit ends, which a resumed run cannot."""


# --------------------------------------------------------------------------------------------------------------------
# Weights: one file format for ours, the original's read as well
# --------------------------------------------------------------------------------------------------------------------


def save_weights(generator, architecture, path, run=""):
    """Write a generator's weights as float16 (half the size, 79 dB from float32) with what it is built from."""
    with tempfile.TemporaryDirectory() as folder:
        full, half = Path(folder) / "full.weights.h5", Path(folder) / "half.h5"
        generator.save_weights(full)
        with h5py.File(full) as source, h5py.File(half, "w") as target:

            def convert(name, item):
                if isinstance(item, h5py.Dataset):
                    target[name] = item[()].astype(np.float16) if item.dtype.kind == "f" else item[()]
                else:
                    target.require_group(name).attrs.update(item.attrs)

            source.visititems(convert)
            target.attrs.update(source.attrs)
            target.attrs["nox"] = json.dumps({**dataclasses.asdict(architecture), "run": run})
        write_bytes(path, half.read_bytes())


def inspect_weights(path):
    """(architecture, run that wrote it) of a weights file, ours or the original's legacy one; raises BadInput."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such weights file")
    try:
        with h5py.File(path) as file:
            if "nox" in file.attrs:
                values = json.loads(file.attrs["nox"])
                run = values.pop("run", "")
                return Architecture(**values), run
            kernels = []
            file.visititems(lambda name, item: kernels.append(item.shape) if getattr(item, "ndim", 0) == 4 else None)
            if "layer_names" in file.attrs or "model_weights" in file:  # the original's, or any other legacy Keras file
                # first and last layer have as many channels as the picture; the first has fewer on its other side
                first = min((shape for shape in kernels if shape[0] == 4 and shape[2] in (1, 3)), key=lambda s: s[3])
                return Architecture("starnet", first[3], 8, first[2]), ""
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    raise BadInput(f"{path}: not a weights file of nox")


def load_weights(generator, path):
    """Load a weights file, ours or a legacy one, into a generator of its architecture; raises BadInput."""
    path = Path(path).resolve()
    with h5py.File(path) as file:
        ours = "nox" in file.attrs
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
            copy = Path(folder) / ("copy.weights.h5" if ours else "copy.h5")  # Keras goes by the name, not the content
            shutil.copyfile(path, copy)
            generator.load_weights(copy)
    except Exception as error:  # Keras and h5py raise various types
        raise BadInput(f"{path}: does not fit the network ({first_line(error)})") from None


def load_generator(path):
    """(generator, architecture) of a weights file."""
    architecture, _ = inspect_weights(path)
    generator = build_generator(architecture)
    load_weights(generator, path)
    return generator, architecture


def start_from(generator, architecture, path):
    """Set a generator's weights from a file; colour weights start a grayscale one as if it saw R = G = B."""
    source, found = load_generator(path)
    if (found.network, found.width, found.levels) != (architecture.network, architecture.width, architecture.levels):
        flags = f"--network {found.network} --width {found.width} --levels {found.levels}"
        raise BadInput(f"{path}: holds another network; start from it with {flags}")
    weights = source.get_weights()
    if (found.n_channels, architecture.n_channels) == (3, 1):
        weights = fold_channels(weights, [tuple(v.shape) for v in generator.weights])
    elif found.n_channels != architecture.n_channels:
        raise BadInput(f"{path}: grayscale weights cannot start the colour network")
    generator.set_weights(weights)


def fold_channels(weights, shapes):
    """A colour network's weights for gray, of these shapes: summed over input channels, averaged over output channels.

    The first convolution alone sees channels of the picture, three for each kind of contrast; kernels of the transposed
    convolutions that make pictures have shape (height, width, n_channels, inputs).
    """
    first, *others = weights
    first = first.reshape(*first.shape[:2], -1, 3, first.shape[3]).sum(axis=3)
    outputs = zip(others, shapes[1:])
    return [first, *(w if w.shape == shape else w.mean(axis=min(w.ndim - 1, 2), keepdims=True) for w, shape in outputs)]


# --------------------------------------------------------------------------------------------------------------------
# Callbacks: history, smoothing, samples, plots
# --------------------------------------------------------------------------------------------------------------------


class History(keras.callbacks.Callback):
    """history.csv: one row an epoch, with exponential moving averages of loss and PSNR; never an epoch twice.

    It comes first of the callbacks and ends a run whose loss is not finite, before a good state is written over.

    ema is per step, the row per epoch of n steps: the average moves by 1 - ema^n towards the epoch's mean and is
    corrected for its start at zero, so it is restored from the last row alone. It starts anew with the adversary, who
    adds terms to the loss.
    """

    SMOOTHED = ("generator", "psnr", "val_generator", "val_psnr")

    def __init__(self, path, copy, ema, steps, start):
        """path: the run's own file, in its checkpoint; copy: where the user looks; start: epoch to go on from."""
        super().__init__()
        self.path, self.copy, self.keep = path, copy, ema**steps
        if path.exists():  # an epoch that ended, but whose checkpoint was not written any more, is run again
            write_bytes(path, self.rows(start).to_csv(index=False).encode())

    def rows(self, before=sys.maxsize):
        """The rows of the epochs before one, as a DataFrame."""
        table = pd.read_csv(self.path) if self.path.exists() else pd.DataFrame({"epoch": []})
        return table.astype({"epoch": int})[table["epoch"] < before]

    def comparable(self, before=sys.maxsize):
        """Those of them whose loss has the terms that it has now."""
        table = self.rows(before)
        had = table["discriminator"].notna() if "discriminator" in table else np.zeros(len(table), bool)
        return table[had == self.model.adversarial]

    def on_epoch_end(self, epoch, logs=None):
        if not np.isfinite(logs["generator"]):
            reason = f"the loss of epoch {epoch + 1} is {logs['generator']}"
            raise BadInput(f"{reason}; the epoch before is kept, try a lower --lr")
        row, past = {"epoch": epoch, **logs}, self.comparable(epoch)
        row["learning_rate"] = float(self.model.optimizer.learning_rate)
        for name in (name for name in self.SMOOTHED if name in logs):
            averages = past[f"ema_{name}"].dropna() if f"ema_{name}" in past else past["epoch"][:0]
            total = (1 - self.keep ** len(averages)) * (averages.iloc[-1] if len(averages) else 0)
            average = (self.keep * total + (1 - self.keep) * logs[name]) / (1 - self.keep ** (len(averages) + 1))
            row[f"ema_{name}"] = logs[f"ema_{name}"] = float(average)
        table = pd.concat([self.rows(epoch), pd.DataFrame([row])], ignore_index=True)
        for path in (self.path, self.copy):
            write_bytes(path, table.to_csv(index=False).encode())


class Plateau(keras.callbacks.ReduceLROnPlateau):
    """ReduceLROnPlateau whose counters survive an interruption: they are replayed from the history."""

    def __init__(self, history, **options):
        super().__init__(mode="min", factor=0.5, **options)
        self.history = history

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        rate = float(self.model.optimizer.learning_rate)
        for row in self.history.comparable().to_dict("records"):
            if not np.isnan(row.get(self.monitor, np.nan)):
                super().on_epoch_end(row["epoch"], row)
        self.model.optimizer.learning_rate = rate


class Checkpoint(keras.callbacks.Callback):
    """The whole state of a run after each epoch: weights, optimizer, learning rate, in one file named by the epoch.

    The file gets its name only when it is complete and the one before goes only then, so a run killed at any moment
    resumes. Keras's BackupAndRestore writes in place and keeps the epoch in a second file.
    """

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def files(self):
        """{epoch: file} of the complete states."""
        found = (re.fullmatch(r"epoch(\d+)\.weights\.h5", f.name) for f in self.folder.glob("epoch*.weights.h5"))
        return {int(match[1]): self.folder / match[0] for match in found if match}

    def restore(self, model):
        """Load the last state into a compiled model; returns the number of epochs done, 0 without a state."""
        files = self.files()
        done = max(files, default=0)
        if files:
            try:
                with warnings.catch_warnings(action="error", category=UserWarning):
                    model.load_weights(files[done])  # Keras leaves an optimizer that does not fit out, with a warning
            except Exception as error:  # Keras and h5py raise various types
                advice = "go on with the settings it was begun with, or move the folder away"
                raise BadInput(f"{files[done]}: does not fit ({first_line(error)}); {advice}") from None
        return done

    def on_epoch_end(self, epoch, logs=None):
        earlier = self.files().values()
        temporary = self.folder / "writing.weights.h5"
        self.model.save_weights(temporary, overwrite=True)
        os.replace(temporary, self.folder / f"epoch{epoch + 1}.weights.h5")
        for file in earlier:
            if file.name != f"epoch{epoch + 1}.weights.h5":
                file.unlink(missing_ok=True)


class Outputs(keras.callbacks.Callback):
    """Every save_freq epochs and at the end: weights, training.png, and input.png, output.png, gt.png of one pair."""

    def __init__(self, architecture, settings, run, pairs, history):
        super().__init__()
        self.architecture, self.settings, self.run = architecture, settings, run
        self.pairs, self.history = pairs, history
        self.generator = build_generator(architecture)

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.settings.save_freq and epoch + 1 != self.settings.epochs:
            return
        take_average(self.generator, self.model)
        save_weights(self.generator, self.architecture, self.architecture.weights_name, self.run)
        write_plot("training.png", pd.read_csv(self.history.path))
        paths = self.pairs[np.random.default_rng([self.settings.seed, epoch]).integers(len(self.pairs))]
        show_pair(self.generator, self.architecture, paths, Inference(patch_size=512, stride=448))


def take_average(generator, model):
    """Give a generator the moving average of the trained one's weights, which the optimizer keeps, if it does."""
    averages = [v for v in model.optimizer.variables if v.path.endswith("_average")] if model.optimizer.use_ema else []
    average_of = {id(v): average for v, average in zip(model.trainable_variables, averages)}
    best = [average_of.get(id(v), v) for v in model.generator.weights]
    generator.set_weights(
        [np.array(ops.convert_to_numpy(v)) for v in best]
    )  # copies: JAX deletes what predict was given


def write_plot(path, table):
    """Loss, PSNR and learning rate over the epochs, training and validation, as a picture."""
    figure = matplotlib.figure.Figure(figsize=(9, 9), layout="constrained")
    axes = figure.subplots(3, sharex=True)
    for axis, name, label in zip(axes, ("generator", "psnr", "learning_rate"), ("loss", "PSNR, dB", "learning rate")):
        for column, style in (name, "C0."), (f"ema_{name}", "C0-"), (f"val_{name}", "C1."), (f"ema_val_{name}", "C1-"):
            if column in table:
                axis.plot(table["epoch"] + 1, table[column], style, label=column)
        axis.set_ylabel(label)
        axis.legend()
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[2].set_yscale("log")
    axes[2].set_xlabel("epoch")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())


# --------------------------------------------------------------------------------------------------------------------
# Train
# --------------------------------------------------------------------------------------------------------------------


def set_aside(path):
    """Rename a file that this run did not write to the first free name, with one line that says so."""
    path = Path(path)
    free = next(p for i in range(1, 10**6) if not (p := path.with_name(f"{path.stem}.{i}{path.suffix}")).exists())
    os.rename(path, free)
    print(f"{path} was not written by this run and is kept as {free}")


def open_run(folder, architecture):
    """The id of the run whose checkpoint is in the folder, a new one if there is none; clears the way for its files."""
    record = folder / "run.json"
    run = {"id": uuid.uuid4().hex, "architecture": dataclasses.asdict(architecture)}
    fresh = not record.exists()
    if not fresh:
        try:
            run = json.loads(record.read_text())
        except ValueError:
            raise BadInput(f"{record}: cannot be read; move {folder} away to begin anew") from None
        if run["architecture"] != dataclasses.asdict(architecture):
            flags = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in run["architecture"].items())
            raise BadInput(f"{folder}: holds a run with {flags}; go on with these, or move the folder away")
    weights = Path(architecture.weights_name)
    if weights.exists():
        try:
            owner = inspect_weights(weights)[1]
        except BadInput:
            owner = ""
        if owner != run["id"]:
            set_aside(weights)
    if fresh and Path("history.csv").exists():
        set_aside("history.csv")
    folder.mkdir(parents=True, exist_ok=True)
    if fresh:
        write_bytes(record, json.dumps(run).encode())
    return run["id"]


def train(architecture, settings):
    """Train, from the last checkpoint if there is one, and write everything into the current folder."""
    keras.utils.set_random_seed(settings.seed)
    if settings.patch_size % architecture.multiple:
        raise BadInput(f"--patch-size {settings.patch_size}: must be a multiple of {architecture.multiple} (2^levels)")
    pairs, held = split_pairs(find_pairs(settings.data), settings.validation, settings.seed)
    data = Pairs(pairs, settings, architecture.n_channels, augment=True)
    check = Pairs(held, settings, architecture.n_channels, augment=False) if held else None
    for some in filter(None, (data, check)):
        some[0]  # names a pair that cannot be used before anything starts
    model = Nox(architecture, settings)
    folder = Path("checkpoint") / Path(architecture.weights_name).stem
    if settings.weights and not (folder / "run.json").exists():
        start_from(model.generator, architecture, settings.weights)
    run = open_run(folder, architecture)

    optimizer = TwoRateAdam(
        slow=model.discriminator.trainable_variables, warmup=settings.warmup, learning_rate=settings.lr,
        global_clipnorm=settings.clip or None, beta_2=0.999,
        use_ema=settings.weight_ema > 0, ema_momentum=settings.weight_ema or 0.99,
    )  # fmt: skip
    checkpoint = Checkpoint(folder)
    model.compile(optimizer=optimizer, jit_compile=False)
    optimizer.build(model.trainable_variables)  # now, or TensorFlow traces the first step twice
    start = checkpoint.restore(model)
    history = History(folder / "history.csv", Path("history.csv"), settings.ema, data.steps, start)
    monitor = "ema_val_generator" if held else "ema_generator"
    callbacks = [
        history,
        Plateau(history, monitor=monitor, patience=settings.patience, cooldown=settings.cooldown),
        Outputs(architecture, settings, run, held or pairs, history),
        checkpoint,
    ]
    print(f"{len(pairs)} pairs to train on, {len(held)} to judge by, {start} of {settings.epochs} epochs done")
    for last, model.adversarial in ((min(settings.adversarial_from, settings.epochs), False), (settings.epochs, True)):
        if start < last:
            model.compile(optimizer=optimizer, jit_compile=False)  # the step is built anew, with or without adversary
            data.start = start
            fit(model, data, check, initial_epoch=start, epochs=last, callbacks=callbacks)
            start = last


def fit(model, data, check, **options):
    """model.fit, where a pair that cannot be used is told as just that."""
    try:
        steps = {"steps_per_epoch": data.steps, "validation_steps": check and check.steps}
        model.fit(data, validation_data=check, shuffle=False, **steps, **options)
    except Exception as error:
        raise data.broken or (check and check.broken) or error from None


# --------------------------------------------------------------------------------------------------------------------
# Infer
# --------------------------------------------------------------------------------------------------------------------


def round_up(number, multiple):
    return math.ceil(number / multiple) * multiple


def tiles_along(length, settings, multiple):
    """(side of the tiles, their starts, the picture's pixel at each place along them) for one side of a picture.

    As few tiles as the patch size allows share the length evenly. The picture goes on, reflected, for half an overlap
    at each end and up to a multiple that the network takes: all tiles are of one size and no edge is the picture's.
    The answer depends on where a pixel lies in the network's grid (measured: by up to 17 steps of 8 bits): the overlap
    is rounded up, so that all tiles lie alike in it.
    """
    largest, grid = round_up(settings.patch_size, multiple), 2 * min(multiple, 32)
    overlap = min(round_up(largest - settings.stride, grid), largest - multiple)
    count = math.ceil(length / (largest - overlap))
    tile = round_up(math.ceil(length / count) + overlap, multiple)
    starts = range(0, count * (tile - overlap), tile - overlap)
    before = overlap // 2
    after = starts[-1] + tile - length - before
    return tile, starts, np.pad(np.arange(length), (before, after), mode="symmetric")


def feather(length, starts, tile, overlap):
    """Weights of each tile along one axis, shape (tiles, tile): linear ramps where two overlap, sums of 1."""
    ramp = np.minimum(1, (np.arange(tile) + 0.5) / max(overlap, 1)).astype(np.float32)
    weights = np.zeros((len(starts), tile), np.float32)
    total = np.zeros(length, np.float32)
    for weight, start in zip(weights, starts):
        weight[:] = (ramp if start else 1) * (ramp[::-1] if start != starts[-1] else 1)
        total[start : start + tile] += weight
    return np.stack([weight / total[start : start + tile] for weight, start in zip(weights, starts)])


BAND = 128  # rows that are finished at once, in double precision


def light_by_rows(generator, architecture, shape, read, settings, title=None):
    """Yield (slice of rows, light of the stars in them), from the top down; memory holds one row of tiles, not all.

    shape: the picture's. read: the function that gives the image in an index of numpy's. title: of the progress bar, or
    None. Tiles of one shape run through the network, so it is compiled once, and are blended, feathered.
    """
    axes = [tiles_along(side, settings, architecture.multiple) for side in shape[:2]]
    (high, tops, rows), (wide, lefts, columns) = axes
    down, across = (feather(len(indices), starts, tile, tile - starts.step) for tile, starts, indices in axes)
    margin = (high - tops.step) // 2
    light = np.zeros((high, len(columns), shape[2]), np.float32)  # of the tiles from top on
    size = min(settings.batch_size, len(lefts))
    with tqdm(total=len(tops) * len(lefts), desc=title, unit="tile", disable=title is None) as bar:
        for top, weight in zip(tops, down):
            waiting = list(zip(lefts, across))
            while waiting:
                batch = waiting[:size]
                tiles = [read(np.ix_(rows[top : top + high], columns[left : left + wide])) for left, _ in batch]
                full = np.stack(tiles + tiles[-1:] * (size - len(tiles)))  # every batch is of the same shape
                try:
                    starless = np.asarray(generator.predict_on_batch(full), np.float32)
                except Exception as error:  # each backend raises its own
                    if size == 1 or not re.search("[Oo]ut of memory|OOM|RESOURCE_EXHAUSTED", str(error)):
                        raise
                    size //= 2
                    continue
                for (left, share), starry, answer in zip(batch, tiles, starless):
                    light[:, left : left + wide] += (weight[:, None] * share)[..., None] * (starry - answer)
                del waiting[:size]
                bar.update(len(batch))
            end = margin + shape[0] if top == tops[-1] else top + tops.step  # later tiles add nothing above
            for first in range(max(top, margin), end, BAND):
                last = min(first + BAND, end)
                yield np.s_[first - margin : last - margin], light[first - top : last - top, margin:][:, : shape[1]]
            light = np.concatenate([light[tops.step :], np.zeros_like(light[: tops.step])])


def stellar_light(generator, architecture, image, settings):
    """The light of the stars in an image, same shape, float32; exactly 0 where the network leaves a pixel alone."""
    bands = light_by_rows(generator, architecture, image.shape, image.__getitem__, settings)
    return np.concatenate([light for _, light in bands])


def weights_for(settings, n_channels):
    """The weights file for pictures of so many channels: the named one, else the shipped one beside nox.py."""
    return Path(settings.weights) if settings.weights else Path(__file__).resolve().parent / weights_name(n_channels)


def remove_stars(picture, settings, title):
    """The picture without its stars, in its own depth and channels."""
    shape = picture.pixels.shape
    weights = weights_for(settings, shape[2])
    generator, architecture = load_generator(weights)
    if (taken := architecture.n_channels) != (given := shape[2]):
        kind = {1: "grayscale", 3: "colour"}
        raise BadInput(f"{weights}: {kind[taken]} weights, but a {kind[given]} picture; see --n-channels {taken}")
    pixels = np.empty_like(picture.pixels)
    for rows, light in light_by_rows(generator, architecture, shape, picture.image, settings, title):
        image = picture.image(rows)
        pixels[rows] = picture.without(light.clip(image - 1, image), rows)  # what remains lies in 0..1
    return Picture(pixels, picture.alpha)


def infer(image, output, overwrite, settings):
    """Write the starless picture and, where no output is named, a copy of the starry one."""
    source = Path(image)
    with silenced():  # libpng and libjpeg
        picture = read_picture(source)
    extension = {".tiff": ".tif", ".jpeg": ".jpg"}.get(source.suffix.lower(), source.suffix.lower()) or ".png"
    target = Path(output) if output else Path("starless" + extension)
    if target.is_dir():
        raise BadInput(f"{target}: is a folder; name a file with -o")
    if output and not target.suffix:
        target = target.with_name(target.name + extension)
    if target.exists() and target.samefile(source):
        raise BadInput(f"{target}: is the picture itself, which is never overwritten; name another file with -o")
    if output and target.exists() and not overwrite:
        raise BadInput(f"{target}: exists; --overwrite replaces it")
    if not target.parent.is_dir():
        raise BadInput(f"{target.parent}: no such folder")
    starry = in_channels(picture, settings.n_channels)
    try:
        encode_picture(starry.corner(), target.suffix.lower())  # told before the long work, not after it
    except BadInput as error:
        raise BadInput(f"{target}: {error}") from None
    starless = remove_stars(starry, settings, source.name)
    write_bytes(target, encode_picture(starless, target.suffix.lower()))
    copy = Path("starry" + extension)
    if not output and not (copy.exists() and copy.samefile(source)):
        grayed = starry.pixels.shape[2] < picture.pixels.shape[2]
        write_bytes(copy, encode_picture(starry, extension) if grayed else source.read_bytes())


def in_channels(picture, n_channels):
    """The picture as --n-channels has it: 1 turns colour into gray, 3 gray into colour, 0 leaves it as it is."""
    if n_channels == 3 and picture.pixels.shape[2] == 1:
        return Picture(np.repeat(picture.pixels, 3, axis=2), picture.alpha)
    return picture.gray() if n_channels == 1 else picture


def show_pair(generator, architecture, paths, settings):
    """Write input.png, output.png and gt.png of a pair; returns PSNR of input and of output against the truth."""
    starry, truth = (to_unit(pixels) for pixels in read_pair(paths, architecture.n_channels))
    if architecture.n_channels == 1:
        starry, truth = starry[..., :1], truth[..., :1]
    starless = (starry - stellar_light(generator, architecture, starry, settings)).clip(0, 1)
    for name, image in ("input.png", starry), ("output.png", starless), ("gt.png", truth):
        write_image(name, image)
    return psnr(starry, truth), psnr(starless, truth)


def infer_pair(settings):
    """Try the weights on a random pair of the data."""
    paths = random.choice(find_pairs(settings.data))
    generator, architecture = load_generator(weights_for(settings, settings.n_channels or 3))
    before, after = show_pair(generator, architecture, paths, settings)
    print(f"{paths[0]}: PSNR against {paths[1].name} {before:.2f} dB before, {after:.2f} dB after")


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


def collect(cls, values):
    """The settings of one dataclass among the command line's values."""
    return cls(**{field.name: getattr(values, field.name) for field in dataclasses.fields(cls)})


def main(values):
    """Run a parsed command; ends with one line for a mistake."""
    keras.config.set_dtype_policy("mixed_bfloat16" if values.precision == "bfloat16" else "float32")
    try:
        if values.command == "train":
            train(collect(Architecture, values), collect(Training, values))
        elif values.image is None:
            infer_pair(collect(Inference, values))
        else:
            infer(values.image, values.output, values.overwrite, collect(Inference, values))
    except BadInput as error:
        sys.exit(f"nox.py: {error}")
    except KeyboardInterrupt:
        advice = "; the same command goes on from the last epoch" if values.command == "train" else ""
        sys.exit(f"\nnox.py: interrupted{advice}")


if __name__ == "__main__":
    main(ARGUMENTS)
