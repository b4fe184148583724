"""The released SDAR generation loop on a CPU, in a process of its own. Needs torch, transformers 4.52 and einops.

    python benchmarks/sdar_peer.py SDAR_SRC MODEL_DIR

SDAR_SRC is a checkout of the released repository: its `generate.py` and `modeling_sdar.py` are run as they are, over
the weights of MODEL_DIR, but for what needs a GPU or is not there:

- `flash_attn_func` is scaled_dot_product_attention, `rms_norm_fn` torch's own RMSNorm; the fused cross-entropy, which
  only training calls, is absent, and torch.compile, which only decorates a function of training, does nothing;
- `sample_with_temperature_topk_topp` is greedy, with the mask token's logit at minus infinity: the released one has no
  greedy mode (top_k = 1 makes every confidence 1) and may propose the mask token, which then fails. This one does less.

It prints "ready", and for each request, a line of JSON with `prompt`, `new_tokens`, `block_size` and `steps`, a line of
JSON with `seconds`, `tokens` (the new ones) and `forwards` (all but the one that reads the prompt).
"""

# pyright: reportMissingImports=false
import contextlib
import importlib.util
import json
import sys
import time
import types
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

MODEL_CODE = "training/model/SDAR-8B-Chat"


def flash_attn_func(q, k, v, causal=False, softmax_scale=None):
    """[B, L, H, D], as flash_attn's."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
    ).transpose(1, 2)


def rms_norm_fn(x, weight, bias, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


def stand_in(name: str, **members) -> None:
    """A module of this name for the released code to import, and the packages above it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules:
            module = types.ModuleType(path)
            module.__path__ = []
            module.__spec__ = importlib.util.spec_from_loader(path, None, is_package=True)
            sys.modules[path] = module
    for member, value in members.items():
        setattr(sys.modules[name], member, value)


def released(source: Path):
    """The modules generate, modeling_sdar and configuration_sdar."""
    stand_in("flash_attn", flash_attn_func=flash_attn_func, flash_attn_varlen_func=None)
    stand_in("flash_attn.ops.triton.layer_norm", rms_norm_fn=rms_norm_fn)
    stand_in("flash_attn.bert_padding", index_first_axis=None, pad_input=None, unpad_input=None)
    stand_in("sdar_model")
    stand_in(
        "sdar_model.fused_linear_diffusion_cross_entropy", FusedLinearDiffusionCrossEntropyLoss=None
    )
    torch.compile = lambda *_, **__: lambda function: function
    sys.modules["sdar_model"].__path__ = [str(source / MODEL_CODE)]
    sys.path.insert(0, str(source))
    names = ("generate", "sdar_model.modeling_sdar", "sdar_model.configuration_sdar")
    return [importlib.import_module(name) for name in names]


def load(source: Path, directory: Path):
    """The released generate module, a model and its mask token id."""
    generate, modeling, configuration = released(source)
    # Released config.json files have one field of their own, read in each forward.
    config = configuration.SDARConfig(
        **json.loads((directory / "config.json").read_text()), fuse_cross_entropy=True
    )
    model = modeling.SDARForCausalLM(config)
    state = {
        name: tensor
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    model.load_state_dict(state, strict=True)
    mask = config.mask_token_id

    def greedy(logits, temperature=1.0, top_k=0, top_p=1.0):
        logits[..., mask] = -torch.inf
        confidence, token = F.softmax(logits, dim=-1).max(dim=-1)
        return token, confidence

    vars(generate)["sample_with_temperature_topk_topp"] = greedy
    return generate, model, mask


def main():
    torch.set_num_threads(2)
    # transformers prints advice about docstrings as it imports.
    with contextlib.redirect_stdout(sys.stderr):
        generate, model, mask = load(Path(sys.argv[1]), Path(sys.argv[2]))
    forwards = 0

    def count(*_):
        nonlocal forwards
        forwards += 1

    model.register_forward_hook(count)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prompt = torch.tensor([request["prompt"]])
        forwards, start = 0, time.perf_counter()
        out = generate.block_diffusion_generate(
            model,
            {"input_ids": prompt},
            mask,
            gen_length=request["new_tokens"],
            block_length=request["block_size"],
            denoising_steps=request["steps"],
            remasking_strategy="low_confidence_static",
        )
        seconds = time.perf_counter() - start
        tokens = out[0, prompt.shape[1] :][: request["new_tokens"]].tolist()
        prefill = prompt.shape[1] >= request["block_size"]
        print(
            json.dumps({"seconds": seconds, "tokens": tokens, "forwards": forwards - prefill}),
            flush=True,
        )


if __name__ == "__main__":
    main()
