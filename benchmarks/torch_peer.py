"""The same work in PyTorch, in a process of its own, so that both sides can be timed in turns. Needs torch alone.

    python benchmarks/torch_peer.py attention '{"length": 2048, ...}'

builds the work, prints "ready", and for each line on its standard input does it once and prints the seconds it took and
the peak memory of the process in bytes. torch is no dependency of this project: run it with a Python that has it.
"""

import json
import resource
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


def hybrid_mask(length: int, block_size: int) -> torch.Tensor:
    """The dense [2 L, 2 L] mask of the layout [noisy | clean] for one document (Eq. 7)."""
    position = torch.arange(2 * length)
    noisy, block = position < length, position % length // block_size
    q_noisy, k_noisy, q, k = noisy[:, None], noisy[None], block[:, None], block[None]
    return (
        (q_noisy & k_noisy & (q == k))
        | (q_noisy & ~k_noisy & (q > k))
        | (~q_noisy & ~k_noisy & (q >= k))
    )


def attention(length: int, block_size: int, heads: int, kv_heads: int, head_dim: int, batch: int):
    """scaled_dot_product_attention with the dense mask, forward and backward."""
    shape = lambda n: (batch, n, 2 * length, head_dim)
    q, k, v = (torch.randn(shape(n), requires_grad=True) for n in (heads, kv_heads, kv_heads))
    d_out, mask = torch.randn(shape(heads)), hybrid_mask(length, block_size)

    def run():
        q.grad = k.grad = v.grad = None
        F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=heads != kv_heads
        ).backward(d_out)

    return run


class Layer(nn.Module):
    def __init__(self, hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        linear = lambda a, b: nn.Linear(a, b, bias=False)
        self.qkv = linear(hidden, (heads + 2 * kv_heads) * head_dim)
        self.output = linear(heads * head_dim, hidden)
        self.gate_up, self.down = linear(hidden, 2 * ffn), linear(ffn, hidden)
        self.norms = nn.ModuleList(
            nn.RMSNorm(n, eps=1e-6) for n in (hidden, hidden, head_dim, head_dim)
        )

    def forward(self, x, cos, sin, mask):
        batch, length, _ = x.shape
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        parts = self.qkv(self.norms[0](x)).split(sizes, dim=-1)
        q, k, v = (p.view(batch, length, -1, self.head_dim).transpose(1, 2) for p in parts)
        q, k = rotate(self.norms[2](q), cos, sin), rotate(self.norms[3](k), cos, sin)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=self.heads != self.kv_heads
        )
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Network(nn.Module):
    def __init__(self, vocab_size: int, hidden: int, layers: int, **layer):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden)
        self.layers = nn.ModuleList(Layer(hidden, **layer) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.head = nn.Linear(hidden, vocab_size, bias=False)


def training_step(
    length: int, block_size: int, batch: int, vocab_size: int, mask_token_id: int, **network
):
    """Forward over [noisy | clean], head and cross-entropy at masked positions alone, backward, clipping, AdamW."""
    torch.manual_seed(0)
    model = Network(vocab_size, **network)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, betas=(0.9, 0.95))
    mask = hybrid_mask(length, block_size)
    position = torch.arange(length, dtype=torch.float32).repeat(2)
    dim = network["head_dim"]
    angle = position[:, None] * 1e6 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    cos, sin = (f(torch.cat((angle, angle), dim=-1)) for f in (torch.cos, torch.sin))
    tokens = torch.randint(0, vocab_size, (batch, length))

    def run():
        p = 1e-3 + (1 - 1e-3) * torch.rand(batch, 1)
        masked = torch.rand(batch, length) < p
        x = model.embedding(torch.cat((torch.where(masked, mask_token_id, tokens), tokens), dim=1))
        for layer in model.layers:
            x = layer(x, cos, sin, mask)
        logits = model.head(model.norm(x[:, :length][masked]))
        weights = (1 / p).expand(batch, length)[masked]
        loss = (
            F.cross_entropy(logits, tokens[masked], reduction="none") * weights
        ).sum() / tokens.numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def main():
    torch.set_num_threads(2)
    run = {"attention": attention, "training_step": training_step}[sys.argv[1]](
        **json.loads(sys.argv[2])
    )
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)


if __name__ == "__main__":
    main()
