"""What unlabelled images look like, and which of them look alike: what the tiny model learns to see.

An image's looks are its strokes and its colours. Strokes are histograms of gradient directions in small cells (Dalal
and Triggs 2005), which hardly change when something is drawn a little further left; pixels do.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

SIDE, CELL, DIRECTIONS = 32, 4, 9  # pixels of the grey image's side and of a cell's; directions over half a turn
COLOUR_SIDE = 4  # pixels
COLOUR = 0.5  # weight of the colours; with 1, strokes counted for less and the groups were worse (digits, clothes)
COMPONENTS = 32  # of the looks; with 64 the model was no better (clothes)
LUMA = (0.299, 0.587, 0.114)
LEAST = 0.1  # spread, so that rounding is not taken for strokes where there are none; ordinary pools have 1 to 10
FURTHEST = 10.0  # deviations: what no ordinary image has, and one of a pool whose images are all the same may
AT_ONCE = 256  # images whose gradients are in memory together


def group_counts(classes: int) -> tuple[int, int]:
    """The largest numbers of coarse and fine groups."""
    return max(4, classes * 5 // 4), max(8, classes * 3)


class Looks:
    """The leading principal components of a pool's looks.

    Any image's looks can be told in them. So the model learns from moved, turned and zoomed images what these look like
    themselves, and sees new images better for that (a linear probe of clothes: 69.7 % in place of 67.8 %).
    """

    def __init__(self, stacks: Sequence[torch.Tensor], seed: int) -> None:
        """`stacks`: the pool, each [N, 3, H, W] with values 0 to 255."""
        from sklearn.decomposition import PCA

        parts = [_parts(some) for stack in stacks for some in stack.split(AT_ONCE)]
        whole = [torch.cat([part[which] for part in parts]) for which in (0, 1)]
        # Strokes and colours are brought to a mean squared distance of 1 from their mean, all values together.
        self._scales = [_spread(values) for values in whole]
        looks = self._together(*whole)
        analysis = PCA(min(COMPONENTS, len(looks) - 1), random_state=seed).fit(looks.numpy())
        self._mean, self._axes = torch.from_numpy(analysis.mean_), torch.from_numpy(analysis.components_.T)
        self._deviation = torch.from_numpy(np.sqrt(analysis.explained_variance_)) + 1e-6
        self.pool = (looks - self._mean) @ self._axes
        """Components of the pool's images, in the order of the stacks, FP32 [N, D]."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The components of images [B, 3, H, W], values 0 to 255. FP32 [B, D], of deviation 1 over the pool."""
        components = (self._together(*_parts(images)) - self._mean) @ self._axes / self._deviation
        return components.clamp(-FURTHEST, FURTHEST)

    def _together(self, strokes: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        return torch.cat([strokes / self._scales[0], COLOUR * colours / self._scales[1]], 1)


def look_alike_groups(looks: np.ndarray, classes: int, seed: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Group images by their looks [N, D]. Returns places on a spectral map, [N, E], and N (coarse, fine) words.

    The map consists of the leading eigenvectors of the neighbour graph's normalised adjacency. It follows chains of
    near neighbours, so two handwritings' 4 come close although they differ.
    """
    from scipy.linalg import eigh
    from sklearn.cluster import KMeans
    from sklearn.neighbors import kneighbors_graph

    count = len(looks)
    distance = kneighbors_graph(looks, min(7, count - 1), mode="distance").toarray()
    # A scale for each image (the distance of its furthest neighbour) evens out dense and sparse regions.
    scale = distance.max(1) + 1e-9
    weight = np.where(distance > 0, np.exp(-(distance**2) / np.outer(scale, scale)), 0)
    weight = np.maximum(weight, weight.T) + 1e-9
    degree = weight.sum(1)
    dimensions = min(max(8, classes * 3 // 2), 64, count - 2)
    _, vectors = eigh(weight / np.sqrt(np.outer(degree, degree)), subset_by_index=[count - 1 - dimensions, count - 2])
    places = vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-12)

    def cut(groups: int) -> np.ndarray:
        return KMeans(min(groups, count // 4), n_init=10, random_state=seed).fit_predict(places)

    coarse, fine = map(cut, group_counts(classes))
    words = [(f"group-{c:02d}", f"kind-{f:03d}") for c, f in zip(coarse, fine, strict=True)]
    return places * np.sqrt(dimensions), words


def strokes(grey: torch.Tensor) -> torch.Tensor:
    """Square roots of gradient lengths by direction in each cell, [B, `DIRECTIONS`, cells down, cells right].

    `grey` is [B, SIDE, SIDE], values 0 to 1. A gradient between two directions counts for both, by its nearness.
    Opposite directions are one: dark on light is as light on dark.
    """
    down, right = torch.zeros_like(grey), torch.zeros_like(grey)
    down[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    right[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    length = torch.hypot(down, right)
    angle = torch.atan2(down, right).remainder(math.pi) * (DIRECTIONS / math.pi)
    lower = angle.floor()
    share = angle - lower
    histogram = torch.zeros(len(grey), DIRECTIONS, SIDE, SIDE)
    # Just under half a turn the remainder may round up to all of it, which is direction 0 again.
    for direction, part in ((lower, 1 - share), (lower + 1, share)):
        histogram.scatter_add_(1, (direction.long() % DIRECTIONS)[:, None], (length * part)[:, None])
    return (F.avg_pool2d(histogram, CELL) * CELL**2).sqrt()


def _parts(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Strokes [B, values] and colours [B, values] of images [B, 3, H, W], values 0 to 255."""
    images = images.float() / 255.0
    grey = (images * torch.tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
    grey = F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True)[:, 0]
    return strokes(grey).flatten(1), F.adaptive_avg_pool2d(images, COLOUR_SIDE).flatten(1)


def _spread(values: torch.Tensor) -> float:
    return max(LEAST, float(values.var(0, correction=0).sum().sqrt()) + 1e-6)
