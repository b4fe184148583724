"""Likelihood and accuracy of trained models."""

from sdar_jax.evaluation.likelihood import autoregressive_nll, nelbo

__all__ = ["autoregressive_nll", "nelbo"]
