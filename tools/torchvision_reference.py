"""Writes `tests/torchvision/NAME.json.gz`: keys and shapes of torchvision's networks, and logits of some of them.

    python tools/torchvision_reference.py      # needs torch and torchvision, which the project does not

Weights are synthetic: `tests/parity/synthetic.py` gives each entry from its key and shape.
"""

import gzip
import json
import sys
from pathlib import Path

import torch
import torchvision

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from parity import synthetic  # noqa: E402

from se_flax.checkpoints.torchvision import NETWORKS  # noqa: E402

# One of each kind of block and norm is computed.
COMPUTED = ("efficientnet_b0", "efficientnet_b5", "efficientnetv2_s", "mobilenetv3_small_100", "mobilenetv3_large_100")
COMPUTED += ("regnety_004", "regnety_008_tv")
SHAPE = (2, 3, 64, 64)


def norm_scales(model: torch.nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Mean square in front of every batch norm, so that no map grows or vanishes."""
    found: dict[str, float] = {}

    def measure(name: str) -> object:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            found[name] = scale = float(inputs[0].square().mean())
            for part in ("running_mean", "running_var"):
                value = synthetic.tensor(f"{name}.{part}", getattr(module, part).shape, scale)
                getattr(module, part).copy_(torch.from_numpy(value))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(measure(name))
    model(images)
    return found


def reference(name: str) -> dict[str, object]:
    """The content of a file."""
    model = getattr(torchvision.models, NETWORKS[name].name)().eval()
    entries = [[key, list(value.shape)] for key, value in model.state_dict().items()]
    found = {"network": NETWORKS[name].name, "torchvision": torchvision.__version__, "entries": entries}
    if name in COMPUTED:
        drawn = {key: torch.from_numpy(synthetic.tensor(key, shape, 1.0)) for key, shape in entries}
        model.load_state_dict(drawn)
        images = torch.from_numpy(synthetic.images(SHAPE))
        found |= {"input_shape": SHAPE, "norm_scales": norm_scales(model, images)}
        found["logits"] = model(images)[:, ::5].tolist()
    return found


def main() -> None:
    """Writes a file for every network."""
    folder = TESTS / "torchvision"
    folder.mkdir(exist_ok=True)
    with torch.no_grad():
        for name in NETWORKS:
            text = json.dumps(reference(name), separators=(",", ":"))
            (folder / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
