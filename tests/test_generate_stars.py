"""Behaviour of GenerateStars.py: what its pairs hold, against references of their own, and its command line."""

import dataclasses
import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from astropy import units
from astropy.modeling.fitting import TRFLSQFitter
from astropy.modeling.models import BlackBody, Moffat2D
from astropy.table import Table
from photutils.detection import DAOStarFinder
from photutils.psf import CircularGaussianPRF, PSFPhotometry, fit_fwhm
from scipy import stats as statistics
from scipy.integrate import cumulative_trapezoid
from scipy.ndimage import gaussian_filter1d

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import GenerateStars as gs  # noqa: E402

# --------------------------------------------------------------------------------------------------------------------
# Helpers
# --------------------------------------------------------------------------------------------------------------------


def command(*arguments):
    """Run the real command line; the result has returncode, stdout and stderr."""
    line = [sys.executable, str(ROOT / "GenerateStars.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def read(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def plain_optics(**changes):
    """Round Moffat stars without spikes, halo, coma or colour."""
    values = dict(
        core="moffat", fwhm=4.0, beta=3.0, axis_ratio=1.0, angle=0.0, obstruction=0.3, band=0.05, chromatic=np.ones(3),
        shift=np.zeros((3, 2)), trail=np.zeros(2), coma=0.0, field_stretch=0.0, field_blur=0.0, seeing=np.zeros(2), spikes=None, halos=[],
        reflections=[],
    )  # fmt: skip
    return gs.Optics(**{**values, **changes})


def draw(stars, optics, size, threshold=1e-7):
    """Green light of white stars given as (x, y, flux)."""
    x, y, flux = np.array(stars, float).T
    table = Table({"x": x, "y": y, "flux": flux, "fwhm": np.full(len(x), optics.fwhm)})
    return gs.render(table, np.ones((len(x), 3)), optics, (size, size), threshold)[..., 1].astype(float)


def make(index, seed=0, path=None, **changes):
    return gs.make_pair(index, gs.Settings(seed=seed, **{"size": 96, **changes}), path)


def write_photograph(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)
    return str(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Four pairs by one process, with catalogues and a contact sheet; (folder, result of the command)."""
    folder = tmp_path_factory.mktemp("pairs")
    options = ["--imcount", "4", "--cpus", "1", "--size", "96", "--catalog", "--preview-pairs", "2", "--seed", "3"]
    return folder, command(*options, "--save-dir", folder)


# --------------------------------------------------------------------------------------------------------------------
# Point spread functions
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x, y", [(30.0, 30.0), (30.4, 29.7)])
def test_fitted_moffat_has_the_asked_fwhm_beta_and_flux(x, y):
    image = draw([(x, y, 50.0)], plain_optics(fwhm=5.0, beta=3.0), 61)
    yy, xx = np.indices(image.shape)
    fit = TRFLSQFitter()(Moffat2D(1, x, y, 3, 2.5), xx, yy, image)
    flux = np.pi * fit.amplitude * fit.gamma**2 / (fit.alpha - 1)
    assert fit.fwhm == pytest.approx(5.0, rel=0.03)
    assert fit.alpha.value == pytest.approx(3.0, rel=0.03)
    assert flux == pytest.approx(50.0, rel=0.03)


def test_star_lies_where_it_was_asked():
    image = draw([(30.4, 29.7, 1.0)], plain_optics(core="gaussian"), 61)
    yy, xx = np.indices(image.shape)
    assert (image * xx).sum() / image.sum() == pytest.approx(30.4, abs=0.15)  # sprites have a few phases a pixel
    assert (image * yy).sum() / image.sum() == pytest.approx(29.7, abs=0.15)


def test_undersampled_star_is_integrated_over_its_pixels():
    image = draw([(15.0, 15.0, 1.0)], plain_optics(core="gaussian", fwhm=1.3), 31)
    assert fit_fwhm(image, fit_shape=7)[0] == pytest.approx(1.3, rel=0.03)  # photutils integrates over pixels too
    assert image.sum() == pytest.approx(1.0, rel=0.01)


def test_psf_photometry_returns_the_fluxes():
    rng = np.random.default_rng(0)
    grid = np.arange(30, 220, 40)
    stars = [(x, y, f) for (x, y), f in zip(np.array(np.meshgrid(grid, grid)).reshape(2, -1).T, rng.uniform(1, 9, 25))]
    image = draw(stars, plain_optics(core="gaussian", fwhm=3.0), 230)
    init = Table(np.array(stars), names=["x", "y", "flux"])
    found = PSFPhotometry(CircularGaussianPRF(fwhm=3.0), fit_shape=9)(image, init_params=init)
    np.testing.assert_allclose(found["flux_fit"], init["flux"], rtol=0.03)


@pytest.mark.parametrize("fwhm, beta", [(2.0, 2.0), (4.0, 2.5), (9.0, 4.0)])
def test_bright_star_has_no_seam_and_no_square(fwhm, beta):
    """The wings of a star 10,000 times over the threshold against the profile drawn over the whole frame."""
    size, threshold = 241, 1e-4
    flux = 1e4 * threshold * fwhm**2
    image = draw([(120, 120, flux)], plain_optics(fwhm=fwhm, beta=beta), size, threshold)
    yy, xx = np.indices(image.shape)
    gamma = fwhm / (2 * np.sqrt(2 ** (1 / beta) - 1))
    truth = flux * Moffat2D((beta - 1) / (np.pi * gamma**2), 120, 120, gamma, beta)(xx, yy)
    outside = np.hypot(xx - 120, yy - 120) > 2 * fwhm  # nearer, a pixel's mean is not its middle
    seen = truth > 1.05 * threshold
    assert np.abs(image / truth - 1)[seen & outside].max() < 0.03
    assert image[~seen].max() < 1.1 * threshold


def test_glare_in_a_corner_neither_wraps_round_nor_leaves_noise():
    """A star a hundred million times over the threshold against its profile: its wings come from one Fourier transform."""
    image = draw([(-2, 3, 1e5)], plain_optics(fwhm=3.0, beta=4.0), 301, threshold=1e-4)
    yy, xx = np.indices(image.shape)
    gamma = 3.0 / (2 * np.sqrt(2 ** (1 / 4.0) - 1))
    truth = 1e5 * Moffat2D(3 / (np.pi * gamma**2), -2, 3, gamma, 4.0)(xx, yy)
    outside = np.hypot(xx + 2, yy - 3) > 8
    assert np.abs(image - truth)[outside & (truth < 1e-3)].max() < 1.1e-4
    assert np.abs(image / truth - 1)[outside & (truth >= 1e-3)].max() < 0.03
    assert image.min() >= 0


def test_faint_star_is_cut_below_the_threshold_only():
    threshold = 1e-4
    image = draw([(30, 30, 0.05)], plain_optics(fwhm=3.0), 61, threshold)
    whole = draw([(30, 30, 0.05)], plain_optics(fwhm=3.0), 61, 1e-9)
    assert np.abs(image - whole).max() <= threshold
    assert (image == 0).any()


def test_ellipse_has_the_asked_angle():
    image = draw([(30, 30, 1.0)], plain_optics(core="gaussian", fwhm=5.0, axis_ratio=0.6, angle=0.5), 61)
    yy, xx = np.indices(image.shape) - 30
    xx_, yy_, xy_ = ((image * m).sum() / image.sum() for m in (xx * xx, yy * yy, xx * yy))
    _, vectors = np.linalg.eigh([[xx_, xy_], [xy_, yy_]])
    assert np.arctan2(vectors[1, 1], vectors[0, 1]) % np.pi == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("beta", [2.0, 3.0, 5.0])
def test_ellipse_gets_rounder_outwards_as_that_of_a_star_blurred_along_one_axis(beta):
    image = draw([(100, 100, 1.0)], plain_optics(fwhm=8.0, beta=beta, axis_ratio=0.76), 201)
    expected = gaussian_filter1d(draw([(100, 100, 1.0)], plain_optics(fwhm=8.0, beta=beta), 201), 2.4, axis=1)
    inner, outer = ([axis_ratio(im, radius) for im in (image, expected)] for radius in (5, 30))
    assert inner == pytest.approx([inner[1]] * 2, abs=0.03) and max(inner) < 0.85
    assert outer == pytest.approx([outer[1]] * 2, abs=0.015) and min(outer) > 0.95


def axis_ratio(image, radius):
    """Minor over major axis, along y and x, of the isophote that crosses the x axis so far from the middle."""
    across, down = (part[len(part) // 2 :] for part in (image[len(image) // 2], image[:, len(image) // 2]))
    return np.interp(-across[radius], -down, np.arange(len(down))) / radius


def test_wide_stars_are_not_trailed():
    drawn = [gs.draw_optics(np.random.default_rng(seed), True) for seed in range(300)]
    assert {optics.fwhm > gs.FWHM.high for optics in drawn if optics.trail.any()} == {False}
    assert any(optics.fwhm > gs.FWHM.high for optics in drawn)


def test_seeing_widens_the_stars_towards_one_side():
    image = draw([(30, 150, 1.0), (270, 150, 1.0)], plain_optics(core="gaussian", seeing=np.array([0.15, 0.0])), 300)
    left, right = (fit_fwhm(image, xypos=(x, 150), fit_shape=15)[0] for x in (30, 270))
    assert left == pytest.approx(4 * 0.9, rel=0.03)  # the middle of the left third of the frame lies at -2/3
    assert right == pytest.approx(4 * 1.1, rel=0.03)


@pytest.mark.parametrize("angles", [[0.3, 0.3 + np.pi / 2], [0.1, 0.1 + np.pi / 3, 0.1 + 2 * np.pi / 3]])
def test_spikes_point_where_asked(angles):
    spikes = dict(
        angles=np.array(angles),
        weights=np.ones(len(angles)) / len(angles),
        light=0.05,
        width=0.5,
        decay=1.5,
        length=60.0,
        rainbow=0.0,
        period=20.0,
    )
    image = draw([(150, 150, 1000.0)], plain_optics(fwhm=3.0, spikes=spikes), 301)
    polar = cv2.warpPolar(image.astype(np.float32), (150, 720), (150, 150), 150, cv2.INTER_LINEAR)
    profile = polar[:, 40:120].mean(axis=1)  # by angle, half a degree a row
    peaks = np.flatnonzero((profile > np.roll(profile, 1)) & (profile >= np.roll(profile, -1)) & (profile > 5 * np.median(profile)))  # fmt: skip
    asked = np.sort(np.concatenate([angles, np.array(angles) + np.pi])) * 720 / (2 * np.pi)
    np.testing.assert_allclose(peaks, asked, atol=2)


def test_star_beyond_the_edge_sends_its_halo_in():
    halo = {"light": 0.2, "scale": 10.0, "aureole": None, "blue": 1.0, "rays": np.ones(2)}
    image = draw([(-3.0, 40.0, 1000.0)], plain_optics(halos=[halo]), 81, 1e-4)
    r = 20 + 3
    expected = 1000 * (0.2 * np.exp(-r / 10) / (2 * np.pi * 100))
    assert image[40, 20] > 0.9 * expected


def test_halos_add_up():
    dy, dx = np.mgrid[-30:31, -30:31].astype(np.float32)
    narrow = {"light": 0.1, "scale": 4.0, "aureole": None, "blue": 0.8, "rays": np.ones(2)}
    wide = {"light": 0.3, "scale": 15.0, "aureole": 1.3, "blue": 1.5, "rays": np.ones(2)}
    both, *each = (gs.far_light(plain_optics(halos=halos), dx, dy) for halos in ([narrow, wide], [narrow], [wide]))
    np.testing.assert_allclose(both, sum(each), rtol=1e-5)


def test_rays_of_a_halo_have_no_seam():
    rays = np.exp(np.random.default_rng(0).standard_normal(40))
    halo = {"light": 0.2, "scale": 10.0, "aureole": None, "blue": 1.0, "rays": rays}
    angles = np.linspace(-np.pi, np.pi, 2001)
    light = gs.far_light(plain_optics(halos=[halo]), 20 * np.cos(angles)[None], 20 * np.sin(angles)[None])[0, :, 1]
    assert light[0] == pytest.approx(light[-1], rel=1e-4)
    assert light.max() > 5 * light.min() and np.abs(np.diff(light)).max() < 0.1 * light.max()


FAR = np.mgrid[-70:71, -70:71].astype(np.float32)[::-1]  # dx, dy


def reflection(**changes):
    plain = {"light": 0.02, "radius": 40.0, "offset": (0.0, 0.0), "hole": 0.0, "tint": np.ones(3)}
    return {**plain, "rim": 0.0, "rim_width": 0.1, "rim_side": 0.0, **changes}


def test_reflection_with_a_hole_is_drawn_without_a_halo():
    disc = reflection(light=0.05, radius=30.0, rim=3.0, hole=0.5)
    optics, flux = plain_optics(fwhm=2.0, beta=5.0, reflections=[disc]), 1000.0
    rim = flux * gs.far_light(optics, np.array([[29.0]]), np.zeros((1, 1)))[0, 0, 1]
    image = draw([(64, 64, flux)], optics, 129, rim / 20)
    assert image[64, 64 + 29] == pytest.approx(rim, rel=0.05)


def test_each_of_several_reflections_is_drawn():
    discs = [reflection(radius=radius, offset=(offset, 0.0)) for radius, offset in ((12.0, 30.0), (35.0, -20.0))]
    sums = [gs.far_light(plain_optics(reflections=some), *FAR) for some in (discs, discs[:1], discs[1:])]
    np.testing.assert_allclose(sums[0], sums[1] + sums[2], rtol=1e-5)
    assert all(part.max() > 0 for part in sums)


def test_a_narrow_rim_leaves_the_disc_inside_it_as_it_was():
    rimmed, plain = (gs.far_light(plain_optics(reflections=[reflection(rim=rim, rim_width=0.03)]), *FAR)[70, 70:, 1] for rim in (4.0, 0.0))  # fmt: skip
    np.testing.assert_allclose(rimmed[:36], plain[:36], rtol=0.01)
    assert rimmed[40] > 4 * plain[40]


def test_a_rim_is_brightest_on_the_side_to_which_the_disc_is_shifted():
    disc = reflection(offset=(6.0, 0.0), rim=500.0, rim_side=0.5)
    light = gs.far_light(plain_optics(reflections=[disc]), *FAR)[..., 1]
    across, along, against = light[70 + 38, 76], light[70, 76 + 38], light[70, 76 - 38]
    assert (along / across, against / across) == pytest.approx((1.5, 0.5), rel=0.01)


@pytest.mark.parametrize("rim, hole", [(0.0, 0.0), (3.0, 0.0), (0.0, 0.4), (3.0, 0.4)])
def test_reflection_is_a_disc_with_its_rim_and_hole(rim, hole):
    tint = np.array([1.8, 0.9, 0.3])
    disc = reflection(offset=(6.0, -9.0), rim=rim, hole=hole, tint=tint)
    light = gs.far_light(plain_optics(reflections=[disc]), *FAR)
    middle, half, edge, beyond = (light[70 - 9, 70 + 6 + r, 1] for r in (0, 24, 38, 46))
    plateau = 0.9 * 0.02 / (np.pi * 40**2)
    assert half == pytest.approx(plateau, rel=0.02)
    assert middle == pytest.approx(0 if hole else plateau, abs=0.02 * plateau)
    assert (edge > 2 * plateau) == (rim > 0)
    assert beyond < 0.01 * plateau
    np.testing.assert_allclose(light.sum(axis=(0, 1)) / light.sum(), tint / 3, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# Stars: magnitudes, colours, catalogue
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope, span", [(0.5, 9.0), (1.5, 4.0)])
def test_fluxes_follow_the_truncated_power_law(slope, span):
    flux = gs.magnitudes_to_flux(np.random.default_rng(1), 20000, slope, span)
    brightest = 10 ** (0.4 * span)
    reference = lambda f: (1 - f**-slope) / (1 - brightest**-slope)  # noqa: E731
    assert statistics.kstest(flux, reference).pvalue > 0.01
    assert statistics.kstest(flux, lambda f: reference(f) ** 1.1).pvalue < 0.01  # another slope is told apart


@pytest.mark.parametrize("kelvin", [3000, 5772, 15000])
def test_star_colour_is_that_of_a_blackbody(kelvin):
    bands = [units.Quantity(w, "nm") for w in (610, 540, 460)]
    ratio = np.array([float(BlackBody(kelvin * units.K)(w) / BlackBody(6500 * units.K)(w)) for w in bands])
    np.testing.assert_allclose(gs.blackbody_rgb(kelvin)[0], ratio / ratio[1], rtol=1e-5)


def test_daostarfinder_finds_the_stars_and_nothing_else():
    rng = np.random.default_rng(2)
    grid = np.arange(20, 380, 30)
    places = np.array(np.meshgrid(grid, grid)).reshape(2, -1).T + rng.uniform(-4, 4, (len(grid) ** 2, 2))
    flux = gs.magnitudes_to_flux(rng, len(places), 0.8, 7)
    optics = plain_optics(fwhm=3.5, beta=4.0)
    sigma = gs.Sprites(optics, (0, 0)).peak / 4  # the faintest star peaks at 4 sigma
    light = draw(np.column_stack([places, flux]), optics, 400, 0.01 * sigma)
    found = DAOStarFinder(threshold=5 * sigma, fwhm=3.5)(light + rng.normal(0, sigma, light.shape))
    seen = np.array([found["x_centroid"], found["y_centroid"]]).T
    distance = np.hypot(*(places[:, None] - seen[None]).transpose(2, 0, 1))
    plain = flux * gs.Sprites(optics, (0, 0)).peak > 10 * sigma
    assert plain.sum() > 60
    assert (distance[plain].min(axis=1) < 1).mean() >= 0.98
    assert (distance.min(axis=0) < 2).all()


@pytest.mark.parametrize("resized", [0, 1])
def test_catalogue_tells_where_the_light_is(resized, monkeypatch):
    """Over several pictures, the light near a lone catalogued star centres on it."""
    monkeypatch.setattr(gs, "RESIZE_CHANCE", resized)
    monkeypatch.setattr(gs, "RESIZE", gs.Range(0.6, 0.65))
    offsets = []
    for index in range(16):
        starry, starless, stars = make(index, size=192)
        light = (starry - starless).astype(float).mean(axis=-1).clip(0)
        places = np.array([stars["x"], stars["y"]]).T
        for star, place in zip(stars, places):
            box = int(2 * star["fwhm"]) + 2
            column, row = np.round(place).astype(int)
            others = (np.abs(places - place).max(axis=1) < 2 * box).sum() - 1
            if others or min(row, column) < box or max(row, column) >= 192 - box:
                continue
            window = light[row - box : row + box + 1, column - box : column + box + 1]
            if window.max() > 0.1:
                y, x = np.indices(window.shape) - box
                centroid = np.array([(window * x).sum(), (window * y).sum()]) / window.sum()
                offsets.append(centroid - (place - [column, row]))
    assert len(offsets) > 12
    np.testing.assert_allclose(np.median(offsets, axis=0), 0, atol=0.15)


# --------------------------------------------------------------------------------------------------------------------
# Exposure
# --------------------------------------------------------------------------------------------------------------------


def test_star_noise_is_poissons_at_the_asked_gain():
    light = np.full((200, 200, 3), 0.5, np.float32)
    noisy = gs.own_noise(np.random.default_rng(0), light, electron=1e-3, sky=1e-3)
    assert noisy.mean() == pytest.approx(0.5, rel=0.01)
    assert noisy.var() == pytest.approx(0.5 * 1e-3, rel=0.03)


@pytest.mark.parametrize("photons", [3, 12, 40])
def test_star_noise_is_poissons_for_few_photons_and_for_many(photons):
    light = np.full((300, 300, 3), 0.5, np.float32)
    noisy = gs.own_noise(np.random.default_rng(0), light, electron=0.5 / photons, sky=1e-3)
    counts = noisy.ravel() / 0.5 * photons
    assert counts.mean() == pytest.approx(photons, rel=0.01)
    assert counts.var() == pytest.approx(photons, rel=0.03)
    assert statistics.skew(counts) == pytest.approx(photons**-0.5, rel=0.1)


def test_normals_are_standard_normal_and_independent():
    draws = gs.normals(np.random.default_rng(0), 512, 512)
    assert draws.dtype == np.float32
    assert statistics.kstest(draws.ravel(), "norm").pvalue > 0.01
    power = np.abs(np.fft.fft2(draws)) ** 2 / draws.size
    assert statistics.kstest(power[1:256].ravel(), "expon").pvalue > 0.01  # white: no wave number stands out
    assert abs(np.corrcoef(draws.ravel(), gs.normals(np.random.default_rng(1), 512, 512).ravel())[0, 1]) < 0.01


def test_sky_noise_has_its_sigma_and_grows_with_the_light(monkeypatch):
    for name in ("CORRELATION_CHANCE", "BANDING_CHANCE", "HOT_PIXEL_CHANCE"):
        monkeypatch.setattr(gs, name, 0)
    linear = np.full((256, 256, 3), 0.1, np.float32)
    linear[:64] = 0.4
    noise = gs.noise_layer(np.random.default_rng(0), linear, 0.01, 1.0, True)
    assert noise[64:].std() == pytest.approx(0.01, rel=0.05)
    assert noise[:64].std() == pytest.approx(0.02, rel=0.05)


def test_bleeding_fills_the_column_of_a_saturated_star_alone(monkeypatch):
    light = np.zeros((64, 64, 3), np.float32)
    stars = Table({"x": [20.0, 40.0], "y": [30.0, 30.0], "flux": [1000.0, 1.0], "fwhm": [3.0, 3.0]})
    gs.bleed(np.random.default_rng(0), light, stars, 0.1)
    lines = light.max(axis=-1) > 0
    assert lines[:, 20].sum() == lines.sum() >= 12 or lines[30, :].sum() == lines.sum() >= 12


@pytest.mark.parametrize("m", [0.01, 0.25, 0.7])
def test_midtones_transfer_maps_m_to_a_half(m):
    assert gs.midtones_transfer(m, m) == pytest.approx(0.5)
    assert gs.midtones_transfer(0.0, m) == 0
    assert gs.midtones_transfer(1.0, m) == pytest.approx(1)


@pytest.mark.parametrize("kind", gs.STRETCH_SHARES)
@pytest.mark.parametrize("unlinked", [0, 1])
def test_stretches_are_undone_by_their_inverse(kind, unlinked, monkeypatch):
    y = np.repeat(np.linspace(0, 1, 101)[:, None], 3, axis=1)
    monkeypatch.setattr(gs, "STRETCH_SHARES", {kind: 1.0})
    monkeypatch.setattr(gs, "UNLINKED_CHANCE", unlinked)
    for seed in range(8):
        forward, inverse = gs.draw_stretch(np.random.default_rng(seed), True)
        x = inverse(y)
        np.testing.assert_allclose(forward(x), y, atol=1e-5)
        assert (np.diff(forward(y), axis=0) > 0).all()
        assert (np.ptp(x, axis=1)[1:-1] > 0).all() == unlinked


def test_headroom_leaves_more_magnitudes_between_the_sky_and_white(monkeypatch):
    monkeypatch.setattr(gs, "STRETCH_SHARES", {"asinh": 1.0})
    spans = []
    for headroom in (1.0, 1e4):
        monkeypatch.setattr(gs, "HEADROOM", gs.Range(headroom, headroom, True))
        _, inverse = gs.draw_stretch(np.random.default_rng(0), False)
        spans.append(2.5 * np.log10(inverse(np.float32(1)) / inverse(np.float32(0.1))))
    assert spans[1] > spans[0] + 3


@pytest.mark.parametrize("b", [-2.5, -1.0, 0.8, 4.0])
def test_hyperbolic_stretch_is_the_integral_of_its_published_slope(b):
    """Its slope is D (1 + b D d)^(-(1 + b) / b) for b > 0 and D (1 - b D d)^(1 / b) for b < 0, d away from SP."""
    amount, symmetry, highlights = 40.0, 0.02, 0.6
    x = np.linspace(0, 1, 200001)
    away = np.abs(np.minimum(x, highlights) - symmetry)
    slope = (1 + b * amount * away) ** (-(1 + b) / b) if b > 0 else (1 - b * amount * away) ** (1 / b)
    integral = cumulative_trapezoid(slope, x, initial=0)
    forward, _ = gs.hyperbolic_stretch(amount, b, symmetry, highlights)
    np.testing.assert_allclose(forward(x), integral / integral[-1], atol=1e-5)


def test_turbulence_has_the_power_law_it_says():
    size, slope = 256, 3.0
    power = sum(np.abs(np.fft.fft2(gs.turbulence(np.random.default_rng(s), size, slope))) ** 2 for s in range(4))
    k = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size))) * size
    rings = np.arange(4, 100)
    summed = [power[(k >= r - 0.5) & (k < r + 0.5)].sum() for r in rings]
    assert np.polyfit(np.log(rings), np.log(summed), 1)[0] == pytest.approx(-slope, abs=0.15)


# --------------------------------------------------------------------------------------------------------------------
# Pairs
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [8, 16])
def test_where_stars_add_under_half_a_level_the_written_pictures_are_equal(depth, tmp_path):
    some = False
    for index in range(10):
        starry, starless, _ = make(index)
        for path, image in (("x.png", starry), ("y.png", starless)):
            gs.write_png(tmp_path / path, image, depth)
        x, y = (read(tmp_path / name).astype(int) for name in ("x.png", "y.png"))
        changed = np.abs(x - y) > 0
        least = 0.5 / 255 * (2**depth - 1)
        assert np.abs(x - y)[changed].min(initial=10**6) >= int(least)
        some |= changed.any() and not changed.all()
    assert some


def test_far_from_every_star_nothing_is_changed(monkeypatch):
    """One population of few stars in the upper half; in the lower half the pictures are equal."""
    lone = gs.Population(1.0, gs.Range(100, 101), gs.Range(0.2, 0.3), gs.Range(1, 2), gs.Range(1, 1.1), gs.Range(5000, 6000))  # fmt: skip
    monkeypatch.setattr(gs, "POPULATIONS", {"field": lone})
    monkeypatch.setattr(gs, "draw_optics", lambda rng, color: plain_optics(fwhm=2.5, beta=4.0))
    for name in ("CONTRAST_CHANCE", "JPEG_CHANCE", "STARLESS_CHANCE", "SPARSE_CHANCE"):  # the first two reach far
        monkeypatch.setattr(gs, name, 0)
    for index in range(4):
        starry, starless, stars = make(index, size=256)
        yy, xx = np.indices(starry.shape[:2])
        near = np.zeros(xx.shape, bool)
        for star in stars:
            near |= np.hypot(xx - star["x"], yy - star["y"]) < 40
        near |= (np.minimum(xx, yy) < 40) | (np.maximum(xx, yy) >= 216)  # stars beyond the edge
        assert (~near).any()
        np.testing.assert_array_equal(starry[~near], starless[~near])
        assert (starry != starless).any()


def test_images_are_finite_and_within_0_and_1():
    for index in range(20, 28):
        for image in make(index)[:2]:
            assert image.shape == (96, 96, 3)
            assert image.dtype == np.float32
            assert image.min() >= 0 and image.max() <= 1


def test_picture_without_stars_is_its_own_starless_picture(monkeypatch):
    """However it is blended, and though JPEG makes grey levels of rounding errors."""
    for name in ("STARLESS_CHANCE", "SCREEN_CHANCE", "JPEG_CHANCE"):
        monkeypatch.setattr(gs, name, 1)
    for index in (0, 1, 34, 47):  # the last two differed by levels where the blend left a rounding error
        starry, starless, stars = gs.make_pair(index, gs.Settings(size=128, seed=5))
        assert len(stars) == 0
        np.testing.assert_array_equal(starry, starless)


def test_beacons_are_saturated_to_the_asked_radius(monkeypatch):
    wide = gs.Population(1.0, gs.Range(100, 101), gs.Range(0.94, 0.95), gs.Range(0, 1), gs.Range(1, 2), gs.Range(6000, 7000), disc=gs.Range(12, 12.1))  # fmt: skip
    monkeypatch.setattr(gs, "POPULATIONS", {"beacons": wide})
    rng = np.random.default_rng(0)
    optics = plain_optics(fwhm=4.0)
    level = 1.0 / gs.Sprites(optics, (0, 0)).peak  # flux of a star that just reaches light 1
    stars = gs.draw_stars(rng, (300, 300), optics, lambda height: level)
    image = draw([(100, 100, stars["flux"][0])], optics, 201)
    assert 2 * np.sqrt((image >= 1).sum() / np.pi) == pytest.approx(24, rel=0.05)


@pytest.mark.parametrize("fwhm", [2.0, 6.0])
def test_stars_of_a_population_are_not_crowded_into_a_glow(fwhm, monkeypatch):
    crowd = dataclasses.replace(gs.POPULATIONS["crowd"], chance=1.0, density=gs.Range(1e8, 1.1e8))
    monkeypatch.setattr(gs, "POPULATIONS", {"crowd": crowd})
    monkeypatch.setattr(gs, "MULTIPLE_SHARE", gs.Range(0, 0))  # companions come on top
    stars = gs.draw_stars(np.random.default_rng(0), (300, 300), plain_optics(fwhm=fwhm), lambda height: height)
    inside = (stars["x"] > 0) & (stars["x"] < 300) & (stars["y"] > 0) & (stars["y"] < 300)
    assert inside.sum() * fwhm**2 / 300**2 == pytest.approx(gs.CONFUSION, rel=0.1)


def test_companions_stand_close_to_a_brighter_star_as_many_in_each_octave(monkeypatch):
    monkeypatch.setattr(gs, "MULTIPLE_SHARE", gs.Range(1, 1))
    x, y = np.meshgrid(100.0 * np.arange(20), 100.0 * np.arange(20))
    columns = {"x": x.ravel(), "y": y.ravel(), "flux": np.full(400, 7.0), "fwhm": np.full(400, 3.0)}
    stars = gs.Table({**columns, "temperature": np.linspace(3000, 9000, 400), "population": np.full(400, "field")})
    companions = gs.draw_companions(np.random.default_rng(0), stars)
    assert len(companions) == pytest.approx(400 * (1 + gs.COMPANIONS), rel=0.1)
    separation = [np.abs(companions[axis] - 100 * np.round(companions[axis] / 100)) for axis in "xy"]
    octaves = np.histogram(np.log2(np.hypot(*separation) / 3), np.arange(-1, 3))[0]  # 0.5 to 4 FWHM
    np.testing.assert_allclose(octaves, len(companions) / np.log2(6 / 0.5), rtol=0.15)
    assert companions["flux"].max() < 7 and companions["flux"].min() > 7 * 10 ** (-0.4 * 4)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_share_of_the_stars_has_companions(monkeypatch, share):
    monkeypatch.setattr(gs, "MULTIPLE_SHARE", gs.Range(share, share))
    monkeypatch.setattr(gs, "COMPANIONS", 0.0)
    columns = {name: np.full(2000, 3.0) for name in ("x", "y", "flux", "fwhm", "temperature")}
    companions = gs.draw_companions(np.random.default_rng(0), gs.Table(columns))
    assert len(companions) / 2000 == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("bright", [True, False])
def test_bright_stars_light_the_nebulae_and_faint_ones_the_planetary_ones(monkeypatch, bright):
    field = dataclasses.replace(gs.POPULATIONS["field"], chance=1.0, density=gs.Range(4000, 5000))
    monkeypatch.setattr(gs, "POPULATIONS", {"field": field})
    places = [(20.5, 30.0, bright), (150.0, 99.0, bright), (250.0, 30.0, bright)]  # the last lies outside
    for seed in range(5):
        stars = gs.draw_stars(
            np.random.default_rng(seed), (200, 200), plain_optics(), lambda height: height, 1.0, places
        )
        here = [stars[(stars["x"] == x) & (stars["y"] == y)] for x, y, _ in places]
        assert [len(table) for table in here] == [1, 1, 0]
        least = np.sort(stars["flux"])[-3 * gs.BRIGHTER]
        assert all((table["flux"][0] >= least) == bright for table in here[:2])


@pytest.mark.parametrize("limit", [gs.VEILED, 9.0])
def test_a_glow_all_over_the_frame_is_dimmed(limit, monkeypatch):
    giants = gs.Population(1.0, gs.Range(1500, 1600), gs.Range(0.8, 0.9), gs.Range(0, 1), gs.Range(1, 2), gs.Range(6400, 6600), disc=gs.Range(20, 30))  # fmt: skip
    monkeypatch.setattr(gs, "POPULATIONS", {"beacons": giants})
    monkeypatch.setattr(gs, "FLOODED", 9.0)
    monkeypatch.setattr(gs, "VEILED", limit)
    starry, starless, _ = exposed(plain_optics(halos=[plain_halo(scale=60.0)]))
    assert (np.percentile(starry - starless, 10) < 0.07) == (limit < 1)


@pytest.mark.parametrize("limit", [gs.CLIPPED, 0.01])
def test_noise_is_not_cut_off_at_black(limit, monkeypatch):
    monkeypatch.setattr(gs, "CLIPPED", limit)
    _, starless, _ = exposed(plain_optics(), noise=0.1, share=0.0)
    assert ((starless == 0).mean() < 0.05) == (limit > 1)


def exposed(optics, noise=0.0, share=1.0):
    """expose of a flat dark sky under a deep stretch, gray."""
    sky = np.full((96, 96, 3), 0.05, np.float32)
    forward, inverse = (functools.partial(gs.midtones_transfer, m=np.float32(m)) for m in (0.005, 0.995))
    return gs.expose(np.random.default_rng(0), sky, [], optics, (forward, inverse), False, noise, share)


@pytest.mark.parametrize("limit, screen", [(0.3, 0), (0.3, 1), (9.0, 0), (9.0, 1)])
def test_stars_that_would_flood_the_picture_are_dimmed_in_the_catalogue_too(limit, screen, monkeypatch):
    crowd = gs.Population(1.0, gs.Range(2e5, 2.1e5), gs.Range(0.8, 0.9), gs.Range(0, 1), gs.Range(1, 2), gs.Range(6400, 6600))  # fmt: skip
    monkeypatch.setattr(gs, "POPULATIONS", {"crowd": crowd})
    monkeypatch.setattr(gs, "SCREEN_CHANCE", screen)
    monkeypatch.setattr(gs, "FLOODED", limit)
    monkeypatch.setattr(gs, "VEILED", limit)
    sky = np.full((96, 96, 3), 0.1, np.float32)
    forward, inverse = (functools.partial(gs.midtones_transfer, m=np.float32(m)) for m in (0.005, 0.995))
    starry, starless, stars = gs.expose(
        np.random.default_rng(0), sky, [], plain_optics(), (forward, inverse), False, 0.0, 1.0
    )
    assert (np.median(starry - starless) < 0.32) == (limit < 1)
    light = inverse(1 - (1 - starry) / (1 - starless)) if screen else inverse(starry) - inverse(starless)
    inside = (np.abs(stars["x"] - 47.5) < 40) & (np.abs(stars["y"] - 47.5) < 40)
    assert light[8:-8, 8:-8, 1].sum() == pytest.approx(stars["flux"][inside].sum(), rel=0.05)


def test_gas_is_brightest_round_the_star_that_lights_it(monkeypatch):
    monkeypatch.setattr(gs, "LIT_REACH", gs.Range(0.1, 0.11))
    near, far = (64, 200), (200, 64)
    clouds = [gs.cloud(np.random.default_rng(seed), 256, near) for seed in range(20)]
    around = [[cloud[y - 20 : y + 20, x - 20 : x + 20].mean() for cloud in clouds] for x, y in (near, far)]
    assert np.mean(around[0]) > 4 * np.mean(around[1])


def test_stars_brighten_the_picture():
    gained = [float((starry - starless).mean()) for starry, starless, _ in map(make, range(10))]
    assert min(gained) > -1e-3  # rings of sharpening may darken a little
    assert np.median(gained) > 0


@pytest.mark.parametrize("own_noise", [0, 1])
def test_gray_pictures_among_colour_pairs_have_no_colour_at_all(own_noise, monkeypatch):
    giants = gs.Population(1.0, gs.Range(800, 900), gs.Range(0.8, 0.9), gs.Range(4, 5), gs.Range(0.3, 0.4), gs.Range(3000, 9000))  # fmt: skip
    monkeypatch.setattr(gs, "POPULATIONS", {"giants": giants})
    monkeypatch.setattr(gs, "GLOW_CHANCE", own_noise)
    monkeypatch.setattr(gs, "MONO_CHANCE", 1)
    monkeypatch.setattr(gs, "HALO_LIGHT", gs.Range(0.5, 0.6))
    monkeypatch.setattr(gs, "HALO_BLUE", gs.Range(2.0, 2.5))
    monkeypatch.setattr(gs, "HALO_COUNT", {2: 1.0})
    for name in ("SPIKE_CHANCE", "SPIKE_RAINBOW_CHANCE", "CHROMATIC_CHANCE", "HOT_PIXEL_CHANCE"):
        monkeypatch.setattr(gs, name, 1)
    for index in range(4):
        for image in make(index)[:2]:
            assert np.ptp(image, axis=-1).max() < 0.5 / 255


def test_galaxies_without_arms_do_not_burn_out_unless_wide(monkeypatch):
    monkeypatch.setattr(gs, "SPIRAL_CHANCE", 0)
    monkeypatch.setattr(gs, "GALAXY_SCALE", gs.Range(0.02, 0.5))
    heights = [gs.large_galaxy(np.random.default_rng(seed), 64, 2.0).max() for seed in range(40)]
    assert max(heights) <= gs.BURNT_ELLIPTICAL * (1 + 1e-6) and max(heights) > 0.5 * gs.BURNT_ELLIPTICAL


def test_burnt_out_galaxies_without_arms_fade_gently(monkeypatch):
    """Shown, the light falls by less than half of white within a FWHM, where a star's falls by 1.4 times its height."""
    monkeypatch.setattr(gs, "SPIRAL_CHANCE", 0)
    monkeypatch.setattr(gs, "GALAXY_SCALE", gs.Range(0.2, 0.5))
    galaxies = [gs.large_galaxy(np.random.default_rng(seed), 400, 2.0).max(axis=-1) for seed in range(40)]
    burnt = [1 - np.exp(-light) for light in galaxies if light.max() > gs.BURNT_ELLIPTICAL * (1 + 1e-6)]
    assert len(burnt) > 3
    assert max(np.hypot(*np.gradient(shown)).max() for shown in burnt) * 2.0 < 0.5


def test_the_middle_of_a_galaxy_larger_than_the_frame_may_lie_beyond_it():
    lights = [gs.large_galaxy(np.random.default_rng(seed), 64, 2.0).mean(axis=-1) for seed in range(60)]
    smooth = np.array([cv2.blur(light, (5, 5)) for light in lights])
    assert (smooth.max(axis=(1, 2)) > 1.02 * smooth[:, 2:-2, 2:-2].max(axis=(1, 2))).sum() > 1


@pytest.fixture
def no_knots(monkeypatch):
    monkeypatch.setattr(gs, "blobs", lambda rng, size, fwhm: np.zeros((size, size, 3), np.float32))


def test_the_disk_of_a_spiral_is_no_white_plate(no_knots, monkeypatch):
    """Its bulge apart, the brightest ask for no more than BURNT_DISK, where the arms are still seen."""
    monkeypatch.setattr(gs, "SPIRAL_CHANCE", 1)
    monkeypatch.setattr(gs, "GALAXY_LIGHT", gs.Range(8.0, 8.0))
    monkeypatch.setattr(gs, "BULGE", gs.Range(1e-3, 2e-3))
    lights = [gs.large_galaxy(np.random.default_rng(seed), 128, 2.0).max(axis=-1) for seed in range(20)]
    most = [np.percentile(light, 98) for light in lights]  # HII knots may be brighter
    assert 0.5 * gs.BURNT_DISK < max(most) <= gs.BURNT_DISK


def test_the_bulge_of_a_spiral_seen_edge_on_stands_out_of_its_disk(no_knots, monkeypatch):
    monkeypatch.setattr(gs, "BULGE", gs.Range(3.0, 5.0))
    monkeypatch.setattr(gs, "RING_CHANCE", 0)
    y, x = np.indices((256, 256), dtype=np.float32) - 128
    for seed in range(8):
        light = gs.spiral(np.random.default_rng(seed), x, y, 0.1, 60.0, 2.0)[0].mean(axis=-1)
        over = light[128 - 20 : 128 + 21 : 40].mean(axis=0)  # 20 pixels off the plane, where the disk has exp(-3.3)
        assert over[128 - 3 : 128 + 4].mean() > 3 * over[[128 - 90, 128 + 90]].mean()


def test_a_dust_lane_dims_the_bulge_on_one_side_of_a_spiral_seen_edge_on(no_knots, monkeypatch):
    monkeypatch.setattr(gs, "BULGE", gs.Range(3.0, 5.0))
    monkeypatch.setattr(gs, "RING_CHANCE", 0)
    y, x = np.indices((256, 256), dtype=np.float32) - 128
    lights = [gs.spiral(np.random.default_rng(seed), x, y, 0.1, 60.0, 2.0)[0].mean(axis=-1) for seed in range(12)]
    before, behind = (np.array([light[128 + v, 108:149].mean() for light in lights]) for v in (2, -2))
    assert (before < 1.02 * behind).all() and before.mean() < 0.9 * behind.mean()


def test_bright_bulges_of_spirals_fade_more_gently_than_a_star_in_its_glow(no_knots, monkeypatch):
    """A FWHM from the middle, three quarters of the light are left; of a Gaussian star it is a sixteenth."""
    monkeypatch.setattr(gs, "BULGE", gs.Range(3.0, 5.0))
    y, x = np.indices((128, 128), dtype=np.float32) - 64
    for seed in range(8):
        light = gs.spiral(np.random.default_rng(seed), x, y, 1.0, 12.0, 3.0)[0].mean(axis=-1)
        assert light[64, [61, 67]].min() > 0.75 * light[64, 64]


def test_spirals_have_no_ring_as_small_as_a_star(no_knots, monkeypatch):
    """However small a spiral is asked for, its light falls without a bump to twice the FWHM from its middle."""
    monkeypatch.setattr(gs, "RING_CHANCE", 1)
    y, x = np.indices((128, 128), dtype=np.float32) - 64
    radius = np.hypot(x, y).astype(int)
    for seed in range(8):
        light = gs.spiral(np.random.default_rng(seed), x, y, 1.0, 6.0, 6.0)[0].mean(axis=-1)
        profile = np.bincount(radius.ravel(), light.ravel()) / np.bincount(radius.ravel())
        assert (profile[1:13] < 1.01 * profile[:12]).all()


def test_knots_are_one_patch_each_and_few_are_round(monkeypatch):
    """A heap of round spots looks like stars out of focus."""
    monkeypatch.setattr(gs, "KNOTS", gs.Range(1, 1))
    monkeypatch.setattr(gs, "gas", lambda rng, size: np.ones((size, size), np.float32))
    ratios = []
    for seed in range(40):
        light = gs.blobs(np.random.default_rng(seed), 160, 4.0).mean(axis=-1)
        parts, labels = cv2.connectedComponents((light > 0.5 * light.max()).astype(np.uint8))
        assert parts == 2  # it and what lies around
        least, most = np.linalg.eigvalsh(np.cov(np.nonzero(labels)))
        ratios.append(np.sqrt(least / most))
    assert np.mean(np.array(ratios) > 0.8) < 0.2


def test_knots_of_galaxies_far_wider_than_the_picture_need_no_more_memory():
    light = gs.blobs(np.random.default_rng(1), 64, 3000)
    assert light.shape == (64, 64, 3) and np.isfinite(light).all()


@pytest.mark.parametrize("paint", [gs.blobs, lambda *args: gs.planetary(*args, (90, 140))], ids=["knots", "planetary"])
def test_small_nebulae_are_no_sharper_than_the_stars(paint):
    """Nowhere does their light bend more, for its height, than in the middle of a star, a Gaussian of the same FWHM."""
    star = 1 - np.exp(-0.5 * (2.355 / 4) ** 2)
    for seed in range(6):
        light = paint(np.random.default_rng(seed), 256, 4.0).mean(axis=-1)
        height, bend = light[1:-1], light[1:-1] - (light[:-2] + light[2:]) / 2
        assert (bend / height.clip(1e-9))[height > 0.2 * light.max()].max() < star


def test_planetary_nebulae_are_larger_than_the_stars_and_burn_out_only_if_much_larger(monkeypatch):
    monkeypatch.setattr(gs, "PLANETARY_RADIUS", lambda rng: 0.0)  # the least one
    for seed in range(10):
        light = gs.planetary(np.random.default_rng(seed), 256, 3.0, (128, 128)).max(axis=-1)
        assert (light > light.max() / 2).sum() > np.pi * 3.0**2 and light.max() <= gs.BURNT_HEIGHT * (1 + 1e-6)


@pytest.mark.parametrize("radius", [0.0, 0.3, 0.9, 1.1])
def test_chord_is_half_the_way_through_a_ball(radius):
    along = np.linspace(-1.5, 1.5, 100001)
    inside = (radius**2 + along**2 < 1).mean() * 3.0
    assert gs.chord(np.float64(radius)) == pytest.approx(inside / 2, abs=1e-4)


def test_galaxies_are_wider_than_the_stars():
    """The brightest galaxy of a field covers more pixels than a star of the same seeing."""
    width = lambda image: image.sum() ** 2 / (image**2).sum()  # noqa: E731
    for seed in range(6):
        star = draw([(64, 64, 1.0)], plain_optics(fwhm=3.0), 129)
        light = gs.galaxy_field(np.random.default_rng(seed), 256, 3.0, 3.0).mean(axis=-1).astype(float)
        peak = np.unravel_index(light.argmax(), light.shape)
        box = tuple(slice(max(p - 6, 0), p + 7) for p in peak)
        assert width(light[box]) > width(star[58:71, 58:71])


@pytest.mark.parametrize("roundest, burnt", [(0.25, 1.5), (gs.ROUNDEST, 40.0)])
def test_small_galaxies_that_are_round_or_no_wider_than_burnt_out_stars_do_not_burn_out(roundest, burnt, monkeypatch):
    monkeypatch.setattr(gs, "ROUNDEST", roundest)  # 0.25: all count as round
    monkeypatch.setattr(gs, "GALAXY_CLUSTER_CHANCE", 0)
    monkeypatch.setattr(gs, "GALAXY_HEIGHT", gs.Range(3.0, 4.0))
    brightest = [gs.galaxy_field(np.random.default_rng(seed), 512, 1.5, burnt).max() for seed in range(8)]
    assert min(brightest) < 1.3 * gs.BURNT_HEIGHT  # of the warmest channel; higher where two overlap
    assert max(brightest) < 3


def test_galaxies_are_wider_than_trailed_and_comatic_stars():
    optics = plain_optics(fwhm=3.0)
    assert optics.widest == 3
    trailed = dataclasses.replace(optics, trail=np.array([0.0, 4.0]), coma=12.0, chromatic=np.array([1.2, 1, 0.9]))
    assert trailed.widest == pytest.approx(1.2 * 13)


def plain_halo(light=0.3, scale=10.0, beta=None):
    return {"light": light, "scale": scale, "aureole": beta, "blue": 1.0, "rays": np.ones(8)}


@pytest.mark.parametrize("fwhm, beta", [(3.0, 2.5), (5.0, 4.8)])
def test_without_a_stretch_stars_are_seen_as_wide_as_they_are(fwhm, beta):
    assert gs.seen_width(plain_optics(fwhm=fwhm, beta=beta), lambda y: y, 1.0) == pytest.approx(fwhm, rel=0.05)


def test_a_deep_stretch_shows_a_saturated_star_as_wide_as_its_wings():
    m, beta = 0.001, 2.5
    alpha = 3.0 / (2 * np.sqrt(2 ** (1 / beta) - 1))
    seen = gs.seen_width(plain_optics(fwhm=3.0, beta=beta), lambda y: gs.midtones_transfer(y, 1 - m), 1.0)
    assert seen == pytest.approx(2 * alpha * np.sqrt(m ** (-1 / beta) - 1), rel=0.05)


def test_faint_stars_are_seen_narrower_than_bright_ones():
    inverse = functools.partial(gs.midtones_transfer, m=0.999)
    widths = [gs.seen_width(plain_optics(fwhm=3.0), inverse, height) for height in (0.1, 0.5, 0.8, 1.0)]
    assert widths == sorted(widths) and widths[-1] > 2 * widths[0]


def test_a_strong_halo_widens_stars_as_they_are_seen():
    alone, glowing = (plain_optics(fwhm=3.0, beta=5.0, halos=halos) for halos in ([], [plain_halo()]))
    inverse = functools.partial(gs.midtones_transfer, m=0.999)
    assert gs.seen_width(glowing, inverse, 1.0) > 1.5 * gs.seen_width(alone, inverse, 1.0)


@pytest.mark.parametrize("kind, certain", [("large_galaxy", "GALAXY_CHANCE"), ("planetary", "PLANETARY_CHANCE")])
def test_what_may_burn_out_is_sized_by_stars_as_the_stretch_shows_them(monkeypatch, kind, certain):
    widths, paint = [], getattr(gs, kind)
    monkeypatch.setattr(gs, kind, lambda rng, size, fwhm, *place: widths.append(fwhm) or paint(rng, size, fwhm, *place))
    monkeypatch.setattr(gs, certain, 1)
    monkeypatch.setattr(gs, "STARLESS_CHANCE", 0)
    for midtones in (0.25, 0.0006):
        monkeypatch.setattr(gs, "MIDTONES", gs.Range(midtones, midtones, True))
        make(1, 3)
    assert widths[1] > 1.5 * widths[0]


# --------------------------------------------------------------------------------------------------------------------
# Photographs
# --------------------------------------------------------------------------------------------------------------------


def ramp(height=120, width=150, top=255, dtype=np.uint8, channels=3):
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    planes = [x, y, (x + y) / 2, np.ones_like(x)][:channels]
    return (np.stack(planes, axis=-1).squeeze() * top).astype(dtype)


@pytest.mark.parametrize(
    "pixels",
    [ramp(), ramp(channels=1), ramp(channels=4), ramp(top=65535, dtype=np.uint16), ramp(5, 9), ramp(1, 1)],
    ids=["rgb", "gray", "rgba", "16 bits", "tiny", "one pixel"],
)
def test_photographs_of_any_depth_size_and_channels_serve(pixels, tmp_path):
    path = write_photograph(tmp_path / "photo.png", pixels)
    starless = make(1, path=path)[1]
    assert starless.shape == (96, 96, 3)
    assert np.isfinite(starless).all()


@pytest.mark.parametrize("top, dtype", [(255, np.uint8), (65535, np.uint16)])
def test_photograph_is_read_rgb_from_0_to_1(top, dtype, tmp_path):
    red = np.zeros((8, 8, 3), dtype)
    red[..., 2] = top  # OpenCV's order is blue, green, red
    image = gs.read_background(write_photograph(tmp_path / "red.png", red))
    np.testing.assert_allclose(image, np.broadcast_to([1.0, 0, 0], (8, 8, 3)))


def test_a_gray_photograph_of_floats_is_read(tmp_path):
    path = write_photograph(tmp_path / "gray.tif", np.full((8, 8), 0.25, np.float32))
    np.testing.assert_array_equal(gs.read_background(path), np.full((8, 8, 3), 0.25, np.float32))


def test_transparency_is_dropped_not_blended(tmp_path):
    pixels = np.full((8, 8, 4), 200, np.uint8)
    pixels[..., 3] = 0
    np.testing.assert_allclose(gs.read_background(write_photograph(tmp_path / "a.png", pixels)), 200 / 255, atol=1e-6)


def test_pair_shows_its_photograph(tmp_path):
    """A bright and a dark half are still told apart behind the stars."""
    pixels = np.zeros((200, 200, 3), np.uint8)
    pixels[:, 100:] = 220
    path = write_photograph(tmp_path / "halves.png", pixels)
    assert np.median([np.ptp(cv2.blur(make(i, path=path)[1].mean(axis=-1), (9, 9))) for i in range(6)]) > 0.15


def test_of_sidd_only_the_clean_photographs_are_taken(tmp_path):
    for kind in ("GT", "NOISY"):
        write_photograph(tmp_path / "SIDD/Data/0001_001_S6" / f"0001_{kind}_SRGB_010.PNG", ramp(8, 8))
    assert [Path(p).name for p in gs.find_photographs([tmp_path])] == ["0001_GT_SRGB_010.PNG"]


def test_of_renoir_only_the_reference_photographs_are_taken(tmp_path):
    for kind in ("Reference", "Noisy"):
        write_photograph(tmp_path / "Mi3_Aligned/Batch_001" / f"IMG_20160202_015216{kind}.bmp", ramp(8, 8))
    assert [Path(p).name for p in gs.find_photographs([tmp_path])] == ["IMG_20160202_015216Reference.bmp"]


def test_of_a_plain_folder_all_pictures_are_taken_and_nothing_else(tmp_path):
    for name in ("b.jpg", "a.PNG", "deep/er/c.tif"):
        write_photograph(tmp_path / name, ramp(8, 8))
    for name in ("notes.txt", "._b.jpg", ".hidden.png"):
        (tmp_path / name).write_text("no picture")
    assert sorted(Path(p).name for p in gs.find_photographs([tmp_path])) == ["a.PNG", "b.jpg", "c.tif"]


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


def test_command_writes_pairs_catalogues_and_preview_and_nothing_else(pairs):
    folder, result = pairs
    assert result.returncode == 0, result.stderr
    expected = [f"{kind}{i}.png" for kind in "xy" for i in range(4)] + [f"stars{i}.ecsv" for i in range(4)]
    assert names(folder) == sorted([*expected, "preview.png"])


def test_pictures_have_the_asked_size_and_8_bits(pairs):
    for path in pairs[0].glob("[xy]*.png"):
        image = read(path)
        assert image.shape == (96, 96, 3)
        assert image.dtype == np.uint8


def test_preview_shows_starry_above_starless(pairs):
    sheet = read(pairs[0] / "preview.png")
    columns = [np.vstack([read(pairs[0] / f"{kind}{i}.png") for kind in "xy"]) for i in range(2)]
    np.testing.assert_array_equal(sheet, np.hstack(columns))


def test_preview_of_pairs_of_two_sizes(tmp_path):
    for count, size in (1, 32), (2, 48):
        options = ["--imcount", count, "--size", size, "--preview-pairs", 2, "--cpus", 1, "--save-dir", tmp_path]
        result = command(*map(str, options))
        assert result.returncode == 0, result.stderr
    assert read(tmp_path / "preview.png").shape == (96, 80, 3)


def test_catalogue_lists_the_stars_inside_the_frame(pairs):
    counts = []
    for i in range(4):
        stars = Table.read(pairs[0] / f"stars{i}.ecsv")
        assert stars.colnames == ["x", "y", "flux", "fwhm", "temperature", "population"]
        assert stars.meta["background"] == "painted"
        counts.append(len(stars))
        for axis in ("x", "y"):
            assert ((stars[axis] > -0.5) & (stars[axis] < 95.5)).all()
        assert set(stars["population"]) <= set(gs.POPULATIONS)
    assert max(counts) > 0


def test_pair_depends_on_seed_and_number_alone(pairs, tmp_path):
    """Three processes, another start and count: the same bytes as one process wrote."""
    options = ["--start", "2", "--imcount", "3", "--cpus", "3", "--size", "96", "--seed", "3"]
    assert command(*options, "--save-dir", tmp_path).returncode == 0
    for name in ("x2.png", "y2.png", "x3.png", "y3.png"):
        assert (tmp_path / name).read_bytes() == (pairs[0] / name).read_bytes(), name


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
@pytest.mark.parametrize("after", [0.2, 1.5])
def test_an_interruption_while_the_processes_begin_is_told_in_one_line(after, tmp_path):
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background ignores it
    line = [
        sys.executable,
        str(ROOT / "GenerateStars.py"),
        "--cpus",
        "2",
        "--size",
        "32",
        "--save-dir",
        str(tmp_path / "new"),
    ]
    with subprocess.Popen(
        line, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heeding
    ) as process:
        while not (tmp_path / "new").exists():  # now its own modules are there
            time.sleep(0.02)
        time.sleep(after)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert [text for text in re.split(r"[\r\n]+", told) if text and "pair" not in text.split(":")[-1]] == []


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_an_interruption_while_its_packages_load_shows_nothing_of_them(tmp_path):
    (tmp_path / "cv2.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(60)"
    )
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background ignores it
    line = [sys.executable, str(ROOT / "GenerateStars.py"), "--save-dir", str(tmp_path / "new")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(line, capture_output=True, timeout=60, env=environment, preexec_fn=heeding)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, b"")


@pytest.mark.skipif(sys.platform == "win32", reason="kills without a signal")
def test_a_run_that_is_ended_leaves_no_process_behind(tmp_path):
    line = [
        sys.executable,
        str(ROOT / "GenerateStars.py"),
        "--imcount",
        "500",
        "--cpus",
        "2",
        "--size",
        "64",
        "--save-dir",
        str(tmp_path),
    ]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(tmp_path.glob("x*.png")):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    output, _ = process.communicate(timeout=60)  # to the end of what all processes can write
    assert process.returncode == 1 and "interrupted; the pairs made so far are kept" in output


def test_another_seed_or_number_is_another_picture():
    first, other_seed, other_number = make(0)[1], make(0, seed=1)[1], make(1)[1]
    assert (first != other_seed).any()
    assert (first != other_number).any()


def test_resume_keeps_finished_pairs_makes_the_missing_and_says_so(pairs):
    folder, _ = pairs
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    (folder / "y1.png").unlink()
    (folder / "x0.png").write_bytes(b"kept as it is")
    result = command(*["--imcount", "4", "--cpus", "1", "--size", "96", "--seed", "3"], "--save-dir", folder)
    try:
        assert result.returncode == 0, result.stderr
        assert "3 of 4 pairs are there and kept" in result.stdout
        assert (folder / "y1.png").read_bytes() == before["y1.png"]
        assert (folder / "x0.png").read_bytes() == b"kept as it is"
    finally:
        (folder / "x0.png").write_bytes(before["x0.png"])


def test_a_catalogue_that_is_asked_for_later_costs_no_pair(tmp_path, capsys):
    for path in gs.pair_paths(tmp_path, 0):
        path.write_bytes(b"mine")
    asked = ["--imcount", "1", "--size", "32", "--catalog", "--save-dir", str(tmp_path)]
    gs.main(asked)
    assert "1 of 1 pairs are there and kept, 1 of them without a catalogue" in capsys.readouterr().out
    assert [(tmp_path / name).read_bytes() for name in names(tmp_path)] == [b"mine"] * 2
    gs.main([*asked, "--overwrite", "--cpus", "1"])
    assert names(tmp_path) == ["stars0.ecsv", "x0.png", "y0.png"]


def test_a_folder_that_may_not_be_written_to_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(gs.os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit, match="this folder cannot be written to"):
        gs.main(["--imcount", "1", "--save-dir", str(tmp_path)])
    assert names(tmp_path) == []


def test_gray_pairs_of_16_bits_over_photographs_past_a_corrupt_one(tmp_path):
    """--no-color gives one channel, --depth 16 uint16; a photograph that cannot be read is named, the run goes on."""
    photographs, folder = tmp_path / "photos", tmp_path / "out"
    write_photograph(photographs / "fine.png", ramp())
    (photographs / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    result = command(
        *[
            "--no-color",
            "--depth",
            "16",
            "--painted",
            "0",
            "--imcount",
            "6",
            "--cpus",
            "1",
            "--size",
            "64",
            "--seed",
            "5",
        ],
        *("--backgrounds", photographs, "--save-dir", folder),
    )
    settings, found = gs.Settings(seed=5, painted=0.0), gs.find_photographs([photographs])
    broken = [i for i in range(6) if "broken" in gs.choose_photograph(i, settings, found)]
    assert 0 < len(broken) < 6
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    for i in broken:
        assert f"pair {i} (seed 5, background {photographs / 'broken.jpg'})" in result.stderr
    assert names(folder) == sorted(f"{kind}{i}.png" for kind in "xy" for i in range(6) if i not in broken)
    for path in folder.iterdir():
        image = read(path)
        assert image.shape == (64, 64)
        assert image.dtype == np.uint16


@pytest.mark.parametrize("exists", [False, True], ids=["missing", "empty"])
def test_folder_without_photographs_is_told_in_one_line(exists, tmp_path):
    photographs, folder = tmp_path / "photos", tmp_path / "out"
    if exists:
        photographs.mkdir()
    result = command("--imcount", 1, "--backgrounds", photographs, "--save-dir", folder)
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert str(photographs) in result.stderr
    assert not folder.exists()


def test_save_dir_that_is_a_file_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        gs.main(["--imcount", "1", "--save-dir", str(tmp_path / "file")])
    assert "cannot be made a folder" in str(stop.value)


@pytest.mark.parametrize("wrong", ["--depth 12", "--size 8", "--imcount 0", "--painted 2", "--start -1"])
def test_impossible_settings_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        gs.parse_arguments(wrong.split())
    assert stop.value.code == 2
    assert wrong.split()[0] in capsys.readouterr().err


def test_a_mistake_is_told_in_one_line():
    result = command("--size", "8")
    assert (result.returncode, result.stderr) == (
        2,
        "GenerateStars.py: --size must be at least 32; --help lists the options\n",
    )


def test_a_pair_that_cannot_be_shown_in_the_contact_sheet_is_named(tmp_path):
    for name in "xy":
        (tmp_path / f"{name}0.png").write_bytes(b"no picture")
    result = command("--imcount", 1, "--size", 32, "--preview-pairs", 1, "--save-dir", tmp_path)
    line = (
        f"GenerateStars.py: {tmp_path / 'x0.png'}: cannot be read (not a readable picture); --overwrite makes it again"
    )
    assert (result.returncode, result.stderr.splitlines()[-1]) == (1, line)


def test_of_a_pair_whose_second_picture_cannot_be_written_the_first_goes_too(tmp_path, monkeypatch):
    whole = gs.write_png

    def full(path, image, depth):
        if path.name == "x0.png":
            raise OSError("disk full")
        whole(path, image, depth)

    monkeypatch.setattr(gs, "write_png", full)
    with pytest.raises(OSError, match="disk full"):  # it ends the run: the next would not find room either
        gs.save_pair((0, gs.Settings(size=32, save_dir=str(tmp_path), catalog=True), []))
    assert names(tmp_path) == []


def test_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(gs.os, "replace", full)
    with pytest.raises(OSError):
        gs.write_bytes(tmp_path / "x0.png", b"data")
    assert names(tmp_path) == []
