"""The demo's experiment: a teacher, a student alone, and the same student with each distillation loss."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, FaissKMeans
from torch import nn

from pml_distill.datasets import Digits, Glyphs
from pml_distill.evaluation import asymmetric_accuracy, model_cost, neighbor_agreement
from pml_distill.losses import (
    AbsoluteTeacherLoss,
    AsymmetricRegressionLoss,
    BaseDistillationLoss,
    CollaborativeRankLoss,
    CorrelationCongruenceLoss,
    CosineTeacherLoss,
    DarkRankLoss,
    DecoupledDifferentialLoss,
    LogitDistillationLoss,
    MutualDistanceLoss,
    ProbabilisticTransferLoss,
    RankPreservationLoss,
    RegressionTeacherLoss,
    RelativeTeacherLoss,
    RelaxedContrastiveLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    SimilarityDistributionLoss,
    SimilarityPreservingLoss,
    SimilarityRegressionLoss,
    catalogue,
)
from pml_distill.models import SmallResNet
from pml_distill.teachers import FrozenTeacher
from pml_distill.teachers.fingerprint import digest_of
from pml_distill.trainers import DistillationWithClassifier, LossWeightRamp
from pml_distill.utils.files import whole_file

EMBEDDING_SIZE = 128
BATCH_SIZE = 128
PER_CLASS = 4
TEACHER_WIDTH, STUDENT_WIDTH = 32, 8
#: On the validation classes the student alone does best from 2e-2 to 3e-2; the teacher was given what trains it well.
TEACHER_RATE, STUDENT_RATE = 3e-3, 2e-2
DATASETS = {"glyphs": Glyphs, "digits": Digits}


@dataclass(frozen=True)
class Distillation:
    """A loss to distil with and its weight beside the metric loss."""

    make: Callable[[], BaseDistillationLoss]
    weight: float

    @property
    def aligned(self) -> bool:
        """Whether a student that learns all it can stands in the teacher's own space, for asymmetric retrieval."""
        loss = self.make()
        entry = next(entry for entry in catalogue() if entry.name == type(loss).__name__)
        # A queue of the student's own compares relations alone.
        return entry.aligned and loss.equal_widths


@dataclass(frozen=True)
class Supervision:
    """A loss on the labels, built for a number of classes, and the miner before it, if it needs one."""

    make: Callable[[int], nn.Module] = lambda num_classes: MultiSimilarityLoss()
    miner: Callable[[], nn.Module] | None = None


MULTI_SIMILARITY = Supervision()
QUEUE = (1024, EMBEDDING_SIZE)
#: Weights chosen after a search by benchmarks/search_weights.py on the validation classes of Glyphs.
LOSSES = {
    "soft_dark_rank": Distillation(lambda: DarkRankLoss("soft"), 0.01),
    "hard_dark_rank": Distillation(lambda: DarkRankLoss("hard"), 0.01),
    "similarity_regression": Distillation(SimilarityRegressionLoss, 1.0),
    "absolute_teacher": Distillation(AbsoluteTeacherLoss, 3.0),
    "relative_teacher": Distillation(RelativeTeacherLoss, 1.0),
    "logit_distillation": Distillation(lambda: LogitDistillationLoss(temperature=4), 0.03),
    "cosine_teacher": Distillation(CosineTeacherLoss, 3.0),
    "regression_teacher": Distillation(RegressionTeacherLoss, 2.0),
    "asymmetric_regression": Distillation(AsymmetricRegressionLoss, 10.0),
    "rkd_distance": Distillation(RKDDistanceLoss, 10.0),
    "rkd_angle": Distillation(RKDAngleLoss, 10.0),
    "similarity_preserving": Distillation(SimilarityPreservingLoss, 20.0),
    "probabilistic_transfer": Distillation(ProbabilisticTransferLoss, 15.0),
    "correlation_congruence": Distillation(CorrelationCongruenceLoss, 2.0),
    "relaxed_contrastive": Distillation(RelaxedContrastiveLoss, 8.0),
    "mutual_distance": Distillation(MutualDistanceLoss, 1.5),
    "rank_preservation": Distillation(RankPreservationLoss, 0.05),
    "decoupled_differential": Distillation(DecoupledDifferentialLoss, 0.05),
    "collaborative_rank": Distillation(lambda: CollaborativeRankLoss(queue_size=QUEUE[0], width=QUEUE[1]), 0.3),
    "compress": Distillation(lambda: SimilarityDistributionLoss(*QUEUE), 0.2),
    "compress_two_queues": Distillation(lambda: SimilarityDistributionLoss(*QUEUE, student_width=EMBEDDING_SIZE), 0.1),
    "contextual_similarity": Distillation(
        lambda: SimilarityDistributionLoss(*QUEUE, 1.0, 0.01, include_batch=True, topk=128), 0.3
    ),
}
#: What the demo compares unless asked for others.
CORE = tuple(LOSSES)[:6]


@dataclass(frozen=True)
class DemoConfig:
    """What makes two runs of the demo comparable; an output folder holds the runs of one configuration."""

    dataset: str = "glyphs"
    epochs: int = 10
    train_split: str = "train+val"
    test_split: str = "test"


def layout_for(width: int) -> torch.memory_format:
    """Return the layout of a ResNet's weights: ``channels_last``, a third faster on the CPU, from 8 channels on.

    With fewer the backward pass of a strided 1x1 convolution breaks the memory in it, in torch 2.14 with AVX2.
    """
    return torch.channels_last if width >= 8 else torch.contiguous_format


class Demo:
    """All runs of one configuration in one folder.

    A finished run has a ``result.json`` in its folder and is never computed again; an interrupted one goes on from its
    last epoch.

    Args:
        config: what to compare.
        out: the folder; created if missing.
        device: where to train.

    A subclass may set other attributes or load other data:

    Attributes:
        metrics: of PML's ``AccuracyCalculator``, the figures of a run.
        batch_size, workers, amp_dtype, teacher_width, teacher_rate: how all networks are trained.

    Raises:
        ValueError: ``out`` holds the runs of another configuration, or of data with other classes.
    """

    metrics: tuple[str, ...] = ("precision_at_1", "mean_average_precision_at_r")
    batch_size = BATCH_SIZE
    workers = 0
    amp_dtype: torch.dtype | None = None
    teacher_width: Any = TEACHER_WIDTH
    teacher_rate = TEACHER_RATE

    def __init__(self, config: DemoConfig, out: str | os.PathLike, device: torch.device):
        self.config, self.out, self.device = config, Path(out), device
        self.out.mkdir(parents=True, exist_ok=True)
        self.train_set, self.test_set = self.load(config.train_split, True), self.load(config.test_split, False)
        self.claim_folder()
        self.image_shape = tuple(self.test_set[0][0].shape)
        self.num_classes = len(set(self.train_set.labels.tolist()))
        logging.getLogger("PML").setLevel(logging.ERROR)

    def load(self, split: str, training: bool) -> Any:
        """Return a split of the dataset, to train or to test on; it has ``labels``, a tensor."""
        return DATASETS[self.config.dataset](split)

    def claim_folder(self) -> None:
        """Write configuration and data into the folder, or check that they are the ones there."""
        # The labels too: which classes Glyphs has depends on the version of matplotlib.
        labels = torch.cat([torch.as_tensor(data.labels) for data in (self.train_set, self.test_set)])
        path, ours = self.out / "config.json", asdict(self.config) | {"labels": digest_of(labels)}
        # Looked for before the configuration: another process may claim the folder meanwhile.
        others = any(not other.name.startswith(path.name) for other in self.out.iterdir())
        if not path.exists():
            if others:
                raise ValueError(f"out folder {self.out} is not empty and holds no demo; choose another folder.")
            with whole_file(path) as unfinished:
                unfinished.write_text(json.dumps(ours, indent=2))
        theirs = json.loads(path.read_text())
        if theirs != ours:
            raise ValueError(f"out folder {self.out} holds a demo with {theirs}, not {ours}; choose another folder.")

    def results(self) -> list[dict]:
        """Return the finished runs."""
        return [json.loads(path.read_text()) for path in sorted(self.out.glob("seed*/*/result.json"))]

    def run(
        self,
        name: str,
        seed: int,
        distillation: Distillation | None = None,
        learning_rate: float = STUDENT_RATE,
        width: Any = STUDENT_WIDTH,
        supervision: Supervision = MULTI_SIMILARITY,
    ) -> dict:
        """Train and test one network, unless that has been done, and return its figures.

        Args:
            name: ``teacher``, or whatever a student's run shall be called.
            seed: of the initial weights, the order of the data and its augmentation.
            distillation: what the student learns beside the metric loss; None for the student alone.
            learning_rate: the student's.
            width: the student's, as ``networks`` takes it.
            supervision: what a student learns from the labels.
        """
        folder = self.out / f"seed{seed}" / name
        if (folder / "result.json").exists():
            return json.loads((folder / "result.json").read_text())
        if name == "teacher":
            width, learning_rate, supervision = self.teacher_width, self.teacher_rate, MULTI_SIMILARITY
        models = self.networks(width, seed)
        trainer, tester = self.trainer_and_tester(folder, models, seed, learning_rate, distillation, supervision)
        checkpoint = folder / "checkpoint.pth"
        start = trainer.load_checkpoint(checkpoint) if checkpoint.exists() else 1
        trainer.train(start, self.config.epochs)
        tester.test({"test": self.test_set}, self.config.epochs, models["trunk"], models["embedder"])
        accuracies = tester.all_accuracies["test"]
        embeddings = tester.embeddings
        torch.save(embeddings, folder / "embeddings.pth")
        row = {
            "name": name,
            "seed": seed,
            **{metric: accuracies[f"{metric}_level0"] for metric in self.metrics},
            **self.beside_teacher(embeddings, self.embeddings("teacher", seed)),
        }
        torch.save({key: model.state_dict() for key, model in models.items()}, folder / "models.pth")
        with whole_file(folder / "result.json") as unfinished:
            unfinished.write_text(json.dumps(row))
        return row

    def beside_teacher(self, embeddings: torch.Tensor, gallery: torch.Tensor) -> dict[str, float]:
        """Measure embeddings of the test set against the teacher's."""
        asymmetric = asymmetric_accuracy(embeddings, gallery, torch.as_tensor(self.test_set.labels))
        return {
            "asymmetric_map_at_r": asymmetric["mean_average_precision_at_r"],
            "neighbor_agreement": neighbor_agreement(embeddings, gallery),
        }

    def embeddings(self, name: str, seed: int) -> torch.Tensor:
        """Return the normalised embeddings of the test set by a finished run."""
        return torch.load(self.out / f"seed{seed}" / name / "embeddings.pth", map_location=self.device)

    def networks(self, width: Any, seed: int) -> dict[str, nn.Module]:
        """Build trunk, embedder and classifier, the same for a seed whatever is done with them."""
        torch.manual_seed(seed)
        trunk = SmallResNet(width, in_channels=self.image_shape[0])
        embedder = nn.Linear(trunk.output_size, EMBEDDING_SIZE)
        classifier = nn.Linear(EMBEDDING_SIZE, self.num_classes)
        models: dict[str, Any] = {"trunk": trunk, "embedder": embedder, "classifier": classifier}
        return {key: model.to(self.device, memory_format=layout_for(width)) for key, model in models.items()}

    def teacher(self, seed: int) -> tuple[Any, nn.Module]:
        """Return the trained teacher of a seed and its classifier."""
        models = self.networks(self.teacher_width, seed)
        saved = torch.load(self.out / f"seed{seed}" / "teacher" / "models.pth", map_location=self.device)
        for key, model in models.items():
            model.load_state_dict(saved[key])
        return FrozenTeacher(models["trunk"], models["embedder"]), models["classifier"]

    def training_data(self, name: str, seed: int) -> tuple[Any, Any]:
        """Return the dataset that a run learns from and the sampler of an epoch."""
        per_class = PER_CLASS
        while per_class * self.num_classes < self.batch_size:
            per_class *= 2
        return self.train_set, MPerClassSampler(self.train_set.labels, per_class, self.batch_size, len(self.train_set))

    def trainer_and_tester(
        self,
        folder: Path,
        models: dict[str, nn.Module],
        seed: int,
        learning_rate: float,
        distillation: Distillation | None,
        supervision: Supervision = MULTI_SIMILARITY,
    ) -> tuple[DistillationWithClassifier, GlobalEmbeddingSpaceTester]:
        """Build what every run has in common, and add the teacher where there is a loss to distil with."""
        from pytorch_metric_learning.utils import common_functions as c_f
        from pytorch_metric_learning.utils.logging_presets import HookContainer, get_record_keeper

        record_keeper, _, _ = get_record_keeper(str(folder / "logs"), str(folder / "tensorboard"))
        hooks = HookContainer(record_keeper, log_freq=10)
        metric_loss = supervision.make(self.num_classes).to(self.device)
        loss_funcs: dict[str, nn.Module] = {"metric_loss": metric_loss}
        loss_weights = {"metric_loss": 1.0}
        teacher = teacher_classifier = None
        if folder.name == "teacher":
            loss_funcs["classifier_loss"], loss_weights["classifier_loss"] = nn.CrossEntropyLoss(), 0.1
        if distillation is not None:
            loss = distillation.make().to(self.device)
            teacher, classifier = self.teacher(seed)
            if isinstance(loss, LogitDistillationLoss):
                key, teacher_classifier = "logit_distillation_loss", classifier
            else:
                key = "distillation_loss"
            loss_funcs[key], loss_weights[key] = loss, distillation.weight
        parameters = [p for model in models.values() for p in model.parameters()]
        optimizers = {"trunk": torch.optim.AdamW(parameters, weight_decay=1e-2)}
        if any(True for _ in metric_loss.parameters()):
            optimizers["metric_loss"] = torch.optim.AdamW(metric_loss.parameters(), weight_decay=0)
        dataset, sampler = self.training_data(folder.name, seed)
        c_f.NUMPY_RANDOM.seed(seed)
        torch.manual_seed(seed)
        total_steps = self.config.epochs * (len(sampler) // self.batch_size)
        trainer = DistillationWithClassifier(
            models=models,
            optimizers={f"{key}_optimizer": optimizer for key, optimizer in optimizers.items()},
            batch_size=self.batch_size,
            loss_funcs=loss_funcs,
            loss_weights=loss_weights,
            # Without it the relative teacher and the similarity regression lower the accuracy.
            loss_weight_ramps={key: LossWeightRamp() for key in loss_funcs if "distillation" in key},
            total_steps=total_steps,
            dataset=dataset,
            mining_funcs={} if supervision.miner is None else {"tuple_miner": supervision.miner()},
            dataset_labels=dataset.labels.numpy(),
            set_min_label_to_zero=True,
            sampler=sampler,
            lr_schedulers={
                f"{key}_scheduler_by_iteration": torch.optim.lr_scheduler.OneCycleLR(
                    optimizer,
                    learning_rate,
                    total_steps=total_steps,
                    pct_start=0.2,
                )
                for key, optimizer in optimizers.items()
            },
            teacher=teacher,
            teacher_classifier=teacher_classifier,
            amp_dtype=self.amp_dtype,
            data_device=self.device,
            dataloader_num_workers=self.workers,
            end_of_iteration_hook=hooks.end_of_iteration_hook,
            end_of_epoch_hook=lambda trainer: trainer.save_checkpoint(folder / "checkpoint.pth"),
        )

        def end_of_testing(tester: GlobalEmbeddingSpaceTester) -> None:
            hooks.end_of_testing_hook(tester)
            record_keeper.save_records()
            record_keeper.tensorboard_writer.close()
            tester.embeddings = tester.embeddings_and_labels["test"][0]

        tester = GlobalEmbeddingSpaceTester(
            batch_size=512,
            data_device=self.device,
            dataloader_num_workers=self.workers,
            accuracy_calculator=AccuracyCalculator(
                include=self.metrics,
                k="max_bin_count",
                device=self.device,
                knn_func=CustomKNN(LpDistance(), batch_size=1024),
                # PML's own choice would need faiss-gpu wherever there is a GPU.
                kmeans_func=FaissKMeans(niter=20, gpu=False, min_points_per_centroid=1),
            ),
            end_of_testing_hook=end_of_testing,
        )
        return trainer, tester

    def costs(self) -> dict:
        """Measure both networks as they would be deployed: trunk and embedder."""
        return {
            role: model_cost(nn.Sequential(models["trunk"], models["embedder"]), self.image_shape)
            for role, models in (
                ("teacher", self.networks(self.teacher_width, 0)),
                ("student", self.networks(STUDENT_WIDTH, 0)),
            )
        }
