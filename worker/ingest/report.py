"""What ingest has to say about a dataset: counts, sizes, bad files, duplicates, leakage, imbalance."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.domain.datasets import SPLITS, Shard, Split
from worker.ingest import inspectors
from worker.ingest.archive import Problem
from worker.ingest.rows import Source
from worker.ingest.shards import names_of

NAMED = 1000  # bad files that the report itself names; the job's log names the others
EXAMPLES = 20
_MODES = (("alpha", inspectors.ALPHA), ("palette", inspectors.PALETTE), ("cmyk", inspectors.CMYK))


class Report:
    """Collects what was seen, row by row in the order of the shards; a row costs 33 bytes."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._tables: list[np.ndarray] = []  # of VERDICT without what is not needed any more
        self._labels: list[np.ndarray] = []
        self._splits: list[np.ndarray] = []
        self.bad: list[Problem] = list(source.problems)
        self.samples = 0
        self.bytes = 0

    def add(self, split: Split, table: np.ndarray, labels: Sequence[int | None], count: int) -> None:
        """Note rows that were kept: `table[i]` of dtype `VERDICT`, and their bytes together."""
        slim = np.empty(len(table), _SLIM)
        for name in ("height", "width", "format", "channels", "bits", "flags"):
            slim[name] = table[name]
        slim["digest"] = np.frombuffer(table["digest"].tobytes(), "<u8").reshape(-1, 4)[:, :2]
        self._tables.append(slim)
        self._labels.append(np.array([-1 if label is None else label for label in labels], np.int32))
        self._splits.append(np.full(len(table), SPLITS.index(split), np.uint8))
        self.samples += len(table)
        self.bytes += count

    def facts(self) -> dict[str, Any]:
        """Give the fields of `DatasetFacts` that follow from the rows."""
        table, labels, splits = self._columns()
        counts = {split: int((splits == number).sum()) for number, split in enumerate(SPLITS)}
        kept = {split: count for split, count in counts.items() if count}
        return {
            "splits": kept,
            "labelled": {split: int((labels[splits == SPLITS.index(split)] >= 0).sum()) for split in kept},
            "image_sizes": {
                f"{least}_{side}": int(getattr(table[side], least)()) for least in ("min", "max") for side in _SIDES
            },
            "channels": int(table["channels"].max()),
            "bits": int(table["bits"].max()),
        }

    def json(self, shards: Sequence[Shard]) -> dict[str, Any]:
        """Give the whole report; `shards` are read for the names of duplicates."""
        table, labels, splits = self._columns()
        sizes = Counter(zip(table["width"].tolist(), table["height"].tolist(), strict=True))
        duplicates, leakage = _duplicates(table["digest"], labels, splits, shards)
        by_split = {split: self._split(labels[splits == n]) for n, split in enumerate(SPLITS) if (splits == n).any()}
        report = {
            "samples": len(table),
            "bytes": self.bytes,
            "splits": by_split,
            "sizes": {
                **{f"{word}_{side}": int(value) for side in _SIDES for word, value in (
                    ("min", table[side].min()), ("median", np.median(table[side])), ("max", table[side].max()))},
                "distinct": len(sizes),
                "most_common": [[width, height, count] for (width, height), count in sizes.most_common(5)],
            },
            "formats": {
                name: int(count)
                for name, count in zip(inspectors.FORMATS, np.bincount(table["format"], minlength=4), strict=True)
                if count
            },
            "modes": {
                "grey": int((table["channels"] == 1).sum()), "sixteen_bit": int((table["bits"] == 16).sum()),
                **{name: int((table["flags"] & bit > 0).sum()) for name, bit in _MODES},
            },
            "bad": {
                "count": len(self.bad),
                "reasons": dict(Counter(problem.reason for problem in self.bad).most_common(EXAMPLES)),
                "files": [problem._asdict() for problem in self.bad[:NAMED]],
            },
            "ignored": {
                "count": len(self._source.ignored),
                "files": [problem._asdict() for problem in self._source.ignored[:EXAMPLES]],
            },
            "duplicates": duplicates,
            "leakage": leakage,
            "imbalance": self._imbalance(labels[splits == 0]),
        }  # fmt: skip
        report["warnings"] = [*self._source.warnings, *self._warnings(report, labels, splits)]
        return report

    def _columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._tables, self._labels, self._splits = (
            [np.concatenate(column)] for column in (self._tables, self._labels, self._splits)
        )
        return self._tables[0], self._labels[0], self._splits[0]

    def _split(self, labels: np.ndarray) -> dict[str, Any]:
        known = labels[labels >= 0]
        counts = np.bincount(known, minlength=len(self._source.classes)).tolist()
        return {
            "samples": len(labels),
            "labelled": len(known),
            "unlabelled": len(labels) - len(known),
            "classes": dict(zip(self._source.classes, counts, strict=True)),
        }

    def _imbalance(self, labels: np.ndarray) -> dict[str, Any] | None:
        counts = np.bincount(labels[labels >= 0], minlength=len(self._source.classes))
        if not counts.sum():
            return None
        most, least = int(counts.argmax()), int(counts.argmin())
        return {
            "largest": {"class": self._source.classes[most], "samples": int(counts[most])},
            "smallest": {"class": self._source.classes[least], "samples": int(counts[least])},
            "ratio": round(float(counts[most] / counts[least]), 3) if counts[least] else None,
        }

    def _warnings(self, report: dict[str, Any], labels: np.ndarray, splits: np.ndarray) -> list[str]:
        classes, found = self._source.classes, []
        train = np.bincount(labels[(splits == 0) & (labels >= 0)], minlength=len(classes))
        if not (splits == 0).any():
            found.append("there is no train split")
        if len(classes) == 1:
            found.append(f"there is one class only ({classes[0]!r}): fine-tuning needs at least two")
        empty = [name for name, count in zip(classes, train, strict=True) if not count]
        if len(classes) > 1 and empty and (splits == 0).any():
            found.append(f"no training image of {len(empty)} of {len(classes)} classes: {', '.join(empty[:5])}")
        imbalance = report["imbalance"]
        if imbalance and imbalance["ratio"] and imbalance["ratio"] >= 10:
            found.append(f"the largest class has {imbalance['ratio']:g} times the images of the smallest")
        if report["leakage"]["rows"]:
            found.append(f"{report['leakage']['rows']} images of another split lie in the training split too")
        if report["duplicates"]["conflicting_labels"]:
            found.append(f"{report['duplicates']['conflicting_labels']} images occur with different labels")
        if report["bad"]["count"]:
            found.append(f"{report['bad']['count']} files were left out because they cannot be used")
        wide = report["modes"]["sixteen_bit"]
        if 0 < wide < report["samples"]:
            found.append(f"{wide} of {report['samples']} images have 16 bits a channel: all are trained on at 16")
        if report["modes"]["alpha"]:
            found.append(f"{report['modes']['alpha']} images have transparency, which training drops")
        return found


_SIDES = ("height", "width")
_SLIM = np.dtype(
    [("digest", "<u8", (2,)), ("height", "<u4"), ("width", "<u4"), ("format", "u1"), ("channels", "u1"),
     ("bits", "u1"), ("flags", "u1")]
)  # fmt: skip


def _duplicates(
    digests: np.ndarray, labels: np.ndarray, splits: np.ndarray, shards: Sequence[Shard]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Find images whose bytes occur more than once: in all, and in train and another split."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable, so a group begins with its first row
    same = (digests[order][1:] == digests[order][:-1]).all(axis=1)
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    ends = np.append(starts[1:], len(order))
    repeated = np.flatnonzero(ends - starts > 1)
    groups = [np.sort(order[starts[g] : ends[g]]) for g in repeated]
    groups.sort(key=lambda rows: rows[0])
    crossing = [rows for rows in groups if splits[rows[0]] == 0 and (splits[rows] > 0).any()]
    conflicting = sum(len(set(labels[rows][labels[rows] >= 0].tolist())) > 1 for rows in groups)
    examples = [[rows[0], rows[1]] for rows in groups[:EXAMPLES]]
    leaks = [[rows[0], rows[splits[rows] > 0][0]] for rows in crossing[:EXAMPLES]]
    names = names_of(shards, {int(row) for pair in examples + leaks for row in pair})

    def named(pairs: list[list[Any]]) -> list[list[dict[str, str]]]:
        return [[{"split": SPLITS[splits[row]], "path": names[int(row)]} for row in pair] for pair in pairs]

    return (
        {
            "rows": int((ends - starts)[repeated].sum() - len(repeated)),
            "groups": len(groups),
            "conflicting_labels": int(conflicting),
            "examples": named(examples),
        },
        {
            "rows": sum(int((splits[rows] > 0).sum()) for rows in crossing),
            "by_split": {
                split: sum(int((splits[rows] == number).sum()) for rows in crossing)
                for number, split in enumerate(SPLITS)
                if number and any((splits[rows] == number).any() for rows in crossing)
            },
            "examples": named(leaks),
        },
    )
