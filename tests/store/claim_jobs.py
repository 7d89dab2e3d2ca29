"""A process that claims jobs until there are none; run by test_concurrency, which reads what it prints: its jobs."""

import sys

from app.store import claims
from app.store.session import make_engine, transaction


def main(url: str, project_id: str, worker: str) -> None:
    """Claim whatever there is; the test's jobs have the highest priority of the database."""
    engine = make_engine(url)
    print("ready", flush=True)
    sys.stdin.readline()  # so that all begin together
    while True:
        with transaction(engine) as session:
            found = claims.claim(
                session, worker=worker, source="poll", internal=True, devices=frozenset({"cpu"}), gpus_free=0,
                lease_seconds=1e6,
            )  # fmt: skip
            if found is None or found[1].project_id != project_id:
                session.rollback()
                break
        held, _ = found
        print(held.job_id, held.attempt)
    engine.dispose()


if __name__ == "__main__":
    main(*sys.argv[1:])
