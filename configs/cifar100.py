"""SE-ResNet-110 on CIFAR-100 (Hu et al. 2020, table 5: 23.85 % error, without attention 26.88 %).

Command:   python -m train --config=configs/cifar100.py --workdir=runs/cifar100
Data:      tfds:cifar100, prepared once (see docs/data.md), or class folders: --config.data.source=folder:<path>
"""

from configs import cifar10
from train.config import Config

MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)


def get_config(model: str = "seresnet110") -> Config:
    """Settings of the run; the argument names a CIFAR network."""
    config = cifar10.get_config(model)
    config.data.source = "tfds:cifar100"
    config.data.mean, config.data.std = MEAN, STD
    # He et al. 2016, section 4.2: 110 layers start with a smaller rate, or they do not start at all.
    config.optim.warmup_epochs = 1
    return config
