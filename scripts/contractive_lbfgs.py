"""The contractive autoencoder by L-BFGS, beside its default optimiser, on 300 digits: results/contractive_lbfgs.json.

    python scripts/contractive_lbfgs.py                 # five minutes on one core

With the exact penalty the whole objective (cross-entropy and penalty, all 300 digits, no draws) is a function of the
weights alone. Both start from the same weights and evaluate it, with its gradient, as many times, in double precision.
BatchNorm is in eval mode with the statistics it starts with, so that it is an affine layer. AdamW has the task's own
rate, warm-up, cosine and clipped gradients, with its weight decay and without; and other peak rates beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from scipy.stats import t as student
from sklearn.datasets import load_digits
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pretext.contractive import Contractive
from pretext.task import Batch
from unlabel import optim
from unlabel.backbone import build_backbone
from unlabel.draws import Draws
from unlabel.runfolder import commit, hardware, versions

BACKBONE, CODE, PENALTY = "mlp:32-16:gelu", 4, 0.1
RATES = (1e-2, 3e-2)  # beside the task's own


class Objective:
    """The loss of the whole set, as a function of the task's and the backbone's weights."""

    def __init__(self, digits: int, seed: int) -> None:
        flat = np.asarray(load_digits(return_X_y=True)[0])[:digits] / 16
        images = torch.tensor(flat).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
        self.batch = Batch(images, Draws(0, [0] * len(images), range(len(images))), 1.0)
        torch.manual_seed(seed)
        backbone = build_backbone(BACKBONE, 8, seed=seed)
        task = Contractive(backbone, Contractive.Config(code=CODE, penalty=PENALTY, projections=0))
        self.task, self.backbone = task.double().eval(), backbone.double().eval()
        self.weights = [p for m in (backbone, task) for p in m.parameters()]

    def __call__(self) -> dict[str, float]:
        """The loss, its two parts, and the gradient's norm; the gradient itself is in the weights."""
        for weight in self.weights:
            weight.grad = None
        out = self.task(self.batch)
        out["loss"].backward()
        return {**{k: float(v.detach()) for k, v in out.items()}, "gradient_norm": float(self.gradient().norm())}

    def gradient(self) -> torch.Tensor:
        return parameters_to_vector([torch.zeros_like(w) if w.grad is None else w.grad for w in self.weights])

    def at(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        vector_to_parameters(torch.from_numpy(x), self.weights)
        return self()["loss"], self.gradient().numpy()


def by_lbfgs(objective: Objective, evaluations: int) -> dict[str, Any]:
    """``path``: the objective at the start and after each iteration."""
    start = parameters_to_vector(objective.weights).detach().numpy()
    first = objective()
    path = [first["loss"]]

    def iterated(intermediate_result: OptimizeResult) -> None:
        path.append(float(intermediate_result.fun))

    options = {"maxfun": evaluations, "maxiter": evaluations, "maxcor": 50, "ftol": 0, "gtol": 0}
    found = minimize(objective.at, start, jac=True, method="L-BFGS-B", callback=iterated, options=options)
    objective.at(found.x)
    before = {"path": path, "gradient_norm_at_start": first["gradient_norm"]}
    return {**before, "evaluations": int(found.nfev), **objective()}


def by_adamw(objective: Objective, evaluations: int, rate: float, decay: float) -> dict[str, Any]:
    """As the training loop has it: warm-up, cosine, clipped gradients."""
    groups = objective.task.param_groups()
    optimizers = optim.make_optimizers(objective.backbone, groups, "adamw", rate, decay)
    for k in range(evaluations):
        optim.set_rates(optimizers, optim.rate_at(k / evaluations, 0.1, "cosine"))
        objective()
        torch.nn.utils.clip_grad_norm_(objective.weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
    return {"rate": rate, "weight_decay": decay, "evaluations": evaluations, **objective()}


def compared(digits: int, evaluations: int, seed: int, rates: tuple[float, ...] = RATES) -> dict[str, Any]:
    """L-BFGS, and AdamW with as many evaluations as it took: as it comes, without decay, and at each of ``rates``."""
    first = by_lbfgs(Objective(digits, seed), evaluations)
    spent, recipe = first["evaluations"], Contractive.recipe
    asked = [(recipe.lr, recipe.weight_decay), *((rate, 0.0) for rate in (recipe.lr, *rates))]
    return {"lbfgs": first, "adamw": [by_adamw(Objective(digits, seed), spent, *pair) for pair in asked]}


def difference(runs: list[dict[str, Any]], k: int) -> dict[str, Any]:
    """The objective that AdamW's k-th way reached, less that of L-BFGS, paired over the seeds (95 % t interval)."""
    less = np.array([run["adamw"][k]["loss"] - run["lbfgs"]["loss"] for run in runs])
    half = student.ppf(0.975, len(less) - 1) * less.std(ddof=1) / np.sqrt(len(less)) if len(less) > 1 else float("nan")
    way = {key: runs[0]["adamw"][k][key] for key in ("rate", "weight_decay")}
    return {**way, "mean": float(less.mean()), "interval": [float(less.mean() - half), float(less.mean() + half)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=int, default=300)
    parser.add_argument("--evaluations", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    runs = []
    for seed in range(args.seeds):
        runs.append(run := compared(args.digits, args.evaluations, seed))
        first, rises = run["lbfgs"], int((np.diff(run["lbfgs"]["path"]) > 0).sum())
        others = ", ".join(f"{a['loss']:.4f} ({a['rate']:g}, {a['weight_decay']:g})" for a in run["adamw"])
        print(
            f"seed {seed}, {first['evaluations']} evaluations: L-BFGS {first['path'][0]:.4f} to {first['loss']:.4f} in "
            f"{len(first['path']) - 1} iterations, {rises} of them upwards, "
            f"gradient {first['gradient_norm_at_start']:.2g} to {first['gradient_norm']:.2g}; "
            f"AdamW (rate, decay) {others}",
            flush=True,
        )
    differences = [difference(runs, k) for k in range(len(runs[0]["adamw"]))]
    for d in differences:
        low, high = d["interval"]
        print(f"AdamW ({d['rate']:g}, {d['weight_decay']:g}) - L-BFGS: {d['mean']:+.4f} [{low:+.4f}, {high:+.4f}]")
    means = {
        "lbfgs": float(np.mean([run["lbfgs"]["loss"] for run in runs])),
        "adamw": [float(np.mean([run["adamw"][k]["loss"] for run in runs])) for k in range(len(differences))],
    }
    about = {
        "digits": args.digits, "backbone": BACKBONE, "code": CODE, "penalty": PENALTY, "means": means,
        "adamw_less_lbfgs": differences, "runs": runs,
        "hardware": hardware(), "versions": versions(), "commit": commit(),
    }  # fmt: skip
    Path("results").mkdir(exist_ok=True)
    Path("results/contractive_lbfgs.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
