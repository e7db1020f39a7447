"""What a run is, as dataclasses: every option with what it means and its default."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "image_folder", "npz")


@dataclass
class DataConfig:
    """Which images.

    Args:
        name: digits, mnist, fashion_mnist, cifar10 or cifar100; image_folder (dir/train/CLASS/IMAGE, and test or val
            beside train); npz (x_train, y_train, x_test, y_test in dir or the one file in it); or code that is called
            and returns the splits, as package.module:make or file.py:make (docs/experiments.md). Naming
            code is running it: do not use a stranger's config that names code which you have not read
        dir: folder of the files, or its parent; not needed for digits
        args: keywords for the code that name stands for
        size: side of the square, or height and width, that the images of image_folder are resized to; null where
            they have one size
        validation_size: training images held out for validation (digits has its own split, and what comes with a
            validation split keeps it): the last ones, of image_folder, npz and code random ones
        train_fraction: share of the remaining training images that is kept
        label_noise: share of training labels flipped to another class
        seed: draws the fraction and the noise, the same for every model of a comparison
        verify: compare the files with the official checksums; the binary layout of cifar100 has none here: numbers of
            images, and of each class, are compared
        preprocess: none (images in [0, 1]) or gcn_zca (global contrast normalisation and ZCA whitening: attacks are
            not clipped, and radii and norms are in the units of whitened images)
    """

    name: str = "digits"
    dir: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    size: int | list[int] | None = None
    validation_size: int = 5000
    train_fraction: float = 1.0
    label_noise: float = 0.0
    seed: int = 0
    verify: bool = True
    preprocess: Literal["none", "gcn_zca"] = "none"


@dataclass
class ModelConfig:
    """Which network.

    Args:
        name: digits_cnn, mnist_cnn, lenet5, lenet, mlp800, mlp1000, nin, resnet20, wrn28_2 or
            wrn28_10; or code that returns a module, as package.module:Class or file.py:Class, called with shape= (of
            an image) and classes= where its signature has them. Naming code is running it
        args: keywords for the code that name stands for
        dropout: probability in front of each fully connected layer but the first; after both pools of nin
        norm: batch or group, for the residual networks
        center: subtract the mean training image inside the network
        init: random first weights; default (PyTorch's), lecun_uniform (variance 1 / inputs) or he_normal (2 / inputs)
        initial: folder of a trained run whose weights are the first ones, or null for random ones
    """

    name: str = "digits_cnn"
    args: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    norm: Literal["batch", "group"] = "batch"
    center: bool = False
    init: Literal["default", "lecun_uniform", "he_normal"] = "default"
    initial: str | None = None


def exponent(p: float | str) -> float:
    """p as a number."""
    return math.inf if p == "inf" else float(p)


@dataclass
class SensitivityConfig:
    """Options of MarginSensitivityLoss [M].

    Args:
        weight: factor C of the norm of the gradient difference
        p: norm of the distances, p >= 1 or inf
        power: of the norm, >= 1 (1 or 2 in [M])
        classification: hinge or cross_entropy
        top_k: competitors whose gradient is looked at, the largest logits; null for all
    """

    weight: float = 0.1
    p: float | Literal["inf"] = 2.0
    power: float = 2.0
    classification: Literal["hinge", "cross_entropy"] = "hinge"
    top_k: int | None = None


@dataclass
class AdversarialConfig:
    """Options of AdversarialMarginLoss [Y] [A].

    Args:
        weight: factor lambda of the margin term
        c: slope for samples classified correctly
        d: slope for the others
        aggregation: avg (all samples) or min (per class the sample with the smallest margin)
        shrinkage: lin, exp or inv
        normalize: divide each perturbation by the norm of its image (Deep Defense)
        max_iter: DeepFool iterations at most
        overshoot: of each DeepFool step
        top_k: competitors that take part, those with the largest logits
        gradient: unrolled, envelope or first_order
        p: norm of the perturbations, 1, 2 or inf
    """

    weight: float = 32.0
    c: float = 2.0
    d: float = 1.0
    aggregation: Literal["avg", "min"] = "min"
    shrinkage: Literal["lin", "exp", "inv"] = "exp"
    normalize: bool = False
    max_iter: int = 5
    overshoot: float = 0.02
    top_k: int = 9
    gradient: Literal["unrolled", "envelope", "first_order"] = "unrolled"
    p: float | Literal["inf"] = 2.0


@dataclass
class OneToNConfig:
    """Options of OneToNLoss [R], and delta of the squared hinge.

    Args:
        delta: bound of the logits
        bound: symmetric [-delta, delta] or positive [0, delta]
        cross_entropy: add the classes of the sample itself (equation 14)
        weight_norm: divide each logit by the norm of its weight row
    """

    delta: float = 1.0
    bound: Literal["symmetric", "positive"] = "symmetric"
    cross_entropy: bool = False
    weight_norm: bool = False


@dataclass
class AdversarialTrainingConfig:
    """Options of fgsm_training.

    Args:
        eps: l_inf radius of the attack, images in [0, 1]
        steps: 1 for FGSM; more for projected gradient descent from a random start in the ball
        alpha: size of a step of the latter; null for 2 eps / steps
    """

    eps: float = 0.2
    steps: int = 1
    alpha: float | None = None


@dataclass
class VirtualAdversarialConfig:
    """Options of vat (Miyato et al., TPAMI 2019).

    Args:
        weight: factor of the divergence
        eps: l2 norm of the perturbation, images in [0, 1]
        xi: l2 norm of the step at which the power iteration takes its gradient
        iterations: of the power iteration, at least 1
    """

    weight: float = 1.0
    eps: float = 2.0
    xi: float = 0.001
    iterations: int = 1


@dataclass
class LossConfig:
    """Which loss, the options of LargeMarginLoss, which the others ignore, and a section for each other loss. Defaults
    are those of the library's losses.

    Args:
        kind: cross_entropy, hinge, squared_hinge, large_margin, margin_sensitivity, adversarial_margin, one_to_n,
            fgsm_training or vat
        cross_entropy_epochs: epochs of cross-entropy alone before this loss, for any kind
        gamma: desired distance to the boundary in the units of each tap; one value, one for each of `layers`, or one
            for each tap that these stand for, in their order; or auto: gamma_factor times the running median of each
            tap's own distance, every term divided by its gamma
        gamma_unit: absolute; or median: gamma is a multiple of the median distance of the training images (the first
            1000, those on the right side) to the nearest boundary at each tap, measured where this loss begins, and
            layer_weights are divided by the gamma that comes out, so that a tap counts in its own units
        gamma_factor: of gamma auto
        warmup: steps with enough samples on the right side before the margin has its weight, of gamma auto
        p: norm of the distances, p >= 1 or inf
        competitors: hard (the top_k largest scores), or soft: all classes as one, which needs top_k 1
        soft_shift: of the soft competitor, 0 (the lower bound of the hard gap) to 1 (the upper one)
        top_k: competitors per sample, 1 to C-1
        aggregation: max, sum, mean or mean_distance over the competitors
        alpha: clips each term at alpha * gamma
        eps: added to the gradient norm
        layer_weights: one weight for each of `layers`, or for each tap
        layer_reduction: mean (weighted) or sum over the taps
        layer_scale: numel divides the norm by the number of elements of the layer
        space: logit or probability scores
        second_order: differentiate the gradient norms too
        margin_weight: factor of the margin term
        cross_entropy_weight: factor of the auxiliary term; gamma auto needs one above 0
        auxiliary: cross_entropy, or pairwise: the logistic loss of the label and its best competitor
        label_smoothing: of the cross-entropy
        layers: taps; input, output, module names, or hidden for every hidden layer of the network (of one of your own
            what its attribute hidden_taps lists). All of these by default, as [E]; MarginTask, which knows no hidden
            layers, has the input alone
        batchnorm: batch or frozen statistics in the margin passes
        passes: how the margin gradients are obtained, auto, loop or split
        sensitivity: options of margin_sensitivity
        adversarial: options of adversarial_margin
        one_to_n: options of one_to_n
        adversarial_training: options of fgsm_training
        virtual_adversarial: options of vat
    """

    kind: str = "cross_entropy"
    cross_entropy_epochs: int = 0
    gamma: float | list[float] | Literal["auto"] = 1.0
    gamma_unit: Literal["absolute", "median"] = "absolute"
    gamma_factor: float = 1.0
    warmup: int = 50
    p: float | Literal["inf"] = 2.0
    competitors: Literal["hard", "soft"] = "hard"
    soft_shift: float = 0.0
    top_k: int = 1
    aggregation: Literal["max", "sum", "mean", "mean_distance"] = "max"
    alpha: float | None = None
    eps: float = 1e-6
    layer_weights: list[float] | None = None
    layer_reduction: Literal["mean", "sum"] = "mean"
    layer_scale: Literal["numel"] | None = None
    space: Literal["logit", "probability"] = "logit"
    second_order: bool = False
    margin_weight: float = 1.0
    cross_entropy_weight: float = 0.0
    auxiliary: Literal["cross_entropy", "pairwise"] = "cross_entropy"
    label_smoothing: float = 0.0
    layers: list[str] = field(default_factory=lambda: ["input", "hidden", "output"])
    batchnorm: Literal["batch", "frozen"] = "batch"
    passes: Literal["auto", "loop", "split"] = "auto"
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    one_to_n: OneToNConfig = field(default_factory=OneToNConfig)
    adversarial_training: AdversarialTrainingConfig = field(default_factory=AdversarialTrainingConfig)
    virtual_adversarial: VirtualAdversarialConfig = field(default_factory=VirtualAdversarialConfig)


# The options of LossConfig that each loss reads besides `kind` and `cross_entropy_epochs`. A section has a default that
# is made anew for each config.
_SECTIONS = tuple(f.name for f in dataclasses.fields(LossConfig) if dataclasses.is_dataclass(f.default_factory))
GENERAL_OPTIONS = ("kind", "cross_entropy_epochs")
OPTIONS_OF_LOSS: dict[str, tuple[str, ...]] = {
    "cross_entropy": (),
    "hinge": (),
    "squared_hinge": ("one_to_n",),
    "large_margin": tuple(
        f.name for f in dataclasses.fields(LossConfig) if f.name not in (*_SECTIONS, *GENERAL_OPTIONS)
    ),
    "margin_sensitivity": ("sensitivity", "passes", "batchnorm"),
    "adversarial_margin": ("adversarial",),
    "one_to_n": ("one_to_n",),
    "fgsm_training": ("adversarial_training",),
    "vat": ("virtual_adversarial",),
}


@dataclass
class OptimiserConfig:
    """Which optimiser.

    Args:
        name: sgd, adam or rmsprop
        lr: learning rate at the start
        momentum: of sgd and rmsprop
        weight_decay: added to the gradient
    """

    name: Literal["sgd", "adam", "rmsprop"] = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0


@dataclass
class ScheduleConfig:
    """Learning rate as a function of the epoch.

    Args:
        name: constant, cosine (to 0 at the end), step (x factor at each milestone) or exponential (x factor every
            epoch)
        factor: of step and exponential
        milestones: epochs of step
        warmup: epochs of linear increase from 0
    """

    name: Literal["constant", "cosine", "step", "exponential"] = "constant"
    factor: float = 0.1
    milestones: list[int] = field(default_factory=list)
    warmup: float = 0.0


@dataclass
class TrainingConfig:
    """How to train.

    Args:
        epochs: passes over the training images, `repeat` at a time
        repeat: passes in what counts as one epoch; for so few images that a pass is a step or two
        augment: training images shifted by up to 4 pixels (crop), half of them mirrored too (crop_flip), or none
        stop_at_train_accuracy: stop after the epoch in which this share of the training labels (the noisy ones, where
            there is noise) was predicted, counted batch by batch during the epoch; null for all epochs
        batch_size: images per optimiser step
        accumulate: equal parts a batch is cut into, one backward pass each
        seed: initial weights, order of the data, dropout
        device: cpu, cuda or cuda:N
        precision: fp32, bf16 (autocast) or fp16 (autocast and loss scaling, cuda only)
        compile: one compiled graph for each training step (MarginTask.compile), where the loss allows it
        channels_last: memory format of model and images
        clip_norm: largest l2 norm of the gradient, or null
        threads: CPU threads, or null for torch's choice
        distance_samples: validation images whose distance to the boundary is measured after each epoch; 0 for none
        distance_p: norm of that measurement, the same for every model of a comparison
        tensorboard: write TensorBoard events into the run's folder as well; needs the extra [tensorboard]
    """

    epochs: int = 30
    repeat: int = 1
    augment: Literal["none", "crop", "crop_flip"] = "none"
    stop_at_train_accuracy: float | None = None
    batch_size: int = 64
    accumulate: int = 1
    seed: int = 0
    device: str = "cpu"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    channels_last: bool = False
    clip_norm: float | None = None
    threads: int | None = None
    distance_samples: int = 256
    distance_p: float | Literal["inf"] = 2.0
    tensorboard: bool = False


@dataclass
class EvaluationConfig:
    """What to measure on the test split.

    Args:
        eps: l_inf radius of the attacks in the table
        curve: radii of the accuracy curves; 0 costs no attack, and eps none but the table's
        steps: of IFGSM, each of size 2 eps / steps
        batch_size: images per evaluation batch
        attack_samples: test images attacked; null for all
        ifgsm_samples: those among them that are attacked by IFGSM, which costs `steps` times as much; null for all of
            them, 0 for none
        deepfool_samples: test images measured by DeepFool; 0 for none
        deepfool_iterations: at most
        deepfool_step_limit: longest step of DeepFool, or null; [M] limits it to 0.5
        distance_samples: test images whose signed distance is measured; 0 for none
        distance_p: norm of that distance
        noise_sigmas: standard deviations of Gaussian noise added to test images; empty for none
        noise_samples: test images with noise; null for all
        noise_seed: draws the noise, the same for every model and sigma
        attacker: folder of a trained run whose network makes black-box images for this one, and is attacked with the
            images made for this one, or null; in a sweep the label of a model above
        timing_repeats: interleaved training steps of the loss and of cross-entropy; 0 for no timing
    """

    eps: float = 0.1
    curve: list[float] = field(default_factory=lambda: [0.0, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3])
    steps: int = 10
    batch_size: int = 500
    attack_samples: int | None = None
    ifgsm_samples: int | None = None
    deepfool_samples: int = 500
    deepfool_iterations: int = 50
    deepfool_step_limit: float | None = None
    distance_samples: int = 1000
    distance_p: float | Literal["inf"] = 2.0
    noise_sigmas: list[float] = field(default_factory=list)
    noise_samples: int | None = None
    noise_seed: int = 0
    attacker: str | None = None
    timing_repeats: int = 15


@dataclass
class Config:
    """One run.

    Args:
        name: of the run, and of its folder
        data: which images
        model: which network
        loss: which loss
        optimiser: which optimiser
        schedule: learning rate over the epochs
        training: how to train
        evaluation: what to measure
    """

    name: str = "run"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
