"""Writes timm's float64 gradients of a fixture's training step to `tests/parity/double/NAME.json.gz`.

    python tools/double_gradients.py NAME [NAME ...]      # needs torch and timm, which the project does not

A fixture's gradients are float32. In a network with ReLU some activations are so close to zero that float32 rounding
changes their sign, in PyTorch and in JAX, and with it all earlier gradients. In float64 both frameworks agree to a
dozen digits, which shows that the networks are the same.
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import timm
import torch

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from parity import synthetic  # noqa: E402


def double_gradients(name: str) -> dict[str, object]:
    """Loss of a network in float64, and norm and projection of every gradient.

    Args:
      name: a network with a fixture that has a training step.
    """
    fixture = json.loads(gzip.decompress((TESTS / "parity" / "fixtures" / f"{name}.json.gz").read_bytes()))
    state = synthetic.state_dict(fixture["entries"], fixture["norm_scales"])
    model = timm.create_model(name)
    model.load_state_dict({key: torch.from_numpy(np.asarray(value)) for key, value in state.items()})
    model.double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.train()
    images = torch.from_numpy(synthetic.images(fixture["train"]["batch_shape"])).double()
    loss = torch.nn.functional.cross_entropy(model(images), torch.arange(len(images)))
    loss.backward()
    grads = {}
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        grad = parameter.grad.numpy()
        grads[key] = [float(np.linalg.norm(grad)), float(np.vdot(synthetic.probe(key, grad.shape), grad))]
    return {"model": name, "loss": loss.item(), "grads": grads}


def main() -> None:
    """Writes one file for every name on the command line."""
    folder = TESTS / "parity" / "double"
    folder.mkdir(exist_ok=True)
    for name in sys.argv[1:]:
        text = json.dumps(double_gradients(name), separators=(",", ":"))
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
