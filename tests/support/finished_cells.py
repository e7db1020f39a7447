"""Records of cells that were never trained."""

import math
from dataclasses import replace

from margin_kernels.experiments import sweeps
from margin_kernels.experiments.config import Config, DataConfig
from margin_kernels.experiments.results import Record, Tried


def record(model, point, seed, noise=None, clean=0.9, attacker=None, **evaluation):
    """A finished cell as sweep writes it, as far as a report reads it."""
    evaluation = {"clean": clean, "eps": 0.1, "samples": 50, "curve_eps": [0.0, 0.1], "curves": {}, **evaluation}
    settings = Config(name=sweeps.cell_name(model, point, seed), data=DataConfig("digits", label_noise=noise or 0.0))
    settings.training.epochs = 3
    return Record(
        config=settings,
        network={"name": "digits_cnn"},
        parameters=1000,
        versions={"torch": "2"},
        machine={"processor": "P", "cores": 2, "torch_threads": 1, "device": "cpu"},
        history=[],
        cell=settings.name,
        model=model,
        point=point,
        seed=seed,
        values={} if noise is None else {"data.label_noise": noise},
        attacker=attacker,
        seconds={"training": 10.0, "evaluation": 1.0},
        evaluation=evaluation,
    )


def filled(seed=0, model="plain", **changes):
    """As `record`, with numbers that take all their digits."""
    own = record(model, "few samples", seed, 0.4, clean=1 / 3, histograms={"rho_adv": [0, 2, 5]}, rho_adv=0.1 + 0.2)
    history = [{"epoch": 1, "lr": 1e-3, "train_loss": math.pi * 1e-8, "seconds": 5e300 * (seed + 1)}]
    choice = [Tried({"loss.gamma": 1}, 2 / 3, True, [0, 1])]
    return replace(own, **{"history": history, "choice": choice, "measured": {"gamma": [1e-5]}, **changes})
