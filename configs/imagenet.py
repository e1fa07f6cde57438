"""SE-ResNet-50 on ImageNet.

Command:   python -m train --config=configs/imagenet.py --workdir=runs/se-resnet50
           python -m train --config=configs/imagenet.py:modern --workdir=runs/se-resnet50-modern
Data:      tfds:imagenet2012, prepared as ArrayRecord (see docs/data.md); --config.data.data_dir=gs://<bucket>/tfds

`paper`:   Hu et al. 2020, section 5.1: SGD with momentum 0.9, batch 1024, rate 0.6 divided by ten every 30 epochs, 100
           epochs, random resized crop and flip; stride in the first 1x1, as their models have it. The paper reports
           23.29 % top-1 error (ResNet-50: 24.80 %). It does not state the weight decay; 1e-4 is the usual one.
`modern`:  what later recipes add (Wightman et al. 2021, "ResNet strikes back", procedure A3's ingredients at 224
           pixels): LAMB, cosine, RandAugment, mixup and CutMix, label smoothing, stochastic depth, moving average.

Neither was run by this project to its end: that takes a TPU or GPU for hours to days.
"""

from se_flax.errors import UserError, closest
from train.config import Augment, Checkpoint, Config, Data, Model, Optim, Parallel


def get_config(recipe: str = "paper") -> Config:
    """Settings of the run; the argument is `paper` or `modern`."""
    recipes = {"paper": paper, "modern": modern}
    if recipe not in recipes:
        raise UserError(f"unknown recipe imagenet.py:{recipe}; {closest(recipe, recipes)}")
    return recipes[recipe]()


def data(batch_size: int) -> Data:
    """ImageNet at 224 pixels, cropped as every paper since GoogLeNet does."""
    return Data(
        source="tfds:imagenet2012",
        train_split="train",
        eval_split="validation",
        image_size=224,
        train_crop="random_resized",
        eval_crop_fraction=0.875,
        batch_size=batch_size,
        workers=8,
    )


def paper() -> Config:
    """The recipe of the Squeeze-and-Excitation paper."""
    return Config(
        model=Model(name="msra_seresnet50"),
        data=data(1024),
        augment=Augment(flip=True),
        optim=Optim(
            name="sgd",
            learning_rate=0.6,
            schedule="step",
            boundaries=(30.0, 60.0, 90.0),
            decay_factor=0.1,
            momentum=0.9,
            nesterov=False,
            weight_decay=1e-4,
        ),
        epochs=100,
        precision="bfloat16",
        log_every_steps=100,
    )


def modern() -> Config:
    """LAMB, strong augmentation, moving average."""
    return Config(
        model=Model(name="seresnet50", drop_path_rate=0.05),
        data=data(2048),
        augment=Augment(flip=True, randaugment_layers=2, randaugment_magnitude=7, mixup=0.1, cutmix=1.0),
        optim=Optim(
            name="lamb",
            learning_rate=8e-3,
            schedule="cosine",
            warmup_epochs=5,
            weight_decay=0.02,
            eps=1e-6,
            clip_norm=1.0,
            label_smoothing=0.1,
            ema_decay=0.9999,
        ),
        parallel=Parallel(batch_norm="replica"),
        checkpoint=Checkpoint(keep_best=1),
        epochs=100,
        precision="bfloat16",
        log_every_steps=100,
    )
