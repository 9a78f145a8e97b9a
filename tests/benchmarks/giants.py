"""How much of the light of bright stars, and of crowds that run together, is left.

    python tests/benchmarks/giants.py [--pairs 60] [--seed 98] [--size 768] [--weights FILE] [--data DIR]

A giant is a connected area of at least 150 pixels, on ground darker than 100 levels of 255, to which stars add 50 levels
or more: one star, or several that touch. The table counts, by that area, the giants of which more than 30% and more
than 50% of the light was left. Makes the pairs with GenerateStars.py (painted skies) in a temporary folder unless --data
names a folder of pairs.
"""

import argparse
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import nox  # noqa: E402

AREAS = [150, 300, 700, 2000, 6000, np.inf]
HEIGHT = 50 / 255
BRIGHT = 100 / 255  # ground on which the eye cannot tell what was left


def giants(starry, starless, truth):
    """(area in pixels, share of its light that was left) of each giant of a pair, images of 0..1."""
    due, left = (starry - truth).mean(axis=2), (starless - truth).mean(axis=2)
    mask = (cv2.GaussianBlur(due, (0, 0), 2) > HEIGHT).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
    for label in np.flatnonzero(stats[:, cv2.CC_STAT_AREA] >= AREAS[0]):
        inside = labels == label
        if label and truth[inside].mean() < BRIGHT:
            yield int(stats[label, cv2.CC_STAT_AREA]), float(left[inside].sum() / due[inside].sum())


def measure(folder, weights):
    """Table of all giants of a folder's pairs: area, left."""
    load, settings, rows = functools.cache(nox.load_generator), nox.Inference(weights=weights), []
    for paths in tqdm(nox.find_pairs(folder), unit="pair", leave=False):
        starry, truth = (nox.Picture(pixels) for pixels in nox.read_pair(paths, 3))
        starless = starry.with_pixels(starry.without(nox.whole_starlight(starry, settings, load)))
        rows += giants(starry.image(), starless.image(), truth.image())
    return pd.DataFrame(rows, columns=["area", "left"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=98)
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--weights", default="", help="default: the shipped ones")
    parser.add_argument("--data", help="a folder of colour pairs instead of fresh ones")
    values = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not values.data:
            sizes = [f"--{name}={getattr(values, name)}" for name in ("seed", "size")]
            command = [sys.executable, ROOT / "GenerateStars.py", f"--imcount={values.pairs}", *sizes]
            subprocess.run([*command, f"--save-dir={folder}"], check=True)
        table = measure(values.data or folder, values.weights)
    groups = table.groupby(pd.cut(table["area"], AREAS, right=False), observed=True)["left"]
    shares = groups.agg(
        giants="size", mean="mean", over_30=lambda s: (s > 0.3).sum(), over_50=lambda s: (s > 0.5).sum()
    )
    print(shares.round(3).to_string())


if __name__ == "__main__":
    main()
