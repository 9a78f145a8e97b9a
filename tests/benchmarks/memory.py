"""Peak memory of nox.py infer for pictures of several sizes, float32 in and out.

    python tests/benchmarks/memory.py [--megapixels 1 10 50] [--weights FILE | --tiny] [--linear] [--giants]

Each size runs in its own process, from TIFF to TIFF. The picture's own arrays, the pixels that go in and those that
come out, are taken off in the column "above".
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, capture_output=True)
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit)
"""


def peak(*command):
    """Largest resident memory, in gigabytes, of a command; in a process of its own, whose only child it is."""
    line = [sys.executable, "-c", PEAK, sys.executable, *map(str, command)]
    return int(subprocess.run(line, check=True, capture_output=True, text=True).stdout) / 1e9


def add_giants(picture):
    """A burnt-out star with a wide glow in the middle of each 1000 x 1000 pixels."""
    r = np.hypot(*(np.indices((400, 400)) - 200))
    star = np.maximum(r < 14, 0.5 * np.exp(-r / 25))[..., None].astype(np.float32)
    for top, left in np.ndindex(picture.shape[0] // 1000, picture.shape[1] // 1000):
        part = picture[1000 * top + 300 :, 1000 * left + 300 :][:400, :400]
        np.minimum(part + star, 1, out=part)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--megapixels", type=float, nargs="+", default=[1, 10, 50], help="100 needs minutes")
    parser.add_argument("--weights", default="", help="default: the shipped ones")
    parser.add_argument("--tiny", action="store_true", help="a network of width 4, 20 times faster")
    parser.add_argument("--linear", action="store_true", help="the pictures are taken for linear data")
    parser.add_argument("--giants", action="store_true", help="pictures with giant stars, at which infer looks twice")
    values = parser.parse_args()
    print("| megapixels | own arrays, GB | peak, GB | above |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source, output, weights = Path(folder) / "in.tif", Path(folder) / "out.tif", values.weights
        if values.tiny:
            import nox

            weights, architecture = str(Path(folder) / "tiny.h5"), nox.Architecture(width=4)
            nox.save_weights(nox.build_generator(architecture), architecture, weights)
        for megapixels in values.megapixels:
            side = round((megapixels * 1e6) ** 0.5)
            own = 2 * side * side * 3 * 4 / 1e9
            picture = np.random.default_rng(0).random((side, side, 3), np.float32)
            if values.giants:
                picture *= 0.05  # a sky, on which the network tells stars
                add_giants(picture)
            cv2.imwrite(str(source), picture)
            flags = [*(["--weights", weights] if weights else []), "--linear", "yes" if values.linear else "no"]
            whole = peak(ROOT / "nox.py", "infer", source, "-o", output, "--overwrite", *flags)
            numbers = own, whole, whole - own
            print(f"| {megapixels:g} | " + " | ".join(f"{n:.2f}" for n in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
