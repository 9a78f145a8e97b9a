"""How many linear frames of nothing but sky and noise come back from nox.py infer as they were.

    python tests/benchmarks/noise.py [--frames 30] [--size 512] [--seed 5] [--gray] [--weights FILE]

The frames take turns: 16-bit integers and floats, fine noise and noise that debayering has smoothed, and of the floats
every other one has the level of its sky subtracted. All have a gradient.
"""

import argparse
import functools
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import nox  # noqa: E402

LARGEST = 0.25  # noise over sky


def frame(index, seed, size, channels):
    """(a picture, the noise over the sky in it)."""
    rng = np.random.default_rng([seed, index])
    sky, noise = (float(np.exp(rng.uniform(*np.log(ends)))) for ends in ((0.002, 0.2), (0.005, LARGEST)))
    grain = rng.standard_normal((size, size, channels))
    if index % 3 == 1:
        grain = cv2.GaussianBlur(grain, (0, 0), rng.uniform(0.5, 1.2)).reshape(grain.shape)
        grain /= grain.std()
    gradient = 1 + rng.uniform(-0.2, 0.2) * np.linspace(-1, 1, size)[:, None, None]
    linear = sky * gradient * (1 + noise * grain)
    if index % 4 == 3:
        linear -= sky
    pixels = linear.astype(np.float32) if index % 2 else np.rint(65535 * linear.clip(0)).astype(np.uint16)
    return nox.Picture(pixels), noise


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--gray", action="store_true", help="grayscale frames and weights")
    parser.add_argument("--weights", default="", help="default: the shipped ones")
    values = parser.parse_args()
    settings = nox.Inference(linear="yes", weights=values.weights)
    load = functools.cache(nox.load_generator)
    rows = []
    for index in range(values.frames):
        picture, noise = frame(index, values.seed, values.size, 1 if values.gray else 3)
        starless = nox.layers_of(picture, ("starless",), None, None, settings, None, load)["starless"]
        rows.append((index, noise, int((starless.pixels != picture.pixels).any(axis=2).sum())))
    table = pd.DataFrame(rows, columns=["frame", "noise over sky", "pixels changed"]).set_index("frame")
    touched = table[table["pixels changed"] > 0]
    print(f"{len(table) - len(touched)} of {len(table)} frames come back bit for bit")
    if len(touched):
        print(touched.round(3).to_string())


if __name__ == "__main__":
    main()
