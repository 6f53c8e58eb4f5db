"""Drawn inputs: each is forecast with finite, ordered quantiles or refused in one line, and left as it was.

``FUZZ_EXAMPLES`` says how many each test draws; the same number draws the same ones. Shapes are not checked.
A failure is not shrunk, which takes minutes where a model runs: set ``FUZZ_SHRINK``.
"""

import os
import signal
import warnings
from contextlib import contextmanager

import jaxtyping
import pytest
from hypothesis import HealthCheck, Phase, settings

from chronomoe.errors import InputError
from chronomoe.models.mixture.mixture import MixtureConfig, build_mixture
from chronomoe.models.mixture.router import RouterConfig
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.pipeline import ChronoMoEPipeline

SECONDS = 120
"""Whatever takes longer hangs."""

settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "60")),
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    phases=[phase for phase in Phase if phase is not Phase.shrink or "FUZZ_SHRINK" in os.environ],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")


@pytest.fixture(scope="session")
def mixture_pipeline(make_teacher):
    """A mixture of two tiny students of a tiny teacher."""
    teacher = make_teacher(num_layers=2)
    students = {
        "shallow": create_student_model(teacher, StudentConfig(num_layers=1)),
        "deep": create_student_model(teacher, StudentConfig(num_layers=2)),
    }
    return ChronoMoEPipeline(build_mixture(students, MixtureConfig(router=RouterConfig(hidden_sizes=(4,)))).eval())


@pytest.fixture(autouse=True)
def as_users_run_it(monkeypatch):
    """Check no shapes, and take warnings for what they are; stop what hangs."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def refusing():
    """Let one line of ``InputError`` pass, and nothing else."""
    before = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(SECONDS)
    try:
        yield
    except InputError as error:
        if len(str(error).splitlines()) != 1:
            pytest.fail(f"a refusal takes one line: {error}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _hangs(*_):
    raise TimeoutError(f"no answer within {SECONDS} seconds")


@pytest.fixture(scope="session")
def refused_in_one_line():
    """Return a context that passes a refusal in one line, and fails on every other exception."""
    return refusing
