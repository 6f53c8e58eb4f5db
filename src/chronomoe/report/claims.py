"""Claims of a report: a ratio between two models, its interval and what was aimed for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from chronomoe.report.charts import Number, interval_chart

HIGHER_IS_BETTER = ("throughput", "speed", "speed-up")
"""Metrics of which more is better; of errors, times and sizes less is."""
VERDICTS = {
    "met": "the estimate reaches the target and the interval excludes a tie",
    "open": "the estimate reaches the target, but the interval includes a tie",
    "not met": "the estimate misses the target",
}
"""A target that allows a model to be worse than its rival takes the place of the tie."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A ratio between two models with its interval, against what was aimed for."""

    claim: str
    metric: str
    ratio: Number
    model: str = ""
    against: str = ""
    unseen: bool = False
    low: Number | None = None
    high: Number | None = None
    target: str | None = None
    target_ratio: Number | None = None

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Claim":
        """Make a claim of a record, less what the record says besides."""
        return cls(**{name: record[name] for name in cls.__dataclass_fields__ if name in record})

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger ratio is the better one: speeds, not errors or times."""
        return self.metric.lower() in HIGHER_IS_BETTER

    @property
    def verdict(self) -> str:
        """One of :data:`VERDICTS`, or nothing where nothing was aimed for."""
        if self.target_ratio is None:
            return ""
        sign = -1 if self.higher_is_better else 1
        worst = self.low if self.higher_is_better else self.high
        if sign * self.ratio > sign * self.target_ratio:
            return "not met"
        tie = max(1.0, self.target_ratio) if sign > 0 else 1.0
        return "met" if worst is None or sign * worst < sign * tie else "open"

    @property
    def winner(self) -> int:
        """1 where a model has lower errors than its rival, -1 where it has higher ones, 0 where the interval ties."""
        return 0 if self.low is None or self.high is None else int(self.high < 1) - int(self.low > 1)

    @property
    def effect(self) -> str:
        """The ratio in words."""
        if self.higher_is_better:
            return f"{self.ratio:.1f}× the {self.metric}"
        if round(self.ratio, 3) == 1:
            return f"equal {self.metric}"
        return f"{abs(1 - self.ratio):.1%} {'lower' if self.ratio < 1 else 'higher'} {self.metric}"

    @property
    def span(self) -> str:
        """The ratio and its interval as numbers."""
        interval = "" if self.low is None or self.high is None else f" ({self.low:.3f} to {self.high:.3f})"
        return f"{self.ratio:.3f}{interval}"

    def draw(self, claims: Sequence["Claim"]) -> Markup:
        """Draw the interval on the scale of all claims that read the same way."""
        alike = [other for other in claims if other.higher_is_better == self.higher_is_better]
        ends = [end for c in alike for end in (c.ratio, c.low, c.high, c.target_ratio, 1.0) if end is not None]
        pad = 0.06 * (max(ends) - min(ends)) or 0.1
        bounds = (min(ends) - pad, max(ends) + pad)
        return interval_chart(ratio=self.ratio, low=self.low, high=self.high, target=self.target_ratio, bounds=bounds)
