"""How fast nox.py train is, beside a plain loop, and whether it waits for its pairs.

    python tests/benchmarks/train.py [--width 16] [--patch-size 128] [--batch-size 4] [--steps 8] [--workers 2] [--data DIR]

Prints how many crops a second the pairs alone deliver and, for L1 alone and with the adversary, in float32 and bfloat16:
crops a second of nox.py's own fit, of the same fit on one batch again and again (the difference is time spent waiting
for pairs), and on TensorFlow of a bare GradientTape loop of the same networks and loss, which reports nothing. Makes
pairs with GenerateStars.py unless --data names a folder of them.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import nox  # noqa: E402
from nox import keras, ops  # noqa: E402


class OneBatch(nox.Pairs):
    """The first batch again and again."""

    def __getitem__(self, index):
        if not hasattr(self, "batch"):
            self.batch = super().__getitem__(0)
        return self.batch


class Clock(keras.callbacks.Callback):
    """Seconds of the last epoch; the ones before compile and fill the queue."""

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self.start


def delivered(data, threads, batches):
    """Crops a second of the pairs alone."""
    data[0]
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(data.__getitem__, range(batches)))
        return batches * data.settings.batch_size / (time.perf_counter() - start)


def fitted(model, data):
    """Crops a second of nox.py's own fit."""
    clock = Clock()
    nox.fit(model, data, None, epochs=2, callbacks=[clock], verbose=0)
    return data.steps * data.settings.batch_size / clock.seconds


def new_optimizer(model):
    return nox.Muon(model.discriminator.trainable_variables, learning_rate=1e-4, global_clipnorm=1.0, use_ema=True)


def looped(model, data):
    """Crops a second of a bare loop on one batch."""
    import tensorflow as tf

    settings, optimizer = model.settings, new_optimizer(model)
    weights = {"l1": settings.l1_weight, "fill": settings.fill_weight, "discriminator": 1.0}
    weights |= {"features": settings.feature_weight, "adversarial": settings.adversarial_weight}
    variables = (model if model.adversarial else model.generator).trainable_variables
    optimizer.build(variables)

    @tf.function
    def step(starry, truth):
        with tf.GradientTape() as tape:
            images = [ops.cast(image, "float32") for image in model(starry, training=True)]
            loss = sum(weights[name] * term for name, term in model.losses_of(starry, truth, *images).items())
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    batch = [tf.constant(part) for part in data[0]]
    step(*batch).numpy()
    start = time.perf_counter()
    for _ in range(data.steps):
        loss = step(*batch)
    loss.numpy()  # a GPU may still be at work
    return data.steps * settings.batch_size / (time.perf_counter() - start)


def compared(pairs, architecture, settings, steps, adversarial):
    """One line on one kind of step."""
    model = nox.Nox(architecture, settings)
    model.adversarial = adversarial
    model.compile(optimizer=new_optimizer(model), jit_compile=False)
    data, one = (kind(pairs, settings, architecture.n_channels, augment=True) for kind in (nox.Pairs, OneBatch))
    data.steps = one.steps = steps
    real, same = fitted(model, data), fitted(model, one)
    line = f"fit {real:.2f} crops/s, on one batch {same:.2f}: waits for pairs {max(0, 1 - real / same):.0%} of the time"
    if keras.backend.backend() == "tensorflow":
        loop = looped(model, one)
        line += f"; bare loop {loop:.2f}, of which fit on one batch is {same / loop:.2f}"
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--patch-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="that are timed, after as many that are not")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", help="a folder of pairs instead of fresh ones")
    values = parser.parse_args()
    settings = nox.Training(patch_size=values.patch_size, batch_size=values.batch_size, workers=values.workers)
    with tempfile.TemporaryDirectory() as folder:
        if not values.data:
            needed = -(-values.steps * values.batch_size // settings.crops)
            flags = [f"--imcount={needed}", "--size=256", "--save-dir", folder]
            subprocess.run([sys.executable, ROOT / "GenerateStars.py", *flags], check=True, capture_output=True)
        pairs = nox.find_pairs(values.data or folder)
        for threads in sorted({1, values.workers}):
            rate = delivered(nox.Pairs(pairs, settings, 3, augment=True), threads, 40)
            print(f"pairs alone, {threads} threads: {rate:.0f} crops/s", flush=True)
        for policy in "float32", "mixed_bfloat16":
            keras.config.set_dtype_policy(policy)
            for adversarial in False, True:
                line = compared(pairs, nox.Architecture(width=values.width), settings, values.steps, adversarial)
                print(f"{policy}, {'with the adversary' if adversarial else 'L1 alone'}: {line}", flush=True)


if __name__ == "__main__":
    main()
