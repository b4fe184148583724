"""An MoE as plain loops over tokens and their experts, after the paper's words and not the code's."""

import jax.numpy as jnp
import numpy as np


def gates_of(logits: np.ndarray, top_k: int, renormalise: bool) -> tuple[np.ndarray, np.ndarray]:
    """Experts and gates [N, k] of each token, highest first."""
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    experts = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top_k]
    gates = np.take_along_axis(probabilities, experts, axis=-1)
    return experts, gates / gates.sum(-1, keepdims=True) if renormalise else gates


def gates_by_sigmoid(logits, bias, top_k, renormalise, groups, groups_per_token, scale):
    """The same, one token at a time, by DeepSeek-V3's section 2.1.2: sigmoid scores, and a bias that only chooses."""
    experts, gates = [], []
    for row in logits:
        score = [1 / (1 + np.exp(-value)) for value in row]
        wanted = [own + extra for own, extra in zip(score, bias, strict=True)]
        size = len(row) // groups
        members = [range(group * size, (group + 1) * size) for group in range(groups)]
        worth = [sum(sorted(wanted[i] for i in group)[-2:]) for group in members]
        best = sorted(range(groups), key=lambda group: -worth[group])[:groups_per_token]
        allowed = [i for group in best for i in members[group]]
        chosen = sorted(allowed, key=lambda i: -wanted[i])[:top_k]
        total = sum(score[i] for i in chosen) if renormalise and top_k > 1 else 1
        experts.append(chosen)
        gates.append([scale * score[i] / total for i in chosen])
    return np.array(experts), np.array(gates)


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
