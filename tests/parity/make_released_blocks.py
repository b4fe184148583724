"""Outputs of the released code of Fast-dLLM v2 and LLaDA2, for their directories of tests/released.py.

    python -m tests.released MODELS
    python tests/parity/make_released_blocks.py CODE MODELS

Written once to fixtures/released_blocks.npz, with torch 2.6 and transformers 4.52.4, which nothing else here needs.
CODE holds public files: `fast_dllm/generation_functions.py` (v2/ of NVlabs/Fast-dLLM at d259b48, its loop) and
`llada2_moe/{modeling,configuration}_llada2_moe.py` (models/llada2_moe/ of inclusionAI/dFactory at 92b6890, the
network).

The network of Fast-dLLM v2 is transformers' Qwen2 under its mask and with its cache, which only a finished block is
written to: what its hub's modeling file has besides compiles for a GPU. LLaDA2's loop is on the hub alone, and is
written here as forks carry it.

Losses are sums of the cross-entropy of masked positions over [noisy | clean], in Fast-dLLM's case of the token after
each position, as the released training codes have them; the gradients, some of them, are of those.
"""

import copy
import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

CODE, MODELS = map(Path, sys.argv[1:3])
MASK, SIZE, THRESHOLD = 260, 32, 0.08
OUTPUT = Path(__file__).parent / "fixtures" / "released_blocks.npz"


def tokens(length: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(length).integers(4, MASK, length))[None]


def load(model: torch.nn.Module, directory: Path) -> torch.nn.Module:
    model.load_state_dict(load_file(directory / "model.safetensors"), strict=True)
    return model.float().eval()


def additive(visible: torch.Tensor) -> torch.Tensor:
    return torch.where(visible, 0.0, -torch.inf)[None, None]


def block_causal(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return additive(queries[:, None] // SIZE >= keys[None] // SIZE)


def hybrid(length: int) -> torch.Tensor:
    block, noisy = torch.arange(length).repeat(2) // SIZE, torch.arange(2 * length) < length
    own = (block[:, None] == block) & (noisy[:, None] == noisy)
    before = (block[:, None] > block) & ~noisy
    return additive(own | before)


class FastDLLM(torch.nn.Module):
    """The face that its loop expects of the network."""

    device = torch.device("cpu")

    def __init__(self, model):
        super().__init__()
        self.model, self.forwards = model, 0

    def forward(
        self,
        input_ids,
        use_cache,
        update_past_key_values,
        past_key_values=None,
        block_size=SIZE,
    ):
        assert use_cache and block_size == SIZE
        self.forwards += 1
        cache = copy.deepcopy(past_key_values) or transformers.DynamicCache()
        seen = cache.get_seq_length()
        at = torch.arange(seen, seen + input_ids.shape[1])
        out = self.model(
            input_ids,
            attention_mask=block_causal(at, torch.arange(seen + input_ids.shape[1])),
            position_ids=at[None],
            past_key_values=cache,
            use_cache=True,
        )
        kept = cache if update_past_key_values else past_key_values
        return types.SimpleNamespace(logits=out.logits, past_key_values=kept)

    def sample_with_top_p(self, logits, top_p, temperature):
        assert temperature == 0
        probs = torch.softmax(logits, dim=-1)
        return probs.argmax(dim=-1), probs


def fast_dllm(config: dict, directory: Path) -> dict[str, np.ndarray]:
    fields = {
        name: value for name, value in config.items() if name not in ("model_type", "auto_map")
    }
    qwen2 = transformers.Qwen2Config(**fields, attn_implementation="eager")
    model = load(transformers.Qwen2ForCausalLM(qwen2), directory)
    # It writes a docstring where Python has none to write to.
    transformers.utils.auto_docstring = lambda decorated: decorated
    loop = importlib.import_module("fast_dllm.generation_functions").Fast_dLLM_QwenForCausalLM
    found = {}
    for length in (40, 64):
        network = FastDLLM(model)
        (made,) = loop.batch_sample(
            network,
            tokens(length),
            types.SimpleNamespace(pad_token_id=0),
            block_size=SIZE,
            max_new_tokens=2 * SIZE,
            small_block_size=8,
            min_len=length,
            seq_len=torch.tensor([length]),
            mask_id=MASK,
            threshold=THRESHOLD,
            stop_token=-1,
        ).values()
        # Its last token begins another block.
        found[f"greedy{length}"] = made[length:-1]
        found[f"forwards{length}"] = np.array(network.forwards)
    noisy = noised(tokens(64))
    read = torch.cat([noisy, tokens(64)], dim=1)
    positions = torch.arange(64).repeat(2)[None]
    out = model(read, attention_mask=hybrid(64), position_ids=positions, use_cache=False)
    labels = torch.where(noisy == MASK, tokens(64), -100)
    loss = cross_entropy(out.logits[:, :63], labels[:, 1:])
    weights = ("model.layers.0.self_attn.q_proj.bias", "model.norm.weight")
    return {**found, **gradients(model, loss, weights), "logits": clean(model, tokens(12))}


def llada2(config: dict, directory: Path) -> dict[str, np.ndarray]:
    module = llada2_module()
    configs = importlib.import_module("llada2_moe.configuration_llada2_moe")
    shape = configs.LLaDA2MoeConfig(**config, attn_implementation="eager")
    # The one in which experts have tensors of their own.
    shape.model_type = "llada2_moe"
    model = load(module.LLaDA2MoeModelLM(shape), directory)
    x = torch.cat([tokens(40), torch.full((1, 56), MASK)], dim=1)
    forwards = 0
    for start in (32, 64):
        end = start + SIZE
        at = torch.arange(end)
        for _ in range(SIZE):
            masked = x[0, start:end] == MASK
            if not masked.any():
                break
            out = model(x[:, :end], attention_mask=block_causal(at, at), position_ids=at[None])
            confidence, token = out.logits[0, start:end].softmax(-1).max(-1)
            confidence = torch.where(masked, confidence, -torch.inf)
            commit = confidence > THRESHOLD
            if not commit.any():
                commit[confidence.argmax()] = True
            x[0, start:end] = torch.where(commit, token, x[0, start:end])
            forwards += 1
    noisy = noised(tokens(64))
    read = torch.cat([noisy, tokens(64)], dim=1)
    positions = torch.arange(64).repeat(2)[None]
    model.train()
    out = model(read, attention_mask=hybrid(64), position_ids=positions)
    loss = cross_entropy(out.logits[:, :64], torch.where(noisy == MASK, tokens(64), -100))
    names = ("mlp.gate.weight", "attention.query_layernorm.weight", "mlp.experts.5.up_proj.weight")
    weights = [f"model.layers.1.{name}" for name in names]
    made = {**gradients(model, loss, weights), "logits": clean(model.eval(), tokens(12))}
    return {**made, "greedy40": x[0, 40:], "forwards40": np.array(forwards)}


def llada2_module() -> types.ModuleType:
    """Imports the network, with what it takes of VeOmni in place: nothing of that runs here."""
    no_op = lambda *arguments, **options: None
    parts = {
        "veomni.ops": {"causallm_loss_function": no_op, "fused_moe_forward": no_op},
        "veomni.distributed.parallel_state": {"get_parallel_state": no_op},
        "veomni.utils.import_utils": {"is_liger_kernel_available": lambda: False},
        "veomni.utils": {"logging": transformers.utils.logging},
        "veomni.distributed": {},
        "veomni": {},
    }
    for name, values in parts.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(values)
        sys.modules[name] = module
    module = importlib.import_module("llada2_moe.modeling_llada2_moe")
    # Masks are given as they are added.
    for name in ("_prepare_4d_causal_attention_mask", "_prepare_4d_causal_attention_mask_for_sdpa"):
        setattr(module, name, lambda mask, *arguments, **options: mask)
    return module


def noised(clean_tokens: torch.Tensor) -> torch.Tensor:
    masked = torch.from_numpy(np.random.default_rng(1).random(clean_tokens.shape) < 0.5)
    return torch.where(masked, MASK, clean_tokens)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum")


def gradients(model, loss: torch.Tensor, names) -> dict[str, np.ndarray]:
    loss.backward()
    weights = dict(model.named_parameters())
    found = {f"gradient/{name}": weights[name].grad.numpy() for name in names}
    return {"loss": loss.detach().numpy(), **found}


def clean(model, ids: torch.Tensor) -> np.ndarray:
    at = torch.arange(ids.shape[1])
    out = model(ids, attention_mask=block_causal(at, at), position_ids=at[None], use_cache=False)
    return out.logits[0, :, ::8].detach().numpy()


def main() -> None:
    sys.path.insert(0, str(CODE))
    found = {}
    for name, outputs in (("Fast_dLLM_v2_7B", fast_dllm), ("LLaDA2.0-mini", llada2)):
        directory = MODELS / name
        for key, made in outputs(
            json.loads((directory / "config.json").read_text()), directory
        ).items():
            if key.startswith("greedy"):
                assert MASK not in made
                made = np.asarray(made, np.int16)
            found[f"{name}/{key}"] = np.asarray(made)
            print(name, key, made if made.size < 80 else made.shape)
    np.savez_compressed(OUTPUT, **found)


if __name__ == "__main__":
    main()
