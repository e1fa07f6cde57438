"""timm's side, under an interpreter that has it: `python timm_side.py MODEL TASK BATCH SIDE MODE`.

Modes are `eager`, `channels_last` and `compile`, which is `torch.compile` with channels-last memory.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.loader_sides import import_torchvision
from benchmarks.sides.pace import serve


def main() -> None:
    """Serves one comparison."""
    name, task, batch, side, mode = sys.argv[1:]
    kept = import_torchvision(torch)
    import timm

    torch.manual_seed(0)
    torch.set_num_threads(2)
    layout = torch.contiguous_format if mode == "eager" else torch.channels_last
    model = timm.create_model(name).to(memory_format=layout)
    images = torch.randn(int(batch), 3, int(side), int(side)).contiguous(memory_format=layout)
    labels = torch.arange(int(batch)) % 1000
    model.train(task == "train")
    run = torch.compile(model) if mode == "compile" else model
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def train() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(run(images), labels).backward()
        optimizer.step()

    def infer() -> None:
        with torch.inference_mode():
            run(images)

    serve(train if task == "train" else infer, torch=torch.__version__, timm=timm.__version__)
    del kept


if __name__ == "__main__":
    main()
