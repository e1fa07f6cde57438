"""The saved model of a finished run, a folder that `se_flax.load_pretrained` reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import se_flax
from se_flax.errors import UserError
from train.build import network_attributes
from train.config import Config
from train.run.evaluate import Result


def save_model(
    folder: Path,
    config: Config,
    variables: Mapping[str, Any],
    class_names: Sequence[str],
    result: Result | None,
    step: int,
) -> None:
    """Saves the network of a run with its preprocessing and class names; a folder of an earlier end is replaced.

    Args:
      folder: where to.
      config: the completed settings.
      variables: what evaluation uses: the moving average where there is one.
      class_names: of the data.
      result: the last evaluation.
      step: updates done.

    Raises:
      UserError: the disk is full, or the folder holds something else.
    """
    data = config.data
    # An evaluation with the whole image squashes it, as `train.data.images.eval_image` says.
    whole = data.eval_crop_fraction == 1.0
    preprocess = se_flax.Preprocess(
        image_size=data.image_size,
        crop=data.eval_crop_fraction,
        crop_mode="squash" if whole else "center",
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
        exif_orientation=data.exif_orientation,
    )
    classes = config.model.num_classes or len(class_names)
    provenance: dict[str, Any] = {"data": data.source, "steps": step, "init_from": config.init_from or None}
    if result is not None:
        counts = {f"{name}_count": hits for name, hits in result.counts().items()}
        views = {} if config.eval_tta == "none" else {"tta": config.eval_tta}
        provenance["evaluation"] = {"count": result.count, **counts, **views}
    try:
        se_flax.save_pretrained(
            folder,
            config.model.name,
            variables,
            arguments={"num_classes": classes, **network_attributes(config)},
            preprocess=preprocess,
            labels=class_names if len(class_names) == classes else None,
            provenance=provenance,
            overwrite=True,
        )
    except UserError as error:
        raise UserError(f"the run is complete and its checkpoints are whole, but {error}") from error
