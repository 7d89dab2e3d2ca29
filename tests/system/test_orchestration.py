"""Jobs made of other jobs on a real stack: real pretraining, real children, one slot, one POST each."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest

from app.client import Refused
from tests.system.up import running

pytestmark = pytest.mark.system
NETWORK = {"architecture": "small_cnn", "width": 0.125}


def test_one_post_asks_whether_pretraining_pays_and_one_races_methods(tmp_path: Path) -> None:
    with running(tmp_path / "home") as stack, stack.client() as client:
        dataset = client.datasets.create("digits", builtin="digits")["id"]
        assert client.datasets.wait(dataset, timeout=240)["status"] == "ready"

        def submit(**body: Any) -> str:
            return client.jobs.submit({"dataset": dataset, **body})["id"]

        pretrained = submit(recipe="simclr", model=NETWORK, training={"steps": 3})
        asked = submit(
            recipe="label_efficiency", model=pretrained, params={"labels_per_class": [2], "seeds": 2},
            training={"steps": 4}, priority=5,
        )  # fmt: skip
        heads = submit(
            recipe="label_efficiency", model=pretrained,
            params={"fractions": [0.05, 1], "seeds": 3, "finetune": {"trainable": "head"}}, training={"steps": 50},
        )  # fmt: skip
        race = submit(
            recipe="method_race", model=NETWORK, training={"steps": 3},
            params={"methods": [{"recipe": "simclr"}, {"recipe": "autoencoder"}], "steps": 2},
        )  # fmt: skip
        follows = submit(
            recipe="image_classification", model=race, data={"labels_per_class": 2}, training={"steps": 2}
        )  # fmt: skip
        with pytest.raises(Refused, match=r"params\.methods\.0\.params\.temprature: .*did you mean temperature"):
            submit(
                recipe="method_race", model=NETWORK,
                params={"methods": [{"recipe": "simclr", "params": {"temprature": 1}}, {"recipe": "vae"}]},
            )  # fmt: skip
        ended: dict[str, Any] = {job: client.jobs.wait(job, timeout=600) for job in (asked, heads, race, follows)}

        job = ended[asked]
        assert job["status"] == "succeeded", job["error"]
        assert job["children"] == {"total": 4, "by_status": {"succeeded": 4}}
        assert job["attempt"] == 2, "one to plan, one to gather"
        assert job["result"]["sentence"].startswith("With 2 labels per class, pretraining ")
        assert [(row["start"], row["n"]) for row in job["result"]["rows"]] == [("random", 2), ("model", 2)]
        with httpx.Client(
            base_url=stack.url, headers={"Authorization": f"Bearer {(stack.home / 'key').read_text().strip()}"},
            trust_env=False,
        ) as http:  # fmt: skip
            children = http.get("/v1/jobs", params={"parent": asked}).json()["data"]
            drawn = http.get(f"/v1/jobs/{asked}/files/label_efficiency.svg")
        assert {child["parent"] for child in children} == {asked}
        assert {child["priority"] for child in children} == {5}
        assert {child["plan"]["steps"] for child in children} == {4}
        assert all(child["model"] for child in children), "what the children made is kept"
        assert drawn.headers["content-type"].startswith("image/svg+xml")
        ElementTree.fromstring(drawn.text)

        job = ended[heads]
        assert job["status"] == "succeeded", job["error"]
        assert job["children"]["total"] == 2
        assert [row["n"] for row in job["result"]["rows"]] == [3, 3, 3, 3]

        job = ended[race]
        assert job["status"] == "succeeded", job["error"]
        assert job["children"]["total"] == 3
        assert job["model"] == job["result"]["winner"]["model"]
        won: dict[str, Any] = dict(client.models.get(job["model"]))
        assert (won["status"], won["lineage"]["base_model"] is not None) == ("ready", True), "it went on from round one"
        assert ended[follows]["status"] == "succeeded", "a job may start from the winner before it is known"
