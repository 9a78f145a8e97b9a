"""How well the weights remove stars from fresh pairs: PSNR against the truth, before and after.

    python tests/benchmarks/fresh_pairs.py [--pairs 100] [--seed 99] [--size 256] [--weights FILE] [--gray] [--views 8]
        [--data DIR]

Makes the pairs with GenerateStars.py (painted skies) in a temporary folder unless --data names a folder of pairs.
"""

import argparse
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import nox  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument(
        "--seed",
        type=int,
        default=99,
        help="of the pairs; README.md lists those that the shipped weights saw",
    )
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--weights", default="", help="default: the shipped ones")
    parser.add_argument("--views", type=int, default=1, help="as of nox.py infer")
    parser.add_argument("--gray", action="store_true", help="grayscale pairs and weights")
    parser.add_argument("--data", help="a folder of pairs instead of fresh ones")
    values = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not values.data:
            color = "--no-color" if values.gray else "--color"
            sizes = [f"--{name}={getattr(values, name)}" for name in ("seed", "size")]
            command = [sys.executable, str(ROOT / "GenerateStars.py"), f"--imcount={values.pairs}", color, *sizes]
            subprocess.run([*command, "--save-dir", folder], check=True)
        report(nox.find_pairs(values.data or folder), values)


def report(pairs, values):
    channels = 1 if values.gray else 3
    settings = nox.Inference(weights=values.weights, views=values.views)
    load = functools.cache(nox.load_generator)
    rows = []
    for paths in pairs:
        starry, truth = (nox.Picture(pixels[..., :channels]) for pixels in nox.read_pair(paths, channels))
        light = nox.whole_starlight(starry, settings, load)
        starless = starry.with_pixels(starry.without(light))  # in 8 bits, as nox.py infer writes it
        images = (picture.image() for picture in (starry, starless))
        rows.append((paths[0].name, *(nox.psnr(image, truth.image()) for image in images)))
    table = pd.DataFrame(rows, columns=["pair", "before", "after"]).set_index("pair")
    table["gain"] = table["after"] - table["before"]
    starless = table["before"] == 100  # both pictures are the same
    stars, none = table[~starless], table[starless]
    print(
        f"{len(stars)} pairs: PSNR {stars['before'].mean():.2f} dB before, {stars['after'].mean():.2f} dB after; "
        f"gain in the mean {stars['gain'].mean():.2f} dB, in the median {stars['gain'].median():.2f} dB"
    )
    worse = stars["gain"][stars["gain"] < -0.5].sort_values()
    print(f"made worse by more than 0.5 dB: {len(worse)} {worse.round(2).to_dict() or ''}")
    print(f"{len(none)} pairs without a star: PSNR after {none['after'].round(1).tolist()} dB, 100 is unchanged")


if __name__ == "__main__":
    main()
