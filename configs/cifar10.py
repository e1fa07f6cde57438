"""SE-ResNet on CIFAR-10, the schedule of He et al. 2016 (section 4.2), as Hu et al. 2020 (section 5.1) used it.

Command:   python -m train --config=configs/cifar10.py --workdir=runs/cifar10
           python -m train --config=configs/cifar10.py:seresnet110 --workdir=runs/cifar10-110
Data:      tfds:cifar10, prepared once (see docs/data.md), or class folders: --config.data.source=folder:<path>
"""

from train.config import Augment, Checkpoint, Config, Data, Model, Optim

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


def get_config(model: str = "seresnet20") -> Config:
    """Settings of the run; the argument names a CIFAR network."""
    return Config(
        model=Model(name=model),
        data=Data(source="tfds:cifar10", image_size=32, batch_size=128, mean=MEAN, std=STD),
        augment=Augment(flip=True, pad=4),
        optim=Optim(
            name="sgd",
            learning_rate=0.1,
            schedule="step",
            boundaries=(82.0, 123.0),
            decay_factor=0.1,
            weight_decay=1e-4,
        ),
        checkpoint=Checkpoint(every_epochs=5),
        epochs=164,
        log_every_steps=50,
    )
