import pytest
import torch
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.logging_presets import HookContainer, get_record_keeper

from pml_distill.evaluation import HashAccuracyCalculator
from pml_distill.losses import CentralSimilarityLoss, DeepCauchyHashingLoss
from pml_distill.testers import MultiLabelTester

MAP = "mean_average_precision"


@pytest.fixture
def splits():
    """Two splits of 48 samples, each the sum of the directions of its labels."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(6, 12, generator=generator)
    labels = (torch.rand(96, 6, generator=generator) < 0.2).float()
    data = labels @ directions + 0.1 * torch.randn(96, 12, generator=generator)
    return {
        name: torch.utils.data.TensorDataset(data[part], labels[part])
        for name, part in (("train", slice(48)), ("val", slice(48, 96)))
    }


@pytest.mark.parametrize("loss", [DeepCauchyHashingLoss(), CentralSimilarityLoss(6, 16)], ids=["dch", "csq"])
def test_trains_and_measures_what_shares_a_label(splits, loss, tmp_path):
    torch.manual_seed(0)
    trunk = torch.nn.Sequential(torch.nn.Linear(12, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    hooks = HookContainer(get_record_keeper(str(tmp_path / "logs"))[0], primary_metric=MAP)
    tester = MultiLabelTester(
        end_of_testing_hook=hooks.end_of_testing_hook,
        accuracy_calculator=HashAccuracyCalculator(include=(MAP,), device=torch.device("cpu")),
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
    )
    trainer = MetricLossOnly(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.Adam(trunk.parameters(), 0.01)},
        batch_size=24,
        loss_funcs={"metric_loss": loss},
        dataset=splits["train"],
        label_hierarchy_level="all",
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
        end_of_epoch_hook=hooks.end_of_epoch_hook(
            tester, splits, str(tmp_path / "models"), splits_to_eval=[("val", ["train"])]
        ),
    )
    before = tester.test(splits, 0, trunk, splits_to_eval=[("val", ["train"])])["val"][f"{MAP}_level0"]
    trainer.train(num_epochs=20)
    after = tester.all_accuracies["val"][f"{MAP}_level0"]
    assert after > before
    (query, query_labels), (reference, reference_labels) = (splits[name].tensors for name in ("val", "train"))
    direct = tester.accuracy_calculator.get_accuracy(trunk(query), query_labels, trunk(reference), reference_labels)
    assert after == pytest.approx(direct[MAP])


def test_the_default_calculator_counts_what_shares_a_label(splits):
    tester = MultiLabelTester(data_device=torch.device("cpu"), dataloader_num_workers=0)
    found = tester.test(splits, 1, torch.nn.Identity())["val"]
    data, labels = splits["val"].tensors
    similar = torch.nn.functional.normalize(data) @ torch.nn.functional.normalize(data).T
    relevant = (labels @ labels.T > 0).fill_diagonal_(False)
    first = similar.fill_diagonal_(-2).argmax(dim=1)
    hits = relevant[torch.arange(48), first][relevant.any(dim=1)]
    assert found["precision_at_1_level0"] == pytest.approx(hits.double().mean().item())
    assert {"r_precision_level0", "mean_average_precision_at_r_level0"} <= set(found)


def test_a_calculator_that_compares_columns_is_refused():
    with pytest.raises(ValueError, match="accuracy_calculator compares labels by equality.*label_comparison_fn"):
        MultiLabelTester(accuracy_calculator=AccuracyCalculator(include=("precision_at_1",)))
