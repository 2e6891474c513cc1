"""RLHF recipes for small Korean language models, on TRL.

Start reading in recipes/ppo.py, then ppo/objective.py and `PPOTrainer._update` in ppo/trainer.py. docs/architecture.md
has every room, three walks through the code, and where to add what.
"""

import logging
import os

# TRL sends usage statistics unless told not to; a run on local files touches no network here.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# bitsandbytes notes every cast and every optional kernel that it does without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
