"""The API and the task: `uvicorn tests.benchmarks.usual.api:api`, `celery -A tests.benchmarks.usual.api worker`."""

import os
import subprocess
import sys
import uuid
from typing import Any

from celery import Celery
from fastapi import FastAPI

api = FastAPI()
app = Celery("usual", broker=os.environ.get("USUAL_BROKER", "memory://"))
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True


@app.task
def train(job: str, settings: dict[str, Any]) -> None:
    """Start the training script and wait for its end."""
    options = [f"--{name}={value}" for name, value in settings.items()]
    subprocess.run([sys.executable, "-m", "tests.benchmarks.usual.train", f"--job={job}", *options], check=True)


@api.post("/jobs", status_code=201)
def create(settings: dict[str, Any]) -> dict[str, str]:
    """Queue a job."""
    job = uuid.uuid4().hex
    train.delay(job, settings)  # pyright: ignore[reportFunctionMemberAccess]
    return {"id": job}
