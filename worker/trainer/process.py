"""The trainer's process: an order in, files in scratch and one last word out. No SQL, no credentials, no network."""

import socket
from pathlib import Path
from typing import Any

from app.domain.errors import JobFault
from worker import catalogue, ingest
from worker.ingest import model as imported
from worker.report import Failed, Finished, Order, Reporter
from worker.trainer import application, measure, orchestration, training
from worker.trainer.trouble import translated


def main(order_path: str, connection: socket.socket) -> int:
    """Carry out the order in a file and report over `connection`; 0 after Finished, 1 after Failed."""
    order = Order.model_validate_json(Path(order_path).read_text(encoding="utf-8"))
    reporter = Reporter(connection, silence_seconds=order.silence_seconds)
    return carry_out(order, reporter)


def carry_out(order: Order, reporter: Reporter) -> int:
    """Do what an order says and report exactly one Finished or Failed."""
    try:
        finished = _perform(order, reporter)
    except JobFault as fault:
        reporter.send(Failed(error=fault.failure("train")))
        return 1
    except Exception as error:
        reporter.send(Failed(error=translated(error, reporter).failure("train")))
        return 1
    reporter.send(finished)
    return 0


def _perform(order: Order, reporter: Reporter) -> Finished:
    try:
        match order.recipe:
            case "ingest":
                return Finished(outcome="succeeded", dataset=ingest.run(order, reporter))
            case "import_model":
                return Finished(outcome="succeeded", model=imported.run(order, reporter))
            case "measure":
                return Finished(outcome="succeeded", result=measure.run(order, reporter))
            case _ if catalogue.recipe(order.recipe).plan is not None:
                return orchestration.run(order, reporter)
            case _ if order.kind == "apply":
                return application.run(order, reporter)
            case _:
                return training.train(order, reporter)
    except ingest.Interrupted as interrupted:
        return Finished(outcome=_OUTCOMES[interrupted.wanted])


_OUTCOMES: dict[str, Any] = {"cancel": "cancelled", "stop": "cancelled", "pause": "paused", "drain": "drained"}
