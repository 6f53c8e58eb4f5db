from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from chronomoe.data.fingerprint import fingerprint
from chronomoe.data.split import Split
from sample_series import sample_domain


def domain(**options):
    return sample_domain(variates=2, past_only=("p",), known=("k",), **options)


def with_value(part, value):
    changed = domain()
    (changed.series[1].target[1] if part == "target" else changed.series[1].covariates[part])[77] = value
    return changed


def with_series(**changes):
    changed = domain()
    return replace(changed, series=[replace(changed.series[0], **changes), *changed.series[1:]])


def with_all(**changes):
    changed = domain()
    return replace(changed, series=[replace(series, **changes) for series in changed.series])


def test_equal_domains_have_equal_fingerprints():
    assert fingerprint(domain()) == fingerprint(domain())
    assert fingerprint(with_value("target", np.nan)) == fingerprint(with_value("target", np.nan))


@pytest.mark.parametrize(
    "changed",
    [
        with_value("target", 9.0),
        with_value("target", np.nan),
        with_value("p", 9.0),
        with_value("k", 9.0),
        with_series(item_id="other"),
        with_series(start=pd.Timestamp("2021-01-01")),
        with_all(freq="D"),
        with_all(known=()),
        domain(length=201),
        domain(count=4),
        replace(domain(), name="other"),
        replace(domain(), seasonality=7),
        replace(domain(), cutoffs=Split(train=0.6)),
    ],
)
def test_the_fingerprint_changes_with_everything_a_run_depends_on(changed):
    assert fingerprint(changed) != fingerprint(domain())


def test_the_fingerprint_of_long_series_sees_their_end():
    long = sample_domain(length=100_000, count=1)
    longer = replace(long, series=[replace(long.series[0], target=np.roll(long.series[0].target, 1, axis=1))])
    assert fingerprint(longer) != fingerprint(long)
