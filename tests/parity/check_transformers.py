"""Compares a model directory that this project saved with transformers' own classes. Needs torch and transformers.

    python tests/parity/check_transformers.py DIRECTORY OUTPUTS.npz [MODEL_TYPE]

OUTPUTS.npz holds int32 `tokens` [B, L] and our causal float32 `logits` [B, L, V]. Prints the greatest difference,
relative to the greatest logit; exits with 1 if it is over 1e-4, or if a tensor is missing or unexpected. MODEL_TYPE
reads a converted directory as that architecture.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM


def main(directory: str, outputs: str, model_type: str | None = None) -> int:
    values = json.loads((Path(directory) / "config.json").read_text())
    config = AutoConfig.for_model(**{**values, "model_type": model_type or values["model_type"]})
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, config=config, torch_dtype=torch.float32, output_loading_info=True
    )
    expected = np.load(outputs)
    with torch.no_grad():
        logits = model(torch.tensor(expected["tokens"], dtype=torch.long)).logits.numpy()
    difference = np.abs(logits - expected["logits"]).max() / np.abs(logits).max()
    problems = [
        list(report[key])
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report[key]
    ]
    print(f"{type(model).__name__}: difference {difference:.1e}, problems {problems}")
    return 1 if problems or difference > 1e-4 else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
