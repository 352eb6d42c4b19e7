"""Colored shapes on a dark background with labels and a caption, rendered from their index.

`shapes` are images; `moving_shapes` are videos in which the shape moves. Pixels are the coverage of
a signed distance function, so edges are smooth at any size.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from genai_jax.config import ConfigError

COLORS = {
    "red": (230, 60, 50),
    "green": (70, 190, 80),
    "blue": (60, 110, 235),
    "yellow": (240, 210, 60),
    "purple": (170, 80, 210),
    "white": (235, 235, 235),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": (0.16, 0.21), "large": (0.29, 0.36)}  # radius, in half image widths
POSITIONS = {  # (y, x) of the center, in half image widths
    "left": (0.0, -0.45),
    "right": (0.0, 0.45),
    "top": (-0.45, 0.0),
    "bottom": (0.45, 0.0),
    "centre": (0.0, 0.0),
}
MOTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}
TRAVEL = 0.8  # distance that a moving shape covers over all frames, in half image widths
BACKGROUND = 18.0
COUNTS = {"train": 50_000, "validation": 5_000}
TEMPLATES = (
    "a {size} {color} {shape} {where}",
    "{where}, a {size} {color} {shape}",
    "a {color} {shape}, {size}, {where}",
)


class Scene(NamedTuple):
    """What one picture shows."""

    labels: tuple[int, ...]  # color, shape, size, then position or motion
    radius: float
    center: tuple[float, float]
    angle: float
    shade: float
    template: int


def _where(position: str) -> str:
    return "in the centre" if position == "centre" else f"at the {position}"


def _scene(index: int, split: str, last: dict) -> Scene:
    """The scene at an index; each split has its own random stream."""
    rng = np.random.default_rng((index, list(COUNTS).index(split), 7))
    names = (COLORS, SHAPES, SIZES, last)
    labels = tuple(int(rng.integers(len(n))) for n in names)
    radius = rng.uniform(*list(SIZES.values())[labels[2]])
    jitter = rng.uniform(-0.12, 0.12, 2)
    position = (0.0, 0.0) if last is MOTIONS else list(POSITIONS.values())[labels[3]]
    center = tuple(float(p + j) for p, j in zip(position, jitter, strict=True))
    angle, shade = rng.uniform(-0.25, 0.25), rng.uniform(0.9, 1.05)
    return Scene(labels, radius, center, angle, shade, int(rng.integers(len(TEMPLATES))))


def draw(scene: Scene, size: int, offset: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Renders the scene with its shape moved by `offset` (y, x), uint8 [size, size, 3]."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    y = axis[:, None] - (scene.center[0] + offset[0])
    x = axis[None, :] - (scene.center[1] + offset[1])
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    x, y = cos * x + sin * y, cos * y - sin * x
    distance = _distance(SHAPES[scene.labels[1]], x, y, scene.radius)
    coverage = np.clip(0.5 - distance * size / 2, 0, 1)[..., None]  # edges are one pixel wide
    color = np.array(list(COLORS.values())[scene.labels[0]], np.float32) * scene.shade
    image = BACKGROUND + coverage * (np.minimum(color, 255) - BACKGROUND)
    return np.round(image).astype(np.uint8)


def _distance(shape: str, x, y, radius):
    """Signed distance to the edge, negative inside; all shapes have about the same area."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.87 * radius
    if shape == "triangle":
        sides = np.maximum(0.866 * abs(x) - 0.5 * y, y)
        return sides - 0.62 * radius
    arms = np.minimum(
        np.maximum(abs(x) - 1.05 * radius, abs(y) - 0.36 * radius),
        np.maximum(abs(y) - 1.05 * radius, abs(x) - 0.36 * radius),
    )
    return arms


class Shapes:
    """One split of `shapes`, or of `moving_shapes` if `num_frames` is set."""

    levels = 256
    has_captions = True
    can_flip = False  # left would become right

    def __init__(self, split: str, size: int, num_frames: int | None):
        self.split, self.size, self.num_frames = split, size, num_frames
        self._last = MOTIONS if num_frames else POSITIONS
        self.label_names = tuple(tuple(n) for n in (COLORS, SHAPES, SIZES, self._last))
        self.shape = (*((num_frames,) if num_frames else ()), size, size, 3)
        self.name = f"{'moving_shapes' if num_frames else 'shapes'}{size}[{split}]"

    def __len__(self) -> int:
        return COUNTS[self.split]

    def __getitem__(self, index: int) -> dict:
        scene = _scene(index, self.split, self._last)
        color, shape, size, last = (
            names[i] for names, i in zip(self.label_names, scene.labels, strict=True)
        )
        if not self.num_frames:
            image = draw(scene, self.size)
            where = _where(last)
        else:
            direction = np.array(MOTIONS[last])
            distances = TRAVEL * np.linspace(-0.5, 0.5, self.num_frames)
            image = np.stack([draw(scene, self.size, tuple(direction * d)) for d in distances])
            where = f"moving {last}"
        caption = TEMPLATES[scene.template].format(color=color, shape=shape, size=size, where=where)
        return {"image": image, "labels": np.array(scene.labels, np.int32), "caption": caption}

    def fingerprint(self) -> str:
        first = b"".join(self[i]["image"].tobytes() for i in range(8))
        return hashlib.sha256(f"{self.name} {len(self)}".encode() + first).hexdigest()


def open_shapes(config, split: str) -> Shapes:
    return Shapes(split, _size(config), None)


def open_moving_shapes(config, split: str) -> Shapes:
    frames = 8 if config.num_frames is None else config.num_frames
    if frames < 2:
        raise ConfigError(f"--data.num_frames={frames}: motion needs at least 2 frames")
    return Shapes(split, _size(config), frames)


def _size(config) -> int:
    size = config.image_size or 32
    if size % 8 or size < 16:
        raise ConfigError(
            f"--data.image_size={size}: the size of shapes must be a multiple of 8, at least 16"
        )
    return size
