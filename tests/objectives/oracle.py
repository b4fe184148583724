"""The network and its losses as the equations say them: an explicit mask, a plain softmax, all logits at once.

Written apart from the package's forward: it shares the weights' layout (model.py) and nothing else.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sdar_jax.model import Model


def hybrid_layout(segment_ids: np.ndarray, block_size: int, noisy_index: np.ndarray):
    """Of one row: positions [N + L] and the mask [N + L, N + L] of Eq. 7; noisy_index is -1 where unused."""
    length, copies = len(segment_ids), len(noisy_index)
    place = np.zeros(length, np.int64)
    document = np.zeros(length, np.int64)
    for i in range(1, length):
        same = segment_ids[i] == segment_ids[i - 1]
        place[i] = place[i - 1] + 1 if same else 0
        document[i] = document[i - 1] if same else i
    block = place // block_size
    index = np.concatenate([noisy_index, np.arange(length)])
    used = (index >= 0) & (segment_ids[index] > 0)
    noisy = np.arange(copies + length) < copies
    together = (document[index][:, None] == document[index]) & used[:, None] & used
    b, c = block[index][:, None], block[index]
    from_noisy = np.where(noisy, c == b, c < b)
    from_clean = ~noisy & (c <= b)
    return place[index], together & np.where(noisy[:, None], from_noisy, from_clean)


def rotated(x, positions, theta: float):
    """RoPE: dimension i turns with i + K / 2, at theta^(-2 i / K), held in float32 as transformers holds it."""
    half = x.shape[-1] // 2
    frequencies = (1.0 / theta ** (np.arange(half) / half)).astype(np.float32).astype(np.float64)
    angle = positions[:, None, None] * frequencies
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def normed(x, scale, eps: float):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale[...]


def attended(q, k, v, mask):
    """[T, H, K] queries over [T, G, K] keys, every head on its own; what sees nothing gives zero."""
    groups = q.shape[1] // k.shape[1]
    heads = []
    for h in range(q.shape[1]):
        scores = jnp.where(mask, q[:, h] @ k[:, h // groups].T / np.sqrt(q.shape[-1]), -1e30)
        probs = jnp.where(mask, jnp.exp(scores - scores.max(-1, keepdims=True)), 0)
        heads.append(probs / jnp.where(mask.any(-1), probs.sum(-1), 1)[:, None] @ v[:, h // groups])
    return jnp.stack(heads, axis=1)


def feed_forward(h, gate_up, down):
    gate, up = h @ gate_up[...][0].T, h @ gate_up[...][1].T
    return (gate / (1 + jnp.exp(-gate)) * up) @ down[...].T


def moe(h, layer, config):
    """Every expert on every token, times a gate that is zero for all but the token's own."""
    odds = jnp.exp(h @ layer.router[...])
    lowest = jnp.sort(odds, axis=-1)[:, -config.num_experts_per_token, None]
    gates = jnp.where(odds >= lowest, odds, 0)
    gates = gates / (gates if config.norm_topk_prob else odds).sum(-1, keepdims=True)
    weights = zip(layer.experts_gate_up[...], layer.experts_down[...], strict=True)
    return sum(
        gates[:, e, None] * feed_forward(h, up.transpose(1, 2, 0), down.T)
        for e, (up, down) in enumerate(weights)
    )


def logits(model: Model, tokens, positions, mask):
    """[T, V] of one row [T] under an explicit mask [T, T]."""
    config = model.config
    x = model.embedding[...][tokens]
    for layer in model.layers:
        h = normed(x, layer.attention_norm, config.rms_norm_eps)
        qkv = jnp.einsum("td,grkd->tgrk", h, layer.qkv[...])
        q, k, v = (
            qkv[:, :, :-2].reshape(len(tokens), config.num_heads, config.head_dim),
            qkv[:, :, -2],
            qkv[:, :, -1],
        )
        q, k = (
            normed(q, layer.q_norm, config.rms_norm_eps),
            normed(k, layer.k_norm, config.rms_norm_eps),
        )
        mixed = attended(
            rotated(q, positions, config.rope.theta),
            rotated(k, positions, config.rope.theta),
            v,
            mask,
        )
        x = x + mixed.reshape(len(tokens), -1) @ layer.output[...].reshape(config.hidden_size, -1).T
        h = normed(x, layer.mlp_norm, config.rms_norm_eps)
        x = x + (
            feed_forward(h, layer.gate_up, layer.down)
            if layer.router is None
            else moe(h, layer, config)
        )
    head = (model.embedding if model.head is None else model.head)[...].T
    return normed(x, model.final_norm, config.rms_norm_eps) @ head


def cross_entropy(logits, targets):
    shifted = logits - logits.max(-1, keepdims=True)
    return jnp.log(jnp.exp(shifted).sum(-1)) - shifted[jnp.arange(len(targets)), targets]


@jax.jit
@jax.value_and_grad
def loss_and_gradients(model: Model, inputs, positions, mask, targets, weights):
    """Sum of weights * CE of the first N of each row's T positions. [B, T], mask [B, T, T]; targets, weights [B, N]."""
    total = 0.0
    for row in range(len(inputs)):
        asked = logits(model, inputs[row], positions[row], mask[row])[: targets.shape[1]]
        total += (weights[row] * cross_entropy(asked, targets[row])).sum()
    return total


def block_diffusion(
    model: Model, tokens, noisy_tokens, weights, segment_ids, noisy_index=None, *, block_size
):
    """The loss and its gradients, in numpy until the network is reached."""
    if noisy_index is None:
        noisy_index = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    layouts = [
        hybrid_layout(ids, block_size, index)
        for ids, index in zip(segment_ids, noisy_index, strict=True)
    ]
    positions, mask = (np.stack(parts) for parts in zip(*layouts, strict=True))
    targets = np.take_along_axis(tokens, np.maximum(noisy_index, 0), axis=1)
    inputs = np.concatenate([noisy_tokens, tokens], axis=1)
    return loss_and_gradients(
        model, inputs, positions, mask, targets, np.where(noisy_index >= 0, weights, 0)
    )
