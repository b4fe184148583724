"""Makes smollm2.npz: logits of SmolLM2-135M-Instruct as transformers reads it from its GGUF file.

    python tests/parity/make_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf [OUTPUT.npz]

Needs torch, gguf, accelerate and transformers 4. Stored: `text` and its int32 `tokens` [16], every 97th logit, `logits`
[16, 507], and over the whole vocabulary `argmax` [16] and `log_normaliser` [16], the log of the sum of exponentials.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "<|im_start|>user\nThe capital of France, in 1789, was Paris;"


def main(gguf: str, output: str = str(Path(__file__).parent / "fixtures" / "smollm2.npz")) -> None:
    place = {"pretrained_model_name_or_path": str(Path(gguf).parent), "gguf_file": Path(gguf).name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    # The file says add_bos_token = False, which transformers' Llama tokenizer does not read.
    tokens = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt").input_ids[:, :16]
    model = AutoModelForCausalLM.from_pretrained(**place, torch_dtype=torch.float32)
    with torch.no_grad():
        logits = model(tokens).logits[0]
    np.savez_compressed(
        output,
        text=TEXT,
        tokens=tokens[0].int().numpy(),
        logits=logits[:, ::97].numpy(),
        argmax=logits.argmax(-1).int().numpy(),
        log_normaliser=logits.logsumexp(-1).numpy(),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
