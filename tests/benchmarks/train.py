"""How fast nox.py train is, beside a plain loop, and whether it waits for its pairs.

    python tests/benchmarks/train.py [--width 32] [--patch-size 256] [--batch-size 4] [--steps 12] [--rounds 4]
                                     [--workers 2] [--data DIR]

Prints how many crops a second the pairs alone deliver, decoded anew and from memory, and how long a step would wait for
them that does 500 crops a second without the CPU, as a fast GPU does. Then, for L1 alone and with the adversary, in
float32 and bfloat16: crops a second of nox.py's own fit, of the same fit on one batch again and again (the difference
is time lost to the pairs), and on TensorFlow of a bare GradientTape loop of the same networks and loss, which reports
nothing. Makes pairs with GenerateStars.py unless --data names a folder of them.
"""

import argparse
import dataclasses
import os
import statistics
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
    """Seconds of the last epoch; the first one of a fit fills the queue."""

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self.start


def delivered(data, threads, batches=64, rate=None):
    """(crops a second, share of the time spent waiting) of someone who takes so many batches, read ahead as by Keras.

    rate: crops a second of a step without the CPU, which follows each batch.
    """
    size, waited, begin = data.settings.batch_size, 0, time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        ahead = [pool.submit(data.__getitem__, i) for i in range(data.max_queue_size)]
        for i in range(batches):
            start = time.perf_counter()
            ahead[i].result()
            waited += time.perf_counter() - start
            ahead[i] = None
            ahead.append(pool.submit(data.__getitem__, len(ahead)))
            time.sleep(size / rate if rate else 0)
        seconds = time.perf_counter() - begin
    return batches * size / seconds, waited / seconds


def print_delivered(pairs, settings, rate=500):
    """A line for each number of threads, without and with the cache."""
    for threads in sorted({1, settings.workers}):
        for cache in 0, settings.cache:
            data = nox.Pairs(pairs, dataclasses.replace(settings, cache=cache), 3, augment=True)
            for i in range(data.steps if cache else 1):
                data[i]
            crops, (reached, waits) = delivered(data, threads)[0], delivered(data, threads, rate=rate)
            line = (
                f"{threads} threads on {len(os.sched_getaffinity(0))} cores, {'from memory' if cache else 'decoding'}"
            )
            step = f"a step at {rate} crops/s waits {waits:.1%} of the time and reaches {reached:.0f}"
            print(f"pairs alone, {line}: {crops:.0f} crops/s; {step}", flush=True)


def fitted(model, data):
    """Seconds of an epoch of nox.py's own fit."""
    clock = Clock()
    nox.fit(model, data, None, epochs=2, callbacks=[clock], verbose=0)
    return clock.seconds


def new_optimizer(model):
    optimizer = nox.Muon(model.discriminator.trainable_variables, learning_rate=1e-4, global_clipnorm=1.0, use_ema=True)
    optimizer.resting = not model.adversarial
    return optimizer


def bare_loop(model, data):
    """A function that gives the seconds of an epoch of a bare loop on one batch."""
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
            terms = model.losses_of(starry, truth, *images).items()
            loss = sum(weights[name] * term for name, term in terms) + sum(model.losses)
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    batch = [tf.constant(part) for part in data[0]]
    step(*batch).numpy()

    def epoch():
        start = time.perf_counter()
        for _ in range(data.steps):
            loss = step(*batch)
        loss.numpy()  # a GPU may still be at work
        return time.perf_counter() - start

    return epoch


def compared(pairs, architecture, settings, steps, adversarial, rounds):
    """One line on one kind of step; all take turns, since machines have good and bad moments, and the best one counts."""
    model = nox.Nox(architecture, settings)
    model.adversarial = adversarial
    model.compile(optimizer=new_optimizer(model), jit_compile=nox.JIT)
    data, one = (kind(pairs, settings, architecture.n_channels, augment=True) for kind in (nox.Pairs, OneBatch))
    data.steps = one.steps = steps
    ways = {"fit": lambda: fitted(model, data), "on one batch": lambda: fitted(model, one)}
    if keras.backend.backend() == "tensorflow":
        ways["bare loop"] = bare_loop(model, one)
    times = [[way() for way in ways.values()] for _ in range(rounds + 1)][1:]  # the first compiles and decodes
    pace = {name: steps * settings.batch_size / min(seconds) for name, seconds in zip(ways, zip(*times))}
    line = ", ".join(f"{name} {crops:.2f} crops/s" for name, crops in pace.items())
    line += f"; loses to the pairs {1 - pace['fit'] / pace['on one batch']:.1%} of the time"
    if "bare loop" in pace:
        of_bare = statistics.median(seconds[-1] / seconds[1] for seconds in times)
        line += f"; on one batch it is {pace['on one batch'] / pace['bare loop']:.3f} of the bare loop"
        line += f", {of_bare:.3f} by the median of the rounds"
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name in "patch_size", "batch_size", "workers":
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(nox.Training, name))
    parser.add_argument("--width", type=int, default=nox.Architecture.width)
    parser.add_argument(
        "--steps",
        type=int,
        default=12,
        help="of an epoch: of few, what an epoch costs once would seem to cost each step",
    )
    parser.add_argument(
        "--rounds", type=int, default=4, help="epochs of which the fastest and the median are told, and one before them"
    )
    parser.add_argument("--data", help="a folder of pairs instead of fresh ones")
    values = parser.parse_args()
    settings = nox.Training(patch_size=values.patch_size, batch_size=values.batch_size, workers=values.workers)
    with tempfile.TemporaryDirectory() as folder:
        if not values.data:
            needed = -(-values.steps * values.batch_size // settings.crops)
            flags = [f"--imcount={needed}", "--size=512", "--save-dir", folder]
            subprocess.run([sys.executable, ROOT / "GenerateStars.py", *flags], check=True, capture_output=True)
        pairs = nox.find_pairs(values.data or folder)
        print_delivered(pairs, settings)
        for policy in "float32", "mixed_bfloat16":
            keras.config.set_dtype_policy(policy)
            for adversarial in False, True:
                line = compared(
                    pairs, nox.Architecture(width=values.width), settings, values.steps, adversarial, values.rounds
                )
                print(f"{policy}, {'with the adversary' if adversarial else 'L1 alone'}: {line}", flush=True)


if __name__ == "__main__":
    main()
