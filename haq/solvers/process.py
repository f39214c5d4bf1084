"""A Gaussian process for what policies are worth: a constant, a linear part, and a smooth one with a length per feature.

Rasmussen & Williams, "Gaussian Processes for Machine Learning", 2006: equations 2.23 and 2.24 predict, 5.8 and 5.9 fit.
Libraries were tried: scikit-learn's has no priors, and forms the gradient of every length as a matrix of its own.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize

Floats = NDArray[np.float64]

# Means and standard deviations of the logarithms of what is fitted, which has a normal prior each.
CONSTANT = 1.0  # variance of the constant, not fitted: values are standardized
LINEAR = (math.log(0.3), 1.0)  # variance of the linear part
SMOOTH = (math.log(0.5), 1.0)  # variance of the smooth part
NOISE = (math.log(1e-2), 1.5)  # variance of the noise
LENGTH = 1.0  # standard deviation only: of one feature's length, in parts of the typical distance of two policies
JITTER = 1e-8
STEPS = 30  # of one fit
RANGE = 6.0  # how far, in logarithms, anything can be from the mean of its prior


class Process:
    """A Gaussian process on policies' features, fitted by the maximum of the posterior."""

    def __init__(self, features: int, length: float = 0.0) -> None:
        """Begin with what the priors say.

        Args:
            features: How many there are.
            length: The mean of the prior of every feature's length, a logarithm.
        """
        self.features = features
        self._prior = np.array([LINEAR, SMOOTH, NOISE, *[(length, LENGTH)] * features]).T
        self._parameters = self._prior[0].copy()
        self._x = np.zeros((0, features))

    def learn(
        self, x: Floats, y: Floats, noise: Floats | None = None, *, extra: Floats | None = None, fit: bool = True
    ) -> None:
        """Take what was measured.

        Args:
            x: Features, shape (policies, features).
            y: Values, shape (policies,).
            noise: How many times the variance of the noise each value has; None: once.
            extra: Variance that each value has beside it, in the squared unit of the values; None: none.
            fit: Whether to fit the parameters anew; otherwise they stay what they are.
        """
        self._x = x
        self._mean = float(y.mean())
        self._size = float(y.std()) or 1.0
        self._y = (y - self._mean) / self._size
        self._noise = np.ones(len(y))
        if noise is not None:
            self._noise = noise
        self._extra = np.full(len(y), JITTER)
        if extra is not None:
            self._extra += extra / self._size**2
        # Features are as far apart as they are in these policies; lengths are in parts of the typical distance of two.
        self._centre = x.mean(0)
        spread = x.std(0)
        typical = math.sqrt(2 * float(np.square(spread).sum())) or 1.0
        self._x = (x - self._centre) / typical
        self._typical = typical
        self._squares = np.square(self._x)
        if fit and len(y) > 2:
            low, high = self._prior[0] - RANGE, self._prior[0] + RANGE
            found = minimize(
                self._objective,
                self._parameters,
                jac=True,
                method="L-BFGS-B",
                bounds=np.stack([low, high], axis=1),
                options={"maxiter": STEPS},
            )
            if np.isfinite(found.x).all():
                self._parameters = found.x
        self._factorize()

    def predict(self, x: Floats) -> tuple[Floats, Floats]:
        """Predict values.

        Args:
            x: Features, shape (policies, features).

        Returns:
            Means and standard deviations, without noise, shape (policies,) each, in the unit of the values.
        """
        x = (x - self._centre) / self._typical
        linear, smooth, _, lengths = self._unpacked(self._parameters)
        cross = CONSTANT + linear * (x @ self._x.T) + smooth * np.exp(-0.5 * _distances(x / lengths, self._x / lengths))
        mean = self._mean + self._size * (cross @ self._weights)
        known = solve_triangular(self._factor[0], cross.T, lower=True, check_finite=False)
        own = CONSTANT + linear * np.square(x).sum(1) + smooth
        variance = np.maximum(own - np.square(known).sum(0), 1e-12)
        return mean, self._size * np.sqrt(variance)

    @property
    def noise(self) -> float:
        """Return the standard deviation of the noise, in the unit of the values."""
        return self._size * math.sqrt(math.exp(self._parameters[2]))

    def _unpacked(self, parameters: Floats) -> tuple[float, float, float, Floats]:
        linear, smooth, noise = np.exp(parameters[:3])
        return float(linear), float(smooth), float(noise), np.exp(parameters[3:])

    def _covariance(self, parameters: Floats) -> tuple[Floats, Floats, Floats]:
        """Return the covariance of the values, and its linear and its smooth part."""
        linear, smooth, noise, lengths = self._unpacked(parameters)
        of_line = linear * (self._x @ self._x.T)
        scaled = self._x / lengths
        of_smooth = smooth * np.exp(-0.5 * _distances(scaled, scaled))
        total = CONSTANT + of_line + of_smooth
        total[np.diag_indices_from(total)] += noise * self._noise + self._extra
        return total, of_line, of_smooth

    def _objective(self, parameters: Floats) -> tuple[float, Floats]:
        """Return the negative logarithm of the posterior, and its gradient."""
        total, of_line, of_smooth = self._covariance(parameters)
        try:
            factor = cho_factor(total, lower=True, check_finite=False)
        except LinAlgError:
            return math.inf, np.zeros_like(parameters)
        weights = cho_solve(factor, self._y, check_finite=False)
        inverse = cho_solve(factor, np.eye(len(self._y)), check_finite=False)
        beyond = (parameters - self._prior[0]) / self._prior[1]
        value = 0.5 * float(self._y @ weights) + float(np.log(np.diag(factor[0])).sum()) + 0.5 * float(beyond @ beyond)
        outer = np.outer(weights, weights) - inverse
        _, _, noise, lengths = self._unpacked(parameters)
        of_lengths = outer * of_smooth
        rows = of_lengths.sum(1)
        # The sum over pairs of outer x smooth x (difference)^2, for every feature, without a matrix for each.
        apart = 2 * (rows @ self._squares - (self._x * (of_lengths @ self._x)).sum(0))
        gradient = np.concatenate(
            [
                [0.5 * float((outer * of_line).sum())],
                [0.5 * float(of_lengths.sum())],
                [0.5 * noise * float(np.diag(outer) @ self._noise)],
                0.5 * apart / np.square(lengths),
            ]
        )
        return value, -gradient + beyond / self._prior[1]

    def _factorize(self) -> None:
        total, _, _ = self._covariance(self._parameters)
        self._factor = cho_factor(total, lower=True, check_finite=False)
        self._weights = cho_solve(self._factor, self._y, check_finite=False)


def _distances(one: Floats, other: Floats) -> Floats:
    """Return squared distances of rows, shape (rows, other rows)."""
    found: Floats = np.square(one).sum(1)[:, None] + np.square(other).sum(1)[None] - 2 * (one @ other.T)
    return np.maximum(found, 0.0)
