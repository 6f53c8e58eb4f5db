"""What a server accepts, and how it batches."""

from pydantic import Field

from chronomoe.models.configuration import configuration


@configuration
class ServingConfig:
    """Limits and batching of a server; rows count variates and covariates."""

    max_batch: int = Field(default=64, ge=1)
    """Rows forecast at once, and the most that one series may have."""
    max_batch_ms: float = Field(default=100.0, gt=0)
    """Time that a batch may take at the pace of those before it, which limits its rows, to no fewer than eight."""
    parallel: int = Field(default=1, ge=1)
    """Batches forecast at once, each by a thread of its own."""
    max_wait_ms: float = Field(default=5.0, ge=0)
    """How long a series waits for others to share its batch, where the batch before had several."""
    queue: int = Field(default=1024, ge=1)
    """Rows that may wait; beyond it, requests get status 429."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Seconds for a whole request, reading its body included."""
    max_body_mb: float = Field(default=16.0, gt=0)
    """Size of a request's body."""
    max_series: int = Field(default=256, ge=1)
    """Series of a request."""
    max_steps: int = Field(default=65536, ge=1)
    """Past steps of a series; a model reads the latest of its context."""
    max_horizon: int = Field(default=1024, ge=1)
    """Steps to forecast."""
    drain_s: float = Field(default=1.0, ge=0)
    """Seconds between a signal to stop, when readiness ends, and the close of the port."""
