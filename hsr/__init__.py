"""Half-space reporting: given keys K, report every key with ``<q, k> >= b``, fast and without false negatives.

Letters used throughout: ``n`` keys, ``m`` queries, ``d`` width, ``h`` query heads, ``g`` key-value heads, ``G = h /
g``, ``r`` a number of keys, ``nnz`` reported pairs.  Half-spaces are closed.
"""

from hsr.backend import ROWS, Row, methods
from hsr.errors import ArgumentError, BackendUnavailable, HsrError, StorageError
from hsr.index import HSRIndex
from hsr.report import Report

__all__ = [
    "ROWS",
    "ArgumentError",
    "BackendUnavailable",
    "HSRIndex",
    "HsrError",
    "Report",
    "Row",
    "StorageError",
    "methods",
]
