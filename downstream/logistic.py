"""Multinomial logistic regression for many subsets of the labels at once: the folds of a cross-validation.

scikit-learn's, which it is tested against, spends most of its time between the steps of one small fit; here a step is
one matrix product for all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import minimize
from threadpoolctl import ThreadpoolController

__all__ = ["logistic_path", "one_thread"]

WIDE = 2048  # features; beyond it, a step or two more cost less than even coordinates do
_threads = ThreadpoolController()


def one_thread(labels: int) -> contextlib.AbstractContextManager[object]:
    """With a few thousand labels a second BLAS thread costs more than it gives: beside torch's, ten times as much."""
    return _threads.limit(limits=1, user_api="blas") if labels <= 4096 else contextlib.nullcontext()


def logistic_path(
    z: np.ndarray, y: np.ndarray, grid: Sequence[float], subsets: np.ndarray | None = None, tol: float = 1e-4
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each C the minimum of C Σ loss + ½ ‖w‖², as scikit-learn has it; the intercept is not penalised.

    Args:
        z: (n, d) features.
        y: (n,) classes, 0 … K - 1.
        grid: values of C, each started from the result of the one before it.
        subsets: (F, n) bool, the labels that each of F fits sees; one fit to all where None.
        tol: largest slope that is left, of a mean loss, in the coordinates that are stepped in.

    Yields:
        weights (F, K, d) and intercepts (F, K). Two classes have one vector w, as scikit-learn fits it, and are given
        -w / 2 and w / 2.
    """
    n, d = z.shape
    subsets = np.ones((1, n), bool) if subsets is None else subsets
    f, classes = len(subsets), int(y.max()) + 1
    k = 1 if classes == 2 else classes  # vectors for each fit
    one_hot = np.eye(classes)[:, y]  # (K, n)
    sizes = subsets.sum(axis=1)
    share = (subsets / sizes[:, None])[:, None]  # (F, 1, n): of the mean loss of each
    products = z.T @ z / n if d < min(n, WIDE) else None

    def outputs(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities and probabilities (F, K, n)."""
        scores = (w[:, :d] @ z.T + w[:, d:]).reshape(f, k, n)
        scores = np.concatenate([-scores, scores], axis=1) / 2 if k == 1 else scores
        scores -= scores.max(axis=1, keepdims=True)
        p = np.exp(scores)
        total = p.sum(axis=1, keepdims=True)
        p /= total
        return scores - np.log(total), p

    w = np.zeros((f * k, d + 1))
    for c in grid:
        penalty = np.repeat(1 / (c * sizes), k)[:, None]
        lower, into = None, None
        if products is not None:  # coordinates in which the curvature is about one, so that few steps are needed
            p = outputs(w)[1]
            lower = np.eye(d + 1)
            lower[:d, :d] = np.linalg.cholesky(
                penalty.mean() * np.eye(d) + max(float((p * (1 - p)).mean()), 1e-3) * products
            )
            into = solve_triangular(lower, np.eye(d + 1), lower=True)

        def loss(
            v: np.ndarray, penalty: np.ndarray = penalty, into: np.ndarray | None = into
        ) -> tuple[float, np.ndarray]:
            w = v.reshape(f * k, d + 1)
            w = w if into is None else w @ into
            log_p, p = outputs(w)
            shrunk = penalty * w[:, :d]
            value = 0.5 * (shrunk * w[:, :d]).sum() - (share * log_p * one_hot).sum()
            residuals = ((p - one_hot)[:, -k:] * share).reshape(f * k, n)
            slope = np.concatenate([residuals @ z + shrunk, residuals.sum(axis=1, keepdims=True)], axis=1)
            return float(value), (slope if into is None else slope @ into.T).ravel()

        options = {"maxiter": 1000, "maxls": 50, "gtol": tol, "ftol": 64 * np.finfo(float).eps}
        start = w if lower is None else w @ lower
        found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(f * k, d + 1)
        w = found if into is None else found @ into
        each = w.reshape(f, k, d + 1)
        each = np.concatenate([-each, each], axis=1) / 2 if k == 1 else each
        yield each[:, :, :d], each[:, :, d]
