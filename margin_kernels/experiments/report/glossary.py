"""What the words of the tables mean, to be unfolded."""

from __future__ import annotations

import html

TERMS = {
    "clean, error": "Accuracy on the test images as they are; the error is the rest.",
    "linf, eps": "Every pixel may change by eps at most. Pixels lie in [0, 1], where the images are not whitened.",
    "FGSM": "One step of length eps along the sign of the gradient of an objective with respect to the image.",
    "IFGSM": "Several such steps, each of length 2 eps / steps, never further than eps from the image.",
    "on cross-entropy": "The attack ascends the log-odds of the other classes: the direction of cross-entropy without "
    "its underflow.",
    "on gap, on logit gap": "The attack ascends the largest wrong logit less that of the label, which has no scale: "
    "large logits cannot hide from it.",
    "worst, worst of the four": "An image counts as correct only if none of the attacks of the table succeeds on it.",
    "zero attack gradients, zero grad.": "Share of images on which the gradient of the objective is exactly 0. Such an "
    "image looks robust to FGSM and need not be.",
    "1 - p_y below 6e-8, 1 - p < 6e-8": "Share of images on which the probability of the label rounds to 1 in single "
    "precision, where the gradient of cross-entropy itself would be 0.",
    "DeepFool, margin, mean l2 norm": "Mean l2 norm of the perturbation with which DeepFool changes the prediction: an "
    "upper bound of the distance to the decision boundary in the space of images.",
    "of correct images, of correct": "The same over the images that are classified correctly.",
    "rho_adv": "Mean of that norm divided by the norm of the image, over the images that are classified correctly.",
    "tap": "A place at which distances are measured: the input, a hidden layer, the output.",
    "distance, mean signed distance": "(z_y - z_j) / dual norm of its gradient at the tap, of the nearest other class "
    "j: the distance to the decision boundary of the linearised network. Negative for an image that is classified "
    "wrongly.",
    "gamma": "The distance that a large margin loss asks for at a tap: an image that is further away adds nothing to "
    "the loss.",
    "reached": "Median distance at the tap of the test images that are classified correctly, in the norm of the loss.",
    "m": "gamma as a multiple of the median distance that the cross-entropy network has at the tap.",
    "black box": "The attacked images were made on another network, the attacker.",
    "attacker": "Accuracy or error of the attacker at the images that were attacked on this network.",
    "sigma": "Standard deviation of the Gaussian noise that is added to every pixel.",
    "valid.": "Accuracy on images that were held out of training, on which choices are made.",
    "train": "Accuracy on the training images during the last epoch.",
    "ms per step, ms/step": "Wall clock of one training step.",
    "ratio to cross-entropy": "A step's time divided by that of a cross-entropy step beside it, median.",
    "cross-entropy to itself": "The same ratio of a second cross-entropy network: how far it is from 1 shows how quiet "
    "the machine was.",
    "95 % interval": "Of one run: where the share of very many test images lies (binomial, Wilson). Of several seeds: "
    "where the mean of very many seeds lies (Student's t).",
    "budget": "How much of the paper's training a sweep does. Only the full one is comparable to published values.",
}


def unfolding() -> str:
    """The terms as a list that is folded at first."""
    items = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in TERMS.items())
    return f'<details class="glossary"><summary>What the words mean</summary><dl>{items}</dl></details>'
