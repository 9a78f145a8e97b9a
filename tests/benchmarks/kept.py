"""How much the weights change what must stay: the light of galaxies and nebulae among stars.

    python tests/benchmarks/kept.py [--pairs 40] [--size 512] [--seed 94] [--only NAME ...] [--weights FILE]

A kind is GenerateStars.py with every background but that one left out, on an empty sky with little noise. What stands
0.1 over the sky's median in the star-free picture, averaged over 7 x 7 pixels, belongs to it; of its light there the
share that is missing or too much in the starless picture is told, also at the stars in front of it, and in how many
pictures that is more than a tenth.
"""

import argparse
import functools
import sys
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import GenerateStars as gs  # noqa: E402
import nox  # noqa: E402

OTHERS = ("GALAXY", "GALAXY_FIELD", "GALAXY_CLUSTER", "KNOT", "PLANETARY", "COMET", "GLOBULAR", "STARLESS")
EMPTY = {f"{name}_CHANCE": 0 for name in OTHERS}
EMPTY |= {"EMPTY_SKY_CHANCE": 1, "NOISE": gs.Range(0.0006, 0.01, True), "SKY_LEVEL": gs.Range(0.01, 0.1, True)}
KINDS = {
    "large galaxy without arms": {"GALAXY_CHANCE": 1, "SPIRAL_CHANCE": 0},
    "large spiral": {"GALAXY_CHANCE": 1, "SPIRAL_CHANCE": 1},
    "galaxy larger than the frame": {"GALAXY_CHANCE": 1, "GALAXY_SCALE": gs.Range(0.5, 2, True)},
    "small galaxies": {"GALAXY_FIELD_CHANCE": 1},
    "planetary nebula": {"PLANETARY_CHANCE": 1},
    "glow of a globular cluster": {"GLOBULAR_CHANCE": 1},
    "comet": {"COMET_CHANCE": 1},
    "nebula": {"EMPTY_SKY_CHANCE": 0},
}
HEIGHT = 0.1  # over the sky's median


def smooth(image):
    return cv2.blur(image, (7, 7)).mean(axis=2)


def share_taken(truth, starless):
    """Share of the light of what stands out of the sky that differs between two images; None where nothing does."""
    truth, starless = smooth(truth), smooth(starless)
    light = truth - np.median(truth)
    if not (light > HEIGHT).any():
        return None
    return float(np.abs(starless - truth)[light > HEIGHT].sum() / light[light > HEIGHT].sum())


def measure(ranges, values, load):
    """Shares taken in as many pictures as were asked for of those that hold such a thing."""
    making, shares = gs.Settings(seed=values.seed, size=values.size), []
    settings = nox.Inference(weights=values.weights)
    with mock.patch.dict(vars(gs), EMPTY | ranges):
        for index in range(10 * values.pairs):
            starry, truth, _ = gs.make_pair(index, making)
            if share_taken(truth, truth) is None:
                continue
            picture = nox.Picture(np.rint(starry * 255).astype(np.uint8))
            light = nox.whole_starlight(picture, settings, load)
            shares.append(share_taken(truth, picture.with_pixels(picture.without(light)).image()))
            if len(shares) == values.pairs:
                break
    return np.array(shares)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=94)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME")
    parser.add_argument("--weights", default="", help="of the colour network; default: the shipped ones")
    values = parser.parse_args()
    load = functools.cache(nox.load_generator)
    print(
        "| what must stay | pictures | light changed, mean, % | median, % | pictures that change by more than a tenth |"
    )
    print("|---|---|---|---|---|")
    for name in tqdm(values.only, unit="kind", leave=False):
        shares = 100 * measure(KINDS[name], values, load)
        row = f"{len(shares)} | {shares.mean():.1f} | {np.median(shares):.1f} | {(shares > 10).sum()}"
        tqdm.write(f"| {name} | {row} |")


if __name__ == "__main__":
    main()
