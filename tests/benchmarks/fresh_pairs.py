"""How well the weights remove stars from fresh pairs: PSNR against the truth, before and after.

    python tests/benchmarks/fresh_pairs.py [--pairs 100] [--seed 99] [--size 256] [--weights FILE] [--gray] [--data DIR]

Makes the pairs with GenerateStars.py (painted skies) in a temporary folder unless --data names a folder of pairs.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import nox  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=99, help="of the pairs; the shipped weights saw seed 2")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--weights", default="", help="default: the shipped ones")
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
    settings = nox.Inference(weights=values.weights)
    generator, architecture = nox.load_generator(nox.weights_for(settings, channels))
    rows = []
    for paths in pairs:
        starry, truth = (nox.to_unit(pixels)[..., :channels] for pixels in nox.read_pair(paths, channels))
        light = nox.stellar_light(generator, architecture, starry, settings)
        starless = starry - light.clip(starry - 1, starry)
        rows.append((nox.psnr(starry, truth), nox.psnr(starless, truth)))
    before, after = np.array(rows).T
    gain = after - before
    print(
        f"{len(rows)} pairs: PSNR {before.mean():.2f} dB before, {after.mean():.2f} dB after; mean gain {gain.mean():.2f} dB"
    )
    print(f"median gain {np.median(gain):.2f} dB; smallest {gain.min():.2f} dB ({pairs[gain.argmin()][0].name})")
    print(f"pairs made worse by more than 0.5 dB: {(gain < -0.5).sum()}")


if __name__ == "__main__":
    main()
