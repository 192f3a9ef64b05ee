"""The kinds of datasets a run file can name, told apart by `class_name`."""

from lme_data.dataset.debug import DebugClassArgs, DebugDatasetArgs
from lme_data.dataset.huggingface import HuggingFaceClassArgs, HuggingFaceDatasetArgs
from lme_data.dataset.megatron import MegatronClassArgs, MegatronDatasetArgs
from lme_data.dataset.presets import PresetClassArgs, PresetDatasetArgs

DatasetArgs = MegatronDatasetArgs | HuggingFaceDatasetArgs | DebugDatasetArgs | PresetDatasetArgs
"""One entry of `datasets`."""

__all__ = [
    "DatasetArgs",
    "DebugClassArgs",
    "DebugDatasetArgs",
    "HuggingFaceClassArgs",
    "HuggingFaceDatasetArgs",
    "MegatronClassArgs",
    "MegatronDatasetArgs",
    "PresetClassArgs",
    "PresetDatasetArgs",
]
