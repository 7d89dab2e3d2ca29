"""The publisher: never in anybody's way, whatever Redis does; and Celery's settings are those that were tried."""

import math
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import app.broker
from app.broker import INTERNAL_QUEUE, TRAINING_QUEUE, WAKE_TASK, Publisher, celery_app
from app.local.child import Child
from app.local.redis import RedisConfig, find_redis
from app.settings import Settings
from tests.waiting import until

pytestmark = pytest.mark.system


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisConfig]:
    config, program = RedisConfig.for_home(tmp_path), find_redis()
    assert program is not None
    child = Child("redis", [program, "-"], {}, tmp_path, tmp_path / "redis.log", stdin=config.file)
    child.start()
    until(config.socket.exists)
    yield config
    child.sweep()


def settings(url: str | None) -> Settings:
    return Settings(redis_url=url)  # pyright: ignore[reportCallIssue]


def test_a_hint_is_a_job_id_on_the_queue_of_its_class(server: RedisConfig) -> None:
    publisher = Publisher(settings(server.url))
    publisher.wake("job_1")
    publisher.wake("job_2", internal=True)
    publisher.close(timeout=60)
    celery = celery_app(settings(server.url))
    with celery.connection_for_read() as connection:
        for queue, expected in ((TRAINING_QUEUE, ("job_1", False)), (INTERNAL_QUEUE, ("job_2", True))):
            with connection.SimpleQueue(queue) as simple:
                message = simple.get(timeout=60)
            message.ack()
            arguments, named, _ = message.payload
            assert (arguments[0], named["internal"]) == expected
            assert message.headers["task"] == WAKE_TASK
    celery.close()


def test_ten_thousand_hints_at_a_dead_redis_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.broker, "STALE_SECONDS", math.inf)  # or whoever waited would not wait long
    publisher = Publisher(settings(f"redis+socket://{tmp_path}/nothing.sock"))
    began = time.monotonic()
    for index in range(10_000):
        publisher.wake(f"job_{index}")
    assert time.monotonic() - began < 20  # a try each, however short, would take longer
    publisher.close()


def test_a_redis_that_accepts_and_never_answers_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.broker, "STALE_SECONDS", math.inf)
    with socket.create_server(("127.0.0.1", 0)) as hole:
        publisher = Publisher(settings(f"redis://127.0.0.1:{hole.getsockname()[1]}/0"))
        began = time.monotonic()
        for index in range(2000):
            publisher.wake(f"job_{index}")
        publisher.close(timeout=0.5)
        assert time.monotonic() - began < 60  # and not five seconds for each that the queue has no place for


def test_without_a_redis_url_there_is_no_publisher_at_all() -> None:
    before = threading.active_count()
    publisher = Publisher(settings(None))
    publisher.wake("job_1")
    assert threading.active_count() == before
    publisher.close()


def test_redis_coming_back_is_noticed(server: RedisConfig) -> None:
    password, path = server.password, str(server.socket)
    publisher = Publisher(settings(server.url))
    with redis.Redis(unix_socket_path=path, password=password) as client:
        publisher.wake("job_1")
        until(lambda: client.llen(TRAINING_QUEUE) == 1)
        client.client_kill_filter(skipme=True)  # every connection but this one
        publisher.wake("job_2")
        publisher.wake("job_3")
        until(lambda: int(client.llen(TRAINING_QUEUE)) >= 2)  # the broken link may have cost one
    publisher.close()


def test_the_settings_are_those_that_were_tried() -> None:
    celery = celery_app(settings("redis://127.0.0.1:1/0"))
    wanted: dict[str, Any] = {
        "task_acks_late": False, "task_ignore_result": True, "worker_disable_prefetch": True,
        "broker_connection_max_retries": None, "worker_cancel_long_running_tasks_on_connection_loss": False,
        "accept_content": ["json"], "worker_enable_remote_control": False,
    }  # fmt: skip
    assert {name: celery.conf[name] for name in wanted} == wanted
    assert celery.conf.broker_transport_options["health_check_interval"] == 5
    assert celery.conf.broker_transport_options["socket_timeout"] == 5
    celery.close()
