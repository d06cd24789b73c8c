"""Encoders of point sets that do not see how a set is turned, mirrored, stretched or placed; their blind spots."""

import math

import pytest
import torch
from problems import close, normal
from torch.autograd import gradcheck
from torch.testing import assert_close

from setpred.aggregators import GIGP, FrameAverage, FSPool, MeanPool, SetEncoder
from setpred.encoders import InvariantCoordinates, Pooled, SurfaceTokens
from setpred.encoders.surface import SURFACE_FEATURES, nearest_neighbours, neighbours_of, surface_features
from setpred.errors import InputError

SIZE, DIM = 9, 7
MASK = torch.tensor([[1] * SIZE, [1, 0, 1, 1, 0, 1, 0, 1, 1], [0] * SIZE]).bool()
CLAIMS = ("rotation", "reflection", "size", "linear map")


def coordinates(**options):
    return lambda: InvariantCoordinates(input_dim=DIM, **options)


def frames(**options):
    return lambda: FrameAverage(SetEncoder(FSPool(4, set_size=SIZE), set_dim=DIM, hidden_dim=8), **options)


def surface_tokens(neighbours=4, **options):
    return SurfaceTokens(input_dim=DIM, neighbours=neighbours, token_dim=8, heads=2, hidden_dim=8, **options)


# name to constructor, position_dim, directions, and the maps that change nothing
FAMILY = {
    "coordinates": (coordinates(), 3, 0, "rotation, reflection"),
    "coordinates, scaled": (coordinates(scaled=True), 3, 0, "rotation, reflection, size"),
    "coordinates, right-handed": (coordinates(directions=1, reflections=False), 3, 1, "rotation"),
    "coordinates in the plane": (coordinates(position_dim=2, directions=2), 2, 2, "rotation, reflection"),
    "coordinates, affine": (coordinates(affine=True), 3, 0, ", ".join(CLAIMS)),
    "coordinates, affine and right-handed": (
        coordinates(position_dim=2, affine=True, reflections=False, scaled=True),
        2,
        0,
        "rotation, size, linear map",
    ),
    "frames with normals": (frames(directions=1, reflections=False), 3, 1, "rotation"),
    "frames, affine": (frames(affine=True), 3, 0, ", ".join(CLAIMS)),
    "frames, affine and right-handed": (
        frames(position_dim=2, affine=True, reflections=False),
        2,
        0,
        "rotation, size, linear map",
    ),
    "surface": (surface_tokens, 3, 1, "rotation"),
    "surface, no layers": (lambda: surface_tokens(layers=0), 3, 1, "rotation"),
    "surface, pooled": (lambda: Pooled(surface_tokens(), FSPool(8, set_size=SIZE)), 3, 1, "rotation"),
    "orbits of affine coordinates": (
        lambda: Pooled(
            coordinates(affine=True)(),
            SetEncoder(GIGP(8, orbits=4, largest=3.0, centred=False), set_dim=DIM, hidden_dim=8, kept=3),
        ),
        3,
        0,
        ", ".join(CLAIMS),
    ),
}
every_part = pytest.mark.parametrize("name", FAMILY)


def made(name):
    torch.manual_seed(0)
    build, position_dim, directions, claims = FAMILY[name]
    part = build().double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.copy_(normal(*parameter.shape, seed=parameter.numel()) / 2)
    return part, position_dim, directions, claims


def sets(seed=1, batch=3):
    """Sets with unit vectors after the positions, for the parts that take these as normals."""
    elements = normal(batch, SIZE, DIM, seed=seed)
    elements[..., 3:6] /= elements[..., 3:6].norm(dim=-1, keepdim=True)
    return elements


def mapped(elements, matrix, position_dim, directions, shift=0.0):
    """The sets with positions and directions multiplied by matrices, and positions shifted."""
    end = position_dim * (1 + directions)
    vectors = elements[..., :end].unflatten(-1, (-1, position_dim)) @ matrix.unsqueeze(1)
    vectors[:, :, 0] += shift
    return torch.cat([vectors.flatten(2), elements[..., end:]], dim=-1)


def maps(dim, kind, batch=3):
    """One random map of each kind for each set; all but reflections have a positive determinant."""
    matrix = normal(batch, dim, dim, seed=7)
    if kind == "size":
        return torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64).view(-1, 1, 1) * torch.eye(dim, dtype=torch.float64)
    if kind != "linear map":
        matrix = torch.linalg.qr(matrix).Q
    wrong = torch.linalg.det(matrix).sign() != (-1 if kind == "reflection" else 1)
    matrix[wrong, :, 0] *= -1
    return matrix


# --- laws of all -----------------------------------------------------------------------------------------------------


@every_part
def test_claimed_maps_change_nothing_and_the_others_do(name):
    part, dim, directions, claims = made(name)
    elements, shift = sets(), 3 * normal(3, 1, dim, seed=8)

    def seen(matrix, shift):
        found = part(mapped(elements, matrix, dim, directions, shift), MASK)
        return found.masked_fill(~MASK.unsqueeze(-1), 0.0) if found.ndim == 3 else found

    still = torch.eye(dim, dtype=torch.float64).expand(3, -1, -1)
    expected = seen(still, 0.0)
    close(seen(still, shift), expected)
    for kind in CLAIMS:
        found = seen(maps(dim, kind), shift)
        difference = (found - expected)[:2].abs().flatten(1).amax(1)
        if kind in claims:
            close(found, expected, rtol=1e-7, atol=1e-7)
        elif directions == 0 or kind != "linear map":
            assert (difference > 1e-4).all(), kind


@every_part
def test_order_and_padding(name):
    """Tokens keep the order of their elements; absent ones and other sets of the batch have no influence."""
    part, elements, order = made(name)[0], sets(), [4, 2, 8, 0, 1, 7, 3, 6, 5]
    tokens = hasattr(part, "token_dim")
    expected = part(elements, MASK)
    assert expected.isfinite().all()
    other = part(elements[:, order], MASK[:, order])
    close(other[:, torch.tensor(order).argsort()] if tokens else other, expected)
    noise = elements.masked_fill(~MASK.unsqueeze(-1), torch.nan).requires_grad_()
    found = part(noise, MASK)
    close(found, expected)
    (gradient,) = torch.autograd.grad(found[MASK].square().sum() if tokens else found.square().sum(), noise)
    assert (gradient[~MASK] == 0).all()
    assert (gradient[MASK] != 0).any()
    assert gradient.isfinite().all()
    for row in (0, 1):
        present = MASK[row]
        alone = part(elements[row : row + 1, present])[0]
        close(alone, expected[row, present] if tokens else expected[row])


@every_part
def test_gradients_are_those_of_finite_differences(name):
    part = made(name)[0]
    assert gradcheck(lambda elements: part(elements, MASK), sets().requires_grad_(), fast_mode=True)


def degenerate(name, dim):
    """Positions of sets that do not span the space, or where elements coincide."""
    along, places = normal(2, SIZE, 1), torch.zeros(2, SIZE, dim, dtype=torch.float64)
    if name == "collinear":
        return along * normal(2, 1, dim, seed=4)
    if name == "two places":
        places[:, 4:] = 1.0
    return places


@pytest.mark.parametrize("kind", ["collinear", "coincident", "two places", "one element"])
@every_part
def test_degenerate_sets_have_finite_gradients_and_keep_the_claims(name, kind):
    part, dim, directions, _ = made(name)
    elements = sets(batch=2)
    elements[..., :dim] = degenerate(kind, dim)
    elements = elements[:, :1] if kind == "one element" else elements
    leaf = elements.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(part(leaf).square().sum(), leaf, create_graph=True)
    assert gradient.isfinite().all()
    if "surface" not in name and gradient.requires_grad:
        (second,) = torch.autograd.grad(gradient.square().sum(), leaf, allow_unused=True)
        assert second is None or second.isfinite().all()
    if directions == 0:  # across a line axes are arbitrary, and directions are seen in them
        turned = mapped(elements, maps(dim, "rotation")[:2], dim, directions, 2.0)
        close(part(turned), part(elements), rtol=1e-5, atol=1e-5)


@every_part
def test_half_precision_around_it(name):
    part, elements = made(name)[0].float(), sets().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = part(elements.bfloat16(), MASK)
    assert mixed.isfinite().all()
    if isinstance(part, InvariantCoordinates):
        assert mixed.dtype == torch.float32


# --- multidimensional scaling ---------------------------------------------------------------------------------------


def test_coordinates_are_classical_multidimensional_scaling():
    """Distances are kept, and the coordinates are the eigenvectors of -½ J D² J, up to signs."""
    elements = sets()
    found = InvariantCoordinates(input_dim=DIM)(elements)
    close(torch.cdist(found[..., :3], found[..., :3]), torch.cdist(elements[..., :3], elements[..., :3]))
    close(found[..., 3:], elements[..., 3:])
    centre = torch.eye(SIZE, dtype=torch.float64) - 1 / SIZE
    gram = -0.5 * centre @ torch.cdist(elements[..., :3], elements[..., :3]).square() @ centre
    values, vectors = torch.linalg.eigh(gram)
    close(found[..., :3].abs(), (vectors * values.clamp(min=0).sqrt().unsqueeze(1))[..., -3:].abs())
    assert (found[..., :3].pow(3).sum(1) > 0).all()
    handed = InvariantCoordinates(input_dim=DIM, reflections=False)(elements)[..., :3]
    assert (handed[..., 1:].pow(3).sum(1) > 0).all()
    scaled = InvariantCoordinates(input_dim=DIM, scaled=True)(elements)[..., :3]
    close(scaled.square().sum(-1).mean(1), torch.ones(3, dtype=torch.float64))


def test_affine_coordinates_have_unit_covariance_and_diagonal_fourth_moments():
    found = InvariantCoordinates(input_dim=DIM, affine=True)(sets())[..., :3]
    close(found.mT @ found / SIZE, torch.eye(3, dtype=torch.float64).expand(3, -1, -1))
    fourth = (found.square().sum(-1, keepdim=True) * found).mT @ found
    values = fourth.diagonal(dim1=1, dim2=2)
    close(fourth, torch.diag_embed(values))
    assert (values.diff(dim=1) > 0).all()


def test_the_mean_over_signs_of_coordinates_is_a_frame_average():
    elements, pool = sets(), SetEncoder(FSPool(4, set_size=SIZE), set_dim=DIM, hidden_dim=8).double()
    for affine in (False, True):
        seen = InvariantCoordinates(input_dim=DIM, affine=affine)(elements)
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
        flipped = [torch.cat([seen[..., :3] * sign, seen[..., 3:]], dim=-1) for sign in signs]
        close(FrameAverage(pool, affine=affine)(elements), torch.stack([pool(each) for each in flipped]).mean(0))


def test_symmetric_sets_have_no_sign_in_one_frame():
    """The documented fault: the frame of a symmetric set depends on rounding; an average over the signs does not."""
    half = normal(1, 5, 2)
    features = torch.linspace(0, 1, 10, dtype=torch.float64).view(1, -1, 1)
    elements = torch.cat([torch.cat([half, -half], dim=1), features], dim=-1)
    one = InvariantCoordinates(input_dim=3, position_dim=2)
    pool = SetEncoder(FSPool(4, set_size=10), set_dim=3, hidden_dim=8).double()
    turned = [
        torch.cat([elements[..., :2] @ torch.linalg.qr(normal(1, 2, 2, seed=seed)).Q, features], dim=-1)
        for seed in range(20)
    ]
    seen = torch.stack([one(each) for each in turned])
    assert (seen - seen[0]).abs().max() > 0.1
    averaged = torch.stack([FrameAverage(pool, position_dim=2)(each) for each in turned])
    close(averaged, averaged[:1].expand_as(averaged))


# --- local surface features -----------------------------------------------------------------------------------------


def twin(p, n, neighbours):
    """The 14 numbers of each neighbour `(position, normal)` of one point, in loops, in the order around the normal."""
    across = torch.linalg.cross(n, torch.tensor([0.3, -0.5, 0.8], dtype=n.dtype))
    across = across / across.norm()
    up = torch.linalg.cross(n, across)
    ranked = sorted(neighbours, key=lambda each: math.atan2((each[0] - p) @ up, (each[0] - p) @ across))

    def cosine(v, w):
        return v @ w / v.norm() / w.norm()

    found = []
    for i, (a, at_a) in enumerate(ranked):
        (b, at_b), (c, at_c) = ranked[i - 1], ranked[(i + 1) % len(ranked)]
        first, second = torch.linalg.cross(c - p, a - p), torch.linalg.cross(b - p, a - p)
        dihedral = first @ second / ((a - p).norm() ** 2 * (b - p).norm() * (c - p).norm())
        numbers = [(a - p).norm(), cosine(a - p, n), cosine(p - a, at_a), cosine(b - p, n), cosine(p - b, at_b)]
        numbers += [cosine(b - a, at_a), cosine(a - b, at_b), cosine(a - p, b - p), cosine(b - p, b - a)]
        numbers += [cosine(c - p, a - p), cosine(c - p, c - a), cosine(c - a, at_c), cosine(a - p, at_c), dihedral]
        found.append(torch.stack(numbers))
    return torch.stack(found)


@pytest.mark.parametrize("row", [0, 1])
def test_surface_features_are_their_twin(row):
    elements, k = sets()[row : row + 1], 4
    positions, normals = elements[..., :3], elements[..., 3:6]
    index, found = nearest_neighbours(positions, MASK[row : row + 1], count=k)
    features, _ = surface_features(positions, normals, neighbours_of(elements[..., :6], index), found)
    assert features.shape == (1, SIZE, k, SURFACE_FEATURES)
    for i in MASK[row].nonzero().flatten().tolist():
        others = [j for j in MASK[row].nonzero().flatten().tolist() if j != i]
        others = sorted(others, key=lambda j: float((positions[0, j] - positions[0, i]).norm()))[:k]
        assert sorted(index[0, i][found[0, i]].tolist()) == sorted(others)
        expected = twin(positions[0, i], normals[0, i], [(positions[0, j], normals[0, j]) for j in others])
        start = int((expected[:, 0] - features[0, i, 0, 0]).abs().argmin())  # the first one is a convention
        close(features[0, i], expected.roll(-start, 0))


def test_few_neighbours_and_none():
    part = made("surface, no layers")[0]
    elements = sets(batch=1)
    few = part(elements, torch.arange(SIZE).unsqueeze(0) < 3)
    close(few[:, :3], part(elements[:, :3]))
    close(part(elements[:, :1]), torch.zeros(1, 1, 8, dtype=torch.float64))


def test_what_each_is_blind_to():
    """Local surfaces do not see where neighbourhoods are, orbits do not see angles, coordinates see both."""
    elements = sets(batch=1)
    cluster = torch.arange(SIZE) < 5
    apart = elements.clone()
    apart[:, ~cluster, 0] += 50
    other = apart.clone()  # the second cluster elsewhere, and turned about itself
    other[:, ~cluster] = mapped(apart[:, ~cluster], maps(3, "rotation")[:1], 3, 1, 20.0)
    local = surface_tokens(neighbours=3, layers=0).double()
    assert_close(local(other), local(apart), rtol=1e-6, atol=1e-6)
    whole = InvariantCoordinates(input_dim=DIM)
    assert (whole(other) - whole(apart)).abs().max() > 1
    pool = GIGP(4, orbits=4, largest=3.0, centred=False).double()
    around = torch.cat([elements[..., :3], elements[..., 6:]], dim=-1)
    shuffled = around.clone()
    shuffled[..., :3] = (elements[0, :, None, :3] @ torch.linalg.qr(normal(SIZE, 3, 3)).Q).squeeze(1)
    close(pool(shuffled), pool(around))


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: InvariantCoordinates(input_dim=2), InputError, "position_dim from 1 to the 2 numbers"),
        (lambda: InvariantCoordinates(input_dim=5, directions=1), InputError, "got 3, 1 directions"),
        (lambda: InvariantCoordinates(input_dim=6, directions=1, affine=True), InputError, "no directions with affine"),
        (lambda: FrameAverage(MeanPool(6), directions=1, affine=True), InputError, "no directions with affine"),
        (lambda: FrameAverage(MeanPool(3), directions=-1), InputError, "-1 directions"),
        (lambda: SurfaceTokens(input_dim=5), InputError, "input_dim of at least 6"),
        (lambda: SurfaceTokens(neighbours=0), InputError, "at least 1 neighbour, got 6 and 0"),
    ],
)
def test_arguments_that_do_not_fit_raise(build, error, message):
    with pytest.raises(error, match=message):
        build()
