"""How fast nox.py infer is, beside the original's way, the machine's peak and the bare import of TensorFlow.

    python tests/benchmarks/infer.py [--size 1024] [--corner 512] [--repeat 3] [--patch-sizes 512 1024 2048]
                                     [--backends openvino torch jax]

The original's way: its network (StarNet's, width 64, here with random weights), model.predict on batches of 6 patches of
512 pixels, of which the middle 128 are kept; it sees a corner of the picture. All is measured in one run, on one
generated picture. In the end a table tells for this backend and for each of the others, in a process of its own, the
time, the ratio to the original's way and by how much its picture differs from this backend's.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import nox  # noqa: E402
from nox import keras, ops  # noqa: E402

PATCH, STRIDE, BATCH = 512, 128, 6  # the original's


def make_picture(size, folder):
    """A starry colour picture of size x size pixels, made by GenerateStars.py."""
    command = [sys.executable, ROOT / "GenerateStars.py", "--imcount", 1, "--size", size, "--save-dir", folder]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    return Path(folder) / "x0.png"


def original_way(model, image):
    """The starless image, tiled as the original does it; the last rows and columns are reflected to whole strides."""
    side = (PATCH - STRIDE) // 2
    height, width = (-(-length // STRIDE) * STRIDE for length in image.shape[:2])
    padded = np.pad(
        image, [(side, side + new - old) for new, old in zip((height, width), image.shape)] + [(0, 0)], "symmetric"
    )
    places = [(top, left) for top in range(0, height, STRIDE) for left in range(0, width, STRIDE)]
    starless = np.empty((height, width, image.shape[2]), np.float32)
    for first in range(0, len(places), BATCH):
        batch = places[first : first + BATCH]
        patches = np.stack([padded[top : top + PATCH, left : left + PATCH] for top, left in batch])
        answers = model.predict(patches, verbose=0)[:, side : side + STRIDE, side : side + STRIDE]
        for (top, left), answer in zip(batch, answers):
            starless[top : top + STRIDE, left : left + STRIDE] = answer
    return starless[: image.shape[0], : image.shape[1]]


def seconds(work, *arguments, repeat=1):
    """Shortest wall time of some calls."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work(*arguments)
        times.append(time.perf_counter() - start)
    return min(times)


def peak(side=2048, repeat=8):
    """Floating-point operations a second of a float32 matrix product."""
    a, b = (ops.convert_to_tensor(np.random.default_rng(i).random((side, side), np.float32)) for i in (0, 1))
    return 2 * side**3 / seconds(lambda: ops.convert_to_numpy(ops.matmul(a, b)[0, 0]), repeat=repeat)


def operations(generator, side=1024):
    """Floating-point operations a pixel of the generator's convolutions."""
    convolutions = [layer for layer in generator.layers if hasattr(layer, "kernel")]
    probe = keras.Model(generator.input, [layer.output for layer in convolutions])
    outputs = probe.compute_output_spec(keras.KerasTensor((1, side, side, generator.input.shape[-1])))
    total = 0
    for layer, output in zip(convolutions, outputs):
        pixels = output.shape[1] * output.shape[2]
        pixels //= np.prod(layer.strides) if isinstance(layer, keras.layers.Conv2DTranspose) else 1
        total += 2 * pixels * np.prod(layer.kernel.shape)
    return total / side**2


def command(line):
    subprocess.run([sys.executable, *map(str, line)], check=True, capture_output=True)


def time_ours(image, repeat):
    """(light, seconds a megapixel, seconds of the first call, which compiles) of nox on this process's backend."""
    ours = *nox.load_generator(ROOT / nox.weights_name(3)), image, nox.Inference()
    first = seconds(nox.stellar_light, *ours)
    again = seconds(nox.stellar_light, *ours, repeat=repeat)
    return nox.stellar_light(*ours), again / image[..., 0].size * 1e6, first


OURS = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import infer
light, pace, first = infer.time_ours(np.load(sys.argv[2]), int(sys.argv[3]))
np.savez(sys.argv[2] + ".npz", light=light, pace=pace, first=first)
"""


def time_elsewhere(backend, image, repeat):
    """time_ours on another backend."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.npy"
        np.save(path, image)
        line = [sys.executable, "-c", OURS, Path(__file__).parent, path, repeat]
        subprocess.run([*map(str, line)], check=True, capture_output=True, env=os.environ | {"KERAS_BACKEND": backend})
        with np.load(f"{path}.npz") as found:
            return found["light"], float(found["pace"]), float(found["first"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, default=1024, help="side of the picture")
    parser.add_argument("--corner", type=int, default=512, help="side of the part for the original's way")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of which the shortest counts")
    parser.add_argument("--patch-sizes", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--backends", nargs="*", default=[], help="other backends to time as well")
    values = parser.parse_args()
    settings = nox.Inference()
    with tempfile.TemporaryDirectory() as folder:
        source = make_picture(values.size, folder)
        out = "-o", Path(folder) / "out.png", "--overwrite"
        backend = keras.backend.backend()
        lines = {
            "nox.py --help": [ROOT / "nox.py", "--help"],
            f"import {backend}": ["-c", f"import {backend}"],
            "nox.py infer, cold, from file to file": [ROOT / "nox.py", "infer", source, *out],
        }
        for name, line in lines.items():
            print(f"{name}: {seconds(command, line, repeat=values.repeat):.2f} s", flush=True)
        image = nox.read_picture(source).image()
    generator, _ = nox.load_generator(ROOT / nox.weights_name(3))

    top = peak()
    print(f"{backend}, float32 peak of a matrix product: {top / 1e9:.0f} GFLOP/s")
    for side in values.patch_sizes:
        tile = np.random.default_rng(0).random((1, side, side, 3), np.float32)
        first = seconds(generator.predict_on_batch, tile)
        again = seconds(generator.predict_on_batch, tile, repeat=values.repeat)
        share = operations(generator) * side**2 / again / max(top, peak())
        print(
            f"network alone, tile of {side}: {again / side**2 * 1e6:.2f} s/MP, {share:.0%} of the peak; first call {first:.1f} s",
            flush=True,
        )

    model = nox.build_generator(nox.Architecture("starnet", width=64))
    model.predict(np.zeros((BATCH, PATCH, PATCH, 3), np.float32), verbose=0)
    corner = image[: values.corner, : values.corner]
    old = seconds(original_way, model, corner) / corner[..., 0].size * 1e6
    print(f"the original's way: {old:.1f} s/MP ({operations(model) / 1e3 * (PATCH / STRIDE) ** 2:.0f} GFLOP/MP)")
    print(f"\nours, patch {settings.patch_size}, stride {settings.stride}:\n")
    print("| backend | s/MP | first picture, s | ratio | largest difference, steps of 8 bits |\n|---|---|---|---|---|")
    truth, *times = time_ours(image, values.repeat)
    rows = itertools.chain(
        [(backend, truth, *times)], ((name, *time_elsewhere(name, image, values.repeat)) for name in values.backends)
    )
    for name, light, pace, first in rows:
        numbers = f"{pace:.2f} | {first:.1f} | {old / pace:.0f} | {255 * np.abs(light - truth).max():.4f}"
        print(f"| {name} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
