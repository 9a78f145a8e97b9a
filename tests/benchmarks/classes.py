"""What the weights reach on fresh pairs of each class: PSNR within the stars, and recall by magnitude.

    python tests/benchmarks/classes.py [--pairs 300] [--size 256] [--seed 98] [--only NAME ...] [--weights FILE]

A class is GenerateStars.py with some of its ranges narrowed, on painted skies. Magnitudes count from a star whose middle
is just saturated: above 0 is fainter. A star is found when less than half of its light is left in the 3 x 3 pixels
around it; those whose light there is below 2/255 are not counted. Recall is the mean over the pictures that have such
stars, so that no crowded one outweighs the others. Linear data, with the level of their sky or with it subtracted, go
the whole way of nox.py infer, and are compared under the stretch from which they were made.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
from tqdm import tqdm

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import GenerateStars as gs  # noqa: E402
import nox  # noqa: E402

SHARP = {"FWHM_LARGE_CHANCE": 0}
CLASSES = {  # name: ranges in place of GenerateStars.py's
    "colour": {"MONO_CHANCE": 0},
    "mono": {"color": False},
    "noise low": {"NOISELESS_CHANCE": 0, "NOISE": gs.Range(0.0006, 0.003, True)},
    "noise middle": {"NOISELESS_CHANCE": 0, "NOISE": gs.Range(0.003, 0.01, True)},
    "noise high": {"NOISELESS_CHANCE": 0, "NOISE": gs.Range(0.01, 0.1, True)},
    "FWHM 1.2-2": SHARP | {"FWHM": gs.Range(1.2, 2)},
    "FWHM 2-4": SHARP | {"FWHM": gs.Range(2, 4)},
    "FWHM 4-8": SHARP | {"FWHM": gs.Range(4, 8)},
    "without spikes": {"SPIKE_CHANCE": 0},
    "with spikes": {"SPIKE_CHANCE": 1},
    "linear": {"linear": True},
    "linear, sky subtracted": {"linear": True, "subtracted": True},
    "stretched": {},
}
MAGNITUDES = {"saturated": -np.inf, "0-2": 0, "2-4": 2, "4-6": 4, "above 6": 6}  # from which on


def as_linear(starry, rng, subtracted):
    """(an image as linear data of 16 bits, as a picture; a function that shows such pixels stretched again)."""
    midtones = gs.Range(0.003, 0.05, True)(rng)
    linear = np.rint(65535 * nox.midtones_transfer(starry, 1 - midtones)) / 65535
    level = np.median(linear, axis=(0, 1)) if subtracted else 0
    picture = nox.Picture((linear - level).astype(np.float32))
    return picture, lambda pixels: nox.midtones_transfer((pixels + level).clip(0, 1), midtones).astype(np.float32)


def star_psnr(image, truth, mask):
    return -10 * np.log10(max(float(np.square(image - truth)[mask].mean()), 1e-10))


def recall(starry, truth, starless, stars):
    """Share of the stars that count which was found, by magnitude; NaN where there is none."""
    column, row = (np.rint(stars[axis].data).astype(int).clip(1, len(truth) - 2) for axis in "xy")
    light, left = (np.abs(image - truth).mean(axis=2) for image in (starry, starless))
    light, left = (sum(part[row + i, column + j] for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9 for part in (light, left))
    middle = stars["flux"].data / (1.13 * stars["fwhm"].data ** 2)  # a Gaussian's, in saturated pixels
    table = pd.DataFrame({"magnitude": -2.5 * np.log10(middle), "found": left < 0.5 * light})
    table = table[light > 2 / 255]
    part = pd.cut(table["magnitude"], [*MAGNITUDES.values(), np.inf], labels=list(MAGNITUDES), right=False)
    return table["found"].groupby(part, observed=False).mean()


def measure(ranges, network, values, channels):
    """One row of the table; network: what load_generator gives."""
    ranges = dict(ranges)
    linear, subtracted, _ = (ranges.pop(name, False) for name in ("linear", "subtracted", "color"))
    making, rows, recalls = gs.Settings(seed=values.seed, size=values.size, color=channels == 3), [], []
    settings = nox.Inference(linear="yes" if linear else "no")
    with mock.patch.dict(vars(gs), ranges):
        for index in range(values.pairs):
            starry, truth, stars = gs.make_pair(index, making)
            starry, truth = (np.rint(image * 255).astype(np.float32) / 255 for image in (starry, truth))
            mask = (starry != truth).any(axis=2)
            if not mask.any():
                continue
            picture, shown = nox.Picture(starry), np.asarray
            if linear:
                picture, shown = as_linear(starry, np.random.default_rng(index), subtracted)
            whole_way = nox.layers_of(picture, ("starless",), None, None, settings, None, lambda weights: network)
            starless = shown(whole_way["starless"].pixels)
            rows.append([star_psnr(image, truth, mask) for image in (starry, starless)])
            recalls.append(recall(starry, truth, starless, stars))
    shares = 100 * pd.concat(recalls, axis=1).mean(axis=1)
    before, after = np.mean(rows, axis=0)
    return {"pairs": len(rows), "before, dB": before, "after, dB": after} | shares.to_dict()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--size", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--seed", type=int, default=98)
    parser.add_argument("--only", nargs="+", choices=CLASSES, default=list(CLASSES), metavar="NAME")
    parser.add_argument("--weights", default="", help="of the colour network; default: the shipped ones")
    values = parser.parse_args()
    print("| class | pairs | before, dB | after, dB | " + " | ".join(f"found, {name}, %" for name in MAGNITUDES) + " |")
    print("|---" * (4 + len(MAGNITUDES)) + "|")
    for name in tqdm(values.only, unit="class", leave=False):
        channels = 3 if CLASSES[name].get("color", True) else 1
        settings = dataclasses.replace(nox.Inference(), weights=values.weights if channels == 3 else "")
        network = nox.load_generator(nox.weights_for(settings, channels))
        row = measure(CLASSES[name], network, values, channels)
        tqdm.write(f"| {name} | {row.pop('pairs')} | " + " | ".join(f"{value:.1f}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
