"""GenerateStars.py: make pairs of a starry picture and the same picture without its stars, to train nox on.

    python GenerateStars.py                                  1000 colour pairs on painted skies into "nox data"
    python GenerateStars.py --backgrounds photos SIDD_Small  photographs as backgrounds, painted skies between them
    python GenerateStars.py --no-color --imcount 200 --preview-pairs 12

Each pair is x{i}.png (starry) and y{i}.png (star-free). It depends on --seed, its number i, its size and colour and
the backgrounds alone.

Convention: an image is float32 RGB, shape (height, width, channels), 0..1; lengths are pixels, angles radians,
temperatures kelvin. "Linear" values are light, "display" values are what the stretched picture shows. OpenCV's BGR
and integer depths exist only where pictures are read, written and squeezed through JPEG.

Star removal by a network trained on such pairs is StarNet's idea (Nikita Misiura); synthetic stars on star-free
backgrounds is that of the original nox (Christopher Harvey).
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import itertools
import math
import multiprocessing
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    INTERRUPTED = signal.getsignal(signal.SIGINT)
    if INTERRUPTED is signal.default_int_handler:  # heeded: without a traceback from within what is loaded here
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import cv2
import numpy as np
from astropy import units
from astropy.modeling.models import BlackBody, Sersic2D
from astropy.table import Table, vstack
from photutils.datasets import apply_poisson_noise
from photutils.psf import AiryDiskPSF, GaussianPSF, MoffatPSF
from scipy.fft import irfft2, next_fast_len, rfft2
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------------------------
# Settings: one field a line; the command line is derived from them
# --------------------------------------------------------------------------------------------------------------------


def setting(default, text):
    """A dataclass field with its default and the reason or meaning that --help shows."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Settings:
    imcount: int = setting(1000, "number of pairs to make")
    start: int = setting(0, "number of the first pair")
    cpus: int = setting(0, "processes; 0 takes one for each CPU")
    color: bool = setting(True, "RGB pairs; --no-color makes grayscale ones")
    save_dir: str = setting("nox data", "folder for the pairs; made if missing")
    seed: int = setting(0, "seed of everything random; pair i depends on it, i, its size, colour and backgrounds alone")
    size: int = setting(512, "height and width of a picture: room for halos and random 256-pixel crops")
    depth: int = setting(8, "bits per channel of the PNG files, 8 or 16")
    backgrounds: tuple[str, ...] = setting(
        (), "folders of star-free photographs (also SIDD-Small, RENOIR); none: paint"
    )
    painted: float = setting(0.5, "share of painted skies beside the photographs of --backgrounds")
    overwrite: bool = setting(False, "make pairs again whose two files exist; by default they are kept")
    catalog: bool = setting(
        False, "write each pair's stars as stars{i}.ecsv (x, y, flux, FWHM, temperature, population)"
    )
    preview_pairs: int = setting(
        0, "write preview.png, a contact sheet of the first N of these pairs, starry above starless"
    )


# --------------------------------------------------------------------------------------------------------------------
# What is drawn for each picture: every range in one place
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Range:
    """A random number between two ends, uniform in itself or (log) in its logarithm."""

    low: float
    high: float
    log: bool = False

    def __call__(self, rng, size=None):
        if not self.log:
            return rng.uniform(self.low, self.high, size)
        drawn = np.exp(rng.uniform(np.log(self.low), np.log(self.high), size))
        return float(drawn) if size is None else drawn  # numpy's own scalar would turn whole float32 images to float64


# Stars. A population is drawn with its chance; "faintest" is how far its faintest star stands over the sky once
# stretched (0.01 drowns in noise, 0.1 is plain); "span" is magnitudes from faintest to brightest; "slope" is s of
# N(>F) ~ F^-s (1.5 is a uniform space, real fields lie below); "spread" is the radius of its clumps over the frame;
# "disc" is the radius in pixels to which the stars are saturated, drawn in place of a magnitude.
@dataclasses.dataclass(frozen=True)
class Population:
    chance: float
    density: Range  # stars per megapixel
    faintest: Range
    span: Range
    slope: Range
    temperature: Range
    spread: Range | None = None
    disc: Range | None = None


POPULATIONS = {
    "field": Population(0.90, Range(100, 8000, True), Range(0.015, 0.40, True), Range(4, 9), Range(0.4, 1.2), Range(3000, 12000, True)),
    "crowd": Population(0.35, Range(5000, 250000, True), Range(0.01, 0.25, True), Range(2, 6), Range(0.7, 1.6), Range(2400, 7000, True)),
    "dwarfs": Population(0.30, Range(200, 8000, True), Range(0.012, 0.06, True), Range(1, 3), Range(0.8, 1.4), Range(1800, 3600, True)),
    "cluster": Population(0.20, Range(200, 6000, True), Range(0.02, 0.4, True), Range(4, 8), Range(0.4, 0.9), Range(4000, 25000, True), spread=Range(0.03, 0.25, True)),
    "giants": Population(0.70, Range(4, 60, True), Range(0.5, 0.9), Range(2, 8), Range(0.3, 0.8), Range(2800, 25000, True)),
    "beacons": Population(0.40, Range(3, 20, True), Range(0.9, 0.95), Range(0, 1), Range(1, 2), Range(2800, 25000, True), disc=Range(2, 30, True)),
}  # fmt: skip
STARLESS_CHANCE = 0.08  # no star at all: nothing may be taken, not even galaxies that look like stars
SPARSE_CHANCE, SPARSE = 0.25, Range(0.02, 0.3, True)  # share that is left of all stars but giants and beacons
MULTIPLE_SHARE, COMPANIONS = Range(0.003, 0.3, True), 1.0  # share of stars with companions; mean beyond the first
COMPANION_SEPARATION = Range(0.5, 6, True)  # in FWHM: as many in each octave, after Opik 1924
COMPANION_MAGNITUDES = Range(0, 4)  # fainter than their star
CONFUSION = 0.3  # most stars of a population in a square of the FWHM's side: more are a glow, which is to stay
MARGIN = 0.06  # stars are drawn so far outside the frame, over its side: their halos reach in
EXCESS = 3e5  # most light of a beacon over a just saturated star's: 14 magnitudes

# Optics.
FWHM = Range(1.0, 5.0, True)  # pixels; most pictures are sampled at 2 to 4 pixels, wide fields at 1
FWHM_LARGE = Range(5.0, 15, True)  # long focal lengths and poor seeing
FWHM_LARGE_CHANCE = 0.10
BETA = Range(2.0, 6.0, True)  # Moffat's exponent: 2.5 measured seeing, 4.765 Kolmogorov, more: short wings
CORE_SHARES = {"moffat": 0.68, "gaussian": 0.10, "airy": 0.17, "defocus": 0.05}
AIRY_BAND = Range(0.01, 0.15, True)  # half width of the filter over its middle: a wide one smears the outer rings
OBSTRUCTION = Range(0.2, 0.5)  # secondary mirror over aperture, of defocused stars
AXIS_RATIO = Range(0.75, 1.0)  # minor over major axis of a star's middle: tilt, guiding
ROUND = 1.2  # FWHM at which half of that is left, less further out: as of Moffats that are blurred along one axis
TRAIL_CHANCE, TRAIL = 0.12, Range(0.5, 1.5)  # guiding trail in FWHM; none where seeing is poor, which hides it
COMA_CHANCE, COMA = 0.20, Range(0.3, 1.5)  # comet tail at the frame's corner in FWHM
FIELD_STRETCH = Range(0.0, 0.35)  # radial elongation at the corner
FIELD_BLUR = Range(0.0, 0.3)  # FWHM at the corner over that in the middle, less 1: field curvature
SEEING_CHANCE, SEEING = 0.2, Range(-0.1, 0.1)  # FWHM at an edge over the middle, less 1: tilt, drifting air
ZONES = 3  # a picture with coma or changing seeing is divided into ZONES x ZONES, each with its own PSF
CHROMATIC_CHANCE = 0.25
CHROMATIC_FWHM = Range(0.9, 1.25)  # red and blue FWHM over green
CHROMATIC_SHIFT = Range(-0.6, 0.6)  # lateral colour, pixels
SPIKE_CHANCE = 0.6
SPIKE_AXES = {2: 0.70, 3: 0.20, 4: 0.10}  # two arms an axis: 4 (reflector, Hubble), 6 (JWST), 8
SPIKE_UNEVEN_CHANCE, SPIKE_UNEVEN = 0.3, Range(0.2, 1.0, True)  # light of the axes over each other
SPIKE_LIGHT = Range(0.01, 0.15, True)  # share of the star's light in all its spikes
SPIKE_WIDTH = Range(0.35, 0.8)  # in FWHM
SPIKE_DECAY = Range(1.2, 2.2)  # exponent of the fall along the arm
SPIKE_LENGTH = Range(8, 150, True)  # in FWHM, on which the arm ends exponentially
SPIKE_RAINBOW_CHANCE, SPIKE_SPLIT_CHANCE = 0.4, 0.2
SPIKE_PERIOD = Range(8, 40, True)  # pixels between the colour fringes of a spike
HALO_COUNT = {0: 0.42, 1: 0.22, 2: 0.2, 3: 0.16}  # several sum up to a glow that falls off slowly, without an edge
HALO_LIGHT = Range(0.02, 0.6, True)  # of each, over that of the star; a diffusion filter scatters half of it
HALO_SCALE = Range(1.5, 30, True)  # exponential scale, or the FWHM of an aureole, in FWHM
AUREOLE_CHANCE, AUREOLE_BETA = 0.5, Range(1.1, 2.0)  # halo that falls as r^-2beta; King 1971 found r^-2
RAYS_CHANCE, RAYS, RAY_COUNT = 0.25, Range(0.1, 0.5), Range(80, 400, True)  # hairs of scattered light in the halo
HALO_BLUE = Range(0.6, 2.5, True)  # blue over red light of the halo: refractors bloat blue
REFLECTION_COUNT = {0: 0.7, 1: 0.2, 2: 0.1}  # filters, window and sensor reflect each other's light
REFLECTION_LIGHT, REFLECTION_RADIUS = Range(0.0005, 0.02, True), Range(10, 60, True)  # over the star's; pixels
RIM_CHANCE, RIM = 0.5, Range(0.3, 6.0, True)  # light of a disc's rim over its middle's, less 1
RIM_WIDTH = Range(0.03, 0.15, True)  # over the disc's radius
RIM_SIDE = Range(0.0, 1.0)  # how much brighter the rim is on the side to which the disc is shifted, and darker opposite
HOLE_CHANCE = 0.5  # shadow of the secondary mirror over the disc
REFLECTION_TINT = Range(0.1, 1.0)  # of each channel: coatings and filters reflect one colour most

BLEED_CHANCE, BLEED = 0.04, Range(2, 10)  # charge of saturated stars along the CCD's columns, FWHM a decade of excess

# Colour of the stars.
SATURATION = Range(0.0, 2.6)  # exponent on a star's blackbody colour: 0 grey, 1 true, 2 pushed
TINT_CHANCE, TINT = 0.25, Range(0.5, 1.5)  # narrow-band palettes, poor white balance, unlinked stretch
MONO_CHANCE = 0.15  # grey pictures among the colour pairs

# Exposure and stretch.
SCREEN_CHANCE = 0.25  # stretched stars screen-blended, the original way; else linear light is added
MIDTONES = Range(0.0006, 0.25, True)  # of the midtones transfer function: 0.0006 deep stretch, 0.25 gentle
UNLINKED_CHANCE, UNLINKED = 0.15, Range(0.5, 2.0, True)  # midtones of each channel over their common value
STRETCH_SHARES = {"mtf": 0.55, "asinh": 0.22, "hyperbolic": 0.23}
HEADROOM = Range(1, 1e4, True)  # white over that of one exposure: giants come out as cusps in wide glows, not as discs
LOCAL_INTENSITY = Range(0.6, 5.0, True)  # |b| of the generalised hyperbolic stretch, of either sign
SYMMETRY_POINT, HIGHLIGHTS = Range(0.0, 1.0), Range(0.3, 1.0)  # SP over 1 / D; HP, above which it is a line
FLOODED = 0.3  # most that stars lift the median pixel on the display: nobody stretches a picture until it is white
VEILED = 0.06  # and the pixel at a tenth: a glow all over the frame goes with the sky's gradient, before the stretch
NOISE = Range(0.0006, 0.1, True)  # standard deviation in display units at the sky's level: single exposures reach 0.1
CLIPPED = 2.0  # least standard deviations from the sky down to black: nobody cuts off most of the noise
NOISELESS_CHANCE = 0.2  # noise reduction went before: smooth but for the rounding
PHOTON_SHARE = Range(0.0, 1.0)  # part of the variance at the sky's level that grows with the light
CORRELATION_CHANCE, CORRELATION = 0.65, Range(0.4, 1.0)  # debayering and resampling: blur of the noise, pixels
CHROMA = Range(0.0, 1.0)  # 0: the same noise in all channels, 1: independent
BANDING_CHANCE, BANDING = 0.08, Range(0.05, 0.4)  # row or column noise over pixel noise
HOT_PIXEL_CHANCE, HOT_PIXELS = 0.06, Range(3, 60, True)  # left in both pictures, per megapixel
GLOW_CHANCE = 0.85  # share of pictures whose stars raise their own photon noise

# Processing applied to both pictures alike.
RESIZE_CHANCE, RESIZE = 0.25, Range(0.6, 1.0)  # rendered larger, then reduced by this factor
SHARPEN_CHANCE, SHARPEN_AMOUNT, SHARPEN_RADIUS = 0.30, Range(0.3, 1.6), Range(0.8, 2.5)  # leaves dark rings
SHARPEN_NOISE = 0.03  # nobody sharpens a picture that is noisier
DENOISE_CHANCE, DENOISE = 0.20, Range(0.5, 1.0)  # share of the smoothed picture
LEVELS_CHANCE, BLACK_POINT, WHITE_POINT = 0.12, Range(0.0, 0.06), Range(0.7, 1.0)  # what lies beyond is clipped
CONTRAST_CHANCE, CONTRAST = 0.10, Range(0.1, 0.4)
VIBRANCE_CHANCE, VIBRANCE = 0.30, Range(0.6, 1.8)
JPEG_CHANCE, JPEG_QUALITY = 0.35, Range(72, 98)

# Backgrounds.
SKY_LEVEL = Range(0.01, 0.25, True)  # display level of the darkest sky
NEBULA_PEAK = Range(0.05, 4.0, True)  # height of the brightest nebula over the sky, before the shoulder 1 - exp(-x)
EMPTY_SKY_CHANCE = 0.25  # no nebula at all: a gradient and noise
GALAXY_CHANCE, GALAXY_FIELD_CHANCE, GALAXY_CLUSTER_CHANCE = 0.30, 0.28, 0.17
SPIRAL_CHANCE = 0.5  # of large galaxies; the others are ellipticals
KNOT_CHANCE, COMET_CHANCE, GLOBULAR_CHANCE = 0.30, 0.03, 0.05
LIT_CHANCE = 0.5  # a bright star stands where a nebula is lit from, a faint one in the middle of a planetary one
BRIGHTER = 8  # it is one of so many of the brightest, or none of them: a ring round a burnt-out star is a reflection
LIT_REACH = Range(0.08, 1.0, True)  # radius within which it lights the gas, over the frame: a reflection nebula, a sky
PLANETARY_CHANCE, PLANETARY_RADIUS, PLANETARY_LIGHT = 0.12, Range(0.015, 0.4, True), Range(0.15, 6.0, True)
PLANETARY_LEAST = 4  # FWHM of its least radius: what is smaller cannot be told from a burnt-out star
KNOTS, KNOT_LIGHT = Range(3, 80, True), Range(0.05, 1.5, True)  # in a picture that has any; before the shoulder
GALAXY_SCALE = Range(0.02, 2.0, True)  # of a large one's disk over the frame: to a close-up of its middle
GALAXY_LIGHT = Range(0.2, 8.0, True)  # middle of a large galaxy before the shoulder: some are burnt out
GALAXY_HEIGHT = Range(0.03, 4.0, True)  # middle of a small one: from hardly seen to white
GALAXY_SIZE = Range(1.8, 3.0)  # least half-light radius in FWHM: what is smaller cannot be told from a star
GALAXY_CUSP = 0.25  # Sersic index at most this x (1 + half-light radius in FWHM): a cusp looks like a star in its halo
GALAXY_INDEX = 2.0  # and at most this: beyond, the cusp of a wider one is as narrow as a star again; of a round one 1
SEEN_WIDTH = 0.55  # of the width of stars on the display counts as their FWHM where galaxies and planetaries are sized
GALAXY_CORE = 4  # least scale of a large one's middle in FWHM: a burnt-out smaller one looks like a star with its halo
ROUNDEST = 0.82  # axis ratio of galaxies without arms, for the same reason
WIDE_GALAXY = 5  # half-light radius in FWHM from which small galaxies may be round
WIDE_CORE = 8  # scale of its middle in FWHM from which one without arms may be round: a star's edge is steeper
BULGE, BULGE_SCALE = Range(0.5, 5.0, True), Range(0.08, 0.35, True)  # of a spiral: light over the disk's, scale too
RING_CHANCE, RING_RADIUS, RING_WIDTH = 0.3, Range(0.4, 1.6), Range(0.08, 0.3)  # of star formation, in disk scales
BURNT_SIZE, BURNT_HEIGHT = 8, 0.8  # those of fewer FWHM (half-light radius) do not burn out either
BURNT_ELLIPTICAL = 1.6  # nor those without arms, unless wide: a giant star in its glow is white in the middle
BURNT_DISK = 1.0  # nor a spiral's disk: a white plate, of which no arms are left, looks like a giant star in its glow
PHOTO_SCALE = Range(0.35, 1.0)  # photographs are reduced by this: hides their own noise and blur
PHOTO_DARKEN = Range(0.15, 0.8)
PALETTE = {  # red, green, blue of an emission or a reflection, display colours
    "hydrogen": (1.00, 0.22, 0.25),
    "oxygen": (0.15, 0.85, 0.80),
    "sulphur": (1.00, 0.62, 0.18),
    "reflection": (0.35, 0.55, 1.00),
    "dust": (0.75, 0.60, 0.45),
    "cirrus": (0.62, 0.65, 0.70),
    "magenta": (0.95, 0.30, 0.75),
    "green": (0.30, 0.80, 0.30),
}

EMISSIONS = ("hydrogen", "oxygen", "sulphur", "reflection", "magenta", "green")  # of planetary nebulae

PHOTOGRAPHS = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
HALF_LEVEL = 0.5 / 255  # half a grey level of an 8-bit picture: light below it is no star
COLOR_BANDS = np.array([610.0, 540.0, 460.0])  # nm, centres of a camera's red, green and blue
WHITE = 6500  # kelvin, the star that comes out white


class BadInput(Exception):
    """A user's mistake, told in one line."""


def chance(rng, probability):
    return rng.random() < probability


def pick(rng, shares):
    """One key of a {key: share} table; the shares sum to 1."""
    return list(shares)[rng.choice(len(shares), p=list(shares.values()))]


def normals(rng, *shape):
    """Standard normal deviates, float32; OpenCV draws them in a quarter of numpy's time."""
    cv2.setRNGSeed(int(rng.integers(1, 2**31)))
    return cv2.randn(np.empty((shape[0], math.prod(shape[1:])), np.float32), 0, 1).reshape(shape)


def lookup(table, position):
    """Linear interpolation in a table at fractional indices; evenly spaced, so far faster than np.interp."""
    index = position.astype(np.int32)
    left = table[index]
    return left + (position - index) * (table[index + 1] - left)


# --------------------------------------------------------------------------------------------------------------------
# Backgrounds: photographs
# --------------------------------------------------------------------------------------------------------------------


def find_photographs(folders):
    """Sorted paths of the photographs below the folders.

    Of SIDD-Small (..._GT_SRGB_..., ..._NOISY_SRGB_...) and RENOIR (...Reference.bmp, ...Noisy.bmp) only the clean
    one of each scene is taken. Raises BadInput for a folder that is missing or holds none.
    """
    found = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise BadInput(f"{folder}: not a folder of backgrounds")
        files = [f for f in folder.rglob("*") if f.suffix.lower() in PHOTOGRAPHS and f.is_file() and f.name[0] != "."]
        clean = [f for f in files if not ("_NOISY_" in f.name or f.stem.lower().endswith("noisy"))]
        if not clean:
            raise BadInput(f"{folder}: no photograph (PNG, JPEG, TIFF, BMP or WebP) in it")
        found += clean
    return sorted(str(f) for f in found)


def read_background(path):
    """A photograph as an image, whatever its depth and channels; raises ValueError when it cannot be read."""
    data = np.fromfile(path, np.uint8)
    pixels = cv2.imdecode(data, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR) if data.size else None
    if pixels is None and data.size:  # gray floats it does not turn into colour
        pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("not a readable picture")
    pixels = np.atleast_3d(pixels)
    pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] < 3 else pixels[..., :3]
    if pixels.dtype.kind == "u":
        return pixels[..., ::-1].astype(np.float32) / np.iinfo(pixels.dtype).max
    pixels = np.nan_to_num(pixels[..., ::-1].astype(np.float32), posinf=0, neginf=0).clip(0)
    return pixels / max(1.0, float(pixels.max()))


def photograph(rng, size, path):
    """A random part of a photograph, reduced, mirrored, and regraded so that daylight looks like night."""
    image = read_background(path)
    scale = max(PHOTO_SCALE(rng), size / min(image.shape[:2]))  # a small photograph is enlarged to fill the frame
    window = min(int(np.ceil(size / scale)), *image.shape[:2])
    top, left = (rng.integers(0, length - window + 1) for length in image.shape[:2])
    image = image[top : top + window, left : left + window]
    method = cv2.INTER_AREA if window >= size else cv2.INTER_CUBIC
    image = cv2.resize(image, (size, size), interpolation=method).clip(0, 1)
    image = np.rot90(image, rng.integers(4))[:, :: rng.choice([-1, 1])]
    image = image[..., rng.permutation(3)] ** rng.uniform(0.8, 2.2)  # a darker gamma keeps the highlights
    gray = image.mean(axis=-1, keepdims=True)
    image = gray + rng.uniform(0.3, 1.3) * (image - gray)
    return (SKY_LEVEL(rng) * 0.3 + PHOTO_DARKEN(rng) * image).clip(0, 1)


# --------------------------------------------------------------------------------------------------------------------
# Backgrounds: painted skies
# --------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(16)
def wavenumbers(size):
    """|k| of rfft2's coefficients, shape (size, size // 2 + 1); that of the mean is set to the lowest."""
    k = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]).astype(np.float32)
    k[0, 0] = 1 / size
    return k


def random_field(rng, amplitude):
    """Gaussian random field, periodic, with that amplitude at each wave number: shape (size, size)."""
    spectrum = normals(rng, *amplitude.shape, 2).view(np.complex64)[..., 0]
    return irfft2(spectrum * amplitude, (len(amplitude), len(amplitude)))


def turbulence(rng, size, slope=3.0, coarse=1):
    """Random field, shape (size, size), scaled so that 1% to 99% is 0..1.

    Its power summed over all directions is k^-slope (5/3: Kolmogorov's; 3: smooth). coarse > 1 draws it on a grid so
    many times coarser, where fine detail does not show.
    """
    grid = next_fast_len(-(-size // coarse), real=True) if coarse > 1 else size
    field = random_field(rng, wavenumbers(grid) ** np.float32(-slope / 2 - 0.5))
    low, high = np.percentile(field[::4, ::4], [1, 99]).astype(np.float32)
    field = (field - low) / (high - low)
    return field if coarse == 1 else cv2.resize(field, (size, size), interpolation=cv2.INTER_CUBIC)


def warp(rng, field, reach):
    """The periodic field with its coordinates displaced by up to about reach pixels (domain warping): wisps
    instead of clouds. Beyond a fifth of the frame it would fold over and show mirror images.
    """
    size = len(field)
    y, x = np.indices(field.shape, dtype=np.float32)
    shift_x, shift_y = (np.float32(reach) * (turbulence(rng, size, 3.4, 4) - 0.5) for _ in range(2))
    return cv2.remap(field, x + shift_x, y + shift_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


def tinted(field, color):
    """field[..., None] * color, laid out as three planes: numpy's loops over planes take a tenth of the time."""
    return np.moveaxis(np.float32(color)[:, None, None] * field, 0, -1)


def turned(x, y, angle):
    """x, y in axes turned by an angle."""
    cos, sin = np.cos(angle), np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def smoothstep(field, low, high):
    t = ((field - low) / (high - low)).clip(0, 1)
    return t * t * (3 - 2 * t)


def gas(rng, size):
    """Density of turbulent gas, log-normal as in the interstellar medium, its 99th percentile 1."""
    field = warp(rng, turbulence(rng, size, rng.uniform(1.6, 3.0)), size * rng.uniform(0.03, 0.2))
    return np.exp(np.float32(rng.uniform(1.5, 5)) * (field - 1))


def filaments(rng, size):
    """A net of filaments on filaments, about 0..1: ridged noise whose every octave grows on the ridges of the last."""
    net, weight = np.zeros((size, size), np.float32), np.float32(1)
    for octave in range(rng.integers(4, 6)):
        cells = int(rng.integers(2, 5)) * 2**octave  # over the frame
        grid = min(size, next_fast_len(max(8 * cells, size // 3), real=True))
        noise = random_field(rng, np.exp(-0.5 * (wavenumbers(grid) * np.float32(3 * grid / cells)) ** 2))
        noise = cv2.resize(noise / noise.std(), (size, size), interpolation=cv2.INTER_CUBIC)
        ridge = (1 - np.abs(noise)).clip(0) ** 3 * weight
        net += np.float32(0.85**octave) * ridge
        weight = (1.5 * ridge).clip(0.2, 1)
    fine = warp(rng, turbulence(rng, size, 1.8), size * rng.uniform(0.03, 0.2))
    return warp(rng, net, size * rng.uniform(0.03, 0.2)) * (0.3 + fine.clip(0))


def shell(rng, size):
    """A bubble blown by a star: a thin bright shock front outside, thin gas within."""
    y, x = np.indices((size, size), dtype=np.float32)
    radius = np.hypot(x - rng.uniform(0, size), y - rng.uniform(0, size)) / (size * rng.uniform(0.2, 0.7))
    radius = radius + np.float32(rng.uniform(0.3, 0.9)) * (turbulence(rng, size, rng.uniform(2.5, 3.2)) - 0.5)
    inside, outside = rng.uniform(0.1, 0.5), rng.uniform(0.01, 0.06)  # thickness of the front on its two sides
    front = np.exp(-np.where(radius < 1, (1 - radius) / inside, (radius - 1) / outside))
    return front * (0.3 + 0.7 * gas(rng, size))


def cloud(rng, size, place):
    """One emission or reflection, shape (size, size), about 0..1: gas, filaments or a shell, lit from a place (x, y)."""
    kind = rng.choice(3, p=[0.5, 0.3, 0.2])
    light = (gas, filaments, shell)[kind](rng, size)
    if kind == 1:
        light = light * (0.2 + gas(rng, size))
    x, y = ((np.arange(size, dtype=np.float32) - c) ** 2 for c in place)
    light = light / (1 + (x + y[:, None]) / (size * LIT_REACH(rng)) ** 2)  # the star's inverse square, softened
    return light / np.percentile(light[::4, ::4], 99.5).clip(1e-6)


def absorb(rng, image):
    """The image behind dust lanes that redden it; their edge towards a hot star glows (an ionisation front)."""
    size = len(image)
    dust = gas(rng, size) if chance(rng, 0.6) else filaments(rng, size)
    dust = dust * smoothstep(turbulence(rng, size, 3.4, 4), rng.uniform(0.0, 0.5), 1.0)
    dust = cv2.GaussianBlur(dust, (0, 0), 1.0)
    shaded = image * np.exp(tinted(dust, -rng.uniform(0.5, 4.0) * np.array([0.7, 1.0, 1.3])))
    if chance(rng, 0.5):
        angle = np.float32(rng.uniform(0, 2 * np.pi))
        slope = np.gradient(cv2.GaussianBlur(dust, (0, 0), 2.0))
        rim = (np.cos(angle) * slope[0] + np.sin(angle) * slope[1]).clip(0)
        rim = rim / np.percentile(rim[::4, ::4], 99.5).clip(1e-6)
        color = image.mean(axis=(0, 1)) * PALETTE[rng.choice(["hydrogen", "sulphur", "dust"])]
        shaded = shaded + tinted(rim.clip(0, 1.5), rng.uniform(0.1, 0.6) * color)
    return shaded


def sky_gradient(rng, size):
    """Light pollution, moonlight and vignetting: a plane and a bowl, shape (size, size, 3), around 1."""
    x = np.linspace(-1, 1, size, dtype=np.float32)
    y = x[:, None]
    plane = 1 + rng.uniform(-0.4, 0.4) * x + rng.uniform(-0.4, 0.4) * y
    bowl = 1 - rng.uniform(0, 0.3) * (x**2 + y**2) * chance(rng, 0.5)
    return tinted(plane * bowl, rng.uniform(0.75, 1.25, 3))


def large_galaxy(rng, size, fwhm):
    """A spiral or an elliptical galaxy, from a small part of the frame to more than all of it, light of (size, size, 3)."""
    scale, angle = size * GALAXY_SCALE(rng), np.float32(rng.uniform(0, np.pi))
    arms = chance(rng, SPIRAL_CHANCE)
    power = rng.uniform(0.4, 1)  # of one without arms: a smooth profile, cusped as Sersic's are, flatter once stretched
    core = max(scale * rng.uniform(0.05, 0.4), GALAXY_CORE * fwhm / power)
    wide = core * power > WIDE_CORE * fwhm
    q = rng.uniform(0.1 if arms else 0.2, 1.0 if arms or wide else ROUNDEST)
    y, x = np.indices((size, size), dtype=np.float32)
    middle = size / 2 + max(size, 2 * scale) * rng.uniform(-0.4, 0.4, 2).astype(np.float32)
    u, v = turned(x - middle[0], y - middle[1], angle)
    if arms:
        light, most = spiral(rng, u, v, q, scale, fwhm)
    else:
        profile = np.exp(-(((np.hypot(u, v / q) + 0.5) / core) ** np.float32(power)))
        light = tinted(cv2.GaussianBlur(profile, (0, 0), fwhm / 2.355), OLD_STARS)
        most = np.inf if wide else BURNT_ELLIPTICAL
    return np.float32(min(GALAXY_LIGHT(rng), most)) * light.astype(np.float32)


OLD_STARS, YOUNG_STARS = np.float32([1.0, 0.85, 0.65]), np.float32([0.6, 0.75, 1.0])  # display colours


def spiral(rng, u, v, q, scale, fwhm):
    """Light of a spiral galaxy with bulge, disk, arms, dust and HII knots, from smooth early types with a large bulge to
    late ones that are all arms, and by what it may be multiplied at most; u and v along its axes on the sky, q the axis
    ratio of its disk, scale the disk's least: its bulge must be wider than a star, and is the smaller of the two.
    """
    height = BULGE(rng)
    within = max(BULGE_SCALE(rng) * scale, 0.75 * GALAXY_CORE * max(1, height) ** 0.5 * fwhm)
    scale = max(scale, within / BULGE_SCALE.high)
    radius, azimuth = np.hypot(u, v / q) + 0.5, np.arctan2(v / q, u)  # in its plane
    size, contrast = len(radius), np.float32(rng.uniform(0.1, 1))
    winding = int(rng.integers(1, 4)) * (azimuth - np.log(radius) / math.tan(rng.uniform(0.25, 0.7)))
    grain = turbulence(rng, size, 2.2)
    arms = (0.5 + 0.5 * np.cos(winding + 5 * grain)) ** rng.uniform(0.7, 2.5) * (0.3 + grain.clip(0))
    arms = 0.3 + contrast * (arms - 0.3) * smoothstep(radius, 0.2 * scale, 1.2 * scale)  # not into the bulge
    if chance(rng, RING_CHANCE):
        arms += rng.uniform(0.5, 2) * np.exp(-(((radius / scale - RING_RADIUS(rng)) / RING_WIDTH(rng)) ** 2))
    disk = np.exp(-radius / scale)
    knots = np.where((turbulence(rng, size, 1.0) > 0.95) & (arms > 0.4), 1, 0).astype(np.float32)
    knots = cv2.GaussianBlur(knots, (0, 0), max(1.0, 0.6 * fwhm)) * disk
    spheroid = np.hypot(u, v / max(q, rng.uniform(0.5, 1)))  # seen edge on it stands out of the disk
    bulge = height * np.exp(-spheroid / within)
    lane = rng.uniform(0, 0.9) * smoothstep(np.float32(0.5 - q), 0, 0.3)  # of dust, before the half behind the disk
    lane = lane * (0.3 + turbulence(rng, size, 2.4)).clip(0, 1)
    bulge *= 1 - lane * np.exp(-((v / max(0.6 * q * scale, fwhm) - 0.5) ** 2))
    dust = 1 - rng.uniform(0, 0.7) * smoothstep(turbulence(rng, size, 2.4), 0.5, 0.9)
    young = OLD_STARS + contrast * (YOUNG_STARS - OLD_STARS)
    smooth, lit = 0.5 * disk, disk * (0.2 + arms)
    most = BURNT_DISK / np.max(smooth + lit)
    light = tinted(bulge + smooth, OLD_STARS) + tinted(lit * dust, young)
    light += tinted(rng.uniform(0, 3) * knots, PALETTE["magenta"])
    return light + 4 * (disk * arms)[..., None] * blobs(rng, size, fwhm), most


def galaxy_field(rng, size, fwhm, burnt):
    """Small and far galaxies, clearly wider than a star, spread or (a cluster) crowded; light of (size, size, 3).

    fwhm, burnt: as of painted_sky.
    """
    light = tinted(np.zeros((size, size), np.float32), np.zeros(3))
    middle, spread = rng.uniform(0, size, 2), size * rng.uniform(0.08, 0.2)
    crowded = chance(rng, GALAXY_CLUSTER_CHANCE / (GALAXY_CLUSTER_CHANCE + GALAXY_FIELD_CHANCE))
    for _ in range(rng.integers(15, 50) if crowded else rng.integers(2, 30)):
        least = max(fwhm * GALAXY_SIZE(rng), 3.0)
        r_eff = least * max(1.0, size / 12 / least) ** (rng.random() ** 2)  # most are small
        wide = r_eff / fwhm
        ellipticity = rng.uniform(0 if wide > WIDE_GALAXY else 1 - ROUNDEST if wide > 3 else 0.4, 0.75)
        height = GALAXY_HEIGHT(rng)
        is_round = ellipticity < 1 - ROUNDEST
        if is_round or r_eff < BURNT_SIZE * burnt:
            height = min(height, BURNT_HEIGHT)
        reach = int(min(size, 6 * r_eff + 8))
        x, y = rng.normal(middle, spread) if crowded else rng.uniform(0, size, 2)
        if not (0 <= x < size and 0 <= y < size):
            continue
        rows, columns = (slice(max(int(c) - reach, 0), min(int(c) + reach + 1, size)) for c in (y, x))
        yy, xx = np.mgrid[rows, columns].astype(np.float32)
        index = rng.uniform(0.6, 1.0 if is_round else min(GALAXY_INDEX, GALAXY_CUSP * (1 + wide)))
        shape = np.float32([1, r_eff, index, x, y, ellipticity, rng.uniform(0, np.pi)])
        profile = cv2.GaussianBlur(SERSIC.evaluate(xx, yy, *shape), (0, 0), fwhm / 2.355)
        profile *= 1 - smoothstep(np.hypot(xx - shape[3], yy - shape[4]), 0.6 * reach, reach - 1)  # no square is seen
        profile *= height / profile.max()
        warm = rng.uniform(0, 0.5) * (1 if crowded else rng.choice([-1, 1]))
        color = 1 + warm * np.array([0.5, 0.0, -0.5], np.float32)
        light[rows, columns] += tinted(profile, color)
    return light


SERSIC = Sersic2D()  # evaluate() with numbers, as for the PSFs


def blobs(rng, size, fwhm):
    """Small bright blobs wider than a star, irregular, that must stay: HII regions and globules' rims."""
    light = np.zeros((size, size, 3), np.float32)
    hue = np.array(PALETTE[rng.choice(list(PALETTE))], np.float32)
    for _ in range(int(KNOTS(rng))):
        sigma = fwhm * rng.uniform(0.9, 3.0) + 1
        half = min(int(6 * sigma), size)
        width, angle = sigma * rng.uniform(0.6, 1.0), rng.uniform(0, 2 * np.pi)
        drift = rng.uniform(0.5, 1.1) * np.array([np.cos(angle), np.sin(angle)])
        steps = width * rng.normal(drift, 0.6, (rng.integers(4, 8), 2))  # one patch, no heap of spots as round as stars
        points = half + np.cumsum(steps, axis=0) - steps.sum(axis=0) / 2
        lights = rng.uniform(0.4, 1, len(points)).astype(np.float32)
        # a Gaussian of both axes is the product of one of each: a blur as wide as some of these takes minutes
        away = (np.arange(2 * half + 1, dtype=np.float32) - points.T[..., None]) / width
        down, right = np.exp(-0.5 * away.astype(np.float32) ** 2)
        blob = (lights[:, None] * down).T @ right
        r = np.hypot(*np.indices(blob.shape) - half)
        blob *= (1 - smoothstep(r, 0.5 * half, half)) / blob.max()
        column, row = rng.integers(0, size, 2)
        add_window(light, blob[..., None], KNOT_LIGHT(rng) * hue * rng.uniform(0.7, 1.3, 3), column, row)
    torn = light * (0.15 + gas(rng, size)[..., None])  # not round
    return cv2.GaussianBlur(torn, (0, 0), fwhm / 2.355)  # shreds sharper than a star would look like one


def globular(rng, size, fwhm):
    """The unresolved light of a globular cluster, King's profile without its edge; shape (size, size, 3)."""
    y, x = np.indices((size, size), dtype=np.float32)
    core = max(size * rng.uniform(0.02, 0.08), GALAXY_CORE * fwhm)
    radius = np.hypot(x - rng.uniform(0, size), y - rng.uniform(0, size)) / core
    return tinted(rng.uniform(0.1, 0.8) / (1 + radius**2), [1.0, 0.9, 0.75])


def planetary(rng, size, fwhm, place):
    """A planetary nebula round a place (x, y), without its star: nested shells of gas, each of its own colour, that are
    seen through; added light of shape (size, size, 3).
    """
    y, x = np.indices((size, size), dtype=np.float32)
    angle, q = np.float32(rng.uniform(0, np.pi)), rng.uniform(0.5, 1)
    outer = max(size * PLANETARY_RADIUS(rng), PLANETARY_LEAST * fwhm)
    u, v = turned(x - place[0], y - place[1], angle)
    v = v / q
    radius, lobes = np.hypot(u, v), chance(rng, 0.25) * rng.uniform(0.2, 0.6)
    radius = radius / (outer * (1 - lobes * (v / (radius + 1)) ** 2))  # pinched at the waist
    radius = radius + np.float32(rng.uniform(0, 0.7) ** 2) * (turbulence(rng, size, rng.uniform(2, 3)) - 0.5)
    texture = turbulence(rng, size, rng.uniform(1.6, 2.6)) if chance(rng, 0.5) else filaments(rng, size)
    texture = np.float32(1) + np.float32(rng.uniform(0, 1)) * (texture.clip(0) ** rng.uniform(1, 3) - 1)
    light = np.zeros((size, size, 3), np.float32)
    small = outer < BURNT_SIZE * fwhm
    for edge in np.cumprod([1, *rng.uniform(0.4, 0.9, 0 if small else rng.integers(0, 3))]):
        inner = rng.uniform(0.0, 0.95)
        path = chord(radius / edge) - inner * chord(radius / (edge * inner + 1e-6))
        color = np.float32(PALETTE[rng.choice(EMISSIONS)]) ** rng.uniform(0.7, 2)
        light += tinted(rng.uniform(0.2, 1) * texture * path / math.sqrt(1 - inner**2), color)
    most = BURNT_HEIGHT if small else np.inf
    light = cv2.GaussianBlur(light, (0, 0), fwhm / 2.355)  # no edge is sharper than a star
    return np.float32(min(PLANETARY_LIGHT(rng), most)) * light / light.max().clip(1e-3)


def chord(radius):
    """Half the way of a line of sight through a ball of radius 1, at such distances from its middle."""
    return np.sqrt((1 - np.square(radius)).clip(0))


def comet(rng, size, fwhm):
    """Coma and tail of a comet without its star-like nucleus, added light of shape (size, size, 3)."""
    y, x = np.indices((size, size), dtype=np.float32)
    angle, head = np.float32(rng.uniform(0, 2 * np.pi)), fwhm * rng.uniform(3, 8)
    dx, dy = x - size * rng.uniform(0.1, 0.9), y - size * rng.uniform(0.1, 0.9)
    along, across = turned(dx, dy, angle)
    across = across + head * (turbulence(rng, size, 3.0) - 0.5)  # streamers
    width = head * (0.7 + rng.uniform(0.05, 0.3) * along.clip(0) / head)
    tail = np.exp(-0.5 * (across / width) ** 2 - along.clip(0) / (size * rng.uniform(0.2, 0.8))) * head / width
    tail *= smoothstep(along, -head, head)
    coma = 1 / (1 + (np.hypot(dx, dy) / head) ** 2) ** 1.5
    light = tinted(0.4 * tail, [0.9, 0.9, 1.0]) + tinted(coma, [0.55, 1.0, 0.8])
    return np.float32(rng.uniform(0.1, 0.7)) * light.astype(np.float32)


def painted_sky(rng, size, fwhm, burnt):
    """A star-free deep-sky picture from noise alone, display values, shape (size, size, 3), and the places of the stars
    that light its nebulae: x, y, and whether it is a bright one.

    fwhm: of stars, for what is not bright in the middle; burnt: for what may be burnt out.
    """
    image, places = SKY_LEVEL(rng) * sky_gradient(rng, size), []
    if not chance(rng, EMPTY_SKY_CHANCE):
        glow = smoothstep(turbulence(rng, size, 4.0, 4), -0.2, 1.2)  # unresolved, wide
        light = tinted(rng.uniform(0, 0.6) * glow, PALETTE[rng.choice(list(PALETTE))])
        for name in rng.choice(list(PALETTE), rng.integers(1, 4), replace=False):
            color = PALETTE[name] * rng.uniform(0.7, 1.3, 3)
            places.append((*size * rng.uniform(-0.2, 1.2, 2), True))
            light += tinted(rng.uniform(0.3, 1) * cloud(rng, size, places[-1][:2]), color)
        image = image + NEBULA_PEAK(rng) * light / np.percentile(light[::4, ::4], 99.5).clip(1e-3)
        if chance(rng, 0.6):
            image = absorb(rng, image)
    if chance(rng, GALAXY_CHANCE):
        image = image + large_galaxy(rng, size, burnt)
    if chance(rng, GALAXY_FIELD_CHANCE + GALAXY_CLUSTER_CHANCE):
        image = image + galaxy_field(rng, size, fwhm, burnt)
    if chance(rng, KNOT_CHANCE):
        image = image + blobs(rng, size, fwhm)
    if chance(rng, GLOBULAR_CHANCE):
        image = image + globular(rng, size, fwhm)
    if chance(rng, PLANETARY_CHANCE):
        places.append((*size * rng.uniform(0.05, 0.95, 2), False))
        image = image + planetary(rng, size, burnt, places[-1][:2])
    if chance(rng, COMET_CHANCE):
        image = image + comet(rng, size, fwhm)
    image = 1 - np.exp(-image.clip(0))  # a shoulder: nothing of it is cut off at white
    return np.ascontiguousarray(image, np.float32), [place for place in places if chance(rng, LIT_CHANCE)]


def background(rng, size, fwhm, burnt, path):
    """A photograph, alone or with a painted sky screen-blended over it, or (path None) a painted sky alone; and the
    places of the stars that light it.
    """
    if path is None:
        return painted_sky(rng, size, fwhm, burnt)
    image, places = photograph(rng, size, path), []
    if chance(rng, 0.2):
        sky, places = painted_sky(rng, size, fwhm, burnt)
        image = 1 - (1 - image) * (1 - sky)
    return image.astype(np.float32), places


# --------------------------------------------------------------------------------------------------------------------
# Optics: drawn once per picture
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Optics:
    """How a telescope, its mount and the air draw a point of light."""

    core: str
    fwhm: float
    beta: float
    axis_ratio: float
    angle: float
    obstruction: float
    band: float  # half width of the filter over its wavelength
    chromatic: np.ndarray  # FWHM of R, G, B over that of green
    shift: np.ndarray  # (3, 2) lateral colour x, y
    trail: np.ndarray  # (2,) guiding trail x, y
    coma: float  # comet tail at the corner
    field_stretch: float  # radial elongation at the corner
    field_blur: float  # growth of the FWHM to the corner
    seeing: np.ndarray  # (2,) growth of the FWHM from the middle to the right and the lower edge
    spikes: dict | None
    halos: list[dict]
    reflections: list[dict]

    @property
    def widest(self):
        """FWHM of the widest stars of the picture, along their trail or their coma in a corner."""
        return float(np.sqrt(self.fwhm**2 + self.trail @ self.trail + self.coma**2) * self.chromatic.max())

    @property
    def varies(self):
        return self.coma > 0 or self.seeing.any()

    @property
    def gray(self):
        """The same PSF in all three channels."""
        return bool(np.all(self.chromatic == 1) and not self.shift.any())


def draw_spikes(rng, color):
    axes = pick(rng, SPIKE_AXES)
    start = rng.choice([0.0, np.pi / 4, rng.uniform(0, np.pi)])
    angles = start + np.arange(axes) * np.pi / axes
    weights = SPIKE_UNEVEN(rng, axes) if chance(rng, SPIKE_UNEVEN_CHANCE) else np.ones(axes)
    if chance(rng, SPIKE_SPLIT_CHANCE):  # vanes that are not parallel split each spike in two
        angles, weights = np.concatenate([angles - 0.012, angles + 0.012]), np.tile(weights, 2)
    return {
        "angles": angles,
        "weights": weights / weights.sum(),
        "light": SPIKE_LIGHT(rng),
        "width": SPIKE_WIDTH(rng),
        "decay": SPIKE_DECAY(rng),
        "length": SPIKE_LENGTH(rng),
        "rainbow": chance(rng, SPIKE_RAINBOW_CHANCE) * rng.uniform(0.2, 0.95) * color,
        "period": SPIKE_PERIOD(rng),
    }


def draw_halo(rng, fwhm, color):
    rays = RAYS(rng) * chance(rng, RAYS_CHANCE) * rng.standard_normal(int(RAY_COUNT(rng)))
    return {
        "light": HALO_LIGHT(rng),
        "scale": HALO_SCALE(rng) * fwhm,
        "aureole": AUREOLE_BETA(rng) if chance(rng, AUREOLE_CHANCE) else None,
        "blue": HALO_BLUE(rng) ** color,
        "rays": np.exp(rays - rays.var() / 2),  # brightness by direction
    }


def draw_reflection(rng, color):
    tint = REFLECTION_TINT(rng, 3) if color else np.ones(3)
    return {
        "light": REFLECTION_LIGHT(rng),
        "radius": REFLECTION_RADIUS(rng),
        "offset": rng.normal(0, 8, 2),
        "rim": RIM(rng) * chance(rng, RIM_CHANCE),
        "rim_width": RIM_WIDTH(rng),
        "rim_side": RIM_SIDE(rng),
        "hole": OBSTRUCTION(rng) * chance(rng, HOLE_CHANCE),
        "tint": tint / tint.mean(),
    }


def draw_optics(rng, color):
    fwhm = FWHM_LARGE(rng) if chance(rng, FWHM_LARGE_CHANCE) else FWHM(rng)
    core = pick(rng, CORE_SHARES)
    chromatic = color and chance(rng, CHROMATIC_CHANCE)
    trail = TRAIL(rng) * fwhm * chance(rng, TRAIL_CHANCE) * (fwhm <= FWHM.high)
    direction = rng.uniform(0, 2 * np.pi)
    return Optics(
        core=core if fwhm > 2 else "moffat",  # an undersampled Airy or defocus ring cannot be told from a Moffat
        fwhm=fwhm,
        beta=BETA(rng),
        axis_ratio=AXIS_RATIO(rng),
        angle=rng.uniform(0, np.pi),
        obstruction=OBSTRUCTION(rng),
        band=AIRY_BAND(rng),
        chromatic=np.array([CHROMATIC_FWHM(rng), 1, CHROMATIC_FWHM(rng)]) if chromatic else np.ones(3),
        shift=np.stack([CHROMATIC_SHIFT(rng, 2), (0, 0), CHROMATIC_SHIFT(rng, 2)]) if chromatic else np.zeros((3, 2)),
        trail=trail * np.array([np.cos(direction), np.sin(direction)]),
        coma=COMA(rng) * fwhm if chance(rng, COMA_CHANCE) else 0.0,
        field_stretch=FIELD_STRETCH(rng),
        field_blur=FIELD_BLUR(rng),
        seeing=SEEING(rng, 2) * chance(rng, SEEING_CHANCE),
        spikes=draw_spikes(rng, color) if chance(rng, SPIKE_CHANCE) else None,
        halos=[draw_halo(rng, fwhm, color) for _ in range(pick(rng, HALO_COUNT))],
        reflections=[draw_reflection(rng, color) for _ in range(pick(rng, REFLECTION_COUNT))],
    )  # fmt: skip


def core_light(optics, radius, fwhm):
    """core_profile looked up in a table: some 1e-4 off, and many times faster over a whole frame."""
    step = fwhm / 60
    table = core_profile(optics, np.arange(0, radius.max(initial=0) + 3 * step, step), fwhm)
    return lookup(table.astype(np.float32), (radius / step).astype(np.float32))


def core_profile(optics, r, fwhm):
    """Light per square pixel of a star of flux 1 at r from its centre, circular, total 1."""
    if optics.core == "gaussian":
        return GAUSSIAN.evaluate(r, 0, 1, 0, 0, fwhm, fwhm, 0)
    if optics.core == "airy":  # FWHM = 0.8436 x the radius of the first dark ring; a filter's band smears outer rings
        scales = fwhm / 0.8436 * (1 + optics.band * np.linspace(-1, 1, 5))
        return 0.16 * sum(AIRY.evaluate(r, 0, 1, 0, 0, scale) for scale in scales) + 0.2 * moffat(r, fwhm, 3.0)
    if optics.core == "defocus":  # out of focus: the image of the pupil, with the shadow of the secondary mirror
        outer, soft = fwhm / 2, 0.08 * fwhm + 0.3
        inner = optics.obstruction * outer
        ring = 0.25 * (1 + np.tanh((outer - r) / soft)) * (1 + np.tanh((r - inner) / soft))
        return 0.85 * ring / (np.pi * (outer**2 - inner**2)) + 0.15 * moffat(r, fwhm, optics.beta)
    return moffat(r, fwhm, optics.beta)


# photutils' profiles; evaluate() with numbers, since building a model costs more than evaluating it
MOFFAT, GAUSSIAN, AIRY = MoffatPSF(), GaussianPSF(), AiryDiskPSF()


def moffat(r, fwhm, beta):
    return MOFFAT.evaluate(r, 0, 1, 0, 0, fwhm / (2 * np.sqrt(2 ** (1 / beta) - 1)), beta)


def point_spread(optics, dx, dy, channel, field=(0.0, 0.0)):
    """Light per square pixel at (dx, dy) from a star of flux 1, in one channel; field: place in the frame, -1..1."""
    dx, dy = dx - optics.shift[channel, 0], dy - optics.shift[channel, 1]
    radius, azimuth = np.hypot(*field) / np.sqrt(2), np.arctan2(field[1], field[0])
    paths = [(0.0, 0.0, 1.0)]
    if optics.trail.any():
        paths = [(*(t * optics.trail), 1.0) for t in np.linspace(-0.5, 0.5, 5)]
    if optics.coma and radius > 0:
        tail = optics.coma * radius**2 * np.array([np.cos(azimuth), np.sin(azimuth)])
        paths = [
            (x + t * tail[0], y + t * tail[1], w * (1 - 0.75 * t)) for x, y, w in paths for t in (0, 0.33, 0.67, 1)
        ]
    total = sum(w for *_, w in paths)
    angle, q = optics.angle, np.sqrt(optics.axis_ratio)
    fwhm = optics.fwhm * optics.chromatic[channel] * (1 + optics.seeing @ field)
    if optics.coma and radius > 0:  # in the corners stars point to the centre
        angle, q = azimuth, np.sqrt(1 - optics.field_stretch * radius**2)
        fwhm = fwhm * (1 + optics.field_blur * radius**2)
    light = 0
    for x, y, weight in paths:
        u, v = turned(dx - x, dy - y, angle)
        squash = 1 - (1 - q) / (1 + (np.hypot(u, v) / (ROUND * fwhm)) ** 2)
        light = light + weight / total * core_light(optics, np.hypot(u * squash, v / squash), fwhm)
    return light


def glowing_profile(optics, radius):
    """Green light per square pixel at radii (n,) from a star of flux 1, halos and reflections with it, spikes without."""
    glow = far_light(dataclasses.replace(optics, spikes=None), radius, 0 * radius)[:, 1]
    return point_spread(optics, radius, 0.0, 1) + glow


def seen_width(optics, inverse, height):
    """FWHM on the display of stars as bright as height in the middle, 0..1, with their glow; inverse: of the stretch.

    A deep stretch lifts the wings: what is burnt out and not wider cannot be told from a star.
    """
    share = np.min(inverse(np.float32(height / 2)) / inverse(np.float32(height)))  # of an unlinked stretch the widest
    radius = np.concatenate([[0], np.geomspace(0.1, 50, 200) * optics.fwhm])
    light = glowing_profile(optics, radius)
    return 2 * float(radius[np.argmax(light < share * light[0])])


# --------------------------------------------------------------------------------------------------------------------
# Stars: drawn per population
# --------------------------------------------------------------------------------------------------------------------


def magnitudes_to_flux(rng, count, slope, span):
    """Fluxes from 1 to 10^(0.4 span) with N(>F) ~ F^-slope, by inversion of the truncated power law."""
    bright = 10 ** (-0.4 * span * slope)
    return (1 - rng.random(count) * (1 - bright)) ** (-1 / slope)


def blackbody_rgb(temperature):
    """Light of a blackbody in red, green and blue over that of a 6500 K one, green = 1; shape (..., 3)."""
    bands = COLOR_BANDS * units.nm
    kelvin = np.atleast_1d(temperature)[..., None] * units.K
    ratio = (BlackBody(kelvin)(bands) / BlackBody(WHITE * units.K)(bands)).value
    return ratio / ratio[..., 1:2]


def draw_stars(rng, shape, optics, visible_flux, share=1.0, places=()):
    """Table of the stars of one picture: x, y, flux, fwhm, temperature, population.

    share: of all stars but giants and beacons, which is left; 0 leaves none at all. visible_flux(d) is the flux of a
    star that stands d over the sky once stretched. Stars up to a margin outside the frame are drawn too: their halos
    reach in. In each of the places (x, y, bright) that lies within it stands one of the brightest stars or another.
    """
    (height, width), tables = shape, []
    for name, population in POPULATIONS.items():
        left = chance(rng, population.chance) * (np.sign(share) if name in ("giants", "beacons") else share)
        tables.append(draw_population(rng, name, left, shape, optics, visible_flux))
    stars = within_margin(vstack(tables), shape)
    order = np.argsort(-stars["flux"].data)
    bright, faint = (list(rng.permutation(part)) for part in np.split(order, [BRIGHTER * len(places)]))
    for x, y, is_bright in places:
        candidates = bright if is_bright else faint
        if candidates and abs(x - width / 2) < width / 2 and abs(y - height / 2) < height / 2:
            star = candidates.pop()
            stars["x"][star], stars["y"][star] = x, y
    companions = draw_companions(rng.spawn(1)[0], stars)  # with a stream of its own: what is drawn next stays the same
    stars = within_margin(vstack([stars, companions]), shape)
    edge = [2 * stars["x"].data / width - 1, 2 * stars["y"].data / height - 1]
    stars["fwhm"] *= 1 + optics.seeing @ edge
    return stars


def draw_population(rng, name, share, shape, optics, visible_flux):
    """draw_stars' table for one population, of which a share is left, all with the FWHM of the frame's middle."""
    population = POPULATIONS[name]
    height, width = shape
    margin = MARGIN * max(shape)
    area = (height + 2 * margin) * (width + 2 * margin) / 1e6
    density = population.density(rng) / max(1, optics.fwhm / 3) ** 2  # wide stars fill the frame sooner
    count = rng.poisson(share * min(density, 1e6 * CONFUSION / optics.fwhm**2) * area)
    x, y = rng.uniform(-margin, width + margin, count), rng.uniform(-margin, height + margin, count)
    if population.spread:  # a cluster: Gaussian clump round a random centre
        radius = population.spread(rng) * max(shape)
        x, y = rng.normal(rng.uniform(0, width), radius, count), rng.normal(rng.uniform(0, height), radius, count)
    flux = visible_flux(population.faintest(rng))
    if population.disc:
        edge = population.disc(rng, count)
        center = point_spread(optics, 0.0, 0.0, 1)
        flux = flux * center / np.maximum(glowing_profile(optics, edge), center / EXCESS)
    else:
        flux = flux * magnitudes_to_flux(rng, count, population.slope(rng), population.span(rng))
    temperature = population.temperature(rng, count)
    columns = {"x": x, "y": y, "flux": flux, "fwhm": np.full(count, optics.fwhm), "temperature": temperature}
    return Table({**columns, "population": np.full(count, name)})


def within_margin(stars, shape):
    """The stars of the table that stand in a frame of this shape or in its margin."""
    reach = [side / 2 + MARGIN * max(shape) for side in shape]
    return stars[(np.abs(stars["y"] - shape[0] / 2) < reach[0]) & (np.abs(stars["x"] - shape[1] / 2) < reach[1])]


def draw_companions(rng, stars):
    """draw_stars' table of the companions of some of its stars: doubles, and small groups that touch one another."""
    share, count = MULTIPLE_SHARE(rng), len(stars)
    companions = np.where(rng.random(count) < share, 1 + rng.poisson(COMPANIONS, count), 0)
    table = stars[np.repeat(np.arange(count), companions)]
    distance = COMPANION_SEPARATION(rng, len(table)) * table["fwhm"].data
    angle = rng.uniform(0, 2 * np.pi, len(table))
    table["x"] += distance * np.cos(angle)
    table["y"] += distance * np.sin(angle)
    table["flux"] *= 10 ** (-0.4 * COMPANION_MAGNITUDES(rng, len(table)))
    if count:
        table["temperature"] = rng.choice(stars["temperature"].data, len(table))
    return table


def star_colors(rng, temperature, color):
    """Light of each star in R, G, B, mean 1; shape (stars, 3)."""
    if not color:
        return np.ones((len(temperature), 3))
    rgb = blackbody_rgb(temperature) ** SATURATION(rng)
    if chance(rng, TINT_CHANCE):
        rgb = rgb * TINT(rng, 3)
    return rgb / rgb.mean(axis=1, keepdims=True)


# --------------------------------------------------------------------------------------------------------------------
# Rendering: linear light
# --------------------------------------------------------------------------------------------------------------------


class Sprites:
    """Pixel-integrated pictures of a star of flux 1 for each sub-pixel phase, for one place in the frame.

    The PSF is evaluated once on cells of 1/phases pixel; binning the cells from each start gives each phase. So a
    star costs one slice addition, and an undersampled star is integrated over its pixels.
    """

    def __init__(self, optics, field):
        self.radius = int(np.clip(np.ceil(3 * optics.fwhm), 10, 45))
        self.phases = phases = 5 if optics.fwhm < 4 else 3
        reach = self.radius * phases + phases - 1
        cells = np.arange(-reach, reach + 1) / phases
        dx, dy = np.meshgrid(cells, cells)
        channels = [0] if optics.gray else [0, 1, 2]
        fine = np.stack([point_spread(optics, dx, dy, c, field) for c in channels], axis=-1) / phases**2
        sums = np.cumsum(np.cumsum(np.pad(fine, ((1, 0), (1, 0), (0, 0))), axis=0), axis=1)
        length = (2 * self.radius + 1) * phases
        self.stamps = np.empty((phases, phases, 2 * self.radius + 1, 2 * self.radius + 1, 3), np.float32)
        for py, px in itertools.product(range(phases), repeat=2):
            top, left = phases - 1 - py, phases - 1 - px
            corner = sums[top : top + length + 1 : phases, left : left + length + 1 : phases]
            self.stamps[py, px] = corner[1:, 1:] - corner[:-1, 1:] - corner[1:, :-1] + corner[:-1, :-1]
        self.stamps = self.stamps.clip(0)  # the sums cancel to within rounding
        center = self.stamps[phases // 2, phases // 2].max(axis=-1)
        self.peak = float(center.max())
        offset = np.abs(np.arange(-self.radius, self.radius + 1))
        square = np.maximum(offset[:, None], offset)
        brightest = np.array([center[square == r].max() for r in range(self.radius + 1)])
        self.falloff = np.maximum.accumulate(brightest[::-1])[::-1]  # brightest value on or outside a square's edge
        self.tapered = self.stamps * blend_to_wings(np.hypot(offset[:, None], offset), self.radius)[..., None]

    def place(self, x):
        """(pixels, phases) of stars at x along one axis."""
        pixel = np.floor(x + 0.5).astype(int)
        return pixel, ((x + 0.5 - pixel) * self.phases).astype(int)

    def radii(self, fluxes, threshold):
        """Radius of the square outside which a star of each flux stays below the threshold."""
        return np.minimum(np.searchsorted(-self.falloff, -threshold / fluxes) + 1, self.radius)


def blend_to_wings(r, radius):
    """Weight of a bright star's sprite at r from its centre; the wings have the rest, so that no edge is seen."""
    return (1 - smoothstep(r, 0.55 * radius, radius)).astype(np.float32)


def add_window(canvas, stamp, color, column, row):
    """Add color * stamp, centred on (column, row), to the canvas, as far as they overlap."""
    radius = stamp.shape[0] // 2
    top, left = max(row - radius, 0), max(column - radius, 0)
    bottom, right = min(row + radius + 1, canvas.shape[0]), min(column + radius + 1, canvas.shape[1])
    if top < bottom and left < right:
        part = stamp[top - row + radius : bottom - row + radius, left - column + radius : right - column + radius]
        canvas[top:bottom, left:right] += part * color


def far_light(optics, dx, dy):
    """Light of spikes, halos and reflections of a white star of flux 1, shape (*dx.shape, 3)."""
    light = np.zeros((*dx.shape, 3), np.float32)
    radius = np.hypot(dx, dy)
    for halo in optics.halos:
        scale, blue, beta = halo["scale"], halo["blue"], halo["aureole"]
        tint = np.array([1, (1 + blue) / 2, blue]) / ((1 + blue) / 2)
        directions = np.linspace(-np.pi, np.pi, len(halo["rays"]), endpoint=False)
        rays = np.interp(np.arctan2(dy, dx), directions, halo["rays"], period=2 * np.pi)
        glow = moffat(radius, scale, beta) if beta else np.exp(-radius / scale) / (2 * np.pi * scale**2)
        light += (halo["light"] * rays * glow)[..., None] * tint
    for reflection in optics.reflections:
        light += reflection_light(reflection, dx, dy)
    if optics.spikes:
        light += spike_light(optics, dx, dy, radius)
    return light


def reflection_light(reflection, dx, dy):
    """Reflection disc of a star of flux 1, shape (h, w, 3): an image of the pupil far out of focus, its rim brighter,
    on one side the most.
    """
    size, offset = reflection["radius"], reflection["offset"]
    x, y = dx - offset[0], dy - offset[1]
    radius = np.hypot(x, y)
    inside = lambda edge: 0.5 * (1 - np.tanh((radius - edge) / 1.5))  # noqa: E731
    along = (x * offset[0] + y * offset[1]) / np.maximum(radius * np.hypot(*offset), 1e-6)  # cosine
    rim = reflection["rim"] * np.exp(-(((radius - size) / (reflection["rim_width"] * size)) ** 2))
    rim = rim * (1 + reflection["rim_side"] * along)
    disc = inside(size) * (1 + rim)
    if reflection["hole"]:
        disc = disc - inside(reflection["hole"] * size)
    return (reflection["light"] / (np.pi * size**2) * disc)[..., None] * reflection["tint"]


def spike_light(optics, dx, dy, radius):
    """Diffraction spikes of a star of flux 1, shape (h, w, 3 or 1): a power law along each arm, narrow across."""
    spikes = optics.spikes
    width = max(0.5, spikes["width"] * optics.fwhm / 2)
    arms = sum(
        weight * np.exp(-0.5 * ((dx * np.sin(angle) - dy * np.cos(angle)) / width) ** 2)
        for angle, weight in zip(spikes["angles"], spikes["weights"])
    )
    along = (1 + radius / (2 * optics.fwhm)) ** -spikes["decay"] * np.exp(-radius / (spikes["length"] * optics.fwhm))
    length = 4 * optics.fwhm / max(spikes["decay"] - 1, 0.2)  # about the integral along one axis
    light = (spikes["light"] * arms * along / (length * width * 2.5))[..., None]
    if spikes["rainbow"]:  # diffraction orders lie further out in red light
        period = spikes["period"] * COLOR_BANDS / COLOR_BANDS[1]
        light = light * (1 + spikes["rainbow"] * np.cos(2 * np.pi * radius[..., None] / period))
    return light.astype(np.float32)


def render(stars, colors, optics, shape, threshold):
    """Linear light of the stars, shape (height, width, 3); what lies below threshold may be left out.

    Faint stars are sprites alone. Of bright ones, all that lies outside the sprite (wings, spikes, halo, reflection) is
    the same picture for each, so one convolution draws it for all of them, as far out as the brightest one shows.
    """
    height, width = shape
    steps = ZONES if optics.varies else 1
    centers = (np.arange(steps) + 0.5) / steps * 2 - 1
    zones = [[Sprites(optics, (fx, fy)) for fx in centers] for fy in centers]
    zone_x = (stars["x"].data / width * steps).astype(int).clip(0, steps - 1)
    zone_y = (stars["y"].data / height * steps).astype(int).clip(0, steps - 1)
    fluxes = (stars["flux"].data[:, None] * colors).astype(np.float32)
    sprites, strongest = zones[0][0], fluxes.max(axis=1)
    bright = strongest * max(sprites.falloff[-1], far_light(optics, *brightest_far(optics)).max()) > threshold
    pad = math.ceil(MARGIN * max(shape)) + sprites.radius + 1  # no sprite is cut
    canvas = np.zeros((height + 2 * pad, width + 2 * pad, 3), np.float32)
    places = [a.tolist() for axis in ("x", "y") for a in sprites.place(stars[axis].data + pad)]
    rows_of_flux = fluxes[:, None].repeat(2 * sprites.radius + 1, axis=1)  # numpy multiplies whole rows at once
    radii = np.where(bright, sprites.radius, sprites.radii(strongest, threshold)).tolist()
    for column, phase_x, row, phase_y, zx, zy, radius, flux, wings in zip(
        *places, zone_x.tolist(), zone_y.tolist(), radii, rows_of_flux, bright.tolist()
    ):
        zone = zones[zy][zx]
        inner = slice(zone.radius - radius, zone.radius + radius + 1)
        stamp = (zone.tapered if wings else zone.stamps)[phase_y, phase_x, inner, inner]
        canvas[row - radius : row + radius + 1, column - radius : column + radius + 1] += stamp * flux[: 2 * radius + 1]
    canvas = canvas[pad:-pad, pad:-pad]
    if bright.any():
        canvas = canvas + draw_wings(stars["x"].data[bright], stars["y"].data[bright], fluxes[bright], optics, sprites.radius, shape, threshold)  # fmt: skip
    return canvas


def draw_wings(x, y, fluxes, optics, sprite_radius, shape, threshold):
    """Linear light of bright stars outside their sprites, shape (height, width, 3), by one Fourier transform."""
    margin = math.ceil(MARGIN * max(shape)) + 1
    points = np.zeros((3, shape[0] + 2 * margin, shape[1] + 2 * margin))
    x, y = x + margin, y + margin
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    for right, low in itertools.product((0, 1), repeat=2):  # a star between pixels is shared out among four
        weight = np.abs(1 - right - (x - column)) * np.abs(1 - low - (y - row))
        np.add.at(points, (slice(None), row + low, column + right), weight * fluxes.T)
    furthest = max(shape) + margin - 1  # from a star to a pixel of the frame
    reach = visible_radius(optics, fluxes.max(initial=0), threshold, furthest)
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    outside = 1 - blend_to_wings(np.hypot(dx, dy), sprite_radius)
    cores = [point_spread(optics, dx, dy, channel) for channel in ([1] if optics.gray else range(3))]
    kernels = far_light(optics, dx, dy).transpose(2, 0, 1) + outside * cores
    error = 1e-7 * np.linalg.norm(points) * np.linalg.norm(kernels)  # of single precision, all over the frame
    points, kernels = (a.astype(np.float32 if error < 0.02 * threshold else float) for a in (points, kernels))
    size = max(furthest + 1 + reach, *points.shape[1:])  # what wraps round stays outside the frame
    size = (next_fast_len(size, real=True),) * 2
    light = irfft2(rfft2(points, size) * rfft2(kernels, size), size)
    rows, columns = (slice(reach + margin, reach + margin + length) for length in shape)
    return np.ascontiguousarray(light[:, rows, columns].transpose(1, 2, 0), np.float32).clip(0)


def brightest_far(optics):
    """dx, dy, each of shape (1, n), where far_light may be brightest: the middle, reflections off their hole, and rims."""
    points = [(0.0, 0.0)]
    for disc in optics.reflections:
        points += [disc["offset"] + np.array([share * disc["radius"], 0.0]) for share in (0.8, 0.97)]
    return np.transpose(points)[:, None]


def visible_radius(optics, flux, threshold, limit):
    """Radius beyond which no part of a star of that flux reaches the threshold, at most limit."""
    edges = (1.1 * disc["radius"] + np.hypot(*disc["offset"]) for disc in optics.reflections)
    nearest = max([12, *edges])  # a reflection with a hole is dark further in
    for radius in np.geomspace(min(nearest, limit), limit, 16).astype(int):
        along = optics.spikes["angles"] if optics.spikes else []
        ring = radius * np.exp(1j * np.concatenate([np.linspace(0, 2 * np.pi, 24), along]))[None]
        light = point_spread(optics, ring.real, ring.imag, 1) + far_light(optics, ring.real, ring.imag).max(axis=-1)
        if flux * light.max() < threshold:
            return int(radius)
    return int(limit)


# --------------------------------------------------------------------------------------------------------------------
# Exposure: noise, saturation, stretch
# --------------------------------------------------------------------------------------------------------------------


def midtones_transfer(x, m):
    """Midtones transfer function (PixInsight's): maps m to 0.5, keeps 0 and 1; its inverse has 1 - m for m."""
    return (m - 1) * x / ((2 * m - 1) * x - m)


def hyperbolic_stretch(amount, intensity, symmetry, highlights):
    """(forward, inverse) of the generalised hyperbolic stretch, 0..1 to 0..1; arguments D, b != 0, SP and HP (LP is 0).

    Steepest at SP with slope D, a straight line from HP to 1. Formulas: D. Payne and M. Cranfield, ghsastro.co.uk;
    its members for b > 0 (hyperbolic), b < 0 (integral) and b = -1 (logarithmic) are all Box-Cox transforms.
    """
    k = abs(intensity)
    power = -1 / intensity if intensity > 0 else 1 + 1 / intensity
    box_cox = (lambda x: np.expm1(power * np.log1p(x)) / power) if power else np.log1p
    unbox_cox = (lambda y: np.expm1(np.log1p(power * y) / power)) if power else np.expm1
    curve = lambda x: np.sign(x - symmetry) * box_cox(k * amount * np.abs(x - symmetry)) / k  # noqa: E731
    uncurve = lambda y: symmetry + np.sign(y) * unbox_cox(k * np.abs(y)) / (k * amount)  # noqa: E731
    slope = amount * (1 + k * amount * (highlights - symmetry)) ** (power - 1)
    low, knee = curve(0), curve(highlights)
    scale = knee + slope * (1 - highlights) - low

    def forward(x):
        return (curve(np.minimum(x, highlights)) + slope * (x - highlights).clip(0) - low) / scale

    def inverse(y):
        y = low + scale * y
        return uncurve(np.minimum(y, knee)) + (y - knee).clip(0) / slope

    return forward, inverse


def draw_stretch(rng, color):
    """(forward, inverse) between linear and display values, 0..1 both; most have about the slope of the MTF at black.

    Unlinked ones (of color pictures) work on (..., 3), each channel with its own midtones.
    """
    m = np.float32(MIDTONES(rng))
    if color and chance(rng, UNLINKED_CHANCE):
        m = (m * UNLINKED(rng, 3)).astype(np.float32)
    kind = pick(rng, STRETCH_SHARES)
    if kind == "mtf":
        return (lambda x: midtones_transfer(x, m)), (lambda y: midtones_transfer(y, 1 - m))
    if kind == "asinh":  # Lupton et al. 2004
        m = m / np.float32(HEADROOM(rng))
        scale = np.arcsinh(1 / m)
        return (lambda x: np.arcsinh(x / m) / scale), (lambda y: m * np.sinh(y * scale))
    sign, intensity = rng.choice([-1, 1]), LOCAL_INTENSITY(rng)
    symmetry = np.minimum(m * np.float32(SYMMETRY_POINT(rng)), 0.1)
    return hyperbolic_stretch(1 / m, np.float32(sign * intensity), symmetry, np.float32(HIGHLIGHTS(rng)))


def noise_layer(rng, linear, sigma, photon, color):
    """Camera noise for a linear picture, same shape: standard deviation sigma at its median, share photon of it shot."""
    shape = linear.shape
    if not sigma:
        return np.zeros_like(linear)
    chroma = CHROMA(rng) if color else 0.0
    grain = np.repeat((1 - chroma) ** 0.5 * normals(rng, *shape[:2], 1), 3, axis=2)
    if chroma:
        grain += chroma**0.5 * normals(rng, *shape)
    if chance(rng, CORRELATION_CHANCE):
        grain = cv2.GaussianBlur(grain, (0, 0), CORRELATION(rng))
        grain /= grain[::3, ::3].std()
    if chance(rng, BANDING_CHANCE):
        rows = BANDING(rng) * normals(rng, shape[0], 1, 1)
        grain = grain + (rows if chance(rng, 0.5) else rows.transpose(1, 0, 2))
    variance = 1 - photon + photon / np.median(linear[::4, ::4]) * linear
    layer = sigma * np.sqrt(variance.clip(0.01)) * grain
    if chance(rng, HOT_PIXEL_CHANCE):
        count = int(HOT_PIXELS(rng) * shape[0] * shape[1] / 1e6) + 1
        rows, columns = rng.integers(0, shape[0], count), rng.integers(0, shape[1], count)
        channels = rng.integers(0, 3, (count, 1)) if color else [0, 1, 2]
        layer[rows[:, None], columns[:, None], channels] += sigma * rng.uniform(10, 60, (count, 1))
    return layer


def own_noise(rng, light, electron, sky):
    """The stars' own photon noise: their light counted in photons of `electron` linear units each."""
    some = (light > 0.02 * sky) & (light < 4)  # what is fainter raises the sky's own noise by 1%; beyond is saturated
    few, grain = light < 10 * electron, normals(rng, *light.shape)
    # of ten photons or more, the Cornish-Fisher expansion of Poisson's law: its mean, variance and skewness
    counted = light + (np.sqrt(light * electron) * grain + electron / 6 * (grain**2 - 1)) * (some & ~few)
    counted[some & few] = apply_poisson_noise(light[some & few] / electron, seed=int(rng.integers(2**31))) * electron
    return counted


def bleed(rng, light, stars, peak):
    """Blooming: the charge of saturated stars runs along the columns of a CCD; changes light in place."""
    reach, turned = BLEED(rng), chance(rng, 0.5)
    canvas = light.transpose(1, 0, 2) if turned else light
    excess = stars["flux"].data * peak
    for star in stars[excess > 3]:
        half = int(reach * star["fwhm"] * np.log10(star["flux"] * peak))
        row, column = (int(round(star[axis])) for axis in ("xy" if turned else "yx"))
        first, last = max(row - half, 0), max(row + half + 1, 0)
        left, width = max(column, 0), max(1, int(star["fwhm"] / 3))
        if column >= 0:
            canvas[first:last, left : left + width] = np.maximum(canvas[first:last, left : left + width], 1)


def expose(rng, sky, places, optics, stretch, color, noise, share):
    """(starry, starless, stars): both pictures as the camera and the stretch show them, display values, and a table.

    stretch as of draw_stretch; noise is its standard deviation in display units at the sky's level; places (x, y,
    bright) and share as for draw_stars.
    """
    shape = sky.shape[:2]
    forward, inverse = stretch
    linear = inverse(sky.clip(0.002, 0.999)).astype(np.float32)
    median = np.median(linear[::4, ::4])
    gain = np.mean(forward(median * 1.01) - forward(median)) / (median * 0.01)  # slope at the sky
    screen = chance(rng, SCREEN_CHANCE)
    peak = Sprites(optics, (0.0, 0.0)).peak

    def light_over(base, height):
        """Linear light of what stands so high over a linear base once stretched, per channel of an unlinked stretch."""
        return inverse(np.minimum(forward(np.float32(base)) + np.float32(height), np.float32(0.98))) - base

    def visible_flux(height):
        return max(float(np.mean(light_over(0.0 if screen else median, height))), 1e-6) / peak

    def with_stars(base, light):
        """Display values of stars over a linear base, blended as this picture's are."""
        if screen:
            return 1 - (1 - forward(base.clip(0, 1))) * (1 - forward(light.clip(0, 1)))
        return forward((base + light).clip(0, 1))

    stars = draw_stars(rng, shape, optics, visible_flux, share, places)
    colors = star_colors(rng, stars["temperature"].data, color)
    darkest = 0.0 if screen else np.percentile(linear[::4, ::4], 2)
    threshold = 0.5 * float(np.min(light_over(darkest, HALF_LEVEL)))
    light = render(stars, colors, optics, shape, threshold)
    few, bare = light[::4, ::4], linear[::4, ::4]  # few is a view of light: it falls with it
    while np.any(np.percentile(with_stars(bare, few) - forward(bare), [50, 10]) > [FLOODED, VEILED]):
        for part in (light, stars["flux"]):
            part *= 0.5

    sigma = min(noise / gain, median / CLIPPED)
    photon = PHOTON_SHARE(rng)
    grain = noise_layer(rng, linear, sigma, photon, color)
    electron = min(photon * sigma**2 / median, sigma)  # the sky's shot noise tells what one photon is worth
    if chance(rng, GLOW_CHANCE) and electron > 1e-12:
        light = own_noise(rng, light if color else light[..., :1], electron, median)
    if chance(rng, BLEED_CHANCE):
        bleed(rng, light, stars, peak)
    base = linear + grain
    starless = forward(base.clip(0, 1))
    # no light, no difference: JPEG would make levels of a rounding error
    return np.where(light, with_stars(base, light), starless), starless, stars


# --------------------------------------------------------------------------------------------------------------------
# Processing applied to both pictures alike
# --------------------------------------------------------------------------------------------------------------------


def draw_processing(rng, size, color, noise):
    """A function from image to image, the same for both pictures, that ends at (size, size); noise as in expose."""
    steps = []
    if chance(rng, DENOISE_CHANCE):
        share, sigma = np.float32(DENOISE(rng)), rng.uniform(0.03, 0.12)
        steps.append(lambda im: im + share * (cv2.bilateralFilter(im, 5, sigma, 2) - im))
    if chance(rng, SHARPEN_CHANCE) and noise < SHARPEN_NOISE:
        amount, radius = np.float32(SHARPEN_AMOUNT(rng)), SHARPEN_RADIUS(rng)
        steps.append(lambda im: im + amount * (im - cv2.GaussianBlur(im, (0, 0), radius)))
    if chance(rng, CONTRAST_CHANCE):
        strength, wide = np.float32(CONTRAST(rng)), rng.uniform(8, 20)
        steps.append(lambda im: im + strength * (im - cv2.GaussianBlur(im, (0, 0), wide)))
    if chance(rng, LEVELS_CHANCE):
        black, white = np.float32(BLACK_POINT(rng)), np.float32(WHITE_POINT(rng))
        steps.append(lambda im: (im - black) / (white - black))
    if color and chance(rng, VIBRANCE_CHANCE):
        vibrance = np.float32(VIBRANCE(rng))
        steps.append(lambda im: cv2.transform(im, vibrance * np.eye(3) + (1 - vibrance) / 3))  # of gray and colour
    method = int(rng.choice([cv2.INTER_AREA, cv2.INTER_LANCZOS4, cv2.INTER_CUBIC]))
    steps.append(lambda im: im if im.shape[0] == size else cv2.resize(im, (size, size), interpolation=method))
    if chance(rng, JPEG_CHANCE):
        quality = int(JPEG_QUALITY(rng))
        steps.append(lambda im: jpeg_round_trip(im, quality))

    def process(image):
        for step in steps:
            image = np.ascontiguousarray(step(image).clip(0, 1), np.float32)
        return image

    return process


def jpeg_round_trip(image, quality):
    """What JPEG leaves of an image."""
    pixels = np.ascontiguousarray((image[..., ::-1] * 255 + 0.5).astype(np.uint8))
    _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32) / 255


# --------------------------------------------------------------------------------------------------------------------
# One pair from one index
# --------------------------------------------------------------------------------------------------------------------


def choose_photograph(index, settings, photographs):
    """Path of the photograph behind a pair, None for a painted sky; of its own stream, so that a failure can name it."""
    rng = np.random.default_rng([settings.seed, index, 1])
    if not photographs or chance(rng, settings.painted):
        return None
    return photographs[rng.integers(len(photographs))]


def make_pair(index, settings, path=None):
    """(starry, starless, stars): images of shape (size, size, 3 or 1) and a table; path: the photograph behind.

    Where the stars add less than half a grey level, the two images are equal.
    """
    rng = np.random.default_rng([settings.seed, index])
    color = settings.color and not chance(rng, MONO_CHANCE)
    size = settings.size
    if chance(rng, RESIZE_CHANCE):
        size = next_fast_len(int(size / RESIZE(rng)), real=True)  # Fourier transforms of a prime length are slow
    optics = draw_optics(rng, color)
    share = 0.0 if chance(rng, STARLESS_CHANCE) else SPARSE(rng) if chance(rng, SPARSE_CHANCE) else 1.0
    stretch = draw_stretch(rng, color)
    least = burnt = 0.5 * optics.widest
    if share:  # galaxies are told apart from stars
        seen = (seen_width(optics, stretch[1], height) for height in (BURNT_HEIGHT, 1.0))
        least, burnt = (max(optics.widest, SEEN_WIDTH * width) for width in seen)
    sky, places = background(rng, size, least, burnt, path)
    if not color:
        sky = np.repeat((sky @ np.array([0.299, 0.587, 0.114], np.float32))[..., None], 3, axis=2)
    noise = 0.0 if chance(rng, NOISELESS_CHANCE) else NOISE(rng)
    starry, starless, stars = expose(rng, sky, places, optics, stretch, color, noise, share)
    process = draw_processing(rng, settings.size, color, noise)
    starry, starless = process(starry.astype(np.float32)), process(starless.astype(np.float32))
    starry = np.where(np.abs(starry - starless) < HALF_LEVEL, starless, starry)
    for column in ("x", "y"):  # pixel centres of the reduced picture
        stars[column] = (stars[column] + 0.5) * settings.size / size - 0.5
    stars["fwhm"] *= settings.size / size
    inside = (stars["x"] > -0.5) & (stars["x"] < settings.size - 0.5) & (stars["y"] > -0.5) & (stars["y"] < settings.size - 0.5)  # fmt: skip
    keep = slice(None) if settings.color else slice(0, 1)
    return starry[..., keep], starless[..., keep], stars[inside]


def write_png(path, image, depth):
    """Write an image as PNG of 8 or 16 bits: to a temporary file, then renamed, so that no half file is ever seen."""
    levels = 2**depth - 1
    pixels = (image.astype(np.float64) * levels + 0.5).astype(np.uint8 if depth == 8 else np.uint16)
    _, data = cv2.imencode(".png", np.ascontiguousarray(pixels[..., ::-1]))
    write_bytes(path, data.tobytes())


def write_bytes(path, data):
    temporary = path.with_name(f".{path.name}.tmp")  # always the same: what a killed run left is written over
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def pair_paths(folder, index):
    return Path(folder) / f"x{index}.png", Path(folder) / f"y{index}.png"


def catalog_path(folder, index):
    return Path(folder) / f"stars{index}.ecsv"


def save_pair(job):
    """Make and write one pair in a worker process; returns None, or a line that says why it could not be made.

    Raises OSError where it cannot be written: nor could the next.
    """
    index, settings, photographs = job
    cv2.setNumThreads(1)  # the processes are the parallelism
    path = choose_photograph(index, settings, photographs)
    path_x, path_y = pair_paths(settings.save_dir, index)
    try:
        starry, starless, stars = make_pair(index, settings, path)
    except Exception as error:  # one bad photograph must not end a long run; the exit status tells
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"pair {index} (seed {settings.seed}, background {path or 'painted'}): {reason}"
    try:
        path_x.unlink(missing_ok=True)  # all are there when x is: never a new y beside an old x
        if settings.catalog:
            stars.meta["background"] = path or "painted"
            text = io.StringIO()
            stars.write(text, format="ascii.ecsv")
            write_bytes(catalog_path(settings.save_dir, index), text.getvalue().encode())
        write_png(path_y, starless, settings.depth)
        write_png(path_x, starry, settings.depth)
    finally:
        if not path_x.exists():
            for path in (path_y, catalog_path(settings.save_dir, index)):
                path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------------
# The pool and the command line
# --------------------------------------------------------------------------------------------------------------------


def write_preview(settings, indices):
    """Contact sheet preview.png in the folder of the pairs: starry above starless, at most 6 in a row."""
    rows = []
    for start in range(0, len(indices), 6):
        pairs = [pair_paths(settings.save_dir, i) for i in indices[start : start + 6]]
        pairs = [np.vstack(list(map(read_again, pair))) for pair in pairs if all(p.exists() for p in pair)]
        if pairs:
            height = max(len(pair) for pair in pairs)
            rows.append(np.hstack([np.pad(pair, ((0, height - len(pair)), (0, 0), (0, 0))) for pair in pairs]))
    if rows:
        width = max(row.shape[1] for row in rows)
        sheet = np.vstack([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows])
        write_png(Path(settings.save_dir) / "preview.png", sheet, 8)


def read_again(path):
    """A picture of a pair; raises BadInput."""
    try:
        return read_background(path)
    except (OSError, ValueError, cv2.error) as error:
        raise BadInput(f"{path}: cannot be read ({error}); --overwrite makes it again") from None


@contextlib.contextmanager
def waiting_for_later(number):
    """Within, a signal to this process waits; processes that begin within never get it. Windows has no such thing."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])


def work(jobs, cpus):
    """Yield save_pair's answer to each job, in the order they end; few jobs wait at a time, so memory stays flat."""
    context = multiprocessing.get_context("spawn")  # the same on all systems, and no forked threads
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # inherited: the processes are the parallelism, in numpy too
    leave = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process; the workers end what they have in hand
    with concurrent.futures.ProcessPoolExecutor(cpus, context, signal.signal, leave) as pool:
        waiting = set()
        while True:
            with waiting_for_later(signal.SIGINT):  # processes begin here, and would show what it interrupts
                waiting |= {pool.submit(save_pair, job) for job in itertools.islice(jobs, 2 * cpus - len(waiting))}
            if not waiting:
                return
            done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            yield from (future.result() for future in done)


MOST_CPUS = 61  # that Windows can wait for


def generate(settings):
    """Make the pairs that settings ask for; returns the number of those that failed."""
    photographs = find_photographs(settings.backgrounds)
    folder = Path(settings.save_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be made a folder ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise BadInput(f"{folder}: this folder cannot be written to")
    indices = list(range(settings.start, settings.start + settings.imcount))
    there = [i for i in indices if not settings.overwrite and all(path.exists() for path in pair_paths(folder, i))]
    missing = sorted(set(indices) - set(there))
    if there:
        bare = sum(not catalog_path(folder, i).exists() for i in there) if settings.catalog else 0
        more = f", {bare} of them without a catalogue" if bare else ""
        print(f"{folder}: {len(there)} of {len(indices)} pairs are there and kept{more} (--overwrite: anew)")
    failed = 0
    with waiting_for_later(signal.SIGINT):  # a bar that is interrupted in its making shows what it then lacks
        bar = tqdm(total=len(missing), unit="pair", desc=str(folder))
    with bar:
        for message in work(
            ((i, settings, photographs) for i in missing), settings.cpus or min(os.cpu_count(), MOST_CPUS)
        ):
            bar.update()
            if message:
                failed += 1
                bar.write(message, file=sys.stderr)
    if settings.preview_pairs:
        write_preview(settings, indices[: settings.preview_pairs])
    return failed


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, without the list of all options."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def parse_arguments(arguments=None):
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(prog="GenerateStars.py", description=__doc__.split("\n\n")[0], formatter_class=form)
    for field in dataclasses.fields(Settings):
        options = {"default": field.default, "help": field.metadata["help"]}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(field.default, tuple):
            options |= {"nargs": "+", "metavar": "DIR"}
        else:
            options["type"] = field.type
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    values = vars(parser.parse_args(arguments))
    settings = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    if settings.depth not in (8, 16):
        parser.error("--depth must be 8 or 16")
    if not 0 <= settings.painted <= 1:
        parser.error("--painted must lie between 0 and 1")
    for name, least in dict(imcount=1, start=0, cpus=0, size=32, preview_pairs=0, seed=0).items():
        if getattr(settings, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return settings


def main(arguments=None):
    settings = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: else the workers would outlive this process
    try:
        failed = generate(settings)
    except (BadInput, OSError) as error:  # OSError: of a contact sheet that cannot be written
        sys.exit(f"GenerateStars.py: {error}")
    except concurrent.futures.BrokenExecutor:
        sys.exit("GenerateStars.py: a process was killed (memory?); try again with less --cpus")
    except KeyboardInterrupt:
        sys.exit("GenerateStars.py: interrupted; the pairs made so far are kept, the same command goes on from there")
    if failed:
        sys.exit(f"GenerateStars.py: {failed} of {settings.imcount} pairs failed")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, INTERRUPTED)
    main()
