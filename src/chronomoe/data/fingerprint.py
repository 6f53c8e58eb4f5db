"""A hash of a domain's series, to notice when data have changed."""

import hashlib
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch.utils.data import Dataset, Subset

from chronomoe.data.domains import Domain

VALUES_OF_A_ROW = 4096
_KNOWN: WeakKeyDictionary[Domain, str] = WeakKeyDictionary()
"""Every training asks for that of its domains, and to answer means reading all series."""


def fingerprint(domain: Domain) -> str:
    """Hash names, starts, lengths and, of each row, every value or some thousands of evenly spread ones."""
    if domain in _KNOWN:
        return _KNOWN[domain]
    total = hashlib.sha256(repr((domain.name, domain.seasonality, domain.cutoffs)).encode())
    for series in domain.series:
        facts = (series.item_id, str(series.start), series.freq, series.target.shape, series.known)
        total.update(repr(facts).encode())
        every = max(1, len(series) // VALUES_OF_A_ROW)
        for row in (*series.target, *series.covariates.values()):
            total.update(np.ascontiguousarray(row[::every]).tobytes())
    return _KNOWN.setdefault(domain, total.hexdigest()[:16])


def fingerprints(windows: Dataset[Any]) -> dict[str, str]:
    """Return the fingerprint of each domain that windows are cut from, by name; none where that is not known."""
    while isinstance(windows, Subset):
        windows = windows.dataset
    return {domain.name: fingerprint(domain) for domain in getattr(windows, "domains", ())}
