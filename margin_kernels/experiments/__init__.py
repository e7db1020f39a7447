"""Experiment runner: data, models, attacks, training, evaluation, report, and the command line `margin-kernels`.

Nothing in margin_kernels outside this folder imports it; its further dependencies come with `pip install
margin_kernels[experiments]`.
"""
