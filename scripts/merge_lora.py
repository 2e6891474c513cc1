"""Merge a LoRA adapter (SFT, PPO or reward) into the base that it was trained on.

python scripts/merge_lora.py --adapter outputs/kogpt2/ppo --output outputs/kogpt2/merged
"""

import argparse
import logging

from kochat_trl.errors import run
from kochat_trl.models.remote import allow_remote_code
from kochat_trl.runs.merge import merge_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", required=True, help="folder with adapter_config.json")
    parser.add_argument("--output", required=True, help="empty or new folder for the merged model")
    trust = "run code that comes with the model; only if you trust who made it"
    parser.add_argument("--trust-remote-code", action="store_true", help=trust)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.trust_remote_code:
        allow_remote_code("--trust-remote-code")
    merge_adapter(arguments.adapter, arguments.output)
    print(f"Written to {arguments.output}.")


if __name__ == "__main__":
    run(main)
