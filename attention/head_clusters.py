"""Which heads of a model attend alike: found once, offline, from attention maps of a calibration text."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from hsr import checks
from hsr.errors import ArgumentError

ALONE = -1  # label of a head in no cluster


@dataclass(frozen=True)
class HeadClusters:
    """Clusters of heads, over all layers of a model.

    Args:
        labels: for each layer, for each of its query heads, the number of its cluster, or -1 for none.

    Raises:
        ArgumentError: no layers or heads, layers that differ in heads, or labels that are not whole or below -1.
    """

    labels: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        given: Any = self.labels
        if not (isinstance(given, tuple) and given and all(isinstance(layer, tuple) and layer for layer in given)):
            raise ArgumentError(f"labels must be a tuple of layers, each a tuple of its heads' labels; got {given!r}")
        for layer, row in enumerate(given):
            if len(row) != len(given[0]):
                raise ArgumentError(
                    f"labels must have {len(given[0])} heads in every layer; got {len(row)} in layer {layer}"
                )
            for head, label in enumerate(row):
                checks.whole(f"labels[{layer}][{head}]", label, ALONE)

    @property
    def layers(self) -> int:
        """How many."""
        return len(self.labels)

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return len(self.labels[0])

    @classmethod
    def fit(cls, maps: Iterable[Any], *, distance: float = 0.3, least: int = 2) -> Self:
        """Agglomerative clustering of attention maps, with average linkage.

        Maps are compared as vectors of length 1, by Euclidean distance: 0 for maps alike up to a factor, at most the
        square root of 2 for those that share no block.  They are taken as they are, small as blocks make them; the
        paper's autoencoder, which compresses maps of single keys, has no place here.

        Args:
            maps: for each layer an array or tensor (h, T, C), attention of row blocks to key blocks that
                `attention.estimates.block_attention` makes, of one text for all layers; not negative.
            distance: at which clusters are cut off, in (0, 2); ours, 0.3 (cosines of about 0.95).
            least: heads of a cluster, at least 2: those of smaller ones are in none.

        Returns:
            HeadClusters: numbered in the order of their first heads.

        Raises:
            ArgumentError: no maps, maps that differ in shape, negative, all zero or not finite; a value out of range.
        """
        checks.real("distance", distance, np.nextafter(0, 1), 2.0)
        checks.whole("least", least, 2)
        arrays = [checks.floats(f"maps[{layer}]", part, (3,)).astype(np.float64) for layer, part in enumerate(maps)]
        if not arrays or 0 in arrays[0].shape:
            raise ArgumentError(f"maps must have layers, heads and blocks; got {[x.shape for x in arrays]}")
        for layer, part in enumerate(arrays):
            if part.shape != arrays[0].shape:
                raise ArgumentError(f"maps[{layer}] must be {arrays[0].shape} as those before; got {part.shape}")
            if (part < 0).any() or not part.any(axis=(1, 2)).all():
                raise ArgumentError(f"maps[{layer}] must be shares of attention, at least 0 and some above; got others")
        flat = np.concatenate([part.reshape(len(part), -1) for part in arrays])
        flat /= np.linalg.norm(flat, axis=1, keepdims=True)
        found = fcluster(linkage(flat, "average"), distance, "distance") if len(flat) > 1 else np.ones(1, np.int64)
        return cls(_numbered(found, least, len(arrays)))

    def save(self, path: str | Path) -> None:
        """Write them to a file whose name ends in .npz, which `load` reads; ArgumentError for another name."""
        np.savez(_npz(path), labels=np.array(self.labels, np.int64))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Those of a file.

        Raises:
            ArgumentError: no such file, or one that `save` did not write.
        """
        place = _npz(path)
        if not place.is_file():
            raise ArgumentError(f"path must name a file that save wrote; got {place}, which is not there")
        try:
            with place.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                labels = file["labels"]
        except (KeyError, ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ArgumentError(f"path must name a file that save wrote; got {place}: {error}") from error
        if labels.ndim != 2 or labels.dtype != np.int64:
            raise ArgumentError(
                f"path must name a file with labels (layers, heads) of int64; got {labels.dtype} of shape "
                f"{labels.shape} in {place}"
            )
        return cls(tuple(tuple(layer) for layer in labels.tolist()))


def _numbered(found: np.ndarray, least: int, layers: int) -> tuple[tuple[int, ...], ...]:
    """Numbers of all heads, (layers h,), anew: by first head, and ALONE in clusters that are too small."""
    numbers: dict[int, int] = {}
    labels = [
        numbers.setdefault(number, len(numbers)) if np.sum(found == number) >= least else ALONE
        for number in found.tolist()
    ]
    return tuple(tuple(row) for row in np.reshape(labels, (layers, -1)).tolist())


def _npz(path: str | Path) -> Path:
    place = Path(path)
    if place.suffix != ".npz":
        raise ArgumentError(f"path must end in .npz; got {place}")
    return place
