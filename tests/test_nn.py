"""Laws of the small parts."""

import pytest
import torch

from setpred.errors import InputError
from setpred.nn import (
    MLP,
    LayerNorm,
    Positive,
    batch_norms,
    diagonal,
    estimating_statistics,
    log_sum_exp,
    softplus_inverse,
)


def third_derivative_error(norm):
    """Relative error of a third derivative of `norm` against finite differences of the second."""
    generator = torch.Generator().manual_seed(0)
    point, direction = (torch.randn(3, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    weights = torch.linspace(-1, 2, 18, dtype=torch.float64).view(3, 6)

    def second(point):
        leaf = point.detach().requires_grad_()
        (first,) = torch.autograd.grad((torch.sin(norm(leaf)) * weights).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first**3).sum(), leaf, create_graph=True)
        return leaf, second

    leaf, value = second(point)
    (product,) = torch.autograd.grad((value * direction).sum(), leaf)
    step = 1e-5
    expected = (second(point + step * direction)[1] - second(point - step * direction)[1]).detach() / (2 * step)
    return float((product - expected).norm() / expected.norm())


def test_layer_norm_is_that_of_torch_with_right_third_derivatives():
    torch.manual_seed(0)
    ours, theirs = LayerNorm(6).double(), torch.nn.LayerNorm(6).double()
    with torch.no_grad():
        ours.weight.normal_()
        ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    elements = torch.randn(4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(elements), theirs(elements))
    assert third_derivative_error(ours) < 1e-6


def test_a_diagonal_is_its_first_numbers_and_ones_also_where_there_is_no_memory():
    """Loading a checkpoint builds its model on the meta device first."""
    assert diagonal([4, 0.5], 4).tolist() == [4.0, 0.5, 1.0, 1.0]
    assert diagonal([4], 3, 0.25).tolist() == [4.0, 0.25, 0.25]
    with torch.device("meta"):
        assert diagonal([4, 0.5], 4).shape == (4,)
        for first in ([0.0], [-1.0], [float("nan")], [float("inf")], [1.0] * 5):
            with pytest.raises(InputError, match="expected at most 4 positive numbers"):
                diagonal(first, 4)


@pytest.mark.parametrize("value", [1e-3, 0.1, 1.0, 30.0, 800.0])
def test_positive_starts_at_the_value_asked_for(value):
    assert Positive(value)().item() == pytest.approx(value, rel=1e-4)
    assert torch.nn.functional.softplus(torch.tensor(softplus_inverse(value))).item() == pytest.approx(value, rel=1e-4)


def test_mlp_has_no_activation_at_the_end():
    network = MLP(3, 4, 2)
    assert [type(layer).__name__ for layer in network] == ["Linear", "ReLU", "Linear"]
    assert (network(torch.randn(100, 3)) < 0).any()


def test_estimated_statistics_are_the_mean_over_the_batches_and_nothing_else_changes():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5)).double()
    network.eval()
    network[1].num_batches_tracked.fill_(7)
    batches = torch.randn(5, 8, 3, 6, 6, dtype=torch.float64)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad(), estimating_statistics(batch_norms(network)):
        assert not network[2].training  # no dropout
        for batch in batches:
            network(batch)
        maps = torch.stack([network[0](batch).transpose(0, 1).flatten(1) for batch in batches])  # [batches, 4, values]
    (norm,) = batch_norms(network)
    torch.testing.assert_close(norm.running_mean, maps.mean((0, 2)))
    torch.testing.assert_close(norm.running_var, maps.var(2).mean(0))
    assert (norm.momentum, norm.training) == (0.1, False)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) or "running" in name


@pytest.mark.parametrize("scale", [0.1, 10.0, 300.0])
def test_log_sum_exp_is_that_of_torch_with_its_derivatives(scale):
    values = scale * torch.randn(3, 5, 7, dtype=torch.float64)
    values[0, 1], values[1, :2, 3] = -torch.inf, values[1, 2, 3]  # absent terms, and equal ones
    found = []
    for function in (log_sum_exp, torch.logsumexp):
        point = values.clone().requires_grad_()
        result = function(point, 1)
        (gradient,) = torch.autograd.grad(result.square().sum(), point, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), point)
        found.append((result, gradient, second))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)
