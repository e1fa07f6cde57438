"""timm in a comparison: `python timm_side.py MODEL TASK BATCH IMAGE_SIZE MODE [bfloat16]`, with timm's interpreter.

Modes are `eager`, `channels_last` and `compile`, which is `torch.compile` with channels-last memory. In bfloat16 the
parameters are float32 in training (autocast). The network runs on a GPU if torch finds one (see
`CUDA_VISIBLE_DEVICES`).
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.loader_sides import import_torchvision
from benchmarks.sides.pace import serve


def main() -> None:
    """Serves one comparison."""
    name, task, batch, side, mode, *words = sys.argv[1:]
    half = "bfloat16" in words
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    kept = import_torchvision(torch)
    import timm

    torch.manual_seed(0)
    torch.set_num_threads(2)
    layout = torch.contiguous_format if mode == "eager" else torch.channels_last
    stored = torch.bfloat16 if half and task != "train" else torch.float32
    model = timm.create_model(name).to(device, stored, memory_format=layout)
    images = torch.randn(int(batch), 3, int(side), int(side), device=device, dtype=stored)
    images = images.contiguous(memory_format=layout)
    labels = torch.arange(int(batch), device=device) % 1000
    model.train(task == "train")
    run = torch.compile(model) if mode == "compile" else model
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def train() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = torch.nn.functional.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        if gpu:
            torch.cuda.synchronize()

    def infer() -> None:
        with torch.inference_mode():
            run(images)
        if gpu:
            torch.cuda.synchronize()

    serve(train if task == "train" else infer, torch=torch.__version__, timm=timm.__version__)
    del kept


if __name__ == "__main__":
    main()
