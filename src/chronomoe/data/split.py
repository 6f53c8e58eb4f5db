"""Where series are cut by time into train, validation and test."""

from typing import Literal, NamedTuple

from pydantic import Field

from chronomoe.errors import InputError
from chronomoe.models.configuration import configuration

Part = Literal["train", "validation", "test"]


class Stops(NamedTuple):
    """Where the parts of one series end, in rows: train is ``0:train``, validation ``train:validation`` and so on."""

    train: int
    validation: int
    test: int

    def rows(self, part: Part) -> slice:
        """Return the rows whose values may be targets of a part; a context may reach back before them."""
        starts = {"train": 0, "validation": self.train, "test": self.validation}
        return slice(starts[part], getattr(self, part))


@configuration
class Split:
    """Where series are cut by time: by shares of each one's rows, or at the same absolute rows in all of them."""

    train: float = Field(0.7, gt=0, le=1)
    """Share of the rows that comes first, rounded down."""
    test: float = Field(0.2, ge=0, lt=1)
    """Share of the rows that comes last, rounded down; validation is what lies between."""
    stops: tuple[int, int, int] | None = None
    """The three rows at which train, validation and test end, instead of shares; later rows are unused."""

    def __post_init__(self) -> None:
        if self.stops is not None and not 0 < self.stops[0] <= self.stops[1] <= self.stops[2]:
            raise InputError(f"split stops must be three rows in order, such as (8640, 11520, 14400), got {self.stops}")
        if self.train + self.test > 1:
            raise InputError(
                f"split shares must sum to at most 1, got train={self.train}, test={self.test}; validation lies between"
            )

    def of(self, length: int) -> Stops:
        """Return the stops in a series of ``length`` rows; refuse one that ends before the absolute rows do."""
        if self.stops is None:
            return Stops(int(self.train * length), length - int(self.test * length), length)
        if length < self.stops[-1]:
            raise InputError(f"the split {self.stops} needs series of at least {self.stops[-1]} rows, got {length}")
        return Stops(*self.stops)
