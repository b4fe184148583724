"""Makes the adapters in adapters/, by PEFT, of the models in fixtures/; or reads with PEFT one that was saved here.

    python tests/parity/make_adapters.py [OUTPUT_DIRECTORY]
    python tests/parity/make_adapters.py --read ADAPTER OUTPUTS.npz

Needs torch, transformers and peft; the stored files were made with torch 2.7.1, transformers 4.52.4 and peft 0.21.2,
lora-experts with torch 2.13.0 (which makes the others again, within 3e-6).
Each directory is what `save_pretrained` of PEFT writes, with outputs.npz: `tokens`, float32 `logits` with the adapter,
and one array for each gradient of the mean next-token cross-entropy, named as in the adapter's file.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).parent / "fixtures"
ADAPTERS = Path(__file__).parent / "adapters"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MADE = {
    "lora-qwen3": ("qwen3", {"r": 4, "lora_alpha": 6, "target_modules": LINEAR}),
    # A rank and a scale of its own, embeddings trained whole.
    "lora-patterns": (
        "qwen3",
        {
            "r": 3,
            "lora_alpha": 5,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 5},
            "alpha_pattern": {"down_proj": 7},
            "modules_to_save": ["embed_tokens", "lm_head"],
        },
    ),
    "lora-moe": ("qwen3-moe", {"r": 4, "target_modules": ["q_proj", "k_proj", "o_proj"]}),
    # Modules of each expert, which transformers before 5 has.
    "lora-experts": ("qwen3-moe", {"r": 3, "lora_alpha": 5, "target_modules": LINEAR}),
}


def base(name: str):
    return AutoModelForCausalLM.from_pretrained(
        FIXTURES / name, attn_implementation="eager", torch_dtype=torch.float32
    )


def make(output: Path, name: str) -> None:
    fixture, settings = MADE[name]
    torch.manual_seed(0)
    model = get_peft_model(base(fixture), LoraConfig(task_type="CAUSAL_LM", **settings))
    tokens = torch.from_numpy(np.load(FIXTURES / fixture / "outputs.npz")["tokens"]).long()
    trained = {key: each for key, each in model.named_parameters() if each.requires_grad}
    for key, each in trained.items():
        if "lora_A" not in key:
            each.data += 0.05 * torch.randn_like(each)
    logits = model(tokens).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    ).backward()
    gradients = {
        key.replace(".default", "").replace("modules_to_save.", ""): each.grad.numpy()
        for key, each in trained.items()
    }
    # No path of the machine that makes it.
    model.peft_config["default"].base_model_name_or_path = fixture
    model.save_pretrained(output / name)
    (output / name / "README.md").unlink(missing_ok=True)
    np.savez_compressed(
        output / name / "outputs.npz",
        tokens=tokens.numpy(),
        logits=logits.detach().numpy(),
        **gradients,
    )


def read(adapter: Path, outputs: Path) -> None:
    """Prints how far PEFT's logits with this adapter are from those in `outputs`."""
    fixture = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(base(Path(fixture).name), adapter)
    stored = np.load(outputs)
    logits = model(torch.from_numpy(stored["tokens"]).long()).logits.detach().numpy()
    print("largest difference", abs(logits - stored["logits"]).max())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        for name in MADE:
            make(Path(sys.argv[1]) if sys.argv[1:] else ADAPTERS, name)
