"""What a run's figures mean, in plain words."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from chronomoe.report.claims import VERDICTS, Claim

VERDICTS_NOTE = (
    "Dot: estimate; bar: its interval by paired bootstrap over series and windows; dashed: target. "
    + "; ".join(f"{verdict.capitalize()}: {meaning}" for verdict, meaning in VERDICTS.items())
    + "."
)


def recommendation(found: Mapping[str, Any], costs: Sequence[Mapping[str, Any]]) -> str:
    """Say what to deploy, why, and how sure that is."""
    cost = next(row for row in costs if row["model"] == found["model"])
    words = (
        f"Deploy {found['model']}: it is {found['rule']}. Expect {found['error']:.3f} of seasonal naive's "
        f"{found['metric']} ({found['low']:.3f} to {found['high']:.3f} on validation windows) for "
        f"{found['flops'] / 1e9:.3f} GFLOPs and {cost['active_parameters'] / 1e6:.2f} M active parameters a forecast."
    )
    if found["rival"] != found["model"]:
        words += f" In {found['sure']:.0%} of bootstrap draws it is no worse than {found['rival']}, the best other."
    return words + " No target of a test window had a say. The checkpoint is in recommended/."


def when_another(claims: Sequence[Claim], costs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say when a plain student, a generalist or the teacher is the better choice, from test windows of this run."""
    main = next((claim.model for claim in claims), "")
    flops = {cost["model"]: cost["flops"] for cost in costs if cost.get("flops")}
    said = []
    for claim in (claim for claim in claims if claim.model == main and claim.metric == "WQL"):
        rival, where = claim.against, "on unseen domains" if claim.unseen else "at home"
        cheaper = min((main, rival), key=lambda name: flops.get(name, math.inf))
        if rival == "own single":
            outcome = ("ties with it", "is more accurate", "is less accurate")[claim.winner]
            says = "A plain student of each domain, called by name, needs no router: take it where you know the domain "
            says += f"of every series, unless the {main} beats it. Here the {main} {outcome}"
        elif rival in flops and rival.startswith("generalist-") and rival != "generalist-base":
            says = (
                f"{rival} and the {main} tie {where}: take the cheaper, {cheaper}",
                f"The {main} is more accurate than {rival} {where}",
                f"{rival} is more accurate than the {main} {where}: take it there",
            )[claim.winner]
        elif rival == "teacher" and claim.winner < 0:
            says = f"The teacher is more accurate {where}: keep it where it is fast enough"
        else:
            continue
        said.append(f"{says} (ratio of WQL {claim.span}).")
    return said
