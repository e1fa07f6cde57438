"""Settings of other training programs and their counterparts here."""

from collections.abc import Iterable, Mapping

from se_flax.errors import closest

_WORKDIR = "--workdir=DIR is where a run leaves everything, and goes on by itself when it is started again"

# By the foreign word: settings, of which a recipe has one, or a sentence.
_MEANINGS: Mapping[str, tuple[str, ...] | str] = {
    # How the parameters move.
    **dict.fromkeys(("lr", "base_lr", "blr", "lr0", "init_lr", "initial_lr", "max_lr"), ("optim.learning_rate",)),
    **dict.fromkeys(("min_lr", "lr_min", "eta_min", "end_lr", "final_lr"), ("optim.final_learning_rate",)),
    **dict.fromkeys(("wd", "decay", "l2_reg", "weight_decay"), ("optim.weight_decay", "optim.l2")),
    **dict.fromkeys(("opt", "optimizer", "optimiser"), ("optim.name",)),
    **dict.fromkeys(("sched", "scheduler", "lr_scheduler", "lr_schedule"), ("optim.schedule",)),
    **dict.fromkeys(("warmup", "warmup_steps", "num_warmup_steps", "warmup_ratio"), ("optim.warmup_epochs",)),
    **dict.fromkeys(("milestones", "decay_milestones", "lr_steps"), ("optim.boundaries",)),
    **dict.fromkeys(("gamma", "decay_rate", "lr_gamma"), ("optim.decay_factor",)),
    **dict.fromkeys(("decay_epochs", "step_size", "lr_step_size"), ("optim.decay_every_epochs",)),
    **dict.fromkeys(("beta1", "adam_beta1", "betas"), ("optim.b1",)),
    **dict.fromkeys(("beta2", "adam_beta2"), ("optim.b2",)),
    **dict.fromkeys(("epsilon", "opt_eps", "adam_epsilon"), ("optim.eps",)),
    **dict.fromkeys(
        ("clip", "clip_grad", "grad_clip", "clip_grad_norm", "max_grad_norm", "gradient_clip_val"), ("optim.clip_norm",)
    ),
    **dict.fromkeys(
        ("accum", "accum_iter", "accum_steps", "grad_accum", "grad_accum_steps", "gradient_accumulation_steps"),
        ("optim.accumulate",),
    ),
    **dict.fromkeys(("accumulate_grad_batches",), ("optim.accumulate",)),
    **dict.fromkeys(("ema", "model_ema", "model_ema_decay", "use_ema"), ("optim.ema_decay",)),
    **dict.fromkeys(("smoothing", "label_smooth", "ls"), ("optim.label_smoothing",)),
    **dict.fromkeys(("lr_layer_decay", "layerwise_decay", "llrd"), ("optim.layer_decay",)),
    **dict.fromkeys(("freeze", "freeze_backbone", "linear_probe", "head_only"), ("optim.train_only",)),
    **dict.fromkeys(("freeze_bn",), ("optim.freeze_batch_norm",)),
    **dict.fromkeys(("early_stopping", "early_stop"), ("optim.patience",)),
    **dict.fromkeys(("criterion", "loss", "loss_fn"), ("loss.name",)),
    # The network.
    **dict.fromkeys(("model", "arch", "architecture", "net", "network", "backbone", "model_name"), ("model.name",)),
    **dict.fromkeys(("classes", "n_classes", "num_class", "nb_classes", "num_labels"), ("model.num_classes",)),
    **dict.fromkeys(("drop", "dropout", "dropout_rate"), ("model.drop_rate", "model.dropout")),
    **dict.fromkeys(
        ("drop_path", "stochastic_depth", "stochastic_depth_prob", "drop_connect_rate"), ("model.drop_path_rate",)
    ),
    **dict.fromkeys(("attn", "attention", "se"), ("model.attention.kind",)),
    **dict.fromkeys(("rd_ratio", "se_ratio", "reduction_ratio"), ("model.attention.reduction", "model.reduction")),
    **dict.fromkeys(("amp", "fp16", "bf16", "half", "half_precision", "mixed_precision", "dtype"), ("precision",)),
    **dict.fromkeys(
        ("pretrained", "finetune", "weights", "initial_checkpoint", "load_from", "init_checkpoint"), ("init_from",)
    ),
    **dict.fromkeys(
        ("in_chans", "in_channels", "channels"),
        "the training program reads colour images, so leave it out; se_flax.create_model has in_channels",
    ),
    # The data.
    **dict.fromkeys(
        ("dataset", "data", "data_path", "data_root", "dataset_dir", "root", "train_dir", "input_dir"),
        ("data.source", "data.train"),
    ),
    **dict.fromkeys(("bs", "b", "batch", "batchsize", "train_batch_size"), ("data.batch_size",)),
    **dict.fromkeys(("eval_bs", "val_batch_size", "test_batch_size"), ("data.eval_batch_size",)),
    **dict.fromkeys(("img_size", "imgsz", "input_size", "size", "resolution", "crop_size"), ("data.image_size",)),
    **dict.fromkeys(("crop_pct", "val_crop", "crop"), ("data.eval_crop_fraction",)),
    **dict.fromkeys(("num_workers", "n_workers", "nw", "j"), ("data.workers",)),
    **dict.fromkeys(("val_split", "val_fraction", "valid_ratio"), ("data.eval_fraction",)),
    **dict.fromkeys(("hflip", "fliplr", "horizontal_flip", "random_flip"), ("augment.flip",)),
    **dict.fromkeys(("aa", "auto_augment", "autoaugment", "randaugment"), ("augment.randaugment_layers",)),
    **dict.fromkeys(("reprob", "random_erase", "random_erasing"), ("augment.erase",)),
    **dict.fromkeys(("mixup_alpha",), ("augment.mixup",)),
    **dict.fromkeys(("cutmix_alpha",), ("augment.cutmix",)),
    **dict.fromkeys(("color_jitter", "colour_jitter", "jitter"), ("augment.brightness",)),
    # How long, on what, and what is kept.
    **dict.fromkeys(
        ("epoch", "n_epochs", "num_epochs", "nb_epochs", "max_epochs", "total_epochs", "num_train_epochs"), ("epochs",)
    ),
    **dict.fromkeys(
        ("max_steps", "num_steps", "total_steps", "num_train_steps", "iterations", "iters", "max_iter"), ("steps",)
    ),
    **dict.fromkeys(("random_seed", "manual_seed", "rng_seed"), ("seed",)),
    **dict.fromkeys(("log_interval", "log_every", "logging_steps", "print_freq"), ("log_every_steps",)),
    **dict.fromkeys(("tta", "test_time_augmentation"), ("eval_tta",)),
    **dict.fromkeys(("eval_interval", "eval_every", "eval_freq", "val_interval", "val_freq"), ("eval_every_epochs",)),
    **dict.fromkeys(
        ("save_interval", "save_freq", "save_every", "ckpt_freq", "checkpoint_freq"),
        ("checkpoint.every_epochs", "checkpoint.every_steps"),
    ),
    **dict.fromkeys(("save_steps",), ("checkpoint.every_steps",)),
    **dict.fromkeys(("save_total_limit", "checkpoint_hist", "max_to_keep"), ("checkpoint.keep_last",)),
    **dict.fromkeys(("device", "gpu", "gpus", "n_gpu", "num_gpus", "num_devices"), ("parallel.devices",)),
    **dict.fromkeys(("ddp", "dist", "multihost"), ("parallel.distributed",)),
    **dict.fromkeys(("sync_bn", "syncbn", "sync_batchnorm"), ("parallel.batch_norm",)),
    **dict.fromkeys(
        ("output", "output_dir", "out", "out_dir", "save_dir", "save_path", "log_dir", "logdir", "checkpoint_dir"),
        _WORKDIR,
    ),
    **dict.fromkeys(("resume", "resume_from", "resume_from_checkpoint"), _WORKDIR),
}


def advice(given: str, allowed: Iterable[str], flag: str = "") -> str:
    """What to say of a setting that does not exist: by its meaning, else by its letters.

    Args:
      given: its name, with or without the section that it was looked for in: `optim.lr`, `batch-size`.
      allowed: all settings.
      flag: what is written in front of a setting.

    Returns:
      The end of a sentence.
    """
    allowed = list(allowed)
    word = given.lower().replace("-", "_").rpartition(".")[2]
    # The same word in another section is no synonym but the thing itself.
    found = [name for name in allowed if name.rpartition(".")[2] == word]
    meaning = _MEANINGS.get(word, ())
    if not found and isinstance(meaning, str):
        return meaning
    found = found or [name for name in meaning if name in allowed][:1]
    return f"here it is {' or '.join(flag + name for name in found)}" if found else closest(given, allowed)


def known(given: str, allowed: Iterable[str]) -> bool:
    """Whether `advice` knows what a word means."""
    return not advice(given, allowed).startswith(("closest: ", "allowed: "))
