"""Outputs of the released code of block-diffusion and masked-diffusion models, for the directories of released.py.

    python -m tests.released MODELS
    python tests/parity/make_released.py CODE MODELS

Written once to fixtures/released.npz, with torch 2.6 and transformers 4.57.3, which nothing else here needs. CODE holds
checkouts of the public repositories: `dllm` (ZHZisZZ/dllm: the networks of a2d, LLaDA and Dream, its samplers of block
and masked diffusion, Dream's loop), `SDAR` (JetAstra/SDAR: the loop of generate.py) and `LLaDA` (ML-GSAI/LLaDA: that of
generate.py). The network of SDAR is transformers' Qwen3 under SDAR's mask, as SDAR's own needs a GPU.

Greedy: where a loop samples, the likeliest token is taken instead. Dream's loop has `eps` at -1e-4, where it commits
a token each step; at its 1e-3 it rounds down to none in the first step and commits two in the last. dllm's sampler of
blocks pads a prompt on the left to whole blocks, which its training does not do: its prompts are whole blocks here.
"""

import copy
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

CODE, MODELS = map(Path, sys.argv[1:3])
MASK = 260
OUTPUT = Path(__file__).parent / "fixtures" / "released.npz"
PROMPTS = {"blocks": 64, "canvas": 11}


def tokens(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(4, MASK, length)


def package(name: str, path: Path) -> None:
    """Makes a package of a directory without running its __init__, which imports what is not needed here."""
    module = types.ModuleType(name)
    module.__path__ = [str(path)]
    sys.modules[name] = module


def load(path: Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Tokenizer:
    mask_token_id, bos_token_id, pad_token_id, eos_token_id = MASK, 0, 0, 0


class BlockCache(torch.nn.Module):
    """Takes SDAR's `store_kv`: a forward that does not store leaves the cache as it is."""

    device = torch.device("cpu")

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, attention_mask, position_ids, past_key_values, use_cache, store_kv):
        cache = past_key_values if store_kv else copy.deepcopy(past_key_values)
        return self.model(
            ids,
            attention_mask=attention_mask[:, None].bool(),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )


def network(config: dict, directory: Path):
    kind = config["model_type"]
    fields = {name: value for name, value in config.items() if name != "model_type"}
    fields["attn_implementation"] = "sdpa"
    fields.pop("auto_map", None)
    if kind in ("sdar", "sdar_moe"):
        classes = {
            "sdar": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
            "sdar_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
        }[kind]
    elif kind.startswith("a2d"):
        base = kind.removeprefix("a2d-")
        module = importlib.import_module(f"dllm.pipelines.a2d.models.{base}.modeling_{base}")
        name = {"qwen3": "A2DQwen3", "qwen2": "A2DQwen2", "llama": "A2DLlama"}[base]
        classes = (getattr(module, f"{name}Config"), getattr(module, f"{name}LMHeadModel"))
    elif kind == "llada":
        configs = importlib.import_module("dllm.pipelines.llada.models.configuration_llada")
        module = importlib.import_module("dllm.pipelines.llada.models.modeling_llada")
        fields |= {"init_device": "cpu", "attn_implementation": "eager"}

        def build(config):
            # By itself it would go to a GPU.
            shape = module.create_model_config_from_pretrained_config(config)
            inner = module.LLaDAModel(shape, init_params=False)
            return module.LLaDAModelLM(config, model=inner)

        classes = (configs.LLaDAConfig, build)
    else:
        configs = importlib.import_module("dllm.pipelines.dream.models.configuration_dream")
        module = importlib.import_module("dllm.pipelines.dream.models.modeling_dream")
        classes = (configs.DreamConfig, module.DreamModel)
    model = classes[1](classes[0](**fields)).float().eval()
    missing, unexpected = model.load_state_dict(
        load_file(directory / "model.safetensors"), strict=False
    )
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def block_mask(length: int, size: int) -> torch.Tensor:
    block = torch.arange(length) // size
    return (block[None] <= block[:, None])[None, None]


def logits(model, kind: str, size: int) -> np.ndarray:
    ids = torch.from_numpy(tokens(12))[None]
    options = {"attention_mask": block_mask(12, size)} if kind.startswith("sdar") else {}
    return model(ids, **options).logits[0, :, ::8].float().numpy()


def decode(model, name: str, kind: str, size: int) -> dict[str, np.ndarray]:
    if kind.startswith("sdar"):
        prompt = torch.from_numpy(tokens(6))[None]
        loop = load(CODE / "SDAR" / "generate.py", "sdar_generate").block_diffusion_generate
        made = loop(
            BlockCache(model),
            {"input_ids": prompt},
            MASK,
            gen_length=2 * size,
            block_length=size,
            denoising_steps=size,
            confidence_threshold=0.9,
        )
        return {"greedy": made[0, 6 : 6 + 2 * size]}
    if "bd3lm" in name:
        samplers = importlib.import_module("dllm.core.samplers.bd3lm")
        prompt = tokens(PROMPTS["blocks"]).tolist()
        made = samplers.BD3LMSampler(model=model, tokenizer=Tokenizer()).sample(
            [prompt], samplers.BD3LMSamplerConfig(steps=64, max_new_tokens=64, block_size=32)
        )
        return {"greedy": made[0, -64:]}
    prompt = torch.from_numpy(tokens(PROMPTS["canvas"]))[None]
    if kind == "llada":
        loop = load(CODE / "LLaDA" / "generate.py", "llada_generate").generate
        made = loop(model, prompt, steps=64, gen_length=64, block_length=32, mask_id=MASK)
        return {"greedy": made[0, -64:]}
    if kind == "Dream":
        made = {}
        settings = {"steps": 16, "max_new_tokens": 16, "eps": -1e-4, "temperature": 0.0}
        generation = importlib.import_module("dllm.pipelines.dream.models.generation_utils")
        for alg, key in (("maskgit_plus", "greedy"), ("entropy", "greedy_entropy")):
            config = generation.DreamGenerationConfig(
                mask_token_id=MASK,
                pad_token_id=0,
                eos_token_id=0,
                bos_token_id=0,
                alg=alg,
                **settings,
            )
            made[key] = model.diffusion_generate(prompt, generation_config=config)[0, -16:]
        return made
    samplers = importlib.import_module("dllm.core.samplers.mdlm")
    made = samplers.MDLMSampler(model=model, tokenizer=Tokenizer()).sample(
        [prompt[0].tolist()], samplers.MDLMSamplerConfig(steps=64, max_new_tokens=64, block_size=32)
    )
    return {"greedy": made[0, -64:]}


def main() -> None:
    torch.manual_seed(0)
    for part in ("", ".core", ".core.samplers", ".core.schedulers", ".pipelines"):
        package(f"dllm{part}", CODE.joinpath("dllm", "dllm", *part.split(".")))
    for kind in ("llada", "dream", "a2d"):
        package(f"dllm.pipelines.{kind}", CODE / "dllm" / "dllm" / "pipelines" / kind)
        package(f"dllm.pipelines.{kind}.models", CODE / "dllm/dllm/pipelines" / kind / "models")
    schedulers = importlib.import_module("dllm.core.schedulers.alpha")
    sys.modules["dllm.core.schedulers"].BaseAlphaScheduler = schedulers.BaseAlphaScheduler
    sys.modules["dllm.core.schedulers"].LinearAlphaScheduler = schedulers.LinearAlphaScheduler
    # An old registry, which their classes of today do not fit.
    for auto in (transformers.AutoModel, transformers.AutoModelForMaskedLM):
        auto.register = lambda *arguments, **options: None
    torch.multinomial = lambda probs, num_samples: probs.argmax(-1, keepdim=True)
    found = {}
    with torch.no_grad():
        for directory in sorted(MODELS.iterdir()):
            name, config = directory.name, json.loads((directory / "config.json").read_text())
            kind = config["model_type"]
            if kind in ("Fast_dLLM_Qwen", "llada2_moe"):
                # Of make_released_blocks.py.
                continue
            size = 8 if name.endswith("-b8") else 4
            model = network(config, directory)
            found[f"{name}/logits"] = logits(model, kind, size)
            for key, made in decode(model, name, kind, size).items():
                assert MASK not in made
                found[f"{name}/{key}"] = np.asarray(made, np.int16)
                print(name, key, made.tolist())
    np.savez_compressed(OUTPUT, **found)


if __name__ == "__main__":
    main()
