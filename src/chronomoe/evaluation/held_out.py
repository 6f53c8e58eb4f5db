"""Domains that nothing was trained on: the place where a router cannot be replaced by a lookup."""

from collections.abc import Mapping

from chronomoe.errors import InputError
from chronomoe.evaluation.comparison import Candidate, Comparison, compare_models
from chronomoe.evaluation.tasks import Task


def compare_unseen(
    candidates: Mapping[str, Candidate], home: Mapping[str, Task], held_out: Mapping[str, Task], levels: list[float]
) -> Comparison | None:
    """Score every candidate on held-out domains; None where there are none.

    No row is chosen here, since there are no validation windows of a domain nobody has seen: what remains to compare
    with are the averages of singles and of branched experts (a blind pick), generalists and the teacher.

    Raises:
        InputError: a held-out domain is also a domain that models were trained on.
    """
    both = sorted(set(home) & set(held_out))
    if both:
        raise InputError(f"held-out domains must not be trained on, got {', '.join(both)} in both; rename or remove it")
    return compare_models(candidates, held_out, levels=levels) if held_out else None
