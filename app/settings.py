"""Every setting, in one class; each can be given as an environment variable `TUNEYARD_<NAME>`."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Read once per process, from the environment only."""

    model_config = SettingsConfigDict(env_prefix="TUNEYARD_", env_ignore_empty=True, frozen=True, extra="ignore")

    mode: Literal["local", "production"] = Field(
        "local", description="`local` makes the first key itself; `production` demands one, and a database."
    )
    home: Path = Field(Path("~/.tuneyard"), description="Everything this process writes lies under here.")
    host: str = Field("127.0.0.1", description="Address the API listens on.")
    port: int = Field(8000, ge=0, le=65535, description="Port the API listens on.")
    database_url: str | None = Field(None, description="SQLAlchemy URL; null is SQLite under the home.")
    redis_url: str | None = Field(None, description="Redis URL for wake-ups; null publishes none (workers poll).")
    blobs: str | None = Field(None, description="`s3://bucket/prefix`, or null for the local disk under the home.")
    s3_endpoint: str | None = Field(None, description="Endpoint of an S3-compatible store.")
    s3_region: str = Field("us-east-1", description="Region of the S3 store.")
    s3_access_key_id: SecretStr | None = Field(None, description="Key id for the S3 store.")
    s3_secret_access_key: SecretStr | None = Field(None, description="Secret for the S3 store.")
    admin_key: SecretStr | None = Field(None, description="First operator key (`ty_…`); required in production.")
    log_format: Literal["json", "console"] = Field("json", description="How log lines look: `json` or `console`.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least level logged: `debug`, `info`, `warning` or `error`."
    )

    max_upload_bytes: int = Field(50 * 2**30, ge=1, description="Largest upload.")
    max_body_bytes: int = Field(2**20, ge=1024, description="Largest JSON body.")
    max_entries: int = Field(2_000_000, ge=1, description="Most entries in one archive.")
    max_entry_bytes: int = Field(512 * 2**20, ge=1, description="Largest single file in an archive.")
    max_unpacked_bytes: int = Field(200 * 2**30, ge=1, description="Most bytes that one archive may unpack to.")
    max_ratio: int = Field(200, ge=2, description="Largest ratio of unpacked to packed bytes of one archive.")
    max_pixels: int = Field(50_000_000, ge=1, description="Largest image, in pixels.")
    max_queued_jobs: int = Field(1000, ge=1, description="Most unfinished jobs of one project.")
    free_space_floor_bytes: int = Field(512 * 2**20, ge=0, description="Uploads are refused below this much free disk.")
    streams_per_key: int = Field(20, ge=1, description="Most open event streams and long polls of one key.")
    max_wait_seconds: float = Field(60, gt=0, description="Longest `?wait=`.")

    slots: int = Field(1, ge=1, description="Training jobs at once on a worker without GPUs.")
    threads: int = Field(0, ge=0, description="CPU threads per training job; 0 shares the cores among the slots.")
    heartbeat_seconds: float = Field(5, gt=0, description="Between heartbeats of a held job.")
    lease_seconds: float = Field(30, gt=0, description="A job whose worker is silent this long is taken over.")
    fence_seconds: float = Field(20, gt=0, description="A supervisor unheard this long kills its own trainer.")
    poll_seconds: float = Field(3, gt=0, description="An idle slot looks for work this often without any message.")
    sweep_seconds: float = Field(5, gt=0, description="Between sweeps of expired leases and satisfied waits.")
    progress_seconds: float = Field(600, gt=0, description="A trainer without progress this long is hung.")
    drain_seconds: float = Field(25, gt=0, description="How long a draining worker waits for checkpoints.")
    blob_grace_seconds: float = Field(24 * 3600, ge=0, description="Unreferenced blobs are kept this long.")
    cache_bytes: int = Field(
        50 * 2**30, ge=0,
        description="Disk budget of decoded images and features on a worker; copies of inputs may take as much again.",
    )  # fmt: skip
    max_attempts: int = Field(20, ge=1, description="Attempts before a job fails for good.")

    @model_validator(mode="after")
    def _sane(self) -> Self:
        if not self.heartbeat_seconds < self.fence_seconds < self.lease_seconds:
            raise ValueError(
                "set TUNEYARD_HEARTBEAT_SECONDS < TUNEYARD_FENCE_SECONDS < TUNEYARD_LEASE_SECONDS: a supervisor must "
                "kill its trainer before another worker may take the job"
            )
        if self.mode == "production":
            self._refuse_defaults()
        return self

    def _refuse_defaults(self) -> None:
        if self.database_url is None:
            raise ValueError("set TUNEYARD_DATABASE_URL: production does not run on the built-in SQLite file")
        key = self.admin_key.get_secret_value() if self.admin_key else ""
        if not key.startswith("ty_") or len(key) < 35 or len(set(key)) < 10:
            raise ValueError("set TUNEYARD_ADMIN_KEY to `ty_` and at least 32 random characters")

    @property
    def home_path(self) -> Path:
        """The home as an absolute path."""
        return self.home.expanduser().absolute()

    @property
    def database(self) -> str:
        """The database URL in force."""
        return self.database_url or f"sqlite:///{self.home_path / 'tuneyard.db'}"
