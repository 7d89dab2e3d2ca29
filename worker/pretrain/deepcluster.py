"""DeepCluster: cluster the images with k-means, learn to name each image's cluster, and begin again.

Caron, Bojanowski, Joulin, Douze: Deep Clustering for Unsupervised Learning of Visual Features, 2018, arXiv 1807.05520.
`head: centroids` is what DeepCluster-v2 does instead of a new classifier after every clustering (Caron et al.,
arXiv 2006.09882, appendix D): the centroids themselves classify, so nothing has to be learnt anew. The paper's Sobel
filter is left out: at 32 pixels and less colour and strength are much of what there is to see.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from app.domain.errors import UserFault
from worker.data.policy import Level, augmented
from worker.parts import clustering, kmeans
from worker.parts.whitening import whitening
from worker.recipe import Batch, FeaturesOf, Info, PretrainParams, Progress, Recipe, Requires

PER_CLUSTER, MOST = 32, 10000  # images per cluster where nobody says; the paper has 128 of them in 10,000 clusters
# At least, between two clusterings where nobody says. The paper clusters after every epoch of 5,000 steps; but to look
# at all images costs a third of an epoch, so that would be a quarter of the run.
EPOCHS, STEPS = 3, 50
PIXELS = 16  # a side, at most, of images whose pixels are clustered
ROWS, COLUMNS = 20, 8  # of the contact sheet
NUMBERS = ("nmi_before", "nmi", "matched_accuracy", "purity")


class DeepClusterParams(PretrainParams):
    """What is clustered, how finely and how often, and how the clusters are learnt."""

    clusters: int | None = Field(
        default=None, ge=2, le=100_000,
        description="k, best some ten times the number of classes; null is one for 32 images, at most 10000.",
    )  # fmt: skip
    cluster_on: Literal["features", "pixels"] = Field(
        default="features", description="Of the backbone, time and again; or of the images, once."
    )
    reassign_every: int | None = Field(
        default=None, ge=1, le=10_000,
        description="Epochs between clusterings, each with a new nmi, which are what patience counts where runs stop "
        "early by it; null is 3, or more if that is under 50 steps.",
    )  # fmt: skip
    pca_dimension: int = Field(
        default=256, ge=1, le=4096, description="Width, at most, to which whitening reduces what is clustered."
    )
    head: Literal["new", "centroids"] = Field(
        default="new",
        description="A linear classifier that starts anew after each clustering, or the centroids (DeepCluster-v2).",
    )
    temperature: float = Field(default=0.1, gt=0, le=10, description="Of the similarities, where centroids classify.")
    balanced: bool = Field(default=True, description="Draw images so that each cluster comes equally often.")
    iterations: int = Field(default=20, ge=1, le=1000, description="Of k-means, at most.")
    augmentation: Level = Field(default="standard", description="Of the image whose cluster is to be named.")


class DeepCluster(nn.Module):
    """A backbone, a classifier of clusters, and the clusters; the pseudo-labels are a buffer."""

    couples_batch = False

    def __init__(self, params: DeepClusterParams, backbone: nn.Module, info: Info) -> None:
        super().__init__()
        self.backbone, self._params, self._labelled = backbone, params, info.labelled > 0
        self.fixed_numbers = NUMBERS if params.cluster_on == "pixels" else ()
        self._white = (1 - torch.tensor(info.mean)) / torch.tensor(info.std)
        count = params.clusters or min(max(info.samples // PER_CLUSTER, 2), MOST)
        if count > info.samples:
            raise UserFault(
                f"params.clusters: {count} clusters need at least as many training samples; there are {info.samples}.",
                code="too_many_clusters",
            )
        if params.head == "centroids" and params.cluster_on == "pixels":
            raise UserFault(
                "params.head: centroids of pixels do not classify features; use a new head.", code="head_of_pixels"
            )
        side = min(info.image_size, PIXELS)
        wide = info.channels * side**2 if params.cluster_on == "pixels" else info.feature_dimension
        self._pixels = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten())
        narrow = min(params.pca_dimension, wide)
        self.classifier = nn.Linear(info.feature_dimension, count) if params.head == "new" else None
        self.register_buffer("assignment", torch.arange(info.samples) % count)  # int64 [samples]
        self.register_buffer("centroids", torch.zeros(count, narrow))
        self.register_buffer("shift", torch.zeros(wide))
        self.register_buffer("matrix", torch.zeros(wide, narrow))
        self.register_buffer("told", torch.full((len(NUMBERS),), math.nan))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        wanted = self.get_buffer("assignment")[batch["index"]]
        logits = self._logits(self.backbone(batch["image"]))
        told = dict(zip(NUMBERS, self.get_buffer("told"), strict=True))
        # Only where they are new: whoever waits for a better one waits for another clustering.
        shown = (NUMBERS if self._labelled else NUMBERS[:1]) if self._due(progress) else ()
        hit = (logits.argmax(1) == wanted).float().mean()
        return {"loss": F.cross_entropy(logits, wanted), "hit": hit, **{name: told[name] for name in shown}}

    def before_epoch(self, features_of: FeaturesOf, progress: Progress) -> list[nn.Parameter]:
        """Cluster all training images where it is time; give the parameters that begin anew."""
        if not self._due(progress):
            return []
        points = features_of(self._pixels if self._params.cluster_on == "pixels" else None)
        shift, matrix = whitening(points, self._params.pca_dimension)
        embedded = _embedded(points, shift, matrix)
        seed = int(torch.randint(2**62, ()))  # from the loop's own draw for this epoch
        k = len(self.get_buffer("centroids"))
        found = kmeans.kmeans(
            embedded, k, generator=torch.Generator().manual_seed(seed), iterations=self._params.iterations,
            tick=features_of.tick,
        )  # fmt: skip
        self._tell(found.assignment, features_of.labels, first=progress.epoch == 0)
        self.get_buffer("shift").copy_(shift)
        self.get_buffer("matrix").zero_()[:, : matrix.shape[1]] = matrix
        self.get_buffer("centroids").zero_()[:, : matrix.shape[1]] = found.centroids
        self.get_buffer("assignment").copy_(found.assignment)
        if self.classifier is None:
            return []
        self.classifier.reset_parameters()
        return list(self.classifier.parameters())

    def sample_weights(self, labels: Tensor) -> Tensor | None:  # noqa: ARG002 (clusters count here, not labels)
        """Draw from every cluster equally often (section 3.3, "trivial parametrization")."""
        if not self._params.balanced:
            return None
        assignment = self.get_buffer("assignment").cpu()
        return 1 / torch.bincount(assignment, minlength=len(self.get_buffer("centroids")))[assignment].double()

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Give how badly the cluster whose centroid is nearest is named, of images that were not clustered: [batch]."""
        features = self.backbone(batch["image"])
        points = self._pixels(batch["image"]) if self._params.cluster_on == "pixels" else features
        embedded = _embedded(points.float(), self.get_buffer("shift"), self.get_buffer("matrix"))
        wanted, _ = kmeans.nearest(embedded, self.get_buffer("centroids"))
        return {"loss": F.cross_entropy(self._logits(features), wanted, reduction="none")}

    def picture_rows(self) -> Tensor:
        """Choose some members of the largest clusters: int64 [n]."""
        return torch.cat(self._members())

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Show a contact sheet: a row of images for each cluster, the largest ones first; white where there is none."""
        images = batch["image"].float()
        rows: list[Tensor] = []
        for found in images.split([len(members) for members in self._members()]):
            blank = self._white.to(images)[:, None, None].expand(COLUMNS - len(found), *images.shape[1:])
            rows += [found, blank]
        return {"clusters": torch.cat(rows)}

    def _members(self) -> list[Tensor]:
        assignment = self.get_buffer("assignment").cpu()
        largest = torch.bincount(assignment).argsort(descending=True, stable=True)[:ROWS]
        found = [(assignment == number).nonzero().squeeze(1) for number in largest]
        return [rows[:: max(1, len(rows) // COLUMNS)][:COLUMNS] for rows in found if len(rows)]

    def _due(self, progress: Progress) -> bool:
        if self._params.cluster_on == "pixels":
            return progress.epoch == 0  # they do not change
        every = self._params.reassign_every
        every = every or max(EPOCHS, math.ceil(STEPS * progress.epochs / max(progress.steps, 1)))
        return progress.epoch % every == 0

    def _logits(self, features: Tensor) -> Tensor:
        if self.classifier is not None:
            return self.classifier(features).float()
        embedded = _embedded(features, self.get_buffer("shift"), self.get_buffer("matrix"))
        return embedded @ F.normalize(self.get_buffer("centroids"), dim=1).T / self._params.temperature

    def _tell(self, assignment: Tensor, labels: Tensor, *, first: bool) -> None:
        """Note how far the clusters agree with those before, and with labels; nothing here is trained on."""
        before = clustering.contingency(self.get_buffer("assignment"), assignment)
        found = {"nmi_before": math.nan if first else clustering.normalised_mutual_information(before)}
        if self._labelled:
            found |= clustering.agreement(assignment.cpu(), labels.cpu())
        self.get_buffer("told").copy_(torch.tensor([found.get(name, math.nan) for name in NUMBERS]))


def _embedded(points: Tensor, shift: Tensor, matrix: Tensor) -> Tensor:
    """Whiten, reduce and normalise (section 3.3): float32 [n, at most pca_dimension]."""
    with torch.autocast(points.device.type, enabled=False):
        return F.normalize((points.float() - shift) @ matrix, dim=1)


def inputs(params: DeepClusterParams, info: Info) -> Callable[[Batch, Generator], Batch] | None:
    """Augment the image whose cluster is to be named."""
    return augmented(params.augmentation, info)


RECIPE = Recipe(
    name="deepcluster",
    kind="pretrain",
    version="1",
    summary="Learn features without labels: name the cluster of each image, cluster by what was learnt, and again.",
    tasks=("image_classification", "unlabelled_images"),
    Params=DeepClusterParams,
    requires=Requires(
        min_samples=3,
        min_batch=2,
        fewer_than_samples=("clusters",),
        alone="it looks at all images of an epoch by their numbers, and chooses those of its steps itself",
    ),
    defaults={"training": {"epochs": 100, "weight_decay": 1e-5}},
    build=DeepCluster,
    inputs=inputs,
)
