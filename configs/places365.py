"""SE-ResNet-152 on Places365 (Hu et al. 2020, section 5.2 and table 6: 40.37 % top-1 error; ResNet-152 41.15 %).

Command:   python -m train --config=configs/places365.py --workdir=runs/places365
Data:      tfds:places365_small, prepared as ArrayRecord (see docs/data.md). The paper trained on the larger
           Places365-Challenge set of 8 million images.

Trained from scratch with ImageNet's recipe, as the paper did. Not run by this project: 1.8 million images.
"""

from configs import imagenet
from train.config import Config


def get_config() -> Config:
    """Settings of the run."""
    config = imagenet.get_config("paper")
    config.model.name = "msra_seresnet152"
    config.data.source = "tfds:places365_small"
    return config
