"""An MoE as plain loops over tokens and their experts, after the paper's words and not the code's."""

import jax.numpy as jnp
import numpy as np


def gates_of(logits: np.ndarray, top_k: int, renormalise: bool) -> tuple[np.ndarray, np.ndarray]:
    """Experts and gates [N, k] of each token, highest first."""
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    experts = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top_k]
    gates = np.take_along_axis(probabilities, experts, axis=-1)
    return experts, gates / gates.sum(-1, keepdims=True) if renormalise else gates


def expert_mlp(x, experts, gates, gate_up, down):
    """[N, D]; experts [N, k] on the host, the others may be traced."""
    rows = []
    for token, own, weights in zip(x, np.asarray(experts), gates, strict=True):
        row = jnp.zeros_like(token)
        for expert, weight in zip(own, weights, strict=True):
            gate, up = token @ gate_up[expert, :, 0], token @ gate_up[expert, :, 1]
            row += weight * ((gate / (1 + jnp.exp(-gate)) * up) @ down[expert])
        rows.append(row)
    return jnp.stack(rows)
