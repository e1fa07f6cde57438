"""Your own images: class folders of JPEG or PNG files.

Command:   python -m train --config=configs/folder.py --config.data.source=folder:<path> --workdir=runs/mine
           python -m train --config=configs/folder.py:finetune --config.init_from=<checkpoint>
           --config.data.source=folder:<path> --workdir=runs/mine
           python -m train --config=configs/folder.py:head --config.init_from=<checkpoint>
           --config.data.source=folder:<path> --workdir=runs/mine
Data:      <path>/<class>/*.jpg, of which a tenth is held out, or <path>/train/<class>/ and <path>/val/<class>/

The first command trains SE-ResNet-18 from scratch; `folder.py:<network>` names another network. With `init_from` a run
goes on from published or saved weights (<checkpoint> is anything that `se_flax.load_pretrained` takes) with a new
classifier. `folder.py:finetune` has the size, rate and length that suit it: the classifier is fitted to the features of
the training images first (Kumar et al. 2022), and batch norms stay in evaluation mode. `folder.py:head` ends after the
fit, for which every image is read once. What is left empty comes from the checkpoint: the network, and the mean, std
and interpolation that its images had; image size and crops do not. A network that is named must be the checkpoint's. A
resumed run reads its own checkpoints only.
    --config.optim.layer_decay=0.8                  slows a block down the more, the lower it sits
    --config.optim.freeze_batch_norm=false          trains the batch norms too, for large batches

Measured:  five kinds of flowers (3,451 photographs to train, 860 to test), SE-ResNet-20 from scratch at 48 pixels,
           2026-11-20, JAX 0.10.2, 2 cores of a 2.5 GHz Xeon shared with another training:
               GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m train --config=configs/folder.py:seresnet20
               --config.data.source=folder:data/flowers128_split --config.data.image_size=48 --config.epochs=6
               --config.optim.warmup_epochs=0.5 --workdir=runs/flowers
           16 min 9 s; top-1 after each epoch 46.2, 51.3, 55.8, 60.8, 61.2, 60.3 % (519 of 860); curve in
           docs/curves/flowers.png. Six epochs are a start, not what the network can reach.
Measured:  the same photographs, EfficientNetV2-B0 with the ImageNet weights of Keras at 224 pixels, 2026-11-30, JAX
           0.10.2, 2 cores of an AMD EPYC, shared with other work. The classifier alone:
               GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m train --config=configs/folder.py:head
               --config.init_from=efficientnetv2_b0_imagenet_keras.npz
               --config.data.source=folder:data/flowers128_split --workdir=runs/flowers_head
           2 min 12 s; top-1 74.07 % (637 of 860). All layers from there, the same command with `:finetune`, one seed:
           87 min 2 s, while other programs took most of the machine (9.4 images/s alone: about 25 min); top-1 after
           each epoch 73.49, 74.53, 75.93, 76.16 % (655 of 860); curve in docs/curves/flowers_finetune.png. At rate
           0.01 with batch norms in training mode, top-1 after the first of four epochs was 59.3 %, probably since their
           statistics are a mixture of old and new ones then.
Measured:  the same at 96 pixels, without the fit and with batch norms in training mode, 2026-11-20, 2 cores of a Xeon,
           two runs at a time: four epochs at rate 0.05 from the ImageNet weights 52.1, 60.7, 65.0, 65.0 % (559 of
           860), from scratch 34.1 % (293 of 860). The classifier alone by
           gradient descent (train_only=head, rate 0.1, 128 pixels, 3 epochs): 68.4 % (588 of 860).
"""

from train.config import CHECKPOINT, Augment, Checkpoint, Config, Data, Model, Optim


def get_config(model: str = "") -> Config:
    """Settings of the run; the argument names a network, or is `finetune` or `head`."""
    if model in ("finetune", "head"):
        return finetune(head_only=model == "head")
    return scratch(model)


def scratch(model: str) -> Config:
    """Training from random weights."""
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


def finetune(*, head_only: bool = False) -> Config:
    """Training from a checkpoint: a classifier fitted to its features, then all layers at a low rate."""
    config = scratch("")
    config.init_from = CHECKPOINT
    config.data.image_size = 224
    config.data.crop_scale = (0.5, 1.0)
    config.optim.fit_head, config.optim.freeze_batch_norm = True, True
    config.optim.learning_rate, config.optim.warmup_epochs, config.epochs = 0.003, 0, 4
    if head_only:
        config.optim.train_only, config.epochs = "head", 0
    return config
