"""OTSeq2Set's loss against its definition, and its plan against the paper's proximal points."""

import pytest
import torch

from setpred.losses import HungarianLoss, MatchingWithTransport
from setpred.matching import sinkhorn
from setpred.schema import CLEVR

SIZE = 4


def problem(seed=0):
    """Predictions and CLEVR-like targets, with 3, 1 and no real elements."""
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randn(3, SIZE, CLEVR.set_dim, generator=generator, dtype=torch.float64)
    target = torch.rand(3, SIZE, CLEVR.set_dim, generator=generator, dtype=torch.float64)
    target[..., -1] = 1
    present = torch.arange(SIZE) < torch.tensor([[3], [1], [0]])
    return predicted, target * present.unsqueeze(-1), present


def cosines(predicted, target):
    dots = torch.stack([torch.stack([x @ y for y in target]) for x in predicted])
    return 1 - dots / (predicted.norm(dim=-1)[:, None] * target.norm(dim=-1)[None])


def proximal_points(cost, *, steps, inner=60):
    """P ← argmin <P, C> + KL(P | P before), each solved to the end by scaling rows and columns."""
    plan = torch.full_like(cost, 1 / cost.numel())
    for _ in range(steps):
        plan = plan * (-cost).exp()
        for _ in range(inner):
            plan = plan / plan.sum(1, keepdim=True) / plan.shape[0]
            plan = plan / plan.sum(0, keepdim=True) / plan.shape[1]
    return plan


def test_proximal_points_are_the_entropic_plan_at_a_falling_temperature():
    cost = torch.rand(SIZE, 3, dtype=torch.float64)
    for steps in (1, 5, 50):
        plan = sinkhorn(cost[None], epsilon=1 / steps, iterations=400).plan[0]
        torch.testing.assert_close(plan, proximal_points(cost, steps=steps), rtol=1e-4, atol=1e-6)


def test_is_the_matching_and_the_transport_of_real_elements():
    predicted, target, present = problem()
    transport = MatchingWithTransport(transport=1.0, iterations=400)(predicted, target) - HungarianLoss()(
        predicted, target
    )
    for example in range(2):
        cost = cosines(predicted[example], target[example][present[example]])
        expected = (proximal_points(cost, steps=50) * cost).sum()
        torch.testing.assert_close(transport[example], expected, rtol=1e-4, atol=1e-6)
    assert transport[2] == 0  # nothing real to carry to
    heavier = MatchingWithTransport(transport=8.0, iterations=400)(predicted, target)
    torch.testing.assert_close(heavier, HungarianLoss()(predicted, target) + 8 * transport)


def test_does_not_see_orders_and_vanishes_for_equal_sets():
    predicted, target, _ = problem()
    loss = MatchingWithTransport(iterations=200)
    order = torch.tensor([2, 0, 3, 1])
    for ours, theirs in ((predicted[:, order], target), (predicted, target[:, order])):
        torch.testing.assert_close(loss(ours, theirs), loss(predicted, target))
    three = target[:1, :3]
    sharp = MatchingWithTransport(temperature=0.001, iterations=200)
    assert sharp(three[:, [1, 2, 0]], three) < 1e-6


def test_the_gradient_holds_the_plan_fixed():
    predicted, target, present = problem()
    leaf = predicted.clone().requires_grad_()
    MatchingWithTransport(transport=1.0, iterations=400)(leaf, target)[0].backward()
    ours = leaf.grad[0]
    leaf = predicted.clone().requires_grad_()
    real = target[0][present[0]]
    plan = proximal_points(cosines(predicted[0], real), steps=50)
    (HungarianLoss()(leaf, target)[0] + (plan * cosines(leaf[0], real)).sum()).backward()
    torch.testing.assert_close(ours, leaf.grad[0], rtol=1e-3, atol=1e-6)


def test_masked_elements_have_no_influence():
    predicted, target, present = problem()
    loss = MatchingWithTransport()
    expected = loss(predicted[:1, :3], target[:1, :3])
    noise = torch.where(present[:1].unsqueeze(-1), predicted[:1], torch.nan).requires_grad_()
    found = loss(noise, target[:1], present[:1], present[:1])
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert torch.isfinite(noise.grad).all()


@pytest.mark.parametrize("numbers", [{"transport": -1.0}, {"temperature": 0.0}, {"iterations": 0}])
def test_refuses_numbers_it_cannot_have(numbers):
    with pytest.raises(ValueError, match="expected transport"):
        MatchingWithTransport(**numbers)
