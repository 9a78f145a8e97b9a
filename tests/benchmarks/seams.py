"""How wide tiles must overlap: the error at seams, in steps of 8 bits, against the overlap.

    python tests/benchmarks/seams.py                 the starry pictures of "nox data"
    python tests/benchmarks/seams.py PICTURE ...     your own, or their centres

The light found with each overlap is compared with the light found with the widest.
--bfloat16 tells in the same way what that precision changes.
"""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import nox  # noqa: E402


def centre(path, size):
    """The middle of a picture, at most size x size pixels, as an image."""
    picture = nox.read_picture(path)
    top, left = (max(0, (side - size) // 2) for side in picture.pixels.shape[:2])
    return picture.image()[top : top + size, left : left + size]


@functools.cache
def network(precision, channels):
    nox.keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    return nox.load_generator(ROOT / nox.weights_name(channels))


def light_of(image, patch, overlap, precision="float32"):
    """The light of an image with the shipped weights."""
    settings = nox.Inference(patch_size=patch, stride=patch - overlap)
    return nox.stellar_light(*network(precision, image.shape[2]), image, settings)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pictures", nargs="*", type=Path)
    parser.add_argument("--patch-size", type=int, default=512)
    parser.add_argument("--overlaps", type=int, nargs="+", default=[0, 64, 128, 192])
    parser.add_argument("--widest", type=int, default=256)
    parser.add_argument("--size", type=int, default=1000, help="side of the crop of each picture")
    parser.add_argument("--bfloat16", action="store_true", help="also the error of that precision")
    values = parser.parse_args()
    errors = {}  # of each row of the table, one array a picture
    for path in values.pictures or sorted((ROOT / "nox data").glob("x*.png")):
        image = centre(path, values.size)
        truth = light_of(image, values.patch_size, values.widest)
        found = {f"{n}": light_of(image, values.patch_size, n) for n in values.overlaps}
        if values.bfloat16:
            found["bfloat16"] = light_of(image, values.patch_size, values.widest, "bfloat16")
        for name, light in found.items():
            errors.setdefault(name, []).append(255 * np.abs(light - truth).max(axis=2).ravel())
        print(f"{path.name}: largest " + ", ".join(f"{name}: {error[-1].max():.2f}" for name, error in errors.items()))
    print("\n| overlap | mean | 99.9 % below | above 1/4 step | above 1 step | largest |\n|---|---|---|---|---|---|")
    for name, error in errors.items():
        error = np.concatenate(error)
        numbers = f"{error.mean():.4f} | {np.quantile(error, 0.999):.3f}"
        print(f"| {name} | {numbers} | {np.mean(error > 0.25):.4%} | {np.mean(error > 1):.4%} | {error.max():.2f} |")


if __name__ == "__main__":
    main()
