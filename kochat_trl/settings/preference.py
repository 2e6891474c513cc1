"""DPOConfig and KTOConfig: TRL's, and where the policy starts."""

from dataclasses import dataclass, field

import trl


@dataclass
class DPOConfig(trl.DPOConfig):
    """Settings of `PairTrainer`."""

    sft_model_path: str | None = field(default=None, metadata={"help": "What the policy starts from, and is held to."})


@dataclass
class KTOConfig(trl.KTOConfig):
    """Settings of `LabelTrainer`."""

    sft_model_path: str | None = field(default=None, metadata={"help": "What the policy starts from, and is held to."})
