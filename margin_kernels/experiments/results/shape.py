"""What the JSON of runs, records and evaluations must look like before anything is made of it.

A shape is a type, a tuple of types, [shape] for a list of such, {str: shape} for a mapping of any labels, or a mapping
of names to shapes, of which those that end with "?" may be missing; names that it lacks are not looked at. LABEL is
text that a table, a figure and the name of a file can show; integers are those of 64 bits.
"""

from __future__ import annotations

from types import NoneType
from typing import Any

from ..config import bounds

LABEL = "label"
NUMBER = (int, float)
MAYBE = (int, float, NoneType)  # what is not finite is null
EPOCH = {
    "epoch": int,
    "train_loss": MAYBE,
    "train_accuracy": MAYBE,
    "validation_accuracy": MAYBE,
    "seconds": NUMBER,
    "ms_per_step": NUMBER,
    "distance?": {str: MAYBE},
}
MACHINE = {"processor": LABEL, "cores": (int, NoneType), "torch_threads": int, "device": LABEL}
RUN = {
    "config": {"name?": LABEL},
    "network": dict,
    "parameters": int,
    "versions": {str: LABEL},
    "machine": MACHINE,
    "history": [EPOCH],
    "measured?": dict,
}
EVALUATION = {
    "samples": int,
    "counts?": {str: int},
    "clean": NUMBER,
    "eps": NUMBER,
    "curve_eps": [NUMBER],
    "curves": {str: [MAYBE]},
    "distance_p": (int, float, str, NoneType),
    "distance": {str: MAYBE},
    "distances?": {str: [MAYBE]},
    "reached?": {"p": (int, float, str), "median": {str: MAYBE}},
    "deepfool_norm?": MAYBE,
    "deepfool_norm_correct?": MAYBE,
    "rho_adv?": MAYBE,
    "deepfool_norms?": [MAYBE],
    "histograms?": {str: [int]},
    "noise_sigmas?": [NUMBER],
    "noise?": [NUMBER],
    "black_box?": {str: MAYBE},
    "reverse?": {str: MAYBE},
    "black_box_curves?": {str: [MAYBE]},
    "reverse_curves?": {str: [MAYBE]},
    **dict.fromkeys(
        ("fgsm_ce?", "fgsm_gap?", "ifgsm_ce?", "ifgsm_gap?", "worst?", "zero_ce?", "zero_gap?", "saturated?"), MAYBE
    ),
    "deepfool_missed?": MAYBE,
    "attacks?": {str: {"eps": NUMBER, "norm": LABEL, "samples": int, "accuracy": NUMBER}},
}


TIMING = {str: MAYBE}
SUMMARY = {"sweep?": (str, NoneType), "budget?": (str, NoneType)}


def optional(shape: dict[Any, Any]) -> dict[Any, Any]:
    """The same shape, any part of which may be missing."""
    return {f"{name.removesuffix('?')}?": below for name, below in shape.items()}


# Records of earlier versions lack what was not measured then; a report needs these.
RECORD_EVALUATION = {
    **optional(EVALUATION),
    **{name: EVALUATION[name] for name in ("samples", "clean", "eps", "curve_eps")},
}
RECORD = {
    **RUN,
    "history": [{**optional(EPOCH), "epoch": int}],
    "machine": optional(MACHINE),
    "evaluation?": (dict, NoneType),
    "cell": LABEL,
    "model": LABEL,
    "point": str,
    "seed": int,
    "values": dict,
    "after?": (str, NoneType),
    "attacker?": (str, NoneType),
    "seconds": {str: NUMBER},
    "timing?": (dict, NoneType),
    "choice?": [{"values": dict, "validation_accuracy": NUMBER, "chosen": bool, "seeds": [int]}],
}


def check(values: Any, shape: Any, where: str) -> None:
    """Raises ValueError with the place of the first part of `values` that has another shape."""
    if shape == LABEL:
        check(values, str, where)
        if not bounds.is_label(values):
            raise ValueError(f"{where} must be {bounds.LABEL}, got {values!r:.100}")
    elif isinstance(shape, list):
        check(values, list, where)
        for number, value in enumerate(values):
            check(value, shape[0], f"{where}[{number}]")
    elif isinstance(shape, dict):
        check(values, dict, where)
        if str in shape:
            for name, value in values.items():
                check(name, LABEL, f"a name in {where}")
                check(value, shape[str], f"{where}.{name}")
            return
        for name, below in shape.items():
            key = name.removesuffix("?")
            if key in values:
                check(values[key], below, f"{where}.{key}")
            elif key == name:
                raise ValueError(f"{where} must have {key!r}, which is missing")
    elif not isinstance(values, shape) or (isinstance(values, bool) and bool not in _types(shape)):
        expected = " or ".join("null" if kind is NoneType else kind.__name__ for kind in _types(shape))
        raise ValueError(f"{where} must be {expected}, got {'null' if values is None else type(values).__name__}")
    elif isinstance(values, int) and not -(2**63) <= values < 2**63:
        raise ValueError(f"{where} must be an integer of 64 bits, got one of {values.bit_length():,}")
    elif isinstance(values, str) and values and not bounds.is_label(values):
        raise ValueError(f"{where} must be {bounds.LABEL}, got {values!r:.100}")


SHARES = ("clean", "fgsm_ce", "fgsm_gap", "ifgsm_ce", "ifgsm_gap", "worst", "zero_ce", "zero_gap", "saturated")


def check_evaluation(values: Any, shape: dict[Any, Any]) -> None:
    """`check`, that every curve has as many values as there are radii, and that shares are shares of images."""
    check(values, shape, "evaluation")
    _check_shares(values)
    curves = {f"curves.{name}": curve for name, curve in values.get("curves", {}).items()}
    pairs = [(name, curve, "curve_eps") for name, curve in curves.items()]
    if "noise" in values or "noise_sigmas" in values:
        pairs.append(("noise", values.get("noise", []), "noise_sigmas"))
    for name, curve, over in pairs:
        if len(curve) != len(values.get(over, [])):
            raise ValueError(f"evaluation.{name} must have a value for each of {over}, got {len(curve)} values")


def _check_shares(values: dict[str, Any]) -> None:
    """Raises ValueError for a share that is not between 0 and 1, and for one of no image."""
    counts = {name: values[name] for name in ("samples",) if name in values}  # records of any version are read
    counts |= {f"counts.{name}": count for name, count in values.get("counts", {}).items() if name == "fgsm"}
    counts |= {f"attacks.{name}.samples": own["samples"] for name, own in values.get("attacks", {}).items()}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"evaluation.{name} must be at least 1, got {count}")
    shares = {name: values[name] for name in SHARES if name in values}
    for side in ("black_box", "reverse"):
        shares |= {f"{side}.{name}": value for name, value in values.get(side, {}).items()}
    shares |= {f"attacks.{name}.accuracy": own["accuracy"] for name, own in values.get("attacks", {}).items()}
    shares |= {f"noise[{i}]": value for i, value in enumerate(values.get("noise", []))}
    for name, share in shares.items():
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"evaluation.{name} must be between 0 and 1, got {share}")


def _types(shape: Any) -> tuple[type, ...]:
    return shape if isinstance(shape, tuple) else (shape,)
