"""nox.py: remove the stars from astrophotographs with a neural network, and train that network.

    python nox.py infer image.png    writes starry.png (a copy) and starless.png into the current folder
    python nox.py infer              tries the weights on a random pair of "nox data"
    python nox.py train              trains on "nox data", which GenerateStars.py makes; resumes when repeated

Convention: an image is float32 RGB (or gray), shape (height, width, channels), 0..1; lengths are pixels. OpenCV's BGR
and the files' own depths exist only in Picture, its readers and writers; the networks' -1..1 only inside the networks.

The encoder-decoder, trained with an adversary and feature matching, is StarNet's (Nikita Misiura, MIT licence); layer
normalization in it and training on synthetic stars are the original nox's (Christopher Harvey, MIT licence).
"""

import argparse
import contextlib
import dataclasses
import functools
import glob
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import threading
import uuid
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

VERSION = "1.0"

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
    levels: int = setting(0, "times the resolution is halved; 0: 6 for nox, 8 for starnet")
    n_channels: int = setting(3, "3 trains the colour network, 1 the grayscale one", choices=(1, 3))

    def __post_init__(self):
        if not self.levels:
            object.__setattr__(self, "levels", {"nox": 6, "starnet": 8}[self.network])

    @property
    def weights_name(self):
        return weights_name(self.n_channels)

    @property
    def flags(self):
        """The command line that asks for it."""
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in dataclasses.asdict(self).items())

    @property
    def multiple(self):
        """Heights and widths that the network takes are multiples of this."""
        return 2**self.levels


@dataclasses.dataclass(frozen=True)
class Training:
    data: str = setting("nox data", "folder of pairs x*.png, y*.png (starry, star-free), or with original/, starless/")
    epochs: int = setting(100, "passes over the pairs in all; a finished run goes on when it is raised")
    patch_size: int = setting(256, "side of the random crops: wide enough for the halo of a bright star")
    crops: int = setting(
        2, "crops of each pair in an epoch: those in one batch share the decoding of what does not fit the cache"
    )
    batch_size: int = setting(4, "crops a step: small ones learn more from the same pictures on a CPU")
    lr: float = setting(
        2e-4, "learning rate of the generator: 6e-4 is stable, but noisy; the discriminator's is a quarter"
    )
    clip: float = setting(1.0, "largest norm of the gradient: one odd batch must not ruin a run")
    warmup: int = setting(200, "steps over which the learning rate rises from nothing")
    l1_weight: float = setting(1.0, "weight of the absolute error, relative to that of changing nothing")
    star_weight: float = setting(
        5.0, "how much more star pixels count in it, faint ones the most; knots and galaxies a third"
    )
    texture_weight: float = setting(
        0.0, "weight of the error of the grain where stars were; 0.3 keeps plugs from being smooth"
    )
    fill_weight: float = setting(5.0, "weight of the fill's squared error: where the gate errs, no hole shall show")
    adversarial_from: int = setting(80, "epochs before the discriminator comes in; until then it costs nothing")
    adversarial_weight: float = setting(0.005, "weight of fooling the discriminator")
    feature_weight: float = setting(0.2, "weight of matching the discriminator's features")
    vgg_weight: float = setting(
        0.0, "weight of matching VGG19's features; 0: off, it needs a download or --vgg-weights"
    )
    vgg_weights: str = setting("imagenet", "file of VGG19 weights without top, or imagenet: downloaded by Keras")
    ema: float = setting(0.9999, "smoothing of the reported loss and PSNR, per step")
    weight_ema: float = setting(0.999, "averaging of the weights that are saved, per step; the average is less noisy")
    patience: int = setting(8, "epochs without a better smoothed loss before the learning rate is halved")
    cooldown: int = setting(4, "epochs to wait after that")
    validation: bool = setting(True, "hold back about a fifth of the pairs to judge by")
    save_freq: int = setting(1, "epochs between saved weights, plots and sample pictures")
    seed: int = setting(0, "seed of crops, order and split")
    cache: float = setting(2.0, "gigabytes of decoded pairs to keep in memory: decoding a PNG is most of the reading")
    workers: int = setting(2, "threads that read and augment pairs while the network runs")
    precision: str = setting(
        "float32",
        "bfloat16 is faster on GPUs and on CPUs with AMX or AVX-512 BF16, far slower with AVX2 alone",
        choices=PRECISIONS,
    )
    weights: str = setting("", "weights file to start from; colour weights can start the grayscale network")

    @property
    def loss(self):
        """{name: value} of all that the loss depends on."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name in LOSS_WEIGHTS}


LOSS_WEIGHTS = [field.name for field in dataclasses.fields(Training) if field.name.endswith("_weight")]


@dataclasses.dataclass(frozen=True)
class Inference:
    patch_size: int = setting(1024, "side of a tile: few tiles, little overlap")
    stride: int = setting(960, "step between tiles; they overlap, feathered, by the difference or a little more")
    batch_size: int = setting(1, "tiles at once; more helps GPUs only")
    n_channels: int = setting(
        0, "1 turns colour into gray first, 3 gray into colour; 0 leaves the picture as it is", choices=(0, 1, 3)
    )
    weights: str = setting("", "weights file; by default generator_color.h5 or generator_grayscale.h5 beside nox.py")
    precision: str = setting(
        "float32",
        "bfloat16 is faster on GPUs and on CPUs with AMX or AVX-512 BF16, but rounds bright stars",
        choices=PRECISIONS,
    )
    data: str = setting("nox data", "folder of pairs for a call without a picture")
    linear: str = setting(
        "auto",
        "whether the pictures are linear (not stretched); auto goes by the histogram",
        choices=("auto", "yes", "no"),
    )
    linked: bool = setting(False, "stretch the channels of linear pictures alike, which keeps colours but not balance")
    shadows: float = setting(
        -2.8, "black point of the stretch, in standard deviations of the sky from the median: little noise is clipped"
    )
    target: float = setting(0.1875, "mean of the stretched picture")
    upsample: bool = setting(False, "show the network the picture at twice its size: for stars below 2 pixels")
    second_look: bool = setting(
        True, "show the network giant stars at a third of their size, too: it takes more of them"
    )
    views: int = setting(
        1,
        "views, turned and mirrored, of which the mean is taken: 8 is best, and takes eight times as long",
        choices=(1, 2, 4, 8),
    )
    strength: float = setting(1.0, "share of the stars' light that is taken, 0..1")
    depth: str = setting("keep", "depth of what is written", choices=("keep", "8", "16", "32f"))
    star_mode: str = setting(
        "subtract",
        "how --stars and the starless picture make the input again: by adding, or by screen blending",
        choices=("subtract", "unscreen"),
    )


class BadInput(Exception):
    """A user's mistake, told in one line."""


def weights_name(n_channels):
    return "generator_color.h5" if n_channels == 3 else "generator_grayscale.h5"


OUTPUTS = {
    "stars": "the stars alone",
    "mask": "a mask of the stars, white where they were, 8 bits",
    "preview": "before and after side by side, 8 bits",
}


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
    parser.add_argument("--version", action="version", version=f"nox {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True)
    form = argparse.ArgumentDefaultsHelpFormatter
    infer = commands.add_parser("infer", help="remove the stars from a picture", formatter_class=form)
    infer.add_argument("images", nargs="*", help="pictures, folders, wildcards; without one, a random pair of the data")
    place = {"metavar": "FILE|DIR"}
    infer.add_argument("-o", "--output", help="the starless picture; then no copy of the input is made", **place)
    for name, text in OUTPUTS.items():
        infer.add_argument("--" + name, help=text, **place)
    infer.add_argument("--exclude", metavar="FILE", help="gray picture of the same size: what is white in it stays")
    infer.add_argument("--overwrite", action="store_true", help="replace files that exist")
    add_settings(infer, Inference)
    train = commands.add_parser("train", help="train the network on pairs", formatter_class=form)
    add_settings(train, Architecture, Training)
    values, more = parser.parse_known_args(arguments)
    if more and (values.command == "train" or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # argparse takes pictures from one place only; these stand behind an option
        values.images += more
    check_arguments(commands.choices[values.command], values)
    return values


def check_arguments(parser, values):
    """End with one line for a number out of range."""
    at_least = dict(patch_size=1, stride=1, batch_size=1, epochs=1, width=1, levels=0, crops=1, save_freq=1, workers=1)
    at_least |= dict(patience=1, cooldown=0, warmup=0, adversarial_from=0, seed=0, clip=0, cache=0)
    at_least |= dict.fromkeys(LOSS_WEIGHTS, 0)
    for name, least in at_least.items():
        if not least <= getattr(values, name, least) < 2**31:  # nor not-a-number
            parser.error(f"--{name.replace('_', '-')} must be at least {least} and below 2^31")
    for name in ("ema", "weight_ema"):
        if not 0 <= getattr(values, name, 0) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 0 and below 1")
    if not 0 < getattr(values, "lr", 1) <= 1:
        parser.error("--lr must be above 0 and at most 1")
    if not 0 < getattr(values, "target", 0.5) < 1:
        parser.error("--target must be between 0 and 1")
    if not 0 <= getattr(values, "strength", 1) <= 1:
        parser.error("--strength must be between 0 and 1")
    if not -100 <= getattr(values, "shadows", 0) <= 100:
        parser.error("--shadows must be between -100 and 100")
    if values.command == "infer" and not values.images:
        for name in ("output", *OUTPUTS, "exclude", "overwrite", "linear", "linked", "shadows", "target", "depth", "star_mode"):  # fmt: skip
            if getattr(values, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} needs a picture; none is named")
    if values.command == "infer" and values.stride > values.patch_size:
        parser.error("--stride must not exceed --patch-size, or tiles would leave gaps")


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # answers --help and mistakes before Keras takes its seconds to load
    INTERRUPTED = signal.getsignal(signal.SIGINT)
    if INTERRUPTED is signal.default_int_handler:  # heeded: until Keras is there without a traceback of its insides
        signal.signal(signal.SIGINT, signal.SIG_DFL)

if sys.stderr is None:  # closed, or Windows without a console
    while (descriptor := os.open(os.devnull, os.O_WRONLY)) < 2:
        pass  # standard output is closed, too
    sys.stderr = open(descriptor, "w")  # noqa: SIM115
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


try:
    with silenced():
        import keras
        from keras import layers, ops
except (ImportError, ValueError) as error:  # of a backend that is not there, or is none
    if __name__ != "__main__":
        raise
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    sys.exit(f"nox.py: Keras does not load with KERAS_BACKEND={backend}: {' '.join(str(error).split())}")

if keras.backend.backend() == "openvino":
    import openvino

    # by itself it computes in bfloat16 where the CPU can: local contrast, too, and then stars stay (31 steps of 8 bits)
    openvino.compile_model = functools.partial(openvino.compile_model, config={"INFERENCE_PRECISION_HINT": "f32"})

# --------------------------------------------------------------------------------------------------------------------
# Pictures: pixels in the file's own units, images for the network
# --------------------------------------------------------------------------------------------------------------------


def bands(stop, start=0, rows=64):
    """Slices that cover the rows up to stop: what is computed in float64 never needs a whole picture of it."""
    return (slice(first, min(first + rows, stop)) for first in range(start, stop, rows))


def brightest(pixels):
    """The largest finite pixel, at least 1: what stands for white where the type has no range of its own."""
    return max(
        [1.0, *(float(pixels[rows].max(initial=1, where=np.isfinite(pixels[rows]))) for rows in bands(len(pixels)))]
    )


@dataclasses.dataclass
class Picture:
    """A picture as its file holds it: pixels of shape (height, width, 1 or 3) in RGB and their alpha, or None.

    black, white: the pixels that stand for 0 and 1. Without a white it is an integer's largest; of float pixels 1, or
    the brightest if above 1. blank: the integer of a missing pixel, if there is one. metadata: icc, exif and xmp
    (bytes, as every format has them), and under a format's name what only that format can hold.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    metadata: dict = dataclasses.field(default_factory=dict)
    black: float = 0.0
    white: float | None = None
    blank: int | None = None

    def __post_init__(self):
        if self.white is None:
            integer = self.pixels.dtype.kind in "ui"
            self.white = float(np.iinfo(self.pixels.dtype).max) if integer else brightest(self.pixels)

    def with_pixels(self, pixels):
        return dataclasses.replace(self, pixels=pixels)

    def noting(self, history):
        """The picture with a line on what was done to it, for formats that have a place for that."""
        return dataclasses.replace(self, metadata=self.metadata | {"history": history})

    def unit(self, rows=slice(None)):
        """Some rows in float64, black at 0 and white at 1; not clipped, missing pixels stay missing."""
        values = self.pixels[rows].astype(np.float64)
        if self.blank is not None:
            values[self.pixels[rows] == self.blank] = np.nan
        return (values - self.black) / (self.white - self.black)

    def image(self, stretch=None):
        """The picture as an image: missing pixels are 0; clipped to 0..1, or stretched."""
        image = np.empty(self.pixels.shape, np.float32)
        for rows in bands(len(image)):
            x = np.nan_to_num(self.unit(rows), posinf=0, neginf=0)
            image[rows] = stretch.forward(x) if stretch else x.clip(0, 1)
        return image

    def rounded(self, values):
        """float64 values as they are stored: an integer type rounds and, whatever it is given, does not wrap."""
        if self.pixels.dtype.kind in "ui":
            limits = np.iinfo(self.pixels.dtype)
            values = np.rint(values).clip(limits.min, np.nextafter(float(limits.max) + 1, 0))
        return values.astype(self.pixels.dtype)

    def without(self, light, stretch=None, rows=slice(None)):
        """Some rows of pixels less the light taken from them (an image); where that is 0, the very same bits.

        stretch: the one under which the light was seen, or None. Pixels that it clipped stay as they are, missing and
        without a stretch negative ones too. What is taken away leaves nothing below black, or below the shadows where
        these are negative, what is filled in nothing above white.
        """
        pixels, x, taken = self.pixels[rows], self.unit(rows), light.astype(np.float64)
        touched = (taken != 0) & np.isfinite(x) & (stretch.keeps(x) if stretch else x >= 0)
        darkest = self.black
        if stretch:
            taken = x - stretch.inverse(stretch.forward(x) - taken)
            darkest = darkest + np.minimum(stretch.shadows, 0) * (self.white - self.black)
        low, high = np.minimum(darkest, self.white), np.maximum(darkest, self.white)
        less = pixels - np.where(touched, taken, 0) * (self.white - self.black)
        less = less.clip(np.minimum(pixels, low), np.maximum(pixels, high))
        return np.where(touched, self.rounded(np.where(touched, less, low)), pixels)

    def in_depth(self, dtype, from_zero=False):
        """The picture in another type of pixels: integers span its black to white, floats keep their values.

        from_zero: for a format that cannot say that black is another pixel than 0.
        """
        new, old = np.dtype(dtype), self.pixels.dtype
        moved = from_zero and self.black != 0
        if new == old and not moved:
            return self
        if new.kind == old.kind == "f" and not moved:
            return dataclasses.replace(self, pixels=self.pixels.astype(new), alpha=as_type(self.alpha, new))
        white = float(np.iinfo(new).max) if new.kind in "ui" else 1.0
        scaled = np.empty(self.pixels.shape, new)
        for rows in bands(len(scaled)):
            values = self.unit(rows) * white  # missing integers become NaN, as floats have it
            if new.kind in "ui":
                values = np.rint(np.nan_to_num(values, posinf=white, neginf=0).clip(0, white))
            scaled[rows] = values
        alpha = as_type(self.alpha, new)
        return dataclasses.replace(self, pixels=scaled, alpha=alpha, black=0.0, white=white, blank=None)

    def gray(self):
        """The luminance (ITU-R BT.601) of a colour picture, as a picture of one channel."""
        if self.pixels.shape[2] == 1:
            return self
        gray = self.rounded(self.pixels.astype(np.float64) @ np.array([[0.299], [0.587], [0.114]]))
        if self.blank is not None:
            gray[(self.pixels == self.blank).any(axis=2)] = self.blank
        return self.with_pixels(gray)


def as_type(alpha, dtype):
    """An alpha channel in another type of pixels."""
    return None if alpha is None else Picture(alpha[..., None]).in_depth(dtype).pixels[..., 0]


# --------------------------------------------------------------------------------------------------------------------
# Linear data: stretched for the network, and back
# --------------------------------------------------------------------------------------------------------------------


def midtones_transfer(x, m):
    """Midtones transfer function (PixInsight's): maps m to 0.5, keeps 0 and 1; its inverse has 1 - m for m."""
    return (m - 1) * x / ((2 * m - 1) * x - m)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Linear values, 0..1, to display values and back, channel by channel: shadows are clipped, midtones raised."""

    shadows: np.ndarray
    midtones: np.ndarray

    def forward(self, x):
        return midtones_transfer(((x - self.shadows) / (1 - self.shadows)).clip(0, 1), self.midtones)

    def inverse(self, y):
        return self.shadows + (1 - self.shadows) * midtones_transfer(y, 1 - self.midtones)

    def keeps(self, x):
        """Which values come back: those that are not clipped."""
        return (x > self.shadows) & (x <= 1)


def sample(picture, count=2**17):
    """Some pixels of a picture in units of white, spread over it, shape (n, channels).

    Without missing ones and the black border of registered pictures; zeros if there are no others.
    """
    pixels = picture.pixels.reshape(-1, 1, picture.pixels.shape[2])
    values = picture.with_pixels(pixels[:: -(-len(pixels) // count)]).unit()[:, 0]
    values[:, ~np.isfinite(values).any(axis=0)] = 0  # a channel that is missing as a whole, as the image has it
    inside = np.isfinite(values).all(axis=1) & values.any(axis=1)
    return values[inside].clip(max=1) if inside.any() else np.zeros((1, values.shape[1]))


def fit_stretch(picture, shadows, target, linked):
    """The stretch of a linear picture whose display values have the mean target in each channel, or more: none darkens.

    shadows: black point in standard deviations of the sky from the median, negative only where pixels are: the sky
    that is left when its level was subtracted. That of the whole histogram would be one of the stars, and clip half of
    such a sky. linked: one stretch for all channels together.
    """
    from astropy.stats import mad_std

    values = sample(picture)
    values = values.reshape(-1, 1) if linked else values
    deviation = mad_std(values, axis=0)  # 0 where most pixels are of one value
    deviation = np.where(deviation > 0, deviation, values.std(axis=0))
    lowest = np.quantile(values, 0.001, axis=0).clip(max=0)  # not the minimum: one odd pixel says nothing
    black = np.maximum(lowest, np.median(values, axis=0) + shadows * deviation)
    black = np.where(black < values.max(axis=0), black, 0)  # of a constant picture nothing would be left
    low, high = np.full_like(black, -20), np.full_like(black, -1)  # log2 of the midtones; the mean falls with them
    for _ in range(40):
        middle = (low + high) / 2
        too_dark = Stretch(black, 2**middle).forward(values).mean(axis=0) < target
        low, high = np.where(too_dark, low, middle), np.where(too_dark, middle, high)
    return Stretch(black, 2**high)


def looks_linear(picture):
    """Whether the histogram is one of linear data: nine tenths of each channel's pixels within 5% of the range.

    Stretching widens the sky's share of the range to several times that. Of a crowded field they may take 10%, if
    the range is empty for as much below them, where a stretch would have put its black point, and the stars reach five
    times as high. What has 8 bits has been stretched.
    """
    low, high, top = np.quantile(sample(picture), (0.05, 0.95, 0.999), axis=0)
    spread = high - low
    crowded = (spread < 0.1) & (spread < low) & (5 * spread < top - low)
    return picture.pixels.dtype.itemsize > 1 and bool(np.all((spread < 0.05) | crowded))


# --------------------------------------------------------------------------------------------------------------------
# Picture files: each format's reader and writer; tifffile, astropy and xisf are loaded by those who need them
# --------------------------------------------------------------------------------------------------------------------


def from_channels(pixels, **fields):
    """A picture from an array of shape (height, width) or (height, width, 1 to 4), colour in RGB, alpha last."""
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    channels = pixels.shape[2]
    if channels > 4 or pixels.dtype.kind not in "uif" or 0 in pixels.shape:
        raise BadInput(f"{channels} channels of {pixels.dtype} are not a picture that can be read")
    alpha = pixels[..., -1] if channels in (2, 4) else None
    color = pixels[..., : channels - (alpha is not None)]
    return Picture(np.ascontiguousarray(color, pixels.dtype.newbyteorder("=")), alpha, **fields)


def with_alpha(picture):
    """All channels in one array: (height, width) for gray, else (height, width, 2 to 4)."""
    if picture.alpha is not None:
        return np.dstack([picture.pixels, picture.alpha])
    return picture.pixels[..., 0] if picture.pixels.shape[2] == 1 else picture.pixels


def reordered(pixels, order):
    """A copy with the channels in another order, ten times as fast as by an index; pixels of a type OpenCV knows."""
    result = np.empty(pixels.shape, pixels.dtype)
    cv2.mixChannels([pixels], [result], [int(c) for place in enumerate(order) for c in reversed(place)])
    return result


def swapped(pixels):
    """RGB with or without alpha for OpenCV's BGR, or the other way round; gray as it is."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    return reordered(pixels, [2, 1, 0, 3][:channels]) if channels > 2 else pixels


def decode(data):
    """Pixels of the bytes of a picture file, shape (height, width[, channels]), colour in RGB."""
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise BadInput("not a picture that can be read")
    for rows in bands(len(pixels)):  # in place, since it may be large
        pixels[rows] = swapped(pixels[rows])
    return pixels


def encode(pixels, extension, options=()):
    """The bytes of a file of that extension that holds such pixels, as a memoryview."""
    done, data = cv2.imencode(extension, swapped(pixels), options)
    if not done:
        raise ValueError("too large for this format")
    return data.data


def profile(picture):
    """The ICC profile, if it is of the kind of picture that this is (still): one for colour says nothing of gray."""
    icc = picture.metadata.get("icc", b"")
    return icc if icc[16:20] == {1: b"GRAY", 3: b"RGB "}[picture.pixels.shape[2]] else b""


# -- PNG

PNG_SIGNATURE, PNG_GRAY_ALPHA, PNG_XMP = b"\x89PNG\r\n\x1a\n", 4, b"XML:com.adobe.xmp"
PNG_KEPT = b"gAMA", b"cHRM", b"sRGB", b"cICP", b"pHYs", b"tEXt", b"zTXt", b"iTXt", b"tIME"


def png_chunks(data):
    """(name, content) of each chunk of a PNG file's bytes."""
    position = len(PNG_SIGNATURE)
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        yield name, bytes(data[position + 8 : position + 8 + length])
        position += 12 + length


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def read_png(path, _):
    data = np.fromfile(path, np.uint8)  # cv2.imread cannot open non-ASCII names on Windows
    pixels, metadata = decode(data), {"png": []}
    for name, content in png_chunks(memoryview(data)):
        with contextlib.suppress(zlib.error, ValueError, IndexError):  # what is damaged is left out
            if name == b"iCCP":  # name, zero, method, deflated profile
                metadata["icc"] = zlib.decompress(content[content.index(0) + 2 :])
            elif name == b"eXIf":
                metadata["exif"] = content
            elif name == b"iTXt" and content.startswith(PNG_XMP + b"\0"):
                deflated, (_, _, text) = content[len(PNG_XMP) + 1], content[len(PNG_XMP) + 3 :].split(b"\0", 2)
                metadata["xmp"] = zlib.decompress(text) if deflated else text
            elif name in PNG_KEPT:
                metadata["png"].append((name, content))
            elif name == b"tRNS" and data[24] >= 8 and data[25] == 0:  # one gray is transparent; OpenCV ignores it
                opaque = pixels != int.from_bytes(content[:2], "big")
                pixels = np.dstack([pixels, np.iinfo(pixels.dtype).max * opaque.astype(pixels.dtype)])
    if data[25] == PNG_GRAY_ALPHA and pixels.ndim == 3 and pixels.shape[2] == 4:
        pixels = pixels[..., 2:]  # OpenCV repeats gray to three channels
    return from_channels(pixels, metadata=metadata)


def write_png(picture, path):
    pixels, metadata = with_alpha(picture), picture.metadata
    chunks = list(metadata.get("png", []))
    if icc := profile(picture):
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)))
    if exif := metadata.get("exif"):
        chunks.append((b"eXIf", exif))
    if xmp := metadata.get("xmp"):
        chunks.append((b"iTXt", PNG_XMP + bytes(5) + xmp))
    data = encode_gray_alpha(pixels) if pixels.ndim == 3 and pixels.shape[2] == 2 else encode(pixels, ".png")
    header = len(PNG_SIGNATURE) + 25  # IHDR comes first
    with open(path, "wb") as file:
        file.writelines([data[:header], *(png_chunk(*chunk) for chunk in chunks), data[header:]])


def encode_gray_alpha(pixels):
    """The bytes of a PNG file of gray and alpha, shape (height, width, 2), which OpenCV reads but does not write."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, PNG_GRAY_ALPHA, 0, 0, 0)
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(height, -1)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))  # 0: a row without filter
    return PNG_SIGNATURE + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


# -- JPEG

JPEG_EXIF, JPEG_XMP, JPEG_ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"
JPEG_KEPT = 0xE0, 0xE1, 0xED, 0xFE  # JFIF's resolution, the rest of a long XMP packet, IPTC, comment
JPEG_SEGMENT = 65533  # bytes that fit


def jpeg_segments(data):
    """(marker, content) of each segment of a JPEG file's bytes before the picture itself."""
    position = 2
    while data[position] == 0xFF and data[position + 1] != 0xDA:
        if data[position + 1] == 0xFF:  # any number of these may stand before a marker
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        yield data[position + 1], bytes(data[position + 4 : position + 2 + length])
        position += 2 + length


def read_jpeg(path, _):
    data = np.fromfile(path, np.uint8)
    pixels, metadata, icc = decode(data), {"jpeg": []}, {}
    for marker, content in jpeg_segments(data.tobytes()):
        if content.startswith(JPEG_EXIF):
            metadata["exif"] = content.removeprefix(JPEG_EXIF)
        elif content.startswith(JPEG_XMP):
            metadata["xmp"] = content.removeprefix(JPEG_XMP)
        elif content.startswith(JPEG_ICC):
            icc[content[len(JPEG_ICC)]] = content[len(JPEG_ICC) + 2 :]  # number of this part, number of parts, part
        elif marker in JPEG_KEPT:
            metadata["jpeg"].append((marker, content))
    metadata["icc"] = b"".join(icc[part] for part in sorted(icc))
    return from_channels(pixels, metadata=metadata)


def write_jpeg(picture, path):
    quality = [cv2.IMWRITE_JPEG_QUALITY, 100, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    data, metadata = encode(with_alpha(picture), ".jpg", quality), picture.metadata
    kept = metadata.get("jpeg", [])
    first, jfif = next(jpeg_segments(data))
    segments = [s for s in kept if s[0] == first] or [(first, jfif)]
    segments += [
        (0xE1, head + metadata[name]) for name, head in (("exif", JPEG_EXIF), ("xmp", JPEG_XMP)) if metadata.get(name)
    ]
    icc, step = profile(picture), JPEG_SEGMENT - len(JPEG_ICC) - 2
    parts = [icc[start : start + step] for start in range(0, len(icc), step)]
    segments += [(0xE2, JPEG_ICC + bytes([i + 1, len(parts)]) + part) for i, part in enumerate(parts)]
    segments += [s for s in kept if s[0] != first]
    head = [
        struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
        for marker, content in segments
        if len(content) <= JPEG_SEGMENT
    ]
    with open(path, "wb") as file:
        file.writelines([data[:2], *head, data[6 + len(jfif) :]])


# -- TIFF

TIFF_XMP, TIFF_ICC = 700, 34675
NEUTRAL = {338: 0, 274: 1}  # what is alpha, orientation: OpenCV would multiply by the one and turn by the other
EXIF_FOLDERS = 34665, 34853  # EXIF and GPS: tags whose value is a list of tags
EXIF_TAGS = 271, 272, 274, 305, 306, 315, 33432  # maker, model, orientation, software, date, artist, copyright
# what says how the pixels lie in the file, which the writer decides, and what is kept under another name
TIFF_STRUCTURE = {*range(254, 260), 262, 266, 273, *range(277, 285), 288, 289, 292, 293, 296, 317, 320}
TIFF_STRUCTURE |= {*range(322, 326), 330, *range(338, 342), 347, *range(512, 522), *range(529, 533)}
TIFF_STRUCTURE |= {50838, 50839}  # ImageJ's, which describe its stacks in a way of their own
TIFF_STRUCTURE |= {TIFF_XMP, TIFF_ICC, *EXIF_FOLDERS}


def read_tiff(path, _):
    import tifffile

    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        if page.is_reduced and (len(tif.pages) > 1 or page.subifds):
            raise BadInput("begins with a reduced picture, as camera raw files do; convert it to a plain TIFF")
        gray_or_rgb = int(page.photometric) in (0, 1, 2)  # white is zero, black is zero, RGB
        try:
            pixels = page.asarray() if gray_or_rgb else None  # a palette, YCbCr
        except (ValueError, ImportError) as error:
            if isinstance(error, ValueError) and "imagecodecs" not in str(error):
                raise
            pixels = None  # LZW and the like: a package of 20 MB, while OpenCV is here
        if pixels is None:
            pixels = decode_tiff(path, tif, gray_or_rgb)
        elif page.axes == "SYX":
            pixels = np.moveaxis(pixels, 0, -1)
        tags = [(t.code, int(t.dtype), t.count, t.value, True) for t in page.tags if t.code not in TIFF_STRUCTURE]
        native = {"tags": tags, "byteorder": tif.byteorder, "bigtiff": tif.is_bigtiff, "alpha": page.extrasamples}
        if 282 in page.tags and 283 in page.tags:
            native["resolution"] = (page.tags[282].value, page.tags[283].value)
            native["unit"] = int(page.tags[296].value) if 296 in page.tags else 2
        native |= {"planarconfig": int(page.planarconfig), "deflate": int(page.compression) != 1}
        metadata = {"tiff": native, "exif": exif_of_tiff(tif)}
        metadata |= {
            k: bytes(page.tags[code].value) for k, code in (("icc", TIFF_ICC), ("xmp", TIFF_XMP)) if code in page.tags
        }
        picture = from_channels(pixels, metadata=metadata)
        if gray_or_rgb and page.photometric == 0:
            picture.black, picture.white = picture.white, picture.black
        return picture


def decode_tiff(path, tif, gray_or_rgb):
    """Pixels of a TIFF file's first page as OpenCV reads them; raises BadInput where it would lose some of them."""
    page, data = tif.pages[0], np.fromfile(path, np.uint8)
    positive = {262: 1} if page.photometric == 0 else {}  # it would invert 8 bits of white is zero, but not 16
    for code, neutral in (NEUTRAL | positive).items():
        if tag := page.tags.get(code):
            data[tag.valueoffset : tag.valueoffset + 2] = list(struct.pack(tif.byteorder + "H", neutral))
    compression = getattr(page.compression, "name", page.compression)
    try:
        pixels = decode(data)
    except BadInput as error:
        raise BadInput(f"{error}; its compression is {compression}") from None
    planes = page.planarconfig == 2 and page.samplesperpixel > 1
    fewer = gray_or_rgb and pixels[0, 0].size < page.samplesperpixel
    if planes or fewer or 8 * pixels.itemsize < page.bitspersample:
        raise BadInput(f"of this kind ({compression}) it cannot be read whole; save it as RGB or gray, uncompressed")
    return pixels


def exif_of_tiff(tif):
    """The EXIF and GPS tags of a TIFF file, and those of its own that say the same, as other formats hold EXIF."""
    from PIL import Image, TiffImagePlugin

    tags, exif, file = tif.pages[0].tags, Image.Exif(), tif.filehandle
    for code in (code for code in EXIF_FOLDERS if code in tags):
        folder = TiffImagePlugin.ImageFileDirectory_v2(tiff_magic(tif), group=code)
        file.seek(tags[code].offset + (12 if tif.is_bigtiff else 8))
        file.seek(struct.unpack(tif.byteorder + "L", file.read(4))[0])  # tifffile has the folder's tags, but no types
        folder.load(file)
        exif.get_ifd(code).update(folder)
    exif.update({code: tags[code].value for code in EXIF_TAGS if code in tags})
    return exif.tobytes().removeprefix(JPEG_EXIF) if exif or exif._ifds else b""


def tiff_magic(tif):
    """What a TIFF file of this kind begins with; Pillow tells the kind by it."""
    order = {"<": b"II", ">": b"MM"}[tif.byteorder]
    return order + (
        struct.pack(tif.byteorder + "HLQ", 43, 0, 0) if tif.is_bigtiff else struct.pack(tif.byteorder + "HL", 42, 0)
    )


def write_tiff(picture, path):
    import tifffile

    pixels, metadata = with_alpha(picture), picture.metadata
    native = metadata.get("tiff", {})
    exif, folders = exif_for_tiff(metadata.get("exif", b""))
    tags = {tag[0]: tag for tag in exif + native.get("tags", [])}
    if metadata.get("xmp"):
        tags[TIFF_XMP] = (TIFF_XMP, 1, len(metadata["xmp"]), metadata["xmp"], True)
    for code in folders:  # tifffile refuses to write these tags: they get their number, and their value, afterwards
        tags[code - 1] = (code - 1, 4, 1, 0, True)
    planar = native.get("planarconfig") == 2 and picture.pixels.shape[2] == 3
    deflate = {"compression": "zlib", "predictor": pixels.dtype.kind in "ui"} if native.get("deflate") else {}
    tifffile.imwrite(
        path,
        np.moveaxis(pixels, -1, 0) if planar else pixels,
        photometric="rgb" if picture.pixels.shape[2] == 3 else "miniswhite" if picture.white < picture.black else "minisblack",
        planarconfig=None if pixels.ndim == 2 else "separate" if planar else "contig",
        extrasamples=None if picture.alpha is None else native.get("alpha", ["unassalpha"]) or ["unspecified"],
        byteorder=native.get("byteorder"),
        bigtiff=native.get("bigtiff") or None,
        resolution=native.get("resolution"),
        resolutionunit=native.get("unit"),
        iccprofile=profile(picture) or None,
        metadata=None,
        software=False,
        extratags=[(code, kind, count, value.encode() if isinstance(value, str) else value, once) for code, kind, count, value, once in tags.values()],
        **deflate,
    )  # fmt: skip
    if folders:
        add_exif_folders(path, folders)


def exif_for_tiff(exif):
    """(tags of a TIFF's own that EXIF bytes hold, {folder: its tags}) of a picture's EXIF."""
    from PIL import Image

    found = Image.Exif()
    try:
        if exif:
            found.load(exif)
        folders = {code: tags for code in EXIF_FOLDERS if (tags := dict(found.get_ifd(code)))}
    except Exception:  # Pillow has several for bytes that are damaged: then there is nothing to keep
        return [], {}
    texts = {tag: found[tag] for tag in EXIF_TAGS if tag in found}
    own = [(t, 3, 1, v, True) if isinstance(v, int) else (t, 2, 0, str(v), True) for t, v in texts.items()]
    return own, folders


def add_exif_folders(path, folders):
    """Put the EXIF and GPS tags at the end of a TIFF file, whose placeholders then point there."""
    import tifffile
    from PIL import TiffImagePlugin

    with tifffile.TiffFile(path, mode="r+b") as tif:
        end, file = tif.filehandle.size, tif.filehandle
        for code, values in folders.items():
            folder = TiffImagePlugin.ImageFileDirectory_v2(tiff_magic(tif), group=code)
            for tag, value in values.items():
                folder[tag] = value
            start = end + end % 2
            placeholder, data = tif.pages[0].tags[code - 1], folder.tobytes(start)
            placeholder.overwrite(start)
            for position, content in (placeholder.offset, struct.pack(tif.byteorder + "H", code)), (start, data):
                file.seek(position)
                file.write(content)
            end = start + len(data)


# -- FITS: the first row is the lowest, unless ROWORDER says otherwise

# BZERO by BITPIX: how FITS stores signed bytes and other unsigned integers
OTHER_SIGN = {8: -128, 16: 2**15, 32: 2**31, 64: 2**63}


def read_fits(path, number):
    """number: of the HDU; None takes the first with a picture. Scaled integers stay as stored, for the very bits."""
    from astropy.io import fits

    options = {"memmap": False, "ignore_blank": True}
    with fits.open(path, **options) as file:
        pictures = [i for i, hdu in enumerate(file) if hdu.is_image and hdu.header.get("NAXIS", 0) >= 2]
        chosen = next((i for i in pictures if number in (None, i)), None)
        if chosen is None:
            raise BadInput("holds no picture" if number is None else f"HDU {number} is not a picture")
        header = file[chosen].header.copy()
        bits, scale, zero = header["BITPIX"], header.get("BSCALE", 1), header.get("BZERO", 0)
        scaled = bits > 0 and (scale, zero) not in ((1, 0), (1, OTHER_SIGN[bits]))
        # of a packed picture astropy turns integers into floats for the sake of BLANK, whatever it is told
        as_stored = scaled or (bits > 0 and zero == 0 and "BLANK" in header)
        data = file[chosen].data if not as_stored else None
    if as_stored:
        with fits.open(path, do_not_scale_image_data=True, **options) as file:
            data = file[chosen].data
    planes = data.reshape(-1, *data.shape[-2:])
    if len(planes) not in (1, 3):
        raise BadInput(f"HDU {chosen} holds {len(planes)} planes; gray and RGB (3) can be read")
    top_down = str(header.get("ROWORDER", "")).strip().upper() == "TOP-DOWN"
    pixels = np.moveaxis(planes if top_down else planes[:, ::-1], 0, -1)
    native = {"path": path, "number": chosen, "shape": data.shape, "top_down": top_down}
    picture = from_channels(pixels, metadata={"fits": native})
    if bits > 0 and "BLANK" in header:  # as stored, while astropy has moved integers of the other sign
        picture.blank = header["BLANK"] + (0 if scaled else round(zero))
    if scaled:
        native |= {"scaling": {"BSCALE": scale, "BZERO": zero}, "type": picture.pixels.dtype}
        known = picture.pixels[picture.pixels != picture.blank]
        ends = [zero + scale * float(end) for end in ((known.min(), known.max()) if known.size else (0, 1))]
        picture.black, picture.white = -zero / scale, (max(1, *ends) - zero) / scale
    elif picture.pixels.dtype.kind == "i":  # counts, not a range to be filled
        picture.white = brightest(np.where(picture.pixels == picture.blank, 0, picture.pixels))
    return picture


def write_fits(picture, path, compress=False):
    """The other HDUs of the file that the picture came from are written along."""
    from astropy.io import fits

    native = picture.metadata.get("fits", {"number": 0, "shape": (), "top_down": False})
    planes = np.moveaxis(picture.pixels, -1, 0)
    planes = planes if native["top_down"] else planes[:, ::-1]
    same_shape = np.prod(native["shape"]) == planes.size
    planes = planes.reshape(native["shape"]) if same_shape else planes[0] if len(planes) == 1 else planes
    with contextlib.ExitStack() as stack, warnings.catch_warnings(action="ignore"):
        hdus = [fits.PrimaryHDU()]
        header, number = fits.Header({"ROWORDER": "BOTTOM-UP"}), native["number"]
        if native.get("path"):
            hdus = [*stack.enter_context(fits.open(native["path"], memmap=False))]
            header = hdus[number].header.copy()
            gone = ["BLANK"] if picture.blank is None else []
            for key in "CHECKSUM", "DATASUM", *gone:  # of the pixels before
                header.remove(key, ignore_missing=True)
        if history := picture.metadata.get("history"):
            header.add_history(history)
        as_stored = "scaling" in native and native["type"] == planes.dtype
        if compress:  # by default lossy for floats, and 32 bits of 64
            lossless = planes.dtype.kind == "f" or planes.dtype.itemsize == 8
            options = {"compression_type": "GZIP_2", "quantize_level": 0} if lossless else {}
            written = fits.CompImageHDU(planes, header, **options)
            hdus[number : number + 1] = [fits.PrimaryHDU()] * (number == 0) + [written]
        else:
            kind = fits.ImageHDU if number else fits.PrimaryHDU
            written = hdus[number] = kind(planes, header, do_not_scale_image_data=as_stored)
        if as_stored:
            written.header.update(native["scaling"])
        fits.HDUList(hdus).writeto(path, output_verify="silentfix+ignore")  # cameras write cards against the standard


def write_gzipped_fits(picture, path):
    with open(path, "wb") as plain, gzip.GzipFile("", "wb", fileobj=plain) as file:  # without the temporary name
        write_fits(picture, file)


# -- XISF


def xisf_package():
    try:
        import xisf
    except ImportError:
        raise BadInput("XISF files need a package: pip install xisf") from None
    return xisf.XISF


def read_xisf(path, _):
    file = xisf_package()(path)
    image = file.get_images_metadata()[0]
    native = {"image_metadata": image, "xisf_metadata": file.get_file_metadata()}
    return from_channels(file.read_image(0), metadata={"xisf": native})


def write_xisf(picture, path):
    native = picture.metadata.get("xisf", {})
    xisf_package().write(str(path), picture.pixels, creator_app="nox", **native)
    bounds = native.get("image_metadata", {}).get("bounds") or f"0:{brightest(picture.pixels):.17g}"
    if picture.pixels.dtype.kind == "f" and bounds != "0:1":
        set_bounds(path, bounds.encode())


def set_bounds(path, bounds):
    """Put the bounds of floats into a XISF file's header, for which the package has 0:1, and before the padding room."""
    with open(path, "r+b") as file:
        begin, length = struct.unpack("<8sI4x", file.read(16))
        header = file.read(length)
        changed = re.sub(b'bounds="[^"]*"', b'bounds="%s"' % bounds, header, count=1)
        first = min(int(start) for start in re.findall(b"attachment:([0-9]+):", header))
        if 16 + len(changed) > first:
            raise ValueError("no room for the bounds of its floats")
        file.seek(0)
        file.write(struct.pack("<8sI4x", begin, len(changed)) + changed.ljust(first - 16, b"\0"))


# -- all


def read_other(path, _):
    return from_channels(decode(np.fromfile(path, np.uint8)))


def write_bmp(picture, path):
    Path(path).write_bytes(encode(with_alpha(picture), ".bmp"))


@dataclasses.dataclass(frozen=True)
class Format:
    """A picture file format: how it begins, how it is read and written, and what it holds."""

    begins: tuple
    read: Callable
    write: Callable
    depths: str  # types of pixels; a picture of another type is turned into the first of them
    alpha: bool = False
    own: str = ""  # name of the metadata that only it can hold; with them, whatever pixel stood for black

    def depth_for(self, dtype, wanted="keep"):
        """The type of pixels written for a picture of a type: the wanted one, or its own if the format has it."""
        name = {"8": "uint8", "16": "uint16", "32f": "float32", "keep": str(dtype)}[wanted]
        if name in self.depths.split():
            return name
        if wanted != "keep":
            raise BadInput(f"this format cannot hold --depth {wanted}")
        return self.depths.split()[0]

    def stored(self, picture, wanted="keep"):
        """The picture as the format holds it, in the wanted depth."""
        return picture.in_depth(self.depth_for(picture.pixels.dtype, wanted), self.own not in picture.metadata)


INTEGERS = "uint16 uint8 uint32 int8 int16 int32"
PNG = Format((PNG_SIGNATURE,), read_png, write_png, "uint16 uint8", alpha=True, own="png")
JPEG = Format((b"\xff\xd8\xff",), read_jpeg, write_jpeg, "uint8", own="jpeg")
TIFF_BEGINS = b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"
TIFF = Format(TIFF_BEGINS, read_tiff, write_tiff, f"float32 {INTEGERS} float16 float64", alpha=True, own="tiff")
FITS = Format((b"SIMPLE  =",), read_fits, write_fits, f"float32 {INTEGERS} int64 uint64 float64", own="fits")
GZIPPED_FITS = dataclasses.replace(FITS, begins=(b"\x1f\x8b",), write=write_gzipped_fits)
PACKED_FITS = dataclasses.replace(FITS, begins=(), write=functools.partial(write_fits, compress=True))
XISF = Format((b"XISF0100",), read_xisf, write_xisf, "float32 uint8 uint16 uint32 float64", own="xisf")
BMP = Format((b"BM",), read_other, write_bmp, "uint8")
FORMATS = {".png": PNG, ".jpg": JPEG, ".jpeg": JPEG, ".tif": TIFF, ".tiff": TIFF, ".xisf": XISF, ".bmp": BMP}
FORMATS |= dict.fromkeys((".fits", ".fit", ".fts"), FITS) | dict.fromkeys((".fits.gz", ".fit.gz"), GZIPPED_FITS)
FORMATS |= dict.fromkeys((".fits.fz", ".fit.fz", ".fz"), PACKED_FITS)


def read_picture(path):
    """The picture in a file, in whatever format; FILE.fits[n] names an HDU of a FITS file.

    Raises BadInput with the file's name and the reason.
    """
    path, number = picture_file(path)
    if path.is_dir():
        raise BadInput(f"{path}: is a folder, not a picture")
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if not start:
        raise BadInput(f"{path}: the file is empty")
    read = next((f.read for f in FORMATS.values() if start.startswith(f.begins)), read_other)
    try:
        return read(path, number)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    except Exception as error:  # each library has its own for a file that is broken
        raise BadInput(f"{path}: not a picture that can be read ({first_line(error)})") from None


def format_of(path):
    """The format of a name's extension; raises BadInput when it is not written."""
    if (extension := name_parts(path)[1]) not in FORMATS:
        raise BadInput(f"{path}: {extension or 'nameless'} files are not written; name a .png, .tif or .fits file")
    if extension == ".xisf":
        xisf_package()
    return FORMATS[extension]


def extension_of(picture):
    """The extension for a picture whose file has none: of the format that it was read from."""
    return next((extension for extension, form in FORMATS.items() if form.own in picture.metadata), ".png")


def name_parts(path):
    """(stem, extension, HDU number or None) of a picture's name; the extension in lower case and its short form."""
    match = re.fullmatch(
        r"(.*?)((?:\.fits?)?\.fz|\.fits?\.gz|\.[^.\[]+)?(?:\[(\d+)\])?", Path(path).name, re.IGNORECASE | re.DOTALL
    )
    stem, extension, number = match.groups()
    extension = (extension or "").lower()
    return stem, {".tiff": ".tif", ".jpeg": ".jpg"}.get(extension, extension), number and int(number)


def picture_file(path):
    """(file, number of the HDU or None) of a picture's name, which may end in [n]."""
    path, number = Path(path), name_parts(path)[2]
    if number is None or path.exists():
        return path, None
    return path.with_name(path.name[: path.name.rindex("[")]), number


def check_holds(picture, path, depth="keep"):
    """Raises BadInput when a file of that name cannot hold the picture in that depth; returns the type of pixels."""
    form = format_of(path)
    if picture.alpha is not None and not form.alpha:
        raise BadInput(f"{path}: this format cannot hold transparency; name a .png or .tif file")
    try:
        return form.depth_for(picture.pixels.dtype, depth)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def write_picture(path, picture, depth="keep"):
    """Write a picture to a file in the format of its name, in that depth or the picture's own if the format has it."""
    check_holds(picture, path, depth)
    form = format_of(path)
    stored = form.stored(picture, depth)
    with replacing(path) as temporary:
        try:
            form.write(stored, temporary)
        except (BadInput, OSError):
            raise
        except Exception as error:  # each library has its own for what it cannot write
            raise BadInput(f"{path}: cannot be written ({first_line(error)})") from None


@contextlib.contextmanager
def replacing(path):
    """A temporary file that gets its name when it is whole: nobody ever sees half a file."""
    path = Path(path)
    temporary = path.with_name(f".nox{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror or first_line(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path, data):
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_image(path, image):
    """Write an image as an 8-bit file."""
    write_picture(path, Picture(np.rint(np.asarray(image).clip(0, 1) * 255).astype(np.uint8)))


def resized(image, height, width):
    """The image at another size: averaged down, interpolated up, where it may leave its range."""
    if image.shape[:2] == (height, width):
        return image
    method = cv2.INTER_AREA if height < len(image) else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=method).reshape(height, width, -1)


def psnr(image, truth):
    """Peak signal-to-noise ratio of two images in dB, at most 100."""
    return float(-10 * np.log10(max(np.mean(np.square(image - truth, dtype=np.float64)), 1e-10)))


# --------------------------------------------------------------------------------------------------------------------
# Pairs: find, split, augment
# --------------------------------------------------------------------------------------------------------------------


def round_up(number, multiple):
    return math.ceil(number / multiple) * multiple


PAIR_FILES = (".png", ".tif", ".tiff")


def find_pairs(folder):
    """[(starry path, star-free path)] of a folder in the order of their numbers.

    Pairs are x*.png and y*.png (or .tif), or, as StarNet keeps them, files of one name in original/ and starless/.
    Raises BadInput for a folder that is missing or empty and for a picture without its partner or with two.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder of pairs; python GenerateStars.py makes one")
    places = [(folder / name, "") for name in ("original", "starless")]
    if not all(place.is_dir() for place, _ in places):
        places = [(folder, "x"), (folder, "y")]
    starry, starless = (pictures_by_stem(place, prefix) for place, prefix in places)
    for some, others, (place, prefix) in (starry, starless, places[1]), (starless, starry, places[0]):
        for stem in sorted(some.keys() - others.keys()):
            raise BadInput(f"{some[stem]}: its partner {place.name}/{prefix}{stem}{some[stem].suffix} is missing")
    if not starry:
        raise BadInput(
            f"{folder}: no pairs x*.png, y*.png in it, nor original/ and starless/; python GenerateStars.py makes some"
        )
    order = sorted(starry, key=lambda stem: (int(stem) if stem.isdecimal() else sys.maxsize, stem))
    return [(starry[stem], starless[stem]) for stem in order]


def pictures_by_stem(place, prefix):
    """{name without prefix and extension: file} of the pictures in a folder; raises BadInput for one name twice."""
    found = {}
    for file in sorted(place.glob(f"{prefix}*")):
        if file.suffix.lower() in PAIR_FILES and not file.name.startswith("."):
            other = found.setdefault(file.stem[len(prefix) :], file)
            if other != file:
                raise BadInput(f"{other} and {file.name}: which of them is the pair's? Move one away")
    return found


def split_pairs(pairs, validation, seed):
    """(training, validation) pairs: about a fifth is held back, at least one; none without validation.

    Seed and name of a pair alone decide, so pairs that are added leave the others where they are.
    """
    if not validation:
        return pairs, []
    if len(pairs) < 2:
        raise BadInput("validation needs two pairs at least; give more, or --no-validation")
    draw = {pair: random.Random(f"{seed} {Path(pair[0]).stem}").random() for pair in pairs}
    first, last = min(pairs, key=draw.get), max(pairs, key=draw.get)
    held = {pair for pair in pairs if pair == first or (draw[pair] < 0.2 and pair != last)}
    return [pair for pair in pairs if pair not in held], [pair for pair in pairs if pair in held]


def fingerprint(pairs):
    """A number that changes when pairs are added, taken away or made anew."""
    return zlib.crc32(repr([(file.name, file.stat().st_size) for pair in pairs for file in pair]).encode())


def read_pair(paths, n_channels):
    """Both pictures of a pair as arrays of the file's type, shape (height, width, n_channels).

    A colour pair read for one channel keeps all three, of which a crop takes one.
    """
    pictures = map(read_picture, paths)
    pair = [picture.in_depth(picture.pixels.dtype, from_zero=True).pixels for picture in pictures]  # white is white
    if pair[0].shape != pair[1].shape or pair[0].dtype != pair[1].dtype:
        raise BadInput(f"{paths[0]} and {paths[1]}: not of the same size, channels and depth")
    if pair[0].dtype not in (np.uint8, np.uint16):
        raise BadInput(f"{paths[0]}: pairs are of 8 or 16 bits, not {pair[0].dtype}")
    return [np.repeat(p, 3, axis=2) if n_channels == 3 and p.shape[2] == 1 else p for p in pair]


def to_unit(pixels, out=None):
    """The integer pixels as an image."""
    return np.divide(pixels, np.float32(np.iinfo(pixels.dtype).max), out=out, dtype=np.float32)


class Pairs(keras.utils.PyDataset):
    """An endless run of batches (starry, star-free): float32 crops, shape (batch, size, size, n_channels), 0..1.

    Every pair is read once an epoch, which has self.steps batches. Training crops are random and augmented; validation
    crops are the centres. Epoch and step are told from the running number of the batch, counted from the epoch
    self.start: Keras reads ahead into the next epoch before any callback could say that it has begun.
    A pair that cannot be used raises BadInput and stays in self.broken: raised in a worker, it reaches the caller of
    fit as some error of the backend's.
    """

    num_batches = None  # endless, to Keras

    def __init__(self, pairs, settings, n_channels, augment, devices=1, share=1.0):
        """devices: each batch is a multiple of these; some crops of the last of an epoch come twice. share: of the cache."""
        super().__init__(workers=settings.workers, max_queue_size=8)
        self.devices = devices
        self.pairs, self.settings, self.n_channels, self.augment = pairs, settings, n_channels, augment
        self.crops = settings.crops if augment else 1
        self.steps = -(-len(pairs) * self.crops // settings.batch_size)
        self.start = 0
        self.broken = None
        self.kept, self.room = {}, share * settings.cache * 2**30  # decoded pairs by their files, bytes still free
        self.lock = threading.Lock()  # workers are threads, and two may have read one pair

    def __getitem__(self, index):
        seed, (epoch, step) = self.settings.seed, divmod(index + self.start * self.steps, self.steps)
        jobs = list(range(len(self.pairs) * self.crops))
        if self.augment:  # whole pairs are shuffled, so that the crops of one stand together and it is read once
            order = np.random.default_rng([seed, epoch]).permutation(len(self.pairs))
            jobs = [pair for pair in order for _ in range(self.crops)]
        jobs = jobs[step * self.settings.batch_size : (step + 1) * self.settings.batch_size]
        jobs = (jobs * self.devices)[: round_up(len(jobs), self.devices)]
        rng = np.random.default_rng([seed, epoch, step])
        try:
            read = {job: self.read(self.pairs[job]) for job in dict.fromkeys(jobs)}
            crops = [self.crop(rng, self.pairs[job], *read[job]) for job in jobs]
        except BadInput as error:
            self.broken = error
            raise
        return augmented(rng, crops) if self.augment else tuple(np.stack(list(map(to_unit, im))) for im in zip(*crops))

    def read(self, paths):
        """A pair, decoded when it is first asked for: that is nine tenths of the work. What has no room is not kept."""
        if paths in self.kept:
            return self.kept[paths]
        pair = read_pair(paths, self.n_channels)
        size = sum(picture.nbytes for picture in pair)
        with self.lock:
            if size <= self.room and paths not in self.kept:
                self.room -= size
                self.kept[paths] = pair
        return pair

    def crop(self, rng, paths, starry, starless):
        """The integer pixels of a crop of both."""
        size, (height, width) = self.settings.patch_size, starry.shape[:2]
        if height < size or width < size:
            raise BadInput(f"{paths[0]}: {width}x{height} pixels are less than the patch size {size}; see --patch-size")
        side = size
        if self.augment and rng.random() < SCALED:
            side = min(round(size * np.exp2(rng.uniform(*SCALES))), height, width)
        room = height - side, width - side
        top, left = (rng.integers(r + 1) for r in room) if self.augment else (r // 2 for r in room)
        channel = slice(None)
        if self.n_channels == 1 and starry.shape[2] == 3:
            channel = [int(rng.integers(3)) if self.augment else 1]
        window = np.s_[top : top + side, left : left + side, channel]
        pair = starry[window], starless[window]
        if not self.augment:
            return pair
        way = int(rng.integers(8))
        return [np.ascontiguousarray(laid(resized(pixels, size, size), way)) for pixels in pair]


def laid(images, way):
    """Images of shape (..., height, width, channels) in one of the eight ways in which they can lie."""
    images = images[..., :: 1 - (way & 2), :: 1 - (way >> 1 & 2), :]
    return images.swapaxes(-3, -2) if way & 1 else images


def laid_back(images, way):
    """The images of which laid made these."""
    images = images.swapaxes(-3, -2) if way & 1 else images
    return images[..., :: 1 - (way & 2), :: 1 - (way >> 1 & 2), :]


SCALED = 0.3  # share of crops that are taken larger or smaller and resized: other star sizes, other grain
SCALES = -0.6, 1  # binary logarithm of how much larger
RECOMBINED = 0.2  # share of crops that get another crop's stars
DIMMED = 0.3  # share of crops that are dimmed or lifted, the channels apart: another colour


def augmented(rng, pairs):
    """The batch of such crops with channels permuted, some under another crop's stars, some dimmed or lifted."""
    size, _, channels = pairs[0][0].shape
    batch = np.empty((2, len(pairs), size, size, channels), np.float32)
    for i, pair in enumerate(pairs):
        order, images = rng.permutation(channels), batch[:, i]
        for image, pixels in zip(images, pair):
            to_unit(reordered(pixels, order), out=image)
        if rng.random() < RECOMBINED:
            x, y = map(to_unit, pairs[rng.integers(len(pairs))])
            passed = np.minimum((1 - x) / np.maximum(1 - y, 1 / 255), 1)  # by the stars as a screen-blended layer
            images[0] = np.where(x != y, 1 - (1 - images[1]) * passed, images[1])
        if rng.random() < DIMMED:
            apart = channels if rng.integers(2) else 1
            gain = rng.uniform(0.5, 1.0, apart).astype(np.float32)
            lift = rng.uniform(0, 1 - gain).astype(np.float32) * rng.integers(2)
            rows = images.reshape(2, size, -1)  # numpy is slow where the last axis is short
            rows *= np.resize(gain, rows.shape[-1])
            rows += np.resize(lift, rows.shape[-1])
    return tuple(batch)


# --------------------------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------------------------


def build_generator(architecture):
    """The generator: images (batch, height, width, n_channels) to the same without stars, any multiple of 2^levels."""
    shape = architecture.width, architecture.levels, architecture.n_channels
    return build_starnet(*shape) if architecture.network == "starnet" else build_nox(*shape)


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


def soft_clip(x):
    """x clipped to 0..1, whose gradient outside is a fifth instead of none.

    Where the gradient ends, a gate that has shut or a fill that has run out of range stays so for good, and whole runs
    fell back to changing nothing; where it goes on in full, both run away (both measured).
    """
    clipped = ops.clip(x, 0, 1)
    beyond = (x - clipped) / 5
    return clipped + (beyond - ops.stop_gradient(beyond))


class Gate(layers.Layer):
    """starless = starry - gate * (starry - fill), from (starry, gate, fill), gate and fill clipped to 0..1.

    A gate of 0 leaves the very bits of a pixel, a gate of 1 puts the fill in its place: a saturated core is painted
    from its surroundings, a dark ring is lifted. A small loss pulls back what has left -1..2: behind a shut gate nothing
    else would hold the fill, which then grew without end and took the whole network with it (measured).
    """

    def call(self, inputs):
        starry, gate, fill = inputs
        for free in gate, fill:
            self.add_loss(ops.mean(ops.square(ops.relu(ops.abs(free - 0.5) - 1.5))))
        return starry - soft_clip(gate) * (starry - soft_clip(fill))


class PullPush(layers.Layer):
    """starless, of (starry, starless), where the more light was taken, the more of it is interpolated.

    Pull-push (Gortler et al. 1996, The Lumigraph): the pull averages over ever larger squares, weighted by trust; the
    push goes back from coarse to fine and gives each square what its own trust lacks. Trust is 1 / (1 + (light /
    scale)^2): the error is a share of the light, its variance one of the square. Where none was taken, a pixel keeps
    its bits. Colour, what the channels differ by from their mean, is trusted less than brightness. Without all this
    bright stars left spots of a strange colour, and colour pairs came out 0.1 to 0.3 dB worse.
    """

    SCALES = 0.11, 0.055  # light that halves the trust, in brightness and in colour: fitted to pairs
    FINEST = 4  # pixels, the side of the smallest squares: what is finer is the grain, and stays

    def __init__(self, levels, **options):
        """levels: sizes of squares, each of twice the side; images have sides of multiples of 2^levels."""
        super().__init__(**options)
        self.levels, self.finest = levels, min(self.FINEST, 2**levels)

    def call(self, inputs):
        starry, starless = inputs
        squares = reduced(starless, self.finest)
        gray, light = ops.mean(squares, axis=-1, keepdims=True), light_between(reduced(starry, self.finest), squares)
        parts = (gray, squares - gray)[: squares.shape[-1]]  # a grayscale image has no colour
        change = 0
        for part, scale in zip(parts, self.SCALES):
            trust = 1 / (1 + ops.square(light / scale))
            change = change + self.interpolated(part, trust, self.levels - 1) - part
        doubt = ops.square(light_between(starry, starless) / self.SCALES[1])  # at 0.1 pairs were a little worse
        return starless + doubt / (1 + doubt) * enlarged(change, self.finest)

    def compute_output_shape(self, shapes):  # JAX cannot tell it while sides are unknown
        return shapes[1]

    def interpolated(self, x, trust, levels):
        """x, as far as it is trusted; for the rest the interpolated coarser levels, so many."""
        if not levels:
            return x
        total = reduced(trust, 2)
        coarse = self.interpolated(reduced(x * trust, 2) / (total + 1e-6), total, levels - 1)
        return trust * x + (1 - trust) * enlarged(coarse, 2)[:, : ops.shape(x)[1], : ops.shape(x)[2]]


def light_between(starry, starless):
    """Mean of the channels of what was taken, shape (batch, height, width, 1), for a trust that is no aim of training."""
    return ops.stop_gradient(ops.mean(starry - starless, axis=-1, keepdims=True))


def reduced(x, side):
    """Means of squares of side x side pixels; at the end of an odd side, of what there is of them."""
    return ops.average_pool(x, side, strides=side, padding="same")


def enlarged(x, side):
    """x at side times the resolution, bilinear: by a transposed convolution, since Keras's resize must know the shape."""
    tent = 1 - np.abs(np.arange(2 * side) - side + 0.5) / side
    kernel = np.einsum("i,j,kl->ijkl", tent, tent, np.eye(x.shape[-1])).astype(np.float32)
    x = ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="symmetric")
    return ops.conv_transpose(x, kernel, strides=side, padding="same")[:, side:-side, side:-side]


def residual_block(x, name):
    """x + conv(relu(conv(norm(x)))), 3x3; starts as the identity. Without the norm, whole layers of ReLUs died.

    Epsilon keeps flat black sky, where next to nothing is left to normalize, from blowing up the gradient.
    """
    options = {"filters": x.shape[-1], "kernel_size": 3, "padding": "same"}
    y = layers.RMSNormalization(epsilon=0.01, name=f"{name}_norm")(x)
    y = layers.Conv2D(activation="relu", kernel_initializer="he_normal", name=f"{name}_found", **options)(y)
    return layers.Add()([x, layers.Conv2D(kernel_initializer="zeros", name=f"{name}_added", **options)(y)])


def build_nox(width, levels, n_channels):
    """StarNet's encoder-decoder with residual blocks at each level, half resolution on, and a gated fill.

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
        name = f"down{level}"  # (batch, height / 2^(level+1), ..., width * (level+1))
        x = layers.Conv2D(count, kernel, 2, padding="same", kernel_initializer="lecun_normal", name=f"{name}_halved")(x)
        x = residual_block(x, name)
        skips.append(x)
    x = residual_block(skips.pop(), f"up{levels - 1}")
    quiet = keras.initializers.VarianceScaling(0.05)  # at first the fine levels speak, the coarse ones whisper
    for level, skip in reversed(list(enumerate(skips))):
        name = f"up{level}"
        x = layers.Conv2DTranspose(skip.shape[-1], 2, 2, kernel_initializer=quiet, name=f"{name}_doubled")(x)
        x = residual_block(layers.Add()([x, skip]), name)
    x = layers.LeakyReLU(negative_slope=0.2)(x)
    options = {"kernel_size": 4, "strides": 2, "padding": "same", "kernel_initializer": quiet}
    gate = layers.Conv2DTranspose(n_channels, bias_initializer=keras.initializers.Constant(0.05), **options)(x)
    fill = layers.Conv2DTranspose(n_channels, **options)(x)
    # from the start near the right answer
    fill = layers.Add(name="fill", **exact)([fill, local_mean(starry, LocalContrast.SIDES[-1])])
    starless = Gate(**exact)([starry, gate, fill])
    mended = PullPush(levels, **exact)([starry, starless])
    return keras.Model(starry, mended, name="generator")


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


OUT_OF_MEMORY = re.compile(r"[Oo]ut of memory|\bOOM\b|RESOURCE_EXHAUSTED|DefaultCPUAllocator")  # in the backends' words


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


def relative_l1(starry, truth, starless, star_weight):
    """Weighted absolute error of each image over that of the starry one, mean over the batch: changing nothing gives 1.

    Star pixels weigh more, those of faint light the most: light is how much the stars add, 0.02 of it makes a full star
    pixel, and the quotient makes faint light weigh 5 times light of half the range. Knots and galaxies, which would be
    given up for the stars that look like them, weigh a third as much, by how far they stand out of their surroundings:
    at the full weight stars that look like galaxies stayed (measured). All other pixels weigh 1 and hold the background
    where it is. The ratio lets crowded and nearly empty pictures count alike: by their plain errors a few crowded ones
    threw the training off (measured). 0.005 is the error that counts as much in a picture without stars as doing
    nothing elsewhere.
    """
    near, wide = (local_mean(truth, side) for side in LocalContrast.SIDES)
    stars, knots = ops.abs(starry - truth), ops.relu(ops.abs(near - wide) - 0.02)  # noise seldom comes that far
    stars, knots = (ops.max(light, axis=-1, keepdims=True) for light in (stars, knots))
    stars, knots = (ops.clip(light / 0.02, 0, 1) * 0.3 / (0.1 + light) for light in (stars, knots))
    weight = 1 + star_weight * (stars + knots / 3)
    error, before = (ops.mean(weight * ops.abs(image - truth), axis=(1, 2, 3)) for image in (starless, starry))
    return ops.mean(error / (before + 0.005))


GRAIN = 5  # pixels: what differs from the mean over a square of this side is grain


def texture_error(starry, truth, starless):
    """Error of the grain where stars were over the grain that is due, mean over the batch; of a glassy plug about 1.

    The absolute error alone is least for the median of all grain that could be there, which has none. Grain is the
    standard deviation of what differs from the mean of 5 x 5 pixels, over as many, in the luminance; a step of 8 bits,
    0.004, is added to it. No pixel's error counts more than the plug's: a star that stayed is far rougher, and where it
    did so since it looks like a galaxy, this term would outweigh the absolute error and the galaxies went (measured;
    when too much grain cost nothing, specks stayed).
    """

    def as_channels(images):  # of a single image: averaging one channel of each took three times as long (measured)
        return ops.transpose(images, (1, 2, 0))[None]

    stars = as_channels(ops.clip(ops.max(ops.abs(starry - truth), axis=-1) / 0.02, 0, 1))
    grays = (as_channels(ops.mean(image, axis=-1)) for image in (starless, truth))
    details = (gray - local_mean(gray, GRAIN) for gray in grays)
    found, due = (ops.sqrt(local_mean(ops.square(detail), GRAIN) + 1e-6) + 0.004 for detail in details)
    error, whole = (ops.mean(stars * part, axis=(1, 2)) for part in (ops.minimum(ops.abs(found - due), due), due))
    return ops.mean(error / (whole + 1e-6))


def decibels(error):
    """PSNR in dB, at most 100, of a mean squared error of images."""
    return -10 * ops.log10(ops.maximum(error, 1e-10))


def qualities(starry, truth, starless, compared=...):
    """What is reported but not trained for: PSNR in dB of whole images, of star pixels and of the others, and SSIM.

    compared: the part whose SSIM is taken; that of one small crop was already a tenth of a training step (measured).
    Returns {name: (value, weight in a mean over batches)}, the weight 0 where a batch has no such pixel.
    """
    stars = ops.cast(ops.any(starry != truth, axis=-1), "float32")  # (batch, height, width), as the errors
    errors = ops.mean(ops.square(starless - truth), axis=-1)
    parts = {"psnr_stars": stars, "psnr_background": 1 - stars}
    means = {name: decibels(ops.sum(part * errors) / (ops.sum(part) + 1e-6)) for name, part in parts.items()}
    return {
        "psnr": (ops.mean(decibels(ops.mean(errors, axis=(1, 2)))), 1.0),
        **{name: (value, ops.cast(ops.any(parts[name] > 0), "float32")) for name, value in means.items()},
        "ssim": (ops.mean(ops.image.ssim(starless[compared], truth[compared])), 1.0),
    }


def distance(features, others):
    """Mean absolute difference, added up in float32: the networks may be of bfloat16."""
    return ops.mean(ops.cast(ops.abs(features - others), "float32"))


def cross_entropy(logits, real):
    """Binary cross-entropy of logits against all real or all fake."""
    logits = ops.cast(logits, "float32")
    return ops.mean(ops.softplus(-logits if real else logits))


class Nox(keras.Model):
    """Generator and discriminator with every term of the loss in compute_loss, for training and validation alike."""

    TERMS = ("generator", "l1", "texture", "fill", "features", "adversarial", "discriminator", "vgg")
    QUALITIES = ("psnr", "psnr_stars", "psnr_background", "ssim")

    def __init__(self, architecture, settings, losses=1):
        """losses: how many, each of a part of the batch, are added up (see all_devices)."""
        super().__init__(name="nox", dtype="float32")  # of bfloat16, it would round the pictures on their way in
        self.settings, self.losses_added = settings, losses
        self.generator = build_generator(architecture)
        fills = [layer.output for layer in self.generator.layers if layer.name == "fill"]
        self.seen = keras.Model(self.generator.input, [self.generator.output, *fills])
        self.discriminator = build_discriminator(architecture.n_channels)
        self.vgg = build_vgg(settings.vgg_weights, architecture.n_channels) if settings.vgg_weight else None
        self.adversarial = False  # whether the discriminator has come in
        self.trackers = {name: keras.metrics.Mean(name=name) for name in self.TERMS + self.QUALITIES}
        self.build((None, None, None, architecture.n_channels))

    def build(self, input_shape):
        self.built = True  # the networks come built

    def call(self, starry, training=None):
        """[starless], from the gated network [starless, fill]."""
        found = self.seen(starry, training=training)
        return found if isinstance(found, list) else [found]  # Keras unpacks what is alone

    @property
    def metrics(self):
        idle = () if self.adversarial else ("features", "adversarial", "discriminator")
        idle += () if self.vgg else ("vgg",)
        idle += () if len(self.seen.outputs) > 1 else ("fill",)
        idle += () if self.settings.texture_weight else ("texture",)
        return [tracker for name, tracker in self.trackers.items() if name not in idle]

    def losses_of(self, starry, truth, starless, fill=None):
        """Each term by name, unweighted.

        That of the fill holds everywhere, also where the gate is shut and nothing else would: a gate that opens on the
        core of a galaxy then puts there what was there, more or less, and not a hole.
        """
        terms = {"l1": relative_l1(starry, truth, starless, self.settings.star_weight)}
        if self.settings.texture_weight:
            terms["texture"] = texture_error(starry, truth, starless)
        if fill is not None:
            terms["fill"] = ops.mean(ops.square(fill - truth))
        if self.adversarial:
            *fake, fake_logits = frozen(self.discriminator, starless)
            *real, _ = frozen(self.discriminator, truth)
            terms["features"] = sum(map(distance, fake, real))
            terms["adversarial"] = cross_entropy(fake_logits, True)
            seen_fake, seen_real = self.discriminator(ops.stop_gradient(starless))[-1], self.discriminator(truth)[-1]
            terms["discriminator"] = (cross_entropy(seen_fake, False) + cross_entropy(seen_real, True)) / 2
        if self.vgg:
            terms["vgg"] = distance(self.vgg(starless), self.vgg(truth))
        return terms

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The scalar both networks descend; each sees only its own part of it (see frozen)."""
        starless, *fill = (ops.cast(image, "float32") for image in y_pred)
        s, terms = self.settings, self.losses_of(x, y, starless, *fill)
        weights = {
            "l1": s.l1_weight,
            "texture": s.texture_weight,
            "fill": s.fill_weight,
            "features": s.feature_weight,
            "adversarial": s.adversarial_weight,
            "vgg": s.vgg_weight,
        }
        generator = sum(weights[name] * value for name, value in terms.items() if name in weights) + sum(self.losses)
        images, ssim = (x, y, ops.stop_gradient(starless)), ...
        if training:  # crops are random, so a corner tells as much; whole ones were a twentieth of a step (measured)
            side = max(s.patch_size // 2, 64)
            images, ssim = (image[:, :side, :side] for image in images), np.s_[:1, :64, :64]
        found = qualities(*images, compared=ssim)
        for name, value in {"generator": generator, **terms}.items():
            self.trackers[name].update_state(value)
        for name, (value, weight) in found.items():
            self.trackers[name].update_state(value, sample_weight=weight)
        if self.adversarial:
            return (generator + terms["discriminator"]) / self.losses_added
        # every weight needs a gradient, if only of zero, on all backends
        return generator / self.losses_added + 0.0 * sum(ops.sum(v) for v in self.discriminator.trainable_variables)


class NoxOfMachines(Nox):
    """Nox for TensorFlow's MultiWorkerMirroredStrategy, which fit of Keras does not know (seen with 3.15).

    It averages what is logged along an axis that numbers do not have, and to build a model that is built already asks
    for the mean of a whole batch in a form that the strategy does not take.
    """

    def train_step(self, data):
        return {name: ops.reshape(value, (1,)) for name, value in super().train_step(data).items()}

    def test_step(self, data):
        return {name: ops.reshape(value, (1,)) for name, value in super().test_step(data).items()}

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        pass


def orthogonalized(matrix, rounds=5):
    """The matrix with all its singular values brought to about 1 (0.7 to 1.2), its singular vectors kept.

    Newton-Schulz iteration with the coefficients of Muon (K. Jordan et al. 2024, kellerjordan.github.io/posts/muon),
    here on the Gram matrix: of a long kernel that is a small part of the work, and the polynomials commute.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return ops.transpose(orthogonalized(ops.transpose(matrix), rounds))
    gram = ops.transpose(matrix) @ matrix
    size = ops.trace(gram) + 1e-12
    gram, one = gram / size, ops.eye(gram.shape[0])
    turn = one
    for _ in range(rounds):
        step = 3.4445 * one - 4.7750 * gram + 2.0315 * (gram @ gram)
        turn, gram = turn @ step, step @ gram @ step
    return matrix @ turn / ops.sqrt(size)


class Muon(keras.optimizers.Adam):
    """Muon for the generator's convolutions among features, Adam for the rest; with a warm-up.

    keras.optimizers.Muon takes matrices alone and leaves convolutions to Adam. Its orthogonal steps learn more from the
    same crops: from the same weights, the loss over the second 280 steps was 4% lower than Adam's. A kernel's step is
    scaled to that of Adam, 0.2 in the root mean square (Liu et al. 2025, arXiv:2502.16982), so that one learning rate
    serves both. The discriminator's learning rate is a quarter of the generator's; while resting, it is left alone,
    as its gradients of zero would leave it, which saves the time.
    """

    MOMENTUM = 0.95
    CHANNELS = 16  # kernels with fewer, which read or write the picture, are Adam's

    def __init__(self, slow=(), warmup=0, **options):
        super().__init__(**options)
        self.slow, self.warmup, self.resting = {id(v) for v in slow}, warmup, False

    def build(self, variables):
        super().build(variables)
        self.slow_indices = {self._get_variable_index(v) for v in variables if id(v) in self.slow}

    def update_step(self, gradient, variable, learning_rate):
        if self.warmup:
            learning_rate = learning_rate * ops.minimum(1.0, (ops.cast(self.iterations, "float32") + 1) / self.warmup)
        if self._get_variable_index(variable) in self.slow_indices:  # TensorFlow passes other objects than it was given
            if not self.resting:
                super().update_step(gradient, variable, learning_rate / 4)
        elif len(variable.shape) == 4 and min(variable.shape[2:]) >= self.CHANNELS:
            self.update_kernel(gradient, variable, learning_rate)
        else:
            super().update_step(gradient, variable, learning_rate)

    def update_kernel(self, gradient, variable, learning_rate):
        """Nesterov momentum, orthogonalized as a matrix of taps and channels by channels."""
        momentum = self._momentums[self._get_variable_index(variable)]
        self.assign(momentum, momentum + (1 - self.MOMENTUM) * (gradient - momentum))
        ahead = gradient + self.MOMENTUM * (momentum - gradient)
        step = orthogonalized(ops.reshape(ahead, (-1, variable.shape[-1])))
        rate = 0.2 * math.sqrt(max(step.shape)) * learning_rate
        self.assign_sub(variable, rate * ops.reshape(step, variable.shape))

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
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        copy = Path(folder) / ("copy.weights.h5" if ours else "copy.h5")  # Keras goes by the name, not the content
        shutil.copyfile(path, copy)
        try:
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
    """Set a generator's weights from a file; colour weights start a grayscale one as if it saw R = G = B.

    A nox of more levels goes on from one of fewer: what the coarser levels find counts for nothing at first. One of
    several times the width goes on from a narrower one, see widened.
    """
    source, found = load_generator(path)
    grows = found.network == architecture.network == "nox"
    levels = max(found.levels, architecture.levels) if grows else found.levels
    width = architecture.width if grows and architecture.width % found.width == 0 else found.width
    fitting = dataclasses.replace(found, n_channels=architecture.n_channels, levels=levels, width=width)
    if fitting != architecture:
        raise BadInput(f"{path}: holds another network; start from it with {fitting.flags}")
    if width > found.width:
        source = widened(source, dataclasses.replace(found, width=width))
    known = {layer.name for layer in source.layers}
    shared = (layer for layer in generator.layers if layer.name in known or not layer.name.startswith(("down", "up")))
    same = [variable for layer in shared for variable in layer.weights]
    weights = source.get_weights()
    if (found.n_channels, architecture.n_channels) == (3, 1):
        weights = fold_channels(weights, [tuple(v.shape) for v in same])
    elif found.n_channels != architecture.n_channels:
        raise BadInput(f"{path}: grayscale weights cannot start the colour network")
    for variable, values in zip(same, weights, strict=True):
        variable.assign(values)
    if levels > found.levels:
        kernel = generator.get_layer(f"up{found.levels - 1}_doubled").kernel
        kernel.assign(ops.zeros_like(kernel))


def widened(source, architecture):
    """A nox of the architecture, of several times the width of the source, that gives the source's answers.

    Net2Net (Chen et al. 2016, arXiv:1511.05641): every channel is repeated, and what hears it shares its weights out
    among the copies, unevenly, so that they come to differ. The hidden channels of a residual block are heard by one
    convolution alone: in place of copies come new ones, to which it does not listen at first.
    """
    generator, rng = build_generator(architecture), np.random.default_rng(0)
    for narrow, layer in zip(source.layers, generator.layers, strict=True):
        hears, speaks = (3, 2) if isinstance(layer, layers.Conv2DTranspose) else (2, 3)  # axes of a kernel
        for values, variable in zip(narrow.get_weights(), layer.weights, strict=True):
            axis = speaks if values.ndim == 4 else 0
            said = [values] * (variable.shape[axis] // values.shape[axis])
            if layer.name.endswith("_found"):
                fresh = np.split(ops.convert_to_numpy(variable), len(said), axis=axis)[1:]
                said[1:] = [part[:, :, : values.shape[hears]] if values.ndim == 4 else part for part in fresh]
            values = np.concatenate(said, axis=axis)
            if values.ndim == 4:
                shares = rng.uniform(0.5, 1.5, (variable.shape[hears] // values.shape[hears], *values.shape))
                if layer.name.endswith("_added"):
                    shares[1:] = 0
                values = np.concatenate(shares / shares.sum(axis=0) * values, axis=hears)
            variable.assign(values)
    return generator


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
    corrected for its start at zero, so it is restored from the last row alone. It starts anew where the loss becomes
    another: with the adversary, who adds terms to it, and with other weights of its terms.
    """

    SMOOTHED = ("generator", "psnr", "val_generator", "val_psnr")

    def __init__(self, path, copy, ema, steps, start, since=0):
        """path: the run's own file, in its checkpoint; copy: where the user looks; start: epoch to go on from; since:
        the first with the loss's weights of today.
        """
        super().__init__()
        self.path, self.copy, self.keep, self.since = path, copy, ema**steps, since
        if path.exists():  # an epoch that ended, but whose checkpoint was not written any more, is run again
            write_bytes(path, self.rows(start).to_csv(index=False).encode())

    def rows(self, before=sys.maxsize):
        """The rows of the epochs before one, as a DataFrame."""
        try:
            table = pd.read_csv(self.path) if self.path.exists() else pd.DataFrame({"epoch": []})
            return table.astype({"epoch": int})[table["epoch"] < before]
        except (ValueError, KeyError):
            raise BadInput(f"{self.path}: cannot be read; move it away to go on without the rows in it") from None

    def comparable(self, before=sys.maxsize):
        """Those of them whose loss is the one that it is now."""
        table = self.rows(before)
        had = table["discriminator"].notna() if "discriminator" in table else np.zeros(len(table), bool)
        return table[(had == self.model.adversarial) & (table["epoch"] >= self.since)]

    def on_epoch_end(self, epoch, logs=None):
        if not np.isfinite(logs["generator"]):
            reason = f"the loss of epoch {epoch + 1} is {logs['generator']}"
            raise BadInput(f"{reason}; the epoch before is kept, try a lower --lr")
        row, past = {"epoch": epoch, **logs}, self.comparable(epoch)
        row["learning_rate"] = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
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
        rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
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
        self.record = {}  # what is to be said of the run in run.json from its next state on

    def files(self):
        """{epoch: file} of the complete states."""
        found = (re.fullmatch(r"epoch(\d+)\.weights\.h5", f.name) for f in self.folder.glob("epoch*.weights.h5"))
        return {int(match[1]): self.folder / match[0] for match in found if match}

    def restore(self, model):
        """Load the last state into a compiled model."""
        files = self.files()
        file = files[max(files)]
        try:
            with warnings.catch_warnings(action="error", category=UserWarning):
                model.load_weights(file)  # Keras leaves an optimizer that does not fit out, with a warning
        except Exception as error:  # Keras and h5py raise various types
            advice = "go on with the settings it was begun with, or move the folder away"
            raise BadInput(f"{file}: does not fit ({first_line(error)}); {advice}") from None

    def save(self, model, done):
        """Write the state after so many epochs in place of the one before."""
        size = 4 * sum(math.prod(v.shape) for v in [*model.weights, *model.optimizer.variables])
        if shutil.disk_usage(self.folder).free < 1.1 * size + 2**20:  # HDF5 does not survive a disk that fills up
            kept = "; the last epoch is kept" if done else ""
            raise BadInput(f"{self.folder}: no room on the disk for {size / 1e6:.0f} MB{kept}")
        earlier, file = self.files().values(), self.folder / f"epoch{done}.weights.h5"
        temporary = self.folder / "writing.weights.h5"
        model.save_weights(temporary, overwrite=True)
        os.replace(temporary, file)
        write_bytes(self.folder / "run.json", json.dumps(self.record).encode())
        for old in earlier:
            if old != file:
                old.unlink(missing_ok=True)

    def on_epoch_end(self, epoch, logs=None):
        self.save(self.model, epoch + 1)


class Outputs(keras.callbacks.Callback):
    """Every save_freq epochs and at the end: weights, training.png, and input.png, output.png, gt.png of one pair."""

    def __init__(self, architecture, settings, run, pairs, history):
        super().__init__()
        self.architecture, self.settings, self.run = architecture, settings, run
        self.pairs, self.history = pairs, history
        self.generator = build_generator(architecture)

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.settings.save_freq == 0 or epoch + 1 == self.settings.epochs:
            self.write(epoch)

    def write(self, epoch):
        """Write all of them as they are after that epoch."""
        take_average(self.generator, self.model)
        save_weights(self.generator, self.architecture, self.architecture.weights_name, self.run)
        write_plot("training.png", pd.read_csv(self.history.path))
        paths = self.pairs[np.random.default_rng([self.settings.seed, epoch]).integers(len(self.pairs))]
        pair = map(to_unit, read_pair(paths, self.architecture.n_channels))
        if self.architecture.n_channels == 1:  # of colours the green one, as in validation
            pair = (image[..., image.shape[2] // 2, None] for image in pair)
        show_pair(self.generator, self.architecture, *pair, Inference(patch_size=512, stride=448))


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

# JAX would run each operation of a step by itself; TensorFlow is slower so on CPUs, and torch did not finish a step
JIT = keras.backend.backend() == "jax"


def set_aside(path):
    """Rename a file that this run did not write to the first free name, with one line that says so."""
    path = Path(path)
    free = next(p for i in range(1, 10**6) if not (p := path.with_name(f"{path.stem}.{i}{path.suffix}")).exists())
    os.rename(path, free)
    print(f"{path} was not written by this run and is kept as {free}")


def open_run(folder, architecture, weights="", seed=None, validation=False):
    """The record of the run whose checkpoint is in the folder, a new one if there is none.

    It has the run's id and architecture and, from its first state on, what was asked for that a later call may not
    change, or not unnoticed. weights, seed, validation: asked for now.
    """
    record = folder / "run.json"
    run = {"id": uuid.uuid4().hex, "architecture": dataclasses.asdict(architecture)}
    if record.exists():
        try:
            run = json.loads(record.read_text())
            found = Architecture(**run["architecture"])
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{record}: cannot be read; move {folder} away to begin anew") from None
        if found != architecture:
            raise BadInput(f"{folder}: holds a run with {found.flags}; go on with these, or move the folder away")
        if seed != run.get("seed", seed):  # it has decided which pairs are held back
            raise BadInput(f"{folder}: holds a run with --seed {run['seed']}; go on with it, or move the folder away")
        if validation and not run.get("validation", True):
            raise BadInput(f"{folder}: holds a run that has trained on all pairs; go on with --no-validation")
        if weights and Path(weights).resolve() != Path(run.get("weights", weights)).resolve():
            start = run["weights"] or "random weights"
            raise BadInput(f"{folder}: holds a run begun from {start}; leave --weights out, or move the folder away")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(record, json.dumps(run).encode())
    return run


def clear_the_way(folder, architecture, run):
    """Set aside weights and a history that the run whose checkpoint is in the folder did not write."""
    output, history = Path(architecture.weights_name), Path("history.csv")
    if output.exists():
        try:
            owner = inspect_weights(output)[1]
        except BadInput:
            owner = ""
        if owner != run["id"]:
            set_aside(output)
    if history.exists() and not (folder / history.name).exists():
        set_aside(history)


@dataclasses.dataclass(frozen=True)
class Devices:
    """What shares each batch: how many devices, how many losses are added up, whether of several machines."""

    count: int = 1
    losses: int = 1
    machines: bool = False
    folder: Path = Path(".")  # to write into


@contextlib.contextmanager
def all_devices():
    """Within, all GPUs of this machine, or those of all machines in TF_CONFIG, share each batch; yields the Devices.

    TensorFlow adds up the gradients of a loss for each device, JAX has one loss for the whole batch; torch trains on one
    device. Where a machine has no GPU, its CPU is one device unless it has been divided into several.
    """
    if "TF_CONFIG" in os.environ:
        strategy = strategy_of_machines()
        with strategy.scope():
            count = strategy.num_replicas_in_sync
            yield Devices(count, count, machines=True, folder=machine_folder(strategy.cluster_resolver))
        return
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        if len(devices) > 1:
            with tf.distribute.MirroredStrategy([device.name for device in devices]).scope():
                yield Devices(len(devices), len(devices))
            return
    elif keras.backend.backend() == "jax" and len(devices := keras.distribution.list_devices()) > 1:
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
        yield Devices(len(devices))
        return
    yield Devices()


def strategy_of_machines():
    """MultiWorkerMirroredStrategy of the machines in TF_CONFIG, once all of them are there."""
    if keras.backend.backend() != "tensorflow":
        raise BadInput("TF_CONFIG: several machines need KERAS_BACKEND=tensorflow; unset it to train on this one alone")
    import tensorflow as tf

    try:
        machine = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        total = len(machine.cluster_spec().job_tasks("worker"))
        if machine.task_id is None:
            raise ValueError("no task in it")
        print(f"{machine.task_type} {machine.task_id}: waiting for all {total} workers of TF_CONFIG", flush=True)
        return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=machine)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"TF_CONFIG: not as TensorFlow wants it ({first_line(error)})") from None


def machine_folder(machine):
    """Where a machine writes, made if missing: the chief into the current folder, worker 1 into worker1 in it.

    Each keeps the whole state of the run, so that all resume alike; they may share a disk.
    """
    has_chief = "chief" in machine.cluster_spec().jobs
    chief = machine.task_type == "chief" or (machine.task_id == 0 and not has_chief)
    folder = Path("." if chief else f"{machine.task_type}{machine.task_id}")
    folder.mkdir(exist_ok=True)
    return folder


def agree(numbers):
    """Raises BadInput unless all machines come with the same numbers; {what a number stands for: number}."""
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    mine = tf.constant([list(numbers.values())], tf.int64)
    gathered = tf.function(lambda: strategy.gather(strategy.run(lambda: mine), axis=0))
    for name, values in zip(numbers, gathered().numpy().T):
        if len(set(values)) > 1:
            raise BadInput(f"TF_CONFIG: the machines differ in {name}")


def train(architecture, settings):
    """Train, from the last checkpoint if there is one, and write everything into the current folder."""
    if keras.backend.backend() == "openvino":
        raise BadInput("KERAS_BACKEND=openvino: cannot train; take tensorflow, torch or jax")
    with all_devices() as devices:
        if settings.batch_size % devices.count:
            raise BadInput(f"--batch-size {settings.batch_size}: must be a multiple of the {devices.count} devices")
        if devices.folder != Path("."):
            files = {name: getattr(settings, name) for name in ("data", "weights", "vgg_weights")}
            files = {name: os.path.abspath(file) for name, file in files.items() if file and os.path.exists(file)}
            settings = dataclasses.replace(settings, **files)
        with contextlib.chdir(devices.folder):
            train_within(architecture, settings, devices)


def train_within(architecture, settings, devices):
    """Train on the Devices that all_devices yields."""
    keras.utils.set_random_seed(settings.seed)
    if settings.patch_size < 11:
        raise BadInput(f"--patch-size {settings.patch_size}: must be at least 11, the window of the SSIM")
    if settings.patch_size % architecture.multiple:
        raise BadInput(f"--patch-size {settings.patch_size}: must be a multiple of {architecture.multiple} (2^levels)")
    found = find_pairs(settings.data)
    pairs, held = split_pairs(found, settings.validation, settings.seed)
    data, check = (
        Pairs(some, settings, architecture.n_channels, augment, devices.count, len(some) / len(found)) if some else None
        for some, augment in ((pairs, True), (held, False))
    )
    for some in filter(None, (data, check)):
        some[0]  # names a pair that cannot be used before anything starts
    model = (NoxOfMachines if devices.machines else Nox)(architecture, settings, devices.losses)
    folder = Path("checkpoint") / Path(architecture.weights_name).stem
    checkpoint = Checkpoint(folder)
    if settings.weights and not checkpoint.files():
        start_from(model.generator, architecture, settings.weights)
    if devices.machines:
        same = dataclasses.replace(settings, data="", weights="", vgg_weights="", workers=0, cache=0)
        agree(
            {
                "their pairs": fingerprint(found),
                "their options": zlib.crc32(repr((architecture, same)).encode()),
                "the weights they start from": zlib.crc32(b"".join(w.tobytes() for w in model.get_weights())),
                "their last epoch; copy the checkpoint of one to the others": max(checkpoint.files(), default=-1),
            }
        )
    run = open_run(folder, architecture, settings.weights, settings.seed, settings.validation)
    start, pairs_now = max(checkpoint.files(), default=0), fingerprint(found)
    if run.get("pairs", pairs_now) != pairs_now:
        print(f"{settings.data}: pairs have changed since the last epoch of this run, which goes on with these")
    checkpoint.record = run | {
        "lr": settings.lr,
        "seed": settings.seed,
        "pairs": pairs_now,
        "weights": run.get("weights", settings.weights),
        "validation": settings.validation and run.get("validation", True),
        "loss": settings.loss,
        "since": run.get("since", 0) if run.get("loss", settings.loss) == settings.loss else start,
    }

    optimizer = Muon(
        slow=model.discriminator.trainable_variables, warmup=settings.warmup, learning_rate=settings.lr,
        global_clipnorm=settings.clip or None, beta_2=0.999,
        use_ema=settings.weight_ema > 0, ema_momentum=settings.weight_ema or 0.99,
    )  # fmt: skip
    model.compile(optimizer=optimizer, jit_compile=JIT)
    optimizer.build(model.trainable_variables)  # now, or TensorFlow traces the first step twice
    if not checkpoint.files():
        checkpoint.save(model, 0)  # before the weights that it starts from are renamed
    checkpoint.restore(model)
    clear_the_way(folder, architecture, run)
    if run.get("lr", settings.lr) != settings.lr:  # another one is meant; the same leaves what the plateaus made of it
        optimizer.learning_rate = settings.lr
    history = History(
        folder / "history.csv", Path("history.csv"), settings.ema, data.steps, start, checkpoint.record["since"]
    )
    outputs = Outputs(architecture, settings, run["id"], held or pairs, history)
    monitor = "ema_val_generator" if held else "ema_generator"
    callbacks = [
        history,
        Plateau(history, monitor=monitor, patience=settings.patience, cooldown=settings.cooldown),
        outputs,
        checkpoint,
    ]
    print(f"{len(pairs)} pairs to train on, {len(held)} to judge by, {start} of {settings.epochs} epochs done")
    if start >= settings.epochs:  # it ended between two epochs of --save-freq, or its weights are gone
        outputs.set_model(model)
        outputs.write(start - 1)
    for last, model.adversarial in ((min(settings.adversarial_from, settings.epochs), False), (settings.epochs, True)):
        if start < last:
            optimizer.resting = not model.adversarial
            model.compile(optimizer=optimizer, jit_compile=JIT)  # the step is built anew, with or without adversary
            data.start = start
            fit(model, data, check, initial_epoch=start, epochs=last, callbacks=callbacks)
            start = last


def fit(model, data, check, **options):
    """model.fit, where a pair that cannot be used and a lack of memory are told as just that."""
    try:
        steps = {"steps_per_epoch": data.steps, "validation_steps": check and check.steps}
        model.fit(data, validation_data=check, shuffle=False, **steps, **options)
    except Exception as error:
        if broken := data.broken or (check and check.broken):
            raise broken from None
        if OUT_OF_MEMORY.search(str(error)):
            raise BadInput("out of memory; lower --batch-size or --patch-size, the last epoch is kept") from None
        if type(error).__name__ == "UnavailableError":  # TensorFlow's
            raise BadInput(
                "TF_CONFIG: another machine is gone; the last epoch is kept, all can go on from it"
            ) from None
        raise


# --------------------------------------------------------------------------------------------------------------------
# Infer
# --------------------------------------------------------------------------------------------------------------------


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


def answer(generator, tiles, views):
    """The network's answer to a batch of tiles: the mean over so many of the ways in which they can lie."""
    found = (np.asarray(generator.predict_on_batch(laid(tiles, way)), np.float32) for way in range(views))
    return sum(laid_back(starless, way) for way, starless in enumerate(found)) / np.float32(views)


def answers(generator, tiles, size, views):
    """(tile, the network's answer) for each of the tiles, so many at once, fewer where the memory does not hold them.

    All batches are of one shape, so that the network is compiled once, twice where tiles are turned.
    """
    while batch := list(itertools.islice(tiles, size)):
        full = np.stack(batch + batch[-1:] * (size - len(batch)))
        try:
            starless = answer(generator, full, views)
        except Exception as error:  # each backend raises its own
            if not OUT_OF_MEMORY.search(str(error)):
                raise
            if size == 1:
                raise BadInput("out of memory; lower --patch-size and --stride") from None
            tiles, size = itertools.chain(batch, tiles), size // 2
        else:
            yield from zip(batch, starless)


FLAT, BRIGHT = 5 / 255, 0.1  # grain of the starry image, light taken from it: of each, what makes the doubt a half
FREE = 0.02  # light taken where grain may still be cloned from
LEAST = 0.2  # doubt below which cloning is not worth its time: it is most of the pixels of a crowded picture
DISTANCES = 12, 24, 40, 64, 96, 140  # pixels to where it is cloned from, the nearest first, along eight directions
DIRECTIONS = np.stack([np.sin(np.arange(8) * np.pi / 4), np.cos(np.arange(8) * np.pi / 4)], axis=1)
OFFSETS = np.rint(np.multiply.outer(DISTANCES, DIRECTIONS)).astype(int).reshape(-1, 2)


def smoothed(image, side=GRAIN):
    """Means over side x side pixels."""
    return cv2.blur(image, (side, side)).reshape(image.shape)


def with_grain(starry, starless):
    """The starless image with grain cloned from its surroundings where a bright star has none: on saturated discs.

    There the network sees the same everywhere, and made of it the same everywhere in its grid, which showed. Cloned is
    only from where no star was, and no knot stands out; where there is no such place near, it is smooth.
    """
    gray, fill = (image @ np.full(image.shape[2], 1 / image.shape[2], np.float32) for image in (starry, starless))
    light, variance = np.abs(gray - fill), smoothed(np.square(gray - smoothed(gray)))
    rows, columns = np.nonzero(light > FREE)
    doubt = 1 / (1 + (BRIGHT / light[rows, columns]) ** 2) / (1 + variance[rows, columns] / FLAT**2)
    rows, columns, doubt = (values[doubt > LEAST] for values in (rows, columns, doubt))
    if not rows.size:
        return starless
    strength = np.abs(fill - smoothed(fill))
    source = (smoothed(light) < FREE) & (strength <= 4 * smoothed(strength, 31))
    grain = starless - smoothed(starless)
    mended = starless.copy()
    mended[rows, columns] += doubt[:, None] * (cloned(grain, source, rows, columns) - grain[rows, columns])
    return mended


def cloned(values, source, rows, columns):
    """For pixels of an image the values at the first of OFFSETS that is a source, in the image; else 0."""
    margin, width = DISTANCES[-1], source.shape[1]
    wide = width + 2 * margin
    source, values = np.pad(source, margin).ravel(), values.reshape(-1, values.shape[2])
    here, there = rows * width + columns, (rows + margin) * wide + columns + margin
    found, missing = np.zeros((rows.size, values.shape[1]), values.dtype), np.arange(rows.size)
    for down, right in OFFSETS:
        good = source[there[missing] + down * wide + right]
        hits, missing = missing[good], missing[~good]
        found[hits] = values[here[hits] + down * width + right]
    return found


FAINT = 1 / 255, 3 / 255  # light in an image: up to the first none of it is taken, from the second on all


def without_faint(light):
    """Light without what is too faint to be trusted, by the brightest channel of each pixel.

    A gate is seldom shut to the last bit; and light of up to two levels of 8 bits was better left than taken (measured
    on pairs, by the absolute error). The ramp leaves no edge.
    """
    strength = np.abs(light).max(axis=2, keepdims=True)
    return light * ((strength - FAINT[0]) / (FAINT[1] - FAINT[0])).clip(0, 1)


def light_bands(generator, architecture, shape, look, settings, title=None):
    """(rows, the light of the stars in them) from the top of an image of that shape to its bottom, float32.

    look: gives the part of the image that is at an index of an array. Tiles are blended, feathered, where they overlap;
    the light of one row of them is kept, no more, and changed when the next one is asked for. title: of the progress
    bar, or None.
    """
    axes = [tiles_along(side, settings, architecture.multiple) for side in shape[:2]]
    (high, tops, rows), (wide, lefts, columns) = axes
    down, across = (feather(len(indices), starts, tile, tile - starts.step) for tile, starts, indices in axes)
    before, aside = ((tile - starts.step) // 2 for tile, starts, _ in axes)  # what was added before the picture
    tiles = (look(np.ix_(rows[top : top + high], columns[left : left + wide])) for top in tops for left in lefts)
    count = len(tops) * len(lefts)
    found = answers(generator, tiles, min(settings.batch_size, count), settings.views)
    light = np.zeros((high, len(columns), shape[2]), np.float32)
    with tqdm(total=count, desc=title, unit="tile", disable=title is None) as bar:
        for top, weight in zip(tops, down):
            for left, share, (starry, starless) in zip(lefts, across, found):
                taken = starry - with_grain(starry, starless)
                light[:, left : left + wide] += (weight[:, None] * share)[..., None] * taken
                bar.update()
            first = top - before  # the picture's row that the topmost of these is
            done = first + tops.step if top != tops[-1] else shape[0]
            for part in bands(done, max(first, 0)):
                yield part, light[part.start - first : part.stop - first, aside : aside + shape[1]]
            light[: -tops.step] = light[tops.step :]
            light[-tops.step :] = 0


def stellar_light(generator, architecture, image, settings, title=None):
    """The light of the stars in an image as the network finds it, same shape, float32."""
    light = np.empty_like(image)
    for rows, part in light_bands(generator, architecture, image.shape, image.__getitem__, settings, title):
        light[rows] = part
    return light


def weights_for(settings, n_channels):
    """The weights file for pictures of so many channels: the named one, else the shipped one beside nox.py."""
    return Path(settings.weights) if settings.weights else Path(__file__).resolve().parent / weights_name(n_channels)


def stretch_for(picture, settings):
    """The stretch under which the network is to see a picture; None if it is not linear."""
    if settings.linear == "yes" or settings.linear == "auto" and looks_linear(picture):
        return fit_stretch(picture, settings.shadows, settings.target, settings.linked)


def starlight(picture, stretch, settings, title, load):
    """(rows, the light of the stars in them, an image) from the top of a picture to its bottom.

    load: load_generator, or one that remembers. title: of the progress bar, or None. No light is taken where the
    picture is transparent, and of a colour picture without colour the same from each channel.
    """
    height, width, given = picture.pixels.shape
    weights = weights_for(settings, given)
    generator, architecture = load(weights)
    if (taken := architecture.n_channels) != given:
        kind = {1: "grayscale", 3: "colour"}
        raise BadInput(f"{weights}: {kind[taken]} weights, but a {kind[given]} picture; see --n-channels {taken}")
    title = title and title + ", stretched" * (stretch is not None)
    gray = given == 3 and all((part == part[..., :1]).all() for part in map(picture.pixels.__getitem__, bands(height)))

    def look(index):
        return picture.with_pixels(picture.pixels[index]).image(stretch)

    if settings.upsample:  # takes memory for the whole: each row of twice the size depends on several of these
        seen = resized(picture.image(stretch), 2 * height, 2 * width).clip(0, 1)
        whole = resized(stellar_light(generator, architecture, seen, settings, title), height, width)
        found = ((rows, whole[rows]) for rows in bands(height))
    else:
        found = light_bands(generator, architecture, picture.pixels.shape, look, settings, title)
    for rows, light in found:
        image = look(rows)
        if gray:
            light = light.mean(axis=2, keepdims=True).repeat(3, axis=2)
        light = without_faint(light).clip(image - 1, image)  # what remains lies in 0..1
        if picture.alpha is not None:
            light[picture.alpha[rows] == 0] = 0
        yield rows, light


def whole_starlight(picture, settings, load):
    """All the light that both looks take from a picture that is not linear, in one image."""
    light = np.zeros(picture.pixels.shape, np.float32)
    for rows, part in both_looks(picture, None, settings, None, load):
        light[rows] += part
    return np.minimum(light, picture.image())


SIGNIFICANCE = 4  # standard deviations: then all frames of tests/benchmarks/noise.py come back as they were
ISLAND_ROWS = 64  # an island that is taller is no noise


def significant(found, picture, stretch):
    """What starlight gives for a linear picture, less the islands of light that its noise alone may have made.

    Where the stretch clips the sky, what is left of its noise looks like faint stars, and the network takes some; the
    linear pixels still tell. Some rows are held back, so that no island is judged before it is whole.
    """
    held, first, height = None, 0, len(picture.pixels)
    for rows, light in found:
        light = light.copy() if held is None else np.concatenate([held, light])
        drop_islands(light, picture, stretch, slice(first, rows.stop))
        done = height if rows.stop == height else max(first, rows.stop - ISLAND_ROWS)
        yield slice(first, done), light[: done - first]
        held, first = light[done - first :], done


def drop_islands(light, picture, stretch, rows):
    """Set the islands of light in some rows to 0 whose brightest 3 x 3 pixels do not stand out of the linear noise.

    Those that may go on above or below the rows are left.
    """
    from astropy.stats import mad_std

    without = picture.without(light, stretch, rows)
    both = picture.unit(rows), picture.with_pixels(without).unit()
    starry, starless = (np.nan_to_num(x, posinf=0, neginf=0) for x in both)
    touched = (starry != starless).any(axis=2)
    removed, starless = (x.astype(np.float32) for x in (starry - starless, starless))
    removed, smooth = (smoothed(x, 3) for x in (removed, starless))
    grain = smooth - cv2.GaussianBlur(starless, (0, 0), 3).reshape(light.shape)
    for columns in bands(light.shape[1]):
        deviation = mad_std(grain[:, columns], axis=(0, 1))  # of medians: stars that are left do not count
        removed[:, columns] /= np.maximum(deviation, 1e-12)
    count, islands = cv2.connectedComponents(touched.astype(np.uint8))
    stays = np.zeros(count, bool)
    stays[islands[(np.abs(removed) >= SIGNIFICANCE).any(axis=2)]] = True
    if rows.start > 0:
        stays[islands[0]] = True
    if rows.stop < len(picture.pixels):
        stays[islands[-1]] = True
    light[~stays[islands]] = 0


SHRINK = 3  # how many times smaller the second look sees a giant
GIANT = 0.7, 225 / 255  # light taken, brightness: the core of a giant has more. At 0.5 more pairs became worse


class Squares:
    """Means over SHRINK x SHRINK pixels of an image that comes in rows; at the end of a side, of what there is."""

    def __init__(self, shape):
        self.counts = [np.bincount(np.arange(side) // SHRINK).astype(np.float32) for side in shape[:2]]
        self.sums = np.zeros((*map(len, self.counts), shape[2]), np.float32)

    def add(self, rows, part):
        for down, right in np.ndindex(SHRINK, SHRINK):
            some, first = part[down::SHRINK, right::SHRINK], (rows.start + down) // SHRINK
            self.sums[first : first + len(some), : some.shape[1]] += some

    def means(self):
        down, right = self.counts
        return self.sums / (down[:, None, None] * right[:, None])


def enlarged_rows(small, shape):
    """(rows, part) of the image whose Squares these are, interpolated; without rows of zeros."""
    for rows in bands(shape[0], rows=21 * SHRINK):
        first = max(rows.start // SHRINK - 1, 0)  # a row more at each end, for the interpolation
        part = small[first : math.ceil(rows.stop / SHRINK) + 1]
        if part.any():
            large = cv2.resize(part, None, fx=SHRINK, fy=SHRINK, interpolation=cv2.INTER_LINEAR)
            start = rows.start - SHRINK * first
            yield rows, large[start : start + rows.stop - rows.start, : shape[1]].reshape(-1, *shape[1:])


def both_looks(picture, stretch, settings, title, load):
    """What starlight gives, less noise; then, from the top again, (rows, the light that a second look takes besides).

    Of a wide star the network leaves rings and discs, since it sees only so many pixels far. The first light is given
    away at once, not kept: all that the second look needs of it is its means over small squares.
    """
    found = starlight(picture, stretch, settings, title, load)
    found = significant(found, picture, stretch) if stretch else found
    if not settings.second_look:
        yield from found
        return
    first = Squares(picture.pixels.shape)
    for rows, light in found:
        first.add(rows, light)  # before the light is given away, and changed
        yield rows, light
    if (taken := first.means()).max() > GIANT[0]:
        yield from second_look(picture, taken, stretch, settings, title, load)


def second_look(picture, first, stretch, settings, title, load):
    """(rows, light) that the network takes from giants in the picture at a third of its size, and did not at its own.

    first: what it did, at a third. Where there is no giant, there is no second inference.
    """
    small = Squares(picture.pixels.shape)
    for rows in bands(len(picture.pixels)):
        small.add(rows, picture.with_pixels(picture.pixels[rows]).image(stretch))
    image = small.means()
    cores = (first.max(axis=2) > GIANT[0]) & (image.max(axis=2) > GIANT[1])
    cores = cv2.morphologyEx(cores.astype(np.uint8), cv2.MORPH_OPEN, disc(1))
    if not cores.any():
        return
    settings, title = dataclasses.replace(settings, upsample=False), title and title + ", second look"
    second = np.concatenate([light for _, light in starlight(Picture(image), None, settings, title, load)])
    for rows, light in enlarged_rows(glow_of(cores, first, second), picture.pixels.shape):
        if picture.alpha is not None:
            light[picture.alpha[rows] == 0] = 0
        yield rows, light


def disc(radius):
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


def glow_of(cores, first, second):
    """The wide light around cores of giants, a mask, that the second look takes and the first one did not.

    Blurred and opened, it is none of the grain and of small stars. Grey reconstruction (Vincent 1993) then leaves each
    pixel no more than the faintest on the brightest way to it from a core: a galaxy that stands out of the glow is cut
    off there, and what does not hang together with a core is 0. To a ring the way leads over what the first look took.
    The widths are those that gained most on pairs, in pixels of the small picture.
    """
    light = cv2.GaussianBlur(second - first, (0, 0), 1.5).clip(0).reshape(first.shape)
    light = without_faint(cv2.morphologyEx(light, cv2.MORPH_OPEN, disc(2)).reshape(first.shape))
    strength = light.max(axis=2)
    ways = np.where(first.max(axis=2) > 0.3, np.float32(1), strength)
    found, before = ways * cv2.dilate(cores, disc(3)), None
    while not np.array_equal(found, before):
        found, before = np.minimum(cv2.dilate(found, np.ones((3, 3), np.uint8)), ways), found
    return light * (np.minimum(found, strength) / np.maximum(strength, 1e-6))[..., None]


def star_layer(starry, starless, mode):
    """(starless, stars) of two pictures of one depth, from which the starry one is made again.

    subtract: starry = starless + stars, exactly. unscreen: starry = 1 - (1 - starless) (1 - stars), in units of white;
    of integers exactly when rounded, of floats to their precision. Nothing may be brighter without stars than with.
    """
    a, b = starry.pixels, starless.pixels
    stars = np.empty_like(a)
    if mode == "unscreen":
        for rows in bands(len(a)):
            x, y = starry.unit(rows), starless.unit(rows)
            light = np.divide(x - y, 1 - y, out=np.zeros_like(x), where=(x != y) & (y < 1) & np.isfinite(x))
            stars[rows] = starry.rounded(starry.black + light * (starry.white - starry.black))
        return starless, starry.with_pixels(stars)
    for rows in bands(len(a)):  # the difference may be rounded where it is large; then what it leaves is exact
        difference = np.subtract(a[rows], b[rows], out=np.zeros_like(a[rows]), where=a[rows] != b[rows])
        difference[~np.isfinite(difference)] = 0
        stars[rows] = difference + a.dtype.type(round(starry.black))
        b[rows] = np.where(difference != 0, a[rows] - difference, a[rows])
    return starless, starry.with_pixels(stars)


MASK_WHITE = 0.1  # light at which the mask is white: faint stars are to show in it


def star_mask(light):
    """Pixels of 8 bits, white where much light was taken, shape (height, width, 1)."""
    return np.rint(255 * (np.abs(light).max(axis=2, keepdims=True) / MASK_WHITE).clip(0, 1)).astype(np.uint8)


PREVIEW_SIDE = 1600


def preview(starry, starless, stretch):
    """An 8-bit picture of before, left, and after, right, as the network saw them, reduced to fit a screen."""
    factor = min(1, PREVIEW_SIDE / max(starry.pixels.shape[:2]))
    height, width = (max(1, round(factor * side)) for side in starry.pixels.shape[:2])
    halves = [resized(picture.image(stretch), height, width) for picture in (starry, starless)]
    return Picture(np.rint(255 * np.hstack(halves).clip(0, 1)).astype(np.uint8), metadata={"icc": profile(starry)})


HISTORY = {
    "starless": "stars removed by nox",
    "stars": "stars alone, as removed by nox",
    "mask": "mask of the stars, by nox",
    "preview": "before and after removing the stars, by nox",
}


def expand(name):
    """The pictures that the name of a file or folder or a wildcard stands for; not those that nox wrote beside them."""
    found = [Path(name)]
    if found[0].is_dir():
        found = sorted(p for p in Path(name).iterdir() if name_parts(p)[1] in FORMATS and not p.name.startswith("."))
    elif glob.has_magic(name) and not found[0].exists() and name_parts(name)[2] is None:
        found = sorted(map(Path, glob.glob(name)))  # Windows leaves wildcards to the program
    if not found:
        raise BadInput(f"{name}: no pictures there")
    ours = {f"{name_parts(p)[0]}_{kind}" for p in found for kind in HISTORY}
    return [p for p in found if name_parts(p)[0] not in ours]


def destination(place, source, extension, kind, many):
    """Where something made of a picture goes: into a folder, as <stem>_<kind>, or to the file that is named.

    Of HDU n it is <stem>_<n>_<kind>. A name without an extension gets the picture's, a preview .png. The folder is made
    if need be.
    """
    path = Path(place)
    stem, _, number = name_parts(source)
    stem += "" if number is None else f"_{number}"
    extension = ".png" if kind == "preview" else extension
    if many or path.is_dir() or place.endswith(("/", os.sep)):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{place}: not a folder, nor can it be made one ({error.strerror})") from None
        return path / f"{stem}_{kind}{extension}"
    return path if path.suffix else path.with_name(path.name + extension)


def same_file(path, other):
    return path.exists() and path.samefile(other)


def check_target(target, source, replaceable):
    """Raises BadInput for a file that must not be or cannot be written: told before the long work, not after it."""
    if target.is_dir():
        raise BadInput(f"{target}: is a folder; name a file with -o")
    if not target.parent.is_dir():
        raise BadInput(f"{target.parent}: no such folder")
    if not os.access(target.parent, os.W_OK):
        raise BadInput(f"{target.parent}: this folder cannot be written to")
    if same_file(target, source):
        raise BadInput(f"{target}: is the picture itself, which is never overwritten; name another file with -o")
    if target.exists() and not replaceable:
        raise BadInput(f"{target}: exists; --overwrite replaces it")
    format_of(target)


def infer(values, settings):
    """Remove the stars from every picture named; raises BadInput in the end when that failed for some of several."""
    sources, failed, several = [], [], len(values.images) > 1
    for name in values.images:
        with telling(failed, several):
            sources += expand(name)
    total = len(sources) + len(failed)
    many = several or total > 1 or Path(values.images[0]).is_dir()
    load = functools.cache(load_generator)
    files = (picture_file(source)[0].resolve() for source in sources)
    reserved = dict.fromkeys(files, "is one of the pictures, which are never overwritten")
    if values.exclude:
        reserved.setdefault(Path(values.exclude).resolve(), "is what --exclude names, which is never overwritten")
    for source in sources:
        with telling(failed, many):
            infer_one(source, values, settings, load, many, reserved)
    if failed:
        raise BadInput(f"{len(failed)} of {total} pictures failed")


@contextlib.contextmanager
def telling(failed, several):
    """Within, what fails is told and noted, so that others go on; where there are none, it ends the run."""
    try:
        yield
    except (BadInput, OSError) as error:  # OSError: of a path that cannot be looked at
        if not several:
            raise
        failed.append(error)
        print(f"nox.py: {error}", file=sys.stderr)


def infer_one(source, values, settings, load, many, reserved):
    """Write what was asked for of one picture and, where no output is named, a copy of the starry one.

    many: everything goes into folders. reserved: the files that must not be written and why; those that are written
    are added.
    """
    with silenced():  # libpng and libjpeg
        original = read_picture(source)
    picture = in_channels(original, settings.n_channels)
    file, extension = picture_file(source)[0], name_parts(source)[1] or extension_of(original)
    named = values.output or ("." if many else None)
    places = {"starless": named or "starless" + extension} | {kind: getattr(values, kind) for kind in OUTPUTS}
    targets = {kind: destination(place, source, extension, kind, many) for kind, place in places.items() if place}
    copy = Path("starry" + extension)
    if not named:
        reason = reserved.setdefault(copy.resolve(), "is the copy of the picture")
        if values.exclude and copy.resolve() == Path(values.exclude).resolve():
            raise BadInput(f"{copy}: {reason}; name the starless picture with -o")
        if not same_file(copy, file):
            check_target(copy, file, True)
    for kind, target in targets.items():
        check_target(target, file, values.overwrite or (kind == "starless" and not named))
        if kind in ("starless", "stars"):
            as_read = check_holds(picture, target, settings.depth) == picture.pixels.dtype
            as_read &= format_of(target).own in picture.metadata
            if kind == "stars" and as_read and picture.rounded(np.rint(picture.black)) != np.rint(picture.black):
                raise BadInput(f"{target}: the integers of this picture have none for black; see --depth 32f")
        if reason := reserved.get(target.resolve()):
            raise BadInput(f"{target}: {reason}; name another file")
        reserved[target.resolve()] = "is another output of this call"
    excluded = read_exclusion(values.exclude, picture) if values.exclude else None
    stored = functools.partial(format_of(targets["starless"]).stored, wanted=settings.depth)
    for kind, layer in layers_of(picture, targets, stored, excluded, settings, source.name, load).items():
        write_picture(
            targets[kind], layer.noting(HISTORY[kind]), settings.depth if kind in ("starless", "stars") else "keep"
        )
    if not named and not same_file(copy, file):
        write_copy(copy, file, picture if picture is not original else None)


def layers_of(picture, kinds, stored, excluded, settings, title, load):
    """{kind: picture} of what is made of a picture; starless and stars are of one depth.

    stored(picture): the picture as it will be written. excluded: what is to stay, an image, or None. title, load: as for
    starlight.
    """
    stretch, gray = stretch_for(picture, settings), (*picture.pixels.shape[:2], 1)
    layers = {"starless": picture.with_pixels(picture.pixels.copy())}
    if "mask" in kinds:
        layers["mask"] = Picture(np.zeros(gray, np.uint8), metadata=picture.metadata)
    for rows, light in both_looks(picture, stretch, settings, title, load):
        light *= np.float32(settings.strength)
        if excluded is not None:
            light *= 1 - excluded[rows]
        if "stars" in kinds:
            np.maximum(light, 0, out=light)  # what is lifted cannot be made again by adding stars
        # of what is left so far: rows with giants come a second time
        layers["starless"].pixels[rows] = layers["starless"].without(light, stretch, rows)
        if "mask" in kinds:
            mask = layers["mask"].pixels[rows]
            mask += np.minimum(star_mask(light), 255 - mask)
    if "preview" in kinds:
        layers["preview"] = preview(picture, layers["starless"], stretch)
    if "stars" in kinds:
        pair = star_layer(stored(picture), stored(layers["starless"]), settings.star_mode)
        layers |= zip(("starless", "stars"), pair)
    return layers


def write_copy(target, file, changed):
    """Write the starry picture: the file itself, or the picture that was made of it."""
    if changed:
        return write_picture(target, changed)
    with replacing(target) as temporary:
        shutil.copyfile(file, temporary)


def read_exclusion(path, picture):
    """What is to stay of a picture, an image of one channel, from a file of the same size."""
    mask = read_picture(path).gray().image()
    if mask.shape[:2] != picture.pixels.shape[:2]:
        sizes = ["x".join(map(str, array.shape[1::-1])) for array in (mask, picture.pixels)]
        raise BadInput(f"{path}: has {sizes[0]} pixels, the picture {sizes[1]}")
    return mask


def in_channels(picture, n_channels):
    """The picture as --n-channels has it: 1 turns colour into gray, 3 gray into colour, 0 leaves it as it is."""
    if n_channels == 3 and picture.pixels.shape[2] == 1:
        return picture.with_pixels(np.repeat(picture.pixels, 3, axis=2))
    return picture.gray() if n_channels == 1 else picture


def show_pair(generator, architecture, starry, truth, settings):
    """Write input.png, output.png and gt.png of a pair of images; returns PSNR of input and of output against truth."""
    starless = starry - settings.strength * whole_starlight(
        Picture(starry), settings, lambda weights: (generator, architecture)
    )
    for name, image in ("input.png", starry), ("output.png", starless), ("gt.png", truth):
        write_image(name, image)
    return psnr(starry, truth), psnr(starless, truth)


def infer_pair(settings):
    """Try the weights on a random pair of the data."""
    paths = random.choice(find_pairs(settings.data))
    pair = [in_channels(Picture(pixels), settings.n_channels) for pixels in read_pair(paths, 1)]
    generator, architecture = load_generator(weights_for(settings, pair[0].pixels.shape[2]))
    before, after = show_pair(generator, architecture, *(picture.image() for picture in pair), settings)
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
        elif not values.images:
            infer_pair(collect(Inference, values))
        else:
            infer(values, collect(Inference, values))
    except (BadInput, OSError) as error:  # OSError: of a path that cannot be looked at
        sys.exit(f"nox.py: {error}")
    except KeyboardInterrupt:
        advice = "; the same command goes on from the last epoch" if values.command == "train" else ""
        sys.exit(f"\nnox.py: interrupted{advice}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, INTERRUPTED)
    main(ARGUMENTS)
