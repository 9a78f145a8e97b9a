"""Pictures in and out of nox.py: every format's bits and metadata, odd data, linear data, layers, several pictures."""

import re
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.stats
import tifffile
from astropy.io import fits
from conftest import keras, load_once, mistake, names, noise, nox, read, run, write
from PIL import Image, PngImagePlugin, TiffImagePlugin

import GenerateStars

# --------------------------------------------------------------------------------------------------------------------
# Helpers
# --------------------------------------------------------------------------------------------------------------------


def same_bits(a, b):
    """Whether two arrays hold the same values bit for bit, whatever their byte order."""
    assert (a.shape, a.dtype.newbyteorder("=")) == (b.shape, b.dtype.newbyteorder("="))
    native = [np.ascontiguousarray(x.astype(x.dtype.newbyteorder("="))) for x in (a, b)]
    return native[0].tobytes() == native[1].tobytes()


def subtracting(amount, channels=3):
    """A network that takes the same light from every pixel."""
    image = keras.Input((None, None, channels))
    return keras.Model(image, keras.layers.Rescaling(1.0, -amount)(image)), nox.Architecture(
        width=4, levels=2, n_channels=channels
    )


@pytest.fixture
def subtract(folder, monkeypatch):
    """subtract(amount, file, *flags): run infer with a network that takes so much light from every pixel."""

    def call(amount, *arguments):
        channels = {nox.read_picture(name).pixels.shape[2] for name in arguments[:1]}.pop()
        channels = 1 if "--n-channels" in arguments else channels
        monkeypatch.setattr(nox, "load_generator", lambda path: subtracting(amount, channels))
        monkeypatch.setattr(nox, "SIGNIFICANCE", 0)  # nothing here looks like a star
        run("infer", *arguments, "--patch-size", 32, "--stride", 24)

    return call


def values_of(dtype, *shape):
    """Random values of a type: an integer's whole range, floats from below 0 to above 1."""
    rng = np.random.default_rng(list(shape))
    if np.dtype(dtype).kind in "ui":
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    return (rng.random(shape) * 1.4 - 0.2).astype(dtype)


def starry_sky(height=70, width=90, channels=3, sky=0.2):
    """A flat float64 sky with a little noise and some Gaussian stars, 0..1."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:height, :width]
    image = sky + 0.01 * rng.standard_normal((height, width, channels))
    for _ in range(8):
        distance = (x - rng.uniform(0, width)) ** 2 + (y - rng.uniform(0, height)) ** 2
        image += (rng.uniform(0.2, 1) * np.exp(-distance / 4))[..., None]
    return image.clip(0, 1)


# --------------------------------------------------------------------------------------------------------------------
# TIFF
# --------------------------------------------------------------------------------------------------------------------

TYPES = ["uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64"]
LAYOUTS = {
    "gray": ((21, 33), {"photometric": "minisblack"}),
    "gray, white is zero": ((21, 33), {"photometric": "miniswhite"}),
    "gray and alpha": ((21, 33, 2), {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]}),
    "colour": ((21, 33, 3), {"photometric": "rgb"}),
    "planes": ((3, 21, 33), {"photometric": "rgb", "planarconfig": "separate"}),
    "colour and alpha": ((21, 33, 4), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
    "premultiplied alpha": ((21, 33, 4), {"photometric": "rgb", "extrasamples": ["assocalpha"]}),
    "deflated": ((21, 33, 3), {"photometric": "rgb", "compression": "zlib"}),
    "big": ((21, 33, 3), {"photometric": "rgb", "bigtiff": True}),
    "big endian": ((21, 33, 3), {"photometric": "rgb", "byteorder": ">"}),
}  # fmt: skip
CASES = [("float32", layout) for layout in LAYOUTS] + [("uint16", layout) for layout in LAYOUTS]
CASES += [(dtype, "colour") for dtype in TYPES] + [("uint8", "colour and alpha"), ("float64", "gray")]


@pytest.mark.parametrize("dtype, layout", dict.fromkeys(CASES))
def test_a_tiff_that_the_network_leaves_alone_comes_out_as_it_was(dtype, layout, infer):
    shape, options = LAYOUTS[layout]
    tifffile.imwrite("in.tif", values_of(dtype, *shape), **options)
    infer("in.tif", kind="identity")
    with tifffile.TiffFile("in.tif") as old, tifffile.TiffFile("starless.tif") as new:
        assert same_bits(old.pages[0].asarray(), new.pages[0].asarray())
        assert (old.byteorder, old.is_bigtiff) == (new.byteorder, new.is_bigtiff)
        for name in "axes", "photometric", "planarconfig", "extrasamples", "compression":
            assert getattr(old.pages[0], name) == getattr(new.pages[0], name), name


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_lzw_tiff_is_read_without_further_packages(dtype, channels, infer):
    pixels = noise(21, 33, channels, dtype)
    if channels == 4:
        pixels[3:9, ..., 3] = 0  # transparent: colour must not be multiplied by it
    data = bytearray(cv2.imencode(".tif", pixels, [cv2.IMWRITE_TIFF_COMPRESSION, cv2.IMWRITE_TIFF_COMPRESSION_LZW])[1])
    Path("in.tif").write_bytes(data)
    infer("in.tif", kind="identity")
    with tifffile.TiffFile("in.tif") as file:
        assert file.pages[0].compression == tifffile.COMPRESSION.LZW
    rgb = pixels[..., [2, 1, 0, 3][:channels]] if channels > 1 else pixels[..., 0]
    assert same_bits(tifffile.imread("starless.tif"), rgb)


NOT_WHOLE = "in.tif: of this kind (LZW) it cannot be read whole; save it as RGB or gray, uncompressed"


def test_an_lzw_tiff_in_planes_is_not_read_as_if_they_were_interleaved(folder):
    options = [cv2.IMWRITE_TIFF_COMPRESSION, cv2.IMWRITE_TIFF_COMPRESSION_LZW, cv2.IMWRITE_TIFF_ROWSPERSTRIP, 20]
    Path("in.tif").write_bytes(cv2.imencode(".tif", noise(60, 33, 1, "uint16"), options)[1])
    planes = {"ImageLength": 20, "SamplesPerPixel": 3, "BitsPerSample": (16, 16, 16), "PlanarConfiguration": 2}
    for name, value in {**planes, "PhotometricInterpretation": 2}.items():
        with tifffile.TiffFile("in.tif", mode="r+b") as file:
            file.pages[0].tags[name].overwrite(value)
    with tifffile.TiffFile("in.tif") as file:
        assert file.pages[0].shape == (3, 20, 33)
    assert NOT_WHOLE in mistake("infer", "in.tif")


def test_an_lzw_tiff_of_gray_and_alpha_is_not_read_without_its_alpha(folder):
    Image.fromarray(noise(21, 33, 2), "LA").save("in.tif", compression="tiff_lzw")
    assert NOT_WHOLE in mistake("infer", "in.tif")


def test_a_compression_that_nothing_here_can_read_is_named(folder):
    pixels = values_of("uint8", 21, 33)
    tifffile.imwrite("in.tif", pixels)
    with tifffile.TiffFile("in.tif", mode="r+b") as file:
        file.pages[0].tags["Compression"].overwrite(34887)
    assert re.search("in.tif: not a picture.*; its compression is LERC", mistake("infer", "in.tif"))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("target", ["out.tif", "out.png", "out.fits"])
def test_white_is_zero_stays_so_or_is_turned_round_for_a_format_without_it(target, dtype, infer):
    pixels = noise(21, 33, 1, dtype)
    Path("in.tif").write_bytes(cv2.imencode(".tif", pixels)[1])  # LZW
    with tifffile.TiffFile("in.tif", mode="r+b") as file:
        file.pages[0].tags["PhotometricInterpretation"].overwrite(0)
    infer("in.tif", "-o", target, kind="identity")
    shown = np.iinfo(dtype).max - pixels
    np.testing.assert_array_equal(np.rint(nox.read_picture(target).unit() * np.iinfo(dtype).max), shown)
    assert (nox.read_picture(target).white == 0) == (target == "out.tif")


PROFILES = {1: b"GRAY", 3: b"RGB "}
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a>\xc3\xa4</a></x:xmpmeta>'


def icc(channels, size=3000):
    """Bytes with what nox looks at in a profile: the kind of picture that it is for."""
    return bytes(16) + PROFILES[channels] + bytes(range(256)) * (size // 256)


def exif():
    """EXIF with a maker, an orientation, an exposure, a date and a place."""
    tags = Image.Exif()
    tags.update({0x010F: "Maker", 0x0112: 6})
    tags.get_ifd(0x8769).update({0x829A: 30.0, 0x9003: "2024:01:02 03:04:05"})
    tags.get_ifd(0x8825).update({1: "N", 2: (47.0, 30.0, 0.0)})
    return tags


def exif_in(path):
    """{folder or 0: {tag: value}} of the EXIF in a PNG, JPEG or TIFF file as Pillow reads it."""
    with Image.open(path) as image:
        tags = image.getexif()
        own = {tag: tags[tag] for tag in (0x010F, 0x0112) if tag in tags}
        return {0: own, 0x8769: dict(tags.get_ifd(0x8769)), 0x8825: dict(tags.get_ifd(0x8825))}


def save_with_metadata(path, channels=3):
    """A small picture with ICC profile, EXIF, XMP and a resolution of 300 dpi; written by Pillow."""
    options = {"icc_profile": icc(channels), "dpi": (300, 300)}
    if path.endswith(".tif"):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        for code, value in (
            *exif().items(),
            (0x8769, exif().get_ifd(0x8769)),
            (0x8825, exif().get_ifd(0x8825)),
            (700, XMP),
        ):
            tags[code] = value
        options["tiffinfo"] = tags
    else:
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", XMP.decode())
        options |= {"exif": exif()} | ({"pnginfo": text} if path.endswith(".png") else {"xmp": XMP})
    Image.fromarray(ramp(channels).squeeze()).save(path, **options)
    return path


def ramp(channels):
    """A small 8-bit picture that is darkest in the upper left corner."""
    y, x = np.mgrid[:20, :30]
    return np.repeat((5 * y + 2 * x)[..., None], channels, axis=2).astype("uint8")


@pytest.mark.parametrize("extension", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("target", [".png", ".jpg", ".tif"])
def test_profile_exif_and_xmp_stay_also_in_another_format(extension, target, infer):
    source = save_with_metadata("in" + extension)
    infer(source, "-o", "out" + target)
    assert exif_in("out" + target) == exif_in(source)
    assert exif_in(source)[0x8769][0x9003] == "2024:01:02 03:04:05"
    with Image.open("out" + target) as image:
        assert image.info["icc_profile"] == icc(3)
        assert XMP in Path("out" + target).read_bytes()
        if target == extension:
            assert [round(float(x)) for x in image.info["dpi"]] == [300, 300]


@pytest.mark.parametrize("extension", [".png", ".jpg", ".tif"])
def test_a_colour_profile_is_left_out_of_a_gray_picture(extension, infer):
    source = save_with_metadata("in" + extension)
    infer(source, "--n-channels", 1)
    with Image.open("starless" + extension) as image:
        assert "icc_profile" not in image.info
    save_with_metadata("gray" + extension, channels=1)
    infer("gray" + extension, "-o", "out" + extension)
    with Image.open("out" + extension) as image:
        assert image.info["icc_profile"] == icc(1)


def test_tags_of_a_tiff_stay(infer):
    tags = [(315, 2, 0, "Jürgen".encode(), True), (65000, 12, 2, (1.5, 2.5), True), (33723, 7, 8, b"abcdefgh", True)]
    tags += [(270, 2, 0, "a line\nand another", True), (306, 2, 0, "2024:01:02 03:04:05", True), (274, 3, 1, 8, True)]
    tifffile.imwrite("in.tif", noise(20, 30, 3), photometric="rgb", metadata=None, extratags=tags,
                     resolution=(118.11, 118.11), resolutionunit="CENTIMETER")  # fmt: skip
    infer("in.tif")
    with tifffile.TiffFile("in.tif") as old, tifffile.TiffFile("starless.tif") as new:
        assert old.pages[0].tags["Artist"].value == "Jürgen"
        for code in 315, 65000, 33723, 270, 305, 306, 274, 282, 283, 296:
            assert new.pages[0].tags[code].value == old.pages[0].tags[code].value, code


@pytest.mark.parametrize("chunk", [(b"gAMA", struct.pack(">I", 45455)), (b"sRGB", b"\0"), (b"tEXt", b"Title\0M 42"),
                                   (b"zTXt", b"Comment\0\0" + zlib.compress(b"seen"))])  # fmt: skip
def test_chunks_of_a_png_stay(chunk, infer):
    data = write("in.png", noise(20, 30, 3)).read_bytes()
    whole = struct.pack(">I", len(chunk[1])) + b"".join(chunk)
    whole += struct.pack(">I", zlib.crc32(b"".join(chunk)))
    Path("in.png").write_bytes(data[:33] + whole + data[33:])
    infer("in.png")
    assert Path("starless.png").read_bytes()[33:].startswith(whole)
    assert read("starless.png").shape == (20, 30, 3)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_the_transparent_gray_of_a_png_becomes_alpha(dtype, infer):
    pixels = noise(21, 33, 1, dtype)
    data = cv2.imencode(".png", pixels)[1].tobytes()
    Path("in.png").write_bytes(data[:33] + nox.png_chunk(b"tRNS", struct.pack(">H", pixels[3, 4, 0])) + data[33:])
    infer("in.png", kind="identity")
    found = nox.read_picture("starless.png")
    np.testing.assert_array_equal(found.pixels, pixels)
    np.testing.assert_array_equal(found.alpha, np.where(pixels[..., 0] == pixels[3, 4, 0], 0, np.iinfo(dtype).max))


@pytest.mark.parametrize("chunk", [b"iCCPx\0\0no stream", b"iTXt" + nox.PNG_XMP + b"\0\0\0none"])
def test_a_damaged_chunk_of_a_png_is_left_out(chunk, infer):
    data = Path(write("in.png", noise(20, 30, 3))).read_bytes()
    Path("in.png").write_bytes(data[:33] + nox.png_chunk(chunk[:4], chunk[4:]) + data[33:])
    infer("in.png", kind="identity")
    assert Path("starless.png").read_bytes() == data


def test_exif_that_does_not_parse_is_left_out_of_a_tiff(infer):
    data = cv2.imencode(".jpg", noise(20, 30, 3))[1].tobytes()
    Path("in.jpg").write_bytes(data[:2] + b"\xff\xe1\0\x0cExif\0\0junk" + data[2:])
    infer("in.jpg", "-o", "out.tif", kind="identity")
    assert tifffile.imread("out.tif").shape == (20, 30, 3)


def test_a_jpeg_with_bytes_that_fill_up_before_a_marker_is_read(infer):
    data = cv2.imencode(".jpg", noise(20, 30, 3))[1].tobytes()
    end = 4 + int.from_bytes(data[4:6], "big")  # of the first segment
    Path("in.jpg").write_bytes(data[:end] + b"\xff\xff" + data[end:])
    infer("in.jpg", "-o", "out.png", kind="identity")
    np.testing.assert_array_equal(read("out.png"), cv2.imdecode(np.frombuffer(data, np.uint8), -1))


def test_a_profile_longer_than_a_jpeg_segment_stays_whole(infer):
    Image.fromarray(noise(20, 30, 3)).save("in.jpg", icc_profile=icc(3, 200_000))
    infer("in.jpg")
    with Image.open("starless.jpg") as image:
        assert image.info["icc_profile"] == icc(3, 200_000)


def test_jpeg_without_stars_is_written_again_within_rounding(infer):
    Image.fromarray(noise(60, 80, 3)).save("in.jpg", quality=75)
    infer("in.jpg", kind="identity")
    before, after = (np.asarray(Image.open(name)).astype(int) for name in ("in.jpg", "starless.jpg"))
    assert np.abs(after - before).max() <= 4
    assert np.abs(after - before).mean() < 0.5


@pytest.mark.parametrize("extension", [".png", ".jpg", ".tif"])
def test_pixels_stay_as_stored_whatever_the_orientation(extension, infer):
    infer(save_with_metadata("in" + extension), "-o", "out.tif", kind="identity")
    difference = tifffile.imread("out.tif").astype(int) - ramp(3)
    assert np.abs(difference).max() <= (10 if extension == ".jpg" else 0)


# --------------------------------------------------------------------------------------------------------------------
# FITS, XISF
# --------------------------------------------------------------------------------------------------------------------

FITS_TYPES = ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]


def write_fits(path, data, hdu=fits.PrimaryHDU, **cards):
    header = fits.Header({"OBJECT": "M 31", "CTYPE1": "RA---TAN", "CRVAL1": 10.68, "CD1_1": -1e-4, **cards})
    options = {"quantize_level": 0, "compression_type": "GZIP_2"} if hdu is fits.CompImageHDU else {}
    first = [] if hdu is fits.PrimaryHDU else [fits.PrimaryHDU()]
    fits.HDUList([*first, hdu(data, header, **options)]).writeto(path)


@pytest.mark.parametrize("dtype", FITS_TYPES)
@pytest.mark.parametrize("shape", [(21, 33), (3, 21, 33), (1, 21, 33)])
@pytest.mark.parametrize("extension", [".fits", ".fits.fz"])
def test_a_fits_picture_that_the_network_leaves_alone_comes_out_as_it_was(dtype, shape, extension, infer):
    data = values_of(dtype, *shape)
    write_fits("in" + extension, data, fits.PrimaryHDU if extension == ".fits" else fits.CompImageHDU)
    infer("in" + extension, kind="identity")
    assert same_bits(fits.getdata("starless" + extension), data)


def test_the_header_stays_and_gains_one_line_of_history(infer):
    write_fits("in.fits", values_of("float32", 3, 21, 33), EXPTIME=300.0, HISTORY="stacked")
    infer("in.fits")
    old, new = fits.getheader("in.fits"), fits.getheader("starless.fits")
    assert list(new["HISTORY"]) == ["stacked", "stars removed by nox"]
    assert {k: old[k] for k in old if k != "HISTORY"} == {k: new[k] for k in new if k != "HISTORY"}


@pytest.mark.parametrize("order", ["TOP-DOWN", "BOTTOM-UP", None])
def test_the_order_of_rows_stays_and_is_respected_in_other_formats(order, infer):
    data = values_of("uint16", 3, 21, 33)
    write_fits("in.fits", data, **({"ROWORDER": order} if order else {}))
    infer("in.fits", kind="identity")
    assert same_bits(fits.getdata("starless.fits"), data)
    infer("in.fits", "-o", "out.tif", kind="identity")
    rows = slice(None) if order == "TOP-DOWN" else slice(None, None, -1)
    assert same_bits(tifffile.imread("out.tif"), np.moveaxis(data, 0, -1)[rows])
    infer("out.tif", "-o", "back.fits", kind="identity")
    assert fits.getheader("back.fits")["ROWORDER"] == "BOTTOM-UP"
    assert same_bits(fits.getdata("back.fits"), data if order != "TOP-DOWN" else data[:, ::-1])


def write_scaled(path, raw, **cards):
    """A FITS file of raw integers with BSCALE and BZERO, and perhaps BLANK."""
    hdu = fits.PrimaryHDU(raw)
    hdu.header.update(cards)
    hdu.writeto(path)


def test_scaled_integers_keep_their_bits_and_their_scale(infer):
    raw = values_of("int16", 21, 33)
    write_scaled("in.fits", raw, BSCALE=0.5, BZERO=100.0, BLANK=-32768)
    infer("in.fits", kind="identity")
    with fits.open("starless.fits", do_not_scale_image_data=True) as file:
        assert same_bits(file[0].data, raw)
        assert [file[0].header[key] for key in ("BSCALE", "BZERO", "BLANK")] == [0.5, 100, -32768]


@pytest.mark.parametrize("target", ["out.fits.fz", "out.tif"])
def test_scaled_integers_keep_their_values_or_their_range_in_other_files(target, infer):
    raw = values_of("int16", 21, 33)
    write_scaled("in.fits", raw, BSCALE=0.5, BZERO=20000.0)
    infer("in.fits", "-o", target, kind="identity")
    seen = [nox.read_picture(name).unit() for name in ("in.fits", target)]
    np.testing.assert_allclose(seen[1], seen[0], atol=1e-4)
    if target.endswith("fz"):
        np.testing.assert_array_equal(fits.getdata(target), 20000 + 0.5 * raw)


def test_light_is_taken_from_scaled_integers_in_their_physical_units(subtract):
    raw = np.arange(600, dtype="int16").reshape(20, 30)
    raw[0, 0] = -32768
    write_scaled("in.fits", raw, BSCALE=2.0, BZERO=10.0, BLANK=-32768)
    subtract(0.25, "in.fits", "--linear", "no")
    white = 2 * 599 + 10
    new = fits.getdata("starless.fits")
    expected = (10 + 2 * raw - 0.25 * white).clip(0)
    assert np.isnan(new[0, 0])
    inner = np.s_[2:-2, 2:-2]  # the ramp has no grain, and what is smoothed for it is not straight at the edge
    np.testing.assert_allclose(new[inner], expected[inner], atol=2)


def test_of_a_fits_file_the_first_picture_is_taken_or_the_one_that_is_named(infer):
    table = fits.BinTableHDU.from_columns([fits.Column("a", "E", array=np.arange(5))])
    pictures = [fits.ImageHDU(values_of("float32", 21, 33 + i), name=f"SCI{i}") for i in range(2)]
    fits.HDUList([fits.PrimaryHDU(header=fits.Header({"OBSERVER": "me"})), table, *pictures]).writeto("in.fits")
    for name, taken in ("in.fits", 2), ("in.fits[3]", 3):
        infer(name)
        with fits.open("starless.fits") as file, fits.open("in.fits") as old:
            assert [hdu.name for hdu in file] == ["PRIMARY", "", "SCI0", "SCI1"]
            assert file[0].header["OBSERVER"] == "me" and file[1].data["a"].tolist() == [0, 1, 2, 3, 4]
            changed = [i for i in (2, 3) if not same_bits(file[i].data, old[i].data)]
            assert changed == [taken]
    assert "HDU 1 is not a picture" in mistake("infer", "in.fits[1]")
    assert "HDU 9 is not a picture" in mistake("infer", "in.fits[9]")


def test_a_cube_is_refused_with_the_number_of_its_planes(folder):
    fits.writeto("cube.fits", np.zeros((5, 20, 30), "float32"))
    assert "cube.fits: HDU 0 holds 5 planes" in mistake("infer", "cube.fits")


@pytest.mark.parametrize(
    "source, target", [("in.fits.fz", "out.fits"), ("in.fits", "out.fits.fz"), ("in.fit", "out.fz")]
)
def test_fits_is_packed_and_unpacked_by_the_name_of_the_output(source, target, infer):
    data = values_of("float32", 3, 21, 33)
    write_fits(source, data, fits.CompImageHDU if source.endswith("fz") else fits.PrimaryHDU)
    infer(source, "-o", target, kind="identity")
    with fits.open(target) as file:
        assert isinstance(file[1], fits.CompImageHDU) == target.endswith("fz")
        assert same_bits(file[1].data, data)
        assert file[1].header["CRVAL1"] == 10.68


def test_gzipped_fits_stays_gzipped(infer):
    data = values_of("uint16", 3, 21, 33)
    write_fits("in.fits.gz", data)
    infer("in.fits.gz", kind="identity")
    assert names() == ["in.fits.gz", "starless.fits.gz", "starry.fits.gz"]
    assert Path("starless.fits.gz").read_bytes()[:2] == b"\x1f\x8b"
    assert same_bits(fits.getdata("starless.fits.gz"), data)
    assert fits.getheader("starless.fits.gz")["HISTORY"][-1] == nox.HISTORY["starless"]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "float32", "float64"])
@pytest.mark.parametrize("channels", [1, 3])
def test_xisf_comes_out_as_it_was(dtype, channels, infer):
    XISF = pytest.importorskip("xisf").XISF
    pixels = values_of(dtype, 21, 33, channels)
    keywords = {"FITSKeywords": {"OBJECT": [{"value": "M 31", "comment": "what"}]}}
    XISF.write("in.xisf", pixels, image_metadata=keywords)
    infer("in.xisf", kind="identity")
    assert same_bits(XISF.read("starless.xisf"), pixels)
    assert XISF("starless.xisf").get_images_metadata()[0]["FITSKeywords"] == keywords["FITSKeywords"]


@pytest.mark.parametrize("size", [(21, 33), (121, 133)])
def test_floats_of_a_xisf_keep_their_bounds(size, infer):
    XISF = pytest.importorskip("xisf").XISF
    fits.writeto("in.fits", 65535 * values_of("float32", 3, *size))
    infer("in.fits", "-o", "first.xisf", kind="identity")
    bounds = XISF("first.xisf").get_images_metadata()[0]["bounds"]
    assert list(map(float, bounds.split(":"))) == [0, fits.getdata("in.fits").max()]
    infer("first.xisf", "-o", "second.xisf", kind="identity")
    assert XISF("second.xisf").get_images_metadata()[0]["bounds"] == bounds
    assert same_bits(XISF.read("second.xisf"), XISF.read("first.xisf"))


def test_a_xisf_with_alpha_is_refused_before_the_work(folder, monkeypatch):
    monkeypatch.setattr(nox, "xisf_package", lambda: None)
    write("in.png", noise(20, 30, 4))
    assert "out.xisf: this format cannot hold transparency" in mistake("infer", "in.png", "-o", "out.xisf")


def test_xisf_without_the_package_says_so(folder, monkeypatch):
    monkeypatch.setitem(nox.sys.modules, "xisf", None)
    Path("in.xisf").write_bytes(b"XISF0100" + bytes(20))
    assert "in.xisf: XISF files need a package: pip install xisf" in mistake("infer", "in.xisf")
    write("in.png", noise(20, 30, 3))
    assert "pip install xisf" in mistake("infer", "in.png", "-o", "out.xisf")


# --------------------------------------------------------------------------------------------------------------------
# Odd data
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (32, 32), (61, 83)])
@pytest.mark.parametrize(
    "extension, dtype", [(".png", "uint8"), (".png", "uint16"), (".tif", "uint32"), (".tif", "float32")]
)
def test_light_is_taken_from_each_pixel_exactly_once(size, extension, dtype, subtract):
    pixels = noise(*size, 3, dtype)
    write("in" + extension, pixels)
    subtract(0.25, "in" + extension, "--linear", "no")
    white = 1 if dtype == "float32" else np.iinfo(dtype).max
    expected = (pixels - 0.25 * white).clip(0)
    np.testing.assert_allclose(
        read("starless" + extension), expected, rtol=2e-7, atol=0.5 + 1e-7 * white if white > 1 else 1e-7
    )


@pytest.mark.parametrize("linear", ["yes", "no"])
def test_missing_pixels_and_those_out_of_range_stay_and_others_lose_their_light(linear, subtract):
    pixels = noise(30, 40, 3, "float32") * 50_000 + 100
    pixels[2, 3], pixels[4, 5], pixels[6, 7], pixels[8, 9] = np.nan, np.inf, -np.inf, -7
    tifffile.imwrite("in.tif", pixels, photometric="rgb")
    subtract(0.05, "in.tif", "--linear", linear)
    new = tifffile.imread("starless.tif")
    odd = ~np.isfinite(pixels) | (pixels < 0)
    assert same_bits(new[odd], pixels[odd])
    assert np.all(new[~odd] <= pixels[~odd]) and np.mean(new[~odd] < pixels[~odd]) > 0.5
    assert new[~odd].min() >= 0


@pytest.mark.parametrize("value", [0, 1, 0.3, 70_000])
@pytest.mark.parametrize("linear", ["yes", "no", "auto"])
def test_a_constant_picture_stays_finite(value, linear, subtract):
    tifffile.imwrite("in.tif", np.full((30, 40), value, "float32"), photometric="minisblack")
    subtract(0.01, "in.tif", "--linear", linear)
    assert np.all(np.isfinite(tifffile.imread("starless.tif")))


@pytest.mark.parametrize("linear", ["yes", "no"])
@pytest.mark.parametrize("levels, stays", [(0.9, True), (-0.9, True), (1.1, False)])
def test_light_below_a_grey_level_is_not_taken(levels, stays, linear, subtract):
    pixels = noise(30, 40, 3, "uint16") // 2 + 20000
    write("in.png", pixels)
    subtract(levels / 255, "in.png", "--linear", linear)
    assert np.array_equal(read("starless.png"), pixels) == stays


@pytest.mark.parametrize(
    "levels, taken", [(1.0, 0.0), (1.5, 0.375), (2.0, 1.0), (-2.0, -1.0), (3.0, 3.0), (40.0, 40.0)]
)
def test_faint_light_fades_in(levels, taken):
    light = np.zeros((5, 6, 3), np.float32)
    light[2, 3] = [0.5 * levels / 255, levels / 255, 0]  # the brightest channel tells
    found = nox.without_faint(light)
    np.testing.assert_allclose(found[2, 3] * 255, [taken / 2, taken, 0], atol=1e-4)
    assert not found[light == 0].any()


def test_no_light_is_taken_where_a_picture_is_transparent(subtract):
    pixels = noise(30, 40, 4, "uint16")
    pixels[5:20, 5:20, 3], pixels[20:, :, 3] = 0, 1
    write("in.png", pixels)
    subtract(0.25, "in.png")
    new = read("starless.png")
    assert same_bits(new[5:20, 5:20], pixels[5:20, 5:20])
    assert np.all(new[20:, :, :3] <= (pixels[20:, :, :3] * 1.0 - 0.249 * 65535).clip(0))
    assert same_bits(new[..., 3], pixels[..., 3])


@pytest.mark.parametrize("depth, dtype", [("8", "uint8"), ("16", "uint16"), ("32f", "float32"), ("keep", None)])
@pytest.mark.parametrize("given", ["uint8", "uint16", "uint32", "float64"])
def test_depth_changes_what_is_written(given, depth, dtype, infer):
    pixels = noise(20, 30, 3, given)
    tifffile.imwrite("in.tif", pixels, photometric="rgb")
    infer("in.tif", "--depth", depth, kind="identity")
    new = tifffile.imread("starless.tif")
    assert new.dtype == (dtype or given)
    white = {
        np.dtype(t): 1 if t.startswith("f") else np.iinfo(t).max
        for t in ("uint8", "uint16", "uint32", "float32", "float64")
    }
    steps = 0.5 / min(white[new.dtype], 1e9) if white[new.dtype] > 1 else 1e-7
    np.testing.assert_allclose(new / white[new.dtype], pixels / white[pixels.dtype], atol=steps * 1.001)


@pytest.mark.parametrize("target, dtype", [(".png", "uint16"), (".jpg", "uint8"), (".fits", "float64")])
def test_a_format_that_cannot_hold_the_depth_takes_the_nearest(target, dtype, infer):
    pixels = noise(20, 30, 3, "float64") * 1000
    tifffile.imwrite("in.tif", pixels, photometric="rgb")
    infer("in.tif", "-o", "out" + target, kind="identity")
    picture = nox.read_picture("out" + target)
    assert picture.pixels.dtype == dtype
    assert np.abs(picture.unit() - pixels / pixels.max()).mean() < (0.1 if target == ".jpg" else 1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Linear data
# --------------------------------------------------------------------------------------------------------------------


def linear_frame(height=60, width=80, channels=3):
    """A linear star-free float32 frame: sky at a hundredth of the range with a gradient and noise, one bright pixel."""
    rng = np.random.default_rng(3)
    x = np.linspace(0, 0.004, width)[None, :, None]
    frame = 0.01 * np.arange(1, channels + 1) + x + 0.001 * rng.standard_normal((height, width, channels))
    frame[0, 0] = 1
    return frame.astype("float32")


def test_the_midtones_formula_is_that_of_generatestars():
    x = np.linspace(0, 1, 101)
    for m in 0.001, 0.2, 0.5, 0.9:
        np.testing.assert_array_equal(nox.midtones_transfer(x, m), GenerateStars.midtones_transfer(x, m))


@pytest.mark.parametrize("linked", [False, True])
def test_the_stretch_has_the_shadows_and_the_mean_asked_for(linked):
    image = linear_frame()
    stretch = nox.fit_stretch(nox.Picture(image), -0.5, 0.3, linked)
    values = image.reshape(-1, 1) if linked else image.reshape(-1, 3)
    median = np.median(values, axis=0)
    deviation = scipy.stats.median_abs_deviation(values, scale="normal")
    np.testing.assert_allclose(stretch.shadows, median - 0.5 * deviation, rtol=1e-6)
    shown = stretch.forward(image.astype(float))
    means = shown.mean() if linked else shown.mean(axis=(0, 1))
    np.testing.assert_allclose(means, 0.3, atol=1e-5)
    assert len(np.unique(stretch.midtones)) == (1 if linked else 3)


@pytest.mark.parametrize("level", [0, 0.001])
def test_the_black_point_is_negative_only_where_the_sky_is(level):
    frame = 0.001 * np.abs(noise(60, 80, 3, "float32") - 0.5) - np.float32(level)
    frame[5, 5] = -0.2  # one odd pixel is no sky
    stretch = nox.fit_stretch(nox.Picture(frame), -2.8, 0.1875, False)
    assert np.all(stretch.shadows < 0) if level else np.all(stretch.shadows == 0)


def test_the_stretch_never_darkens_even_where_most_of_a_channel_is_white():
    frame = np.random.default_rng(0).uniform(0.1, 1.4, (64, 64, 3)).clip(max=1)
    stretch = nox.fit_stretch(nox.Picture(frame), -2.8, 0.1875, False)
    assert (stretch.forward(frame) >= frame - stretch.shadows - 1e-6).all()


def test_a_sky_without_its_level_loses_light_below_zero_too(subtract):
    frame = linear_frame() - np.float32([0.012, 0.022, 0.032])
    tifffile.imwrite("in.tif", frame, photometric="rgb")
    subtract(0.02, "in.tif")
    new = tifffile.imread("starless.tif")
    shadows = nox.fit_stretch(nox.Picture(frame), -2.8, 0.1875, False).shadows
    kept, negative = frame > shadows, frame < 0
    assert same_bits(new[~kept], frame[~kept])
    assert (
        np.all(new[kept] < frame[kept])
        and new[kept].min() >= np.float32(shadows.min())
        and (kept & negative).mean() > 0.3
    )


def test_the_black_border_of_registered_pictures_has_no_say_in_the_stretch():
    frame = linear_frame()
    bordered = np.pad(frame, ((40, 40), (40, 40), (0, 0)))
    plain, other = (nox.fit_stretch(nox.Picture(image), -2.8, 0.1875, False) for image in (frame, bordered))
    np.testing.assert_allclose(other.midtones, plain.midtones, rtol=1e-6)


def test_a_channel_that_is_missing_has_no_say_in_the_stretch():
    pixels = starry_sky().astype("float32")
    whole = nox.fit_stretch(nox.Picture(pixels), -2.8, 0.19, linked=False)
    pixels[..., 2] = np.nan
    stretch = nox.fit_stretch(nox.Picture(pixels), -2.8, 0.19, linked=False)
    np.testing.assert_array_equal(stretch.midtones[:2], whole.midtones[:2])


def test_the_stretch_and_its_inverse_are_exact():
    stretch = nox.fit_stretch(nox.Picture(linear_frame()), -2.8, 0.1875, False)
    x = np.linspace(0, 1, 50_000)[:, None] * np.ones(3)
    kept = stretch.keeps(x)
    assert 0.95 < kept.mean() < 1
    np.testing.assert_allclose(stretch.inverse(stretch.forward(x))[kept], x[kept], atol=1e-12)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_linear_data_lose_what_the_network_takes_from_their_stretched_picture(dtype, subtract):
    frame = linear_frame()
    pixels = frame if dtype == "float32" else np.rint(frame * 65535).astype("uint16")
    tifffile.imwrite("in.tif", pixels, photometric="rgb")
    subtract(0.02, "in.tif", "--shadows", -0.05)
    new = tifffile.imread("starless.tif")
    x = pixels / (1 if dtype == "float32" else 65535.0)
    stretch = nox.fit_stretch(nox.Picture(x.astype("float32")), -0.05, 0.1875, False)
    clipped = x <= stretch.shadows
    assert same_bits(new[clipped], pixels[clipped]) and 0.05 < clipped.mean() < 0.5
    shown = stretch.forward(x)
    light = np.minimum(shown, 0.02)
    expected = stretch.inverse(shown - light) * (1 if dtype == "float32" else 65535)
    np.testing.assert_allclose(new[~clipped], expected[~clipped], atol=1e-6 if dtype == "float32" else 0.5001)


@pytest.mark.parametrize("channels", [1, 3])
def test_of_linear_data_only_what_stands_out_of_their_noise_is_taken(channels):
    rng = np.random.default_rng(8)
    y, x = np.mgrid[:200, :90]
    star = 900 * np.exp(-((x - 30) ** 2 + (y - 63.5) ** 2) / 6)[..., None]  # over the edge between two bands of rows
    picture = nox.Picture(np.rint(3000 + star + 30 * rng.standard_normal((200, 90, channels))).astype("uint16"))
    stretch = nox.fit_stretch(picture, -3, 0.1875, False)
    removed = np.where(star > 2, star, 0) + np.zeros(channels)
    grains = [(10, 10), (63, 60), (64, 80), (127, 20), (199, 5)]
    for row, column in grains:
        removed[row : row + 2, column : column + 2, 0] = 40
    seen = stretch.forward(picture.unit())
    light = (seen - stretch.forward(picture.unit() - removed / 65535)).astype("float32")
    found = [
        (rows, part.copy()) for rows, part in nox.significant(((r, light[r]) for r in nox.bands(200)), picture, stretch)
    ]
    assert [rows.start for rows, _ in found[1:]] == [rows.stop for rows, _ in found[:-1]] and found[-1][0].stop == 200
    stays = np.concatenate([part for _, part in found])
    assert np.array_equal(stays, np.where(star > 2, light, 0))


@pytest.mark.parametrize("linear, stretched", [("auto", True), ("yes", True), ("no", False)])
def test_auto_takes_linear_data_for_linear(linear, stretched, subtract):
    tifffile.imwrite("in.tif", linear_frame(), photometric="rgb")
    subtract(0.5, "in.tif", "--linear", linear)
    assert (tifffile.imread("starless.tif")[..., 2].min() > 0.01) == stretched  # what is left is the stretch's shadows


def crowded_frame():
    """A linear float32 frame on a pedestal, full of stars: many faint ones for each bright one."""
    rng = np.random.default_rng(4)
    frame = 0.15 + 0.002 * rng.standard_normal((300, 400, 3)) + 0.005 * rng.pareto(1, (300, 400, 1))
    return frame.clip(0, 1).astype("float32")


@pytest.mark.parametrize("make", [linear_frame, crowded_frame])
@pytest.mark.parametrize("dtype, white", [("uint16", 65535), ("float32", 1), ("float32", 20_000)])
@pytest.mark.parametrize("shadows", [-0.75, -2.8])
def test_auto_tells_linear_data_from_stretched(make, dtype, white, shadows):
    frame = make()
    shown = nox.fit_stretch(nox.Picture(frame), shadows, 0.1875, False).forward(frame.astype(float))
    pictures = [nox.Picture((image * white).astype(dtype)) for image in (frame, shown)]
    assert [nox.looks_linear(picture) for picture in pictures] == [True, False]


def test_auto_takes_8_bits_for_stretched():
    assert not nox.looks_linear(nox.Picture((linear_frame() * 255).astype("uint8")))


# --------------------------------------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["subtract", "unscreen"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("linear", ["no", "yes"])
def test_stars_and_starless_make_the_picture_again(mode, dtype, linear, infer):
    sky = starry_sky()
    pixels = sky.astype(dtype) if dtype == "float32" else np.rint(sky * np.iinfo(dtype).max).astype(dtype)
    tifffile.imwrite("in.tif", pixels, photometric="rgb")
    infer("in.tif", "-o", "out.tif", "--stars", "stars.tif", "--star-mode", mode, "--linear", linear)
    starless, stars = tifffile.imread("out.tif"), tifffile.imread("stars.tif")
    assert starless.dtype == stars.dtype == pixels.dtype
    assert stars.max() > 0
    if mode == "subtract":
        assert same_bits(starless + stars, pixels)
        return
    white = 1.0 if dtype == "float32" else np.iinfo(dtype).max
    again = white * (1 - (1 - starless / white) * (1 - stars / white))
    if dtype == "float32":
        np.testing.assert_allclose(again, pixels, atol=1e-7)
    else:
        assert same_bits(np.rint(again).astype(dtype), pixels)


def test_stars_and_starless_of_another_depth_make_the_picture_of_that_depth_again(infer):
    tifffile.imwrite("in.tif", starry_sky().astype("float32"), photometric="rgb")
    infer("in.tif", "-o", "out.png", "--stars", "stars.png", "--depth", 16)
    again = read("out.png") + read("stars.png")
    assert same_bits(again[..., ::-1], np.rint(starry_sky().astype("float32").astype(float) * 65535).astype("uint16"))


def test_the_mask_is_white_where_much_light_was_taken(subtract):
    write("in.png", np.full((30, 40, 3), 200, "uint8"))
    for light, gray in (0.0, 0), (0.05, 128), (0.3, 255):
        subtract(light, "in.png", "-o", "out.png", "--mask", "mask.png", "--overwrite")
        assert np.all(np.abs(read("mask.png").astype(int) - gray) <= 1) and read("mask.png").shape == (30, 40, 1)


def test_strength_is_the_share_of_light_that_is_taken(subtract):
    write("in.png", np.full((30, 40, 3), 200, "uint8"))
    subtract(100 / 255, "in.png", "--strength", 0.3)
    assert np.all(read("starless.png") == 170)


def test_what_is_white_in_the_excluded_stays(subtract):
    write("in.png", np.full((30, 40, 3), 200, "uint8"))
    mask = np.zeros((30, 40, 1), "uint8")
    mask[:10], mask[10:20] = 255, 102
    write("keep.png", mask)
    subtract(100 / 255, "in.png", "--exclude", "keep.png")
    new = read("starless.png")[:, 0, 0]
    assert new.tolist() == [200] * 10 + [140] * 10 + [100] * 10
    write("small.png", mask[:9])
    assert "small.png: has 40x9 pixels, the picture 40x30" in mistake("infer", "in.png", "--exclude", "small.png")


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (64, 64)])
@pytest.mark.parametrize("channels", [1, 3])
def test_upsampling_takes_the_same_light_and_keeps_the_size(size, channels, subtract):
    write("in.png", np.full((*size, channels), 200, "uint8"))
    subtract(100 / 255, "in.png", "--upsample")
    assert np.all(read("starless.png") == 100) and read("starless.png").shape == (*size, channels)


def test_the_preview_has_before_on_the_left_and_after_on_the_right(subtract):
    write("in.png", np.full((30, 40, 3), 200, "uint8"))
    subtract(100 / 255, "in.png", "-o", "out.png", "--preview", "both.png")
    both = read("both.png")
    assert both.shape == (30, 80, 3) and np.all(both[:, :40] == 200) and np.all(both[:, 40:] == 100)


# --------------------------------------------------------------------------------------------------------------------
# Several pictures
# --------------------------------------------------------------------------------------------------------------------


def test_several_pictures_go_into_a_folder_and_the_weights_load_once(infer, folder, monkeypatch):
    (folder / "Bilder ä").mkdir()
    for name in "a b.png", "星.tif", "c.jpg":
        write(folder / "Bilder ä" / name, noise(20, 30, 3))
    write(folder / "one.png", noise(20, 30, 3))
    loads = []
    monkeypatch.setattr(nox, "load_generator", lambda path: loads.append(path) or load_once(path))
    infer("Bilder ä", "*.png", "-o", "out/deep", "--mask", "masks")
    assert names("out/deep") == ["a b_starless.png", "c_starless.jpg", "one_starless.png", "星_starless.tif"]
    assert names("masks") == ["a b_mask.png", "c_mask.jpg", "one_mask.png", "星_mask.tif"]
    assert len(loads) == 1


def test_pictures_may_stand_on_both_sides_of_an_option(infer, folder):
    for name in "abc":
        write(folder / f"{name}.png", noise(20, 30, 3))
    infer("a.png", "-o", "out", "b.png", "--mask", "masks", "c.png")
    assert names("out") == ["a_starless.png", "b_starless.png", "c_starless.png"]


def test_a_folder_taken_again_leaves_out_what_was_made_of_it(infer, folder):
    (folder / "in").mkdir()
    write(folder / "in" / "a.png", noise(20, 30, 3))
    for _ in range(2):
        infer("in", "-o", "in", "--stars", "in", "--overwrite")
        assert names("in") == ["a.png", "a_starless.png", "a_stars.png"]


def test_a_wildcard_taken_again_leaves_out_what_was_made_of_it(infer, folder):
    for name in "ab":
        write(f"{name}.png", noise(20, 30, 3))
    for _ in range(2):
        infer("*.png", "--overwrite")
        assert names() == ["a.png", "a_starless.png", "b.png", "b_starless.png"]


def test_a_name_may_hold_the_extension_of_another_format(infer, folder):
    Path("in").mkdir()
    write("in/m31.fits.png", noise(20, 30, 3))
    infer("in", "-o", "out")
    assert names("out") == ["m31.fits_starless.png"]


def test_several_pictures_of_one_file_do_not_get_one_name(infer, folder):
    pictures = [fits.ImageHDU(values_of("float32", 21, 33 + i)) for i in range(2)]
    fits.HDUList([fits.PrimaryHDU(), *pictures]).writeto("in.fits")
    infer("in.fits[1]", "in.fits[2]", "-o", "out")
    assert names("out") == ["in_1_starless.fits", "in_2_starless.fits"]


def test_without_an_extension_results_have_that_of_their_format(infer, folder):
    write_fits("m31", noise(20, 30, 1, "uint16")[..., 0])
    infer("m31")
    infer("m31", "-o", "out")
    assert names() == ["m31", "out.fits", "starless.fits", "starry.fits"]


def test_a_picture_that_cannot_be_read_is_told_and_the_others_are_done(infer, folder, capsys):
    write("a.png", noise(20, 30, 3))
    Path("b.png").write_text("no picture")
    write("c.png", noise(20, 30, 3))
    with pytest.raises(SystemExit, match="1 of 3 pictures failed"):
        infer("a.png", "b.png", "c.png", "-o", "out")
    assert names("out") == ["a_starless.png", "c_starless.png"]
    assert re.search(r"^nox.py: b.png: not a picture", capsys.readouterr().err, re.MULTILINE)


def test_a_folder_without_pictures_is_told_and_the_others_are_done(infer, folder, capsys):
    (folder / "none").mkdir()
    write("c.png", noise(20, 30, 3))
    with pytest.raises(SystemExit, match="1 of 2 pictures failed"):
        infer("none", "c.png", "-o", "out")
    assert names("out") == ["c_starless.png"]
    assert "none: no pictures there" in capsys.readouterr().err


def test_two_pictures_of_one_name_do_not_replace_each_other(infer, folder, capsys):
    for place in "x", "y":
        (folder / place).mkdir()
        write(folder / place / "a.png", noise(20, 30, 3))
    with pytest.raises(SystemExit, match="1 of 2 pictures failed"):
        infer("x/a.png", "y/a.png", "-o", "out", "--overwrite")
    assert "is another output of this call" in capsys.readouterr().err


def test_one_file_for_two_outputs_is_refused(infer, folder):
    write("in.png", noise(20, 30, 3))
    assert "out.png: is another output of this call" in mistake(
        "infer", "in.png", "-o", "out.png", "--stars", "out.png"
    )
    assert names(folder) == ["in.png"]


@pytest.mark.parametrize("name", ["nothing*.png", "empty"])
def test_a_wildcard_or_folder_without_pictures_is_told(name, folder):
    (folder / "empty").mkdir()
    assert f"{name}: no pictures there" in mistake("infer", name)


# --------------------------------------------------------------------------------------------------------------------
# Files that are odd, and files that must stay
# --------------------------------------------------------------------------------------------------------------------


def test_cards_against_the_fits_standard_are_written_as_text(infer):
    write_fits("in.fits", noise(20, 30, 1, "uint16")[..., 0])
    data = Path("in.fits").read_bytes()
    bad = b"CCD-TEMP= NaN".ljust(80)
    assert b"END".ljust(80) in data
    Path("in.fits").write_bytes(data.replace(b"OBJECT  = 'M 31    '".ljust(80), bad, 1))
    infer("in.fits", kind="identity")
    assert fits.getheader("starless.fits")["CCD-TEMP"] == "NaN"


def test_checksums_of_the_pixels_before_are_left_out(infer):
    write_fits("in.fits", noise(20, 30, 1, "uint16")[..., 0])
    with fits.open("in.fits") as file:
        file.writeto("summed.fits", checksum=True)
    infer("summed.fits")
    with warnings.catch_warnings(action="error"), fits.open("starless.fits", checksum=True) as file:
        file[0].data.sum()
    assert "DATASUM" in fits.getheader("summed.fits")


def test_missing_pixels_of_unsigned_fits_integers_stay(subtract):
    pixels = np.full((20, 30), 40000, np.uint16)
    pixels[3:9, 4:7] = 32868  # stored as 100
    fits.PrimaryHDU(pixels).writeto("in.fits")
    with fits.open("in.fits", mode="update", do_not_scale_image_data=True) as file:
        file[0].header["BLANK"] = 100
    subtract(0.25, "in.fits", "--linear", "no")
    new, missing = nox.read_picture("starless.fits").pixels[::-1, :, 0], pixels == 32868
    assert missing.sum() == 18 and (new[missing] == 32868).all() and (new[~missing] < 30000).all()


def with_missing_pixels(name, kind=fits.PrimaryHDU):
    """Raw 16-bit integers of RGB in a FITS file, whose upper rows are missing in red alone."""
    raw = np.random.default_rng(3).integers(100, 20000, (3, 20, 30), np.int16)
    raw[0, 15:] = -32768
    hdu = kind(raw)
    hdu.header["BLANK"] = -32768
    hdu.writeto(name)
    return raw


def test_missing_pixels_of_packed_fits_integers_stay(infer):
    raw = with_missing_pixels("in.fits.fz", fits.CompImageHDU)
    infer("in.fits.fz", kind="identity")
    with fits.open("starless.fits.fz", do_not_scale_image_data=True) as file:
        assert file[1].header["BLANK"] == -32768 and same_bits(file[1].data, raw)


def test_missing_pixels_are_not_a_number_in_floats(infer):
    missing = with_missing_pixels("in.fits") == -32768
    infer("in.fits", "--depth", "32f", "-o", "out.fits", kind="identity")
    with warnings.catch_warnings(action="error"):
        np.testing.assert_array_equal(np.isnan(fits.getdata("out.fits")), missing)
    assert "BLANK" not in fits.getheader("out.fits")


def test_the_number_of_a_missing_pixel_is_not_white(folder):
    raw = np.arange(600, dtype=np.int16).reshape(20, 30)
    raw[0] = 32767
    write_scaled("in.fits", raw, BSCALE=2.0, BZERO=10.0, BLANK=32767)
    assert nox.read_picture("in.fits").white == 599


def test_where_a_colour_is_missing_gray_is_missing(infer):
    missing = (with_missing_pixels("in.fits") == -32768).any(axis=0)
    infer("in.fits", "--n-channels", 1, "-o", "out.fits", kind="identity")
    new = fits.getdata("out.fits", ignore_blank=True, do_not_scale_image_data=True)
    np.testing.assert_array_equal(new == -32768, missing)


def test_metadata_of_imagej_are_no_obstacle(infer):
    pixels = noise(20, 30, 1, "uint16")
    tifffile.imwrite("in.tif", pixels[..., 0], imagej=True, metadata={"Info": "a note", "Labels": ["one"]})
    infer("in.tif", kind="identity")
    assert np.array_equal(tifffile.imread("starless.tif"), pixels[..., 0])


def test_a_reduced_picture_is_not_taken_for_the_whole(folder):
    with tifffile.TiffWriter("in.tif") as tif:
        tif.write(noise(8, 8, 3), photometric="rgb", subfiletype=1)
        tif.write(noise(90, 90, 3), photometric="rgb")
    assert "in.tif: begins with a reduced picture" in mistake("infer", "in.tif")
    assert names() == ["in.tif"]


def test_a_picture_too_large_for_a_format_is_told_and_nothing_left(infer, folder):
    tifffile.imwrite("in.tif", np.zeros((1, 65600), np.uint8))
    with pytest.raises(SystemExit, match="out.jpg: cannot be written"):
        infer("in.tif", "-o", "out.jpg", kind="identity")
    assert names() == ["in.tif"]


def test_negative_pixels_stay_even_where_light_is_filled_in(subtract):
    pixels = np.full((20, 30), 0.5, np.float32)
    pixels[5:9] = -0.01
    tifffile.imwrite("in.tif", pixels)
    subtract(-0.25, "in.tif", "--linear", "no")
    new = tifffile.imread("starless.tif")
    assert same_bits(new[5:9], pixels[5:9]) and (new[:5] > 0.7).all()


def test_stars_of_integers_without_a_black_are_refused(infer, folder):
    write_scaled("in.fits", np.arange(600, dtype=np.int16).reshape(20, 30), BSCALE=0.001, BZERO=50)
    with pytest.raises(SystemExit, match="stars.fits: the integers of this picture have none for black"):
        infer("in.fits", "-o", "out.fits", "--stars", "stars.fits")
    assert names() == ["in.fits"]
    infer("in.fits", "-o", "out.fits", "--stars", "stars.fits", "--depth", "32f")
    assert names() == ["in.fits", "out.fits", "stars.fits"]


def test_a_colour_picture_without_colour_stays_so(infer):
    pixels = write("in.png", noise(40, 50, 1).repeat(3, axis=2))
    infer("in.png")
    new = read("starless.png")
    assert not np.array_equal(new, read(pixels)) and not np.ptp(new, axis=2).any()


def test_one_picture_never_replaces_another(infer, folder, capsys):
    first, second = write("b.png", noise(20, 30, 3)), write("b_starless.png", noise(30, 20, 3))
    before = second.read_bytes()
    with pytest.raises(SystemExit):
        infer(first, second, "-o", ".", "--overwrite")
    assert "b_starless.png: is one of the pictures" in capsys.readouterr().err
    assert second.read_bytes() == before


def test_the_copy_of_the_picture_replaces_no_other_output(infer, folder):
    write("a.png", noise(20, 30, 3))
    with pytest.raises(SystemExit, match="starry.png: is the copy"):
        infer("a.png", "--stars", "starry.png")
    assert names() == ["a.png"]


@pytest.mark.parametrize(
    "name, flags", [("starless.png", []), ("starry.png", []), ("out.png", ["-o", "out.png", "--overwrite"])]
)
def test_the_mask_of_what_stays_is_never_overwritten(name, flags, infer):
    write("a.png", noise(20, 30, 3))
    before = Path(write(name, noise(20, 30, 1))).read_bytes()
    with pytest.raises(SystemExit, match=f"{name}: is what --exclude names"):
        infer("a.png", "--exclude", name, *flags)
    assert Path(name).read_bytes() == before and names() == sorted(["a.png", name])


def test_outputs_without_a_picture_are_refused(folder, capsys):
    with pytest.raises(SystemExit):
        run("infer", "-o", "out.tif")
    assert "--output needs a picture" in capsys.readouterr().err
    assert names() == []


def test_a_folder_is_done_with_pictures_that_only_look_like_made_ones(infer, folder):
    Path("in").mkdir()
    for name in "M31", "M31_starless", "M42_stars":
        write(f"in/{name}.png", noise(20, 30, 3))
    infer("in", "-o", "out")
    assert names("out") == ["M31_starless.png", "M42_stars_starless.png"]


def test_a_path_that_cannot_be_looked_at_is_told(folder):
    assert "File name too long" in mistake("infer", "x" * 300 + ".png")
