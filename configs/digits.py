"""SE-ResNet-20 on scikit-learn's handwritten digits: the quickstart.

Command:   python -m train --config=configs/digits.py --workdir=runs/digits
"""

from train.config import Augment, Config, Data, Model, Optim


def get_config() -> Config:
    """Settings of the run."""
    return Config(
        model=Model(name="seresnet20"),
        data=Data(source="digits", image_size=16, batch_size=64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        augment=Augment(pad=2),
        optim=Optim(name="sgd", learning_rate=0.05, schedule="cosine", warmup_epochs=1, weight_decay=5e-4),
        epochs=15,
    )
