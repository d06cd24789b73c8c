"""Points that attract each other, whose motion is to be continued."""

from typing import Any

import numpy as np

from setpred.data.toy.base import World
from setpred.errors import InputError

SUBSTEPS = 20  # of the integrator, from one shown position to the next
SOFTENING = 0.2  # squared length ε under which the attraction no longer grows


class MovingPoints(World):
    """Points in the plane under their attraction: past positions are the input, future ones the target.

        ẍ_i = (1/n) Σ_j (x_j - x_i) / (|x_j - x_i|² + ε)^(3/2)

    by the leapfrog method. Element i of both sets is point i: [x, y] of each time, one after the other. Points start in
    a band along x, normal with deviations 2 and 1/2, with velocities of mean (1, 0) and deviation 1/4: upright. A
    turned example is turned about the origin by a random angle. The law knows no direction, but the data do: as in
    `RotatedDigits`, only a model that is equivariant by construction answers turned questions after upright training.

    Args:
        points: n.
        past, future: times of the input and of the target.
        interval: time between them.
        train_turned, val_turned: whether the examples of that part are turned.
        arguments: those of `World`.

    Raises:
        InputError: a number out of range.
    """

    def __init__(
        self,
        *,
        points: int = 5,
        past: int = 4,
        future: int = 4,
        interval: float = 0.4,
        train_turned: bool = False,
        val_turned: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        if min(points, past, future) < 1 or not 0 < interval <= 1:
            raise InputError(
                f"expected points, past and future of at least 1 and an interval from over 0 to 1, got {points}, "
                f"{past}, {future} and {interval}"
            )
        self.points, self.past, self.future, self.interval = points, past, future, interval
        self.turned = {"train": train_turned, "val": val_turned}

    def examples(self, split: str, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        places = rng.normal(0, [2, 0.5], (count, self.points, 2))
        speeds = rng.normal([1, 0], 0.25, places.shape)
        seen = motion(places, speeds, times=self.past + self.future, interval=self.interval)
        angle = rng.uniform(0, 2 * np.pi, count) * self.turned[split]
        cosine, sine = np.cos(angle), np.sin(angle)
        turns = np.stack([cosine, sine, -sine, cosine], axis=-1).reshape(-1, 1, 2, 2)  # of positions in rows
        past, future = np.split((seen @ turns).astype(np.float32), [self.past], axis=2)
        return {"input": past.reshape(*places.shape[:2], -1), "elements": future.reshape(*places.shape[:2], -1)}


def motion(places: np.ndarray, speeds: np.ndarray, *, times: int, interval: float) -> np.ndarray:
    """Follow points `[count, n, 2]` with these velocities: positions `[count, n, times, 2]`, from the given ones on."""
    step, seen = interval / SUBSTEPS, [places]
    for _ in range((times - 1) * SUBSTEPS):
        speeds = speeds + step / 2 * attraction(places)
        places = places + step * speeds
        speeds = speeds + step / 2 * attraction(places)
        seen.append(places)
    return np.stack(seen[::SUBSTEPS], axis=2)


def attraction(places: np.ndarray) -> np.ndarray:
    """Acceleration of each point, `[count, n, 2]`; see `MovingPoints`."""
    apart = places[:, None] - places[:, :, None]
    return (apart / ((apart**2).sum(-1, keepdims=True) + SOFTENING) ** 1.5).mean(2)
