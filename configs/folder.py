"""Your own images: class folders of JPEG or PNG files.

Command:   python -m train --config=configs/folder.py --config.data.source=folder:<path> --workdir=runs/mine
Data:      <path>/<class>/*.jpg, of which a tenth is held out, or <path>/train/<class>/ and <path>/val/<class>/

Measured:  five kinds of flowers (3,451 photographs to train, 860 to test), SE-ResNet-20 from scratch at 48 pixels,
           2026-11-20, JAX 0.10.2, 2 cores of a 2.5 GHz Xeon shared with another training:
               GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m train --config=configs/folder.py:seresnet20
               --config.data.source=folder:data/flowers128_split --config.data.image_size=48 --config.epochs=6
               --config.optim.warmup_epochs=0.5 --workdir=runs/flowers
           16 min 9 s; top-1 after each epoch 46.2, 51.3, 55.8, 60.8, 61.2, 60.3 % (519 of 860); curve in
           docs/curves/flowers.png. Six epochs are a start, not what the network can reach.
"""

from train.config import Augment, Checkpoint, Config, Data, Model, Optim


def get_config(model: str = "seresnet18") -> Config:
    """Settings of the run; the argument names a network."""
    return Config(
        model=Model(name=model),
        data=Data(
            source="folder:data/images",
            image_size=128,
            train_crop="random_resized",
            crop_scale=(0.25, 1.0),
            eval_crop_fraction=1.0,
            bad_images="skip",
            batch_size=64,
        ),
        augment=Augment(flip=True, brightness=0.3, contrast=0.3, saturation=0.3),
        optim=Optim(
            name="sgd", learning_rate=0.05, schedule="cosine", warmup_epochs=2, weight_decay=5e-4, label_smoothing=0.1
        ),
        checkpoint=Checkpoint(every_epochs=1),
        epochs=30,
    )
