"""CLEVR's camera: projection of world points, rays of pixels, and the camera fitted to annotations.

World: z up, the ground at z = 0, the unit of CLEVR's `3d_coords`. Image: origin at the top left corner, pixel
centres at half integers. Source: the official scene file, whose camera always looks at the origin without roll.
"""

import math
from dataclasses import dataclass

import numpy as np

JITTER = 0.5  # each coordinate of the location moves by uniform(-JITTER, JITTER) from image to image
ASPECT = 1.5  # CLEVR v1.0 is 480x320; other sizes show the same view stretched
FOCAL = 35 / 32  # lens over sensor width: focal length in image widths
ROUNDING = 12**-0.5  # standard deviation of an annotated pixel coordinate, which is rounded to an integer
DEPTH_ERROR = 1e-4  # annotated depths are float32 numbers near 10
TRUSTED = 0.1  # largest standard deviation of a fitted location that counts as determined


@dataclass(frozen=True)
class Camera:
    """A camera at `location` that looks at the origin, its horizontal axis level.

    With c = location, b = c/|c| (backward), r = (-b_y, b_x, 0)/|(b_x, b_y)| (right) and u = b x r (up), the point p
    with X = (p - c).r, Y = (p - c).u and depth Z = -(p - c).b appears at

        px = width/2 + f_x X/Z,    py = height/2 - f_y Y/Z,    f_x = 35/32 width,    f_y = 35/32 aspect height.

    `aspect` is width over height of the view. An image of another shape shows the view stretched, as a CLEVR image
    resized to a square does.
    """

    location: tuple[float, float, float]

    def axes(self) -> np.ndarray:
        """Right, up and backward, the orthonormal rows of a `[3, 3]` matrix."""
        backward = np.asarray(self.location, dtype=np.float64)
        backward = backward / np.linalg.norm(backward)
        x, y, z = backward
        flat = np.hypot(x, y)
        return np.array([[-y / flat, x / flat, 0.0], [-x * z / flat, -y * z / flat, flat], [x, y, z]])

    def turned(self, angle: float) -> "Camera":
        """This camera after a turn by `angle` in radians, anticlockwise about the vertical through the origin."""
        (x, y, z), cosine, sine = self.location, math.cos(angle), math.sin(angle)
        return Camera((cosine * x - sine * y, sine * x + cosine * y, z))

    def project(self, points: np.ndarray, width: int, height: int, *, aspect: float = ASPECT) -> np.ndarray:
        """World points `[..., 3]` to (px, py, depth) `[..., 3]`: pixels, pixels, world units. Depth > 0 is in front."""
        local = (np.asarray(points, dtype=np.float64) - self.location) @ self.axes().T
        depth = -local[..., 2]
        focal_x, focal_y = FOCAL * width, FOCAL * aspect * height
        px = width / 2 + focal_x * local[..., 0] / depth
        py = height / 2 - focal_y * local[..., 1] / depth
        return np.stack([px, py, depth], axis=-1)

    def rays(
        self, width: int, height: int, *, aspect: float = ASPECT, box: tuple[int, int, int, int] | None = None
    ) -> np.ndarray:
        """Directions `[height, width, 3]` through the pixel centres: location + Z * direction has depth Z.

        `box` (left, top, right, bottom) restricts them to some of the pixels.
        """
        right, up, backward = self.axes()
        left, top, end, bottom = box or (0, 0, width, height)
        x = ((np.arange(left, end) + 0.5) / width - 0.5) / FOCAL
        y = (0.5 - (np.arange(top, bottom) + 0.5) / height) / (FOCAL * aspect)
        return x[None, :, None] * right + y[:, None, None] * up - backward


NOMINAL_CAMERA = Camera((7.481131553649902, -6.5076398849487305, 5.34366512298584))


def fit_camera(
    coords: np.ndarray, pixel_coords: np.ndarray, width: int, height: int, *, aspect: float = ASPECT
) -> Camera | None:
    """Fit the camera of an image to the annotations of its objects.

    Weighted least squares in the location by Gauss-Newton from the nominal camera: the residuals of px and py (rounded
    to integers) and of the depth (exact), each over its standard deviation.

    Args:
        coords: object centres `[objects, 3]` in world units.
        pixel_coords: the annotated (px, py, depth) `[objects, 3]`, for an image of `width` x `height`.

    Returns:
        The camera, or None if the objects do not determine it (fewer than two, or nearly coincident) or if no camera
        explains the annotations to within their rounding.

    Raises:
        ValueError: different numbers of `coords` and `pixel_coords`.
    """
    coords = np.asarray(coords, dtype=np.float64).reshape(-1, 3)
    pixel_coords = np.asarray(pixel_coords, dtype=np.float64).reshape(-1, 3)
    if len(coords) != len(pixel_coords):
        raise ValueError(f"expected as many pixel_coords as coords, got {len(pixel_coords)} and {len(coords)}")
    if len(coords) < 2 or not (np.isfinite(coords).all() and np.isfinite(pixel_coords).all()):
        return None
    spread = np.array([ROUNDING, ROUNDING, DEPTH_ERROR])

    def residuals(location: np.ndarray) -> np.ndarray:
        seen = Camera(tuple(location)).project(coords, width, height, aspect=aspect)
        return ((seen - pixel_coords) / spread).reshape(-1)

    location = np.array(NOMINAL_CAMERA.location)
    step = 1e-5
    for _ in range(20):
        slopes = [(residuals(location + d) - residuals(location - d)) / (2 * step) for d in step * np.eye(3)]
        jacobian = np.stack(slopes, axis=1)
        information = jacobian.T @ jacobian
        if np.linalg.matrix_rank(information, hermitian=True) < 3:
            return None
        change = np.linalg.solve(information, jacobian.T @ residuals(location))
        location = location - change
        if np.abs(location - NOMINAL_CAMERA.location).max() > 10 * JITTER:
            return None
        if np.abs(change).max() < 1e-9:
            break
    if np.sqrt(np.diag(np.linalg.inv(information))).max() > TRUSTED:
        return None
    misfit = np.abs(residuals(location).reshape(-1, 3) * spread).max(axis=0)
    if misfit[:2].max() > 1.0 or misfit[2] > 10 * DEPTH_ERROR:
        return None
    return Camera(tuple(float(value) for value in location))
