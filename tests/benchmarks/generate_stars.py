"""How fast GenerateStars.py is: seconds a pair, beside stars rendered one by one over the whole frame, and throughput.

python tests/benchmarks/generate_stars.py
python tests/benchmarks/generate_stars.py --size 256 --stars 1000 --pairs 4    quicker, rougher
python tests/benchmarks/generate_stars.py --memory 10 100 600                  memory of a process after so many pairs
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # CPU seconds are to be those of one core
import cv2
import numpy as np
from astropy.modeling.models import Moffat2D

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import GenerateStars as gs  # noqa: E402


def only_stars(count, size):
    """A field population that gives about `count` stars inside the frame."""
    field, density = gs.POPULATIONS["field"], count / (size / 1e3) ** 2
    many = gs.Range(density, density * 1.001)
    return {"field": gs.Population(1.0, many, field.faintest, field.span, field.slope, field.temperature)}


def seconds_a_pair(size, count, pairs):
    """(median, longest, stars): CPU seconds of one process for whole pairs, exposure and background included."""
    # the script thins out the stars of wide PSFs and of sparse pictures; here every picture has them all
    gs.POPULATIONS, gs.FWHM_LARGE_CHANCE, gs.FWHM = only_stars(count, size), 0, gs.Range(1.2, 3)
    gs.SPARSE_CHANCE = gs.STARLESS_CHANCE = 0
    settings, seconds, stars = gs.Settings(size=size), [], []
    gs.make_pair(0, settings)  # the first call pays for caches
    for index in range(pairs):
        start = time.process_time()
        stars.append(len(gs.make_pair(index, settings)[2]))
        seconds.append(time.process_time() - start)
    return np.median(seconds), max(seconds), np.mean(stars)


def seconds_a_star(size, count=20):
    """CPU seconds for one colour star drawn over the whole frame by astropy's model, blended as the original does."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    canvas = np.zeros((size, size, 3), np.float32)
    start = time.process_time()
    for _ in range(count):
        star = Moffat2D(rng.uniform(0.1, 1), *rng.uniform(0, size, 2), 2.0, 2.5)(x, y)
        canvas = 1 - (1 - canvas) * (1 - star[..., None].astype(np.float32) * rng.uniform(0.5, 1, 3).astype(np.float32))
    return (time.process_time() - start) / count


def pairs_a_second(cpus, size, pairs):
    """Throughput of the real command; the start of the processes is measured with one pair and taken off."""
    times = []
    for count in (cpus, cpus + pairs):
        with tempfile.TemporaryDirectory() as folder:
            line = [sys.executable, ROOT / "GenerateStars.py", "--imcount", count, "--cpus", cpus, "--size", size]
            start = time.perf_counter()
            subprocess.run([*map(str, line), "--save-dir", folder], check=True, capture_output=True)
            times.append(time.perf_counter() - start)
    return pairs / (times[1] - times[0])


def peak_memory(counts):
    """Yield (pairs, MiB): the most memory this process has held by then, making 64x64 pairs."""
    import resource  # not on Windows

    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes there, KiB elsewhere
    with tempfile.TemporaryDirectory() as folder:
        settings = gs.Settings(size=64, save_dir=folder, seed=1)
        for first, last in zip([0, *counts], counts):
            for index in range(first, last):
                gs.save_pair((index, settings, []))
            yield last, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--stars", type=int, default=3000)
    parser.add_argument("--pairs", type=int, default=12, help="pairs measured")
    parser.add_argument("--memory", type=int, nargs="+", metavar="N", help="only the peak memory after N pairs")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    if options.memory:
        for count, mebibytes in peak_memory(sorted(options.memory)):
            print(f"{count} pairs: at most {mebibytes:.0f} MiB")
        return

    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else os.cpu_count())
    one, two = (pairs_a_second(cpus, options.size, options.pairs) for cpus in (1, 2))
    print(
        f"throughput of the command: 1 process {one:.2f} pairs/s, 2 processes {two:.2f} pairs/s, {two / one:.2f} times"
    )
    median, longest, stars = seconds_a_pair(options.size, options.stars, options.pairs)
    print(f"a {options.size}x{options.size} colour pair, {stars:.0f} stars: {median:.2f} s (longest {longest:.2f} s)")
    star = seconds_a_star(options.size)
    print(
        f"each star over the full frame: {star * 1e3:.1f} ms a star (20 measured), {star * stars:.1f} s a pair (scaled)"
    )
    print(f"ratio: {star * stars / median:.0f}")


if __name__ == "__main__":
    main()
