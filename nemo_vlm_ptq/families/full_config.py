"""config.json as transformers' class, with the defaults that it leaves out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from nemo_vlm_ptq.families.base import Config

ConfigReader = Callable[[Config], Any]


def full_config_reader(*names: str) -> ConfigReader:
    """Return the function that makes transformers' config of a whole model of config.json.

    Args:
        names: classes of transformers; the first is that of a config whose model_type is of none.
    """

    def full_config(config: Config) -> Any:
        import transformers

        classes = [getattr(transformers, name) for name in names]
        kind = config.get("model_type")
        chosen = next((one for one in classes if one.model_type == kind), classes[0])
        return chosen.from_dict(copy.deepcopy(dict(config)))  # which changes its argument

    return full_config


def text_config_reader(full_config: ConfigReader) -> ConfigReader:
    """Return the function that makes transformers' config of the decoder of config.json."""
    return lambda config: full_config(config).text_config
