"""The networks of Hu et al. 2020 (section 5.1 and table 4) on CIFAR-10, each with the schedule of its own paper.

Command:   python -m train --config=configs/cifar10.py --workdir=runs/cifar10
           python -m train --config=configs/cifar10.py:seresnet110 --workdir=runs/cifar10-110
           python -m train --config=configs/cifar10.py:se_wrn16_8 --workdir=runs/cifar10-wide
           python -m train --config=configs/cifar10.py:se_shake_shake26_2x96d --workdir=runs/cifar10-shake
           python -m train --config=configs/cifar10.py:fast --workdir=runs/cifar10-fast      (small: half its widths)
Data:      tfds:cifar10, prepared once (see docs/data.md), or class folders: --config.data.source=folder:<path>

ResNets:   He et al. 2016, section 4.2. Hu et al. report 5.21 % error for SE-ResNet-110, 6.37 % without SE.
WRN:       Zagoruyko & Komodakis 2016, section 3: 200 epochs, rate 0.1 times 0.2 after 60, 120 and 160, weight decay
           5e-4 (3.88 %, without SE 4.27 %); --config.model.drop_rate=0.3 for their dropout.
Shake-*:   Gastaldi 2017 and his code: 1800 epochs of a cosine from 0.2, with Cutout of 16 pixels (2.12 %, without SE
           2.56 %).
The code of the last two decays every parameter, norms and biases too.
fast:      SE-airbench94 with the settings of Jordan 2024 ("94% on CIFAR-10 in 3.29 Seconds on a Single GPU", section 3:
           94.0 % after 9.9 epochs of the network without SE). Different here: half his batch, a moving average in
           place of Lookahead, no weight decay of biases, 15 epochs.
small:     The same with half the widths, in 8 epochs: for comparisons on a CPU.

Measured:  fast, 15 epochs of a JPEG copy (quality 75) of CIFAR-10, one seed, 2026-11-30, JAX 0.10.2, 2 cores of an AMD
           EPYC with AVX2, shared with other work:
               GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m train --config=configs/cifar10.py:fast
               --config.data.source=folder:data/cifar10 --config.data.place=device --workdir=runs/fast
           76 min 47 s (230 images/s where nothing else ran: 56 min); top-1 85.93, 89.18 and 90.87 % (9,087 of 10,000)
           after 5, 10 and 15 epochs; curve in docs/curves/cifar10_fast.png.
           What the copy costs: the ResNet-20, 32, 44 and 56 of akamaster/pytorch_resnet_cifar10, which were trained on
           the original images and have 91.73, 92.63, 93.10 and 93.39 % on the original test images, have 81.03, 82.56,
           82.67 and 83.20 % on the copy's. On 500 original test images (an easy sample) these four have 94.0, 95.4,
           96.6 and 97.4 %, this network 96.6 %, and 96.2 % on the copies of the same images. So it stands near 93 % of
           the originals; 94 % is not shown, and training on the originals was not possible here.

Measured:  SE-ResNet-20, one epoch of a JPEG copy (quality 75) of CIFAR-10, 2026-11-20, JAX 0.10.2, 2 cores of a 2.5 GHz
           Xeon shared with another training:
               GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m train --config=configs/cifar10.py
               --config.data.source=folder:data/cifar10 --config.epochs=1 --config.optim.schedule=cosine
               --config.optim.weight_decay=5e-4 --config.eval_every_epochs=0.5 --workdir=runs/cifar10
           16 min 35 s; top-1 50.6 % after half an epoch, 59.62 % (5,962 of 10,000) after one; curve in
           docs/curves/cifar10.png. With and without SE, two epochs, three seeds: docs/ablations.md. The 164 epochs of
           the recipe were not run: that takes an accelerator.
"""

from train.config import Augment, Checkpoint, Config, Data, Model, Optim

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


def get_config(model: str = "seresnet20") -> Config:
    """Settings of the run; the argument names a CIFAR network, which brings its schedule along."""
    config = Config(
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
    if "wrn" in model:
        config.epochs = 200
        config.optim.boundaries, config.optim.decay_factor = (60.0, 120.0, 160.0), 0.2
        config.optim.weight_decay, config.optim.decay_norm_and_bias = 5e-4, True
    elif model in ("fast", "small"):
        config.model.name = "se_airbench94"
        fast(config)
        if model == "small":
            config.model.name, config.epochs = "se_airbench94_050", 8
    elif "shake" in model:
        config.epochs = 1800
        config.optim.schedule, config.optim.learning_rate, config.optim.boundaries = "cosine", 0.2, ()
        config.optim.decay_norm_and_bias = True
        config.augment.cutout = 16
    return config


def fast(config: Config) -> None:
    """Settings of Jordan 2024, of whose rate of 11.5 for 1,024 summed losses 0.75 is the one for a mean over 512."""
    config.epochs, config.data.batch_size, config.data.eval_batch_size = 15, 512, 1000
    config.augment = Augment(flip=True, alternate_flip=True, pad=2, pad_mode="reflect")
    rate = 0.75
    config.optim = Optim(
        name="sgd",
        learning_rate=rate,
        schedule="triangular",
        first_learning_rate=0.2 * rate,
        peak=0.23,
        final_learning_rate=0.07 * rate,
        momentum=0.85,
        weight_decay=1.33e-3,
        norm_bias_multiplier=64.0,
        ema_decay=0.975,
        label_smoothing=0.2,
        whiten_stem=True,
    )
    config.eval_tta = "flip_shift"
    config.eval_every_epochs = 5  # six views of 10,000 images cost two fifths of an epoch
    config.checkpoint = Checkpoint(every_epochs=5)
