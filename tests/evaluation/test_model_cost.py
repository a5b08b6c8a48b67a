import torch

from pml_distill.evaluation import model_cost
from pml_distill.models import SmallResNet


def test_counts_equal_the_closed_form():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.Flatten(), torch.nn.Linear(144, 10))
    model[0].train()
    cost = model_cost(model, (3, 8, 8), batch_sizes=(1, 4), repeats=2)
    assert cost.parameters == 3 * 4 * 9 + 144 * 10 + 10
    assert cost.flops == 2 * (3 * 4 * 9 * 36 + 144 * 10)
    assert set(cost.latency) == {1, 4} and min(cost.latency.values()) > 0
    assert model.training


def test_small_resnet_has_the_parameters_it_says():
    assert model_cost(SmallResNet(32), (1, 32, 32), ()).parameters == 694752
    assert model_cost(SmallResNet(8), (1, 32, 32), ()).parameters == 43896
    assert SmallResNet(8, in_channels=3)(torch.zeros(2, 3, 8, 8)).shape == (2, 32)


def test_a_network_without_parameters_costs_nothing():
    cost = model_cost(torch.nn.Flatten(), (3, 8, 8), batch_sizes=(2,), repeats=1)
    assert (cost.parameters, cost.flops) == (0, 0) and cost.latency[2] > 0
