"""What the tests of nox.py share: commands run in this process, pictures in and out, tiny networks."""

import functools
import importlib
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import nox  # noqa: E402
from nox import keras  # noqa: E402

if keras.backend.backend() == "tensorflow":
    importlib.import_module("tensorflow").config.experimental.enable_op_determinism()  # to compare one run with another


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Where pytest-xdist divides the tests among processes, those that share a run of training go to one of them."""
    for item in items:
        if {"whole", "resumed", "survivor", "gray"} & set(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group("runs"))


def run(*arguments):
    """A command, parsed and run in this process."""
    nox.main(nox.parse_arguments([str(argument) for argument in arguments]))


def mistake(*arguments):
    """The one line with which a command that cannot be done ends."""
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert isinstance(caught.value.code, str)
    assert len(caught.value.code.strip().splitlines()) == 1
    return caught.value.code


def names(folder="."):
    return sorted(path.name for path in Path(folder).iterdir())


def read(path):
    """A file's pixels as OpenCV has them, shape (height, width, channels)."""
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    return pixels.reshape(*pixels.shape[:2], -1)


def noise(height, width, channels, dtype="uint8"):
    """Random pixels over the type's whole range, the same for the same arguments."""
    rng = np.random.default_rng([height, width, channels])
    values = rng.random((height, width, channels))
    return (values if dtype.startswith("float") else np.rint(values * np.iinfo(dtype).max)).astype(dtype)


def write(path, pixels):
    """Write pixels (BGR, as OpenCV has them; two channels are gray and alpha) and return the path."""
    gray_alpha = pixels.shape[2] == 2
    data = nox.encode_gray_alpha(pixels) if gray_alpha else cv2.imencode(Path(path).suffix, pixels)[1].tobytes()
    Path(path).write_bytes(data)
    return Path(path)


def randomized(generator, scale=0.1):
    """The generator with every weight drawn anew, so that none is still the neutral one it started with."""
    rng = np.random.default_rng(0)
    generator.set_weights([w + rng.normal(0, scale, w.shape) for w in generator.get_weights()])
    return generator


def gate_layer(generator):
    """The layer of a nox generator that computes the gate."""
    (gate,) = (layer for layer in generator.layers if isinstance(layer, nox.Gate))
    return gate.input[1]._keras_history.operation


def without_effect(generator):
    """The generator with a gate that is 0 everywhere."""
    gate = gate_layer(generator)
    gate.set_weights([0 * w for w in gate.get_weights()])
    return generator


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """{kind: weights file} of tiny networks: random ones by number of channels, and ones that change nothing."""
    folder, files = tmp_path_factory.mktemp("weights"), {}
    for channels in 1, 3:
        architecture = nox.Architecture(width=4, levels=2, n_channels=channels)
        for kind, change in ("random", randomized), ("identity", without_effect):
            files[kind, channels] = folder / f"{kind}{channels}.h5"
            nox.save_weights(change(nox.build_generator(architecture)), architecture, files[kind, channels])
    return files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


load_once = functools.cache(nox.load_generator)


@pytest.fixture
def infer(folder, weights, monkeypatch):
    """infer(file, *flags, kind=...): run infer in an empty folder with tiny weights, loaded once for all tests."""
    monkeypatch.setattr(nox, "load_generator", load_once)

    def call(image, *flags, kind="random"):
        monkeypatch.setattr(nox, "weights_for", lambda settings, channels: weights[kind, channels])
        run("infer", image, *flags, "--patch-size", 32, "--stride", 24)

    return call
