"""Copy this folder to ``models/`` of https://github.com/autogluon/fev, then: python models/evaluate.py -m chronomoe."""

from chronomoe.integrations.fev import ChronoMoEModel

__all__ = ["ChronoMoEModel"]
