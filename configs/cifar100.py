"""The networks of Hu et al. 2020 (section 5.1 and table 5) on CIFAR-100, each with the schedule of its own paper.

Command:   python -m train --config=configs/cifar100.py --workdir=runs/cifar100
           python -m train --config=configs/cifar100.py:se_wrn16_8 --workdir=runs/cifar100-wide
           python -m train --config=configs/cifar100.py:se_shake_even29_2x4x64d --workdir=runs/cifar100-shake
Data:      tfds:cifar100, prepared once (see docs/data.md), or class folders: --config.data.source=folder:<path>

Errors that Hu et al. report, with SE and without: ResNet-110 23.85 and 26.88 %, WRN-16-8 19.14 and 20.43 %, Shake-Even
29 2x4x64d with Cutout of 8 pixels 15.41 and 15.85 %. The schedules are CIFAR-10's, but for the two settings below.
"""

from configs import cifar10
from train.config import Config

MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)


def get_config(model: str = "seresnet110") -> Config:
    """Settings of the run; the argument names a CIFAR network, which brings its schedule along."""
    config = cifar10.get_config(model)
    config.data.source = "tfds:cifar100"
    config.data.mean, config.data.std = MEAN, STD
    if "shake" in model:
        # Gastaldi's code for CIFAR-100; DeVries & Taylor 2017, section 4.2 for Cutout.
        config.data.batch_size, config.optim.learning_rate, config.optim.weight_decay = 32, 0.025, 5e-4
        config.augment.cutout = 8
    elif "wrn" not in model:
        # He et al. 2016, section 4.2: 110 layers start with a smaller rate, or they do not start at all.
        config.optim.warmup_epochs = 1
    return config
