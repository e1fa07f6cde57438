"""Your own images: class folders of JPEG or PNG files.

Command:   python -m train --config=configs/folder.py --config.data.source=folder:<path> --workdir=runs/mine
Data:      <path>/<class>/*.jpg, of which a tenth is held out, or <path>/train/<class>/ and <path>/val/<class>/
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
