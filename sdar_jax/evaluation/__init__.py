"""Likelihood and accuracy of trained models; `held_out` scores them while they are trained."""

from sdar_jax.evaluation.likelihood import autoregressive_nll, nelbo

__all__ = ["autoregressive_nll", "nelbo"]
