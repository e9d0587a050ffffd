"""Ways to change images of digits that leave them readable; corruptions.py says how strongly.

A function takes images, float (n, 28, 28) in [0, 1] and light on black, a strength in the unit that
its docstring names, and a random generator. It returns the changed images, which may leave [0, 1].
Each image draws its own amounts, and a strength between half of the one given and all of it.
"""

import io

import numpy as np
from PIL import Image
from scipy import ndimage

Images = np.ndarray
Rng = np.random.Generator

SIDE = 28
RADIUS = SIDE / 2 - 0.5
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE] - RADIUS  # of each pixel, from the middle of the image
AWAY = np.stack([ROWS, COLUMNS]) + 0.5  # of each pixel, from pixel (13, 13)
FINE = 3  # strokes are measured on a grid so many times as fine
BAYER = np.array([(0, 8, 2, 10), (12, 4, 14, 6), (3, 11, 1, 9), (15, 7, 13, 5)]) / 16 + 1 / 32


# ------------------------------------------------------------------------------------------ light


def low_contrast(images: Images, strength: float, rng: Rng) -> Images:
    """Light grey on grey: `strength` is the share of the contrast that is lost."""
    lost = _drawn(images, strength, rng)
    return lost * _uniform(images, 0, 1, rng) + (1 - lost) * images


def dark_on_light(images: Images, strength: float, rng: Rng) -> Images:
    """Ink on paper: `strength` is the share of the contrast that is lost."""
    return 1 - low_contrast(images, strength, rng)


def side_light(images: Images, strength: float, rng: Rng) -> Images:
    """Light from one side, `strength` at its edge."""
    return _lit(images, _drawn(images, strength, rng) * _slope(images, rng))


def vignette(images: Images, strength: float, rng: Rng) -> Images:
    """Light behind the digit, `strength` in the middle and none in the corners."""
    distance = (ROWS**2 + COLUMNS**2) / (2 * RADIUS**2)
    return _lit(images, _drawn(images, strength, rng) * (1 - distance))


def gamma(images: Images, strength: float, rng: Rng) -> Images:
    """Grey on grey, then a power of up to exp(`strength`), or its inverse."""
    level = _drawn(images, strength, rng)
    base = 0.2 * level / max(strength, 1)
    return (base + (1 - 1.5 * base) * images) ** np.exp(level * _sign(images, rng))


def part_inverted(images: Images, strength: float, rng: Rng) -> Images:
    """Dark on light on one side of a straight line; `strength` 1 inverts all the light there."""
    part = np.clip(_from_lines(images, 1, 6, rng)[:, 0] + 0.5, 0, 1)
    level = strength * _uniform(images, 0.8, 1, rng)
    return images + part * level * (1 - 2 * images)


def blotches(images: Images, strength: float, rng: Rng) -> Images:
    """Clouds behind the digit, where they are brightest `strength`."""
    clouds = np.clip(0.5 + 0.6 * _clouds(images, 3.5, rng), 0, 1)
    return _lit(images, _drawn(images, strength, rng) * clouds)


def blinds(images: Images, strength: float, rng: Rng) -> Images:
    """Soft stripes of light, as through a blind, `strength` in their middles."""
    distance = _from_lines(images, 1, 6, rng)[:, 0]
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * distance / _uniform(images, 6, 14, rng))
    return _lit(images, _drawn(images, strength, rng) * wave)


# ------------------------------------------------------------------------------------------ noise


def gaussian_noise(images: Images, strength: float, rng: Rng) -> Images:
    """Independent normal noise with a standard deviation of `strength`."""
    return images + _drawn(images, strength, rng) * rng.normal(size=images.shape)


def speckle(images: Images, strength: float, rng: Rng) -> Images:
    """Noise with a standard deviation of `strength` times the light, which is nowhere 0."""
    level = _drawn(images, strength, rng)
    return _lit(images, 0.35 * level) * (1 + level * rng.normal(size=images.shape))


def salt_and_pepper(images: Images, strength: float, rng: Rng) -> Images:
    """A share `strength` of the pixels is white or black."""
    hit = rng.random(images.shape) < _drawn(images, strength, rng)
    return np.where(hit, rng.integers(2, size=images.shape), images)


def grain(images: Images, strength: float, rng: Rng) -> Images:
    """Noise in grains and fibres of some pixels, with a standard deviation of `strength`."""
    sizes = (0.5, 1.6), (1.6, 0.5), (0.9, 0.9)  # lying, upright, round
    noises = np.stack([_clouds(images, size, rng) for size in sizes])
    noise = noises[rng.integers(3, size=len(images)), np.arange(len(images))]
    return images + _drawn(images, strength, rng) * noise


# ------------------------------------------------------------------------------------------- blur


def defocus(images: Images, strength: float, rng: Rng) -> Images:
    """Every point becomes a disc with a radius of `strength` pixels."""
    radius = _drawn(images, strength, rng)
    return _convolve(images, np.clip(radius + 0.5 - np.hypot(*AWAY), 0, 1))


def motion(images: Images, strength: float, rng: Rng) -> Images:
    """Every point becomes a line of `strength` pixels, in any direction."""
    angle = _uniform(images, 0, np.pi, rng)
    rows, columns = AWAY
    along = np.abs(np.cos(angle) * columns + np.sin(angle) * rows)
    beside = np.abs(np.cos(angle) * rows - np.sin(angle) * columns)
    inside = np.clip(_drawn(images, strength, rng) / 2 + 0.5 - along, 0, 1)
    return _convolve(images, inside * np.clip(1 - beside, 0, 1))


def ghost(images: Images, strength: float, rng: Rng) -> Images:
    """The image again, `strength` as bright, some pixels away."""
    return np.maximum(images, _drawn(images, strength, rng) * shifted(images, 6, rng))


def coarse(images: Images, strength: float, rng: Rng) -> Images:
    """Squares of up to `strength` pixels in one shade."""
    cells = np.rint(SIDE / np.maximum(_drawn(images, strength, rng), 1)).astype(int).ravel()
    box, nearest = Image.Resampling.BOX, Image.Resampling.NEAREST

    def enlarged(image: Image.Image, i: int) -> Image.Image:
        return image.resize((cells[i], cells[i]), box).resize((SIDE, SIDE), nearest)

    return _with_pillow(images, enlarged)


# ---------------------------------------------------------------------------------------- strokes


def thin(images: Images, strength: float, rng: Rng) -> Images:
    """A fine pen: the share `strength` of the stroke's width is missing."""
    depth = np.maximum(_depth(images), 0)
    crest = ndimage.maximum_filter(depth, (1, 4 * FINE + 1, 4 * FINE + 1))
    kept = depth > _drawn(images, strength, rng) * crest
    return np.minimum(images, 2 * _coarsened(kept))


def thick(images: Images, strength: float, rng: Rng) -> Images:
    """A broad pen: `strength` more pixels on each side of the stroke."""
    grown = np.clip(0.5 + _drawn(images, strength, rng) + _depth(images), 0, 1)
    return np.maximum(images, _coarsened(grown))


def outline(images: Images, strength: float, rng: Rng) -> Images:
    """The stroke's contour; `strength` of the light inside is gone."""
    contour = _coarsened(np.clip(1.2 - np.abs(_depth(images) + 0.7), 0, 1))
    level = strength * _uniform(images, 0.8, 1, rng)
    return images + level * (contour - images)


def broken(images: Images, strength: float, rng: Rng) -> Images:
    """Gaps with a radius of `strength` pixels in the stroke."""
    weight = np.log(np.maximum(images, 1e-9)).reshape(len(images), -1)
    # The largest of weights with Gumbel noise are places drawn in proportion to the light.
    places = np.argsort(weight + rng.gumbel(size=weight.shape), axis=1)[:, -4:]
    gaps = _discs(places // SIDE - RADIUS, places % SIDE - RADIUS, _drawn(images, strength, rng))
    return images * (1 - gaps)


# --------------------------------------------------------------------------------------- geometry


def rotated(images: Images, strength: float, rng: Rng) -> Images:
    """Turned by `strength` degrees to either side."""
    angle = np.deg2rad(_drawn(images, strength, rng)) * _sign(images, rng)
    rows, columns = np.cos(angle) * ROWS, np.cos(angle) * COLUMNS
    return _resample(images, rows + np.sin(angle) * COLUMNS, columns - np.sin(angle) * ROWS)


def perspective(images: Images, strength: float, rng: Rng) -> Images:
    """Seen at a slant: one edge 1 + `strength` times as large, the other 1 - `strength`."""
    slope = 2 * _slope(images, rng) - 1
    depth = 1 + _drawn(images, strength, rng) * slope
    return _resample(images, ROWS / depth, COLUMNS / depth)


def small(images: Images, strength: float, rng: Rng) -> Images:
    """Smaller by the share `strength`, anywhere in the image."""
    sides = np.rint(SIDE * (1 - _drawn(images, strength, rng))).astype(int).ravel()
    corners = rng.random((len(images), 2))

    def place(image: Image.Image, i: int) -> Image.Image:
        canvas = Image.new("F", (SIDE, SIDE))
        left, top = np.floor(corners[i] * (SIDE - sides[i] + 1)).astype(int)
        canvas.paste(image.resize((sides[i], sides[i]), Image.Resampling.BILINEAR), (left, top))
        return canvas

    return _with_pillow(images, place)


def wave(images: Images, strength: float, rng: Rng) -> Images:
    """Rows and columns move to and fro by `strength` pixels."""
    height = _drawn(images, strength, rng) * _sign(images, rng)
    length, phase = _uniform(images, 12, 26, rng), _uniform(images, 0, 2 * np.pi, rng)
    upright = _uniform(images, 0, 1, rng) < 0.5
    bend = height * np.sin(2 * np.pi * np.where(upright, ROWS, COLUMNS) / length + phase)
    return _resample(images, ROWS + bend * ~upright, COLUMNS + bend * upright)


def shifted(images: Images, strength: float, rng: Rng) -> Images:
    """Moved by `strength` pixels in any direction."""
    angle, distance = _uniform(images, 0, 2 * np.pi, rng), _drawn(images, strength, rng)
    return _resample(images, ROWS + distance * np.sin(angle), COLUMNS + distance * np.cos(angle))


def lens(images: Images, strength: float, rng: Rng) -> Images:
    """The middle enlarged by 1 + `strength`, or shrunk by half as much; the rim stays."""
    distance = (ROWS**2 + COLUMNS**2) / RADIUS**2
    level = _drawn(images, strength, rng)
    ball = _uniform(images, 0, 1, rng) < 0.5
    rim = 1 + level * (1 - np.minimum(distance, 1)) / 2
    factor = np.where(ball, (1 + level * distance) / (1 + level), rim)
    return _resample(images, ROWS * factor, COLUMNS * factor)


# ------------------------------------------------------------------------------------------ marks


def lines(images: Images, strength: float, rng: Rng) -> Images:
    """Three straight lines, `strength` as bright as the digit."""
    pen = np.clip(1.1 - np.abs(_from_lines(images, 3, 12, rng)), 0, 1).max(axis=1)
    return np.maximum(images, _drawn(images, strength, rng) * pen)


def dots(images: Images, strength: float, rng: Rng) -> Images:
    """Spots all over the image, `strength` as bright as the digit."""
    shape = len(images), 14
    places = rng.uniform(-RADIUS, RADIUS, (2, *shape))
    spots = _discs(*places, rng.uniform(1, 2.1, (*shape, 1)))
    return np.maximum(images, _drawn(images, strength, rng) * spots)


def creases(images: Images, strength: float, rng: Rng) -> Images:
    """Folds of a grey sheet, lighter on one side and darker on the other by `strength`."""
    level = _drawn(images, strength, rng)
    distance = _from_lines(images, 2, 10, rng)
    folds = (distance / 1.2 * np.exp(0.5 - (distance / 1.2) ** 2 / 2)).sum(axis=1)
    sheet = 0.4 * level
    return sheet + (1 - 1.5 * sheet) * images + level * folds


def frame(images: Images, strength: float, rng: Rng) -> Images:
    """A box around the digit, `strength` as bright."""
    sides = rng.uniform(8, 13.5, (len(images), 4, 1, 1))
    outside = (np.stack([ROWS, -ROWS, COLUMNS, -COLUMNS]) - sides).max(axis=1)  # of the box
    box = np.clip(_uniform(images, 0.9, 1.4, rng) - np.abs(outside), 0, 1)
    return np.maximum(images, _drawn(images, strength, rng) * box)


def second_digit(images: Images, strength: float, rng: Rng) -> Images:
    """Another digit behind, `strength` as bright."""
    other = shifted(images[rng.permutation(len(images))], 8, rng)
    return np.maximum(images, _drawn(images, strength, rng) * other)


def squared_paper(images: Images, strength: float, rng: Rng) -> Images:
    """Printed lines in both directions, `strength` as bright as the digit."""
    spacing, start = _uniform(images, 4, 8, rng), rng.uniform(0, 8, (2, len(images), 1, 1))
    distances = np.abs((np.stack([ROWS, COLUMNS])[:, None] + start) % spacing - spacing / 2)
    printed = np.clip(1 - distances.min(axis=0), 0, 1)
    return np.maximum(images, _drawn(images, strength, rng) * printed)


# -------------------------------------------------------------------------------------- occlusion


def patches(images: Images, strength: float, rng: Rng) -> Images:
    """Two rectangles of `strength` pixels a side, each in one shade."""
    for _ in range(2):
        y, x = rng.uniform(-9, 9, (2, len(images), 1, 1))
        height, width = _drawn(images, strength, rng), _drawn(images, strength, rng)
        hidden = (np.abs(ROWS - y) < height / 2) & (np.abs(COLUMNS - x) < width / 2)
        images = np.where(hidden, _uniform(images, 0, 1, rng), images)
    return images


def erased_stripes(images: Images, strength: float, rng: Rng) -> Images:
    """Two stripes of `strength` pixels erased, in any direction."""
    distance = np.abs(_from_lines(images, 2, 8, rng)).min(axis=1)
    return images * np.clip(1 + distance - _drawn(images, strength, rng) / 2, 0, 1)


# ----------------------------------------------------------------------------------- quantisation


def jpeg(images: Images, strength: float, rng: Rng) -> Images:
    """A JPEG file of a dimmer image: of quality 100 at strength 0, of quality 1 at 1."""
    images = images * (1 - _drawn(images, strength, rng) / 2)
    qualities = np.rint(100 ** (1 - _drawn(images, strength, rng))).astype(int).ravel()

    def saved(image: Image.Image, i: int) -> Image.Image:
        file = io.BytesIO()
        pixels = np.rint(255 * np.asarray(image)).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=int(qualities[i]))
        return Image.fromarray(np.asarray(Image.open(file), dtype=np.float32) / 255)

    return _with_pillow(images, saved)


def dithered(images: Images, strength: float, rng: Rng) -> Images:
    """`low_contrast` as a pattern of white and black pixels (Bayer, 1973)."""
    pattern = np.tile(BAYER, (SIDE // 4, SIDE // 4))
    return (low_contrast(images, strength, rng) > pattern).astype(float)


def posterised(images: Images, strength: float, rng: Rng) -> Images:
    """Three shades, which make islands of a background of clouds."""
    return np.rint(2 * blotches(images, strength, rng)) / 2


def fax(images: Images, strength: float, rng: Rng) -> Images:
    """Black and white after noise with a standard deviation of `strength`: frayed, with specks."""
    noisy = images + _drawn(images, strength, rng) * _clouds(images, 0.7, rng)
    return (noisy > _uniform(images, 0.4, 0.6, rng)).astype(float)


# ---------------------------------------------------------------------------- what the kinds share


def _uniform(images, low, high, rng) -> np.ndarray:
    """A number for each image, (n, 1, 1)."""
    return rng.uniform(low, high, (len(images), 1, 1))


def _drawn(images, strength, rng) -> np.ndarray:
    """A strength for each image, (n, 1, 1): from half of `strength` to all of it."""
    return _uniform(images, strength / 2, strength, rng)


def _sign(images, rng) -> np.ndarray:
    """-1 or 1 for each image, (n, 1, 1)."""
    return rng.choice([-1.0, 1.0], (len(images), 1, 1))


def _lit(images, light) -> np.ndarray:
    """Images with more light behind them: white stays white."""
    return light + (1 - light) * images


def _slope(images, rng) -> np.ndarray:
    """A ramp from 0 at one end of each image to 1 at the other, in any direction, (n, S, S)."""
    angle = _uniform(images, 0, 2 * np.pi, rng)
    across = np.cos(angle) * COLUMNS + np.sin(angle) * ROWS
    return 0.5 + across / (2 * RADIUS * (np.abs(np.cos(angle)) + np.abs(np.sin(angle))))


def _clouds(images, sigma, rng) -> np.ndarray:
    """Smooth noise with mean 0 and standard deviation 1, (n, S, S)."""
    noise = ndimage.gaussian_filter(rng.normal(size=images.shape), sigma, mode="wrap", axes=(1, 2))
    noise -= noise.mean(axis=(1, 2), keepdims=True)
    return noise / noise.std(axis=(1, 2), keepdims=True)


def _from_lines(images, count, reach, rng) -> np.ndarray:
    """How far each pixel is from straight lines, (n, count, S, S); the sign tells the side.

    A line passes the middle of the image at up to `reach` pixels.
    """
    shape = len(images), count, 1, 1
    angle, offset = rng.uniform(0, 2 * np.pi, shape), rng.uniform(-reach, reach, shape)
    return np.cos(angle) * COLUMNS + np.sin(angle) * ROWS - offset


def _discs(rows, columns, radius) -> np.ndarray:
    """How much of each pixel is covered by discs with soft edges, (n, S, S) in [0, 1].

    Args:
        rows, columns: of the discs' middles, (n, count).
        radius: (n, 1, 1) or (n, count, 1).
    """
    distance = np.hypot(ROWS - rows[..., None, None], COLUMNS - columns[..., None, None])
    return np.clip(radius[..., None] - distance, 0, 1).max(axis=1)


def _resample(images, rows, columns) -> np.ndarray:
    """Images read at other places, (n, S, S), from the middle; what is outside is black."""
    rows, columns = np.broadcast_arrays(rows, columns)
    number = np.broadcast_to(np.arange(len(images))[:, None, None], rows.shape)
    places = number, rows + RADIUS, columns + RADIUS
    return ndimage.map_coordinates(images, places, order=1, mode="constant")


def _convolve(images, kernels) -> np.ndarray:
    """Each image convolved with its own kernel (n, S, S) around pixel (13, 13)."""
    kernels = kernels / kernels.sum(axis=(1, 2), keepdims=True)
    size = 2 * SIDE, 2 * SIDE  # no light comes in from the other side
    product = np.fft.rfft2(images, size) * np.fft.rfft2(kernels, size)
    kept = slice(SIDE // 2 - 1, SIDE // 2 - 1 + SIDE)
    return np.fft.irfft2(product, size)[:, kept, kept]


def _depth(images) -> np.ndarray:
    """How deep in the stroke each point is, in pixels; outside negative: (n, FINE S, FINE S)."""
    size, bilinear = (FINE * SIDE, FINE * SIDE), Image.Resampling.BILINEAR
    pens = _with_pillow(images, lambda image, _: image.resize(size, bilinear)) > 0.5
    pens[:, 0, 0] = False  # there is an outside
    distance = ndimage.distance_transform_edt
    return np.stack([distance(pen) - distance(~pen) for pen in pens]) / FINE


def _coarsened(fine) -> np.ndarray:
    """Means over the points of each pixel, (n, S, S)."""
    return fine.reshape(len(fine), SIDE, FINE, SIDE, FINE).mean(axis=(2, 4))


def _with_pillow(images, change) -> np.ndarray:
    """`change(image, number)` of each image, as one of Pillow's of mode F."""
    pictures = map(Image.fromarray, images.astype(np.float32))
    return np.stack([np.asarray(change(p, i)) for i, p in enumerate(pictures)])
