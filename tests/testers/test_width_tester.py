import pytest
import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from pml_distill.testers import WidthTester


class First(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, rows):
        return rows[:, : self.width]


@pytest.mark.parametrize("normalize", [True, False])
def test_figures_are_those_of_shorter_networks(normalize):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) // 3
    rows = torch.randn(30, 12, generator=generator)[labels] + 0.8 * torch.randn(90, 12, generator=generator)
    splits = {"a": (rows[:45], labels[:45]), "b": (rows[45:], labels[45:] - 15)}
    data = {name: torch.utils.data.TensorDataset(*split) for name, split in splits.items()}
    cpu = torch.device("cpu")
    settings = {"data_device": cpu, "dataloader_num_workers": 0, "normalize_embeddings": normalize}
    settings["accuracy_calculator"] = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count", device=cpu
    )
    for chosen in ([("a", ["a"])], [("a", ["b"])]):
        found = WidthTester(widths=(3, 8), **settings).test(data, 1, torch.nn.Identity(), splits_to_eval=chosen)["a"]
        for width, prefix in ((3, "width_3_"), (8, "width_8_"), (12, "")):
            usual = GlobalEmbeddingSpaceTester(**settings).test(data, 1, First(width), splits_to_eval=chosen)["a"]
            for name in ("precision_at_1_level0", "mean_average_precision_at_r_level0"):
                assert found[f"{prefix}{name}"] == pytest.approx(usual[name]), (width, name)
    with pytest.raises(ValueError, match=r"widths must be from 1 to 12, .* but are \(16,\)"):
        WidthTester(widths=(16,), **settings).test(data, 1, torch.nn.Identity())
