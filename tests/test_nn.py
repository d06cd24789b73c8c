"""Laws of the small parts."""

import pytest
import torch

from setpred.nn import MLP, LayerNorm, Positive, softplus_inverse


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


@pytest.mark.parametrize("value", [1e-3, 0.1, 1.0, 30.0, 800.0])
def test_positive_starts_at_the_value_asked_for(value):
    assert Positive(value)().item() == pytest.approx(value, rel=1e-4)
    assert torch.nn.functional.softplus(torch.tensor(softplus_inverse(value))).item() == pytest.approx(value, rel=1e-4)


def test_mlp_has_no_activation_at_the_end():
    network = MLP(3, 4, 2)
    assert [type(layer).__name__ for layer in network] == ["Linear", "ReLU", "Linear"]
    assert (network(torch.randn(100, 3)) < 0).any()
