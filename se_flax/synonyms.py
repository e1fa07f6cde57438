"""Arguments of other libraries and their counterparts in this one, for error messages.

Spelling does not find them: `pretrained` resembles no attribute of a network, `in_chans` resembles several.
"""

from collections.abc import Iterable, Mapping

from se_flax.errors import closest

_TRAINED = "trained weights come from se_flax.load_pretrained(NAME), without this word"
_SIZE = "a network takes images of any size, so leave it out; se_flax.Preprocess has image_size"
_POOLED = "num_classes=0 gives the pooled features, model.apply(..., return_features=True) the maps of every stage"
_NORM = "give norm=functools.partial(se_flax.BatchNorm, momentum=..., epsilon=...)"
_REDUCTION = "give attention=functools.partial(se_flax.SqueezeExcite, reduction=16)"
_CALL = "it belongs to the call: model.apply(variables, images, train=True)"

NETWORK: Mapping[str, str] = {
    **dict.fromkeys(("classes", "n_classes", "num_class", "nb_classes", "num_labels", "num_outputs"), "num_classes"),
    **dict.fromkeys(("in_chans", "in_ch", "channels", "input_channels", "num_channels", "n_channels"), "in_channels"),
    **dict.fromkeys(("drop", "dropout", "dropout_rate", "dropout_prob"), "drop_rate"),
    **dict.fromkeys(
        ("drop_path", "stochastic_depth", "stochastic_depth_prob", "stochastic_depth_rate", "drop_connect_rate"),
        "drop_path_rate",
    ),
    **dict.fromkeys(("attn", "attn_layer", "se", "se_layer", "se_module", "attention_layer"), "attention"),
    **dict.fromkeys(("norm_layer", "norm_cls", "bn", "batch_norm"), "norm"),
    **dict.fromkeys(("act_layer", "act_fn", "activation", "nonlinearity"), "act"),
    **dict.fromkeys(("layers", "num_layers", "stage_sizes", "num_blocks", "blocks"), "depths"),
    **dict.fromkeys(("half_precision", "mixed_precision", "precision", "fp16", "bf16"), "dtype"),
    **dict.fromkeys(("pretrained", "weights", "checkpoint_path", "pretrained_cfg"), _TRAINED),
    **dict.fromkeys(("img_size", "image_size", "input_size", "input_shape", "resolution"), _SIZE),
    **dict.fromkeys(("features_only", "out_indices", "return_features", "global_pool", "include_top"), _POOLED),
    **dict.fromkeys(("bn_momentum", "bn_eps", "bn_epsilon", "momentum", "epsilon", "eps"), _NORM),
    **dict.fromkeys(("rd_ratio", "se_ratio", "reduction", "reduction_ratio"), _REDUCTION),
    **dict.fromkeys(("train", "training", "is_training", "deterministic"), _CALL),
}
"""Our attribute, or a sentence of advice, by the foreign name."""


def advice(given: str, allowed: Iterable[str]) -> str:
    """The advice for an unknown attribute of a network, by meaning or else by spelling.

    Args:
      given: the attribute that was given to `create_model`.
      allowed: the network's attributes.
    """
    allowed, meaning = set(allowed), NETWORK.get(given.lower(), "")
    if " " in meaning:
        return meaning
    return f"here it is {meaning}" if meaning in allowed else closest(given, allowed)
